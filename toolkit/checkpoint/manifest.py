"""What stands beside the files of a checkpoint: how the state is cut, where the run was, and a hash of every file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.checkpoint.sharding import Sharding
from toolkit.errors import UserError
from toolkit.state.codecs import BLOCK

NAME = "manifest.json"
FORMAT = 1
"""Version of the format. Readers refuse a newer one by name."""


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
            "format": FORMAT,
            "step": self.step,
            "block": BLOCK,
            **self.facts,
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


def read(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        UserError: there is none, it is damaged, or of a newer format.
    """
    path = folder / NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        claimed = body.pop("sha256")
        intact = claimed == _digest(body)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, AttributeError):  # of text, of JSON, of something else than an object
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged")
    if body["format"] > FORMAT or body["block"] != BLOCK:
        raise UserError(
            f"{path} is of format {body['format']} with blocks of {body['block']}, this version reads format {FORMAT} "
            f"with blocks of {BLOCK}"
        )
    known = {"format", "step", "block", "sharding", "files"}
    facts = {key: value for key, value in body.items() if key not in known}
    return Manifest(body["step"], Sharding.from_json(body["sharding"]), facts, body["files"])


def damage(folder: Path, manifest: Manifest, *, share: tuple[int, int] = (0, 1), hashes: bool = True) -> str | None:
    """What is wrong with the files of a checkpoint, in half a sentence that names the file; None if nothing is.

    `share`: only every n-th file from the i-th on, (i, n), so that ranks can divide the work. Without `hashes` only
    presence and size are looked at.
    """
    for number, (name, entry) in enumerate(sorted(manifest.files.items())):
        if number % share[1] != share[0]:
            continue
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{path} has {size} bytes instead of {entry['bytes']}"
            if hashes and file_hash(path) != entry["sha256"]:
                return f"the content of {path} has changed since it was saved"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make names in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file of `text`, at once and for good."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of the checkpoint in `folder`."""
    write_text(folder / NAME, json.dumps(manifest.to_json(), indent=1) + "\n")
