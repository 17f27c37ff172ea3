"""Continual backpropagation and CCBP: worked out by hand, resumed, and told from nothing happening."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.errors import CriterionError, ScheduleError, SiteError
from neuronsurgery.pytorch.optimizers import young_rows

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()


def network() -> Any:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 1.0, -5.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        model[2].bias.copy_(torch.tensor([0.5, -0.5]))
    return model


def fives(weight: Tensor) -> None:
    weight.fill_(5.0)


def backward(model: Any, x: Tensor = X) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


# -- continual backpropagation ---------------------------------------------------------------------------------------


def test_the_least_useful_unit_gives_way_and_its_mean_effect_goes_into_the_bias() -> None:
    """Mean activations 2, 7 and 1, mean outgoing sizes 2.5, 3.5 and 4.5: utilities 5, 24.5 and 4.5."""
    model = network()
    before = model(X).mean(0)
    replacing = surgery.ContinualBackprop(model, rate=1 / 3, maturity=0, init=fives)
    backward(model)
    report = replacing.step()
    assert report is not None and report.operated == {"0": (2,)}
    assert model[0].weight.tolist() == [[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]
    assert model[0].bias.tolist() == [0.0, 1.0, 0.0]
    assert model[2].weight.tolist() == [[1.0, 2.0, 0.0], [4.0, 5.0, 0.0]]
    assert model[2].bias.tolist() == pytest.approx([3.5, 5.5])  # plus 1 times 3 and 6
    torch.testing.assert_close(model(X).mean(0), before)  # the same in the mean, no longer in each case
    assert replacing.num_units == 1


def test_running_means_are_corrected_for_the_zero_they_started_from() -> None:
    """Activations of unit 0 are 2, then 4: 0.99 * 0.01 * 2 + 0.01 * 4 over 1 - 0.99^2."""
    model = network()
    replacing = surgery.ContinualBackprop(model, rate=0.5, maturity=1, init=fives, sites="0")
    with torch.no_grad():
        model[2].weight[:, 0] = torch.tensor([1e-3, 2e-3])  # the least useful
    backward(model)
    assert replacing.step() is None  # no unit is older than 1
    backward(model, 2 * X)
    report = replacing.step()
    assert report is not None and report.operated == {"0": (0,)}
    mean = (0.99 * 0.01 * 2 + 0.01 * 4) / (1 - 0.99**2)
    assert model[2].bias.tolist() == pytest.approx([0.5 + mean * 1e-3, -0.5 + mean * 2e-3])


def test_fractions_of_units_accumulate_and_young_units_are_left_alone() -> None:
    model = network()
    replacing = surgery.ContinualBackprop(model, rate=0.1, maturity=3)
    replaced = []
    for step in range(1, 15):
        backward(model)
        if report := replacing.step():
            replaced.append((step, report.operated["0"]))
    # From step 4 on three units are mature, 0.3 a step, 1.2 at step 7. The one replaced is counted again at step 11:
    # 0.2 were left, three steps of two units add 0.6, and one of three 0.3.
    assert [step for step, _ in replaced] == [7, 11]


def test_passes_without_a_graph_do_not_count() -> None:
    model = network()
    replacing = surgery.ContinualBackprop(model, rate=1.0, maturity=0)
    with torch.no_grad():
        model(X)
    assert replacing.step() is None
    assert replacing.state_dict()["runner"]["sites"]["0"]["age"].tolist() == [0, 0, 0]


def test_no_bias_is_corrected_behind_a_maximum_or_a_norm() -> None:
    model: Any = nn.Sequential(
        *(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        *(nn.Flatten(), nn.Linear(12, 2)),
    )
    biases = model[3].bias.clone(), model[7].bias.clone()
    replacing = surgery.ContinualBackprop(model, rate=0.5, maturity=0)
    backward(model, torch.rand(4, 1, 5, 5))
    report = replacing.step()
    assert report is not None and set(report.operated) == {"0", "3"}
    kept = [unit for unit in range(3) if unit not in report.operated["3"]]
    assert torch.equal(model[3].bias[kept], biases[0][kept]) and torch.equal(model[7].bias, biases[1])


def test_what_is_replaced_is_young_for_its_optimizer() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    replacing = surgery.ContinualBackprop(model, optimizer, rate=1 / 3, maturity=0)
    backward(model)
    optimizer.step()
    replacing.step()
    assert young_rows(optimizer) == {model[0].weight: {2: 1}, model[0].bias: {2: 1}, model[2].weight: {2: 1}}


def train(model: Any, optimizer: Any, method: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        method.step()


METHODS: dict[str, Any] = {
    "ContinualBackprop": lambda model, optimizer: surgery.ContinualBackprop(model, optimizer, rate=0.03, maturity=2),
    "CCBP": lambda model, optimizer: surgery.CCBP(model, optimizer, every=3),
    "ContinualBackprop, scheduled": lambda model, optimizer: scheduled(
        model, optimizer, method=surgery.ContinualBackprop, rate=0.03, maturity=2
    ),
    "CCBP, scheduled": lambda model, optimizer: scheduled(model, optimizer, method=surgery.CCBP, every=3),
}


def scheduled(model: Any, optimizer: Any, **options: Any) -> surgery.Schedule:
    return surgery.Schedule(model, optimizer, None, operate=surgery.Every(1), **options)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.situation("Checkpoints and copies", "methods that look at every step", "works")
def test_a_run_that_was_killed_goes_on_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = METHODS[name](model, optimizer)
    train(model, optimizer, method, range(14))
    so_far = method.num_units
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), method.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed = copy.deepcopy(model)
    method.close()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    resumed.load_state_dict(states[0])
    again = torch.optim.Adam(resumed.parameters(), lr=0.01)
    again.load_state_dict(states[1])
    other = METHODS[name](resumed, again)
    other.load_state_dict(states[2])
    method = METHODS[name](model, optimizer)
    method.load_state_dict(states[2])
    train(model, optimizer, method, range(14, 30))
    train(resumed, again, other, range(14, 30))
    assert method.num_units == other.num_units > so_far
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["ContinualBackprop", "CCBP"])
def test_a_schedule_lets_it_run_as_by_itself(name: str) -> None:
    reports, weights = [], []
    for each in (name, f"{name}, scheduled"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with METHODS[each](model, optimizer) as method:
            train(model, optimizer, method, range(20))
        reports.append([method.num_steps, method.num_units, method.last and method.last.operated])
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
        model(torch.rand(3, 4)).sum().backward()  # closed: nothing listens
        assert type(model) is nn.Sequential
    assert reports[0] == reports[1] and reports[0][1] > 0
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"criterion": "stagnant", "operate": surgery.Every(1)}, "found criterion=Stagnant"),
        ({"criterion": None, "operate": surgery.Every(5)}, r"operate=Every\(5\): pass criterion=None, "),
        ({"criterion": None, "operate": surgery.Every(1), "mirrors": copy.deepcopy(network())}, "and mirrors"),
        ({"criterion": None, "operate": surgery.Every(1), "verify": X}, "cannot be called as ContinualBackprop"),
        ({"criterion": None, "operate": surgery.Every(1), "rat": 0.1}, "cannot be called as ContinualBackprop"),
    ],
)
def test_a_schedule_refuses_what_it_has_no_use_for(options: dict[str, Any], complaint: str) -> None:
    model = network()
    with pytest.raises(ScheduleError, match=complaint):
        surgery.Schedule(
            model, torch.optim.SGD(model.parameters(), lr=0.1), method=surgery.ContinualBackprop, **options
        )


def test_a_state_of_a_schedule_of_another_method_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = scheduled(model, optimizer, method=surgery.reset_optimizer).state_dict()
    with pytest.raises(ScheduleError, match="another method: here it is ContinualBackprop"):
        scheduled(model, optimizer, method=surgery.ContinualBackprop).load_state_dict(state)
    with pytest.raises(ScheduleError, match="another method: here it is reset_optimizer"):
        scheduled(model, optimizer, method=surgery.reset_optimizer).load_state_dict(
            scheduled(model, optimizer, method=surgery.CCBP).state_dict()
        )


# -- CCBP ------------------------------------------------------------------------------------------------------------


def test_units_move_towards_a_fresh_draw_by_what_the_formula_says() -> None:
    model = network()
    old = [parameter.detach().clone() for parameter in model.parameters()]
    moving = surgery.CCBP(model, every=1, rate=0.1, init=fives)
    backward(model)
    sizes = model[0].weight.grad.abs().mean(1)
    share = 0.1 / (1 + torch.exp(16 * (sizes / sizes.mean() - 1)))
    report = moving.step()
    assert report is not None and report.operated == {"0": (0, 1, 2)}
    weight, bias, outgoing, head = old
    torch.testing.assert_close(model[0].weight.detach(), weight + share[:, None] * (5 - weight))
    torch.testing.assert_close(model[0].bias.detach(), bias - share * bias)
    torch.testing.assert_close(model[2].weight.detach(), (1 - share) * outgoing)
    assert torch.equal(model[2].bias, head)


def test_ccbp_leaves_optimizer_state_alone_and_waits_for_its_time() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    moving = surgery.CCBP(model, optimizer, every=3)
    reports = []
    for _ in range(6):
        backward(model)
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        reports.append(moving.step())
        torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    assert [report is not None for report in reports] == [False, False, True, False, False, True]
    assert young_rows(optimizer) == {}


# -- both ------------------------------------------------------------------------------------------------------------


def test_a_closed_method_leaves_no_tap_and_steps_no_more() -> None:
    model = network()
    before = [type(module) for module in model.modules()]
    with surgery.ContinualBackprop(model) as replacing:
        pass
    assert [type(module) for module in model.modules()] == before
    with pytest.raises(ScheduleError, match="it was closed"):
        replacing.step()


def test_states_of_other_settings_and_other_models_are_refused() -> None:
    one, other = surgery.CCBP(network()), surgery.CCBP(network(), rate=0.5)
    with pytest.raises(ScheduleError, match=r"other settings: rate=0\.015"):
        other.load_state_dict(one.state_dict())
    wider = surgery.CCBP(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(ScheduleError, match=r"sites \{'0': 3\}; this one has \{'0': 4\}"):
        wider.load_state_dict(one.state_dict())


def test_models_without_known_consumers_and_numbers_out_of_range_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    with pytest.raises(SiteError, match="0: it is returned by Sequential"):
        surgery.ContinualBackprop(model)
    with pytest.raises(CriterionError, match="rate=0 is a share"):
        surgery.CCBP(network(), rate=0)
    with pytest.raises(CriterionError, match="maturity is -1"):
        surgery.ContinualBackprop(network(), maturity=-1)


def test_a_site_that_another_method_operated_on_is_refused() -> None:
    model = network()
    replacing = surgery.ContinualBackprop(model, rate=1.0, maturity=0)
    surgery.knife(model, surgery.Units({"0": [1]}))
    backward(model)
    with pytest.raises(SiteError, match="frozen rows by now"):
        replacing.step()


def test_neither_can_be_copied() -> None:
    with pytest.raises(ScheduleError, match="can be neither copied nor pickled"):
        copy.deepcopy(surgery.CCBP(network()))
