"""The tests that need a GPU, as pytest runs them."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

from measuring.record import REPOSITORY, Recorder

SHOWN = 200
"""Characters of a failure's first line."""


def measure(recorder: Recorder) -> None:
    found = recorder.folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["--junitxml", str(found)]
    run = subprocess.run(command, cwd=REPOSITORY)
    if not found.exists():
        raise RuntimeError(f"pytest ended with status {run.returncode} and wrote no results")
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(found).iter("testcase"):
        problems = [child for child in case if child.tag in ("failure", "error")]
        if problems:
            counts["failed"] += 1
            message = (problems[0].get("message") or "").strip().splitlines() or [""]
            recorder.note(f"{case.get('name')}: {message[0][:SHOWN]}")
        elif any(child.tag == "skipped" for child in case):
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    recorder.set(**counts)
