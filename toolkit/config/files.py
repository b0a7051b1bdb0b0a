"""Where a DeepSpeed JSON comes from: shipped by name, a user's own by path, single values by assignment."""

from __future__ import annotations

import ast
import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import UserError, nearest
from toolkit.masking import MASK, is_secret, masked_assignment
from toolkit.sentences import json_kind

_PACKAGE = Path(__file__).resolve().parent.parent

_STAGES = {
    1: "fewest collectives; model and gradients fit",
    2: "the usual choice; the model fits",
    3: "the model does not fit on one device",
}
_OFFLOAD = {
    2: "only weights and activations on the device",
    3: "the largest models, the slowest step",
}


@dataclass(frozen=True)
class ShippedConfig:
    """One DeepSpeed JSON that comes with the package, and what it is for."""

    path: Path
    optimizer: str
    stage: int
    offload: tuple[str, ...]
    state_format: str

    @property
    def way(self) -> str:
        """What the name says behind the optimizer: "zero2_offload"."""
        return self.path.stem.removeprefix(f"{self.optimizer.lower()}_")

    @property
    def idea(self) -> str:
        """What the optimizer does, in a few words."""
        return _idea(self.optimizer)

    @property
    def placing(self) -> str:
        """What this way of sharding is good for."""
        if self.way.endswith("_lean"):
            where = "on the host" if self.offload else "several devices" if self.stage == 3 else "one device"
            return f"least state; gradients are released; {where}"
        return (_OFFLOAD if self.offload else _STAGES)[self.stage]


def _idea(optimizer: str) -> str:
    """What a rule does, by the first line of its module ("AMCS: dual momentum."), which is slow to import."""
    path = _PACKAGE / "optim" / "rules" / f"{optimizer.lower()}.py"
    if not path.is_file():
        return "baseline"
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return first.partition(": ")[2].rstrip(".")


def shipped_configs(package: Path = _PACKAGE) -> dict[str, ShippedConfig]:
    """All shipped configurations by name ("amcs_zero2"), sorted.

    An installed wheel holds them inside the package folder `package`, a source checkout beside it.
    """
    # The package's own folder first: beside an installed package lie other people's.
    folder = next(place / "ds_configs" for place in (package, package.parent) if (place / "ds_configs").is_dir())
    return {path.stem: _describe(path) for path in sorted(folder.glob("*.json"))}


def names_in_short(shipped: Mapping[str, ShippedConfig]) -> str:
    """A sentence on the names of all of `shipped`."""
    optimizers = sorted({one.optimizer.lower() for one in shipped.values()})
    return f"Shipped are <optimizer>_zero1, _zero2 and _zero3 of {', '.join(optimizers)}; see 'toolkit configs'."


def _describe(path: Path) -> ShippedConfig:
    config = _parse(path)
    zero, optimizer = config["zero_optimization"], config["optimizer"]
    return ShippedConfig(
        path=path,
        optimizer=optimizer["type"],
        stage=zero["stage"],
        offload=tuple(part for part in ("optimizer", "param") if f"offload_{part}" in zero),
        state_format=optimizer["params"].get("state_format", "fp32"),
    )


def load_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The DeepSpeed JSON that `config` names, as a dict of its own.

    Args:
        config: the name of a shipped file ("amcs_zero2"), a path, or the content itself (copied deeply).

    Keys that begin with "_" or "//" are comments, at any depth, and are left out. Raises UserError if there is no such
    file, or if it is not one JSON object with every key once. DeepSpeed reads its files as Hjson (comments, trailing
    commas), so those pass too.
    """
    if isinstance(config, Mapping):
        return without_comments(copy.deepcopy(dict(config)))
    shipped = shipped_configs()
    path = shipped[str(config)].path if str(config) in shipped else Path(config).expanduser()
    if path.is_file():
        return without_comments(_parse(path))
    what = "is a folder, not a file" if path.is_dir() else "is neither a shipped config nor a file"
    hint = nearest(path.stem, shipped) or f" {names_in_short(shipped)}"
    raise UserError(f"config {str(config)!r} {what}.{hint}")


def _parse(path: Path) -> dict[str, Any]:
    duplicated: list[tuple[dict[str, Any], str]] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen and not is_comment(key):
                duplicated.append((result, key))
            seen.add(key)
        return result

    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 from byte {error.start} on; save it in that encoding.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if not text.strip():
        raise UserError(f"{path} is empty; a DeepSpeed config is one JSON object.")
    with _bounded(str(path)):
        try:
            content = json.loads(text, object_pairs_hook=unique)
        except json.JSONDecodeError as strict:
            import hjson

            duplicated.clear()
            try:
                content = hjson.loads(text, object_pairs_hook=unique)
            except hjson.HjsonDecodeError as lenient:
                # The parser that got further stopped at what neither can read.
                stop = max(strict, lenient, key=lambda error: error.pos)
                raise UserError(
                    f"{path} is not valid JSON: {stop.msg} at line {stop.lineno}, column {stop.colno}."
                ) from None
        json.dumps(content, ensure_ascii=False).encode()
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {json_kind(content)}; a DeepSpeed config is one JSON object.")
    if duplicated:
        owner, key = duplicated[0]
        raise UserError(f"{path}: the key {_path_to(owner, content) + key!r} appears twice; keep one of them.")
    return content


@contextmanager
def _bounded(where: str) -> Iterator[None]:
    """Refuses in a sentence what JSON can spell, but nothing here can hold."""
    try:
        yield
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{where} is nested too deeply for a DeepSpeed config.") from None
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half of a surrogate pair, which is no character.") from None
    except ValueError:  # Python's limit on the digits of an integer
        digits = sys.get_int_max_str_digits()
        raise UserError(f"{where} holds a whole number of more than {digits} digits, which no setting has.") from None


def _path_to(owner: dict[str, Any], tree: Any) -> str:
    """Dotted path, ending in a dot, from `tree` to the object `owner` inside it; empty at the top."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if value is owner:
            return f"{key}."
        if inner := _path_to(owner, value):
            return f"{key}.{inner}"
    return ""


def is_comment(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(("_", "//"))


def without_comments(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` without the keys that are comments, at any depth, which DeepSpeed may take for settings."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cleaned(inner) for key, inner in value.items() if not is_comment(key)}
        return [cleaned(inner) for inner in value] if isinstance(value, list) else value

    result: dict[str, Any] = cleaned(config)
    return result


def without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` without the keys whose value is "auto", at any depth."""
    return {
        key: without_auto(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value != "auto"
    }


def apply_overrides(config: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A deep copy of `config` with values set by "dotted.key=value"; later assignments win.

    Values are parsed as JSON and taken as plain text where they are not JSON. Objects on the way are made as
    needed; `validate` finds misspelt keys. Raises UserError for an assignment that cannot be read or applied.
    """
    result = copy.deepcopy(dict(config))
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        *parents, last = keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError(
                f"cannot read the assignment {masked_assignment(assignment)!r}: write it as section.key=value."
            )
        node = result
        for depth, key in enumerate(parents, start=1):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                place = ".".join(keys[:depth])
                held = MASK if any(map(is_secret, keys[:depth])) else repr(node)
                told = masked_assignment(assignment)
                raise UserError(f"cannot assign {told!r}: {place!r} is {held}, which holds no keys.")
        with _bounded(f"the value of {dotted.strip()!r}"):
            try:
                node[last] = json.loads(text)
                json.dumps(node[last], ensure_ascii=False).encode()
            except json.JSONDecodeError:
                node[last] = text.strip()
    return result
