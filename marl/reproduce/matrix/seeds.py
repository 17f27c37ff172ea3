"""Learners of several seeds that train side by side and are operated on one by one.

Each seed also has a learner of its own, which carries what the library keeps of it. To operate, a seed's weights and
optimizer state go there, the library does its work, and what came out goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from marl.layers import StackedLinear
from marl.learner import Learner
from marl.reproduce.matrix.outgoing import Differences, carried_on, consumer_of
from marl.reproduce.matrix.units import Lack, StackedConsumer, StackedUnits
from marl.stacking import load_module, load_optimizer, stack_learners
from marl.surgery import FrozenRows, Norms, frozen_rows, operable_sites, write_fades

__all__ = ["Seeds"]

Found = TypeVar("Found")


class Seeds:
    """R learners of the same structure, in training side by side.

    `together` is the learner that trains; its parameters have a leading dimension of R.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.alone = tuple(learners)
        self.together = stack_learners(learners)
        self.sites = operable_sites(learners[0], "agent", "mixer")
        self.layers = {site: _with_units(self.together.online, site) for site in self.sites}
        self.num_steps = 0
        """Updates so far, as the optimizer counts them."""
        self.rows: list[dict[str, FrozenRows]] = [{} for _ in learners]
        """The frozen members of each seed, which only operations change."""
        self.differences: list[dict[str, Differences]] = [{} for _ in learners]
        """What they add to consumers whose weights were drawn anew."""

    def __len__(self) -> int:
        return len(self.alone)

    def count_step(self) -> None:
        """Say that the optimizer has taken a step: members that retire fade with it."""
        self.num_steps += 1
        for layer in self.layers.values():
            layer.fade_to(self.num_steps)

    def operate(self, act: Callable[[int, Learner], Found], *, lack: Lack = "nothing") -> list[Found]:
        """Do something to each seed's learner alone, and go on side by side with what it has become.

        What composites lack, the learners alone do not know: they compute another output in between. So criteria that
        look at activations see those of composites that lack nothing, or of fresh outgoing weights without differences.
        Those by norms of rows are right; the agents' second layer has the fresh weights in its rows. Outgoing weights
        are lacked at all operations or at none.
        """
        found = []
        for seed, learner in enumerate(self.alone):
            self.bring(seed)
            found.append(act(seed, learner))
            self.rows[seed] = frozen_rows(learner.online)
            if lack == "outgoing":
                self._carry_on(seed)
            self._take_back(seed)
        for site, layer in self.layers.items():
            differences = [each[site].table for each in self.differences if site in each]
            layer.take([each.get(site) for each in self.rows], lack=lack, differences=differences)
            layer.fade_to(self.num_steps)
        return found

    def bring(self, seed: int) -> None:
        """Give the learner of a seed what that seed has learned."""
        learner = self.alone[seed]
        load_module(learner.online, self.together.online, seed)
        load_optimizer(learner.optimizer, self.together.optimizer, seed)
        write_fades(learner.online, self.rows[seed], self.num_steps)

    @torch.no_grad()
    def forget_moments(self) -> None:
        """Give the optimizer the state of a fresh one, for all seeds; its count of steps, which ages go by, goes on."""
        for state in self.together.optimizer.state.values():
            for value in state.values():
                if value.ndim:
                    value.zero_()

    @torch.no_grad()
    def norms(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For each site the 2-norms of rows and of their gradients now, each (R, H)."""
        found = {}
        for site, layer in self.layers.items():
            assert layer.weight.grad is not None
            found[site] = (layer.weight.norm(dim=-1), layer.weight.grad.norm(dim=-1))
        return found

    @torch.no_grad()
    def _carry_on(self, seed: int) -> None:
        """Let frozen members add what outgoing weights were before this operation, less what they are."""
        own, rows = self.differences[seed], self.rows[seed]
        for site in self.sites:
            consumer = consumer_of(self.alone[seed].online, site)
            _let_read(self.together.online, consumer)
            old = self.together.online.get_parameter(f"{consumer}.weight")[seed]
            new = self.alone[seed].online.get_parameter(f"{consumer}.weight")
            own[site] = carried_on(own.get(site), old - new, rows.get(site), rows.get(consumer))

    @torch.no_grad()
    def _take_back(self, seed: int) -> None:
        learner, together = self.alone[seed], self.together
        for name, parameter in learner.online.named_parameters():
            stacked = together.online.get_parameter(name)
            stacked[seed].copy_(parameter)
            own = learner.optimizer.state.get(parameter, {})
            for key, value in together.optimizer.state.get(stacked, {}).items():
                if value.ndim:  # a state that was dropped is a fresh one, of zeros
                    value[seed].copy_(own[key] if key in own else torch.zeros_like(value[seed]))


def norms_of(seen: Sequence[Norms], seed: int) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Those of one seed, of norms of all."""
    return [{site: (weight[seed], gradient[seed]) for site, (weight, gradient) in each.items()} for each in seen]


def _with_units(networks: nn.Module, site: str) -> StackedUnits:
    """Put a layer with units that may be composite in the place of a linear layer and its activation function."""
    parent_name, _, place = site.rpartition(".")
    parent = networks.get_submodule(parent_name)
    linear, activation_fn = parent.get_submodule(place), parent.get_submodule(str(int(place) + 1))
    assert isinstance(linear, StackedLinear)
    layer = StackedUnits(linear, activation_fn)
    setattr(parent, place, layer)
    setattr(parent, str(int(place) + 1), nn.Identity())
    return layer


def _let_read(networks: nn.Module, consumer: str) -> None:
    """Put a layer that takes differences in the place of a linear one; layers of units take them already."""
    linear = networks.get_submodule(consumer)
    if isinstance(linear, StackedLinear):
        parent_name, _, place = consumer.rpartition(".")
        setattr(networks.get_submodule(parent_name), place, StackedConsumer(linear))
