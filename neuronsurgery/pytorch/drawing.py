"""Fresh weights for active members: what the layer's own initializer would give, without touching any random state."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.errors import DrawError
from neuronsurgery.pytorch.mirroring import original_class
from neuronsurgery.pytorch.models import random_states_kept
from neuronsurgery.pytorch.places import Place

__all__ = ["Init", "check_drawing", "draw", "seed_for"]

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
    """The seed of an operation: drawn from `generator`, else from `torch.initial_seed()` and the operation's number."""
    if generator is None:
        return (torch.initial_seed() * 1_000_003 + operation) % 2**63
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


def draw(place: Place, rows: Tensor, init: Init | None, seed: int) -> tuple[list[Tensor | None], str]:
    """Fresh rows for each of the place's renewed parameters, and how they were drawn if not by the layer's own rule.

    Args:
        place: the site.
        rows: unit indices, (num_rows,).
        init: fills a weight of the producer's whole shape in place, as the functions of `torch.nn.init` do; biases are
            then zero. None for the class's own `reset_parameters`.
        seed: what the draw depends on, together with the site's name.

    Returns:
        For weight, bias and slopes (num_rows, ...) tensors, None where the place has no such parameter of its own; a
        note for the report, "" when the layer's class drew.
    """
    with _seeded((seed + zlib.crc32(place.site.name.encode())) % 2**63, place.weight.device):
        weight, bias, note = _whole_layer(place, init)
    slopes = [None if p is None else _slope(place, p, rows) for p in place.renewed[2:]]
    drawn = [weight.index_select(0, rows), None if bias is None else bias.index_select(0, rows), *slopes]
    return drawn, note


def _whole_layer(place: Place, init: Init | None) -> tuple[Tensor, Tensor | None, str]:
    weight = torch.full_like(place.weight, torch.nan, requires_grad=False)
    bias = None if place.bias is None else torch.zeros_like(place.bias, requires_grad=False)
    owner = place.owners[0][0]
    with torch.no_grad():
        if init is not None:
            init(weight)
            if not bool(weight.isfinite().all()):
                raise DrawError(
                    f"init= left values that are not finite in the weight of {place.site.name!r}: it must fill all of "
                    "the tensor it gets in place, as torch.nn.init.xavier_uniform_ does; what it returns is not used"
                )
            return weight, bias, ""
        if place.owners[0][1] == "composite" and callable(getattr(owner, "reset_parameters", None)):
            scratch = _scratch(owner)
            scratch.reset_parameters()
            return scratch.weight.detach(), None if bias is None else scratch.bias.detach(), ""
        values = place.weight.detach().float()
        std = float(values.std() if values.numel() > 1 else values.abs())
        return (
            weight.normal_(0.0, std),
            bias,
            f"{place.site.name}: no initializer of its own; drew normal(0, {std:.3g})",
        )


def _scratch(module: nn.Module) -> Any:
    """A module of the same class and settings with uninitialized parameters of its own, without hooks or banks."""
    scratch: Any = object.__new__(original_class(module))
    scratch.__dict__.update(module.__dict__)
    parameters = {n: p if p is None else nn.Parameter(torch.empty_like(p)) for n, p in module._parameters.items()}
    scratch.__dict__.update(_parameters=parameters, _modules={}, _buffers=dict(module._buffers))
    return scratch


def _slope(place: Place, parameter: nn.Parameter, rows: Tensor) -> Tensor:
    """A PReLU slope starts at torch's default, 0.25; it is no random number."""
    return torch.full((len(rows),), 0.25, dtype=parameter.dtype, device=parameter.device)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with random_states_kept(devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every accelerator as well
        for each in devices:
            torch.cuda.default_generators[each.index].manual_seed(seed)
        yield
