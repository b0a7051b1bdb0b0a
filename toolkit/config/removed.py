"""Keys that a DeepSpeed JSON once had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.errors import UserError

# What DeepSpeed itself says nothing about, by section: it ignores such a key, or calls it unknown.
_EARLIER = {
    "aio": {"thread_count": "it is intra_op_parallelism now"},
    "compile": {
        "enabled": "call engine.compile()",
        "disable": "a model is compiled by engine.compile() only",
        "backend": "it is an argument of engine.compile()",
        "kwargs": "they are arguments of engine.compile()",
    },
    "zero_optimization": {
        "comm_overlap": "it is overlap_comm now",
        "cpu_offload_params": "it is offload_param now",
        "stage3_param_persitance_threshold": "it is stage3_param_persistence_threshold now",
    },
}


def check_removed(config: Mapping[str, Any]) -> None:
    """Raises UserError for a key that DeepSpeed no longer has, with what came of it."""
    from deepspeed.runtime import config as deepspeed_config

    zero = config.get("zero_optimization")
    for prefix, section, table in (
        ("", config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS"),
        ("zero_optimization.", zero if isinstance(zero, Mapping) else {}, "_REMOVED_ZERO_CONFIG_KEYS"),
    ):
        for key, why in getattr(deepspeed_config, table, {}).items():
            if key in section:
                why = why.split(" See http")[0].rstrip()
                raise UserError(f"{prefix}{key} is no longer part of DeepSpeed: {why}")
    for name, keys in _EARLIER.items():
        found = config.get(name)
        for key in found if isinstance(found, Mapping) else ():
            if key in keys:
                raise UserError(f"{name}.{key} is no longer part of DeepSpeed: {keys[key]}; leave it out.")
