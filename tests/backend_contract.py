"""What any backend must pass, whatever its framework: the functions of `neuronsurgery.backend.Backend`, held to it.

A backend supplies a `Lab`: a few callables that make, run and train small models of its framework. The tests of the
contract are the methods of `BackendContract`; a test module derives a class from it and gives the lab as a fixture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from neuronsurgery.backend import Backend
from neuronsurgery.choosing import Random, Units
from neuronsurgery.errors import EvidenceError, PlanError, SurgeryError, UndoError
from neuronsurgery.evidence import Evidence, Quantity, update_activity
from neuronsurgery.measuring import Stagnant
from neuronsurgery.plans import Plan, plan
from neuronsurgery.reports import Report
from neuronsurgery.scores import score
from neuronsurgery.selection import select
from neuronsurgery.sites import Sites

__all__ = ["BackendContract", "Lab"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Lab:
    """What a backend supplies to be tested; arrays are numpy's.

    The model is a network of 4 inputs, a hidden layer named `site` of 8 units with a ReLU, and a head named `head` of 2
    outputs, in float64.
    """

    backend: Backend
    site: str
    head: str
    model: Callable[[int], Any]
    """A model by its seed."""
    optimizer: Callable[[Any], Any]
    """An optimizer of the model that counts its steps."""
    batch: Callable[[Array], Any]
    """(num_samples, 4) as the model takes it."""
    output: Callable[[Any, Any], Array]
    """The model's output for a batch."""
    loss: Callable[[Any, Any], Any]
    """A scalar loss of the model on a batch, as `probe` takes it."""
    differentiate: Callable[[Any, Any], None]
    """Leave the gradients of that loss where the framework leaves them."""
    step: Callable[[Any, Any, Any], None]
    """A training step: model, optimizer, batch."""
    weights: Callable[[Any], dict[str, Array]]
    """All weights of the model that train, by name: copies."""
    incoming: Callable[[Any], Array]
    """The hidden layer's weight, (8, 4)."""
    gradient: Callable[[Any], Array]
    """Its gradient, (8, 4)."""
    generator: Callable[[int], Any]
    """A source of random numbers by its seed."""


def planned(lab: Lab, model: Any, units: Sequence[int]) -> Plan:
    sites = lab.backend.discover(model)
    return plan(select(score(sites, None, Units({lab.site: units}))))


def batch_of(lab: Lab, seed: int = 0, num_samples: int = 16) -> Any:
    return lab.batch(np.random.default_rng(seed).standard_normal((num_samples, 4)))


def assert_same_output(before: Array, after: Array) -> None:
    """At most 1e-12 of the largest output, as float64 is promised."""
    error = float(np.abs(after - before).max() / np.abs(before).max())
    assert error <= 1e-12, f"the output moved by {error:.3g}"


def assert_same_weights(before: dict[str, Array], after: dict[str, Array]) -> None:
    """Bit for bit, under the same names in the same order."""
    assert list(before) == list(after)
    moved = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert not moved, f"moved: {moved}"


class BackendContract:
    """The tests; `lab` is a fixture of the class that derives from this one."""

    def test_discover_finds_the_hidden_layer_and_declines_the_head(self, lab: Lab) -> None:
        sites = lab.backend.discover(lab.model(0))
        assert list(sites) == [lab.site]
        assert (sites[lab.site].num_units, sites[lab.site].num_frozen) == (8, 0)
        assert sites.declined[lab.head]
        assert Sites.from_json(sites.to_json()) == sites

    def test_discover_changes_nothing(self, lab: Lab) -> None:
        model = lab.model(0)
        before = lab.weights(model)
        assert lab.backend.discover(model) == lab.backend.discover(model)
        assert_same_weights(before, lab.weights(model))

    def test_measure_reads_the_gradients_that_are_there(self, lab: Lab) -> None:
        model = lab.model(0)
        lab.differentiate(model, batch_of(lab))
        evidence = lab.backend.measure(model, lab.backend.discover(model))
        norms = (np.linalg.norm(each, axis=1) for each in (lab.incoming(model), lab.gradient(model)))
        found = np.asarray(evidence.measured(lab.site)[Quantity.UPDATE_ACTIVITY])
        np.testing.assert_allclose(found, update_activity(*norms), rtol=1e-6)
        assert evidence.num_steps == 1

    def test_measure_without_gradients_is_refused(self, lab: Lab) -> None:
        model = lab.model(0)
        with pytest.raises(EvidenceError, match="no gradients"):
            lab.backend.measure(model, lab.backend.discover(model))

    def test_observe_measures_every_step_of_a_training_and_no_other(self, lab: Lab) -> None:
        model = lab.model(0)
        optimizer = lab.optimizer(model)
        with lab.backend.observe(model, optimizer) as evidence:
            for seed in range(3):
                lab.step(model, optimizer, batch_of(lab, seed))
        lab.step(model, optimizer, batch_of(lab))
        assert (evidence.num_steps, evidence.num_skipped) == (3, 0)
        assert set(evidence.measured(lab.site)) == set(Quantity)
        assert evidence.num_samples(lab.site, Quantity.ACTIVATION) == 3 * 16

    def test_observe_measures_no_pass_of_an_unobserved_block(self, lab: Lab) -> None:
        model, (seen, unseen) = lab.model(0), (batch_of(lab), batch_of(lab, 1))
        with lab.backend.observe(model) as evidence:
            lab.differentiate(model, seen)
            with lab.backend.unobserved():
                lab.loss(model, unseen)
        assert evidence.num_samples(lab.site, Quantity.ACTIVATION) == 16

    def test_observe_changes_no_training(self, lab: Lab) -> None:
        observed, plain = lab.model(0), lab.model(0)
        optimizers = lab.optimizer(observed), lab.optimizer(plain)
        with lab.backend.observe(observed, optimizers[0]):
            lab.step(observed, optimizers[0], batch_of(lab))
        lab.step(plain, optimizers[1], batch_of(lab))
        assert_same_weights(lab.weights(plain), lab.weights(observed))

    def test_probe_measures_a_step_a_batch_and_leaves_the_model(self, lab: Lab) -> None:
        model = lab.model(0)
        before = lab.weights(model)
        evidence = lab.backend.probe(model, [batch_of(lab), batch_of(lab, 1)], lab.loss)
        assert evidence.num_steps == 2
        assert set(evidence.measured(lab.site)) == set(Quantity)
        assert_same_weights(before, lab.weights(model))
        with pytest.raises(EvidenceError, match="no gradients"):
            lab.backend.measure(model, lab.backend.discover(model))

    def test_probe_and_present_gradients_agree(self, lab: Lab) -> None:
        model = lab.model(0)
        probed = lab.backend.probe(model, [batch_of(lab)], lab.loss)
        lab.differentiate(model, batch_of(lab))
        present = lab.backend.measure(model, lab.backend.discover(model))
        for quantity in (Quantity.UPDATE_ACTIVITY, Quantity.RELATIVE_UPDATE_ACTIVITY):
            one, other = (np.asarray(each.measured(lab.site)[quantity]) for each in (probed, present))
            np.testing.assert_allclose(one, other, rtol=1e-12)

    def test_evidence_of_another_model_is_refused(self, lab: Lab) -> None:
        model, other = lab.model(0), lab.model(0)
        evidence = lab.backend.probe(other, [batch_of(lab)], lab.loss)
        lab.backend.check_source(evidence, other)
        with pytest.raises(EvidenceError, match="another model"):
            lab.backend.check_source(evidence, model)
        lab.backend.check_source(Evidence(evidence.sites), model)  # of no one in particular

    def test_operate_leaves_the_output_and_renews_the_units(self, lab: Lab) -> None:
        model, x = lab.model(0), batch_of(lab)
        y, before = lab.output(model, x), lab.incoming(model)
        report = lab.backend.operate(model, planned(lab, model, [1, 5]), verify=x)
        assert_same_output(y, lab.output(model, x))
        moved = [unit for unit in range(8) if not np.array_equal(before[unit], lab.incoming(model)[unit])]
        assert moved == [1, 5]
        assert report.operated == {lab.site: (1, 5)}
        assert report.verified and report.max_error <= 1e-12
        assert Report.from_json(report.to_json()) == report

    def test_operations_repeat_on_the_same_units(self, lab: Lab) -> None:
        model, x = lab.model(0), batch_of(lab)
        optimizer = lab.optimizer(model)
        for number, other in enumerate((2, 3, 4), start=1):
            lab.step(model, optimizer, x)
            y = lab.output(model, x)
            report = lab.backend.operate(model, planned(lab, model, [1, other]), optimizer=optimizer)
            assert report.operation == number
            assert_same_output(y, lab.output(model, x))
        assert lab.backend.discover(model)[lab.site].num_frozen == 12  # three operations on two units, two rows each
        assert lab.backend.composites(model).num_units == 4

    def test_an_operation_adds_nothing_that_trains_and_training_moves_the_active_members(self, lab: Lab) -> None:
        model, x = lab.model(0), batch_of(lab)
        optimizer = lab.optimizer(model)
        names = list(lab.weights(model))
        lab.backend.operate(model, planned(lab, model, range(8)), optimizer=optimizer)
        assert list(lab.weights(model)) == names
        before, frozen = lab.incoming(model), lab.backend.composites(model)
        for _ in range(5):
            lab.step(model, optimizer, x)
        assert (lab.incoming(model) != before).any(axis=1).sum() >= 4
        assert lab.backend.composites(model) == frozen

    def test_an_empty_plan_changes_nothing(self, lab: Lab) -> None:
        model = lab.model(0)
        before = lab.weights(model)
        assert lab.backend.operate(model, planned(lab, model, [])).num_units == 0
        assert_same_weights(before, lab.weights(model))

    def test_a_plan_of_another_model_is_refused_and_changes_nothing(self, lab: Lab) -> None:
        model = lab.model(0)
        before = lab.weights(model)
        wrong = Plan({"nowhere": (0,)}, {}, "by hand", 4.0, (), Sites({}))
        with pytest.raises((PlanError, SurgeryError)):
            lab.backend.operate(model, wrong)
        beyond = Plan({lab.site: (8,)}, {}, "by hand", 4.0, (), Sites({}))
        with pytest.raises(PlanError, match="below 8"):
            lab.backend.operate(model, beyond)
        assert_same_weights(before, lab.weights(model))

    def test_an_initializer_that_fails_changes_nothing(self, lab: Lab) -> None:
        model = lab.model(0)
        before = lab.weights(model)

        def failing(_: Any) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            lab.backend.operate(model, planned(lab, model, [1]), init=failing)
        assert_same_weights(before, lab.weights(model))
        assert lab.backend.composites(model).num_rows == 0

    def test_undo_after_operate_is_the_identity(self, lab: Lab) -> None:
        model, x = lab.model(0), batch_of(lab)
        before, y = lab.weights(model), lab.output(model, x)
        reports = [lab.backend.operate(model, planned(lab, model, units)) for units in ([1, 5], [5], [2])]
        with pytest.raises(UndoError, match="undo the newest first"):
            lab.backend.undo(model, reports[0])
        for report in reversed(reports):
            lab.backend.undo(model, report)
        assert_same_weights(before, lab.weights(model))
        assert lab.output(model, x).tobytes() == y.tobytes()
        assert lab.backend.composites(model).num_rows == 0
        with pytest.raises(UndoError):
            lab.backend.undo(model, reports[0])

    def test_undo_without_a_report_takes_back_the_last_operation_or_the_one_of_a_number(self, lab: Lab) -> None:
        model = lab.model(0)
        before = lab.weights(model)
        for units in ([1, 5], [2], [5]):
            lab.backend.operate(model, planned(lab, model, units))
        assert lab.backend.undo(model).operated == {lab.site: (5,)}
        assert lab.backend.undo(model, 1).operated == {lab.site: (1, 5)}
        assert lab.backend.undo(model).operation == 2
        assert_same_weights(before, lab.weights(model))
        with pytest.raises(UndoError, match="no composite unit"):
            lab.backend.undo(model)

    def test_flatten_keeps_the_output_in_a_plain_wider_network(self, lab: Lab) -> None:
        model, x = lab.model(0), batch_of(lab)
        for units in ([1, 5], [5], [2]):
            lab.backend.operate(model, planned(lab, model, units))
        y = lab.output(model, x)
        report = lab.backend.flatten(model, verify=x)
        found = report.sites[lab.site]
        assert (found.units_before, found.dropped, found.units_after) == (8, 2, 14)  # unit 5 never moved in between
        np.testing.assert_allclose(lab.output(model, x), y, rtol=1e-12, atol=1e-12)
        assert lab.backend.composites(model).num_rows == 0
        assert lab.backend.discover(model)[lab.site].num_units == report.sites[lab.site].units_after

    def test_check_finds_nothing_after_an_operation_and_names_what_another_optimizer_does_not_own(
        self, lab: Lab
    ) -> None:
        model, x = lab.model(0), batch_of(lab)
        optimizer = lab.optimizer(model)
        lab.step(model, optimizer, x)
        lab.backend.operate(model, planned(lab, model, [1]), optimizer=optimizer)
        before = lab.weights(model)
        assert lab.backend.check(model, optimizer).ok
        assert lab.backend.check(model, lab.optimizer(lab.model(1))).about("optimizer")
        (problem,) = lab.backend.check(model, optimizer, mirrors=lab.model(0)).problems
        assert problem.about == "mirror" and lab.site in problem.where
        assert_same_weights(before, lab.weights(model))

    def test_ages_count_the_optimizers_steps_since_the_latest_operation(self, lab: Lab) -> None:
        model, x = lab.model(0), batch_of(lab)
        optimizer = lab.optimizer(model)
        assert lab.backend.ages(model, optimizer) == {}
        lab.step(model, optimizer, x)
        lab.backend.operate(model, planned(lab, model, [1, 5]), optimizer=optimizer)
        for _ in range(3):
            lab.step(model, optimizer, x)
        lab.backend.operate(model, planned(lab, model, [5]), optimizer=optimizer)
        lab.step(model, optimizer, x)
        assert lab.backend.ages(model, optimizer) == {lab.site: {1: 4, 5: 1}}
        assert lab.backend.ages(model, None) == {}

    def test_the_draw_and_the_seed_follow_from_the_generator(self, lab: Lab) -> None:
        def drawn(seed: int) -> tuple[int, Array]:
            model, generator = lab.model(0), lab.generator(seed)
            number = lab.backend.seed(model, generator)
            lab.backend.operate(model, planned(lab, model, [1]), generator=generator)
            return number, lab.incoming(model)[1]

        assert drawn(1)[0] == drawn(1)[0] != drawn(2)[0]
        assert np.array_equal(drawn(1)[1], drawn(1)[1])
        assert not np.array_equal(drawn(1)[1], drawn(2)[1])

    def test_a_copy_gives_the_same_report(self, lab: Lab) -> None:
        model = lab.model(0)
        lab.backend.operate(model, planned(lab, model, [1]))
        twin = copy.deepcopy(model)
        chosen = planned(lab, model, [1, 2])
        one, other = lab.backend.operate(model, chosen), lab.backend.operate(twin, Plan.from_json(chosen.to_json()))
        assert one == other
        assert_same_weights(lab.weights(model), lab.weights(twin))

    def test_the_stages_run_from_discovery_to_report(self, lab: Lab) -> None:
        model, x = lab.model(0), batch_of(lab)
        evidence = lab.backend.probe(model, [x], lab.loss)
        sites = lab.backend.discover(model)
        for criterion in (Stagnant(threshold=1.0), Random(0.5)):
            scores = score(sites, evidence, criterion, seed=lab.backend.seed(model, None))
            chosen = plan(select(scores, ages=lab.backend.ages(model, None)))
            assert lab.backend.operate(model, chosen, verify=x).num_units == chosen.num_units > 0
