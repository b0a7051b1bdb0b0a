"""What the optimizer keeps for every parameter between steps, from a DeepSpeed JSON and a model on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from toolkit.config import DeepSpeedSettings
from toolkit.errors import UserError
from toolkit.optim import Rule, param_groups
from toolkit.records import categories as c
from toolkit.state.codecs import BLOCK
from toolkit.state.layout import Layout, State
from toolkit.state.sharding import lines

_PROBE = 256
"""Elements of the flat tensor that an optimizer of torch is tried on."""


@dataclass(frozen=True)
class Group:
    """Parameters, by number, whose optimizer state takes the same bytes an element.

    `per_element`: bytes by category of remainder and states. `master`: of fp32 master weights, 0 without. `released`:
    whether their gradients are used and freed during the backward pass. `whole`: bytes by category of states of rows
    and columns, which every rank has of whole parameters. `together`: the rule, where it looks at more than single
    elements or has factored states, and `factored`: how many of these.
    """

    numbers: tuple[int, ...]
    per_element: Mapping[str, float]
    master: float
    released: bool
    whole: Mapping[str, float] = field(default_factory=dict)
    together: type[Rule] | None = None
    factored: int = 0


@dataclass(frozen=True)
class OptimizerMemory:
    """All groups, whether the optimizer is one of this package's, and the step's own needs.

    `step_per_element`: bytes of temporaries per element of the shard that is stepped on, for DeepSpeed's and torch's
    optimizers that are not fused.
    """

    groups: tuple[Group, ...]
    ours: bool
    step_per_element: float
    remarks: tuple[str, ...] = ()

    @cached_property
    def released(self) -> frozenset[int]:
        """The parameters whose gradients are used during the backward pass."""
        return frozenset(number for group in self.groups if group.released for number in group.numbers)


def optimizer_memory(model: nn.Module, ds: DeepSpeedSettings) -> OptimizerMemory:
    """What the optimizer that `ds` names keeps for the parameters of `model`.

    A rule's states are counted from its declaration, an optimizer of torch is tried on one small tensor.

    Raises:
        UserError: no optimizer is named, or it is one that cannot be counted.
    """
    rule = ds.rule
    if ds.optimizer is None:
        raise UserError("the DeepSpeed JSON has no optimizer.type; it must name the optimizer to train with.")
    numbers = {id(p): number for number, p in enumerate(model.parameters())}
    # DeepSpeed keeps fp32 weights beside the model's; without ZeRO only if the model's are narrower.
    masters = 4.0 if ds.stage or ds.dtype != torch.float32 else 0.0
    if rule is None:
        states, working = _probe(ds.optimizer, ds.params, ds.offload_optimizer != "none")
        every = tuple(numbers[id(p)] for p in model.parameters() if p.requires_grad)
        remarks = () if working is not None else (f"temporaries of {ds.optimizer}'s step are not known.",)
        return OptimizerMemory((Group(every, states, masters, False),), False, working or 0.0, remarks)
    params = rule.rule.supply(ds.params, total_steps=1)
    optimizer = rule(param_groups(model, [p for p in model.parameters() if p.requires_grad]), **params)
    whole = ds.stage > 0 and optimizer.holds_weights()
    groups = []
    for group in optimizer.param_groups:
        layout = optimizer.layout(group, ds.dtype if whole else torch.float32)
        matrices = all(p.dim() > 1 and p.numel() % BLOCK == 0 for p in group["params"])
        kind = optimizer.rule_of(group)
        groups.append(
            Group(
                numbers=tuple(numbers[id(p)] for p in group["params"]),
                per_element=_per_element(layout),
                master=0.0 if whole else masters,
                released=optimizer.defaults["release_gradients"] and matrices,
                whole=_of_lines(optimizer.whole(group), [tuple(p.shape) for p in group["params"]]),
                together=kind if optimizer.steps_together(group) else None,
                factored=len(layout.factored),
            )
        )
    return OptimizerMemory(tuple(groups), True, 0.0)


def _per_element(layout: Layout) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, spec in layout.specs:
        category = c.category_of_state(key)
        found[category] = found.get(category, 0.0) + spec.bytes_per_element
    return found


def _of_lines(states: Sequence[State], shapes: Sequence[tuple[int, ...]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for state in states:
        category = c.category_of_state(state.name)
        found[category] = found.get(category, 0.0) + 4.0 * sum(lines(shape, str(state.of)) for shape in shapes)
    return found


# DeepSpeed's own, which need a compiler or a GPU to be tried.
_DEEPSPEED: dict[str, tuple[str, ...]] = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adagrad": ("exp_avg_sq",),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
}


def _probe(kind: str, params: Mapping[str, Any], on_host: bool) -> tuple[dict[str, float], float | None]:
    """Bytes of fp32 state per element by name, and of the step's temporaries (None: not known)."""
    name = kind.lower()
    options = {key: value for key, value in params.items() if key not in ("torch_adam", "adam_w_mode")}
    if name in _DEEPSPEED and not (name in ("adam", "adamw") and params.get("torch_adam")):
        return dict.fromkeys(_DEEPSPEED[name], 4.0), 0.0
    made: Any = getattr(torch.optim, {"adam": "AdamW", "adamw": "AdamW"}.get(name, kind), None)
    if made is None:
        raise UserError(
            f"the memory of optimizer.type {kind!r} is not known: known are this package's rules, DeepSpeed's "
            f"{', '.join(_DEEPSPEED)} and the classes of torch.optim."
        )
    # ZeRO steps on flat tensors; what an optimizer keeps may depend on that.
    weight = nn.Parameter(torch.zeros(_PROBE))
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer = made([weight], **options)
        optimizer.step()
    except Exception as error:
        raise UserError(f"the memory of optimizer.type {kind!r} is not known: it cannot be tried: {error}") from None
    states = {
        key: value.numel() * value.element_size() / _PROBE
        for key, value in optimizer.state[weight].items()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    }
    return states, 0.0 if params.get("fused") or on_host else None
