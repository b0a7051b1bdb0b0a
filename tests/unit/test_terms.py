"""A resumed run: settings that are not given stay as the checkpoint has them, and a remark names what changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.config import apply_overrides, load_config
from toolkit.config.batch import ACCUMULATION, GLOBAL, MICRO, Batch, Kept, resolve_batch
from toolkit.errors import UserError
from toolkit.records.run import tokens_of
from toolkit.run.resolve import ResolvedSettings, resolve
from toolkit.run.settings import RunSettings, parse
from toolkit.run.start import Start
from toolkit.run.terms import KEPT, Saved, changes, kept_settings, saved_facts, terms

SMALL = st.integers(1, 48)


def settled(line: str, saved: Saved | None = None) -> ResolvedSettings:
    """The settings of a command line on WORLD_SIZE ranks."""
    settings = parse(line.split())
    assert settings is not None
    return resolve(settings, apply_overrides(load_config(settings.config), settings.overrides), saved)


def saved_by(line: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> Saved:
    """What a checkpoint of that line on so many ranks notes, as it comes back from JSON."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    run = settled(line)
    return Saved.of({"global_batch": run.batch.total, "run": saved_facts(run.settings, run.config, run.batch)})


# The batch


@given(micro=SMALL, accumulation=SMALL, before=st.integers(1, 8), now=st.integers(1, 8))
def test_the_global_batch_stays_at_any_number_of_ranks(micro: int, accumulation: int, before: int, now: int) -> None:
    total = micro * accumulation * before
    config = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    if total % now:
        with pytest.raises(
            UserError, match=f"{total} sequences a step, which cannot be kept: .*--global-batch"
        ) as told:
            resolve_batch({}, config, now, Kept(total, micro))
        assert "\n" not in str(told.value)
        return
    batch = resolve_batch({}, config, now, Kept(total, micro))
    assert batch.total == total
    # The micro-batch, which memory depends on, is the largest that divides and was there before.
    assert batch.micro == max(size for size in range(1, micro + 1) if (total // now) % size == 0)


@pytest.mark.parametrize(
    ("flags", "config", "kept", "expected"),
    [
        # Only flags that fix another batch change it.
        ({GLOBAL: 4}, {}, Kept(8, 4), Batch(2, 1, 2)),
        ({MICRO: 3, ACCUMULATION: 1}, {}, Kept(8, 4), Batch(3, 1, 2)),
        ({MICRO: 2}, {}, Kept(8, 4), Batch(2, 2, 2)),
        ({ACCUMULATION: 2}, {}, Kept(8, 4), Batch(2, 2, 2)),
        # Not a JSON of another batch, nor one that was written for other ranks.
        ({}, {"train_batch_size": 16}, Kept(8, 4), Batch(4, 1, 2)),
        ({}, {"train_batch_size": 16, "gradient_accumulation_steps": 2}, Kept(8), Batch(4, 1, 2)),
        ({}, {"train_batch_size": 8, "gradient_accumulation_steps": 8}, Kept(8, 1), Batch(1, 4, 2)),
        # The micro-batch stays, too, though the JSON has another.
        ({}, {}, Kept(8, 2), Batch(2, 2, 2)),
        # Checkpoints of older versions, and DeepSpeed's own, know the total only.
        ({}, {}, Kept(32), Batch(4, 4, 2)),
    ],
)
def test_flags_alone_change_the_batch(
    flags: dict[str, int | None], config: dict[str, Any], kept: Kept, expected: Batch
) -> None:
    usual = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    assert resolve_batch(flags, usual | config, 2, kept) == expected


@pytest.mark.parametrize("flags", [{MICRO: 3}, {ACCUMULATION: 3}, {MICRO: 16}])
def test_a_batch_that_cannot_stay_names_the_flag(flags: dict[str, int | None]) -> None:
    with pytest.raises(UserError, match="the run that is resumed has 8 sequences .* give --global-batch"):
        resolve_batch(flags, {}, 2, Kept(8, 4))


@pytest.mark.parametrize(
    ("ranks", "line", "batch", "said"),
    [
        (1, "", Batch(4, 2, 1), "ranks 2, now 1; gradient accumulation 1, now 2"),
        (2, "", Batch(4, 1, 2), None),
        (4, "", Batch(2, 1, 4), "ranks 2, now 4; micro-batch 4, now 2"),
        (8, "", Batch(1, 1, 8), "micro-batch 4, now 1"),
        (3, "", None, "8 is not a multiple of world size 3; nearest that fit: 6 or 9; give --global-batch"),
        (3, "--global-batch 9", Batch(3, 1, 3), "global batch 8, now 9"),
        (1, "--micro-batch 4 --grad-accum 1", Batch(4, 1, 1), "global batch 8, now 4"),
        (1, "--set train_batch_size=16", Batch(4, 4, 1), "global batch 8, now 16"),
        (1, "--set train_micro_batch_size_per_gpu=2", Batch(2, 4, 1), "micro-batch 4, now 2"),
    ],
)
def test_the_same_line_on_other_ranks(
    ranks: int, line: str, batch: Batch | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = saved_by("", 2, monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    if batch is None:
        with pytest.raises(UserError) as caught:
            settled(line, saved)
        assert said in str(caught.value)  # type: ignore[operator]
        return
    run = settled(line, saved)
    assert run.batch == batch and run.config["train_batch_size"] == batch.total
    assert (said is None and run.remarks == []) or said in "; ".join(run.remarks)  # type: ignore[operator]
    assert (said is None) == (run.changed == [])


def test_a_global_batch_below_the_jsons_micro_batch_lowers_that_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = settled("--global-batch 4")
    assert run.batch == Batch(2, 1, 2)
    assert run.remarks == [
        "the micro-batch is 2, not the 4 of the DeepSpeed JSON, so that 4 sequences a step divide among 2 ranks."
    ]
    with pytest.raises(UserError, match=r"5 is not a multiple of world size 2; nearest that fit: 4 or 6\.$"):
        settled("--global-batch 5")
    with pytest.raises(UserError, match="micro-batch 4"):  # what is typed is not lowered
        settled("--global-batch 4 --micro-batch 4")


# Everything else


OTHER = {
    "steps": "--steps 70",
    "lr": "--lr 0.005",
    "warmup": "--warmup 7",
    "eval_every": "--eval-every 9",
    "eval_sequences": "--eval-sequences 5",
    "save_every": "--save-every 3",
    "keep_last": "--keep-last 8",
    "keep_every": "--keep-every 4",
    "max_skipped": "--max-skipped 6",
    "activations": "--activations checkpoint:2",
    "loss": "--loss chunked",
    "lora": "--lora r=4,targets=q_proj",
    "track": "--track wandb",
}


def test_a_checkpoint_of_before_the_setting_had_words_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    new = saved_by("--activations checkpoint", 1, monkeypatch)
    for flag, words in ((True, "checkpoint"), (False, "full"), (None, None)):
        settings = {name: value for name, value in new.settings.items() if name != "activations"}
        told = {name: value for name, value in new.terms.items() if name != "--activations"}
        facts = {
            "settings": settings | {"activation_checkpointing": flag},
            "terms": told | {"--activation-checkpointing": flag},
        }
        again = settled("", Saved.of({"global_batch": new.global_batch, "run": facts}))
        kept = again.settings.activations
        assert again.changed == [] and (None if kept is None else str(kept)) == words
    changed = settled("--activations checkpoint,tiled", Saved.of({"global_batch": new.global_batch, "run": facts}))
    assert "--activations not given, now checkpoint,tiled" in changed.changed


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_typed_stays_and_what_is_typed_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = saved_by(OTHER[name], 1, monkeypatch)
    first = settled(OTHER[name])
    again = settled("", saved)
    assert (again.config, again.changed) == (first.config, [])
    assert getattr(again.settings, name) == getattr(first.settings, name) != getattr(RunSettings(), name)
    assert OTHER[name].split()[0] in again.remarks[0] and "taken from the checkpoint" in again.remarks[0]
    back = {
        "lr": "--lr 6e-4",
        "warmup": "--warmup 0.1",
        "loss": "--loss plain",
        "activations": "--activations full",
        "lora": "--lora r=8",
        "track": "--track none",
    }
    line = back.get(name) or f"{OTHER[name].split()[0]} {getattr(RunSettings(), name)}"
    changed = settled(line, saved)
    assert getattr(changed.settings, name) != getattr(first.settings, name)
    assert changed.changed and "changed since the run that saved the checkpoint" in changed.remarks[-1]
    assert settled(OTHER[name], saved).remarks == []  # the same line again says nothing


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--set optimizer.params.betas=[0.9,0.99,0.95]", "optimizer.params.betas [0.9, 0.95, 0.95], now [0.9, 0.99"),
        ("--set optimizer.params.lr=0.5", "optimizer.params.lr 0.005, now 0.5"),
        ("--set optimizer.params.weight_decay=0", "optimizer.params.weight_decay 0.1, now 0"),
        ("--set gradient_clipping=0.5", "gradient_clipping 1.0, now 0.5"),
        ("--set optimizer.params.weights=fp32 --set bf16.enabled=false", "bf16.enabled true, now false"),
        ("--set scheduler.params.cos_min_ratio=0.5", "scheduler.params.cos_min_ratio 0.1, now 0.5"),
        ("--config amcs_zero3", "zero_optimization.stage 2, now 3"),
        ("--config soam_zero2", "optimizer.type AMCS, now SOAM"),
        ("--config amcs_zero2_offload", "zero_optimization.offload_optimizer.device not given, now cpu"),
        ("--deterministic", "--deterministic false, now true"),
        ("--compile-model", "--compile-model false, now true"),
    ],
)
def test_a_json_that_changes_the_curve_is_said(line: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = saved_by("--lr 0.005", 1, monkeypatch)
    assert said in "; ".join(settled(line, saved).changed)


def test_a_kept_warmup_does_not_trip_a_json_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = saved_by("--warmup 7", 1, monkeypatch)
    assert kept_settings(RunSettings(), saved, {"scheduler": {"type": "OneCycle"}})[0].warmup is None
    assert kept_settings(RunSettings(), saved, {})[0].warmup is None


def test_a_budget_for_activations_is_kept_with_the_compiler_alone() -> None:
    saved = Saved(4, {"activations": "budget:0.5"}, {})
    assert kept_settings(RunSettings(), saved, {})[0].activations is None
    kept, told = kept_settings(RunSettings(compile_model=True), saved, {})
    assert str(kept.activations) == "budget:0.5" and told == ["--activations budget:0.5"]


def test_nothing_secret_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = saved_by('--set csv_monitor={"enabled":true,"job_name":"S3CRET"}', 1, monkeypatch)
    assert "S3CRET" not in str(saved)


@pytest.mark.parametrize(
    "facts",
    [{}, {"global_batch": 8}, {"global_batch": "8"}, {"global_batch": -1}, {"run": 3}, {"run": {"settings": []}}]
    + [{"global_batch": True}, {"run": {"terms": None}}],
)
def test_a_manifest_that_says_less_keeps_less(facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    run = settled("", Saved.of(facts))
    assert run.batch.total == (8 if facts == {"global_batch": 8} else 4)


def test_a_manifest_with_settings_that_no_run_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="--steps is -3"):
        settled("", Saved.of({"run": {"settings": {"steps": -3}}}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"train_batch_size": 24}, 24),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, 24),
        ({"train_micro_batch_size_per_gpu": 3}, 12),
        ({"train_micro_batch_size_per_gpu": "auto"}, None),
        (None, None),
    ],
)
def test_deepspeeds_own_checkpoints_say_how_large_a_step_was(config: Any, expected: int | None) -> None:
    class Stock:
        class manifest:  # noqa: N801
            facts: dict[str, Any] = {}

        @staticmethod
        def model_states() -> dict[str, Any]:
            return {"ds_config": config, "dp_world_size": 4}

    saved = Start(3, Stock()).saved  # type: ignore[arg-type]
    assert saved is not None and saved.global_batch == expected


def test_terms_are_compared_as_json_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    run = settled("")
    config = copy.deepcopy(run.config)
    config["optimizer"]["params"]["betas"] = tuple(config["optimizer"]["params"]["betas"])
    saved = Saved(4, {}, terms(run.settings, config, run.batch))
    assert changes(saved, terms(run.settings, run.config, run.batch)) == []


# Tokens


@given(tokens=st.integers(1, 10**9), seconds=st.floats(1e-4, 1e4))
def test_old_metrics_give_their_tokens_too(tokens: int, seconds: float) -> None:
    assert tokens_of({"tokens_per_s": tokens / seconds, "step_time_s": seconds}) == tokens
    assert tokens_of({"tokens": tokens, "tokens_per_s": 1.0, "step_time_s": 1.0}) == tokens


def test_a_run_that_is_resumed_finds_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settled("--lr auto", saved_by("--lr 0.002", 1, monkeypatch))
    assert found.settings.lr == found.config["optimizer"]["params"]["lr"] == 0.002
    assert any("taken from the checkpoint: --lr 0.002" in remark for remark in found.remarks)
    usual = settled("").config["optimizer"]["params"]["lr"]
    left = settled("--lr auto", saved_by("", 1, monkeypatch))
    assert left.settings.lr is None and left.config["optimizer"]["params"]["lr"] == usual
    assert any("--lr auto is for the start of a run" in remark for remark in left.remarks)
    assert settled("--lr auto").settings.lr == "auto" and settled("--lr auto").config == settled("").config
