"""Methods that look at every step: they keep running utilities of units, and are called after each optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Protocol, TypeVar

from neuronsurgery.errors import ScheduleError
from neuronsurgery.reports import Report

__all__ = ["Runner", "Stepping"]

SteppingT = TypeVar("SteppingT", bound="Stepping")


class Runner(Protocol):
    """What a backend provides: the utilities of a model's units, and what is done by them."""

    num_steps: int
    """How many steps were seen."""

    def step(self) -> Report | None:
        """See a step, and act if it is time; all of it or nothing."""

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as tensors, numbers and strings."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""

    def close(self) -> None:
        """Leave nothing on the model."""


class Stepping:
    """A method that is called after each optimizer step; `surgery.ContinualBackprop` says how one is made."""

    def __init__(self, runner: Runner, settings: Mapping[str, Any]) -> None:
        self._runner = runner
        self._settings = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        self._is_closed = False
        self.num_units = 0
        """How many units were replaced so far."""
        self.last: Report | None = None
        """The latest report; not part of the state."""

    def step(self) -> Report | None:
        """Take note of an optimizer step, before gradients are zeroed, and act if it is time.

        Returns:
            The report; None when nothing was written.

        Raises:
            ScheduleError: it was closed.
            SurgeryError: what was to be written could not be; then nothing has changed.
        """
        if self._is_closed:
            raise ScheduleError("it was closed and measures no more; make a new one and load its state")
        report = self._runner.step()
        if report is not None:
            self.num_units += report.num_units
            self.last = report
        return report

    @property
    def num_steps(self) -> int:
        """How many steps were seen."""
        return self._runner.num_steps

    def state_dict(self) -> dict[str, Any]:
        """Return all that is remembered, as tensors, numbers and strings (`weights_only=True` loads it)."""
        return {"settings": self._settings, "num_units": self.num_units, "runner": self._runner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; model and optimizers are to be loaded before.

        Raises:
            ScheduleError: the state of other settings, or of a model with other sites.
        """
        if state["settings"] != self._settings:
            raise ScheduleError(
                f"the state was saved with other settings: {state['settings']}, here {self._settings}. Make it as it "
                "was, or begin anew without loading a state"
            )
        self._runner.load_state_dict(state["runner"])
        self.num_units = state["num_units"]

    def close(self) -> None:
        """Give the model back without taps; what was written stays."""
        self._is_closed = True
        self._runner.close()

    def __enter__(self: SteppingT) -> SteppingT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ScheduleError(
            f"{type(self).__name__} can be neither copied nor pickled: it belongs to one model and its optimizers. "
            "Save its state_dict(); for a copy of the model make a new one and load that"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._settings}, step {self.num_steps}, {self.num_units} units>"
