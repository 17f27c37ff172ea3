"""Whether banks take effect: that each belongs to a site, and that the modules around it are those that apply it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from neuronsurgery.checks import Problem
from neuronsurgery.errors import SurgeryError
from neuronsurgery.pytorch.carrying import Role
from neuronsurgery.pytorch.composites import PASSED_BY, Composite
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.operating import banked_names
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.rewriting import class_changes, programs_for
from neuronsurgery.pytorch.sites import Discovery
from neuronsurgery.pytorch.transaction import SetClass

__all__ = ["rewrite_problems"]

_PUT_BACK = "put back what stood there, or undo the operation before you exchange it"


def rewrite_problems(discovery: Discovery) -> Iterator[Problem]:
    """Why banks have no effect, or will have none after the next operation."""
    for name, reason in discovery.strays.items():
        yield Problem(
            "bank",
            name,
            f"it belongs to no site of the model now: {reason}. Operating and observing are refused",
            "undo what was changed around its layer since the operation",
        )
    for name, place in discovery.places.items():
        yield from _owner_problems(name, place)
        if place.bank is not None:
            yield from _path_problems(name, place, place.bank)
    yield from _class_problems(discovery)


def _owner_problems(name: str, place: Place) -> Iterator[Problem]:
    """One weight has one bank, at every module that owns the weight."""
    banks = [owner._modules.get(child) for owner, child in place.owners]
    if len({id(bank) for bank in banks}) > 1:
        found = f"{len(place.owners)} modules own its weight, and they do not have the same bank"
        yield Problem("bank", name, found, "tie the modules again, their banks with their weights")


def _path_problems(name: str, place: Place, bank: Composite) -> Iterator[Problem]:
    """What the rows were made to pass is what the slots pass now."""
    if bank.product != place.product:
        found = "the layer computes another product than the one its bank was made for (a convolution's settings, say)"
        yield Problem("bank", name, found, _PUT_BACK)
    for module in place.passed_modules:
        if bank.site not in vars(module).get(PASSED_BY, ()):
            label = original_class(module).__name__
            found = f"a {label} between it and its activation function was exchanged after the operation"
            yield Problem("bank", name, found, _PUT_BACK)
    if change := place.path_change:
        yield Problem("bank", name, change, _PUT_BACK)


def _class_problems(discovery: Discovery) -> Iterator[Problem]:
    """The modules around a bank have the generated classes that apply it, and no others have one."""
    names = {module: name or "the model" for name, module in discovery.model.named_modules()}
    banked = banked_names(discovery)
    try:
        changes = [change for change in class_changes(discovery, banked) if isinstance(change, SetClass)]
    except SurgeryError as error:
        yield Problem("bank", "the model", f"its forwards cannot be read: {error}", _PUT_BACK)
        return
    wrong = [change.instance for change in changes if not _runs(change.instance, change.cls)]
    if not wrong:
        return
    sites = {site: programs_for(discovery, {site}, ()) for site in banked}
    for module in wrong:
        of = [site for site, programs in sites.items() if module in programs]
        if of:
            yield Problem(
                "bank",
                ", ".join(of),
                f"its bank has no effect, or another than it should: {names[module]!r} has the class "
                f"{_shown(type(module))}, not the one that applies the bank",
                "put back what stood there at the operation, or rebuild the model and surgery.restore its state dict",
            )
        elif not discovery.strays and (gone := _gone(module)):
            yield Problem(
                "bank",
                names[module],
                f"it is rewritten for a bank that is gone{gone}: the layer was replaced, with its composite units",
                "put the operated layer back; if its replacement is meant to be plain, any further operation tidies up",
            )


def _runs(module: nn.Module, wanted: type) -> bool:
    """Whether a module runs the program of a class, whatever other classes were put around the generated one."""
    program = vars(wanted).get("_neuronsurgery_program")
    if program is None:
        return original_class(module) is type(module)
    found = [cls for cls in type(module).__mro__ if vars(cls).get("_neuronsurgery_program") == program]
    return bool(found) and type(module).forward is found[0].forward  # type: ignore[attr-defined]


def _gone(module: nn.Module) -> str:
    """Which bank a module was rewritten for and cannot find, as the end of a phrase; "" where it is not so."""
    program = getattr(type(module), "_neuronsurgery_program", None)
    if program is None or program.role is Role.SEQUENTIAL or isinstance(module._modules.get("composite"), Composite):
        return ""
    if program.role is not Role.SCOPE:
        return " before it" if program.role is Role.PATH else " of its own"
    lost = [rewrite.bank for rewrite in program.rewrites if rewrite.bank is not None and not _has(module, rewrite.bank)]
    return "".join(f", '{bank}'" for bank in lost)


def _has(scope: nn.Module, path: str) -> bool:
    try:
        return isinstance(submodule(scope, path), Composite)
    except AttributeError:
        return False


def _shown(cls: type) -> str:
    has_program = getattr(cls, "_neuronsurgery_program", None) is not None
    return f"{cls.__qualname__} generated for other banks" if has_program else cls.__qualname__
