"""Undo after operate is the identity, bit for bit, newest operation first; anything else is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.optimizers import current_step, young_rows
from neuronsurgery.reports import Report
from tests.snapshots import bits
from tests.subjects import MODELS, OPTIMIZERS, Subject, subject


def operated(found: Subject, *units: int, **options: Any) -> Report:
    return surgery.knife(found.model, surgery.Units(found.units(*units)), optimizer=found.optimizers, **options)


def everything(model: nn.Module) -> dict[str, Any]:
    """What undo must bring back: state dict with keys in order, classes, children, parameters' identities."""
    found: dict[str, Any] = {"keys": list(model.state_dict())}
    found |= {f"state {key}": bits(value) for key, value in model.state_dict().items()}
    found |= {f"class {name}": type(module) for name, module in model.named_modules()}
    found |= {f"id {name}": id(parameter) for name, parameter in model.named_parameters()}
    found |= {f"buffers {name}": list(module._buffers) for name, module in model.named_modules()}
    return found


def output(found: Subject) -> bytes:
    torch.manual_seed(0)  # for dropout
    with torch.no_grad():
        return bits(found.model(found.x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("model", MODELS)
def test_undo_is_the_identity_bit_for_bit(model, training):
    found = subject(model)
    found.model.train(training)
    found.model.eval() if model == "conv" else None  # batch norm in training moves its statistics at each call
    before, y = everything(found.model), output(found)
    report = operated(found, 1, 5)
    assert everything(found.model) != before
    surgery.undo(found.model, report, found.optimizers)
    assert everything(found.model) == before
    assert output(found) == y
    assert not any(isinstance(module, Composite) for module in found.model.modules())


@pytest.mark.parametrize("model", MODELS)
def test_undoing_several_operations_newest_first_brings_each_state_back(model):
    found = subject(model)
    found.model.eval()
    states, reports = [], []
    for units in ([1, 5], [5, 6], [0, 1, 2, 3, 4, 5], [15]):
        states.append((everything(found.model), output(found)))
        reports.append(operated(found, *units))
    while reports:
        surgery.undo(found.model, reports.pop(), found.optimizers)
        assert (everything(found.model), output(found)) == states.pop()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_training_undo_puts_the_old_weights_back_and_leaves_the_other_rows(optimizer):
    found = subject("sequential", optimizer)
    layer = found.model[0]
    old = layer.weight.detach().clone(), layer.bias.detach().clone()
    report = surgery.knife(found.model, surgery.Units({"0": [1, 5]}), optimizer=found.optimizers)
    found.train(4)
    trained = layer.weight.detach().clone()
    surgery.undo(found.model, report, found.optimizers)
    for now, then in zip((layer.weight, layer.bias), old, strict=True):
        assert bits(now[[1, 5]]) == bits(then[[1, 5]])
    others = [unit for unit in range(16) if unit not in (1, 5)]
    assert bits(layer.weight[others]) == bits(trained[others])
    assert not torch.equal(trained[[1, 5]], layer.weight[[1, 5]])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_undo_makes_the_optimizer_state_of_its_rows_fresh_and_leaves_all_other_state(optimizer):
    found = subject("sequential", optimizer)
    weight = found.model[0].weight
    report = surgery.knife(found.model, surgery.Units({"0": [1, 5]}), optimizer=found.optimizers)
    found.train(4)
    states = [(one, key, entry) for o in found.optimizers for one, s in o.state.items() for key, entry in s.items()]
    before = [entry.clone() if isinstance(entry, torch.Tensor) else entry for _, _, entry in states]
    surgery.undo(found.model, report, found.optimizers)
    seen = 0
    for (parameter, key, entry), was in zip(states, before, strict=True):
        if not isinstance(entry, torch.Tensor):
            assert entry == was
            continue
        others = [unit for unit in range(len(entry) if entry.dim() else 0) if unit not in (1, 5)]
        if entry.shape == weight.shape and parameter is weight:
            assert not entry[[1, 5]].any(), key  # all of these optimizers start at zero
            assert entry[others].any()
            assert bits(entry[others]) == bits(was[others])
            seen += 1
        elif parameter is not found.model[0].bias:
            assert bits(entry) == bits(was), key
    assert seen or optimizer == "sgd"
    if optimizer in ("adam", "adamw", "two"):
        (owner, *_) = found.optimizers
        now = current_step([owner], weight)
        assert young_rows(owner)[weight] == {1: now, 5: now}


def test_a_gradient_that_is_there_is_zeroed_in_the_rows_undone_only():
    found = subject()
    report = surgery.knife(found.model, surgery.Units({"0": [1]}), optimizer=found.optimizers)
    found.backward()
    gradient = found.model[0].weight.grad
    was = gradient.clone()
    surgery.undo(found.model, report, found.optimizers)
    assert found.model[0].weight.grad is gradient
    assert not gradient[1].any()
    others = [unit for unit in range(16) if unit != 1]
    assert bits(gradient[others]) == bits(was[others])


def test_undo_of_part_keeps_the_units_operated_on_otherwise():
    found = subject()
    found.model.eval()
    surgery.knife(found.model, surgery.Units({"0": [3]}), optimizer=found.optimizers)
    between = everything(found.model)
    second = surgery.knife(found.model, surgery.Units({"0": [1, 5]}), optimizer=found.optimizers)
    third = surgery.knife(found.model, surgery.Units({"0": [3]}), optimizer=found.optimizers)
    y = found.model(found.x)
    surgery.undo(found.model, second, found.optimizers)  # the third operated on other units: nothing intervened
    assert torch.allclose(found.model(found.x), y, atol=1e-6)
    surgery.undo(found.model, third, found.optimizers)
    assert everything(found.model) == between


# -- without a report ------------------------------------------------------------------------------------------------


def test_the_last_operation_is_undone_by_default_down_to_the_first():
    found = subject()
    found.model.eval()
    states, reports = [], []
    for units in ([1, 5], [5, 6], [15]):
        states.append(everything(found.model))
        reports.append(operated(found, *units))
    while reports:
        report, undone = reports.pop(), surgery.undo(found.model, optimizer=found.optimizers)
        assert (undone.operation, undone.operated) == (report.operation, report.operated)
        assert everything(found.model) == states.pop()
    with pytest.raises(surgery.UndoError, match="no composite unit: there is nothing to undo"):
        surgery.undo(found.model)


@pytest.mark.parametrize("model", MODELS)
def test_an_operation_of_which_no_unit_was_touched_later_is_undone_by_its_number(model):
    by_number, by_report = subject(model), subject(model)
    for found in (by_number, by_report):
        operated(found, 3)
        middle = operated(found, 1, 5)
        operated(found, 3, 6)
        surgery.undo(found.model, 2 if found is by_number else middle, found.optimizers)
    assert numbers(by_number.model) == [1, 3]
    first, second = by_number.model.state_dict(), by_report.model.state_dict()
    assert {key: bits(value) for key, value in first.items()} == {key: bits(value) for key, value in second.items()}
    surgery.undo(by_number.model, 3)
    surgery.undo(by_number.model, 1)
    assert numbers(by_number.model) == []


def numbers(model: nn.Module) -> list[int]:
    return list(surgery.composites(model).operations)


def test_an_operation_by_number_with_a_later_one_on_its_units_is_refused():
    found = subject()
    operated(found, 1, 5)
    operated(found, 5)
    before = everything(found.model)
    with pytest.raises(surgery.UndoError, match=r"operation 2 came after operation 1 on units \[5\]"):
        surgery.undo(found.model, 1)
    assert everything(found.model) == before


def test_a_number_that_the_banks_do_not_hold_is_refused_with_those_that_they_do():
    found = subject()
    for unit in (1, 2):
        operated(found, unit)
    with pytest.raises(surgery.UndoError, match="operation 7 is not in this model, whose banks hold 1, 2"):
        surgery.undo(found.model, 7)
    wrongs: tuple[Any, ...] = (True, "1")
    for wrong in wrongs:
        with pytest.raises(surgery.UndoError, match="pass its report, its number, or nothing for the last"):
            surgery.undo(found.model, wrong)


def test_an_operation_that_was_consolidated_in_part_is_undone_by_number_only():
    found = subject()
    first = operated(found, 1, 5)
    operated(found, 1)  # no step between: of unit 1 the first operation's active member never moved
    surgery.consolidate(found.model)
    assert surgery.composites(found.model).operations == {1: {"0": (5,), "2": (5,)}, 2: {"0": (1,), "2": (1,)}}
    with pytest.raises(surgery.UndoError, match=r"only units \[5\] are left.*surgery.undo\(model, 1\)"):
        surgery.undo(found.model, first)
    assert surgery.undo(found.model, 1).operated == {"0": (5,), "2": (5,)}
    assert surgery.undo(found.model, 2).operated == {"0": (1,), "2": (1,)}
    assert everything(found.model)["keys"] == everything(subject().model)["keys"]


def test_an_operation_whose_rows_fade_is_refused_by_number_too():
    found = subject("sequential", "adam")
    operated(found, 1, retire=9)
    found.train(1)
    with pytest.raises(surgery.UndoError, match="have begun to fade"):
        surgery.undo(found.model)


def test_the_report_of_an_undo_by_number_prints_the_operation_as_its_own_report_does():
    found, other = subject(), subject()
    reports = [operated(each, 1, 5) for each in (found, other)]
    by_number, by_report = surgery.undo(found.model, 1), surgery.undo(other.model, reports[1])
    assert str(by_number).splitlines()[1:4] == str(by_report).splitlines()[1:4]
    assert by_number.plan.units == reports[0].plan.units and by_number.notes == ("operation 1 was undone",)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_later_operation_on_one_of_the_units_is_named():
    found = subject()
    first = surgery.knife(found.model, surgery.Units({"0": [1, 5]}), optimizer=found.optimizers)
    second = surgery.knife(found.model, surgery.Units({"0": [5, 6]}), optimizer=found.optimizers)
    before = everything(found.model)
    with pytest.raises(surgery.UndoError) as caught:
        surgery.undo(found.model, first, found.optimizers)
    text = str(caught.value)
    assert "operation 2 came after operation 1 on units [5] of '0'" in text
    assert "undo the newest first" in text
    assert everything(found.model) == before
    surgery.undo(found.model, second)
    surgery.undo(found.model, first)


def test_undoing_twice_is_refused():
    found = subject()
    report = operated(found, 1)
    surgery.undo(found.model, report)
    with pytest.raises(surgery.UndoError, match="operation 1 on '0' is not in this model: it was undone"):
        surgery.undo(found.model, report)


def test_undo_on_another_model_is_refused():
    found, other = subject(), subject()
    report = operated(found, 1)
    with pytest.raises(surgery.UndoError, match="another model"):
        surgery.undo(other.model, report)
    with pytest.raises(surgery.UndoError, match="another model"):
        surgery.undo(subject("functional").model, report)
    surgery.knife(other.model, surgery.Units({"0": [2]}))
    with pytest.raises(surgery.UndoError, match="another model"):
        surgery.undo(other.model, report)


def test_undo_of_a_report_without_operated_units_is_refused():
    found = subject()
    report = surgery.knife(found.model, surgery.Units({}))
    assert report.num_units == 0
    with pytest.raises(surgery.UndoError, match="nothing to undo"):
        surgery.undo(found.model, report)


def test_undo_with_a_strangers_optimizer_is_refused_before_anything_changes():
    found = subject()
    report = operated(found, 1)
    before = everything(found.model)
    with pytest.raises(surgery.OptimizerError, match="owns none"):
        surgery.undo(found.model, report, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert everything(found.model) == before


# -- what an undo survives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_report_from_json_undoes_on_a_copy(carry):
    found = subject()
    before = everything(found.model)
    report = Report.from_json(operated(found, 1, 5).to_json())
    twin = carry(found.model)
    undone = surgery.undo(twin, report)
    state = {key: value for key, value in before.items() if key.startswith("state") or key == "keys"}
    assert {key: everything(twin)[key] for key in state} == state
    assert [type(module) for module in twin.modules()] == [type(module) for module in subject().model.modules()]
    assert undone.parameters_after < undone.parameters_before
    assert undone.notes == ("operation 1 was undone",)


def test_a_model_undone_can_be_operated_on_again_with_the_same_result():
    one, two = subject(), subject()
    report = operated(one, 1, 5)
    surgery.undo(one.model, report, one.optimizers)
    again, only = operated(one, 1, 5), operated(two, 1, 5)
    assert again == only
    assert {k: bits(v) for k, v in one.model.state_dict().items()} == {
        k: bits(v) for k, v in two.model.state_dict().items()
    }
