"""The bank: the frozen members of a site, stacked row by row, and the sum that makes them composite units.

A bank is a child module of its producer and holds buffers only, so nothing that walks parameters can move a frozen
member. It receives the producer's own input, and replaces the activations of operated units by their composites:
`forward` gives the rows' pre-activations, `passed` takes them along the path, `assemble` sums them in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neuronsurgery.composites import Layout, Rows, room_for
from neuronsurgery.errors import StateError, SurgeryError
from neuronsurgery.pytorch.computing import FIRST_NAMES, Compute, Recipe
from neuronsurgery.pytorch.links import BatchNorm, Coupling, Link, Move, Norm, SyncBatchNorm, is_statistic
from neuronsurgery.pytorch.products import Contraction, Product
from neuronsurgery.pytorch.sharding import copied, gathered, held, is_sharded, is_spread, shard_of, sharded_rows, whole
from neuronsurgery.pytorch.stacking import check_stacked
from neuronsurgery.pytorch.step_hooks import Clock
from neuronsurgery.pytorch.structure import Structure, agrees, decoded
from neuronsurgery.pytorch.unitwise import Kind, along, laid_out_as

__all__ = ["PASSED_BY", "Composite", "UnitPath", "check_in_place", "frozen_names", "shard_rows"]


@dataclass(frozen=True)
class UnitPath:
    """What a producer's pre-activations pass on the way out, link by link; the last link is the activation function.

    `classes` names for each link the class of the module that it is, "" for a function.
    """

    links: tuple[Link, ...]
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The activation function."""
        return self.links[-1].name

    @property
    def kind(self) -> Kind:
        """Whether the activation function may become composites anywhere."""
        return self.links[-1].kind

    @property
    def tensors(self) -> tuple[str, ...]:
        """The labels of all links' own tensors, in order."""
        return tuple(label for link in self.links for label in link.tensors)

    def span(self, index: int) -> slice:
        """Which of `tensors` belong to a link."""
        first = sum(len(link.tensors) for link in self.links[:index])
        return slice(first, first + len(self.links[index].tensors))

    def num_axes(self, start: int) -> int:
        """How many axes a pre-activation may have to pass, its units on `start`: the fewest with a batch axis."""
        moves = [link.num_axes for link in self.links if isinstance(link, Move)]
        least = max([2, -start, *moves, *(len(link.sizes) + 1 for link in self.links if isinstance(link, Norm))])
        return next((n for n in range(least, least + 4) if self._is_on_one(start, n)), least)

    def _is_on_one(self, start: int, num_axes: int) -> bool:
        """Whether the units are on axis 1 wherever a norm takes them to be."""
        return all(
            self.axis(index, start, num_axes) == 1 - num_axes
            for index, link in enumerate(self.links)
            if isinstance(link, BatchNorm) or (isinstance(link, Norm) and link.name == "group_norm")
        )

    def sizes(self, num_axes: int) -> dict[int, int]:
        """The sizes that a pre-activation of so many axes must have to pass, by axis counted from the end."""
        places, found = list(range(-num_axes, 0)), dict[int, int]()
        for link in self.links:
            if isinstance(link, Norm):
                last = places[-len(link.sizes) :] if link.sizes else []
                found |= dict(zip(last, link.sizes, strict=True))
            if isinstance(link, Move):
                moved = {link.axis_after(axis, num_axes): place for axis, place in enumerate(places, -num_axes)}
                places = [moved[axis] for axis in range(-num_axes, 0)]
        return found

    def axis(self, index: int, start: int, num_axes: int) -> int:
        """Where the units are as a link is entered, counted from the end."""
        for link in self.links[:index]:
            start = link.axis_after(start, num_axes)
        return start

    def unit_axes(self, product: Product, num_axes: int) -> tuple[int, ...]:
        """Where the units of a product are in its activations of so many axes, counted from the end."""
        if product.is_stacked:
            return product.unit_axes
        return (self.axis(len(self.links), product.unit_axes[0], num_axes),)


PASSED_BY = "_neuronsurgery_passed_by"
"""The attribute of a module on a path that names the sites whose banks hold copies of its tensors."""


def check_in_place(bank: Composite, module: nn.Module) -> None:
    """See that a module on the path is the one whose tensors the bank's rows have copies of.

    Raises:
        SurgeryError: it was exchanged after the operation.
    """
    if bank.site not in module.__dict__.get(PASSED_BY, ()):
        raise SurgeryError(
            f"a {type(module).__name__} between the producer {bank.site!r} and its activation function was exchanged "
            "after the operation, and the bank's rows pass the one that was there; undo the operation before you "
            "exchange it"
        )


def frozen_names(path: UnitPath, extras: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of a bank's buffers with one value a row: weights, biases, the path's own tensors, and the extras.

    Not `weight` and `bias`: functions that walk all modules and initialize whatever has a weight must pass it by.
    Running statistics are not frozen: they follow what their row sees.
    """
    labels = enumerate(path.tensors)
    tensors = (f"running_path_{i}" if is_statistic(label) else f"frozen_path_{i}" for i, label in labels)
    return (*FIRST_NAMES, *tensors, *extras)


def _table(name: str) -> Any:
    """A gather table of a bank, an attribute in two versions: one that may grow, to compile, and one to export."""

    def read(bank: Composite) -> Tensor | None:
        return (bank.fixed_tables if torch.compiler.is_exporting() else bank.growing_tables)[name]

    def write(bank: Composite, value: Tensor | None) -> None:
        bank.fixed_tables[name] = value
        bank.growing_tables[name] = _let_grow(None if value is None else value.detach(), *_GROWING_AXES[name])

    return property(read, write)


_GROWING_AXES: dict[str, tuple[int, ...]] = {
    "order": (0, 1),
    "source": (),
    "units": (0,),
    "reference": (),
    "references": (0,),
    "own": (0,),
}


class Composite(nn.Module):
    """The bank of one producer: frozen rows, their structure, and the sum into composite units.

    Buffers: `frozen_weight` (capacity, *row_shape), `frozen_bias` (capacity,) where the producer has one, and for the
    path's own tensors `frozen_path_<i>` (capacity, ...), copies of parameters, and `running_path_<i>`, statistics that
    each row keeps. Where a producer computes its weight from several parameters, `frozen_weight` is the first of them,
    and each other has a `frozen_<name>` (capacity, *its_row_shape). Unused rows repeat the first and are never read.
    `fade` (capacity,) float is what rows that retire are multiplied by, None where none does; it falls with each step.
    `fingerprint` (4,) float32 is not saved: stacked with those of other models it tells whether they are summed alike.
    """

    frozen_weight: Tensor
    frozen_bias: Tensor | None
    fade: Tensor | None
    fingerprint: Tensor
    order = _table("order")
    source = _table("source")
    units = _table("units")
    reference = _table("reference")
    references = _table("references")
    own = _table("own")

    def __init__(
        self,
        product: Product,
        path: UnitPath,
        num_units: int,
        rows: Rows,
        values: Sequence[Tensor | None],
        recipe: Recipe | None = None,
        fade: Tensor | None = None,
    ):
        super().__init__()
        self.product, self.path, self.num_units = product, path, num_units
        self.rows, self.recipe = rows, recipe
        self.site = ""
        self.clocks: tuple[Clock | None, ...] = ()  # what its births are counted by, where no optimizer does
        self.growing_tables: dict[str, Tensor | None] = {}
        self.fixed_tables: dict[str, Tensor | None] = {}
        self.split: tuple[int, int] | None = None  # the units that this process computes, where it does not all
        self._gathered_rows: tuple[Any, int, Tensor | None, Tensor] | None = None
        room = next((len(v) for v in values if v is not None and is_sharded(v)), room_for(len(rows), num_units))
        for name, value in zip(self.buffer_names(), values, strict=True):
            self.register_buffer(name, value if value is None or is_sharded(value) else _padded(value, room))
        self.register_buffer("fade", None)
        self._fade_as(rows, fade)
        self._tabulate()

    def _fade_as(self, rows: Rows, fade: Tensor | None = None) -> None:
        """Have a fade where rows can fade, and none elsewhere; `fade` (num_rows,) is that of now, None: not begun."""
        if not rows.can_fade:
            self.fade = None
        elif fade is not None:
            self.fade = _padded(fade, len(self.frozen_weight))
        elif self.fade is None or len(self.fade) != len(self.frozen_weight):
            self.fade = torch.ones(len(self.frozen_weight), device=self.frozen_weight.device)

    def live_fade(self) -> Tensor:
        """What the rows in use are multiplied by, (num_rows,): ones where none retires."""
        if self.fade is None:
            return torch.ones(len(self.rows), device=self.frozen_weight.device)
        return self.fade[: len(self.rows)]

    def buffer_names(self) -> tuple[str, ...]:
        """The buffers with one value a row: weight, bias, the path's parameters, and what else weights come from."""
        return frozen_names(self.path, () if self.recipe is None else self.recipe.names)

    def tables(self, rows: Rows) -> dict[str, Tensor | None]:
        """The gather tables for these rows, on the bank's device; on the CPU where the bank has no storage."""
        own: NDArray[np.int64] | None = None
        if self.split is not None:
            own = np.flatnonzero((rows.unit >= self.split[0]) & (rows.unit < self.split[1]))
            rows = rows.of_units(*self.split)
        layout = Layout.of(rows, self.num_here) if len(rows) else None
        spare = len(self.frozen_weight) - len(rows) if own is None else 0
        tables = {
            "order": None if layout is None else layout.order,
            "source": None if layout is None else layout.source,
            "units": np.concatenate([rows.unit, np.full(spare, rows.unit[0] if len(rows) else 0)]),
            "reference": rows.reference(self.num_here),
            "references": rows.references(self.num_here),
            "own": own,
        }
        device = "cpu" if self.frozen_weight.is_meta else self.frozen_weight.device
        return {name: None if table is None else torch.from_numpy(table).to(device) for name, table in tables.items()}

    def _tabulate(self) -> None:
        device = "cpu" if self.frozen_weight.is_meta else self.frozen_weight.device
        fingerprint = torch.from_numpy(self.rows.fingerprint(self.num_units)).to(device)
        self.register_buffer("fingerprint", fingerprint, persistent=False)
        for name, value in self.tables(self.rows).items():
            setattr(self, name, value)
        for name in (*self.buffer_names(), "fade"):
            if not is_sharded(self._buffers[name]):
                _let_grow(self._buffers[name], 0)

    def _stored(self, name: str) -> Any:
        """A buffer, read so that torch's compiler takes its size for one that may change.

        What it reads through a module's attributes of parameters and buffers it takes to be of one size for good. An
        exported program is of one size.
        """
        return getattr(self, name) if torch.compiler.is_exporting() else self.__dict__["_buffers"][name]

    @property
    def num_here(self) -> int:
        """How many units this process computes."""
        return self.num_units if self.split is None else self.split[1] - self.split[0]

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the frozen rows."""
        return is_spread(self.frozen_weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Composite:
        """Cast or move the frozen rows; the tables, which are never cast, are made anew where the rows are now."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tabulate()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state | {"growing_tables": {}, "fixed_tables": {}, "_gathered_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tabulate()

    def live(self, name: str) -> Tensor | None:
        """The rows in use of one buffer, (num_rows, ...); of sharded ones all processes have to ask."""
        value: Tensor | None = getattr(self, name)
        return None if value is None else whole(value)[: len(self.rows)]

    def frozen(self) -> dict[str, Tensor]:
        """The rows in use of what no step changes, and the fade: all but running statistics, by buffer.

        Sharded ones are left out.
        """
        names = (name for name in (*self.buffer_names(), "fade") if not name.startswith("running"))
        kept = (name for name in names if not is_sharded(self._buffers[name]))
        return {name: value for name in kept if (value := self.live(name)) is not None}

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activations of the frozen rows for the input the producer received, on the unit axis or the last."""
        weight, bias = (self._stored(name) for name in FIRST_NAMES)
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):  # the slots' was cast as well
            bias = None if bias is None else bias.to(x.dtype)
            weight = weight.to(x.dtype)
        if is_sharded(x) and self.split is None:
            raise SurgeryError(
                f"{self.label} was made before its layer was parallelized: its units are split over processes since. "
                "Call surgery.attach(model, optimizer) after parallelize_module"
            )
        if not is_sharded(weight):
            return self.product(x, weight, bias, self.units.to(x.device))
        if self.split is not None:
            own = self._own_rows().to(weight.dtype)
            return self.product(copied(x), own, bias if bias is None else bias.index_select(0, self.own))
        with gathered(weight, is_freed=x.requires_grad) as rows:
            return self.product(x, rows, bias, self.units.to(x.device))

    def _own_rows(self) -> Tensor:
        """The frozen rows of the units that this process computes; gathered once, until an operation or a load."""
        weight = self._stored("frozen_weight")
        if torch.compiler.is_compiling():
            with gathered(weight, is_freed=False) as rows:
                return rows.index_select(0, self.own)
        stored = held(weight)
        known, version, own, rows = self._gathered_rows or (None, 0, None, stored)
        if known is not weight or version != stored._version or own is not self.own:
            with gathered(weight, is_freed=False) as found:
                rows = found.index_select(0, self.own)
            self._gathered_rows = (weight, stored._version, self.own, rows)
        return rows

    def computed(self, x: Tensor, recipe: Recipe, compute: Compute, live: Sequence[Any]) -> Tensor:
        """As `forward`, with weights and biases that are computed from the frozen rows and these live values."""
        for source in recipe.sources:
            if source.name and source.name not in self._buffers:
                raise SurgeryError(
                    f"the weight is computed from '{source.path}' now, of which this bank has no frozen rows; call it "
                    "as before, or undo the operation"
                )
        stored = {source.name: self._stored(source.name) for source in recipe.sources if source.name}
        units = self.units.to(x.device)
        return self.product(x, *recipe.rows(compute, stored, live, units), units)

    # -- on the path

    def passed(
        self,
        index: int,
        link: Link,
        rows: Tensor,
        others: Sequence[Any] = (),
        module: nn.Module | None = None,
        path: UnitPath | None = None,
    ) -> Tensor:
        """The rows past a link of the path; `link` as it is now, should a plain attribute have changed it.

        Here and below `path` is the one of this call, where that may have other links with the same tensors: a mask.
        """
        return link.rows(self, rows, self.values(index, link, path), others, self.axis(index, rows, path), module)

    def entered(self, index: int, link: Coupling, slots: Tensor, rows: Tensor, path: UnitPath | None = None) -> Tensor:
        """What the operation of a coupling link receives in the slots' place."""
        return link.enter(self, slots, rows, self.axis(index, rows, path))

    def referred(self, slots: Tensor, rows: Tensor, axis: int) -> Tensor:
        """The reference, of the slots' shape: each operated unit's first knowledge row, or what it is fading into."""
        values = torch.cat([slots, rows], axis)
        if self.references is None:
            return values.index_select(axis, self.reference.to(slots.device))
        terms = self.references.to(slots.device)
        fade = self._stored("fade").to(slots.dtype)
        left = torch.cat([fade.new_ones(self.num_units), fade])[terms]
        shares = left * torch.cat([torch.ones_like(left[:1]), 1 - left[:-1]]).cumprod(0)
        values = values.index_select(axis, terms.reshape(-1)).unflatten(axis, terms.shape)  # type: ignore[no-untyped-call]
        reference: Tensor = (values * shares.reshape(*terms.shape, *[1] * (-axis - 1))).sum(axis - 1)
        return reference

    def together(
        self,
        index: int,
        link: SyncBatchNorm,
        module: nn.Module,
        slots: Tensor,
        rows: Tensor,
        path: UnitPath | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Slots and rows past a module that all processes share."""
        return link.together(slots, rows, self.values(index, link, path), self.axis(index, rows, path), module)

    def left(
        self,
        index: int,
        link: Coupling,
        slots: Tensor,
        rows: Tensor,
        received: Tensor,
        result: Tensor,
        own: Sequence[Tensor] = (),
        path: UnitPath | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Slots and rows past a coupling link; `own` are the slots' own tensors of that link."""
        axis = self.axis(index, rows, path)
        return link.leave(self, slots, rows, received, result, own, self.values(index, link, path), axis)

    def axis(self, index: int, rows: Tensor, path: UnitPath | None = None) -> int:
        """Where the rows' units are as they enter a link (past the last: as they come out), counted from the end."""
        start = -1 if self.product.is_stacked else self.product.unit_axes[0]
        return (path or self.path).axis(index, start, rows.dim())

    def values(self, index: int, link: Link, path: UnitPath | None = None) -> list[Tensor]:
        """The rows' own tensors of a link.

        Raises:
            SurgeryError: the link is another one now, with other tensors.
        """
        path = path or self.path
        made_for = path.links[index]
        if link.tensors != made_for.tensors or path.tensors != self.path.tensors:
            raise SurgeryError(
                f"the pre-activations pass '{link.name}' now, with other parameters than those of '{made_for.name}', "
                "for which the bank was made; undo the operation before you change it"
            )
        span = path.span(index)
        return [self._stored(name) for name in self.buffer_names()[2:][span]]

    def gathered(self, other: Any, axis: int) -> Any:
        """Each row's unit's part of a tensor from elsewhere; what has no unit axis is the same for all rows.

        Raises:
            SurgeryError: the tensor has another number of units: it broadcasts the slots along their own axis.
        """
        if not isinstance(other, Tensor):
            return other
        if self.product.is_stacked:
            other = self.stacked(other)
        size = other.shape[axis] if other.dim() >= -axis else 1
        if size == self.num_here:
            return other.index_select(axis, self.units.to(other.device))
        if size == 1:
            return other
        raise SurgeryError(
            f"a tensor of shape {tuple(other.shape)} enters between producer and activation: it has {size} entries "
            f"along the axis of the {self.num_units} units; undo the operation on this site before you call it so"
        )

    def stacked(self, values: Tensor) -> Tensor:
        """The axes that number the units as one, the last; axes of size 1 are broadcast."""
        axes = self.product.unit_axes
        sizes = self.product.sizes if isinstance(self.product, Contraction) else (self.num_units,)
        shape = list((1,) * (-min(axes) - values.dim()) + tuple(values.shape))
        if all(shape[axis] == 1 for axis in axes):
            return values.reshape([size for axis, size in enumerate(shape, -len(shape)) if axis not in axes] + [1])
        for axis, size in zip(axes, sizes, strict=True):
            shape[axis] = size
        return values.expand(shape).movedim(axes, tuple(range(-len(axes), 0))).flatten(-len(axes))

    def assemble(self, h: Tensor, rows: Tensor, path: UnitPath | None = None) -> Tensor:
        """The layer's activations with composites in place: h (the slots' activations), rows (the frozen rows')."""
        if not self.product.is_stacked:
            return self.summed(h, rows, self.axis(len((path or self.path).links), rows, path))
        axes = self.product.unit_axes
        last = tuple(range(-len(axes), 0))
        has_axes = h.dim() >= -min(axes)
        moved = h.movedim(axes, last) if has_axes else h
        sizes = moved.shape[-len(axes) :]
        if not has_axes or moved.shape[: -len(axes)] != rows.shape[:-1]:
            raise SurgeryError(
                f"activations of shape {tuple(h.shape)} do not have the {self.num_units} units on axes {axes} and "
                f"{tuple(rows.shape[:-1])} beside them; give the input a batch axis, or undo the operation on this site"
            )
        flat = self.summed(moved.flatten(-len(axes)), rows, -1)
        return flat.unflatten(-1, sizes).movedim(last, axes)  # type: ignore[no-untyped-call, no-any-return]

    def summed(self, h: Tensor, rows: Tensor, axis: int) -> Tensor:
        """As `assemble`, of slots and rows that have their units on one axis."""
        check_stacked(self.fingerprint, self.site)
        if self.order is None:  # none of the composite units is computed here
            return h
        fade = self._stored("fade")
        fade = fade if fade is None or self.own is None else fade[self.own]
        values = torch.cat([h, rows if fade is None else rows * along(fade.to(rows.dtype), axis)], axis)
        num_terms, num_columns = self.order.shape
        terms = values.index_select(axis, self.order.to(h.device).reshape(-1))
        terms = terms.unflatten(axis, (num_terms, num_columns))  # type: ignore[no-untyped-call]
        depth = num_terms // 2
        oldest, positive, negative = terms.split([1, depth, depth], axis - 1)
        composites: Tensor = oldest.squeeze(axis - 1) + (positive - negative).sum(axis - 1)
        if self.source is not None:
            composites = torch.cat([h, composites], axis).index_select(axis, self.source.to(h.device))
        return laid_out_as(composites, h)

    # -- in state dicts

    @property
    def structure(self) -> Structure:
        """What is saved beside the weights, with what the clocks of the births stand at now."""
        counts = [clock.num_steps if clock is not None else -1 for clock in self.clocks]
        num_columns = self.rows.births.shape[1]
        return Structure(self.num_units, self.rows, tuple(counts or [-1] * num_columns))

    def get_extra_state(self) -> Tensor:
        """The structure as one int64 tensor, so that state dicts hold tensors only."""
        return self.structure.encoded()

    def set_extra_state(self, state: Any) -> None:
        """Take over a saved structure; the weights come with the same state dict.

        Raises:
            StateError: a structure of another version or layer, one with more rows, or one that was averaged or cast.
        """
        if agrees(state, self.structure):
            return
        found = self.fitting(decoded(state, self.label))
        if len(found.rows) > len(self.frozen_weight):
            raise StateError(self._other_structure(found))
        self.rows, self.clocks = found.rows, _set_back(self.clocks, found.counts)
        self._fade_as(self.rows)
        self._tabulate()

    def fitting(self, found: Structure) -> Structure:
        """A saved structure that fits this layer.

        Raises:
            StateError: it is of another layer.
        """
        num_columns = self.rows.births.shape[1]
        if found.num_units != self.num_units or len(found.counts) != num_columns:
            raise StateError(
                f"the saved structure of {self.label} belongs to a layer of {found.num_units} units with "
                f"{len(found.counts)} parameters each, this one has {self.num_units} with {num_columns}"
            )
        return found

    @property
    def label(self) -> str:
        """As errors name it."""
        return f"the bank of '{self.site}'" if self.site else "a bank"

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As torch does it, but whole or not at all: weights of one structure under another are no composites."""
        try:
            self._load_into(self._check_loading({k.removeprefix(prefix): value for k, value in state_dict.items()}))
        except StateError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_into(self, rows: Rows) -> None:
        """Have a fade if what is loaded has one: torch's loader copies into what is there."""
        self._fade_as(rows)
        if self.fade is not None and rows is not self.rows:
            _let_grow(self.fade, 0)

    def _check_loading(self, saved: Mapping[str, Any]) -> Rows:
        """Refuse to load what would leave weights and structure apart, and return what rows there will be.

        Raises:
            StateError: a structure that cannot be read, weights that do not fit it, or one without the other.
        """
        own, state = self.structure, saved.get("_extra_state")
        tensors = {name: value for name in self.buffer_names() if (value := getattr(self, name)) is not None}
        tensors |= {} if self.fade is None or "fade" not in saved else {"fade": self.fade}
        found = own if state is None or agrees(state, own) else self.fitting(decoded(state, self.label))
        is_same = np.array_equal(found.rows.encoded()[:, :3], own.rows.encoded()[:, :3])
        for name, value in tensors.items():
            if name not in saved and not is_same:
                raise StateError(f"{self.label} is saved without '{name}', with a structure other than it has here")
            if name in saved and (not isinstance(saved[name], Tensor) or saved[name].shape != value.shape):
                raise StateError(f"{self._other_structure(found)}; '{name}' is {_described(saved[name])}")
        return found.rows

    def _other_structure(self, found: Structure) -> str:
        return (
            f"{self.label} is saved with {len(found.rows)} frozen rows, and has room for {len(self.frozen_weight)} "
            "here: the model was operated on differently. surgery.restore(model, state_dict) takes over what was saved"
        )

    def extra_repr(self) -> str:
        return f"{len(self.rows)} frozen rows, {len(set(self.rows.unit))} of {self.num_units} units"


def shard_rows(weight: Tensor, bank: Composite, is_split: bool) -> None:
    """Let a bank that does not hang yet hold its rows as its producer's weight is held: each process a part of them."""
    if is_split:
        units = shard_of(weight).rows(bank.product.axes)
        bank.split = (units.start, units.stop)
    if not is_sharded(weight) or bank.is_sharded:
        bank._tabulate()
        return
    for name in bank.buffer_names():
        value = bank._buffers[name]
        if value is not None and value.dim() > 1:
            bank._buffers[name] = sharded_rows(weight, value)
    room = len(bank.frozen_weight)
    for name in (*bank.buffer_names(), "fade"):
        value = bank._buffers[name]
        if value is not None and len(value) < room:
            bank._buffers[name] = torch.cat([value, value[:1].expand(room - len(value), *value.shape[1:])])
    bank._tabulate()


def _set_back(clocks: Sequence[Clock | None], counts: Sequence[int]) -> tuple[Clock | None, ...]:
    """The clocks at saved counts: those that run are set, others stand until they are attached; -1 says nothing."""
    own = clocks or [None] * len(counts)
    for clock, count in zip(own, counts, strict=True):
        if clock is not None and count >= 0:
            clock.num_steps = count
    return tuple(
        Clock(count) if clock is None and count >= 0 else clock for clock, count in zip(own, counts, strict=True)
    )


def _described(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _let_grow(value: Tensor | None, *axes: int) -> Tensor | None:
    """Let torch's compiler leave the sizes of these axes of a tensor open from the first time it sees them.

    The tensor is marked and handed back. Unmarked, each layer's first growth recompiles; and below one of torch's own
    layers, whose tensors are taken to be of one size for good unless that setting is off, every growth of a bank.
    Parameters and buffers are not concerned: another setting fixes theirs, so a bank's rows are read by `_stored`.
    """
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    if value is not None:
        for axis in axes:
            torch._dynamo.maybe_mark_dynamic(value, axis)
    return value


def _padded(value: Tensor, room: int) -> Tensor:
    """Rows up to the capacity; unused ones repeat the first, so that no function is evaluated off its domain."""
    return torch.cat([value, value[:1].expand(room - len(value), *value.shape[1:])]).contiguous()
