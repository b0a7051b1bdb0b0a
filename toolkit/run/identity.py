"""What a run trains, on what: the parts that a checkpoint must share with the run that resumes from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.agreed import agreed
from toolkit.checkpoint.model_files import config_hash, tokenizer_hash
from toolkit.errors import UserError
from toolkit.run import ranks
from toolkit.run.settings import RunSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from toolkit.data import PackedTokens


def identity(
    settings: RunSettings, config: PretrainedConfig, tokenizer: str, training: PackedTokens
) -> dict[str, dict[str, Any]]:
    """Names and hashes of model, tokenizer and data, and what else fixes the order of the data."""
    lora = settings.lora
    return {
        "model": {"name": settings.model, "sha256": config_hash(config), **({"lora": str(lora)} if lora else {})},
        "tokenizer": {"name": tokenizer, "sha256": tokenizer_hash(training.tokenizer)},
        "data": {
            "name": settings.data,
            "sha256": training.documents.fingerprint(),
            "part": training.part,
            "seq_len": training.seq_len,
            "seed": training.seed,
            "windows": [training.shuffle_window, training.sequence_window],
            **({"template": template} if (template := template_hash(training)) is not None else {}),
            **packing_fact(training),
        },
    }


def note_base(settings: RunSettings, here: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
    """Add to this run's identity which weights adapters are trained beside; every rank must call this.

    Random ones are noted nowhere: only checkpoints have them. `say` is told what takes a while.

    Raises:
        UserError: they cannot be read.
    """
    if settings.lora is None or not settings.from_checkpoint:
        return
    from toolkit.checkpoint.base import Base  # imports torch
    from toolkit.models.presets import folder_of

    found = agreed(lambda: Base.of(folder_of(settings.model), say) if ranks.rank() == 0 else None)
    here["model"]["base"] = ranks.from_first(found and found.facts)


def template_hash(training: PackedTokens) -> str | None:
    """SHA-256, in hex, of what the chat template makes sequences of conversations from; None for text."""
    from toolkit.data import PackedConversations

    if not isinstance(training, PackedConversations):
        return None
    return hashlib.sha256(repr(training.chat.identity).encode()).hexdigest()


def packing_fact(text: PackedTokens) -> dict[str, int]:
    """What checkpoints note of how sequences are made of a text; nothing of plain text."""
    return {} if text.packing is None else {"packing": text.packing}


def check_same(saved: Mapping[str, Any] | None, here: dict[str, dict[str, Any]], where: Path) -> None:
    """Raise UserError unless the checkpoint in `where`, which says `saved` of itself, is of this run's kind.

    Where that one holds the weights beside adapters itself, `here` names no base any more.
    """
    if saved is None:  # DeepSpeed's own checkpoints say nothing
        here["model"].pop("base", None)
        return
    for part in ("model", "tokenizer", "data"):
        old, new = saved[part], here[part]
        if old["sha256"] != new["sha256"]:
            same = old["name"] == new["name"]
            now = "which has changed since" if same else f"and this run has {part} {new['name']!r}"
            raise UserError(f"the checkpoint {where} was trained with {part} {old['name']!r}, {now}.")
    if saved["model"].get("lora") != here["model"].get("lora"):
        words = [f"--lora {said}" if (said := part["model"].get("lora")) else "all weights" for part in (saved, here)]
        raise UserError(f"the checkpoint {where} was trained with {words[0]}, and this run trains {words[1]}.")
    beside, weights = (part["model"].get("base") for part in (saved, here))
    if beside is None:
        here["model"].pop("base", None)  # it holds all weights, as those of this run will
    elif weights is None or weights["sha256"] != beside["sha256"]:
        given = f"other weights, those in {weights['path']}" if weights else "random weights, without --from-checkpoint"
        raise UserError(
            f"the checkpoint {where} was trained beside the weights in {beside['path']}, and this run has {given}."
        )
    for key, flag in (("seq_len", "--seq-len"), ("seed", "--seed"), ("windows", "shuffling in windows of")):
        if saved["data"][key] != here["data"][key]:
            old = saved["data"][key]
            advice = f"; give {flag} {old}" if flag.startswith("--") else ""
            raise UserError(
                f"the checkpoint {where} was trained with {flag} {old}, and this run has {here['data'][key]}: "
                f"the data would differ{advice}."
            )
    if saved["data"].get("template") != here["data"].get("template"):
        raise UserError(
            f"the checkpoint {where} was trained with another chat template: give the --chat-template of that run."
        )
    if (packing := saved["data"].get("packing")) != (own := here["data"].get("packing")):
        raise UserError(
            f"the checkpoint {where} was trained on conversations that another version of this package fitted into "
            f"sequences (packing {packing or 'older than 2'}, this one's is {own}): the data would differ; resume with "
            "that version, or begin a new run from its weights (toolkit export, --from-checkpoint)."
        )
    if saved["data"]["part"] != here["data"]["part"]:
        raise UserError(
            f"the checkpoint {where} was trained on the part {saved['data']['part']!r} of its data, and this run on "
            f"{here['data']['part']!r}: give the same --val-data and --eval-every."
        )
