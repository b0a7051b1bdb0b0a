"""On a GPU a step is read after the next one has been queued; here a CPU does so, and nothing else may change.

And the steps at which a run saves where writing is slow (`test_due.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

from small_runs import answer_of

WORKER = """
import json, os, signal, sys
from pathlib import Path
import toolkit.train
from toolkit.run import training
from toolkit.run.settings import parse

folder, data = Path(sys.argv[1]), sys.argv[2]
line = f"--data {data} --model {folder}/model --tokenizer python-4k --eval-sequences 2 --config amcs_zero2"
line += " --set optimizer.params.compile=false --seq-len 16 --seed 1"
line += " --micro-batch 1 --grad-accum 2 --memory-profile off --bad-documents stop"
step, made = training.optimizer_step, []

def stopping(engine, *rest):
    if engine.global_steps == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(engine, *rest)

training.optimizer_step = stopping
for behind, stop_at, name in ((0, None, "at once"), (1, 3, "later")):
    training.steps_behind = lambda device: behind
    settings = parse([*line.split(), *"--steps 7 --eval-every 3 --save-every 3 --run-dir".split(), str(folder / name)])
    toolkit.train.train(settings)

import time
import toolkit.checkpoint.files as files
from toolkit.checkpoint.store import Store

write, store, stop_at, at_risk = files.save, Store(folder / "slow" / "checkpoints"), None, []

def slowly(*args, **kwargs):
    time.sleep(0.4)
    return write(*args, **kwargs)

def noted(engine, *rest):
    at_risk.append(engine.global_steps + 1 - max(store.steps(), default=0))
    return step(engine, *rest)

files.save, training.optimizer_step, training.steps_behind = slowly, noted, lambda device: 0
more = "--steps 30 --eval-every 0 --save-every 20 --keep-last 9 --run-dir"
toolkit.train.train(parse([*line.split(), *more.split(), str(folder / "slow")]))
print(json.dumps([at_risk, sorted(store.steps())]))
"""


def test_records_saves_and_stops_are_those_of_steps_that_are_read_at_once(tmp_path: Path) -> None:
    at_risk, saved = answer_of(WORKER, tmp_path)
    assert (saved[0], saved[-1]) == (18, 30)  # a tenth of 20 early; then as early as this machine's steps are quick
    assert len(at_risk) == 30 and max(at_risk) <= 20  # the step that is made among them

    def records(name: str) -> list[dict[str, object]]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        timed = ("tokens_per_s", "step_time_s", "between_s", "data_seconds", "flops_per_s", "memory_bytes")
        timed += ("save_wait_s",)
        return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]

    assert len(records("at once")) == 7
    # The signal came in step 4. The step that was queued before anybody knew of it is made, written and saved.
    assert records("later") == records("at once")[:5]
    for name, last in (("at once", 7), ("later", 5)):
        assert (tmp_path / name / "checkpoints" / f"global_step{last}").is_dir()
