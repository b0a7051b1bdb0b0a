"""Compiled steps on the disk of a CPU machine, as they are called: a later process neither traces nor compiles.

What Inductor keeps itself it finds by the traced graph, and tracing takes each process some two seconds of processor
time. Here the key names all that the graph and the code made of it follow from. What cannot be read is made anew.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("toolkit")


def _sources() -> str:
    """Of all that a step's graph is traced through, and its code written by. Read when this process imports it."""
    rooms = (Path(__file__).parent, Path(__file__).parents[1] / "state")
    files = sorted(file for room in rooms for file in room.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


SOURCES = _sources()


def ours(*types: type) -> bool:
    """Whether SOURCES has all that they say of arithmetic."""
    bases = {base.__module__.partition(".")[0] for one in types for base in one.__mro__}
    return bases <= {"toolkit", "pydantic", "abc", "builtins"}


def place(what: str, tensors: Sequence[Any]) -> Path | None:
    """The file of the step `what` for `tensors` like these; None where nothing is kept.

    Nothing is kept of a GPU's code, and where caches are off.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as settings
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.utils import parallel_num_threads

    given = [x for x in tensors if isinstance(x, Tensor)]
    if any(x.device.type != "cpu" for x in given):
        return None  # before this processor and its compiler are asked, which a GPU's code needs nothing of
    if settings.force_disable_caches or not (settings.fx_graph_cache and hasattr(functorch, "bundled_autograd_cache")):
        return None
    found: list[object] = [SOURCES, what, torch.__version__, torch.version.git_version, platform.python_version()]
    found += [
        str(pick_vec_isa()),
        get_cpp_compiler(),
        parallel_num_threads(),
        settings.get_hash(),
        functorch.get_hash(),
    ]
    found += [x is None for x in tensors]
    found += [(x.dtype, x.stride(), x.shape if x.dim() < 2 else x.shape[1:]) for x in given]
    return Path(cache_dir()) / "leanstate" / hashlib.sha256(repr(found).encode()).hexdigest()


def load(file: Path, options: dict[str, Any]) -> Callable[..., Any] | None:
    """What `store` has left there, or None; `options` are those it was compiled with."""
    import torch._inductor.config as settings
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    try:
        with settings.patch(options):
            loaded: Callable[..., Any] = AOTCompiledArtifact.deserialize(file.read_bytes()).inner_fn.compiled_fn
            return loaded
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file, or another version of a compiler's, may raise
        logger.debug("%s is not what it should be and is made anew: %s", file, error)
        return None


def writable(file: Path | None) -> AbstractContextManager[object]:
    """What Inductor compiles meanwhile can be written down, if there is a place for it."""
    import torch._functorch.config as functorch

    return nullcontext() if file is None else functorch.patch(bundled_autograd_cache=True)


def store(file: Path, compiled: Any) -> None:
    """Keep a function that was compiled under `writable`."""
    from torch._inductor.codecache import write_atomic
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(str(file), AOTCompiledArtifact(compiled).serialize())
    except Exception as error:  # a full disk, or what cannot be written down: this process has the function
        logger.debug("the compiled step is not kept in %s: %s", file, error)
