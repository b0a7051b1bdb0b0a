"""A checkpoint written anew for another number of ranks or another stage, without an engine or a process group."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint.content import OWN, PER_RANK
from toolkit.checkpoint.files import on_host, plain, save
from toolkit.checkpoint.manifest import Manifest
from toolkit.checkpoint.source import OPTIMIZER_FILE, Source, model_file
from toolkit.checkpoint.store import Store, name_of
from toolkit.checkpoint.transfer import WEIGHTS, Transfer
from toolkit.errors import UserError
from toolkit.masking import masked
from toolkit.state.sharding import Sharding, reshard, share_of


def convert(source: Source, folder: Path, *, stage: int, world_size: int) -> Sharding:
    """Write `source` into `folder`/global_step<n> as `world_size` ranks at `stage` would have saved it: cut so.

    One rank's tensors are in memory at a time.

    Raises:
        UserError: such a checkpoint is there already; an older version saved it, whose groups have no grid of blocks
            at that stage.
    """
    target = reshard(source.origin, stage=stage, world_size=world_size)
    shared = target.straddling()
    if shared is not None:
        raise UserError(
            f"{source.folder} cannot be converted to stage {stage}: an older version saved it, and there {shared!r} "
            "would share a block with the parameter before it; resume from it, and convert what that run saves"
        )
    transfer = Transfer(source, target)
    store = Store(folder, keep_last=len(Store(folder).steps()) + 1)  # whatever else is there stays
    step = source.manifest.step
    if store.path(step).exists():
        raise UserError(f"{store.path(step)} exists already; give another folder")
    draft = store.draft(step)
    written = draft / name_of(step)
    written.mkdir(parents=True)
    try:
        entries = {}
        prefix = "bf16_" if any(flat.dtype == "bfloat16" for flat in target.flats) else ""
        for rank in range(world_size):
            name = prefix + OPTIMIZER_FILE.format(rank=rank)
            entries[name] = save(_optimizer_file(transfer, rank), written / name)
            if rank == 0 or stage == 3:
                name = model_file(stage, rank)
                entries[name] = save(model_states(source, target, rank), written / name)
        entries |= {name: save(path.read_bytes(), written / name) for name, path in source.model_files().items()}
        store.commit(draft, Manifest(step, target, source.manifest.facts, entries))
    except OSError as error:
        raise UserError(f"{source.folder} cannot be converted: {error}") from None
    finally:
        store.discard(draft)
    return target


def _optimizer_file(transfer: Transfer, rank: int) -> Any:
    source, target = transfer.source, transfer.target
    saved = source.optimizer_states(0)
    old = saved["optimizer_state_dict"]
    flats, state = [], {}
    for index in range(len(target.flats)):
        made = transfer.tensors(index, rank)
        flats.append(made.pop(WEIGHTS))
        if source.trained():
            if target.rule is None:  # optimizers of torch and DeepSpeed have flat state
                made = {key: value.view(-1)[: flats[-1].numel()] for key, value in made.items()}
            small = target.small(index) if rank else {}
            made = {key: value for key, value in made.items() if key not in small}
            state[index] = {**made, "step": transfer.step_of(index)}
    # At stage 3 a group may have had several flat tensors; here each has one.
    groups = [group | {"params": [index]} for index, group in enumerate(source.param_groups())]
    shared = {key: old.get(key) for key in ("loss_scaler", "dynamic_loss_scale", "overflow")}
    optimizer = {"state": state, "param_groups": groups}
    if target.stage == 3:
        body = shared | {
            "zero_stage": 3,
            "partition_count": target.world_size,
            "optimizer_state_dict": optimizer,
            "fp32_flat_groups": flats,
        }
    else:
        ends = [max(place.offset + place.numel for place in flat.places) for flat in target.flats]
        paddings = [
            flat.size * target.world_size - end if rank == target.world_size - 1 else 0
            for flat, end in zip(target.flats, ends, strict=True)
        ]
        lean = [flat[: max(flat.numel() - extra, 0)] for flat, extra in zip(flats, paddings, strict=True)]
        body = shared | {
            "zero_stage": target.stage,
            "partition_count": [target.world_size] * len(flats),
            "base_optimizer_state": optimizer,
            "single_partition_of_fp32_groups": lean,
            "group_paddings": paddings,
            "clip_grad": old.get("clip_grad", 0.0),
            "ds_version": saved.get("ds_version"),
        }
    config = masked(saved.get("ds_config"))  # as DeepSpeed saved it, where the checkpoint is its own
    content = {"optimizer_state_dict": body, "ds_config": config, "ds_version": saved.get("ds_version")}
    extra = source.extra(rank) or source.extra(0)
    if extra is not None:
        same = target.world_size == source.sharding.world_size
        content[PER_RANK] = {key: value for key, value in extra.items() if same or key != OWN}
    return plain(content, on_host)


def model_states(source: Source, target: Sharding, rank: int = 0) -> Any:
    """What DeepSpeed keeps beside the optimizer, as `rank` writes it of checkpoints that are cut as `target`."""
    saved = source.model_states()
    module: dict[str, Any] = {name: torch.empty(0, dtype=source.dtype_of(name)) for name in target.by_name}
    fragments = {}
    kept = {name: one for name, one in source.frozen.items() if name not in source.based}
    module |= {name: torch.empty(0, dtype=source.frozen[name].dtype) for name in source.based}
    for name in kept:
        whole = source.frozen_weight(name)
        fragments[name] = _part(whole, rank, target.world_size) if target.stage == 3 else whole
        module[name] = torch.empty(0, dtype=whole.dtype)
    module |= {name: module[origin] for name, origin in source.tied().items()}
    changed = {
        "module": module | source.buffers() | source.extra_states(),
        "param_shapes": [OrderedDict((p.name, torch.Size(p.shape)) for p in flat.places) for flat in target.flats],
        "frozen_param_shapes": OrderedDict((name, one.shape) for name, one in kept.items()),
        "frozen_param_fragments": OrderedDict(fragments),
        "dp_world_size": target.world_size,
        "ds_config": masked(saved.get("ds_config")),
    }
    return plain(dict(saved) | changed, on_host)


def _part(whole: Tensor, rank: int, world_size: int) -> Tensor:
    """What `rank` holds of a parameter at stage 3, padding included."""
    size = share_of(whole.shape, world_size)
    padded = torch.zeros(size * world_size, dtype=whole.dtype)
    padded[: whole.numel()] = whole.reshape(-1)
    return padded[rank * size : (rank + 1) * size]
