"""One optimizer class that runs any rule with any state format, in a plain PyTorch loop or under ZeRO."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from toolkit.errors import UserError, nearest
from toolkit.optim.components import whole_dim
from toolkit.optim.rule import Rule, check_component
from toolkit.optim.step import StepFunction, step_function
from toolkit.state.codecs import BLOCK, FORMATS, Codec, codec_for

RULES: dict[str, type[RuleOptimizer]] = {}
"""Every optimizer that `as_optimizer` made, by the name that `optimizer.type` of a DeepSpeed JSON selects."""

_OPTIONS: dict[str, Any] = {"state_format": "8bit", "compile": True}
"""Constructor keywords that belong to the optimizer, not to the rule, with their defaults."""


class RuleOptimizer(torch.optim.Optimizer):
    """Runs `rule` on every parameter. Subclasses come from `as_optimizer`.

    Args:
        params: tensors, or groups of them as in torch.optim; `toolkit.optim.param_groups(model)` makes groups by
            component. A group may set any hyper-parameter, `component` and `state_format` for itself.
        state_format: "fp32", "8bit", or a mapping from state to one of these; states that a mapping leaves out
            are "8bit". 1-D tensors always keep fp32 state.
        compile: run the step through torch.compile. If that fails, a warning says why and the same step runs
            eagerly.
        **hyper: the fields of `rule`.

    The state of a tensor of n elements is kept in ceil(n / 256) blocks: per state a tensor [blocks, 256] of
    codes (key: the state's name) and, where compressed, fp32 scales [blocks, 1] (key: `<state>.scale`). The
    step count lives there too (key `step`), because under ZeRO one training step is many calls of `step()`.

    Raises:
        UserError: a bad hyper-parameter, state format or component, in one sentence.
    """

    rule: ClassVar[type[Rule]]
    _allocate_only: ClassVar[bool] = False

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        options = _bind(type(self), args, kwargs)
        own = {key: options[key] for key in _OPTIONS}
        hyper = {key: value for key, value in options.items() if key not in _OPTIONS}
        rule = self.rule.parse(hyper, where=type(self).__name__)
        rule.check_ready()
        super().__init__(params, dict(rule) | own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: settles its component, rate scale and state formats, and sets 1-D tensors apart.

        A group that mixes 1-D tensors (fp32 state) with others becomes two: under ZeRO a group is flattened
        into one tensor, which can have one format only.
        """
        group = dict(param_group)
        group["params"] = _as_list(group["params"])
        component = group.setdefault("component", "other")
        check_component(component)
        merged = self.defaults | {k: v for k, v in group.items() if k in self.rule.model_fields}
        where = f"{type(self).__name__}, parameter group {len(self.param_groups)}"
        rule = self.rule.parse(_fields(self.rule, merged), where=where)
        for key, value in rule.for_component(component).items():
            group.setdefault(key, value)
        group.setdefault("lr_scale", 1.0)
        wanted = group.get("state_format", self.defaults["state_format"])
        group["state_format"] = state_formats(self.rule, wanted, where=where)
        plain = dict.fromkeys(group["state_format"], "fp32")
        small: list[Any] = []
        large: list[Any] = []
        for item in group["params"]:
            tensor = item[1] if isinstance(item, tuple) else item  # torch takes (name, tensor) pairs too
            (small if whole_dim(tensor) <= 1 else large).append(item)
        if small and large and group["state_format"] != plain:
            super().add_param_group(group | {"params": large})
            super().add_param_group(group | {"params": small, "state_format": plain})
        else:
            super().add_param_group(group | ({"state_format": plain} if small and not large else {}))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            scalars: dict[tuple[int, torch.device], tuple[tuple[str, ...], Tensor]] = {}
            codecs = self.codecs(group)
            for parameter in group["params"]:
                if parameter.grad is None or parameter.numel() == 0:
                    continue
                state = self._allocate(parameter, codecs)
                if self._allocate_only:
                    continue
                state["step"] += 1
                key = (state["step"], parameter.device)
                if key not in scalars:
                    scalars[key] = self._scalars(group, *key)
                names, values = scalars[key]
                function = step_function(self.rule, names, tuple(codecs.values()))
                parts = [state[name] for name in state_keys(codecs)]
                _apply(function, group["compile"], parameter, values, parts)
        return loss

    def codecs(self, group: Mapping[str, Any]) -> dict[str, type[Codec]]:
        """The codec of each state in this parameter group."""
        formats = group["state_format"]
        return {s.name: codec_for(formats[s.name], signed=s.signed) for s in self.rule.states}

    def _allocate(self, parameter: Tensor, codecs: Mapping[str, type[Codec]]) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            # Two at least: the compiled step takes no fewer.
            blocks = max(-(-parameter.numel() // BLOCK), 2)
            state["step"] = 0
            for key, part in _parts(codecs):
                state[key] = torch.zeros(blocks, part.per_block, dtype=part.dtype, device=parameter.device)
        return state

    def _scalars(self, group: Mapping[str, Any], t: int, device: torch.device) -> tuple[tuple[str, ...], Tensor]:
        rule = self._group_rule(group)
        named = rule.scalars(t)
        values = torch.tensor(list(named.values()), dtype=torch.float32)
        return tuple(named), values.to(device, non_blocking=True)

    def _group_rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule with this group's hyper-parameters as they stand now (schedulers write to groups)."""
        fields = _fields(self.rule, group)
        fields["lr"] = float(fields["lr"]) * group["lr_scale"]
        return self.rule.parse(fields, where=f"{type(self).__name__}, group {group['component']!r}")

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
        """Values worth logging after the latest step (AMCS: alpha); empty before the first."""
        # Not by way of groups: ZeRO-3 empties them between steps.
        t = max((held["step"] for held in self.state.values()), default=0)
        return self._group_rule(self.param_groups[0]).report(t) if t else {}

    def state_bytes(self) -> dict[str, int]:
        """Bytes held per state on this process, scales counted with their state."""
        total = {state.name: 0 for state in self.rule.states}
        for held in self.state.values():
            for key, value in held.items():
                if isinstance(value, Tensor):
                    total[key.split(".")[0]] += value.untyped_storage().nbytes()
        return total

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its dtype: torch casts state to the parameter's, codes included.

        Raises ValueError when a saved state does not have the shape and dtype that this optimizer keeps.
        """
        for own, group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if group["state_format"] != own["state_format"]:
                raise ValueError(
                    f"the saved optimizer keeps state_format {group['state_format']}, this one {own['state_format']}"
                )
        super().load_state_dict(state_dict | {"state": {}})
        saved = state_dict["state"]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        here = [(p, self.codecs(group)) for group in self.param_groups for p in group["params"]]
        for number, (parameter, codecs) in zip(numbers, here, strict=True):
            if number not in saved:
                continue
            self.state.pop(parameter, None)
            state = self._allocate(parameter, codecs)
            for key, value in state.items():
                given = saved[number].get(key)
                if isinstance(value, Tensor):
                    if given is None or given.shape != value.shape or given.dtype != value.dtype:
                        found = f"{given.dtype} {list(given.shape)}" if given is not None else "nothing"
                        raise ValueError(
                            f"saved optimizer state {key!r} of parameter {number} is {found}, but this "
                            f"optimizer keeps {value.dtype} {list(value.shape)}; was it saved with another "
                            "state_format or model?"
                        )
                    value.copy_(given)
                else:
                    state[key] = int(given)


def as_optimizer(rule: type[Rule]) -> type[RuleOptimizer]:
    """The optimizer class for `rule`, named after it without "Rule", and registered under that name."""
    name = rule.__name__.removesuffix("Rule")
    parameters = [inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    defaults = {key: field.get_default() for key, field in rule.model_fields.items()} | _OPTIONS
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


def check_settings(name: str, params: Mapping[str, Any]) -> None:
    """Check `optimizer.params` of a JSON for the rule `name` without building anything.

    Values "auto" (filled in later by a trainer) are passed over, and what only the run knows may be missing.
    Raises UserError with one sentence.
    """
    optimizer = find_rule(name)
    assert optimizer is not None, name
    options = _bind(optimizer, (), {k: v for k, v in params.items() if v != "auto"})
    hyper = {key: value for key, value in options.items() if key not in _OPTIONS}
    optimizer.rule.parse(hyper, where=name)
    state_formats(optimizer.rule, options["state_format"], where=name)


def state_formats(rule: type[Rule], wanted: str | Mapping[str, str], *, where: str) -> dict[str, str]:
    """The format of every state of `rule`, from one name or a mapping. Raises UserError."""
    names = [state.name for state in rule.states]
    if not isinstance(wanted, (str, Mapping)):
        raise UserError(f"{where}: state_format is {wanted!r}, but must be a name or a mapping from state to name")
    given = dict.fromkeys(names, wanted) if isinstance(wanted, str) else dict(wanted)
    for state in given:
        if state not in names:
            raise UserError(
                f"{where}: state_format names the unknown state {state!r}; its states are "
                f"{', '.join(names)}.{nearest(state, names)}"
            )
    for value in given.values():
        if str(value) not in FORMATS:
            raise UserError(
                f"{where}: state_format {value!r} is unknown; known are {', '.join(FORMATS)}."
                f"{nearest(str(value), FORMATS)}"
            )
    return {name: given.get(name, _OPTIONS["state_format"]) for name in names}


def state_keys(codecs: Mapping[str, type[Codec]]) -> list[str]:
    """Keys of the state tensors, in the order that the step takes them."""
    return [key for key, _ in _parts(codecs)]


def _parts(codecs: Mapping[str, type[Codec]]) -> Iterator[tuple[str, Any]]:
    for state, codec in codecs.items():
        for part in codec.parts:
            yield (f"{state}.{part.suffix}" if part.suffix else state), part


def _apply(function: StepFunction, compiled: bool, parameter: Tensor, scalars: Tensor, parts: list[Tensor]) -> None:
    """Run the step over one tensor of any size and layout.

    Whole blocks are viewed in place. A tensor that ends in the middle of a block goes through a padded copy of
    its last two blocks (three if one would remain, since the compiled step takes no fewer than two).
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise UserError("sparse gradients are not supported; use dense embeddings (sparse=False)")
    theta = parameter.detach().reshape(-1)
    g = gradient.detach().reshape(-1)
    rows = parts[0].shape[0]
    whole = theta.numel() == rows * BLOCK
    padded_rows = 0 if whole else (rows if rows - 2 < 2 else 2)
    head = rows - padded_rows
    if head:
        main = slice(0, head * BLOCK)
        view = (head, BLOCK)
        function(compiled, theta[main].view(view), g[main].view(view), scalars, *(p[:head] for p in parts))
    if padded_rows:
        tail = slice(head * BLOCK, None)
        size = theta.numel() - head * BLOCK
        padded_theta, padded_g = theta.new_zeros(padded_rows * BLOCK), g.new_zeros(padded_rows * BLOCK)
        padded_theta[:size], padded_g[:size] = theta[tail], g[tail]
        view = (padded_rows, BLOCK)
        tails = (p[head:] for p in parts)
        function(compiled, padded_theta.view(view), padded_g.view(view), scalars, *tails)
        theta[tail] = padded_theta[:size]
    if theta.data_ptr() != parameter.data_ptr():
        parameter.copy_(theta.view_as(parameter))


def _bind(optimizer: type[RuleOptimizer], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    known = [key for key in inspect.signature(optimizer).parameters if key != "params"]
    positional = dict(zip(known, args, strict=False))
    if len(args) > len(known) or positional.keys() & kwargs.keys():
        raise TypeError(f"{optimizer.__name__} got a hyper-parameter twice or too many of them: {args}, {dict(kwargs)}")
    given = positional | dict(kwargs)
    for key in given:
        if key not in known:
            raise UserError(
                f"{optimizer.__name__}: unknown hyper-parameter {key!r}; known are {', '.join(known)}."
                f"{nearest(key, known)}"
            )
    options = dict(_OPTIONS) | given
    if not isinstance(options["compile"], bool):
        raise UserError(f"{optimizer.__name__}: compile must be true or false, not {options['compile']!r}")
    return options


def _fields(rule: type[Rule], values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in rule.model_fields if key in values}


def _as_list(params: Any) -> list[Any]:
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, Iterable) and not isinstance(params, (set, frozenset, str)):
        return list(params)
    raise UserError(f"params must be a tensor or an ordered collection of tensors, not {type(params).__name__}")
