"""The state that an optimizer gives a fresh parameter, learned by letting its class step on a scratch parameter.

Zeros are what most optimizers start from, and wrong for those that do not (Rprop's step sizes, Adagrad's initial
accumulator, averages that start at the weights); one mechanism serves the known families and all others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch.sharding import held, is_sharded, is_sharded_alike, own_units
from neuronsurgery.pytorch.step_hooks import HOOK_CALLER
from neuronsurgery.pytorch.transaction import WriteRows, revert
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes
from neuronsurgery.pytorch.wrappers import COPIES

__all__ = [
    "Group",
    "Refresh",
    "fresh_rows",
    "is_shared",
    "own_step",
    "refresh_coupled",
    "refuse_coupled",
    "scratch_optimizer",
    "scratch_options",
]

Group = dict[str, Any]


class Refresh:
    """Write the state of a fresh parameter into rows, learned from the weights that the rows have by then."""

    def __init__(
        self, optimizer: Optimizer, group: Group, parameter: nn.Parameter, rows: Tensor, axes: UnitAxes = ROWS
    ) -> None:
        self.optimizer, self.group, self.parameter, self.rows, self.axes = optimizer, group, parameter, rows, axes
        self.writes: list[WriteRows] = []

    def apply(self) -> None:
        self.writes = [
            WriteRows(entry, own_units(self.parameter, self.rows, self.axes).to(entry.device), values, self.axes)
            for entry, values in fresh_rows(self.optimizer, self.group, self.parameter, self.rows, self.axes)
        ]
        for write in self.writes:
            write.apply()

    def revert(self) -> None:
        revert(self.writes)


def fresh_rows(
    optimizer: Optimizer, group: Group, parameter: nn.Parameter, rows: Tensor, axes: UnitAxes = ROWS
) -> list[tuple[Tensor, Tensor]]:
    """Return (state tensor of the parameter's shape, its fresh rows (r, *row_shape)) for each such tensor.

    Of a sharded parameter it is the part that this process holds, and `own_units` of the rows.
    """
    weights = axes.take(held(parameter.detach()), own_units(parameter, rows, axes).to(parameter.device))
    _, fresh = _scratch_step(optimizer, group, weights, torch.zeros_like(weights))
    pairs: list[tuple[Tensor, Tensor]] = []
    for key, entry in optimizer.state[parameter].items():
        if is_shared(key, entry, parameter):
            continue
        _refuse_shape(optimizer, key, entry, parameter)
        entry = held(entry)
        if key in COPIES and key not in fresh:  # a wrapper's, in the state of the optimizer that it holds
            pairs.append((entry, weights))
            continue
        if not isinstance(fresh.get(key), Tensor) or fresh[key].shape != weights.shape:
            raise OptimizerError(
                f"the operated rows of a parameter need a fresh {key!r}, but {type(optimizer).__name__} has "
                f"none after its first step, so it cannot be learned. {_ELEMENT_WISE}"
            )
        pairs.append((entry, fresh[key]))
    return pairs


def refresh_coupled(
    optimizer: Optimizer, parameter: nn.Parameter, rows: Tensor, axes: UnitAxes, means: Collection[str]
) -> list[WriteRows]:
    """Plan the writes for a class that couples rows: these entries take the other rows' mean, momentum becomes zero."""
    if is_sharded(parameter):
        raise OptimizerError(
            f"{type(optimizer).__name__} couples the rows of a parameter of shape {tuple(parameter.shape)}, which is "
            f"sharded over processes; {_ELEMENT_WISE}"
        )
    if axes != ROWS:
        raise OptimizerError(
            f"{type(optimizer).__name__} couples the rows of a parameter of shape {tuple(parameter.shape)}, and its "
            f"units are not along axis 0 but along {axes}; {_ELEMENT_WISE}"
        )
    writes = []
    for key, entry in optimizer.state[parameter].items():
        if key in means:
            others = torch.ones(len(entry), dtype=torch.bool, device=entry.device)
            others[rows] = False
            mean = entry[others].mean(0) if bool(others.any()) else entry.mean(0)
            writes.append(WriteRows(entry, rows, mean.expand(len(rows), *entry.shape[1:])))
        elif isinstance(entry, Tensor) and entry.shape == parameter.shape:
            writes.append(WriteRows(entry, rows, torch.zeros_like(entry[rows])))
    return writes


def is_shared(key: str, entry: object, parameter: Tensor) -> bool:
    """Whether a state entry belongs to the whole parameter: a number, or a tensor of one element."""
    if isinstance(entry, Tensor):
        return entry.numel() == 1 and (key == "step" or entry.shape != parameter.shape)
    return entry is None or isinstance(entry, (int, float, complex, str))


def _refuse_shape(optimizer: Optimizer, key: str, entry: object, parameter: nn.Parameter) -> None:
    if is_sharded(parameter) and is_sharded_alike(entry, parameter):
        return
    if isinstance(entry, Tensor) and (type(entry) not in (Tensor, nn.Parameter) or is_sharded(parameter)):
        raise OptimizerError(
            f"{type(optimizer).__name__} keeps its state {key!r} of a parameter of shape {tuple(parameter.shape)} as "
            f"{type(entry).__name__}, which cannot be read and written row by row. {_ELEMENT_WISE}"
        )
    if isinstance(entry, Tensor) and entry.shape == parameter.shape:
        return
    found = f"shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else f"type {type(entry).__name__}"
    raise OptimizerError(
        f"{type(optimizer).__name__} couples the rows of a parameter of shape {tuple(parameter.shape)}: its "
        f"state {key!r} has {found}, so single rows cannot be made fresh. {_ELEMENT_WISE}"
    )


_ELEMENT_WISE = (
    "Give the operated layers an element-wise optimizer (SGD, RMSprop, Adam, AdamW), or operate without "
    "optimizer=, which leaves its state to you."
)


def refuse_coupled(optimizer: Optimizer, group: Group, parameter: nn.Parameter, axes: UnitAxes = ROWS) -> None:
    """Refuse an optimizer in which one row's updates depend on another row's weights or gradients.

    State of the parameter's shape does not tell (Muon, LAMB, Adafactor's vectors), a few steps on few units do, with a
    second parameter beside them. Units that are not along axis 0 alone learn their state in another layout than their
    own: there no element's updates may depend on another's.
    """
    is_single = (parameter.shape[0] if axes == ROWS else parameter.numel()) < 2
    shape = axes.few_units(parameter.shape)
    generator = torch.Generator().manual_seed(0)
    weights, *gradients = torch.randn((7, *shape), generator=generator).to(held(parameter.detach()))
    kept = torch.zeros(shape, dtype=torch.bool, device=weights.device)
    kept[... if is_single else 0 if axes == ROWS else (0,) * len(shape)] = True
    scales = (torch.tensor([0.0, 3.0, 0.1, 30.0, 0.0, 1.0]).to(weights), torch.ones(6).to(weights))
    found = [
        _shown_of(optimizer, group, torch.where(kept, weights, weights * (1 + scale[1])), gradients, scale, kept)
        for scale in scales
    ]
    is_apart = all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    if not is_apart or type(optimizer).__name__ in _NOT_ALWAYS_APART:
        one = "row" if axes == ROWS else "weight"
        raise OptimizerError(
            f"{type(optimizer).__name__} couples the {one}s of a parameter of shape {tuple(parameter.shape)}: the "
            f"update of one {one} depends on the others, so single rows cannot be made fresh. {_ELEMENT_WISE}"
        )


_NOT_ALWAYS_APART = ("AdamP", "SGDP")
"""Classes outside torch that couple rows only where a gradient is nearly orthogonal to the weights (Heo et al. 2021)"""


def _shown_of(
    optimizer: Optimizer, group: Group, weights: Tensor, gradients: list[Tensor], scales: Tensor, kept: Tensor
) -> list[Tensor]:
    """Step on scratch parameters and return what must not depend on `scales`, which all but `kept` are scaled by.

    These are the kept weights, and what all rows share; to know its own state would not help a row that is kept.
    """
    parameter, beside = nn.Parameter(weights.clone()), nn.Parameter(weights.clone())
    with _learning(optimizer, weights):
        scratch = scratch_optimizer(optimizer, group, parameter, beside)
        for gradient, scale in zip(gradients, scales, strict=True):
            parameter.grad = torch.where(kept, gradient, gradient * scale)
            beside.grad = gradient * scale
            own_step(type(optimizer))(scratch)
    state = scratch.state.get(parameter, {})
    shared = [entry for key, entry in state.items() if is_shared(key, entry, weights)]
    numbers = [*shared, *scratch.param_groups[0].values()]
    values = [float(one) for one in numbers if _is_number(one)]
    return [parameter.detach()[kept], torch.tensor(values)]


def _is_number(entry: Any) -> bool:
    return isinstance(entry, (int, float)) or (isinstance(entry, Tensor) and entry.numel() == 1)


def _scratch_step(
    optimizer: Optimizer, group: Group, weights: Tensor, gradient: Tensor
) -> tuple[Tensor, Mapping[str, Any]]:
    """Take one step of the optimizer's class on a scratch parameter; return its weights and its state.

    The group's hyper-parameters apply, except weight decay, which would put a gradient into the state. No
    hook fires (the class's own `step` is called), and the random state is left as it was.
    """
    parameter = nn.Parameter(weights.clone())
    parameter.grad = gradient.clone()
    with _learning(optimizer, weights):
        scratch = scratch_optimizer(optimizer, group, parameter)
        own_step(type(optimizer))(scratch)
    return parameter.detach(), scratch.state.get(parameter, {})


@contextmanager
def _learning(optimizer: Optimizer, like: Tensor) -> Iterator[None]:
    """Leave the random state as it was, and name the optimizer whose class failed on a scratch parameter."""
    with torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
        try:
            yield
        except Exception as error:
            raise OptimizerError(
                f"the state that {type(optimizer).__name__} gives a fresh parameter cannot be learned: building one "
                f"from its parameter group and stepping on a scratch copy failed with {type(error).__name__}: {error}. "
                + _ELEMENT_WISE
            ) from error


def scratch_optimizer(optimizer: Optimizer, group: Group, *parameters: nn.Parameter) -> Optimizer:
    """An optimizer of the same class on scratch parameters, with the settings of a group but for weight decay."""
    cls, options = type(optimizer), scratch_options(group)
    accepted = _accepted_options(cls)
    scratch = cls(list(parameters), **{key: entry for key, entry in options.items() if key in accepted})
    scratch.param_groups[0].update(options)
    for name, entry in vars(optimizer).items():  # settings that a class keeps beside its groups
        if isinstance(entry, (bool, int, float, str, tuple)) and name in vars(scratch) and not name.startswith("_"):
            setattr(scratch, name, entry)
    return scratch


def scratch_options(group: Group, *, keeps_decay: bool = False) -> Group:
    """The settings of a group for a step on a scratch copy: plain kernels, which take all they are given."""
    options = {key: option for key, option in group.items() if key not in ("params", "param_names")}
    for key, option in options.items():
        if isinstance(option, Tensor):
            options[key] = option.detach().clone()
    if "weight_decay" in options and not keeps_decay:
        options["weight_decay"] = 0.0
    return options | {key: value for key, value in _PLAIN.items() if key in options}


# A schedule-free optimizer is told when it trains, and refuses to step otherwise.
_PLAIN = {"foreach": False, "fused": None, "capturable": False, "differentiable": False, "train_mode": True}


def _accepted_options(cls: type[Optimizer]) -> set[str]:
    """Return the names that the class's constructor takes, following `**options` to the parents."""
    names: set[str] = set()
    for ancestor in cls.__mro__:
        if "__init__" not in vars(ancestor):
            continue
        parameters = inspect.signature(vars(ancestor)["__init__"]).parameters.values()
        names |= {one.name for one in parameters}
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters):
            break
    return names


def own_step(cls: type[Optimizer]) -> Callable[..., Any]:
    """Return the class's `step` without the wrappers, which call hooks, that torch puts around it."""
    step: Any = cls.step
    while getattr(step, "__code__", None) is HOOK_CALLER:
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]
