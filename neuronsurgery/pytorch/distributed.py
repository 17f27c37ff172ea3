"""Many processes that hold one model: whose replicas they are, and how an operation is done by all or by none.

`group_of(model)` finds the processes, from what wraps the model; a model that nothing wraps is this process's alone,
and nothing here ever communicates for it. `together(model)` opens a **session**, in which `vote`, `agreed`,
`agreed_number`, `same_rows` and `summed` exchange what has to be one. Without a session they hand back what they were
given, so that code calls them without asking.

No process waits for one that failed. Every exchange begins with a **vote**: one all-reduce of 48 bytes that says
whether anyone failed, whether all are at the same point, and whether they hold the same. A process that fails anywhere
in a session casts its next vote as a failure, and so all learn of it where they are. A transaction votes before its
first change, and a session at its end; until then everything can be taken back.
"""

from __future__ import annotations

import functools
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NoReturn, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuronsurgery.errors import DistributedError
from neuronsurgery.plans import Plan
from neuronsurgery.pytorch.digests import digest_of_text, digests_of, structure_of
from neuronsurgery.pytorch.exclusions import exclusions
from neuronsurgery.pytorch.fsdp import as_shards, require_reduced
from neuronsurgery.pytorch.models import Replicated, unwrap, wrappers_of
from neuronsurgery.pytorch.sharding import ASKED, is_sharded, mesh_of, own_share
from neuronsurgery.pytorch.transaction import Change, keeping, revert
from neuronsurgery.pytorch.unit_axes import UnitAxes
from neuronsurgery.values import FrozenMapping

__all__ = [
    "Session",
    "added",
    "agreed",
    "agreed_plan",
    "agreed_units",
    "agreed_number",
    "by_itself",
    "collected",
    "differing",
    "group_of",
    "is_one_of_many",
    "is_shared",
    "named",
    "replicated",
    "same_rows",
    "session",
    "summed",
    "taken",
    "together",
    "vote",
]

P = ParamSpec("P")
T = TypeVar("T")

NOTHING: Mapping[str, int] = FrozenMapping({})


# -- whose replicas --------------------------------------------------------------------------------------------------


def replicated(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Say that the processes of a group hold replicas of a model; see `neuronsurgery.surgery.replicated`."""
    if not (dist.is_available() and dist.is_initialized()):
        raise DistributedError(
            "replicated(model) names the processes of a group, and there is none: call it after "
            "torch.distributed.init_process_group, or operate on the model itself"
        )
    if dist.get_rank(group) < 0:
        raise DistributedError("this process is no member of the group; leave the operation to those that are")
    return Replicated(model, group)


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that hold a model together, by what wraps it; None: it is this process's alone."""
    for wrapper in wrappers_of(model):
        if isinstance(wrapper, (nn.parallel.DistributedDataParallel, Replicated)):
            group: dist.ProcessGroup | None = wrapper.process_group
            return group or dist.group.WORLD
    as_shards(unwrap(model))
    mesh = mesh_of(unwrap(model))
    return None if mesh is None else _processes_of(mesh)


def _processes_of(mesh: Any) -> dist.ProcessGroup:
    """The group of all processes of a mesh.

    Raises:
        DistributedError: torch has none.
    """
    if mesh.ndim == 1:
        return mesh.get_group()  # type: ignore[no-any-return]
    if mesh.size() == dist.get_world_size() and dist.group.WORLD is not None:
        return dist.group.WORLD
    raise DistributedError(
        f"the model's parameters are sharded over a mesh of {mesh.size()} processes with {mesh.ndim} axes, and others "
        "run beside them: there is no group of these processes alone. Give the mesh one axis, or all processes"
    )


def is_one_of_many(model: nn.Module) -> bool:
    """Whether other processes run that may hold replicas, and nothing says so of this model."""
    return group_of(model) is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# -- a session -------------------------------------------------------------------------------------------------------


class Session:
    """One operation of all processes of a group: what they exchange, and what is to be taken back if one fails."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.wrapped, self.model, self.group = model, unwrap(model), group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = _device(group, self.model)
        self.is_over = False
        self.is_quiet = False
        self.log: list[list[Change]] = []

    def vote(self, point: str, *, number: int = 0, alike: Mapping[str, int] = NOTHING) -> int:
        """See that all are here, unharmed and holding the same; returns the first process's number.

        `alike`: by name what has to be the same, as numbers or digests.

        Raises:
            DistributedError: a process failed, is elsewhere, or holds something else; on all of them.
        """
        agreed = self._cast(point, False, _digest_of(alike), number)
        if agreed is None:
            self._refuse({"point": point, "details": dict(alike)})
        return agreed

    def differing(self, point: str, held: Mapping[str, int]) -> dict[str, list[int]]:
        """What is not the same on all: its name, and the processes that hold another than the first."""
        if self._cast(point, False, _digest_of(held), 0) is not None:
            return {}
        own = {"point": point, "details": dict(held)}
        reports = self._gathered(own)
        if _failed(reports) or len({report["point"] for report in reports}) > 1:
            self.is_over = True
            raise DistributedError(_described(reports))
        return _differences(reports)

    def fail(self, error: BaseException) -> NoReturn:
        """Let all processes know that this one failed.

        Raises:
            DistributedError: the failures of all processes; where all failed alike, their own error.
        """
        self._cast("", True, 0, 0)
        self._refuse({"point": "", "details": {}, "error": type(error).__name__, "text": str(error)}, error)

    def broadcast(self, data: Tensor) -> Tensor:
        """The first process's tensor, in place."""
        self._guarded(lambda: dist.broadcast(data, group=self.group, group_src=0))
        return data

    def total(self, data: Tensor) -> Tensor:
        """The sum of all processes' tensors, in place."""
        self._guarded(lambda: dist.all_reduce(data, group=self.group))
        return data

    def close(self) -> None:
        """The end of what was done together: all processes hold the same, and nothing will be taken back."""
        for change in exclusions(self.wrapped) if self.log else ():
            self.keep([change])
            change.apply()
        self.vote("what was changed", alike=digests_of(self.model, self.log) if self.log else NOTHING)
        self.is_over = True
        self.log.clear()

    def take_back(self) -> None:
        """Take back what was changed in this session, newest first."""
        while self.log:
            revert(self.log.pop())

    # as `transaction.Keeper`

    def begin(self) -> None:
        """Before the first change of a transaction."""
        if not self.is_quiet:
            require_reduced(self.model)
            self.vote("before the first change")

    def keep(self, changes: list[Change]) -> None:
        """What a transaction changed, until the session is over."""
        self.log.append(changes)

    def _cast(self, point: str, failed: bool, digest: int, number: int) -> int | None:
        """One vote; None if it did not pass."""
        here = digest_of_text(point)
        lead = number if self.rank == 0 else -(2**62)
        ballot = torch.tensor([failed, here, -here, digest, -digest, lead], dtype=torch.int64, device=self.device)
        self._guarded(lambda: dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.group))
        has_failed, most, least, high, low, agreed = ballot.tolist()
        return None if has_failed or most != -least or high != -low else int(agreed)

    def _refuse(self, own: Mapping[str, Any], error: BaseException | None = None) -> NoReturn:
        """Say on all processes what was wrong on which of them; the session is over."""
        reports = self._gathered(own)
        self.is_over = True
        is_common = len({report.get("error") for report in reports}) == 1
        if error is not None and (is_common or not isinstance(error, Exception)):
            raise error
        raise DistributedError(_described(reports)) from error

    def _gathered(self, own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each process says, as JSON."""
        data = _encoded(own, self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        size = torch.tensor([len(data)], device=self.device)
        self._guarded(lambda: dist.all_gather(sizes, size, group=self.group))
        most = max(int(each) for each in sizes)
        room = [torch.zeros(most, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
        padded = torch.cat([data, data.new_zeros(most - len(data))])
        self._guarded(lambda: dist.all_gather(room, padded, group=self.group))
        return [_decoded(each[: int(size)]) for each, size in zip(room, sizes, strict=True)]

    def _guarded(self, exchange: Callable[[], object]) -> None:
        """Exchange something; whoever cannot be reached is none to vote with."""
        try:
            exchange()
        except Exception as error:
            self.is_over = True
            raise DistributedError(
                f"process {self.rank} of {self.size} lost touch with the others in the middle of an operation, which "
                f"was taken back here: {type(error).__name__}: {error}. Load the last checkpoint on all of them"
            ) from error


def _failed(reports: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    return {rank: report for rank, report in enumerate(reports) if "error" in report}


def _differences(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    details = [report["details"] for report in reports]
    names = dict.fromkeys(name for each in details for name in each)
    found = {name: [r for r, each in enumerate(details) if each.get(name) != details[0].get(name)] for name in names}
    return {name: ranks for name, ranks in found.items() if ranks}


def _described(reports: Sequence[Mapping[str, Any]]) -> str:
    """What was wrong on which process."""
    undone = "Nothing was changed on any process"
    if failed := _failed(reports):
        causes = "; ".join(f"process {rank}: {each['error']}: {each['text']}" for rank, each in failed.items())
        return f"the operation failed on {len(failed)} of {len(reports)} processes. {causes}. {undone}"
    points = [report["point"] for report in reports]
    if len(set(points)) > 1:
        where = "; ".join(f"process {rank} is at '{point}'" for rank, point in enumerate(points))
        return (
            f"the processes do not do the same: {where}. Call the same function with the same arguments on all of "
            f"them. {undone}"
        )
    found = [f"'{name}' on {named(ranks)}" for name, ranks in _differences(reports).items()]
    shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return (
        f"the processes do not agree on {points[0]}. Other than on process 0 are {shown}. Where models differ, load "
        f"one state on all of them (surgery.restore); where arguments do, pass the same. {undone}"
    )


def named(ranks: Sequence[int]) -> str:
    """Some processes, as text."""
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _digest_of(held: Mapping[str, int]) -> int:
    return digest_of_text(json.dumps(held)) if held else 0


def _device(group: dist.ProcessGroup, model: nn.Module) -> torch.device:
    """Where the group exchanges: on the CPU if it can, so that nothing waits for an accelerator."""
    kinds = {device.type for device in group._device_types}
    if "cpu" in kinds:
        return torch.device("cpu")
    own = next((p.device for p in model.parameters() if p.device.type in kinds), None)
    return own or torch.device(next(iter(kinds)), torch.accelerator.current_device_index())


def _encoded(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _decoded(data: Tensor) -> Any:
    return json.loads(bytes(data.cpu().numpy().tobytes()).decode())


_SESSION: ContextVar[Session | None] = ContextVar("neuronsurgery_session", default=None)


def session() -> Session | None:
    """The session that is open, if one is."""
    return _SESSION.get()


def is_shared(model: nn.Module) -> bool:
    """Whether what is done to a model now concerns other processes: those that hold it, or those of an open session."""
    return _SESSION.get() is not None or group_of(model) is not None


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Let what is done to a model in this block be done by all processes that hold it, or by none.

    A block inside another one of the same model is part of it. A model that nothing wraps is left to its process.

    Raises:
        DistributedError: the block failed on a process, or would have left the processes with different models; on all
            of them, and what was changed is taken back. Where all failed alike, their own error.
    """
    outer = _SESSION.get()
    if outer is not None and outer.model is unwrap(model):
        yield
        return
    group = group_of(model)
    found = None if group is None else Session(model, group)
    token, asked = _SESSION.set(found), ASKED.set(None if found is None else found.vote)
    try:
        with keeping(found):
            if found is None:
                yield
            else:
                with _ended_together(found):
                    yield
    finally:
        ASKED.reset(asked)
        _SESSION.reset(token)


@contextmanager
def _ended_together(found: Session) -> Iterator[None]:
    """End a session on all processes, or take it back on all."""
    try:
        yield
        found.close()
    except BaseException as error:
        found.take_back()
        if not found.is_over:
            found.fail(error)
        raise


def by_itself(function: Callable[P, T]) -> Callable[P, T]:
    """A function that a process may do alone, also in a session: it asks no one, and is taken back with the session."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        found = _SESSION.get()
        if found is None or found.is_quiet:
            return function(*args, **kwargs)
        token = _SESSION.set(None)
        found.is_quiet = True
        try:
            return function(*args, **kwargs)
        finally:
            found.is_quiet = False
            _SESSION.reset(token)

    return wrapped


# -- what is exchanged -----------------------------------------------------------------------------------------------


def vote(point: str, alike: Mapping[str, int] = NOTHING) -> None:
    """See that all processes got to this point, and hold the same: numbers or digests, by name."""
    if (found := _SESSION.get()) is not None:
        found.vote(point, alike=alike)


def differing(point: str, held: Mapping[str, int]) -> dict[str, list[int]]:
    """What is not the same on all processes: its name, and those that hold another than the first."""
    found = _SESSION.get()
    return {} if found is None else found.differing(point, held)


def agreed_number(point: str, number: int) -> int:
    """The first process's number, from 0 to below 2^63."""
    found = _SESSION.get()
    return number if found is None else found.vote(point, number=number)


def agreed(point: str, value: T, alike: Mapping[str, int] = NOTHING) -> T:
    """The first process's value: lists, dictionaries with keys of text, numbers and text; `alike` as of `vote`."""
    found = _SESSION.get()
    if found is None:
        return value
    data = _encoded(value, found.device)
    size = found.vote(point, number=len(data), alike=alike)
    shared = found.broadcast(data if found.rank == 0 else data.new_empty(size))
    return value if found.rank == 0 else _decoded(shared)


def agreed_units(
    point: str, units: Mapping[str, Sequence[int]], alike: Mapping[str, int] = NOTHING
) -> dict[str, tuple[int, ...]]:
    """The units that the first process chose, by site; as many bytes for each, wherever it is in its layer."""
    packed = {name: b64encode(np.array(own, "<u4").tobytes()).decode() for name, own in units.items()}
    shared = agreed(point, packed, alike)
    return {name: tuple(np.frombuffer(b64decode(own), "<u4").tolist()) for name, own in shared.items()}


def agreed_plan(plan: Plan, **options: int) -> Plan:
    """The first process's plan; the model's structure and the options, numbers, have to be the same on all."""
    found = _SESSION.get()
    if found is None:
        return plan
    alike = {**structure_of(found.model), "max_growth=": digest_of_text(str(plan.max_growth))}
    alike |= {f"{name}=": value for name, value in options.items()}
    units = agreed_units("the plan", plan.units, alike)
    if units == dict(plan.units):
        return plan
    note = "the units are those that process 0 chose: what was measured here alone said otherwise"
    return replace(plan, units=units, notes=(*plan.notes, note))


def same_rows(point: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The first process's tensors, in one broadcast; all processes have as many, of the same shapes and dtypes."""
    found = _SESSION.get()
    if found is None or not any(each is not None for each in tensors):
        return list(tensors)
    found.vote(point, alike=_shapes(tensors))
    parts = [_bytes_of(each) for each in tensors if each is not None]
    shared = iter(torch.split(found.broadcast(torch.cat(parts).to(found.device)), [len(part) for part in parts]))
    return [None if each is None else _like(each, next(shared)) for each in tensors]


def summed(point: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all processes, in float64, in one all-reduce; all have as many tensors, of the same shapes."""
    found = _SESSION.get()
    if found is None or not tensors:
        return [each.double() for each in tensors]
    found.vote(point, alike=_shapes(tensors))
    packed = torch.cat([each.detach().double().reshape(-1).to(found.device) for each in tensors])
    found.total(packed)
    parts = torch.split(packed, [each.numel() for each in tensors])
    return [part.reshape(each.shape).to(each.device) for part, each in zip(parts, tensors, strict=True)]


def taken(point: str, tensor: Tensor, units: Tensor, axes: UnitAxes) -> Tensor:
    """The rows of some units of a tensor, (r, *row_shape); all processes have those of a sharded one, at their cost."""
    if not is_sharded(tensor):
        return axes.take(tensor.detach(), units)
    return collected(point, [own_share(tensor, units, axes)], tensor)[0]


def collected(point: str, shares: Sequence[Tensor], like: Any) -> list[Tensor]:
    """Tensors of which each process has a part and zeros elsewhere, whole and bit for bit, in one all-reduce.

    `like`: a sharded tensor of the model, for its processes where no session is open.
    """
    found = _SESSION.get()
    data = torch.cat([_bytes_of(each) for each in shares])
    if found is not None:
        found.vote(point, alike=_shapes(shares))
        data = found.total(data.to(found.device))
    else:
        dist.all_reduce(data, group=_processes_of(like.device_mesh))
    parts = torch.split(data, [each.numel() * each.element_size() for each in shares])
    return [_like(each, part) for each, part in zip(shares, parts, strict=True)]


def added(point: str, tensors: Sequence[Tensor], like: Any) -> list[Tensor]:
    """The sums over all processes of tensors of one dtype, in one all-reduce; `like` as of `collected`."""
    found = _SESSION.get()
    packed = torch.cat([each.reshape(-1) for each in tensors])
    if found is not None:
        found.vote(point, alike=_shapes(tensors))
        packed = found.total(packed.to(found.device)).to(packed.device)
    else:
        dist.all_reduce(packed, group=_processes_of(like.device_mesh))
    parts = torch.split(packed, [each.numel() for each in tensors])
    return [part.reshape(each.shape) for part, each in zip(parts, tensors, strict=True)]


def _shapes(tensors: Sequence[Tensor | None]) -> dict[str, int]:
    described = [None if each is None else (tuple(each.shape), str(each.dtype)) for each in tensors]
    return {"shapes": digest_of_text(str(described))}


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _like(tensor: Tensor, data: Tensor) -> Tensor:
    """Bytes as a tensor of the same shape, dtype and device as another."""
    return data.clone().view(tensor.dtype).reshape(tensor.shape).to(tensor.device)
