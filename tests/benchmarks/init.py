"""Memory while a model and its engine are made, against what a run holds between its steps.

    python tests/benchmarks/init.py                                        # qwen3-134m, one and two ranks
    python tests/benchmarks/init.py --model qwen3-1.7b --ranks 2 --stages 2 3
    python tests/benchmarks/init.py --model qwen3-0.6b --ranks 2 --stages 3 --steps 2 --mapped no yes

Every allocation of real CPU ranks is counted by torch's profiler, and the resident set by the kernel; of several ranks
the largest number counts. "above" is what the peak has on top of what is held between steps, in shares of the largest
layer or embedding as it is drawn: fp32, and the bf16 weights that it becomes. "mapped" says whether glibc maps pieces
of 2 MB by themselves, as a run has it where memory is scarce. What is resident is without what was before the model:
at most until the engine is there, at most in the steps, and after them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from memory import CASES, Launcher, by_deepspeed, configuration

WORKER = Path(__file__).with_name("init_worker.py")
LEAN = "AMCS lean, bf16, released"
SETS = ("resident_set", "steps_set", "steady_set")


def launch(
    config: dict[str, Any],
    world_size: int,
    model: str,
    steps: int = 1,
    launcher: Launcher = by_deepspeed,
    mapped: bool = True,
) -> list[dict[str, Any]]:
    """What each rank held, as init_worker.py has it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.json"
        settings = {"config": config, "model": model, "steps": steps, "mapped": mapped, "out": folder}
        path.write_text(json.dumps(settings))
        status, printed = launcher(Path(folder), world_size, WORKER, str(path))
        if status:
            raise SystemExit(f"{config}, {world_size} rank(s):\n{printed}")
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-134m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--cases", nargs="+", default=[LEAN], choices=CASES)
    parser.add_argument("--steps", type=int, default=1, help="0: against what is held when the engine is there")
    parser.add_argument("--mapped", nargs="+", default=["yes"], choices=("yes", "no"), help="pieces of 2 MB or more")
    options = parser.parse_args()
    held_at = ("peak", "engine made", "in steps", "between steps", "above")
    columns = ("case", "stage", "ranks", "mapped", *held_at, "resident: peak", "in steps", "after")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    every = itertools.product(options.cases, options.stages, options.ranks, options.mapped)
    for name, stage, ranks, mapped in every:
        found = launch(configuration(name, stage), ranks, options.model, options.steps, mapped=mapped == "yes")
        for one in found:
            if not options.steps:
                one |= {"in_steps": one["held"], "steady": one["held"]}
                one |= {"steps_set": one["resident_set"], "steady_set": one["resident_set"]}
        held = {key: max(one[key] for one in found) for key in found[0]}
        above = max((one["peak"] - one["steady"]) / one["largest"] for one in found)
        sizes = [f"{held[key] / 1e6:,.0f} MB" for key in ("peak", "held", "in_steps", "steady")]
        # Without Python and libraries, which were there before.
        sets = [f"{max(one[key] - one['before'] for one in found) / 1e6:,.0f} MB" for key in SETS]
        print(
            "| " + " | ".join((name, str(stage), str(ranks), mapped, *sizes, f"{above:+.2f}", *sets)) + " |", flush=True
        )


if __name__ == "__main__":
    main()
