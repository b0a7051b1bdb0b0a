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


def test_the_list_names_every_shipped_config_with_its_facts() -> None:
    result = CliRunner().invoke(cli.app, ["configs"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    header, *rows = result.stdout.strip().splitlines()
    assert header.split()[:4] == ["name", "optimizer", "ZeRO", "offload"]
    shipped = shipped_configs()
    assert len(rows) == len(shipped)
    for row, (name, config) in zip(rows, shipped.items(), strict=True):
        offload = "+".join(config.offload) or "-"
        assert row.split(maxsplit=5)[:5] == [name, config.optimizer, str(config.stage), offload, config.state_format]
        assert row.rstrip().endswith(config.purpose)


@pytest.mark.parametrize("name", shipped_configs())
def test_names_stay_whole_on_a_narrow_screen(name: str) -> None:
    result = CliRunner().invoke(cli.app, ["configs"], env={"COLUMNS": "80"})
    assert name in result.stdout.split()


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
