"""Makes the wheels that a GPU machine with PyTorch and transformers, but no network, may lack: tests/gpu/wheels/.

    python tests/gpu/wheels.py [NAME ...]        # for Python 3.12 on x86-64 Linux; NAME: further packages

`measure.py` installs those that are missing or older there. Such a machine is taken to have torch, triton, transformers
and what those and common tools bring along (numpy, tokenizers, accelerate, safetensors, pyarrow, pandas, psutil, rich,
typer, pytest, hypothesis, ...); versions are those of constraints.txt. For one Python and one CUDA, so that all of it
stays under 60 MB: 22 MB with deepspeed 0.19.8 and bitsandbytes 0.50.2.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WHEELS = Path(__file__).resolve().parent / "wheels"
PYTHON = "3.12"
CUDA = "130"
LIMIT = 60_000_000
"""Bytes of all wheels together."""

PACKAGES = (
    "deepspeed",
    "hjson",
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "typing_extensions",
    "datasets",
    "dill",
    "multiprocess",
    "mistral_common",  # for the tokenizer file in it; no module of it is imported
    "zstandard",
    "bitsandbytes",
    "flashoptim==0.1.4",  # compared with, and not used otherwise
)

PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (39, 34, 31, 28, 27, 24, 17, 12, 5)) + (
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="further packages, as pip writes them")
    options = parser.parse_args()
    pinned = versions()
    WHEELS.mkdir(exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    for name in (*PACKAGES, *options.names):
        plain = re.split(r"[=<>!~]", name)[0]
        make(name if plain != name else f"{name}=={pinned[key(name)]}" if key(name) in pinned else name)
    for wheel in sorted(WHEELS.glob("bitsandbytes-*.whl")):
        slim(wheel)
    wheels = sorted(WHEELS.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:6.1f} MB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total / 1e6:6.1f} MB  in all, in {WHEELS}")
    if total > LIMIT:
        print(f"error: more than {LIMIT / 1e6:.0f} MB; leave something out", file=sys.stderr)
        return 1
    return 0


def versions() -> dict[str, str]:
    """By name: the version in constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {key(name): version for name, version in pairs}


def key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def make(requirement: str) -> None:
    """Download the wheel of `requirement` for the GPU machine, or build it where there are sources only."""
    pip = [sys.executable, "-m", "pip"]
    target = ["--python-version", PYTHON, "--implementation", "cp", "--abi", f"cp{PYTHON.replace('.', '')}"]
    target += ["--abi", "abi3", "--abi", "none", *(word for name in PLATFORMS for word in ("--platform", name))]
    download = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", *target, "--dest", str(WHEELS)]
    if subprocess.run([*download, requirement], capture_output=True).returncode == 0:
        return
    # Without isolation: DeepSpeed's setup.py imports torch. Without compiled operators it is the same on every machine.
    with tempfile.TemporaryDirectory() as folder:
        build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, requirement]
        done = subprocess.run(build, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"error: there is no wheel of {requirement}, and none could be built:\n{done.stderr[-2000:]}"
            )
        made = next(Path(folder).glob("*.whl"))
        if not made.name.endswith("-py3-none-any.whl"):
            raise SystemExit(f"error: {made.name} fits this machine only")
        shutil.move(made, WHEELS / made.name)


def slim(wheel: Path) -> None:
    """Leave out the libraries of `wheel` for other versions of CUDA and other makers' GPUs."""
    keep = re.compile(rf"libbitsandbytes_(cpu|cuda{CUDA})\.so$")
    draft = wheel.with_suffix(".draft")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as new:
        names = [
            name for name in old.namelist() if not re.search(r"libbitsandbytes_\w+\.so$", name) or keep.search(name)
        ]
        if not any(keep.search(name) and "cuda" in name for name in names):
            raise SystemExit(f"error: {wheel.name} has no library for CUDA {CUDA}")
        for name in names:
            content = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if line.rsplit(",", 2)[0] in names).encode()
            new.writestr(old.getinfo(name), content, zipfile.ZIP_DEFLATED)
    draft.replace(wheel)


if __name__ == "__main__":
    sys.exit(main())
