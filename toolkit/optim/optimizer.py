"""One optimizer class that runs any rule with any state format, in a plain PyTorch loop or under ZeRO."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.arguments import OPTIONS, as_list, bind, check_tensor, fields, separate
from toolkit.optim.joined import Joined
from toolkit.optim.kernel import step_function
from toolkit.optim.purity import check_declared, check_pure, with_defaults
from toolkit.optim.reporting import Copied, Told, told_later
from toolkit.optim.rule import Rule, State, all_states, check_component, looks_at
from toolkit.optim.saved import Settled, check_settled, fill, settled
from toolkit.optim.scalars import Known, in_one_tensor
from toolkit.optim.schedules import check_setting, moves, value_at
from toolkit.optim.statistics import Alone, Member, Parameter, Share, small_states
from toolkit.optim.streaming import TensorStep, check_gradient
from toolkit.optim.together import Found, step_together
from toolkit.state.codecs import BLOCK, FACTORED
from toolkit.state.files import StateFiles
from toolkit.state.layout import REMAINDER, Layout, check_weights, kept_whole, layout, state_formats, state_of
from toolkit.state.remainders import MASTER, Remainder
from toolkit.state.sharding import Fragment, blocks_of, whole_shape

RULES: dict[str, type[RuleOptimizer]] = {}
"""Every optimizer that `as_optimizer` made, by the name that `optimizer.type` of a DeepSpeed JSON selects."""


class RuleOptimizer(torch.optim.Optimizer):
    """Runs `rule` on every parameter. Subclasses come from `as_optimizer`.

    Args:
        params: tensors, or groups of them as in torch.optim; `toolkit.optim.param_groups(model)` makes groups by
            component. A group may set any hyper-parameter, `component`, `state_format` and `weights` for itself.
        state_format: "fp32", "8bit", "compact", "minimal", "factored", "lean", "leanest", or a mapping from state to
            "fp32", "8bit", "4bit" or "2bit", or for a second moment "factored"; states that a mapping leaves out are
            "8bit". 1-D tensors always keep fp32 state.
        weights: how bf16 tensors keep the bits that rounding drops: "bf16+8", "bf16+16", "bf16+4", as state; "bf16":
            not at all. Other types are whole by themselves. "fp32" leaves them to DeepSpeed's fp32 master weights.
        seed: of the stochastic rounding of "bf16+8", "bf16+4" and "bf16".
        release_gradients: under ZeRO, update weights during the backward pass (`toolkit.zero`).
        compile: run the step as Inductor compiles it. If that fails, a warning says why and the same step runs
            eagerly.
        **hyper: the fields of `rule`.

    The state of a tensor of n elements is kept in ceil(n / 256) blocks; `toolkit.state.layout` names its tensors. The
    step count lives there too (key `step`), because under ZeRO one training step is many tensors' steps.

    Weights may be fp32, bf16, fp16 or fp64 (updated in fp64, from states in fp32).

    Raises:
        UserError: a bad hyper-parameter, state format, component or type of tensor, in one sentence.
    """

    rule: ClassVar[type[Rule]]
    settled: tuple[Settled, ...] = ()
    """What the groups were made with and state is kept in; empty in a copy."""
    files: StateFiles | None = None
    """Where the state of tensors on the host is made, instead of in memory."""
    found: Found = MappingProxyType({})
    """What the latest step found; empty in a copy."""
    _allocate_only: ClassVar[bool] = False

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        options = bind(type(self), args, kwargs)
        own, hyper = separate(options)
        super().__init__(params, dict(self.rule.parse(hyper, where=type(self).__name__)) | own)

    def rule_of(self, group: Mapping[str, Any]) -> type[Rule]:
        """The rule that runs in this parameter group: `rule`, or a variant of it."""
        return self.rule.variant(group, component=group["component"], matrix=group["matrix"])

    def rules(self) -> tuple[type[Rule], ...]:
        """The rules of all parameter groups, each once."""
        return tuple(dict.fromkeys(self.rule_of(group) for group in self.param_groups))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: settles its component, rate scale and formats, and sets some tensors apart.

        Under ZeRO a group is flattened into one tensor, which has one format and one grid of blocks. So a group that
        mixes 1-D tensors (fp32 state) with others becomes two, and a matrix whose size is no multiple of a block is a
        group of its own: no block belongs to two parameters, and the grid is the same at every stage.
        """
        group = dict(param_group)
        group["params"] = as_list(group["params"])
        check_component(group.setdefault("component", "other"))
        where = f"{type(self).__name__}, parameter group {len(self.param_groups)}"
        small, large, alone = list[Any](), list[Any](), list[Any]()
        for item in group["params"]:
            name, tensor = item if isinstance(item, tuple) else (None, item)  # torch takes (name, tensor) pairs too
            check_tensor(tensor, f"{where}, parameter {name!r}" if name else where)
            shape = whole_shape(tensor)
            (small if len(shape) <= 1 else alone if shape.numel() % BLOCK else large).append(item)
        group.setdefault("matrix", True)
        made = [self._settle(group | {"params": some}, where) for some in (large, *([one] for one in alone)) if some]
        if small or not made:
            made.append(self._settle(group | {"params": small, "matrix": False}, where, exact=bool(small)))
        for one in made:
            super().add_param_group(one)
            self.settled += (settled(one),)

    def _settle(self, group: dict[str, Any], where: str, exact: bool = False) -> dict[str, Any]:
        """A parameter group with all that its rule and the options settle; `exact`: state is fp32."""
        settings = self.defaults | fields(self.rule, group)
        kind = self.rule.variant(settings, component=group["component"], matrix=group["matrix"])
        rule = kind.parse(fields(kind, settings), where=where)
        rule.check_ready()
        check_pure(rule)
        for key, value in rule.for_component(group["component"]).items():
            group.setdefault(key, value)
        try:
            group["lr_scale"] = check_setting(group.get("lr_scale", 1.0), "lr_scale", most=math.inf)
        except ValueError as error:
            raise UserError(f"{where}: lr_scale {error}") from None
        if moves(group["lr_scale"]) and settings.get("total_steps") is None:
            raise UserError(f"{where}: an lr_scale that moves over the training needs total_steps")
        known = all_states([*self.rule.variants(self.defaults), *self.rule.variants(settings)])
        wanted = group.get("state_format", self.defaults["state_format"])
        group["state_format"] = state_formats(kind.states, wanted, known=known, where=where)
        check_weights(group.setdefault("weights", self.defaults["weights"]), where=where)
        if (group["weights"] == MASTER) != (self.defaults["weights"] == MASTER):
            raise UserError(
                f"{where}: weights is {group['weights']!r}, but {self.defaults['weights']!r} for the optimizer; either "
                f"all groups have {MASTER!r} weights or none"
            )
        if exact:
            group["state_format"] = dict.fromkeys(group["state_format"], "fp32")
            group["weights"] = MASTER if group["weights"] == MASTER else Remainder(16).name
        return group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.defaults["release_gradients"]:
            raise UserError(
                f"{type(self).__name__}: release_gradients works under DeepSpeed's ZeRO stages 1, 2 and 3 only, "
                "through toolkit.initialize or toolkit.register"
            )
        check_settled(self)
        known: Known = {}
        apart = Joined()
        together: list[tuple[Tensor, Member]] = []
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                check_gradient(parameter.grad)
        for group in self.param_groups:
            together_here, blocks = self.steps_together(group), 0
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    begun = self.begin(group, parameter, known)
                    gradient = parameter.grad.detach().reshape(-1)
                    if together_here:
                        own = Parameter(tuple(parameter.shape), group["component"])
                        whole = Fragment(0, 0, own.numel, 0)
                        [small] = small_states(self.whole(group), [own], self.state[parameter], parameter.device)
                        if begun is not None:  # else state is only allocated
                            share = Share(whole, gradient, blocks)
                            together.append((parameter, Member(own, begun, small, [whole], share)))
                    elif begun is not None:
                        apart.add(begun, parameter, gradient, blocks)
                blocks += blocks_of(parameter.numel())
        apart.finish()
        self.found = step_together([member for _, member in together], torch.ones(()), Alone())
        for parameter, member in together:
            member.step.write_back(parameter)
        return loss

    def begin(self, group: dict[str, Any], tensor: Tensor, known: Known | None = None) -> TensorStep | None:
        """Count one step of `tensor`, a member of `group`; None while state is only allocated.

        `known`: a dict that the calls of one training step share, for what they have in common.
        """
        state = self.state[tensor] or self.allocate(tensor, self.layout(group, tensor.dtype))
        if self._allocate_only:
            return None
        state["step"] += 1
        known = {} if known is None else known
        kind = (id(group), state["step"], tensor.dtype, tensor.device)
        if kind not in known:
            known[kind] = self._kind(group, *kind[1:], known)
        make, keys = known[kind]
        return make(theta=tensor.detach().reshape(-1), parts=[state[key] for key in keys])

    def _kind(
        self, group: Mapping[str, Any], t: int, dtype: torch.dtype, device: torch.device, known: Known
    ) -> tuple[Callable[..., TensorStep], list[str]]:
        """What tensors of a group, dtype and device have in common at step `t`, and the keys of what is stored."""
        number = next(index for index, own in enumerate(self.param_groups) if own is group)
        if (number, t, device) not in known:
            scalars = {i: self._group_rule(own, t).scalars(t) for i, own in enumerate(self.param_groups)}
            known.update(in_one_tensor(scalars, t, device))
        names, numbers = known[number, t, device]
        kept = self.layout(group, dtype)
        opened = [key for key, _ in kept.opened.specs]
        make = functools.partial(
            TensorStep,
            function=step_function(self.rule_of(group), names, kept.opened),
            compiled=group["compile"],
            scalars=numbers,
            seed=self.defaults["seed"] * len(self.param_groups) + number,
            step=t,
            factored={one.name: opened.index(one.name) for _, one in kept.factored},
        )
        return make, [key for key, _ in kept.specs]

    def layout(self, group: Mapping[str, Any], dtype: torch.dtype) -> Layout:
        """What is stored for a tensor of `dtype` in this parameter group."""
        return _layout(self.rule_of(group), tuple(group["state_format"].items()), group["weights"], dtype)

    def holds_weights(self) -> bool:
        """Whether bf16 weights are stepped on themselves, with a remainder or without: there are no master weights."""
        dtypes = {getattr(p, "ds_tensor", p).dtype for group in self.param_groups for p in group["params"]}
        return self.defaults["weights"] != MASTER and torch.bfloat16 in dtypes

    def forget_remainders(self) -> None:
        """After weights have been replaced: their bf16 values are all there is."""
        for held in self.state.values():
            for key, value in held.items():
                if state_of(key) == REMAINDER:
                    value.zero_()

    def allocate(self, tensor: Tensor, kept: Layout) -> dict[str, Any]:
        """The state of `tensor`, made of zeros if there is none yet."""
        state = self.state[tensor]
        if not state:
            state.update({"step": 0} | kept.allocate(tensor.numel(), tensor.device, self.files))
        return state

    def _group_rule(self, group: Mapping[str, Any], t: int) -> Rule:
        """The rule with this group's hyper-parameters as they are at step `t` (schedulers write to groups)."""
        rule = self.rule_of(group)
        values = fields(rule, group)
        values["lr"] = float(values["lr"]) * value_at(group["lr_scale"], t, values.get("total_steps"))
        return rule.parse(values, where=f"{type(self).__name__}, group {group['component']!r}")

    @staticmethod
    @contextmanager
    def allocating() -> Iterator[None]:
        """Within this context `step()` of every instance allocates state and changes nothing else.

        For wrappers that call `step()` on zero gradients at start-up only to make the state exist: it would
        count as a training step and decay the weights.
        """
        RuleOptimizer._allocate_only = True
        try:
            yield
        finally:
            RuleOptimizer._allocate_only = False

    def report(self) -> dict[str, float]:
        """Values worth logging after the latest step (AMCS: alpha), of the first group of each rule, and of the first
        of each component what was found; empty before. Where something was found the host waits for the device."""
        return self.report_later(lambda found: found.cpu)()

    def report_later(self, copied: Copied) -> Told:
        """What `report` gives of the latest step, to be called once the device has made it; see `told_later`."""
        # Not by way of groups: ZeRO-3 empties them between steps.
        t = max((held["step"] for held in self.state.values()), default=0)
        rules = [functools.partial(self._group_rule, group, t) for group in self.param_groups]
        kinds = [(self.rule_of(group), group["component"]) for group in self.param_groups]
        groups = [(*kind, rule) for kind, rule in zip(kinds, rules, strict=True)]
        return told_later(groups if t else [], self.found, t, copied)

    def state_bytes(self) -> dict[str, int]:
        """Bytes held on this process by state, scales counted with their state, and by remainders of weights."""
        total = {state.name: 0 for state in all_states(self.rules())}
        for held in self.state.values():
            for key, value in held.items():
                if isinstance(value, Tensor):
                    name = state_of(key)
                    total[name] = total.get(name, 0) + value.untyped_storage().nbytes()
        return total

    def whole(self, group: Mapping[str, Any]) -> tuple[State, ...]:
        """The states of a parameter group that are of no single elements, which under ZeRO every rank holds whole."""
        return kept_whole(self.rule_of(group).states, group["state_format"])

    def whole_states(self) -> set[str]:
        """Names of those of all groups."""
        return {state.name for group in self.param_groups for state in self.whole(group)}

    def whole_bytes(self) -> int:
        """Bytes of them."""
        names = self.whole_states()
        return sum(
            x.untyped_storage().nbytes() for held in self.state.values() for key, x in held.items() if key in names
        )

    def steps_together(self, group: Mapping[str, Any]) -> bool:
        """Whether a step of a parameter group is one of whole parameters, of all such groups together."""
        return bool(self.rule_of(group).statistics) or FACTORED in group["state_format"].values()

    def looks_at(self) -> str:
        """What a step looks at beside single elements, for sentences; empty if at nothing else."""
        factored = (
            name for group in self.param_groups for name, kept in group["state_format"].items() if kept == FACTORED
        )
        found = [looks_at(self.rules()), *(f"rows and columns of {name}" for name in dict.fromkeys(factored))]
        return ", ".join(one for one in found if one)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its dtype: torch casts state to the parameter's, codes included.

        Options that the saved groups lack, an older version's, stay as they are here. Raises ValueError when a saved
        state does not have the shape and dtype that this optimizer keeps, or belongs to another variant of the rule.
        """
        groups = []
        for own, group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for key in ("state_format", "weights"):
                if group.get(key) != own[key]:
                    raise ValueError(f"the saved optimizer keeps {key} {group.get(key)}, this one {own[key]}")
            groups.append({**own, **group})
            then, now = self.rule_of(groups[-1]).__name__, self.rule_of(own).__name__
            if then != now:
                raise ValueError(f"the saved optimizer runs {then}, this one {now}: give it the options of that one")
        groups += state_dict["param_groups"][len(groups) :]  # torch says that there are too many
        matrices = [group["matrix"] for group in self.param_groups]
        super().load_state_dict(state_dict | {"state": {}, "param_groups": groups})
        for own, matrix in zip(self.param_groups, matrices, strict=True):
            own["matrix"] = matrix  # whatever the saved ones say
        saved = state_dict["state"]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        here = [(p, group) for group in self.param_groups for p in group["params"]]
        for number, (parameter, group) in zip(numbers, here, strict=True):
            if number not in saved:
                continue
            self.state.pop(parameter, None)
            state = self.allocate(parameter, self.layout(group, parameter.dtype))
            if parameter.dim() > 1:
                whole = [Parameter(tuple(parameter.shape), group["component"])]
                small_states(self.whole(group), whole, state, parameter.device)
            else:  # under ZeRO one tensor holds those of several parameters
                small = [one.name for one in self.whole(group) if one.name in saved[number]]
                state |= {name: saved[number][name].to(parameter.device, copy=True) for name in small}
            fill(state, saved[number], number, parameter.dtype)


@functools.cache
def _layout(rule: type[Rule], formats: tuple[tuple[str, str], ...], weights: str, dtype: torch.dtype) -> Layout:
    return layout(rule.states, dict(formats), weights, dtype)


def as_optimizer(rule: type[Rule]) -> type[RuleOptimizer]:
    """The optimizer class for `rule`, named after it without "Rule", and registered under that name.

    Raises UserError for a rule that is not elementwise (`purity.py`); one without defaults is tried when it is made.
    """
    given = {key: field.get_default() for key, field in rule.model_fields.items() if not field.is_required()}
    kinds = list(dict.fromkeys([rule, *rule.variants(given)]))
    for kind in kinds:
        check_declared(kind)
        made = with_defaults(kind)
        if made is not None:
            check_pure(made)
    all_states(kinds)
    name = rule.__name__.removesuffix("Rule")
    parameters = [inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    defaults = {key: field.get_default() for key, field in rule.model_fields.items()} | OPTIONS
    parameters += [
        inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for key, default in defaults.items()
    ]
    doc = f"{inspect.getdoc(rule)}\n\n{inspect.getdoc(RuleOptimizer)}"
    body = {"rule": rule, "__doc__": doc, "__module__": rule.__module__}
    optimizer = type(name, (RuleOptimizer,), body | {"__signature__": inspect.Signature(parameters)})
    RULES[name] = optimizer
    return optimizer


def find_rule(name: str | None) -> type[RuleOptimizer] | None:
    """The registered optimizer called `name`, upper or lower case, or None."""
    return {key.lower(): value for key, value in RULES.items()}.get((name or "").lower())


def check_params(name: str, params: Mapping[str, Any]) -> None:
    """Check `optimizer.params` of a JSON for the rule `name` without building anything.

    Values "auto" (filled in later by a trainer) are passed over, and what only the run knows may be missing.
    Raises UserError with one sentence.
    """
    optimizer = find_rule(name)
    assert optimizer is not None, name
    own, hyper = separate(bind(optimizer, (), {k: v for k, v in params.items() if v != "auto"}))
    rule = optimizer.rule.parse(hyper, where=name)
    state_formats(all_states(rule.variants(dict(rule))), own["state_format"], where=name)
    check_weights(own["weights"], where=name)
