"""Methods of whole layers, worked out by hand on networks of a few weights, and under every optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from neuronsurgery import surgery
from neuronsurgery.errors import DrawError, ModelError, OptimizerError
from neuronsurgery.pytorch.forgetting import forget
from neuronsurgery.pytorch.optimizers import young_rows
from neuronsurgery.pytorch.transaction import Overwrite, run
from tests.optimizer_rows import COUPLED, EXACT, REFUSED, SHAPE, Make, gradient, library_warnings


def hand_made() -> Any:
    """y = 3 relu(x1 + 2 x2 + 1) - 2 relu(-x1 + x2) + 0.5."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 1.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[3.0, -2.0]]))
        model[2].bias.copy_(torch.tensor([0.5]))
    return model


def ones(weight: Tensor) -> None:
    nn.init.ones_(weight)


X = torch.tensor([[1.0, 2.0]])  # hidden: 6 and 1


def trained(model: nn.Module, optimizer: optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_reset_draws_the_layers_weights_and_zeroes_biases_of_a_given_init() -> None:
    model = hand_made()
    report = surgery.reset(model, 1, example=X, init=ones)
    assert model[2].weight.tolist() == [[1.0, 1.0]]
    assert model[2].bias.tolist() == [0.0]
    assert model(X).item() == 7.0  # 6 + 1
    assert dict(report.changed) == {"2": ("weight", "bias")}
    assert report.num_numbers == 3


def test_reset_uses_the_modules_own_initializer() -> None:
    model: Any = nn.Sequential(nn.Linear(100, 50), nn.LayerNorm(50), nn.Linear(50, 1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    surgery.reset(model)
    assert model[0].weight.abs().max() <= 0.1  # uniform within 1 / sqrt(100)
    assert 0.05 < model[0].weight.std() < 0.065
    assert model[1].weight.tolist() == [1.0] * 50


def test_reset_takes_running_statistics_back() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    report = surgery.reset(model)
    assert model[1].running_mean is not None and model[1].running_mean.tolist() == [0.0] * 3
    assert model[1].num_batches_tracked is not None and int(model[1].num_batches_tracked) == 0
    assert "num_batches_tracked" in report.changed["1"]


def test_reset_to_stored_weights_is_the_model_that_was_stored() -> None:
    model = hand_made()
    stored = copy.deepcopy(model.state_dict())
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    trained(model, optimizer)
    surgery.reset(model, "0", optimizer=optimizer, initial=stored)
    assert torch.equal(model[0].weight, stored["0.weight"])
    assert not torch.equal(model[2].weight, stored["2.weight"])


def test_scale_head_scales_the_output() -> None:
    model = hand_made()
    assert model(X).item() == 16.5  # 3 * 6 - 2 * 1 + 0.5
    report = surgery.scale_head(model, 0.5, example=X)
    assert model[2].weight.tolist() == [[1.5, -1.0]]
    assert model(X).item() == 8.25
    assert report.layers == ("2",)


def test_shrink_and_perturb_adds_a_part_of_fresh_weights() -> None:
    model = hand_made()
    surgery.shrink_and_perturb(model, shrink=0.5, perturb=0.25, init=ones)
    assert model[0].weight.tolist() == [[0.75, 1.25], [-0.25, 0.75]]
    assert model[0].bias.tolist() == [0.5, 0.0]  # fresh biases of a given init are zero
    assert model[2].weight.tolist() == [[1.75, -0.75]]


def test_shrink_and_perturb_towards_stored_weights_is_reset_replays() -> None:
    model = hand_made()
    stored = {name: torch.zeros_like(value) + 10 for name, value in model.state_dict().items()}
    surgery.shrink_and_perturb(model, "2", initial=stored)
    assert torch.allclose(model[2].weight, torch.tensor([[0.8 * 3 + 2, 0.8 * -2 + 2]]))
    assert model[0].weight.tolist() == [[1.0, 2.0], [-1.0, 1.0]]


def test_shrink_and_perturb_keeps_the_optimizers_state_and_reset_does_not() -> None:
    model = hand_made()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    trained(model, optimizer)
    before = copy.deepcopy(optimizer.state[model[2].weight])
    surgery.shrink_and_perturb(model, optimizer=optimizer)
    assert all(torch.equal(before[key], value) for key, value in optimizer.state[model[2].weight].items())
    surgery.reset(model, "2", optimizer=optimizer)
    assert model[2].weight not in optimizer.state
    assert model[0].weight in optimizer.state


def test_gradients_of_weights_that_went_are_zero() -> None:
    model = hand_made()
    model(X).sum().backward()
    surgery.reset(model, "2")
    assert model[2].weight.grad is not None and model[2].weight.grad.tolist() == [[0.0, 0.0]]
    assert model[0].weight.grad is not None and bool((model[0].weight.grad != 0).any())


def test_reset_optimizer_leaves_weights_and_gradients() -> None:
    model = hand_made()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    trained(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    gradient_before = model[0].weight.grad.clone()
    surgery.reset_optimizer(model, optimizer=optimizer)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, gradient_before)
    assert not optimizer.state


# -- draws -----------------------------------------------------------------------------------------------------------


def test_equal_generators_give_equal_weights_and_no_global_random_state_moves() -> None:
    one, other, random = hand_made(), hand_made(), torch.get_rng_state()
    for model in (one, other):
        surgery.reset(model, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one[0].weight, other[0].weight)
    assert torch.equal(random, torch.get_rng_state())


def test_without_a_generator_one_reset_after_the_other_draws_anew() -> None:
    model = hand_made()
    surgery.reset(model)
    first = model[0].weight.detach().clone()
    surgery.reset(model)
    assert not torch.equal(model[0].weight, first)


def test_a_failed_reset_leaves_model_optimizer_and_generator_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hand_made()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    generator = torch.Generator().manual_seed(0)
    random = generator.get_state()
    monkeypatch.setattr("neuronsurgery.pytorch.resetting.LayerReport", None)
    with pytest.raises(TypeError):
        surgery.reset(model, optimizer=optimizer, generator=generator)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state["state"][0]["momentum_buffer"], optimizer.state_dict()["state"][0]["momentum_buffer"])
    assert torch.equal(random, generator.get_state())


# -- refusals --------------------------------------------------------------------------------------------------------


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 2))
        self.shift = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table + self.shift


def test_a_module_without_an_initializer_is_refused_until_one_is_given() -> None:
    model: Any = nn.Sequential(Raw(), nn.Linear(2, 1))
    with pytest.raises(DrawError, match="'0' cannot be drawn anew: Raw has no initializer"):
        surgery.reset(model)
    surgery.reset(model, init=ones)
    assert model[0].table.tolist() == [[1.0, 1.0]] * 3
    assert model[0].shift.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": {}}, "initial= holds nothing for '0.weight'"),
        ({"initial": {"0.weight": torch.zeros(1)}}, r"initial= holds shape \(1,\) for '0.weight'"),
        ({"init": lambda weight: None}, "not finite"),
        ({"init": 3}, "init= takes a function"),
    ],
)
def test_what_draws_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    model = hand_made()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DrawError, match=message):
        surgery.reset(model, **options)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_parametrized_layer_is_reset_to_stored_weights_only() -> None:
    model: Any = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    stored = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].bias.fill_(9.0)
    with pytest.raises(DrawError, match="parametrized"):
        surgery.reset(model)
    surgery.reset(model, initial=stored)
    assert torch.equal(model[0].bias, stored["0.bias"])


@pytest.mark.parametrize(("layers", "message"), [("1", "BatchNorm1d"), ("2", "Raw: its output would not be scaled")])
def test_a_head_that_is_not_proportional_to_its_parameters_is_not_scaled(layers: str, message: str) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), Raw(), nn.ReLU(), nn.Linear(2, 1))
    with pytest.raises(ModelError, match=message):
        surgery.scale_head(model, 0.5, layers)


def test_a_layer_with_frozen_rows_is_not_scaled() -> None:
    model = hand_made()
    surgery.knife(model, surgery.Units({"0": [0]}))
    with pytest.raises(ModelError, match="a layer with frozen rows"):
        surgery.scale_head(model, 0.5, "0")


@pytest.mark.parametrize("options", [{"shrink": -0.1}, {"shrink": 1.1}, {"perturb": 2.0}])
def test_factors_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="a factor from 0 to 1"):
        surgery.shrink_and_perturb(hand_made(), **options)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_factor_that_is_no_positive_number_is_refused(factor: float) -> None:
    with pytest.raises(ModelError, match="a positive number"):
        surgery.scale_head(hand_made(), factor, "2")


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(OptimizerError, match="owns none"):
        surgery.reset(hand_made(), optimizer=optim.Adam(hand_made().parameters()))


def test_parameters_that_no_optimizer_owns_are_noted() -> None:
    model = hand_made()
    report = surgery.reset(model, optimizer=optim.Adam(model[0].parameters()))
    assert "no optimizer owns 2.weight, 2.bias: they will not train" in report.notes


# -- composite units -------------------------------------------------------------------------------------------------


def test_reset_takes_the_frozen_rows_of_its_layers_and_leaves_others() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    trained(model, optimizer)
    surgery.knife(model, surgery.Units({"0": [1], "2": [0, 3]}), optimizer=optimizer)
    report = surgery.reset(model, ["2", "4"], optimizer=optimizer)
    assert {name: site.num_frozen for name, site in surgery.discover(model).items()} == {"0": 2, "2": 0}
    assert "2: 4 frozen rows are gone" in report.notes
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    plain.load_state_dict({f"{int(k[0]) - 2}{k[1:]}": v for k, v in model.state_dict().items() if k[0] in "24"})
    assert torch.equal(model[2:](torch.ones(1, 4)), plain(torch.ones(1, 4)))
    trained(model, optimizer)
    assert surgery.check(model, optimizer).ok


def test_after_reset_optimizer_composite_units_are_as_old_as_all_others() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    trained(model, optimizer, steps=5)
    surgery.knife(model, surgery.Units({"0": [1]}), optimizer=optimizer)
    surgery.reset_optimizer(model, optimizer=optimizer)
    trained(model, optimizer, steps=2)
    twin = copy.deepcopy(model)
    fresh = optim.Adam(twin.parameters(), lr=0.01)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(model, optimizer, steps=4)
    trained(twin, fresh, steps=4)  # without the hooks that correct young rows: there is none left
    assert torch.equal(model[0].weight, twin[0].weight)
    assert surgery.check(model, optimizer).ok


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.situation("When to operate", "layers reset every n steps", "works")
def test_a_schedule_without_a_criterion_resets_layers_periodically() -> None:
    model = hand_made()
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    with surgery.Schedule(
        model, optimizer, None, operate=surgery.Every(3), method=surgery.reset, layers="2", init=ones
    ) as schedule:
        found = []
        for _ in range(7):
            trained(model, optimizer, steps=1)
            report: Any = schedule.step()
            found.append(None if report is None else report.layers)
            if report is not None:
                assert model[2].weight.tolist() == [[1.0, 1.0]]
    assert found == [None, None, ("2",), None, None, ("2",), None]
    assert schedule.num_operations == 2
    assert str(schedule).startswith("Schedule: reset at Every(")


def test_a_model_without_sites_is_reset_on_a_plateau() -> None:
    model = nn.Linear(2, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    how = {"operate": surgery.Plateau(2), "method": surgery.reset_optimizer}
    with surgery.Schedule(model, optimizer, None, **how) as schedule:  # type: ignore[arg-type]
        acted = []
        for _ in range(4):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            acted.append(schedule.step(1.0) is not None)
    assert acted == [False, False, True, False]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (surgery.shrink_and_perturb, {"shrink": 0.9}),
        (surgery.scale_head, {"factor": 0.5, "layers": "2"}),
        (surgery.reset_optimizer, {}),
        (surgery.plasticity_injection, {"head": "2"}),
    ],
)
def test_every_method_of_layers_serves_a_schedule(method: Any, options: dict[str, Any]) -> None:
    model = hand_made()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    schedule = surgery.Schedule(model, optimizer, None, operate=surgery.Every(1), method=method, **options)
    trained(model, optimizer, steps=1)
    report: Any = schedule.step()
    schedule.close()
    assert report is not None and report.method == method.__name__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_units": 3}, "max_units=3 asks how many units are chosen"),
        ({"operate": surgery.Share(0.1)}, "Share.* asks how many units"),
        ({"dry_run": True}, "criterion=None chooses none"),
        ({"sites": ["0"]}, "cannot be called"),
    ],
)
def test_a_schedule_without_a_criterion_refuses_what_is_asked_of_units(options: dict[str, Any], message: str) -> None:
    model = hand_made()
    given = {"operate": surgery.Every(1), "method": surgery.reset, **options}
    with pytest.raises(surgery.ScheduleError, match=message):
        surgery.Schedule(model, optim.SGD(model.parameters(), lr=0.1), None, **given)


# -- every optimizer -------------------------------------------------------------------------------------------------


@pytest.fixture
def _warnings_of_libraries() -> Iterator[None]:
    with library_warnings():
        yield


def weights(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def step(optimizer: optim.Optimizer, parameters: list[nn.Parameter], *seeds: int) -> None:
    for parameter, seed in zip(parameters, seeds, strict=True):
        parameter.grad = gradient(seed, "random", SHAPE)
    optimizer.step()


def reset_beside(make: Make, before: int = 12, after: int = 6) -> tuple[float, float]:
    """Make one of two parameters fresh in a run; its distance from a fresh one, the other's from an untouched one."""
    pair, untouched = ([nn.Parameter(weights(1)), nn.Parameter(weights(2))] for _ in range(2))
    fresh = [nn.Parameter(weights(3))]
    optimizer, beside, alone = make(pair), make(untouched), make(fresh)
    for place in range(before):
        step(optimizer, pair, place, 100 + place)
        step(beside, untouched, place, 100 + place)
    run([Overwrite(pair[1], weights(3)), *forget([optimizer], [pair[1]])])
    apart, others = 0.0, 0.0
    for place in range(before, before + after):
        step(optimizer, pair, place, 100 + place)
        step(beside, untouched, place, 100 + place)
        step(alone, fresh, 100 + place)
        apart = max(apart, float((pair[1] - fresh[0]).abs().max()))
        others = max(others, float((pair[0] - untouched[0]).abs().max()))
    return apart, others


def reset_whole(make: Make, before: int = 12, after: int = 6) -> float:
    """Make all parameters fresh, and return their distance from those of a new optimizer."""
    pair, fresh = ([nn.Parameter(weights(1)), nn.Parameter(weights(2))] for _ in range(2))
    optimizer, new = make(pair), make(fresh)
    for place in range(before):
        step(optimizer, pair, place, 100 + place)
    run([*(Overwrite(one, one_new) for one, one_new in zip(pair, fresh, strict=True)), *forget([optimizer], pair)])
    apart = 0.0
    for place in range(before, before + after):
        step(optimizer, pair, place, 100 + place)
        step(new, fresh, place, 100 + place)
        apart = max(apart, *(float((a - b).abs().max()) for a, b in zip(pair, fresh, strict=True)))
    return apart


def rows_of(names: Iterable[str], what: str, outcome: str) -> Any:
    marks = [pytest.mark.situation("Optimizers", f"{name}: {what}", outcome) for name in names]
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in zip(names, marks, strict=True)])


@pytest.mark.usefixtures("_warnings_of_libraries")
@pytest.mark.parametrize("name", EXACT)
def test_a_layer_made_fresh_trains_as_in_a_new_optimizer_and_all_others_as_before(name: str) -> None:
    assert reset_beside(EXACT[name]) == (0.0, 0.0)
    assert reset_whole(EXACT[name]) == 0.0


@pytest.mark.usefixtures("_warnings_of_libraries")
@rows_of(list(COUPLED), "a layer reset", "works")
def test_a_layer_of_an_optimizer_that_couples_rows_trains_as_in_a_new_one(name: str) -> None:
    assert reset_beside(COUPLED[name]) == (0.0, 0.0)
    assert reset_whole(COUPLED[name]) == 0.0


@pytest.mark.usefixtures("_warnings_of_libraries")
@rows_of(list(REFUSED), "a layer reset", "refused")
def test_an_optimizer_that_couples_layers_is_refused_for_one_of_them(name: str) -> None:
    with pytest.raises(OptimizerError, match="couples the rows"):
        reset_beside(REFUSED[name], before=3)


@pytest.mark.parametrize(
    "make", [partial(optim.SGD, lr=0.1, momentum=0.9, fused=True), partial(optim.Adam, lr=torch.tensor(0.01))]
)
def test_a_kernel_that_reads_all_states_at_once_and_a_rate_in_a_tensor_are_served(make: Make) -> None:
    assert reset_beside(make) == (0.0, 0.0)


@pytest.mark.parametrize("cls", [optim.Adam, optim.NAdam])
def test_young_rows_of_a_parameter_that_forgets_are_forgotten(cls: Any) -> None:
    model = hand_made()
    optimizer = cls(model.parameters(), lr=0.1)
    trained(model, optimizer)
    surgery.knife(model, surgery.Units({"0": [1]}), optimizer=optimizer)
    assert model[0].weight in young_rows(optimizer)
    surgery.reset_optimizer(model, "0", optimizer=optimizer)
    assert not young_rows(optimizer)
    trained(model, optimizer)
    assert optimizer.state[model[0].weight]["step"] == 3


def test_copies_that_a_wrapper_keeps_in_the_optimizers_own_state_follow() -> None:
    parameter = nn.Parameter(weights(1))
    optimizer = optim.SGD([parameter], lr=0.1, momentum=0.9)
    step(optimizer, [parameter], 0)
    optimizer.state[parameter]["slow_buffer"] = weights(1)
    run([Overwrite(parameter, weights(2)), *forget([optimizer], [parameter])])
    state = optimizer.state[parameter]
    assert torch.equal(state["slow_buffer"], weights(2))
    assert not state["momentum_buffer"].any()


def copies(optimizer: Any, parameter: nn.Parameter) -> list[Tensor]:
    states = optimizer.state[parameter] | optimizer.optimizer.state[parameter]
    return [entry for entry in states.values() if isinstance(entry, Tensor) and entry.shape == parameter.shape]


@pytest.mark.situation("Optimizers", "Lookahead, layers reset", "works")
@pytest.mark.usefixtures("_warnings_of_libraries")
def test_slow_weights_follow_a_reset_and_a_shrinking() -> None:
    import pytorch_optimizer

    model = hand_made()
    optimizer = pytorch_optimizer.Lookahead(optim.SGD(model.parameters(), lr=0.1), k=100)
    trained(model, optimizer)
    (slow,) = copies(optimizer, model[0].weight)
    before = slow.clone()
    surgery.reset(model, "2", optimizer=optimizer)
    surgery.shrink_and_perturb(model, "0", shrink=0.5, perturb=0.0, optimizer=optimizer)
    assert any(torch.equal(model[2].weight, each) for each in copies(optimizer, model[2].weight))
    assert torch.equal(copies(optimizer, model[0].weight)[0], 0.5 * before)


@pytest.mark.situation("Optimizers", "SGDScheduleFree, a scaled head", "works")
def test_averages_of_a_schedule_free_optimizer_are_scaled_with_the_weights() -> None:
    import schedulefree

    model = hand_made()
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    trained(model, optimizer)
    twin, other = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    surgery.scale_head(model, 0.5, "2", optimizer=optimizer)
    optimizer.eval()
    averages = schedulefree.SGDScheduleFree(twin.parameters(), lr=0.1)
    averages.load_state_dict(other)
    averages.eval()
    assert torch.allclose(model[2].weight, 0.5 * twin[2].weight)
    assert torch.equal(model[0].weight, twin[0].weight)
