"""What goes wrong elsewhere when networks are changed in the middle of a training run, each tested not to here.

In the order of how often such things are reported, how silent they are and how much they spoil. Not yet: training
distributed over processes (the tenth), and networks that grow by new units rather than by frozen rows.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neuronsurgery import surgery
from tests.assertions import TOLERANCES, assert_same_output, assert_same_state, bank_tensors, outcome, state_of

situation = pytest.mark.situation


def network() -> Any:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


UNITS = surgery.Units({"0": [0, 3, 5], "2": [1, 2]})
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 1) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


@situation("Optimizers", "the optimizer that the run already has", "works")
def test_optimizer_is_not_silently_detached_from_new_parameters() -> None:
    model = network()
    optimizer = Adam(model.parameters(), lr=1e-2)
    train(model, optimizer)
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    surgery.knife(model, UNITS, optimizer=optimizer)
    assert [id(p) for p in model.parameters()] == owned
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer)
    assert all(bool((old != new).any()) for old, new in zip(before, model.parameters(), strict=True))
    surgery.check(model, optimizer).require()


@situation("Optimizers", "an optimizer of another model", "refused")
def test_an_optimizer_of_another_model_is_refused_and_not_passed_over() -> None:
    model, other = network(), network()
    before = state_of(model)
    with pytest.raises(surgery.OptimizerError, match="owns none of the model's 6 parameters"):
        surgery.knife(model, UNITS, optimizer=Adam(other.parameters()))
    assert_same_state(before, state_of(model))


@situation("Optimizers", "Adam, state of operated and of other rows", "works")
def test_optimizer_state_is_neither_lost_nor_leaked_nor_mis_scaled() -> None:
    model, lr = network(), 1e-3
    optimizer = Adam(model.parameters(), lr=lr)
    train(model, optimizer, 500)
    twin, theirs = copy.deepcopy((model, optimizer))
    surgery.knife(model, surgery.Units({"0": [3]}), optimizer=optimizer)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    largest = 0.0
    for _ in range(30):
        before = model[0].weight.detach().clone()
        for one, each in ((model, optimizer), (twin, theirs)):
            for parameter, gradient in zip(one.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            each.step()
        largest = max(largest, float((model[0].weight.detach() - before)[3].abs().max()) / lr)
    others = [unit for unit in range(16) if unit != 3]
    assert torch.equal(model[0].weight[others], twin[0].weight[others])
    assert torch.equal(model[2].weight, twin[2].weight)
    assert 0.9 <= largest <= 1.1  # a fresh parameter's is 1; forgotten moments alone would make it 6.6


@situation("Optimizers", "weight decay, momentum, clipping and sweeps over parameters", "works")
@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.1, weight_decay=0.1), lambda p: SGD(p, lr=0.1, momentum=0.9)])
def test_frozen_is_frozen(make: Any) -> None:
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer, 2)
    surgery.knife(model, UNITS, optimizer=optimizer)
    frozen = bank_tensors(model)
    for _ in range(20):
        model.requires_grad_(True)
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.999)
    model.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(getattr(m, "weight", None), Tensor) else None)
    assert_same_state(frozen, bank_tensors(model))


class Dueling(nn.Module):
    """Two heads of one hidden layer: what comes next in the order of registration is not what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 8, 2)
        self.advantage, self.a_out = nn.Linear(8 * 9, 16), nn.Linear(16, 3)
        self.value, self.v_out = nn.Linear(8 * 9, 16), nn.Linear(16, 1)

    def forward(self, x):
        h = F.relu(self.features(x)).flatten(1)
        advantage, value = self.a_out(F.relu(self.advantage(h))), self.v_out(F.relu(self.value(h)))
        return value + advantage - advantage.mean(1, keepdim=True)


@situation("When to operate", "dueling heads, a convolution behind flatten", "works")
def test_no_wrong_consumer_or_axis_is_changed_because_no_consumer_is() -> None:
    model, x = Dueling(), torch.randn(6, 1, 4, 4)
    before, state = outcome(model, [x]), state_of(model)
    report = surgery.knife(model, surgery.Random(0.5), verify=x)
    assert set(report.operated) == {"features", "advantage", "value"}
    assert_same_output(before, outcome(model, [x]), TOLERANCES[torch.float32])
    for name in ("a_out.weight", "v_out.weight", "a_out.bias", "v_out.bias"):
        assert torch.equal(state[name], model.state_dict()[name])


class Untraceable(nn.Module):
    """A forward that no tracer can follow, around blocks that can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(network() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            if float(x.detach().mean()) > 10:
                x = x * 0.1
            x = F.pad(block(x), (0, 2))
        return x


@situation("When to operate", "a model whose own forward cannot be traced", "works")
def test_a_forward_that_cannot_be_captured_whole_does_not_keep_its_blocks_from_being_operated_on() -> None:
    model = Untraceable()
    with pytest.raises(Exception, match="Proxy"):
        torch.fx.symbolic_trace(model)
    before, cls = outcome(model, [X]), type(model)
    report = surgery.knife(model, surgery.Random(0.5), verify=X)
    assert set(report.operated) == {"blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"}
    assert type(model) is cls
    assert_same_output(before, outcome(model, [X]), TOLERANCES[torch.float32])


@situation("Precision", "bfloat16, weights of order one and operations upon operations", "works")
def test_what_is_called_equivalent_is() -> None:
    layers = [nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2)]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = copy.deepcopy(nn.Sequential(*layers)).to(dtype)
        x = X.to(dtype)
        before = outcome(model, [x], seed=3)  # in training mode, under the same seed: the same dropout masks
        for _ in range(3):
            surgery.knife(model, surgery.Units({"0": [0, 3, 5]}), verify=x)
        assert_same_output(before, outcome(model, [x], seed=3), TOLERANCES[dtype])


@situation("Checkpoints and copies", "the optimizer's state dict after an operation", "works")
def test_a_checkpoint_fits_after_the_structure_has_changed() -> None:
    model = network()
    optimizer = Adam(model.parameters(), lr=1e-2)
    train(model, optimizer)
    surgery.knife(model, UNITS, optimizer=optimizer)
    again = copy.deepcopy(model)
    fresh = Adam(again.parameters(), lr=1e-2)
    fresh.load_state_dict(optimizer.state_dict())  # no "doesn't match the size of optimizer's group"
    again.load_state_dict(model.state_dict(), strict=True)
    plain = Adam(network().parameters(), lr=1e-2)
    plain.load_state_dict(optimizer.state_dict())
    assert torch.equal(model(X), again(X))
    assert set(network().state_dict()) <= set(model.state_dict())  # the keys of the untouched model are still there
    with pytest.raises(RuntimeError, match=r"0\.composite\.frozen_weight"):  # and banks are not dropped in silence
        network().load_state_dict(model.state_dict())


@situation("Checks", "a target network that fell out of step", "works")
def test_a_target_network_that_falls_out_of_step_is_found() -> None:
    model = network()
    target = copy.deepcopy(model).requires_grad_(False)
    surgery.knife(model, UNITS)
    (problem,) = surgery.check(model, mirrors=target).about("mirror")
    assert problem.where == "mirrors[0]: 0.composite; mirrors[0]: 2.composite"
    assert "surgery.mirror(model, onto=target)" in problem.remedy
    assert surgery.check(model, mirrors=copy.deepcopy(model)).ok


@situation("Schedules and wrappers", "a learning rate schedule that has begun", "works")
def test_a_learning_rate_schedule_goes_on_bit_for_bit() -> None:
    rates = []
    for operates in (False, True):
        torch.manual_seed(0)
        model = network()
        optimizer = AdamW(model.parameters(), lr=1e-3)
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
        found = []
        for step in range(20):
            train(model, optimizer)
            schedule.step()
            if operates and step in (5, 11):
                surgery.knife(model, UNITS, optimizer=optimizer, cooldown=0)
            found.append((schedule.get_last_lr(), optimizer.param_groups[0]["betas"]))
        assert len(optimizer.param_groups) == 1
        rates.append(found)
    assert rates[0] == rates[1]


@situation(
    "When to operate", "while monitored: in-place activations, evaluations in between, a copy made meanwhile", "works"
)
def test_a_monitor_neither_dies_nor_disturbs_training() -> None:
    runs = []
    for is_observed in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(4, 16), nn.ReLU(inplace=True), nn.Linear(16, 2))
        optimizer = SGD(model.parameters(), lr=0.1)
        if not is_observed:
            train(model, optimizer, 3)
        else:
            with surgery.observe(model, optimizer) as evidence:
                train(model, optimizer, 2)
                target = copy.deepcopy(model)
                with torch.no_grad():
                    model(100 * X)  # an evaluation, which is not measured
                target(100 * X).sum().backward()
                train(model, optimizer)
            assert evidence.num_samples("0", surgery.Quantity.ACTIVATION) == 3 * len(X)
            assert not model[0]._forward_hooks and not target[0]._forward_hooks
            assert not optimizer._optimizer_step_pre_hooks
        runs.append(state_of(model))
    assert_same_state(*runs)


@situation("Checks", "scores against numbers worked out by hand", "works")
def test_a_metric_means_what_its_paper_says() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, 2.0]]))
    evidence = surgery.probe(model, [torch.tensor([[1.0, 1.0]])], lambda model, x: model(x).sum())
    sites = surgery.discover(model)
    # activations 7 and 1, dL/dh 1 and 2, gradients of the rows (1, 1) and (2, 2) over norms 5 and 1
    expected = {"dormant": [7 / 4, 1 / 4], "grama": [1 / 1.5, 2 / 1.5]}
    activity = torch.tensor([2**0.5 / 5, 8**0.5])
    expected["stagnant"] = (activity / activity.mean()).tolist()
    for name, values in expected.items():
        scores = surgery.score(sites, evidence, name)
        (found,) = [one for leaf in scores.values.values() for one in leaf.values()]
        assert [float(each) for each in found] == pytest.approx(values), name


@situation("When to operate", "tied weights", "works")
def test_ties_survive_and_a_shared_weight_is_operated_on_once() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    before = outcome(model, [X])
    report = surgery.knife(model, surgery.Units({"0": [1, 2]}), verify=X)
    assert report.num_units == 2 and list(surgery.discover(model)) == ["0"]
    assert model[2].weight is model[0].weight and model[2].composite is model[0].composite
    assert_same_output(before, outcome(model, [X]), TOLERANCES[torch.float32])


@situation("When to operate", "a layer of no supported kind", "refused")
def test_a_layer_that_is_not_covered_is_named_with_its_reason() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.gru, self.out = nn.Linear(4, 8), nn.GRUCell(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.gru(F.relu(self.enter(x))))

    model = Recurrent()
    found = surgery.discover(model)
    assert list(found) == ["enter"] and "gru" in found.declined
    with pytest.raises(surgery.SiteError, match="gru"):
        surgery.knife(model, surgery.Units({"gru": [0]}))
    before = outcome(model, [X])
    surgery.knife(model, surgery.Units({"enter": [0, 1]}), verify=X)
    assert_same_output(before, outcome(model, [X]), TOLERANCES[torch.float32])


@situation("When to operate", "again and again, up to the bound on growth", "works")
def test_growth_is_bounded_and_an_operation_can_be_undone() -> None:
    model = network()
    before, state, reports = outcome(model, [X]), state_of(model), []
    everything = surgery.Units({"0": list(range(16))})
    for _ in range(2):
        reports.append(surgery.knife(model, everything, max_growth=4.0))
    assert surgery.composites(model).num_rows == 4 * 16
    assert_same_output(before, outcome(model, [X]), TOLERANCES[torch.float32])
    for report in reversed(reports):
        surgery.undo(model, report)
    assert_same_state(state, state_of(model))

    done = []
    for _ in range(4):
        done.append(surgery.knife(model, everything, max_growth=4.0))
        with torch.no_grad():  # as training does; members that never moved would cancel, and be consolidated
            model.get_parameter("0.weight").mul_(1.1)
    assert [report.num_units for report in done] == [16, 16, 0, 0] and "0" in done[-1].declined
    assert surgery.composites(model).num_rows == 4 * 16
