"""What leaves and enters a run by other doors: exports, other formats, DeepSpeed's checkpoints, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import hub
from safetensors.torch import load_file
from test_checkpoints import COMPACT, WAYS, World, model, steps_of
from torch import Tensor
from typer.testing import CliRunner

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.export import export
from toolkit.checkpoint.source import Source
from toolkit.checkpoint.universal import open_checkpoint, write
from toolkit.cli import app
from toolkit.commands.checkpoint import find
from toolkit.errors import UserError
from toolkit.report import build_report

AMCS, ADAMW = WAYS["amcs-2"], WAYS["adamw-2"]
FP32_STATE = ["--set", "optimizer.params.state_format=fp32", "--set", "comet.api_key=K3Y"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def runs(world: World) -> World:
    """On two ranks: a run stopped after step 5 and the same uninterrupted; DeepSpeed's own."""
    val = ["--val-data", str(world.data), "--eval-every", "5", "--eval-sequences", "6"]
    steps = [
        {"run": world.arguments("main", AMCS, 2, *val), "stop_at": 5},
        {"run": world.arguments("fp32", AMCS, 2, *FP32_STATE), "stop_at": 5},
        {"run": world.arguments("done", AMCS, 2, *val)},
        {"stock": world.arguments("unused", ADAMW, 2), "to": str(world.root / "stock")},
        {"stock": world.arguments("unused", WAYS["adamw-3"], 2), "to": str(world.root / "stock-3")},
    ]
    world.results = steps_of(world, "runs", 2, steps)  # type: ignore[attr-defined]
    return world


def source_of(world: World, run: str) -> Source:
    return open_checkpoint(find(world.root / run))


def states(source: Source) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, (_, place) in source.sharding.by_name.items():
        found[name] = source.states(name, 0, place.numel) | {"weights": source.weights(name, 0, place.numel)}
    return found


# ---- export ----


@pytest.mark.parametrize(("dtype", "shard_bytes"), [("bf16", 10**9), ("fp32", 600_000)])
def test_an_export_has_the_loss_of_the_run(runs: World, tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolkit.run.prepare import prepare
    from toolkit.run.settings import parse

    source = source_of(runs, "done")
    files = export(source, tmp_path / "hf", dtype=dtype, shard_bytes=shard_bytes)
    assert len(files) == (1 if dtype == "bf16" else 3)
    # A matrix of the vocabulary is larger than a shard; all else keeps to the size.
    assert all(file.stat().st_size < max(shard_bytes, 4096 * 64 * 4) + 20_000 for file in files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    assert loaded.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    for name, value in loaded.named_parameters():
        expected = source.weights(f"hf.{name}", 0, value.numel()).view(value.shape)
        if dtype == "bf16":
            expected = source.elements(f"hf.{name}", None, 0, value.numel()).view(value.shape)
        assert torch.equal(value, expected), name
    settings = parse(runs.arguments("new", AMCS, 1, "--val-data", str(runs.data), "--eval-every", "5"))
    assert settings is not None
    tokens = torch.stack(prepare(settings).validation[:6])
    with torch.no_grad():
        loss = loaded(input_ids=tokens[:, :-1]).logits.float().flatten(0, 1)
        mean = torch.nn.functional.cross_entropy(loss, tokens[:, 1:].flatten())
    assert float(mean) == pytest.approx(runs.records("done")[-1]["val_loss"], rel=1e-4 if dtype == "bf16" else 2e-3)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == 4096
    with pytest.raises(UserError, match="holds a model already"):
        export(source, tmp_path / "hf")


def test_an_export_is_of_what_was_trained_not_of_what_a_path_names_today(runs: World, tmp_path: Path) -> None:
    """The model's folder changes after the run, and is gone; the checkpoint lies elsewhere."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(find(runs.root / "done"), moved)
    older = tmp_path / "older"  # without files that describe the model, as earlier versions saved
    shutil.copytree(moved, older)
    manifest = manifests.read(older)
    for name in source_of(runs, "done").model_files():
        (older / name).unlink()
        del manifest.files[name]
    manifests.write(older, manifest)
    hidden = runs.whole.with_name("hidden")
    runs.whole.rename(hidden)
    try:
        export(open_checkpoint(moved), tmp_path / "out")
        made = json.loads((tmp_path / "out" / "config.json").read_text())
        with pytest.raises(UserError, match="model folder .* does not exist"):
            export(open_checkpoint(older), tmp_path / "none")
        model(runs.whole, 64, rms_norm_eps=0.1)
        with pytest.raises(UserError, match="which is another one now, and keeps no copy of its files"):
            export(open_checkpoint(older), tmp_path / "none")
        shutil.rmtree(runs.whole)
    finally:
        hidden.rename(runs.whole)
    assert not (tmp_path / "none").exists()
    export(open_checkpoint(older), tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == made and made["rms_norm_eps"] == 1e-6
    assert (made["dtype"], made["architectures"]) == ("bfloat16", ["Qwen3ForCausalLM"])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "same" / "tokenizer.json").read_bytes()


# ---- formats ----


def test_formats_change_on_request_only(runs: World) -> None:
    changes = {
        "compact": ("main", [*AMCS, *COMPACT]),
        "8bit": ("fp32", AMCS),
        "soam": ("main", ["--config", "soam_zero2"]),
        "adamw": ("main", ADAMW),
    }
    steps = []
    for name, (source, way) in changes.items():
        place = str(runs.root / source / "checkpoints")
        arguments = runs.arguments(f"to-{name}", way, 1, "--resume", str(find(Path(place))))
        steps += [{"run": arguments}, {"carry": arguments, "source": place, "to": str(runs.root / "as" / name)}]
        steps[-1]["convert"] = True
        steps.append({"run": [*arguments, "--convert-state"]})
    results = steps_of(runs, "formats", 1, steps)
    for name, (refused, said, resumed) in zip(changes, zip(*[iter(results)] * 3, strict=True), strict=True):
        assert "cannot be taken over as it is" in refused and "--convert-state" in refused
        assert resumed["steps"] == 5, name
        # What is said is what was done, in the run as in the engine alone.
        assert said and all(sentence in " ".join(resumed["said"].split("\n")) for sentence in said)
    said = {name: " ".join(results[3 * i + 1]) for i, name in enumerate(changes)}
    assert "m_fast was kept as 8bit and is now 4bit (the difference from another state)" in said["compact"]
    assert "weights were bf16+8 and are bf16+4" in said["compact"]
    assert "m_slow was kept as fp32 and is now 8bit" in said["8bit"]
    assert "the optimizer was AMCS and is SOAM: m from m_fast, v from v" in said["soam"]
    assert "exp_avg from m_fast, exp_avg_sq from v" in said["adamw"]
    main, fp32 = states(source_of(runs, "main")), states(source_of(runs, "fp32"))
    for name, old in main.items():
        compact, adam = states(source_of(runs, "as/compact"))[name], states(source_of(runs, "as/adamw"))[name]
        assert torch.equal(adam["exp_avg"], old["m_fast"]) and torch.equal(adam["exp_avg_sq"], old["v"])
        assert torch.equal(compact["m_slow"], old["m_slow"]) or "norm" in name
        assert torch.allclose(compact["weights"], old["weights"], rtol=2**-12, atol=0)
    eight = states(source_of(runs, "as/8bit"))
    for name, old in fp32.items():
        for key in ("m_fast", "m_slow"):  # a code is up to 1.6 % of the block's largest from the next
            assert (eight[name][key] - old[key]).abs().max() <= 0.017 * old[key].abs().max(), (name, key)


@pytest.mark.parametrize("folder", ["stock", pytest.param("stock-3", marks=pytest.mark.slow)])
def test_deepspeeds_adam_seeds_both_momenta(runs: World, folder: str) -> None:
    place = runs.root / folder / "global_step3"
    arguments = runs.arguments(f"from-{folder}", AMCS, 1, "--resume", str(runs.root / folder))
    carry = {"carry": arguments, "source": str(place), "to": str(runs.root / "as" / folder), "convert": True}
    refused, said, resumed = steps_of(
        runs, f"from-{folder}-ranks", 1, [{"run": arguments}, carry, {"run": [*arguments, "--convert-state"]}]
    )
    assert "the optimizer was Adam and is AMCS: m_fast from exp_avg, m_slow from exp_avg, v from exp_avg_sq" in refused
    assert resumed["steps"] == 7 and "says nothing of the data" in resumed["said"]
    assert any("m_slow from exp_avg" in sentence for sentence in said)
    adam, made = states(Source(place)), states(source_of(runs, f"as/{folder}"))
    assert adam.keys() == made.keys()
    for name, old in adam.items():
        assert torch.equal(made[name]["m_fast"], made[name]["m_slow"])
        assert (made[name]["m_fast"] - old["exp_avg"]).abs().max() <= 0.017 * old["exp_avg"].abs().max()
        assert torch.allclose(made[name]["weights"], old["weights"], rtol=2**-15, atol=1e-30)
        root = old["exp_avg_sq"] ** 0.25
        assert (made[name]["v"] ** 0.25 - root).abs().max() <= root.max() / 250


def test_offline_and_live_resharding_agree(runs: World) -> None:
    origin = runs.digest("main")
    source = source_of(runs, "main")
    for number, (stage, ranks) in enumerate([(1, 1), (3, 4), (2, 3), (2, 2)]):
        convert(source, runs.root / f"offline-{number}", stage=stage, world_size=ranks)
        source = source_of(runs, f"offline-{number}")
        assert source.digest() == origin
        assert (source.stage, source.sharding.world_size) == (stage, ranks)
    assert source.sharding == source_of(runs, "main").sharding
    with pytest.raises(UserError, match="exists already"):
        convert(source, runs.root / "offline-0", stage=1, world_size=1)
    # A run resumes from what was written offline, as from its own.
    resume = ["--resume", str(runs.root / "offline-1")]
    val = ["--val-data", str(runs.data), "--eval-every", "5", "--eval-sequences", "6"]
    [result] = steps_of(runs, "offline-run", 2, [{"run": runs.arguments("went-on", AMCS, 2, *val, *resume)}])
    assert result["steps"] == 5
    assert [r["loss"] for r in runs.records("went-on")] == [r["loss"] for r in runs.records("done")[5:]]


# ---- DeepSpeed's universal layout ----


def test_universal_layout_there_and_back(runs: World) -> None:
    source = source_of(runs, "main")
    folder = runs.root / "universal" / "global_step5"
    write(source, folder)
    there = open_checkpoint(folder)
    assert there.digest() == source.digest()
    for path in folder.rglob("*.pt"):
        torch.load(path, weights_only=True)
    exported = []
    for origin in (source, there):  # the sum of a weight and its remainder may round to another weight
        [file] = export(origin, runs.root / f"exported-{origin.stage}")
        exported.append(load_file(file))
    assert exported[0].keys() == exported[1].keys()
    for name, value in exported[0].items():
        assert value.dtype == exported[1][name].dtype and torch.equal(value, exported[1][name]), name
    convert(there, runs.root / "back", stage=2, world_size=2)
    before, after = states(source), states(source_of(runs, "back"))
    for name, old in before.items():
        for key in ("weights", "m_fast", "m_slow"):
            assert torch.equal(after[name][key], old[key]), (name, key)
        assert torch.allclose(after[name]["v"], old["v"], rtol=1e-6, atol=0)
    # DeepSpeed's own loader gives it to its Adam.
    loads = ["--set", 'checkpoint={"load_universal": true}']
    arguments = runs.arguments("unused", ADAMW, 2, *loads)
    step = {"universal": arguments, "source": str(folder.parent), "tag": folder.name}
    [found] = steps_of(runs, "universal-ranks", 2, [step])
    assert found
    for name, held in found.items():
        inside = slice(held["start"], held["start"] + held["fp32"].numel())
        assert torch.equal(held["fp32"], before[name]["weights"][inside]), name
        assert torch.equal(held["exp_avg"], before[name]["m_fast"][inside]), name
        assert torch.equal(held["exp_avg_sq"], before[name]["v"][inside]), name


# ---- the command line ----


def test_commands(runs: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})

    run = runs.root / "main"
    shown = call("checkpoint", "inspect", run, "--digest").output
    for expected in ("2 at ZeRO stage 2", "AMCS: m_fast, m_slow, v", "m_fast=8bit", runs.digest("main")):
        assert expected in shown
    assert "global_step4: intact" in call("checkpoint", "verify", run).output
    assert call("checkpoint", "convert", run, "--out", tmp_path / "one", "--zero-stage", "1").exit_code == 0
    assert runs.digest("main") == open_checkpoint(find(tmp_path / "one")).digest()
    assert call("checkpoint", "convert", run, "--out", tmp_path / "u" / "x", "--universal").exit_code == 0
    assert runs.digest("main") == open_checkpoint(find(tmp_path / "u" / "x")).digest()
    assert "step 5 as trained, 1 file" in call("export", run, "--out", tmp_path / "hf").output
    with hub(monkeypatch) as server:
        pushed = call("export", run, "--out", tmp_path / "pushed", "--push_to_hub", "owner/name")
        assert f"1 file; uploaded to {server.url}/owner/name" in pushed.output
        assert server.files["owner/name"].keys() == {path.name for path in (tmp_path / "hf").iterdir()}
        assert server.private == {"owner/name": True}
    assert "--public is for --push" in str(call("export", run, "--out", tmp_path / "x", "--public").exception)
    assert "--dtype is 'fp8'" in str(call("export", run, "--out", tmp_path / "x", "--dtype", "fp8").exception)
    file = next((tmp_path / "one" / "global_step5").glob("*optim*"))
    file.write_bytes(file.read_bytes()[:-1])
    verified = call("checkpoint", "verify", tmp_path / "one")
    assert f"{file} has" in verified.output and "1 of 1 checkpoint is damaged" in str(verified.exception)
    with pytest.raises(UserError, match="there is no such folder"):
        find(tmp_path / "absent")


# ---- refusals ----


BATCH_AND_STEPS = ("--global-batch", "--micro-batch", "--steps", "--save-every", "--keep-last", "--eval-every")


def without(arguments: list[str], flags: tuple[str, ...]) -> list[str]:
    """A command line that leaves `flags` and their values out."""
    gone = {place + more for place, word in enumerate(arguments) if word in flags for more in (0, 1)}
    return [word for place, word in enumerate(arguments) if place not in gone]


def test_another_model_tokenizer_or_data_is_refused_by_name(runs: World, tmp_path: Path) -> None:
    model(tmp_path / "deeper", 64, num_hidden_layers=2)
    other = tmp_path / "other.jsonl"
    other.write_text(runs.data.read_text().replace("Document", "Paper"))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(runs.data, moved)
    resume = ["--resume", str(runs.root / "main" / "checkpoints" / "global_step5")]
    changes: dict[str, tuple[list[str], str]] = {
        "model": (["--model", str(tmp_path / "deeper")], f"and this run has model '{tmp_path / 'deeper'}'"),
        "tokenizer": (["--tokenizer", "mistral-32k", "--model", "qwen3-134m"], "trained with model"),
        "data": (["--data", str(other)], f"was trained with data '{runs.data}', and this run has data '{other}'"),
        "seq-len": (["--seq-len", "16"], "was trained with --seq-len 32, and this run has 16"),
        "seed": (["--seed", "1"], "was trained with --seed 0, and this run has 1"),
        "absent": (["--resume", str(tmp_path / "absent")], "there is no such folder"),
    }
    fixed = {name: runs.arguments(f"refused-{name}", AMCS, 1, *resume, *more) for name, (more, _) in changes.items()}
    resumed = runs.arguments("moved", AMCS, 1, *resume, "--data", str(moved))
    # Two ranks made 5 of 10 steps of 12 sequences. What is left open stays; what is typed holds, and is said.
    val = ["--val-data", str(runs.data), "--eval-sequences", "6"]
    left_open = without(runs.arguments("left-open", AMCS, 1, *val, *resume), BATCH_AND_STEPS)
    impossible = [*without(runs.arguments("impossible", AMCS, 1, *val, *resume), BATCH_AND_STEPS), "--micro-batch", "5"]
    auto = without(runs.arguments("mixed", AMCS, 1, *val), BATCH_AND_STEPS)
    first = [*auto, "--resume", resume[1], "--global-batch", "6", "--steps", "7", "--lr", "2e-3"]
    further = [{"run": line} for line in (left_open, impossible, first, [*auto, "--global-batch", "4", "--steps", "9"])]
    lines = [*({"run": line} for line in fixed.values()), *further, {"run": resumed}]
    results = steps_of(runs, "refusals", 1, lines)
    for (name, (_, message)), result in zip(changes.items(), results, strict=False):
        assert isinstance(result, str) and message in result and "\n" not in result, (name, result)
        assert not (runs.root / f"refused-{name}").exists()
    assert results[-1]["steps"] == 5  # the same text elsewhere
    stayed, refused, _, mixed = results[len(fixed) : -1]
    assert (stayed["steps"], stayed["tokens"]) == (5, 5 * 12 * 32)
    assert "taken from the checkpoint: --steps 10, --eval-every 5, --save-every 4, --keep-last 9" in stayed["said"]
    done, found = runs.records("done")[5:], runs.records("left-open")
    for key in ("lr", "alpha", "step"):
        assert [record[key] for record in found] == [record[key] for record in done]
    assert "12 sequences a step, which cannot be kept" in refused and "give --global-batch" in refused
    assert [record["sequences"] for record in runs.records("mixed")] == [6, 6, 4, 4]
    assert mixed["tokens"] == (6 + 6 + 4 + 4) * 32
    changed = {record["step"]: record["changed"] for record in runs.records("mixed") if "changed" in record}
    assert list(changed) == [6, 8]
    assert {"global batch 12, now 6", "optimizer.params.lr 0.0006, now 0.002"} <= set(changed[6])
    assert "global batch 6, now 4" in changed[8] and not any("lr" in one for one in changed[8])
    training = build_report([runs.root / "mixed"]).runs[0].training
    assert training is not None and training.tokens == mixed["tokens"]
    assert [(one.first, one.sequences) for one in training.batches] == [(6, 6), (8, 4)]


# ---- trust ----


def test_deepspeeds_own_files_need_no_trust_and_keep_no_secret(runs: World) -> None:
    for name in ("stock", "stock-3"):
        folder = runs.root / name / "global_step3"
        assert Source(folder).digest() == Source(folder, trust_pickle=True).digest()
    for path in (runs.root / "fp32").rglob("*"):
        assert not path.is_file() or b"K3Y" not in path.read_bytes(), path


# ---- gradients that are not finite ----


def test_skipped_steps_do_not_move_alpha_and_too_many_stop_the_run(runs: World) -> None:
    plain = runs.arguments("plain-alpha", AMCS, 1)
    skips = runs.arguments("skips", AMCS, 1)
    stops = runs.arguments("stops", AMCS, 1, "--max-skipped", "3")
    results: list[Any] = steps_of(
        runs,
        "nonfinite",
        1,
        [
            {"run": plain},
            {"run": skips, "poison": [4, 5]},
            {"run": stops, "poison": [5, 6, 7, 8]},
            {"run": stops},
        ],
    )
    records = runs.records("skips")
    assert [r["step"] for r in records if r["skipped"]] == [4, 5] == [r["step"] for r in records if "nonfinite" in r]
    assert results[1]["skipped_steps"] == 2 and not results[1]["diverged"]
    alphas = [r["alpha"] for r in runs.records("plain-alpha")]
    # A skipped step repeats the value of the step before; the next one has its successor.
    assert [r["alpha"] for r in records] == alphas[:3] + [alphas[2]] * 2 + alphas[3:8]
    assert results[2]["diverged"] and "not finite in 3 steps in a row" in results[2]["said"]
    source = Source(runs.root / "stops" / "checkpoints" / "global_step7")
    assert {source.step_of(index) for index in range(len(source.sharding.flats))} == {4}
    assert not results[3]["diverged"] and [r["step"] for r in runs.records("stops")] == list(range(1, 11))
