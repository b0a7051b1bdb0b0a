"""The ledger on a CUDA device: `pytest tests/gpu -m gpu`."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from toolkit.memory.out_of_memory import Explainer, asked_bytes, failed_allocation, json_name
from toolkit.memory.trace import StepTrace
from toolkit.memory.watermarks import CachingAllocator, limits
from toolkit.records import categories as c
from toolkit.records.memory import FOLDER, Measurement, OutOfMemoryRecord, measured_name

pytestmark = pytest.mark.gpu
REPOSITORY = Path(__file__).resolve().parents[2]
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def test_the_allocators_peak_is_that_of_the_phase() -> None:
    watermark = CachingAllocator(torch.device("cuda", 0))
    watermark.begin()
    before = watermark.now()
    large = torch.empty(256 * MEGABYTE, dtype=torch.uint8, device="cuda")
    del large
    peak, reserved = watermark.read()
    assert peak is not None and before is not None and reserved is not None
    assert peak - before == 256 * MEGABYTE and reserved >= peak
    watermark.begin()
    assert watermark.read()[0] == before
    state = watermark.state()
    assert state.reserved >= state.allocated and 0 <= state.fragmentation <= 1
    assert state.largest_free_block >= 256 * MEGABYTE


def test_a_step_is_traced() -> None:
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024)).cuda()
    x = torch.randn(512, 1024, device="cuda")
    # Libraries have taken their workspaces by then.
    model(x).sum().backward()
    model.zero_grad()
    trace = StepTrace(model, None, lambda: [(c.WEIGHTS, n, p.data) for n, p in model.named_parameters()], on_gpu=True)
    torch.cuda.reset_peak_memory_stats()
    with trace:
        trace.phase(c.FORWARD)
        loss = model(x).sum()
        trace.phase(c.BACKWARD)
        loss.backward()
    assert trace.curve.by_category[c.WORKSPACES][0] >= 2 * MEGABYTE  # of the forward and of the backward pass's thread
    gradients = sum(p.numel() * 4 for p in model.parameters())
    assert trace.curve.by_category[c.GRADIENTS][-1] == gradients
    assert trace.curve.total.max() == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.02)
    backward = [lifetime for lifetime in trace.storages.lifetimes if lifetime.category == c.GRADIENTS]
    assert all(lifetime.where.startswith("backward: ") for lifetime in backward)


def test_memory_that_runs_out_is_explained(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    weight = torch.zeros(64 * MEGABYTE, dtype=torch.uint8, device=device)
    explain = Explainer(tmp_path, 0, device)
    explain.inventory, explain.phase = (lambda: [(c.WEIGHTS, "weight", weight)]), c.STEP
    asked = 1 << 50
    with pytest.raises(torch.OutOfMemoryError) as caught, explain:
        torch.empty(asked, dtype=torch.uint8, device=device)
    assert failed_allocation(caught.value) is caught.value
    assert asked_bytes(str(caught.value)) == pytest.approx(asked, rel=0.01)
    record = OutOfMemoryRecord.model_validate_json((tmp_path / FOLDER / json_name(0)).read_text())
    assert record.held[c.WEIGHTS] == 64 * MEGABYTE and record.limit == limits(device)["GPU"]
    taken = pickle.loads((tmp_path / FOLDER / "rank0-out-of-memory.pickle").read_bytes())
    assert taken["segments"]


def test_a_run_is_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "toolkit.train", "--model", "qwen3-134m", "--run-dir", str(folder)]
    command += ["--steps", "4", "--eval-every", "0", "--memory-profile", "full"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    record = Measurement.model_validate_json((folder / FOLDER / measured_name(0)).read_text())
    assert record.source == "CUDA caching allocator" and record.allocator is not None
    for phase in record.phases:
        if phase.held:
            assert sum(phase.held.values()) == phase.peak
            assert phase.held[c.WORKSPACES] >= MEGABYTE
            assert phase.held.get(c.OTHER, 0) < 0.03 * (phase.peak or 0)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["peak_memory_bytes"] >= (record.peak or 0) > 0
    taken = pickle.loads((folder / FOLDER / "rank0-snapshot.pickle").read_bytes())
    assert any(taken["device_traces"])
