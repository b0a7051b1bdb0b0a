"""The `toolkit` command: what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import toolkit
from toolkit import cli
from toolkit.config import shipped_configs


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of the command, as the console script runs it."""
    monkeypatch.setattr(sys, "argv", ["toolkit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_matrix_says_which_configs_there_are_and_each_way_has_a_row(columns: str) -> None:
    result = CliRunner().invoke(cli.app, ["configs"], env={"COLUMNS": columns})
    assert result.exit_code == 0
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert len(lines) == len({line for line in lines if line}) + 2, "no row is broken into two"
    found = set()
    for name, config in shipped_configs().items():
        optimizer, _, way = name.partition("_")
        [row] = [line for line in lines if line.split()[:1] == [optimizer]]
        usual = shipped_configs()[f"{optimizer}_zero2"].state_format
        _, state, *cells = row.split(maxsplit=5)
        assert (state, cells[3]) == (usual, config.idea)
        ends = {"x": "", "l": "_lean", "o": "_offload", "b": "_offload_lean"}
        found |= {f"{optimizer}_zero{stage}{ends[mark]}" for stage in (1, 2, 3) for mark in cells[stage - 1]}
        [row] = [line for line in lines if line.split()[:1] == [way]]
        assert row.endswith(config.placing)
    assert found == set(shipped_configs())


def test_the_list_as_json() -> None:
    listed = json.loads(CliRunner().invoke(cli.app, ["configs", "--json"]).stdout)
    assert [one["name"] for one in listed] == list(shipped_configs())
    assert {one["stage"] for one in listed if one["optimizer"] == "SOAM"} == {1, 2, 3}


def test_a_name_prints_that_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "configs", "soam_zero3") == 0
    printed = capsys.readouterr().out
    assert printed == shipped_configs()["soam_zero3"].path.read_text()
    assert json.loads(printed)["optimizer"]["type"] == "SOAM"


def test_an_unknown_name_ends_with_one_sentence_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "configs", "soam_zero33") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: there is no shipped config 'soam_zero33'. Did you mean 'soam_zero3'?\n"


@pytest.mark.parametrize("arguments", [["confgs"], ["configs", "--nmae"], ["configs", "a", "b"]])
def test_wrong_usage_ends_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_the_version_is_the_package_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"leanstate {toolkit.__version__}\n"


def test_listing_loads_neither_torch_nor_deepspeed() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from toolkit.cli import app\n"
        "assert CliRunner().invoke(app, ['configs']).exit_code == 0\n"
        "print([name for name in ('torch', 'deepspeed', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
