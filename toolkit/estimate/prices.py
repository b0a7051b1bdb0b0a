"""Which state formats are offered and recommended, by what they were measured to add to the loss."""

from __future__ import annotations

from toolkit.optim import Rule, find_rule

DEFAULT_FORMAT = "8bit"
EXACT_FORMAT = "fp32"
_BOUND = {DEFAULT_FORMAT: 0.003}
_BOUND_OF_OTHERS = 0.01  # nats


def offered(optimizer: str, state_format: str) -> bool:
    """Whether a format is offered for an optimizer: those smaller than 8 bits where their price in loss is measured."""
    made = find_rule(optimizer)
    return made is None or state_format in (EXACT_FORMAT, DEFAULT_FORMAT) or state_format in made.rule.loss_price


def missed_bound(rule: type[Rule], state_format: str) -> float | None:
    """The bound in nats that the measured price of a format misses, None where it holds it or was not measured.

    A price holds its bound where it is not above it, or not above twice its standard error.
    """
    more, error = rule.loss_price.get(state_format, (0.0, 0.0))
    bound = _BOUND.get(state_format, _BOUND_OF_OTHERS)
    return bound if more > max(bound, error) else None


def default_format(optimizer: str) -> str:
    """The state format that is recommended where none is asked for; of an optimizer that is no rule, its only one."""
    made = find_rule(optimizer)
    return EXACT_FORMAT if made is None or missed_bound(made.rule, DEFAULT_FORMAT) is not None else DEFAULT_FORMAT
