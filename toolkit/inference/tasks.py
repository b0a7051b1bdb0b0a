"""The tasks of lm-evaluation-harness, a package of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from toolkit.errors import UserError, nearest
from toolkit.inference.opened import Opened


def check(names: Sequence[str]) -> None:
    """Raise UserError unless the package is there and knows all of `names`."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs the package lm_eval, which is not installed: pip install lm_eval.")
    from lm_eval.tasks import TaskManager

    known = TaskManager()
    for name in names:
        if not known.match_tasks([name]):
            raise UserError(f"lm_eval has no task {name!r}.{nearest(name, known.all_tasks)}")


def evaluate(opened: Opened, names: Sequence[str]) -> dict[str, Any]:
    """The figures of each task, by name."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=opened.model.hf, tokenizer=opened.tokenizer)
    found: Any = simple_evaluate(model=model, tasks=list(names), log_samples=False)
    names_of_it = ("name", "alias")
    return {
        task: {name: value for name, value in figures.items() if name not in names_of_it}
        for task, figures in found["results"].items()
    }
