"""Files in a folder that somebody else may have written: nothing outside of it, and nothing but files.

Also how a file is written: whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from toolkit.errors import UserError
from toolkit.sentences import shown

TEXT_LIMIT = 64 << 20
"""Bytes of a JSON or text file that is read as a whole."""
_NAME_LIMIT = 255  # bytes, of most file systems
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


def inside(folder: Path, name: str) -> Path:
    """`folder`/`name`; the name may have slashes, but must not lead out of the folder. Nothing is looked up.

    Raises:
        UserError: it is absolute, has "..", or is not a file name.
    """
    try:
        good = all(part not in ("", ".", "..") and len(part.encode()) <= _NAME_LIMIT for part in name.split("/"))
    except UnicodeEncodeError:  # half a character
        good = False
    if not good or "\0" in name:
        raise UserError(f"{shown(name)} is not a file name within {folder}")
    return folder / name


def regular(folder: Path, name: str) -> Path:
    """The path of the file `name` in `folder`, whatever links lie on the way to the folder itself.

    Raises:
        UserError: it is missing, no regular file (a FIFO would wait for ever), or a link to something outside.
    """
    path = inside(folder, name)
    try:
        found = path.resolve(strict=True)
        mode = found.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not found.is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link out of its folder, which is not followed")
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "something else")
        raise UserError(f"{path} is {kind} and not a file")
    return path


def check_writable(path: Path) -> None:
    """Raise UserError where something other than a file is: what is written there would go elsewhere, or nowhere."""
    if path.is_symlink():
        raise UserError(f"{path} is a link, which is not written through; remove it")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; remove it")


def read_text(folder: Path, name: str, *, limit: int = TEXT_LIMIT, errors: str = "strict") -> str:
    """The text of the file `name` in `folder`, UTF-8; `errors` as `bytes.decode` has it.

    Raises:
        UserError: as `regular`; it has more than `limit` bytes, cannot be read or is no text.
    """
    path = regular(folder, name)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise UserError(f"{path} has more than {limit} bytes")
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    try:
        return content.decode(errors=errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text from byte {error.start} on") from None


def cache_folder() -> Path:
    """Where this package keeps what it can make again; nothing need be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leanstate"


def draft_of(path: Path) -> Path:
    """A name beside `path` for what will replace it; nothing of that name is there.

    Raises:
        OSError: what is there cannot be removed.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)  # which may be a link
    return draft


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Make `path` a file of `text`, UTF-8: whatever ends this process, readers find the old one or the new.

    Args:
        durable: it also survives a loss of power from here on.

    Raises:
        OSError: it cannot be written; then it is what it was.
    """
    draft = draft_of(path)
    try:
        with open(draft, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
