"""The architecture that CONTRIBUTING.md states: its table, and the imports, sizes and names of the code."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LINES, BYTES = 400, 250_000
SHARE = 0.2

DEEPSPEED = {
    "toolkit/zero/": "the room of DeepSpeed's internals",
    "toolkit/config/": "validation reads DeepSpeed's own config models, names and defaults",
}
"""Where `deepspeed.runtime` may be imported, and why; outside of zero/ inside functions only."""


@cache
def modules() -> dict[str, Path]:
    """The files of the package by the name of their module."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / "toolkit").rglob("*.py"))
    }


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every name that a file imports, and the column: also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.col_offset) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.col_offset) for alias in node.names)


@cache
def graph() -> dict[str, set[str]]:
    """The modules of the package that each one imports."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        names = {name for name, _ in imported(path) if name.partition(".")[0] == "toolkit"}
        # A name is a module, or something that the module before its last dot defines.
        found[module] = {name if name in modules() else name.rpartition(".")[0] for name in names} - {module}
    return found


def room(module: str) -> str:
    """The folder or the file of the top level; what the package itself offers (`toolkit.initialize`) is zero's."""
    return module.split(".")[1] if "." in module else "zero"


def rooms_in_order() -> list[str]:
    """The rooms as the table under "Where things go" lists them, from the lowest to the highest."""
    table = PAGE.split("## Where things go")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| ([^|]*`[^|]*) \|", table, flags=re.MULTILINE)
    names = [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]
    package = [name for name in names if name.startswith("toolkit/") or "/" not in name]
    return [name.removeprefix("toolkit/").removesuffix("/").removesuffix(".py") for name in package]


def circle(edges: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def room_graph() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {room(module): set() for module in modules()}
    for module, others in graph().items():
        found[room(module)] |= {room(other) for other in others} - {room(module)}
    return found


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not circle({"a": {"b", "c"}, "b": {"c"}})


def test_the_graph_holds_what_is_imported_at_the_top_inside_functions_and_for_types_only() -> None:
    run = graph()["toolkit.run.training"]
    assert {"toolkit.run.screen", "toolkit.data", "toolkit.memory.ledger"} <= run


def test_no_circle_between_files_or_rooms() -> None:
    assert circle(graph()) == []
    assert circle(room_graph()) == []


def test_the_table_names_every_room_once() -> None:
    order = rooms_in_order()
    assert sorted(order) == sorted(room_graph()), "CONTRIBUTING.md and toolkit/ name the same rooms"
    assert len(order) == len(set(order))


def test_imports_follow_the_order_of_the_table() -> None:
    place = {name: index for index, name in enumerate(rooms_in_order())}
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in sorted(others)
        if place[room(other)] > place[room(module)]
    ]
    assert wrong == []


def test_no_room_holds_more_than_a_fifth_of_the_code() -> None:
    counts: dict[str, int] = {}
    for module, path in modules().items():
        counts[room(module)] = counts.get(room(module), 0) + len(path.read_text(encoding="utf-8").splitlines())
    total = sum(counts.values())
    assert {name: f"{count / total:.1%}" for name, count in counts.items() if count > SHARE * total} == {}


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("toolkit", "tests", "launch")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {path: length for path, length in lengths.items() if length > LINES} == {}


def test_no_large_file_is_tracked() -> None:
    """What is once in the history stays in every clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if (ROOT / name).is_file()}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > BYTES} == {}


def test_only_the_rooms_that_say_why_import_the_internals_of_deepspeed() -> None:
    used = set()
    for path in modules().values():
        name = path.relative_to(ROOT).as_posix()
        found = [column for what, column in imported(path) if what.startswith("deepspeed.runtime")]
        if not found:
            continue
        allowed = next((place for place in DEEPSPEED if name.startswith(place)), None)
        assert allowed is not None, f"{name} imports deepspeed.runtime"
        assert allowed == "toolkit/zero/" or all(found), f"{name} imports deepspeed.runtime at the top"
        used.add(allowed)
    assert used == set(DEEPSPEED), "an exception that nothing needs any more"


LAYOUT = {
    *("bit16_groups", "round_robin_bit16_groups", "round_robin_bit16_offsets", "parallel_partitioned_bit16_groups"),
    *("single_partition_of_fp32_groups", "partition_size", "real_dp_process_group", "params_in_partition"),
    *("fp16_groups", "fp16_partitioned_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"),
    *("sub_group_to_group_id", "sub_group_process_groups", "partition_numel", "_get_param_partition_group"),
}
"""What DeepSpeed's ZeRO optimizers say of their groups: which parameters they hold, cut how, over which ranks."""

WALK = "toolkit/zero/shards.py"
PASSED_ON = {
    ("toolkit/zero/stage12.py", "parallel_partitioned_bit16_groups"): "whole, to DeepSpeed's all_gather_dp_groups",
    ("toolkit/zero/stage12.py", "real_dp_process_group"): "whole, to DeepSpeed's all_gather_dp_groups",
    ("toolkit/zero/stage12.py", "params_in_partition"): "as the list that DeepSpeed takes gradients from by number",
}


def test_one_module_walks_over_the_groups_of_deepspeed() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), node.attr)
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in LAYOUT
    }
    assert {file for file, _ in found - PASSED_ON.keys()} == {WALK}
    assert PASSED_ON.keys() - found == set(), "an exception that nothing needs any more"


@pytest.mark.parametrize("name", ["state", "optim"])
def test_the_mathematics_imports_nothing_of_deepspeed(name: str) -> None:
    files = [path for module, path in modules().items() if room(module) == name]
    assert files
    assert [str(path) for path in files for what, _ in imported(path) if what.partition(".")[0] == "deepspeed"] == []


def test_the_readers_walk_names_what_exists() -> None:
    walk = PAGE.split("## A reader's walk")[1].split("\n## ")[0]
    steps = re.findall(r"^\d\. (.*(?:\n   .*)*)", walk, flags=re.MULTILINE)
    assert len(steps) == 15, "three ways of five lines"
    for step in steps:
        path = None
        for name in re.findall(r"`([^`]+)`", step):
            if name.endswith(".py"):
                path = ROOT / "toolkit" / name
                assert path.is_file(), name
            else:
                assert path is not None, f"{name} comes before the file that has it"
                defined = {
                    node.name
                    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                    if isinstance(node, ast.ClassDef | ast.FunctionDef)
                }
                assert name in defined, f"{path.name} does not define {name}"
