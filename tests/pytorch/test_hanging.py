"""Banks hang at their places, and every module that their rows pass is marked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuronsurgery import surgery


class SharedSlope(nn.Module):
    """Two layers that pass one module on the way to their activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.slope = nn.PReLU(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.slope(self.second(self.slope(self.first(x)))))
        return y


def test_two_sites_that_pass_one_module_are_operated_on_together():
    model, x = SharedSlope(), torch.randn(5, 4)
    report = surgery.knife(model, surgery.Units({"first": [0], "second": [1, 2]}), verify=x)
    assert report.model_error is not None and report.model_error <= 2e-6
    operated = model(x)
    surgery.undo(model, report)
    assert not [name for name in vars(model.slope) if "neuronsurgery" in name]
    assert torch.allclose(model(x), operated, atol=1e-6)


def test_a_mark_stays_while_another_sites_bank_passes_the_module():
    model, x = SharedSlope(), torch.randn(5, 4)
    surgery.knife(model, surgery.Units({"first": [0]}))
    report = surgery.knife(model, surgery.Units({"second": [1]}))
    before = model(x)
    surgery.undo(model, report)
    assert torch.allclose(model(x), before, atol=1e-6)
    assert list(surgery.composites(model).members) == ["first"]
