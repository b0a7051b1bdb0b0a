"""DeepSpeed engines to files and back: what an engine holds, how it is cut, and taking it over from any checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from toolkit.agreed import AgreedError, agreed, everyones
from toolkit.checkpoint.base import in_base
from toolkit.checkpoint.content import BASE, OWN, PER_RANK, SCHEDULE
from toolkit.checkpoint.files import Staging, as_it_lies, on_host, plain
from toolkit.checkpoint.source import Source
from toolkit.checkpoint.store import name_of
from toolkit.checkpoint.transfer import WEIGHTS, Transfer
from toolkit.config.outside import is_outside
from toolkit.errors import UserError
from toolkit.masking import masked
from toolkit.optim import RuleOptimizer
from toolkit.optim.rule import all_states
from toolkit.state.layout import State, dtype_name
from toolkit.state.sharding import Flat, Place, Sharding, whole_shape
from toolkit.zero import schedule
from toolkit.zero.engine import rule_optimizer, weights_were_loaded
from toolkit.zero.release import RELEASED_NORM
from toolkit.zero.shards import model_weights, shards

# The class; DeepSpeed's name for it is a function once `engine.register` has been called.
from toolkit.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from toolkit.zero.stage12 import gather_weights
from toolkit.zero.untrained import Untrained


def refusal(engine: Any) -> str | None:
    """Why an engine has no checkpoints here, in half a sentence, or None."""
    if not isinstance(engine.optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        return "checkpoints need ZeRO stage 1, 2 or 3 (with one rank, stage 1 is stage 0)"
    if engine.has_moe_layers or engine.mp_world_size > 1:
        return "checkpoints of expert, tensor and pipeline parallelism are not supported"
    if rule_optimizer(engine) is None and is_outside(engine.optimizer_name()):
        return f"checkpoints of optimizers of other packages ({engine.optimizer_name()}) are not supported"
    return Untrained(engine.module, ()).refusal()


def sharding(engine: Any) -> Sharding:
    """How `engine` cuts its parameters, and what it keeps of each.

    Raises:
        UserError: it is none that can be saved.
    """
    problem = refusal(engine)
    if problem is not None:
        raise UserError(problem)
    zero, optimizer = engine.optimizer, rule_optimizer(engine)
    stage = int(engine.zero_optimization_stage())
    names = {id(param): name for name, param in engine.module.named_parameters()}
    states = all_states(optimizer.rules()) if optimizer else (State("exp_avg"), State("exp_avg_sq", signed=False))
    groups = engine.basic_optimizer.param_groups
    flats = []
    for shard in shards(zero):
        places = [
            Place(names[id(member.param)], tuple(whole_shape(member.param)), member.offset, member.share)
            for member in shard.members
        ]
        group = groups[shard.group]
        flats.append(
            Flat(
                shard.group,
                group.get("component", "other"),
                shard.tensor.numel(),
                dtype_name(shard.tensor.dtype),
                group["weights"] if optimizer else "fp32",
                _formats(optimizer, group) if optimizer else dict.fromkeys((s.name for s in states), "fp32"),
                tuple(places),
            )
        )
    rule = type(optimizer).__name__ if optimizer else None
    return Sharding(stage, dist.get_world_size(), rule, states, tuple(flats))


def _formats(optimizer: RuleOptimizer, group: Mapping[str, Any]) -> dict[str, str]:
    small = (state.name for state in optimizer.rule_of(group).states if state.of is not None)
    return {**group["state_format"], **dict.fromkeys(small, "fp32")}


RECOVERY_SCRIPT = Path(deepspeed.__file__).with_name("utils") / "zero_to_fp32.py"
"""DeepSpeed's, which it puts beside its checkpoints."""

# ---- saving -------------------------------------------------------------------------------------------------------


class _Capture(CheckpointEngine):
    """Stands in for DeepSpeed's writer and keeps what it is given, in host memory; with `copy` nothing of it is the
    engine's own."""

    def __init__(
        self,
        engine: Any,
        untrained: Untrained,
        extra: Mapping[str, Any],
        per_rank: Mapping[str, Any],
        copy: bool,
        based: Mapping[str, torch.Size],
    ) -> None:
        super().__init__()
        self.files: dict[Path, Any] = {}
        self._engine = engine
        self._untrained = untrained
        self._based = based
        self._extra = dict(extra)
        self._per_rank = per_rank
        self._copy = copy
        self._dtypes: dict[int, torch.dtype] = {}
        self._staging: Staging | None = None

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing is written yet: one rank that fails here would leave the others waiting for it."""

    def commit(self, info: Any) -> bool:
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError

    def save(self, state_dict: Any, path: str) -> None:
        content = dict(state_dict)
        content["ds_config"] = masked(content.get("ds_config"))
        if "module" in content:
            whole = self._module(content)
        else:
            own = self._untrained.saved_buffers() | self._extra if dist.get_rank() else {}
            whole = {PER_RANK: {**self._per_rank, OWN: own}}
            if dist.get_rank():
                whole |= self._sharded(content)
        self.files[Path(path)] = plain(content | whole, self._on_host)

    def _module(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """What the module has and the ranks' optimizer files do not, each thing once.

        An empty tensor stands for each parameter, as DeepSpeed does it at stage 3; its zero_to_fp32.py looks for
        weights in the optimizer files and among the frozen parameters only. DeepSpeed saves as frozen what needs no
        gradient; here it is what the optimizer does not have, at every stage.
        """
        weights = dict(self._engine.module.named_parameters(remove_duplicate=False))
        empty = {name: torch.empty(0, dtype=param.dtype) for name, param in weights.items()}
        scheduler = self._engine.lr_scheduler
        return {
            "module": dict(content["module"]) | empty,
            "frozen_param_shapes": OrderedDict(self._untrained.shapes()),
            "frozen_param_fragments": OrderedDict(self._untrained.parts()),
            **({BASE: {name: tuple(shape) for name, shape in self._based.items()}} if self._based else {}),
            SCHEDULE: None if scheduler is None else type(scheduler).__name__,
        }

    def _sharded(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The state without that of rows and columns, which is the first rank's to save: it is the same on all."""
        optimizer = rule_optimizer(self._engine)
        small = optimizer.whole_states() if optimizer else set()
        body = content["optimizer_state_dict"]
        base = next(key for key in ("base_optimizer_state", "optimizer_state_dict") if key in body)
        state = {
            index: {key: value for key, value in held.items() if key not in small}
            for index, held in body[base]["state"].items()
        }
        return {"optimizer_state_dict": {**body, base: {**body[base], "state": state}}}

    def _on_host(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            # torch.save takes no memory twice as different types.
            same = self._dtypes.setdefault(tensor.data_ptr(), tensor.dtype) == tensor.dtype
            return as_it_lies(tensor) if same and not self._copy else on_host(tensor)
        self._staging = self._staging or Staging()
        return self._staging.copy(tensor)

    def finish(self) -> None:
        """Wait until `files` is complete: before the next step changes what it is copied from."""
        if self._staging is not None:
            self._staging.finish()


def copied_bytes(engine: Any) -> int:
    """Bytes of host memory that `capture` takes on this rank for copies of weights and state that lie on the host.

    What a GPU holds is copied there in any case.
    """
    held = [shard.tensor for shard in shards(engine.optimizer)]
    held += [x for state in engine.basic_optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return sum(tensor.nbytes for tensor in held if tensor.is_cpu)


def capture(
    engine: Any,
    trained: Collection[str],
    draft: Path,
    step: int,
    per_rank: Mapping[str, Any],
    *,
    copy: bool = True,
    base: bool = False,
) -> dict[Path, Any]:
    """What this rank writes of a checkpoint, by path below `draft`, in host memory; every rank must call this.

    Args:
        trained: names of the parameters that the optimizer holds.
        per_rank: plain values that go into this rank's file beside its state.
        copy: of what lies in host memory, too. Without, nothing may change it until it is written.
        base: leave out the frozen weights of a model with adapters: the manifest says where they are.
    """
    untrained = Untrained(engine.module, trained)
    extra = untrained.extra_states()
    for problem in everyones(untrained.unsaveable(extra)):
        if problem is not None:  # what modules keep may have changed since the run began
            raise AgreedError(problem)
    based = {name: shape for name, shape in untrained.shapes().items() if base and in_base(name)}
    untrained.leave(based)
    capturing = _Capture(engine, untrained, extra, per_rank, copy, based)
    writer, engine.checkpoint_engine = engine.checkpoint_engine, capturing
    engine._copy_recovery_script = lambda folder: None  # which would write at once; `RECOVERY_SCRIPT` is it
    try:
        # Frozen parameters are added by `_Capture`: DeepSpeed would have copies of them, or of some.
        engine.save_checkpoint(str(draft), tag=name_of(step), save_latest=False, exclude_frozen_parameters=True)
        capturing.finish()
        files = capturing.files
    finally:
        engine.checkpoint_engine = writer
        del engine._copy_recovery_script
    return files


# ---- loading ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load(engine: Any, source: Source, *, convert: bool = False, base: str | None = None) -> list[str]:
    """Take the whole model, optimizer state, schedule and counters over from `source`; every rank must call this.

    The number of ranks, the stage and offload may differ from those of the checkpoint. Every parameter group then has
    the rate that the engine's schedule gives at that step (`toolkit.zero.schedule`).

    Args:
        convert: whether formats, the optimizer and what is not trained may differ as well.
        base: hash of the weights (`checkpoint.base`) that the engine's frozen parameters are, if they are those of
            a base; where the checkpoint has the same, they stay.

    Returns:
        What was done to the state or the schedule, a sentence each; nothing where they are the very same.

    Raises:
        UserError: raised by every rank: another model, or other parameters are frozen; a file is damaged; without
            `convert`: another format or optimizer, frozen parameters or buffers that the checkpoint lacks or that
            lose digits here.
    """
    target = agreed(lambda: sharding(engine))
    untrained = Untrained(engine.module, target.by_name)
    transfer = Transfer(source, target)
    converted = agreed(lambda: _fitting(engine, transfer, untrained, convert))  # until here no weight has changed
    zero = engine.optimizer
    if target.stage == 3:
        zero.checkpoint_event_prologue()  # small parameters may be whole, and would stay what they are
    agreed(lambda: _take_over(engine, transfer))
    _show(zero)
    untrained.restore(source, base)
    if target.stage == 3:
        zero.checkpoint_event_epilogue()
    _restore_rest(engine, source)
    weights_were_loaded(engine)
    return converted


def _fitting(engine: Any, transfer: Transfer, untrained: Untrained, convert: bool) -> list[str]:
    """Set the schedule, if the checkpoint fits; what is converted, a sentence each. Raises UserError as `load`."""
    source = transfer.source
    problem = transfer.mismatch(untrained.parameters) or untrained.mismatch(source)
    if problem is not None:
        raise UserError(f"{source.folder} does not fit this model: {problem}")
    converted = transfer.conversions() + untrained.conversions(source)
    if converted and not convert:
        raise UserError(
            f"{source.folder} cannot be taken over as it is: {converted[0]}; --convert-state (convert=True) takes over "
            "what it can, and encodes state anew"
        )
    return converted + schedule.resume(engine, source)


def _take_over(engine: Any, transfer: Transfer) -> None:
    """Set this rank's flat tensors and their state."""
    files = optimizer.files if (optimizer := rule_optimizer(engine)) else None
    for shard in shards(engine.optimizer):
        step = transfer.step_of(shard.number) if transfer.source.trained() else None
        _put(engine, shard.tensor, transfer.tensors(shard.number, dist.get_rank(), files), step)


def _put(engine: Any, flat: Tensor, made: dict[str, Tensor], step: int | None) -> None:
    """Set a flat tensor and its state; `step` None: there is no state yet."""
    flat.data.copy_(made.pop(WEIGHTS))
    optimizer = engine.basic_optimizer
    if step is None:
        return
    if isinstance(optimizer, RuleOptimizer):
        held: dict[str, Any] = optimizer.state[flat]
        held.clear()
        held.update({key: tensor.to(flat.device) for key, tensor in made.items()}, step=step)
        return
    held = optimizer.state[flat]
    for key, tensor in made.items():
        value = tensor.view(-1)[: flat.numel()].to(flat.device)
        if key in held:
            held[key].copy_(value)
        else:
            held[key] = value
    # torch's own counts in a tensor, DeepSpeed's in a number.
    held["step"] = torch.tensor(float(step)) if isinstance(optimizer, torch.optim.Adam) else step
    for group in optimizer.param_groups:
        if "step" in group:  # DeepSpeed's fused Adam counts there
            group["step"] = step


def _show(zero: Any) -> None:
    """Give the model the weights that the optimizer now has."""
    placed = shards(zero)
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        for shard in placed:
            zero._reassign_or_swap_out_partitioned_parameters(shard.number)
        return
    for shard in placed:
        model_weights(zero, shard).data.copy_(shard.tensor.data)
    gather_weights(zero, placed)


def _restore_rest(engine: Any, source: Source) -> None:
    """Loss scale and counters."""
    saved = source.model_states()
    optimizer_states = source.optimizer_states(0)["optimizer_state_dict"]
    scaler = optimizer_states.get("loss_scaler")
    if isinstance(scaler, Mapping) and engine.fp16_enabled():
        vars(engine.optimizer.loss_scaler).update(scaler)
    for group, old in zip(engine.basic_optimizer.param_groups, source.param_groups(), strict=False):
        group.update({key: old[key] for key in (RELEASED_NORM,) if key in old})
    engine.global_steps = saved["global_steps"]
    engine.global_samples = saved.get("global_samples", engine.global_steps * engine.train_batch_size())
    engine.skipped_steps = saved["skipped_steps"]
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
