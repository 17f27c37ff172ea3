"""One composite for each kind of link and product, with numbers that a reader can check on paper.

In each, unit 0 (or the one named) is operated on with a fresh draw that is told beforehand, so that knowledge k,
compensation c and active member a are known; its activation is k + (a - c). Then the slot is moved by hand, as training
would, and the activation moves by what a moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery import surgery


def operate(model: nn.Module, site: str, unit: int, draw: float) -> None:
    """Operate on one unit; its fresh incoming weights are all `draw`."""
    surgery.knife(model, surgery.Units({site: [unit]}), init=lambda weight: weight.fill_(draw))


def move(model: nn.Module, name: str, index: tuple[int, ...], number: float) -> None:
    """Set a slot, as training would."""
    model.get_parameter(name).data[index] = number


def with_weights(layer: Any, numbers: Any) -> Any:
    layer.weight.data.copy_(torch.tensor(numbers).reshape(layer.weight.shape))
    return layer


def two_units(first: float, second: float) -> Any:
    return with_weights(nn.Linear(1, 2, bias=False), [first, second])


def sited(*modules: nn.Module) -> nn.Sequential:
    """The modules, and a layer behind them that adds the two units up."""
    return nn.Sequential(*modules, with_weights(nn.Linear(2, 1, bias=False), [1.0, 1.0]))


ONE = torch.ones(1, 1)


def test_batch_norm_in_training_normalizes_each_row_by_its_own_batch():
    """x = 0, 2 and w = (1, 1), so z = 0, 2 with mean 1 and variance 1; by sqrt(1 + eps) = 2: -1/2, 1/2; relu 0, 1/2.

    Draw w = -1: z = 0, -2 with mean -1; normalized 1/2, -1/2; relu 1/2, 0 for c and a. k + (a - c) = 0, 1/2 as before.
    Momentum 1/2 from (0, 1): the mean goes to 1/2 for k and -1/2 for a and c, the unbiased variance 2 to 3/2.
    Active then -3: z = 0, -6 with mean -3 and variance 9; by sqrt(12): a = 0.866, 0. h_0 = 0 + 0.866 - 0.5, 1/2.
    """
    norm = nn.BatchNorm1d(2, eps=3.0, momentum=0.5)
    model = sited(two_units(1.0, 1.0), norm, nn.ReLU())
    operate(model, "0", 0, -1.0)
    assert model[:3](torch.tensor([[0.0], [2.0]])).tolist() == [[0, 0], [0.5, 0.5]]
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.running_mean.tolist() == [-0.5, 0.5]
    assert norm.running_var.tolist() == [1.5, 1.5]
    mean, var = (v for name, v in model.state_dict().items() if "running_path" in name)
    assert mean[:2].tolist() == [0.5, -0.5]
    assert var[:2].tolist() == [1.5, 1.5]
    move(model, "0.weight", (0,), -3.0)
    found = model[:3](torch.tensor([[0.0], [2.0]]))
    assert torch.allclose(found, torch.tensor([[0.75**0.5 - 0.5, 0], [0.5, 0.5]]))


def test_batch_norm_in_evaluation_normalizes_each_row_by_the_running_statistics_it_took_over():
    """Mean 1, variance 4, x = 1 and w = 5: (5 - 1) / 2 = 2 for k; draw 3: (3 - 1) / 2 = 1 for c and a."""
    norm = nn.BatchNorm1d(2, eps=0.0)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    model = sited(two_units(5.0, 9.0), norm, nn.ReLU()).eval()
    operate(model, "0", 0, 3.0)
    assert model[:3](ONE).tolist() == [[2, 4]]
    move(model, "0.weight", (0,), 7.0)  # a = (7 - 1) / 2 = 3, h_0 = 2 + (3 - 1)
    assert model[:3](ONE).tolist() == [[4, 4]]


def test_layer_norm_takes_its_statistics_from_the_reference():
    """z = (3, 1): mean 2, deviation 1; normalized (1, -1), leaky relu (1, -0.5).

    Draw 5: a = c = (5 - 2) / 1 = 3, h_0 = 1 + (3 - 3). Active moved to 0: (0 - 2) / 1 = -2, leaky -1, so
    h_0 = 1 + (-1 - 3) = -3, and unit 1 stays -0.5. By statistics of the slots (0, 1) it would have become 1.
    """
    model = sited(two_units(3.0, 1.0), nn.LayerNorm(2, eps=0.0, elementwise_affine=False), nn.LeakyReLU(0.5))
    operate(model, "0", 0, 5.0)
    assert model[:3](ONE).tolist() == [[1, -0.5]]
    move(model, "0.weight", (0,), 0.0)
    assert model[:3](ONE).tolist() == [[-3, -0.5]]


def test_layer_norm_scales_frozen_rows_by_the_old_weight_and_the_slot_by_a_fresh_one():
    """As above with gamma = (2, 1), beta = (4, 0): k = 2 * 1 + 4 = 6; fresh gamma 1 and beta 0: a = c = 3."""
    norm = nn.LayerNorm(2, eps=0.0)
    norm.weight.data.copy_(torch.tensor([2.0, 1.0]))
    norm.bias.data.copy_(torch.tensor([4.0, 0.0]))
    model = sited(two_units(3.0, 1.0), norm, nn.LeakyReLU(0.5))
    operate(model, "0", 0, 5.0)
    assert (norm.weight.tolist(), norm.bias.tolist()) == ([1, 1], [0, 0])
    assert model[:3](ONE).tolist() == [[6, -0.5]]
    norm.weight.data[0] = 2.0  # a = 2 * 3 = 6, h_0 = 6 + (6 - 3); frozen rows keep their own scale
    assert model[:3](ONE).tolist() == [[9, -0.5]]


def test_rms_norm_takes_its_scale_from_the_reference():
    """z = (1, 7): mean square 25, so (0.2, 1.4). Draw 5: a = c = 1. Active 10: 2, so h_0 = 0.2 + (2 - 1)."""
    model = sited(two_units(1.0, 7.0), nn.RMSNorm(2, eps=0.0, elementwise_affine=False), nn.ReLU()).double()
    operate(model, "0", 0, 5.0)
    assert close(model[:3](ONE.double()), [[0.2, 1.4]])
    move(model, "0.weight", (0,), 10.0)
    assert close(model[:3](ONE.double()), [[1.2, 1.4]])


def test_group_norm_takes_the_statistics_of_a_row_from_its_own_group():
    """Groups (3, 1) and (9, 5): means 2 and 7, deviations 1 and 2; normalized (1, -1), (1, -1).

    Unit 2, draw 11: a = c = (11 - 7) / 2 = 2. Active 15: 4, so h_2 = 1 + (4 - 2) = 3, the others stay.
    """
    layer = with_weights(nn.Linear(1, 4, bias=False), [3.0, 1.0, 9.0, 5.0])
    model = nn.Sequential(layer, nn.GroupNorm(2, 4, eps=0.0), nn.LeakyReLU(0.5), nn.Linear(4, 1))
    operate(model, "0", 2, 11.0)
    assert model[:3](ONE).tolist() == [[1, -0.5, 1, -0.5]]
    layer.weight.data[2] = 15.0
    assert model[:3](ONE).tolist() == [[1, -0.5, 3, -0.5]]


def close(found: Tensor, expected: list[list[float]]) -> bool:
    return torch.allclose(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=1e-12)


class Added(nn.Module):
    """A residual joins before the activation function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = two_units(1.0, 2.0), nn.Linear(2, 1)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.fc(x) + residual)
        return self.head(h), h


def test_every_member_receives_its_units_part_of_a_residual():
    """w = (1, 2), x = 1, residual (-3, 1): k = relu(1 - 3) = 0, unit 1 relu(2 + 1) = 3.

    Draw 5: a = c = relu(5 - 3) = 2, h_0 = 0 + (2 - 2). Active 4: relu(4 - 3) = 1, h_0 = 0 + (1 - 2) = -1.
    Residual (3, 1) then: k = 4, c = 8, a = 7, h_0 = 4 + (7 - 8) = 3.
    """
    model = Added()
    operate(model, "fc", 0, 5.0)
    assert model(ONE, torch.tensor([[-3.0, 1.0]]))[1].tolist() == [[0, 3]]
    model.fc.weight.data[0] = 4.0
    assert model(ONE, torch.tensor([[-3.0, 1.0]]))[1].tolist() == [[-1, 3]]
    assert model(ONE, torch.tensor([[3.0, 1.0]]))[1].tolist() == [[3, 3]]


def test_one_dropout_mask_falls_on_all_members_of_a_unit():
    """z = (1, 2), kept ones are doubled. Draw 3, active moved to 4: kept 2 * (1 + 4 - 3) = 4, dropped 0."""
    model = sited(two_units(1.0, 2.0), nn.Dropout(0.5), nn.ReLU())
    operate(model, "0", 0, 3.0)
    move(model, "0.weight", (0,), 4.0)
    seen = {tuple(model[:3](ONE)[0].tolist()) for _ in range(100)}
    assert seen == {(0, 0), (4, 0), (0, 4), (4, 4)}
    assert model.eval()[:3](ONE).tolist() == [[2, 2]]


def test_a_slope_of_the_path_is_frozen_with_its_row():
    """z = (-2, -4), slopes (0.5, 0.25): (-1, -1). Draw -8 and fresh slope 0.25: a = c = -2; a fresh slope of 1: -8."""
    activation = nn.PReLU(2)
    activation.weight.data.copy_(torch.tensor([0.5, 0.25]))
    model = sited(two_units(-2.0, -4.0), activation)
    operate(model, "0", 0, -8.0)
    assert activation.weight.tolist() == [0.25, 0.25]
    assert model[:2](ONE).tolist() == [[-1, -1]]
    activation.weight.data[0] = 1.0
    assert model[:2](ONE).tolist() == [[-7, -1]]


class Hidden(nn.Module):
    """A product with the module's own weight, and relu."""

    def __init__(self, weight: list[Any], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.product = nn.Parameter(torch.tensor(weight)), product

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.product(x, self.weight))


def test_a_row_of_a_grouped_convolution_reads_the_channels_of_its_units_group():
    """Channels (1, 10), one per group, w = (1, 2): (1, 20). Unit 1, draw 3: 30. Active 4: 20 + (40 - 30) = 30."""
    layer = with_weights(nn.Conv1d(2, 2, 1, groups=2, bias=False), [1.0, 2.0])
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(2, 1))
    x = torch.tensor([[[1.0], [10.0]]])
    operate(model, "0", 1, 3.0)
    assert model[:2](x).flatten().tolist() == [1, 20]
    layer.weight.data[1] = 4.0
    assert model[:2](x).flatten().tolist() == [1, 30]


def test_a_unit_of_a_transposed_convolution_is_an_output_channel():
    """Weight (in 1, out 2, kernel 1) = (1, 2), x = 10: (10, 20). Unit 1, draw 3: slot (1, 3). Active 4: 20 + 10."""
    layer = with_weights(nn.ConvTranspose1d(1, 2, 1, bias=False), [1.0, 2.0])
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(2, 1))
    x = torch.full((1, 1, 1), 10.0)
    operate(model, "0", 1, 3.0)
    assert layer.weight.flatten().tolist() == [1, 3]
    assert model[:2](x).flatten().tolist() == [10, 20]
    layer.weight.data[0, 1] = 4.0
    assert model[:2](x).flatten().tolist() == [10, 30]


def test_a_unit_of_x_at_w_is_a_column():
    """x = (1, 10), W = [[1, 2], [3, 4]]: (31, 42). Unit 1, draw 5: 55, column (5, 5). Active (5, 6): 42 + 65 - 55."""
    model = nn.Sequential(Hidden([[1.0, 2.0], [3.0, 4.0]], torch.matmul), nn.Linear(2, 1))
    x = torch.tensor([[1.0, 10.0]])
    operate(model, "0.weight", 1, 5.0)
    assert model.get_parameter("0.weight").tolist() == [[1, 5], [3, 5]]
    assert model[:1](x).tolist() == [[31, 42]]
    move(
        model,
        "0.weight",
        (
            1,
            1,
        ),
        6.0,
    )
    assert model[:1](x).tolist() == [[31, 52]]


def test_a_unit_of_stacked_experts_reads_its_experts_input():
    """Inputs 1 and 10; W = (1, 2) and (3, 4): (1, 2) and (30, 40). Unit 2 is the second expert's first.

    Draw 5: 50, in slot [1, 0, 0] alone. Active 6: 30 + (60 - 50) = 40.
    """
    model = nn.Sequential(Hidden([[[1.0, 2.0]], [[3.0, 4.0]]], torch.bmm), nn.Linear(2, 1))
    x = torch.tensor([[[1.0]], [[10.0]]])
    operate(model, "0.weight", 2, 5.0)
    assert model.get_parameter("0.weight").tolist() == [[[1, 2]], [[5, 4]]]
    assert model[:1](x).flatten().tolist() == [1, 2, 30, 40]
    move(
        model,
        "0.weight",
        (
            1,
            0,
            0,
        ),
        6.0,
    )
    assert model[:1](x).flatten().tolist() == [1, 2, 40, 40]
