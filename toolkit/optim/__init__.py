"""Optimizers with compressed state: the rules of `rules/`, and whatever rule a user adds; all are in `RULES`."""

from toolkit.optim.arguments import OPTIONS
from toolkit.optim.components import component_of, param_groups
from toolkit.optim.optimizer import RULES, RuleOptimizer, as_optimizer, check_params, find_rule
from toolkit.optim.rule import COMPONENTS, Beta, Matrix, Mean, NonNegative, Rule, State
from toolkit.optim.rules import COMPARED, RECOMMENDED
from toolkit.optim.rules.amcs import AMCS, AMCSRule
from toolkit.optim.rules.soam import SOAM, SOAMRule

__all__ = [
    "AMCS",
    "COMPARED",
    "COMPONENTS",
    "OPTIONS",
    "RECOMMENDED",
    "RULES",
    "SOAM",
    "AMCSRule",
    "Beta",
    "Matrix",
    "Mean",
    "NonNegative",
    "Rule",
    "RuleOptimizer",
    "SOAMRule",
    "State",
    "as_optimizer",
    "check_params",
    "component_of",
    "find_rule",
    "param_groups",
]
