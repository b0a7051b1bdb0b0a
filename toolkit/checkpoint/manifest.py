"""What stands beside the files of a checkpoint: how the state is cut, where the run was, and a hash of every file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolkit.checkpoint.schema import ManifestFile, claimed_bytes, disagreement
from toolkit.errors import UserError
from toolkit.masking import masked
from toolkit.paths import read_text, regular, replace_text
from toolkit.sentences import explain, shown, value_at
from toolkit.state.codecs import BLOCK
from toolkit.state.sharding import Sharding

NAME = "manifest.json"
FORMAT = 3
"""Version of the format. Readers refuse a newer one by name; `_update` says what an older one lacks."""
_WHOLE = 2
"""That of checkpoints with all weights: 3 leaves out those beside adapters, which a reader of 2 would not miss."""


@dataclass
class Manifest:
    """The content of manifest.json.

    `facts` are what the run says of itself: `position` of the data stream, `identity` of model, tokenizer and data,
    `batch`, `versions`, `saved` (the time). `files`: by name, bytes and SHA-256. RNG states are in the ranks' files.
    """

    step: int
    sharding: Sharding
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it is written; `sha256` is the hash of all the rest."""
        body = {
            "format": _WHOLE if value_at(self.facts, "identity.model.base") is None else FORMAT,
            "step": self.step,
            "block": BLOCK,
            **masked(self.facts),
            "sharding": self.sharding.to_json(),
            "files": self.files,
        }
        return body | {"sha256": _digest(body)}

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    @property
    def parameters(self) -> int:
        return sum(place.numel for flat in self.sharding.flats for place in flat.places)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class NotUnderstood(UserError):
    """A checkpoint that another version wrote. It is no damage, and nobody's to replace or remove."""


class UnknownFormat(NotUnderstood):
    """A checkpoint that was written with a plug-in's codec."""


def read(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`, checked: its numbers agree, its names stay in the folder.

    Raises:
        NotUnderstood: it is of a newer format, or of a plug-in's (UnknownFormat).
        UserError: there is none, or it is damaged.
    """
    path = folder / NAME
    text = read_text(folder, NAME)
    try:
        body = json.loads(text)
        if not isinstance(body, dict):
            raise ValueError("it is not one JSON object")
        _check_format(path, body)
        claimed = body.pop("sha256", None)
        if claimed != _digest(body):
            raise ValueError("its content has changed since it was saved")
        _update(body)
        if body.get("block") != BLOCK:
            raise NotUnderstood(f"{path} is of blocks of {shown(body.get('block'))}, this version of {BLOCK}")
        checked = ManifestFile.model_validate(body)
        if unknown := checked.sharding.unknown_formats():
            raise UnknownFormat(
                f"{path} keeps state in the format {shown(unknown[0])}, which no codec here has; if a plug-in "
                "registers it, name that with --plugin"
            )
        sharding = Sharding.from_json(body["sharding"])
        problem = disagreement(sharding) or _more_than_there_is(sharding, body["files"])
        if problem is not None:
            raise ValueError(problem)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({explain(error, ManifestFile)})") from None
    except NotUnderstood:
        raise
    except (ValueError, RecursionError) as error:
        why = "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{path} is damaged ({why})") from None
    known = {"format", "step", "block", "sharding", "files"}
    facts = {key: value for key, value in body.items() if key not in known}
    return Manifest(checked.step, sharding, facts, body["files"])


def _check_format(path: Path, body: Mapping[str, Any]) -> None:
    """Before all else: the hash and the keys of a newer format may be others."""
    written = body.get("format")
    newer = isinstance(written, int | float) and not isinstance(written, bool) and written > FORMAT
    if newer or (isinstance(written, str) and written):
        raise NotUnderstood(
            f"{path} is of format {shown(written)}, which a newer version wrote; this one reads formats up to "
            f"{FORMAT}: update it (pip install --upgrade leanstate)"
        )
    if written not in range(1, FORMAT + 1):
        raise ValueError(f"its format is {shown(written)}")


def _update(body: dict[str, Any]) -> None:
    """Bring the content of an older format to that of `FORMAT`."""
    sharding = body.get("sharding")
    states = sharding.get("states") if body["format"] == 1 and isinstance(sharding, dict) else None
    for state in states if isinstance(states, list) else ():
        if isinstance(state, dict) and "near" in state:
            state["residual_of"] = state.pop("near")


def _more_than_there_is(sharding: Sharding, files: Mapping[str, Any]) -> str | None:
    """Weights are in the files as they are: fewer bytes than these claim cannot hold them."""
    claimed, there = claimed_bytes(sharding), sum(entry["bytes"] for entry in files.values())
    return f"its parameters take {claimed} bytes, its files {there}" if claimed > there else None


def damage(folder: Path, manifest: Manifest, *, share: tuple[int, int] = (0, 1), hashes: bool = True) -> str | None:
    """What is wrong with the files of a checkpoint, in half a sentence that names the file; None if nothing is.

    `share`: only every n-th file from the i-th on, (i, n), so that ranks can divide the work. Without `hashes` only
    presence and size are looked at.
    """
    for number, (name, entry) in enumerate(sorted(manifest.files.items())):
        if number % share[1] != share[0]:
            continue
        try:
            path = regular(folder, name)
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{path} has {size} bytes instead of {entry['bytes']}"
            if hashes and file_hash(path) != entry["sha256"]:
                return f"the content of {path} has changed since it was saved"
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
    return None


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Names of what lies in a checkpoint's folder and is not of it; nothing of this package reads them."""
    listed = {NAME, *manifest.files}
    folders = {str(parent) for name in listed for parent in Path(name).parents}
    found = []
    for place, below, names in os.walk(folder):
        here = Path(place).relative_to(folder)
        links = [name for name in below if (Path(place) / name).is_symlink()]
        found += [str(here / name) for name in (*names, *links) if str(here / name) not in listed]
        found += [f"{here / name}/" for name in below if name not in links and str(here / name) not in folders]
        below[:] = [name for name in below if str(here / name) in folders]
    return sorted(found)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of the checkpoint in `folder`."""
    replace_text(folder / NAME, json.dumps(manifest.to_json(), indent=1) + "\n", durable=True)
