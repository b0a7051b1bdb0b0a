"""Draw the README's pictures from what was measured: the bars of docs/images/bytes.svg from the tables of
docs/benchmarks/README.md, the curves of docs/images/losses.svg from docs/benchmarks/losses.json.

    python tests/benchmarks/picture.py
    python tests/benchmarks/picture.py runs/adamw runs/adamw8 runs/amcs    # from new runs, by the name of their folder
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from markupsafe import Markup

DOCS = Path(__file__).parents[2] / "docs"
PICTURE, CURVES = DOCS / "images" / "bytes.svg", DOCS / "images" / "losses.svg"
LOSSES = DOCS / "benchmarks" / "losses.json"
EVERY = 4
"""Steps whose mean is a point of the curves."""
NAMES = {
    "adamw": "AdamW, fp32 state",
    "adamw8": "AdamW8, 8-bit state",
    "amcs": "AMCS, 8-bit state",
}
"""Runs, and what the picture calls them."""

ROWS = {
    "AdamW, DeepSpeed defaults": "AdamW, DeepSpeed's defaults",
    "AMCS 8bit, bf16+8": "AMCS 8bit",
    "SOAM 8bit, bf16+8": "SOAM 8bit",
    "AMCS lean, bf16": "AMCS lean",
    "AdamW8 lean, bf16": "AdamW8 lean",
    "AMCS lean, bf16, released": "AMCS lean, gradients released",
    "AdamW8 lean, bf16, released": "AdamW8 lean, gradients released",
}
"""Rows of the tables, and what the picture calls them."""

WIDTH, LEFT, HEIGHT, TOP = 760, 230, 26, 34
SCALE = (WIDTH - LEFT - 50) / 23.46

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.held { fill: #2f6fb3 } .peak { fill: #a9c6e8 }
polyline { fill: none; stroke-width: 2 } .rule { stroke: #d0d7de }
.a { stroke: #57606a } .b { stroke: #2f6fb3 } .c { stroke: #c2570c }
@media (prefers-color-scheme: dark) { text { fill: #d0d7de } .held { fill: #4f93d8 } .peak { fill: #2b4f78 }
.rule { stroke: #373e47 } .a { stroke: #adbac7 } .b { stroke: #4f93d8 } .c { stroke: #e0823d } }
"""


def measured() -> dict[str, tuple[float, float]]:
    """Bytes a parameter between steps and at the peak, by the row's name."""
    text = (DOCS / "benchmarks" / "README.md").read_text()
    peaks = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) \|[^|]*\|[^|]*\|$", text, re.MULTILINE))
    resident = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) \|(?: [\d.]+ \|){3}$", text, re.MULTILINE))
    return {name: (float(resident[name]), float(peaks[name])) for name in ROWS}


def draw(found: dict[str, tuple[float, float]]) -> str:
    """The picture: a bar for each row, what is held between steps and what the peak adds."""
    height = TOP + HEIGHT * len(found) + 6
    parts = [
        Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img">').format(WIDTH, height),
        Markup("<title>Peak bytes per parameter of a training step, measured on Qwen3-134M</title>"),
        Markup("<style>{}</style>").format(Markup(STYLE)),
    ]
    legend = (("held", "weights and optimizer state"), ("peak", "gradients and temporaries at the peak"))
    for place, (kind, words) in enumerate(legend):
        x = LEFT + 210 * place
        parts.append(Markup('<rect class="{}" x="{}" y="6" width="12" height="12"/>').format(kind, x))
        parts.append(Markup('<text x="{}" y="17">{}</text>').format(x + 18, words))
    for place, (name, (held, peak)) in enumerate(found.items()):
        y = TOP + HEIGHT * place
        middle, end = round(LEFT + SCALE * held, 1), round(LEFT + SCALE * peak, 1)
        parts += [
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 8, y + 14, ROWS[name]),
            Markup('<rect class="held" x="{}" y="{}" width="{:.1f}" height="18"/>').format(LEFT, y, middle - LEFT),
            Markup('<rect class="peak" x="{}" y="{}" width="{:.1f}" height="18"/>').format(middle, y, end - middle),
            Markup('<text x="{}" y="{}">{:.1f}</text>').format(end + 6, y + 14, peak),
        ]
    return "\n".join([*parts, Markup("</svg>"), ""])


def read(folders: list[Path]) -> dict[str, Any]:
    """What is kept of runs: a point for some steps together, and the last validation."""
    runs = {}
    for folder in folders:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records]
        runs[folder.name] = {
            "loss": [round(statistics.fmean(losses[at : at + EVERY]), 4) for at in range(0, len(losses), EVERY)],
            "val_loss": round(records[-1]["val_loss"], 4),
            "state_bytes_per_parameter": round(
                json.loads((folder / "summary.json").read_text())["state_bytes_per_parameter"], 2
            ),
        }
    return {"every": EVERY, "runs": runs}


def draw_losses(found: dict[str, Any]) -> str:
    """The curves over one another, each with its last validation loss and its bytes of state a parameter."""
    height, left, top, bottom = 300, 44, 78, 270
    runs = found["runs"]
    longest = max(len(run["loss"]) for run in runs.values())
    all_of_them = [loss for run in runs.values() for loss in run["loss"]]
    first, last = int(min(all_of_them)), int(max(all_of_them)) + 1

    def place(index: int, loss: float) -> str:
        x = left + (WIDTH - left - 16) * (index + 1) / longest
        return f"{x:.1f},{bottom - (bottom - top) * (loss - first) / (last - first):.1f}"

    parts = [
        Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img">').format(WIDTH, height),
        Markup("<title>Training loss with AdamW, AdamW8 and AMCS, measured on a Qwen3 of 5M parameters</title>"),
        Markup("<style>{}</style>").format(Markup(STYLE)),
    ]
    for loss in range(first, last + 1):
        _, y = place(0, loss).split(",")
        parts.append(Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, WIDTH - 16, y, y))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 8, float(y) + 4, loss))
    for index in range(longest // 3 - 1, longest, longest // 3):
        x, _ = place(index, first).split(",")
        step = (index + 1) * found["every"]
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(x, height - 8, f"step {step}"))
    for kind, (at, (name, run)) in zip("abc", enumerate(runs.items()), strict=False):
        points = " ".join(place(index, loss) for index, loss in enumerate(run["loss"]))
        words = (
            f"{NAMES[name]}: {run['state_bytes_per_parameter']:.2f} bytes a parameter beside the weights, "
            f"validation {run['val_loss']:.3f}"
        )
        y = 16 + 20 * at
        parts += [
            Markup('<polyline class="{}" points="{}"/>').format(kind, points),
            Markup('<polyline class="{}" points="{},{} {},{}"/>').format(kind, left, y - 4, left + 22, y - 4),
            Markup('<text x="{}" y="{}">{}</text>').format(left + 30, y, words),
        ]
    return "\n".join([*parts, Markup("</svg>"), ""])


def main() -> None:
    if folders := [Path(folder) for folder in sys.argv[1:]]:
        LOSSES.write_text(json.dumps(read(folders), indent=1) + "\n")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(measured()))
    CURVES.write_text(draw_losses(json.loads(LOSSES.read_text())))


if __name__ == "__main__":
    main()
