"""What hangs on an optimizer's step: hooks that come and go with an operation, and a clock, the simplest of them.

The hooks live on the optimizer. As torch drops hooks on pickling and copying, neither a copy of the model nor a copy
or a pickle of the optimizer has them. They refer to no optimizer, and so keep none alive.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch.transaction import Change

__all__ = ["CLOCKS", "HOOK_CALLER", "Clock", "install"]


class StepHooks(Protocol):
    """What is installed on an optimizer, at most once of each kind.

    The hooks run outside of a compiled `step`, as what they read changes with every step.
    """

    has_pre_hook: bool

    def install(self, optimizer: Optimizer) -> Iterable[RemovableHandle]: ...


H = TypeVar("H", bound=StepHooks)


class Clock:
    """Counts the steps of an optimizer that does not count them itself, from its first operation on.

    A step is a call of `step` that returned, whether or not a parameter had a gradient. One that a fused optimizer
    skips by itself, as its gradient scaler found an overflow, is none.
    """

    has_pre_hook = False

    def __init__(self, num_steps: int = 0) -> None:
        self.num_steps = num_steps

    def install(self, optimizer: Optimizer) -> Iterable[RemovableHandle]:
        yield optimizer.register_step_post_hook(torch.compiler.disable(self.after_step))  # type: ignore[no-untyped-call]

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is None or not bool(overflow):
            self.num_steps += 1


CLOCKS: WeakKeyDictionary[Optimizer, Clock] = WeakKeyDictionary()


def install(optimizer: Optimizer, registry: MutableMapping[Optimizer, H], hooks: Callable[[], H]) -> list[Change]:
    """Plan the change that installs hooks and enters them in their registry; none where they are installed.

    Raises `OptimizerError` where torch is running the optimizer's hooks and has some left to run: it would stop at
    those with "OrderedDict mutated during iteration", after the operation. Before the first step, after any, in a
    closure and in the last of the hooks is fine.
    """
    if optimizer in registry:
        return []
    if _is_between_hooks(optimizer._optimizer_step_post_hooks) or (
        hooks().has_pre_hook and _is_between_hooks(optimizer._optimizer_step_pre_hooks)
    ):
        name = type(optimizer).__name__
        raise OptimizerError(
            f"the first operation with this {name} adds step hooks to it, and was asked for inside one of its step "
            "hooks, with others left to run, which torch does not allow. Operate after optimizer.step() has returned, "
            "or register this hook as the last"
        )
    return [_Install(optimizer, registry, hooks)]


class _Install:
    """Install hooks on an optimizer, unless an earlier change has."""

    def __init__(
        self, optimizer: Optimizer, registry: MutableMapping[Optimizer, Any], hooks: Callable[[], Any]
    ) -> None:
        self.optimizer, self.registry, self.hooks = optimizer, registry, hooks
        self.handles: list[RemovableHandle] = []

    def apply(self) -> None:
        if self.optimizer not in self.registry:
            installed = self.hooks()
            self.handles.extend(installed.install(self.optimizer))
            self.registry[self.optimizer] = installed

    def revert(self) -> None:
        for handle in self.handles:
            handle.remove()
            self.registry.pop(self.optimizer, None)


def _is_between_hooks(hooks: Mapping[int, Any]) -> bool:
    """Whether torch, further up the stack, is iterating over the hooks and has not come to the last.

    The stack alone would not tell a hook from a closure, nor the last hook from the first; to look for the iterators
    takes tens of milliseconds, which is why the stack goes first.
    """
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not HOOK_CALLER:
        frame = frame.f_back
    if frame.f_code is not HOOK_CALLER:
        return False
    iterators = (one for one in gc.get_referrers(hooks) if type(one) is _ITERATOR)
    return any(list(copy.copy(one)) for one in iterators)


HOOK_CALLER = Optimizer.profile_hook_step(Optimizer.step).__code__
"""The code of what torch puts around a class's `step`."""

_ITERATOR = type(iter(OrderedDict[int, Any]().values()))
