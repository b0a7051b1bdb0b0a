"""`toolkit estimate` and `toolkit plan`: what they print, and how they end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit import cli
from toolkit.config import load_config, validate
from toolkit.errors import UserError
from toolkit.estimate.prices import default_format, missed_bound
from toolkit.estimate.recommend import Candidate, formats_of, recommend
from toolkit.optim import RULES, AMCSRule
from toolkit.records.memory import Prediction
from toolkit.records.sizes import parse_size


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["toolkit", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_json_is_the_whole_prediction(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "qwen3-tiny", "--config", "soam_zero3", "--ranks", "2", "--nodes", "3", "--grad-accum", "2"]
    assert run(monkeypatch, "estimate", *arguments, "--json") == 0
    found = Prediction.model_validate_json(capsys.readouterr().out)
    assert (found.setup.optimizer, found.setup.stage, found.setup.world_size) == ("SOAM", 3, 6)
    assert (found.setup.micro_batch, found.setup.gradient_accumulation) == (4, 2)
    assert found.context > 0 and any("assumed" in remark for remark in found.remarks)


def test_the_table_adds_up_and_says_whether_it_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["estimate", "--model", "qwen3-134m", "--device", "cpu", "--seq-len", "128"]
    assert run(monkeypatch, *arguments, "--gpu-memory", "80GB") == 0
    printed = capsys.readouterr().out
    for word in ("weights", "remainder", "gradients", "m_fast", "m_slow", "v ", "scales", "the peak lies in the phase"):
        assert word in printed
    assert "fits:" in printed and "to spare" in printed
    assert run(monkeypatch, *arguments, "--gpu-memory", "0.5GB") == 1
    assert "does not fit:" in capsys.readouterr().out


@pytest.mark.parametrize(("config", "told"), [("amcs", "what each rank puts in"), ("adamw", "not predicted for AdamW")])
def test_collectives_are_told_or_said_not_to_be_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str, told: str
) -> None:
    line = ["estimate", "--model", "qwen3-3m", "--config", f"{config}_zero1", "--seq-len", "64", "--ranks"]
    assert run(monkeypatch, *line, "2") == 0
    printed = capsys.readouterr().out
    assert f"collectives in a step{',' if config == 'amcs' else ':'} {told}" in printed
    assert "without the context)" in printed, "which the table has"
    assert run(monkeypatch, *line, "1", "--device", "cpu") == 0
    assert "collectives" not in capsys.readouterr().out


def test_eight_billion_parameters_on_one_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "qwen3-8b", "--micro-batch", "1", "--seq-len", "2048", "--gpu-memory", "80GB", "--json"]
    assert run(monkeypatch, "estimate", "--config", "amcs_zero2", *arguments) == 0
    lean = Prediction.model_validate_json(capsys.readouterr().out)
    assert run(monkeypatch, "estimate", "--config", "adamw_zero2", *arguments) == 1
    plain = Prediction.model_validate_json(capsys.readouterr().out)
    assert lean.peak + lean.context < 80e9 < plain.peak
    assert lean.setup.parameters == plain.setup.parameters == 8_190_735_360


def test_what_if_lists_variants_and_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "estimate", "--ranks", "2", "--what-if") == 0
    printed = capsys.readouterr().out
    for words in ("kept, eager attention", "logits, chunked loss", "optimizer.params.state_format compact", "--micro-"):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "qwen3-9b"], "Did you mean 'qwen3-8b'?"),
        (["--config", "amcs_zero22"], "Did you mean 'amcs_zero2'?"),
        (["--gpu-memory", "80XB"], "must be a size such as 80GB"),
        (["--gpu-memory", "0GB"], "must be a size such as 80GB"),
        (["--set", "optimizer.params.state_format=9bit"], "state_format '9bit' is unknown"),
        (["--plugin", "missing.py"], "there is no such file"),
        (["--attention", "flsh"], "flsh"),
        (["--seq-len", "5000"], "has 4096 positions"),
        (["--activations", "tile"], "Did you mean 'tiled'?"),
        (["--activations", "offload", "--device", "cpu"], "on a CPU the host is the device"),
        (["--activation-checkpointing"], "that is --activations checkpoint, and without it --activations full"),
        (["--ranks", "0"], "--ranks is 0, but must be at least 1."),
        (["--ranks", "99999999999"], "must be at most 1024; machines are --nodes."),
    ],
)
def test_what_is_typed_wrong_ends_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(monkeypatch, "estimate", *arguments) == 2
    printed = capsys.readouterr()
    assert words in " ".join(printed.err.split()) and "Traceback" not in printed.err


def test_a_plan_writes_a_config_that_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    arguments = ["plan", "--model", "qwen3-tiny", "--ranks", "2", "--gpu-memory", "1.6GB", "--seq-len", "128"]
    assert run(monkeypatch, *arguments, "--out", str(path)) == 0
    printed = capsys.readouterr().out
    assert "the fastest first" in printed and "does not fit" not in printed.split("fits in")[0]
    written = load_config(path)
    validate(written, origin="plan")
    micro_batch = written["train_micro_batch_size_per_gpu"]
    kept = printed.split("--activations ")[-1].split()[0]
    again = ["estimate", "--model", "qwen3-tiny", "--config", str(path), "--ranks", "2", "--seq-len", "128"]
    assert run(monkeypatch, *again, "--activations", kept, "--gpu-memory", "1.6GB") == 0
    doubled = ["--micro-batch", str(2 * micro_batch), "--gpu-memory", "1.6GB"]
    assert run(monkeypatch, *again, "--activations", kept, *doubled) == (0 if micro_batch == 64 else 1)


def test_a_plan_that_cannot_be_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    wanted = ["plan", "--model", "qwen3-tiny", "--gpu-memory", "1.01GB", "--optimizer", "adamw", "--out", str(path)]
    assert run(monkeypatch, *wanted) == 1
    printed = capsys.readouterr().out
    assert "does not fit in 1.01 GB" in printed and "too much" in printed and "; most: " in printed
    assert not path.exists()
    assert run(monkeypatch, "plan", "--model", "qwen3-tiny", "--gpu-memory", "1GB", "--optimizer", "Adm") == 2
    sentence = capsys.readouterr().err
    assert "must be AMCS, AdEMAMix, " in sentence and "SOAM, SinkGD, StableAdamW. Did you mean 'AdamW'?" in sentence


def test_a_plan_recommends_eight_bits_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "--model", "qwen3-tiny", "--gpu-memory", "1.6GB", "--seq-len", "128"]
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    chosen = json.loads((tmp_path / "qwen3-tiny-plan.json").read_text())["optimizer"]["params"]
    assert chosen["state_format"] == "8bit"
    recommended, others = printed.split(
        "is not recommended unless asked for (--state-format compact or minimal or lean or leanest)"
    )
    assert "2.9 %" in recommended and "compact" not in recommended
    assert (
        "lean +0.002 ± 0.013" in others
        and "12.1 %" in others
        and "22.7 %" in others
        and "at 128 tokens a sequence" in recommended
    )
    assert run(monkeypatch, *arguments, "--state-format", "minimal", "--json") == 0
    assert json.loads(capsys.readouterr().out)["optimizer"]["params"]["state_format"] == "minimal"
    assert run(monkeypatch, *arguments, "--optimizer", "soam", "--json") == 0
    assert json.loads(capsys.readouterr().out)["optimizer"]["params"]["state_format"] == "8bit"


@pytest.mark.parametrize(
    ("optimizer", "state_format", "where"),
    [
        ("soam", "lean", "for SOAM, only for AdamW8, AMCS."),
        ("soam", "leanest", "for SOAM, only for AMCS."),
        ("adamw8", "compact", "for AdamW8, only for AMCS, SOAM."),
        ("muon8", "minimal", "for Muon8, only for AMCS."),
    ],
)
def test_no_format_is_planned_whose_price_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], optimizer: str, state_format: str, where: str
) -> None:
    arguments = ["--model", "qwen3-tiny", "--gpu-memory", "8GB", "--optimizer", optimizer]
    assert run(monkeypatch, "plan", *arguments, "--state-format", state_format, "--json") == 2
    said = capsys.readouterr().err
    assert f"--state-format is {state_format!r}, but its price in loss is not measured {where} A config can" in said


def test_a_plan_does_not_pass_over_a_format_that_deepspeeds_optimizers_lack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "qwen3-tiny", "--gpu-memory", "8GB", "--optimizer", "adamw", "--state-format", "lean"]
    assert run(monkeypatch, "plan", *arguments) == 2
    assert "--state-format is 'lean', but the state of AdamW, DeepSpeed's own, is fp32." in capsys.readouterr().err


def test_update_errors_are_those_of_the_docs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "state.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in page.splitlines() if line.count("|") == 9]
    heading = next(row for row in rows if row[3] == "compact")
    shown = {row[1]: {heading[i]: float(row[i]) for i in (2, 3, 4)} for row in rows if row[1] in RULES}
    kept = {name: one.rule for name, one in RULES.items() if one.__module__.startswith("toolkit.")}
    assert shown == {
        name: {state: rule.update_error[state] for state in ("8bit", "compact", "minimal")}
        for name, rule in kept.items()
    }
    by_codec = next(row for row in rows if "all" in row).index("all")
    of_amcs = {row[1]: float(row[by_codec]) for row in rows if row[1] in AMCSRule.update_error}
    assert of_amcs == AMCSRule.update_error


def test_prices_in_loss_are_those_of_the_docs() -> None:
    """Of several rows about one format that of most seeds, and of as many seeds the last."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "README.md").read_text()
    rows = [[cell.strip(" *") for cell in line.split("|")] for line in page.splitlines() if line.count("|") == 7]
    formats = {
        " 8bit, bf16+8": "8bit",
        " compact, bf16+4": "compact",
        " minimal, bf16+4": "minimal",
        " lean, bf16": "lean",
        " mixed, leanest, bf16": "leanest",
        "": "8bit",
    }
    wanted: dict[str, dict[str, tuple[int, tuple[float, float]]]] = {}
    for row in rows:
        for ending, state_format in formats.items():
            seeds = row[6].count(",") + 1
            if (name := row[1].removesuffix(ending)) in RULES and (ending == "" or name != row[1]) and seeds > 2:
                held = wanted.setdefault(name, {})
                if seeds >= held.get(state_format, (0, None))[0]:
                    held[state_format] = seeds, (round(float(row[4]), 3), round(float(row[5]), 3))
    kept = {name: dict(one.rule.loss_price) for name, one in RULES.items() if one.rule.loss_price}
    assert kept == {name: {state: price for state, (_, price) in held.items()} for name, held in wanted.items()}
    assert len(kept) > 10


def test_what_is_measured_to_cost_loss_is_not_what_is_recommended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert default_format("Muon8") == "fp32" and missed_bound(RULES["Muon8"].rule, "8bit") == 0.003
    within = [name for name in RULES if name != "Muon8"]
    assert {default_format(name) for name in within} == {"8bit"}
    arguments = ["plan", "--model", "qwen3-tiny", "--gpu-memory", "8GB", "--seq-len", "128", "--optimizer", "muon8"]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 0
    recommended, others = capsys.readouterr().out.split("is not recommended unless asked for (--state-format 8bit)")
    assert "fp32, bf16+8" in recommended and "8bit" not in recommended
    assert "8bit +0.005 ± 0.002, above its bound of 0.003" in others
    [plan] = tmp_path.glob("*.json")
    assert json.loads(plan.read_text())["optimizer"]["params"]["state_format"] == "fp32"
    for state_format in ("8bit", "any"):
        assert run(monkeypatch, *arguments, "--state-format", state_format, "--json") == 0
        chosen = json.loads(capsys.readouterr().out)["optimizer"]["params"]["state_format"]
        assert chosen == ("fp32" if state_format == "any" else "8bit"), "what is plainest is the fastest, by assumption"


def test_formats_are_those_that_an_optimizer_has() -> None:
    states = {name: list(formats_of(name, "any")) for name in ("AMCS", "SOAM", "AdamW")}
    assert "leanest, bf16" in states["AMCS"] and "fp32, bf16+8" not in states["AMCS"]
    assert "compact, bf16+4" in states["SOAM"] and "minimal, bf16+4" not in states["SOAM"]
    assert states["AdamW"] == list(formats_of("AdamW", "fp32")) == ["fp32"]
    assert "fp32, bf16+8" in formats_of("AMCS", "fp32")
    with pytest.raises(UserError, match="--state-format is '8bit', but the state of AdamW"):
        formats_of("AdamW", "8bit")


def test_a_plan_counts_the_hosts_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def found(host: int, ranks: int) -> dict[tuple[str, str], Candidate]:
        about: dict[str, Any] = {"gpu_memory": 2 * 10**9, "world_size": 2, "seq_len": 64, "optimizer": "AMCS"}
        every = recommend("qwen3-tiny", **about, host_memory=host, ranks_per_machine=ranks)
        return {(one.config, one.state): one for one in every if not one.activations.checkpoint}

    offloaded, plain = ("amcs_zero2_offload", "8bit, bf16+8"), ("amcs_zero2", "8bit, bf16+8")
    roomy, tight, apart = found(10**12, 2), found(10**6, 2), found(10**12, 1)
    assert roomy[offloaded].fits and not tight[offloaded].fits and tight[plain].fits
    assert roomy[offloaded].host == 2 * apart[offloaded].host > 10**6
    arguments = ["plan", "--model", "qwen3-tiny", "--gpu-memory", "2", "--seq-len", "64", "--out", str(tmp_path / "x")]
    assert run(monkeypatch, *arguments, "--host-memory", "1MB") == 0
    printed = capsys.readouterr().out
    assert printed.count("of host memory\n") > 1
    assert printed.count("what takes host memory is held against the 1.00 MB of --host-memory, less 5 %") == 1


def test_a_plan_overwrites_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "--model", "qwen3-tiny", "--gpu-memory", "8GB", "--seq-len", "64", "--json"]
    assert run(monkeypatch, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["optimizer"]["type"] == "AMCS"
    assert list(tmp_path.iterdir()) == []
    first, second = (tmp_path / f"qwen3-tiny-plan{number}.json" for number in ("", "-2"))
    first.write_text("{}")
    assert run(monkeypatch, *arguments[:-1], "--out", first.name) == 2
    assert "is there already" in capsys.readouterr().err
    assert run(monkeypatch, *arguments[:-1]) == 0
    assert "qwen3-tiny-plan-2.json written; train with" in capsys.readouterr().out
    assert json.loads(second.read_text())["optimizer"]["type"] == "AMCS"
    assert first.read_text() == "{}" and {*tmp_path.iterdir()} == {first, second}


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("1.5tb", 1_500_000_000_000), ("512B", 512), ("2 gb", 2 * 10**9)]
    # A bare number is GB: nobody has a GPU of 80 bytes.
    + [("80", 80 * 10**9), ("80G", 80 * 10**9), ("80g", 80 * 10**9), ("80Gi", 80 * 2**30), ("81559MiB", 81559 * 2**20)]
    + [("0.5", 500_000_000), ("1T", 10**12), ("80gib", 80 * 2**30), ("24.5G", 24_500_000_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, where="test") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1e3", "80 bytes", "nan", "0", "0.0000000001", "80X", "81559", "80000000000"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="--gpu-memory"):
        parse_size(text, where="--gpu-memory")
