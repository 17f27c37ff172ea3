"""`surgery.check` finds what goes wrong in silence, says where, and changes nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam

from neuronsurgery import surgery
from neuronsurgery.surgery import Check, CheckError
from tests.snapshots import assert_untouched, snapshot
from tests.subjects import MODELS, OPTIMIZERS, Subject, subject

situation = pytest.mark.situation
UNITS = (0, 1, 2)


def operated(model: str = "sequential", optimizer: str = "adam", steps_after: int = 2) -> Subject:
    """A subject that was operated on in the middle of its training."""
    found = subject(model, optimizer)
    surgery.knife(found.model, surgery.Units(found.units(*UNITS)), optimizer=found.optimizers)
    found.train(steps_after)
    return found


def check(found: Subject) -> Check:
    return surgery.check(found.model, found.optimizers)


# -- nothing wrong ---------------------------------------------------------------------------------------------------


@situation("Checks", "a healthy model", "works")
@pytest.mark.parametrize(
    ("model", "optimizer"), [*((m, "adam") for m in MODELS), *(("sequential", o) for o in OPTIMIZERS if o != "adam")]
)
def test_a_healthy_model_has_no_problem_and_is_left_as_it_was_bit_for_bit(model: str, optimizer: str) -> None:
    found = subject(model, optimizer)
    assert surgery.check(found.model).ok and check(found).ok
    for operation in (1, 2):
        surgery.knife(found.model, surgery.Units(found.units(*UNITS)), optimizer=found.optimizers)
        before = snapshot(found.model, found.optimizers)
        assert check(found).require().ok, operation
        assert_untouched(before, found.model, found.optimizers)
        found.train(2)
        before = snapshot(found.model, found.optimizers)
        assert check(found).require().ok, operation
        assert_untouched(before, found.model, found.optimizers)


@situation("Checks", "after an undo", "works")
def test_a_model_whose_operation_was_undone_has_no_problem() -> None:
    found = subject()
    report = surgery.knife(found.model, surgery.Units(found.units(0)), optimizer=found.optimizers)
    surgery.undo(found.model, report, optimizer=found.optimizers)
    assert check(found).require().notes == ("no composite units",)


@situation("Checks", "while the model is observed", "works")
def test_a_model_that_is_being_observed_has_no_problem() -> None:
    found = operated()
    with surgery.observe(found.model, found.optimizers):
        check(found).require()
    check(found).require()


@situation("Checks", "wrapped models (DataParallel, torch.compile)", "works")
def test_wrappers_are_taken_off() -> None:
    found = operated()
    for wrapped in (nn.DataParallel(found.model), torch.compile(found.model)):
        surgery.check(wrapped, found.optimizers).require()


def test_no_forward_is_run_and_no_hook_fires() -> None:
    found = operated()
    found.model.register_forward_pre_hook(lambda *_: pytest.fail("a hook fired"))
    found.model.register_forward_hook(lambda *_: pytest.fail("a hook fired"))
    check(found).require()


@pytest.mark.parametrize("steps", [0, 1])
def test_active_members_that_have_not_moved_are_counted_and_no_problem(steps: int) -> None:
    found = subject("sequential", "sgd")
    surgery.knife(found.model, surgery.Units({"0": [0, 1, 2]}), optimizer=found.optimizers)
    if steps:
        found.backward()
        for parameter in (found.model[0].weight, found.model[0].bias):
            parameter.grad[1:3] = 0  # as of units that did not fire
        found.optimizers[0].step()
    still = "0: 2 of 3 active members have not moved since their operation; 2 of them received no gradient just now"
    expected = still if steps else "0: 3 of 3 active members have not moved since their operation"
    assert check(found).require().notes == ("3 composite units, 6 frozen rows", expected)


def test_equal_members_are_no_old_weights_written_back() -> None:
    model = subject().model
    for _ in range(2):  # the second time knowledge, active and compensation are all zero
        surgery.knife(model, surgery.Units({"0": [1]}), init=nn.init.zeros_)
    surgery.check(model).require()


def test_a_layer_frozen_after_its_operation_is_no_problem_and_noted() -> None:
    found = operated()
    found.model[0].requires_grad_(False)
    assert "0: its weight is frozen, so that its 3 active members cannot learn" in check(found).require().notes


def test_a_model_must_be_a_module_and_an_optimizer_an_optimizer() -> None:
    with pytest.raises(surgery.ModelError):
        surgery.check([nn.Linear(2, 2)])
    with pytest.raises(surgery.OptimizerError, match=r"takes a torch\.optim\.Optimizer"):
        surgery.check(nn.Linear(2, 2), "adam")


# -- the table of what goes wrong ------------------------------------------------------------------------------------


FAULTS: list[Any] = []


def fault(
    what: str, about: str, *, at: str, says: str, model: str = "sequential", optimizer: str = "adam"
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """A way of breaking a subject, as a row of the table: what the problem concerns, where it is, and what it says."""

    def enter(how: Callable[[Subject], None]) -> Callable[[Subject], None]:
        marks = situation("Checks", what, "works")
        FAULTS.append(pytest.param(how, model, optimizer, about, at, says, id=how.__name__, marks=marks))
        return how

    return enter


class Adapted(nn.Module):
    """A low-rank adapter around a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.up = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(x)


def bank(found: Subject, site: str | None = None) -> Any:
    """The bank of a subject's first site."""
    name = site or found.sites[0]
    return getattr(found.model, f"{name}_composite", None) or found.model.get_submodule(name).composite


@fault("a layer replaced after its operation", "bank", at="1", says="a bank that is gone", optimizer="none")
def replaced_by_a_plain_layer(found: Subject) -> None:
    found.model[0] = nn.Linear(4, 16)


@fault("an adapter (LoRA) around an operated layer", "bank", at="0.base", says="add and ReLU stands there")
def adapted(found: Subject) -> None:
    found.model[0] = Adapted(found.model[0])
    found.optimizers[0].add_param_group({"params": found.model[0].up.parameters()})


@fault("a forward hook on an operated layer", "bank", at="0.composite", says="a forward hook")
def given_a_hook(found: Subject) -> None:
    found.model[0].register_forward_hook(lambda module, args, output: None)


@fault("a class put back", "bank", at="0", says="has no effect")
def given_its_old_class(found: Subject) -> None:
    found.model[0].__class__ = nn.Linear


@fault("an activation exchanged", "bank", at="0", says="ReLU behind it, and GELU")
def given_another_activation(found: Subject) -> None:
    found.model[1] = nn.GELU()


@fault("a norm or a PReLU exchanged", "bank", at="0", says="a PReLU between", model="prelu", optimizer="none")
def given_another_slope(found: Subject) -> None:
    found.model[1] = nn.PReLU(16)


@fault("frozen rows made parameters", "frozen rows", at="0.composite.frozen_weight", says="a parameter")
def made_a_parameter(found: Subject) -> None:
    values = bank(found).frozen_weight
    del bank(found).frozen_weight
    bank(found).frozen_weight = nn.Parameter(values)


@fault("frozen rows that require a gradient", "frozen rows", at="0.composite.frozen_weight", says="requires a gradient")
def made_to_require_a_gradient(found: Subject) -> None:
    bank(found).frozen_weight.requires_grad_(True)


@fault(
    "frozen rows that share a parameter's storage",
    "frozen rows",
    at="0.composite.frozen_weight",
    says="shares its storage with the parameter '0.weight'",
)
def tied_to_a_parameter(found: Subject) -> None:
    room = len(bank(found).frozen_weight)
    bank(found).frozen_weight = found.model[0].weight.detach()[:room]


@fault("frozen rows in an optimizer", "frozen rows", at="0.composite", says="an optimizer owns rows")
def given_to_an_optimizer(found: Subject) -> None:
    found.optimizers[0].add_param_group({"params": [bank(found).frozen_bias]})


@fault("a bank of another capacity than its structure", "bank", at="0", says="room for 3 rows")
def cut_short(found: Subject) -> None:
    bank(found).frozen_weight = bank(found).frozen_weight[:3]


@fault("a bank of another dtype than its layer", "bank", at="0", says="torch.float64")
def cast_alone(found: Subject) -> None:
    bank(found).double()


@fault("a bank with rows that do not pair", "bank", at="0", says="units 1 do not have a compensation row")
def unpaired(found: Subject) -> None:
    rows = bank(found).rows
    bank(found).rows = rows.kept(rows.sign * rows.unit != -1)


@fault("a bank with the tables of another", "bank", at="0", says="tables (order)")
def of_other_tables(found: Subject) -> None:
    bank(found).order = bank(found).order.roll(1, 0)


@fault("tied layers with different banks", "bank", at="one", says="2 modules own its weight", model="shared")
def owned_by_one_of_two(found: Subject) -> None:
    found.model.two._modules["composite"] = copy.deepcopy(found.model.one.composite)


@fault("tied layers with different banks", "bank", at="one", says="2 modules own its weight", model="shared")
def missing_at_one_of_two(found: Subject) -> None:
    del found.model.two._modules["composite"]


@fault("frozen rows that are not finite", "not finite", at="0, 'frozen_bias'", says="units 1")
def not_a_number(found: Subject) -> None:
    bank(found).frozen_bias[1] = torch.nan


@fault("active members that are not finite", "not finite", at="0, 'weight'", says="units 1")
def active_not_a_number(found: Subject) -> None:
    with torch.no_grad():
        found.model[0].weight[1, 0] = torch.inf


@fault("optimizer state that is not finite", "not finite", at="0, 'weight'", says="'exp_avg' of units 1")
def state_not_a_number(found: Subject) -> None:
    found.optimizers[0].state[found.model[0].weight]["exp_avg"][1] = torch.nan


@fault("old weights written back into slots", "active members", at="0", says="units 1")
def old_weights_written_back(found: Subject) -> None:
    with torch.no_grad():
        found.model[0].weight[1] = bank(found).frozen_weight[1]
        found.model[0].bias[1] = bank(found).frozen_bias[1]


@fault("a parameter that no optimizer owns", "optimizer", at="6.weight, 6.bias", says="no optimizer owns them")
def a_new_parameter(found: Subject) -> None:
    found.model.append(nn.Linear(2, 2))


@fault("a parameter that two optimizers own", "optimizer", at="2.weight, 2.bias", says="more than once")
def another_optimizer(found: Subject) -> None:
    found.optimizers.append(SGD(found.model[2].parameters(), lr=0.1))


@fault(
    "births ahead of the optimizer's count",
    "ages",
    at="0, 'weight'",
    says="born at steps up to 3, and the optimizer counts 0",
)
def an_optimizer_made_anew(found: Subject) -> None:
    found.optimizers[:] = [Adam(found.model.parameters())]


@fault("a clock of steps lost", "step hooks", at="0, 'weight'", says="nothing counts", optimizer="sgd")
def an_optimizer_without_clock(found: Subject) -> None:
    found.optimizers[:] = [SGD(found.model.parameters(), lr=0.1)]


@fault("step hooks lost in a copy or pickle", "step hooks", at="0, 'weight'", says="are not corrected")
def a_copy_of_both(found: Subject) -> None:
    """As a pickle of a trainer makes it: neither has hooks."""
    both = pickle.loads(pickle.dumps((found.model, found.optimizers[0])))
    object.__setattr__(found, "model", both[0])
    found.optimizers[:] = [both[1]]


@fault("a model quantized after its operation", "bank", at="the model", says="quantized", optimizer="none")
def quantized(found: Subject) -> None:
    found.model.register_module("packed", torch.ao.nn.quantized.ReLU6())
    for module in found.model.modules():
        module._parameters.clear()


@pytest.mark.parametrize(("how", "model", "optimizer", "about", "where", "says"), FAULTS)
def test_a_fault_is_found_where_it_is(
    how: Callable[[Subject], None], model: str, optimizer: str, about: Any, where: str, says: str
) -> None:
    found = operated(model, "sgd" if optimizer == "none" else optimizer)
    check(found).require()
    how(found)
    before = snapshot(found.model, found.optimizers)
    result = surgery.check(found.model, () if optimizer == "none" else found.optimizers)
    assert_untouched(before, found.model, found.optimizers)
    assert not result and not result.ok
    assert {problem.about for problem in result.problems} == {about}, str(result)
    assert any(where in each.where.split("; ") and says in each.found for each in result.problems), str(result)
    assert says in str(result)
    with pytest.raises(CheckError, match="problem"):
        result.require()


def test_an_optimizer_of_another_model_is_told_by_what_it_owns() -> None:
    found = operated()
    other = copy.deepcopy(found.model)
    (problem,) = surgery.check(other, found.optimizers).about("optimizer")
    assert (
        "6 trainable parameters of 6" in problem.found
        and "of the 6 that they own 6 are not the model's" in problem.found
    )


def test_a_check_goes_to_json_and_back() -> None:
    found = operated()
    given_its_old_class(found)
    result = check(found)
    assert Check.from_json(result.to_json()) == result


def test_young_rows_of_a_copy_are_no_problem_once_they_are_old() -> None:
    found = operated("sequential", "adam", steps_after=0)
    a_copy_of_both(found)
    for state in found.optimizers[0].state.values():
        state["step"] += 20_000
    check(found).require()


# -- mirrors ---------------------------------------------------------------------------------------------------------


@situation("Checks", "a target network of another structure", "works")
def test_a_target_network_that_lacks_an_operation_is_named() -> None:
    found = operated()
    target = copy.deepcopy(found.model).requires_grad_(False)
    surgery.check(found.model, found.optimizers, mirrors=target).require()
    surgery.knife(found.model, surgery.Units({"2": [3]}), optimizer=found.optimizers)
    result = surgery.check(found.model, found.optimizers, mirrors=[copy.deepcopy(found.model), target])
    assert [(each.about, each.where, each.found) for each in result.problems] == [
        ("mirror", "mirrors[1]: 2.composite", "lacks operation 2")
    ]
    result = surgery.check(target, mirrors=found.model)
    assert result.problems[0].found == "has operation 2, which the model has not"


def test_problems_of_a_target_network_itself_are_named_with_it() -> None:
    found = operated()
    target = copy.deepcopy(found.model)
    target[0].composite.frozen_bias[0] = torch.inf
    (problem,) = surgery.check(found.model, found.optimizers, mirrors=[target]).problems
    assert problem.where == "mirrors[0]: 0, 'frozen_bias'"


# -- a bank that could no longer be applied --------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.relu(self.two(F.relu(self.one(x)))))


def sequential() -> Any:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def operated_once(make: Callable[[], Any]) -> tuple[Any, str, str, torch.Tensor]:
    """A model with composite units whose active members have moved, its two sites, and an input."""
    model = make()
    first, second = surgery.discover(model)
    surgery.knife(model, surgery.Units({first: [0, 1, 2]}))
    with torch.no_grad():
        model.get_submodule(first).weight[:3] += 0.5
    return model, first, second, torch.randn(5, 4)


@situation("When to operate", "after a layer with composite units was frozen", "works")
@pytest.mark.parametrize("make", [Net, sequential])
def test_a_frozen_layer_keeps_its_composite_units_when_another_is_operated_on(make: Callable[[], Any]) -> None:
    model, first, second, x = operated_once(make)
    model.get_submodule(first).requires_grad_(False)
    before = model(x)
    assert list(surgery.discover(model)) == [second]
    report = surgery.knife(model, surgery.Units({second: [0]}))
    torch.testing.assert_close(model(x), before)
    with surgery.observe(model):
        torch.testing.assert_close(model(x), before)
    with pytest.raises(surgery.SiteError, match="frozen"):
        surgery.knife(model, surgery.Units({first: [4]}))
    surgery.undo(model, report)
    torch.testing.assert_close(model(x), before)
    assert surgery.composites(model).num_units == 3


@situation("When to operate", "after a hook was put on a layer with composite units", "refused")
@pytest.mark.parametrize("make", [Net, sequential])
def test_operating_and_observing_are_refused_where_a_bank_would_be_left_out(make: Callable[[], Any]) -> None:
    model, first, second, x = operated_once(make)
    handle = model.get_submodule(first).register_forward_hook(lambda module, args, output: None)
    before = model(x)
    for attempt in (
        lambda: surgery.knife(model, surgery.Units({second: [0]})),
        lambda: surgery.observe(model).__enter__(),
        lambda: surgery.probe(model, [x], lambda model, x: model(x).sum()),
    ):
        with pytest.raises(surgery.ModelError, match=f"{first}.composite.*a forward hook.*surgery.check"):
            attempt()
    assert torch.equal(model(x), before)
    handle.remove()
    surgery.knife(model, surgery.Units({second: [0]}))
    torch.testing.assert_close(model(x), before)


@situation("When to operate", "after an operated layer was replaced (LoRA, quantization)", "refused")
def test_a_forward_whose_bank_went_with_a_replaced_layer_names_the_bank() -> None:
    model, _, _, x = operated_once(Net)
    before = model(x)
    layer = model.one
    model.one = Adapted(layer)
    for _ in range(2):
        with pytest.raises(
            surgery.SurgeryError, match=r"the bank 'one.composite' of this Net is gone.*Put the layer back"
        ):
            model(x)
    model.one = layer
    assert torch.equal(model(x), before)


def test_operating_is_refused_where_a_sequentials_rows_would_pass_something_else() -> None:
    model, _, second, x = operated_once(sequential)
    layer, before = model[0], model(x)
    model[0] = Adapted(layer)
    with pytest.raises(
        surgery.ModelError, match=r"0.base: its bank was made for ReLU behind it, and add and ReLU stands there"
    ):
        surgery.knife(model, surgery.Units({second: [0]}))
    model[0] = layer
    surgery.knife(model, surgery.Units({second: [0]}))
    torch.testing.assert_close(model(x), before)
