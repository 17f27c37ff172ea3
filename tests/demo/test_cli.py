"""The command line."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from neuronsurgery import cli

TINY = ["demo", "--tasks", "2", "--images", "64", "--epochs", "2", "--seeds", "1", "--workers", "1"]


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_version_is_the_installed_one():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"neuronsurgery {version('neuronsurgery')}\n")


def test_demo_ends_with_table_conclusion_and_picture(tmp_path):
    out = tmp_path / "new" / "demo.png"
    result = invoke(*TINY, "--out", str(out))
    assert result.exit_code == 0, result.output
    for arm in ("no intervention", "plain reset", "wide, no intervention", "wide, plain reset", "KNIFE"):
        assert f"| {arm} " in result.output
    assert "KNIFE ends at" in result.output
    assert f"picture: {out}" in result.output
    assert out.read_bytes().startswith(b"\x89PNG")


def test_demo_without_a_terminal_has_a_line_per_run_and_no_control_codes(tmp_path):
    output = invoke(*TINY, "--out", str(tmp_path / "demo.png")).output
    assert "KNIFE, seed 0: " in output
    assert "\x1b" not in output


def test_the_wide_network_is_not_reset_when_asked_not_to(tmp_path):
    output = invoke(*TINY, "--no-wide-reset", "--out", str(tmp_path / "demo.png")).output
    assert "| wide, plain reset " not in output
    assert "wide, plain reset (not run): " in output


@pytest.mark.parametrize(
    "option, number", [("--images", "1798"), ("--tasks", "0"), ("--seeds", "0"), ("--workers", "0")]
)
def test_an_impossible_number_is_refused(option, number):
    result = invoke("demo", option, number)
    assert result.exit_code == 2
    assert option in result.output


def test_quick_sizes_give_way_to_those_asked_for():
    experiment = cli._experiment(True, num_tasks=None, num_images=77, num_epochs=None)
    assert (experiment.num_tasks, experiment.num_images, experiment.num_epochs) == (4, 77, 5)


def test_the_demo_is_the_documented_experiment_when_nothing_is_asked():
    experiment = cli._experiment(False, num_tasks=None, num_images=None, num_epochs=None)
    assert (experiment.num_tasks, experiment.num_images, experiment.num_epochs) == (40, 512, 30)


def test_a_missing_extra_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    result = invoke("demo")
    assert result.exit_code == 1
    assert "this command needs sklearn and matplotlib and gymnasium: pip install 'neuronsurgery[demo]'" in result.output


def test_the_command_line_starts_without_torch():
    code = "import sys, neuronsurgery.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_package_runs_as_a_module():
    found = subprocess.run([sys.executable, "-m", "neuronsurgery", "--version"], capture_output=True, text=True)
    assert found.stdout == f"neuronsurgery {version('neuronsurgery')}\n"
