"""The optimizer's side of an operation: overwritten rows are updated as a fresh parameter's rows would be.

An optimizer remembers every element of a parameter (its **state**: momentum, moments) and, once per
parameter, how many steps it took (`step`). Rows that surgery overwrites must forget the former; the latter
belongs to all rows and is never touched. Two things are done:

- `refresh` gives the rows the state of a fresh parameter, learned by letting the same optimizer class take
  one step on a scratch parameter, so that it also holds for state that does not start at zero;
- `births` notes the step at which rows were overwritten. Adam divides its moments by `1 - beta ** step`
  (Kingma & Ba 2015, algorithm 1), which is wrong for a row younger than its parameter: 3.2 times too large
  at first, 6.6 times at its peak. A pair of step hooks writes the young rows' update anew, from the
  optimizer's own moments, with `age = step - birth` in the place of `step`, until the two corrections agree.

Everything else (parameter groups, state keys, the tensors themselves, all other elements) stays as it is.
The hooks live on the optimizer. As torch drops hooks on pickling and copying, neither a copy of the model
nor a copy or a pickle of the optimizer has them; `births` installs them again.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch.transaction import Change, WriteRows, revert

__all__ = [
    "as_optimizers",
    "births",
    "check_owners",
    "current_step",
    "notes",
    "refresh",
    "unowned",
    "young_rows",
]

Group = dict[str, Any]


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """Return what was passed as `optimizer=` as a tuple, each optimizer once.

    Raises `OptimizerError` for anything but an optimizer, a sequence of optimizers, or None.

    >>> as_optimizers(None)
    ()
    """
    if optimizer is None:
        return ()
    found = optimizer if isinstance(optimizer, Sequence) and not isinstance(optimizer, str) else (optimizer,)
    for one in found:
        if not isinstance(one, Optimizer):
            raise OptimizerError(
                "optimizer= takes a torch.optim.Optimizer, a sequence of them, or None; "
                f"found {type(one).__name__}. Pass the optimizer itself: of a scheduler, "
                "scheduler.optimizer; of a wrapper, what it wraps."
            )
    return tuple(dict.fromkeys(found))


def check_owners(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `OptimizerError` for an optimizer that owns none of the model's parameters (given by name)."""
    for optimizer in optimizers:
        if any(_group(optimizer, parameter) is not None for parameter in parameters.values()):
            continue
        name = type(optimizer).__name__
        num_owned = sum(len(group["params"]) for group in optimizer.param_groups)
        raise OptimizerError(
            f"{name} owns none of the model's {len(parameters)} parameters: it has {num_owned}, all of "
            "another model. Was it built before the model was moved to a device, copied or re-created? Build "
            f"it from this model, optimizer = {name}(model.parameters(), ...), and pass that one."
        )


def unowned(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Return the names of the parameters that no optimizer owns, in order."""
    return tuple(name for name, parameter in parameters.items() if not any(_owners(optimizers, parameter)))


def current_step(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> int | None:
    """Return how many steps the owner has taken for the parameter, 0 before its first.

    None when no optimizer owns the parameter, and when its owner does not count steps, as SGD does not. Of
    several owners the first that counts.
    """
    steps = (_step(optimizer, parameter) for optimizer, _ in _owners(optimizers, parameter))
    return next((step for step in steps if step is not None), None)


def refresh(optimizers: Sequence[Optimizer], parameter: nn.Parameter, rows: Tensor) -> list[Change]:
    """Plan the changes that give rows of a parameter the state of a fresh parameter, in all its optimizers.

    `rows`: (r,) int64, indices along dim 0. The changes are to be run after those that write the rows
    themselves: some optimizers' state is a copy of the weights. A parameter without state needs no change.
    Raises `OptimizerError` for state that cannot be learned, or that couples rows, before anything changes.

    >>> layer = nn.Linear(2, 3)
    >>> adam = Adam(layer.parameters())
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> adam.step()
    >>> for change in refresh([adam], layer.weight, torch.tensor([1])):
    ...     change.apply()
    >>> (adam.state[layer.weight]["exp_avg"] == 0).all(dim=1).tolist()
    [False, True, False]
    """
    changes: list[Change] = []
    for optimizer, group in _owners(optimizers, parameter):
        if not optimizer.state.get(parameter) or not rows.numel():
            continue
        family = _family(optimizer)
        _fresh_rows(optimizer, parameter, rows)
        if family is None:
            _refuse_coupled(optimizer, group, parameter)
        changes.append(_Refresh(optimizer, parameter, rows))
        if family is not None and family.first_step and group.get("dampening"):
            changes.append(_Register(optimizer, parameter, rows, [1] * rows.numel()))
    return changes


def births(
    optimizers: Sequence[Optimizer], parameter: nn.Parameter, rows: Tensor, steps: Sequence[int]
) -> list[Change]:
    """Plan the changes that register rows of a parameter as born at `steps`, with the step hooks they need.

    `rows`: (r,) int64; `steps`: r values of `current_step(optimizers, parameter)`, at surgery all of them
    the current one. A row registered before takes the new birth. A row born at step 0 is as old as its
    parameter and needs no correction, nor do optimizers without bias correction. Births later than the
    owner's step wait for a state to be loaded; the next step forgets them.
    """
    now = current_step(optimizers, parameter)
    changes: list[Change] = []
    for optimizer, _ in _owners(optimizers, parameter):
        family, step = _family(optimizer), _step(optimizer, parameter)
        if family is None or not family.ages or step is None or now is None:
            continue
        own = [born - now + step for born in steps]
        if any(born > 0 for born in own) or parameter in young_rows(optimizer):
            changes.append(_Register(optimizer, parameter, rows, own))
    return changes


def notes(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> list[str]:
    """Return what a report should say of the parameter's optimizers: a line for each of an unknown family."""
    found = []
    for optimizer, _ in _owners(optimizers, parameter):
        state = optimizer.state.get(parameter)
        if not state or _family(optimizer) is not None:
            continue
        shared = ", ".join(key for key, entry in state.items() if _is_shared(key, entry, parameter))
        note = f"{type(optimizer).__name__}: unknown family; rows took the state of a fresh parameter"
        if shared:
            note += f", what all rows share ({shared}) is left as it is and may scale their first updates"
        found.append(note)
    return found


def young_rows(optimizer: Optimizer) -> dict[nn.Parameter, dict[int, int]]:
    """Return the rows the step hooks still correct: parameter -> row -> birth. It waits for the device."""
    corrections = _CORRECTIONS.get(optimizer)
    young = {} if corrections is None else corrections.young
    return {
        parameter: {
            row: int(birth) for row, birth in zip(one.rows.tolist(), one.births.tolist(), strict=True) if birth == birth
        }
        for parameter, one in young.items()
    }


# -- who owns what -------------------------------------------------------------------------------------------


def _owners(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> Iterator[tuple[Optimizer, Group]]:
    """Yield each optimizer that owns the parameter, with the parameter's group."""
    for optimizer in optimizers:
        group = _group(optimizer, parameter)
        if group is not None:
            yield optimizer, group


def _group(optimizer: Optimizer, parameter: nn.Parameter) -> Group | None:
    groups = (group for group in optimizer.param_groups if any(one is parameter for one in group["params"]))
    return next(groups, None)


def _step(optimizer: Optimizer, parameter: nn.Parameter) -> int | None:
    """Return the optimizer's count of steps for a parameter it owns; None when it keeps none."""
    family = _family(optimizer)
    if family is not None and family.first_step:
        return None
    state = optimizer.state.get(parameter)
    if not state:
        return 0
    step = state.get("step")
    is_count = isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1)
    return int(step) if is_count else None


# -- fresh state, learned from a scratch parameter -----------------------------------------------------------


class _Refresh:
    """Write the state of a fresh parameter into rows, learned from the weights that the rows have by then."""

    def __init__(self, optimizer: Optimizer, parameter: nn.Parameter, rows: Tensor) -> None:
        self.optimizer, self.parameter, self.rows = optimizer, parameter, rows
        self.writes: list[WriteRows] = []

    def apply(self) -> None:
        self.writes = [
            WriteRows(entry, self.rows.to(entry.device), values)
            for entry, values in _fresh_rows(self.optimizer, self.parameter, self.rows)
        ]
        for write in self.writes:
            write.apply()

    def revert(self) -> None:
        revert(self.writes)


def _fresh_rows(optimizer: Optimizer, parameter: nn.Parameter, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (state tensor of the parameter's shape, its (r, ...) fresh rows) for each such tensor."""
    group = _group(optimizer, parameter)
    assert group is not None, "asked of owners only"
    weights = parameter.detach().index_select(0, rows.to(parameter.device))
    _, fresh = _scratch_step(optimizer, group, weights, torch.zeros_like(weights))
    pairs: list[tuple[Tensor, Tensor]] = []
    for key, entry in optimizer.state[parameter].items():
        if _is_shared(key, entry, parameter):
            continue
        _refuse_shape(optimizer, key, entry, parameter)
        if not isinstance(fresh.get(key), Tensor) or fresh[key].shape != weights.shape:
            raise OptimizerError(
                f"the operated rows of a parameter need a fresh {key!r}, but {type(optimizer).__name__} has "
                f"none after its first step, so it cannot be learned. {_ELEMENT_WISE}"
            )
        pairs.append((entry, fresh[key]))
    return pairs


def _is_shared(key: str, entry: object, parameter: nn.Parameter) -> bool:
    """Whether a state entry belongs to the whole parameter: a number, or a tensor of one element."""
    if isinstance(entry, Tensor):
        return entry.numel() == 1 and (key == "step" or entry.shape != parameter.shape)
    return entry is None or isinstance(entry, (int, float, complex, str))


def _refuse_shape(optimizer: Optimizer, key: str, entry: object, parameter: nn.Parameter) -> None:
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


def _refuse_coupled(optimizer: Optimizer, group: Group, parameter: nn.Parameter) -> None:
    """Refuse an optimizer in which one row's first update depends on another row's weights or gradient.

    State of the parameter's shape does not tell (Muon, LAMB, Adafactor's vectors), two steps on two rows do.
    """
    if parameter.shape[0] < 2:
        return
    cls, shape = type(optimizer).__name__, tuple(parameter.shape)
    generator = torch.Generator().manual_seed(0)
    weights, gradient = torch.randn((2, 2, *shape[1:]), generator=generator).to(parameter.detach())
    factor = _over_rows(torch.tensor([1.0, 3.0]).to(weights), weights)
    alone, _ = _scratch_step(optimizer, group, weights, gradient)
    beside, _ = _scratch_step(optimizer, group, weights * factor, gradient * (factor == 1))
    if not torch.equal(alone[0], beside[0]):
        raise OptimizerError(
            f"{cls} couples the rows of a parameter of shape {shape}: the update of one row depends on the "
            f"others, so single rows cannot be made fresh. {_ELEMENT_WISE}"
        )


def _scratch_step(
    optimizer: Optimizer, group: Group, weights: Tensor, gradient: Tensor
) -> tuple[Tensor, Mapping[str, Any]]:
    """Take one step of the optimizer's class on a scratch parameter; return its weights and its state.

    The group's hyper-parameters apply, except weight decay, which would put a gradient into the state. No
    hook fires (the class's own `step` is called), and the random state is left as it was.
    """
    cls, options = type(optimizer), _scratch_options(group)
    parameter = nn.Parameter(weights.clone())
    parameter.grad = gradient.clone()
    accepted = _accepted_options(cls)
    with torch.random.fork_rng(devices=[weights.device] if weights.device.type == "cuda" else []):
        try:
            scratch = cls([parameter], **{key: entry for key, entry in options.items() if key in accepted})
            scratch.param_groups[0].update(options)
            _own_step(cls)(scratch)
        except Exception as error:
            raise OptimizerError(
                f"the state that {cls.__name__} gives a fresh parameter cannot be learned: building one from "
                "its parameter group and stepping on a scratch copy failed with "
                f"{type(error).__name__}: {error}. If it wraps another optimizer, pass that one. " + _ELEMENT_WISE
            ) from error
    return parameter.detach(), scratch.state.get(parameter, {})


def _scratch_options(group: Group) -> Group:
    options = {key: option for key, option in group.items() if key not in ("params", "param_names")}
    for key, option in options.items():
        if isinstance(option, Tensor):
            options[key] = option.detach().clone()
    if "weight_decay" in options:
        options["weight_decay"] = 0.0
    return options


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


# -- families ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """What is known of a class of optimizers.

    `correct(optimizer, parameter, group, young, sweep)` writes the young rows' update anew after a step and
    returns those that stay young. `ages`: the correction goes by age, so it needs `births`. `first_step`:
    there is no count of steps, and only the first update needs correcting.
    """

    correct: Callable[[Optimizer, nn.Parameter, Group, _Young, bool], _Young | None] | None = None
    ages: bool = False
    first_step: bool = False


def _family(optimizer: Optimizer) -> _Family | None:
    """Return the row of the class, or of the parent whose `step` it uses; None when the family is unknown."""
    cls = type(optimizer)
    known = next((ancestor for ancestor in cls.__mro__ if ancestor in _FAMILIES), None)
    return _FAMILIES[known] if known is not None and _own_step(cls) is _own_step(known) else None


def _own_step(cls: type[Optimizer]) -> Callable[..., Any]:
    """Return the class's `step` without the wrappers, which call hooks, that torch puts around it."""
    step: Any = cls.step
    while getattr(step, "__code__", None) is _HOOK_CALLER:
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


_HOOK_CALLER = Optimizer.profile_hook_step(Optimizer.step).__code__


# -- step hooks and what they correct ------------------------------------------------------------------------


@dataclass
class _Young:
    """The young rows of one parameter, on its device; `weights` and `step` are as they were before the step.

    `rows`: (r,) int64; `births`: (r,) float, NaN for a row to be forgotten, none after `latest`; `weights`:
    (r, ...); `step`: 0-d when it lives on the device.
    """

    rows: Tensor
    births: Tensor
    latest: float
    weights: Tensor | None = None
    step: float | Tensor | None = None


class _Corrections:
    """The pair of step hooks of one optimizer, and the young rows they correct.

    It refers to no optimizer, and to parameters only as long as the optimizer owns them.
    """

    # Looking for rows that are no longer young makes the host wait for the device: not at every step.
    SWEEP_EVERY = 64

    def __init__(self) -> None:
        self.young: dict[nn.Parameter, _Young] = {}
        self.num_steps = 0

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        family = _family(optimizer) if self.young else None
        for parameter, _, young in self._each(optimizer):
            step = _clock(optimizer.state.get(parameter, {}).get("step", 0.0), young.births)
            if family is not None and family.ages and isinstance(step, float) and young.latest > step:
                young = self.young[parameter] = _born_until(young, step)
            young.weights, young.step = parameter.index_select(0, young.rows), step

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        family = _family(optimizer)
        if not self.young or family is None or family.correct is None:
            return
        self.num_steps += 1
        sweep = self.num_steps % self.SWEEP_EVERY == 0
        # Rows without a snapshot were overwritten during this step, by another hook: it was not theirs.
        remaining = {
            parameter: family.correct(optimizer, parameter, group, young, sweep) if young.weights is not None else young
            for parameter, group, young in self._each(optimizer)
        }
        self.young = {parameter: young for parameter, young in remaining.items() if young is not None}
        for young in self.young.values():
            young.weights = young.step = None

    def _each(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Group, _Young]]:
        if self.young:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter in self.young:
                        yield parameter, group, self.young[parameter]


_CORRECTIONS: WeakKeyDictionary[Optimizer, _Corrections] = WeakKeyDictionary()


class _Register:
    """Enter rows of a parameter among the young of an optimizer, installing its hooks if there are none."""

    def __init__(self, optimizer: Optimizer, parameter: nn.Parameter, rows: Tensor, steps: Sequence[int]) -> None:
        assert rows.numel() == len(steps), "one birth for each row"
        dtype = torch.float64 if parameter.dtype in (torch.float64, torch.complex128) else torch.float32
        births = torch.tensor(steps, dtype=dtype, device=parameter.device)
        self.optimizer, self.parameter = optimizer, parameter
        self.entered = _Young(rows.to(parameter.device), births, max(steps))
        self.replaced: dict[nn.Parameter, _Young] | None = None  # None until the rows are about to be entered
        self.handles: list[Any] = []

    def apply(self) -> None:
        if self.optimizer not in _CORRECTIONS:
            corrections = _Corrections()
            self.handles.append(self.optimizer.register_step_pre_hook(corrections.before_step))
            self.handles.append(self.optimizer.register_step_post_hook(corrections.after_step))
            _CORRECTIONS[self.optimizer] = corrections
        young = _CORRECTIONS[self.optimizer].young
        self.replaced = dict(young)
        young[self.parameter] = _with_rows(young.get(self.parameter), self.entered)

    def revert(self) -> None:
        corrections = _CORRECTIONS.get(self.optimizer)
        if corrections is not None and self.replaced is not None:
            corrections.young = self.replaced
        for handle in self.handles:
            handle.remove()
            _CORRECTIONS.pop(self.optimizer, None)


def _born_until(young: _Young, step: float) -> _Young:
    """Return the rows born by then: later births belong to a state that was replaced."""
    stays = young.births <= step
    return _Young(young.rows[stays], young.births[stays], step)


def _with_rows(young: _Young | None, entered: _Young) -> _Young:
    """Return the young rows with those entered, whose births replace earlier ones; born at 0 is not young."""
    is_young = entered.births > 0
    rows, born, latest = entered.rows[is_young], entered.births[is_young], entered.latest
    if young is not None:
        latest = max(latest, young.latest)
        stays = ~torch.isin(young.rows, entered.rows)
        rows, born = torch.cat([young.rows[stays], rows]), torch.cat([young.births[stays], born])
    return _Young(rows, born, latest)


def _correct_dampening(
    optimizer: Optimizer, parameter: nn.Parameter, group: Group, young: _Young, sweep: bool
) -> _Young | None:
    """SGD's first gradient enters the buffer undamped, later ones times `1 - dampening`: undo that once.

    With a dampening of 1 the row's buffer holds no trace of the gradient; it stays 0. A first step that the
    fused kernel skips for an overflow counts as the first.
    """
    buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
    if parameter.grad is None:
        return young
    if buffer is not None and group["momentum"] and group["dampening"] != 1:
        assert young.weights is not None, "the step hooks come in pairs"
        first = buffer.index_select(0, young.rows) / (1 - group["dampening"])
        buffer.index_copy_(0, young.rows, first)
        moved = young.weights - _on(group["lr"], parameter) * first
        parameter.index_copy_(0, young.rows, moved.to(parameter))
    return None


def _correct_bias(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    group: Group,
    young: _Young,
    sweep: bool,
    *,
    is_decoupled: bool = False,
) -> _Young | None:
    """Write the update of Adam's young rows anew, with the bias corrections at their ages.

    A step that did not count (no gradient, an overflow found by a gradient scaler) changes nothing.
    With a `step` on the device that is masked, not branched on, which would make the host wait.
    """
    state = optimizer.state.get(parameter, {})
    if "step" not in state:
        return young
    assert young.weights is not None and young.step is not None, "the step hooks come in pairs"
    step, rows = _clock(state["step"], young.births), young.rows
    is_due = _is_due(young, step)
    if is_due is False:
        return _still_young(young, group, step) if sweep else young
    moment = state["exp_avg"].index_select(0, rows)
    square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].index_select(0, rows)
    is_decoupled = group.get("decoupled_weight_decay", is_decoupled)
    ages = step - young.births
    moved = _adam_update(group, young.weights, moment, square, ages, is_decoupled=is_decoupled).to(parameter)
    if isinstance(is_due, Tensor):
        moved = torch.where(_over_rows(is_due, moved), moved, parameter.index_select(0, rows))
    parameter.index_copy_(0, rows, moved)
    return _still_young(young, group, step) if sweep else young


def _is_due(young: _Young, step: float | Tensor) -> bool | Tensor:
    """Whether the step counted; on the device for each row, (r,), and not for those born after the step before.

    Those belong to a state that was replaced: their births become NaN, so that they never fall due.
    """
    assert young.step is not None, "the step hooks come in pairs"
    counted = step - young.step == 1
    if isinstance(counted, bool):
        return counted
    young.births.masked_fill_(young.births > young.step, torch.nan)
    return (step - young.births >= 1) & counted


def _adam_update(
    group: Group, weights: Tensor, moment: Tensor, square: Tensor, ages: Tensor, *, is_decoupled: bool
) -> Tensor:
    """Return `w (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps)`, its decay only where it is decoupled.

    All but `ages` (r,): (r, ...). Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2, with
    the schedule multiplier in `lr` and decay times `lr`, as torch has it. Complex numbers count as pairs.
    """
    if weights.is_complex():
        weights, moment, square = (torch.view_as_real(entry) for entry in (weights, moment, square))
        pairs = _adam_update(group, weights, moment, square, ages, is_decoupled=is_decoupled)
        return torch.view_as_complex(pairs)
    weights, moment, square = (entry.to(ages.dtype) for entry in (weights, moment, square))
    lr, decay = _on(group["lr"], ages), _on(group["weight_decay"], ages)
    moment_bias, square_bias = (_over_rows(_bias(beta, ages), weights) for beta in group["betas"])
    decayed: Tensor = weights * (1 - lr * decay) if is_decoupled else weights
    direction = (moment / moment_bias) / ((square / square_bias).sqrt() + group["eps"])
    moved: Tensor = decayed - lr * direction
    return moved


def _still_young(young: _Young, group: Group, step: float | Tensor) -> _Young | None:
    """Return the rows whose corrections still differ from their parameter's; None when there are none."""
    tolerance = 1e-15 if young.births.dtype is torch.float64 else 1e-7
    ages, full_ages = step - young.births, step - torch.zeros_like(young.births)
    pairs = [(_bias(beta, ages), _bias(beta, full_ages)) for beta in group["betas"]]
    differ = torch.stack([1 - own / shared > tolerance for own, shared in pairs])
    stays = differ.any(dim=0) & ~young.births.isnan()
    return _Young(young.rows[stays], young.births[stays], young.latest) if bool(stays.any()) else None


def _bias(beta: float | Tensor, ages: Tensor) -> Tensor:
    """Return `1 - beta ** age` without cancellation."""
    if isinstance(beta, Tensor):
        return -torch.expm1(ages * beta.to(ages).reshape(()).log())
    return -torch.expm1(ages * math.log(beta)) if beta > 0 else torch.ones_like(ages)


def _clock(step: float | Tensor, like: Tensor) -> float | Tensor:
    """Return a step count the host can read without waiting as a number, any other as a copy, 0-d, on the device."""
    if isinstance(step, Tensor) and step.device.type != "cpu":
        return step.to(like, copy=True).reshape(())
    return float(step)


def _on(scalar: Any, like: Tensor) -> Any:
    """Return a hyper-parameter, step or other scalar as it can be combined with `like`: a number, or 0-d."""
    return scalar.detach().to(like).reshape(()) if isinstance(scalar, Tensor) else scalar


def _over_rows(column: Tensor, like: Tensor) -> Tensor:
    """Shape one value per row, (r,), to apply to all of `like`, (r, ...)."""
    return column.view(-1, *[1] * (like.dim() - 1))


# A new family is a new row. No bias correction, no note: the scratch state is all that RMSprop needs.
_FAMILIES: dict[type[Optimizer], _Family] = {
    SGD: _Family(_correct_dampening, first_step=True),
    Adam: _Family(_correct_bias, ages=True),
    AdamW: _Family(functools.partial(_correct_bias, is_decoupled=True), ages=True),
    RMSprop: _Family(),
}
