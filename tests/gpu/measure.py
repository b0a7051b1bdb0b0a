"""Measures on one GPU what a CPU cannot show; docs/benchmarks/gpu.md says what and how.

    python tests/gpu/measure.py [--only PART ...] [--minutes 9] [--out docs/benchmarks/gpu.json]
    python tests/gpu/measure.py --render            # the page, from the JSON
    python tests/gpu/measure.py --rehearse --out /tmp/gpu.json    # everything at toy size, on a CPU

Exit status 0 where every part that was asked for passed, 1 where one did not. A part that does not pass, crashes or
hangs stops none of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from measuring.parts import PARTS, Part
from measuring.record import REPOSITORY, Recorder, stated, verdict, write_json
from measuring.render import page

HERE = Path(__file__).resolve().parent
WHEELS = HERE / "wheels"
JSON = REPOSITORY / "docs" / "benchmarks" / "gpu.json"
PAGE = REPOSITORY / "docs" / "benchmarks" / "gpu.md"
MINUTES = 8.8
"""In all, by default: below nine minutes with what ends a part that hangs."""

ENOUGH = 0.6
"""A part is started while so much of its expected time is left."""

ERROR_LINES = 15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help="of " + ", ".join(names))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=JSON, help="default: %(default)s; a log is written beside it")
    parser.add_argument("--rehearse", action="store_true", help="at toy size on the CPU; measures nothing")
    parser.add_argument("--render", action="store_true", help="write the page from the JSON, and measure nothing")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)  # the process of one part
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.render:
        PAGE.write_text(page(read(options.out)), encoding="utf-8")
        print(f"{PAGE} written")
        return 0
    if options.part:
        return run_part(options.part, options.out, options.folder, options.rehearse)
    return measure(options.only or names, options.minutes * 60, options.out, options.rehearse, anew=not options.only)


def read(path: Path) -> dict[str, Any] | None:
    """What was measured, or None."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def run_part(name: str, out: Path, folder: Path, rehearse: bool) -> int:
    """In the part's own process: measure, and leave figures or an error in `out`."""
    if rehearse:
        os.environ["OMP_NUM_THREADS"] = "1"  # toy sizes: on a busy machine threads wait for one another
    recorder = Recorder(name, out, folder, rehearse)
    recorder.save()
    try:
        importlib.import_module(f"measuring.{name}").measure(recorder)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


# ---- all parts --------------------------------------------------------------------------------------------------


def measure(names: list[str], budget: float, out: Path, rehearse: bool, *, anew: bool) -> int:
    """Run the parts called `names`, each in its own process, for `budget` seconds at most."""
    started = time.monotonic()
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    before = None if anew else read(out)
    with tempfile.TemporaryDirectory(prefix="leanstate-gpu-") as name:
        scratch = Path(name)
        environment = child_environment(scratch / "site", rehearse)
        installed = install(scratch / "site", environment)
        report: dict[str, Any] = {
            "began": now(),
            "rehearsal": rehearse,
            "machine": describe(environment),
            "installed": installed,
            "parts": before["parts"] if before else {},
        }
        write_json(out, report)
        with open(out.with_suffix(".log"), "w", encoding="utf-8") as log:
            for part in (part for part in PARTS if part.name in names):
                left = budget - (time.monotonic() - started)
                print(f"{part.name} ...", flush=True)
                found = one(part, left, scratch / part.name, environment, rehearse, log)
                report["parts"][part.name] = found
                report["seconds"] = round(time.monotonic() - started, 1)
                write_json(out, report)
                shutil.rmtree(scratch / part.name, ignore_errors=True)  # checkpoints take gigabytes
                show(part, found)
    print(f"{out} written after {report['seconds']:.0f} s")
    return int(any(report["parts"][name]["status"] != "passed" for name in names))


def one(part: Part, left: float, folder: Path, environment: dict[str, str], rehearse: bool, log: Any) -> dict[str, Any]:
    """What became of one part: "passed", "failed", "crashed", "out of time" or "not run"."""
    if left < ENOUGH * part.seconds:
        return {"status": "not run: no time left"}
    folder.mkdir(parents=True)
    limit = min(2.0 * part.seconds, left) if not rehearse else left
    file, output = folder / "figures.json", folder / "output.txt"
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part.name, "--out", str(file)]
    command += ["--folder", str(folder)] + (["--rehearse"] if rehearse else [])
    began, clock = now(), time.monotonic()
    with open(output, "wb") as sink:
        child = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            status: int | None = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(child)
    seconds = round(time.monotonic() - clock, 1)
    text = output.read_text(encoding="utf-8", errors="replace")
    print(f"==== {part.name} ====\n{text}", file=log, flush=True)
    found = read(file) or {"figures": {}, "tables": {}, "notes": []}
    found |= {"began": began, "seconds": seconds, "checks": stated(part, found["figures"])}
    if status == 0:
        return found | {"status": verdict(part, found["figures"])}
    words = "out of time" if status is None else "crashed"
    if status is None:
        text += f"\nstopped after {limit:.0f} s"
    return found | {"status": words, "error": "\n".join(text.strip().splitlines()[-ERROR_LINES:])}


def end(child: subprocess.Popen[bytes]) -> None:
    """End the part's process and whatever it started: ranks and launchers may have sessions of their own."""
    import psutil

    family: list[Any] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(child.pid)
        family = [*parent.children(recursive=True), parent]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    with contextlib.suppress(ProcessLookupError):  # those whose parents are gone already
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def show(part: Part, found: dict[str, Any]) -> None:
    print(f"  {found['status']}" + (f" ({found['seconds']:.0f} s)" if "seconds" in found else ""))
    for check in part.checks:
        value = found.get("figures", {}).get(check.key)
        passed = {None: "", True: "", False: "   <-- beyond its target"}[check.passes(value)]
        print(f"    {check.words}: {'not measured' if value is None else f'{value:.6g} {check.unit}'}{passed}")
    if "error" in found:
        print("\n".join(f"    | {line}" for line in found["error"].splitlines()))
    sys.stdout.flush()


# ---- the machine ------------------------------------------------------------------------------------------------


def child_environment(site: Path, rehearse: bool) -> dict[str, str]:
    """Of every process that is started: the project and what was installed are on its path, and nothing is fetched."""
    paths = [str(REPOSITORY), str(site), os.environ.get("PYTHONPATH", "")]
    scripts = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PATH": os.pathsep.join(scripts),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if rehearse:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def install(site: Path, environment: dict[str, str]) -> list[str]:
    """Install into `site` the wheels whose package is missing here or older; returns their file names.

    Without the network and without what they need: that is in the same folder, or on the machine.
    """
    lacking = [wheel for wheel in sorted(WHEELS.glob("*.whl")) if outdated(wheel)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--target", str(site)]
    if not lacking or subprocess.run([*command, *map(str, lacking)], env=environment).returncode == 0:
        return [wheel.name for wheel in lacking]
    # A wheel that does not fit must not keep the others out.
    fits = [subprocess.run([*command, str(wheel)], env=environment).returncode == 0 for wheel in lacking]
    return [wheel.name for wheel, good in zip(lacking, fits, strict=True) if good]


def outdated(wheel: Path) -> bool:
    from packaging.version import Version

    name, version = wheel.name.split("-")[:2]
    try:
        return Version(metadata.version(name)) < Version(version)
    except metadata.PackageNotFoundError:
        return True


def describe(environment: dict[str, str]) -> dict[str, str]:
    """What the figures belong to, as far as packages say; asked in a process of its own, which imports them."""
    asked = (
        "import json, importlib.metadata as m\n"
        "import torch\n"
        "found = {}\n"
        "if torch.cuda.is_available():\n"
        "    found['GPU'] = torch.cuda.get_device_name(0)\n"
        "    found['CUDA'] = str(torch.version.cuda)\n"
        "for name in ('torch', 'triton', 'deepspeed', 'transformers', 'bitsandbytes', 'flashoptim'):\n"
        "    try:\n"
        "        found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError:\n"
        "        found[name] = 'missing'\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    found = json.loads(lines[-1]) if done.returncode == 0 and lines else {"torch": "cannot be imported"}
    driver = shutil.which("nvidia-smi")
    if driver and "GPU" in found:
        query = [driver, "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]
    return found | {"Python": platform.python_version()}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


if __name__ == "__main__":
    sys.exit(main())
