"""`toolkit bench`: what is counted, in which order it is timed, what counts as slower, and what is refused."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_command import process_kept, run

from toolkit.bench import step as steps
from toolkit.bench import timing
from toolkit.bench.against import Change, check, compare
from toolkit.bench.contenders import DEFAULT, Stepper, read_contenders
from toolkit.bench.methods import read_each
from toolkit.bench.record import WAYS, Machine, Record, Row, Spread, loaded, ratios
from toolkit.bench.shapes import even, of_model, parse_count
from toolkit.commands.bench_call import UNFINISHED
from toolkit.data import PackedTokens
from toolkit.errors import UserError
from toolkit.models import count_parameters, load_config
from toolkit.optim import arguments
from toolkit.state.layout import layout, state_formats


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiling proves nothing here; the command sets the process's threads and some of its environment."""
    monkeypatch.setitem(arguments.OPTIONS, "compile", False)
    with process_kept():
        monkeypatch.setenv("COLUMNS", "80")
        yield


# ---- what is counted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "state", "moved"),
    [
        ("torch-adamw:fp32", 8, 28),
        ("torch-adamw:bf16", 4, 14),
        ("torch-adamw:master", 12, 28),  # state and the copy of the weights twice, gradient and weights once
        ("amcs:fp32:fp32", 12, 36),
        ("amcs:8bit:bf16+8", 3 + 3 * 4 / 256 + 1, 6 + 2 * (3 + 3 * 4 / 256 + 1)),
        ("soam:8bit:bf16", 2 + 2 * 4 / 256, 6 + 2 * (2 + 2 * 4 / 256)),
        ("adamw8:8bit:master", 4 + 2 + 2 * 4 / 256, 4 + 2 * (4 + 2 + 2 * 4 / 256)),
    ],
)
def test_bytes_are_those_of_the_types(name: str, state: float, moved: float) -> None:
    [contender], shapes = read_contenders([name]), even(2**16)
    weights, gradients = (shapes.tensors_like(contender.dtype, "cpu", scale) for scale in (1.0, 1e-3))
    stepper = Stepper(contender, shapes, weights, gradients)
    before = weights[0].clone()
    stepper()
    assert not weights[0].equal(before), "a step updates the weights that a model computes with"
    assert stepper.state_bytes() == pytest.approx(state, rel=1e-3)
    assert stepper.bytes_moved() == pytest.approx(moved, rel=1e-3)


def test_bytes_of_every_format_are_those_of_its_layout() -> None:
    shapes = even(2**16)
    for text in ("soam:compact:bf16+4", "amcs:minimal:bf16+4", "lion8:4bit:bf16+16"):
        [one] = read_contenders([text])
        tensors = [shapes.tensors_like(one.dtype, "cpu", 1.0) for _ in range(2)]
        stepper = Stepper(one, shapes, *tensors)
        stepper()
        [group] = stepper.optimizer.param_groups
        states: Any = type(stepper.optimizer).rule.states  # type: ignore[attr-defined]
        formats = state_formats(states, one.state_format or "", where=text)
        held = layout(states, formats, group["weights"], one.dtype).bytes_per_element()
        assert stepper.state_bytes() == pytest.approx(sum(held.values()), rel=1e-3), text


def test_the_tensors_of_a_model_are_all_its_parameters() -> None:
    shapes = of_model("qwen3-tiny")
    assert shapes.parameters == count_parameters(load_config("qwen3-tiny")[0])
    assert {group.options["component"] for group in shapes.groups} == {
        *("embedding", "attention", "ffn", "norm", "head"),
    }


# ---- how it is timed ----------------------------------------------------------------------------------------------


def test_calls_alternate_and_the_first_rounds_do_not_count() -> None:
    made: list[str] = []
    told: list[tuple[int, bool]] = []
    calls: dict[str, timing.Call] = {name: functools.partial(made.append, name) for name in "abc"}
    found = timing.in_turn(calls, "cpu", 7, lambda left: told.append((len(made), left > 0)))
    assert told == [(3 * timing.WARM, True)]
    assert made == list("abc") * (timing.WARM + 7)
    assert {name: len(samples) for name, samples in found.items()} == dict.fromkeys("abc", 7)


def test_a_slow_round_moves_no_ratio() -> None:
    times = {"a": [1.0, 1.0, 8.0, 1.0], "b": [2.0, 2.0, 16.0, 2.0]}
    assert ratios(times, "a")["b"] == Spread(median=2, lower=2, upper=2, samples=4)


# ---- what is said -------------------------------------------------------------------------------------------------


def record(median: float, spread: float, **changed: Any) -> Record:
    machine = Machine(processor="p", instructions="AVX2", cores=2, threads=2, device="cpu")
    timed = {"seconds": Spread(median=median, lower=median - spread, upper=median + spread, samples=7)}
    timed["tokens_per_s"] = Spread(
        median=1 / median, lower=1 / (median + spread), upper=1 / (median - spread), samples=7
    )
    values: dict[str, Any] = {
        "command": "step",
        "settings": {"parameters": 4},
        "options": {},
        "machine": machine,
        "load": 0.0,
        "began": "",
        "versions": {},
        "rows": [Row(name="x", timed=timed)],
    }
    return Record(**(values | changed))


def slower(before: Record, now: Record, **options: Any) -> list[str]:
    check(before, now, Path("old.json"), anyway=options.pop("anyway", False))
    found: list[Change] = compare(before, now, Path("old.json"), options.pop("tolerance", 0.05))
    return [change.quantity for change in found if change.slower]


def test_slower_is_what_lies_beyond_both_spreads_and_the_tolerance() -> None:
    assert slower(record(1.0, 0.1), record(1.3, 0.1)) == ["seconds", "tokens_per_s"]
    assert slower(record(1.0, 0.1), record(1.3, 0.25)) == []
    assert slower(record(1.0, 0.01), record(1.04, 0.01)) == []
    assert slower(record(1.0, 0.01), record(1.04, 0.01), tolerance=0.02) == ["seconds", "tokens_per_s"]
    assert slower(record(1.3, 0.1), record(1.0, 0.1)) == [], "faster is not slower"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"settings": {"parameters": 5}}, "old.json was measured with parameters 4, and now it is 5"),
        (
            {"machine": Machine(processor="p", instructions="AVX2", cores=2, threads=1, device="cpu")},
            "threads 2, and now it is 1",
        ),
        ({"rows": [Row(name="y", timed={})]}, "has none of what was measured now"),
        ({"command": "data"}, "is of `toolkit bench step`, not of `toolkit bench data`"),
    ],
)
def test_what_does_not_compare_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("`", ".")):
        slower(record(1.0, 0.1), record(9.0, 0.1, **changed))


def test_figures_that_mean_something_else_do_not_compare() -> None:
    """Not even with --anyway, and before anything is measured."""
    before = record(1.0, 0.1).model_copy(update={"command": "train", "way": 1})
    with pytest.raises(UserError, match="old.json is of another version, whose `toolkit bench train` measures"):
        check(before, before.model_copy(update={"way": WAYS["train"]}), Path("old.json"), anyway=True)


def test_anyway_compares_another_machine() -> None:
    machine = Machine(processor="q", instructions="AVX2", cores=2, threads=1, device="cpu")
    assert slower(record(1.0, 0.1), record(9.0, 0.1, machine=machine), anyway=True)


def test_a_loaded_machine_is_said() -> None:
    assert loaded(record(1.0, 0.1, load=0.4)) is None
    assert "load average 3.5 on 2 cores" in str(loaded(record(1.0, 0.1, load=3.5)))


# ---- the command --------------------------------------------------------------------------------------------------

SHORT = ("--repeats", "7", "--threads", "1")
SMALL = ("--parameters", "64k", "--optimizers", "torch-adamw,soam:8bit:bf16+8,flash-adamw", *SHORT)


def test_a_record_is_shown_written_and_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "now.json"
    assert run(monkeypatch, "step", *SMALL, "--json", str(file)) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith(("copy", "torch-adamw:", "soam:"))]
    assert len(table) == 3 and all(len(line) <= 80 for line in table), printed
    assert "left out: flash-adamw:bf16: " in printed
    found = Record.model_validate_json(file.read_text())
    assert [row.name for row in found.rows] == ["copy", "torch-adamw:fp32", "soam:8bit:bf16+8"]
    assert all(row.timed["seconds"].samples == 7 for row in found.rows)
    assert found.rows[1].counted["ratio"] == 1 and found.rows[0].counted["of_copy"] == pytest.approx(1)

    # As if everything had been far faster before.
    content = json.loads(file.read_text())
    for row in content["rows"]:
        row["timed"] = {
            key: {part: value if part == "samples" else value / 1000 for part, value in spread.items()}
            for key, spread in row["timed"].items()
        }
    other = tmp_path / "before.json"
    other.write_text(json.dumps(content))
    assert run(monkeypatch, "--against", str(other)) == 1
    assert "slower: soam:8bit:bf16+8: ms " in capsys.readouterr().out
    content["machine"]["processor"] = "another"
    other.write_text(json.dumps(content))
    assert run(monkeypatch, "--against", str(other)) == 2
    assert 'measured with processor "another"' in capsys.readouterr().err
    content["options"]["plugins"] = "x.py"
    other.write_text(json.dumps(content))
    assert run(monkeypatch, "--against", str(other)) == 2
    assert "has an option 'plugins'" in capsys.readouterr().err


def test_json_on_stdout_is_nothing_else(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "step", *SMALL, "--json", "-") == 0
    assert Record.model_validate_json(capsys.readouterr().out).rows


def test_a_benchmark_that_is_cut_short_has_written_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(steps, "SIZES", (2000, 4000))
    monkeypatch.setattr(steps, "TENSORS", (3,))
    file, whole, sizes = tmp_path / "cut.json", steps.measure, list[int]()

    def cut(contenders: Any, shapes: Any, *rest: Any, **options: Any) -> steps.Measured:
        sizes.append(shapes.parameters)
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return whole(contenders, shapes, *rest, **options)

    monkeypatch.setattr(steps, "measure", cut)
    given = ["step", "--growth", "--optimizers", "torch-adamw", "--parameters", "8k", *SHORT]
    assert run(monkeypatch, *given, "--json", str(file)) != 0
    kept = Record.model_validate_json(file.read_text())
    assert [row.at["parameters"] for row in kept.rows if row.name != steps.COPY] == [1024, 3072]
    assert kept.notes == [UNFINISHED]
    before = json.loads(file.read_text()) | {"notes": []}
    file.write_text(json.dumps(before))
    sizes.clear()
    capsys.readouterr()
    assert run(monkeypatch, *given, "--against", str(file), "--json", str(file)) != 0
    assert json.loads(file.read_text()) == before, "what an earlier call has measured is not lost with this one"
    assert Record.model_validate_json((tmp_path / "cut-unfinished.json").read_text()).notes == [UNFINISHED]
    assert f"{tmp_path / 'cut-unfinished.json'}" in capsys.readouterr().err
    monkeypatch.setattr(steps, "measure", whole)
    before["notes"] = [UNFINISHED]
    [row, _] = [row for row in before["rows"] if row["name"] != steps.COPY]
    before["rows"].append(row | {"name": "gone", "timed": {"seconds": row["timed"]["seconds"]}})
    file.write_text(json.dumps(before))
    run(monkeypatch, *given, "--against", str(file), "--tolerance", "1000000")
    shown = capsys.readouterr()
    printed = shown.out.replace("\n", " ")
    assert f"not compared, since {file} does not have them: 6 figures, of copy, torch-adamw:fp32." in printed
    assert "not compared, since they are not measured any more: 1 figure, of gone." in printed
    assert "none of 6 figures is slower beyond its spread." in printed
    assert "of a benchmark that was cut short" in shown.err


def test_growth_is_measured_and_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(steps, "SIZES", (2000, 4000))
    monkeypatch.setattr(steps, "TENSORS", (3, 9))
    plot, file = tmp_path / "growth.svg", tmp_path / "growth.json"
    given = ["--optimizers", "torch-adamw", "--parameters", "8k", *SHORT, "--json", str(file)]
    assert run(monkeypatch, "step", "--growth", *given, "--plot", str(plot)) == 0
    rows = Record.model_validate_json(file.read_text()).rows
    assert [tuple(row.at.values()) for row in rows if row.name != steps.COPY] == [
        *((1024, 1), (3072, 1), (7168, 1), (6144, 3), (7992, 9)),
    ], "as many as there are"
    assert "</svg>" in plot.read_text()
    few = [*given[:3], "6", *given[4:]]
    assert run(monkeypatch, "step", "--growth", *few) == 0
    rows = Record.model_validate_json(file.read_text()).rows
    assert [row.at["tensors"] for row in rows if row.name != steps.COPY] == [1, 3], "no 9 tensors have 6 parameters"
    monkeypatch.setattr(steps, "free_memory", lambda device: 100_000)
    capsys.readouterr()
    assert run(monkeypatch, "step", "--growth", *given) == 0
    assert "7.99k parameters in 9 tensors: left out, since it needs" in capsys.readouterr().out
    monkeypatch.setattr(steps, "free_memory", lambda device: 0)
    plot.unlink()
    assert run(monkeypatch, "step", "--growth", *given, "--plot", str(plot)) == 0, "one size alone is drawn, too"
    assert "</svg>" in plot.read_text()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["step", "--optimizers", "amcz"], "there is no optimizer 'amcz'"),
        (["step", "--optimizers", "torch-adamv"], "Did you mean 'torch-adamw'?"),
        (["step", "--optimizers", "amcs:9bit"], "state_format '9bit' is unknown"),
        (
            ["step", "--optimizers", "amcs:8bit:bf61"],
            "must be fp32, master, bf16+8, bf16+16, bf16+4, bf16. Did you mean",
        ),
        (["step", "--optimizers", "torch-adamw:bf16+8"], "must be fp32, bf16, master"),
        (["step", "--optimizers", "torch-adamw:fp32:fp32"], "not of the form NAME:WEIGHTS"),
        (["step", "--optimizers", "flash-adamw"], "none of --optimizers can run here (flash-adamw:bf16: "),
        (["step", "--parameters", "4", "--optimizers", "torch-adamw", "--baseline", "amcs"], "is none of --optimiz"),
        (["step", "--parameters", "many"], "such as 33.5M"),
        (["step", "--parameters", "1M", "--model", "qwen3-tiny"], "give one of them"),
        (["step", "--plot", "x.png"], "give --growth, too"),
        (["step", "--growth", "--plot", "x.xyz"], "--plot x.xyz is no kind of picture that can be drawn; those are"),
        (["step", "--growth", "--plot", "missing/x.png"], "--plot missing/x.png cannot be written: No such file"),
        (["step", "--json", "missing/x.json"], "--json missing/x.json cannot be written: No such file"),
        (["data", "--json", "."], "--json . cannot be written: it is a folder"),
        (["step", "--repeats", "3"], "7"),
        (["train", "--steps", "2", "--rounds", "3"], "a median is of 7 steps at least"),
        (["train", "--methods", "amcs,hf-trainer", "--baseline", "adamw"], "is none of --methods amcs, hf-trainer"),
        (["train", "--methods", "amcz"], "'amcz' is no shipped config"),
        (["train", "--methods", "hf-trainer,amcs,hf-trainer"], "'hf-trainer' is there twice"),
        (["train", "--methods", "amcs,hf-trainer=soam"], "'hf-trainer' is another project's, and takes no config"),
        (["save", "--methods", "deepspeed,deepspeed"], "'deepspeed' is there twice"),
        (["save", "--methods", "amcs,soam,amcs"], "'amcs' is there twice"),
        (["save", "--methods", ","], "--methods names no method"),
        (["save", "--folder", "missing"], "is no folder"),
        (["data", "--data", "missing.txt"], "missing.txt"),
        (["--against", "missing.json"], "missing.json is missing"),
        (["--json", "x.json", "step"], "go behind it"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], words: str
) -> None:
    monkeypatch.setattr(steps, "in_turn", None)  # it is said before anything is measured
    assert run(monkeypatch, *given) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and words in said[0], said


def test_the_data_path_is_timed_over_whole_windows_and_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """More documents than a window has, and a tokenizer that says how fast it may be: nothing read ahead counts."""
    (tmp_path / "text.jsonl").write_text(f"{json.dumps({'text': 'One word after another.'})}\n" * 1500)
    made: list[int] = []
    ids = PackedTokens._ids

    def slow(packed: PackedTokens, texts: list[str]) -> list[list[int]]:
        time.sleep(2e-4 * len(texts))
        found = ids(packed, texts)
        made.extend(len(tokens) + 1 for tokens in found)
        return found

    monkeypatch.setattr(PackedTokens, "_ids", slow)
    file = tmp_path / "data.json"
    given = ["--data", str(tmp_path / "text.jsonl"), "--seq-len", "32", "--batches", "3", "--step-ms", "4"]
    assert run(monkeypatch, "data", *given, *SHORT, "--json", str(file)) == 0
    first, again = Record.model_validate_json(file.read_text()).rows
    assert (first.name, again.name) == ("first pass", "from the cache")
    fastest = sum(made) / len(made) / 2e-4
    assert first.timed["tokens_per_s"].median < 1.2 * fastest < 2 * fastest < again.timed["tokens_per_s"].median
    for row in (first, again):
        assert row.timed["tokens_per_s"].samples == row.timed["wait_seconds"].samples == 7
        wait = row.timed["wait_seconds"].median
        assert row.counted == {"wait_share": pytest.approx(wait / (wait + 4e-3)), "asked_per_s": 4 * 32 / 4e-3}


def test_without_room_for_the_cache_the_first_pass_is_measured_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("One word after another, and so on to the end. " * 2000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=100 << 30, free=1 << 30))
    given = ["--data", str(tmp_path / "text.txt"), "--seq-len", "32", "--batches", "3", "--step-ms", "1"]
    assert run(monkeypatch, "data", *given, *SHORT, "--json", str(tmp_path / "data.json")) == 0
    found = Record.model_validate_json((tmp_path / "data.json").read_text())
    assert [row.name for row in found.rows] == ["first pass"]
    assert found.left_out["from the cache"].startswith("tokens cannot be kept in ")


def test_the_default_optimizers_are_known() -> None:
    assert [one.name for one in read_contenders(DEFAULT)] == list(DEFAULT)


@pytest.mark.parametrize(("text", "count"), [("33.5M", 33_500_000), ("1B", 10**9), ("64k", 64_000), ("7", 7)])
def test_numbers_of_parameters(text: str, count: int) -> None:
    assert parse_count(text, where="here") == count


def test_a_file_of_methods_names_all_of_them(tmp_path: Path) -> None:
    file = tmp_path / "methods.json"
    file.write_text(json.dumps({"one": "amcs_zero2", "two": "soam_zero2"}))
    assert list(read_each([str(file), "deepspeed"], "deepspeed", 2)) == ["one", "two", "deepspeed"]
