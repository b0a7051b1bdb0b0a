"""Secrets in settings: the engine gets them, what is written or shown does not."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
_SECRET = re.compile(
    r"api_?key|secret|pass(w|phrase)|credential|private_?key|access_?key|authorization|bearer|(^|_)auth(_|$)"
    r"|(^|_)(token|pwd)([_-]?(value|\d+))?$|(^|_)(hf|access|auth|api|refresh)_tokens$"
    r"|(ssh|signing|encryption|deploy|wandb|comet)_key|cookie|webhook"
)

_IN_URL = re.compile(r"(?<=://)([^/@:\s]*:)([^/@\s]+)(?=@)")
"""User and password of an address, `https://user:password@host`."""


def is_secret(key: object) -> bool:
    """Whether a key is named like one that holds a secret: `api_key`, `hf_token`, `WANDB_API_KEY`, `clientSecret`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", str(key)).lower()
    return _SECRET.search(words) is not None


def masked(value: Any) -> Any:
    """A copy of plain data with `MASK` for each value under a secret's name, at any depth; nothing and flags stay.

    The password in an address is masked under whatever name. Strings in lists may be assignments (the words of a
    command line) and are masked as such.
    """
    if isinstance(value, Mapping):
        return {key: _hidden(item) if is_secret(key) else masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked_assignment(item) if isinstance(item, str) else masked(item) for item in value]
    return _IN_URL.sub(rf"\1{MASK}", value) if isinstance(value, str) else value


def _hidden(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item) for item in value]
    return value if value is None or value == "" or isinstance(value, bool) else MASK


def masks(value: Any, path: str = "") -> Iterator[str]:
    """The dotted paths in `value`, a configuration, whose secret is only `MASK`: it comes from a run's folder."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if (item == MASK and is_secret(key)) or (isinstance(item, str) and f":{MASK}@" in item):
                yield f"{path}{key}"
            yield from masks(item, f"{path}{key}.")


def masked_assignment(text: str) -> str:
    """`text`, the "dotted.key=value" of a --set, with its secrets masked; a word without a value stays."""
    key, equals, value = text.partition("=" if "=" in text else " ")
    if not equals:
        return str(masked(text))
    if any(is_secret(part) for part in key.split(".")):
        return key + equals + MASK
    try:
        given = json.loads(value)
    except (ValueError, RecursionError):
        return str(masked(text))
    shown = masked(given)
    return text if shown == given else key + equals + json.dumps(shown)


def hide_in_logs(value: Any, logger: logging.Logger) -> None:
    """Mask the secrets in `value`, a configuration, in whatever `logger` says from now on."""
    words = sorted(filter(lambda word: len(word) >= _SHORT, _secrets(value)), key=len, reverse=True)
    if not words:
        return

    def hide(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        record.msg, record.args = re.sub("|".join(map(re.escape, words)), MASK, message), ()
        return True

    logger.addFilter(hide)


_SHORT = 4
"""Characters below which a word is no secret, and would mask parts of others."""


def _secrets(value: Any, under: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(item, under or is_secret(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item, under)
    elif isinstance(value, str):
        yield from [value] if under else (password for _, password in _IN_URL.findall(value))
