"""Checkpoints without an engine: of this package by `toolkit.checkpoint.convert`, and such as DeepSpeed writes."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint import universal
from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.files import save
from toolkit.checkpoint.manifest import Manifest
from toolkit.checkpoint.source import OPTIMIZER_FILE, Source, model_file
from toolkit.checkpoint.store import Store, name_of
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.cli import app
from toolkit.errors import UserError
from toolkit.optim.rules.amcs import AMCSRule
from toolkit.state.sharding import Flat, Place, Sharding, reshard

SHAPES = {
    "attention": {"a.weight": (48, 32), "b.weight": (16, 16)},
    "norm": {"n.weight": (48,), "o.weight": (40,), "e.weight": (0,)},
}
STEP = 5
FACTS = {
    "saved": "2026-11-26T12:00:00+00:00",
    "position": {"epoch": 0, "window": 0, "index": 3, "offset": 7, "mixed": 1},
    "identity": {
        "model": {"name": "qwen3-tiny", "sha256": "a" * 64},
        "tokenizer": {"name": "python-4k", "sha256": "b" * 64},
        "data": {"name": "d", "sha256": "c", "part": "all", "seq_len": 8, "seed": 0, "windows": [4, 4]},
    },
    "global_batch": 8,
    "versions": {"torch": "2"},
}


def _module(sharding: Sharding) -> dict[str, Any]:
    names = sharding.by_name
    return {
        "module": dict.fromkeys(names, torch.empty(0)) | {"rope": torch.arange(4.0)},
        "buffer_names": ["rope"],
        "shared_params": {},
        "param_shapes": [OrderedDict((p.name, torch.Size(p.shape)) for p in flat.places) for flat in sharding.flats],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "lr_scheduler": {"last_batch_iteration": STEP},
        "global_steps": STEP,
        "global_samples": 8 * STEP,
        "skipped_steps": 0,
        "ds_config": {"comet": {"api_key": "SECRET"}},
    }


def whole(folder: Path, keep_last: int = 2, weights: str = "bf16+8", step: int = STEP) -> Store:
    """A checkpoint of one rank at stage 1, with random weights, remainders and states."""
    generator = torch.Generator().manual_seed(0)
    flats = []
    for number, (component, shapes) in enumerate(SHAPES.items()):
        formats = dict.fromkeys((s.name for s in AMCSRule.states), "fp32" if component == "norm" else "8bit")
        places = tuple(Place(name, shape, 0) for name, shape in shapes.items())
        kept = "bf16+16" if component == "norm" else weights  # as `RuleOptimizer` has it
        flats.append(Flat(number, component, 0, "bfloat16", kept, formats, places))
    sharding = reshard(Sharding(1, 1, "AMCS", AMCSRule.states, tuple(flats)), stage=1, world_size=1)
    masters, state = [], {}
    for index, flat in enumerate(sharding.flats):
        draw = torch.randn(flat.size, generator=generator)
        masters.append(draw.to(torch.bfloat16))
        kept = sharding.layout(index)
        made = {s.name: torch.randn(flat.size, generator=generator).square().view(-1, 256) for s in AMCSRule.states}
        low = {
            key: torch.randint(0, 127, (flat.size // 256, spec.per_block), generator=generator).to(spec.dtype)
            for key, spec in kept.specs
            if key.startswith("remainder")
        }
        state[index] = kept.encode(made) | low | {"step": step}
    body = {
        "zero_stage": 1,
        "partition_count": [1] * len(masters),
        "base_optimizer_state": {"state": state, "param_groups": [{"params": [i]} for i in range(len(masters))]},
        "single_partition_of_fp32_groups": masters,
    }
    store = Store(folder, keep_last=keep_last)
    draft = store.draft(step)
    written = draft / name_of(step)
    written.mkdir(parents=True)
    optimizer = {"optimizer_state_dict": body, "ds_config": {}, "leanstate": {"random": {}}}
    files = {
        "bf16_" + OPTIMIZER_FILE.format(rank=0): optimizer,
        model_file(1, 0): _module(sharding),
    }
    entries = {name: save(content, written / name) for name, content in files.items()}
    store.commit(draft, Manifest(step, sharding, FACTS, entries))
    return store


def cut(root: Path, stage: int, ranks: int) -> Path:
    """The folder of the same checkpoint as `ranks` ranks at `stage` would have saved it."""
    if not (root / "whole").exists():
        whole(root / "whole")
    convert(Source(root / "whole" / name_of(STEP)), root / "cut", stage=stage, world_size=ranks)
    return root / "cut" / name_of(STEP)


def stock(folder: Path, stage: int = 2) -> Path:
    """A checkpoint as DeepSpeed writes it for AdamW on one rank, with the objects that it pickles."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    names = {name: shape for shapes in SHAPES.values() for name, shape in shapes.items()}
    numel = sum(torch.Size(shape).numel() for shape in names.values())
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(1), requires_grad=True)
    held = {"step": torch.tensor(5.0), "exp_avg": flat.detach() / 10, "exp_avg_sq": flat.detach() ** 2}
    base = {"state": {0: held}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    body = {"loss_scaler": LossScaler(1), "dynamic_loss_scale": False, "zero_stage": ZeroStageEnum(stage)}
    mapping = [OrderedDict((name, fragment_address(numel=4, start=0)) for name in names)]
    if stage == 3:
        body |= {"partition_count": 1, "optimizer_state_dict": base, "fp32_flat_groups": [flat]}
    else:
        body |= {"partition_count": [1], "base_optimizer_state": base, "single_partition_of_fp32_groups": [flat]}
        body |= {"param_slice_mappings": mapping}
    place = Place("", (), 0)
    model = _module(Sharding(stage, 1, None, (), (Flat(0, "other", numel, "float32", "fp32", {}, (place,)),)))
    model["param_shapes"] = [OrderedDict((name, torch.Size(shape)) for name, shape in names.items())]
    folder.mkdir(parents=True)
    torch.save({"optimizer_state_dict": body, "ds_version": "0.19.8"}, folder / OPTIMIZER_FILE.format(rank=0))
    torch.save(model, folder / model_file(stage, 0))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, and give it the hash that fits."""
    path = folder / manifests.NAME
    body = json.loads(path.read_text())
    body.pop("sha256")
    body = change(body) or body
    path.write_text(json.dumps(body | {"sha256": manifests._digest(body)}))


def refile(folder: Path, name: str, content: Any) -> None:
    """Write another content into a file, and its size and hash into the manifest."""
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        torch.save(content, folder / name)
    entry = {"bytes": (folder / name).stat().st_size, "sha256": manifests.file_hash(folder / name)}

    def change(body: dict[str, Any]) -> None:
        body["files"][name] = entry

    rewrite(folder, change)


class Call:
    """Unpickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def use(folder: Path, to: Path) -> None:
    """Whatever reads a checkpoint: its digest, and both ways of converting it."""
    source = open_checkpoint(folder)
    source.check()
    source.digest()
    convert(source, to / "converted", stage=2, world_size=2)
    universal.write(source, to / "universal" / "x")


def refused(folder: Path, to: Path) -> str:
    with pytest.raises(UserError) as caught:
        use(folder, to)
    return str(caught.value)


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
