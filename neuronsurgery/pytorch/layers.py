"""Which layers a method concerns: named ones, all, or the last before the output, as an example's graph has it.

The last layers are not those registered last: a forward may use its children in any order, and a model may have
several heads. A layer's distance from the output is counted along the autograd graph of an example's forward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neuronsurgery.errors import SiteError
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.models import left_alone, run_model

__all__ = ["Layers", "Owned", "layers_of", "owned_by"]

Layers = str | Iterable[str] | int | None


@dataclass(frozen=True, eq=False)
class Owned:
    """A module and the tensors that it owns itself, each parameter under the first name that the model has for it."""

    name: str
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]


def layers_of(model: nn.Module, layers: Layers, example: Any = None) -> list[Owned]:
    """The modules with parameters of their own in the layers asked for, in the order of the model.

    Args:
        model: the model, taken out of its wrappers.
        layers: names of modules, with all that is in them; a number, of the last layers before the output; None: all.
        example: a batch; what is last is told by its forward pass.

    Raises:
        SiteError: there is no such module, or none with a parameter; the last were asked for without an example.
    """
    if layers is None:
        names: list[str] = [""]
    elif isinstance(layers, int):
        names = _last(model, layers, example)
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
    return owned_by(model, names)


def owned_by(model: nn.Module, names: Iterable[str]) -> list[Owned]:
    """The modules at these names and below that own parameters; raises `SiteError` for names that hold none."""
    modules = dict(model.named_modules())
    found: dict[str, Owned] = {}
    seen: set[int] = set()
    for asked in names:
        if asked not in modules:
            raise SiteError(
                f"{asked!r} is no module of this {type(model).__name__}; it has {', '.join(list(modules)[1:9])} ..."
            )
        inside = [name for name in modules if not asked or name == asked or name.startswith(f"{asked}.")]
        if not any(True for _ in modules[asked].parameters()):
            raise SiteError(f"{asked!r} has no parameter, so that there is nothing to change in it")
        for name in inside:
            owned = {n: p for n, p in modules[name]._parameters.items() if p is not None and id(p) not in seen}
            if owned and not isinstance(modules[name], Composite):
                seen.update(map(id, owned.values()))
                found[name] = Owned(name, modules[name], owned)
    return [found[name] for name in modules if name in found]


def _last(model: nn.Module, number: int, example: Any) -> list[str]:
    """The names of the layers from which a way leads to an output past fewer than `number` other layers."""
    if number < 1:
        raise SiteError(f"the last {number} layers were asked for; ask for at least 1, or name them")
    if example is None:
        raise SiteError(
            f"the last {number} layers were asked for without an example: which come last is told by the graph of a "
            "forward pass, not by the order in which they were registered. Pass example=batch, or name the layers"
        )
    distances = _distances(model, example)
    found = [name for name, distance in distances.items() if distance <= number]
    if not found:
        raise SiteError(
            "no layer was found on the way to an output of the example: gradients do not reach one (a forward under "
            "no_grad, or through functions of parameters alone). Name the layers"
        )
    return found


def _distances(model: nn.Module, example: Any) -> dict[str, int]:
    """For each layer that the example passes, how many layers a shortest way from it to an output has, itself one.

    A layer is a module that owns a parameter of two or more axes: norms and scales count as none.
    """
    tagged: dict[Any, str] = {}

    def noted(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tagged.update(dict.fromkeys(_functions(output), name))

        return hook

    with ExitStack() as stack, left_alone(model), torch.enable_grad():
        for name, module in model.named_modules():
            if any(p is not None and p.dim() > 1 for p in module._parameters.values()):
                handle = module.register_forward_hook(noted(name))
                stack.callback(handle.remove)
        outputs = list(_functions(run_model(model, example)))
    return dict(_counted(outputs, tagged))


def _functions(output: Any) -> Iterator[Any]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            yield leaf.grad_fn


def _counted(outputs: list[Any], tagged: Mapping[Any, str]) -> Iterator[tuple[str, int]]:
    """Walk the graph back from the outputs, the nearest first: entering a layer costs one step, all else none."""
    pending = deque((function, 0) for function in outputs)
    distances: dict[Any, int] = {}
    found: dict[str, int] = {}
    while pending:
        function, distance = pending.popleft()
        if function is None or distances.get(function, distance + 1) <= distance:
            continue
        distances[function] = distance
        name = tagged.get(function)
        if name is not None:
            distance += 1
            found[name] = min(distance, found.get(name, distance))
        for before, _ in function.next_functions:
            if name is None:
                pending.appendleft((before, distance))
            else:
                pending.append((before, distance))
    yield from found.items()
