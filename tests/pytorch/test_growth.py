"""Growth that stays bounded: frozen members that retire, and rows that contribute nothing, which are consolidated."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery import surgery
from neuronsurgery.errors import EquivalenceError
from neuronsurgery.pytorch import consolidating
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.fading import FADING
from neuronsurgery.pytorch.operating import num_weights

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))
N = 4


def build(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.LayerNorm(8)] if norm else []
    return nn.Sequential(nn.Linear(4, 8), *norms, nn.ReLU(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


def operated(norm: bool = False, retire: int | None = N) -> tuple[nn.Sequential, Optimizer]:
    """A model after three steps, with two composite units."""
    model = build(norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    surgery.knife(model, surgery.Units({"0": [1, 5]}), optimizer=optimizer, retire=retire, verify=X)
    return model, optimizer


def bank_of(model: nn.Module) -> Composite:
    return next(module for module in model.modules() if isinstance(module, Composite))


def fade_of(model: nn.Module) -> list[float]:
    return [round(value, 6) for value in bank_of(model).live_fade().tolist()]


def plain_of(model: nn.Module, norm: bool = False) -> nn.Module:
    """The slots alone, in a model that was never operated on."""
    plain = build(norm)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "composite" not in key})
    return plain


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
}


# -- the fade --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.situation("When to operate", "retirement (retire=N)", "works")
def test_rows_fade_linearly_and_contribute_nothing_after_so_many_steps(name: str, norm: bool) -> None:
    model = build(norm)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    surgery.knife(model, surgery.Units({"0": [1, 5]}), optimizer=optimizer, retire=N, verify=X)
    seen = []
    for _ in range(N):
        train(model, optimizer, 1)
        seen.append(fade_of(model))
    assert seen == [[left] * 4 for left in (0.75, 0.5, 0.25, 0.0)]
    torch.testing.assert_close(model(X), plain_of(model, norm)(X), atol=1e-6 if norm else 0, rtol=0)
    train(model, optimizer, 2)
    assert fade_of(model) == [0.0] * 4


def test_forward_passes_accumulation_and_evaluation_do_not_count() -> None:
    model, optimizer = operated()
    optimizer.zero_grad()
    for _ in range(5):
        model(X).square().mean().backward()
    model.eval()(X)
    assert fade_of(model) == [1.0] * 4
    optimizer.step()
    assert fade_of(model) == [0.75] * 4


@pytest.mark.parametrize("norm", [False, True])
def test_operating_again_in_the_middle_of_a_fade_changes_no_output(norm: bool) -> None:
    model, optimizer = operated(norm)
    for num_units in range(1, 6):
        train(model, optimizer, 2)
        units = surgery.Units({"0": list(range(num_units))})
        surgery.knife(model, units, optimizer=optimizer, retire=N, verify=X, max_growth=9.0)
    permanent = surgery.knife(model, surgery.Units({"0": [1]}), optimizer=optimizer, verify=X, max_growth=9.0)
    assert permanent.max_error < 2e-6
    train(model, optimizer, N)
    assert fade_of(model) == [0.0] * (len(fade_of(model)) - 2) + [1.0] * 2


def test_a_norm_refers_to_the_slot_once_the_reference_has_faded() -> None:
    model, optimizer = operated(norm=True)
    bank = bank_of(model)
    slots, rows = torch.randn(3, 8), torch.randn(3, len(bank.frozen_weight))
    torch.testing.assert_close(bank.referred(slots, rows, -1)[:, 1], rows[:, 0])
    train(model, optimizer, 1)
    torch.testing.assert_close(bank.referred(slots, rows, -1)[:, 1], 0.75 * rows[:, 0] + 0.25 * slots[:, 1])
    train(model, optimizer, N)
    torch.testing.assert_close(bank.referred(slots, rows, -1), slots)


def test_a_second_operation_moves_the_reference_on_without_a_jump() -> None:
    model, optimizer = operated(norm=True)
    train(model, optimizer, 1)
    surgery.knife(model, surgery.Units({"0": [1]}), optimizer=optimizer, retire=2, verify=X)
    bank = bank_of(model)
    slots, rows = torch.zeros(1, 8), torch.zeros(1, len(bank.frozen_weight))
    rows[0, 0], rows[0, 4], slots[0, 1] = 1.0, 10.0, 100.0  # first knowledge, second knowledge, slot
    assert bank.referred(slots, rows, -1)[0, 1] == pytest.approx(0.75 * 1 + 0.25 * 10)
    train(model, optimizer, 1)
    assert bank.referred(slots, rows, -1)[0, 1] == pytest.approx(0.5 * 1 + 0.5 * (0.5 * 10 + 0.5 * 100))


def test_steps_that_a_gradient_scaler_skips_do_not_count() -> None:
    model, optimizer = operated()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for poison in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(X).square().mean() * poison).backward()
        scaler.step(optimizer)
        scaler.update()
    assert fade_of(model) == [0.5] * 4


def test_an_optimizer_that_counts_anew_brings_nothing_back() -> None:
    model, optimizer = operated()
    train(model, optimizer, 2)
    optimizer.state.clear()
    train(model, optimizer, 1)
    assert fade_of(model) == [0.5] * 4


@pytest.mark.parametrize("name", ["adam", "capturable", "momentum"])
@pytest.mark.situation("When to operate", "optimizer reset in the middle of a fade", "works")
def test_a_fade_goes_on_at_its_pace_when_the_optimizer_is_reset_and_after_a_resume(name: str) -> None:
    model = build()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    surgery.knife(model, surgery.Units({"0": [1, 5]}), optimizer=optimizer, retire=N)
    seen = []
    for _ in range(N - 1):
        train(model, optimizer, 1)
        surgery.reset_optimizer(model, optimizer=optimizer)
        assert surgery.check(model, optimizer).ok
        seen.append(fade_of(model)[0])
    assert seen == [0.75, 0.5, 0.25]
    copied = copy.deepcopy(model)
    other = OPTIMIZERS[name](copied.parameters())
    other.load_state_dict(optimizer.state_dict())
    surgery.attach(copied, other)
    train(copied, other, 1)
    assert fade_of(copied) == [0.0] * 4


def test_units_in_a_fade_keep_their_age_when_the_optimizer_is_reset() -> None:
    model, optimizer = operated()
    train(model, optimizer, 2)
    surgery.reset_optimizer(model, optimizer=optimizer)
    train(model, optimizer, 1)
    everything = surgery.Random(1.0)
    report = surgery.knife(model, everything, optimizer=optimizer, cooldown=4, max_growth=9.0)
    assert report.operated == {"0": (0, 2, 3, 4, 6, 7)}
    report = surgery.knife(model, everything, optimizer=optimizer, cooldown=3, max_growth=9.0)
    assert report.operated == {"0": (1, 5)}


def test_gradients_reach_the_slots_and_no_frozen_row_moves() -> None:
    model, optimizer = operated()
    bank, before = bank_of(model), bank_of(model).frozen_weight.clone()
    slots = model.get_parameter("0.weight").detach().clone()
    train(model, optimizer, N + 1)
    assert torch.equal(bank.frozen_weight, before)
    assert not torch.equal(slots[[1, 5]], model.get_parameter("0.weight")[[1, 5]])
    assert not list(bank.parameters()) and bank.fade is not None and not bank.fade.requires_grad


@pytest.mark.parametrize("retire", [0, -1, 2.5, True])
def test_a_number_of_steps_that_is_none_is_refused(retire: object) -> None:
    model = build()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(surgery.PlanError, match="number of optimizer steps"):
        surgery.knife(model, surgery.Units({"0": [1]}), optimizer=optimizer, retire=retire)  # type: ignore[arg-type]


@pytest.mark.situation("When to operate", "retirement without an optimizer", "refused")
def test_retirement_without_an_optimizer_of_the_layer_is_refused_and_nothing_changes() -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    for optimizer in (None, torch.optim.Adam(model[2].parameters())):
        with pytest.raises(surgery.OptimizerError, match="retire="):
            surgery.knife(model, surgery.Units({"0": [1]}), optimizer=optimizer, retire=N)
    assert list(before) == list(model.state_dict()) and all(
        map(torch.equal, before.values(), model.state_dict().values())
    )


def test_undo_is_refused_once_a_fade_has_begun_and_possible_before() -> None:
    model, optimizer = operated(retire=None)
    report = surgery.knife(model, surgery.Units({"0": [2]}), optimizer=optimizer, retire=N)
    before = model(X)
    surgery.undo(model, report, optimizer)
    torch.testing.assert_close(model(X), before)
    report = surgery.knife(model, surgery.Units({"0": [2]}), optimizer=optimizer, retire=N)
    train(model, optimizer, 1)
    with pytest.raises(surgery.UndoError, match="begun to fade"):
        surgery.undo(model, report, optimizer)


# -- copies and checkpoints ------------------------------------------------------------------------------------------


def again_for(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """One of the same class for another model."""
    cls: Any = type(optimizer)
    made: Optimizer = cls(model.parameters(), lr=0.01)
    return made


def _restored(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    state, optimizer_state = torch.load(buffer, weights_only=True)
    fresh = build()
    other = again_for(optimizer, fresh)
    other.load_state_dict(optimizer_state)
    surgery.restore(fresh, state, other)
    return fresh, other


def _copied(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    copied = copy.deepcopy(model)
    other = again_for(optimizer, copied)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the counts of steps
    surgery.attach(copied, other)
    return copied, other


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("again", [_restored, _copied])
@pytest.mark.situation("Checkpoints and copies", "in the middle of a fade", "works")
def test_a_fade_goes_on_after_a_resume_and_in_a_copy(
    name: str, again: Callable[..., tuple[nn.Module, Optimizer]]
) -> None:
    model = build()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    surgery.knife(model, surgery.Units({"0": [1, 5]}), optimizer=optimizer, retire=N)
    train(model, optimizer, 2)
    other, its_optimizer = again(model, optimizer)
    assert fade_of(other) == [0.5] * 4
    for one, own in ((model, optimizer), (other, its_optimizer)):
        train(one, own, 1)
    assert fade_of(other) == [0.25] * 4 and torch.equal(model(X), other(X))


def test_check_says_that_a_copy_lacks_the_hook_of_its_fade() -> None:
    model, _ = operated()
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    assert any("fade" in problem.found for problem in surgery.check(copied, optimizer).problems)
    surgery.attach(copied, optimizer)
    assert not any("fade" in problem.found for problem in surgery.check(copied, optimizer).problems)


def test_an_earlier_state_of_the_same_model_loads_with_its_fade() -> None:
    model, optimizer = operated()
    train(model, optimizer, 1)
    state, optimizer_state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    before = model(X)
    train(model, optimizer, N)
    model.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    assert torch.equal(model(X), before)
    train(model, optimizer, 1)
    assert fade_of(model) == [0.5] * 4


def test_states_with_and_without_a_fade_load_onto_each_other() -> None:
    fading, optimizer = operated()
    train(fading, optimizer, 1)
    staying, _ = operated(retire=None)
    of_fading, of_staying = copy.deepcopy(fading.state_dict()), copy.deepcopy(staying.state_dict())
    expected = fading(X), staying(X)
    staying.load_state_dict(of_fading)
    fading.load_state_dict(of_staying)
    assert torch.equal(staying(X), expected[0]) and torch.equal(fading(X), expected[1])


# -- mirrors ---------------------------------------------------------------------------------------------------------


def buffers_and_parameters(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("by", ["state dict", "loop"])
@pytest.mark.situation("Replicas", "hard copy in the middle of a fade", "works")
def test_a_target_equals_its_model_after_a_hard_copy_in_the_middle_of_a_fade(by: str) -> None:
    model, optimizer = operated(norm=True)
    target = build(norm=True).requires_grad_(False)
    surgery.mirror(model, onto=target)
    before = target(X)
    train(model, optimizer, 2)
    assert torch.equal(target(X), before)
    if by == "state dict":
        target.load_state_dict(model.state_dict())
    else:
        for own, its in zip(buffers_and_parameters(target), buffers_and_parameters(model), strict=True):
            own.data.copy_(its.data)
    assert torch.equal(target(X), model(X))


@pytest.mark.situation("Replicas", "average of parameters and buffers in a fade", "works")
def test_an_averaged_fade_stays_between_those_it_is_averaged_of() -> None:
    model, optimizer = operated()
    target = copy.deepcopy(model).requires_grad_(False)
    for _ in range(3 * N):
        train(model, optimizer, 1)
        for own, its in zip(buffers_and_parameters(target), buffers_and_parameters(model), strict=True):
            own.data.lerp_(its.data, 0.5)
        assert all(online <= value <= 1 for online, value in zip(fade_of(model), fade_of(target), strict=True))
    assert max(fade_of(target)) < 0.01


@pytest.mark.situation("Replicas", "average of parameters alone in a fade", "works")
def test_a_target_that_shares_frozen_rows_fades_with_its_model() -> None:
    model, optimizer = operated()
    target = build().requires_grad_(False)
    surgery.mirror(model, onto=target, frozen="shared")
    train(model, optimizer, 2)
    assert fade_of(target) == [0.5] * 4
    surgery.mirror(model, onto=target, frozen="own")
    train(model, optimizer, 1)
    assert fade_of(target) == [0.5] * 4


def test_a_target_that_missed_a_consolidation_gives_up_retired_rows_as_it_is_mirrored() -> None:
    model, optimizer = operated()
    target = copy.deepcopy(model).requires_grad_(False)
    surgery.mirror(model, onto=target)
    train(model, optimizer, 3)
    target.load_state_dict(model.state_dict())
    train(model, optimizer, 1)
    surgery.knife(model, surgery.Units({"0": [5]}), optimizer=optimizer)
    surgery.consolidate(model)
    surgery.mirror(model, onto=target)
    assert surgery.composites(target).members == surgery.composites(model).members
    target.load_state_dict(model.state_dict())
    assert torch.equal(target(X), model(X))


# -- consolidation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_after_retirement_no_row_is_left_in_model_or_mirrors(norm: bool) -> None:
    model, optimizer = operated(norm)
    target = copy.deepcopy(model).requires_grad_(False)
    train(model, optimizer, N)
    before = model(X)
    report = surgery.consolidate(model, mirrors=[target], optimizer=optimizer)
    plain = build(norm)
    for each in (model, target):
        assert list(each.state_dict()) == list(plain.state_dict())
        assert [type(module) for module in each.modules()] == [type(module) for module in plain.modules()]
    torch.testing.assert_close(model(X), before, atol=1e-6, rtol=0)
    assert report.sites["0"].retired == 4 and report.sites["0"].left == 0 and len(report.mirrors) == 1
    assert surgery.Consolidation.from_json(report.to_json()) == report and "4" in str(report)


def test_consolidation_leaves_what_still_fades_and_lets_it_go_on() -> None:
    model, optimizer = operated()
    train(model, optimizer, 2)
    surgery.knife(model, surgery.Units({"0": [1]}), optimizer=optimizer, retire=N)
    train(model, optimizer, 2)
    before = model(X)
    assert surgery.consolidate(model, optimizer=optimizer).sites["0"].retired == 4
    torch.testing.assert_close(model(X), before)
    train(model, optimizer, 1)
    assert fade_of(model) == [0.25] * 2


def test_rows_that_are_taken_for_equal_and_are_not_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = operated(retire=None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(consolidating, "equal", lambda bank, pairs: [(0, len(bank.rows) - 1)])
    with pytest.raises(EquivalenceError, match="without rows that contribute nothing the activations differ"):
        surgery.consolidate(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("norm", [False, True])
def test_pairs_of_equal_rows_cancel_exactly(norm: bool) -> None:
    model, optimizer = operated(norm, retire=None)
    before = model(X)
    for _ in range(3):
        surgery.knife(model, surgery.Units({"0": [1, 2]}), optimizer=optimizer)
    report = surgery.consolidate(model)
    assert (report.sites["0"].cancelled, report.sites["0"].left) == (2 * 3 + 2 * 2, 2 * 3)
    torch.testing.assert_close(model(X), before, atol=1e-6, rtol=0)
    assert surgery.check(model, optimizer)
    train(model, optimizer, 2)
    assert surgery.consolidate(model).num_rows == 0


def test_what_is_left_of_cancelled_operations_can_be_undone_and_mirrored() -> None:
    model = build()
    before = model(X)
    surgery.knife(model, surgery.Units({"0": [1]}))
    second = surgery.knife(model, surgery.Units({"0": [1]}))
    surgery.consolidate(model)
    target = build().requires_grad_(False)
    surgery.mirror(model, onto=target)
    assert torch.equal(target(X), model(X))
    surgery.undo(model, second)
    assert torch.equal(model(X), before) and surgery.composites(model).num_rows == 0


def test_rows_that_never_fire_on_the_batches_go_and_the_error_is_reported() -> None:
    model = build()
    with torch.no_grad():
        model.get_parameter("0.bias")[3] = -100.0
    surgery.knife(model, surgery.Units({"0": [3, 4]}), init=lambda weight: nn.init.zeros_(weight))
    assert surgery.consolidate(model).num_rows == 0
    before = model(X)
    report = surgery.consolidate(model, batches=[X[:8], X[8:]])
    assert report.sites["0"].merged == 2 and report.sites["0"].left == 2
    assert report.model_error == 0.0 and torch.equal(model(X), before)


@pytest.mark.parametrize("seed", range(3))
def test_merged_rows_stay_within_the_reported_error_on_fresh_data(seed: int) -> None:
    model, optimizer = operated(retire=None)
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    for _ in range(4):
        surgery.knife(model, surgery.Units({"0": [1, 2]}), optimizer=optimizer)
        train(model, optimizer, 2)
    before = copy.deepcopy(model)
    report = surgery.consolidate(model, batches=[torch.randn(512, 4, generator=generator)], tolerance=0.05)
    fresh = torch.randn(512, 4, generator=generator)
    old, new = before[:2](fresh), model[:2](fresh)
    assert report.sites["0"].merged > 0
    assert float(((new - old).norm() / old.norm()).detach()) <= 1.2 * report.sites["0"].error < 0.05


def test_a_reference_row_goes_only_once_retired() -> None:
    model = build(norm=True)
    surgery.knife(model, surgery.Units({"0": [1]}), init=lambda weight: nn.init.zeros_(weight))
    with torch.no_grad():
        for name in ("frozen_weight", "frozen_bias"):
            getattr(bank_of(model), name).zero_()  # all rows equal: but for the reference they would cancel
    assert surgery.consolidate(model, batches=[X]).num_rows == 0


def test_a_mirror_with_other_rows_is_refused_and_nothing_changes() -> None:
    model, optimizer = operated()
    target = build().requires_grad_(False)
    train(model, optimizer, N)
    before = list(model.state_dict())
    with pytest.raises(surgery.MirrorError, match="other frozen rows"):
        surgery.consolidate(model, mirrors=target)
    assert list(model.state_dict()) == before


def test_a_fault_in_the_middle_of_a_consolidation_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = operated()
    train(model, optimizer, N)
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]

    def fails(_: object) -> int:
        raise KeyboardInterrupt

    counts = itertools.count()
    name = "neuronsurgery.pytorch.consolidating.num_weights"
    monkeypatch.setattr(name, lambda m: num_weights(m) if next(counts) == 0 else fails(m))
    with pytest.raises(KeyboardInterrupt):
        surgery.consolidate(model)
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(before[key], after[key]) for key in before)


def test_a_fault_in_an_operation_lets_no_bank_fade_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    surgery.knife(model, surgery.Units({"0": [1]}), optimizer=optimizer, retire=N)
    entries = list(FADING[optimizer].entries)
    counts = itertools.count()

    def fails(module: nn.Module) -> int:
        if next(counts):
            raise KeyboardInterrupt
        return num_weights(module)

    monkeypatch.setattr("neuronsurgery.pytorch.operating.num_weights", fails)
    with pytest.raises(KeyboardInterrupt):
        surgery.knife(model, surgery.Units({"2": [1]}), optimizer=optimizer, retire=N)
    assert FADING[optimizer].entries == entries and len(entries) == 1


# -- the bound -------------------------------------------------------------------------------------------------------


def test_a_site_at_its_bound_is_consolidated_before_it_is_declined() -> None:
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options: dict[str, Any] = {"optimizer": optimizer, "max_growth": 0.5}
    surgery.knife(model, surgery.Units({"0": [1, 5]}), retire=N, **options)
    train(model, optimizer, N - 1)
    full = surgery.knife(model, surgery.Units({"0": [2]}), **options)
    assert full.num_units == 0 and "max_growth=0.5" in full.declined["0"]
    train(model, optimizer, 1)
    report = surgery.knife(model, surgery.Units({"0": [2]}), verify=X, **options)
    assert report.operated == {"0": (2,)} and surgery.composites(model).num_rows == 2


def test_a_schedule_retires_and_keeps_the_bound() -> None:
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    target = copy.deepcopy(model).requires_grad_(False)
    schedule = surgery.Schedule(
        model,
        optimizer,
        surgery.Random(0.25),
        operate=surgery.Every(5),
        cooldown=0,
        mirrors=target,
        retire=N,
        max_growth=0.5,
    )
    for _ in range(40):
        train(model, optimizer, 1)
        schedule.step()
        assert surgery.composites(model).num_rows <= 4
    assert schedule.num_operations == 8
    assert surgery.composites(target).members == surgery.composites(model).members


@pytest.mark.situation("Compile and export", "a fade in compiled code", "works")
def test_compiled_code_lasts_for_a_whole_fade() -> None:
    torch._dynamo.reset()
    model, optimizer = operated()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    compiled(X)
    first = counter.frame_count
    for _ in range(N):
        train(model, optimizer, 1)
        torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == first > 0


# -- for long --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["retire", "consolidate", "neither"])
def test_a_thousand_operations_stay_within_the_bound_or_are_declined(way: str) -> None:
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    num_operated, sizes = 0, []
    for operation in range(1000):
        train(model, optimizer, 2)
        report = surgery.knife(
            model,
            surgery.Units({"0": [operation % 8]}),
            optimizer=optimizer,
            retire=6 if way == "retire" else None,
            verify=X,
            max_growth=2.0,
        )
        num_operated += report.num_units
        assert report.max_error < 2e-6
        if way == "consolidate":  # a wide tolerance: these rows do contribute
            surgery.consolidate(model, optimizer=optimizer, batches=[X], tolerance=0.9)
        assert surgery.composites(model).num_rows <= 16
        sizes.append(sum(buffer.numel() for buffer in model.buffers()))
    assert max(sizes[500:]) <= max(sizes[:500])
    if way == "retire":
        assert num_operated == 1000
    elif way == "neither":
        assert num_operated == 8
    else:
        assert num_operated > 8
