"""Operations on a model that several processes hold: by all of them and alike, or by none, and no one waits for ever.

One launch of two processes does the work of all quick tests in turn; each test looks at what one function returned.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.pytorch.digests import weights_of
from neuronsurgery.surgery import Every, Lowest, Plateau, Units
from tests.processes import NEEDS_FORK, in_processes
from tests.replica_work import (
    LOWEST,
    bank_of,
    batch,
    counting,
    network,
    operated_run,
    pair,
    refusal,
    same_everywhere,
    take,
)
from tests.snapshots import bits, snapshot

pytestmark = NEEDS_FORK
CHOSEN = Units({"0": [1], "2": [0, 3]})


# -- what each process does ------------------------------------------------------------------------------------------


def runs(rank: int) -> list[dict[str, Any]]:
    return [operated_run(rank, seed, 12, wrapped_first=bool(seed % 2)) for seed in range(2)]


def refused(rank: int) -> dict[str, Any]:
    """What each process is told when something goes wrong on one of them, and what of its model changed by it."""
    replica, optimizer = pair(rank)
    take(replica, optimizer, batch(0, rank))
    surgery.knife(replica, CHOSEN, optimizer=optimizer)
    take(replica, optimizer, batch(1, rank))
    generator = torch.Generator().manual_seed(rank)
    knife = functools.partial(surgery.knife, replica, CHOSEN, optimizer=optimizer, generator=generator, cooldown=0)
    told: dict[str, Any] = {}

    def tried(name: str, call: Callable[[], object]) -> None:
        before = snapshot(replica.module, [optimizer], generator)
        told[name] = refusal(call)
        after = snapshot(replica.module, [optimizer], generator)
        told[f"{name}: changed"] = [label for label in before if before[label] != after.get(label)]

    tried("draw", lambda: knife(init=torch.nn.init.zeros_ if not rank else lambda weight: weight.fill_(float("nan"))))
    tried("batch", lambda: knife(verify=torch.zeros(2, 4 + rank)))
    with mock.patch(
        "neuronsurgery.pytorch.operating.num_weights", side_effect=[1, RuntimeError("late") if rank else 2, 2]
    ):
        tried("record", lambda: knife())
    with mock.patch.object(surgery.Report, "__post_init__", side_effect=KeyboardInterrupt if rank else None):
        told["interrupt"] = ""
        try:
            knife()
        except KeyboardInterrupt:
            told["interrupt"] = "interrupted"
        except surgery.DistributedError as error:
            told["interrupt"] = str(error)
    tried("plan", lambda: surgery.knife(replica, Units({"0": [99]}), optimizer=optimizer))
    tried("options", lambda: knife(retire=3 + rank))
    tried("functions", knife if rank else lambda: surgery.consolidate(replica))
    if rank:
        replica.zero_grad()
    tried("evidence", lambda: surgery.knife(replica, "stagnant", optimizer=optimizer, cooldown=0))
    told["number"] = surgery.knife(replica, CHOSEN, optimizer=optimizer).operation
    told["weights"] = weights_of(replica.module)
    return told


def own_initializers(rank: int) -> dict[str, Any]:
    """An initializer that draws on each process what it likes."""
    own = torch.Generator().manual_seed(rank)
    init = lambda weight: weight.copy_(torch.randn(weight.shape, generator=own))  # noqa: E731
    replica, optimizer = pair(rank)
    take(replica, optimizer, batch(0, rank))
    surgery.redo(replica, Units({"0": [5]}), optimizer=optimizer, init=init)
    surgery.knife(replica, CHOSEN, optimizer=optimizer, init=init)
    before = weights_of(replica.module)
    told = refusal(lambda: surgery.reset(replica, ["4"], optimizer=optimizer, init=init))
    return {"weights": before, "same": before == weights_of(replica.module), "told": told}


def diverged(rank: int) -> dict[str, Any]:
    """A frozen row, then a weight, that one process has otherwise."""
    replica, optimizer = pair(rank)
    take(replica, optimizer, batch(0, rank))
    surgery.knife(replica, CHOSEN, optimizer=optimizer)
    found = {"before": [str(each) for each in surgery.check(replica, optimizer).problems]}
    row = bank_of(replica.module, "2").frozen_weight[1]
    kept = row.clone()
    row += rank
    found["row"] = [str(each) for each in surgery.check(replica, optimizer).about("replica")]
    found["knife"] = [refusal(lambda: surgery.knife(replica, Units({"0": [2]}), optimizer=optimizer))]
    row.copy_(kept)
    with torch.no_grad():
        replica.module[4].bias += rank
    found["weight"] = [each.where for each in surgery.check(replica).about("replica")]
    found["alone"] = [str(each) for each in surgery.check(replica.module).about("replica")]
    return found


def other_structure(rank: int) -> str:
    model = network()
    if rank:
        surgery.knife(model, Units({"0": [1]}))
    return refusal(lambda: surgery.knife(surgery.replicated(model), CHOSEN))


def alone(rank: int) -> dict[str, Any]:
    """A model that nothing wraps, operated on by one process only: the other has no part in it."""
    if rank:
        return {"calls": 0, "notes": []}
    with counting() as sent:
        report = surgery.knife(network(), CHOSEN)
    return {"calls": len(sent.calls), "notes": list(report.notes)}


def traffic(rank: int) -> dict[str, Any]:
    """What an operation on four units of layer 2 sends, whatever the model's size, and what an observation does."""
    found = {}
    for name, width, depth in (("small", 16, 1), ("wide", 160, 1), ("deep", 16, 10)):
        replica, optimizer = pair(rank, network(width, depth))
        take(replica, optimizer, batch(0, rank))
        with counting() as sent:
            surgery.knife(replica, Units({"2": [1, 2, 3, 15]}), optimizer=optimizer)
        found[name] = sent.calls
        with counting() as sent, surgery.observe(replica, optimizer) as evidence:
            take(replica, optimizer, batch(1, rank))
            take(replica, optimizer, batch(2, rank))
        found[f"{name}, observing"] = sent.calls
        with counting() as sent:
            surgery.pooled(replica, evidence)
        found[f"{name}, pooled"] = sent.calls
    return found


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.first(x))))
        return out


def buffers(rank: int) -> dict[str, Any]:
    """What DistributedDataParallel sends with each forward, of replicas operated on before and after wrapping."""
    found: dict[str, Any] = {}
    units = Units({"first": [1, 2]})
    for when in ("after", "before", "unknown", "grown"):
        torch.manual_seed(0)
        model = Normed()
        if when in ("before", "unknown"):
            torch.manual_seed(rank if when == "before" else 0)
            surgery.knife(surgery.replicated(model) if when == "before" else model, units)
        replica, optimizer = pair(rank, model)
        take(replica, optimizer, batch(0, rank))
        if when in ("after", "grown"):
            surgery.knife(replica, units, optimizer=optimizer)
        if when == "grown":
            surgery.knife(replica, Units({"first": [3, 4, 5, 6, 7]}), optimizer=optimizer)
        take(replica, optimizer, batch(1, rank))
        found[when] = sorted(name for name in replica.named_module_buffers if "composite" in name)
        replica.eval()(batch(2, rank))
        found[f"{when}: held"] = [str(bits(value)) for value in model.state_dict().values()]
    return found


def kinds_of_replicas(rank: int) -> dict[str, Any]:
    """The options of DistributedDataParallel, an operation on the first step and later, and accumulated gradients."""
    found = {}
    for option in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "broadcast_buffers"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch call one of them otherwise
            replica, optimizer = pair(rank, None, **{option: option != "broadcast_buffers"})
        for step in range(4):
            if step in (0, 2):
                report = surgery.knife(replica, CHOSEN, optimizer=optimizer, verify=batch(9, rank))
            with replica.no_sync():
                if option != "static_graph":  # of which torch says that it cannot accumulate so
                    (replica(batch(step, rank)) - 1).square().mean().backward()
            (replica(batch(step + 10, rank)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[option] = {"weights": weights_of(replica.module), "operation": report.operation}
    return found


def measured(rank: int) -> dict[str, Any]:
    """Evidence of activations and gradients, with and without an optimizer; probing; a look at an example."""
    replica, optimizer = pair(rank)
    accumulated = pair(rank)[0]
    with surgery.observe(replica) as without, surgery.observe(accumulated, optimizer_of(accumulated)) as read:
        for step in range(2):
            take(replica, optimizer, batch(step, rank))
            reduced = [replica.module[i].weight.grad.norm(dim=1) for i in (0, 2)]
        with accumulated.no_sync():
            (accumulated(batch(0, rank)) - 1).square().mean().backward()
        (accumulated(batch(1, rank)) - 1).square().mean().backward()
        optimizer_of(accumulated).step()
    activity = surgery.Quantity.UPDATE_ACTIVITY
    probed = surgery.probe(replica, [batch(5, rank)], lambda model, x: model(x).square().mean())
    surgery.discover(replica, example=batch(5, rank))
    take(replica, optimizer, batch(6, rank))  # which torch would refuse, had a pass of those before been its own
    pooled = surgery.pooled(replica, probed)
    h = surgery.Quantity.ACTIVATION
    return {
        "without": {name: without.measured(name)[activity] for name in without.sites},
        "reduced": reduced,
        "read": {name: read.measured(name)[activity] for name in read.sites},
        "num": [pooled.num_samples("0", h), probed.num_samples("0", h), without.num_steps, read.num_steps],
        "pooled": pooled.measured("0")[h],
        "own": probed.measured("0")[h],
    }


@functools.cache
def optimizer_of(replica: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(replica.parameters(), lr=0.1)


def methods(rank: int) -> dict[str, Any]:
    """Methods beside knife, after each of which the processes hold the same; reports and refusals."""
    found: dict[str, Any] = {}
    replica, optimizer = pair(rank)
    probe = functools.partial(surgery.probe, replica, [batch(0, rank)], lambda model, x: model(x).square().mean())
    how: dict[str, Any] = {"optimizer": optimizer}
    some = {"evidence": None, **how}
    calls: dict[str, Callable[[], Any]] = {
        "widen": lambda: refusal(lambda: surgery.widen(replica, Units({"0": [1]}), **how)),
        "redo": lambda: surgery.redo(replica, LOWEST, **{**some, "evidence": probe()}),
        "regrama": lambda: surgery.regrama(replica, Lowest(0.25, of="grama"), **{**some, "evidence": probe()}),
        "reborn": lambda: surgery.reborn(replica, LOWEST, over_active=1.01, **{**some, "evidence": probe()}),
        "random": lambda: surgery.knife(replica, surgery.Random(0.2), **how),
        "stagnant": lambda: surgery.knife(replica, Lowest(0.2), cooldown=0, **how),
        "undo": lambda: surgery.undo(replica, found["last"], **how),
        "retire": lambda: surgery.knife(replica, Units({"2": [1]}), retire=1, **how),
        "consolidate": lambda: surgery.consolidate(replica, batches=[batch(3, rank)], tolerance=0.5, **how),
        "reset": lambda: surgery.reset(replica, ["4"], **how),
        "shrink_and_perturb": lambda: surgery.shrink_and_perturb(replica, **how),
        "reset_optimizer": lambda: surgery.reset_optimizer(replica, **how),
        "restore": lambda: surgery.restore(replica, replica.state_dict(), optimizer),
        "attach": lambda: surgery.attach(replica, optimizer),
        "plasticity_injection": lambda: surgery.plasticity_injection(replica, "4", **how),
    }
    for name, call in calls.items():
        take(replica, optimizer, batch(len(found), rank))
        report = call()
        found["last"] = report if name == "stagnant" else found.get("last")
        found[name] = [weights_of(replica.module), report if isinstance(report, str) else ""]
    found.pop("last")
    return found


def scheduled(rank: int) -> dict[str, Any]:
    """Schedules: on values that one process has, on gradients, with a target, and one that fails on one process."""
    found: dict[str, Any] = {}
    replica, optimizer = pair(rank)
    target = copy.deepcopy(replica.module)
    act = functools.partial(surgery.Schedule, replica, optimizer)
    with act(Lowest(0.2), operate=Plateau(2), mirrors=target, cooldown=0) as schedule:
        steps = []
        for step in range(8):
            take(replica, optimizer, batch(step, rank))
            report = schedule.step(None if rank else 1.0)
            steps += [step] if report is not None else []
        found["plateau"] = [steps, weights_of(replica.module), weights_of(target), schedule.num_operations]
        found["words"] = refusal(lambda: schedule.step("low" if rank else 1.0))
    mirrors = [copy.deepcopy(replica.module)] if rank else ()  # a target that the second process alone has
    with act(Lowest(0.2), operate=Every(1), cooldown=0, mirrors=mirrors) as schedule:
        take(replica, optimizer, batch(1, rank))
        schedule.step()
    found["own target"] = weights_of(replica.module)
    failing: dict[str, Any] = {"init": torch.nn.init.zeros_ if not rank else torch.Tensor.numpy}
    with act(Lowest(0.2), operate=Every(2), cooldown=0, **failing) as schedule:
        take(replica, optimizer, batch(2, rank))
        schedule.step()
        take(replica, optimizer, batch(3, rank))
        found["failing"] = [refusal(schedule.step), weights_of(replica.module), schedule.num_operations]
    for name, method in (("continual", surgery.ContinualBackprop), ("ccbp", surgery.CCBP)):
        fresh, own = pair(rank)
        runner: Any = method(fresh, own, **({"rate": 0.3, "maturity": 1} if name == "continual" else {"every": 1}))
        for step in range(4):
            take(fresh, own, batch(step, rank))
            runner.step()
        found[name] = weights_of(fresh.module)
    return found


def group_of_one(rank: int) -> dict[str, Any]:
    """A group that the second process is not in; its member operates by itself."""
    group = dist.new_group([0])
    if rank:
        return {"told": refusal(lambda: surgery.replicated(network(), group))}
    return {"told": str(surgery.knife(surgery.replicated(network(), group), CHOSEN).num_units)}


WORK = [
    *(runs, refused, own_initializers, diverged, other_structure, alone, traffic, buffers),
    *(kinds_of_replicas, measured, methods, scheduled, group_of_one),
]


def all_work(rank: int) -> dict[str, Any]:
    return {each.__name__: each(rank) for each in WORK}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[int], Any]], list[Any]]:
    """What each process returned of a piece of work."""
    results = in_processes(all_work, tmp_path_factory.mktemp("replicas"))
    return lambda work: [result[work.__name__] for result in results]


Done = Callable[[Callable[[int], Any]], list[Any]]
GROUP = "Replicas"


@pytest.mark.situation(GROUP, "DDP, operated on before and after it is wrapped, ranks of other seeds and data", "works")
def test_ranks_with_other_seeds_and_data_stay_one_model(done: Done):
    results = done(runs)
    assert same_everywhere(results)
    for run in results[0]:
        assert run["problems"] == [] and run["num_operations"] == 2
        assert all(run["operated"].values())


@pytest.mark.situation(GROUP, "an operation that fails on one rank, before and after it changed something", "refused")
@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("draw", "process 1: DrawError: init="),
        ("batch", "process 1: RuntimeError: mat1"),
        ("record", "process 1: RuntimeError: late"),
        ("evidence", "process 1: EvidenceError"),
        ("options", "'retire=' on process 1"),
        ("functions", "process 0 is at 'before the first change'; process 1 is at 'the plan'"),
    ],
)
def test_what_fails_on_one_rank_is_taken_back_on_all(done: Done, name: str, cause: str):
    for told in done(refused):
        assert told[name].startswith("DistributedError: the ")
        assert cause in told[name]
        assert told[f"{name}: changed"] == []


def test_what_fails_on_all_ranks_alike_is_its_own_error(done: Done):
    for told in done(refused):
        assert told["plan"].startswith("SiteError")
        assert told["plan: changed"] == []


def test_an_interrupt_on_one_rank_stays_one_and_is_told_to_the_others(done: Done):
    first, second = done(refused)
    assert "process 1: KeyboardInterrupt" in first["interrupt"]
    assert second["interrupt"] == "interrupted"


def test_after_failures_ranks_operate_on_as_if_nothing_had_been(done: Done):
    first, second = done(refused)
    assert first["number"] == second["number"] == 2
    assert first["weights"] == second["weights"]


def test_what_an_initializer_draws_on_the_first_rank_is_what_all_get(done: Done):
    results = done(own_initializers)
    assert results[0]["weights"] == results[1]["weights"]


def test_whole_layers_that_ranks_draw_differently_are_refused_and_put_back(done: Done):
    for result in done(own_initializers):
        assert result["told"].startswith("DistributedError: the processes do not agree on what was changed")
        assert "'rows of 4.weight' on process 1" in result["told"]
        assert result["same"]


@pytest.mark.situation(GROUP, "frozen rows or weights that one rank holds otherwise", "refused")
def test_ranks_that_diverged_are_found_by_check_and_refused_by_knife(done: Done):
    results = done(diverged)
    assert same_everywhere(results)
    found = results[0]
    assert found["before"] == [] and found["alone"] == []
    assert ["2.composite: on process 1" in each for each in found["row"]] == [True]
    assert "'2.composite' on process 1" in found["knife"][0]
    assert found["weight"] == ["4.bias"]


def test_ranks_of_other_structure_are_refused(done: Done):
    for told in done(other_structure):
        assert told.startswith("DistributedError: the processes do not agree on the plan")
        assert "'0.composite' on process 1" in told


def test_a_model_that_nothing_wraps_is_operated_on_without_a_word_to_the_others(done: Done):
    found = done(alone)[0]
    assert found["calls"] == 0
    assert any("surgery.replicated(model)" in note for note in found["notes"])


def test_an_operation_sends_as_much_whatever_the_size_of_the_model(done: Done):
    found = done(traffic)[0]
    assert found["small"] == found["wide"] == found["deep"]
    rows = 4 * 4 * (8 + 1)  # four units of eight inputs and a bias, in float32
    plan = len('{"2": "AQAAAAIAAAADAAAADwAAAA=="}')
    votes = [("all_reduce", 48)] * 5
    assert sorted(found["small"]) == [*votes, *sorted([("broadcast", plan), ("broadcast", rows)])]


def test_observing_sends_nothing_until_it_is_pooled_once(done: Done):
    found = done(traffic)[0]
    for name, num_units in (("small", 8 + 16), ("wide", 8 + 160), ("deep", 8 + 10 * 16)):
        num_sites = 11 if name == "deep" else 2
        assert found[f"{name}, observing"] == []
        sent = 2 * 8 * (num_units + num_sites)  # of each unit two sums in float64, of each site two counts
        assert found[f"{name}, pooled"] == [("all_reduce", 48), ("all_reduce", sent), ("all_reduce", 48)]


@pytest.mark.parametrize("when", ["after", "before", "grown"])
def test_frozen_rows_are_not_sent_with_each_forward_and_running_statistics_are(done: Done, when: str):
    first, second = done(buffers)
    assert first[when] == ["first.composite.running_path_2", "first.composite.running_path_3"]
    assert first[f"{when}: held"] == second[f"{when}: held"]


def test_frozen_rows_of_an_operation_that_ranks_did_not_do_together_are_sent_until_they_are_compared(done: Done):
    first, second = done(buffers)
    assert "first.composite.frozen_weight" in first["unknown"]
    assert first["unknown: held"] == second["unknown: held"]


@pytest.mark.situation(
    GROUP, "DDP: unused parameters, static graph, bucket views, no_sync, no buffer broadcast", "works"
)
def test_all_kinds_of_replicas_are_operated_on(done: Done):
    results = done(kinds_of_replicas)
    assert same_everywhere(results)
    assert [each["operation"] for each in results[0].values()] == [2, 2, 2, 2]


def test_gradients_are_read_after_replicas_have_reduced_them(done: Done):
    results = done(measured)
    for name in ("read", "without"):
        assert same_everywhere([result[name] for result in results])
        assert all(bool(values.isfinite().all()) and bool((values > 0).any()) for values in results[0][name].values())


@pytest.mark.situation(GROUP, "evidence of ranks that saw other numbers of samples", "works")
def test_pooled_evidence_counts_every_sample_once(done: Done):
    first, second = (result for result in done(measured))
    assert (first["num"], second["num"]) == ([14, 6, 2, 1], [14, 8, 2, 1])
    expected = (6 * first["own"] + 8 * second["own"]) / 14
    torch.testing.assert_close(first["pooled"].float(), expected)
    assert torch.equal(first["pooled"], second["pooled"])


@pytest.mark.situation(GROUP, "methods beside knife on DDP", "works")
def test_after_each_method_ranks_hold_the_same(done: Done):
    first, second = done(methods)
    assert [name for name in first if first[name] != second[name]] == []
    assert "widen the module before it is wrapped" in first["widen"][1]


@pytest.mark.situation(GROUP, "DDP, schedule on a plateau of values that one rank has", "works")
def test_a_schedule_goes_by_the_value_that_one_rank_has(done: Done):
    first, second = done(scheduled)
    assert first["plateau"] == second["plateau"]
    assert first["plateau"][0] == [2, 5] and first["plateau"][3] == 2


def test_a_value_that_is_no_number_on_one_rank_is_told_to_all(done: Done):
    first, second = done(scheduled)
    assert first["words"] == "DistributedError: 1 of 2 processes passed step a value that is no number"
    assert second["words"].startswith("ScheduleError: step takes a number")


def test_a_target_that_one_rank_alone_has_follows_there(done: Done):
    first, second = done(scheduled)
    assert first["own target"] == second["own target"]


def test_a_schedule_that_fails_on_one_rank_counts_no_operation(done: Done):
    first, second = done(scheduled)
    assert first["failing"] == second["failing"]
    assert "process 1: DrawError" in first["failing"][0] and first["failing"][2] == 0


@pytest.mark.parametrize("name", ["continual", "ccbp"])
def test_methods_of_each_step_keep_ranks_alike(done: Done, name: str):
    first, second = done(scheduled)
    assert first[name] == second[name]


def test_a_group_has_its_members_only(done: Done):
    first, second = done(group_of_one)
    assert first["told"] == "3" and "no member of the group" in second["told"]


# -- many runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 4])
def test_twenty_runs_of_ranks_with_other_seeds_and_data_stay_one_model(num: int, tmp_path: Path):
    def work(rank: int) -> list[dict[str, Any]]:
        return [operated_run(rank, seed, 100, wrapped_first=bool(seed % 2)) for seed in range(20)]

    results = in_processes(work, tmp_path, num)
    assert same_everywhere(results)
    assert [run["problems"] for run in results[0]] == [[]] * 20
    assert all(any(run["operated"].values()) for run in results[0])
    assert len({str(run["weights"]) for run in results[0]}) == 20


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 4])
def test_processes_of_torchrun_stay_one_model(num: int, tmp_path: Path):
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}", "-m", "tests.replicas_by_torchrun"]
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, *run, str(tmp_path)], cwd=root, check=True, timeout=500, env=os.environ)
    results = [torch.load(tmp_path / f"result {rank}", weights_only=True) for rank in range(num)]
    assert same_everywhere(results)
    assert [each["num_operations"] for each in results[0]] == [2, 2]


@pytest.mark.slow
@pytest.mark.situation(GROUP, "DDP, compiled", "works")
def test_a_compiled_replica_is_operated_on_and_trains_on_alike(tmp_path: Path):
    def work(rank: int) -> dict[str, Any]:
        replica, optimizer = pair(rank)
        compiled: Any = torch.compile(replica, backend="aot_eager")
        for step in range(4):
            take(compiled, optimizer, batch(step, rank))
            report = surgery.knife(compiled, CHOSEN, optimizer=optimizer, verify=batch(step, rank))
        with torch.no_grad():
            apart = (compiled(batch(5, rank)) - replica.module(batch(5, rank))).abs().max()
        return {"weights": weights_of(replica.module), "number": report.operation, "agrees": float(apart) < 1e-5}

    results = in_processes(work, tmp_path)
    assert same_everywhere(results)
    assert results[0]["number"] == 4 and results[0]["agrees"]


@pytest.mark.slow
@pytest.mark.situation(GROUP, "a rank that dies in the middle of an operation", "refused")
def test_what_is_left_when_a_process_dies_is_as_it_was(tmp_path: Path):
    def work(rank: int) -> dict[str, Any]:
        replica, optimizer = pair(rank)
        take(replica, optimizer, batch(0, rank))

        def dies(weight: Tensor) -> None:
            torch.nn.init.zeros_(weight)
            if rank:
                torch.save({}, tmp_path / "result 1")
                os._exit(0)

        before = snapshot(replica.module, [optimizer])
        told = refusal(lambda: surgery.knife(replica, CHOSEN, optimizer=optimizer, init=dies))
        after = snapshot(replica.module, [optimizer])
        return {"told": told, "changed": [label for label in before if before[label] != after.get(label)]}

    found = in_processes(work, tmp_path)[0]
    assert "lost touch with the others" in found["told"]
    assert found["changed"] == []
