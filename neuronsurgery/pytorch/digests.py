"""Digests: whether processes hold the same, told by a few numbers instead of the tensors themselves.

A digest of a tensor is computed where it lies, bit by bit, and depends on the order of its elements. Two that differ
in any bit have the same digest once in 2^62 times.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.sharding import is_sharded
from neuronsurgery.pytorch.transaction import Change, Later, Overwrite, WriteRows

__all__ = ["digest_of_text", "digests_of", "structure_of", "weights_of"]

MOST = 2**62
CHUNK = 2**20
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def digest_of_text(text: str) -> int:
    """A number of a text, from 0 to below 2^62."""
    data = text.encode()
    return (zlib.crc32(data) << 30 ^ zlib.adler32(data)) % MOST


def structure_of(model: nn.Module) -> dict[str, int]:
    """By name, numbers of the shapes of parameters and of which rows each bank holds."""
    shapes = {name: digest_of_text(f"{tuple(p.shape)} {p.dtype}") for name, p in model.named_parameters()}
    banks = {name: bank for name, bank in model.named_modules() if isinstance(bank, Composite)}
    return shapes | {name: zlib.crc32(bank.rows.encoded().tobytes()) for name, bank in banks.items()}


def digests_of(model: nn.Module, log: Iterable[Sequence[Change]]) -> dict[str, int]:
    """By name, the digests of each bank's frozen rows and structure, and of what was written of parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    written = {f"rows of {names[id(tensor)]}": tensors for tensor, tensors in _written(log) if id(tensor) in names}
    return _digests({**_frozen(model), **written})


def weights_of(model: nn.Module) -> dict[str, int]:
    """By name, the digests of each bank and of each parameter."""
    whole = {name: [parameter] for name, parameter in model.named_parameters() if not is_sharded(parameter)}
    return _digests({**_frozen(model), **whole})


def _frozen(model: nn.Module) -> dict[str, list[Tensor]]:
    """Each bank's frozen rows in use, by name; running statistics follow what each process sees.

    Of sharded rows each process has its own part, and no two are to be the same.
    """
    return {
        name: [torch.from_numpy(bank.rows.encoded()), *bank.frozen().values()]
        for name, bank in model.named_modules()
        if isinstance(bank, Composite) and not bank.frozen_weight.is_meta
    }


def _written(log: Iterable[Sequence[Change]]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """The parameters that changes wrote to, with what they hold there now."""
    found: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for change in _flat(change for changes in log for change in changes):
        values = change.axes.take(change.tensor, change.rows) if isinstance(change, WriteRows) else change.tensor
        found.setdefault(id(change.tensor), (change.tensor, []))[1].append(values)
    yield from found.values()


def _flat(changes: Iterable[Change]) -> Iterator[WriteRows | Overwrite]:
    for change in changes:
        if isinstance(change, Later):
            yield from _flat(change.begun)
        elif isinstance(change, (WriteRows, Overwrite)) and isinstance(change.tensor, nn.Parameter):
            yield change


def _digests(tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, int]:
    """The digests of lists of tensors; each device is waited for once."""
    with torch.no_grad():
        parts = [(name, _digest(each)) for name, own in tensors.items() for each in own]
    found = dict.fromkeys(tensors, 0)
    if parts:
        numbers = torch.stack([part.cpu() for _, part in parts]).tolist()
        for (name, _), number in zip(parts, numbers, strict=True):
            found[name] = (found[name] * 1_000_003 + number) % MOST
    return found


def _digest(tensor: Tensor) -> Tensor:
    """A 0-d int64 tensor on the tensor's device."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    size = next(size for size in WORDS if len(data) % size == 0)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for index, part in enumerate(torch.split(data.view(WORDS[size]), CHUNK)):
        places = torch.arange(index * CHUNK, index * CHUNK + len(part), device=tensor.device)
        total += (part.long() * _factors(places)).sum()
    return total


def _factors(places: Tensor) -> Tensor:
    """An odd number for each place, as good as random: what differs in any bit makes a difference, as do exchanges."""
    mixed = (places + 1) * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return (mixed ^ (mixed >> 32)) | 1
