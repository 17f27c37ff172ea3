"""Operations on models whose parameters are sharded over processes, by FSDP2 and by tensor parallelism.

One launch of two processes does the work of all quick tests in turn; each test looks at what one function returned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from neuronsurgery import surgery
from neuronsurgery.pytorch.sharding import held, is_sharded, whole
from neuronsurgery.surgery import Lowest, Units
from tests.processes import NEEDS_FORK, in_processes
from tests.replica_work import bank_of, counting, refusal, same_everywhere
from tests.sharded_work import (
    FIRST,
    Feed,
    apart,
    blocks,
    inputs,
    mesh_of_all,
    operated_run,
    parallel,
    shard,
    train,
    weights,
)

dcp: Any = checkpoint  # which does not export what it documents

pytestmark = NEEDS_FORK
Adam = torch.optim.Adam


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, dampening=0.1)


def by_columns(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % 2 == 0 else None


# -- what each process does ------------------------------------------------------------------------------------------


def gathered_runs(rank: int) -> dict[str, Any]:
    """Runs of sharded models beside runs of plain ones."""
    plain, sharded = operated_run(blocks()), operated_run(blocks(), shard)
    columns = operated_run(
        blocks(), lambda model: shard(model, shard_placement_fn=by_columns, reshard_after_forward=False), momentum
    )
    root = operated_run(
        blocks(), lambda model: fully_shard(model, mesh=mesh_of_all()), torch.optim.NAdam, operates_first=True
    )
    other = operated_run(blocks(), kind=torch.optim.NAdam, operates_first=True)
    return {
        "operated": plain["operated"],
        "apart": apart(plain, sharded),
        "sizes": [plain["sizes"], sharded["sizes"]],
        "columns, kept whole, SGD": apart(operated_run(blocks(), kind=momentum), columns),
        "operated before, root, NAdam": apart(other, root),
        "problems": [problem for run in (sharded, columns, root) for problem in run["problems"]],
    }


def long_run(rank: int) -> float:
    return apart(operated_run(blocks(), num_steps=100), operated_run(blocks(), shard, num_steps=100))


def parts_held(rank: int) -> dict[str, Any]:
    """Which rows each process holds, and whether the lists of parameters stay what they were."""
    model = shard(blocks())
    optimizer = Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    before = [id(parameter) for parameter in model.parameters()]
    surgery.knife(model, Units({"0.up": [1, 6]}), optimizer=optimizer)
    train(model, optimizer, 1)
    model(inputs(0))
    bank = bank_of(model, "0.up")
    old = held(bank.frozen_weight).clone()
    train(model, optimizer, 3)
    return {
        "capacity": len(bank.frozen_weight),
        "here": len(held(bank.frozen_weight)),
        "frozen": bool(torch.equal(old, held(bank.frozen_weight))),
        "same parameters": before == [id(parameter) for parameter in _as_shards(model).parameters()],
        "sharded": all(is_sharded(parameter) for parameter in model.parameters()),
        "classes": [type(part).__mro__.index(Feed) > 0 and isinstance(part, Feed) for part in (model[0], model[1])],
        "methods": [callable(getattr(model[0], name)) for name in ("unshard", "reshard")],
    }


def _as_shards(model: Any) -> Any:
    for part in (model, model[0], model[1], model[2]):
        part.reshard()
    return model


def half_precision(rank: int) -> dict[str, Any]:
    """Passes in bfloat16: what the composites give, to the bit, and in what the rows are kept."""
    model = shard(blocks(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    before = model(inputs(1)).detach()
    report = surgery.knife(model, FIRST, optimizer=optimizer, verify=inputs(1))
    same = bool(torch.equal(before, model(inputs(1)).detach()))
    kept = weights(model)
    train(model, optimizer, 3, 10)
    surgery.undo(model, report, optimizer=optimizer)
    again = {name: whole(model.get_submodule(name).weight) for name in report.operated}
    undone = all(
        torch.equal(again[name][list(units)], kept[f"{name}.composite.frozen_weight"][: len(units)])
        for name, units in report.operated.items()
    )
    return {"dtype": str(before.dtype), "same": same, "undone": undone}


def accumulated(rank: int) -> dict[str, Any]:
    """Several backward passes for one step, reduced at each or at the last."""

    def run(model: Any, *, waits: bool) -> tuple[str, dict[str, Any]]:
        optimizer = Adam(model.parameters(), lr=0.01)
        told = ""
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2):
                if waits:
                    model.set_requires_gradient_sync(part == 1)
                (model(inputs(2 * step + part)) - 1).square().mean().backward()
                if waits and part == 0 and step == 1:
                    told = refusal(lambda: surgery.knife(model, FIRST, optimizer=optimizer))
            optimizer.step()
            surgery.knife(model, Units({"0.up": [step]}), optimizer=optimizer)
        return told, {"weights": weights(model), "output": model(inputs(1)).detach(), "operated": []}

    _, plain = run(blocks(), waits=False)
    told, waiting = run(shard(blocks()), waits=True)
    return {"told": told, "apart": apart(plain, waiting)}


def checkpoints(rank: int, folder: Path) -> dict[str, Any]:
    """Whole and sharded states, in plain and in sharded models."""
    model = shard(blocks())
    optimizer = Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    surgery.knife(model, FIRST, optimizer=optimizer)
    train(model, optimizer, 2, 10)
    expected, output = weights(model), model(inputs(1)).detach()
    complete = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    sharded = get_model_state_dict(model)
    found: dict[str, Any] = {}

    def same(other: Any) -> bool:
        own = weights(other)
        return own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)

    def restored(other: Any, state: Any) -> list[bool]:
        surgery.restore(other, state)
        return [same(other), bool(torch.equal(other(inputs(1)).detach(), output))]

    found["whole into plain"] = restored(blocks(1), complete)
    found["whole into sharded"] = restored(shard(blocks(1)), complete)
    found["sharded into sharded"] = restored(shard(blocks(1)), sharded)
    dcp.save({"model": sharded}, checkpoint_id=folder)
    train(model, optimizer, 2, 20)
    into = {"model": get_model_state_dict(model)}
    dcp.load(into, checkpoint_id=folder)
    found["loaded into operated"] = restored(model, into["model"])
    fresh = shard(blocks(1))
    state: dict[str, Any] = get_model_state_dict(fresh)
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, entry in entries.items():
        if "composite." in name and isinstance(entry, dcp.TensorStorageMetadata):
            state[name.removeprefix("model.")] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load({"model": state}, checkpoint_id=folder)
    found["loaded into fresh"] = restored(fresh, state)
    return found


def split_runs(rank: int) -> dict[str, Any]:
    """Runs of models whose units are computed by different processes."""
    plain = operated_run(blocks(), operates_first=True)
    split = operated_run(blocks(), parallel, operates_first=True)
    model = parallel(blocks())
    surgery.knife(model, Units({"0.up": [1, 2]}))  # all of them on the first process
    model(inputs(0))
    state = model.state_dict()
    other = parallel(blocks(1))
    surgery.restore(other, state)
    return {
        "apart": apart(plain, split),
        "problems": split["problems"],
        "restored": bool(torch.equal(other(inputs(1)), model(inputs(1)))),
        "outputs": float((model(inputs(1)) - blocks()(inputs(1))).detach().abs().max()),
    }


def own_data(rank: int) -> dict[str, Any]:
    """Processes with other data and other seeds."""
    model = shard(blocks())
    torch.manual_seed(rank)
    optimizer = Adam(model.parameters(), lr=0.01)
    operated = []
    for round_ in range(3):
        with surgery.observe(model, optimizer) as evidence:
            for step in range(3):
                optimizer.zero_grad()
                (model(inputs(100 * rank + 10 * round_ + step, 4 + 4 * rank)) - 1).square().mean().backward()
                optimizer.step()
        criterion = Lowest(0.25, of="dormant" if round_ % 2 else "stagnant")
        report = surgery.knife(model, criterion, evidence=evidence, optimizer=optimizer, cooldown=0)
        operated.append({name: list(units) for name, units in report.operated.items()})
    return {"operated": operated, "weights": weights(model)}


def bounded(rank: int) -> dict[str, Any]:
    """Rows that go again, of a sharded model and of a plain one, and operations of a schedule."""

    def run(model: Any) -> dict[str, Any]:
        optimizer = Adam(model.parameters(), lr=0.01)
        train(model, optimizer, 2)
        numbers = []
        for _ in range(2):  # the first active member never moves
            surgery.knife(model, Units({"0.up": [1]}), optimizer=optimizer, cooldown=0)
        before = model(inputs(1)).detach()
        numbers.append(surgery.consolidate(model).num_rows)
        moved = float((model(inputs(1)) - before).detach().abs().max())
        surgery.knife(model, Units({"2": [0, 6]}), optimizer=optimizer, retire=3)
        train(model, optimizer, 5, 10)
        numbers.append(surgery.consolidate(model, optimizer=optimizer).num_rows)
        how: dict[str, Any] = {
            "operate": surgery.Every(2),
            "cooldown": 0,
            "generator": torch.Generator().manual_seed(7),
        }
        with surgery.Schedule(model, optimizer, "stagnant", **how) as schedule:
            for step in range(4):
                train(model, optimizer, 1, 20 + step)
                schedule.step()
            numbers.append(schedule.num_operations)
        output = model(inputs(2)).detach()
        return {"weights": weights(model), "output": output, "operated": numbers, "moved": moved}

    plain, sharded = run(blocks()), run(shard(blocks()))
    return {"apart": apart(plain, sharded), "numbers": sharded["operated"], "moved": sharded["moved"]}


def refused(rank: int) -> dict[str, Any]:
    """What each process is told of what cannot be done, or went wrong on one of them."""
    model = shard(blocks())
    optimizer = Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    surgery.knife(model, Units({"0.up": [1]}), optimizer=optimizer)
    train(model, optimizer, 1, 10)
    before = weights(model)

    def fails(weight: torch.Tensor) -> None:
        weight.fill_(float("nan") if rank else 0.5)

    told: dict[str, Any] = {
        "one fails": refusal(lambda: surgery.knife(model, FIRST, optimizer=optimizer, init=fails)),
        "widen": refusal(lambda: surgery.widen(model, Units({"2": [0]}), optimizer=optimizer)),
        "mirror": refusal(lambda: surgery.mirror(model, onto=blocks())),
        "redo": refusal(lambda: surgery.redo(model, Units({"2": [0]}), optimizer=optimizer)),
        "reset": refusal(lambda: surgery.reset(model, ["2"], optimizer=optimizer)),
        "probe": refusal(lambda: surgery.probe(model, [inputs(0)], lambda model, x: model(x).sum())),
        "observe": refusal(lambda: surgery.observe(model).__enter__()),
        "plan": refusal(lambda: surgery.knife(model, Units({"2": [rank]}), optimizer=optimizer, max_growth=2.0 + rank)),
    }
    inside: list[str] = []
    handle = model[0].up.register_forward_hook(lambda *_: inside.append(refusal(lambda: surgery.discover(model))))
    model(inputs(0))
    handle.remove()
    after = weights(_as_shards(model))
    told |= {"inside": inside[0], "same": all(torch.equal(before[name], after[name]) for name in before)}
    cast = blocks()
    fully_shard(cast[2], mesh=mesh_of_all(), mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    told["cast"] = surgery.discover(cast).declined.get("2", "")
    line = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    parallelize_module(line, mesh_of_all(), {"0": ColwiseParallel()})
    told["line"] = surgery.discover(line).declined.get("0", "")
    told["row-wise"] = surgery.discover(parallel(blocks())).declined["0.down"]
    early = blocks()
    surgery.knife(early, Units({"0.up": [1]}))
    parallel(early)
    told["not attached"] = refusal(lambda: early(inputs(0)))
    return told


def traffic(rank: int) -> dict[str, Any]:
    """What operations on four units of a layer send, of layers of different widths."""
    found = {}
    for width in (64, 256):
        model = shard(blocks(width=width))
        optimizer = Adam(model.parameters(), lr=0.01)
        train(model, optimizer, 1)
        sent = []
        for operation in range(2):
            with counting() as own:
                surgery.knife(model, Units({"0.up": [0, 1, 4, 6]}), optimizer=optimizer, max_growth=9.0)
            sent.append(own.num_bytes)
            train(model, optimizer, 1, operation)
        found[str(width)] = sent
    return found


# -- what is asked of it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[..., Any]], list[Any]]:
    """What each process returned of a piece of work."""
    folder = tmp_path_factory.mktemp("sharded")
    quick = (gathered_runs, parts_held, half_precision, accumulated, split_runs, own_data, bounded, refused, traffic)

    def work(rank: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        return {each.__name__: each(rank) for each in quick} | {"checkpoints": checkpoints(rank, folder / "saved")}

    results = in_processes(work, folder)
    return lambda work: [result[work.__name__] for result in results]


Done = Callable[[Callable[..., Any]], list[Any]]
GROUP = "Replicas"


@pytest.mark.situation(GROUP, "FSDP2, operated on four times in training, beside a plain model", "works")
def test_a_sharded_model_stays_the_plain_one_that_is_operated_on_alike(done: Done):
    for found in done(gathered_runs):
        for name in ("apart", "columns, kept whole, SGD", "operated before, root, NAdam"):
            assert found[name] <= 1e-6, name
        assert found["problems"] == []
        assert found["sizes"][0] == found["sizes"][1]
        assert sum(len(units) for each in found["operated"] for units in each.values()) > 8


def test_each_process_holds_a_part_of_the_frozen_rows_and_the_parameters_stay_what_they_were(done: Done):
    for found in done(parts_held):
        assert found["here"] * 2 == found["capacity"]
        assert found["frozen"] and found["same parameters"] and found["sharded"]
        assert all(found["classes"]) and all(found["methods"])


@pytest.mark.situation(GROUP, "FSDP2 with MixedPrecisionPolicy(param_dtype=bfloat16)", "works")
def test_composites_give_in_half_precision_what_the_old_units_gave_to_the_bit(done: Done):
    for found in done(half_precision):
        assert found == {"dtype": "torch.bfloat16", "same": True, "undone": True}


@pytest.mark.situation(GROUP, "gradient accumulation without reduction (set_requires_gradient_sync)", "works")
def test_accumulated_gradients_are_reduced_before_rows_are_renewed(done: Done):
    for found in done(accumulated):
        assert found["apart"] <= 1e-6
        assert "operate after optimizer.step()" in found["told"]


@pytest.mark.situation(GROUP, "whole and sharded checkpoints, DCP, restored into plain and sharded models", "works")
def test_checkpoints_of_sharded_models_are_restored_bit_for_bit(done: Done):
    for found in done(checkpoints):
        assert all(all(each) for each in found.values()), found
        assert len(found) == 5


@pytest.mark.situation(GROUP, "tensor parallel feed-forward parts (ColwiseParallel, RowwiseParallel)", "works")
def test_a_model_with_split_units_stays_the_plain_one_that_is_operated_on_alike(done: Done):
    for found in done(split_runs):
        assert found["apart"] <= 1e-5
        assert found["outputs"] <= 1e-6 and found["restored"] and found["problems"] == []


def test_processes_with_other_data_and_seeds_choose_and_draw_alike(done: Done):
    results = done(own_data)
    assert same_everywhere(results)
    assert all(any(each.values()) for each in results[0]["operated"])


@pytest.mark.situation(GROUP, "FSDP2: consolidation, retirement, schedules", "works")
def test_rows_leave_a_sharded_model_as_they_leave_a_plain_one(done: Done):
    for found in done(bounded):
        assert found["apart"] <= 1e-6 and found["moved"] <= 1e-6
        assert found["numbers"][:2] == [2, 4] and found["numbers"][2] > 0


@pytest.mark.situation(GROUP, "one process fails, or is asked for what sharded layers do not allow", "refused")
def test_what_cannot_be_done_is_refused_on_all_processes(done: Done):
    results = done(refused)
    for found in results:
        assert "process 1: DrawError" in found["one fails"] and "Nothing was changed" in found["one fails"]
        for verb in ("widen", "mirror", "redo", "reset"):
            assert "sharded over processes" in found[verb], verb
        assert "surgery.observe(model, optimizer)" in found["probe"]
        assert "observe(model, optimizer)" in found["observe"]
        assert "do not agree on the plan" in found["plan"]
        assert "in the middle of a forward" in found["inside"]
        assert found["same"]
        assert "output_dtype" in found["cast"]
        assert "in a Sequential" in found["line"]
        assert "in another way than ColwiseParallel" in found["row-wise"]
        assert "surgery.attach" in found["not attached"]


def test_an_operation_sends_as_much_as_it_has_rows_whatever_the_width_of_the_layer(done: Done):
    for found in done(traffic):
        assert found["64"] == found["256"]
        assert found["64"][1] <= 2 * found["64"][0]


# -- slow ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sharded_and_a_plain_model_agree_after_a_hundred_steps(tmp_path: Path):
    assert max(in_processes(long_run, tmp_path)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 4])
def test_twenty_runs_of_sharded_models_are_the_same_on_all_processes(num: int, tmp_path: Path):
    def work(rank: int) -> list[dict[str, Any]]:
        return [operated_run(blocks(seed), shard) for seed in range(20)]

    results = in_processes(work, tmp_path, num)
    assert same_everywhere(results)
    assert all(each["problems"] == [] for each in results[0])


@pytest.mark.slow
def test_replicated_shards_stay_the_plain_model(tmp_path: Path):
    def work(rank: int) -> list[float]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        return [apart(operated_run(blocks()), operated_run(blocks(), lambda model: shard(model, mesh=mesh)))]

    assert max(max(each) for each in in_processes(work, tmp_path, 4)) <= 1e-6
