"""Hidden units counted by watching a model run, independently of how discovery reads its code.

Every operation that reaches torch's dispatcher is seen, whatever Python called it, those inside `nn.GRU` and the
transformer layers included. Each element of a tensor carries the unit it is a value of:

- a product of a computed tensor with a weight (`mm`, `bmm`, `convolution` ...) gives each element the unit whose
  weights it was computed with: a column of what the weight was contracted to, an output channel. A weight is a
  Parameter, or whatever was computed from parameters and buffers alone (a transpose, a weight norm, noise added);
- operations that move elements move the units with them; arithmetic with anything else, normalization, dropout and
  pooling of one unit's values leave them; where two products meet in one element, their two units are one;
- an activation function ends it: the units that arrive there are the hidden units. Whatever else is done with a
  value (another product, softmax, a sum over units) ends it too, and counts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Hidden", "hidden_units"]

ACTIVATIONS = frozenset(
    "relu leaky_relu _prelu_kernel elu gelu silu mish hardswish softplus softshrink hardshrink threshold sigmoid "
    "hardsigmoid log_sigmoid_forward tanh hardtanh clamp clamp_min clamp_max rrelu_with_noise "
    "rrelu_with_noise_functional glu abs exp expm1 sin cos tan sinh cosh atan asinh erf".split()
)
"""What counts as an activation function. Powers, roots and logarithms do not: norms and likelihoods are made of them.
"""
MOVING = frozenset(
    "view _unsafe_view reshape _reshape_alias t transpose permute expand squeeze unsqueeze slice select split "
    "split_with_sizes chunk unsafe_chunk unsafe_split unbind clone contiguous _to_copy detach alias lift_fresh index "
    "index_select gather flip roll repeat diagonal constant_pad_nd narrow unfold".split()
)
JOINING = frozenset(["cat", "stack"])
UNITWISE = frozenset(
    "add sub rsub mul div neg addcmul lerp masked_fill where dropout native_dropout native_batch_norm "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training _native_batch_norm_legit_functional "
    "_batch_norm_with_update _batch_norm_no_update cudnn_batch_norm native_layer_norm native_group_norm "
    "_fused_rms_norm copy bernoulli".split()
)
POOLING = frozenset(
    "mean sum amax amin max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_bilinear2d "
    "mkldnn_max_pool2d".split()
)
FACTORS = {"mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "addmv": (1, 2)}

SHIFT = 40  # an element of a weight is numbered (parameter << SHIFT) + its place, from 1 on; 0 is no unit


@dataclass(frozen=True)
class Hidden:
    """The hidden units of a model by producer: names of the parameters joined in a unit -> number of such units."""

    units: Mapping[tuple[str, ...], int]

    @property
    def num_units(self) -> int:
        """All hidden units, those that several producers compute together counted once."""
        return sum(self.units.values())


def hidden_units(model: nn.Module, run: Callable[[nn.Module], Any]) -> Hidden:
    """Count the hidden units of a model in one run of it; buffers may change, as in any run."""
    observer = _Observer(model)
    with observer:
        run(model)
    return observer.hidden()


@dataclass(frozen=True, eq=False)
class _Tracked:
    """A tensor with the unit of each of its elements, once for every product that entered them; or a weight."""

    tensor: Tensor  # held, so that its id stays its own
    labels: tuple[Tensor, ...]
    is_weight: bool = False


class _Observer(TorchDispatchMode):
    """Follows units from the products that compute them to the activation functions they enter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: list[str] = []
        self.tracked: dict[int, _Tracked] = {}
        self.constants = {id(buffer): buffer for buffer in model.buffers()}
        self.numbers: dict[tuple[int, int], int] = {}  # first and last element of a unit's weights -> its number
        self.parents: dict[int, int] = {}  # unit -> a unit that is the same
        self.reached: set[int] = set()
        for index, (name, parameter) in enumerate(model.named_parameters()):
            self.names.append(name)
            places = torch.arange(parameter.numel(), device=parameter.device).reshape(parameter.shape)
            self.keep(parameter, (places + (index << SHIFT) + 1,), is_weight=True)

    # -- following

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        name = name.rstrip("_") if not name.startswith("__") else name
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if not any(id(t) in self.tracked for t in tensors):
            self.follow_constants(tensors, outputs)
            return result
        if all(id(t) in self.constants or self.is_weight(t) for t in tensors):
            found = self.weights(func, name, args, kwargs, tensors, outputs)
        else:
            found = self.values(func, name, args, kwargs, tensors, outputs)
        for output, tracked in zip(outputs, found, strict=False):
            self.keep(output, tracked[0], is_weight=tracked[1])
        for output in outputs[len(found) :]:
            self.tracked.pop(id(output), None)
        return result

    def follow_constants(self, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        if tensors and all(id(t) in self.constants for t in tensors):
            self.constants.update((id(t), t) for t in outputs)
        else:
            for output in outputs:
                self.tracked.pop(id(output), None)
                self.constants.pop(id(output), None)

    def weights(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], outputs: list[Tensor]
    ) -> list[tuple[tuple[Tensor, ...], bool]]:
        """What comes from parameters and buffers alone is a weight, its elements placed as in the first of them."""
        if name in MOVING and isinstance(args[0], Tensor):
            return [(labels, True) for labels in self.moved(func, args, kwargs)]
        found: list[tuple[tuple[Tensor, ...], bool]] = []
        for output in outputs:
            same = (self.tracked[id(t)].labels for t in tensors if self.is_weight(t) and t.shape == output.shape)
            found.append((next((labels for labels in same if labels), ()), True))
        return found

    def values(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], outputs: list[Tensor]
    ) -> list[tuple[tuple[Tensor, ...], bool]]:
        if name in FACTORS:
            labels = self.product(name, args, outputs[0].shape)
        elif name == "convolution":
            labels = self.convolution(args, outputs[0].shape)
        elif name == "_grouped_mm":
            labels = self.grouped_product(*args[:3])
        elif name in ACTIVATIONS:
            self.arrive(args, is_gated=name == "glu")
            labels = ()
        elif name in MOVING and self.is_weight(args[0]):
            return [(moved, True) for moved in self.moved(func, args, kwargs)]
        elif name in MOVING and id(args[0]) in self.tracked:
            return [(moved, False) for moved in self.moved(func, args, kwargs)]
        elif name in JOINING:
            labels = self.joined(func, args, kwargs)
        elif name in UNITWISE:
            labels = self.spread([t for t in tensors if not self.is_weight(t)], outputs[0].shape)
        elif name in POOLING:
            labels = self.pooled(args[0], outputs[0])
        else:
            labels = ()
        return [(labels, False)] if labels else []

    def moved(self, func: Any, args: Any, kwargs: Any) -> list[tuple[Tensor, ...]]:
        """The labels of each output of an operation that moves the elements of its first argument."""
        kwargs = {key: value for key, value in kwargs.items() if key not in ("dtype", "memory_format", "value")}
        # Contiguous, because a view that the strides of the tensor allow, those of its labels might not.
        results = [func(labels.contiguous(), *args[1:], **kwargs) for labels in self.tracked[id(args[0])].labels]
        per_output = [[t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)] for result in results]
        return [tuple(labels) for labels in zip(*per_output, strict=True)]

    def joined(self, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        """As the tensors are concatenated, so are their labels; 0 where one has none."""
        found = [() if self.is_weight(t) else self.labels(t) for t in args[0]]
        depth = max(map(len, found))
        layers = [
            [labels[level] if level < len(labels) else torch.zeros_like(t, dtype=torch.int64) for t, labels in pairs]
            for level, pairs in ((level, list(zip(args[0], found, strict=True))) for level in range(depth))
        ]
        return tuple(func(layer, *args[1:], **kwargs) for layer in layers)

    def spread(self, tensors: Iterable[Tensor], shape: torch.Size) -> tuple[Tensor, ...]:
        """The labels of all arguments, as broadcasting spreads them over the result."""
        found = [labels for tensor in tensors for labels in self.labels(tensor)]
        fitting = [labels for labels in found if _fits(labels.shape, shape)]
        distinct: list[Tensor] = []
        for labels in (labels.broadcast_to(shape) for labels in fitting):
            if not any(torch.equal(labels, other) for other in distinct):
                distinct.append(labels)
        return tuple(distinct)

    def pooled(self, tensor: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Units survive a pooling or a sum over their own values alone."""
        found = []
        for labels in self.labels(tensor):
            kept = [size == now for size, now in zip(tensor.shape, output.shape, strict=False)]
            axes = [axis for axis, same in enumerate(kept) if not same]
            if tensor.dim() != output.dim() or not axes:
                return ()
            low, high = labels.amin(axes, keepdim=True), labels.amax(axes, keepdim=True)
            if not torch.equal(low, high):
                return ()
            found.append(low.expand(output.shape))
        return tuple(found)

    # -- where units begin

    def product(self, name: str, args: Any, shape: torch.Size) -> tuple[Tensor, ...]:
        left, right = (args[index] for index in FACTORS[name])
        labels: list[Tensor] = []
        if self.is_weight(right) and not self.is_weight(left):
            is_matrix = right.dim() > 1
            labels = [self.units(found, -2 if is_matrix else -1) for found in self.labels(right)]
            labels = [found.unsqueeze(-2) if is_matrix else found for found in labels]
        elif self.is_weight(left) and not self.is_weight(right):
            labels = [self.units(found, -1) for found in self.labels(left)]
            labels = [found.unsqueeze(-1) if right.dim() > 1 else found for found in labels]
        added = () if FACTORS[name][0] == 0 or self.is_weight(args[0]) else self.spread([args[0]], shape)
        return (*(found.expand(shape) for found in labels), *added)

    def grouped_product(self, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
        """Each group of rows, up to its end, is multiplied with a weight of its own: (S, in) with (E, in, out)."""
        group = torch.bucketize(torch.arange(len(rows)), ends, right=True).clamp(max=len(weight) - 1)
        return tuple(self.units(found, -2)[group] for found in self.labels(weight) if self.is_weight(weight))

    def convolution(self, args: Any, shape: torch.Size) -> tuple[Tensor, ...]:
        weight, transposed, groups = args[1], args[6], args[8]
        if not self.is_weight(weight) or self.is_weight(args[0]):
            return ()
        found = []
        for labels in self.labels(weight):
            if transposed:  # (in, out / groups, ...) to (out, in / groups, ...)
                split = labels.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
                rows = split.transpose(1, 2).flatten(0, 1).flatten(1)
            else:
                rows = labels.flatten(1)
            units = self.units(rows, -1).reshape(-1, *([1] * (weight.dim() - 2)))
            found.append(units.expand(shape))
        return tuple(found)

    def units(self, labels: Tensor, axis: int) -> Tensor:
        """The unit of each line of weights along an axis: known by the first and the last of its elements."""
        low, high = labels.amin(axis), labels.amax(axis)
        pairs = zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)
        numbers = [self.numbers.setdefault(pair, len(self.numbers) + 1) for pair in pairs]
        return torch.tensor(numbers, device=labels.device).reshape(low.shape)

    # -- where units arrive

    def arrive(self, args: Any, is_gated: bool) -> None:
        layers = [] if self.is_weight(args[0]) else list(self.labels(args[0]))
        if is_gated:
            layers = [layer.chunk(2, args[1] if len(args) > 1 else -1)[1] for layer in layers]
        if not layers:
            return
        table = torch.stack([layer.flatten() for layer in layers], 1).unique(dim=0)
        for row in table.tolist():
            units = [unit for unit in row if unit]
            self.reached.update(units)
            for unit in units[1:]:
                self.parents[self.root(unit)] = self.root(units[0])

    def root(self, unit: int) -> int:
        while self.parents.setdefault(unit, unit) != unit:
            unit = self.parents[unit]
        return unit

    def hidden(self) -> Hidden:
        """The units that arrived, by the parameters whose elements begin them."""
        first = {number: low for (low, _), number in self.numbers.items()}
        members: dict[int, set[int]] = {}
        for unit in self.reached:
            members.setdefault(self.root(unit), set()).add((first[unit] - 1) >> SHIFT)
        counts = Counter(tuple(self.names[index] for index in sorted(found)) for found in members.values())
        return Hidden(dict(sorted(counts.items())))

    # -- bookkeeping

    def keep(self, tensor: Tensor, labels: tuple[Tensor, ...], is_weight: bool) -> None:
        self.tracked[id(tensor)] = _Tracked(tensor, labels, is_weight)

    def is_weight(self, value: Any) -> bool:
        return id(value) in self.tracked and self.tracked[id(value)].is_weight

    def labels(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return self.tracked[id(tensor)].labels if id(tensor) in self.tracked else ()


def _fits(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a shape broadcasts to another without a change of that other."""
    return len(shape) <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False)
    )
