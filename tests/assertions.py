"""What the tests assert of models, in words of their own: nothing here is taken from the code under test."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = [
    "TOLERANCES",
    "Outcome",
    "assert_same_gradient",
    "assert_same_output",
    "assert_same_state",
    "assert_unchanged",
    "Noise",
    "bank_tensors",
    "gradient_errors",
    "outcome",
    "output_errors",
    "rounding_noise",
    "state_of",
]

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
"""The largest error of an output relative to its scale, by dtype (design section 8)."""


# -- outputs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a model gave for an input: its output tensors, the scale of each, and a gradient of each input.

    A scale is the output's largest magnitude, floored by the last layer's sum of |weight| |activation|: an output
    near zero by cancellation is no failure. The gradients are those of a fixed random functional of the outputs.
    """

    tensors: tuple[Tensor, ...]
    scales: tuple[float, ...]
    gradients: tuple[Tensor | None, ...]


def outcome(model: nn.Module, inputs: Sequence[Any] | Mapping[str, Any], seed: int = 0) -> Outcome:
    """Run a model forward and backward to its inputs, from one random state; gradients and buffers stay.

    The inputs are the arguments of the call, or its keyword arguments; gradients are those of floating tensors.
    """
    torch.manual_seed(seed)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    inputs = pytree.tree_map_only(Tensor, _leaf, inputs)
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    products = _Products()
    with products:
        given = pytree.tree_map_only(
            Tensor, lambda x: x.clone(), inputs
        )  # no leaf, so that a forward may work in place
        result = model(**given) if isinstance(given, Mapping) else model(*given)
    outputs = tuple(t for t in pytree.tree_leaves(result) if isinstance(t, Tensor))
    scales = tuple(max(largest(y), products.floor_of(y)) for y in outputs)
    functional = sum((_weighted(y) for y in outputs if y.requires_grad), torch.zeros(()))
    has_gradients = functional.requires_grad and len(leaves) > 0
    gradients = torch.autograd.grad(functional, leaves, allow_unused=True) if has_gradients else ()
    for buffer, value in buffers:
        buffer.copy_(value)
    return Outcome(tuple(y.detach() for y in outputs), scales, gradients)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


def largest(values: Tensor) -> float:
    """The largest magnitude in a tensor, 0 in an empty one."""
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _weighted(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return (output * weights).sum()


PRODUCTS = (
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm, torch.addmm),
)


class _Products(TorchFunctionMode):
    """Notes sum |weight| |activation| of every product that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.floors: list[tuple[Tensor, float]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_batched = torch._C._functorch.peek_interpreter_stack() is not None  # inside vmap no number can be had
        if func in PRODUCTS and not is_batched:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                absolute = pytree.tree_map_only(Tensor, torch.abs, (args, kwargs or {}))
                self.floors.append((result, largest(func(*absolute[0], **absolute[1]))))
        return result

    def floor_of(self, output: Tensor) -> float:
        """The scale of the product that an output is, else of the last one."""
        own = [floor for result, floor in self.floors if result is output]
        return own[0] if own else next((floor for _, floor in reversed(self.floors)), 0.0)


def assert_same_output(before: Outcome, after: Outcome, tolerance: float) -> None:
    """Every output is finite and moved by at most `tolerance` of its scale before."""
    for index, error in enumerate(output_errors(before, after)):
        assert error <= tolerance, f"output {index} moved by {error:.3g} of its scale, at most {tolerance:.3g}"


def output_errors(before: Outcome, after: Outcome) -> list[float]:
    """By how much of its scale before each output moved; the outputs correspond, and were finite before."""
    assert len(before.tensors) == len(after.tensors)
    errors = []
    for index, (old, new) in enumerate(zip(before.tensors, after.tensors, strict=True)):
        assert old.shape == new.shape and old.dtype == new.dtype, (index, old.shape, new.shape, old.dtype, new.dtype)
        assert bool(old.isfinite().all()), f"output {index} was not finite to begin with"
        is_same = torch.equal(old, new)
        errors.append(0.0 if is_same else largest(new.double() - old.double()) / before.scales[index])
    return errors


def assert_same_gradient(before: Outcome, after: Outcome, tolerance: float) -> None:
    """The gradient that reaches each input moved by at most `tolerance` of its scale before."""
    for index, error in enumerate(gradient_errors(before, after)):
        assert error <= tolerance, f"the gradient of input {index} moved by {error:.3g}, at most {tolerance:.3g}"


def gradient_errors(before: Outcome, after: Outcome) -> list[float]:
    """By how much of its scale before the gradient that reaches each input moved.

    That is its largest magnitude, floored by 1: inputs and weights are of order one here, and a gradient that is
    small because its terms cancel, or because few units fire, is no failure.
    """
    assert len(before.gradients) == len(after.gradients)
    errors = []
    for index, (old, new) in enumerate(zip(before.gradients, after.gradients, strict=True)):
        assert (old is None) == (new is None), f"input {index} received a gradient only once"
        if old is None or new is None or torch.equal(old, new):
            errors.append(0.0)
        else:
            errors.append(largest(new.double() - old.double()) / max(largest(old), 1.0))
    return errors


@dataclass(frozen=True)
class Noise:
    """By how much of their scales rounding may move a model's outputs, and the gradients that reach its inputs."""

    output: float
    gradient: float


def rounding_noise(model: nn.Module, inputs: Sequence[Any], num_draws: int = 4) -> Noise:
    """What moves when every weight and buffer of a model is rounded once more, each up or down at random.

    In floating point a network computes what one with slightly other weights would compute exactly (backward error
    analysis). Each member of a composite is rounded on its own, forward and backward, so each row is moved on its own
    here: the result scales with the members and their gradients, not with the sum in which they cancel, and with what
    a normalization or a kink makes of it.
    """
    before, output, gradient = outcome(model, inputs), 0.0, 0.0
    for seed in range(num_draws):
        moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (*moved.parameters(), *moved.buffers()):
                if tensor.is_floating_point():
                    up = torch.randint(0, 2, tensor.shape, generator=generator) * 2.0 - 1
                    tensor.mul_(1 + torch.finfo(tensor.dtype).eps * up.to(tensor))
        after = outcome(moved, inputs)
        output = max([output, *output_errors(before, after)])
        gradient = max([gradient, *gradient_errors(before, after)])
    return Noise(output, gradient)


# -- state -----------------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in a model's state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_state(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """The same keys in the same order, and every tensor the same bit for bit."""
    assert list(before) == list(after)
    for name, value in before.items():
        assert_unchanged(name, value, after[name])


def assert_unchanged(name: str, before: Tensor, after: Tensor) -> None:
    """A tensor holds the same bits."""
    assert before.shape == after.shape and before.dtype == after.dtype, name
    assert torch.equal(before, after), f"{name} moved by {largest(after.double() - before.double()):.3g}"


def bank_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the live frozen rows of every bank, by their state-dict names."""
    return {
        name: value
        for name, value in state_of(model).items()
        if any(part.endswith("composite") for part in name.split(".")[:-1]) and not name.endswith("_extra_state")
    }
