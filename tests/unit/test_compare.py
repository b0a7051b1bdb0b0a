"""What a comparison runs next, what it says of differences, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from toolkit.cli import main
from toolkit.compare.differences import difference, spread
from toolkit.compare.methods import read_methods, read_sweep
from toolkit.compare.plan import Plan, Point, Sweep, extended, load, save
from toolkit.compare.runs import Cell, Runs
from toolkit.compare.tuning import Tuning, beyond, tune
from toolkit.errors import UserError
from toolkit.run import ranks

LR = Sweep(key="lr", values=[1.0, 2.0, 4.0])


def play(sweeps: list[Sweep], loss: Any, *, seeds: int = 3, extend: int = 4) -> tuple[Tuning, list[tuple[Point, int]]]:
    """Make every run that is wanted, with losses from `loss(point, seed)`; the end, and the runs in order."""
    known: dict[tuple[Point, int], float] = {}
    for _ in range(50):
        tuning = tune(sweeps, seeds, extend, lambda point, seed: known.get((point, seed)))
        if not tuning.wanted:
            return tuning, list(known)
        for point, seed in tuning.wanted:
            assert (point, seed) not in known, "a run is made once"
            known[point, seed] = loss(dict(point), seed)
    raise AssertionError("it never ends")


def test_the_best_value_of_the_sweep_gets_the_other_seeds() -> None:
    tuning, made = play([LR], lambda point, seed: abs(math.log2(point["lr"]) - 1) + seed)
    assert tuning.point == (("lr", 2.0),) and tuning.tuned
    assert made == [((("lr", value),), 0) for value in (1.0, 2.0, 4.0)] + [((("lr", 2.0),), seed) for seed in (1, 2)]
    assert tuning.sweeps[0].step == 2.0


@pytest.mark.parametrize(
    ("best", "verdict", "tried"), [(5, "inside", 64.0), (9, "highest", 64.0), (-2, "inside", 0.125)]
)
def test_a_sweep_is_extended_by_its_own_factor_until_the_best_value_is_inside(
    best: int, verdict: str, tried: float
) -> None:
    tuning, _ = play([LR], lambda point, seed: abs(math.log2(point["lr"]) - best))
    assert tuning.sweeps[0].verdict == verdict and tuning.tuned is (verdict == "inside")
    assert tried in tuning.sweeps[0].losses and len(tuning.sweeps[0].losses) <= 3 + 4


def test_without_extension_the_end_of_the_sweep_is_said() -> None:
    tuning, made = play([LR], lambda point, seed: point["lr"], extend=0)
    assert tuning.sweeps[0].verdict == "lowest" and not tuning.tuned and len(made) == 3 + 2


@pytest.mark.parametrize(
    ("values", "best", "more"),
    [
        ([1e-3, 3e-3], 3e-3, 9e-3),
        ([1e-3, 3e-3], 1e-3, 3.33e-4),
        ([0.0, 0.1], 0.0, None),
        ([0.0, 0.1], 0.1, None),
        ([1.0], 1, None),
    ],
)
def test_the_value_beyond_an_end(values: list[float], best: float, more: float | None) -> None:
    assert beyond(values, best) == more


def test_sweeps_are_made_one_after_another_at_the_best_of_those_before() -> None:
    decay = Sweep(key="optimizer.params.weight_decay", values=[0.0, 0.1, 0.2])
    tuning, made = play(
        [LR, decay],
        lambda point, seed: abs(point["lr"] - 2) + abs(point.get(decay.key, 0.5) - 0.1),
    )
    assert tuning.point == (("lr", 2.0), (decay.key, 0.1)) and tuning.tuned
    assert len(made) == 3 + 3 + 2


def test_a_run_that_diverged_is_worse_than_any_and_a_method_of_which_all_diverged_gets_no_more_seeds() -> None:
    tuning, _ = play([LR], lambda point, seed: 1 / point["lr"] if point["lr"] < 4 else math.inf)
    assert tuning.point == (("lr", 2.0),) and tuning.tuned
    tuning, made = play([LR], lambda point, seed: math.inf)
    assert tuning.sweeps[0].verdict == "diverged" and not tuning.chosen
    assert {seed for _, seed in made} == {0} and min(value for ((_, value),), _ in made) < 1, "lower rates are tried"


def test_nothing_swept_is_every_seed_as_configured() -> None:
    tuning, made = play([], lambda point, seed: 1.0)
    assert made == [((), 0), ((), 1), ((), 2)] and not tuning.tuned


def test_differences_by_hand() -> None:
    mine, base = {0: 5.0, 1: 5.2, 2: 5.1}, {0: 5.2, 1: 5.3, 2: 5.3}
    found = difference(mine, base)
    assert found is not None
    assert found.by_seed == pytest.approx({0: -0.2, 1: -0.1, 2: -0.2})
    assert found.mean == pytest.approx(-1 / 6)
    # Of -0.2, -0.1, -0.2: the standard deviation is sqrt(1/300), the error that / sqrt(3).
    assert found.standard_error == pytest.approx(math.sqrt(1 / 300 / 3))
    # Variances 0.01 and 1/300, pooled over 2 + 2 degrees of freedom.
    assert found.spread == pytest.approx(math.sqrt((2 * 0.01 + 2 / 300) / 4))
    assert found.in_spreads == pytest.approx(-1 / 6 / math.sqrt(2 / 3) / math.sqrt((2 * 0.01 + 2 / 300) / 4))
    assert spread(mine) == pytest.approx(0.1)


def test_differences_of_few_seeds_have_no_error() -> None:
    one = difference({0: 5.0}, {0: 5.5, 1: 5.7})
    assert one is not None and one.mean == pytest.approx(-0.5)
    assert one.standard_error is None and one.spread is None and one.in_spreads is None
    apart = difference({2: 5.0}, {0: 5.5, 1: 5.7})
    assert apart is not None and apart.by_seed == {} and apart.mean == pytest.approx(-0.6)
    assert difference({}, {0: 1.0}) is None and spread({0: 1.0}) is None


def methods(*given: str, stage: int = 2, overrides: tuple[str, ...] = ()) -> list[Any]:
    return read_methods(given, [LR], stage, overrides)


def test_the_forms_of_a_method(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}))
    amcs, soam, mine = methods(f"amcs, soam_zero1,mine={own}", overrides=("gradient_clipping=2.0",))
    assert (amcs.name, amcs.origin, amcs.config["zero_optimization"]["stage"]) == ("amcs", "amcs_zero2", 2)
    assert (soam.name, soam.config["zero_optimization"]["stage"]) == ("soam_zero1", 1)
    assert mine.config["optimizer"]["type"] == "AdamW" and mine.sweeps == [LR]
    assert all(method.config["gradient_clipping"] == 2.0 for method in (amcs, soam, mine))
    rule, outside = methods("rule=AMCS", "torch.optim.AdamW", stage=1)
    assert rule.config["optimizer"] == {"type": "AMCS", "params": {"lr": 0.0006}}
    assert (
        outside.config["optimizer"]["type"] == "torch.optim.AdamW" and outside.config["zero_allow_untested_optimizer"]
    )
    assert outside.config["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_a_file_of_methods(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"methods{suffix}"
    content: Mapping[str, Any] = {
        "plain": "adamw",
        "fitted": {"config": "amcs", "set": {"optimizer.params.betas": [0.9, 0.99, 0.9]}},
        "lion": {"config": "adamw", "lr_factor": 0.1},
        "fixed": {"config": "soam", "sweep": {}},
    }
    if suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text(
            'plain = "adamw"\n[fitted]\nconfig = "amcs"\n[fitted.set]\n"optimizer.params.betas" = [0.9, 0.99, 0.9]\n'
            '[lion]\nconfig = "adamw"\nlr_factor = 0.1\n[fixed]\nconfig = "soam"\nsweep = {}\n'
        )
    plain, fitted, lion, fixed = methods(str(path))
    assert plain.sweeps == [LR] and fixed.sweeps == []
    assert fitted.config["optimizer"]["params"]["betas"] == [0.9, 0.99, 0.9]
    assert lion.sweeps[0].values == [0.1, 0.2, 0.4]


def refusal(act: Any) -> str:
    with pytest.raises(UserError) as caught:
        act()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr", "give a key and its values"),
        ("lr=", "give a key and its values"),
        ("lr=1e-3,fast", "'fast' is no finite number"),
        ("lr=1e-3,inf", "'inf' is no finite number"),
        ("lr=1e-3,1e-3", "the value 0.001 appears twice"),
        ("lr=0,1e-3", "rates are above 0"),
        ("warmpu=0.1", "Did you mean 'warmup'?"),
        ("weight_decay=0.1", "did you mean 'optimizer.params.weight_decay'?"),
    ],
)
def test_wrong_sweeps(text: str, said: str) -> None:
    assert said in refusal(lambda: read_sweep(text))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("amsc", "Did you mean 'amcs'?"),
        ("", "names no method"),
        ("amcs,amcs", "two methods 'amcs'"),
        ("a b=amcs", "no name for a method"),
        ("../x=amcs", "no name for a method"),
        ("mine=absent/config.json", "is neither a shipped config nor a file"),
        ("absent.json", "cannot be read"),
    ],
)
def test_wrong_methods(given: str, said: str) -> None:
    assert said in refusal(lambda: methods(given))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "one object, of methods by name"),
        ("{", "not valid JSON"),
        ('{"a": {"confg": "amcs"}}', "a."),
        ('{"a": {"config": "amcs", "lr_factor": 0}}', "a.lr_factor is 0"),
        ('{"a": {"config": "amcs", "sweep": {"lr": [-1.0]}}}', "rates are above 0"),
    ],
)
def test_wrong_files_of_methods(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "methods.json"
    path.write_text(content)
    assert said in refusal(lambda: methods(str(path)))


def plan(*given: str, steps: int = 5, ranks: int = 1) -> Plan:
    found = methods(*given)
    return Plan(settings={"model": "qwen3-tiny", "steps": steps}, ranks=ranks, baseline=found[0].name, methods=found)


def test_a_plan_is_read_back_and_extended(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    old = plan("amcs")
    save(old, tmp_path)
    assert load(tmp_path) == old
    more = read_methods(["amcs,adamw"], [Sweep(key="lr", values=[8.0])], 2, ())
    new = extended(old, old.model_copy(update={"methods": more, "seeds": 5}), tmp_path)
    assert [method.name for method in new.methods] == ["amcs", "adamw"] and new.seeds == 5
    assert new.methods[0].sweeps[0].values == [1.0, 2.0, 4.0, 8.0], "what was swept stays, or its runs would be lost"
    only = extended(new, plan("soam"), tmp_path, kept=["baseline"])
    assert only.baseline == "amcs" and only.seeds == 3
    assert [method.name for method in only.methods] == ["amcs", "adamw", "soam"]


def test_another_plan_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    old = plan("amcs")
    assert "with steps 5, and this one has 6" in refusal(lambda: extended(old, plan("amcs", steps=6), tmp_path))
    assert "with ranks 1, and this one has 2" in refusal(lambda: extended(old, plan("amcs", ranks=2), tmp_path))
    other = plan("amcs=soam")
    assert "config differs at optimizer" in refusal(lambda: extended(old, other, tmp_path))
    (tmp_path / "plan.json").write_text('{"settings": {}}')
    assert "is no plan of a comparison" in refusal(lambda: load(tmp_path))
    (tmp_path / "plan.json").write_text("{")
    assert "not valid JSON" in refusal(lambda: load(tmp_path))


def test_runs_at_the_same_time_have_ports_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([5001, 5001, 5002])  # a launcher that has just started has not taken its port yet
    monkeypatch.setattr(ranks, "free_port", lambda: next(free))
    runs = Runs(plan("amcs", ranks=2), tmp_path)
    ports = []
    for seed in (0, 1):
        command = runs.command(Cell("amcs", (), seed))
        ports.append(command[command.index("--master_port") + 1])
    assert ports == ["5001", "5002"]


def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    monkeypatch.setattr("sys.argv", ["toolkit", "compare", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--methods is missing"),
        (["--methods", "amcs", "--lr", "1e-3"], "--lr is set by the comparison; give --sweep lr="),
        (["--methods", "amcs", "--seed", "1"], "give --seeds"),
        (["--methods", "amcs", "--run-dir", "x"], "give --out"),
        (["--methods", "amcs", "--sweeep", "lr=1"], "there is no option --sweeep. Did you mean '--sweep'?"),
        (["--methods", "amcs", "--stpes", "3"], "Did you mean '--steps'?"),
        (["--methods", "amcs", "--baseline", "adamw"], "--baseline 'adamw' is none of the methods amcs"),
        (["--methods", "amcs", "--set", "gradient_cliping=1"], "Did you mean 'gradient_clipping'?"),
        (["--methods", "amcs", "--sweep", "optimizer.params.alhpa=0,1"], "Did you mean 'alpha'?"),
        (["--methods", "bitsandbites.optim.AdamW8bit"], "no installed package"),
        (["--methods", "torch.optim.AdamX"], "Did you mean 'Adamax'?"),
        (["--methods", "torch.optim.Muon"], "on a flat tensor"),
        (["--methods", "amcs", "--report"], "holds no comparison to report"),
    ],
)
def test_wrong_command_lines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    status, error = cli(monkeypatch, capsys, *arguments, "--out", str(tmp_path / "out"))
    assert status == 2 and error.count("error: ") == 1 and said in error
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_a_comparison_that_is_there_is_not_changed_by_an_option_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save(plan("amcs"), tmp_path)
    for option in (["--seeds", "5"], ["--steps", "7"]):
        status, error = cli(monkeypatch, capsys, "--out", str(tmp_path), *option)
        assert status == 2 and f"to change it by {option[0]}, give --methods too" in error


def test_the_methods_of_the_benchmarks_are_read() -> None:
    found = read_methods([str(Path(__file__).parents[2] / "docs" / "benchmarks" / "methods.json")], [], 2, [])
    assert len(found) == 73 and all(method.sweeps for method in found)
