"""The command line: `neuronsurgery demo`.

What needs torch, scikit-learn or matplotlib is imported inside the command, so that `--help` and `--version`
answer at once and work without the extra `demo`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from neuronsurgery.demo.arms import ArmName
    from neuronsurgery.demo.digits import Experiment
    from neuronsurgery.demo.run import OnTask, Run

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Give worn-out hidden units new plasticity.")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"neuronsurgery {version('neuronsurgery')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Give worn-out hidden units of a PyTorch network new plasticity without changing its output."""


@app.command()
def demo(
    tasks: Annotated[int | None, typer.Option(min=1, help="Tasks learned one after another.")] = None,
    images: Annotated[int | None, typer.Option(min=1, max=1797, help="Images of each task.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over each task.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes; 1 stays in this one.")] = 2,
    out: Annotated[Path, typer.Option(dir_okay=False, help="Where the picture goes (PNG).")] = Path("results/demo.png"),
    quick: Annotated[bool, typer.Option("--quick", help="Small: shows that it runs, not what comes out.")] = False,
    wide_reset: Annotated[
        bool, typer.Option(help="Also the control of equal size that is reset: the wide network with a plain reset.")
    ] = True,
) -> None:
    """Show what operations add when a network learns one task after another on real images."""
    _require_extra()
    from neuronsurgery.demo.arms import ArmName
    from neuronsurgery.demo.schedule import run_all
    from neuronsurgery.demo.show import conclusion, save_figure, table

    out.parent.mkdir(parents=True, exist_ok=True)  # before the runs, so that a wrong path costs no minutes
    experiment = _experiment(quick, num_tasks=tasks, num_images=images, num_epochs=epochs)
    arms = [arm for arm in ArmName if wide_reset or arm is not ArmName.WIDE_RESET]
    console = Console(soft_wrap=True)
    with _progress(console, arms, seeds * experiment.num_tasks) as (on_task, on_run):
        runs = run_all(experiment, arms, num_seeds=seeds, num_workers=workers, on_task=on_task, on_run=on_run)
    save_figure(runs, out)
    for text in (table(runs), conclusion(runs), f"picture: {out}"):
        console.print(text, markup=False, highlight=False)


def _require_extra() -> None:
    """Exits with what to install where the packages of the extra `demo` are missing."""
    missing = [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        typer.echo(f"the demonstration needs {' and '.join(missing)}: pip install 'neuronsurgery[demo]'", err=True)
        raise typer.Exit(code=1)


def _experiment(is_quick: bool, **asked: int | None) -> Experiment:
    """Returns the demonstration's experiment, or the quick one, with the sizes that were asked for."""
    from neuronsurgery.demo.digits import QUICK, Experiment

    return replace(QUICK if is_quick else Experiment(), **{k: v for k, v in asked.items() if v is not None})


@contextmanager
def _progress(
    console: Console, arms: Sequence[ArmName], num_tasks: int
) -> Iterator[tuple[OnTask, Callable[[Run], None]]]:
    """Shows a bar per arm, where there is a terminal, and a line for each run that ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {arm: progress.add_task(arm.value, total=num_tasks, start=False) for arm in arms}

        def on_task(arm: ArmName) -> None:
            progress.start_task(bars[arm])
            progress.advance(bars[arm])

        def on_run(run: Run) -> None:
            console.print(f"{run.arm.value}, seed {run.seed}: {run.seconds:.0f} s", highlight=False)

        yield on_task, on_run
