"""Secrets stay in the engine, and what files and names say reaches screens and documents as text."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import write_run
from small_checkpoints import FACTS, STEP, call, cut, rewrite, stock, whole

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint import universal
from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.manifest import Manifest
from toolkit.checkpoint.source import Source
from toolkit.config.files import apply_overrides
from toolkit.console import PlainConsole
from toolkit.errors import UserError
from toolkit.masking import MASK, hide_in_logs, is_secret, masked, masked_assignment
from toolkit.printable import printable
from toolkit.records.run import read_metrics
from toolkit.report import build_report, report_paths, write_report
from toolkit.report.markdown import escaped
from toolkit.run.folder import RunFolder, plot_loss
from toolkit.run.screen import Screen

EVIL = "x\x1b[31mred\x1b]0;title\x07\u202egnp\u2066\x9b2J\r\u2028[bold]b[/bold] [/] :smile: "
EVIL += "<script>alert(1)</script> &#x202e;"
SECRETS = (
    "api_key",
    "apiKey",
    "API-KEY",
    "hf_token",
    "token",
    "WANDB_API_KEY",
    "client_secret",
    "password",
    "db_passwd",
)
SECRETS += ("AWS_SECRET_ACCESS_KEY", "private_key", "credentials", "http_auth")


def acts(text: str) -> set[str]:
    return {char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}


# ---- secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_masked_at_any_depth(name: str) -> None:
    for value in ("KEY", 123, ["KEY", {"a": "KEY"}], {"value": "KEY"}):
        shown = json.dumps(masked({"a": [{"b": {name: value}}], name: value}))
        assert "KEY" not in shown.replace(name, "") and "123" not in shown and MASK in shown
    assert masked({name: None, "on": True}) == {name: None, "on": True}


def test_what_is_no_secret_stays() -> None:
    config = {
        "tokenizer": "t",
        "tokens_per_s": 3,
        "tokens": 4,
        "keys": ["a", "SecretMoe"],
        "eos_token_id": 2,
        "author": "me",
    }
    assert masked(config) == config and not any(map(is_secret, config))


@pytest.mark.parametrize(
    "text",
    ["comet.api_key=KEY", "wandb.a.token=KEY", 'comet={"api_key": "KEY"}', "x.secret.y=KEY", "comet.api_key KEY"],
)
def test_an_assignment_is_masked(text: str) -> None:
    assert "KEY" not in masked_assignment(text) and "KEY" not in str(masked({"overrides": [text]}))
    assert masked_assignment("optimizer.params.lr=1e-3") == "optimizer.params.lr=1e-3"


def test_sentences_quote_no_secret() -> None:
    from toolkit.config import validate

    config = {"train_micro_batch_size_per_gpu": 1}
    with pytest.raises(UserError) as caught:
        validate({**config, "comet": {"enabled": True, "api_key": ["12345678"]}}, origin="x.json")
    assert "comet.api_key" in str(caught.value) and "12345678" not in str(caught.value)
    for words in (["comet.api_key=KEY", "comet.api_key.x=1"], [".api_key=KEY"]):
        with pytest.raises(UserError) as caught:
            apply_overrides({}, words)
        assert "KEY" not in str(caught.value)


def test_a_mask_is_no_secret() -> None:
    from toolkit.config import validate

    config = masked({"train_micro_batch_size_per_gpu": 1, "comet": {"enabled": True, "api_key": "12345678"}})
    with pytest.raises(
        UserError, match=r"run/ds_config.json: comet.api_key is '\*\*\*', which the files of a run have"
    ):
        validate(config, origin="run/ds_config.json")


def test_the_run_folder_and_checkpoints_hold_no_secret(tmp_path: Path) -> None:
    config = {"comet": {"enabled": False, "api_key": "KEY-1"}, "wandb": {"token": "KEY-2"}}
    facts = {"settings": {"overrides": ["comet.api_key=KEY-3"]}, "ds_config": config}
    held = RunFolder(tmp_path / "run", facts, config, checkpoints=True)
    held.write_step({"step": 1, "loss": 1.0, "tokens_per_s": 1.0, "step_time_s": 1.0, "skipped": False})
    held.continue_after(1, config)
    held.close()
    store = whole(tmp_path / "run" / "checkpoints")
    entries = manifests.read(store.path(STEP))
    noted = Manifest(STEP, entries.sharding, FACTS | {"run": {"config": config}}, entries.files)
    manifests.write(store.path(STEP), noted)
    own = stock(tmp_path / "stock")
    convert(Source(own), tmp_path / "run" / "converted", stage=1, world_size=1)
    universal.write(Source(own), tmp_path / "run" / "universal")
    for path in (tmp_path / "run").rglob("*"):
        # `whole` writes its own files as an engine would without masking: only the manifest is asked there.
        if path.is_file() and not (path.suffix == ".pt" and store.folder in path.parents):
            content = path.read_bytes()
            assert b"KEY-" not in content and b"SECRET" not in content, path
    assert config["comet"]["api_key"] == "KEY-1"  # the engine's own is what it was


def test_a_log_shows_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    config = {"comet": {"api_key": "KEY-12345", "project": "mine"}, "token": ["KEY-6789"], "password": "a"}
    hide_in_logs(config, logging.getLogger("a log"))
    logging.getLogger("a log").warning("%s: %s", "config", config)
    assert "KEY-" not in caplog.text and caplog.text.count(MASK) == 2 and "mine" in caplog.text


# ---- text -----------------------------------------------------------------------------------------------------------


@given(st.text())
def test_printable_text_acts_on_nothing_and_plain_text_stays(text: str) -> None:
    assert not acts(printable(text)) and acts(printable(text, lines=True)) <= {"\t"}
    assert printable(printable(text)) == printable(text)
    if text.isascii() and text.isprintable():
        assert printable(text) == text
    assert not acts(str(UserError(text))) and "\n" not in str(UserError(text))


def test_letters_of_all_languages_stay() -> None:
    assert printable("Größe 大小 размер حجم ∑ 🙂 é") == "Größe 大小 размер حجم ∑ 🙂 é"


def test_the_terminal_gets_text() -> None:
    from rich.table import Table

    out = io.StringIO()
    console = PlainConsole(file=out, width=400, force_terminal=True)
    table = Table(EVIL)
    table.add_row(EVIL)
    console.print(table, EVIL)
    screen = Screen(1, shown=True, console=PlainConsole(file=out, width=400))
    screen.say(EVIL)
    shown = out.getvalue()
    assert "\x1b[31m" not in shown and "\x1b]0" not in shown and not acts(shown) - {"\x1b"}
    assert shown.count("[bold]b[/bold] [/] :smile:") == 4


def test_inspect_and_verify_show_names_as_text(tmp_path: Path) -> None:
    folder = cut(tmp_path, 1, 1)

    def change(body: dict[str, Any]) -> None:
        body["identity"]["model"]["name"] = EVIL
        body["versions"] = {EVIL: EVIL}
        body["saved"] = EVIL

    rewrite(folder, change)
    (folder / f"extra{EVIL.replace('/', '')}"[:100]).touch()
    for command in ("inspect", "verify"):
        shown = call("checkpoint", command, folder)
        assert not acts(shown.output) and "[bold]b" in shown.output, command


def hostile_run(folder: Path) -> Path:
    write_run(folder)
    for name in ("run.json", "memory/predicted.json", "memory/rank0.json"):
        body = json.loads((folder / name).read_text())
        body.get("setup", body.get("settings"))["model"] = EVIL
        (folder / name).write_text(json.dumps(body))
    return folder


def test_a_report_holds_names_as_text(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "run")
    hostile = Path(shutil.copytree(run, tmp_path / f"run{EVIL.replace('/', '')}"))
    report = build_report([run, hostile])
    paths = report_paths([run], tmp_path / "out", ())
    write_report(report, paths)
    for kind, path in paths.items():
        text = path.read_text()
        assert not acts(text), (kind, acts(text))
        assert "<script>alert" not in text.replace("\\u003c", "<") or kind == "json"
    assert "&#x202e;" not in paths["html"].read_text()
    shown = call("report", run, hostile, "--out", tmp_path / "again")
    assert shown.exit_code == 0 and not acts(shown.output)
    assert escaped("&#x202e; [a](b)") == "\\&\\#x202e; \\[a\\](b)"


LINKED = ["run.json", "ds_config.json", "metrics.jsonl", "summary.json", "memory/predicted.json", "memory/rank0.json"]
LINKED += ["memory/rank0-out-of-memory.md", "memory/rank0-out-of-memory.json", "memory"]


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("kind", ["link", "FIFO", "/dev/zero", "circle"])
def test_a_report_reads_nothing_but_files_of_the_run(tmp_path: Path, name: str, kind: str) -> None:
    run = tmp_path / "run"
    write_run(run)
    secret = tmp_path / "secret"
    if name == "memory":
        shutil.copytree(run / name, secret)
        for path in secret.glob("*.json"):
            path.write_text(path.read_text().replace("qwen3-134m", "TOPSECRET"))
        shutil.rmtree(run / name)
    else:
        told = {"step": 1, "loss": 4.25, "tokens_per_s": 7777.0}
        line = json.dumps(told | {"device": "TOPSECRET", "settings": {"model": "TOPSECRET"}})
        secret.write_text(line if name.startswith(("run", "ds", "met", "summ")) else "TOPSECRET")
        (run / name).unlink(missing_ok=True)
    if kind == "link":
        (run / name).symlink_to(secret)
    elif kind == "FIFO":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(kind if kind.startswith("/") else run / name)
    report = build_report([run])
    paths = report_paths([run], tmp_path / "out", ())
    write_report(report, paths)
    for path in paths.values():
        text = path.read_text()
        assert "TOPSECRET" not in text and "7777" not in text.replace(",", "")


def test_a_report_is_not_written_through_a_link(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run)
    (tmp_path / "theirs").write_text("theirs")
    (run / "report.md").symlink_to(tmp_path / "theirs")
    assert "is a link" in str(call("report", run).exception)
    assert (tmp_path / "theirs").read_text() == "theirs" and not list(run.glob("report.html"))


WRITTEN = ["run.json", "ds_config.json", "metrics.jsonl", "summary.json", "loss.png", "memory/rank0-out-of-memory.md"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_does_not_write_through_links(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    RunFolder(run, {}, {}, checkpoints=True).write_step({"step": 1})
    (tmp_path / "theirs").write_text("theirs")
    (run / "memory").mkdir()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="is a link"):
        RunFolder(run, {}, {}, checkpoints=True, resuming=True)
    (run / name).unlink()
    (run / f".metrics.jsonl.{os.getpid()}").symlink_to(tmp_path / "theirs")
    (run / "run.json").touch()
    held = RunFolder(run, {}, {}, checkpoints=True, resuming=True)
    (run / "metrics.jsonl").touch()
    held.continue_after(1, {})
    held.close()
    assert (tmp_path / "theirs").read_text() == "theirs"


STEP_LINE = {"step": 1, "loss": 1.0, "lr": 0.1, "tokens_per_s": 1.0, "step_time_s": 1.0, "skipped": False}
BAD_LINES: list[Any] = [
    *(5, None, [], {}, "x", {"step": "1"}, {"step": None}, {"step": 10**30}, {"loss": 1.0}, STEP_LINE | {"loss": "x"}),
    *(STEP_LINE | {"step": 0}, STEP_LINE | {"skipped": 3}, STEP_LINE | {"step_time_s": float("nan")}),
    *(STEP_LINE | {"deep": {"a": float("inf")}}, STEP_LINE | {"val_loss": "x"}),
]


def test_lines_that_are_no_steps_are_dropped_and_counted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunFolder(run, {}, {}, checkpoints=True).write_step(STEP_LINE)
    with open(run / "metrics.jsonl", "a") as file:
        for line in BAD_LINES:
            file.write(json.dumps(line) + "\n")
        file.write(json.dumps(STEP_LINE | {"step": 2}) + "\n")
    held = RunFolder(run, {}, {}, checkpoints=True, resuming=True)
    assert [record["step"] for record in held.continue_after(5, {})] == [1, 2] and held.dropped == len(BAD_LINES)
    held.close()
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2]
    plot_loss([STEP_LINE], tmp_path / "loss.png", title="a $\\foo$ b")


# ---- custom code ----------------------------------------------------------------------------------------------------


def custom(folder: Path, mark: Path, **config: Any) -> Path:
    folder.mkdir()
    code = f"open({str(mark)!r}, 'w')\n"
    for module in ("configuration_x", "modeling_x", "tokenization_x"):
        (folder / f"{module}.py").write_text(code)
    auto = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto} | config))
    tokens = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def test_a_folder_with_code_of_its_own_is_refused_without_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolkit import data, models

    mark = tmp_path / "mark"

    def ask(*_: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", ask)
    folder = custom(tmp_path / "custom", mark)
    readers: list[Callable[[], Any]] = [
        lambda: models.load_config(str(folder)),
        lambda: data.load_tokenizer(str(folder)),
    ]
    for read in readers:
        with pytest.raises(UserError, match="needs code that comes with it, which is never run here") as caught:
            read()
        assert "\n" not in str(caught.value) and not mark.exists()
    kernel = custom(tmp_path / "kernel", mark, model_type="qwen3", attn_implementation="someone/kernel", auto_map={})
    with pytest.raises(UserError, match="someone/kernel"):
        models.load_config(str(kernel))
    # A model of a known kind is built from transformers' own code, whatever the folder says.
    known = custom(tmp_path / "known", mark, model_type="qwen3", hidden_size=32, num_hidden_layers=1, vocab_size=64)
    models.build_model(str(known), dtype=__import__("torch").float32, seed=0)
    assert not mark.exists()


def test_every_call_of_transformers_forbids_code_of_the_folder() -> None:
    """`from_pretrained` and `from_config` would ask, or run it, where nothing is said."""
    package = Path(manifests.__file__).parents[1]
    calls = 0
    for path in package.rglob("*.py"):
        text = path.read_text()
        for found in ("from_pretrained(", "from_config("):
            for part in text.split(f".{found}")[1:]:
                calls += 1
                assert "trust_remote_code=False" in part[:200], path
        assert "trust_remote_code=True" not in text and "weights_only=False" not in text
    assert calls >= 7
