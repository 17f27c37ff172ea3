"""Every optimizer of torch, and those that people take from elsewhere: how to make one, what an operation does to it.

`measured` steps an optimizer on one parameter, overwrites rows as surgery does, and goes on beside two twins: `fresh`,
a parameter of the new rows alone, and `untouched`, which nobody operated on. All see the same gradients.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lion_pytorch
import schedulefree
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from neuronsurgery.pytorch import optimizers as owners
from neuronsurgery.pytorch.transaction import WriteRows, run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # some of its modules are deprecated by others of its modules
    import pytorch_optimizer

Make = Callable[[list[nn.Parameter]], Optimizer]
Kind = Literal["constant", "random", "growing"]
KINDS: tuple[Kind, ...] = ("constant", "random", "growing")
ROWS, OTHERS = torch.tensor([1, 3]), torch.tensor([0, 2, 4, 5])
SHAPE = (6, 8)


def training(cls: Callable[..., Any], **options: Any) -> Make:
    """A schedule-free optimizer, which has to be told that it trains."""

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer: Optimizer = cls(parameters, **options)
        optimizer.train()  # type: ignore[attr-defined]
        return optimizer

    return make


# Element-wise: operated rows are a fresh parameter's, all other elements bit-identical. A new optimizer is a new row.
EXACT: Mapping[str, Make] = {
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD, momentum": partial(optim.SGD, lr=0.1, momentum=0.9),
    "SGD, dampening": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "SGD, Nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SGD, foreach": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.3, foreach=True),
    "SGD, fused": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.3, fused=True),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adam, foreach": partial(optim.Adam, lr=0.01, foreach=True),
    "Adam, fused": partial(optim.Adam, lr=0.01, fused=True),
    "Adam, amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True),
    "Adam, maximize": partial(optim.Adam, lr=0.01, maximize=True),
    "AdamW": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "AdamW, foreach": partial(optim.AdamW, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW, fused": partial(optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "NAdam, foreach": partial(optim.NAdam, lr=0.01, foreach=True, weight_decay=0.1, decoupled_weight_decay=True),
    "NAdam, maximize": partial(optim.NAdam, lr=0.01, maximize=True, momentum_decay=0.1),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "RAdam, foreach": partial(optim.RAdam, lr=0.01, foreach=True, weight_decay=0.1, decoupled_weight_decay=True),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "Adamax, foreach": partial(optim.Adamax, lr=0.01, foreach=True, maximize=True),
    "Adadelta": partial(optim.Adadelta, lr=0.5),
    "Adadelta, foreach": partial(optim.Adadelta, lr=0.5, foreach=True, weight_decay=0.1),
    "Adagrad": partial(optim.Adagrad, lr=0.1, initial_accumulator_value=0.1),
    "Adagrad, lr_decay": partial(optim.Adagrad, lr=0.1, lr_decay=0.05),
    "Adagrad, foreach": partial(optim.Adagrad, lr=0.1, lr_decay=0.05, foreach=True),
    "Adagrad, fused": partial(optim.Adagrad, lr=0.1, lr_decay=0.05, fused=True),
    "ASGD": partial(optim.ASGD, lr=0.1, lambd=0.01, t0=50),
    "ASGD, foreach": partial(optim.ASGD, lr=0.1, foreach=True),
    "RMSprop": partial(optim.RMSprop, lr=0.01),
    "RMSprop, centered": partial(optim.RMSprop, lr=0.01, centered=True, momentum=0.5),
    "RMSprop, foreach": partial(optim.RMSprop, lr=0.01, momentum=0.9, foreach=True),
    "Rprop": partial(optim.Rprop, lr=0.01),
    "Rprop, foreach": partial(optim.Rprop, lr=0.01, foreach=True),
    "Lion (lion-pytorch)": partial(lion_pytorch.Lion, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    "SGDScheduleFree": training(schedulefree.SGDScheduleFree, lr=0.1),
    "AdamWScheduleFree": training(schedulefree.AdamWScheduleFree, lr=0.01, weight_decay=0.1),
    "AdamWScheduleFree, warmup": training(schedulefree.AdamWScheduleFree, lr=0.01, warmup_steps=30, r=0.5),
    "RAdamScheduleFree": training(schedulefree.RAdamScheduleFree, lr=0.01, foreach=False),
    "Lion (pytorch-optimizer)": partial(pytorch_optimizer.Lion, lr=1e-3),
    "Adan": partial(pytorch_optimizer.Adan, lr=1e-3),
    "AdaBelief": partial(pytorch_optimizer.AdaBelief, lr=1e-3),
    "ADOPT": partial(pytorch_optimizer.ADOPT, lr=1e-3),
    "AdEMAMix": partial(pytorch_optimizer.AdEMAMix, lr=1e-3),
    "Tiger": partial(pytorch_optimizer.Tiger, lr=1e-3),
    "Yogi": partial(pytorch_optimizer.Yogi, lr=1e-2),
    "Yogi, maximize": partial(pytorch_optimizer.Yogi, lr=1e-2, maximize=True),
    "SGDW": partial(pytorch_optimizer.SGDW, lr=0.1, momentum=0.9, dampening=0.5),
}

# Rows are coupled: the operated ones and the others are measured, beside a whole fresh parameter.
COUPLED: Mapping[str, Make] = {
    "Muon": partial(optim.Muon, lr=0.02),
    "Adafactor": partial(optim.Adafactor, lr=0.01),
    "Adafactor, foreach": partial(optim.Adafactor, lr=0.01, foreach=True),
}

# Rows are coupled, by more than could be said of a row: refused before anything changes.
REFUSED: Mapping[str, Make] = {
    "LAMB": pytorch_optimizer.Lamb,
    "LARS": pytorch_optimizer.LARS,
    "Shampoo": pytorch_optimizer.Shampoo,
    "SOAP": pytorch_optimizer.SOAP,
    "Kron": pytorch_optimizer.Kron,
    "AdaFactor (pytorch-optimizer)": pytorch_optimizer.AdaFactor,
    "StableAdamW": pytorch_optimizer.StableAdamW,
    "Prodigy": pytorch_optimizer.Prodigy,
    "DAdaptAdaGrad": pytorch_optimizer.DAdaptAdaGrad,
    "AdamP": pytorch_optimizer.AdamP,
    "Adan, clipping": partial(pytorch_optimizer.Adan, max_grad_norm=0.5),
}


@contextmanager
def library_warnings() -> Iterator[None]:
    """Other people's deprecations: what a library says of its own code while it is built or stepped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


@dataclass(frozen=True)
class Measured:
    """Sizes of the operated rows' updates as multiples of a fresh parameter's; the deviation of the others'.

    `first`, `peak`: means over elements. `drift`: the largest difference of a weight from the fresh twin's at the end.
    `others_first`, `others_last`: how far the other rows' updates are from the untouched twin's, relative to those, in
    the first step and in the last.
    """

    first: float
    peak: float
    drift: float
    others_first: float
    others_last: float


def gradient(step: int, kind: Kind, shape: tuple[int, ...]) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7 if kind == "constant" else step))
    return 0.1 * ((noise + 1.0) * 1.05 ** (step - 200) if kind == "growing" else noise)


def overwrite(optimizer: Optimizer, parameter: nn.Parameter, rows: Tensor = ROWS) -> Tensor:
    """Overwrite rows and make them fresh, as surgery does; return what they are now."""
    generator = torch.Generator().manual_seed(3)
    new = torch.randn((len(rows), *parameter.shape[1:]), generator=generator).to(parameter)
    now = owners.current_step([optimizer], parameter)
    changes = [WriteRows(parameter.data, rows, new), *owners.refresh([optimizer], parameter, rows)]
    if now is not None:
        changes += owners.births([optimizer], parameter, rows, [now] * len(rows))
    run([*changes, *owners.start_clocks([optimizer], parameter)])
    return new


def measured(make: Make, kind: Kind, *, before: int = 120, after: int = 50, whole: bool = False) -> Measured:
    """Operate after some steps, go on for some, and compare; `whole`: with a fresh parameter of all the rows."""
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    parameter, untouched = nn.Parameter(weights.clone()), nn.Parameter(weights.clone())
    optimizer, beside = make([parameter]), make([untouched])
    for step in range(before):
        take_step(optimizer, parameter, gradient(step, kind, SHAPE))
        take_step(beside, untouched, gradient(step, kind, SHAPE))
    new = overwrite(optimizer, parameter)
    fresh = nn.Parameter(parameter.detach().clone() if whole else new)
    twin = make([fresh])
    sizes, others = torch.zeros(2, after), torch.zeros(after)
    for place in range(after):
        given = gradient(before + place, kind, SHAPE)
        moved = take_step(optimizer, parameter, given)
        moved_fresh = take_step(twin, fresh, given if whole else given[ROWS])
        expected = take_step(beside, untouched, given)[OTHERS]
        sizes[0, place] = moved[ROWS].abs().mean()
        sizes[1, place] = (moved_fresh[ROWS] if whole else moved_fresh).abs().mean()
        others[place] = (moved[OTHERS] - expected).norm() / expected.norm()
    peak = float(sizes[0].max() / sizes[1].max())
    first = float(sizes[0, 0] / sizes[1, 0]) if float(sizes[1, 0]) else float(sizes[0, 0] == 0)
    now = fresh.detach()[ROWS] if whole else fresh.detach()
    drift = float((parameter.detach()[ROWS] - now).abs().max())
    return Measured(first, peak, drift, float(others[0]), float(others[-1]))


def take_step(optimizer: Optimizer, parameter: nn.Parameter, given: Tensor) -> Tensor:
    """Step with a gradient and return by how much the parameter moved."""
    before = parameter.detach().clone()
    parameter.grad = given.clone()
    optimizer.step()
    return parameter.detach() - before


def reloaded(optimizer: Optimizer, make: Make, parameter: nn.Parameter) -> Optimizer:
    """A new optimizer of the parameter with the state that a checkpoint of the other would bring."""
    again = make([parameter])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return again
