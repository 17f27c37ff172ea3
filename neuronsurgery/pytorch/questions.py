"""Questions of dtype, device or shape that decide a branch: `if h.dtype != self.out.weight.dtype: h = h.to(...)`.

What a module's own tensors answer is read off and guarded; sizes of arguments are conditions (`scalars`). What else
there is to ask (the dtype of a computed tensor, as autocast decides it, or its shape) is known only when it runs. So a
forward is traced once for each combination of answers; the graphs agree up to the question that tells them apart, and
the program asks it there, at run time (`branching`).
"""

from __future__ import annotations

import dis
import functools
import operator
import types
from typing import Any

import torch
from torch import fx

__all__ = ["MOST_OUTCOMES", "Questions", "compares_by_identity", "is_fact", "own_tensors"]

MOST_OUTCOMES = 16  # combinations of answers that are traced for one kind of call

_PROPERTIES = frozenset("dtype device is_cuda is_cpu is_mps is_sparse is_quantized layout shape ndim".split())
_PARTS = frozenset("type index is_floating_point is_complex is_signed itemsize".split())  # of a dtype or a device
_METHODS = frozenset("is_floating_point is_complex size dim ndimension numel".split())
_OPERATORS = frozenset("eq ne lt le gt ge and_ or_ xor add sub mul floordiv mod getitem".split())


def is_fact(value: Any) -> bool:
    """Whether a node is a dtype, a device, a shape, or something computed of such and constants alone."""
    if not isinstance(value, fx.Node) or value.kwargs:
        return False
    if value.op == "call_method" or value.target in (torch.is_floating_point, torch.is_complex):
        name = getattr(value.target, "__name__", value.target)
        return name in _METHODS and not any(isinstance(argument, fx.Node) for argument in value.args[1:])
    if value.op != "call_function":
        return False
    if value.target is getattr:
        return value.args[1] in (_PARTS if is_fact(value.args[0]) else _PROPERTIES)
    if (
        getattr(value.target, "__module__", "") != "_operator"
        or getattr(value.target, "__name__", "") not in _OPERATORS
    ):
        return False
    return bool(value.all_input_nodes) and all(map(is_fact, value.all_input_nodes))


def own_tensors(fact: fx.Node) -> list[fx.Node] | None:
    """The nodes that ask a tensor of the module, if a fact is made of such alone; else None."""
    if not is_fact(fact.args[0]) and isinstance(fact.args[0], fx.Node):
        is_read = fact.target is getattr and fact.args[0].op == "get_attr"
        return [fact] if is_read else None
    found: list[fx.Node] = []
    for argument in fact.all_input_nodes:
        inner = own_tensors(argument)
        if inner is None:
            return None
        found += inner
    return found


class Questions:
    """The questions of one trace: the first are answered as prescribed, later ones with no."""

    def __init__(self, prescribed: tuple[bool, ...] = ()) -> None:
        self.prescribed = prescribed
        self.asked: list[fx.Node] = []
        self.answers: list[bool] = []
        self.said: dict[Any, bool] = {}
        self.values: dict[Any, Any] = {}  # what a fact is known to be since a comparison said so

    def answer(self, question: fx.Node) -> bool:
        """The answer in this trace, the same each time the same is asked."""
        key, negated = _normal(question)
        if key not in self.said:
            self.said[key] = self.implied(key) if self.implied(key) is not None else self.ask(question, negated)
            self.learn(key)
        return self.said[key] != negated

    def ask(self, question: fx.Node, negated: bool) -> bool:
        place = len(self.asked)
        said = self.prescribed[place] if place < len(self.prescribed) else False
        self.asked.append(question)
        self.answers.append(said)
        return said != negated

    def implied(self, key: Any) -> Any:
        """What follows for a comparison with a constant from an earlier one that held; None if nothing does."""
        fact, constant = _compared(key)
        return self.values[fact] == constant if fact in self.values else None

    def learn(self, key: Any) -> None:
        fact, constant = _compared(key)
        if fact is not None and self.said[key]:
            self.values[fact] = constant

    def known(self, node: fx.Node, name: str) -> Any:
        """A node's dtype or device, where this trace's answers say what it is; else None."""
        return self.values.get((getattr, node, name))


def _key(value: Any) -> Any:
    """A fact by what it is made of, hashable, the same whenever the same is asked."""
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_key, value))
    if isinstance(value, slice):
        return (slice, *map(_key, (value.start, value.stop, value.step)))
    return (value.target, *map(_key, value.args)) if is_fact(value) else value


def _normal(question: fx.Node) -> tuple[Any, bool]:
    """What stands for a question, and whether that is its negation."""
    key = _key(question)
    return ((operator.eq, *key[1:]), True) if key[0] is operator.ne else (key, False)


def _compared(key: Any) -> tuple[Any, Any]:
    """The fact and the constant of a comparison for equality; (None, None) for any other key."""
    if key[0] is operator.eq:
        for fact, constant in ((key[1], key[2]), (key[2], key[1])):
            if isinstance(fact, tuple) and not isinstance(constant, (tuple, fx.Node)):
                return fact, constant
    return None, None


# -- comparisons that no stand-in can see ------------------------------------------------------------------------------


def compares_by_identity(frame: Any) -> bool:
    """Whether the code that runs has an `is` beside a dtype: of a stand-in that is false, whatever the tensor's is."""
    return _has_identity(frame.f_code) or any(
        isinstance(frame.f_globals.get(name), torch.dtype) for name in _names_beside_is(frame.f_code)
    )


def _has_identity(code: types.CodeType) -> bool:
    return not _DTYPES.isdisjoint(_names_beside_is(code))


@functools.lru_cache(maxsize=4096)
def _names_beside_is(code: types.CodeType) -> frozenset[str]:
    instructions = list(dis.get_instructions(code))
    places = [place for place, each in enumerate(instructions) if each.opname == "IS_OP"]
    return frozenset(str(instructions[place - 1].argval) for place in places)


_DTYPES = frozenset(name for name in vars(torch) if isinstance(getattr(torch, name), torch.dtype)) | {"dtype"}
