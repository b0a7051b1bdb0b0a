"""Bytes a parameter at the peak of whole steps: every format, released or not, at every stage, on one rank and two.

    python tests/benchmarks/formats_memory.py measured.jsonl                # what is missing there, then the table
    python tests/benchmarks/formats_memory.py measured.jsonl --at-most 0    # the table of what is there

A row of the file is a run, written when it has ended; what is there is not measured again. Runs are those of
`memory.py`, of three steps, the third traced; the prediction is what `toolkit estimate` says now. Those that say most
come first.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from memory import TOKENS, configuration, launch, predict

FORMATS = (
    "fp32, bf16+16",
    "8bit, bf16+16",
    "8bit, bf16+8",
    "compact, bf16+4",
    "minimal, bf16+4",
    "4bit, bf16+4",
    "factored, bf16+8",
    "lean, bf16",
    "mixed, leanest, bf16",
)
RELEASED = ", released"
PLACES = ((2, 2), (3, 2), (2, 1), (3, 1), (1, 2), (1, 1))  # stage, ranks
LIMIT = 0.01


def names() -> list[str]:
    """Of `memory.CASES`."""
    return [f"AMCS {name}{end}" for end in (RELEASED, "") for name in FORMATS]


def measure(name: str, stage: int, ranks: int, model: str) -> dict[str, Any]:
    found = launch(configuration(name, stage), ranks, model=model, seq_len=TOKENS, steps=3)
    largest = max(found, key=lambda rank: rank["peak"])
    kept = ("peak", "phase", "parameters", "forward", "backward", "step", "resident")
    return {"case": name, "stage": stage, "ranks": ranks, "model": model} | {key: largest[key] for key in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines")
    parser.add_argument("--model", default="qwen3-134m")
    parser.add_argument("--at-most", type=int, help="runs, now")
    options = parser.parse_args()
    lines = options.file.read_text().splitlines() if options.file.exists() else []
    rows = {
        (row["case"], row["stage"], row["ranks"]): row
        for row in map(json.loads, lines)
        if row["model"] == options.model
    }
    missing = [(name, *place) for place, name in itertools.product(PLACES, names()) if (name, *place) not in rows]
    for key in missing[: options.at_most]:
        rows[key] = measure(*key, options.model)
        with options.file.open("a") as file:
            file.write(json.dumps(rows[key]) + "\n")
    print(
        "| | " + " | ".join(f"stage {stage}, {ranks} rank{'s' * (ranks > 1)}" for stage, ranks in sorted(PLACES)) + " |"
    )
    print("|" + "---|" * (len(PLACES) + 1))
    worst = 0.0
    for name in sorted(names(), key=lambda one: one.removesuffix(RELEASED)):
        cells = []
        for stage, ranks in sorted(PLACES):
            row = rows.get((name, stage, ranks))
            if row is None:
                cells.append("")
                continue
            predicted = predict(configuration(name, stage), ranks, options.model)
            worst = max(worst, abs(predicted / row["peak"] - 1))
            cells.append(" / ".join(f"{size / row['parameters']:.2f}" for size in (row["peak"], predicted)))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{len(rows)} runs, measured / predicted; largest error {100 * worst:.2f} %")
    if worst > LIMIT:
        raise SystemExit(f"beyond {LIMIT:.0%}")


if __name__ == "__main__":
    main()
