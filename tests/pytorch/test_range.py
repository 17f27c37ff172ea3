"""Composites leave the range of their function; where a range carries meaning there are none unless they are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuronsurgery import surgery
from tests.zoo import CleanRlAgent, QmixMixer, QplexMixer

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 5))  # agents, state, embed


def knife_everywhere(model: nn.Module, times: int = 2, **options: Any) -> surgery.Report:
    """Default arguments, half of all units that `knife` itself would choose from, twice on some."""
    for _ in range(times):
        report = surgery.knife(model, surgery.Random(0.5), **options)
    return report


def train(model: nn.Module, loss: Callable[[], Tensor], num_steps: int = 100, lr: float = 0.03) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


# -- mixers ------------------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(SHAPES, st.sampled_from([1, 2]), st.sampled_from(["abs", "softplus", "exp"]), st.integers(0, 1000))
def test_qmix_stays_monotone_while_it_trains_after_surgery(shape, hyper_layers: int, positive: str, seed: int):
    torch.manual_seed(seed)
    num_agents, state_size, embed_size = shape
    mixer = QmixMixer(num_agents, state_size, embed_size, hyper_layers, positive)
    report = knife_everywhere(mixer, verify=(torch.randn(8, num_agents), torch.randn(8, state_size)))
    assert not {"hyper_w_1", "hyper_w_final", "hyper_b_1", "hyper_w_1.2", "hyper_w_final.2"} & set(report.operated)

    def loss() -> Tensor:
        qs, states = torch.randn(16, num_agents), torch.randn(16, state_size)
        target: Tensor = -qs.sum(-1, keepdim=True) * 3  # decreasing in every agent: pulls against monotony
        result: Tensor = (mixer(qs, states) - target).square().clamp(max=1e6).mean()
        return result

    train(mixer, loss)
    qs, states = torch.randn(64, num_agents, requires_grad=True), torch.randn(64, state_size) * 3
    (slope,) = torch.autograd.grad(mixer(qs, states).sum(), qs)
    assert float(slope.min()) >= 0.0
    assert all(float(weights.detach().min()) >= 0.0 for weights in mixer.weights(states))
    assert surgery.composites(mixer).num_units > 0


@settings(max_examples=3)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_qplex_keeps_its_weights_positive_and_the_greedy_action_while_it_trains(num_agents, state_size, seed):
    torch.manual_seed(seed)
    mixer = QplexMixer(num_agents, state_size)

    def batch(size: int) -> tuple[Tensor, ...]:
        qs = torch.randn(size, num_agents)
        return qs, torch.randn(size, state_size), torch.randn(size, num_agents * 2), qs + torch.rand(size, num_agents)

    report = knife_everywhere(mixer, verify=batch(8))
    assert report.num_units and all(name.endswith(".0") for name in report.operated)

    def loss() -> Tensor:
        qs, states, actions, greedy = batch(16)
        pulled: Tensor = mixer.si_weight(states, actions).square().mean() - mixer.si_weight(states, actions).mean()
        result: Tensor = (mixer(qs, states, actions, greedy) + qs.sum(-1) * 3).square().mean() + pulled
        return result

    train(mixer, loss)
    qs, states, actions, greedy = batch(64)
    assert float(mixer.si_weight(states, actions).detach().min()) >= 0.0
    chosen, best = mixer(qs, states, actions, greedy), mixer(greedy, states, actions, greedy)
    assert bool((best >= chosen - 1e-4 * (1 + best.abs())).all())


# -- heads, scales, gates ----------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """A continuous policy: tanh mean, softplus scale, a sigmoid gate, tanh in the hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.mean = nn.Sequential(nn.Linear(16, 2), nn.Tanh())
        self.scale, self.gate = nn.Linear(16, 2), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x)
        return self.mean(h), F.softplus(self.scale(h)), torch.sigmoid(self.gate(h))


def test_heads_scales_and_gates_keep_their_range_and_hidden_tanh_layers_are_sites():
    model = Actor()
    found = surgery.discover(model)
    assert set(found) == {"body.0", "body.2"}
    assert all("range-bearing" in found.declined[name] for name in ("mean.0", "scale", "gate"))
    assert "'tanh'" in found.declined["mean.0"] and 'name the site: sites=["mean.0"]' in found.declined["mean.0"]
    knife_everywhere(model, verify=torch.randn(8, 4))

    def loss() -> Tensor:
        mean, scale, gate = model(torch.randn(32, 4))
        result: Tensor = ((mean - 2).square() + (scale + 3).square() + (gate + 2).square()).mean()
        return result

    train(model, loss)
    with torch.no_grad():
        mean, scale, gate = model(torch.randn(256, 4) * 3)
    assert float(mean.abs().max()) <= 1.0
    assert float(scale.min()) >= 0.0 and float(gate.min()) >= 0.0 and float(gate.max()) <= 1.0


def test_a_named_head_is_operated_on_and_can_then_leave_its_range():
    model = Actor()
    x = torch.randn(64, 4)
    report = surgery.knife(model, surgery.Random(1.0), sites=["mean.0"], verify=x)
    assert report.operated == {"mean.0": (0, 1)}
    assert surgery.discover(model)["mean.0"].num_frozen == 4  # stays a site without being named again

    def loss() -> Tensor:
        result: Tensor = (model(x)[0] - 5).square().mean()
        return result

    train(model, loss)
    assert float(model(x)[0].detach().max()) > 1.0  # the reason why the default declines it


def test_naming_units_of_a_head_accepts_it_and_naming_one_site_leaves_the_others():
    model = Actor()
    report = surgery.knife(model, surgery.Units({"scale": [1]}))
    assert report.operated == {"scale": (1,)}
    assert "gate" not in surgery.discover(model, include=["mean.0"])


def test_a_name_that_is_no_producer_is_refused_with_near_names():
    with pytest.raises(surgery.SiteError, match=r"no producer is named 'mean': .*did you mean.*mean.0"):
        surgery.discover(Actor(), include=["mean"])


# -- what a trace cannot follow, an example can ------------------------------------------------------------------------


class Policy(nn.Module):
    """A root that branches on values, so that only an example can show where the tanh body's values go."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = head

    def forward(self, x: Tensor) -> Any:
        if float(x.detach().abs().max()) > 1e6:
            raise ValueError("observations are not normalized")
        return self.head(self.body(x))


def test_under_an_untraceable_parent_a_tanh_body_needs_an_example():
    model, x = Policy(nn.Linear(6, 2)), torch.randn(5, 4)
    assert (
        "it leaves Sequential to Policy.forward, which cannot be traced" in surgery.discover(model).declined["body.0"]
    )
    assert "body.0" in surgery.discover(model, example=x)
    with pytest.raises(surgery.SiteError, match="range-bearing"):
        surgery.knife(model, surgery.Random(0.5))
    before = model(x)
    assert surgery.knife(model, surgery.Random(0.5), verify=x).operated.keys() == {"body.0"}
    assert torch.allclose(model(x), before, atol=1e-6)


@pytest.mark.parametrize("head", [nn.Identity(), nn.ReLU(), nn.Softplus(), nn.LayerNorm(6)], ids=str)
def test_an_example_does_not_accept_a_tanh_that_leaves_the_model(head: nn.Module):
    found = surgery.discover(Policy(head), example=torch.randn(5, 4))
    assert "range-bearing" in found.declined["body.0"]


def test_an_example_sees_a_use_beside_the_next_layer():
    class Both(Policy):
        def forward(self, x: Tensor) -> Any:
            if float(x.detach().abs().max()) > 1e6:
                raise ValueError
            h = self.body(x)
            return self.head(h), h.mean()

    assert "body.0" in surgery.discover(Both(nn.Linear(6, 2)), example=torch.randn(5, 4)).declined


def test_hidden_tanh_layers_of_a_methods_only_agent_are_sites():
    model, x = CleanRlAgent(), torch.randn(8, 4)
    assert set(surgery.discover(model)) == {"critic.0", "critic.2", "actor.0"}
    before = model.get_value(x)
    action = torch.zeros(8, dtype=torch.long)
    chosen = model.get_action_and_value(x, action)[1:]
    surgery.knife(model, surgery.Random(0.5))
    assert torch.allclose(model.get_value(x), before, atol=1e-6)
    for old, new in zip(chosen, model.get_action_and_value(x, action)[1:], strict=True):
        assert torch.allclose(old, new, atol=1e-6)


# -- domains -----------------------------------------------------------------------------------------------------------


class Then(nn.Module):
    """A ReLU layer, a function of its value, and a linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.out, self.function = nn.Linear(4, 8), nn.Linear(8, 1), function

    def forward(self, x: Tensor) -> Any:
        return self.out(self.then(F.relu(self.fc(x))))

    def then(self, h: Tensor) -> Any:
        raise NotImplementedError


class Roots(Then):
    def then(self, h: Tensor) -> Any:
        return torch.sqrt(h + 1e-3)


class Logs(Then):
    def then(self, h: Tensor) -> Any:
        return (h + 1e-3).log()


class Divides(Then):
    def then(self, h: Tensor) -> Any:
        return 1.0 / (h + 1.0)


class Powers(Then):
    def then(self, h: Tensor) -> Any:
        return h**0.5


class Doubles(Then):
    def then(self, h: Tensor) -> Any:
        return h * 2 + 1


@pytest.mark.parametrize("cls", [Roots, Logs, Divides, Powers])
def test_a_relu_under_a_function_that_is_not_defined_for_negatives_is_no_site(cls):
    assert "is not defined for all values" in surgery.discover(cls(torch.relu)).declined["fc"]


def test_a_relu_under_a_function_that_is_defined_everywhere_is_a_site():
    assert "fc" in surgery.discover(Doubles(torch.relu))


class Generating(nn.Module):
    """Weights generated by a layer and an `abs`, multiplied with another computed tensor."""

    def __init__(self, multiply) -> None:
        super().__init__()
        self.generate, self.embed, self.multiply = nn.Linear(5, 12), nn.Linear(5, 4), multiply

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.abs(self.generate(x)).view(-1, 4, 3)
        return self.multiply(self.embed(x).unsqueeze(1), weight)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "multiply",
    [torch.bmm, torch.matmul, lambda q, w: q @ w, lambda q, w: torch.einsum("bie,bej->bij", q, w)],
    ids=["bmm", "matmul", "operator", "einsum"],
)
def test_generated_weights_in_a_product_of_computed_tensors_are_declined(multiply):
    declined = surgery.discover(Generating(multiply)).declined
    assert "range-bearing" in declined["generate"]
