"""Ranks: starting them, reporting errors, averaging."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from toolkit.agreed import AgreedError
from toolkit.errors import UserError
from toolkit.records.machine import cores, local_size
from toolkit.records.sizes import size_text
from toolkit.run import leftovers
from toolkit.usage import SHELL_PATH

if TYPE_CHECKING:
    import torch

    Values = Sequence["float | torch.Tensor"]

MeansAndMaxima = tuple[list[float], list[float]]
T = TypeVar("T")

# How long the other ranks wait for rank 0 to print: the launcher ends all ranks as soon as one has ended.
GRACE_SECONDS = 5.0


# Where torch reads the settings of its caching allocator; from 2.9 on it warns about the older names.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

TOKENIZER_THREADS = "RAYON_NUM_THREADS"
"""In which the library tokenizers finds how many threads it starts at its first use."""
_PARALLEL = "TOKENIZERS_PARALLELISM"

_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""In which MPI says how many processes it has started."""
EMPTY_BYTES = 400_000_000
"""Bytes of memory that no two ranks share, at least: what Python holds with PyTorch, DeepSpeed and transformers."""
THREADS = "LEANSTATE_THREADS"
"""The variable that says how many threads of the CPU each rank has, before OMP_NUM_THREADS."""
_PROBE = "198.51.100.1"  # kept for documents: nobody has it, and the way to it is the way to everywhere


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This rank's place among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_room(count: int, *, options: str = "--ranks") -> None:
    """Raise UserError where this machine's memory, or its control group's, does not even hold `count` ranks without a
    model.

    A machine on which they were started would be of no more use.
    """
    from toolkit.memory.machine import unused

    free = unused()
    if count > 1 and count * EMPTY_BYTES > free:
        raise UserError(
            f"{options}: {count:,} ranks of this machine take {size_text(count * EMPTY_BYTES)} without any model, "
            f"and {size_text(free)} of its memory are free, enough for {max(1, free // EMPTY_BYTES):,}."
        )


def prepare_environment() -> None:
    """Set what libraries read from the environment when they are imported; call it first of all.

    The cores are shared among this machine's ranks: otherwise each rank starts a thread for every core, and
    they wait for each other. DeepSpeed's just-in-time builds take ninja from the PATH: this environment's own,
    also where it is not activated, because two versions of ninja rebuild each other's work at every start. A GPU's
    memory is reserved in segments that can grow, which leaves no gaps of the wrong size between tensors. Tokenizers use
    this rank's cores but one, which is left to the training process.

    Raises:
        UserError: a variable of this package in the environment is not right.
    """
    scripts = sysconfig.get_path("scripts")
    path = os.environ.get("PATH", os.defpath)
    os.environ.setdefault(SHELL_PATH, path)
    if path.split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = os.pathsep.join([scripts, path])
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    if (threads := _threads()) is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault(TOKENIZER_THREADS, str(tokenizer_threads(threads or _share())))
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault(_PARALLEL, "true")
    # The threads are gone in a process that this one has forked: one that tokenizes there would wait for them for ever.
    os.register_at_fork(after_in_child=lambda: os.environ.update({_PARALLEL: "false"}))
    if rank() != 0:
        warnings.simplefilter("ignore")
    if rank() != 0 or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars, too


def _threads() -> int | None:
    """Threads of this rank; None: as many as OMP_NUM_THREADS says.

    torchrun sets that to 1 for its ranks unless it is set, which looks as if somebody had wanted 1: with several ranks
    it is taken for torchrun's, since a rank of one thread leaves most cores idle. `THREADS` says what is wanted.

    Raises:
        UserError: `THREADS` is no number of threads.
    """
    if (asked := os.environ.get(THREADS)) is not None:
        if not asked.isascii() or not asked.isdigit() or int(asked) < 1:
            raise UserError(f"{THREADS} is {asked!r}, but must be a whole number from 1: threads of each rank.")
        return int(asked)
    given, elastic = os.environ.get("OMP_NUM_THREADS"), "TORCHELASTIC_RUN_ID" in os.environ
    if given is None or (given == "1" and elastic and local_size() > 1):
        return _share()
    return None


def _share() -> int:
    """This rank's cores."""
    return max(1, cores() // local_size())


def tokenizer_threads(cores: int) -> int:
    """Threads that tokenize in a process with `cores` of its own: one core is left for the steps."""
    return max(1, cores - 1)


def threads_given() -> bool:
    """Whether the environment says how many threads a rank has."""
    return THREADS in os.environ or "OMP_NUM_THREADS" in os.environ


def with_threads(count: int) -> dict[str, str]:
    """What a rank's environment must have for it to have `count` threads, whatever this process's says."""
    tokenizing = str(tokenizer_threads(count))
    return {THREADS: str(count), "OMP_NUM_THREADS": str(count), TOKENIZER_THREADS: tokenizing}


def _quiet() -> None:
    """Keep DeepSpeed's warnings to rank 0, and off the screen the one that every run would show."""
    log = logging.getLogger("DeepSpeed")
    if rank() != 0:
        log.setLevel(logging.ERROR)
    # DeepSpeed's schedulers warn about their own first call.
    log.addFilter(lambda record: "scheduler before it has started" not in record.getMessage())
    # DeepSpeed calls collectives that torch has since renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for name in ("transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start() -> torch.device:
    """Check the devices and join the process group; a process without a launcher is world size 1.

    Raises:
        UserError: this machine has fewer GPUs than ranks.
    """
    import torch

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    place = local_rank()
    if devices:
        if (started := local_size()) > devices:
            raise UserError(
                f"{started} ranks were started on this machine, which has {devices} GPU(s); "
                f"start at most one rank per GPU (--num_gpus {devices})."
            )
        torch.accelerator.set_device_index(place)
        little = leftovers.little_shared_memory() if place == 0 and local_size() > 1 else None
        if little is not None:
            print(f"note: {little}: ranks of one machine may fail to reach one another.", file=sys.stderr)
    settle_accelerator()
    place_alone()
    _settle_interface()

    leftovers.own_build_folder()
    if place == 0:
        leftovers.release_locks()

    import deepspeed

    from toolkit.zero import shared_memory

    _quiet()
    shared_memory.leave_out()
    deepspeed.init_distributed(verbose=False)
    accelerator = torch.accelerator.current_accelerator() if devices else None
    return torch.device(accelerator.type, place) if accelerator is not None else torch.device("cpu")


def settle_accelerator() -> None:
    """On a machine without GPUs DeepSpeed would look for one when it is imported, and say so; call it before that."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _settle_interface() -> None:
    """Have gloo use the network over which this machine reaches rank 0, unless somebody has named one.

    It would take the address that this machine's own name stands for: often 127.0.0.1, where others find nobody.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or world_size() == local_size():
        return
    import psutil

    for target in (os.environ["MASTER_ADDR"], _PROBE):  # on rank 0's machine its own name may be 127.0.1.1
        with contextlib.suppress(OSError):
            family, kind, protocol, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)  # which sends nothing
                own = probe.getsockname()[0].partition("%")[0]
            for name, addresses in psutil.net_if_addrs().items():
                found = [address.address.partition("%")[0] for address in addresses]
                if own in found and not ipaddress.ip_address(own).is_loopback:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return


def place_alone() -> None:
    """Set what a launcher sets, as far as none has: this process is the only rank.

    Raises:
        UserError: MPI has started others.
    """
    started = next((count for name in _OF_MPI if (count := int(os.environ.get(name, "1"))) > 1), None)
    if started is not None and "RANK" not in os.environ:
        raise UserError(
            f"MPI has started {started} processes and told none of them its RANK, so each would train alone; start "
            "them with `toolkit train --hostfile`, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone["LOCAL_SIZE"] = str(local_size())  # of whatever started it
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())


def finish() -> None:
    """Leave the process group, if this process joined one; its threads must not outlive the interpreter."""
    if _joined():
        from torch import distributed

        distributed.destroy_process_group()


def _joined() -> bool:
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch_command(module: str, options: Sequence[str], count: int, port: int) -> list[str]:
    """What starts `module` on `count` ranks of this machine: one process needs no launcher, whose own start takes
    seconds."""
    if count == 1:
        return [sys.executable, "-m", module, *options]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    master = ["--num_gpus", str(count), "--master_port", str(port)]
    return [sys.executable, launcher, *master, "--module", module, *options]


def from_first(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def mean_max(mean: Values, largest: Values, device: torch.device) -> tuple[list[float], list[float]]:
    """Over all ranks: the means of the first values and the maxima of the second, in one collective."""
    return mean_max_later(mean, largest, device)()


def mean_max_later(mean: Values, largest: Values, device: torch.device) -> Callable[[], MeansAndMaxima]:
    """As `mean_max`, whose result is what the returned function gives; it waits for that alone.

    Until it is called the device may be given more to do. Values may lie on the device.
    """
    import torch
    from torch import distributed

    from toolkit.zero.gradients import HostCopy

    values = [*mean, *largest]
    mine = torch.tensor([0.0 if isinstance(value, torch.Tensor) else value for value in values], dtype=torch.float64)
    mine = mine.to(device, non_blocking=True)
    for place, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            mine[place] = value
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    distributed.all_gather(everyone, mine)
    copy = HostCopy(torch.stack(everyone))

    def read() -> MeansAndMaxima:
        table = copy.wait()
        return table[:, : len(mean)].mean(0).tolist(), table[:, len(mean) :].amax(0).tolist()

    return read


def report(error: UserError) -> None:
    """Print `error: <message>` once for the whole run; the caller exits with status 2."""
    # Before the ranks have joined, each machine speaks for itself.
    if rank() == 0 or (int(os.environ.get("LOCAL_RANK", rank())) == 0 and not _joined()):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(GRACE_SECONDS)
    if _joined() and not isinstance(error, AgreedError):
        print(f"error (rank {rank()}): {error}", file=sys.stderr, flush=True)
