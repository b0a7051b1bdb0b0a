"""DeepSpeed's universal layout: <folder>/zero/<parameter>/<state>.pt, fp32 and whole, whoever trained it.

DeepSpeed reads and writes Adam's states there. Ours go there under their own names as well, and beside the folders of
the parameters stand two files that only this package reads: the manifest and `leanstate_optimizer.pt`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.content import PER_RANK, check_groups, check_whole, is_step
from toolkit.checkpoint.convert import model_states
from toolkit.checkpoint.files import on_host, plain, save
from toolkit.checkpoint.manifest import Manifest
from toolkit.checkpoint.source import Source, model_file
from toolkit.checkpoint.store import LATEST
from toolkit.errors import UserError
from toolkit.paths import inside, replace_text
from toolkit.state.layout import State
from toolkit.state.sharding import Flat, Place, Sharding, reshard

ZERO = "zero"
OPTIMIZER = "leanstate_optimizer.pt"
GROUPS = "optimizer_state.pt"
"""The optimizer's file as DeepSpeed names it, in the folder `ZERO`."""
ADAM = (State("exp_avg"), State("exp_avg_sq", signed=False))


def write(source: Source, folder: Path) -> None:
    """Write `source` in the universal layout; one parameter is in memory at a time.

    Every state is there under its own name, and under Adam's the first of its kind, so that DeepSpeed's Adam can go
    on from it (`"checkpoint": {"load_universal": true}`).

    Raises:
        UserError: the folder exists already; a parameter's name leads out of it.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; give another one")
    homes = {name: _home(folder, name) for name in source.sharding.by_name}
    try:
        _write(source, folder, homes)
    except BaseException:  # in half a folder nobody could try again
        shutil.rmtree(folder, ignore_errors=True)
        raise
    replace_text(folder.parent / f"{LATEST}_universal", folder.name, durable=True)


def _write(source: Source, folder: Path, homes: Mapping[str, Path]) -> None:
    entries: dict[str, dict[str, Any]] = {}

    def put(content: Any, path: Path) -> None:
        entries[path.relative_to(folder).as_posix()] = save(content, path)

    for name, (index, place) in source.sharding.by_name.items():
        home = homes[name]
        home.mkdir(parents=True)
        found = {"fp32": source.weights(name, 0, place.numel)}
        if source.trained():
            found |= source.states(name, 0, place.numel)
            kept = source.sharding.layout(index).every
            for state in ADAM:
                alike = next((old.name for old in kept if old.signed == state.signed), None)
                if state.name not in found and alike is not None:
                    found[state.name] = found[alike]
            put(torch.tensor(float(source.step_of(index))), home / "step.pt")
        whole = {key: values.view(place.shape) for key, values in found.items()}
        if source.trained():  # what is factored is there as a whole
            declared = {state.name for state in source.sharding.kept(index)}
            whole |= {key: values for key, values in source.small(name).items() if key in declared}
        for key, values in whole.items():
            put({"param": on_host(values)}, home / f"{key}.pt")
    saved = source.optimizer_states(0)
    shared = {key: value for key, value in saved["optimizer_state_dict"].items() if key in _SHARED}
    # Hyper-parameters stay behind: those of a rule mean nothing to Adam, which would take them over.
    groups = [{"params": group["params"]} for group in source.param_groups()]
    version = saved.get("ds_version")
    about = {"clip_grad": shared.get("clip_grad", 0.0), "overflow": False, "ds_version": version}
    put(plain(about | {"param_groups": groups}, on_host), folder / ZERO / GROUPS)
    own = shared | {"param_groups": source.param_groups(), PER_RANK: source.extra(0)}
    put(plain(own | {"ds_version": version}, on_host), folder / OPTIMIZER)
    module = model_states(source, reshard(source.sharding, stage=1, world_size=1))
    put(module | {"universal_checkpoint_info": {}}, folder / model_file(1, 0))
    for name, path in source.model_files().items():
        put(path.read_bytes(), folder / name)
    manifests.write(folder, Manifest(source.manifest.step, source.origin, source.manifest.facts, entries))


def _home(folder: Path, name: str) -> Path:
    """The folder of a parameter. Raises UserError where its name cannot be that of a folder."""
    if "/" in name or name == GROUPS:
        raise UserError(f"the parameter {name!r} cannot have a folder of its name in {folder / ZERO}")
    return inside(folder / ZERO, name)


_SHARED = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")


class Universal(Source):
    """A checkpoint in the universal layout, as one rank at stage 3 that holds every parameter in fp32."""

    def __init__(self, folder: Path, *, trust_pickle: bool = False) -> None:
        super().__init__(folder, trust_pickle=trust_pickle)
        self._written = self.manifest if self._own else None
        self.stage = 3
        self.sharding = self._whole()

    def _check_grid(self) -> None:
        """State is whole and fp32, without blocks."""

    @property
    def origin(self) -> Sharding:
        if self._written is None:
            raise UserError(
                f"{self.folder} was not written by this package and does not say how parameters are grouped; resume "
                "from it with --convert-state"
            )
        return self._written.sharding

    def _whole(self) -> Sharding:
        shapes: list[dict[str, Any]] = self.model_states().get("param_shapes") or []
        states = self._written.sharding.states if self._written is not None else ADAM
        rule = self._written.sharding.rule if self._written is not None else None
        written = self._written.sharding.by_name if self._written is not None else {}
        flats: list[Flat] = []
        for group in shapes:
            for name, shape in group.items():
                _home(self.folder, name)
                place = Place(name, tuple(shape), 0, torch.Size(shape).numel())
                formats = dict.fromkeys((state.name for state in states), "fp32")
                if self._written is not None and name in written:
                    formats = dict.fromkeys(self._written.sharding.flats[written[name][0]].formats, "fp32")
                flats.append(Flat(len(flats), "other", place.numel, "float32", "fp32", formats, (place,)))
        made = Sharding(3, 1, rule, states, tuple(flats))
        written = written if self._written is not None else made.by_name
        if {name: place.shape for name, (_, place) in written.items()} != {
            name: place.shape for name, (_, place) in made.by_name.items()
        } or len(flats) != len(made.by_name):
            raise UserError(f"{self.folder} is damaged (its manifest and its files have other parameters)")
        return made

    def _stock(self) -> Manifest:
        return Manifest(int(self.model_states()["global_steps"]), Sharding(3, 1, None, ADAM, ()))

    def check(self, share: tuple[int, int] = (0, 1)) -> None:
        self.optimizer_states(0)
        self._find(f"{ZERO}/{GROUPS}")
        for index in range(share[0], len(self.sharding.flats), share[1]):
            self.master(0, index)
            if self.saved_state(0, index):
                kinds = {state.signed for state in self.sharding.layout(index).states}
                for state in ADAM:  # DeepSpeed's Adam looks for them
                    if state.signed in kinds:
                        self._parameter(index, state.name)

    def _parameter(self, index: int, key: str) -> Tensor:
        sizes = self.sharding.small(index).get(key)
        shape = self.sharding.flats[index].places[0].shape if sizes is None else tuple(sizes)
        name = self._named(index, key)
        return check_whole(self._load(name), shape, self.folder / name)

    def _named(self, index: int, key: str) -> str:
        return self._find(f"{ZERO}/{self.sharding.flats[index].places[0].name}/{key}.pt")

    def master(self, rank: int, index: int) -> Tensor:
        return self._parameter(index, "fp32")

    def saved_state(self, rank: int, index: int) -> Mapping[str, Any]:
        try:
            name = self._named(index, "step")
        except UserError:  # no step has been made
            return {}
        step = self._load(name)
        if not is_step(step):
            raise UserError(f"{self.folder / name} is damaged (it is no number of steps)")
        held = {state.name: self._parameter(index, state.name) for state in self.sharding.kept(index)}
        return held | {"step": step}

    def optimizer_states(self, rank: int) -> dict[str, Any]:
        name = self._find(OPTIMIZER if self._own else f"{ZERO}/{GROUPS}")
        found = check_groups(self._load(name), self.folder / name)
        return {"optimizer_state_dict": found, "ds_version": found.get("ds_version"), PER_RANK: found.get(PER_RANK)}

    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer_states(0)["optimizer_state_dict"]["param_groups"]
        return groups


def open_checkpoint(folder: Path, *, trust_pickle: bool = False) -> Source:
    """The checkpoint in `folder`, whatever its layout. Raises UserError as `Source` does."""
    kind = Universal if (folder / ZERO).is_dir() else Source
    return kind(folder, trust_pickle=trust_pickle)
