"""The ledger's parts that need no DeepSpeed: watermarks, limits, snapshots, the page about memory that ran out."""

from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.cuda import _memory_viz

from toolkit.memory import snapshot
from toolkit.memory.out_of_memory import CHANGES, Explainer, asked_bytes, failed_allocation, json_name
from toolkit.memory.trace import StepTrace
from toolkit.memory.watermarks import RESERVED_SPACE, ResidentSet, limits
from toolkit.records import categories as c
from toolkit.records.activations import Activations
from toolkit.records.by_category import by_category
from toolkit.records.memory import FOLDER, Change, LargeTensor, OutOfMemoryRecord
from toolkit.records.run import RUN
from toolkit.run.folder import RunFolder

CPU = torch.device("cpu")
TOO_MUCH = 1 << 50


def failure() -> BaseException:
    try:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has a petabyte")


# Watermarks and limits


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak is Linux's")
def test_the_resident_sets_peak_is_that_of_the_phase() -> None:
    watermark, size = ResidentSet(), 200 << 20
    watermark.begin()
    before = watermark.read()[1]
    large = torch.ones(size, dtype=torch.uint8)
    del large
    _, peak = watermark.read()
    assert size * 0.9 < peak - before < size * 1.3
    watermark.begin()
    assert watermark.read()[1] < before + size * 0.3


def test_a_limit_on_address_space_is_found() -> None:
    lines = [
        "import resource, torch",
        "from toolkit.memory.watermarks import limits",
        f"resource.setrlimit(resource.RLIMIT_AS, ({40 << 30}, {40 << 30}))",
        "print(limits(torch.device('cpu')))",
    ]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert f"'{RESERVED_SPACE}': {40 << 30}" in run.stdout, run.stderr
    assert min(limits(CPU).values()) > 1 << 28


def test_ranks_of_one_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = psutil.virtual_memory().total
    assert limits(CPU)["this machine, all processes"] == machine
    assert limits(CPU, 4)["this machine, shared by 4 ranks"] == machine // 4
    monkeypatch.setenv("LOCAL_SIZE", "4")
    share = Explainer(tmp_path, 0, CPU).limit
    assert share is not None and share <= machine // 4


# What is held


def test_storages_are_counted_once_under_their_first_name() -> None:
    whole = torch.zeros(1000)
    named = [
        (c.WEIGHTS, "first half", whole[:500]),
        (c.GRADIENTS, "second half", whole[500:]),
        ("m_fast", "other", torch.zeros(10)),
        ("v", "elsewhere", torch.zeros(7, device="meta")),
    ]
    here, on_host, blocks = by_category(named, "cpu")
    assert here == {c.WEIGHTS: 4000, "m_fast": 40} and on_host == {}
    assert [(block.bytes, block.what) for block in blocks] == [(4000, "first half"), (40, "other")]
    assert by_category(named, "meta")[:2] == ({"v": 28}, {c.WEIGHTS: 4000, "m_fast": 40})


# Snapshots


def replay(taken: dict[str, Any]) -> tuple[int, int]:
    """Peak and final bytes of a snapshot, from its history and what it says is there at the end."""
    ends = {segment["address"]: segment["total_size"] for segment in taken["segments"]}
    [trace] = taken["device_traces"]
    held = dict(ends)
    for event in reversed(trace):  # back to the beginning
        if event["action"] == "free_completed":
            assert event["addr"] not in held
            held[event["addr"]] = event["size"]
        elif event["action"] == "alloc":
            assert held.pop(event["addr"]) == event["size"]
    peak = now = sum(held.values())
    for event in trace:
        now += {"alloc": event["size"], "free_completed": -event["size"]}.get(event["action"], 0)
        peak = max(peak, now)
    assert now == sum(ends.values())
    return peak, now


def test_a_snapshot_holds_the_traced_step_and_torch_reads_it(tmp_path: Path, one_thread: None) -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(64, 16)
    trace = StepTrace(model, None, lambda: [(c.WEIGHTS, n, p.data) for n, p in model.named_parameters()], on_gpu=False)
    with trace:
        trace.phase(c.FORWARD)
        loss = model(x).sum()
        trace.phase(c.BACKWARD)
        loss.backward()
    path = tmp_path / "snapshot.pickle"
    snapshot.write(path, snapshot.of_step(trace.storages.lifetimes, trace.storages.nanoseconds or []))
    taken = pickle.loads(path.read_bytes())
    peak, last = replay(taken)
    assert (peak, last) == (trace.curve.total.max(), trace.curve.total[-1])
    [events] = taken["device_traces"]
    names = {(event["category"], event["frames"][0]["name"]) for event in events}
    assert (c.GRADIENTS, "gradient of 0.weight") in names
    assert {block["category"] for segment in taken["segments"] for block in segment["blocks"]} >= {c.WEIGHTS}
    # torch's own readers of the format, which the page at pytorch.org/memory_viz shares.
    assert "raise" not in _memory_viz.trace(taken) and f"{len(events)} entries" in _memory_viz.trace(taken)
    assert f"segments: {len(taken['segments'])}" in _memory_viz.segsum(taken)
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "torch.cuda._memory_viz", "trace_plot", str(path), "-o", str(page)]
    subprocess.run(command, check=True, capture_output=True)
    assert "snapshot.pickle" in page.read_text()


def test_a_snapshot_of_blocks_has_no_history() -> None:
    blocks = [LargeTensor(bytes=1000, category=c.WEIGHTS, what="w", where="", phase=c.INIT)] * 2
    taken = snapshot.of_tensors(blocks)
    assert replay(taken) == (2000, 2000) and taken["device_traces"] == [[]]


# When memory runs out


def test_failed_allocations_are_told_from_other_errors() -> None:
    assert failed_allocation(failure()) is not None
    with pytest.raises(MemoryError) as caught:
        bytearray(1 << 60)
    assert failed_allocation(caught.value) is caught.value
    assert failed_allocation(OSError(errno.ENOMEM, "Cannot allocate memory")) is not None
    assert failed_allocation(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")) is not None
    assert failed_allocation(RuntimeError("std::bad_alloc")) is not None
    wrapped = ValueError("while compiling")
    wrapped.__cause__ = caught.value
    assert failed_allocation(wrapped) is caught.value
    for other in (ValueError("out of memory"), RuntimeError("shapes do not fit"), OSError(errno.ENOSPC, "full"), None):
        assert failed_allocation(other) is None


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 79.1 GiB", 20.5 * 2**20),
        ("Unable to allocate 1.50 GiB for an array with shape (3,)", 1.5 * 2**30),
        ("std::bad_alloc", None),
    ],
)
def test_what_was_asked_is_read_from_the_message(message: str, size: float | None) -> None:
    assert asked_bytes(message) == size
    assert asked_bytes(str(failure())) == TOO_MUCH


def explainer(folder: Path, **more: Any) -> Explainer:
    savings = {"--micro-batch 2": 500, "stage 3": 900, "worse": -10, "--seq-len 128": 300, "bf16+4": 20}
    changes = [Change(change=name, peak=1000 - saves, saves=saves) for name, saves in savings.items()]
    made = Explainer(folder, 3, CPU, **more)
    made.take_changes(changes)
    return made


def test_the_explanation_names_what_was_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.zeros(1 << 20)
    explain = explainer(tmp_path)
    explain.inventory = lambda: [(c.WEIGHTS, "a.weight", weight)]
    explain.phase, explain.step = c.FORWARD, 7
    with pytest.raises(RuntimeError), explain:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    record = OutOfMemoryRecord.model_validate_json((tmp_path / FOLDER / json_name(3)).read_text())
    assert (record.rank, record.phase, record.step, record.asked) == (3, c.FORWARD, 7, TOO_MUCH)
    assert record.held[c.WEIGHTS] == weight.untyped_storage().nbytes()
    assert record.blocks[0].what == "a.weight" and record.limit == explain.limit
    assert [change.change for change in record.changes] == ["stage 3", "--micro-batch 2", "--seq-len 128"]
    assert len(record.changes) == CHANGES
    page = (tmp_path / FOLDER / "rank3-out-of-memory.md").read_text()
    for words in ("**forward** of step 7", f"{TOO_MUCH:,} bytes", "4,194,304", "a.weight", "`stage 3` | 900 | 100"):
        assert words in page
    taken = pickle.loads((tmp_path / FOLDER / "rank3-out-of-memory.pickle").read_bytes())
    assert any(segment["total_size"] == 4 << 20 for segment in taken["segments"])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rank 3 ran out of memory (forward, step 7): see ") and line.endswith(".md")
    assert explain.ended_by_memory()


def test_activations_are_found_without_a_trace(tmp_path: Path) -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = torch.exp(x)  # keeps its result
            return x + torch.empty(TOO_MUCH, dtype=torch.uint8)

    explain = explainer(tmp_path)
    explain.setup = None
    x = torch.zeros(1000, 1000, requires_grad=True)
    explain.inventory, explain.phase = (lambda: [(c.WEIGHTS, "x", x)]), c.FORWARD
    for checkpointing in (False, True):
        explain.written = None
        explain.setup = _setup(checkpointing)
        with pytest.raises(RuntimeError), explain:
            Failing()(x)
        record = OutOfMemoryRecord.model_validate_json((tmp_path / FOLDER / json_name(3)).read_text())
        # The frame holds the last one; the others are in the graph, which is left alone under checkpointing.
        assert record.held[c.ACTIVATIONS] == (1 if checkpointing else 3) * 4_000_000


def _setup(checkpointing: bool) -> Any:
    from toolkit.records.memory import Setup

    return Setup(
        model="m",
        parameters=1,
        optimizer="AMCS",
        stage=0,
        state_format="8bit",
        weights="fp32",
        world_size=1,
        micro_batch=1,
        gradient_accumulation=1,
        seq_len=1,
        activations=Activations(checkpoint=checkpointing),
        attention="sdpa",
        loss="plain",
        device="cpu",
    )


def test_another_error_is_not_explained(tmp_path: Path) -> None:
    explain = explainer(tmp_path)
    with pytest.raises(ValueError, match="wrong"), explain:
        raise ValueError("wrong")
    assert explain.written is None and not explain.ended_by_memory() and not (tmp_path / FOLDER).exists()


def test_another_ranks_end_is_seen(tmp_path: Path) -> None:
    explain, other = explainer(tmp_path), Explainer(tmp_path, 0, CPU)
    assert explain.explain(failure()) is not None
    assert other.written is None and other.ended_by_memory()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    assert explainer(tmp_path).explain(failure()) is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rank 3 ran out of memory")


def test_a_run_that_explains_itself_keeps_its_folder(tmp_path: Path) -> None:
    for explained in (False, True):
        folder = tmp_path / str(explained)
        held = RunFolder(folder, {"steps": 1}, {})
        (folder / FOLDER).mkdir()
        (folder / FOLDER / "predicted.json").write_text(json.dumps({}))
        if explained:
            explainer(folder).explain(failure())
        held.close()
        assert (folder / RUN).exists() == explained == folder.exists()
