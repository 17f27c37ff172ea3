"""Everything an operation may touch, taken down bit for bit, to show that a fault or an undo left it as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.pytorch.optimizers import young_rows
from neuronsurgery.pytorch.step_hooks import CLOCKS

__all__ = ["Same", "assert_untouched", "bits", "snapshot"]


@dataclass(frozen=True, eq=False)
class Same:
    """A leaf that must be the very same object."""

    thing: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    __hash__ = None  # type: ignore[assignment]


def bits(values: Tensor) -> bytes:
    """A tensor's content, NaN and the sign of zero included."""
    flat = values.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) + str((values.dtype, tuple(values.shape))).encode()


def snapshot(
    model: nn.Module, optimizers: Sequence[Optimizer] = (), generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Label -> leaf, in order, for a model, its optimizers, and all random states."""
    leaves = dict(_of_model(model))
    for index, optimizer in enumerate(optimizers):
        leaves |= {f"optimizer {index}: {label}": leaf for label, leaf in _of_optimizer(optimizer)}
    leaves["torch's random state"] = bits(torch.get_rng_state())
    leaves["torch's initial seed"] = torch.initial_seed()
    leaves["Python's random state"] = random.getstate()
    leaves["numpy's random state"] = str(np.random.get_state())
    leaves["grad mode"] = torch.is_grad_enabled()
    if generator is not None:
        leaves["the generator's state"] = bits(generator.get_state())
    return leaves


def _of_model(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules(remove_duplicate=False):
        yield f"class of {name!r}", Same(type(module))
        for attribute, value in vars(module).items():
            label = f"{name!r}.{attribute}"
            if isinstance(value, dict):
                yield f"keys of {label}", list(value)
                for key, item in value.items():
                    yield f"{label}[{key!r}]", Same(item)
                    if isinstance(item, Tensor):
                        yield f"values of {label}[{key!r}]", bits(item)
                        yield f"grad of {label}[{key!r}]", Same(item.grad if item.is_leaf else None)
                        if item.is_leaf and item.grad is not None:
                            yield f"values of the grad of {label}[{key!r}]", bits(item.grad)
                        hooks = [item._backward_hooks, getattr(item, "_post_accumulate_grad_hooks", None)]
                        yield f"hooks of {label}[{key!r}]", [list(one or {}) for one in hooks]
            else:
                yield label, value if isinstance(value, (bool, int, float, str)) else Same(value)


def _of_optimizer(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    yield "owners of state", [id(parameter) for parameter in optimizer.state]
    for index, (_, state) in enumerate(optimizer.state.items()):
        yield f"keys of state {index}", list(state)
        for key, entry in state.items():
            yield f"state {index} {key}", Same(entry) if isinstance(entry, Tensor) else entry
            if isinstance(entry, Tensor):
                yield f"values of state {index} {key}", bits(entry)
    for index, group in enumerate(optimizer.param_groups):
        yield f"group {index}", {key: option for key, option in group.items() if key != "params"}
        yield f"parameters of group {index}", [id(parameter) for parameter in group["params"]]
    for kind in ("pre", "post"):
        hooks = getattr(optimizer, f"_optimizer_step_{kind}_hooks")
        yield f"step {kind} hooks", {key: id(getattr(hook, "__self__", hook)) for key, hook in hooks.items()}
    clock = CLOCKS.get(optimizer)
    yield "clock", None if clock is None else (id(clock), clock.num_steps)
    yield "young rows", {id(parameter): rows for parameter, rows in young_rows(optimizer).items()}


def assert_untouched(
    before: dict[str, Any],
    model: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    generator: torch.Generator | None = None,
    why: str = "",
) -> None:
    """Nothing differs from an earlier `snapshot`; the message names what does."""
    after = snapshot(model, optimizers, generator)
    gone, new = [x for x in before if x not in after], [x for x in after if x not in before]
    assert not gone and not new, f"{why}: gone {gone[:5]}, new {new[:5]}"
    changed = [label for label in before if before[label] != after[label]]
    assert not changed, f"{why}: changed {changed[:8]}"
    assert list(before) == list(after), f"{why}: another order"
