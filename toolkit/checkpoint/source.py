"""The files of a checkpoint as one model: any element of any weight or state, whichever rank's file it lies in."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sized
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.base import Base, shapes_in_base, weight_in_base
from toolkit.checkpoint.content import OWN, PER_RANK, check_model, check_optimizer, check_rank
from toolkit.checkpoint.files import unsqueezed
from toolkit.checkpoint.manifest import Manifest
from toolkit.checkpoint.opening import load_file
from toolkit.checkpoint.schema import disagreement
from toolkit.errors import UserError
from toolkit.optim.factored import shares
from toolkit.paths import regular
from toolkit.state.codecs import BLOCK, unpack
from toolkit.state.layout import REMAINDER, Layout, State, dtype_name, lines_of
from toolkit.state.sharding import Flat, Fragment, Place, Sharding, blocks_of, share_of

OPTIMIZER_FILE = "zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
PREFIXES = ("", "bf16_", "fp16_")
"""Of the names of optimizer files."""
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
HELD = 4
"""Parts of flat tensors whose state is in memory at a time."""
_EXTRA = "_extra_state"
"""Last part of the name under which torch keeps what a module's `get_extra_state` returns."""


def model_file(stage: int, rank: int) -> str:
    """The name of the file with a rank's module; at stages 1 and 2 all ranks share one."""
    return MODEL_FILES[stage == 3].format(rank=rank)


class Source:
    """A checkpoint, opened for reading: files are mapped into memory, and read where they are looked at.

    Only files that the manifest lists are opened; without a manifest, those with DeepSpeed's names. What a file holds
    is compared with the manifest (names, shapes, dtypes, sizes) when it is opened.

    Args:
        trust_pickle: without a manifest, objects of any class are read, which runs the code that the files name.

    Raises:
        UserError: `folder` holds no checkpoint of this package, or of DeepSpeed at ZeRO stage 1, 2 or 3.
    """

    def __init__(self, folder: Path, *, trust_pickle: bool = False) -> None:
        self.folder = folder
        self._trust = trust_pickle
        self._optimizer: dict[int, dict[str, Any]] = {}
        self._model: dict[int, dict[str, Any]] = {}
        self._held: dict[tuple[int, int], Mapping[str, Any]] = {}
        self._cut = False
        # A folder without manifest is DeepSpeed's own.
        self._own = os.path.lexists(folder / manifests.NAME)
        if self._own:
            self.manifest = manifests.read(folder)
            for name in self.manifest.files:
                regular(folder, name)
        else:
            self.manifest = self._stock()
        self.sharding = self.manifest.sharding
        self._check_grid()
        self.stage = self.sharding.stage
        self._cut = True
        self.base = Base.noted(self.manifest.facts)  # of `based`; whoever knows where it is now replaces it

    @property
    def origin(self) -> Sharding:
        """The parameter groups and formats that the checkpoint was trained with."""
        return self.sharding

    def _check_grid(self) -> None:
        shared = self.sharding.straddling()
        if shared is not None:
            raise manifests.NotUnderstood(
                f"{self.folder} was saved by an older version, which let {shared!r} share a block of {BLOCK} elements "
                "with the parameter before it; with that version, convert it to stage 3 (toolkit checkpoint convert "
                "--zero-stage 3), which this one reads, or export its weights"
            )

    # ---- files --------------------------------------------------------------------------------------------------

    def _find(self, *names: str) -> str:
        """The first of `names` that is a file of this checkpoint. Raises UserError."""
        there = self.manifest.files.__contains__ if self._own else lambda name: (self.folder / name).exists()
        found = next(filter(there, names), None)
        if found is None:
            what = f"{manifests.NAME} in {self.folder} lists" if self._own else f"{self.folder} holds"
            raise UserError(f"{what} no {' or '.join(names)}")
        return found

    def check(self, share: tuple[int, int] = (0, 1)) -> None:
        """Open the files of every n-th rank from the i-th on, `share` being (i, n). Raises UserError as they do."""
        for rank in range(share[0], self.sharding.world_size, share[1]):
            self.optimizer_states(rank)
            self.model_states(rank if self.stage == 3 else 0)

    def _load(self, name: str) -> Any:
        return load_file(self.folder, name, trust=self._trust and not self._own, hint=not self._own)

    def model_states(self, rank: int = 0) -> dict[str, Any]:
        """What DeepSpeed saved beside the optimizer: buffers, shapes, scheduler, counters."""
        if rank not in self._model:
            name = self._find(*(name.format(rank=rank) for name in MODEL_FILES))
            self._model[rank] = check_model(self._load(name), self.folder / name)
        return self._model[rank]

    def optimizer_states(self, rank: int) -> dict[str, Any]:
        """The content of a rank's optimizer file."""
        if rank not in self._optimizer:
            name = self._find(*(prefix + OPTIMIZER_FILE.format(rank=rank) for prefix in PREFIXES))
            found = check_optimizer(self._load(name), self.folder / name)
            if self._cut:  # it is known how
                check_rank(found, self.sharding, rank, self.folder / name)
            self._optimizer[rank] = found
            if self._cut and rank and bool(self.saved_state(rank, 0)) != self.trained():
                raise UserError(f"{self.folder / name} is damaged (only some of the ranks have state)")
        return self._optimizer[rank]

    def saved_state(self, rank: int, index: int) -> Mapping[str, Any]:
        """State of a rank's flat tensor `index` by key, as saved, `step` included; empty if none was allocated."""
        saved = self.optimizer_states(rank)["optimizer_state_dict"]
        base = saved["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        found: Mapping[str, Any] = base["state"].get(index, {})
        return found

    def held(self, rank: int, index: int) -> Mapping[str, Any]:
        """The same, ready to use: codes are squeezed in the files."""
        if (rank, index) not in self._held:
            # In memory once they are looked at; whoever reads needs a few flat tensors at a time.
            while len(self._held) >= HELD:
                self._held.pop(next(iter(self._held)))
            state = self.saved_state(rank, index)
            try:
                self._held[rank, index] = {key: unsqueezed(value) for key, value in state.items()}
            except ValueError as error:
                raise UserError(f"{self.folder} is damaged (rank {rank}, flat tensor {index}: {error})") from None
        return self._held[rank, index]

    def stored(self, rank: int, index: int, key: str) -> Tensor:
        """One tensor of `held`. Raises UserError where some flat tensors have state and this one has none."""
        try:
            found: Tensor = self.held(rank, index)[key]
        except KeyError:
            name = self.sharding.flats[index].places[0].name
            raise UserError(f"{self.folder} is damaged ({key!r} of {name!r} is missing)") from None
        return found

    def master(self, rank: int, index: int) -> Tensor:
        """A rank's flat tensor `index`: bf16 weights or fp32 master weights; it may lack padding at its end."""
        saved = self.optimizer_states(rank)["optimizer_state_dict"]
        found: Tensor = saved["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"][index]
        return found.detach()  # DeepSpeed saves parameters

    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: their hyper-parameters, and the numbers of their flat tensors."""
        saved = self.optimizer_states(0)["optimizer_state_dict"]
        base = saved["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        groups: list[dict[str, Any]] = base["param_groups"]
        return groups

    def step_of(self, index: int) -> int:
        """Optimizer steps that flat tensor `index` has made."""
        return int(self.saved_state(0, index).get("step", 0))

    def trained(self) -> bool:
        """Whether there is optimizer state: it is allocated at the first step."""
        return bool(self.saved_state(0, 0))

    def extra(self, rank: int) -> Mapping[str, Any] | None:
        """What this package added to a rank's file; None for a rank that was not there."""
        if rank >= self.sharding.world_size:
            return None
        found: Mapping[str, Any] | None = self.optimizer_states(rank).get(PER_RANK)
        return found

    # ---- elements -----------------------------------------------------------------------------------------------

    def _fragments(self, index: int, place: Place, start: int, stop: int) -> list[Fragment]:
        """As `Sharding.fragments`; nothing of rank 0's for a parameter without elements."""
        return self.sharding.fragments(index, place, start, stop) or [Fragment(0, 0, 0, 0)]

    def elements(self, name: str, key: str | None, start: int, stop: int) -> Tensor:
        """Elements of a state that is kept as one number each, or (`key` None) of the flat tensor itself, 1-D."""
        index, place = self.sharding.by_name[name]
        found = []
        for fragment in self._fragments(index, place, start, stop):
            rank = fragment.rank
            tensor = self.master(rank, index) if key is None else self.stored(rank, index, key)
            found.append(tensor.reshape(-1)[fragment.elements])
        return torch.cat(found) if len(found) != 1 else found[0]

    def blocks(self, name: str, key: str, first: int, last: int) -> Tensor:
        """Blocks `first` to `last` of a parameter in a stored tensor; the last one may be filled in part."""
        index, place = self.sharding.by_name[name]
        found = self._fragments(index, place, first * BLOCK, min(last * BLOCK, place.numel))
        return torch.cat([self.stored(fragment.rank, index, key)[fragment.blocks] for fragment in found])

    def _lanes(self, name: str, key: str, per_block: int, start: int, stop: int) -> Tensor:
        """Elements of a remainder's stored tensor, 4-bit ones unpacked, 1-D."""
        if per_block == BLOCK:
            return self.elements(name, key, start, stop)
        first = start // BLOCK
        rows = self.blocks(name, key, first, blocks_of(stop))
        return torch.cat(unpack([rows]), dim=1).reshape(-1)[start - first * BLOCK : stop - first * BLOCK]

    def weights(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of a parameter as trained, fp32, 1-D: joined with its remainder where it has one."""
        index, _ = self.sharding.by_name[name]
        kept = self.sharding.layout(index)
        weights = self.elements(name, None, start, stop)
        if kept.remainder is None or not self.saved_state(0, index):
            return weights.float()
        parts = zip(kept.keys(REMAINDER), kept.remainder.specs(), strict=True)
        low = [self._lanes(name, key, part.per_block, start, stop) for key, part in parts]
        joined: Tensor = kept.remainder.join(weights, *low)
        return joined

    def states(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """Elements of every state of a parameter, decoded to fp32, 1-D; also of those that are kept as factors."""
        index, _ = self.sharding.by_name[name]
        kept = self.sharding.layout(index)
        factored = self._factored(name, kept, start, stop)
        if not any(codec.scaled for codec in kept.codecs):
            return {state.name: self.elements(name, state.name, start, stop) for state in kept.states} | factored
        first = start // BLOCK
        keys = [key for state in kept.states for key in kept.keys(state.name)]
        decoded = kept.decode({key: self.blocks(name, key, first, blocks_of(stop)) for key in keys})
        inside = slice(start - first * BLOCK, stop - first * BLOCK)
        return {key: value.reshape(-1)[inside] for key, value in decoded.items()} | factored

    def _factored(self, name: str, kept: Layout, start: int, stop: int) -> dict[str, Tensor]:
        small = self.small(name) if kept.factored else {}
        found = {}
        for _, state in kept.factored:
            rows, columns = (small[one.name] for one in lines_of(state.name))
            first, last = start // columns.numel(), -(-stop // columns.numel())
            whole = (shares(rows)[first:last, None] * columns).view(-1)
            found[state.name] = whole[start - first * columns.numel() :][: stop - start]
        return found

    def small(self, name: str) -> dict[str, Tensor]:
        """The states of rows and columns of a parameter, 1-D; the first rank's file has them."""
        index, place = self.sharding.by_name[name]
        number = self.sharding.flats[index].places.index(place)
        return {
            state: self.stored(0, index, state).split(sizes)[number]
            for state, sizes in self.sharding.small(index).items()
        }

    def digest(self) -> str:
        """SHA-256 of the model and of every state as decoded, by parameter: the same however the checkpoint is cut."""
        found = hashlib.sha256()
        for name, (index, place) in sorted(self.sharding.by_name.items()):
            found.update(f"{name}{place.shape}{self.step_of(index)}".encode())
            states = self.states(name, 0, place.numel) | self.small(name) if self.trained() else {}
            for values in (self.weights(name, 0, place.numel), *states.values()):
                found.update(values.contiguous().numpy().tobytes())
        rest = {name: self.frozen_weight(name) for name in self.frozen} | self.buffers()
        for name, value in sorted(rest.items()):
            found.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    # ---- the rest of the module -----------------------------------------------------------------------------------

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers of rank 0 by name."""
        saved = self.model_states()
        return {name: saved["module"][name] for name in saved["buffer_names"]}

    def own(self, rank: int) -> Mapping[str, Any]:
        """Buffers and extra state of a rank, where they need not be rank 0's."""
        extra = self.extra(rank) or {}
        found: Mapping[str, Any] = extra.get(OWN) or {}
        return found

    def extra_states(self) -> dict[str, Any]:
        """What modules return from `get_extra_state`, on rank 0, by name."""
        module: dict[str, Any] = self.model_states()["module"]
        return {name: value for name, value in module.items() if name.rpartition(".")[2] == _EXTRA}

    @cached_property
    def based(self) -> dict[str, torch.Size]:
        """Shapes of the frozen parameters that are not in the files but in `base`, by name."""
        return shapes_in_base(self.model_states(), self.folder)

    @cached_property
    def frozen(self) -> dict[str, Tensor]:
        """The parameters that were not trained, in the files or `based`, by name, as tensors on the meta device."""
        saved = self.model_states()
        shapes = {name: torch.Size(shape) for name, shape in (saved.get("frozen_param_shapes") or {}).items()}
        other = self.sharding.by_name.keys() | self.tied().keys() | set(saved["buffer_names"]) | self.based.keys()
        for name, value in saved["module"].items():
            # At stage 3 the module has no weights of its own: an empty tensor stands for what is elsewhere or nowhere.
            if name not in other and isinstance(value, Tensor) and (value.numel() or self.stage < 3):
                shapes.setdefault(name, value.shape)
        found = {}
        for name, shape in shapes.items():
            parts = self._parts(name)
            # Of a stage 3 checkpoint DeepSpeed's conversion to the universal layout keeps the first rank's part only.
            if parts and sum(part.numel() for part in parts) >= shape.numel():
                found[name] = torch.empty(shape, dtype=parts[0].dtype, device="meta")
        dtypes = {name: saved["module"][name].dtype for name in self.based}
        return found | {name: torch.empty(self.based[name], dtype=dtypes[name], device="meta") for name in dtypes}

    def frozen_weight(self, name: str) -> Tensor:
        """A parameter that was not trained, whole, in the dtype that it was kept in.

        Raises UserError where it is `based`, and the base is gone or changed.
        """
        if name in self.based:
            dtypes = (self.frozen[one].dtype for one in self.based)
            return weight_in_base(self.base, name, self.frozen[name], dtypes, self.folder)
        parts, kept = self._parts(name), self.frozen[name]
        flat = torch.cat([part.reshape(-1) for part in parts]) if len(parts) > 1 else parts[0].reshape(-1)
        return flat[: kept.numel()].view(kept.shape)

    def _parts(self, name: str) -> list[Tensor]:
        """Of a parameter that was not trained: the ranks' parts at stage 3, else the whole."""
        ranks = range(self.sharding.world_size if self.stage == 3 else 1)
        kept = [(self.model_states(rank).get("frozen_param_fragments") or {}).get(name) for rank in ranks]
        whole: Tensor | None = self.model_states()["module"].get(name)
        return [part for part in kept if part is not None] or ([whole] if whole is not None else [])

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which the model computed with a trained parameter; master weights may be wider."""
        kept = self.sharding.flats[self.sharding.by_name[name][0]].torch_dtype
        computed = self.model_states()["module"].get(name)
        return computed.dtype if kept == torch.float32 and computed is not None else kept

    def model_files(self) -> dict[str, Path]:
        """What describes the model beside its weights, by name: config.json, tokenizer, generation settings."""
        return {name: self.folder / name for name in self.manifest.files if not name.endswith(".pt")}

    def tied(self) -> dict[str, str]:
        """Names that share a parameter with another name, and that name."""
        found: dict[str, str] = self.model_states().get("shared_params") or {}
        return found

    # ---- DeepSpeed's own checkpoints --------------------------------------------------------------------------------

    def _stock(self) -> Manifest:
        """What a manifest would say of a checkpoint that DeepSpeed wrote for an optimizer with flat fp32 state."""
        model = self.model_states()
        shapes = model.get("param_shapes")
        if not shapes:
            raise UserError(f"{self.folder} was not saved at ZeRO stage 1, 2 or 3")
        path = self.folder / self._find(*(prefix + OPTIMIZER_FILE.format(rank=0) for prefix in PREFIXES))
        saved = self.optimizer_states(0)["optimizer_state_dict"]
        self.stage = stage = int(saved["zero_stage"])
        count = saved["partition_count"]
        world_size = max(count) if isinstance(count, list) else int(count)
        paddings = saved.get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        masters = saved["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
        if {len(shapes), len(masters)} != {len(paddings)} or any(map(_differ, shapes, paddings)):
            raise UserError(f"{path} is damaged (it has other parameters than the file of the model)")
        flats = []
        for index, group in enumerate(shapes):
            held = self.saved_state(0, index)
            found = {key for key, value in held.items() if torch.is_tensor(value) and value.dim() > 0}
            if found != {"exp_avg", "exp_avg_sq"}:
                raise UserError(
                    f"{self.folder} has no {manifests.NAME}, and its optimizer state is {', '.join(sorted(held))}; "
                    "without one, only Adam's exp_avg and exp_avg_sq can be read"
                )
            size = held["exp_avg"].numel()
            parts = [-(-math.prod(shape) // world_size) for shape in group.values()]
            if stage == 3 and sum(parts) != size:  # saved where this package lays out stage 3
                parts = [share_of(tuple(shape), world_size) for shape in group.values()]
            at, places = 0, []
            for (name, shape), part, padding in zip(group.items(), parts, paddings[index], strict=True):
                places.append(Place(name, tuple(shape), at, part if stage == 3 else 0))
                at += part if stage == 3 else math.prod(shape) + padding
            formats = {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
            dtype = dtype_name(masters[index].dtype)
            flats.append(Flat(index, "other", size, dtype, "fp32", formats, tuple(places)))
        states = (State("exp_avg"), State("exp_avg_sq", signed=False))
        sharding = Sharding(stage, world_size, None, states, tuple(flats))
        problem = disagreement(sharding)
        if problem is not None:
            raise UserError(f"{path} is damaged ({problem})")
        check_rank(self.optimizer_states(0), sharding, 0, path)
        return Manifest(int(model["global_steps"]), sharding)


def _differ(one: Sized, other: Sized) -> bool:
    return len(one) != len(other)
