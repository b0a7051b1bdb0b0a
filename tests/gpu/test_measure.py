"""`measure.py` and its page on a machine without a GPU: everything at toy size, so that no part first runs on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import pytest
import wheels
from measuring import host, numbers, resume, runs, steps
from measuring.models import filled, random_tokens
from measuring.parts import BY_NAME, CASES, PARTS, STEPS, WEIGHTS, Check
from measuring.record import Recorder, verdict
from measuring.render import COMPARED, MISSING, page

from toolkit.bench.contenders import read_contenders
from toolkit.optim import kernel as step


def rehearse(out: Path, *parts: str, minutes: float = 20) -> dict[str, Any]:
    command = [sys.executable, str(Path(measure.__file__)), "--rehearse", "--minutes", str(minutes), "--out", str(out)]
    command += ["--only", *parts] if parts else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1) and out.exists(), done.stderr[-3000:]
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def ended(report: dict[str, Any], *parts: str) -> None:
    """That each of `parts` came to its end: on a CPU they cannot pass."""
    for name in parts:
        found = report["parts"][name]
        assert found["status"] in ("passed", "failed"), (name, found)
        assert found["figures"], name


def test_quick_parts_come_to_their_end(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    before = {"status": "passed", "seconds": 1.0, "figures": {"of_copy": 50.0}, "tables": {}, "notes": []}
    out.write_text(json.dumps({"parts": {"steps": before, "ground": before}}))
    report = rehearse(out, "ground", "suite")
    ended(report, "ground", "suite")
    assert report["parts"]["ground"]["figures"]["copy_tb_s"] > 0
    assert report["parts"]["suite"]["figures"]["skipped"] > 10  # for want of a GPU
    assert {"what": "tests that failed", "measured": 0, "unit": "", "target": "== 0", "passed": True} in report[
        "parts"
    ]["suite"]["checks"]
    assert report["parts"]["steps"] == before  # what is not measured anew stays
    assert report["machine"]["torch"] and "A rehearsal at toy size" in page(report)
    assert "needs a CUDA device" in out.with_suffix(".log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_all_parts_come_to_their_end(tmp_path: Path) -> None:
    report = rehearse(tmp_path / "gpu.json", minutes=35)
    ended(report, *BY_NAME)
    figures = {name: found["figures"] for name, found in report["parts"].items()}
    assert figures["numbers"]["compiled_equal"] > 99 and figures["numbers"]["eager_equal"] == 100
    assert not figures["numbers"]["pieces_differ"] and not figures["numbers"]["twin_differs"]
    assert (figures["out_of_memory"]["status"], figures["out_of_memory"]["pages"]) == (12, 1)
    assert figures["train_134m"]["peak_error"] < 3 and figures["train_8b"]["peak_error"] < 3
    assert 0 < figures["train_134m"]["optimizer_share"] < 100
    assert figures["resume"]["compared"] > 50 and not figures["resume"]["resumed_differ_without"]


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    assert measure.PAGE.read_text(encoding="utf-8") == page(measure.read(measure.JSON)), (
        "run: python tests/gpu/measure.py --render"
    )


def test_what_is_missing_is_not_measured() -> None:
    text = page(None)
    cells = sum(len(part.checks) + sum(len(t.rows) * len(t.columns) for t in part.tables) for part in PARTS)
    cells += COMPARED.count(MISSING)
    assert text.count(MISSING) == cells + len(PARTS)
    part = BY_NAME["steps"]
    found = {"status": "crashed", "error": "Error: no", "seconds": 3.4, "figures": {"of_copy": 62.5}}
    found["tables"] = {"steps": {"amcs:8bit:bf16+8": {"622M, ms": 4.25}}}
    text = page({"machine": {"GPU": "H100"}, "began": "today", "parts": {part.name: found}})
    assert text.count(MISSING) == cells + len(PARTS) - 3
    assert "| 62.5 % |" in text and "| 4.25 |" in text and "    Error: no" in text and "| crashed | 3 |" in text


def test_a_part_passes_only_with_all_its_figures() -> None:
    part = BY_NAME["out_of_memory"]
    assert verdict(part, {"pages": 1, "status": 12, "seconds": 15}) == "passed"
    assert verdict(part, {"pages": 1, "status": 12, "seconds": 15.1}) == "failed"
    assert verdict(part, {"pages": 1, "status": 1, "seconds": 1}) == "failed"
    assert verdict(part, {"pages": 1, "seconds": 1}) == "failed"
    assert Check("x", "x").passes(3.0) is None


def one(tmp_path: Path, body: str, *, left: float, seconds: int = 30) -> dict[str, Any]:
    """What becomes of a part whose module is `body`."""
    (tmp_path / "measuring").mkdir()
    (tmp_path / "measuring" / "made_up.py").write_text(body)
    script = (
        "import sys; import measure, measuring; from measuring.parts import BY_NAME, Check, Part\n"
        f"measuring.__path__.append({str(tmp_path / 'measuring')!r})\n"
        "BY_NAME['made_up'] = Part('made_up', '', 1, '', (Check('x', 'x', '', '>=', 1),))\n"
        "from pathlib import Path\n"
        "sys.exit(measure.run_part('made_up', Path(sys.argv[5]), Path(sys.argv[7]), True))\n"
    )
    (tmp_path / "start.py").write_text(script)
    part = measure.Part("made_up", "", seconds, "", (Check("x", "x", "", ">=", 1),))
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return popen([command[0], str(tmp_path / "start.py"), *command[1:]], **options)

    environment = measure.child_environment(tmp_path / "site", True)
    environment["PYTHONPATH"] += f":{Path(measure.__file__).parent}"
    with mock.patch.object(subprocess, "Popen", start), open(tmp_path / "log", "w") as log:
        return measure.one(part, left, tmp_path / "work", environment, False, log)


def test_a_part_that_crashes_keeps_its_figures(tmp_path: Path) -> None:
    body = "def measure(recorder):\n    recorder.set(x=2)\n    raise ValueError('too warm')\n"
    found = one(tmp_path, body, left=60)
    assert found["status"] == "crashed" and found["figures"] == {"x": 2} and "ValueError: too warm" in found["error"]


def test_a_part_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    body = (
        "import subprocess, sys, time\n"
        "def measure(recorder):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"    open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "    recorder.set(x=1)\n"
        "    time.sleep(600)\n"
    )
    found = one(tmp_path, body, left=20, seconds=4)
    assert found["status"] == "out of time" and found["figures"] == {"x": 1} and "stopped after 8 s" in found["error"]
    time.sleep(0.5)
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_part_that_no_longer_fits_is_not_started(tmp_path: Path) -> None:
    assert one(tmp_path, "", left=10)["status"] == "not run: no time left"


def test_every_case_and_optimizer_has_its_row(tmp_path: Path) -> None:
    """Rows and columns are words, which the parts must hit."""
    recorder = Recorder("steps", tmp_path / "steps.json", tmp_path, True)
    assert [one.name for one in read_contenders(STEPS[1:])] == list(STEPS[1:])
    for name in STEPS:
        recorder.row("steps", name, **{"134M, ms": 1.0})
    recorder = Recorder("numbers", tmp_path / "numbers.json", tmp_path, True)
    for rule in numbers.RULES:
        for name in numbers.FORMATS:
            recorder.row("compiled", f"{rule} {name}", **dict.fromkeys(WEIGHTS, 1.0))
    assert json.loads((tmp_path / "numbers.json").read_text())["tables"]["compiled"].keys() == set(CASES)


def test_every_case_makes_an_optimizer() -> None:
    import torch
    from torch import nn

    for rule in numbers.RULES:
        for name in numbers.FORMATS:
            for weights in WEIGHTS:
                dtype = torch.float32 if weights == "fp32" else torch.bfloat16
                parameter = nn.Parameter(torch.zeros(4, 256, dtype=dtype))
                made = numbers.optimizer_of(rule, [parameter], state_format=name, weights=weights)
                run = numbers.Run(made, parameter)
                parameter.grad = torch.ones_like(parameter)
                made.defaults["compile"] = False
                for group in made.param_groups:
                    group["compile"] = False
                made.step()
                assert run.weights().numel() == 1024
                assert numbers.equal_codes(run, run) == 100


def test_models_are_filled_as_they_are_built() -> None:
    import torch

    from toolkit.models import build_model

    made, built = filled("qwen3-tiny", "cpu"), build_model("qwen3-tiny", dtype=torch.bfloat16, seed=0)
    for mine, theirs in (
        (made.named_parameters(), built.named_parameters()),
        (made.named_buffers(), built.named_buffers()),
    ):
        shapes = [{name: (t.shape, t.dtype, t.device) for name, t in tensors} for tensors in (mine, theirs)]
        assert shapes[0] == shapes[1]
    assert all(torch.equal(a, b) for a, b in zip(made.buffers(), built.buffers(), strict=True))
    loss = made(random_tokens("qwen3-tiny", 2, 16, "cpu"))
    assert float(loss) == pytest.approx(8.3, abs=0.5)  # ln 4096


def test_launch_configurations_are_fixed() -> None:
    """What only a GPU runs, as far as it can be called without one."""
    usual = step.LAUNCH
    assert steps.launched() == set()
    for row in steps.LAUNCHES:
        with steps.fixed(row):
            assert row == f"{step.LAUNCH.rows} block(s), {step.LAUNCH.warps[0]} warp(s)"
        assert step.LAUNCH is usual


def test_operations_that_wait_are_counted_where_they_are(tmp_path: Path) -> None:
    import torch

    recorder = Recorder("host", tmp_path / "host.json", tmp_path, True)
    with host.waiting_operations(recorder) as found:
        with mock.patch.object(torch.cuda, "synchronize", host.noted(lambda: None, found)):
            torch.cuda.synchronize()
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert len(found) == 2 and all(where.startswith("tests/gpu/test_measure.py:") for where in found)


def test_operations_are_those_of_the_matrix_products() -> None:
    # 134,107,392 parameters, of which 32,000 x 768 are looked up; 12 layers of width 768.
    expected = 6 * (134_107_392 - 32_000 * 768) + 6 * 12 * 768 * 1024
    assert runs.operations_per_token("qwen3-134m", 1024) == expected


def test_checkpoints_are_compared_tensor_by_tensor(tmp_path: Path) -> None:
    import torch

    for name, value in (("one", 1.0), ("two", 1.0), ("three", 2.0)):
        folder = tmp_path / name / "checkpoints" / f"global_step{resume.STEPS}"
        folder.mkdir(parents=True)
        torch.save({"a": [torch.tensor(value)], "b": {"c": torch.zeros(3)}}, folder / "rank0.pt")
        lines = [{"step": s, "loss": 1.0, "grad_norm": value, "lr": 0.1} for s in range(1, resume.STEPS + 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    count, different = resume.compare(tmp_path / "one", tmp_path / "two")
    assert (count, different) == (3 * resume.HALF + 2, [])
    _, different = resume.compare(tmp_path / "one", tmp_path / "three")
    assert "rank0.pt.a.0" in different and "rank0.pt.b.c" not in different and len(different) == 1 + resume.HALF


def test_wheels_are_made_slim_and_know_their_versions(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda118", "cuda130", "rocm64")]
    with zipfile.ZipFile(wheel, "w") as made:
        for name in (*libraries, "bitsandbytes/__init__.py"):
            made.writestr(name, b"x")
        record = "".join(f"{name},sha256=0,1\n" for name in (*libraries, "bitsandbytes/__init__.py"))
        made.writestr("bitsandbytes-1.dist-info/RECORD", record + "bitsandbytes-1.dist-info/RECORD,,\n")
    wheels.slim(wheel)
    with zipfile.ZipFile(wheel) as slim:
        kept = set(slim.namelist())
        assert kept == {
            *(libraries[0], libraries[2]),
            *("bitsandbytes/__init__.py", "bitsandbytes-1.dist-info/RECORD"),
        }
        lines = slim.read("bitsandbytes-1.dist-info/RECORD").decode().splitlines()
        assert {line.rsplit(",", 2)[0] for line in lines} == kept
    pinned = wheels.versions()
    assert all("==" in name or wheels.key(name) in pinned for name in wheels.PACKAGES)


def test_only_what_is_missing_or_older_is_installed() -> None:
    assert measure.outdated(Path("no_such_package_at_all-1.0-py3-none-any.whl"))
    assert not measure.outdated(Path("torch-1.0-py3-none-any.whl"))
    assert measure.outdated(Path("torch-99.0-py3-none-any.whl"))
