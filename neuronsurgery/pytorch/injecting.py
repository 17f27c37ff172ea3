"""Plasticity injection: a module gets fresh weights, with frozen copies of the old and of the fresh ones beside it.

Nikishin et al. 2023: `h(x)` becomes `h(x) + h1(x) - h2(x)`, h frozen, h1 fresh and trained, h2 a frozen copy of h1, so
that the output does not change at that moment. It is for a whole head what a composite unit is for one unit, and is
kept as that is: h1 lives in the head's own parameters, edited in place, so that optimizers know it already; h and h2
hold buffers only. The head's class is exchanged for a generated one that adds them up, as `k + (a - c)`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from neuronsurgery.errors import ModelError
from neuronsurgery.layer_reports import LayerReport
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.checking import SameOutput
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.drawing import Init, check_drawing, generator_kept, seed_for
from neuronsurgery.pytorch.forgetting import forget
from neuronsurgery.pytorch.fresh_layers import Fresh, fresh_layers
from neuronsurgery.pytorch.fsdp import require_whole
from neuronsurgery.pytorch.injected import CHILD, Injected, Injection, injected_class
from neuronsurgery.pytorch.layers import Owned, owned_by
from neuronsurgery.pytorch.mirroring import submodule
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.pytorch.transaction import Change, Overwrite, RemoveItem, SetClass, SetItem, run

__all__ = ["inject", "taken_out"]


@with_parameters_in_place
def inject(
    model: nn.Module,
    head: str,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    init: Init | None = None,
    verify: Any = None,
    generator: torch.Generator | None = None,
) -> LayerReport:
    """Inject plasticity into a module of a model; see `neuronsurgery.surgery.plasticity_injection`."""
    require_whole(model, "plasticity_injection")
    check_model(model)
    model = unwrap(model)
    optimizers = optimizer_state.as_optimizers(optimizer)
    optimizer_state.check_owners(optimizers, dict(model.named_parameters()))
    check_drawing(init, generator)
    layers = owned_by(model, [head])
    module = submodule(model, head)
    _refuse(model, head, module)
    with generator_kept(generator):
        fresh = fresh_layers(layers, seed=seed_for(generator, _depth(module)), init=init)
        changes = list(_changes(module, layers, fresh, optimizers))
        check = None if verify is None else SameOutput(model, verify)

        def report() -> LayerReport:
            beside = submodule(module, _holder(module))._modules[CHILD]
            assert beside is not None
            frozen = sum(int(buffer.numel()) for buffer in beside.buffers())
            return LayerReport(
                method="plasticity_injection",
                changed={owned.name: tuple(owned.parameters) for owned in layers},
                num_numbers=sum(p.numel() for owned in layers for p in owned.parameters.values()),
                notes=(f"{head or 'the model'}: {frozen} frozen numbers beside it", *_notes(optimizers, layers)),
                verified=check is not None,
                model_error=None if check is None else check.error,
            )

        return run([*changes, *([check] if check else [])], report)


def _changes(
    module: nn.Module, layers: Sequence[Owned], fresh: Sequence[Fresh], optimizers: tuple[Optimizer, ...]
) -> Iterator[Change]:
    knowledge, compensation = _copied(module), _plain(_copied(module))
    inside = {id(own): path for path, own in module.named_modules()}
    for each in fresh:
        for name, values in each.values.items():
            if name in each.owned.parameters:  # running statistics stay, as those of composite units do
                getattr(submodule(compensation, inside[id(each.owned.module)]), name).data.copy_(values)
    holder = submodule(module, _holder(module))
    yield SetItem(holder._modules, CHILD, Injection(_frozen(knowledge), _frozen(compensation)).train(module.training))
    for parameter, values in (pair for each in fresh for pair in each.parameters()):
        yield Overwrite(parameter, values)
        if parameter.grad is not None:
            yield Overwrite(parameter.grad, torch.zeros_like(parameter.grad))
    yield from forget(optimizers, [p for owned in layers for p in owned.parameters.values()])
    if not isinstance(module, Injected):
        yield SetClass(module, injected_class(cast(Any, type(module)), _holder(module)))


def taken_out(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[Change]:
    """Take the frozen copies away from the modules of which all parameters are among these."""
    asked = set(parameters)
    for module in list(model.modules()):
        own = list(module.parameters()) if isinstance(module, Injected) else []
        if isinstance(module, Injected) and own and all(parameter in asked for parameter in own):
            yield RemoveItem(submodule(module, module._neuronsurgery_holder)._modules, CHILD)
            yield SetClass(module, module._neuronsurgery_injected)


# -- what cannot be injected into ------------------------------------------------------------------------------------


def _refuse(model: nn.Module, head: str, module: nn.Module) -> None:
    """Refuse modules whose output would change, or whose frozen copies could not be kept.

    Raises:
        ModelError: dropout inside, composite units inside, weights shared with the rest, or not one forward of its own.
    """
    masked = next((name for name, each in module.named_modules() if _drops_out(each)), None)
    if masked is not None:
        raise ModelError(
            f"{head!r} holds dropout ({masked or 'itself'!r}): its three copies would draw three masks, so that the "
            "output would change. Name a part of it without dropout, or set its rate to 0"
        )
    if any(isinstance(each, Composite) for each in module.modules()):
        raise ModelError(
            f"{head!r} holds composite units, whose frozen rows would be copied with it: inject first and operate "
            "afterwards, or undo the operations on it"
        )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or "forward" in vars(module):
        raise ModelError(
            f"{head!r} is a {type(module).__name__} without a forward of its class, whose output could be added up; "
            "name the modules in it, one by one"
        )
    inside = {id(each) for each in module.modules()}
    own = {id(p) for p in module.parameters()}
    for name, each in model.named_modules(remove_duplicate=False):
        if id(each) not in inside and any(id(p) in own for p in each._parameters.values()):
            raise ModelError(
                f"{head!r} shares weights with {name!r}, which would compute with the fresh ones and change its "
                "output; untie them, or name another module"
            )


def _drops_out(module: nn.Module) -> bool:
    rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    return isinstance(rate, float) and rate > 0


def _notes(optimizers: tuple[Optimizer, ...], layers: Sequence[Owned]) -> Iterator[str]:
    if not optimizers:
        yield "no optimizer was given: it keeps its state of the old weights"
        return
    names = {f"{owned.name}.{name}".lstrip("."): p for owned in layers for name, p in owned.parameters.items()}
    if missing := optimizer_state.unowned(optimizers, names):
        yield f"no optimizer owns {', '.join(missing)}: they will not train"


# -- frozen copies ---------------------------------------------------------------------------------------------------


def _depth(module: nn.Module) -> int:
    """How many injections there are, which tells their draws apart where there is no generator."""
    return 1 + sum(isinstance(each, Injection) for each in module.modules())


def _holder(module: nn.Module) -> str:
    """The path to the module that the copies hang on: the head itself; of a Sequential, whose children it runs one by
    one, the first of them that owns a parameter.
    """
    path, inner = "", module
    while isinstance(inner, nn.Sequential):
        name, inner = next((n, m) for n, m in inner.named_children() if any(True for _ in m.parameters()))
        path = f"{path}.{name}" if path else name
    return path


def _copied(module: nn.Module) -> Any:
    """A deep copy without the user's hooks, which are not to see what is computed beside the head."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    memo: dict[int, Any] = {id(vars(each)[name]): OrderedDict() for each in module.modules() for name in hooks}
    gradients = {id(p.grad): None for p in module.parameters() if p.grad is not None}
    return copy.deepcopy(module, {**memo, **gradients})


def _plain(module: nn.Module) -> nn.Module:
    """A copy as it was before any injection."""
    if isinstance(module, Injected):
        del submodule(module, _holder(module))._modules[CHILD]
        object.__setattr__(module, "__class__", module._neuronsurgery_injected)
    return module


def _frozen(module: nn.Module) -> nn.Module:
    """Turn all parameters of a copy into buffers, which no optimizer, decay or sweep over parameters sees."""
    frozen: dict[int, Tensor] = {}
    for each in module.modules():
        for name, parameter in list(each._parameters.items()):
            if parameter is not None:
                del each._parameters[name]
                each._buffers[name] = frozen.setdefault(id(parameter), parameter.detach().clone())
    return module
