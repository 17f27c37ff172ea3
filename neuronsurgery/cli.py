"""The command line: `neuronsurgery demo`, and `neuronsurgery compare-methods`.

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
    from neuronsurgery.comparison.planning import Comparison
    from neuronsurgery.comparison.running import Run as ComparedRun
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


@app.command("compare-methods")
def compare_methods(
    method: Annotated[list[str] | None, typer.Option(help="One to compare; several times for several. All.")] = None,
    benchmark: Annotated[list[str] | None, typer.Option(help="One to compare on; as above. All.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method that count.")] = 10,
    tuning_seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting that a method is tuned over.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Processes; 1 stays in this one.")] = 2,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where runs, table and figure go.")] = Path(
        "results/methods"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Small: shows that it runs, not what comes out.")] = False,
) -> None:
    """Compare all methods on tasks that keep changing, each tuned with the same budget.

    What has run before with the same settings is read from its file: stopped, it goes on where it was.
    """
    _require_extra()
    from neuronsurgery.comparison.planning import compare, num_runs
    from neuronsurgery.comparison.showing import page, save_figure

    console = Console(soft_wrap=True)
    comparison = _comparison(quick, method, benchmark, seeds, tuning_seeds)
    with _counted(console, num_runs(comparison)) as on_run:
        outcome = compare(comparison, out / "runs", num_workers=workers, on_run=on_run)
    found = page(outcome)
    (out / "methods.md").write_text(found, encoding="utf-8")
    save_figure(outcome, out / "methods.png")
    for text in (found, f"table: {out / 'methods.md'}", f"figure: {out / 'methods.png'}"):
        console.print(text, markup=False, highlight=False)


def _comparison(
    is_quick: bool, methods: list[str] | None, benchmarks: list[str] | None, num_seeds: int, num_tuning_seeds: int
) -> Comparison:
    """Returns what is to be compared; exits where there is no such method or benchmark."""
    from neuronsurgery.comparison.planning import Comparison

    asked = {"arms": methods, "benchmarks": benchmarks}
    named = {name: tuple(dict.fromkeys(values)) for name, values in asked.items() if values}
    small = {"shrink": 20, "num_settings": 1} if is_quick else {}
    try:
        return Comparison(num_seeds=num_seeds, num_tuning_seeds=num_tuning_seeds, **named, **small)  # type: ignore[arg-type]
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from error


@contextmanager
def _counted(console: Console, number: int) -> Iterator[Callable[[ComparedRun], None]]:
    """Shows a bar, where there is a terminal, and a line for each run that ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("runs", total=number)

        def on_run(run: ComparedRun) -> None:
            progress.advance(bar)
            job, setting = run.job, run.job.setting
            tuned = f"{setting.rate:g}, {setting.value:g}"
            done = f"{run.score:.3f} in {run.seconds:.0f} s"
            console.print(f"{job.benchmark}, {job.arm} ({tuned}), seed {job.seed}: {done}", highlight=False)

        yield on_run


def _require_extra() -> None:
    """Exits with what to install where the packages of the extra `demo` are missing."""
    missing = [name for name in ("sklearn", "matplotlib", "gymnasium") if find_spec(name) is None]
    if missing:
        typer.echo(f"this command needs {' and '.join(missing)}: pip install 'neuronsurgery[demo]'", err=True)
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
