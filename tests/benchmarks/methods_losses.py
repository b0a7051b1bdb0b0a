"""The tables "Methods side by side" of docs/benchmarks/README.md, from what `toolkit compare` wrote.

    python tests/benchmarks/methods_losses.py                                  # the tables, from the kept losses
    python tests/benchmarks/methods_losses.py --add runs/fineweb/report.json   # add a comparison's first

Kept are validation losses by method, rate and seed (docs/benchmarks/methods-losses.json). Differences are paired by
seed, so all runs are of one kind of machine: another gives other losses for the same seed. A method whose name ends in
"-fp32" is another with fp32 state, one in "-warmup160" with 160 steps of warm-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.compare.differences import Difference, difference
from toolkit.optim import RULES

KEPT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "methods-losses.json"
BASELINE = "adamw"
MAIN = (
    f"method | - {BASELINE}, paired by seed | in spreads | validation loss | lr | at half and twice that, seed 0 | "
    "peak, MB | state, bytes a parameter"
)
FEW = f"method | - {BASELINE}, paired by seed | seeds | lr"
WARMUPS = (13, 32, 64, 160, 320, 480)
"""Steps of warm-up out of 640; 64 are those of a method without "-warmup" in its name."""
WARM = f"method | {' | '.join(map(str, WARMUPS))} | at its best: - {BASELINE} at its, by seed | in spreads | seeds"
STATES = " | 8-bit state | fp32 state | difference, paired | 2 s.e. | by seed"
EXACT = "-fp32"
WARMUP = re.compile(r"(.+)-warmup(\d+)")
ENOUGH = 3  # seeds


def machine() -> str:
    """What losses depend on."""
    import torch

    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.split('+')[0]}"


def add(kept: dict[str, Any], report: Mapping[str, Any], where: str) -> None:
    """Put the losses of a comparison into `kept`, by method and rate."""
    if kept.setdefault("machine", where) != where:
        raise SystemExit(f"kept are losses of {kept['machine']}, and these are of {where}")
    for one in report["methods"]:
        if not one["losses"]:
            continue
        [rate] = one["best"].values()
        held = kept.setdefault("methods", {}).setdefault(one["name"], {"lr": rate, "losses": {}})
        if held["lr"] != rate:
            raise SystemExit(f"{one['name']}: kept are losses at lr {held['lr']:g}, and these are at {rate:g}")
        held["losses"] |= {seed: round(loss, 4) for seed, loss in one["losses"].items()}
        others = {
            value: round(loss, 4)
            for sweep in one["sweeps"]
            for value, loss in sweep["losses"].items()
            if loss is not None and float(value) != rate  # None: diverged, or not run yet
        }
        if others:
            held["others"] = held.get("others", {}) | others
        held |= {"peak_mb": round(one["peak"] / 1e6, 2), "state": round(one["state_per_parameter"], 2)}


def _beside(one: Mapping[str, Any], base: Mapping[str, Any]) -> Difference:
    found = difference(one["losses"], base["losses"])
    assert found is not None
    return found


def _said(beside: Difference) -> str:
    error = "" if beside.standard_error is None else f" ± {beside.standard_error:.3f}"
    return f"{beside.mean:+.3f}{error}"


def _in_spreads(beside: Difference) -> str:
    return "" if beside.in_spreads is None else f"{beside.in_spreads:+.1f}"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def rows(kept: Mapping[str, Any]) -> list[str]:
    """Of MAIN: methods of ENOUGH seeds, the lowest difference first."""
    methods = kept["methods"]
    found = []
    for name, one in methods.items():
        if name.endswith(EXACT) or WARMUP.fullmatch(name) or len(one["losses"]) < ENOUGH:
            continue
        beside, others = _beside(one, methods[BASELINE]), one.get("others", {})
        said = ("", "") if name == BASELINE else (_said(beside), _in_spreads(beside))
        loss = f"{statistics.fmean(one['losses'].values()):.3f} ± {statistics.stdev(one['losses'].values()):.3f}"
        near = [others.get(f"{one['lr'] * factor:g}") for factor in (0.5, 2)]
        tried = ", ".join("not tried" if one is None else f"{one - methods[name]['losses']['0']:+.3f}" for one in near)
        held = f"{one['peak_mb']:.2f}", f"{one['state']:.2f}"
        found.append((beside.mean, _row(name, *said, loss, f"{one['lr']:g}", tried, *held)))
    return [row for _, row in sorted(found)]


def rows_of_warmups(kept: Mapping[str, Any]) -> list[str]:
    """Of WARM: the loss at seed 0 by steps of warm-up, then each method at its best against the baseline at its own."""
    methods = kept["methods"]
    tried: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name, one in methods.items():
        if found := WARMUP.fullmatch(name):
            tried.setdefault(found[1], {64: methods[found[1]]})[int(found[2])] = one
    best = {name: min(by_steps.values(), key=lambda one: one["losses"]["0"]) for name, by_steps in tried.items()}
    made = []
    for name, by_steps in tried.items():
        beside = _beside(best[name], best[BASELINE])
        cells = [f"{by_steps[steps]['losses']['0']:.3f}" if steps in by_steps else "" for steps in WARMUPS]
        said = ("", "") if name == BASELINE else (_said(beside), _in_spreads(beside))
        made.append((beside.mean, _row(name, *cells, *said, len(beside.by_seed))))
    return [row for _, row in sorted(made)]


def rows_of_few(kept: Mapping[str, Any]) -> list[str]:
    """Of FEW: methods of fewer seeds, each against the baseline at these."""
    methods = kept["methods"]
    return [
        _row(name, _said(_beside(one, methods[BASELINE])), len(one["losses"]), f"{one['lr']:g}")
        for name, one in methods.items()
        if len(one["losses"]) < ENOUGH and not WARMUP.fullmatch(name)
    ]


def rows_of_states(kept: Mapping[str, Any]) -> list[str]:
    """Of STATES: each rule in 8 bits and in fp32, the largest loss first."""
    methods, rules = kept["methods"], {name.lower(): name for name in RULES}
    found = []
    for name, exact in methods.items():
        coded = methods.get(name.removesuffix(EXACT))
        if name.endswith(EXACT) and coded is not None:
            beside = _beside(coded, exact)
            if beside.standard_error is None:
                continue
            means = [f"{statistics.fmean(one['losses'].values()):.4f}" for one in (coded, exact)]
            by_seed = ", ".join(f"{one:+.4f}" for one in beside.by_seed.values())
            cells = f"{beside.mean:+.4f}", f"{2 * beside.standard_error:.4f}", by_seed
            found.append((-beside.mean, _row(rules[name.removesuffix(EXACT)], *means, *cells)))
    return [row for _, row in sorted(found)]


TABLES = ((MAIN, rows), (WARM, rows_of_warmups), (FEW, rows_of_few), (STATES, rows_of_states))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="REPORT", help="report.json of comparisons")
    options = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for path in options.add:
        add(kept, json.loads(path.read_text()), machine())
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    for heading, made in TABLES:
        print(f"| {heading} |", "|" + "---|" * len(heading.split(" | ")), *made(kept), "", sep="\n")


if __name__ == "__main__":
    main()
