"""What a run will hold, before it runs: a dry run of the model's pass, and ZeRO and the optimizer around it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.config import DeepSpeedSettings
from toolkit.config.automatic import automatic, settle
from toolkit.config.batch import Batch
from toolkit.config.deepspeed import current
from toolkit.config.files import without_auto
from toolkit.errors import UserError
from toolkit.estimate.dry_run import DryRun, dry_run, scaled
from toolkit.estimate.optimizer_memory import OptimizerMemory, optimizer_memory
from toolkit.estimate.prices import offered
from toolkit.estimate.stretch import dry_run_of
from toolkit.estimate.zero_step import Step, simulate
from toolkit.models import load_config
from toolkit.models.activations import TILEABLE, checkpointable
from toolkit.models.loss import MANY
from toolkit.models.tiled import TILE
from toolkit.optim import RECOMMENDED, find_rule
from toolkit.records.activations import FLAG, Activations
from toolkit.records.categories import LOGITS
from toolkit.records.lora import LoRA
from toolkit.records.memory import Change, Prediction, Setup
from toolkit.records.sizes import size_text
from toolkit.sentences import value_at
from toolkit.state.layout import LEAN, LEANEST, format_text

_CONTEXT = 1_000_000_000
_COMMUNICATOR = 200_000_000
_PEERS = 8


def assumed_context(world_size: int) -> int:
    """Bytes of a GPU that nothing here predicts: CUDA context, cuBLAS's workspaces and other libraries, and NCCL.

    An assumption, not a measurement, which differs by driver, GPU and network: 1 GB, and with several ranks 0.2 GB for
    each of up to 8, after which NCCL's buffers hardly grow. Its users report 1.6 GB of buffers for one communicator
    (https://github.com/NVIDIA/nccl/issues/864) and, on 8 H100, 1.06 GB in all before the first all-to-all and 4.34 GB
    after it (https://github.com/NVIDIA/nccl/issues/1685).
    """
    return _CONTEXT + (_COMMUNICATOR * min(world_size, _PEERS) if world_size > 1 else 0)


_SIMULATED = 4
"""Ranks of a large run whose shares are looked at, evenly spread, the first and the last among them."""

_MATTERS = 0.005
"""Share of the peak below which a change is not worth a line."""


@dataclass(frozen=True)
class Case:
    """A run whose memory is asked for.

    Args:
        model: a preset or a folder with a config.json.
        config: a DeepSpeed JSON that has been validated.
        world_size: ranks in all.
        micro_batch, accumulation: sequences of a forward pass; micro-batches of a step.
        seq_len: predictions per sequence.
        device: "cuda" or "cpu".
        activations, loss, attention: None is the model's default.
        lora: adapters, which alone are trained.
        conversations: are trained on, not text.
    """

    model: str
    config: Mapping[str, Any]
    world_size: int
    micro_batch: int
    seq_len: int
    accumulation: int = 1
    device: str = "cuda"
    activations: Activations | None = None
    loss: str | None = None
    attention: str | None = None
    lora: LoRA | None = None
    conversations: bool = False
    ds: DeepSpeedSettings = field(default=DeepSpeedSettings(), init=False)
    """`config`, read."""
    defaults: tuple[str, ...] = field(default=(), init=False)
    """Keys that are "auto" in the JSON and have no rule, and are counted with DeepSpeed's default."""

    def __post_init__(self) -> None:
        auto = sorted(_auto(self.config))
        if "zero_optimization.stage" in auto:
            raise UserError('zero_optimization.stage is "auto", which fixes no memory; give a stage.')
        config = current(self.config)
        later = {key: "auto" for key in automatic(config)}  # which follow from the model
        settled = with_section(without_auto(config), ["zero_optimization"], later)
        defaults = [path for path in auto if path.removeprefix("zero_optimization.") not in later]
        object.__setattr__(self, "config", settled)
        object.__setattr__(self, "ds", DeepSpeedSettings.read(settled))
        object.__setattr__(self, "defaults", tuple(defaults))


def _auto(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _auto(value, f"{path}{key}.")
        elif value == "auto":
            yield path + key


@dataclass(frozen=True)
class Simulated:
    """The step of `case` on the rank that holds most."""

    case: Case
    run: DryRun
    optimizer: OptimizerMemory
    step: Step

    @property
    def peak(self) -> int:
        """Bytes of the device, the context left out."""
        return int(self.step.curve.total.max())

    def prediction(self) -> Prediction:
        """What is written down of it."""
        case, run, optimizer, step = self.case, self.run, self.optimizer, self.step
        at = step.curve.peak_at
        remarks = [*optimizer.remarks, *_unknown(case.config)]
        if counted := [key for key in case.defaults if key.startswith(("zero_optimization.", "bf16.", "fp16."))]:
            remarks.append(f'{", ".join(counted)}: "auto" is counted as DeepSpeed\'s default.')
        if case.device == "cuda":
            remarks.append(
                f"{size_text(assumed_context(case.world_size))} are assumed for the CUDA context, its libraries and "
                "NCCL; what the caching allocator reserves beyond what is allocated is not predicted."
            )
        kept = run.activations
        if kept.budget is not None:
            priced = kept.priced(len(checkpointable(run.model)))
            remarks.append(
                f"{FLAG} {kept} is priced as {priced}: what the compiler of --compile-model keeps is not known."
            )
        return Prediction(
            setup=setup_of(case, run),
            peak=int(step.curve.total[at]),
            peak_phase=step.curve.phase_at(at),
            phases=step.curve.by_phase(),
            timeline=step.curve.timeline(),
            resident=step.resident,
            host=step.host,
            nvme=step.nvme,
            sent=step.sent,
            wire=step.wire,
            context=assumed_context(case.world_size) if case.device == "cuda" else 0,
            per_block=run.per_block,
            remarks=remarks,
        )


@dataclass
class Estimator:
    """Predicts cases; passes that several of them share are run once.

    Args:
        several: many micro-batches will be asked for, so it pays to scale the dry runs of two.
    """

    several: bool = False
    _passes: dict[tuple[Any, ...], DryRun] = field(default_factory=dict)
    _optimizers: dict[tuple[Any, ...], OptimizerMemory] = field(default_factory=dict)

    def predict(self, case: Case) -> Prediction:
        """The step of the rank that holds most.

        Raises:
            UserError: an unknown model or optimizer, or settings that exclude each other.
        """
        return self.look(case).prediction()

    def peak(self, case: Case) -> int:
        """Bytes of the device, the context left out, at the peak of the rank that holds most."""
        return self.look(case).peak

    def look(self, case: Case) -> Simulated:
        """What `predict` and `peak` are made of, for who needs both."""
        run = self._dry_run(case)
        on_gpu = case.device == "cuda"
        config = settle(case.config, lambda: run.shape, on_gpu=on_gpu, world_size=case.world_size)
        ds, batch = DeepSpeedSettings.read(config), Batch(case.micro_batch, case.accumulation, case.world_size)
        optimizer = self._optimizer_memory(case, config, run, ds)
        steps = [
            simulate(run, ds, optimizer, batch, rank=rank, on_gpu=on_gpu) for rank in _ranks(case.world_size, ds.stage)
        ]
        return Simulated(case, run, optimizer, max(steps, key=lambda step: int(step.curve.total.max())))

    def _optimizer_memory(
        self, case: Case, config: Mapping[str, Any], run: DryRun, ds: DeepSpeedSettings
    ) -> OptimizerMemory:
        """No batch changes it."""
        key = case.model, case.lora, json.dumps(config, sort_keys=True, default=str)
        if key not in self._optimizers:
            self._optimizers[key] = optimizer_memory(run.model, ds)
        return self._optimizers[key]

    def _dry_run(self, case: Case) -> DryRun:
        key = (
            *(case.model, case.ds.computed, case.micro_batch, case.seq_len, case.device),
            *(case.activations, case.loss, case.attention, case.lora, case.conversations),
        )
        if key not in self._passes:
            found = None
            if self.several and case.micro_batch > 3 and case.micro_batch * case.seq_len <= _linear_up_to(case):
                two, three = (self._dry_run(replace(case, micro_batch=size)) for size in (2, 3))
                found = scaled(two, three, case.micro_batch)
            self._passes[key] = found or dry_run_of(
                case.model,
                dtype=case.ds.dtype,
                micro_batch=case.micro_batch,
                seq_len=case.seq_len,
                device=case.device,
                activations=case.activations,
                loss=case.loss,
                attention=case.attention,
                lora=case.lora,
                conversations=case.conversations,
            )
        return self._passes[key]

    def changes(self, case: Case, peak: int) -> list[Change]:
        """What other settings than those of `case`, whose peak is `peak`, would hold; takes a few more dry runs."""
        found = []
        for words, changed in alternatives(case):
            other = self.peak(changed)
            found.append(Change(change=words, peak=other, saves=peak - other))
        found = [change for change in found if abs(change.saves) >= _MATTERS * peak]
        return sorted(found, key=lambda change: -change.saves)


def _linear_up_to(case: Case) -> int:
    """Tokens of a pass up to which its tensors grow with them, and no others are made."""
    return TILE if case.activations is not None and case.activations.tiled else MANY


# What changes memory in ways that are not modelled.
_NOT_MODELLED = (
    ("zero_optimization.contiguous_gradients", False),
    ("zero_optimization.zero_hpz_partition_size", None),
    ("zero_optimization.offload_optimizer.ratio", None),
    ("zero_optimization.round_robin_gradients", True),
    ("bf16.bf16_master_weights_and_grads", True),
    ("bf16.bf16_optimizer_states", True),
    ("data_types.grad_accum_dtype", None),
    ("tensor_parallel", None),
    ("sequence_parallel_size", None),
    ("pipeline", None),
)


def _unknown(config: Mapping[str, Any]) -> Iterator[str]:
    """A remark for each setting that this prediction passes over; None stands for any value."""
    for path, value in _NOT_MODELLED:
        found = value_at(config, path)
        if found is not None and (value is None or found is value):
            yield f"{path} is not modelled: the prediction is that without it."


def _ranks(world_size: int, stage: int) -> list[int]:
    """Ranks that are simulated: parts of a group differ at stages 1 and 2, and are alike otherwise."""
    if stage not in (1, 2):
        return [0]
    return sorted({round(i * (world_size - 1) / (_SIMULATED - 1)) for i in range(_SIMULATED)})


def setup_of(case: Case, run: DryRun) -> Setup:
    """`case` as it is written down."""
    ds, rule, formats = case.ds, case.ds.rule, case.ds.state_format
    places = {"optimizer": ds.offload_optimizer, "param": ds.offload_param}
    return Setup(
        model=case.model,
        parameters=sum(parameter.numel for parameter in run.parameters),
        optimizer=rule.__name__ if rule else str(ds.optimizer),
        stage=ds.stage,
        state_format=format_text(formats),
        weights=ds.weights,
        offload=[part for part, device in places.items() if device != "none"],
        world_size=case.world_size,
        micro_batch=case.micro_batch,
        gradient_accumulation=case.accumulation,
        seq_len=case.seq_len,
        activations=run.activations,
        attention=run.attention,
        loss=run.loss,
        device="cuda" if case.device == "cuda" else "cpu",
    )


def offered_activations(model: str, device: str, lora: LoRA | None) -> list[Activations]:
    """What a run of `model` can be told to keep of its activations, the fastest first."""
    found = [Activations(), Activations(checkpoint=True)]
    if lora is None and load_config(model)[0].model_type in TILEABLE:
        found += [replace(one, tiled=True) for one in found[1:]]
    if device != "cpu":
        found += [replace(one, offload=True) for one in found[1:]]
    return found


def alternatives(case: Case) -> Iterator[tuple[str, Case]]:
    """Settings that change one thing of `case`, in a user's words; only what the rest of it allows."""
    config, ds, stage = case.config, case.ds, case.ds.stage
    ours, in_bf16 = ds.rule is not None, ds.computed == "bf16"
    without_masters = ours and ds.without_masters
    offloaded, released = ds.offload_optimizer != "none", ds.releases_gradients
    can_release = without_masters and case.accumulation == 1 and not ds.waits_for

    def params_with(**changed: Any) -> Case:
        return replace(case, config=with_section(config, ["optimizer", "params"], changed))

    def zero_with(**changed: Any) -> Case:
        return replace(case, config=with_section(config, ["zero_optimization"], changed))

    for other in (1, 2, 3):
        if other > stage and (case.world_size > 1 or stage == 0):
            yield f"zero_optimization.stage {other}", zero_with(stage=other)
    if (made := find_rule(ds.optimizer)) is not None:
        for name in ("8bit", "compact", "minimal", LEAN, LEANEST):
            if ds.state_format != name and offered(str(ds.optimizer), name):
                changed = {"state_format": name, **made.rule.beside.get(name, {})}
                words = " and ".join(f"optimizer.params.{key} {value}" for key, value in changed.items())
                yield words, params_with(**changed)
    if without_masters and ds.weights not in ("bf16+4", "bf16"):
        yield "optimizer.params.weights bf16+4", params_with(weights="bf16+4")
    if ours and not without_masters and stage > 0 and in_bf16:
        yield "optimizer.params.weights bf16+8", params_with(weights="bf16+8")
    if can_release and not released:
        yield "optimizer.params.release_gradients true", params_with(release_gradients=True)
    if not ours and in_bf16:
        own = {"lr": ds.params.get("lr", 1e-4), **({} if stage else {"weights": "fp32"})}
        optimizer = {"type": RECOMMENDED, "params": own}
        yield f"optimizer.type {RECOMMENDED} (8bit)", replace(case, config={**config, "optimizer": optimizer})
    if not offloaded and stage > 0 and case.device == "cuda":
        yield "zero_optimization.offload_optimizer", zero_with(offload_optimizer={"device": "cpu"})
    for kept in offered_activations(case.model, case.device, case.lora):
        if kept != Activations() and kept != case.activations:
            yield f"{FLAG} {kept}", replace(case, activations=kept)
    if case.loss == "plain":
        yield "--loss chunked", replace(case, loss="chunked")
    if case.micro_batch > 1:
        half = case.micro_batch // 2
        yield f"--micro-batch {half}", replace(case, micro_batch=half)
    if case.seq_len > 256:
        half = case.seq_len // 2
        yield f"--seq-len {half}", replace(case, seq_len=half)


def with_section(config: Mapping[str, Any], path: list[str], changed: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with keys changed in the section at `path`."""
    result = copy.deepcopy(dict(config))
    section = result
    for key in path:
        section = section.setdefault(key, {})
    section.update(changed)
    return result


def variants(case: Case) -> dict[str, int]:
    """Bytes of one transformer block's activations and of the loss, under every choice that a run has for them.

    From a model of one layer: "kept" stays between the block's forward and its backward pass, "while it runs" is the
    most that it holds, "logits" the most between the head and the gradient of its input.
    """
    found: dict[str, int] = {}
    for attention, words in (("sdpa", "flash attention"), ("eager", "eager attention")):
        for kept in (Activations(), Activations(checkpoint=True)):
            small = dry_run(
                case.model,
                dtype=case.ds.dtype,
                micro_batch=case.micro_batch,
                seq_len=case.seq_len,
                device=case.device,
                activations=kept,
                loss="plain" if kept.checkpoint else "chunked",
                attention=attention,
                layers=1,
                lora=case.lora,
                conversations=case.conversations,
            )
            if kept.checkpoint:
                found["kept, with checkpointing"] = small.per_block.get("kept", 0)
            else:
                found[f"kept, {words}"] = small.per_block.get("kept", 0)
                found[f"while it runs, {words}"] = small.per_block.get("largest moment", 0)
            logits = small.storages.curve().by_category.get(LOGITS)
            found[f"logits, {small.loss} loss"] = 0 if logits is None else int(logits.max())
    return found
