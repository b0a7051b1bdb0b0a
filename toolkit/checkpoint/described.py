"""What `toolkit checkpoint inspect` says of a checkpoint: as JSON, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.checkpoint.source import Source
from toolkit.console import waiting
from toolkit.state.sharding import Flat

_PLACE = {"epoch": "epoch", "window": "window", "document": "index"}
"""Of a position in the data, the word and the field."""
_KINDS = ("matrices", "1-D parameters")


def describe(source: Source, *, digest: bool = False) -> dict[str, Any]:
    """For programs: numbers are numbers, and what the checkpoint does not say is None."""
    manifest, sharding = source.manifest, source.origin
    facts: Mapping[str, Any] = manifest.facts
    at = facts.get("position")
    sizes = {name: int(entry["bytes"]) for name, entry in manifest.files.items()} or _on_disk(source)
    frozen = {name: kept.numel() for name, kept in source.frozen.items()}
    inside = manifest.parameters + sum(count for name, count in frozen.items() if name not in source.based)
    found: dict[str, Any] = {
        "folder": str(source.folder),
        "step": manifest.step,
        "saved": facts.get("saved"),
        "ranks": sharding.world_size,
        "zero_stage": sharding.stage,
        "optimizer": sharding.rule or "Adam",
        "states": [state.name for state in sharding.states],
        "stored_as": _stored(sharding.flats),
        "parameters": manifest.parameters,
        "frozen_parameters": sum(frozen.values()),
        "buffer_elements": sum(buffer.numel() for buffer in source.buffers().values()),
        "base": source.base.path if source.based and source.base is not None else None,
        "bytes": sum(sizes.values()),
        "bytes_per_parameter": sum(sizes.values()) / max(inside, 1),
        "identity": {part: entry["name"] for part, entry in facts.get("identity", {}).items()},
        "data_position": {word: at.get(key, 0) for word, key in _PLACE.items()} if at else None,
        "versions": dict(facts.get("versions", {})),
        "files": sizes,
    }
    if digest:
        with waiting("hashing the state"):
            found["digest"] = source.digest()
    return found


def _on_disk(source: Source) -> dict[str, int]:
    """DeepSpeed's files and their bytes, where no manifest lists them."""
    return {path.name: path.stat().st_size for path in sorted(source.folder.glob("*_states.pt"))}


def _stored(flats: Sequence[Flat]) -> list[dict[str, Any]]:
    """How states and weights are kept, and of which parameters."""
    found: dict[tuple[Any, ...], list[Flat]] = {}
    for flat in flats:
        weights = flat.weights if flat.dtype == "bfloat16" else flat.dtype
        found.setdefault((tuple(flat.formats.items()), weights), []).append(flat)
    stored = []
    for (formats, weights), alike in found.items():
        places = [place for flat in alike for place in flat.places]
        stored.append(
            {
                "kinds": [kind for kind in _KINDS if any(_kind(place.shape) == kind for place in places)],
                "components": sorted({flat.component for flat in alike}),
                "parameters": sum(place.numel for place in places),
                "formats": dict(formats),
                "weights": weights,
            }
        )
    return sorted(stored, key=lambda one: -one["parameters"])


def _kind(shape: Sequence[int]) -> str:
    return _KINDS[len(shape) <= 1]


def rows(found: Mapping[str, Any]) -> dict[str, str]:
    """The same in words, by what stands before them."""
    at = found["data_position"]
    return {
        "folder": found["folder"],
        "step": str(found["step"]),
        "saved": str(found["saved"] or "?"),
        "ranks": f"{found['ranks']} at ZeRO stage {found['zero_stage']}",
        "optimizer": f"{found['optimizer']}: {', '.join(found['states'])}",
        "stored as": "; ".join(_stored_words(found["stored_as"])),
        "parameters": f"{found['parameters']:,}",
        "not trained": f"{found['frozen_parameters']:,} in frozen parameters, {found['buffer_elements']:,} in buffers",
        **({"beside": found["base"]} if found["base"] is not None else {}),
        "bytes": f"{found['bytes']:,} ({found['bytes_per_parameter']:.2f} per parameter)",
        **found["identity"],
        "data continue at": ", ".join(f"{word} {value}" for word, value in at.items()) if at else "?",
        "versions": ", ".join(f"{key} {value}" for key, value in found["versions"].items()) or "?",
        **({"digest": found["digest"]} if "digest" in found else {}),
    }


def _stored_words(stored: Sequence[Mapping[str, Any]]) -> list[str]:
    """The formats; where there are several, each after the parameters that are kept so."""
    kinds = [" and ".join(one["kinds"]) for one in stored]
    said = []
    for one, kind in zip(stored, kinds, strict=True):
        which = kind if kinds.count(kind) == 1 else f"{kind} of {', '.join(one['components'])}"
        formats = " ".join(f"{name}={value}" for name, value in {**one["formats"], "weights": one["weights"]}.items())
        said.append(f"{which}: {formats}" if len(stored) > 1 else formats)
    return said
