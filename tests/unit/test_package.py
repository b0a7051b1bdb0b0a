"""The package as it is shipped."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import yaml

import toolkit
from toolkit.config import shipped_configs

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_carries_the_configs_and_says_it_is_typed(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("leanstate-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"toolkit/ds_configs/{name}.json" for name in shipped_configs()} <= set(names)
    assert "toolkit/py.typed" in names
    assert not [name for name in names if name.startswith("tests/")]
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    commands = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "toolkit = toolkit.cli:main" in commands and "leanstate = toolkit.cli:main" in commands
    assert "leanstate.py" in names


def test_the_version_is_said_once_alike() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == toolkit.__version__


def test_importing_toolkit_loads_nothing_heavy() -> None:
    heavy = ("torch", "deepspeed", "transformers", "pydantic")
    code = f"import sys, toolkit; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "[]"


def test_importing_the_optimizers_loads_no_deepspeed() -> None:
    code = "import sys, toolkit.optim; print('deepspeed' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "False"


def test_what_a_run_is_refused_for_at_once_is_found_without_torch() -> None:
    code = (
        "import sys, toolkit.config.validate, toolkit.data.stream, toolkit.run.tracking; print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "False"


def test_constraints_pin_what_the_project_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["dev"] + extras["compare"] + extras["docs"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = {requirement.split(">")[0].split("[")[0] for requirement in needed} - {"leanstate"}
    assert wanted <= pinned, wanted - pinned


def test_the_hooks_before_a_commit_and_the_workflow_run_what_make_lint_and_ci_run() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0].splitlines()[1:]
    commands = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in lint]
    assert [hook["entry"] for hook in hooks] == commands
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert workflow["steps"][-1]["run"] == ".ci/run"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    assert workflow["strategy"]["matrix"]["python"] == versions
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text())["body"]
    assert any("toolkit doctor" in part["attributes"]["label"] for part in form)
