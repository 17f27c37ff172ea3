"""Mirroring: targets get the structure of an operated model, all of them or none; what does not fit is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from neuronsurgery import surgery
from neuronsurgery.pytorch import transaction
from neuronsurgery.pytorch.composites import Composite
from tests.snapshots import bits
from tests.subjects import MODELS, Subject, subject

Model = Any


def lagging(model: Model, by: float = 0.1) -> Model:
    """A target: a frozen copy in evaluation that lags behind."""
    target = copy.deepcopy(model).requires_grad_(False).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return target


def pair(name: str = "sequential") -> tuple[Subject, Model]:
    found = subject(name)
    return found, lagging(found.model)


def operated(found: Subject, *units: int) -> surgery.Report:
    report = surgery.knife(found.model, surgery.Units(found.units(*units)), optimizer=found.optimizers)
    found.train(2)
    return report


def structure(model: Model) -> dict[str, Any]:
    """What a hard copy, an average over state dicts and a stack need to be equal."""
    found: dict[str, Any] = {name: value.shape for name, value in model.state_dict().items()}
    found |= {f"class {name}": type(module) for name, module in model.named_modules()}
    found |= {f"rows {n}": m.rows.encoded().tolist() for n, m in model.named_modules() if isinstance(m, Composite)}
    return found


def everything(model: Model) -> dict[str, Any]:
    found: dict[str, Any] = {name: bits(value) for name, value in model.state_dict().items()}
    found |= {f"id {name}": id(value) for name, value in model.named_parameters()}
    found |= {f"asks {name}": value.requires_grad for name, value in model.named_parameters()}
    return found | {f"class {name}": (type(m), sorted(vars(m))) for name, m in model.named_modules()}


# -- what it does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["own", "shared"])
@pytest.mark.parametrize("name", MODELS)
def test_a_target_gets_the_models_structure_and_follows_by_state_dict(name, frozen):
    found, target = pair(name)
    before = target(found.x)
    for units in ([1, 5], [5, 2]):
        operated(found, *units)
    report = surgery.mirror(found.model, onto=target, frozen=frozen, verify=found.x)
    assert structure(target) == structure(found.model)
    assert (report.max_moved > 1e-4) == (frozen == "shared")
    assert torch.allclose(target(found.x), before, atol=1e-6) == (frozen == "own")
    operated(found, 3, 1)
    surgery.mirror(found.model, onto=target, frozen=frozen, verify=found.x)
    assert structure(target) == structure(found.model)
    target.load_state_dict(found.model.state_dict())
    assert torch.equal(target(found.x), found.model.eval()(found.x))


@pytest.mark.parametrize("name", MODELS)
def test_mirroring_changes_nothing_of_the_model(name):
    found, target = pair(name)
    operated(found, 1, 5)
    before = everything(found.model)
    surgery.mirror(found.model, onto=target)
    assert everything(found.model) == before


def test_mirroring_again_finds_nothing_to_do():
    found, target = pair()
    operated(found, 1, 5)
    surgery.mirror(found.model, onto=target)
    before = everything(target)
    report = surgery.mirror(found.model, onto=target)
    assert everything(target) == before
    assert "nothing to do: the targets have what the model has" in str(report)


def test_a_frozen_target_stays_frozen_and_holds_no_gradients():
    found, target = pair()
    operated(found, 1)
    surgery.mirror(found.model, onto=target)
    assert not any(p.requires_grad or p.grad is not None for p in target.parameters())


def test_stale_gradients_of_renewed_slots_become_zero():
    found, target = pair()
    target.requires_grad_(True)(found.x).sum().backward()
    operated(found, 1)
    surgery.mirror(found.model, onto=target)
    assert target[0].weight.grad[1].abs().max() == 0 < target[0].weight.grad.abs().max()


def test_several_targets_are_mirrored_at_once_and_reported_one_by_one():
    found, target = pair()
    operated(found, 1)
    other = AveragedModel(lagging(found.model))
    surgery.mirror(found.model, onto=target)
    operated(found, 2)
    report = surgery.mirror(found.model, onto=[target, other, target])
    assert [dict(each.made) for each in report.targets] == [{"0": (2,), "2": (2,)}] * 2
    assert structure(target) == structure(found.model) == structure(other.module)
    assert surgery.MirrorReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("frozen", ["own", "shared"])
def test_undone_and_repeated_operations_are_taken_back_and_made_again(frozen):
    found, target = pair()
    first = operated(found, 1, 5)
    surgery.mirror(found.model, onto=target, frozen=frozen)
    knowledge = target[0].composite.frozen_weight[:2].clone()
    surgery.undo(found.model, first, found.optimizers)
    again = surgery.knife(found.model, surgery.Units(found.units(5, 6)), init=nn.init.ones_)
    assert again.operation == first.operation  # the number alone would not tell
    report = surgery.mirror(found.model, onto=target, frozen=frozen)
    assert (report.targets[0].taken_back["0"], report.targets[0].made["0"]) == ((1, 5), (5, 6))
    assert structure(target) == structure(found.model)
    assert torch.equal(target[0].weight[1], knowledge[0])
    assert torch.equal(target[0].weight[5], torch.ones(4))


def test_rows_in_another_order_are_put_in_the_models():
    found, target = pair()
    surgery.knife(found.model, surgery.Units(found.units(1, 5)))
    target = copy.deepcopy(found.model).eval()
    bank = target[0].composite
    state, table = bank.state_dict(), bank.rows.encoded()[[1, 0, 3, 2]]
    state["_extra_state"][-table.size :] = torch.from_numpy(table).reshape(-1)
    for name in ("frozen_weight", "frozen_bias"):
        state[name][:4] = state[name][[1, 0, 3, 2]]
    bank.load_state_dict(state)
    before = target(found.x)
    assert structure(target) != structure(found.model)
    assert surgery.mirror(found.model, onto=target).num_units == 0
    assert structure(target) == structure(found.model)
    assert torch.allclose(target(found.x), before, atol=1e-6)


def test_when_all_is_undone_the_target_is_as_it_was():
    found, target = pair()
    before = everything(target)
    reports = [operated(found, 1, 5), operated(found, 5, 2)]
    surgery.mirror(found.model, onto=target)
    for report in reversed(reports):
        surgery.undo(found.model, report, found.optimizers)
    mirrored = surgery.mirror(found.model, onto=target, verify=found.x)
    assert everything(target) == before
    assert mirrored.num_taken_back == 6 and mirrored.max_moved <= 2e-6


@pytest.mark.parametrize(
    ("model", "target"),
    [
        pytest.param(a, b, marks=pytest.mark.situation("Replicas", "target of another dtype", "works"))
        for a, b in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16))
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", ["own", "shared"])
def test_a_target_of_another_dtype_keeps_it(model, target, frozen):
    found, follower = pair()
    found.model.to(model)
    follower.to(target)
    before = follower(found.x.to(target))
    surgery.knife(found.model, surgery.Units(found.units(1, 5)))
    surgery.knife(found.model, surgery.Units(found.units(5)))
    surgery.mirror(found.model, onto=follower, frozen=frozen)
    assert {value.dtype for name, value in follower.state_dict().items() if "extra" not in name} == {target}
    surgery.mirror(found.model, onto=follower, frozen=frozen)
    if frozen == "own":
        allowed = {torch.bfloat16: 2**-6, torch.float32: 1e-6, torch.float64: 1e-12}[target]
        assert torch.allclose(follower(found.x.to(target)), before, atol=allowed, rtol=allowed)


@pytest.mark.situation("Replicas", "compiled target", "works")
def test_wrappers_are_taken_off():
    found, target = pair()
    operated(found, 1)
    compiled, averaged = torch.compile(target, backend="eager"), AveragedModel(lagging(found.model))
    averaged.module.load_state_dict(found.model.state_dict())
    report = surgery.mirror(torch.compile(found.model, backend="eager"), onto=[compiled, averaged], verify=found.x)
    assert [each.sites for each in report.targets] == [("0", "2"), ()]
    with pytest.raises(surgery.MirrorError, match="the target is the model itself"):
        surgery.mirror(target, onto=compiled)


class Noisy(nn.Module):
    """Weights that are computed, from two parameters and fixed noise, in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.sigma = (nn.Parameter(torch.randn(16, 4)) for _ in range(2))
        self.noise = nn.Buffer(torch.randn(16, 4))
        self.mask = nn.Parameter((torch.rand(16, 4) > 0.2).float(), requires_grad=False)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.weight + self.sigma * self.noise) * self.mask
        out: torch.Tensor = self.head(nn.functional.relu(nn.functional.linear(x, weight)))
        return out


def normed() -> Model:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(),
        nn.Linear(16, 2),
    )  # fmt: skip


def weight_normed() -> Model:
    torch.manual_seed(2)  # parametrized modules cannot be copied once a weight was computed
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(4, 16)), nn.ReLU(), nn.Linear(16, 2))


@pytest.mark.parametrize(
    ("make", "sites"), [(Noisy, ["sigma"]), (normed, ["0", "3"]), (weight_normed, ["0"])], ids=["noisy", "norm", "wn"]
)
def test_frozen_targets_with_computed_weights_and_norms_keep_their_output(make: Callable[[], Model], sites):
    torch.manual_seed(2)
    model, x = make(), torch.randn(8, 4)
    torch.manual_seed(2)
    target = make()
    with torch.no_grad():
        for parameter in target.requires_grad_(False).eval().parameters():
            parameter.mul_(1.1) if parameter.is_floating_point() and len(parameter) != 2 else None
    before = target(x)
    surgery.knife(model, surgery.Units({site: [1, 5] for site in sites}))
    surgery.knife(model, surgery.Units({site: [5] for site in sites}))
    surgery.mirror(model, onto=target, verify=x)
    assert torch.allclose(target(x), before, atol=1e-5) and not torch.allclose(before, model.eval()(x), atol=1e-3)
    target.load_state_dict(model.state_dict())
    assert torch.allclose(target(x), model(x), atol=1e-6)


def test_batch_norms_statistics_are_the_targets_own_as_at_surgery():
    model = normed()
    target = lagging(model)
    target[1].running_mean.copy_(torch.arange(16.0))
    surgery.knife(model, surgery.Units({"0": [3]}))
    surgery.mirror(model, onto=target)
    assert [float(row) for row in target[0].composite.running_path_2[:2]] == [3, 3] and target[1].running_mean[3] == 3


def test_shared_rows_that_both_have_keep_the_targets_running_statistics():
    model = normed()
    target = lagging(model)
    surgery.knife(model, surgery.Units({"0": [3]}))
    surgery.mirror(model, onto=target, frozen="shared")
    target[0].composite.running_path_2[:2] = 7
    surgery.knife(model, surgery.Units({"0": [4]}))
    surgery.mirror(model, onto=target, frozen="shared")
    assert target[0].composite.running_path_2[:4].tolist() == [7, 7, 0, 0]


def test_banks_are_in_their_layers_mode():
    found, target = pair()
    operated(found, 1)
    target[0].train()
    surgery.mirror(found.model, onto=target)
    assert (target[0].composite.training, target[2].composite.training) == (True, False)


class Policy(nn.Module):
    """A network and its frozen target in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Wide(8)
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


@pytest.mark.situation("Replicas", "frozen target inside the module that is operated on", "works")
def test_operating_on_a_module_leaves_a_mirrored_target_inside_it_alone():
    policy, x = Policy(), torch.randn(8, 4)
    moved = policy.net.fc.weight
    with torch.no_grad():
        moved.add_(0.1)
    surgery.knife(policy, surgery.Units({"net.fc": [1, 5]}))
    surgery.mirror(policy.net, onto=policy.target)
    with torch.no_grad():
        policy.target.fc.weight.add_(0.1)
    before = policy.target(x)
    surgery.knife(policy, surgery.Units({"net.fc": [2]}))
    assert torch.equal(policy.target(x), before)


def test_layers_of_the_model_that_were_frozen_after_their_operation_are_mirrored_too():
    found, target = pair()
    before = target(found.x)
    surgery.knife(found.model, surgery.Units({"0": [1]}))
    found.model[0].requires_grad_(False)
    surgery.knife(found.model, surgery.Units({"2": [1]}))
    surgery.mirror(found.model, onto=target, verify=found.x)
    assert structure(target) == structure(found.model)
    assert torch.allclose(target(found.x), before, atol=1e-6)


# -- what is refused -------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, sizes[0]), nn.Linear(sizes[0], 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.relu(self.fc(x)))
        return out


class Tanh(Wide):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.tanh(self.fc(x)))
        return out


class Twice(Wide):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.fc(x)
        out: torch.Tensor = self.out(torch.relu(z)) + z.mean()
        return out


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.other = Wide(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.other(x)
        return out


def unbiased() -> Model:
    made = Wide(8)
    made.fc = nn.Linear(4, 8, bias=False)
    return made


def by_itself() -> Model:
    made = Wide(8)
    surgery.knife(made, surgery.Units({"fc": [6]}))
    return made


def sharing(model: Wide) -> Model:
    made = Wide(8)
    made.fc.bias = model.fc.bias
    return made


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "the model itself": (lambda model: model, "the target is the model itself"),
    "none": (lambda model: [], "holds no target"),
    "a state dict": (lambda model: model.state_dict(), "found OrderedDict"),
    "other width": (lambda model: Wide(9), "'fc' differs .* number of units is 9, in the model 8"),
    "other activation function": (lambda model: Tanh(8), "activation function is tanh, in the model relu"),
    "no bias": (lambda model: unbiased(), "'fc' differs"),
    "declined": (lambda model: Twice(8), "declined in the target: its pre-activation is read 2 times"),
    "no such site": (lambda model: Renamed(), "the target lacks a site .* no producer is named 'fc'"),
    "operated on by itself": (lambda model: by_itself(), r"operations on units \[6\] of 'fc' that the model does not"),
    "shared bias": (sharing, "shares a parameter with the model's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_target_that_does_not_fit_is_refused_and_nothing_changes(case):
    model, fits = Wide(8), Wide(8).requires_grad_(False)
    surgery.knife(model, surgery.Units({"fc": [1, 5]}))
    make, message = REFUSED[case]
    target = make(model)
    states = [everything(each) for each in (model, fits)]
    onto = [fits, target] if isinstance(target, nn.Module) else target
    before = everything(target) if isinstance(target, nn.Module) else None
    with pytest.raises(surgery.MirrorError, match=message):
        surgery.mirror(model, onto=onto)
    assert [everything(each) for each in (model, fits)] == states
    assert before is None or everything(target) == before


class Ties(nn.Module):
    """Two layers that may hold one weight, and one bias."""

    def __init__(self, weight: bool, bias: bool) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        if weight:
            self.two.weight = self.one.weight
        if bias:
            self.two.bias = self.one.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.relu(self.two(torch.relu(self.one(x)))))
        return out


def convolution(stride: int) -> Model:
    return nn.Sequential(nn.Conv1d(1, 4, 3, stride=stride), nn.ReLU(), nn.Conv1d(4, 1, 1))


def layer(num_inputs: int) -> Model:
    return nn.Sequential(nn.Linear(num_inputs, 4), nn.ReLU(), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("model", "target", "site", "message"),
    [
        pytest.param(convolution(1), convolution(2), "0", "it computes Convolution.*stride=", id="stride"),
        pytest.param(layer(4), layer(5), "0", r"a unit's weights are \[\(5,\), \(\)\], in the model", id="inputs"),
        pytest.param(Ties(True, True), Ties(False, False), "one", "it is held by", id="tied in the model"),
        pytest.param(Ties(False, False), Ties(True, True), "one", "it is held by", id="tied in the target"),
        pytest.param(Ties(False, False), Ties(False, True), "one", "have of their own", id="tied bias"),
    ],
)
def test_what_a_target_computes_otherwise_is_named(model, target, site, message):
    surgery.knife(model, surgery.Units({site: [1]}))
    before = everything(target)
    with pytest.raises(surgery.MirrorError, match=message):
        surgery.mirror(model, onto=target)
    assert everything(target) == before


def test_another_word_for_frozen_is_refused():
    asked: Any = "copied"
    with pytest.raises(surgery.MirrorError, match="takes 'own' or 'shared', found 'copied'"):
        surgery.mirror(Wide(8), onto=Wide(8), frozen=asked)


def test_model_and_target_exchanged_is_refused_and_takes_nothing_back():
    model, target = Wide(8), Wide(8)
    surgery.knife(model, surgery.Units({"fc": [1]}))
    surgery.mirror(model, onto=target)
    surgery.knife(model, surgery.Units({"fc": [2]}))
    before = everything(model)
    with pytest.raises(surgery.MirrorError, match="target and model were exchanged"):
        surgery.mirror(target, onto=model)
    assert everything(model) == before


@pytest.mark.situation("Replicas", "copy.deepcopy after surgery", "works")
def test_a_copy_made_after_surgery_has_the_structure_and_needs_nothing():
    found, _ = pair()
    report = operated(found, 1, 5)
    target = copy.deepcopy(found.model).requires_grad_(False)
    assert surgery.mirror(found.model, onto=target).targets[0].sites == ()
    surgery.undo(found.model, report, found.optimizers)
    with pytest.raises(surgery.MirrorError, match=r"surgery\.undo\(target, report\)"):
        surgery.mirror(found.model, onto=target)
    surgery.undo(target.requires_grad_(True), report)  # what the error says
    assert structure(target) == structure(found.model)


def test_a_part_of_the_model_that_ends_before_the_activation_function_is_refused():
    model, target = Wide(8), Wide(8)
    surgery.knife(model, surgery.Units({"fc": [1]}))
    with pytest.raises(surgery.MirrorError, match="no site of the module that was passed"):
        surgery.mirror(model.fc, onto=target.fc)


def test_layers_that_a_target_shares_with_the_model_are_left_to_it():
    model, target = Wide(8), Wide(8)
    target.fc = model.fc
    surgery.knife(model, surgery.Units({"fc": [1]}))
    x = torch.randn(4, 4)
    surgery.mirror(model, onto=target)
    target.out = model.out
    assert torch.equal(target(x), model(x))


@pytest.mark.situation("Replicas", "load_state_dict into a target that was not mirrored", "refused")
def test_a_hard_copy_into_a_target_without_the_structure_names_the_bank():
    found, target = pair()
    operated(found, 1)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.composite.frozen_weight"'):
        target.load_state_dict(found.model.state_dict())


@pytest.mark.parametrize("frozen", ["own", "shared"])
def test_a_fault_at_any_change_restores_every_target(frozen, monkeypatch):
    """Among the changes are a bank hung, one brought up to a larger one, one taken down, and classes exchanged."""
    found, first = pair()
    second = lagging(found.model)
    report = operated(found, 1, 5)
    surgery.mirror(found.model, onto=second)
    surgery.undo(found.model, report)
    surgery.knife(found.model, surgery.Units({"0": list(range(12))}))
    before = [everything(each) for each in (first, second)]
    planned: list[Any] = []
    run = transaction.run
    monkeypatch.setattr("neuronsurgery.pytorch.mirrors.run", lambda changes, record: planned.extend(changes))
    surgery.mirror(found.model, onto=[first, second], frozen=frozen)
    assert [everything(each) for each in (first, second)] == before

    class Fault:
        def apply(self) -> None:
            raise ZeroDivisionError

        def revert(self) -> None: ...

    for place in range(1, len(planned) + 1):
        with pytest.raises(ZeroDivisionError):
            run([*planned[:place], Fault()])
        assert [everything(each) for each in (first, second)] == before, place
