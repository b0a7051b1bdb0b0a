"""docs/benchmarks/gpu.md, from what was measured, or from nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from measuring.parts import PARTS, Part

MISSING = "not measured"

HEAD = """\
# On a GPU

What an NVIDIA GPU shows and a CPU cannot. Measured by one command on a machine with one H100 or H200, PyTorch 2.11 or
later and Python 3.12, in less than nine minutes and without a network:

    python tests/gpu/wheels.py               # where there is a network: what such a machine lacks, to tests/gpu/wheels/
    python tests/gpu/measure.py              # on the GPU machine: measures, and writes docs/benchmarks/gpu.json
    python tests/gpu/measure.py --render     # this page, from that file

`measure.py` installs those wheels that are missing or older on its machine into a folder of its own, which it removes.
Each part is a process with a limit on its time, and its figures go into the JSON when it ends: what cuts the command
off loses one part. `--only PART ...` measures some parts anew and keeps the others' figures, `--minutes` limits the
whole (a part that no longer fits is not started), `--rehearse` runs it at toy size on a CPU, which measures nothing.

A part has passed if all its figures that have a target were measured and reach it; the others are only reported.
"""

COMPARED = f"""\
## Methods side by side, 134M

No part of `measure.py`: one command, made again until its exit status is 0 (130: something is left, and the same
command does it). Qwen3-134M, 640 steps of 128 x 256 tokens, one seed, each method at the rate of its shipped config: no
rate is swept, so every line is **untuned** in the sense of [method.md](method.md).

    pip install --no-index --no-deps --target site tests/gpu/wheels/*.whl
    export PYTHONPATH=$PWD:$PWD/site
    python -c 'from toolkit.cli import main; main()' compare --methods amcs,soam,adamw,muon8,stableadamw \\
        --minutes 8 --seeds 1 --model qwen3-134m --data fineweb_train.parquet --val-data fineweb_val.parquet \\
        --steps 640 --seq-len 256 --micro-batch 128 --out runs/fineweb-134m

A call ends in less than nine minutes if the last step, a checkpoint and the report take less than one. `runs/` must be
there in the next call: it holds the run that was cut, with its checkpoint.

`fineweb_*.parquet` are files to bring along, as the wheels are: `measure.py` has no text of its own and trains on the
sources of Python's standard library (`--data stdlib`), which would do here as well. The extract of FineWeb that the
other comparisons use is 19.5 MB of text in 6 MB of parquet: 640 steps, 21 million tokens, go through it several times,
so that losses are not those of as much new text.

| method | rate | validation loss | tokens/s | peak memory |
|---|---|---:|---:|---:|
| amcs, untuned | 6e-4 | {MISSING} | {MISSING} | {MISSING} |
| soam, untuned | 8e-3 | {MISSING} | {MISSING} | {MISSING} |
| adamw, untuned | 6e-4 | {MISSING} | {MISSING} | {MISSING} |
| muon8, untuned | 6e-4 | {MISSING} | {MISSING} | {MISSING} |
| stableadamw, untuned | 6e-4 | {MISSING} | {MISSING} | {MISSING} |
"""


def page(measured: Mapping[str, Any] | None) -> str:
    """The whole page; `measured` is the content of gpu.json, or None."""
    lines = [HEAD]
    lines += list(_machine(measured)) if measured else ["Nothing has been measured yet.", ""]
    parts = measured["parts"] if measured else {}
    lines += ["| part | name for `--only` | result | seconds |", "|---|---|---|---:|"]
    for part in PARTS:
        found = parts.get(part.name)
        seconds = f"{found['seconds']:.0f}" if found and "seconds" in found else ""
        lines.append(f"| {part.title} | `{part.name}` | {found['status'] if found else MISSING} | {seconds} |")
    for part in PARTS:
        lines += ["", *_section(part, parts.get(part.name) or {})]
    return "\n".join(lines) + "\n\n" + COMPARED


def _machine(measured: Mapping[str, Any]) -> Iterator[str]:
    machine = measured["machine"]
    yield "Measured on " + "; ".join(f"{key} {value}" for key, value in machine.items()) + f"; {measured['began']}."
    if measured.get("rehearsal"):
        yield ""
        yield "**A rehearsal at toy size on a CPU: none of these figures says anything about a GPU.**"
    if measured.get("installed"):
        yield ""
        yield f"Installed from tests/gpu/wheels: {', '.join(measured['installed'])}."
    yield ""


def _section(part: Part, found: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {part.title}"
    yield ""
    yield part.about
    if found:
        yield ""
        yield f"Result: **{found['status']}**." + (f" Measured {found['began']}." if "began" in found else "")
    if found.get("error"):
        yield ""
        yield from (f"    {line}" for line in found["error"].splitlines())
    figures = found.get("figures", {})
    yield ""
    yield "| | measured | target | passed |"
    yield "|---|---:|---|---|"
    for check in part.checks:
        value = figures.get(check.key)
        passed = check.passes(value)
        words = {None: "", True: "yes", False: "**no**"}[passed]
        shown = _number(value) + (f" {check.unit}" if check.unit and value is not None else "")
        yield f"| {check.words} | {shown} | {check.target} | {words} |"
    for table in part.tables:
        cells = found.get("tables", {}).get(table.key, {})
        yield ""
        yield f"{table.title}:"
        yield ""
        yield "| | " + " | ".join(table.columns) + " |"
        yield "|---|" + "---:|" * len(table.columns)
        for row in table.rows:
            values = [cells.get(row, {}).get(column) for column in table.columns]
            yield f"| {row} | " + " | ".join(map(_number, values)) + " |"
    for note in found.get("notes", ()):
        yield ""
        yield f"* {note}"


def _number(value: float | None) -> str:
    """Four significant digits, whole numbers as they are."""
    if value is None:
        return MISSING
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
