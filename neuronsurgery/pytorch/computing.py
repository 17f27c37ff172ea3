"""Computed weights: how the rows that a producer multiplies with come from the rows that it stores.

Weight norm, noisy layers, masks and pruning, standardized weights: the weight is no parameter but a function of several
tensors. Where a unit's row depends on that unit's rows of them alone, a bank can freeze the rows of the parameters
among them (the **stored** ones), gather the rows of all others (noise, masks) as they are at each call (the **live**
ones), and compute the weights of its frozen rows as the layer computes its own.

Whether the units are apart is measured: with its rows exchanged for those of other units, a layer must give exactly
those units' weights. Frozen rows are computed in as many at a time as the layer has units, so that a size that the
layer's code holds fits them too, and each is rounded as its slot would be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["FIRST_NAMES", "Compute", "Computed", "Recipe", "Source", "recipe_of"]

Compute = Callable[[Sequence[Any]], tuple[Tensor, Tensor | None]]
"""From the value of each source, in the layer's own layout, to the weight and the bias."""

FIRST_NAMES = ("frozen_weight", "frozen_bias")
"""The buffers of a bank that every producer has: those of the first stored tensor, and of the bias."""


@dataclass(frozen=True)
class Source:
    """A tensor that a weight is computed from; `axis` numbers its units, None: it is the same for all of them.

    `name` is the bank's buffer with its frozen rows, "" for a live one. `path` leads to it from the producer, or from
    the scope of a functional call.
    """

    path: str
    shape: tuple[int, ...]
    axis: int | None
    name: str = ""


@dataclass(frozen=True)
class Recipe:
    """What the weight of a producer with so many units, numbered by its `axis`, is computed from."""

    axis: int
    num_units: int
    sources: tuple[Source, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The bank's buffers beside those that every producer has."""
        return tuple(source.name for source in self.sources if source.name not in ("", *FIRST_NAMES))

    def rows(
        self, compute: Compute, stored: Mapping[str, Tensor], live: Sequence[Any], units: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The weights, (num_rows, *row_shape), and biases of rows that belong to these units, (num_rows,).

        Args:
            compute: how the layer computes its own weight and bias.
            stored: rows of the stored sources by their names, (num_rows, *row_shape) each.
            live: the values of the other sources, in order.
            units: (num_rows,) int64.
        """
        num_rows = len(units)
        room = -(-num_rows // self.num_units) * self.num_units
        index = torch.arange(room, device=units.device).remainder(num_rows)
        with torch.no_grad():
            parts = [compute(self._values(stored, live, units, part)) for part in torch.split(index, self.num_units)]
        weight = torch.cat([weight.movedim(self.axis, 0) for weight, _ in parts])[:num_rows]
        biases = [bias for _, bias in parts if bias is not None]
        return weight, torch.cat(biases)[:num_rows] if biases else None

    def _values(self, stored: Mapping[str, Tensor], live: Sequence[Any], units: Tensor, part: Tensor) -> list[Any]:
        """The value of each source for as many rows as there are units, as if these were the layer's own."""
        values = []
        others = iter(live)
        for source in self.sources:
            value = stored[source.name] if source.name else next(others)
            if source.name:
                assert source.axis is not None
                row_shape = source.shape[: source.axis] + source.shape[source.axis + 1 :]
                value = value.index_select(0, part).reshape(len(part), *row_shape)
                value = value.movedim(0, source.axis).contiguous()
            elif source.axis is not None:
                value = value.index_select(source.axis, units.index_select(0, part))
            values.append(value)
        return values


@dataclass(frozen=True, eq=False)
class Computed:
    """The computed weight of one call of a producer: recipe, values, and how to compute it.

    `weight` and `bias` are the parameters whose slots and rows stand for them; `owners` the module and attribute of
    each source, None for a value that a graph computes. In a graph, `leaves` are the nodes that give the live values,
    `inner` all that these need, and `nodes` those from the parameters to the weight and the bias.
    """

    recipe: Recipe
    weight: nn.Parameter
    bias: nn.Parameter | None
    values: tuple[Any, ...]
    owners: tuple[tuple[nn.Module, str] | None, ...]
    compute: Compute
    leaves: tuple[fx.Node, ...] = ()
    nodes: tuple[fx.Node, ...] = ()
    inner: tuple[fx.Node, ...] = ()

    @property
    def live(self) -> list[Any]:
        """The values of the sources that are not stored."""
        pairs = zip(self.recipe.sources, self.values, strict=True)
        return [value for source, value in pairs if not source.name]

    def owner_of(self, tensor: Tensor) -> tuple[nn.Module, str]:
        """The module that owns one of the sources, and its name there."""
        pairs = zip(self.values, self.owners, strict=True)
        return next(owner for value, owner in pairs if value is tensor and owner is not None)

    @property
    def extras(self) -> Iterator[tuple[Source, nn.Parameter, nn.Module, str]]:
        """The stored sources beside the first and the bias, each with its tensor, owner and attribute."""
        for source, value in zip(self.recipe.sources, self.values, strict=True):
            if source.name in self.recipe.names:
                yield source, value, *self.owner_of(value)


# -- are the units apart? --------------------------------------------------------------------------------------------


def recipe_of(
    paths: Sequence[str], values: Sequence[Any], is_stored: Sequence[bool], compute: Compute, axis: int
) -> tuple[Recipe, int, int | None] | str:
    """How a weight is computed row by row, and which sources stand for it and for its bias; or why it is not.

    Args:
        paths: of the sources.
        values: of the sources.
        is_stored: which of them are parameters to freeze rows of.
        compute: the weight and the bias, of the values.
        axis: which axis of the weight numbers the units.
    """
    with torch.no_grad():
        weight, bias = compute(list(values))
        shape, num_units = weight.shape, weight.shape[axis]
        if bias is not None and bias.shape != (num_units,):
            return "its bias is computed, and not one number per unit"
        alike = [i for i, value in enumerate(values) if is_stored[i] and value.shape == shape]
        if not alike:
            return "its weight is computed, and not of one parameter of its own shape"
        axes = _axes(values, is_stored, compute, axis, shape)
        if axes is None:
            return "its weight is computed in a way that couples its units, or is random"
        if _is_of_one_sign(values, is_stored, compute):
            return "its weight is computed to be of one sign, on which others may rely: a composite unit subtracts"
        first = _standing_for(alike, values, lambda given: compute(given)[0])
        vectors = [] if bias is None else [i for i, v in enumerate(values) if is_stored[i] and v.shape == bias.shape]
        vectors = [i for i in vectors if i != first and _moves_bias(i, values, compute)]
        second = _standing_for(vectors, values, lambda given: compute(given)[1]) if vectors else None
    for i, found in enumerate(axes):
        if is_stored[i] and found is None:
            return f"its weight is computed, and '{paths[i]}', which all units share, is trained"
    names = _names(paths, is_stored, first, second)
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else () for value in values]
    return Recipe(axis, num_units, tuple(map(Source, paths, shapes, axes, names))), first, second


def _names(paths: Sequence[str], is_stored: Sequence[bool], first: int, second: int | None) -> list[str]:
    names: list[str] = []
    for i, path in enumerate(paths):
        _, is_parametrized, rest = path.partition("parametrizations.")
        label = rest.replace(".", "_") if is_parametrized else path.rpartition(".")[2]
        name = f"frozen_{label}" if is_stored[i] else ""
        while name in (*FIRST_NAMES, *filter(None, names)) or name.startswith("frozen_path_"):
            name += "_"
        names.append(FIRST_NAMES[0] if i == first else FIRST_NAMES[1] if i == second else name)
    return names


def _standing_for(found: Sequence[int], values: Sequence[Any], result_of: Callable[[list[Any]], Tensor | None]) -> int:
    """Of several parameters of the result's shape the one that is added to it as it is: a mean."""
    before = result_of(list(values))
    for i in found if len(found) > 1 else ():
        after = result_of([value + 1.0 if j == i else value for j, value in enumerate(values)])
        if before is not None and after is not None and torch.allclose(after - before, torch.ones_like(after), 1e-2):
            return i
    return found[0]


def _moves_bias(index: int, values: Sequence[Any], compute: Compute) -> bool:
    before = compute(list(values))[1]
    after = compute([value + 1.0 if i == index else value for i, value in enumerate(values)])[1]
    return before is not None and after is not None and not torch.equal(before, after)


def _axes(
    values: Sequence[Any], is_stored: Sequence[bool], compute: Compute, axis: int, shape: torch.Size
) -> tuple[int | None, ...] | None:
    """Which axis of each source numbers the units, such that they are apart; None if there is no way to say so."""
    generator = torch.Generator().manual_seed(0)
    examples = [_example(value, stored, generator) for value, stored in zip(values, is_stored, strict=True)]
    candidates = [_candidates(example, axis, shape) for example in examples]
    for axes in itertools.islice(itertools.product(*candidates), _MOST_WAYS):
        if _is_apart(examples, axes, compute, axis, shape[axis], generator):
            return axes
    return None


_MOST_WAYS = 32  # ways to read the sources' axes that are tried


def _is_of_one_sign(values: Sequence[Any], is_stored: Sequence[bool], compute: Compute) -> bool:
    """Whether no weight is ever below zero, or none above, as where a layer is to be monotone."""
    generator = torch.Generator().manual_seed(1)
    signs: set[float] = set()
    for _ in range(16):
        examples = [_example(value, stored, generator) for value, stored in zip(values, is_stored, strict=True)]
        signs |= {float(bound) for bound in compute(examples)[0].sign().aminmax()}
        if {-1.0, 1.0} <= signs:
            return False
    return True


def _example(value: Any, is_stored: bool, generator: torch.Generator) -> Any:
    """A random tensor like a source, in double precision; dtypes become the dtype of the examples."""
    if isinstance(value, torch.dtype):
        return torch.float64
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    random = torch.randn if is_stored else torch.rand
    example = random(value.shape, generator=generator, dtype=torch.float64) + (0.0 if is_stored else 0.5)
    return example.to(value.device)


def _candidates(value: Any, axis: int, shape: torch.Size) -> list[int | None]:
    """The axes of a source that may number the units, the likeliest first."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return [None]
    found: list[int | None] = [axis] if value.dim() == len(shape) else []
    found += [0] if value.dim() == 1 else []
    found += [axis - len(shape) + value.dim()] if axis - len(shape) + value.dim() >= 0 else []
    fitting = [each for each in dict.fromkeys(found) if each is not None and value.shape[each] == shape[axis]]
    return [*fitting, None]


def _is_apart(
    examples: Sequence[Any],
    axes: Sequence[int | None],
    compute: Compute,
    axis: int,
    num_units: int,
    generator: torch.Generator,
) -> bool:
    """Whether exchanged rows of the sources give the very same rows of the result, exchanged."""
    orders = [torch.randint(num_units, (num_units,), generator=generator) for _ in range(2)]
    orders += [torch.full((num_units,), unit) for unit in (0, num_units - 1)]
    weight, bias = compute(list(examples))
    for order in orders:
        order = order.to(weight.device)
        pairs = zip(examples, axes, strict=True)
        moved_weight, moved_bias = compute([v if at is None else v.index_select(at, order) for v, at in pairs])
        if not _is_close(moved_weight, weight.index_select(axis, order)):
            return False
        if bias is not None and (moved_bias is None or not _is_close(moved_bias, bias.index_select(0, order))):
            return False
    return True


def _is_close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-9 if found.dtype is torch.float64 else 1e-4
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
