"""Draw docs/images/bytes.svg, the bars of the README, from the measured tables of docs/benchmarks/README.md.

python tests/benchmarks/picture.py
"""

from __future__ import annotations

import re
from pathlib import Path

from markupsafe import Markup

DOCS = Path(__file__).parents[2] / "docs"
PICTURE = DOCS / "images" / "bytes.svg"

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
@media (prefers-color-scheme: dark) { text { fill: #d0d7de } .held { fill: #4f93d8 } .peak { fill: #2b4f78 } }
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


def main() -> None:
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(measured()))


if __name__ == "__main__":
    main()
