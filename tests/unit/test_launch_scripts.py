"""launch/: the shell that is in it, a SLURM job that comes back, and what a pod of Kubernetes runs."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from toolkit.cli import app
from toolkit.run import launching

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
KUBERNETES = "1.33"

TOOLS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "a\\nb\\n"; else echo "$*" >> "$LOG/scontrol"; fi',
    # SLURM's own: a task on each of two nodes; one that ends badly ends the other. It may be cancelled meanwhile.
    "srun": """
        shift; [[ -z ${CANCEL:-} ]] || kill -TERM $PPID
        for node in 0 1; do SLURM_NODEID=$node "$@" & done
        worst=0
        for node in 0 1; do
            status=0; wait -n || status=$?
            ((status <= worst)) || worst=$status
            ((status == 0)) || kill -TERM $(jobs -pr) 2> /dev/null
        done
        exit $worst
    """,
    # The second node is the slower one.
    "toolkit": """
        printf "%s\\n" "$@" > "$LOG/toolkit${SLURM_NODEID:-}"; env > "$LOG/environment"
        [[ ${SLURM_NODEID:-0} == 0 ]] || sleep 0.5
        exit "${STATUS:-0}"
    """,
}
"""What the scripts call: SLURM's tools, and the programs that they start, which write down how they were called."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a copy of launch/, beside which there is no environment, and the tools."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "tools").mkdir()
    for name, does in TOOLS.items():
        tool = tmp_path / "tools" / name
        tool.write_text(f"#!/usr/bin/env bash\n{does}\n")
        tool.chmod(0o755)
    return tmp_path


def run(place: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{place / 'tools'}{os.pathsep}{os.environ['PATH']}"
    own = os.environ | {"PATH": path, "LOG": str(place)} | environment
    return subprocess.run(command, cwd=place, env=own, capture_output=True, text=True, timeout=60)


def called(place: Path, tool: str) -> list[str]:
    log = place / tool
    return log.read_text().splitlines() if log.exists() else []


def options_of(line: list[str]) -> dict[str, Any]:
    """As the command that is first in `line` reads the rest."""
    group: Any = typer.main.get_command(app)
    params: dict[str, Any] = group.commands[line[0]].make_context(line[0], line[1:]).params
    return params


def slurm(place: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "[a-b]", "SLURM_GPUS_ON_NODE": "8"}
    return run(place, ["bash", "launch/slurm.sh", *options], **job, **environment)


def test_shellcheck_has_nothing_to_say() -> None:
    assert SCRIPTS
    checked = subprocess.run([Path(sys.executable).with_name("shellcheck"), *SCRIPTS], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize(
    ("status", "environment", "requeued"),
    [(0, {}, []), (2, {}, []), (130, {}, ["requeue 41"]), (130, {"CANCEL": "yes"}, [])],
)
def test_a_slurm_job_that_was_asked_to_stop_comes_back(
    place: Path, status: int, environment: dict[str, str], requeued: list[str]
) -> None:
    """Though the other nodes' tasks are still on their way out when the first one's has ended."""
    done = slurm(place, "--model", "qwen3-tiny", STATUS=str(status), **environment)
    assert done.returncode == status, done.stderr
    assert called(place, "scontrol") == requeued
    assert [path.name for path in (place / "runs").iterdir()] == ["hostfile-41"]


def test_slurm_starts_ranks_on_each_node_and_a_job_that_comes_back_finds_its_run(place: Path) -> None:
    slurm(place, "--model", "qwen3-tiny", "--steps=3")
    first = called(place, "toolkit1")
    read = options_of(first)
    assert (place / read["hostfile"]).read_text() == "a slots=8\nb slots=8\n"
    assert (read["no_ssh"], read["node_rank"], read["master_addr"], read["master_port"]) == (True, 1, "a", 20041)
    assert options_of(called(place, "toolkit0"))["node_rank"] == 0
    assert (read["model"], read["steps"], read["run_dir"]) == ("qwen3-tiny", 3, Path("runs/slurm-41"))
    slurm(place, "--model", "qwen3-tiny", "--steps=3")
    assert called(place, "toolkit1") == first
    for own in (["--run-dir", "runs/mine"], ["--run-dir=runs/mine"], ["--output_dir", "runs/mine"]):
        slurm(place, *own)
        assert options_of(called(place, "toolkit1"))["run_dir"] == Path("runs/mine")


def test_sbatch_reads_that_the_job_may_come_back() -> None:
    options = [line.removeprefix("#SBATCH ") for line in (LAUNCH / "slurm.sh").read_text().splitlines()]
    assert {"--requeue", "--open-mode=append", "--signal=USR1@120"} <= set(options)


def pods() -> dict[str, Mapping[str, Any]]:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas: dict[str, Mapping[str, Any]] = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    assert {replica["restartPolicy"] for replica in replicas.values()} == {"OnFailure"}
    return {name: replica["template"] for name, replica in replicas.items()}


def validate(template: Mapping[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_pods_have_the_form_that_kubernetes_knows() -> None:
    templates = pods()
    assert templates["Master"] == templates["Worker"]
    for template in templates.values():
        validate(template)
        container = template["spec"]["containers"][0]
        assert container["name"] == "pytorch"
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            v["name"] for v in template["spec"]["volumes"]
        }
    wrong = copy.deepcopy(dict(templates["Master"]))
    wrong["spec"]["terminationGraceSeconds"] = wrong["spec"].pop("terminationGracePeriodSeconds")
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(wrong)


def test_a_pod_starts_its_own_ranks(place: Path) -> None:
    command = pods()["Worker"]["spec"]["containers"][0]["command"]
    operator = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "leanstate-master-0", "MASTER_PORT": "23456"}
    done = run(place, command, GPUS="8", **operator)
    assert done.returncode == 0, done.stderr
    options = options_of(called(place, "toolkit"))
    assert Path(options["hostfile"]).read_text() == "pod-0 slots=8\npod-1 slots=8\n"
    given = {key: options[key] for key in ("hostfile", "no_ssh", "node_rank", "master_addr", "master_port")}
    launching.check(given)
    assert list(given.values())[1:] == [True, 1, "leanstate-master-0", 23456]
    assert (options["model"], options["steps"]) == ("qwen3-8b", 1000)
    assert not {"RANK", "WORLD_SIZE"} & {line.partition("=")[0] for line in called(place, "environment")}


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="its GPUs are counted")
def test_a_pod_whose_gpus_nobody_counts_says_so(place: Path) -> None:
    done = run(place, ["bash", "launch/kubernetes.sh"], GPUS="", RANK="0", WORLD_SIZE="1")
    assert (done.returncode, called(place, "toolkit")) == (2, [])
    assert done.stderr.startswith("error: GPUS is not set") and done.stderr.count("\n") == 1
