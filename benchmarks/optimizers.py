"""How rows that were operated on are updated, against a fresh parameter's, and what is felt by the others.

`python -m benchmarks.optimizers` prints the table of docs/how-to/optimizers.md: for each optimizer the first and the
largest of 40 updates of operated rows, as a multiple of a fresh parameter's, the worst of three kinds of gradients
(constant, random, growing), and by how much the next updates of all other rows differ from those of a twin that was not
operated on.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_optimizer
import torch
from lion_pytorch import Lion
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from torch import Tensor, nn, optim

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch import optimizers as owners
from neuronsurgery.pytorch.transaction import WriteRows, run

ROWS = torch.tensor([1, 3])
NUM_STEPS = 40

Make = Callable[..., Any]
OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD, momentum": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adam, amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True),
    "Adam, fused": partial(optim.Adam, lr=0.01, fused=True),
    "AdamW": partial(optim.AdamW, lr=0.01),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "Adagrad, decaying": partial(optim.Adagrad, lr=0.1, lr_decay=0.1),
    "Adadelta": partial(optim.Adadelta, lr=0.5),
    "ASGD": partial(optim.ASGD, lr=0.01, lambd=0.01, t0=5),
    "RMSprop, centered": partial(optim.RMSprop, lr=0.01, centered=True),
    "Rprop": partial(optim.Rprop, lr=0.03),
    "LBFGS": optim.LBFGS,
    "SparseAdam": optim.SparseAdam,
    "Muon": partial(optim.Muon, lr=0.01),
    "Adafactor": partial(optim.Adafactor, lr=0.01),
    "Lion (lion-pytorch)": partial(Lion, lr=0.001),
    "AdamW (schedulefree)": partial(AdamWScheduleFree, lr=0.01),
    "SGD (schedulefree)": partial(SGDScheduleFree, lr=0.1),
    "RAdam (schedulefree)": partial(RAdamScheduleFree, lr=0.01),
    **{
        f"{name} (pytorch-optimizer)": partial(getattr(pytorch_optimizer, name), lr=0.01)
        for name in (
            *"AdaBelief AdaMod Adan ADOPT AdEMAMix DiffGrad ScheduleFreeAdamW SGDW Tiger Yogi".split(),
            *"AdamP DAdaptAdaGrad Prodigy StableAdamW AdaFactor Lamb Shampoo SOAP".split(),
        )
    },
    "SAM (pytorch-optimizer)": lambda parameters: pytorch_optimizer.SAM(parameters, optim.SGD, lr=0.1),
    "Lookahead (pytorch-optimizer)": lambda parameters: pytorch_optimizer.Lookahead(optim.Adam(parameters)),
}


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| optimizer | first update | largest update | other rows |\n|---|---|---|---|")  # noqa: T201
    for name, make in OPTIMIZERS.items():
        print(f"| {name} | {' | '.join(measured(make))} |")  # noqa: T201


def measured(make: Make) -> tuple[str, str, str]:
    """The cells of a row."""
    try:
        found = [trial(make, gradients) for gradients in GRADIENTS]
    except OptimizerError as error:
        return ("refused", str(error).split(": ")[0].split(" of a parameter")[0], "")
    first, largest, others = (max(column) for column in zip(*found, strict=True))
    return (f"{first:.3f}", f"{largest:.3f}", "identical" if others == 0 else f"differ by {others:.1%}")


def constant(step: int, shape: tuple[int, ...]) -> Tensor:
    """The same at every step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def random(step: int, shape: tuple[int, ...]) -> Tensor:
    """Another at every step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) + 0.5


def growing(step: int, shape: tuple[int, ...]) -> Tensor:
    """A percent larger at every step."""
    return constant(step, shape) * 1.01**step


GRADIENTS = (constant, random, growing)


def trial(make: Make, gradients: Callable[[int, tuple[int, ...]], Tensor]) -> tuple[float, float, float]:
    """First and largest update of operated rows over a fresh parameter's, and the others' relative difference."""
    weights = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    used, twin = (nn.Parameter(weights.clone()) for _ in range(2))
    optimizer, untouched = started(make, used), started(make, twin)
    for step in range(100):
        for one, parameter in ((optimizer, used), (untouched, twin)):
            take(one, parameter, gradients(step, (16, 8)))
    new = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    owned = owners.as_optimizers(optimizer)
    changes: list[Any] = [WriteRows(used.data, ROWS, new), *owners.refresh(owned, used, ROWS)]
    step_now = owners.current_step(owned, used)
    if step_now is not None:
        changes += owners.births(owned, used, ROWS, [step_now] * 2)
    run(changes)
    couples = bool(owners.notes(owned, used))
    fresh = nn.Parameter(used.detach().clone() if couples else new.clone())
    anew = started(make, fresh)
    others = [row for row in range(16) if row not in ROWS]
    sizes, expected, apart = [], [], 0.0
    for step in range(100, 100 + NUM_STEPS):
        gradient = gradients(step, (16, 8))
        moved = take(optimizer, used, gradient)
        beside = take(untouched, twin, gradient)
        fresh_moved = take(anew, fresh, gradient if couples else gradient[ROWS])
        if step == 100:
            apart = float((moved - beside)[others].norm() / beside[others].norm())
        sizes.append(moved[ROWS].abs().mean())
        expected.append((fresh_moved[ROWS] if couples else fresh_moved).abs().mean())
    size, wanted = torch.stack(sizes), torch.stack(expected)
    first = float(size[0] / wanted[0]) if float(wanted[0]) else 1.0 + float(size[0])  # some only look in a first step
    return first, float(size.max() / wanted.max()), apart


def started(make: Make, parameter: nn.Parameter) -> Any:
    """The optimizer of one parameter, told that the run trains where it asks for that."""
    optimizer = make([parameter])
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return optimizer


def take(optimizer: Any, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """One step; returns the update."""
    before = parameter.detach().clone()

    def closure() -> Tensor:
        parameter.grad = gradient.clone()
        return torch.zeros(())

    if isinstance(optimizer, optim.SparseAdam):
        parameter.grad = gradient.clone().to_sparse()
        optimizer.step()
    elif isinstance(optimizer, (optim.LBFGS, pytorch_optimizer.SAM)):
        closure()
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    return copy.copy(parameter.detach() - before)


if __name__ == "__main__":
    main()
