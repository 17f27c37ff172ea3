"""What a forward takes and returns: structures of every kind come back with their type, and choose a graph each."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery

OPERATED = surgery.Units({"fc": [0, 1, 2]})


@dataclasses.dataclass
class Batch:
    x: Tensor
    mask: Tensor | None = None
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    mask: Tensor | None = None
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Slotted:
    __slots__ = ("mask", "scale", "x")
    x: Tensor
    mask: Any
    scale: Any


@dataclasses.dataclass
class Nested:
    batch: Batch
    more: list[Frozen]


@dataclasses.dataclass
class Counted:
    """Its constructor computes, so that a second run of it would show."""

    y: Tensor
    doubled: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.y = self.y + 1
        self.doubled = self.y * 2


class Output(collections.OrderedDict):  # type: ignore[type-arg]
    """An ordered dictionary whose items are its dataclass fields, as model libraries return."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("items are set through attributes")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@dataclasses.dataclass
class HeadOutput(Output):
    logits: Any = None
    hidden: Any = None
    loss: Any = None


class Pair(NamedTuple):
    first: Any
    second: Any = None


class Mode(enum.Enum):
    SUM = 1
    MEAN = 2


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def compute(self, x: Tensor, mask: Any = None, scale: Any = 1.0) -> Any:
        h = F.relu(self.fc(x)) * scale
        return self.out(h if mask is None else h * mask)


def x() -> Tensor:
    return torch.linspace(-1.0, 1.0, 20).view(5, 4)


MASK = torch.arange(6.0)


class TakesBatch(Hidden):
    def forward(self, batch: Any) -> Any:
        if isinstance(batch, Nested):
            given: list[Any] = [batch.batch, *batch.more]
            parts = [self.compute(each.x, each.mask, each.scale) for each in given]
            return dataclasses.replace(batch.batch, x=sum(parts[1:], parts[0]))
        return self.compute(batch.x, batch.mask, batch.scale)


class TakesOutput(Hidden):
    def forward(self, x, given=None):
        if given is None:
            return self.compute(x)
        y = self.compute(given.logits, given["hidden"] if len(given) > 1 else None)
        return y + given[0].sum() + len(given)


class ReturnsAll(Hidden):
    def forward(self, x, kind="plain"):
        y = self.compute(x)
        if kind == "model output":
            return HeadOutput(logits=y, hidden=(y * 2, [y]))
        if kind == "counted":
            return Counted(y)
        if kind == "nested":
            return Nested(Batch(y, scale=2.0), [Frozen(y, mask=y * 0)])
        if kind == "named":
            return Pair(y, {"inner": Pair(Batch(y))})
        if kind == "ordered":
            return collections.OrderedDict(b=y, a=None)
        return Batch(y) if kind == "plain" else None


class Kinds(Hidden):
    def forward(self, x, /, mask=None, *rest, scale=1.0, mode=Mode.SUM, **more):
        y = self.compute(x, mask, scale)
        for value in (*rest, *more.values()):
            y = y + value
        return (y.sum() if mode is Mode.SUM else y.mean()), sorted(more)


STRUCTURES: list[Any] = [Batch, Frozen, Slotted]
CALLS: dict[str, tuple[type[Hidden], list[tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "dataclasses": (
        TakesBatch,
        [
            *(((kind(x(), mask, scale),), {}) for kind in STRUCTURES for mask in (None, MASK)
              for scale in (1.0, 2)),
            ((), {"batch": Frozen(x())}),
            ((Nested(Batch(x()), [Frozen(2 * x(), MASK), Frozen(x())]),), {}),
            ((Nested(Batch(x()), []),), {}),
        ],
    ),
    "model outputs": (
        TakesOutput,
        [((x(), given), {}) for given in (None, HeadOutput(x()), HeadOutput(x(), hidden=MASK))],
    ),
    "returns": (
        ReturnsAll,
        [((x(), kind), {}) for kind in ("plain", "model output", "counted", "nested", "named", "ordered", "none")],
    ),
    "kinds of parameters": (
        Kinds,
        [
            ((x(),), {}),
            ((x(), MASK), {}),
            ((x(),), {"mask": MASK, "scale": 2.0}),
            ((x(), None, torch.ones(2), 3.0), {}),
            ((x(), MASK, torch.ones(2)), {"a": torch.ones(2), "b": 2}),
            ((x(),), {"x": torch.ones(2), "mode": Mode.MEAN}),
        ],
    ),
}  # fmt: skip


def alike(old: Any, new: Any) -> bool:
    if type(old) is not type(new):
        return False
    if isinstance(old, Tensor):
        return old.shape == new.shape and torch.allclose(old, new, atol=1e-5)
    if dataclasses.is_dataclass(old):
        same = all(alike(getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(old))
        return same and (not isinstance(old, dict) or alike(list(old.items()), list(new.items())))
    if isinstance(old, dict):
        return list(old) == list(new) and all(alike(old[key], new[key]) for key in old)
    if isinstance(old, (tuple, list)):
        return len(old) == len(new) and all(map(alike, old, new))
    return bool(old == new)


@pytest.mark.parametrize("name", CALLS)
def test_structures_keep_type_and_values_with_one_graph_for_each_kind_of_call(name):
    cls, calls = CALLS[name]
    model = cls()
    operated = copy.deepcopy(model)
    report = surgery.knife(operated, OPERATED)
    assert report.num_units == 3, report
    with torch.no_grad():
        for each in (model, operated):
            each.fc.weight[3:].add_(0.5)
    for args, kwargs in calls:
        old, new = model(*args, **kwargs), operated(*args, **kwargs)
        assert alike(old, new), (old, new)
    entry = type(operated)._neuronsurgery_entries["forward"]  # type: ignore[attr-defined]
    num_graphs = sum(map(len, entry.graphs.values()))
    for args, kwargs in calls * 2:
        operated(*args, **kwargs)
    assert sum(map(len, entry.graphs.values())) == num_graphs <= len(calls) + 1


def test_outputs_that_differ_are_not_alike():
    assert alike(Batch(x()), Batch(x())) and alike(HeadOutput(x()), HeadOutput(x()))
    for other in (Frozen(x()), Batch(x() + 1), Batch(x(), MASK), Batch(x(), scale=2.0)):
        assert not alike(Batch(x()), other)
    assert not alike(HeadOutput(x()), HeadOutput(x(), hidden=MASK))


@pytest.mark.parametrize(
    "write",
    [
        lambda batch: setattr(batch, "scale", 2.0),
        lambda batch: setattr(batch, "extra", 2.0),
        lambda batch: object.__setattr__(batch, "mask", 1.0),
    ],
    ids=["field", "extra", "around"],
)
def test_a_forward_that_writes_into_a_dataclass_it_was_given_is_refused(write):
    class Writes(Hidden):
        def forward(self, x, batch=None):
            if batch is not None:
                write(batch)
            return self.compute(x)

    model = Writes()
    surgery.knife(model, OPERATED)
    batch = Batch(x())
    with pytest.raises(surgery.UntraceableError, match="writes into 'batch'"):
        model(x(), batch)
    assert vars(batch).keys() == {"x", "mask", "scale"} and batch.scale == 1.0


def test_constants_that_are_equal_and_of_other_types_are_other_calls():
    class Constant(Hidden):
        def forward(self, x, flag=True):
            return self.compute(x) * (2 if isinstance(flag, bool) else 3 if isinstance(flag, int) else 5)

    model = Constant()
    operated = copy.deepcopy(model)
    surgery.knife(operated, OPERATED)
    for flag in (True, 1, 1.0, 0, False, 0.0, True):
        assert torch.allclose(model(x(), flag), operated(x(), flag), atol=1e-5), flag
