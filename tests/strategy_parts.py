"""What the styles of networks are drawn from: activation functions as modules, functions and methods, and sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["ACTIVATION_MODULES", "FUNCTIONS", "METHODS", "Draw", "activations", "leading", "per_unit", "small"]

Draw = Callable[[Any], Any]

SMOOTH: tuple[Callable[[int], nn.Module], ...] = tuple(
    lambda _, make=make: make()  # type: ignore[misc]
    for make in (
        nn.CELU,
        nn.ELU,
        nn.GELU,
        partial(nn.GELU, "tanh"),
        nn.LogSigmoid,
        nn.Mish,
        nn.SELU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        partial(nn.Softplus, beta=2.0, threshold=1.0),
        nn.Softsign,
        nn.Tanh,
        nn.Tanhshrink,
    )
)
KINKED: tuple[Callable[[int], nn.Module], ...] = (
    *(
        lambda _, make=make: make()
        for make in (
            nn.Hardsigmoid,
            nn.Hardswish,
            nn.Hardtanh,
            partial(nn.Hardtanh, -0.5, 0.25),
            nn.LeakyReLU,
            partial(nn.LeakyReLU, 0.3, inplace=True),
            nn.PReLU,
            nn.ReLU,
            partial(nn.ReLU, inplace=True),
            nn.ReLU6,
            nn.Softshrink,
        )
    ),
    lambda num_units: nn.PReLU(num_units, init=0.1),
)
JUMPING: tuple[Callable[[int], nn.Module], ...] = (lambda _: nn.Hardshrink(), lambda _: nn.Threshold(0.1, -0.5))
"""Where one rounding error moves the output by a constant: exact arithmetic only, or nearly so (float64)."""

ACTIVATION_MODULES = (*SMOOTH, *KINKED, *JUMPING)
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    F.leaky_relu,
    F.gelu,
    F.softplus,
    F.elu_,
    torch.relu,
    torch.relu_,
    torch.tanh,
    torch.sigmoid,
    torch.abs,
    torch.sin,
    torch.atan,
    torch.erf,
    torch.special.expit,
)
METHODS = ("relu", "relu_", "tanh", "sigmoid", "abs", "cos", "erf", "arctan")


small = st.one_of(st.integers(1, 7), st.integers(1, 7), st.sampled_from([16, 70]))


def activations(jumping: bool) -> st.SearchStrategy[Callable[[int], nn.Module]]:
    return st.sampled_from((*SMOOTH, *KINKED, *(JUMPING if jumping else ())))


def per_unit(make: Callable[[int], nn.Module]) -> bool:
    return make is KINKED[-1]


@st.composite
def leading(draw: Draw, size: int, matrix: bool = False) -> tuple[int, ...]:
    """The shape of an input of `size` features: of a batch, unbatched, or with two batch axes."""
    if matrix:
        return (draw(st.integers(2, 5)), size)
    return (*draw(st.sampled_from([(5,), (), (2, 3), (1,)])), size)
