"""The command line, as somebody would use it: train, break off, go on, evaluate, watch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from marl.checkpoints import NAME, load, save
from marl.cli import app
from marl.configuring import configure, read_file, to_yaml
from marl.evaluation import interval_of
from marl.logs import read_csv
from marl.run import Run, make_run
from marl.training import Silent, train
from tests.documents import read_blocks
from tests.marl.runs import KNIFE, PREDATOR_PREY, Recorder, assert_same_run, small

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def marl(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def asked(folder: Path, *layers: object) -> Path:
    """A file of settings for a run of a second."""
    path = folder / "asked.yaml"
    path.write_text(to_yaml(small(*layers)), encoding="utf-8")  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run = make_run(small(PREDATOR_PREY, {"training": {"num_steps": 20}}))
    train(run)
    save(run, folder)
    return folder


def test_help_answers_without_torch() -> None:
    code = "import sys; from typer.testing import CliRunner; from marl.cli import app\n"
    code += "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_run_from_a_file_leaves_logs_and_a_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ("--method", "knife", "--set", "surgery.criterion=lowest", "--set", "surgery.every=30", "--seed", "3")
    result = marl("train", "--settings", asked(tmp_path), "--output", output, *options)
    assert result.exit_code == 0, result.output
    assert f"saved in {output}" in result.stdout
    assert "last 5 of 5 records" in result.stdout
    run, recorder = load(output), Recorder()
    assert run.is_over
    assert (run.settings.seed, run.settings.surgery.every) == (3, 30)
    assert configure(read_file(output / "settings.yaml")) == run.settings
    same = make_run(run.settings)
    train(same, recorder)
    assert_same_run(same, run)
    assert read_csv(output / "log.csv") == recorder.records
    assert len((output / "operations.jsonl").read_text(encoding="utf-8").splitlines()) == recorder.num_operations > 0


def press_ctrl_c_in_round(number: int, monkeypatch: pytest.MonkeyPatch, *, key: int = signal.SIGINT) -> None:
    class Presses(Silent):
        def on_save(self, run: Run) -> None: ...

        def on_round(self, run: Run) -> None:
            if run.progress.round == number:
                os.kill(os.getpid(), key)

    monkeypatch.setattr("marl.checkpoints.Saves", lambda _: Presses())


def test_ctrl_c_saves_after_the_round_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, output = asked(tmp_path), tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        press_ctrl_c_in_round(3, patched)
        result = marl("train", "--settings", file, "--output", output)
    assert result.exit_code == 130
    assert f"python -m marl train --output {output} --resume goes on" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before
    assert load(output).progress.round == 3
    assert marl("train", "--output", output, "--resume").exit_code == 0
    whole, recorder = make_run(small()), Recorder()
    train(whole, recorder)
    assert_same_run(load(output), whole)
    assert read_csv(output / "log.csv") == recorder.records


@pytest.mark.parametrize("key", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_round_of_a_task_loses_no_record(
    key: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = asked(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patched:
        press_ctrl_c_in_round(5, patched, key=key)
        assert marl("train", "--settings", file, "--output", output).exit_code == 130
    assert len(read_csv(output / "log.csv")) == 2  # the second is that of the end


def test_a_finished_run_goes_on_for_longer(trained: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes((trained / NAME).read_bytes())
    assert marl("train", "--output", tmp_path, "--resume", "--steps", "40").exit_code == 0
    assert load(tmp_path).progress.num_steps >= 40


def test_settings_are_shown_as_a_file_that_gives_them_again(tmp_path: Path) -> None:
    options = ("--algorithm", "qplex", "--environment", "matrix_game:knife,qtran", "--preset", "reborn")
    result = marl("train", *options, "--steps", "100", "--method", "knife", "--show-settings")
    path = tmp_path / "shown.yaml"
    path.write_text(result.stdout, encoding="utf-8")
    settings = configure(read_file(path))
    assert (settings.algorithm, settings.training.num_steps, settings.surgery.method) == ("qplex", 100, "knife")
    assert settings.learning.loss.td_lambda == 0.6
    assert str(settings.tasks) == "knife -> qtran"
    assert not (tmp_path / "results").exists()


def test_without_an_output_the_folder_is_named_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = asked(tmp_path, {"tasks": "matrix_game:knife", "training": {"num_steps": 8}})
    assert marl("train", "--settings", file, "--seed", "4").exit_code == 0
    assert (tmp_path / "results" / "qmix-knife-none-4" / NAME).exists()
    assert marl("train", "--settings", file, "--seed", "4", "--resume").exit_code == 0


def documented() -> list[str]:
    lines = [line for page in ("README.md", "docs/marl.md") for line in (ROOT / page).read_text("utf-8").splitlines()]
    return [line.removeprefix("$ python -m marl ") for line in lines if line.startswith("$ python -m marl ")]


@pytest.mark.parametrize("command", sorted({line for line in documented() if line.startswith("train")}))
def test_documented_commands_are_understood(
    command: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in read_blocks(ROOT / "docs" / "marl.md"):
        if block.text.startswith("# mine.yaml"):
            Path("mine.yaml").write_text(block.text, encoding="utf-8")
    if "--resume" in command:
        Path("results").mkdir()
        Path("results/two-games").symlink_to(trained)
    result = marl(*command.split(), "--show-settings")
    assert result.exit_code == 0, result.output


def test_the_other_documented_commands_are_understood(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = {line for line in documented() if not line.startswith("train")}
    folders = {command.split()[1] for command in commands}
    assert folders == {"results/qmix-predator_prey_tiny-knife-0", "results/five"}
    Path("results").mkdir()
    Path("results/qmix-predator_prey_tiny-knife-0").symlink_to(trained)
    games = ("--algorithm", "qmix", "--tasks", "matrix_game:knife,qtran")
    assert marl("train", *games, "--steps", "8", "--output", "results/five").exit_code == 0
    assert {command.partition(" ")[0] for command in commands} == {"evaluate", "play"}
    assert {command: marl(*command.split()).exit_code for command in commands} == dict.fromkeys(commands, 0)


GAME = ("--algorithm", "qmix", "--environment", "predator_prey_tiny")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "algorithm is missing; known are 'qmix', 'qplex', 'vdn'"),
        (("--algorithm", "qmx"), "algorithm is 'qmx'; did you mean 'qmix'?"),
        (("--algorithm", "qmix"), "tasks is missing; set it"),
        (("--algorithm", "qmix", "--environment", "predator"), "did you mean 'predator_prey'"),
        ((*GAME, "--method", "knif"), "unknown method 'knif': choose one of 'none', 'knife'"),
        ((*GAME, "--preset", "rebron"), "preset is 'rebron'; did you mean 'reborn'?"),
        ((*GAME, "--steps", "-5"), "training: num_steps is -5"),
        ((*GAME, "--steps", "59"), "num_steps is 59, less than one episode of up to 60 steps"),
        ((*GAME, "--seed", "-5"), "seed is -5"),
        ((*GAME, "--set", "learning.agent.hidden_size=-8"), "hidden layers of -8 units"),
        ((*GAME, "--set", "learning.mixer.embed_size=0"), "0"),
        ((*GAME, "--set", "tasks.0.options.num_agents=60"), "64 animals do not fit into 49 cells"),
        ((*GAME, "--method", "knife", "--set", "surgery.max_share=2"), "surgery: max_share is 2.0"),
        ((*GAME, "--method", "knife", "--set", "surgery.threshold=-1"), "surgery: Stagnant.threshold is -1.0"),
        ((*GAME, "--settings", "nowhere.yaml"), "no settings can be read from nowhere.yaml"),
        ((*GAME, "--resume"), "there is no checkpoint in results/qmix-predator_prey_tiny-none-0"),
        (("--resume",), "algorithm is missing"),
    ],
)
def test_bad_settings_end_in_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(marl("train", *options), message)
    assert list(tmp_path.iterdir()) == []


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_folder_with_a_run_is_not_trained_over(trained: Path) -> None:
    assert_refused(
        marl("train", *GAME, "--steps", "60", "--output", trained), "holds a run already: go on with it by --resume"
    )


def test_a_run_does_not_go_on_with_other_settings(trained: Path) -> None:
    refused = marl("train", "--output", trained, "--resume", "--set", "learning.loss.gamma=0.5")
    assert_refused(refused, "was saved with learning.loss.gamma 0.99, and is to go on with 0.5")


@pytest.mark.parametrize("command", [("train", "--resume", "--output"), ("evaluate",), ("play",)])
def test_a_damaged_checkpoint_ends_in_one_line(command: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes((trained / NAME).read_bytes()[:-100])
    assert_refused(marl(*command, tmp_path), "is damaged, or no checkpoint")


def test_a_missing_package_ends_in_one_line(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "marl.checkpoints", None)  # what an import that fails looks like
    assert_refused(marl("evaluate", trained), "marl.checkpoints is not installed; install")


def test_evaluation_says_where_the_mean_return_lies(trained: Path) -> None:
    result = marl("evaluate", trained, "--episodes", "10")
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.stdout.splitlines() if "predator_prey" in line]
    _, task, episodes, mean, interval, length, _ = (cell.strip() for cell in row.split("│"))
    low, high = map(float, interval.split(" to "))
    assert (task, episodes) == ("predator_prey", "10")
    assert low <= float(mean) <= high
    assert 1 <= float(length) <= 5
    assert marl("evaluate", trained, "--episodes", "10").stdout == result.stdout


def test_the_interval_is_nearly_the_normal_one_where_that_is_right() -> None:
    values = torch.arange(400.0)
    interval, half = interval_of(values), 1.96 * float(values.std()) / 20
    assert interval.low == pytest.approx(199.5 - half, abs=0.05 * half)
    assert interval.high == pytest.approx(199.5 + half, abs=0.05 * half)


def test_every_task_is_evaluated_once(tmp_path: Path) -> None:
    save(make_run(small({"tasks": "matrix_game:knife,qtran,knife"})), tmp_path)
    shown = marl("evaluate", tmp_path, "--episodes", "1").stdout
    assert (shown.count("knife"), shown.count("qtran")) == (1, 1)


def test_an_episode_is_shown_as_text(trained: Path) -> None:
    shown = marl("play", trained, "--epsilon", "1").stdout.strip().split("\n\n")
    assert shown[0].startswith("step 0, reward 0, return 0\n")
    assert 2 <= len(shown) <= 6
    for number, frame in enumerate(shown[1:], start=1):
        assert frame.startswith(f"step {number}, actions ")
    grid = shown[0].splitlines()[1:]
    assert [len(row.split()) for row in grid] == [3, 3, 3]
    assert "".join(grid).count("A") == 2 and "".join(grid).count("S") == 1
    others = [("--epsilon", "1", "--episode", "1"), ("--epsilon", "0")]
    assert len({marl("play", trained, *options).stdout for options in [("--epsilon", "1"), *others]}) == 3


def test_an_episode_is_drawn_as_a_gif(trained: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "films" / "episode.gif"
    result = marl("play", trained, "--gif", path)
    assert result.exit_code == 0, result.output
    num_frames = len(marl("play", trained).stdout.strip().split("\n\n"))
    with image.open(path) as film:
        assert (film.format, film.is_animated) == ("GIF", True)
        assert f"{num_frames} frames" in result.stdout
        assert film.n_frames == num_frames
        colors = {color for _, color in film.convert("RGB").getcolors(10**6)}
        assert {(0x1F, 0x77, 0xB4), (0xD6, 0x27, 0x28)} <= colors  # of agents and of stags


def test_surgery_goes_on_from_the_command_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, output = asked(tmp_path, KNIFE, {"tasks": "matrix_game"}), tmp_path / "run"
    with monkeypatch.context() as patched:
        press_ctrl_c_in_round(4, patched)
        marl("train", "--settings", file, "--output", output)
    assert len((output / "operations.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert marl("train", "--output", output, "--resume", "--steps", "48").exit_code == 0
    assert len((output / "operations.jsonl").read_text(encoding="utf-8").splitlines()) == 2
