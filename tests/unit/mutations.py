"""Small changes of DeepSpeed JSONs, from a seed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

import hjson
from found_configs import ACCEPTED
from pydantic import BaseModel
from typing_extensions import is_typeddict

from toolkit.config import load_config, shipped_configs
from toolkit.config.schema import DeepSpeedJson, deepspeed_models

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, 1.5, 4.0, 1e9, 1e-8, float("inf"), float("nan"), 10**30,
    "", "auto", "true", "false", "2", "1e-3", "cpu", "fp32", "BF16", "bfloat16", "AdamW", "WarmupLR", "MEAN",
    [], [0.9, 0.95], ["x"], {}, {"enabled": True}, {"type": "AdamW", "params": {"lr": 1e-3}},
]  # fmt: skip


def mutants(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` JSONs, each a valid one with one to three changes; the same for the same seed."""
    source = random.Random(seed)
    bases = [load_config(name) for name in shipped_configs()] + [hjson.loads(text) for text in ACCEPTED.values()]
    known = list(_known_paths())
    for _ in range(count):
        config = _plain(source.choice(bases))
        for _ in range(source.choice((1, 1, 2, 3))):
            _change(config, source, known)
        yield config


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return copy.deepcopy(value)


def _known_paths() -> Iterator[tuple[str, ...]]:
    """Every key of a DeepSpeed JSON that a schema names, as a path."""
    for name, hint in get_type_hints(DeepSpeedJson).items():
        yield (name,)
        if is_typeddict(hint):
            yield from ((name, key) for key in get_type_hints(hint))
    for path, model in deepspeed_models().items():
        yield from _fields(path, model)


def _fields(path: tuple[str, ...], model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*path, field.alias or name)


def _change(config: dict[str, Any], source: random.Random, known: list[tuple[str, ...]]) -> None:
    node, key = _place(config, source)
    way = source.random()
    if way < 0.4:
        node[key] = copy.deepcopy(source.choice(VALUES))
    elif way < 0.55:
        node.pop(key)
    elif way < 0.65:
        at = source.randrange(len(key) + 1)
        node[key[:at] + source.choice("xs_") + key[at:]] = node.pop(key)
    elif way < 0.7:
        node[key.upper()] = node.pop(key)
    else:
        *parents, last = source.choice(known)
        inner: Any = config
        for parent in parents:
            if not isinstance(inner.get(parent), dict):
                inner[parent] = {}
            inner = inner[parent]
        inner[last] = copy.deepcopy(source.choice(VALUES))


def _place(config: dict[str, Any], source: random.Random) -> tuple[dict[str, Any], str]:
    """A key somewhere in `config`, and the object that holds it."""
    places = []

    def walk(node: dict[str, Any]) -> None:
        for key, value in node.items():
            places.append((node, key))
            if isinstance(value, dict):
                walk(value)

    walk(config)
    if not places:
        config["train_batch_size"] = 1
        return config, "train_batch_size"
    return source.choice(places)
