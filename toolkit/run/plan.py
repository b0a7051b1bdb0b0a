"""All that is checked before a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolkit.checkpoint.model_files import model_files
from toolkit.config.batch import Batch
from toolkit.errors import UserError
from toolkit.plugins import import_plugin
from toolkit.run import folder as run_folder
from toolkit.run import ranks
from toolkit.run.identity import identity
from toolkit.run.merge import merge_flags
from toolkit.run.settings import RunSettings
from toolkit.run.start import NONE, noted, run_of
from toolkit.run.terms import Saved, changes, kept_settings, terms

if TYPE_CHECKING:
    import torch

    from toolkit.config import DeepSpeedSettings
    from toolkit.data import PackedTokens, Position


@dataclass
class Terms:
    """What the command line, the DeepSpeed JSON and, where a run is resumed, its checkpoint come to.

    `asked` and `json` are the first two as given, `saved` what the checkpoint notes (None: there is none). `changed`:
    what is not as in the run that saved it, in words; `remarks`: all that is to be said of it.
    """

    asked: RunSettings
    json: Mapping[str, Any]
    saved: Saved | None
    settings: RunSettings
    config: dict[str, Any]
    ds: DeepSpeedSettings
    batch: Batch
    changed: list[str]
    remarks: list[str]


@dataclass
class Plan:
    """A run that has passed every check; nothing large exists yet."""

    settings: RunSettings
    config: dict[str, Any]
    ds: DeepSpeedSettings
    """`config`, read."""
    batch: Batch
    folder: Path
    remarks: list[str]
    data: PackedTokens
    validation: list[torch.Tensor]
    parameters: int
    identity: dict[str, dict[str, Any]]
    model_files: dict[str, bytes]
    """What checkpoints keep beside the weights; on rank 0."""
    read_to: Position
    """How far the data have been read for the steps that were made; the beginning until then."""
    terms: Terms


def make_plan(settings: RunSettings) -> Plan:
    """Check everything, the cheapest first: the JSON, the run folder, the model's shape, the text.

    Raises:
        UserError: the first thing found that is not fit for a run.
    """
    import torch
    from deepspeed.accelerator import get_accelerator

    from toolkit import config as configs
    from toolkit import data, models
    from toolkit.models.build import skeleton

    for plugin in settings.plugins:
        import_plugin(plugin)
    config = configs.apply_overrides(configs.load_config(settings.config), settings.overrides)
    configs.validate(config, origin=settings.config)
    model_config, preset = models.load_config(settings.model)
    config = configs.settle(
        config,
        lambda: configs.Shape.of(skeleton(model_config)),
        on_gpu=get_accelerator().device_name() != "cpu",
        world_size=ranks.world_size(),
    )
    folder = settings.run_dir or run_of(settings) or run_folder.default_folder(settings.model, settings.config)
    run_folder.check_free(folder, resuming=settings.resume != NONE)
    settled = settle_terms(settings, config, noted(settings, folder))
    settings, ds, batch, remarks = settled.settings, settled.ds, settled.batch, list(settled.remarks)
    if ds.computed == "bf16" and not torch.accelerator.is_available() and models.cpu_matmul.computes_in_fp32():
        remarks.append("matrix products are computed in fp32 from bf16 operands, since this CPU is slow at bf16 ones.")

    name = settings.tokenizer or (preset.tokenizer if preset is not None else settings.model)
    tokenizer = data.load_tokenizer(name)
    if len(tokenizer) > model_config.vocab_size:
        raise UserError(
            f"tokenizer {name!r} has {len(tokenizer)} entries, more than the vocabulary of model "
            f"{settings.model!r} ({model_config.vocab_size}); choose another --tokenizer or --model."
        )
    models.check_length(model_config, settings.model, settings.seq_len)

    def packed(source: str, part: Literal["all", "train", "validation"]) -> PackedTokens:
        subset = settings.data_subset if source == settings.data else None
        documents = data.open_documents(
            source, subset=subset, text_column=settings.text_column, bad=settings.bad_documents
        )
        return data.PackedTokens(documents, tokenizer, settings.seq_len, seed=settings.seed, part=part)

    held_out = settings.eval_every > 0 and settings.val_data is None
    training = packed(settings.data, "train" if held_out else "all")
    training.require(batch.total)
    validation: list[torch.Tensor] = []
    if settings.eval_every > 0:
        source = packed(settings.val_data or settings.data, "validation" if held_out else "all")
        source.require(1)
        validation = [torch.as_tensor(sequence) for sequence in source.first_pass(settings.eval_sequences)]
        remarks += [f"passed over in the validation text: {problem}" for problem in source.position.named]
    return Plan(
        settings=settings,
        config=settled.config,
        ds=ds,
        batch=batch,
        folder=folder,
        remarks=remarks,
        data=training,
        validation=validation,
        parameters=models.count_parameters(model_config),
        identity=identity(settings, model_config, name, training),
        model_files=model_files(model_config, tokenizer, Path(settings.model).expanduser())
        if ranks.rank() == 0
        else {},
        read_to=data.Position(),
        terms=settled,
    )


def settle_terms(settings: RunSettings, config: Mapping[str, Any], saved: Saved | None) -> Terms:
    """The run that `settings`, the JSON `config` and the checkpoint to be resumed (None: there is none) make together.

    What is typed holds, and is said where it changes the run; what is left open stays as the checkpoint has it.

    Raises:
        UserError: they contradict each other, or the global batch of the checkpoint cannot stay.
    """
    from toolkit import config as configs

    asked, told = settings, list[str]()
    if saved is not None:
        settings, told = kept_settings(settings, saved, config)
    kept = saved.batch if saved is not None else None
    merged, batch, remarks = merge_flags(config, settings, ranks.world_size(), kept)
    configs.validate(merged, origin=settings.config, world_size=ranks.world_size(), total_steps=settings.steps)
    changed = changes(saved, terms(settings, merged, batch)) if saved is not None else []
    if told:
        remarks.append(f"as the checkpoint has it: {', '.join(told)}.")
    if changed:
        remarks.append(f"not as in the run that saved the checkpoint: {'; '.join(changed)}.")
    return Terms(
        asked, config, saved, settings, merged, configs.DeepSpeedSettings.read(merged), batch, changed, remarks
    )


def settle_again(plan: Plan, saved: Saved | None) -> None:
    """Give `plan` the terms of the checkpoint that was chosen, should they not be those of the newest manifest."""
    if saved == plan.terms.saved:
        return
    old, new = plan.terms, settle_terms(plan.terms.asked, plan.terms.json, saved)
    plan.terms, plan.settings, plan.batch = new, new.settings, new.batch
    plan.config, plan.ds = new.config, new.ds
    plan.remarks = [*new.remarks, *(remark for remark in plan.remarks if remark not in old.remarks)]
