"""The command line: `python -m marl train`, `evaluate`, `play` and `reproduce`.

What needs torch is imported inside the commands, so that `--help` answers at once. Errors of the package end in one
line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from marl.errors import MarlError, MissingExtraError

if TYPE_CHECKING:
    from marl.configuring import Layer
    from marl.run import Run
    from marl.run_settings import RunSettings
    from marl.sessions import Session

__all__ = ["app"]

INTERRUPTED = 130
"""The exit code of what Ctrl-C ended, as shells have it."""

BATCH_SIZE = 100
"""Episodes that `evaluate` plays side by side, at most."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Teams that learn by value factorization, with surgery."
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Where the run was saved.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch; the networks are too small for more.")]


@app.command()
def train(
    algorithm: Annotated[str | None, typer.Option(help="vdn, qmix or qplex.")] = None,
    environment: Annotated[
        str | None, typer.Option(help="By name, or matrix_game:knife,qtran for payoffs that follow each other.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="A sequence by name, as matrix_five; or whatever --environment takes.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="What is done to worn-out units, as knife; none only measures.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="pymarl, reborn, pymarl2 or smacv2.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the environment, in each task.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all random numbers.")] = None,
    settings: Annotated[Path | None, typer.Option(help="A YAML file; it goes over the preset.")] = None,
    assigned: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="As learning.loss.gamma=0.9; goes over all.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where logs and checkpoints go.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log for TensorBoard.")] = False,
    show_settings: Annotated[bool, typer.Option("--show-settings", help="Print all settings and exit.")] = False,
    threads: Threads = 1,
) -> None:
    """Train a team; Ctrl-C saves what there is, and --resume goes on with it."""
    named = {
        "algorithm": algorithm,
        "tasks": tasks if environment is None else environment,
        "surgery.method": method,
        "preset": preset,
        "training.num_steps": steps,
        "seed": seed,
    }
    with _errors_in_one_line():
        if None not in (environment, tasks):
            raise MarlError(f"--environment {environment} and --tasks {tasks} were given: give one of them")
        _set_threads(threads)
        layers = _layers(settings, named, assigned or [])
        from marl import sessions

        session = (sessions.resume if resume else sessions.begin)(layers, output)
        if show_settings:
            _show(session.settings)
        else:
            _train(session, tensorboard=tensorboard)


@app.command()
def evaluate(
    folder: Folder,
    episodes: Annotated[int, typer.Option(min=1, help="Greedy episodes of each task.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the games.")] = 0,
    all_tasks: Annotated[
        bool, typer.Option("--all-tasks", help="Play nothing; show what was learned, kept and transferred.")
    ] = False,
    references: Annotated[
        list[Path] | None,
        typer.Option("--reference", metavar="DIR", help="A run of one of the tasks alone, with --all-tasks."),
    ] = None,
    threads: Threads = 1,
) -> None:
    """Play greedily with what a run has learned: the mean return, its 95 % interval, and the length."""
    with _errors_in_one_line():
        _set_threads(threads)
        if all_tasks:
            _show_all_tasks(folder, references or [])
        else:
            from marl.checkpoints import load

            Console(soft_wrap=True).print(_evaluations(load(folder), episodes, seed))


@app.command()
def play(
    folder: Folder,
    episode: Annotated[int, typer.Option(min=0, help="Which one: another number is another game.")] = 0,
    gif: Annotated[Path | None, typer.Option(dir_okay=False, help="Draw it into this file.")] = None,
    epsilon: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of random actions.")] = 0.0,
    threads: Threads = 1,
) -> None:
    """Show an episode of a run's latest task, as text or as a GIF."""
    with _errors_in_one_line():
        _set_threads(threads)
        from marl.checkpoints import load
        from marl.playing import save_gif, watch

        run = load(folder)
        frames = list(watch(run.task.make(1), run.agent, epsilon=epsilon, seed=_games_seed(episode)))
        if gif is None:
            typer.echo("\n\n".join(map(str, frames)))
        else:
            gif.parent.mkdir(parents=True, exist_ok=True)
            save_gif(frames, gif)
            typer.echo(f"{len(frames)} frames, return {frames[-1].total:g}: {gif}")


@app.command()
def reproduce(
    figure: Annotated[
        str,
        typer.Argument(help="figure1 to 4, 6 to 8, or all; tuning, of what these are run with; show, into a page."),
    ],
    scale: Annotated[str, typer.Option(help="smoke, small (two cores, an hour) or paper (a cluster).")] = "small",
    engine: Annotated[str, typer.Option(help="local processes, or ray.")] = "local",
    seeds: Annotated[int | None, typer.Option(help="Seeds reported; the scale's own number if not said.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; as many as there are processors.")] = None,
    output: Annotated[Path, typer.Option(help="Where runs and pages go; what is there is not run again.")] = Path(
        "results/reproduce"
    ),
    page: Annotated[Path, typer.Option(help="With show: the page whose parts are renewed.")] = Path(
        "docs/reproduction.md"
    ),
) -> None:
    """Reproduce a figure of the paper: runs, tables, verdicts. Stop it at any time; it goes on where it was."""
    with _errors_in_one_line():
        from marl.reproduce.command import run_command, show_command

        if figure == "show":
            return show_command(scale=scale, num_seeds=seeds, folder=output, page=page)
        is_complete = run_command(
            figure, scale=scale, num_seeds=seeds, engine=(engine, workers or os.cpu_count() or 1), folder=output
        )
    if not is_complete:
        raise typer.Exit(1)


# -- what is trained


def _layers(file: Path | None, named: dict[str, Any], assigned: list[str]) -> list[Layer]:
    from marl.configuring import assignments, nested, read_file

    layers = [] if file is None else [read_file(file)]
    layers += [nested(name, value) for name, value in named.items() if value is not None]
    return [*layers, *assignments(assigned)]


def _show(settings: RunSettings) -> None:
    from marl.configuring import to_yaml

    typer.echo(to_yaml(settings), nl=False)


def _train(session: Session, *, tensorboard: bool) -> None:
    """Train to the end or to Ctrl-C, with everything that is logged."""
    from marl.checkpoints import Saves, save
    from marl.logs import open_logs, progress_bar, table_of
    from marl.training import train

    run, output, console = session.run(), session.output, Console(soft_wrap=True)
    logs = open_logs(output, run, tensorboard=tensorboard)
    with _ctrl_c() as is_pressed, progress_bar(console, run) as bar:
        train(run, logs.csv, *logs.others, bar, Saves(output), is_stopped=is_pressed)
    if not run.is_over:
        save(run, output)
        typer.echo(f"stopped and saved: python -m marl train --output {output} --resume goes on", err=True)
        raise typer.Exit(INTERRUPTED)
    console.print(table_of(logs.csv.records))
    console.print(f"saved in {output}", markup=False, highlight=False)


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed or the process told to end; a second time ends it on the spot."""
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        typer.echo("stopping after this round; once more to stop at once, without saving", err=True)

    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- what is shown


def _show_all_tasks(folder: Path, references: list[Path]) -> None:
    from marl.configuring import configure, read_file
    from marl.task_tables import returns_in, save_figure, tables_of

    settings, console = configure(read_file(folder / "settings.yaml")), Console(soft_wrap=True)
    returns = returns_in(folder, settings)
    for table in tables_of(folder, settings, returns, references):
        console.print(table)
    save_figure(folder / "tasks.png", settings, returns)
    console.print(f"drawn in {folder / 'tasks.png'}", markup=False, highlight=False)


def _evaluations(run: Run, num_episodes: int, seed: int) -> Table:
    from marl.evaluation import evaluate, interval_of

    results = {
        task.name: evaluate(
            task.make(min(num_episodes, BATCH_SIZE)), run.agent, seed=_games_seed(0, seed), num_episodes=num_episodes
        )
        for task in {task.name: task for task in run.settings.tasks.tasks}.values()
    }
    has_winners = any(result.won is not None for result in results.values())
    table = Table("task", "episodes", "mean return", "95 % interval", "mean length", *["won"] * has_winners)
    for name, result in results.items():
        returns, lengths = result.returns[:num_episodes], result.lengths[:num_episodes].float()
        interval = interval_of(returns)
        between = f"{interval.low:.2f} to {interval.high:.2f}"
        won = "" if result.won is None else f"{result.won[:num_episodes].float().mean():.0%}"
        cells = (name, str(len(returns)), f"{returns.mean():.2f}", between, f"{lengths.mean():.1f}", won)
        table.add_row(*cells[: len(table.columns)])
    return table


def _games_seed(number: int, seed: int = 0) -> int:
    """Of games to look at, which are none of those that were trained on."""
    from marl.seeding import seed_for

    return seed_for(seed, "evaluation", number)


# -- around all commands


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (MarlError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and not isinstance(error, MarlError):
            error = MissingExtraError.of(str(error.name))
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(code=2) from None


def _set_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)
