"""Documents that cannot be used, in whole runs: the same count and curve at every number of ranks and after stops."""

from __future__ import annotations

import json
from pathlib import Path

from test_checkpoints import WAYS, World, steps_of

from toolkit.checkpoint.store import Store

AMCS = WAYS["amcs-2"]
COUNTED = ("skipped_documents", "skipped_documents_first", "replaced_characters")


def test_runs_pass_over_count_stop_and_resume(tmp_path: Path) -> None:
    world = World(tmp_path)
    lines = [line.encode() for line in world.data.read_text().splitlines()]
    lines[3] = b'{"text": "half of an emoji \\ud83d"}'
    lines[20] = b"no JSON"
    lines[25] = b'{"text": "replaced: \xff\xfe"}'
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"\n".join(lines))
    # The second window of documents, and so this one, is read after step 21.
    late = tmp_path / "late.jsonl"
    texts = [json.dumps({"text": f"{n % 10} 1 2 3 4 5 6 7 8 9"}) for n in range(1100)]
    late.write_text("\n".join([*texts[:1095], '{"text": 5}', *texts[1095:]]))
    book = tmp_path / "one.txt"
    book.write_text("".join(f"Line {n} of a short book.\n" for n in range(600)))

    def on(data: Path, run: str, ranks: int, *more: str) -> list[str]:
        return world.arguments(run, AMCS, ranks, "--data", str(data), *more)

    stops = [*("--steps", "24", "--save-every", "100", "--bad-documents"), "stop"]
    plain, _, cut, refused, stopped, small = steps_of(
        world,
        "two",
        2,
        [
            {"run": on(bad, "plain", 2)},
            {"run": on(bad, "cut", 2), "stop_at": 5},
            {"run": on(bad, "cut", 2)},
            {"run": on(bad, "refused", 2, "--bad-documents", "stop")},
            {"run": on(late, "late", 2, *stops)},
            {"run": on(book, "book", 2, "--eval-every", "5")},
        ],
    )
    assert plain["skipped_documents"] == 2 and plain["replaced_characters"] == 2
    assert {problem.split(" of ")[0] for problem in plain["skipped_documents_first"]} == {"line 4", "line 21"}
    assert all(f"note: skipped: {problem}" in plain["said"] for problem in plain["skipped_documents_first"])
    assert "bytes that are not text in their encoding" in plain["said"]
    assert [cut[key] for key in COUNTED] == [plain[key] for key in COUNTED]
    assert "line 4 of" in refused and "--bad-documents skip" in refused and not (tmp_path / "refused").exists()
    assert "line 1096 of" in stopped and "'text' holds a number" in stopped
    assert Store(tmp_path / "late" / "checkpoints").steps() == [21]
    assert small["val_loss"] is not None

    alone, resumed = steps_of(
        world, "one", 1, [{"run": on(bad, "alone", 1)}, {"run": on(late, "late", 1, *stops[:-1], "skip")}]
    )
    assert [alone[key] for key in COUNTED] == [plain[key] for key in COUNTED]
    assert world.records("late")[-1]["step"] == 24 and resumed["skipped_documents"] == 1
    assert [record["loss"] for record in world.records("cut")] == [record["loss"] for record in world.records("plain")]
