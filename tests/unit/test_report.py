"""The data model of a report: what it says of whole runs, and what of missing and damaged ones."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from report_runs import (
    PARAMETERS,
    measurement,
    out_of_memory,
    prediction,
    setup,
    write_run,
    write_training,
)

from toolkit.errors import UserError
from toolkit.records.categories import is_model_state
from toolkit.records.memory import PREDICTED, Measurement, measured_name, write_record
from toolkit.report import build_report, render
from toolkit.report.data import RunReport


def report_of(folder: Path) -> RunReport:
    [run] = build_report([folder]).runs
    return run


def problems(run: RunReport) -> str:
    return "\n".join(problem.sentence for problem in run.problems)


# A whole run


def test_the_peak_is_the_largest_ranks_and_every_byte_of_it_has_a_category(tmp_path: Path) -> None:
    run = report_of(write_run(tmp_path / "run"))
    first, second = measurement(rank=0), measurement(rank=1)
    assert first.peak is not None and second.peak is not None and first.peak > second.peak
    assert run.peak is not None
    assert (run.peak.bytes, run.peak.rank, run.peak.phase) == (first.peak, 0, first.peak_phase)
    assert sum(run.peak.held.values()) == first.peak
    assert run.peak.per_parameter == pytest.approx(first.peak / PARAMETERS)
    assert sum(row.peak for row in run.per_parameter) == first.peak
    assert sum(row.resident or 0 for row in run.per_parameter) == sum(first.resident.values())
    assert run.problems == []
    assert "1.38 GB on rank 0, in the backward pass: 10.27 bytes for each of 134,107,392 parameters" in run.headline
    assert "largest part is activations: 566.23 MB, 41 %" in run.headline


def test_errors_are_of_the_measurement_in_percent(tmp_path: Path) -> None:
    run = report_of(write_run(tmp_path / "run"))
    at_peak, between = run.comparisons
    assert (at_peak.moment, between.moment) == ("at the peak", "between steps")
    predicted, measured = prediction(), measurement()
    assert (at_peak.total.predicted, at_peak.total.measured) == (predicted.peak, measured.peak)
    assert at_peak.total.error == pytest.approx(100 * (predicted.peak / (measured.peak or 0) - 1))
    activations = next(pair for pair in at_peak.categories if pair.name == "activations")
    assert activations.error == pytest.approx(-1.5, abs=1e-6)
    state = sum(size for name, size in measured.resident.items() if is_model_state(name))
    assert between.model_state is not None and between.model_state.measured == state
    assert between.model_state.error == 0
    other = next(pair for pair in between.categories if pair.name == "other")
    assert (other.predicted, other.error) == (0, -100)


def test_a_category_that_was_only_predicted_has_no_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_record(folder, PREDICTED, prediction(resident={**prediction().resident, "buckets": 5}))
    between = report_of(folder).comparisons[1]
    assert next(pair for pair in between.categories if pair.name == "buckets").error is None


def test_offloaded_state_is_compared_in_host_memory(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ranks=1)
    write_record(folder, PREDICTED, prediction(ranks=1, host={"v": 90}))
    write_record(folder, measured_name(0), measurement(ranks=1, host_memory={"v": 100}, limit=2_000_000_000))
    run = report_of(folder)
    host = run.comparisons[-1]
    assert (host.moment, host.total.error, run.ranks[0].limit) == ("in host memory", -10, 2_000_000_000)


def test_peaks_in_different_phases_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_record(folder, PREDICTED, prediction(peak_phase="step", peak=prediction().phases[-1].peak))
    report = build_report([folder])
    assert report.runs[0].comparisons[0].phases == ["step", "backward"]
    assert "predicted in phase step and measured in backward" in render(report, "markdown")


def test_imbalance_is_the_largest_against_the_mean_and_names_the_category(tmp_path: Path) -> None:
    imbalance = report_of(write_run(tmp_path / "run")).imbalance
    peaks = [measurement(rank=rank).peak or 0 for rank in (0, 1)]
    assert imbalance is not None
    assert (imbalance.rank, imbalance.largest, imbalance.mean) == (0, peaks[0], statistics.fmean(peaks))
    assert imbalance.percent == pytest.approx(100 * (peaks[0] / statistics.fmean(peaks) - 1))
    # The second rank's activations are 7 % smaller; all else is equal.
    assert (imbalance.category, imbalance.excess) == ("activations", (peaks[0] - peaks[1]) / 2)


def test_training_is_summed_up_as_the_loop_does(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    training = report_of(folder).training
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert training is not None and training.complete
    assert training.loss == pytest.approx(statistics.fmean(line["loss"] for line in lines[-10:]))
    assert training.val_loss == lines[-1]["val_loss"]
    assert training.tokens == 8 * 256 * len(lines)
    assert training.compile_s == 41.0
    assert training.tokens_per_s == pytest.approx(8 * 256 / statistics.median(line["step_time_s"] for line in lines))


def test_a_run_of_the_loop_alone_has_its_loss_and_resident_set(tmp_path: Path) -> None:
    write_training(tmp_path / "run")
    run = report_of(tmp_path / "run")
    assert run.peak is not None and (run.peak.kind, run.peak.bytes) == ("resident set", 1_910_000_000)
    assert run.peak.per_parameter is None  # most of it is libraries
    assert (run.facts.optimizer, run.facts.state_format, run.facts.stage) == ("AMCS", "8bit", 2)
    assert "no folder memory/" in problems(run)


def test_memory_of_a_loop_of_ones_own_is_enough(tmp_path: Path) -> None:
    write_record(tmp_path / "run", measured_name(0), measurement(ranks=1))
    run = report_of(tmp_path / "run")
    assert run.training is None and run.peak is not None
    assert run.facts.model == "qwen3-134m" and run.facts.parameters == PARAMETERS
    assert "predicted.json: nothing to compare" in problems(run)


def test_a_summary_on_a_cpu_knows_the_resident_set_only(tmp_path: Path) -> None:
    of = {"peak": None, "peak_phase": None, "phases": [], "resident": {}, "timeline": None, "blocks": []}
    write_record(tmp_path / "run", PREDICTED, prediction())
    for rank in (0, 1):
        write_record(tmp_path / "run", measured_name(rank), measurement(rank=rank, level="summary", **of))
    run = report_of(tmp_path / "run")
    assert run.peak is not None and run.peak.kind == "resident set" and run.comparisons == []
    assert run.imbalance is not None and run.imbalance.of == "resident set"
    assert run.timeline is not None and not run.timeline.measured  # the predicted one


# Missing and damaged


def test_a_crash_is_told_with_the_steps_that_were_made(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    whole = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(whole[:7]) + whole[7][:30])
    run = report_of(folder)
    assert run.training is not None and run.training.steps == 7 and not run.training.complete
    assert "breaks off in line 8 of 8; the 7 before it are whole" in problems(run)
    assert "no summary.json: the run crashed, was killed or is still going; 7 steps" in problems(run)


def test_losses_that_are_not_finite_are_named_and_leave_gaps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[4] |= {"loss": None, "nonfinite": ["loss"]}
    lines[-1]["loss"] = math.nan
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = build_report([folder])
    training = report.runs[0].training
    assert training is not None and training.nonfinite_steps == [5, 40]
    assert training.curve.loss[4] is None and training.loss is None
    assert "not finite at steps 5 and 40" in problems(report.runs[0])
    assert "NaN" not in render(report, "json")
    assert re.search(r"\bnan\b", render(report, "html"), re.IGNORECASE) is None


def test_ranks_without_a_measurement_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ranks=4)
    for rank in (1, 3):
        (folder / "memory" / measured_name(rank)).unlink()
    run = report_of(folder)
    assert run.missing_ranks == [1, 3] and [rank.rank for rank in run.ranks] == [0, 2]
    assert "Ranks 1 and 3 of 4 left no measurement" in problems(run)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"peak": 1}', '"\\ud800"', "[" * 100_000, "\udcff", "9" * 5000]
)
@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "summary.json", "memory/predicted.json", "memory/rank0.json"]
)
def test_a_damaged_file_is_named_and_the_rest_is_reported(tmp_path: Path, name: str, content: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    report = build_report([folder])
    run = report.runs[0]
    assert run.peak is not None
    # A run.json or summary.json of other fields is not damage: whatever it does not say is not known.
    if not (content == '{"peak": 1}' and name in ("run.json", "summary.json")):
        assert name in problems(run)
    for kind in ("html", "markdown", "json"):
        assert render(report, kind)


def test_a_damaged_explanation_falls_back_on_its_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "memory" / "rank1-out-of-memory.json").write_text("{")
    (folder / "memory" / "rank1-out-of-memory.md").write_text("# Out of memory\nheld 3 GB")
    run = report_of(folder)
    [explained] = run.out_of_memory
    assert explained.rank == 1 and explained.record is None and "held 3 GB" in (explained.text or "")
    assert "rank1-out-of-memory.json is damaged" in problems(run)


def test_a_run_out_of_memory_says_so_first(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_record(folder, "rank1-out-of-memory.json", out_of_memory())
    run = report_of(folder)
    assert run.headline.startswith("Rank 1 ran out of memory: it held 1.38 GB and asked for 131.07 MB more.")
    assert run.out_of_memory[0].record == out_of_memory()


def test_a_prediction_of_another_setup_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_record(folder, PREDICTED, prediction(setup=setup(micro_batch=8)))
    assert "another setup than the measurement: micro_batch 8 there, 4 here" in problems(report_of(folder))


def _backwards(record: Measurement) -> None:
    assert record.timeline is not None and record.timeline.milliseconds is not None
    record.timeline.milliseconds.reverse()


def _short(record: Measurement) -> None:
    assert record.timeline is not None
    record.timeline.held["weights"].pop()


def _negative(record: Measurement) -> None:
    assert record.timeline is not None
    record.timeline.held["weights"][0] = -1


@pytest.mark.parametrize("damage", [_backwards, _short, _negative])
def test_a_timeline_that_cannot_be_drawn_is_left_out(tmp_path: Path, damage: Callable[[Measurement], None]) -> None:
    folder = write_run(tmp_path / "run", ranks=1)
    record = measurement(ranks=1)
    damage(record)
    write_record(folder, measured_name(0), record)
    run = report_of(folder)
    assert "memory/rank0.json is damaged: its timeline" in problems(run)
    assert run.timeline is not None and not run.timeline.measured


# What is no run


def test_what_is_no_run_is_one_sentence_with_the_nearest_folder(tmp_path: Path) -> None:
    write_training(tmp_path / "amcs-first")
    (tmp_path / "amcs-frist").mkdir()
    for path, said in (
        (tmp_path / "amcs-fist", "there is no run folder"),
        (tmp_path / "amcs-frist", "holds no run"),
    ):
        with pytest.raises(UserError) as caught:
            build_report([path])
        message = str(caught.value)
        assert said in message and str(path) in message and "run.json and metrics.jsonl" in message
        assert "Did you mean 'amcs-first'?" in message and "\n" not in message
    with pytest.raises(UserError, match=r"Runs are in its folders 'amcs-first'\."):
        build_report([tmp_path])
    with pytest.raises(UserError, match="is a file"):
        build_report([tmp_path / "amcs-first" / "run.json"])
    with pytest.raises(UserError, match="given twice"):
        build_report([tmp_path / "amcs-first", tmp_path / "amcs-first"])


# Several runs


def test_alike_runs_have_no_gap_and_their_losses_are_paired(tmp_path: Path) -> None:
    first = write_run(tmp_path / "adamw", "AdamW")
    second = write_run(tmp_path / "amcs", better=0.3)
    report = build_report([first, second])
    assert report.gaps == []
    adamw, amcs = report.methods
    assert adamw.against_first is None and amcs.against_first is not None
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (first, second)]
    differences = [mine - other for other, mine in zip(*losses, strict=True)]
    assert amcs.against_first.difference == differences
    assert amcs.against_first.mean == pytest.approx(statistics.fmean(differences[-10:]))
    # The noise of the batches is the same in both, so it is gone from the difference.
    assert (amcs.against_first.standard_error or 1) < 0.1 * statistics.stdev(losses[1][-10:])
    assert (adamw.optimizer, adamw.weights, amcs.state_format, amcs.ranks) == ("AdamW", "fp32", "8bit", 2)
    assert report.headline.startswith("amcs takes the least memory")


def test_runs_that_are_not_alike_are_compared_with_every_gap_named(tmp_path: Path) -> None:
    first = write_run(tmp_path / "one")
    write_training(tmp_path / "two", steps=20, model="qwen3-tiny", parameters=5_049_088, data="fineweb", seed=3)
    report = build_report([first, tmp_path / "two"])
    text = "\n".join(report.gaps)
    assert "Different model: qwen3-134m in one; qwen3-tiny in two" in text
    assert "Different number of parameters: 134,107,392 in one; 5,049,088 in two" in text
    assert "Different data: stdlib in one; fineweb in two" in text
    assert "Different token budget: 81,920 in one; 40,960 in two" in text
    assert "Memory allocated at the peak is not known of two." in text
    assert [method.memory_kind for method in report.methods] == ["allocated at the peak", None]
    assert "Different seed" in text and "steps asked for" in text
    assert [method.run for method in report.methods] == ["one", "two"]
    markdown = render(report, "markdown")
    assert markdown.index("Not like for like") < markdown.index("## Methods")


def test_rates_betas_decay_and_warm_up_are_reported_and_compared(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    schedule = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 4}}
    for folder, rate, beta, decay, warmup, clip in zip(
        folders, (6e-4, 1e-3), (0.9, 0.8), (0.1, 0.0), (4, 8), (1.0, 0.5), strict=True
    ):
        run = json.loads((folder / "run.json").read_text())
        params = {"lr": rate, "betas": [beta, 0.95, 0.95], "weight_decay": decay}
        run["ds_config"] |= {"optimizer": {"type": "AMCS", "params": params}, "gradient_clipping": clip}
        run["ds_config"]["scheduler"] = {**schedule, "params": {"warmup_num_steps": warmup}}
        (folder / "run.json").write_text(json.dumps(run))
    report = build_report(folders)
    text = "\n".join(report.gaps)
    for words in (
        "Different learning rate: 0.0006 in one; 0.001 in two",
        "Different betas: [0.9, 0.95, 0.95] in one; [0.8, 0.95, 0.95] in two",
        "Different weight decay: 0.1 in one; 0.0 in two",
        "Different warm-up: 4 in one; 8 in two",
        "Different gradient clipping: 1.0 in one; 0.5 in two",
    ):
        assert words in text
    assert "scheduler" not in text
    markdown = render(report, "markdown")
    for row in ("| learning rate | 0.0006 |", "| betas | 0.8, 0.95, 0.95 |", "| weight decay | 0.1 |"):
        assert row in markdown
    assert "| warm-up | 8 steps |" in markdown and "| scheduler | WarmupCosineLR |" in markdown
    write_run(tmp_path / "peak")
    run = json.loads((tmp_path / "peak" / "run.json").read_text())
    run["ds_config"]["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.25}}
    (tmp_path / "peak" / "run.json").write_text(json.dumps(run))
    assert report_of(tmp_path / "peak").facts.learning_rate == 0.25  # which the scheduler sets over the optimizer's


def test_runs_are_compared_by_what_the_model_holds_and_never_by_resident_sets(tmp_path: Path) -> None:
    """Measured in summary on a CPU, where no peak is known: AdamW's process may be the smaller one."""
    for name, process in (("AdamW", 1_000_000_000), ("AMCS", 3_000_000_000)):
        write_run(tmp_path / name, name, steps=20)
        for rank in (0, 1):
            record = measurement(name, rank=rank, level="summary", peak=None, peak_phase=None, phases=[], timeline=None)
            record.largest_resident_set = process
            write_record(tmp_path / name, measured_name(rank), record)
    report = build_report([tmp_path / "AdamW", tmp_path / "AMCS"])
    adamw, amcs = report.methods
    assert adamw.memory_kind == amcs.memory_kind == "held by the model between steps"
    for method, name in ((adamw, "AdamW"), (amcs, "AMCS")):
        held = measurement(name).resident
        assert method.memory == sum(size for category, size in held.items() if is_model_state(category))
        assert method.per_parameter == pytest.approx((method.memory or 0) / PARAMETERS)
    assert "master weights" in measurement("AdamW").resident  # of which AdamW's state is a part
    assert report.headline.startswith("AMCS takes the least memory")
    assert report.footnotes == [
        "Resident sets, the whole process with its libraries, which say little of the model: AdamW 1.00 GB and "
        "AMCS 3.00 GB."
    ]
    for kind in ("html", "markdown"):
        assert report.footnotes[0] in render(report, kind)


def test_a_batch_that_changed_counts_as_what_each_step_was(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[10:]:  # older lines have no such fields
        line |= {"sequences": 4, "tokens": 4 * 256, "tokens_per_s": 4 * 256 / line["step_time_s"]}
    lines[10]["changed"] = ["ranks 2, now 1", "global batch 8, now 4", "--steps 40, now 60"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = build_report([folder, write_run(tmp_path / "other")])
    training = report.runs[0].training
    assert training is not None and training.tokens == (10 * 8 + 30 * 4) * 256
    assert training.tokens_per_s == pytest.approx(statistics.median(line["tokens_per_s"] for line in lines))
    assert [(one.first, one.sequences) for one in training.batches] == [(1, 8), (11, 4)]
    assert "Different global batch: 8; 4 from step 11 on in run; 8 in other" in "\n".join(report.gaps)
    markdown = render(report, "markdown")
    assert "| global batch | 8; 4 from step 11 on |" in markdown
    assert "before step 11: ranks 2, now 1, global batch 8, now 4, --steps 40, now 60" in markdown
    assert "40 of 60 steps, " in markdown
    assert any(gap.startswith("Different steps asked for: 60 in run; 40 in other") for gap in report.gaps)


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    write_training(tmp_path / "a" / "run")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert [run.name for run in build_report([tmp_path / "a" / "run", tmp_path / "b" / "run"]).runs] == [
        "a/run",
        "b/run",
    ]
