"""Rules with fp32 state against another implementation of the same equations: that of the package pytorch_optimizer.

Settings are spelled out where defaults differ. Left out, since they are other algorithms there: Lamb8 (no correction of
the means for their start, norms of weights up to 10 only) and AdaMuon (no signs of the momentum).
"""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
from test_rules_followed import FEW, PLAIN, assert_same_way, train

STEPS, LR, DECAY = 12, 1e-2, 0.3
DECOUPLED = {"lr": LR, "weight_decay": DECAY, "weight_decouple": True}


@pytest.mark.parametrize(
    ("rule", "other", "own", "known"),
    [
        ("Lion8", "Lion", {}, {"betas": (0.8, 0.97)}),
        ("QHAdam", "QHAdam", {}, {"betas": (0.9, 0.97), "nus": (0.6, 0.8), "eps": 1e-6}),
        ("StableAdamW", "StableAdamW", {}, {"betas": (0.8, 0.97), "eps": 1e-6}),
        # As long as the warm-ups of alpha and beta3, and some steps more.
        ("AdEMAMix", "AdEMAMix", {"total_steps": 8}, {"betas": (0.8, 0.97, 0.999), "alpha": 5.0, "eps": 1e-6}),
    ],
)
def test_it_steps_as_the_other(rule: str, other: str, own: dict[str, Any], known: dict[str, Any]) -> None:
    warm_up = {"t_alpha_beta3": own["total_steps"]} if own else {}
    ours = train(rule, FEW, STEPS, **(PLAIN | {"weight_decay": DECAY} | own | known))
    assert_same_way(ours, train(getattr(pytorch_optimizer, other), FEW, STEPS, **(DECOUPLED | warm_up | known)))


def test_normuon_steps_as_the_other() -> None:
    """Whose products are in bf16: hence the few percent."""

    def other(params: Any, **settings: Any) -> Any:
        groups = [{"params": params, "use_muon": True}]
        return pytorch_optimizer.NorMuon(groups, nesterov=False, update_scale="match_rms", **settings)

    shapes = ((40, 136), (136, 40))
    ours = train("NorMuon", shapes, STEPS, betas=(0.9, 0.95), weight_decay=DECAY, **PLAIN)
    assert_same_way(ours, train(other, shapes, STEPS, momentum=0.9, **DECOUPLED), 0.03)
