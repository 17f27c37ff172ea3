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
    """`torch.nn.GRUCell` that can also be unrolled.

    >>> cell, x = GRUCell(3, 4), torch.randn(5, 7, 3)
    >>> torch.allclose(cell.unroll(x)[1], cell(x[1], cell(x[0], torch.zeros(7, 4))), atol=1e-6)
    True
    """

    def unroll(self, x: Tensor) -> Tensor:
        """States (T, M, H) after each of the inputs (T, M, I), from a state of zeros."""
        hidden: Tensor = _Unrolled.apply(x, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)  # type: ignore[no-untyped-call]
        return hidden


class _Unrolled(torch.autograd.Function):
    """Shapes: T steps, M rows, I inputs, H units; weights as in `nn.GRUCell`, gates in the order r, z, n.

    What belongs to all steps is computed stretch by stretch: a stretch stays in the processor's cache, and so do the
    pieces of memory that it takes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
        is_learning, num_units = any(ctx.needs_input_grad), weight_hh.shape[1]
        hidden = x.new_empty(len(x) + 1, x.shape[1], num_units)
        hidden[0] = 0
        saved = []
        for stretch in _stretches(x, num_units):
            gates = _product(x[stretch], weight_ih, bias_ih)
            from_state = torch.empty_like(gates) if is_learning else torch.empty_like(gates[:1]).expand_as(gates)
            _run(gates, from_state, weight_hh.t(), bias_hh, hidden[stretch.start : stretch.stop + 1])
            saved += [gates, from_state[..., 2 * num_units :]]
        if is_learning:
            ctx.save_for_backward(x, weight_ih, weight_hh, hidden, *saved)
        return hidden[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_ih, weight_hh, hidden, *saved = ctx.saved_tensors
        grads = [torch.zeros_like(weight_ih), torch.zeros_like(weight_hh)]
        grads += [weight_ih.new_zeros(len(weight_ih)), weight_ih.new_zeros(len(weight_ih))]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        carried = torch.zeros_like(hidden[0])
        stretches = _stretches(x, weight_hh.shape[1])
        for number, stretch in reversed(list(enumerate(stretches))):
            before = hidden[stretch]
            at_gates, at_inputs, carried = _changes(
                grad_hidden[stretch],
                carried,
                weight_hh,
                gates=saved[2 * number],
                states=(saved[2 * number + 1], before),
            )
            grads[1].addmm_(at_gates.t(), before.flatten(0, 1))
            grads[3] += at_gates.sum(dim=0)
            grads[0].addmm_(at_inputs.t(), x[stretch].flatten(0, 1))
            grads[2] += at_inputs.sum(dim=0)
            if grad_x is not None:
                torch.mm(at_inputs, weight_ih, out=grad_x[stretch].view(-1, x.shape[-1]))
        return grad_x, *grads


STRETCH = 2**18
"""Numbers in the gates of a stretch."""


def _stretches(x: Tensor, num_units: int) -> list[slice]:
    size = max(1, STRETCH // (3 * num_units * x.shape[1]))
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x.flatten(0, 1), weight.t()).view(*x.shape[:2], -1)


def _run(gates: Tensor, from_state: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor) -> None:
    """Turn what the inputs give the gates into the gates, and write the states that follow the first."""
    num_units = hidden.shape[-1]
    steps = zip(gates.unbind(), from_state.unbind(), hidden[:-1].unbind(), hidden[1:].unbind(), strict=True)
    for gate, recurrent, before, after in steps:
        torch.addmm(bias, before, weight, out=recurrent)
        both, candidate = gate[:, : 2 * num_units], gate[:, 2 * num_units :]
        both.add_(recurrent[:, : 2 * num_units]).sigmoid_()
        candidate.addcmul_(both[:, :num_units], recurrent[:, 2 * num_units :]).tanh_()
        torch.lerp(candidate, before, both[:, num_units:], out=after)


def _changes(
    grad_hidden: Tensor, carried: Tensor, weight: Tensor, *, gates: Tensor, states: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """How the loss changes with the gates, as the state enters them and as the inputs do, and with the first state."""
    reset, update, candidate = gates.chunk(3, dim=-1)
    candidate_from_state, before = states
    num_steps, num_rows, num_units = candidate.shape
    # what a change of h' becomes at the gates: at each step it is only to be multiplied by that change
    at_gates = gates.new_empty(num_steps, num_rows, 3, num_units)
    at_candidate = (1 - update).mul_(1 - candidate * candidate)
    torch.mul(at_candidate * candidate_from_state, reset * (1 - reset), out=at_gates[:, :, 0])
    torch.mul(before - candidate, update * (1 - update), out=at_gates[:, :, 1])
    torch.mul(at_candidate, reset, out=at_gates[:, :, 2])
    changes = torch.empty_like(candidate)
    steps = zip(changes.unbind(), grad_hidden.unbind(), at_gates.unbind(), update.unbind(), strict=True)
    for change, grad, at_gate, keeps in reversed(list(steps)):
        torch.add(grad, carried, out=change)
        at_gate.mul_(change.unsqueeze(1))
        carried = (change * keeps).addmm_(at_gate.view(num_rows, 3 * num_units), weight)
    at_inputs = at_gates.clone()
    torch.mul(changes, at_candidate, out=at_inputs[:, :, 2])  # at the inputs the candidate does not pass the reset gate
    return at_gates.view(-1, 3 * num_units), at_inputs.view(-1, 3 * num_units), carried
