"""AMCS, SOAM and other rules under DeepSpeed's ZeRO."""

from toolkit.zero.engine import compile_step, initialize, optimizer_state_bytes, register, rule_optimizer
from toolkit.zero.full_precision import full_precision_state_dict

__all__ = [
    "compile_step",
    "full_precision_state_dict",
    "initialize",
    "optimizer_state_bytes",
    "register",
    "rule_optimizer",
]
