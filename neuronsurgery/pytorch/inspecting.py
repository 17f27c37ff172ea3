"""What is wrong with a model, and with what is around it: `surgery.check`.

Nothing is changed and no forward pass is run: forwards are traced as discovery does, everything else is read from the
modules, the banks, the parameters and the optimizers. Reading numbers waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.optim import Optimizer

from neuronsurgery.checks import Check, Problem, merged, of_mirror
from neuronsurgery.errors import SurgeryError
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.composites import PASSED_BY, Composite
from neuronsurgery.pytorch.digests import weights_of
from neuronsurgery.pytorch.distributed import differing, is_shared, named
from neuronsurgery.pytorch.inspecting_banks import bank_problems, notes
from neuronsurgery.pytorch.inspecting_optimizers import age_problems, owner_problems
from neuronsurgery.pytorch.inspecting_rewrites import rewrite_problems
from neuronsurgery.pytorch.mirroring import original_class
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.offsets import offsets_of
from neuronsurgery.pytorch.sites import Discovery, discover
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.tables import counted, listed

__all__ = ["check"]

Models = nn.Module | Sequence[nn.Module]


def check(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None, *, mirrors: Models = ()) -> Check:
    """Look for everything that is known to go wrong; see `neuronsurgery.surgery.check`."""
    targets = (mirrors,) if isinstance(mirrors, nn.Module) else tuple(mirrors)
    found = _check(unwrap(model), optimizer_state.as_optimizers(optimizer))
    problems = list(found.problems)
    for index, target in enumerate(targets):
        label = f"mirrors[{index}]"
        problems += of_mirror(label, _check(unwrap(target), ()))
        problems += _mirror_problems(unwrap(model), unwrap(target), label)
    problems += _replica_problems(unwrap(model))
    return Check(merged(problems), found.notes)


@with_parameters_in_place
def _check(model: nn.Module, optimizers: tuple[Optimizer, ...]) -> Check:
    """One model and its optimizers."""
    problems = list(owner_problems(model, optimizers))
    if not _is_touched(model):
        check_model(model)
        return Check(tuple(problems), ("no composite units",))
    try:
        discovery = discover(model)
    except SurgeryError as error:
        remedy = "undo what was done to it since; its banks cannot be told apart from here"
        return Check((*problems, Problem("bank", "the model", f"it cannot be read: {error}", remedy)), ())
    problems += rewrite_problems(discovery)
    problems += bank_problems(discovery, optimizers)
    problems += age_problems(discovery, optimizers)
    problems += () if optimizers else _offset_problems(discovery)  # what has an optimizer trains by itself
    return Check(merged(problems), (_count(model), *notes(discovery, optimizers)))


def _is_touched(model: nn.Module) -> bool:
    """Whether an operation left anything on the model: a bank, a generated class, or a mark on a path."""
    return any(
        isinstance(module, Composite) or original_class(module) is not type(module) or PASSED_BY in vars(module)
        for module in model.modules()
    )


def _count(model: nn.Module) -> str:
    banks = [module for module in model.modules() if isinstance(module, Composite)]
    units = sum(len(set(bank.rows.unit.tolist())) for bank in banks)
    return f"{counted(units, 'composite unit')}, {counted(sum(len(b.rows) for b in banks), 'frozen row')}"


def _mirror_problems(model: nn.Module, target: nn.Module, label: str) -> Iterator[Problem]:
    """Operations that a target network lacks, or has beyond those of the model."""
    own, theirs = _operations(model), _operations(target)
    for name in dict.fromkeys([*own, *theirs]):
        lacks = sorted(own.get(name, set()) - theirs.get(name, set()))
        more = sorted(theirs.get(name, set()) - own.get(name, set()))
        found = [f"lacks operation {listed(_numbers(lacks))}"] if lacks else []
        found += [f"has operation {listed(_numbers(more))}, which the model has not"] if more else []
        if found:
            remedy = "surgery.mirror(model, onto=target) after every operation"
            yield Problem("mirror", f"{label}: {name}", " and ".join(found), remedy)


def _replica_problems(model: nn.Module) -> Iterator[Problem]:
    """What the processes that hold the model do not hold alike; of a model that nothing wraps there is one."""
    for name, ranks in differing("the model", weights_of(model) if is_shared(model) else {}).items():
        found = f"on {named(ranks)} it holds something else than on process 0"
        remedy = "load one state on all processes, and operate on what DistributedDataParallel made of the model"
        yield Problem("replica", name, found, remedy)


def _offset_problems(discovery: Discovery) -> Iterator[Problem]:
    """Targets mirrored with frozen rows of their own, of which parameters alone follow the model."""
    for name, units in offsets_of(discovery.places).items():
        found = f"its slots of units {listed(units)} follow a model, and its own frozen rows stay behind for good"
        remedy = 'surgery.mirror(model, onto=target, frozen="shared"), or average and copy state dicts'
        yield Problem("mirror", name, found, remedy)


def _operations(model: nn.Module) -> dict[str, set[tuple[int, int]]]:
    """Bank name -> (operation, unit) of its rows."""
    return {
        name: set(zip(bank.rows.operation.tolist(), bank.rows.unit.tolist(), strict=True))
        for name, bank in model.named_modules()
        if isinstance(bank, Composite)
    }


def _numbers(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return sorted({operation for operation, _ in pairs})
