"""Weights of samples: means of activations and of their gradients in which padding has no part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.errors import EvidenceError
from neuronsurgery.pytorch.watching import watch
from neuronsurgery.surgery import Quantity

H, GRADIENT = Quantity.ACTIVATION, Quantity.ACTIVATION_GRADIENT
NAN, INF = float("nan"), float("inf")


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = (model(x) - 1).square().mean()
    return out


def two_layers() -> Any:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def one_to_one() -> Any:
    """Activations equal inputs, and the gradient that arrives at them is what the output is multiplied by."""
    model: Any = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.tensor([[1.0, 10.0]]))
    return model


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected).to(found), rtol=1e-5, atol=1e-7)


def both(evidence: surgery.Evidence, site: str = "0") -> list[Any]:
    return [evidence.measured(site)[quantity] for quantity in (H, GRADIENT)]


# -- the means -------------------------------------------------------------------------------------------------------


def test_means_are_weighted_as_worked_out_by_hand() -> None:
    model, x = one_to_one(), torch.tensor([[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]])
    with surgery.observe(model, weights=lambda site, h: torch.tensor([3.0, 1.0, 0.0])) as evidence:
        (model(x) * torch.tensor([[1.0], [5.0], [1000.0]])).sum().backward()
    # E|h| = (3 * (1, 2) + (3, 4)) / 4; dL/dh = (1, 10), (5, 50) and so (3 * (1, 10) + (5, 50)) / 4
    close(evidence.measured("0")[H], [1.5, 2.5])
    close(evidence.measured("0")[GRADIENT], [2.0, 20.0])
    assert [evidence.num_samples("0", quantity) for quantity in (H, GRADIENT)] == [4, 4]


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32, torch.float16], ids=str)
def test_a_mask_measures_what_the_samples_in_it_would_alone(kind) -> None:
    model, x, mask = two_layers(), torch.randn(6, 4), torch.tensor([1, 0, 1, 1, 0, 0])
    with surgery.observe(model, weights=lambda site, h: mask.to(kind)) as masked:
        model(x).square().sum().backward()
    with surgery.observe(model) as alone:
        model(x[mask.bool()]).square().sum().backward()
    for found, expected in zip(both(masked), both(alone), strict=True):
        close(found, expected)
    assert masked.num_samples("0", H) == alone.num_samples("0", H) == 3


@pytest.mark.parametrize("garbage", [NAN, INF])
def test_padding_may_hold_anything(garbage) -> None:
    model, x = one_to_one(), torch.tensor([[1.0, 2.0], [garbage, garbage]])
    with surgery.observe(model, weights=lambda site, h: torch.tensor([True, False])) as evidence:
        out = model(x)
        out.backward(torch.tensor([[1.0], [garbage]]))
    close(evidence.measured("0")[H], [1.0, 2.0])
    close(evidence.measured("0")[GRADIENT], [1.0, 10.0])


@pytest.mark.parametrize("garbage", [NAN, INF])
def test_what_is_not_finite_at_a_sample_that_counts_spoils_its_pass_alone(garbage) -> None:
    model, weights = one_to_one(), torch.tensor([0.5, 0.5])
    with surgery.observe(model, weights=lambda site, h: weights) as evidence:
        model(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
        model(torch.tensor([[1.0, 2.0], [garbage, garbage]])).sum().backward()
        weights = torch.tensor([INF, 1.0])
        model(torch.tensor([[0.0, 2.0], [3.0, 4.0]])).sum().backward()
    close(evidence.measured("0")[H], [2.0, 3.0])
    assert evidence.num_samples("0", H) == 1


def test_a_pass_of_padding_counts_nothing() -> None:
    model, x = one_to_one(), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    masks = iter([torch.tensor([True, True]), torch.tensor([False, False])])
    with surgery.observe(model, weights=lambda site, h: next(masks)) as evidence:
        for scale in (1, 100):
            model(scale * x).sum().backward()
    close(evidence.measured("0")[H], [2.0, 3.0])
    close(evidence.measured("0")[GRADIENT], [1.0, 10.0])
    assert evidence.num_samples("0", H) == 2


def test_weights_that_are_not_above_zero_count_as_zero() -> None:
    model = one_to_one()
    with surgery.observe(model, weights=lambda site, h: torch.tensor([1.0, -1.0, NAN])) as evidence:
        model(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).sum().backward()
    close(evidence.measured("0")[H], [1.0, 2.0])
    assert evidence.num_samples("0", H) == 1


def test_sites_without_weights_are_measured_as_ever() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x, mask = torch.randn(6, 4), torch.tensor([True, False, False, True, True, False])
    kinds = {"weighted": lambda site, h: mask if site == "2" else None, "none": lambda site, h: None, "plain": None}
    found = {}
    for kind, weights in kinds.items():
        with surgery.observe(model, weights=weights) as found[kind]:
            loss_of(model, x).backward()
    for one in ("weighted", "none"):
        assert all(map(torch.equal, both(found[one]), both(found["plain"])))
    assert found["none"].state_dict()["sums"]["2"]["activation"]["count"].dtype == torch.int64
    assert found["weighted"].num_samples("2", H) == 3
    assert not torch.equal(both(found["weighted"], "2")[0], both(found["plain"], "2")[0])


def test_a_gradient_has_the_weights_of_its_own_forward() -> None:
    model, x = one_to_one(), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    mask = torch.tensor([True, False])
    with surgery.observe(model, weights=lambda site, h: mask) as evidence:
        first = model(x)
        mask.logical_not_()  # written anew, as a buffer of a training loop is
        second = model(x)
        mask.zero_()
        first.backward(torch.tensor([[1.0], [100.0]]))
        second.backward(torch.tensor([[100.0], [3.0]]))
    close(evidence.measured("0")[GRADIENT], [2.0, 20.0])


def test_gradients_that_are_scaled_are_unscaled_and_weights_are_not() -> None:
    model = one_to_one()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with surgery.observe(model, scaler=scaler, weights=lambda site, h: torch.tensor([1.0, 0.0])) as evidence:
        scaler.scale(model(torch.ones(2, 2)).sum()).backward()
    close(evidence.measured("0")[GRADIENT], [1.0, 10.0])
    assert evidence.num_samples("0", GRADIENT) == 1


# -- where the units are ---------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        h = x[:, 0]
        for t in range(3):
            h = torch.relu(self.fc(h + x[:, t]))
        return self.out(h)


class Stacked(nn.Module):
    """Heads of several agents as stacked weights: units on two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5, 2))

    def forward(self, x: Any) -> Any:
        return torch.einsum("bnj,njo->bno", torch.relu(torch.einsum("bni,nij->bnj", x, self.weight)), self.out)


SHAPES = {
    "sequence": (two_layers, (3, 5, 4), (3, 5)),
    "sequence by row": (two_layers, (3, 5, 4), (3, 1)),
    "sequence by step": (two_layers, (3, 5, 4), (1, 5)),
    "one number": (two_layers, (3, 5, 4), ()),
    "single": (two_layers, (4,), ()),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(4, 3, 2), nn.ReLU(), nn.Conv1d(3, 1, 4)), (6, 4, 5), (6, 4)),
    "recurrent": (Recurrent, (6, 3, 4), (6,)),
    "stacked": (Stacked, (6, 3, 4), (6,)),
}


def weighted_by_hand(model: nn.Module, site: str, x: Tensor, weights: Tensor) -> Tensor:
    """Each sample as often as its weight says: an unweighted mean."""
    seen: list[Tensor] = []

    def record(name: str, h: Tensor) -> None:
        if name == site:
            seen.append(h)

    with surgery.observe(model, weights=record):
        model(x)
    num_units = surgery.discover(model)[site].num_units
    total, count = torch.zeros(num_units), 0.0
    for h in seen:
        of_units = {"conv": (1,), "stacked": (1, 2)}.get(_layout(model), (h.dim() - 1,))
        rows = h.abs().movedim(of_units, tuple(range(len(of_units)))).flatten(0, len(of_units) - 1)
        each = weights.expand(rows.shape[1:])
        total, count = total + (rows * each).reshape(num_units, -1).sum(1), count + float(each.sum())
    return total / count


def _layout(model: nn.Module) -> str:
    return "stacked" if isinstance(model, Stacked) else "conv" if isinstance(next(model.children()), nn.Conv1d) else ""


@pytest.mark.parametrize("kind", SHAPES)
def test_weights_have_the_axes_that_number_no_units(kind) -> None:
    make, shape, of_weights = SHAPES[kind]
    model, x, weights = make(), torch.randn(shape), torch.rand(of_weights) + 0.1
    site = next(iter(surgery.discover(model)))
    with surgery.observe(model, weights=lambda name, h: weights) as evidence:
        model(x).sum().backward()
    close(evidence.measured(site)[H], weighted_by_hand(model, site, x, weights))


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(5), torch.ones(3), torch.ones(3, 5, 8), torch.ones(5, 3), torch.ones(3, 2), torch.ones(2, 5)],
    ids=lambda wrong: str(tuple(wrong.shape)),
)
def test_weights_of_another_shape_are_refused_with_both_shapes(wrong) -> None:
    model = two_layers()
    with surgery.observe(model, weights=lambda site, h: wrong) as evidence, pytest.raises(EvidenceError) as refused:
        model(torch.randn(3, 5, 4))
    assert str(refused.value) == (
        "weights of site '0': its activations have shape (3, 5, 8) with its units on axis 2, and weights returned "
        f"a tensor of shape {tuple(wrong.shape)}: return a weight for each of its 15 samples, shape (3, 5) (an axis "
        "along which they are alike may have size 1), or None for all alike"
    )
    assert evidence.num_samples("0", H) == 0


def test_a_missing_axis_is_refused_also_where_another_has_its_size() -> None:
    model = two_layers()
    with surgery.observe(model, weights=lambda site, h: torch.ones(5)), pytest.raises(EvidenceError, match="size 1"):
        model(torch.randn(5, 5, 4))


@pytest.mark.parametrize(
    ("wrong", "found"), [([1.0, 1.0], "returned list"), (torch.ones(2) * 1j, "complex numbers of shape")]
)
def test_weights_that_are_no_tensor_of_numbers_are_refused(wrong, found) -> None:
    model = two_layers()
    with surgery.observe(model, weights=lambda site, h: wrong), pytest.raises(EvidenceError, match=found):
        model(torch.randn(2, 4))


def test_weights_that_are_no_function_are_refused_before_anything_is_measured() -> None:
    model, mask = two_layers(), torch.ones(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(EvidenceError, match="found Tensor: for one mask at all sites pass weights=lambda"):
        surgery.probe(model, [torch.randn(2, 4)], loss_of, weights=mask)  # type: ignore[arg-type]
    with pytest.raises(EvidenceError, match="takes a function"), surgery.observe(model, weights=mask):  # type: ignore
        pass
    with pytest.raises(EvidenceError, match="takes a function"):
        surgery.Schedule(model, optimizer, "dormant", operate=surgery.Every(1), weights=mask)  # type: ignore[arg-type]
    assert type(model) is nn.Sequential
    assert not optimizer._optimizer_step_pre_hooks


def test_weights_are_asked_for_where_activations_are_measured_only() -> None:
    model, asked = two_layers(), []
    with surgery.observe(model, every=2, weights=lambda site, h: asked.append((site, h.requires_grad))):
        for _ in range(3):
            loss_of(model, torch.randn(2, 4)).backward()
        with torch.no_grad():
            model(torch.randn(2, 4))
    assert asked == [("0", False)] * 2
    asked.clear()
    with surgery.observe(model, criterion="stagnant", weights=lambda site, h: asked.append((site, True))):
        loss_of(model, torch.randn(2, 4)).backward()
    assert not asked


# -- probes, schedules, states ---------------------------------------------------------------------------------------


def test_probe_weights_as_observe_does() -> None:
    model, x, mask = two_layers(), torch.randn(6, 4), torch.rand(6)
    with surgery.observe(model, weights=lambda site, h: mask) as observed:
        loss_of(model, x).backward()
    probed = surgery.probe(model, [x], loss_of, weights=lambda site, h: mask)
    assert all(map(torch.equal, both(probed), both(observed)))
    assert probed.num_samples("0", H) == pytest.approx(float(mask.sum()), rel=1e-6)


@pytest.mark.situation("When to operate", "padded batches, on activations off the padding", "works")
def test_a_schedule_finds_the_units_that_are_dormant_off_the_padding() -> None:
    model = one_to_one()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.tensor([[1.0, 0.0], [0.0, 500.0]])  # the second unit fires on padding alone

    def run(**options: Any) -> dict[str, tuple[int, ...]]:
        with surgery.Schedule(
            model, optimizer, "dormant", operate=surgery.Every(2), dry_run=True, **options
        ) as schedule:
            for _ in range(2):
                optimizer.zero_grad()
                model(x).sum().backward()
                optimizer.step()
                plan = schedule.step()
        assert isinstance(plan, surgery.Plan)
        return dict(plan.units)

    assert run(weights=lambda site, h: torch.tensor([True, False])) == {"0": (1,)}
    assert run() == {"0": (0,)}


def test_weighted_evidence_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    model, passes = two_layers(), [(torch.randn(6, 4), torch.rand(6)) for _ in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    now: list[Tensor] = []

    def watched() -> Any:
        return watch(model, optimizer, needs={H, GRADIENT}, weights=lambda site, h: now[-1])

    def go(one: Any, some: list[tuple[Tensor, Tensor]]) -> None:
        for x, mask in some:
            now.append(mask)
            loss_of(model, x).backward()
            optimizer.step()
            one.end_round()

    whole, first = watched(), watched()
    whole.open(1)
    go(whole, passes)
    whole.is_open = False
    expected = both(whole.evidence)
    whole.close()
    first.open(1)
    go(first, passes[:2])
    state = first.state_dict()
    first.close()
    second = watched()
    second.load_state_dict(state)
    go(second, passes[2:])
    assert all(map(torch.equal, both(second.evidence), expected))
    second.close()
