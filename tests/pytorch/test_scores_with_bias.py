"""Update activity of rows with their biases: where a bias is, what it adds, and when it is measured at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from neuronsurgery import surgery
from neuronsurgery.pytorch import measure
from neuronsurgery.surgery import Every, Lowest, Quantity, Stagnant

PLAIN = {Quantity.UPDATE_ACTIVITY, Quantity.RELATIVE_UPDATE_ACTIVITY}
UA, RELATIVE = Quantity.UPDATE_ACTIVITY_WITH_BIAS, Quantity.RELATIVE_UPDATE_ACTIVITY_WITH_BIAS


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected).to(found), rtol=1e-5, atol=1e-7)


def two_layers(bias: bool = True) -> Any:
    return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.ReLU(), nn.Linear(8, 2))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = (model(x) - 1).square().mean()
    return out


def now(model: nn.Module) -> surgery.Evidence:
    return measure(model, surgery.discover(model))


def test_the_bias_is_one_more_entry_of_the_row_as_worked_out_by_hand() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 1.0], [0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([2.0, 5.0]))
    model[0].weight.grad = torch.tensor([[0.0, 6.0], [3.0, 0.0]])
    model[0].bias.grad = torch.tensor([6.0 * 3**0.5, 4.0])
    # |(2, 1, 2)| = 3 and |(0, 6, 6 * sqrt 3)| = 12; |(0, 0, 5)| = 5 and |(3, 0, 4)| = 5: UA = 4, 1, of mean 2.5
    evidence = now(model)
    close(evidence.measured("0")[UA], [4.0, 1.0])
    close(evidence.measured("0")[RELATIVE], [1.6, 0.4])
    scores = surgery.score(surgery.discover(model), evidence, Stagnant(0.5, bias=True), model=model)
    assert surgery.select(scores).units == {"0": (1,)}


def test_weights_near_zero_behind_a_constant_input_are_no_longer_the_most_active() -> None:
    torch.manual_seed(0)
    model, x = two_layers(), torch.full((16, 4), 0.01)
    with torch.no_grad():
        model[0].weight[0] = 1e-6
        model[0].bias.fill_(1.0)
    loss_of(model, x).backward()
    sites, evidence = surgery.discover(model), now(model)
    plain, with_bias = (surgery.score(sites, evidence, one) for one in (Stagnant(), Stagnant(bias=True)))
    assert plain["0"]["stagnant"][0] > 7.9  # of 8 that can be: the others all count as stagnant
    assert with_bias["0"]["stagnant_bias"][0] < 3


# -- where a bias is -------------------------------------------------------------------------------------------------


class Stacked(nn.Module):
    """Weights of two experts and their biases, units on two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 4, 3)), nn.Parameter(torch.randn(2, 1, 3))
        self.out = nn.Parameter(torch.randn(2, 3, 2))

    def forward(self, x: Any) -> Any:
        return torch.bmm(torch.relu(torch.baddbmm(self.bias, x.expand(2, -1, -1), self.weight)), self.out)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8))
        self.out = nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        return self.out(F.gelu(F.linear(x, self.weight, self.shift)))


class Noisy(nn.Linear):
    """A weight and a bias that are computed."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.sigma, self.bias_sigma = nn.Parameter(torch.ones(num_out, num_in)), nn.Parameter(torch.ones(num_out))

    def forward(self, x: Any) -> Any:
        return F.linear(x, self.weight + 0.1 * self.sigma, self.bias + 0.1 * self.bias_sigma)


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 3, 2), nn.ReLU(), nn.Conv1d(3, 1, 2))


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose1d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv1d(6, 1, 2))


def behind_a_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))


X, SERIES = torch.linspace(-1, 2, 20).reshape(5, 4).sin(), torch.linspace(-7, 9, 120).reshape(5, 4, 6).sin()
BIASED: dict[str, tuple[Any, str, Tensor, Any]] = {
    "linear": (two_layers, "0", X, lambda m: (m[0].weight, m[0].bias)),
    "functional": (Functional, "weight", X, lambda m: (m.weight, m.shift)),
    "convolution": (convolution, "0", SERIES, lambda m: (m[0].weight, m[0].bias)),
    "behind a norm": (behind_a_norm, "0", X, lambda m: (m[0].weight, m[0].bias)),
    "computed": (
        lambda: nn.Sequential(Noisy(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        "0.weight",
        X,
        lambda m: (m[0].weight, m[0].bias),
    ),
}


def ua(weight: Any, bias: Any) -> Tensor:
    gradient = torch.cat([weight.grad.flatten(1), bias.grad[:, None]], 1)
    row = torch.cat([weight.detach().flatten(1), bias.detach()[:, None]], 1)
    activity: Tensor = gradient.norm(dim=1) / row.norm(dim=1)
    return activity


@pytest.mark.parametrize("kind", BIASED)
def test_every_producers_bias_is_found(kind) -> None:
    make, site, x, parts = BIASED[kind]
    model = make()
    loss_of(model, x).backward()
    expected = ua(*parts(model))
    close(now(model).measured(site)[UA], expected)
    model.zero_grad()
    close(surgery.probe(model, [x], loss_of).measured(site)[UA], expected)


def test_biases_of_stacked_weights_and_of_transposed_convolutions_are_found() -> None:
    stacked: Any = Stacked()
    deconvolution: Any = transposed()
    loss_of(stacked, X).backward()
    rows = [each.detach().transpose(1, 2).reshape(6, -1) for each in (stacked.weight, stacked.bias)]
    gradients = [each.grad.transpose(1, 2).reshape(6, -1) for each in (stacked.weight, stacked.bias)]
    expected = torch.cat(gradients, 1).norm(dim=1) / torch.cat(rows, 1).norm(dim=1)
    close(now(stacked).measured("weight")[UA], expected)
    loss_of(deconvolution, SERIES).backward()
    layer = deconvolution[0]

    def by_channel(tensor: Any) -> Any:  # (in, out / groups, k): of each group its own inputs
        return tensor.unflatten(0, (2, 2)).transpose(1, 2).reshape(6, -1)

    norms = [
        torch.cat([by_channel(weight), bias[:, None]], 1).norm(dim=1)
        for weight, bias in ((layer.weight.grad, layer.bias.grad), (layer.weight.detach(), layer.bias.detach()))
    ]
    close(now(deconvolution).measured("0")[UA], norms[0] / norms[1])


def norm_without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


MAKE_WITHOUT = [lambda: two_layers(bias=False), norm_without_bias]


@pytest.mark.parametrize("make", MAKE_WITHOUT, ids=["none", "of a norm"])
def test_without_a_bias_the_scores_are_the_same_bit_for_bit(make) -> None:
    model = make()
    for evidence in (surgery.probe(model, [X], loss_of), _observed(model)):
        measured = evidence.measured(next(iter(evidence.sites)))
        assert torch.equal(measured[UA], measured[Quantity.UPDATE_ACTIVITY])
        assert torch.equal(measured[RELATIVE], measured[Quantity.RELATIVE_UPDATE_ACTIVITY])


def _observed(model: nn.Module, **options: Any) -> surgery.Evidence:
    with surgery.observe(model, **options) as evidence:
        loss_of(model, X).backward()
    return evidence


def test_a_bias_without_a_gradient_is_an_entry_that_stands_still() -> None:
    model = two_layers()
    loss_of(model, X).backward()
    model[0].bias.grad = None  # as of a bias that was frozen since, say
    row = torch.cat([model[0].weight.detach(), model[0].bias.detach()[:, None]], 1)
    close(now(model).measured("0")[UA], model[0].weight.grad.norm(dim=1) / row.norm(dim=1))


# -- when it is measured ---------------------------------------------------------------------------------------------


def test_each_step_is_normalized_before_the_steps_are_averaged() -> None:
    torch.manual_seed(0)
    model, by_hand = two_layers(), []
    optimizer = SGD(model.parameters(), lr=0.1)
    with surgery.observe(model, optimizer) as evidence:
        for scale in (1.0, 100.0):
            optimizer.zero_grad()
            (scale * loss_of(model, torch.randn(6, 4))).backward()
            by_hand.append(ua(model[0].weight, model[0].bias))
            optimizer.step()
    close(evidence.measured("0")[UA], torch.stack(by_hand).mean(0))
    close(evidence.measured("0")[RELATIVE], torch.stack([each / each.mean() for each in by_hand]).mean(0))


def test_scaled_gradients_are_unscaled_with_their_biases() -> None:
    model = two_layers()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with surgery.observe(model, scaler=scaler) as evidence:
        scaler.scale(loss_of(model, X)).backward()
    close(evidence.measured("0")[UA], ua(model[0].weight, model[0].bias) / 1024)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("stagnant", PLAIN),
        (Lowest(0.5), PLAIN),
        (Stagnant(bias=True), {*PLAIN, UA, RELATIVE}),
        (Lowest(0.5, of=Stagnant(bias=True)), {*PLAIN, UA, RELATIVE}),
        (None, set(Quantity)),
    ],
    ids=["stagnant", "lowest", "bias", "lowest with bias", "none"],
)
def test_biases_are_measured_where_they_are_asked_for(criterion, expected) -> None:
    assert set(_observed(two_layers(), criterion=criterion).measured("0")) == expected
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.1)
    with surgery.observe(model, optimizer, criterion=criterion) as evidence:
        loss_of(model, X).backward()
        optimizer.step()
    assert set(evidence.measured("0")) == expected


@pytest.mark.parametrize("criterion", [Stagnant(0.9, bias=True), Lowest(0.25, of=Stagnant(bias=True))], ids=str)
def test_a_schedule_measures_what_its_criterion_needs_and_goes_on_from_its_state(criterion) -> None:
    torch.manual_seed(0)
    model, by_hand = two_layers(), []
    optimizer = SGD(model.parameters(), lr=0.1)

    def start() -> surgery.Schedule:
        return surgery.Schedule(model, optimizer, criterion, operate=Every(4), dry_run=True)

    schedule = start()
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, torch.randn(6, 4)).backward()
        by_hand.append(ua(model[0].weight, model[0].bias))
        optimizer.step()
        plan = schedule.step()
        if step == 1:
            state = schedule.state_dict()
            schedule.close()
            schedule = start()
            schedule.load_state_dict(state)
    scores = torch.stack([each / each.mean() for each in by_hand]).mean(0)
    is_lowest = isinstance(criterion, Lowest)
    expected = scores.argsort()[:2].sort().values if is_lowest else (scores < 0.9).nonzero().flatten()
    assert isinstance(plan, surgery.Plan)
    assert plan.units == {"0": tuple(expected.tolist())}
    schedule.close()


def test_a_schedule_without_biases_measures_none() -> None:
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.1)
    with surgery.Schedule(model, optimizer, "stagnant", operate=Every(9)) as schedule:
        loss_of(model, X).backward()
        optimizer.step()
        assert set(schedule._watch.evidence.measured("0")) == PLAIN


def test_knife_takes_the_gradients_that_are_there() -> None:
    model = two_layers()
    loss_of(model, X).backward()
    expected = ua(model[0].weight, model[0].bias).argsort()[:2].sort().values
    report = surgery.knife(model, Lowest(0.25, of=Stagnant(bias=True)))
    assert report.operated == {"0": tuple(expected.tolist())}
