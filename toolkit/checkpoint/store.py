"""The folder of a run's checkpoints: temporary until complete, put in place by one rename, removed the same way.

    checkpoints/
      global_step200/      DeepSpeed's files and manifest.json
      global_step300/
      latest               the name of the newest, moved last
      .saving-.../         a checkpoint that is being written; of no interest to anybody else

At every moment each folder called global_step<n> is complete, so that whatever ends the run, what is there is good.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from pathlib import Path

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.manifest import Manifest, NotUnderstood
from toolkit.errors import UserError
from toolkit.paths import inside, read_text, replace_text, sync_folder

LATEST = "latest"
_NAME = re.compile(r"global_step(0|[1-9][0-9]{0,17})")
_HIDDEN = (".saving-", ".removing-")


def name_of(step: int) -> str:
    """As DeepSpeed calls it."""
    return f"global_step{step}"


def pointed(folder: Path) -> Path | None:
    """The checkpoint that the file `latest` in `folder` names; None without such a file.

    Raises:
        UserError: it cannot be read, or names nothing in `folder`.
    """
    if not os.path.lexists(folder / LATEST):
        return None
    return inside(folder, read_text(folder, LATEST, limit=4096).strip())


class Store:
    """Checkpoints in `folder`, and which of them stay: the newest `keep_last`, and every multiple of `keep_every`."""

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every

    def steps(self) -> list[int]:
        """Of all checkpoints, newest first."""
        found = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / name_of(step)

    def draft(self, step: int) -> Path:
        """A folder to write a checkpoint in, as <draft>/global_step<n>; its name is nobody else's."""
        return self.folder / f"{_HIDDEN[0]}{name_of(step)}-{secrets.token_hex(4)}"

    def commit(self, draft: Path, manifest: Manifest) -> None:
        """Put a complete checkpoint in place, and remove those that need not stay.

        What this version does not understand stays: a checkpoint of a newer one is not replaced, and a folder whose
        manifest is missing or cannot be read is set aside as global_step<n>-aside-<letters>.

        Raises OSError; until the rename the checkpoints are what they were.
        """
        written, final = draft / name_of(manifest.step), self.path(manifest.step)
        manifests.write(written, manifest)
        missing = manifests.damage(written, manifest, hashes=False)
        if missing is not None:
            raise OSError(f"{missing}; all machines must share the file system of checkpoints")
        try:
            manifests.read(written)
        except UserError as error:  # what could not be resumed from must not push out what could
            raise OSError(str(error)) from None
        if os.path.lexists(final):
            self._make_way(final)
        os.rename(written, final)
        sync_folder(self.folder)
        replace_text(self.folder / LATEST, final.name, durable=True)
        for script in draft.glob("*.py"):  # DeepSpeed's zero_to_fp32.py
            os.replace(script, self.folder / script.name)
        self.discard(draft)
        # What is beyond this step is damaged, else the run would have resumed from it.
        kept = [step for step in self.steps() if step <= manifest.step and _understood(self.path(step))]
        for step in kept[self.keep_last :]:
            if not (self.keep_every and step % self.keep_every == 0):
                self._remove(self.path(step))

    def _make_way(self, final: Path) -> None:
        try:
            manifests.read(final)
        except NotUnderstood as error:
            raise OSError(f"{error}, and is not replaced") from None
        except UserError:
            os.rename(final, final.with_name(f"{final.name}-aside-{secrets.token_hex(4)}"))
        else:  # one whose files a resume found damaged, and this run has reached again
            self._remove(final)

    @staticmethod
    def discard(draft: Path) -> None:
        """Remove what has been written of a checkpoint, as far as the disk lets us."""
        shutil.rmtree(draft, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        # Under its own name it must never be incomplete.
        hidden = self.folder / f"{_HIDDEN[1]}{path.name}-{secrets.token_hex(4)}"
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what an earlier run was writing or removing when it ended; only for who holds the run's lock."""
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if path.name.startswith(_HIDDEN):
                    shutil.rmtree(path, ignore_errors=True)


def _understood(folder: Path) -> bool:
    try:
        manifests.read(folder)
    except UserError:
        return False
    return True
