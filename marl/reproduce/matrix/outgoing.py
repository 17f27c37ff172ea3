"""Outgoing weights of operated units drawn anew, while what they were is carried by frozen members.

The library keeps the outgoing weights of composites; without them there is one more ablation. A unit u with outgoing
weights v gets fresh ones w, and its consumer goes on to read v u = w u + (v - w) u. Of the latter u is frozen, as it is
at the operation: all of the unit's frozen members but the latest compensation, which with the active member is zero.
So each frozen member has, beside its share of its unit, a frozen share of each row of the consumer, its difference.
Differences add up over operations, and fade with the members.

A row of the consumer that is operated on at the same time is drawn anew anyway, with the outgoing weights in it. Its
differences stay with what it knew: they go to the frozen member that was the row, and fresh ones begin without any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marl.agents import FeedForwardAgent
from marl.errors import SettingsError
from marl.learner import Learner
from marl.seeding import seed_for
from marl.surgery import FrozenRows

__all__ = ["Differences", "carried_on", "consumer_of", "renew_outgoing"]

Name = tuple[int, int, bytes, float]
"""Of a frozen member: unit, sign, weights and bias. Its place and its operation change as others are taken out."""


def consumer_of(networks: nn.Module, site: str) -> str:
    """The name of the linear layer that reads a hidden layer, and nothing else does.

    Raises:
        SettingsError: what reads it is no linear layer.

    >>> from marl.reproduce.matrix.learners import LearnerSettings, make_one
    >>> networks = make_one(LearnerSettings(), 5, seed=0).online
    >>> [consumer_of(networks, site) for site in ("agent.encoder.0", "agent.encoder.2", "mixer.w1.0")]
    ['agent.encoder.2', 'agent.head', 'mixer.w1.2']
    """
    parent_name, _, place = site.rpartition(".")
    after = int(place) + 2  # behind the activation function
    parent = networks.get_submodule(parent_name)
    assert isinstance(parent, nn.Sequential)
    if after < len(parent):
        name, consumer = f"{parent_name}.{after}", parent[after]
    else:
        name, consumer = "agent.head", networks.get_submodule("agent")
        consumer = consumer.head if isinstance(consumer, FeedForwardAgent) else consumer
    if not isinstance(consumer, nn.Linear):
        found = type(consumer).__name__
        raise SettingsError(
            f"asked to draw the outgoing weights of {site} anew, found a {found} behind it: choose agents and a mixer "
            "whose hidden layers are read by linear layers, feed_forward and qmix or vdn"
        )
    return name


@torch.no_grad()
def renew_outgoing(learner: Learner, operated: Mapping[str, tuple[int, ...]], *, seed: int) -> None:
    """Draw the outgoing weights of units anew, as `nn.Linear` does, with the optimizer's state of fresh ones.

    The learner's output changes, unless its frozen members carry the difference. Rows that were operated on themselves
    are fresh already.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "surgery"))  # apart from what the library draws
    for site, units in operated.items():
        consumer = consumer_of(learner.online, site)
        weight = learner.online.get_parameter(f"{consumer}.weight")
        bound = weight.shape[1] ** -0.5
        drawn = weight.new_empty(len(weight), len(units)).uniform_(-bound, bound, generator=generator)
        own = set(operated.get(consumer, ()))
        rows = torch.tensor([row for row in range(len(weight)) if row not in own], dtype=torch.int64)
        entries = rows.unsqueeze(1), torch.tensor(units, dtype=torch.int64)
        weight[entries] = drawn[rows]
        for value in learner.optimizer.state.get(weight, {}).values():
            if value.ndim:
                value[entries] = 0


@dataclass(frozen=True, eq=False)
class Differences:
    """What frozen members add to a consumer beside its weights."""

    table: Tensor
    """To each of its rows and of its own frozen rows, (K, O + L)."""
    members: Sequence[Name]
    """Of which frozen members, K."""
    readers: Sequence[Name]
    """To which frozen rows, L."""


def carried_on(
    before: Differences | None, change: Tensor, rows: FrozenRows | None, consumer_rows: FrozenRows | None
) -> Differences:
    """The differences after an operation.

    `change` (O, H) is what the consumer's weights were less what they are; `rows` and `consumer_rows` are the frozen
    members now, the latest last. The library takes out members that count nothing: those that have faded, and equal
    ones of opposite signs, whose differences are opposite as well.

    One unit, v = 2 and w = 0.5: what it knew adds 1.5 times its activation, and the compensation nothing.

    >>> rows = FrozenRows(*torch.zeros(2, 2, 1), *torch.tensor([[0, 0], [1, -1], [0, 0]]), *torch.zeros(3, 2))
    >>> carried_on(None, torch.tensor([[1.5]]), rows, None).table
    tensor([[1.5000],
            [0.0000]])
    """
    num_outputs, members, readers = len(change), _names(rows), _names(consumer_rows)
    old = change.new_zeros(0, num_outputs) if before is None else _of_those_left(before, members, readers)
    num_old, width = old.shape
    unit, sign = _units_and_signs(rows)
    reader, reader_sign = (each[width - num_outputs :] for each in _units_and_signs(consumer_rows))
    table = change.new_zeros(len(unit), width + len(reader))
    table[:num_old, :width] = old
    was_live = reader_sign > 0
    table[:, width:][:, was_live] = table[:, reader[was_live]]
    table[:, reader] = 0
    is_latest = torch.arange(len(unit)) >= num_old
    counts = sign.masked_fill(is_latest & (sign < 0), 0)
    table[:, :num_outputs] += counts.unsqueeze(1) * change.index_fill(0, reader, 0)[:, unit].T
    return Differences(table, members, readers)


def _of_those_left(before: Differences, members: Sequence[Name], readers: Sequence[Name]) -> Tensor:
    num_outputs = before.table.shape[1] - len(before.readers)
    left, left_readers = set(members), set(readers)
    rows = [place for place, name in enumerate(before.members) if name in left]
    columns = [num_outputs + place for place, name in enumerate(before.readers) if name in left_readers]
    return before.table[rows][:, [*range(num_outputs), *columns]]


def _names(rows: FrozenRows | None) -> list[Name]:
    if rows is None:
        return []
    weights = [weight.numpy().tobytes() for weight in rows.weight.detach()]
    return list(zip(rows.unit.tolist(), rows.sign.tolist(), weights, rows.bias.tolist(), strict=True))


def _units_and_signs(rows: FrozenRows | None) -> tuple[Tensor, Tensor]:
    none = torch.zeros(0, dtype=torch.int64)
    return (none, none) if rows is None else (rows.unit, rows.sign)
