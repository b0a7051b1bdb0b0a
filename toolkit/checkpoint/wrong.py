"""What a folder is that was given as a run or checkpoint."""

from __future__ import annotations

from pathlib import Path

from toolkit.errors import nearest, some

_EXPECTED = "expected is a run's folder, or a checkpoint such as runs/first/checkpoints/global_step100"
_SHOWN = 5


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` looks like a checkpoint of this package's, of DeepSpeed's, or one in its universal layout."""
    from toolkit.checkpoint.manifest import NAME

    return (
        (folder / NAME).exists()
        or (folder / "zero").is_dir()
        or any(folder.glob("*_optim_states.pt"))
        or any(folder.glob("*model_states.pt"))
    )


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds a model in Hugging Face's layout, and is no checkpoint, which has a config.json too."""
    return (folder / "config.json").is_file() and not is_checkpoint(folder)


def not_a_checkpoint(path: Path) -> str:
    """What `path` is instead and what was expected, as a sentence."""
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"{path}: there is no such folder; {_EXPECTED}.{nearest(path.name, beside)}"
    if not path.is_dir():
        return f"{path} is a file; {_EXPECTED}."
    inside = sorted(other for other in path.iterdir() if other.is_dir())
    runs = [other.name for other in inside if (other / "checkpoints").is_dir() or (other / "run.json").is_file()]
    if runs:
        return f"{path} is no run, but holds some: {some(runs, _SHOWN)}; give one of them."
    if (path / "run.json").is_file() or (path / "checkpoints").is_dir() or path.name == "checkpoints":
        return f"the run in {path} has no checkpoint: it saved none yet, or was started with --save-every 0."
    if (path / "adapter_config.json").is_file():
        return f"{path} holds adapters alone; `toolkit export --merge` of their run writes a model with them."
    if any(path.glob("*.safetensors")) or (path / "config.json").is_file():
        return f"{path} is a Hugging Face model and no checkpoint; {_EXPECTED}."
    if not any(path.iterdir()):
        return f"{path} is an empty folder; {_EXPECTED}."
    return f"{path} holds no checkpoint; {_EXPECTED}."
