"""Where the master weights of an optimizer of this package are, at ZeRO stages 1, 2 and 3."""

from __future__ import annotations

from typing import Any

import torch

from toolkit.optim import RuleOptimizer


class MasterWeights:
    """In front of DeepSpeed's ZeRO optimizers: bf16 weights, with their remainders, are the master weights."""

    optimizer: RuleOptimizer

    def _configure_master_weights(self, *args: Any, **kwargs: Any) -> torch.dtype:
        # Asked for now: later the optimizer has no parameters, or other ones.
        self.holds_weights = self.optimizer.holds_weights()
        dtype: torch.dtype = super()._configure_master_weights(*args, **kwargs)  # type: ignore[misc]
        return torch.bfloat16 if self.holds_weights else dtype

    def _restore_from_bit16_weights(self) -> None:
        """Weights were put into the model from outside: what was below their last bit is no longer theirs."""
        super()._restore_from_bit16_weights()  # type: ignore[misc]
        self.optimizer.forget_remainders()
