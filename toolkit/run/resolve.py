"""The settings that a run ends up with, from the command line, the DeepSpeed JSON and the checkpoint it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.config.batch import Batch
from toolkit.run import monitors, ranks
from toolkit.run.merge import merge_flags
from toolkit.run.settings import RunSettings
from toolkit.run.terms import Saved, changes, kept_settings, terms

if TYPE_CHECKING:
    from toolkit.config import DeepSpeedSettings


@dataclass(frozen=True)
class ResolvedSettings:
    """What was given (`asked`, `json`, `saved`: None without a checkpoint) and what it comes to.

    `changed`: what differs from the run that saved the checkpoint, in words; `remarks`: all that the user is told.
    """

    asked: RunSettings
    json: Mapping[str, Any]
    saved: Saved | None
    settings: RunSettings
    config: dict[str, Any]
    ds: DeepSpeedSettings
    """`config`, read."""
    batch: Batch
    changed: list[str]
    remarks: list[str]


def resolve(settings: RunSettings, config: Mapping[str, Any], saved: Saved | None) -> ResolvedSettings:
    """What `settings`, the JSON `config` and the checkpoint that is resumed (None: there is none) come to together.

    A setting that was given holds, with a remark where it changes the run; all others stay as the checkpoint has them.

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
    monitors.check_one(settings.tracker, merged)
    changed = changes(saved, terms(settings, merged, batch)) if saved is not None else []
    if told:
        remarks.append(f"taken from the checkpoint: {', '.join(told)}.")
    if changed:
        remarks.append(f"changed since the run that saved the checkpoint: {'; '.join(changed)}.")
    ds = configs.DeepSpeedSettings.read(merged)
    return ResolvedSettings(asked, config, saved, settings, merged, ds, batch, changed, remarks)
