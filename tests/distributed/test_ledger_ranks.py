"""The ledger on real ranks: every byte of a step has a name, a plain loop is measured, and memory that runs out."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import launched

from toolkit.records import categories as c
from toolkit.records.memory import FOLDER, PREDICTED, Measurement, OutOfMemoryRecord, Prediction, measured_name
from toolkit.records.run import METRICS, SUMMARY, read_metrics
from toolkit.run.memory import placement

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
WORKER = Path(__file__).with_name("ledger_worker.py")
PARAMETERS = 5_049_088
ACCUMULATION = 2


def options(folder: Path, **more: Any) -> list[str]:
    given = {"run-dir": folder, "model": "qwen3-tiny", "eval-sequences": 2} | more
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def measured(folder: Path) -> list[Measurement]:
    return [
        Measurement.model_validate_json((folder / FOLDER / measured_name(rank)).read_text(encoding="utf-8"))
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "full"
    more = {"steps": 4, "seq_len": 64, "micro_batch": 2, "grad_accum": ACCUMULATION, "eval_every": 2}
    status, said = launched(folder.parent, 2, TRAIN, *options(folder, memory_profile="full", **more))
    assert status == 0, said[-6000:]
    assert "USDT" not in said and "memory: at most" in said
    return folder


def test_every_byte_of_the_peak_has_a_name(full: Path) -> None:
    for rank, record in enumerate(measured(full)):
        assert (record.rank, record.level, record.step, record.steps) == (rank, "full", 3, 4)
        assert record.source == "torch's CPU allocator"
        assert record.peak is not None and record.timeline is not None
        phases = {phase.name: phase for phase in record.phases}
        assert {c.INIT, c.FORWARD, c.BACKWARD, c.REDUCE, c.STEP, c.EVAL} <= set(phases)
        for phase in record.phases:
            if phase.peak is not None:
                assert sum(phase.held.values()) == phase.peak
                assert phase.held.get(c.OTHER, 0) < 0.03 * phase.peak, phase
            assert phase.resident_set is not None and phase.resident_set > 50_000_000
        assert record.peak == max(phase.peak or 0 for phase in record.phases)
        assert record.peak_phase is not None and phases[record.peak_phase].peak == record.peak
        totals = [sum(values) for values in zip(*record.timeline.held.values(), strict=True)]
        assert max(totals) == record.peak
        [first, *_] = record.timeline.spans
        assert first.name == c.FORWARD and record.timeline.spans[-1].stop == len(totals)


def test_what_stays_between_steps_is_what_the_formats_say(full: Path) -> None:
    for record in measured(full):
        resident = record.resident
        assert resident[c.WEIGHTS] == pytest.approx(2 * PARAMETERS, rel=0.002)
        for name in ("m_fast", "m_slow", "v", c.REMAINDER):  # a byte each, over two ranks
            assert resident[name] == pytest.approx(PARAMETERS / 2, rel=0.01), name
        assert resident.get(c.GRADIENTS, 0) == resident.get(c.ACTIVATIONS, 0) == 0
        forward = next(phase for phase in record.phases if phase.name == c.FORWARD)
        # The second micro-batch's forward pass holds this rank's gradients of the first.
        assert forward.held[c.GRADIENTS] == pytest.approx(PARAMETERS, rel=0.01)


def test_the_largest_tensors_say_where_they_came_from(full: Path) -> None:
    blocks = measured(full)[0].blocks
    assert [block.bytes for block in blocks] == sorted((block.bytes for block in blocks), reverse=True)
    assert any(block.what.startswith("hf.model.layers.0.") and "more" in block.what for block in blocks)
    # The peak of so short a sequence is where this rank's bucket of gradients is reduced.
    assert any("zero/gradients.py:" in block.where and block.category == c.BUCKETS for block in blocks)
    assert any(block.where.startswith("backward: ") and block.category == c.GRADIENTS for block in blocks)
    assert all(block.category and block.what and block.phase in c.PHASES for block in blocks)


def test_snapshots_prediction_and_summary_are_there(full: Path) -> None:
    for rank, record in enumerate(measured(full)):
        taken = pickle.loads((full / FOLDER / f"rank{rank}-snapshot.pickle").read_bytes())
        left = sum(segment["total_size"] for segment in taken["segments"])
        named = sum(size for name, size in record.resident.items() if name != c.OTHER)
        assert left == pytest.approx(named, rel=0.001)
    predicted = Prediction.model_validate_json((full / FOLDER / PREDICTED).read_text())
    setup = measured(full)[0].setup
    assert setup == predicted.setup
    summary = json.loads((full / SUMMARY).read_text())
    assert summary["memory_files"] == str(full / FOLDER)
    # Of several ranks both are those of one rank; the records are of its last step, the summary of what followed.
    [largest] = [one for one in measured(full) if one.process == summary["process_bytes"]]
    assert largest.largest_resident_set == max(one.largest_resident_set or 0 for one in measured(full))
    assert largest.largest_resident_set <= summary["peak_memory_bytes"] < 1.2 * largest.largest_resident_set
    assert 100e6 < summary["process_bytes"] < summary["peak_memory_bytes"]
    assert summary["counted_peak_bytes"] == max(one.peak or 0 for one in measured(full))
    assert all(line["memory_bytes"] > 0 for line in read_metrics(full / METRICS))


@pytest.mark.parametrize("level", ["summary", "off"])
def test_three_lines_in_a_plain_loop(tmp_path: Path, level: str) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"out": str(tmp_path / "run"), "steps": 3, "level": level}))
    began = time.monotonic()
    status, said = launched(tmp_path, 2, WORKER, "plain", str(settings))
    seconds = time.monotonic() - began
    assert status == 0, said[-6000:]
    if level == "off":
        assert not (tmp_path / "run" / FOLDER).exists()
        return
    for record in measured(tmp_path / "run"):
        assert (record.steps, record.level, record.peak, record.timeline) == (3, "summary", None, None)
        assert [phase.name for phase in record.phases] == list(c.PHASES)
        assert record.setup.optimizer == "AdamW" and record.setup.stage == 2 and record.setup.world_size == 2
        parameters = 64 * 256 + 256 + 256 * 8 + 8
        assert record.setup.parameters == parameters
        assert record.resident[c.WEIGHTS] == pytest.approx(2 * parameters, rel=0.01)
        for name in (c.MASTER, "exp_avg", "exp_avg_sq"):  # fp32, over two ranks
            assert record.resident[name] == pytest.approx(4 * parameters / 2, rel=0.01), name
        assert 0 < record.overhead_seconds < seconds


def test_a_rank_that_runs_out_of_memory_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = options(folder, steps=3, seq_len=1024, micro_batch=8, eval_every=0)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"arguments": arguments, "rank": 1, "room": 1_600_000_000}))
    status, said = launched(tmp_path, 2, WORKER, "train", str(settings))
    assert status == 12, said[-6000:]
    page = folder / FOLDER / "rank1-out-of-memory.md"
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and lines[0].startswith("error: rank 1 ran out of memory") and str(page) in lines[0]
    assert "Traceback" not in said
    record = OutOfMemoryRecord.model_validate_json((folder / FOLDER / "rank1-out-of-memory.json").read_text())
    assert record.rank == 1 and record.setup is not None and record.setup.world_size == 2
    assert record.phase in (c.FORWARD, c.BACKWARD) and record.step == 1
    assert record.asked is not None and record.limit is not None and record.limit < 10_000_000_000
    assert record.held[c.WEIGHTS] == pytest.approx(2 * PARAMETERS, rel=0.01)
    assert record.held[c.ACTIVATIONS] > 50_000_000
    assert len(record.changes) == 3 and all(change.saves > 10_000_000 for change in record.changes)
    words = page.read_text()
    assert all(change.change in words and f"{change.saves:,}" in words for change in record.changes)
    assert "RLIMIT_AS" in words and f"{record.asked:,} bytes" in words
    assert pickle.loads(page.with_suffix(".pickle").read_bytes())["segments"]
    assert not (folder / FOLDER / "rank0-out-of-memory.json").exists()
    assert (folder / "run.json").exists() and (folder / FOLDER / PREDICTED).exists()


def too_large(folder: Path) -> list[str]:
    """Options of a run that is predicted not to fit."""
    small = folder / "small.py"
    small.write_text(
        "import toolkit.memory.out_of_memory as here\n\nhere.limits = lambda device, ranks: {'GPU': 40_000_000}\n"
    )
    return [*options(folder / "run", steps=1, seq_len=32, eval_every=0, save_every=0), "--plugin", str(small)]


def test_a_run_that_is_predicted_not_to_fit_does_not_start(tmp_path: Path) -> None:
    arguments = too_large(tmp_path)
    status, said = launched(tmp_path, 2, TRAIN, *arguments)
    assert status == 2, said[-3000:]
    [error] = [line for line in said.splitlines() if line.startswith("error:")]
    assert error.startswith("error: rank 0: this run is predicted to need") and "the limit of 40.00 MB (GPU)" in error
    assert error.endswith("see `toolkit plan` for settings that fit; --start-anyway starts it all the same.")
    assert "building the model" not in said


@pytest.mark.slow
def test_it_starts_where_it_is_told_to(tmp_path: Path) -> None:
    status, said = launched(tmp_path, 2, TRAIN, *too_large(tmp_path), "--start-anyway")
    assert status == 0, said[-3000:]
    assert "note: rank 0: this run is predicted to need" in said


def test_several_machines_are_shown_with_their_ranks() -> None:
    gib = 1 << 30
    assert placement([("a", gib), ("a", gib), ("b", 2 * gib), ("b", None)]) == [
        "a: ranks 0 to 1, at most 1.07 GB for each",
        "b: ranks 2 to 3, at most 2.15 GB for each",
    ]
    assert placement([("a", None), ("b", None), ("a", None)]) == ["a: ranks 0, 2", "b: rank 1"]
    assert placement([("a", gib), ("a", gib)]) == []
