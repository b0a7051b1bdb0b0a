"""Random damage to checkpoints: a sentence or the right state, nothing written outside, little memory."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import write_run
from small_checkpoints import STEP, cut, refile, rewrite

from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint import universal
from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.source import Source
from toolkit.checkpoint.store import name_of
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.errors import UserError
from toolkit.printable import printable
from toolkit.report import SUFFIXES, build_report, render
from toolkit.run.folder import RunFolder

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 255, 256, 10**6, 2**31, 2**40, 2**63, 10**30, -(2**70), 0.5, 1e308, float("nan")),
    *(
        "",
        "x",
        "a.weight",
        "../../x",
        "/etc/passwd",
        "..",
        "\0",
        "\x1b[31m",
        "\u202e",
        "\ud800",
        "fp32",
        "4bit",
        "x" * 5000,
    ),
    *([], {}, [[]], [1, 2], [2**40, 2**40], {"a": 1}, {"": {}}, [None], [{}], {"format": 9}),
]


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("origins")
    found = [cut(root / f"{stage}", stage, ranks) for stage, ranks in ((1, 1), (2, 2), (3, 2))]
    universal.write(Source(found[1]), root / "universal" / name_of(STEP))
    return [*found, root / "universal" / name_of(STEP)]


@pytest.fixture(autouse=True)
def bounded(one_thread: None) -> Iterator[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def counts(short: int, long: int) -> Any:
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.slow)])


def mutated(value: Any, draw: random.Random) -> Any:
    """`value` with one place in it changed: another value, a key or an item that is gone, twice there or elsewhere."""
    spots: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        spots += [(at, key) for key in keys]
        waiting += [at[key] for key in keys]
    at, key = draw.choice(spots)
    kind = draw.randrange(6)
    if kind == 0:
        del at[key]
    elif kind == 1 and isinstance(at, dict):
        at[draw.choice([v for v in VALUES if isinstance(v, str)])] = at.pop(key)
    elif kind == 2 and isinstance(at, list):
        at.append(at[key])
    elif kind == 3:
        at[key] = copy.deepcopy(draw.choice([other[name] for other, name in spots]))
    elif kind == 4 and type(at[key]) is int:
        at[key] += draw.choice([-1, 1, 256, -256, 10**6])
    else:
        at[key] = draw.choice(VALUES)
    return value


def outcome(folder: Path, to: Path) -> str | None:
    """The sentence with which a reader ends, or None where all of it could be read and written again."""
    try:
        source = open_checkpoint(folder)
        source.check()
        source.digest()
        convert(source, to / "c", stage=3, world_size=2)
        universal.write(source, to / "u")
    except UserError as error:
        said = str(error)
        assert said.isprintable() and "\n" not in said, said
        return said
    return None


def outside(root: Path, own: Path) -> dict[Path, int]:
    return {path: path.lstat().st_size for path in root.rglob("*") if not path.is_relative_to(own)}


@counts(80, 3_000)
def test_manifests(origins: list[Path], tmp_path: Path, count: int) -> None:
    draw = random.Random(0)
    ends = {True: 0, False: 0}
    for number in range(count):
        origin = draw.choice(origins)
        work = tmp_path / "work"
        folder = work / "a" / "b" / name_of(STEP)
        shutil.copytree(origin, folder)
        before = outside(tmp_path, work)

        def change(body: dict[str, Any]) -> Any:
            for _ in range(draw.choice([1, 1, 1, 2, 5])):
                if body:
                    made = mutated(copy.deepcopy(body), draw)
                    with contextlib.suppress(ValueError):  # a part put into itself is no JSON
                        json.dumps(made)
                        body = made
            return body

        state = draw.getstate()
        rewrite(folder, change)
        try:
            ends[outcome(folder, work / "a" / "b") is None] += 1
        except Exception:
            pytest.fail(f"number {number}, {state[1][-1]}: {(folder / manifests.NAME).read_text()}")
        assert outside(tmp_path, work) == before
        shutil.rmtree(work)
    assert ends[False] > count / 3


@counts(40, 1_500)
def test_bits(origins: list[Path], tmp_path: Path, count: int) -> None:
    """With the hashes of before every flipped bit is seen; with hashes that fit, nothing but a sentence comes of it."""
    draw = random.Random(1)
    for number in range(count):
        folder = Path(shutil.copytree(draw.choice(origins), tmp_path / "work" / name_of(STEP)))
        path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        content = bytearray(path.read_bytes())
        # The pickle is a small part of a file, and the part that steers the reader.
        start = content.find(b"data.pkl") if draw.random() < 0.7 else 0
        for _ in range(draw.choice([1, 3])):
            content[start + draw.randrange(min(len(content) - start, 3000))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.1:
            content = content[: draw.randrange(len(content))]
        path.write_bytes(content)
        try:
            problem = manifests.damage(folder, manifests.read(folder))
        except UserError as error:
            problem = str(error)
        assert problem is not None or bytes(content) == path.read_bytes() == b"", path
        if path.name != manifests.NAME:
            refile(folder, path.relative_to(folder).as_posix(), bytes(content))
            try:
                outcome(folder, tmp_path / "work")
            except Exception:
                pytest.fail(f"number {number}: {path}")
        shutil.rmtree(tmp_path / "work")


@counts(60, 2_000)
def test_contents(origins: list[Path], tmp_path: Path, count: int) -> None:
    """What torch's files hold, changed as manifests are."""
    draw = random.Random(2)
    for number in range(count):
        folder = Path(shutil.copytree(draw.choice(origins), tmp_path / "work" / name_of(STEP)))
        path = draw.choice(sorted(folder.rglob("*.pt")))
        content = torch.load(path)
        if isinstance(content, dict):
            content = mutated(content, draw)
        else:
            content = draw.choice(VALUES)
        refile(folder, path.relative_to(folder).as_posix(), content)
        try:
            outcome(folder, tmp_path / "work")
        except Exception:
            pytest.fail(f"number {number}: {path.name}: {json.dumps(content, default=repr)[:3000]}")
        shutil.rmtree(tmp_path / "work")


@counts(30, 2_000)
def test_run_folders(tmp_path: Path, count: int) -> None:
    """A report of whatever lies in a run's folder, without what acts on a screen, and metrics that can be continued."""
    draw = random.Random(3)
    write_run(tmp_path / "origin")
    for number in range(count):
        folder = Path(shutil.copytree(tmp_path / "origin", tmp_path / "work"))
        path = draw.choice(sorted([*folder.glob("*.json*"), *folder.glob("memory/*.json")]))
        if draw.random() < 0.2:
            content = bytearray(path.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
        else:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            place = draw.randrange(len(lines))
            lines[place] = json.dumps(mutated(json.loads(lines[place]), draw))
            path.write_text("\n".join(lines) + "\n")
        try:
            report = build_report([folder])
            for kind in SUFFIXES:
                text = render(report, kind)
                assert printable(text, lines=True) == text, kind
        except Exception:
            pytest.fail(f"number {number}: {path.name}")
        (folder / "checkpoints").mkdir()
        held = RunFolder(folder, {}, {}, checkpoints=True, resuming=True)
        records = held.continue_after(10**9, {})
        held.close()
        assert sum(record["step_time_s"] for record in records) >= 0
        assert all(record["loss"] is None or record["loss"] == record["loss"] for record in records)
        shutil.rmtree(folder)
