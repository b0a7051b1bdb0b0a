"""The table "More methods" of docs/benchmarks/README.md, from what `toolkit compare` wrote.

    python tests/benchmarks/methods_losses.py                                  # the table, from the kept losses
    python tests/benchmarks/methods_losses.py --add runs/fineweb/report.json   # add a comparison's first

Kept are the validation losses by method, best rate and seed (docs/benchmarks/methods-losses.json). Differences are
paired by seed, so all runs are of one kind of machine: another gives other losses for the same seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.compare.differences import difference

KEPT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "methods-losses.json"
BASELINE = "adamw"
HEADING = f"method | - {BASELINE}, paired by seed | seeds | validation loss | peak, MB | state, bytes a parameter | lr"


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
        held |= {"peak_mb": round(one["peak"] / 1e6, 2), "state": round(one["state_per_parameter"], 2)}


def rows(kept: Mapping[str, Any]) -> list[str]:
    """Of a Markdown table, the lowest difference first."""
    methods = kept["methods"]
    found = []
    for name, one in methods.items():
        beside = difference(one["losses"], methods[BASELINE]["losses"])
        assert beside is not None
        error = "" if beside.standard_error is None else f" ± {beside.standard_error:.3f}"
        said = "" if name == BASELINE else f"{beside.mean:+.3f}{error}"
        loss = f"{statistics.fmean(one['losses'].values()):.4f}"
        held = f"{one['peak_mb']:.2f}", f"{one['state']:.2f}"
        cells = (name, said, len(beside.by_seed), loss, *held, f"{one['lr']:g}")
        found.append((beside.mean, f"| {' | '.join(map(str, cells))} |"))
    return [row for _, row in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="REPORT", help="report.json of comparisons")
    options = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for path in options.add:
        add(kept, json.loads(path.read_text()), machine())
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"| {HEADING} |", "|" + "---|" * len(HEADING.split(" | ")), *rows(kept), sep="\n")


if __name__ == "__main__":
    main()
