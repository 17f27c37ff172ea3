"""`knife` end to end: every way to choose units, wrapped models, cooldown, growth, draws, and the report's fields."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.surgery import Plan, Report, Stagnant, Units
from tests.snapshots import bits
from tests.subjects import MODELS, OPTIMIZERS, Subject, subject


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = (model(x) - 1).square().mean()
    return out


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(value) for name, value in model.state_dict().items()}


def rows_changed(before: Tensor, after: Tensor) -> tuple[int, ...]:
    return tuple(row for row in range(len(before)) if not torch.equal(before[row], after[row]))


# -- criteria --------------------------------------------------------------------------------------------------------


def stagnating(num_stagnant: int = 3) -> Subject:
    """A subject whose update activity is 1 everywhere but in the first units of site "0", where it is tiny."""
    found = subject()
    for parameter in found.model.parameters():
        parameter.grad = parameter.detach().clone()
    found.model[0].weight.grad[:num_stagnant] *= 1e-4
    return found


@pytest.mark.parametrize(
    "criterion",
    [
        "stagnant", Stagnant(), Stagnant(threshold=0.01), Stagnant(average="ua"), Stagnant() & ~Units({"0": []}),
        Stagnant() | Stagnant(threshold=0.01), ~~Stagnant(),
        lambda scores: {"0": [one < 0.01 for one in scores["0"]["stagnant"]]},
    ],
    ids="name object threshold ua and or not function".split(),
)  # fmt: skip
def test_each_way_to_state_a_criterion_operates_on_the_units_it_chooses(criterion):
    found = stagnating()
    before = found.model[0].weight.detach().clone()
    report = surgery.knife(found.model, criterion, optimizer=found.optimizers, sites=["0"], verify=found.x)
    assert report.operated == {"0": (0, 1, 2)}
    assert rows_changed(before, found.model[0].weight.detach()) == (0, 1, 2)
    assert report.verified and report.model_error is not None and report.model_error <= 2e-6


@pytest.mark.parametrize("criterion", ["dormant", "grama", surgery.Dormant(0.5) | surgery.GraMa(0.5)])
def test_criteria_of_activations_operate_on_dead_units(criterion):
    found = subject()
    with torch.no_grad():
        found.model[0].bias[4] = -100.0  # E|h| = 0 ...
        found.model[2].weight[:, 4] = 0.0  # ... and E|dL/dh| = 0
    evidence = surgery.probe(found.model, [found.x], loss_of)
    report = surgery.knife(found.model, criterion, evidence=evidence, optimizer=found.optimizers, verify=found.x)
    assert 4 in report.operated["0"]


def test_random_and_lowest_take_their_fraction_of_every_site():
    found = subject()
    report = surgery.knife(found.model, surgery.Random(0.25), optimizer=found.optimizers, verify=found.x)
    assert {name: len(units) for name, units in report.operated.items()} == {"0": 4, "2": 4}
    report = surgery.knife(found.model, surgery.Lowest(0.25), optimizer=found.optimizers, cooldown=0, verify=found.x)
    assert {name: len(units) for name, units in report.operated.items()} == {"0": 4, "2": 4}


def test_sites_restricts_what_is_operated_on_and_takes_a_single_name():
    for sites in (["2"], "2", ("2",), iter(["2"])):
        found = subject()
        assert set(surgery.knife(found.model, surgery.Random(0.25), sites=sites).operated) == {"2"}


def test_a_choice_of_none_changes_nothing():
    found = subject()
    before = weights(found.model)
    classes = [type(module) for module in found.model.modules()]
    criteria: list[Any] = [Units({}), Units({"0": []}), surgery.Random(0.01), lambda scores: {}]
    for criterion in criteria:
        report = surgery.knife(found.model, criterion, optimizer=found.optimizers, verify=found.x)
        assert (report.operation, report.num_units, report.operated) == (0, 0, {})
        assert str(report)
    assert weights(found.model) == before
    assert [type(module) for module in found.model.modules()] == classes
    assert report.parameters_after == report.parameters_before


class TanhBehindABranch(nn.Module):
    """A root that cannot be traced: only an example shows that its tanh layer enters another layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(-x if x.sum() > 1e6 else x))
        return out


def test_a_site_that_only_the_verify_batch_showed_is_declined_where_the_evidence_lacks_it():
    model, x = TanhBehindABranch(), torch.randn(6, 4)
    evidence = surgery.probe(model, [x], loss_of)
    report = surgery.knife(model, surgery.Lowest(0.25), evidence=evidence, verify=x)
    assert set(report.operated) == {"body.0"}
    assert report.declined["body.2"] == "it was not measured: name it in sites= of observe or probe"
    evidence = surgery.probe(model, [x], loss_of, sites=["body.2"])
    report = surgery.knife(model, surgery.Lowest(0.25), evidence=evidence, verify=x, cooldown=0)
    assert set(report.operated) == {"body.0", "body.2"}


# -- wrapped models --------------------------------------------------------------------------------------------------


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "compiled":
        return torch.compile(model, backend="eager")  # type: ignore[return-value]
    if kind == "data-parallel":
        return nn.DataParallel(model)
    return torch.compile(nn.DataParallel(model), backend="eager")  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it where a tap breaks the graph
@pytest.mark.parametrize("kind", ["compiled", "data-parallel", "both"])
def test_wrapped_models_are_operated_on_under_their_own_names(kind):
    plain, inner = subject(), subject()
    outer = wrapped(kind, inner.model)
    expected = surgery.knife(plain.model, Units({"0": [1, 5]}), optimizer=plain.optimizers, verify=plain.x)
    inner.model.eval()
    plain.model.eval()
    y = outer(inner.x)
    assert list(surgery.discover(outer)) == ["0", "2"]
    report = surgery.knife(outer, Units({"0": [1, 5]}), optimizer=inner.optimizers, verify=inner.x)
    assert report.operated == expected.operated
    assert weights(inner.model) == weights(plain.model)
    torch.testing.assert_close(outer(inner.x), y, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(outer(inner.x), plain.model(plain.x), rtol=2e-6, atol=2e-6)
    assert list(surgery.composites(outer).members) == ["0"]
    with surgery.observe(outer, inner.optimizers) as evidence:
        inner.optimizers[0].zero_grad()
        loss_of(outer, inner.x).backward()
        inner.optimizers[0].step()
    assert evidence.num_samples("0", surgery.Quantity.ACTIVATION) == 8
    surgery.knife(outer, surgery.Lowest(0.1, of="dormant"), evidence=evidence, cooldown=0)
    surgery.knife(inner.model, surgery.Lowest(0.1, of="dormant"), evidence=evidence, cooldown=0)
    assert surgery.probe(outer, [inner.x], loss_of).num_steps == 1


# -- cooldown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "two"])
def test_young_units_are_passed_over_and_counted_until_the_cooldown_is_over(optimizer):
    found = subject("sequential", optimizer)
    first = surgery.knife(found.model, Units({"0": [1, 5, 7]}), optimizer=found.optimizers)
    assert first.notes == ()
    found.train(4)

    def lowest() -> Report:
        found.model[0].weight.grad = found.model[0].weight.detach().clone()
        found.model[0].weight.grad[[1, 5, 7, 9]] = 0.0
        return surgery.knife(found.model, Stagnant(threshold=1e-6), optimizer=found.optimizers, cooldown=5, sites=["0"])

    report = lowest()
    assert report.operated == {"0": (9,)}
    assert "0: 3 young units passed over" in report.notes
    assert "0: 3 young units passed over" in str(report)
    found.train(1)
    report = lowest()
    assert report.operated == {"0": (1, 5, 7)}  # five steps old; unit 9 is one step old
    assert "0: 1 young unit passed over" in report.notes


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum"])
def test_young_units_are_passed_over_under_an_optimizer_that_keeps_no_count(optimizer):
    found = subject("sequential", optimizer)
    surgery.knife(found.model, Units({"0": [1, 5, 7]}), optimizer=found.optimizers)
    found.train(4)
    found.model[0].weight.grad = found.model[0].weight.detach().clone()
    found.model[0].weight.grad[[1, 5, 7, 9]] = 0.0
    criterion = Stagnant(threshold=1e-6)
    report = surgery.knife(found.model, criterion, optimizer=found.optimizers, cooldown=5, sites=["0"])
    assert report.operated == {"0": (9,)}
    assert "0: 3 young units passed over" in report.notes


def test_units_chosen_by_hand_need_no_cooldown():
    found = subject()
    for _ in range(2):
        report = surgery.knife(found.model, Units({"0": [1]}), optimizer=found.optimizers)
        assert report.operated == {"0": (1,)}
    assert not report.notes


def test_without_an_optimizer_the_report_says_that_no_cooldown_is_counted():
    found = subject()
    report = surgery.knife(found.model, Units({"0": [1]}))
    assert any("no optimizer was given" in note and "cooldown" in note for note in report.notes)


def test_parameters_that_no_optimizer_owns_are_named():
    found = subject()
    partial = torch.optim.SGD(found.model[2].parameters(), lr=0.1)
    report = surgery.knife(found.model, Units({"0": [1]}), optimizer=partial)
    assert any("no optimizer owns 0.weight, 0.bias" in note for note in report.notes)


# -- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_no_number_of_operations_grows_a_site_beyond_its_bound(model):
    found = subject(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        report = surgery.knife(
            found.model,
            surgery.Random(0.4),
            optimizer=found.optimizers,
            max_growth=1.5,
            cooldown=0,
            generator=generator,
        )
        for site in surgery.discover(found.model).sites.values():
            assert site.num_frozen <= 1.5 * site.num_units
        found.train()
    assert report.num_units == 0
    assert all("max_growth=1.5 allows 24 frozen rows" in report.declined[name] for name in found.sites)
    assert surgery.composites(found.model).num_rows == 24 * len(found.sites)
    assert bool(torch.isfinite(found.model(found.x)).all())


def test_where_room_is_short_the_lowest_scores_come_first():
    found = stagnating()
    found.model[0].weight.grad[2] *= 1e-2
    report = surgery.knife(found.model, "stagnant", optimizer=found.optimizers, max_growth=0.125, sites=["0"])
    assert report.operated == {"0": (2,)}
    assert any(note.startswith("0: 2 of 3 selected units stay out: max_growth=0.125") for note in report.notes)


# -- draws -----------------------------------------------------------------------------------------------------------


def drawn(seed: int | None, global_seed: int = 0, **options: Any) -> Tensor:
    found = subject()
    torch.manual_seed(global_seed)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    before = torch.get_rng_state()
    surgery.knife(found.model, Units({"0": [1, 5]}), optimizer=found.optimizers, generator=generator, **options)
    assert torch.equal(torch.get_rng_state(), before), "the global random state was consumed"
    rows: Tensor = found.model[0].weight.detach()[[1, 5]]
    return rows


def test_the_draw_follows_from_the_generators_seed():
    assert torch.equal(drawn(1), drawn(1))
    assert torch.equal(drawn(1, global_seed=1), drawn(1, global_seed=2))
    assert not torch.equal(drawn(1), drawn(2))


def test_without_a_generator_the_draw_follows_from_the_global_seed():
    assert torch.equal(drawn(None, 1), drawn(None, 1))
    assert not torch.equal(drawn(None, 1), drawn(None, 2))


def test_later_operations_and_other_units_draw_anew():
    found = subject()
    fresh = []
    generator = torch.Generator().manual_seed(0)
    for one in (None, None, generator, generator):
        surgery.knife(found.model, Units({"0": [1, 5]}), optimizer=found.optimizers, generator=one)
        fresh += [found.model[0].weight.detach()[unit].clone() for unit in (1, 5)]
    assert not any(torch.equal(a, b) for i, a in enumerate(fresh) for b in fresh[:i])


def test_sites_of_one_shape_draw_apart():
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    surgery.knife(model, Units({"0": range(4), "2": range(4)}))
    assert not torch.equal(model[0].weight, model[2].weight)


def test_a_random_choice_follows_from_the_generator_too():
    def chosen(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        net = subject().model
        return [surgery.knife(net, surgery.Random(0.25), generator=generator).operated for _ in range(2)]

    assert chosen(1) == chosen(1) != chosen(2)
    assert chosen(1)[0] != chosen(1)[1]


def test_the_default_draw_is_the_layers_own_and_a_custom_one_fills_the_weight_and_zeroes_the_bias():
    bound = 1 / 4**0.5
    rows = drawn(1)
    assert rows.abs().max() <= bound  # nn.Linear's uniform
    found = subject()
    surgery.knife(found.model, Units({"0": [1, 5]}), init=nn.init.ones_, verify=found.x)
    assert torch.equal(found.model[0].weight.detach()[[1, 5]], torch.ones(2, 4))
    assert not found.model[0].bias.detach()[[1, 5]].any()
    shapes = []

    def zeros_(weight: Tensor) -> None:
        shapes.append(weight.shape)
        weight.zero_()

    surgery.knife(found.model, Units({"0": [3]}), init=zeros_)
    assert shapes == [(16, 4)], "the whole layer's weight, for its fan-in"
    assert torch.equal(drawn(1, init=nn.init.orthogonal_), drawn(1, init=nn.init.orthogonal_))


def test_a_site_without_an_initializer_of_its_own_says_how_it_drew():
    found = subject("functional")
    report = surgery.knife(found.model, Units({"w1": [1]}), optimizer=found.optimizers)
    assert any("w1: no initializer of its own; drew normal(0, " in note for note in report.notes)


# -- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_plan_and_report_go_to_json_and_back(model):
    found = subject(model)
    report = surgery.knife(found.model, surgery.Lowest(0.2), optimizer=found.optimizers, cooldown=0)
    assert Report.from_json(report.to_json()) == report
    assert Plan.from_json(report.plan.to_json()) == report.plan
    json.loads(report.to_json())
    assert str(Report.from_json(report.to_json())) == str(report)


@pytest.mark.parametrize("model", MODELS)
def test_a_plan_from_json_gives_the_same_report_on_a_copy(model):
    found = subject(model)
    found.model.eval()
    surgery.knife(found.model, Units(found.units(1)))
    twin = copy.deepcopy(found.model)
    report = surgery.knife(found.model, Units(found.units(1, 5)), verify=found.x)
    again = surgery.operate(twin, Plan.from_json(report.plan.to_json()), verify=found.x)
    assert again == report
    assert weights(twin) == weights(found.model)


def saved_and_loaded(found: Subject) -> tuple[Any, list[torch.optim.Optimizer]]:
    """Through a file's bytes; the optimizer anew, with its state loaded."""
    file = io.BytesIO()
    torch.save(found.model, file)
    file.seek(0)
    model = torch.load(file, weights_only=False)
    (owner,) = found.optimizers
    other = torch.optim.Adam(model.parameters(), lr=owner.param_groups[0]["lr"])
    other.load_state_dict(pickle.loads(pickle.dumps(owner.state_dict())))
    return model, [other]


@pytest.mark.parametrize("model", MODELS)
def test_saving_and_loading_before_an_operation_gives_the_same_report_and_weights(model):
    found = subject(model)
    surgery.knife(found.model, Units(found.units(1, 2)), optimizer=found.optimizers)
    found.train(2)
    found.model.eval()
    loaded, owners = saved_and_loaded(found)
    one = surgery.knife(found.model, Units(found.units(1, 5)), optimizer=found.optimizers, verify=found.x)
    two = surgery.knife(loaded, Units(found.units(1, 5)), optimizer=owners, verify=found.x)
    assert one == two
    assert weights(loaded) == weights(found.model)
    assert surgery.composites(loaded) == surgery.composites(found.model)
    assert torch.equal(loaded(found.x), found.model(found.x))


def test_the_report_says_what_was_done():
    found = subject()
    plain = sum(parameter.numel() for parameter in found.model.parameters())
    report = surgery.knife(found.model, Units({"2": [3], "0": [5, 1]}), optimizer=found.optimizers, verify=found.x)
    assert report.operation == 1
    assert report.operated == {"0": (1, 5), "2": (3,)}
    assert report.num_units == 3
    assert report.declined == {"5": "no activation function: the scope returns its output"}
    assert set(report.errors) == {"0", "2"}
    assert report.max_error == max(*report.errors.values(), report.model_error or 0.0) <= 2e-6
    assert report.verified
    assert report.plan.units == report.operated
    assert report.parameters_before == plain
    assert report.parameters_after == plain + 4 * (4 + 1) + 2 * (16 + 1)  # two frozen rows a unit, with their biases
    assert [parameter.numel() for parameter in found.model.parameters()] == [64, 16, 256, 16, 32, 2]
    text = str(report)
    for words in (
        "Operation 1: 3 units operated on",
        "| 0 ",
        "2 / 16",
        "verified on a batch",
        "declined: 5: no activation",
    ):
        assert words in text
    again = surgery.knife(found.model, Units({"0": [1]}), optimizer=found.optimizers)
    assert again.operation == 2
    assert again.parameters_before == report.parameters_after
    assert not again.verified and again.model_error is None
    assert "trace: unverified (pass verify=batch" in str(again)


@pytest.mark.parametrize("batch", ["tensor", "tuple", "list", "dict"])
def test_verify_takes_a_batch_in_each_form(batch):
    found = subject()
    x = found.x
    forms = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"input": x}}
    report = surgery.knife(found.model, Units({"0": [1]}), verify=forms[batch])
    assert report.verified


# -- between backward and step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_between_backward_and_step_the_operated_rows_lose_their_stale_gradient_only(optimizer):
    found = subject("sequential", optimizer)
    found.backward()
    layer = found.model[0]
    gradients = [layer.weight.grad, layer.bias.grad, found.model[2].weight.grad]
    were = [gradient.clone() for gradient in gradients]
    surgery.knife(found.model, Units({"0": [1, 5]}), optimizer=found.optimizers)
    others = [unit for unit in range(16) if unit not in (1, 5)]
    assert [layer.weight.grad, layer.bias.grad, found.model[2].weight.grad] == [*map(Is, gradients)]
    for gradient, was in zip(gradients[:2], were, strict=False):
        assert not gradient[[1, 5]].any()
        assert bits(gradient[others]) == bits(was[others])
    assert bits(gradients[2]) == bits(were[2])
    fresh = layer.weight.detach().clone()
    for owner in found.optimizers:
        owner.step()
    assert rows_changed(fresh[others], layer.weight.detach()[others])
    if optimizer != "adamw":  # whose decay moves rows without gradient
        assert torch.equal(layer.weight.detach()[[1, 5]], fresh[[1, 5]])


class Is:
    """Equal to one object only."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return other is self.thing

    __hash__ = None  # type: ignore[assignment]


def test_an_operation_between_forward_and_backward_is_no_silent_error():
    found = subject()
    loss = found.loss()
    surgery.knife(found.model, Units({"2": [1]}), optimizer=found.optimizers)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
