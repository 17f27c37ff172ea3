"""SyncBatchNorm: slots and frozen rows share one all-reduce.

It synchronizes on accelerators only. What torch does there is stood in for by a function that normalizes this process's
batch alone and counts its calls; that it is called once, with the right tensors end to end, is what these tests show.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery

UNITS = surgery.Units({"0": [0, 3]})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 5, 2), nn.SyncBatchNorm(5), nn.ReLU(), nn.Conv1d(5, 2, 2))


class Straight(nn.Module):
    """The same layers in a forward that is rewritten as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.body[1](self.body[0](x)))
        return self.body[3](h)


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many channels each synchronized call had; this process stands for two on accelerators."""
    channels: list[int] = []

    class Reduced:
        @staticmethod
        def apply(
            z: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, eps: float, factor: float, *_: Any
        ) -> Any:
            channels.append(z.shape[1])
            return F.batch_norm(z, mean, var, w, b, True, factor, eps)

    monkeypatch.setattr(torch.nn.modules._functions, "SyncBatchNorm", Reduced)
    monkeypatch.setattr(torch.nn.modules.batchnorm, "sync_batch_norm", Reduced)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "group", type("Groups", (), {"WORLD": None}))
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "cpu")
    return channels


@pytest.mark.parametrize("build", [network, Straight])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_site_before_a_synchronized_norm_keeps_the_output(build: Any, mode: str):
    model = build().train(mode == "train")
    name = "0" if build is network else "body.0"
    untouched, x = copy.deepcopy(model), torch.randn(4, 3, 6)
    for units in ([0, 3], [3, 1]):
        surgery.knife(model, surgery.Units({name: units}))
    for _ in range(2):  # the second call sees the running statistics that the first has left
        assert torch.allclose(model(x), untouched(x), atol=1e-6)
    model.eval()
    untouched.eval()
    assert torch.allclose(model(x), untouched(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Set seed for `cpu` device")  # it stands for an accelerator here
@pytest.mark.parametrize("build", [network, Straight])
def test_slots_and_rows_share_one_reduction(build: Any, reductions: list[int]):
    model = build()
    untouched, x = copy.deepcopy(model), torch.randn(4, 3, 6)
    name = "0" if build is network else "body.0"
    surgery.knife(model, surgery.Units({name: [0, 3]}))
    h, before = model(x), untouched(x)
    capacity = len(dict(model.named_buffers())[f"{name}.composite.frozen_weight"])
    assert reductions == [5 + capacity, 5]  # the operated network once for both, the untouched one for its units
    assert torch.allclose(h, before, atol=1e-6)
    for statistic in ("running_mean", "running_var"):  # an active member keeps its own from here on
        own, other = (one.get_buffer(f"{name[:-1]}1.{statistic}")[[1, 2, 4]] for one in (model, untouched))
        assert torch.allclose(own, other, atol=1e-6), statistic
    bank = dict(model.named_modules())[f"{name}.composite"]
    knowledge = bank.get_buffer("running_path_2")[0]
    assert torch.allclose(knowledge, untouched.get_buffer(f"{name[:-1]}1.running_mean")[0])
    h.sum().backward()
    assert dict(model.named_parameters())[f"{name}.weight"].grad.abs().sum() > 0


def test_tensors_on_no_accelerator_are_refused_as_torch_does(reductions: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "none")
    model = network()
    surgery.knife(model, UNITS)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor"):
        model(torch.randn(4, 3, 6))
