"""Every refusal says what was asked, what was found and what to do, and comes before anything changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.errors import DrawError
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.surgery import Units
from tests.snapshots import assert_untouched, snapshot
from tests.subjects import Subject, subject

ONE = Units({"0": [1]})


def refused(error: type[Exception], *words: str) -> Any:
    """`pytest.raises` for an error whose text holds all of the words."""

    class Holds:
        def search(self, text: str) -> bool:
            missing = [word for word in words if word not in text]
            assert not missing, f"{missing} not in {text!r}"
            return True

    return pytest.raises(error, check=lambda caught: Holds().search(str(caught)))


def two_layers() -> Any:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x).square().mean()
    return out


@pytest.fixture
def found() -> Any:
    """A subject that must be untouched when the test is over."""
    one = subject()
    before = snapshot(one.model, one.optimizers)
    yield one
    before["torch's random state"] = snapshot(one.model)["torch's random state"]  # the tests make models of their own
    assert_untouched(before, one.model, one.optimizers)


# -- criteria and evidence -------------------------------------------------------------------------------------------


def test_no_gradients_present_says_how_to_get_them():
    with refused(
        surgery.EvidenceError,
        "no gradients are present: all 1 sites' weights have .grad None",
        "loss.backward()", "surgery.observe(model, optimizer)", "surgery.probe(model, batches, loss_fn)", "evidence=",
    ):  # fmt: skip
        surgery.knife(two_layers(), "stagnant")


@pytest.mark.parametrize(
    ("criterion", "needs"),
    [("dormant", "needs the activations"), ("grama", "needs the activation gradients"),
     (surgery.Stagnant() & surgery.Dormant(), "'dormant' needs the activations")],
)  # fmt: skip
def test_a_criterion_without_what_it_needs_says_where_to_measure_it(found, criterion, needs):
    words = (needs, "of site '0' and 1 more", "surgery.observe(model)", "surgery.probe(model, batches, loss_fn)")
    with refused(surgery.EvidenceError, *words, "pass evidence="):
        surgery.knife(found.model, criterion)


def test_evidence_of_gradients_alone_is_not_enough_for_dormant(found):
    from neuronsurgery.pytorch import measure

    evidence = measure(found.model, surgery.discover(found.model))
    with refused(surgery.EvidenceError, "'dormant' needs the activations of site '0'", "found only gradients"):
        surgery.knife(found.model, "dormant", evidence=evidence)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss, F.cross_entropy, F.mse_loss])
def test_a_loss_is_no_criterion_and_is_told_where_it_goes(found, loss):
    with refused(
        surgery.CriterionError, "a loss is no criterion", "probe(model, batches, loss_fn)", "evidence=evidence"
    ):
        surgery.knife(found.model, loss)


@pytest.mark.parametrize(
    ("name", "nearest"), [("stagnent", "did you mean 'stagnant'?"), ("Dormant", "did you mean 'dormant'?"),
                          ("gramma", "did you mean 'grama'?"), ("xyz", "known: 'stagnant', 'dormant', 'grama'")]
)  # fmt: skip
def test_an_unknown_criterion_is_offered_the_nearest(found, name, nearest):
    with refused(surgery.CriterionError, f"no criterion is named {name!r}", nearest):
        surgery.knife(found.model, name)


def test_a_criterion_that_needs_arguments_is_told_so(found):
    with refused(surgery.CriterionError, "'random' needs arguments", "Random(...)"):
        surgery.knife(found.model, "random")
    with refused(surgery.CriterionError, "Stagnant: call it, Stagnant(...)"):
        surgery.knife(found.model, surgery.Stagnant)  # type: ignore[arg-type]
    with refused(surgery.CriterionError, "a criterion is an object such as Stagnant(), a name", "found int"):
        surgery.knife(found.model, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: surgery.Stagnant(threshold=0), "Stagnant.threshold is 0; it must satisfy 0 < threshold <= 1"),
        (lambda: surgery.Stagnant(threshold=2.5), "Stagnant.threshold is 2.5; it must satisfy 0 < threshold <= 1"),
        (lambda: surgery.Dormant(threshold=-0.1), "Dormant.threshold is -0.1; it must satisfy 0 <= threshold <= 1"),
        (lambda: surgery.GraMa(threshold=float("nan")), "GraMa.threshold is nan; it must satisfy"),
        (lambda: surgery.GraMa(threshold=cast(Any, "high")), "GraMa.threshold is 'high'"),
        (lambda: surgery.Random(0), "Random.fraction is 0"),
        (lambda: surgery.Lowest(1.5), "Lowest.fraction is 1.5"),
    ],
)
def test_a_threshold_out_of_range_is_shown_with_the_range(make, words):
    with refused(surgery.CriterionError, words):
        make()


def test_a_negative_cooldown_is_refused(found):
    with refused(surgery.CriterionError, "cooldown is -1", "optimizer steps", "must be >= 0"):
        surgery.knife(found.model, "stagnant", optimizer=found.optimizers, cooldown=-1)


@pytest.mark.parametrize("bound", [0, -1, float("nan"), float("inf")])
def test_a_growth_bound_that_is_no_bound_is_refused(found, bound):
    with refused(surgery.PlanError, f"max_growth is {bound}", "finite and > 0"):
        surgery.knife(found.model, ONE, max_growth=bound)


def test_evidence_of_a_copy_is_refused(found):
    evidence = surgery.probe(copy.deepcopy(found.model), [found.x], loss_of)
    with refused(
        surgery.EvidenceError, "this is evidence of another model", "a copy", "Measure on the model you operate on"
    ):
        surgery.knife(found.model, "stagnant", evidence=evidence)


def test_evidence_of_another_structure_is_refused(found):
    other = two_layers()
    evidence = surgery.probe(other, [found.x], loss_of)
    evidence.source = None  # as evidence that was carried over
    with refused(
        surgery.EvidenceError, "evidence of another model", "'0' has 16 units here", "the evidence has 8 units"
    ):
        surgery.knife(found.model, "stagnant", evidence=evidence)


def test_layers_without_gradient_or_with_nan_are_reported_and_not_selected():
    model: Any = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.ReLU())], nn.Linear(4, 2))
    loss_of(model, torch.randn(8, 4)).backward()
    model[0].weight.grad.zero_()
    model[2].weight.grad[1, 1] = torch.nan
    model[4].weight.grad = None
    report = surgery.knife(model, surgery.Lowest(0.5), verify=torch.randn(8, 4))
    assert set(report.operated) == {"6"}
    assert report.declined["0"] == "gradients are all zero"
    assert report.declined["2"] == "gradients are not finite"
    assert report.declined["4"] == "received no gradient"
    assert all(name in str(report) for name in ("gradients are all zero", "gradients are not finite"))


def test_dead_and_nan_layers_are_reported_by_their_activations():
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    evidence = surgery.probe(model, [torch.randn(8, 4)], loss_of)
    report = surgery.knife(model, "dormant", evidence=evidence)
    assert report.declined["0"] == "activations are all zero"
    with torch.no_grad():
        model[0].bias.fill_(torch.nan)
    evidence = surgery.probe(model, [torch.randn(8, 4)], loss_of)
    report = surgery.knife(model, "dormant", evidence=evidence)
    assert report.declined["0"] == report.declined["2"] == "activations are not finite"
    assert report.num_units == 0


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_nan_weights_chosen_by_hand_are_refused(what):
    model = two_layers()
    with torch.no_grad():
        getattr(model[0], what)[1] = torch.nan
    before = snapshot(model)
    with refused(surgery.ModelError, "the weights of '0' are not finite", "checkpoint"):
        surgery.knife(model, ONE)
    with refused(surgery.ModelError, "the weights of '0' are not finite"):  # beside them no error could be measured
        surgery.knife(model, Units({"0": [2]}))
    assert_untouched(before, model)


# -- sites and units -------------------------------------------------------------------------------------------------


def test_unknown_sites_and_units_are_named_with_what_there_is(found):
    with refused(surgery.SiteError, "unit 16 of site '0', which has 16 units", "0 to 15"):
        surgery.knife(found.model, Units({"0": [16]}))
    with refused(surgery.SiteError, "unit -1 of site '0'"):
        surgery.knife(found.model, Units({"0": [-1]}))
    with refused(surgery.SiteError, "unit 1 of site '0' more than once"):
        surgery.knife(found.model, Units({"0": [1, 1]}))
    with refused(surgery.SiteError, "no producer is named '7'", "known: '0', '2', '5'"):
        surgery.knife(found.model, Units({"7": [1]}))
    with refused(surgery.SiteError, "no producer is named 'fc1'"):
        surgery.knife(found.model, "stagnant", sites=["fc1"])
    with refused(surgery.SiteError, "'5' is no site, it was declined: no activation function"):
        surgery.knife(found.model, "stagnant", sites=["5"])
    with refused(surgery.SiteError, "'5' is no site, it was declined"):
        surgery.knife(found.model, Units({"5": [0]}))
    with refused(surgery.SiteError, "no producer is named 'fc1'"):
        surgery.discover(found.model, include=["fc1"])
    with refused(surgery.CriterionError, "the units of site '0' must be integers", "1.5"):
        surgery.knife(found.model, Units({"0": [cast(Any, 1.5)]}))


def test_a_near_miss_of_a_sites_name_is_corrected():
    model = nn.ModuleDict({"encoder": two_layers()})
    model.forward = lambda x: x
    with refused(surgery.SiteError, "no producer is named 'encodr.0': did you mean 'encoder.0'"):
        surgery.knife(model, Units({"encodr.0": [0]}))


def test_a_model_without_a_site_gives_the_reasons():
    with refused(surgery.SiteError, "no site to operate on", "0: no activation function"):
        surgery.knife(nn.Sequential(nn.Linear(4, 2)), "stagnant")
    with refused(surgery.SiteError, "no site to operate on", "no Linear or convolution layer"):
        surgery.knife(nn.Sequential(nn.ReLU()), "stagnant")


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (nn.Linear, "found the class Linear"),
        ({"0.weight": torch.zeros(2, 2)}, "found dict"),
        (nn.Linear(2, 2).state_dict(), "found OrderedDict"),
        (torch.zeros(2), "found Tensor"),
        (torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), "found SGD"),
        (None, "found NoneType"),
        ([nn.Linear(2, 2)], "found list"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda thing: surgery.knife(thing, "stagnant"),
        surgery.discover,
        lambda thing: surgery.observe(thing).__enter__(),
        lambda thing: surgery.probe(thing, [torch.zeros(1)], loss_of),
        surgery.composites,
        lambda thing: surgery.operate(thing, planned(two_layers(), 1)),
        lambda thing: surgery.undo(thing, surgery.knife(two_layers(), ONE)),
    ],
    ids="knife discover observe probe composites operate undo".split(),
)
def test_what_is_no_model_is_named(call, thing, words):
    with refused(surgery.ModelError, "expected a torch.nn.Module", words, "pass the model itself"):
        call(thing)


def planned(model: nn.Module, *units: int) -> surgery.Plan:
    scores = surgery.score(surgery.discover(model), None, Units({"0": units}))
    return surgery.plan(surgery.select(scores))


def test_lazy_scripted_quantized_and_inference_models_are_refused_with_the_way_out():
    with refused(surgery.ModelError, "'0.weight' is lazy and has no shape yet", "run one forward pass first"):
        surgery.knife(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2)), ONE)
    with torch.inference_mode():
        model = two_layers()
    with refused(surgery.ModelError, "'0.weight' was created under torch.inference_mode", "outside it"):
        surgery.knife(model, ONE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 4))])
def test_a_scripted_model_is_refused(make):
    with refused(surgery.ModelError, "scripted", "operate on the original module, then script"):
        surgery.knife(make(two_layers()), ONE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_model_is_refused():
    if not torch.backends.quantized.supported_engines or torch.backends.quantized.engine == "none":
        pytest.skip("this build of torch quantizes nothing")
    from torch.ao.quantization import quantize_dynamic

    model = quantize_dynamic(two_layers(), {nn.Linear})
    with refused(surgery.ModelError, "the model is quantized", "operate before you quantize"):
        surgery.knife(model, ONE)


# -- plans and reports -----------------------------------------------------------------------------------------------


def test_the_plan_of_another_model_is_refused(found):
    with refused(surgery.PlanError, "made for 8 units at '0', the model has 16", "plan again for this model"):
        surgery.operate(found.model, planned(two_layers(), 1))
    elsewhere = nn.Sequential(nn.Identity(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    scores = surgery.score(surgery.discover(elsewhere), None, Units({"1": [1]}))
    with pytest.raises((surgery.PlanError, surgery.SiteError), match="'1'"):
        surgery.operate(found.model, surgery.plan(surgery.select(scores)))
    head = surgery.Plan({"5": (0,)}, {}, "by hand", 4.0, (), surgery.Sites({}))
    with refused(surgery.PlanError, "'5', which is no site of this model: no activation function"):
        surgery.operate(found.model, head)
    twice = surgery.Plan({"0": (1, 1)}, {}, "by hand", 4.0, (), surgery.Sites({}))
    with refused(surgery.PlanError, "units [1, 1] of '0' must be distinct"):
        surgery.operate(found.model, twice)


def test_a_site_that_is_full_is_declined_with_the_bound():
    found = subject()
    surgery.knife(found.model, ONE, max_growth=0.2)
    before = snapshot(found.model, found.optimizers)
    report = surgery.knife(found.model, Units({"0": [1, 2]}), max_growth=0.2)
    assert report.num_units == 0
    expected = (
        "2 of 2 selected units stay out: max_growth=0.2 allows 3 frozen rows, 2 are live; consolidate the site or "
        "raise max_growth"
    )
    assert report.declined["0"] == expected
    assert_untouched(before, found.model, found.optimizers)


# -- optimizers ------------------------------------------------------------------------------------------------------


def test_an_optimizer_of_another_model_is_refused(found):
    other = torch.optim.Adam(two_layers().parameters())
    with refused(
        surgery.OptimizerError, "Adam owns none of the model's 6 parameters", "it has 4", "Build it from this model"
    ):
        surgery.knife(found.model, ONE, optimizer=other)
    with refused(surgery.OptimizerError, "Adam owns none"):
        surgery.knife(found.model, ONE, optimizer=[*found.optimizers, other])
    with refused(surgery.OptimizerError, "Adam owns none"), surgery.observe(found.model, other):
        pass


@pytest.mark.parametrize("thing", ["adam", 1e-3, torch.optim.Adam, nn.Linear(2, 2), [1]])
def test_what_is_no_optimizer_is_named(found, thing):
    shown = type(thing[0] if isinstance(thing, list) else thing).__name__
    with refused(surgery.OptimizerError, "optimizer= takes a torch.optim.Optimizer", f"found {shown}"):
        surgery.knife(found.model, ONE, optimizer=thing)


def test_a_scheduler_is_no_optimizer(found):
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(found.model.parameters(), lr=0.1), lambda _: 1.0)
    with refused(surgery.OptimizerError, "found LambdaLR", "of a scheduler, scheduler.optimizer"):
        surgery.knife(found.model, ONE, optimizer=scheduler)


# -- draws -----------------------------------------------------------------------------------------------------------


def test_an_initializer_that_is_no_function_is_refused(found):
    with refused(DrawError, "init= takes a function that fills a weight in place", "found str 'xavier'"):
        surgery.knife(found.model, ONE, init="xavier")


@pytest.mark.parametrize(
    "init",
    [torch.randn_like, lambda weight: None, lambda weight: weight.fill_(torch.nan), lambda weight: weight[:1].zero_()],
    ids=["returns", "nothing", "nan", "part"],
)
def test_an_initializer_that_does_not_fill_the_weight_is_refused(found, init):
    with refused(DrawError, "init= left values that are not finite in the weight of '0'", "in place"):
        surgery.knife(found.model, ONE, optimizer=found.optimizers, init=init)


def test_an_initializer_that_fails_leaves_everything_as_it_was(found):
    with pytest.raises(RuntimeError, match="size of tensor"):
        surgery.knife(found.model, ONE, optimizer=found.optimizers, init=lambda weight: weight.copy_(torch.zeros(3, 3)))


@pytest.mark.parametrize("thing", [0, "seed", torch.zeros(1)])
def test_what_is_no_generator_is_named(found, thing):
    words = ("generator= takes a torch.Generator", f"found {type(thing).__name__}", "manual_seed")
    with refused(DrawError, *words):
        surgery.knife(found.model, ONE, generator=thing)
    with refused(DrawError, *words):
        surgery.knife(found.model, surgery.Random(0.5), generator=thing)


# -- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda model, x: model(x), "must return a scalar tensor, it returned a tensor of shape (8, 2)"),
        (lambda model, x: 1.0, "must return a scalar tensor, it returned float"),
        (lambda model, x: model(x).sum().detach(), "a loss without a graph; do not detach it or use no_grad"),
    ],
)
def test_a_loss_function_that_gives_no_loss_is_told_so(found, loss, words):
    with refused(surgery.EvidenceError, words):
        surgery.probe(found.model, [found.x], loss)


def test_probing_nothing_is_refused(found):
    with refused(surgery.EvidenceError, "probe found no batch"):
        surgery.probe(found.model, [], loss_of)
    with refused(surgery.EvidenceError, "batches is a tensor", "[batch]"):
        surgery.probe(found.model, found.x, loss_of)


@pytest.mark.parametrize("every", [0, -2])
def test_measuring_never_is_refused(found, every):
    with refused(surgery.EvidenceError, f"every={every}", "1 or more"), surgery.observe(found.model, every=every):
        pass


def test_a_verify_batch_that_the_model_refuses_shows_the_models_own_error(found):
    misfit = torch.zeros(3, 7)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        surgery.knife(found.model, ONE, optimizer=found.optimizers, verify=misfit)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_output_that_moves_is_rolled_back_with_the_measured_error(monkeypatch):
    found = subject()
    summed: Callable[..., Tensor] = Composite.summed
    found.model.eval()
    before = snapshot(found.model, found.optimizers)

    def spoilt_on_five(self: Composite, h: Tensor, *rest: Any) -> Tensor:
        return summed(self, h, *rest) * (1.01 if len(h) == 5 else 1.0)

    monkeypatch.setattr(Composite, "summed", spoilt_on_five)
    with refused(surgery.EquivalenceError, "verify= batch moved by", "at most 2e-06", "rolled back", "sites="):
        surgery.knife(found.model, ONE, optimizer=found.optimizers, verify=torch.ones(5, 4))
    assert_untouched(before, found.model, found.optimizers)
    monkeypatch.setattr(Composite, "summed", lambda self, h, *rest: summed(self, h, *rest) * 1.01)
    with refused(
        surgery.EquivalenceError, "0: the composite units differ from the old units by", "Nothing was changed"
    ):
        surgery.knife(found.model, ONE, optimizer=found.optimizers)
    assert_untouched(before, found.model, found.optimizers)


def test_every_error_is_caught_as_one():
    assert issubclass(DrawError, surgery.SurgeryError)
    found: Subject = subject()
    with pytest.raises(surgery.SurgeryError):
        surgery.knife(found.model, "stagnent")


def test_a_model_that_is_one_layer_is_refused_with_its_reason():
    with refused(surgery.SiteError, "no site to operate on", "the model: it is the whole model", "no activation"):
        surgery.knife(nn.Linear(4, 2), "stagnant")


def test_probe_says_that_no_layer_can_be_measured():
    with refused(surgery.EvidenceError, "nothing to measure", "surgery.discover(model) says why"):
        surgery.probe(nn.Linear(4, 2), [torch.ones(3, 4)], loss_of)
