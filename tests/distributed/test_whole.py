"""A checkpoint is all of the model, and a restore is whole or refused: what is not trained, and schedules."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from ranks import launch
from torch import Tensor
from torch.optim import lr_scheduler
from whole_worker import DEEPSPEED, OTHER_SETTINGS, STOP, TORCH

from toolkit.checkpoint import export as exporting
from toolkit.checkpoint import files
from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.export import export
from toolkit.checkpoint.universal import open_checkpoint, write
from toolkit.errors import UserError

WORKER = Path(__file__).with_name("whole_worker.py")
STAGES = (1, 2, 3)
VARIANTS = {
    "frozen": "1 of the parameters were trained in the checkpoint and are frozen here, 'head.bias' for one; freeze",
    "unfrozen": "1 of the parameters were frozen in the checkpoint and are trained here, 'odd.bias' for one; freeze",
    "shape": "'odd.weight' is [5, 48] in the checkpoint and [6, 48] here",
    "wider": "lacks 1 of the frozen parameters and buffers, 'body.bias' for one",
    "buffer": "lacks 1 of the frozen parameters and buffers, 'more' for one",
    "rounded": "1 of the frozen parameters and buffers were float32 and are bfloat16, 'router' for one",
}
CONVERTED = ("wider", "buffer", "rounded")


class World:
    """Three launches: one rank saves; two load that and save; one rank loads, also what was converted in between."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.saved: dict[str, dict[str, Tensor]] = {}
        self.loaded: dict[str, Any] = {}
        self.local: dict[tuple[str, int], Tensor] = {}
        """A buffer that differs between ranks, by step and rank."""
        self._launch(1, {f"one-{s}": {"save": str(root / f"one-{s}"), "stage": s} for s in (1, 3)})
        steps: dict[str, dict[str, Any]] = {f"two-{s}": {"save": str(root / f"two-{s}"), "stage": s} for s in STAGES}
        steps["adam-3"] = {"save": str(root / "adam-3"), "stage": 3, "optimizer": "AdamW"}
        for s in STAGES:
            steps |= {f"one-{old} at {s}": self._load(f"one-{old}", s) for old in (1, 3)}
            steps |= {f"two-{old} at {s}": self._load(f"two-{old}", s) for old in STAGES}
        steps["used"] = self._load("two-3", 3) | {"used": True}
        self._launch(2, steps)
        deepseek(root / "deepseek")
        steps = {
            "schedules": {"schedules": str(root / "schedules")},
            "hf": {"hf": str(root / "deepseek"), "to": str(root / "hf")},
        }
        for old in STAGES:
            source = open_checkpoint(self.folder(f"two-{old}"))
            for s in STAGES:
                convert(source, root / f"offline-{old}-{s}", stage=s, world_size=3)
            write(source, root / f"universal-{old}" / "global_step2")
            universal = open_checkpoint(root / f"universal-{old}" / "global_step2")
            convert(universal, root / f"back-{old}", stage=old, world_size=2)
            names = [f"two-{old}", f"offline-{old}-{4 - old}", f"back-{old}"]
            steps |= {f"{name} on one": self._load(name, old) for name in names}
            steps[f"universal-{old} on one"] = self._load(f"universal-{old}", old, convert=True)
            steps[f"deepspeed-{old} on one"] = self._load(f"two-{old}/deepspeed", old)
        steps["adam-3 on one"] = self._load("adam-3", 2, optimizer="AdamW")
        steps["deepspeed's adam on one"] = self._load("adam-3/deepspeed", 2, optimizer="AdamW")
        for variant in VARIANTS:
            steps[variant] = self._load("two-2", 2, variant=variant)
        for variant in CONVERTED:
            steps[f"{variant} converted"] = self._load("two-2", 2, variant=variant, convert=True)
        self._launch(1, steps)

    def folder(self, name: str) -> Path:
        return next((self.root / name).glob("global_step*"))

    def _load(self, name: str, stage: int, **more: Any) -> dict[str, Any]:
        return {"load": str(self.root / name / "global_step2"), "stage": stage} | more

    def _launch(self, ranks: int, steps: dict[str, dict[str, Any]]) -> None:
        found = launch(self.root / f"launch-{len(self.loaded)}", ranks, WORKER, {"steps": list(steps.values())})
        for number, (name, step) in enumerate(steps.items()):
            kept = self.saved if "save" in step else self.loaded
            kept[name] = found[0][number]
            for rank, other in enumerate(found):
                result = other[number]
                if isinstance(result, dict) and "local" in (held := result.get("model", result)):
                    self.local[name, rank] = held.pop("local")
                same(result, found[0][number], name)


def deepseek(folder: Path) -> None:
    """A mixture of experts with a router's bias that transformers and DeepSpeed keep in fp32."""
    from transformers import DeepseekV3Config, GenerationConfig

    DeepseekV3Config(
        **{"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "n_shared_experts": 1},
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8},
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    GenerationConfig(temperature=0.25, do_sample=True).save_pretrained(folder)


def same(a: Any, b: Any, where: str) -> None:
    """Both have the same values of the same dtypes."""
    if isinstance(b, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in b:
            same(a[key], b[key], f"{where}: {key}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("whole"))


# ---- kept and restored ----


ROUTES = [
    *(f"one-{old} at {s}" for old in (1, 3) for s in STAGES),
    *(f"two-{old} at {s}" for old in STAGES for s in STAGES),
    *(f"{name}-{old} on one" for name in ("two", "back") for old in STAGES),
    *(f"offline-{old}-{4 - old} on one" for old in STAGES),
    "adam-3 on one",
    "used",
]


@pytest.mark.parametrize("route", ROUTES)
def test_all_of_the_model_is_restored(world: World, route: str) -> None:
    """Frozen, tied, odd and left-out parameters, buffers of every dtype, extra state: at other ranks and stages."""
    name = {"used": "two-3"}.get(route, route.split(" ")[0])
    kind, old = name.split("-")[:2]
    origin = world.saved[f"{kind if kind in ('one', 'adam') else 'two'}-{old}"]
    assert world.loaded[route]["said"] == [], route
    same(world.loaded[route]["model"], origin, route)


def test_buffers_are_each_ranks_own_at_the_same_number_of_ranks(world: World) -> None:
    for stage in STAGES:
        for rank in range(2):
            assert torch.equal(world.local[f"two-{stage}", rank], torch.full((2,), 1.0 + rank))
            assert torch.equal(world.local[f"two-{stage} at 1", rank], torch.full((2,), 1.0 + rank))
            assert torch.equal(world.local[f"one-3 at {stage}", rank], torch.ones(2))
        assert torch.equal(world.local[f"two-{stage} on one", 0], torch.ones(2))


@pytest.mark.parametrize("old", STAGES)
def test_a_universal_layout_has_all_of_the_model(world: World, old: int) -> None:
    found = world.loaded[f"universal-{old} on one"]["model"]
    for name, value in world.saved[f"two-{old}"].items():
        # The bf16 weight is the rounded sum of weight and remainder here, which may be its neighbour.
        exact = not name.startswith("head")
        close = torch.allclose(found[name].float(), value.float(), rtol=2**-7, atol=0)
        assert torch.equal(found[name], value) if exact else close, name


def test_digests_are_those_of_the_model_however_it_is_cut(world: World) -> None:
    for old in STAGES:
        origin = open_checkpoint(world.folder(f"two-{old}"))
        for name in (*(f"offline-{old}-{s}" for s in STAGES), f"universal-{old}", f"back-{old}"):
            made = open_checkpoint(world.folder(name))
            assert made.frozen.keys() == origin.frozen.keys() == {"body.weight", "odd.weight", "odd.bias", "left_out"}
            assert made.digest() == origin.digest(), name
    frozen = torch.load(world.folder("two-1") / "mp_rank_00_model_states.pt", weights_only=True)
    assert all(value.numel() == 0 for name, value in frozen["module"].items() if name.endswith("weight")), "kept once"


def test_deepspeeds_own_script_finds_frozen_weights_at_every_stage(world: World) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for stage in STAGES:
        found = get_fp32_state_dict_from_zero_checkpoint(str(world.root / f"two-{stage}"))
        for name in ("body.weight", "again.weight", "odd.weight", "odd.bias", "router"):
            origin = world.saved[f"two-{stage}"]["body.weight" if name == "again.weight" else name]
            assert torch.equal(found[name].float(), origin.float()), (stage, name)


def test_deepspeeds_own_checkpoints_are_whole_or_refused(world: World) -> None:
    for stage in (1, 2):
        assert (
            "has no manifest.json, and its optimizer state is" in world.loaded[f"deepspeed-{stage} on one"]["refused"]
        )
    # Where a parameter needs gradients and no optimizer has it, DeepSpeed saves nothing of it at stage 3.
    refused = world.loaded["deepspeed's adam on one"]["refused"]
    assert "lacks 1 of the frozen parameters and buffers, 'left_out' for one" in refused


# ---- refused ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_model_is_refused_before_anything_changes(world: World, variant: str) -> None:
    found = world.loaded[variant]
    assert VARIANTS[variant] in found["refused"] and "\n" not in found["refused"]
    assert not found["changed"]
    assert ("--convert-state" in found["refused"]) == (variant in CONVERTED)


@pytest.mark.parametrize("variant", CONVERTED)
def test_what_is_lacking_or_rounded_is_said(world: World, variant: str) -> None:
    found, origin = world.loaded[f"{variant} converted"], world.saved["two-2"]
    assert any(VARIANTS[variant] in sentence for sentence in found["said"])
    for name, value in origin.items():
        assert torch.equal(found["model"][name], value.to(found["model"][name].dtype)), name


def test_a_model_of_ones_own_is_not_exported_by_guess(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say which model it is of"):
        export(open_checkpoint(world.folder("two-2")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- exported ----


@pytest.mark.parametrize("dtype", [None, "bf16", "float32"])
def test_an_export_has_every_tensor_in_its_dtype(world: World, tmp_path: Path, dtype: str | None) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    trained = {name.removeprefix("hf."): value for name, value in world.loaded["hf"].items()}
    before = os.umask(0o027)
    try:
        export(open_checkpoint(world.folder("hf")), tmp_path / "out", dtype=dtype)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}
    assert {"config.json", "generation_config.json", "tokenizer.json"} < {p.name for p in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.25
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == trained.keys()
    for name, value in trained.items():
        wide = dtype == "float32" and "e_score" not in name
        assert found[name].dtype == (torch.float32 if wide else value.dtype), name
        assert torch.equal(found[name].to(value.dtype), value) or (wide and "embed_tokens" not in name), name
    [bias] = [value for name, value in found.items() if "e_score" in name]
    assert bias.dtype == torch.float32 and len(bias.unique()) == 8
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert torch.equal(dict(loaded.named_buffers())["model.layers.1.mlp.gate.e_score_correction_bias"], bias)


def test_an_export_is_whole_or_nothing_that_loads(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(world.folder("hf"))
    with pytest.raises(UserError, match="lm_head.weight' has values that float16 cannot hold; give another"):
        export(source, tmp_path / "fp16", dtype="fp16")
    assert not list((tmp_path / "fp16").iterdir())
    moved: list[str] = []

    def killed(old: Path, new: Path) -> None:
        if new.name == "config.json":
            raise KeyboardInterrupt
        moved.append(new.name)
        old.rename(new)

    monkeypatch.setattr(exporting.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "killed")
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "killed").iterdir()} == set(moved) and "model.safetensors" in moved
    with pytest.raises(UserError, match=r"holds a model already \(model\.safetensors\)"):
        export(source, tmp_path / "killed")


def test_a_damaged_or_incomplete_checkpoint_is_not_exported(world: World, tmp_path: Path) -> None:
    folder = tmp_path / world.folder("hf").name
    shutil.copytree(world.folder("hf"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(UserError, match=r"is damaged: .*config\.json has"):
        export(open_checkpoint(folder), tmp_path / "out")
    # One layer more than was trained: what loads it would draw that one at random.
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    manifest = manifests.read(folder)
    manifest.files["config.json"] = files.save((folder / "config.json").read_bytes(), folder / "config.json")
    manifests.write(folder, manifest)
    with pytest.raises(UserError, match=r"it lacks \d+ of the weights, 'model\.layers\.2"):
        export(open_checkpoint(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- schedules ----


def test_every_schedule_is_tried() -> None:
    known = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and not name.endswith("LRScheduler")
    }
    assert TORCH.keys() == known | {"SWALR"}
    assert DEEPSPEED.keys() == set(lr_schedules.VALID_LR_SCHEDULES)


@pytest.mark.parametrize("name", [*TORCH, *DEEPSPEED, "none"])
def test_rates_after_a_load_are_those_of_the_schedule(world: World, name: str) -> None:
    found = world.loaded["schedules"][name]
    whole = found["whole"]
    assert len(whole) == 10 and len(whole[0]) == 2, "every step, every group"
    assert found["resumed"] == ([], whole[STOP:])
    if "from another" in found:
        [said], rates = found["from another"]
        there = f"the schedule was ExponentialLR and is {name}, which begins at step {STOP}"
        ended = "the checkpoint's schedule (ExponentialLR) ends here, since this engine has none: its rate is 0.01"
        assert said.startswith(ended if name == "none" else there)
        assert rates == whole[STOP:] or name == "ReduceLROnPlateau"
    if name == "none":
        return
    [said], rates = found["from none"]
    assert said.startswith(f"the checkpoint has no schedule: {name} begins at step {STOP}")
    # A plateau is found in metrics, which only a run that had them knows.
    assert rates == whole[STOP:] or name == "ReduceLROnPlateau"
    assert len({group[0] for step in whole for group in step}) > 1, "a schedule that moves"


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings_hold_from_the_runs_step_on(world: World, name: str) -> None:
    whole, (said, rates) = world.loaded["schedules"][name]["other settings"]
    assert rates == whole[STOP:]
    kept = name not in ("LambdaLR", "WarmupLR")  # which keep nothing of what they were built with
    assert len(said) == kept
    assert not kept or f"of the schedule {name} the " in said[0] and f"hold from step {STOP} on" in said[0]


def test_a_schedule_that_cannot_be_at_that_step_is_refused(world: World) -> None:
    found = world.loaded["schedules"]
    assert f"CosineAnnealingLR has made {STOP + 1} steps already and cannot go back to step {STOP}" in found["too late"]
    assert f"the schedule OneCycleLR cannot be brought to step {STOP}: Tried to step 3 times" in found["too long"]
