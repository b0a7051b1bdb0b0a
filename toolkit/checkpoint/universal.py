"""DeepSpeed's universal layout: <folder>/zero/<parameter>/<state>.pt, fp32 and whole, whoever trained it.

DeepSpeed reads and writes Adam's states there. Ours go there under their own names as well, and beside the folders of
the parameters stand two files that only this package reads: the manifest and `leanstate_optimizer.pt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.convert import model_states
from toolkit.checkpoint.files import on_host, plain, save
from toolkit.checkpoint.manifest import Manifest
from toolkit.checkpoint.sharding import Flat, Place, Sharding, reshard
from toolkit.checkpoint.source import PER_RANK, Source, load_file, model_file
from toolkit.checkpoint.store import LATEST
from toolkit.errors import UserError
from toolkit.optim.rule import State

ZERO = "zero"
OPTIMIZER = "leanstate_optimizer.pt"
ADAM = (State("exp_avg"), State("exp_avg_sq", signed=False))


def write(source: Source, folder: Path) -> None:
    """Write `source` in the universal layout; one parameter is in memory at a time.

    Every state is there under its own name, and under Adam's the first of its kind, so that DeepSpeed's Adam can go
    on from it (`"checkpoint": {"load_universal": true}`).

    Raises:
        UserError: the folder exists already.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; give another one")
    names = {state.name for state in source.sharding.states}
    for name, (index, place) in source.sharding.by_name.items():
        home = folder / ZERO / name
        home.mkdir(parents=True)
        found = {"fp32": source.weights(name, 0, place.numel)}
        if source.trained():
            found |= source.states(name, 0, place.numel)
            for state in ADAM:
                alike = next((old.name for old in source.sharding.states if old.signed == state.signed), None)
                if state.name not in names and alike is not None:
                    found[state.name] = found[alike]
            save(torch.tensor(float(source.step_of(index))), home / "step.pt")
        for key, values in found.items():
            save({"param": on_host(values).view(place.shape)}, home / f"{key}.pt")
    saved = source.optimizer_states(0)
    shared = {key: value for key, value in saved["optimizer_state_dict"].items() if key in _SHARED}
    # Hyper-parameters stay behind: those of a rule mean nothing to Adam, which would take them over.
    groups = [{"params": group["params"]} for group in source.param_groups()]
    head = {"clip_grad": shared.get("clip_grad", 0.0), "overflow": False, "ds_version": saved["ds_version"]}
    save(plain(head | {"param_groups": groups}, on_host), folder / ZERO / "optimizer_state.pt")
    own = shared | {"param_groups": source.param_groups(), PER_RANK: source.extra(0)}
    save(plain(own | {"ds_version": saved["ds_version"]}, on_host), folder / OPTIMIZER)
    module = model_states(source, reshard(source.sharding, stage=1, world_size=1))
    save(module | {"universal_checkpoint_info": {}}, folder / model_file(1, 0))
    about = {name: save(path.read_bytes(), folder / name) for name, path in source.model_files().items()}
    manifests.write(folder, Manifest(source.manifest.step, source.origin, source.manifest.facts, about))
    manifests.write_text(folder.parent / f"{LATEST}_universal", folder.name)


_SHARED = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")


class Universal(Source):
    """A checkpoint in the universal layout, as one rank at stage 3 that holds every parameter in fp32."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._written = self.manifest if self._own else None
        self.stage = 3
        self.sharding = self._whole()

    @property
    def origin(self) -> Sharding:
        if self._written is None:
            raise UserError(
                f"{self.folder} was not written by this package and does not say how parameters are grouped; resume "
                "from it with --convert-state"
            )
        return self._written.sharding

    def _whole(self) -> Sharding:
        shapes: list[dict[str, Any]] = self.model_states()["param_shapes"]
        states = self._written.sharding.states if self._written is not None else ADAM
        rule = self._written.sharding.rule if self._written is not None else None
        formats = {state.name: "fp32" for state in states}
        flats: list[Flat] = []
        for group in shapes:
            for name, shape in group.items():
                place = Place(name, tuple(shape), 0, torch.Size(shape).numel())
                flats.append(Flat(len(flats), "other", place.numel, "float32", "fp32", formats, (place,)))
        return Sharding(3, 1, rule, states, tuple(flats))

    def _stock(self) -> Manifest:
        return Manifest(int(self.model_states()["global_steps"]), Sharding(3, 1, None, ADAM, ()))

    def _home(self, index: int) -> Path:
        return self.folder / ZERO / self.sharding.flats[index].places[0].name

    def _read(self, path: Path) -> Any:
        return load_file(path, plain=self._own)

    def master(self, rank: int, index: int) -> Tensor:
        found: Tensor = self._read(self._home(index) / "fp32.pt")["param"]
        return found.reshape(-1)

    def saved_state(self, rank: int, index: int) -> Mapping[str, Any]:
        home = self._home(index)
        if not (home / "step.pt").exists():
            return {}
        names = [state.name for state in self.sharding.states]
        held = {name: self._read(home / f"{name}.pt")["param"].reshape(-1) for name in names}
        return held | {"step": self._read(home / "step.pt")}

    def optimizer_states(self, rank: int) -> dict[str, Any]:
        path = self.folder / OPTIMIZER
        found = self._read(path if path.exists() else self.folder / ZERO / "optimizer_state.pt")
        return {"optimizer_state_dict": found, "ds_version": found.get("ds_version"), PER_RANK: found.get(PER_RANK)}

    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer_states(0)["optimizer_state_dict"]["param_groups"]
        return groups


def open_checkpoint(folder: Path) -> Source:
    """The checkpoint in `folder`, whatever its layout. Raises UserError where there is none."""
    return Universal(folder) if (folder / ZERO).is_dir() else Source(folder)
