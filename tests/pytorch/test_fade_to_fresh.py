"""Retirement without knowledge: the chosen units fall silent, and fresh ones fade in where they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuronsurgery import surgery
from tests.optimizer_rows import EXACT, library_warnings

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))
UNITS = surgery.Units({"0": [1, 5]})
N = 4


def build(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.LayerNorm(8)] if norm else []
    return nn.Sequential(nn.Linear(4, 8), *norms, nn.ReLU(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


def faded(norm: bool = False) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = build(norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    surgery.fade_to_fresh(model, UNITS, retire=N, optimizer=optimizer)
    return model, optimizer


def hidden(model: nn.Sequential) -> Tensor:
    return model[:-1](X)[:, [1, 5]]  # type: ignore[no-any-return]


def test_a_unit_is_the_fresh_one_less_what_is_left_of_its_copy_worked_out_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        for parameter, values in zip(
            model.parameters(), ([[3.0], [5.0]], [0.0, 0.0], [[1.0, 10.0]], [0.0]), strict=True
        ):
            parameter.copy_(torch.tensor(values))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    one = torch.ones(1, 1)
    surgery.fade_to_fresh(model, surgery.Units({"0": [0]}), retire=4, optimizer=optimizer, init=lambda w: w.fill_(2.0))
    assert model(one).item() == 0.0 + 50.0  # relu(2) - relu(2), and the other unit as it was
    model[0].weight.grad = torch.tensor([[1.0], [0.0]])
    optimizer.step()  # the active member's weight is 1.5 now, and a quarter of the compensation is gone
    assert model(one).item() == 1.5 - 0.75 * 2.0 + 50.0
    for left in (0.5, 0.25, 0.0):
        model[0].weight.grad = torch.zeros(2, 1)
        optimizer.step()
        assert model(one).item() == 1.5 - left * 2.0 + 50.0


@pytest.mark.parametrize("norm", [False, True])
def test_units_fall_silent_and_end_as_fresh_ones(norm: bool) -> None:
    model, optimizer = faded(norm)
    assert hidden(model).abs().max() == 0
    train(model, optimizer, N)
    plain = build(norm)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "composite" not in key})
    torch.testing.assert_close(model(X), plain(X), atol=1e-6 if norm else 0, rtol=0)
    surgery.consolidate(model)
    assert set(model.state_dict()) == set(plain.state_dict())


def test_what_an_operation_before_had_kept_is_dropped_with_the_rest() -> None:
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        train(model, optimizer, 1)
        surgery.knife(model, surgery.Units({"0": [1, 2]}), optimizer=optimizer)
    train(model, optimizer, 1)
    others = model[:-1](X)[:, [0, 2, 3, 4, 5, 6, 7]]
    surgery.fade_to_fresh(model, surgery.Units({"0": [1]}), retire=N, optimizer=optimizer)
    assert model[:-1](X)[:, 1].abs().max() == 0
    assert torch.equal(model[:-1](X)[:, [0, 2, 3, 4, 5, 6, 7]], others)
    assert surgery.consolidate(model).num_rows == 4  # of unit 1; the fade goes on with its own two rows
    train(model, optimizer, N)
    assert surgery.consolidate(model).num_rows == 2
    assert {member.unit for member in surgery.composites(model).members["0"]} == {2}


def test_consolidation_in_the_middle_of_the_fade_changes_no_output() -> None:
    model, optimizer = faded()
    train(model, optimizer, 2)
    before = model(X)
    assert surgery.consolidate(model).num_rows == 0
    assert torch.equal(model(X), before)


def test_a_target_takes_over_the_fade() -> None:
    model, optimizer = faded()
    target = copy.deepcopy(build()).requires_grad_(False)
    surgery.mirror(model, onto=target)
    train(model, optimizer, 2)
    target.load_state_dict(model.state_dict())
    assert torch.equal(target(X), model(X))


def test_the_report_says_by_how_much_the_output_moved() -> None:
    model = build()
    optimizer = torch.optim.Adam(model.parameters())
    report = surgery.fade_to_fresh(model, UNITS, retire=N, optimizer=optimizer, verify=X)
    assert report.method == "fade_to_fresh" and report.model_error is not None and report.model_error > 0.01
    assert "output on a batch: moved by" in str(report) and "Operation 1 (fade_to_fresh)" in str(report)
    assert surgery.Report.from_json(report.to_json()) == report
    with pytest.raises(surgery.UndoError, match="have begun to fade"):
        surgery.undo(model, report, optimizer)


@pytest.mark.parametrize("retire", [None, 0, 1.5])
def test_without_a_number_of_steps_it_is_refused(retire: object) -> None:
    model = build()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(surgery.PlanError, match="retire is"):
        surgery.fade_to_fresh(model, UNITS, retire=retire, optimizer=optimizer)  # type: ignore[arg-type]
    with pytest.raises(surgery.OptimizerError, match="retire= counts the steps"):
        surgery.fade_to_fresh(model, UNITS, retire=N)


def test_a_schedule_fades_what_it_chooses() -> None:
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    how: dict[str, Any] = {"method": surgery.fade_to_fresh, "retire": 2, "cooldown": 0}
    with surgery.Schedule(model, optimizer, surgery.Lowest(0.25), operate=surgery.Every(5), **how) as schedule:
        for _ in range(10):
            train(model, optimizer, 1)
            schedule.step()
    assert schedule.num_operations == 2


@pytest.mark.parametrize("name", EXACT)
def test_fresh_units_are_stepped_as_fresh_and_all_else_as_before(name: str) -> None:
    with library_warnings():
        model, untouched = build(), build()
        optimizer, beside = EXACT[name](list(model.parameters())), EXACT[name](list(untouched.parameters()))
        generator = torch.Generator().manual_seed(0)

        def step(*pairs: tuple[nn.Module, torch.optim.Optimizer]) -> None:
            gradients = [0.1 * torch.randn(p.shape, generator=generator) for p in model.parameters()]
            for net, own in pairs:
                for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                    parameter.grad = gradient.clone()
                own.step()

        for _ in range(5):
            step((model, optimizer), (untouched, beside))
        surgery.fade_to_fresh(model, UNITS, retire=3, optimizer=optimizer)
        fresh = build()
        fresh.load_state_dict({key: value for key, value in model.state_dict().items() if "composite" not in key})
        twin = EXACT[name](list(fresh.parameters()))
        for _ in range(5):
            step((model, optimizer), (untouched, beside), (fresh, twin))
            for key in ("0.weight", "0.bias", "2.weight", "2.bias"):
                now, then, anew = (dict(net.named_parameters())[key] for net in (model, untouched, fresh))
                mask = torch.zeros_like(now, dtype=torch.bool)
                mask[[1, 5] if key.startswith("0") else []] = True
                assert torch.equal(now[~mask], then[~mask]), key
                torch.testing.assert_close(now[mask], anew[mask], rtol=1e-4, atol=2e-5, msg=key)
