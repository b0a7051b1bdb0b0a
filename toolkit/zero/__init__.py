"""AMCS, SOAM and other rules under DeepSpeed's ZeRO."""

from toolkit.zero.engine import initialize, optimizer_state_bytes, register, rule_optimizer

__all__ = ["initialize", "optimizer_state_bytes", "register", "rule_optimizer"]
