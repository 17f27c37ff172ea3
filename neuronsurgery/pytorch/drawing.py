"""Fresh weights for active members: what the layer's own initializer would give, without touching any random state."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.errors import DrawError
from neuronsurgery.pytorch.distributed import agreed_number, same_rows
from neuronsurgery.pytorch.drawing_computed import fresh_sources
from neuronsurgery.pytorch.mirroring import original_class
from neuronsurgery.pytorch.models import random_states_kept
from neuronsurgery.pytorch.places import Place, Slots
from neuronsurgery.pytorch.reading import is_torch
from neuronsurgery.pytorch.sharding import is_sharded
from neuronsurgery.pytorch.transaction import Call, keep

__all__ = [
    "Drawn",
    "Init",
    "check_drawing",
    "draw",
    "drawn_alike",
    "generator_kept",
    "own_seed",
    "scratch_of",
    "seed_for",
    "seeded",
]

Init = Callable[[Tensor], object]


def check_drawing(init: Any, generator: Any) -> None:
    """Refuse what cannot draw.

    Raises:
        DrawError: `init` is no function, or `generator` no `torch.Generator`.
    """
    if init is not None and not callable(init):
        raise DrawError(
            f"init= takes a function that fills a weight in place, such as torch.nn.init.xavier_uniform_; found "
            f"{type(init).__name__} {init!r}"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise DrawError(
            f"generator= takes a torch.Generator, found {type(generator).__name__} {generator!r}; for a seed, "
            "pass torch.Generator().manual_seed(seed)"
        )


def seed_for(generator: torch.Generator | None, operation: int) -> int:
    """The seed of an operation: drawn from `generator`, else from `torch.initial_seed()` and the operation's number.

    Of a model that several processes hold it is the first one's; each advances its generator.
    """
    return agreed_number("the seed", own_seed(generator, operation))


def own_seed(generator: torch.Generator | None, operation: int) -> int:
    """As `seed_for`, of this process alone."""
    if generator is None:
        return (torch.initial_seed() * 1_000_003 + operation) % 2**63
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


@contextmanager
def generator_kept(generator: torch.Generator | None) -> Iterator[None]:
    """An operation that fails leaves the generator as it was."""
    if generator is None:
        yield
        return
    kept = Call(functools.partial(generator.set_state, generator.get_state()))
    keep(kept)
    try:
        yield
    except BaseException:
        kept.revert()
        raise


@dataclass(frozen=True, eq=False)
class Drawn:
    """Fresh rows of one site's units, for each of its slots as of `draw`, and how they were drawn."""

    place: Place
    units: Tensor
    fresh: list[Tensor | None]
    notes: tuple[str, ...]


def drawn_alike(chosen: Sequence[tuple[Place, Tensor]], init: Init | None, seed: int) -> list[Drawn]:
    """Fresh rows for the units of each site; of a model that several processes hold the first one's, bit for bit."""
    drawn = [Drawn(place, units, *draw(place, units, init, seed)) for place, units in chosen]
    shared = iter(same_rows("the fresh rows", [rows for each in drawn for rows in each.fresh]))
    return [replace(each, fresh=[next(shared) for _ in each.fresh]) for each in drawn]


def draw(place: Place, units: Tensor, init: Init | None, seed: int) -> tuple[list[Tensor | None], tuple[str, ...]]:
    """Fresh rows for each of the place's slots, and how they were drawn if not by the layer's own rule.

    Args:
        place: the site.
        units: unit indices, (num_units,).
        init: fills a weight of the producer's whole shape in place, as the functions of `torch.nn.init` do; biases are
            then zero. None for the class's own `reset_parameters`.
        seed: what the draw depends on, together with the site's name.

    Returns:
        For each of `place.slots` (num_units, ...), None where there are none, or none that an operation renews; notes
        for the report.
    """
    with seeded((seed + zlib.crc32(place.site.name.encode())) % 2**63, place.weight.device), torch.no_grad():
        names = place.buffer_names
        if place.computed:
            wholes, note = fresh_sources(place, init)
            _check_filled(place, wholes[names[0]])
        else:
            weight, bias, note = _whole_layer(place, init)
            wholes = {name: whole for name, whole in zip(names, (weight, bias), strict=False) if whole is not None}
        pairs = zip(names, place.slots, strict=True)
        fresh = [wholes[name] if name in wholes else _path_tensor(slots) for name, slots in pairs]
    rows = [
        None if slots is None or whole is None or not slots.is_renewed else replace(slots, tensor=whole).take(units)
        for slots, whole in zip(place.slots, fresh, strict=True)
    ]
    return rows, (note,) if note else ()


def _whole_layer(place: Place, init: Init | None) -> tuple[Tensor, Tensor | None, str]:
    weight = empty_like(place.weight).fill_(torch.nan)
    bias = None if place.slots[1] is None else empty_like(place.slots[1].tensor).zero_()
    owner = place.owners[0][0]
    if init is not None:
        init(weight)
        _check_filled(place, weight)
        return weight, bias, ""
    if place.owners[0][1] == "composite" and callable(getattr(owner, "reset_parameters", None)):
        scratch = scratch_of(owner)
        scratch.reset_parameters()
        return scratch.weight.detach(), None if bias is None else scratch.bias.detach(), ""
    assert place.slots[0] is not None, "a place has a weight"
    values = place.slots[0].rows().float()
    std = float(values.std() if values.numel() > 1 else values.abs())
    return weight.normal_(0.0, std), bias, f"{place.site.name}: no initializer of its own; drew normal(0, {std:.3g})"


def _check_filled(place: Place, weight: Tensor) -> None:
    if not bool(weight.isfinite().all()):
        raise DrawError(
            f"init= left values that are not finite in the weight of {place.site.name!r}: it must fill all of "
            "the tensor it gets in place, as torch.nn.init.xavier_uniform_ does; what it returns is not used"
        )


def _path_tensor(slots: Slots | None) -> Tensor | None:
    """A fresh tensor of a path: as its module's own initializer makes it.

    Without one, what it adds is zero, and by what it scales is the layer's mean.
    """
    if slots is None or not slots.is_renewed:
        return None
    if is_torch(slots.owner) and callable(getattr(slots.owner, "reset_parameters", None)):
        scratch = scratch_of(slots.owner)
        scratch.reset_parameters()
        return getattr(scratch, slots.attribute).detach()  # type: ignore[no-any-return]
    fill = float(slots.rows().float().mean()) if slots.fresh is None else slots.fresh
    return empty_like(slots.tensor).fill_(fill)


def scratch_of(module: nn.Module) -> Any:
    """A module of the same class and settings with uninitialized parameters of its own, without hooks or banks."""
    scratch: Any = object.__new__(original_class(module))
    scratch.__dict__.update(module.__dict__)
    parameters = {n: p if p is None else nn.Parameter(empty_like(p)) for n, p in module._parameters.items()}
    buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    scratch.__dict__.update(_parameters=parameters, _modules={}, _buffers=buffers)
    return scratch


def empty_like(tensor: Tensor) -> Tensor:
    """An uninitialized tensor of the same shape, all of it here: what is drawn does not depend on how it is sharded."""
    if is_sharded(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.empty_like(tensor, requires_grad=False)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw by a seed on the host and this device; all random states are put back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with random_states_kept(devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every accelerator as well
        for each in devices:
            torch.cuda.default_generators[each.index].manual_seed(seed)
        yield
