"""Evidence: what is measured equals hand-computed numbers, and measuring leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from neuronsurgery import surgery
from neuronsurgery.evidence import Evidence
from neuronsurgery.pytorch import measure
from neuronsurgery.surgery import Quantity
from tests.snapshots import assert_untouched, bits, snapshot
from tests.subjects import Subject, subject

UA, RELATIVE = Quantity.UPDATE_ACTIVITY, Quantity.RELATIVE_UPDATE_ACTIVITY
H, GRADIENT = Quantity.ACTIVATION, Quantity.ACTIVATION_GRADIENT


def two_layers() -> Any:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = (model(x) - 1).square().mean()
    return out


class Idle(torch.optim.Optimizer):
    """Takes steps and leaves the weights, whatever their gradients."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


def activity(layer: Any) -> Tensor:
    """UA by hand: |grad w_i| / |w_i|."""
    found: Tensor = layer.weight.grad.norm(dim=1) / layer.weight.detach().norm(dim=1)
    return found


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found), rtol=1e-5, atol=1e-7)


# -- gradients that are there ----------------------------------------------------------------------------------------


def test_present_gradients_give_the_update_activity_worked_out_by_hand():
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]))
    # |grad| = 1, 2, 3 over |w| = 5, 2, 1: UA = 0.2, 1, 3, of mean 1.4
    model[0].weight.grad = torch.tensor([[0.6, 0.8], [2.0, 0.0], [0.0, -3.0]])
    evidence = measure(model, surgery.discover(model))
    measured = evidence.measured("0")
    close(measured[UA], torch.tensor([0.2, 1.0, 3.0]))
    close(measured[RELATIVE], torch.tensor([0.2, 1.0, 3.0]) / 1.4)
    scores = surgery.score(surgery.discover(model), evidence, "stagnant", model=model)
    assert scores["0"]["stagnant"] == pytest.approx([0.2 / 1.4, 1 / 1.4, 3 / 1.4], rel=1e-6)
    assert surgery.select(scores).units == {"0": (0,)}


def test_present_gradients_of_a_convolution_are_normed_over_the_whole_filter():
    model: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 1))
    model(torch.randn(3, 2, 4, 4)).square().sum().backward()
    w, g = model[0].weight.detach().flatten(1), model[0].weight.grad.flatten(1)
    close(measure(model, surgery.discover(model)).measured("0")[UA], g.norm(dim=1) / w.norm(dim=1))


def test_present_gradients_in_bfloat16_are_normed_in_float32():
    model = two_layers().to(torch.bfloat16)
    model[0].weight.grad = torch.full_like(model[0].weight, 1e-3)
    found = measure(model, surgery.discover(model)).measured("0")[UA]
    assert found.dtype == torch.float32
    close(found, model[0].weight.grad.float().norm(dim=1) / model[0].weight.detach().float().norm(dim=1))


# -- observe with an optimizer ---------------------------------------------------------------------------------------


def observed(num_steps: int = 3, scale: float = 1.0, clip: bool = False, accumulate: int = 1, every: int = 1) -> Any:
    """A model observed over steps, and UA by hand in each step."""
    torch.manual_seed(1)
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.1)
    by_hand = []
    with surgery.observe(model, optimizer, every=every) as evidence:
        for _ in range(num_steps):
            optimizer.zero_grad()
            for _ in range(accumulate):
                (scale * loss_of(model, torch.randn(6, 4)) / accumulate).backward()
            if scale != 1:
                for parameter in model.parameters():
                    parameter.grad /= scale
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            by_hand.append(activity(model[0]))
            optimizer.step()
    return evidence, torch.stack(by_hand)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 3}, {"scale": 1024.0}, {"clip": True}],
    ids=["plain", "accumulated", "scaled", "clipped"],
)
def test_observe_reads_the_gradients_that_the_optimizer_uses(options):
    evidence, by_hand = observed(**options)
    assert (evidence.num_steps, evidence.num_skipped) == (3, 0)
    close(evidence.measured("0")[UA], by_hand.mean(0))
    close(evidence.measured("0")[RELATIVE], (by_hand / by_hand.mean(1, keepdim=True)).mean(0))


def test_clipping_by_a_common_factor_leaves_the_scores_of_a_step():
    for num_steps in (1,):
        plain, clipped = observed(num_steps)[0], observed(num_steps, clip=True)[0]
        close(clipped.measured("0")[RELATIVE], plain.measured("0")[RELATIVE])
        assert not torch.allclose(clipped.measured("0")[UA], plain.measured("0")[UA])


def test_a_scaled_loss_leaves_the_scores_of_a_step():
    plain, scaled = observed(1)[0], observed(1, scale=2.0**14)[0]
    for quantity in (RELATIVE, H):
        close(scaled.measured("0")[quantity], plain.measured("0")[quantity])
    close(scaled.measured("0")[GRADIENT] / 2.0**14, plain.measured("0")[GRADIENT])


def test_every_second_step_is_measured_with_its_activations():
    evidence, by_hand = observed(5, every=2)
    assert evidence.num_steps == 3
    assert evidence.num_samples("0", H) == evidence.num_samples("0", GRADIENT) == 3 * 6
    close(evidence.measured("0")[UA], by_hand[::2].mean(0))


def test_steps_that_are_not_finite_are_skipped_and_counted():
    model = two_layers()
    optimizer = Idle(model.parameters())
    by_hand = []
    with surgery.observe(model, optimizer) as evidence:
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, torch.randn(6, 4)).backward()
            if step % 2:
                model[0].weight.grad[3, 1] = (torch.inf, torch.nan)[step // 2]
            else:
                by_hand.append(activity(model[0]))
            optimizer.step()
    assert (evidence.num_steps, evidence.num_skipped) == (2, 2)
    close(evidence.measured("0")[UA], torch.stack(by_hand).mean(0))


def test_a_pass_that_overflows_does_not_spoil_the_activation_gradients_of_the_others():
    model = two_layers()
    optimizer = Idle(model.parameters())
    x = torch.randn(6, 4)
    with surgery.observe(model, optimizer) as plain:
        loss_of(model, x).backward()
        optimizer.step()
    with surgery.observe(model, optimizer) as evidence:
        for scale in (1.0, torch.inf, 1.0):  # a gradient scaler's first guess overflows
            optimizer.zero_grad()
            (loss_of(model, x) * scale).backward()
            optimizer.step()
    assert (evidence.num_steps, evidence.num_skipped) == (2, 1)
    close(evidence.measured("0")[GRADIENT], plain.measured("0")[GRADIENT])
    assert evidence.num_samples("0", GRADIENT) == 12
    assert not surgery.score(surgery.discover(model), evidence, "grama", model=model).unscored


def test_a_gradient_scaler_that_skips_steps_is_measured_unscaled():
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    by_hand = []
    with surgery.observe(model, optimizer) as evidence:
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, torch.randn(6, 4))).backward()
            scaler.unscale_(optimizer)
            by_hand.append(activity(model[0]))
            scaler.step(optimizer)
            scaler.update()
    assert evidence.num_steps == 3
    close(evidence.measured("0")[UA], torch.stack(by_hand).mean(0))


def test_several_optimizers_measure_each_their_own_sites():
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    owners = [SGD(model[:2].parameters(), lr=0.1), Adam(model[2:].parameters(), lr=0.1)]
    first, second = [], []
    with surgery.observe(model, owners) as evidence:
        for _ in range(3):
            for one in owners:
                one.zero_grad()
            loss_of(model, torch.randn(6, 4)).backward()
            first.append(activity(model[0]))
            second.append(activity(model[2]))
            for one in owners:
                one.step()
    close(evidence.measured("0")[UA], torch.stack(first).mean(0))
    close(evidence.measured("2")[UA], torch.stack(second).mean(0))
    assert evidence.num_samples("0", UA) == evidence.num_samples("2", UA) == 3


def test_sites_that_no_given_optimizer_owns_are_not_measured_by_their_gradients():
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = SGD(model[2:].parameters(), lr=0.1)
    with surgery.observe(model, optimizer) as evidence:
        loss_of(model, torch.randn(6, 4)).backward()
        optimizer.step()
    assert UA not in evidence.measured("0")
    assert UA in evidence.measured("2") and H in evidence.measured("0")
    scores = surgery.score(surgery.discover(model), evidence, "stagnant", model=model)
    assert scores.unscored == {"0": "received no gradient"}


# -- observe without an optimizer ------------------------------------------------------------------------------------


def test_without_an_optimizer_every_backward_is_one_step_however_many_weights_it_reaches():
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    by_hand = []
    with surgery.observe(model) as evidence:
        for _ in range(3):
            model.zero_grad()
            loss_of(model, torch.randn(6, 4)).backward()
            by_hand.append(activity(model[0]))
    assert evidence.num_steps == 3
    close(evidence.measured("0")[UA], torch.stack(by_hand).mean(0))


def test_without_an_optimizer_two_backwards_through_one_graph_are_two_steps_of_what_has_accumulated():
    model = two_layers()
    with surgery.observe(model) as evidence:
        loss = loss_of(model, torch.randn(6, 4))
        loss.backward(retain_graph=True)
        once = activity(model[0])
        loss.backward()
        twice = activity(model[0])
    assert evidence.num_steps == 2
    close(evidence.measured("0")[UA], (once + twice) / 2)
    close(twice, 2 * once)
    assert evidence.num_samples("0", H) == 6  # one forward
    assert evidence.num_samples("0", GRADIENT) == 12  # two backwards


def test_without_an_optimizer_a_weight_used_twice_is_one_step():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.again, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.enter(x))
            out: Tensor = self.head(F.relu(self.again(F.relu(self.again(h)))))
            return out

    model = Twice()
    with surgery.observe(model) as evidence:
        loss_of(model, torch.randn(6, 4)).backward()
    assert evidence.num_steps == 1
    assert evidence.num_samples("again", H) == 12  # both calls are samples
    close(evidence.measured("again")[UA], activity(model.again))


# -- activations -----------------------------------------------------------------------------------------------------


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.seen: dict[str, Tensor] = {}

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.one(x))
        return h, self.two(h).relu()

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.one(x))
        out: Tensor = self.head(self.two(h).relu())
        return out


class Parameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.head = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.zeros(8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(F.linear(x, self.w, self.b)))
        return out


def by_hand(model: Any, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> E|h| and E|dL/dh| by autograd, for the models below; units on the last axis."""
    if isinstance(model, Parameters):
        h = torch.relu(F.linear(x, model.w, model.b))
        hidden, out = {"w": h}, model.head(h)
    elif isinstance(model, Functions):
        h = F.gelu(model.one(x))
        g = model.two(h).relu()
        hidden, out = {"one": h, "two": g}, model.head(g)
    else:
        h = model[1](model[0](x))
        hidden, out = {"0": h}, model[2](h)
    gradients = torch.autograd.grad((out - 1).square().mean(), list(hidden.values()))
    return {
        name: (h.detach().abs().reshape(-1, h.shape[-1]).mean(0), g.abs().reshape(-1, h.shape[-1]).mean(0))
        for (name, h), g in zip(hidden.items(), gradients, strict=True)
    }


@pytest.mark.parametrize("make", [two_layers, Functions, Parameters])
@pytest.mark.parametrize("shape", [(6, 4), (4,), (3, 5, 4)], ids=["batch", "single", "sequence"])
def test_activations_and_their_gradients_are_those_of_autograd(make, shape):
    model, x = make(), torch.randn(shape)
    expected = by_hand(model, x)
    with surgery.observe(model) as evidence:
        loss_of(model, x).backward()
    assert set(evidence.sites) == set(expected)
    for name, (h, gradient) in expected.items():
        close(evidence.measured(name)[H], h)
        close(evidence.measured(name)[GRADIENT], gradient)
        assert evidence.num_samples(name, H) == x[..., 0].numel()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolutions_units_are_its_channels_and_every_position_is_a_sample(dims):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](2, 4, 3)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 2**dims, 1))
    x = torch.randn(3, 2, *[4] * dims)
    h = F.relu(model[0](x))
    (gradient,) = torch.autograd.grad(loss_of(model[2:], h), h)
    evidence = surgery.probe(model, [x], loss_of)
    close(evidence.measured("0")[H], h.detach().abs().transpose(0, 1).flatten(1).mean(1))
    close(evidence.measured("0")[GRADIENT], gradient.abs().transpose(0, 1).flatten(1).mean(1))
    assert evidence.num_samples("0", H) == 3 * 2**dims


class Moved(nn.Module):
    """Has its units on another axis where the caller asks for it, or computes another product."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.weight, self.out = nn.Linear(4, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 2)

    def forward(self, x: Any, is_moved: bool = False) -> Any:
        z = self.fc(x)
        return self.out(F.relu(z.transpose(1, 2) if is_moved else z * 2.0))


class MovedProduct(Moved):
    def forward(self, x: Any, is_moved: bool = False) -> Any:
        return self.out(F.relu(torch.einsum("bti,oi->bot" if is_moved else "bti,oi->bto", x, self.weight)))


@pytest.mark.parametrize("is_operated", [False, True])
@pytest.mark.parametrize(("make", "name"), [(Moved, "fc"), (MovedProduct, "weight")])
def test_activations_are_counted_by_unit_where_a_call_has_the_units_on_another_axis(make, name, is_operated):
    model = make()
    x = torch.randn(5, 8, 4 if make is Moved else 8)
    z = model.fc(x) if make is Moved else x @ model.weight.T
    expected = F.relu(z).abs().mean((0, 1)).detach()
    if is_operated and make is Moved:
        surgery.knife(model, surgery.Units({name: [1, 2]}))
    with surgery.observe(model) as evidence:
        model(x, True).sum().backward()
    close(evidence.measured(name)[H], expected)
    with surgery.observe(model) as evidence:
        model(x).sum().backward()
    close(evidence.measured(name)[H], expected * (2 if make is Moved else 1))


class OtherUnits(Moved):
    def forward(self, x: Any, is_other: bool = False) -> Any:
        return self.out(F.relu(x @ self.weight if is_other else F.linear(x, self.weight)))


def test_observing_a_call_whose_units_are_others_of_the_same_weight_is_refused():
    model = OtherUnits()
    with surgery.observe(model), pytest.raises(surgery.SurgeryError, match=r"weight.*other axes"):
        model(torch.randn(5, 8), True)


@pytest.mark.parametrize("model", ["sequential", "functional", "conv", "shared", "prelu"])
def test_an_operated_units_activation_is_its_composites_output(model):
    found = subject(model)
    found.model.eval()
    before = surgery.probe(found.model, [found.x], loss_of)
    surgery.knife(found.model, surgery.Units(found.units(1, 5)), optimizer=found.optimizers)
    after = surgery.probe(found.model, [found.x], loss_of)
    for name in before.sites:
        for quantity in (H, GRADIENT):  # unchanged right after surgery, GraMa's and Dormant's scores with them
            torch.testing.assert_close(
                after.measured(name)[quantity], before.measured(name)[quantity], rtol=1e-4, atol=1e-6
            )
    sites = surgery.discover(found.model)
    for criterion in (surgery.GraMa(), surgery.Dormant()):
        was = surgery.score(sites, before, criterion)
        now = surgery.score(sites, after, criterion)
        for name in was:
            assert now[name][criterion.name] == pytest.approx(was[name][criterion.name], rel=1e-3, abs=1e-5)
    # the slot alone says something else: its member is a fresh draw
    if model == "sequential":
        slot = torch.relu(F.linear(found.x, found.model[0].weight, found.model[0].bias)).abs().mean(0).detach()
        assert not torch.allclose(slot[[1, 5]], after.measured("0")[H][[1, 5]], rtol=1e-2)


def test_rollouts_evaluations_and_copies_do_not_enter():
    model, x = two_layers(), torch.randn(6, 4)
    optimizer = SGD(model.parameters(), lr=0.1)
    target = copy.deepcopy(model)
    with surgery.observe(model, optimizer) as evidence:
        inside = copy.deepcopy(model)
        with torch.no_grad():
            model(torch.randn(50, 4))
        with torch.inference_mode():
            model(torch.randn(50, 4))
        for each in (target, inside):
            each(torch.randn(50, 4)).sum().backward()
        expected = by_hand(copy.deepcopy(model), x)["0"]
        loss_of(model, x).backward()
        optimizer.step()
    assert evidence.num_samples("0", H) == 6
    close(evidence.measured("0")[H], expected[0])
    close(evidence.measured("0")[GRADIENT], expected[1])
    inside(x)  # the copy still works when the observation is over
    assert torch.equal(inside[:2](x), F.relu(inside[0](x)))


def test_passes_in_an_unobserved_block_do_not_enter_but_for_what_is_opened_there():
    model, x = two_layers(), torch.randn(6, 4)
    expected = by_hand(copy.deepcopy(model), x)["0"]
    with surgery.observe(model) as evidence:
        with surgery.unobserved():
            kept = model(torch.randn(50, 4)).sum()
            with surgery.observe(model) as inner, surgery.unobserved():
                model(torch.randn(7, 4)).sum()
            with surgery.observe(model) as later:
                model(torch.randn(9, 4)).sum()
        torch.autograd.grad(kept, list(model.parameters()))  # nor the gradients of such a pass, whenever they come
        loss_of(model, x).backward()
    assert [each.num_samples("0", H) for each in (evidence, inner, later)] == [6, 0, 9]
    close(evidence.measured("0")[H], expected[0])
    close(evidence.measured("0")[GRADIENT], expected[1])


def test_an_unobserved_block_that_fails_leaves_observations_hearing():
    model, x = two_layers(), torch.randn(6, 4)
    with surgery.observe(model) as evidence:
        with pytest.raises(KeyError), surgery.unobserved():
            raise KeyError
        loss_of(model, x).backward()
    assert evidence.num_samples("0", H) == 6


# -- nothing left behind ---------------------------------------------------------------------------------------------

MODELS = ["sequential", "functional", "conv", "shared", "prelu"]


def shape_of(found: Subject) -> dict[str, Any]:
    """A snapshot without values: classes, keys, hooks, identities."""
    leaves = snapshot(found.model, found.optimizers)
    return {
        k: v for k, v in leaves.items() if not any(x in k for x in ("values of", "grad of", "torch's random", "state "))
    }


@pytest.mark.parametrize("with_optimizer", [True, False])
@pytest.mark.parametrize("operated", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_observing_leaves_nothing_on_the_model_or_its_optimizers(model, operated, with_optimizer):
    found = subject(model)
    if operated:
        surgery.knife(found.model, surgery.Units(found.units(1)), optimizer=found.optimizers)
        found.train()
    before = shape_of(found)
    with surgery.observe(found.model, found.optimizers if with_optimizer else None) as evidence:
        found.train(2)
    assert evidence.num_steps == 2
    assert shape_of(found) == before
    with pytest.raises(ZeroDivisionError), surgery.observe(found.model, found.optimizers):
        found.train()
        raise ZeroDivisionError
    assert shape_of(found) == before
    steps = evidence.num_steps
    found.train()
    assert evidence.num_steps == steps, "it went on measuring"


def test_observing_changes_no_output_and_no_training():
    one, two = subject("conv"), subject("conv")
    with surgery.observe(one.model, one.optimizers):
        torch.manual_seed(0)
        one.train(3)
    torch.manual_seed(0)
    two.train(3)
    assert all(
        bits(a) == bits(b)
        for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)
    )


def test_an_observed_model_may_be_sliced_through_a_site():
    model, x = two_layers(), torch.randn(6, 4)
    with surgery.observe(model) as evidence:
        assert torch.equal(model[:1](x), model[0](x))
        assert torch.equal(model[:2](x), F.relu(model[0](x)))
        loss_of(model, x).backward()
    assert evidence.num_steps == 1


@pytest.mark.parametrize("model", MODELS)
def test_knife_within_an_observation_keeps_measuring_and_leaves_nothing_but_its_banks(model):
    found, twin = subject(model), subject(model)
    units = surgery.Units(found.units(1))
    surgery.knife(twin.model, units, optimizer=twin.optimizers)
    with surgery.observe(found.model, found.optimizers) as evidence:
        found.train(2)
        samples = {name: evidence.num_samples(name, H) for name in evidence.sites}
        surgery.knife(found.model, units, optimizer=found.optimizers, verify=None)
        found.train(2)
    for name in evidence.sites:
        assert evidence.num_samples(name, H) == 2 * samples[name] > 0, f"{name} is no longer heard"
        assert evidence.num_samples(name, GRADIENT) == 2 * samples[name]
    classes = [type(module) for module in found.model.modules()]
    assert classes == [type(module) for module in twin.model.modules()]
    assert evidence.num_steps == 4 * len(found.optimizers)


def test_undo_within_an_observation_keeps_measuring_and_leaves_nothing():
    found = subject()
    classes = [type(module) for module in found.model.modules()]
    report = surgery.knife(found.model, surgery.Units(found.units(1)), optimizer=found.optimizers)
    with surgery.observe(found.model, found.optimizers) as evidence:
        found.train()
        surgery.undo(found.model, report, found.optimizers)
        found.train()
    assert evidence.num_samples("0", H) == 16
    assert [type(module) for module in found.model.modules()] == classes


def test_nested_observations_each_hear_everything_in_their_time():
    found = subject()
    before = shape_of(found)
    with surgery.observe(found.model, found.optimizers) as outer:
        found.train()
        with surgery.observe(found.model, found.optimizers) as inner:
            found.train(2)
            probed = surgery.probe(found.model, [found.x], loss_of)
        found.train()
    assert (outer.num_steps, inner.num_steps, probed.num_steps) == (4, 2, 1)
    assert inner.num_samples("0", H) == 2 * 8  # the probe's pass is none of training
    assert outer.num_samples("0", H) == 4 * 8
    assert shape_of(found) == before


def test_observations_that_end_in_another_order_than_they_began_leave_nothing():
    found = subject()
    before = shape_of(found)
    one, two = surgery.observe(found.model), surgery.observe(found.model)
    first, second = one.__enter__(), two.__enter__()
    found.backward()
    one.__exit__(None, None, None)
    found.backward()
    two.__exit__(None, None, None)
    assert first.num_samples("0", H) == 8
    assert second.num_samples("0", H) == 16
    assert shape_of(found) == before


# -- probe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operated", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_probe_leaves_everything_as_it_was(model, operated):
    found = subject(model)
    if operated:
        surgery.knife(found.model, surgery.Units(found.units(1)), optimizer=found.optimizers)
        found.backward()
    found.model.get_submodule(found.sites[0] if model != "functional" else "head").train(False)

    def noisy(net: nn.Module, x: Tensor) -> Tensor:
        net.eval()
        random.random(), np.random.rand(), torch.rand(1)
        net.train()
        return loss_of(net, x)

    before = snapshot(found.model, found.optimizers)
    evidence = surgery.probe(found.model, [found.x, found.x], noisy)
    assert evidence.num_steps == 2
    assert_untouched(before, found.model, found.optimizers)

    def failing(net: nn.Module, x: Tensor) -> Tensor:
        noisy(net, x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        surgery.probe(found.model, [found.x], failing)
    assert_untouched(before, found.model, found.optimizers)


def test_probe_fires_no_accumulation_hook_and_writes_no_gradient():
    model = two_layers()
    fired: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    surgery.probe(model, [torch.randn(6, 4)], loss_of)
    assert not fired
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert surgery.probe(model, [torch.randn(6, 4)], loss_of).num_steps == 1
        assert not torch.is_grad_enabled()


def test_probe_equals_observe_on_the_same_data():
    model = two_layers()
    batches = [torch.randn(6, 4) for _ in range(3)]
    optimizer = SGD(model.parameters(), lr=0.0)
    with surgery.observe(model, optimizer) as evidence:
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    probed = surgery.probe(model, iter(batches), loss_of)
    for quantity in Quantity:
        assert torch.equal(probed.measured("0")[quantity], evidence.measured("0")[quantity])
        assert probed.num_samples("0", quantity) == evidence.num_samples("0", quantity)
    assert (probed.num_steps, probed.num_skipped) == (evidence.num_steps, evidence.num_skipped)


def test_a_range_bearing_site_is_measured_when_it_is_named():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(6, 4)
    assert not surgery.discover(model)
    evidence = surgery.probe(model, [x], loss_of, sites=["0"])
    close(evidence.measured("0")[H], torch.tanh(model[0](x)).abs().mean(0).detach())
    with surgery.observe(model, sites=["0"]) as other:
        loss_of(model, x).backward()
    assert torch.equal(other.measured("0")[H], evidence.measured("0")[H])
    assert surgery.knife(model, surgery.Lowest(0.5), evidence=evidence, sites=["0"]).num_units == 1


def test_evidence_holds_on_to_no_model():
    model = two_layers()
    evidence = surgery.probe(model, [torch.randn(6, 4)], loss_of)
    assert isinstance(evidence, Evidence)
    del model
    gc.collect()
    assert evidence.source() is None  # type: ignore[operator]
