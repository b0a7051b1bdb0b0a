"""The optimizer step, compiled in the background while model and data load, once for all ranks of a machine.

Local rank 0 starts a process that compiles into the compiler's cache on disk; before the first step all ranks wait for
it and load what is there. Whatever goes wrong with it, each rank compiles for itself. It is a process and not a
thread because `deepspeed.zero.Init` changes torch's functions for the whole process while the model is built.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.agreed import agreed, everyones
from toolkit.run import ranks
from toolkit.run.merge import merge_flags
from toolkit.run.settings import RunSettings

if TYPE_CHECKING:
    from toolkit.config import DeepSpeedSettings
    from toolkit.run.prepare import PreparedRun

LIMIT_SECONDS = 900.0
"""How long ranks wait for the background process before each compiles for itself."""

# From <sys/prctl.h>.
PR_SET_PDEATHSIG = 1

WORDS = "compiling the optimizer step (once for each machine and version; half a minute on two cores)"


class Background:
    """The process that compiles; `close` ends it if it still runs."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        # What this process imports, that one does too; `-P`: and nothing that happens to lie in the working folder.
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        command = [sys.executable, "-P", "-m", "toolkit.run.compiling", json.dumps(order), str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1"},  # no workers of their own
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own: the C++ compiler belongs to it
        )

    def wait(self, say: Callable[[str], None]) -> None:
        """Until it has ended, or for LIMIT_SECONDS; says what the wait is for."""
        deadline = time.monotonic() + LIMIT_SECONDS
        if self._process.poll() is None:
            say(WORDS)
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self.close()

    def close(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def begin(settings: RunSettings) -> Background | None:
    """Start compiling what this run's optimizer needs; None on other ranks and where that is of no use."""
    if ranks.local_rank() != 0:
        return None
    try:
        order = _order(settings)
        return Background(order) if order is not None and not _mark(order).exists() else None
    except Exception:  # of a JSON that nothing has checked yet; what is wrong is said where it is checked
        return None


def building(ds: DeepSpeedSettings) -> str:
    """The line on what happens while the engine is built."""
    if ds.on_cpu_adam:
        return "building the model, and DeepSpeed's CPU Adam, a C++ extension, if this machine has none yet"
    return "building the model"


def step_compiled(engine: Any, background: Background | None, say: Callable[[str], None]) -> float | None:
    """Have the optimizer step of `engine` compiled; every rank must call this.

    Returns:
        The seconds that this took, of the slowest rank; None where there is nothing to compile.
    """
    from toolkit.zero import compile_step, rule_optimizer

    optimizer = rule_optimizer(engine)
    if optimizer is None or not optimizer.defaults["compile"]:
        return None
    began = time.perf_counter()
    if background is not None:
        background.wait(say)
    everyones(None)  # they wait for rank 0 of their machine
    compile_step(engine)
    _, [seconds] = ranks.mean_max([], [time.perf_counter() - began], engine.device)
    return seconds


def run_compiled(
    prepared: PreparedRun, engine: Any, background: Background | None, say: Callable[[str], None]
) -> float | None:
    """Have the optimizer step compiled and, if the run asks for that, the model; every rank must call this.

    Returns:
        The seconds that this took; None where there is nothing to compile.

    Raises:
        UserError: raised by every rank, where the model cannot be compiled on one of them.
    """
    of_step = step_compiled(engine, background, say)
    if not prepared.settings.compile_model:
        return of_step
    return (of_step or 0.0) + _model_compiled(prepared, engine, say)


def _model_compiled(prepared: PreparedRun, engine: Any, say: Callable[[str], None]) -> float:
    """Have the blocks of the model compiled for batches like those of the run; the seconds of the slowest rank."""
    import torch

    from toolkit.models import compiled

    began = time.perf_counter()
    say("compiling the model (minutes on a CPU; later runs take it from a cache)")
    rows = (3,) if prepared.data.documents.conversations else ()
    shape = (prepared.batch.micro, *rows, prepared.settings.seq_len + 1)
    tokens = torch.zeros(shape, dtype=torch.int64, device=engine.device)

    def compile_model() -> None:
        compiled.compile_blocks(engine.module)
        compiled.warm(engine.module, tokens, evaluates=bool(prepared.validation))

    agreed(compile_model)
    _, [seconds] = ranks.mean_max([], [time.perf_counter() - began], engine.device)
    return seconds


def _order(settings: RunSettings) -> dict[str, Any] | None:
    """What to compile, in JSON's types, or None for optimizers that are not compiled."""
    import torch

    from toolkit.config import DeepSpeedSettings, apply_overrides, load_config

    config, _, _ = merge_flags(
        apply_overrides(load_config(settings.config), settings.overrides), settings, ranks.world_size()
    )
    ds = DeepSpeedSettings.read(config)
    # Rules of plugins are known once those have been imported, which is not done yet.
    if not (ds.rule or settings.plugins) or not ds.params.get("compile", True):
        return None
    # Without ZeRO, DeepSpeed hands over fp32 master weights and their gradients.
    gradient = (ds.gradients or ds.computed) if ds.stage else "fp32"
    on_host = ds.offload_optimizer != "none" or not torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator()
    return {
        "plugins": [str(path) for path in settings.plugins],
        "optimizer": ds.optimizer,
        "params": ds.params,
        "total_steps": settings.steps,
        "dtypes": ["bf16" if ds.without_masters else "fp32", gradient],
        "device": "cpu" if on_host or accelerator is None else accelerator.type,
        "deterministic": settings.deterministic,
    }


def _mark(order: Mapping[str, Any]) -> Path:
    """A file in the compiler's cache that is there once `order` has been carried out.

    Its name holds what the compiled code depends on. Numbers among the hyper-parameters are no part of that: they
    are arguments of the step.
    """
    import torch
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from toolkit.optim.kept import SOURCES

    params = {key: value for key, value in order["params"].items() if type(value) not in (int, float)}
    facts = [
        {**order, "params": params, "total_steps": None},
        [SOURCES, *(hashlib.sha256(Path(plugin).read_bytes()).hexdigest() for plugin in order["plugins"])],
        [sys.version, torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        torch.cuda.get_device_name() if order["device"] == "cuda" else "",
    ]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return Path(cache_dir()) / f"leanstate-{digest[:20]}"


def _carry_out(order: Mapping[str, Any]) -> None:
    """Compile what `order` says; in the background process."""
    import torch
    import torch._inductor.compile_fx  # once, before the processes part
    from torch import nn

    from toolkit.config.deepspeed import torch_dtype
    from toolkit.optim import COMPONENTS, find_rule
    from toolkit.optim.warm import kinds, warm
    from toolkit.plugins import import_plugins
    from toolkit.run import deterministic

    if order["deterministic"]:  # part of the key in the compiler's cache
        deterministic.enforce()
    import_plugins(map(Path, order["plugins"]))
    rule = find_rule(order["optimizer"])
    if rule is None:
        return
    params = rule.rule.supply(order["params"], total_steps=order["total_steps"])
    weights, gradient = map(torch_dtype, order["dtypes"])
    # Every component may have a format of its own, and tensors of one dimension have.
    groups = [
        {
            "params": [nn.Parameter(torch.zeros(shape, dtype=weights)) for shape in ((1, 1), (1,))],
            "component": component,
        }
        for component in COMPONENTS
    ]
    optimizer = rule(groups, **params)
    working = []
    for group in kinds(optimizer, weights):  # a core for each
        if (worker := os.fork()) == 0:
            os._exit(warm(optimizer, group, weights, gradient, order["device"]) is not None)
        working.append(worker)
    if not any([os.waitpid(worker, 0)[1] for worker in working]):
        _mark(order).touch()


def hear_of_the_end_of(parent: int) -> None:
    """Have SIGTERM sent to this process when `parent`, which started it, ends, however that ends."""
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _end_with(parent: int) -> None:
    """Let this process, its C++ compiler included, end when `parent` does."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    hear_of_the_end_of(parent)


if __name__ == "__main__":
    _end_with(int(sys.argv[2]))
    gc.disable()  # it imports much and ends soon
    _carry_out(json.loads(sys.argv[1]))
