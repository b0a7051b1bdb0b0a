"""DeepSpeed engines that run this package's optimizers.

`compatibility.py` checks what it relies on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import deepspeed.runtime.engine as ds_engine
import deepspeed.runtime.lr_schedules as ds_schedules
import deepspeed.runtime.zero.stage3 as ds_stage3
import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim.lr_scheduler import LRScheduler

from toolkit.errors import UserError
from toolkit.masking import hide_in_logs
from toolkit.models import cpu_matmul
from toolkit.optim import RuleOptimizer, find_rule, param_groups
from toolkit.optim.saved import check_settled
from toolkit.optim.warm import kinds, warm
from toolkit.printable import warn_once
from toolkit.sentences import shown
from toolkit.state.layout import check_dtype, dtype_name
from toolkit.zero import calls, compatibility, nvme, partition, shared_memory
from toolkit.zero.access import link
from toolkit.zero.audit import Audit
from toolkit.zero.changes import ChangeDetector, steps_alone, steps_copies
from toolkit.zero.release_stages import ReleasingZeroOptimizer, ReleasingZeroOptimizer3
from toolkit.zero.shards import shards
from toolkit.zero.stage3 import ShardedZeroOptimizer3
from toolkit.zero.stage12 import ShardedZeroOptimizer
from toolkit.zero.turns import OrderedZeroOptimizer

if TYPE_CHECKING:
    from toolkit.config import DeepSpeedSettings

logger = logging.getLogger("toolkit")

_registered = False


def initialize(
    model: nn.Module,
    config: str | Path | Mapping[str, Any],
    *,
    total_steps: int | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """As `deepspeed.initialize`, with a config that may be a shipped name, and checked whole before use.

    Args:
        model: the module to train; its tree names the components. What `torch.compile(module)` made in it is
            replaced by the module itself, compiled in place, so that parameters keep their names.
        config: the name of a shipped config ("amcs_zero2"), the path of a DeepSpeed JSON, or a dict.
        total_steps: optimizer steps of the run, for rules that need it (AMCS: alpha) and whose
            `optimizer.params` do not say; else it is the scheduler's `total_num_steps`.
        **kwargs: passed on to `deepspeed.initialize`.

    Returns:
        (engine, optimizer, dataloader, lr_scheduler), as `deepspeed.initialize`.

    Raises:
        UserError: one sentence about what is wrong in the model, the config or the parameters.
    """
    from toolkit.config import DeepSpeedSettings, load_config, remarks, validate

    if not isinstance(model, nn.Module):
        raise UserError(f"initialize: model is {shown(model)}, but must be the torch.nn.Module to train.")
    register()
    model = without_compile_wrappers(model)
    origin = config if isinstance(config, str) else "config"
    config = load_config(config)
    if kwargs.get("optimizer") is not None:
        config.pop("optimizer", None)  # DeepSpeed runs the one that is handed over
    # Ranks that share a layer or a sequence are known to the mesh that the caller hands over, not to the JSON.
    own_mesh = kwargs.get("mpu") is not None or kwargs.get("mesh_param") is not None
    validate(config, origin=origin, world_size=None if own_mesh else _world_size(), total_steps=total_steps)
    ds = DeepSpeedSettings.read(config)
    _check_has_optimizer(ds, kwargs, origin)
    for remark in remarks(config):
        warn_once(logger, "%s: %s", origin, remark)
    hide_in_logs(config, logging.getLogger("DeepSpeed"))  # which shows its configuration at level INFO
    if ds.rule:
        section = config["optimizer"]
        section["params"] = ds.rule.rule.supply(section.get("params", {}), total_steps=total_steps)
    calls.check_free(model, zero=bool(ds.stage))
    kwargs.setdefault("model_parameters", [p for p in model.parameters() if p.requires_grad])
    return deepspeed.initialize(model=model, config=config, **kwargs)


def without_compile_wrappers(model: nn.Module) -> nn.Module:
    """`model` with each module that `torch.compile(module)` wrapped in the wrapper's place; it runs compiled as before.

    The wrapper would add "_orig_mod." to the names of all parameters in it, and to those in checkpoints.
    """
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, OptimizedModule) and not isinstance(module, OptimizedModule):
                module._modules[name] = _compiled_in_place(child)
    return _compiled_in_place(model) if isinstance(model, OptimizedModule) else model


def _compiled_in_place(wrapper: OptimizedModule) -> nn.Module:
    module: nn.Module = wrapper._orig_mod
    module._compiled_call_impl = wrapper.dynamo_ctx(module._call_impl)  # as nn.Module.compile does
    return module


def _world_size() -> int | None:
    """Ranks in all, as far as that is known before they have met."""
    if dist.is_initialized():
        return int(dist.get_world_size())
    return int(os.environ["WORLD_SIZE"]) if os.environ.get("WORLD_SIZE", "").isdecimal() else None


def _check_has_optimizer(ds: DeepSpeedSettings, kwargs: Mapping[str, Any], origin: str) -> None:
    if ds.stage in (1, 2) and ds.optimizer is None and kwargs.get("optimizer") is None:
        raise UserError(
            f"{origin}: zero_optimization.stage {ds.stage} shards an optimizer's state, and there is no optimizer; "
            "name one in the JSON's 'optimizer' section, or hand one to initialize as `optimizer`."
        )


def register() -> None:
    """Make a plain `deepspeed.initialize`, and what builds on it, accept this package's optimizers by type.

    On a CPU that is slow at bf16 matrix products they are computed in fp32 from now on (`toolkit.models.cpu_matmul`).

    Raises RuntimeError if the installed DeepSpeed does not have the internals that this relies on.
    """
    global _registered
    if _registered:
        return
    missing = compatibility.incompatibilities()
    if missing:
        raise RuntimeError(
            f"leanstate does not fit DeepSpeed {deepspeed.__version__}: {', '.join(missing)} changed; install "
            "deepspeed>=0.19.8,<0.20"
        )
    partition.install()
    _install_optimizers()
    engine, zero_supports = ds_engine.DeepSpeedEngine, ds_engine.is_zero_supported_optimizer
    configure_basic, configure = engine._configure_basic_optimizer, engine._configure_optimizer
    supports, make_scheduler = engine._is_supported_optimizer, engine._scheduler_from_config
    make_configured = engine._configure_lr_scheduler
    take, load = engine._take_model_step, engine.load_checkpoint

    from toolkit.config.outside import is_outside, outside_optimizer

    def configure_basic_optimizer(self: Any, model_parameters: Any) -> Any:
        rule = find_rule(self.optimizer_name())
        if rule is None and is_outside(self.optimizer_name()):
            return outside_optimizer(self.optimizer_name())(model_parameters, **(self.optimizer_params() or {}))
        if rule is None:
            return configure_basic(self, model_parameters)
        return _build(rule, self, model_parameters)

    def configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        _settle(self)
        _check_model(self, client_optimizer)
        files = nvme.take_over(self) if _runs_rule(self, client_optimizer) else None
        calls.check_sequences(self)
        calls.claim(self)
        # Stage 0 in bf16 steps once on zero gradients when it starts.
        with RuleOptimizer.allocating():
            configure(self, client_optimizer, model_parameters)
        if files is not None:
            self.basic_optimizer.files = files
        _finish(self)
        zero, copies, both = bool(self.zero_optimization()), steps_copies(self), link(self)
        self.leanstate_changes = ChangeDetector(
            self.module, zero=zero, copies=copies, sampled=steps_alone(self), both=both
        )
        self.leanstate_audit = Audit(self, client_optimizer)

    def take_model_step(self: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self, "leanstate_audit"):  # the engine was made before
            return take(self, *args, **kwargs)
        calls.check_alive(self)
        if isinstance(self.basic_optimizer, RuleOptimizer):
            check_settled(self.basic_optimizer)
        self.leanstate_changes.look()
        rates = [group.get("lr", 1.0) for group in self.basic_optimizer.param_groups]
        take(self, *args, **kwargs)
        self.leanstate_changes.stepped()
        self.leanstate_audit.look(self, rates)

    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(self, *args, **kwargs)
        weights_were_loaded(self)
        return loaded

    engine._take_model_step, engine.load_checkpoint = take_model_step, load_checkpoint
    calls.install(engine)

    def scheduler_from_config(self: Any, optimizer: Any) -> Any:
        self._config.scheduler_params = self.scheduler_params() or {}
        return make_scheduler(self, _schedulers_optimizer(self, optimizer))

    def configure_scheduler(self: Any) -> None:
        make_configured(self)
        if isinstance(self.lr_scheduler, LRScheduler) and self.basic_optimizer is not None:
            # Torch warns unless it has seen `step` of this optimizer, which ZeRO does not always go through; the
            # engine steps the optimizer first. Also where the schedule was handed over.
            self.basic_optimizer._opt_called = True

    engine._configure_basic_optimizer = configure_basic_optimizer
    engine._scheduler_from_config, engine._configure_lr_scheduler = scheduler_from_config, configure_scheduler
    engine._configure_optimizer = configure_optimizer
    engine._is_supported_optimizer = lambda self, name: (
        bool(find_rule(name)) or is_outside(name) or supports(self, name)
    )
    ds_engine.is_zero_supported_optimizer = lambda opt: isinstance(opt, RuleOptimizer) or zero_supports(opt)
    shared_memory.leave_out()
    if not torch.accelerator.is_available():
        cpu_matmul.install()
    _registered = True


def _install_optimizers() -> None:
    """Let engines wrap optimizers in this package's ZeRO optimizers: at stage 3, only this package's own."""
    import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401 (subclasses DeepSpeed's, so before)

    stage_3 = ds_stage3.DeepSpeedZeroOptimizer_Stage3

    def make_stage_1_or_2(init_optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        kind: type[OrderedZeroOptimizer] = OrderedZeroOptimizer
        if isinstance(init_optimizer, RuleOptimizer):
            kind = ReleasingZeroOptimizer if init_optimizer.defaults["release_gradients"] else ShardedZeroOptimizer
        return kind(init_optimizer, *args, **kwargs)

    def make_stage_3(module: nn.Module, init_optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        kind: type[Any] = stage_3
        if isinstance(init_optimizer, RuleOptimizer):
            kind = ReleasingZeroOptimizer3 if init_optimizer.defaults["release_gradients"] else ShardedZeroOptimizer3
        return kind(module, init_optimizer, *args, **kwargs)

    ds_engine.DeepSpeedZeroOptimizer = make_stage_1_or_2
    ds_stage3.DeepSpeedZeroOptimizer_Stage3 = make_stage_3


def _schedulers_optimizer(engine: Any, optimizer: Any) -> Any:
    """What the JSON's scheduler is made for.

    DeepSpeed hands its wrapper to every scheduler. Those of torch want a `torch.optim.Optimizer`: the one inside,
    whose groups are the wrapper's own, so that a rate which is set there is the rate of the step.
    """
    if hasattr(ds_schedules, engine.scheduler_name() or ""):
        return optimizer
    return engine.basic_optimizer


def _build(rule: type[RuleOptimizer], engine: Any, model_parameters: Any) -> RuleOptimizer:
    from toolkit.config import DeepSpeedSettings
    from toolkit.config.optimizers import check_combination

    ds = DeepSpeedSettings.read(engine._config._param_dict)
    steps = ds.scheduler_params.get("total_num_steps")
    params = rule.rule.supply(engine.optimizer_params() or {}, total_steps=steps if isinstance(steps, int) else None)
    check_combination(ds, accumulation=engine.gradient_accumulation_steps())
    return rule(param_groups(engine.module, model_parameters), **params)


def _settle(engine: Any) -> None:
    """Put numbers where the JSON's `zero_optimization` says "auto", which DeepSpeed takes for its own defaults."""
    from toolkit.config.automatic import Shape, automatic, settle

    given = engine._config._param_dict
    settled = settle(
        given,
        lambda: Shape.of(engine.module),
        on_gpu=engine.device.type != "cpu",
        world_size=dist.get_world_size(),
    )
    for key in automatic(given):
        setattr(engine._config.zero_config, key.removeprefix("stage3_"), settled["zero_optimization"][key])


def _runs_rule(engine: Any, client_optimizer: Any) -> bool:
    return isinstance(client_optimizer, RuleOptimizer) or find_rule(engine.optimizer_name()) is not None


def _check_model(engine: Any, client_optimizer: Any) -> None:
    """Raise UserError for parameters that would train wrongly, and for sparse gradients."""
    if not _runs_rule(engine, client_optimizer) and not engine.zero_optimization():
        return
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            check_dtype(param.dtype, f"DeepSpeed, parameter {name!r}", (torch.float32, torch.bfloat16, torch.float16))
    if engine.zero_optimization_partition_weights():
        types = {param.dtype: name for name, param in engine.module.named_parameters() if param.requires_grad}
        if len(types) > 1:
            found = " and ".join(f"{name!r} is {dtype_name(dtype)}" for dtype, name in types.items())
            raise UserError(f"stage 3 trains parameters of one type, but {found}; give all one, or use stage 1 or 2")
    for name, module in engine.module.named_modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "sparse", False) and isinstance(weight, Tensor) and weight.requires_grad:
            raise UserError(f"module {name!r} makes sparse gradients, which are not supported; give it sparse=False")


def _finish(engine: Any) -> None:
    if engine.zero_optimization_partition_weights():
        partition.check_stage_3(engine.optimizer)
    calls.no_copies(engine)
    calls.unscale_by_what_scaled(engine)
    if not isinstance(engine.basic_optimizer, RuleOptimizer):
        return
    if engine.optimizer is not engine.basic_optimizer:
        engine.basic_optimizer.add_param_group = calls.no_more_groups  # type: ignore[method-assign]
    if isinstance(engine.optimizer, BF16_Optimizer) and (found := engine.basic_optimizer.looks_at()):
        raise UserError(
            f"{type(engine.basic_optimizer).__name__} looks at whole parameters ({found}), "
            "which DeepSpeed's BF16_Optimizer flattens; use ZeRO stage 1, 2 or 3"
        )
    if engine.zero_optimization() and isinstance(engine.optimizer, BF16_Optimizer):
        raise UserError(
            'data_types.grad_accum_dtype: "fp32" with bf16 at ZeRO stage 1 makes DeepSpeed keep unsharded fp32 '
            f"gradients and cut {type(engine.basic_optimizer).__name__}'s blocks; leave it out or use stage 2"
        )
    if engine.zero_optimization_partition_weights():
        partition.zero_padding(engine.optimizer)
    # It makes the host wait for the device twice a micro-batch.
    timer = engine._config.timers_config
    if "synchronized" not in timer.model_fields_set:
        timer.synchronized = False


def weights_were_loaded(engine: Any) -> None:
    """Tell those who watch over `engine` that the weights that it has now are its optimizer's."""
    if hasattr(engine, "leanstate_audit"):
        engine.leanstate_changes.accept()
        engine.leanstate_audit.accept(engine)


def rule_optimizer(engine: Any) -> RuleOptimizer | None:
    """The optimizer of this package that `engine` runs inside DeepSpeed's wrapper, or None."""
    basic = getattr(engine, "basic_optimizer", None)
    return basic if isinstance(basic, RuleOptimizer) else None


def compile_step(engine: Any) -> None:
    """Compile the optimizer step of `engine` now, or load it from the compiler's cache; else the first step does.

    Nothing for optimizers that are not this package's, and for `compile: false`.
    """
    optimizer, zero = rule_optimizer(engine), engine.optimizer
    if optimizer is None:
        return
    if isinstance(zero, ShardedZeroOptimizer | ShardedZeroOptimizer3):  # at stage 3 groups hold nothing between steps
        held = [shard.tensor for shard in shards(zero)]
    else:
        held = [param for group in optimizer.param_groups for param in group["params"]]
    # Without ZeRO gradients come in the type of the weights that DeepSpeed hands over.
    for weights, gradient, device in {
        (x.dtype, getattr(zero, "gradient_accumulation_dtype", x.dtype), x.device) for x in held
    }:
        for group in kinds(optimizer, weights):
            warm(optimizer, group, weights, gradient, device)


def replicated_bytes(engine: Any) -> int:
    """Bytes of optimizer state that every rank holds whole: without ZeRO all, else those of rows and columns."""
    if not engine.zero_optimization() and not isinstance(engine.optimizer, BF16_Optimizer):
        return sum(optimizer_state_bytes(engine).values())
    optimizer = rule_optimizer(engine)
    return optimizer.whole_bytes() if optimizer is not None else 0


def optimizer_state_bytes(engine: Any) -> dict[str, int]:
    """Bytes of optimizer state that this rank holds, by state name, whatever the optimizer.

    fp32 master weights are part of it, as "master weights", wherever DeepSpeed keeps them. States are allocated at the
    first step.
    """
    from toolkit.records import categories
    from toolkit.records.by_category import by_category
    from toolkit.zero.inventory import inventory

    here, on_host, _ = by_category(inventory(engine), engine.device.type)
    master = here.get(categories.MASTER, 0) + on_host.get(categories.MASTER, 0)
    total = {categories.MASTER: master} if master else {}
    optimizer = rule_optimizer(engine)
    if optimizer is not None:
        return total | optimizer.state_bytes()
    for held in engine.basic_optimizer.state.values():
        for key, value in held.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                total[key] = total.get(key, 0) + value.untyped_storage().nbytes()
    return total
