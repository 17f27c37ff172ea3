"""A GRU cell that runs over whole episodes at once, in learning as fast as the arithmetic allows.

Step by step only what depends on the step before is computed: one product and a few operations in place, forward as
well as backward. Everything else, the products with the inputs and the gradients of all weights, is one product over
all steps. The gradient is written out by hand, as automatic differentiation would take every step apart again.

With x the inputs and h the states, as in torch (Cho et al. 2014):

    r, z = sigmoid(W x + b + U h + c),  n = tanh(W x + b + r (U h + c)),  h' = n + z (h - n)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["GRUCell"]


class GRUCell(nn.GRUCell):
    """`torch.nn.GRUCell` that also takes all steps at once.

    >>> cell, x = GRUCell(3, 4), torch.randn(5, 7, 3)
    >>> torch.allclose(cell(x)[1], cell(x[1], cell(x[0], torch.zeros(7, 4))), atol=1e-6)
    True
    """

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """States (M, H) after inputs (M, I), or states (T, M, H) after each of the inputs (T, M, I).

        One call for both, so that whoever reads the network sees one reader of the inputs. All steps start from zeros.
        """
        if hidden is not None or x.ndim < 3:
            after: Tensor = super().forward(x, hidden)
            return after
        states: Tensor = _Unrolled.apply(x, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)  # type: ignore[no-untyped-call]
        return states


class _Unrolled(torch.autograd.Function):
    """Shapes: T steps, M rows, I inputs, H units; weights as in `nn.GRUCell`, gates in the order r, z, n.

    What belongs to all steps is computed stretch by stretch: a stretch stays in the processor's cache, and so do the
    pieces of memory that it takes. Each gate has its own piece, as operations on parts of rows take twice as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
        is_learning, num_units = any(ctx.needs_input_grad), weight_hh.shape[1]
        hidden = x.new_empty(len(x) + 1, x.shape[1], num_units)
        hidden[0] = 0
        bias = (bias_ih + bias_hh).view(3, 1, num_units)  # of the candidate, the state's part passes the reset gate
        bias[2] = bias_ih[-num_units:]
        weights = [_by_gate(weight).transpose(1, 2).contiguous() for weight in (weight_ih, weight_hh)]
        stretches, saved = _stretches(x, num_units), list[Tensor]()
        for stretch in stretches:
            if is_learning or not saved:  # else what the stretch before took is still in the cache
                saved.append(x.new_empty(4, stretch.stop - stretch.start, *hidden.shape[1:]))
            gates = saved[-1][:, : stretch.stop - stretch.start]
            _enter(x[stretch], weights[0], bias, out=gates[:3])
            _run(gates, weights[1], bias_hh[-num_units:], hidden[stretch.start : stretch.stop + 1])
        if is_learning:
            ctx.save_for_backward(x, weight_ih, weight_hh, hidden, *saved)
        return hidden[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_ih, weight_hh, hidden, *saved = ctx.saved_tensors
        weights = _by_gate(weight_hh)
        sums = _Sums(_by_gate(weight_ih), weights)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        carried, room = torch.zeros_like(hidden[0]), torch.empty_like(saved[0])
        for gates, stretch in reversed(list(zip(saved, _stretches(x, weight_hh.shape[1]), strict=True))):
            changes = _slopes(gates, hidden[stretch], out=room[:, : gates.shape[1]])
            carried = _run_back(changes, gates[1], grad_hidden[stretch], carried, weights)
            sums.add(changes, x[stretch], hidden[stretch])
            if grad_x is not None:
                _to_inputs(changes, _by_gate(weight_ih), out=grad_x[stretch])
        return grad_x, *sums.gradients()


STRETCH = 2**18
"""Numbers in the gates of a stretch."""


def _stretches(x: Tensor, num_units: int) -> list[slice]:
    size = max(1, STRETCH // (3 * num_units * x.shape[1]))
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


def _by_gate(weight: Tensor) -> Tensor:
    """Weights (3 H, I) as (3, H, I)."""
    return weight.view(3, -1, weight.shape[1])


def _enter(x: Tensor, weights: Tensor, bias: Tensor, *, out: Tensor) -> None:
    """What inputs (T, M, I) give the gates (3, T, M, H)."""
    rows = x.flatten(0, 1)
    torch.baddbmm(bias, rows.expand(3, *rows.shape), weights, out=out.flatten(1, 2))


def _run(gates: Tensor, weights: Tensor, bias: Tensor, hidden: Tensor) -> None:
    """Turn what the inputs give the gates r, z, n into the gates, and write the states that follow the first.

    What the state gives n, before the reset gate, becomes the fourth of `gates` (4, T, M, H).
    """
    both_weights, candidate_weight = weights[:2], weights[2]
    steps = zip(gates.unbind(1), hidden[:-1].unbind(), hidden[1:].unbind(), strict=True)
    for gate, before, after in steps:
        both, candidate, from_state = gate[:2], gate[2], gate[3]
        both.baddbmm_(before.expand_as(both), both_weights).sigmoid_()
        torch.addmm(bias, before, candidate_weight, out=from_state)
        candidate.addcmul_(both[0], from_state).tanh_()
        torch.lerp(candidate, before, both[1], out=after)


def _slopes(gates: Tensor, before: Tensor, *, out: Tensor) -> Tensor:
    """How h' changes with what enters the gates: (4, T, M, H), for n by way of the inputs, r, z, n by way of the state.

    So the first three belong to the inputs and the last three to the state.
    """
    reset, update, candidate, from_state = gates
    by_inputs, by_reset, by_update, by_state = out
    torch.sub(before, candidate, out=by_update)
    _through_sigmoid(by_update, update, grad_input=by_update)
    torch.sub(1, update, out=by_inputs)
    _through_tanh(by_inputs, candidate, grad_input=by_inputs)
    torch.mul(by_inputs, from_state, out=by_reset)
    _through_sigmoid(by_reset, reset, grad_input=by_reset)
    torch.mul(by_inputs, reset, out=by_state)
    return out


_through_tanh = torch.ops.aten.tanh_backward.grad_input
_through_sigmoid = torch.ops.aten.sigmoid_backward.grad_input


def _run_back(slopes: Tensor, updates: Tensor, grad_hidden: Tensor, carried: Tensor, weights: Tensor) -> Tensor:
    """Multiply the slopes by the change of the loss with h', in place; returns its change with the first state."""
    steps = zip(slopes.unbind(1), updates.unbind(), grad_hidden.unbind(), strict=True)
    for slope, update, grad in reversed(list(steps)):
        change = carried.add_(grad)
        slope.mul_(change)
        change.mul_(update)
        for gate, weight in zip(slope[1:].unbind(), weights.unbind(), strict=True):
            carried.addmm_(gate, weight)
    return carried


def _to_inputs(changes: Tensor, weights: Tensor, *, out: Tensor) -> None:
    candidate, reset, update = (each.flatten(0, 1) for each in changes[:3].unbind())
    rows = out.flatten(0, 1)
    torch.mm(candidate, weights[2], out=rows)
    rows.addmm_(reset, weights[0]).addmm_(update, weights[1])


class _Sums:
    """The gradients of weights and biases, summed over stretches."""

    def __init__(self, weights_ih: Tensor, weights_hh: Tensor) -> None:
        self.weights_ih = torch.zeros_like(weights_ih)  # in the order n, r, z
        self.weights_hh = torch.zeros_like(weights_hh)
        self.biases = weights_hh.new_zeros(4, 1, weights_hh.shape[1])

    def add(self, changes: Tensor, x: Tensor, before: Tensor) -> None:
        """Of the changes of the loss with what enters the gates (4, T, M, H), as `_slopes` has them."""
        changes, x, before = changes.flatten(1, 2), x.flatten(0, 1), before.flatten(0, 1)
        self.weights_ih.baddbmm_(changes[:3].transpose(1, 2), x.expand(3, *x.shape))
        self.weights_hh.baddbmm_(changes[1:].transpose(1, 2), before.expand(3, *before.shape))
        self.biases += changes.sum(dim=1, keepdim=True)

    def gradients(self) -> list[Tensor]:
        """In the order of the arguments."""
        in_order = [1, 2, 0]
        return [
            self.weights_ih[in_order].flatten(0, 1),
            self.weights_hh.flatten(0, 1),
            self.biases[in_order].flatten(),
            self.biases[1:].flatten(),
        ]
