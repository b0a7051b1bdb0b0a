"""All that is checked before a model is built, and what comes out of it: a prepared run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.model_files import model_files
from toolkit.config.batch import Batch
from toolkit.errors import UserError
from toolkit.plugins import import_plugins
from toolkit.records.sizes import counted
from toolkit.run import folder as run_folder
from toolkit.run import monitors, ranks, tracking
from toolkit.run.folder import RunFolder
from toolkit.run.identity import identity, packing_fact
from toolkit.run.resolve import ResolvedSettings, resolve
from toolkit.run.settings import NONE, RunSettings
from toolkit.run.start import newest_saved, run_of
from toolkit.run.terms import Saved
from toolkit.run.texts import digest, open_text, texts

if TYPE_CHECKING:
    import torch

    from toolkit.config import DeepSpeedSettings
    from toolkit.data import PackedTokens


@dataclass
class PreparedRun:
    """A run that has passed every check; nothing large exists yet."""

    resolved: ResolvedSettings
    folder: Path
    remarks: list[str]
    data: PackedTokens
    validation: list[torch.Tensor]
    validation_text: dict[str, Any] | None
    """What checkpoints note of the text that these are from; None where the run does not validate."""
    parameters: int
    flops_per_token: int
    identity: dict[str, dict[str, Any]]
    model_files: dict[str, bytes]
    """What checkpoints keep beside the weights; on rank 0."""

    @property
    def settings(self) -> RunSettings:
        return self.resolved.settings

    @property
    def config(self) -> dict[str, Any]:
        return self.resolved.config

    @property
    def ds(self) -> DeepSpeedSettings:
        return self.resolved.ds

    @property
    def batch(self) -> Batch:
        return self.resolved.batch

    def resolve_again(self, saved: Saved | None) -> None:
        """Take the settings of the checkpoint that was chosen, where that is not the newest one."""
        old = self.resolved
        if saved == old.saved:
            return
        self.resolved = resolve(old.asked, old.json, saved)
        self.remarks = [*self.resolved.remarks, *(remark for remark in self.remarks if remark not in old.remarks)]

    def resolve_rate(self, lr: float) -> None:
        """Take the learning rate that was found, as if it had been given."""
        old = self.resolved
        self.resolved = resolve(old.asked.model_copy(update={"lr": lr}), old.json, old.saved)

    def lines(self, device: torch.device) -> list[str]:
        """What the user is told before the model is built."""
        settings, batch, remarks = self.settings, self.batch, list(self.remarks)
        if settings.eval_every and len(self.validation) < settings.eval_sequences:
            are = "it is" if len(self.validation) == 1 else "all are"
            remarks.append(f"the validation text fills only {counted(len(self.validation), 'sequence')}; {are} used.")
        return [
            f"{settings.model}: {self.parameters:,} parameters on {batch.world_size} x {_device_name(device)}; "
            f"{settings.config}; data {settings.data}",
            f"{counted(settings.steps, 'step')} of {counted(batch.total, 'sequence')} x "
            f"{counted(settings.seq_len, 'token')}: micro-batch {batch.micro} x accumulation {batch.accumulation} x "
            f"{counted(batch.world_size, 'rank')}",
            *([f"adapters alone are trained: --lora {settings.lora}"] if settings.lora is not None else []),
            f"files in {self.folder}",
            *(f"note: {remark}" for remark in remarks),
        ]


def prepare(settings: RunSettings) -> PreparedRun:
    """Check everything, the cheapest first: the JSON, the run folder, the model's shape, the text.

    Raises:
        UserError: the first thing found that is not fit for a run.
    """
    import torch
    from deepspeed.accelerator import get_accelerator

    from toolkit import config as configs
    from toolkit import data, models
    from toolkit.models.build import skeleton
    from toolkit.models.lora import refuse_adapters
    from toolkit.models.presets import folder_of

    import_plugins(settings.plugins)
    config = configs.apply_overrides(configs.load_config(settings.config), settings.overrides)
    configs.validate(config, origin=settings.config)
    model_config, preset = models.load_config(settings.model)
    if settings.from_checkpoint and preset is None:
        refuse_adapters(folder_of(settings.model))
    config = configs.settle(
        config,
        lambda: configs.Shape.of(skeleton(model_config)),
        on_gpu=get_accelerator().device_name() != "cpu",
        world_size=ranks.world_size(),
    )
    folder = settings.run_dir or run_of(settings) or run_folder.default_folder(settings.model, settings.config)
    run_folder.check_free(folder, resuming=settings.resume != NONE)
    resolved = resolve(settings, config, newest_saved(settings, folder))
    settings, batch, remarks = resolved.settings, resolved.batch, list(resolved.remarks)
    if ranks.rank() == 0:  # the others draw nothing
        tracking.check(resolved.asked.tracker)
        monitors.check_packages(resolved.config)
    if settings.activations is not None:
        settings.activations.check_device(get_accelerator().device_name())
        if settings.activations.budget is not None and not settings.compile_model:
            raise UserError(
                f"--activations is {str(settings.activations)!r}, and it is torch's compiler that keeps within a "
                "budget: add --compile-model, or choose checkpoint:N."
            )
    if settings.compile_model:
        if resolved.ds.stage == 3:
            raise UserError(
                "--compile-model works at ZeRO stages 0, 1 and 2, and this configuration is of stage 3, which gathers "
                "weights between the operations of a block."
            )
        remarks.append("--compile-model: the prediction is of the model as it is not compiled, which holds more.")
    if resolved.ds.computed == "bf16" and not torch.accelerator.is_available() and models.cpu_matmul.computes_in_fp32():
        remarks.append("matrix products are computed in fp32 from bf16 operands, since this CPU is slow at bf16 ones.")

    own = Path(settings.model) if preset is not None else folder_of(settings.model)
    name = settings.tokenizer or (preset.tokenizer if preset is not None else settings.model)
    tokenizer = data.load_tokenizer(str(own) if name == settings.model else name)
    if len(tokenizer) > model_config.vocab_size:
        raise UserError(
            f"tokenizer {name!r} has {len(tokenizer)} entries, more than the vocabulary of model "
            f"{settings.model!r} ({model_config.vocab_size}); choose another --tokenizer or --model."
        )
    models.check_length(model_config, settings.model, settings.seq_len)
    if settings.chat_template is not None:
        tokenizer.chat_template = data.read_template(settings.chat_template)

    text, held_out = texts(settings)
    training = open_text(text, tokenizer, settings.seq_len, settings.seed, bad=settings.bad_documents)
    training.require(batch.total)
    if settings.chat_template is not None and not training.documents.conversations:
        remarks.append("--chat-template only goes with the tokenizer into checkpoints: the data are no conversations.")
    sequences: list[Any] = []
    if held_out is not None:
        source = open_text(held_out, tokenizer, settings.seq_len, settings.seed, bad=settings.bad_documents)
        source.require(1)
        sequences = source.first_pass(held_out["sequences"])
        held_out |= {"sha256": digest(sequences), **packing_fact(source)}
        remarks += [f"skipped in the validation text: {problem}" for problem in source.position.named]
    return PreparedRun(
        resolved=resolved,
        folder=folder,
        remarks=remarks,
        data=training,
        validation=[torch.as_tensor(sequence) for sequence in sequences],
        validation_text=held_out,
        parameters=models.count_parameters(model_config),
        flops_per_token=models.flops_per_token(model_config, settings.seq_len, frozen=settings.lora is not None),
        identity=identity(settings, model_config, name, training),
        model_files=model_files(model_config, tokenizer, own) if ranks.rank() == 0 else {},
    )


def claim_folder(prepared: PreparedRun, device: torch.device) -> RunFolder | None:
    """Rank 0 takes the run folder; the other ranks have none.

    Raises:
        UserError: as `RunFolder`.
    """
    from toolkit import models

    if ranks.rank() != 0:
        return None
    settings, batch, config = prepared.settings, prepared.batch, prepared.config
    facts = run_folder.run_facts(
        settings=settings.model_dump(mode="json"),
        world_size=batch.world_size,
        micro_batch=batch.micro,
        gradient_accumulation=batch.accumulation,
        global_batch=batch.total,
        parameters=prepared.parameters,
        device=_device_name(device),
        bf16_products="fp32" if device.type == "cpu" and models.cpu_matmul.computes_in_fp32() else "native",
        ds_config=config,
    )
    saves, resuming = settings.save_every > 0 and prepared.ds.stage > 0, settings.resume != NONE
    return RunFolder(prepared.folder, facts, config, checkpoints=saves, resuming=resuming)


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
