"""A learner: a network, its optimizer, a penalty and a schedule, of which a method decides; and the steps it takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Learner"]


@dataclass
class Learner:
    """What learns in a run. A method that is to act once gets a schedule that is closed after it acted.

    `begin` makes the schedule, after `delay` steps: were a method to act with the last step of a task, one that changes
    the output would be scored before it can recover.
    """

    model: nn.Module
    optimizer: Optimizer
    penalty: Callable[[], Tensor] | None = None
    schedule: Any = None
    acts_once: bool = False
    begin: Callable[[], Any] | None = None
    delay: int = 0
    num_steps: int = 0
    num_actions: int = 0

    def learn(self, loss: Tensor) -> None:
        """Take a step on a loss, and let the schedule act if it is time."""
        self.optimizer.zero_grad()
        torch.autograd.backward(loss if self.penalty is None else loss + self.penalty())
        self.optimizer.step()
        self.num_steps += 1
        if self.begin is not None and self.num_steps == self.delay:
            self.schedule = self.begin()
            return
        if self.schedule is None:
            return
        if self.schedule.step() is not None:
            self.num_actions += 1
            if self.acts_once:
                self.close()

    def close(self) -> None:
        """Take the schedule off."""
        with suppress(AttributeError):
            self.schedule.close()
        self.schedule = None
