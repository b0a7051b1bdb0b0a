"""Where the ranks of a run meet before they have a process group.

To join a process group a rank waits in C, for half an hour, for ranks that never come, and can name none. So all of
them first come to the store that torch keeps on rank 0's machine for the process group, and connect to rank 0 there.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from toolkit.errors import UserError
from toolkit.run import ranks
from toolkit.sentences import one_line

LATE_SECONDS = 30.0
"""After how long ranks that have not come are named."""
ABSENT_SECONDS = 60.0 * float(os.environ.get("DEEPSPEED_TIMEOUT", "30"))
"""After how long the others end without them: as long as DeepSpeed would wait."""
CONNECT_SECONDS = 30.0
_meetings = itertools.count()
T = TypeVar("T")


class AbsentError(Exception):
    """Ranks of this run have not come, or rank 0 cannot be found."""


class Meeting:
    """Once it is made, all ranks have come; they leave values under names, and wait for one another.

    Raises:
        UserError: the port is taken.
        AbsentError: by any method.
    """

    def __init__(self) -> None:
        from torch import distributed

        if "MASTER_PORT" not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {ranks.world_size()}, and MASTER_PORT is not set; all ranks need the same one."
            )
        self._where = f"{os.environ.setdefault('MASTER_ADDR', '127.0.0.1')}:{os.environ['MASTER_PORT']}"
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which outlives a restart
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        name = f"leanstate/{restart}/{next(_meetings)}"
        while True:
            store = self._opened(serves=ranks.rank() == 0 and not agent)
            self._store = distributed.PrefixStore(name, store)
            if not self.has(f"here/{ranks.rank()}"):
                break
            time.sleep(1.0)  # a start before this one has met here, and its rank 0 has not ended yet
        self.wait_for_all("here")

    def put(self, name: str, value: str) -> None:
        self._asked(lambda: self._store.set(name, value))

    def get(self, name: str) -> str:
        return self._asked(lambda: self._store.get(name)).decode()

    def has(self, name: str) -> bool:
        return self._asked(lambda: bool(self._store.check([name])))

    def wait_for_all(self, what: str) -> None:
        """Wait until every rank has come here. Rank 0 names those that are late."""
        self.put(f"{what}/{ranks.rank()}", "")
        if self._asked(lambda: self._store.add(what, 1)) == ranks.world_size():
            self.put(f"{what}/all", "")
        began, pause, told = time.monotonic(), 0.01, False
        while not self.has(f"{what}/all"):
            waited = time.monotonic() - began
            if waited > ABSENT_SECONDS:
                raise AbsentError(f"{self._late(what)} within {ABSENT_SECONDS:.0f} s.")
            if waited > LATE_SECONDS and not told and ranks.rank() == 0:
                told = True
                self._note(f"{self._late(what)} yet, {LATE_SECONDS:.0f} s after this one")
            time.sleep(pause := min(1.0, 1.5 * pause))

    def _late(self, what: str) -> str:
        late = [rank for rank in range(ranks.world_size()) if not self.has(f"{what}/{rank}")]
        if not late:  # the last one is on its way out of here
            return "Some ranks have not come"
        first, last = late[0], late[-1]
        names = f"rank {first} has" if len(late) == 1 else f"ranks {', '.join(map(str, late))} have"
        if len(late) > 2 and last - first == len(late) - 1:
            names = f"ranks {first} to {last} have"
        return f"{names} not come to rank 0 at {self._where}"

    def _note(self, words: str) -> None:
        print(
            f"note: {words}: is the run started on every machine, with this address and port? After "
            f"{ABSENT_SECONDS:.0f} s it ends.",
            file=sys.stderr,
            flush=True,
        )

    def _opened(self, serves: bool) -> Any:
        from torch import distributed

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        began, told = time.monotonic(), False
        while True:
            try:
                store = distributed.TCPStore(
                    address,
                    port,
                    is_master=serves,
                    timeout=timedelta(seconds=LATE_SECONDS),
                    wait_for_workers=False,
                    multi_tenant=True,  # the process group's is the same
                )
                store.set_timeout(timedelta(seconds=ABSENT_SECONDS))
                return store
            except distributed.DistError as error:
                if "EADDRINUSE" in str(error):
                    raise UserError(
                        f"port {port} of this machine is in use, and rank 0 needs it; give another one, the same on "
                        "all machines (--master-port or MASTER_PORT)."
                    ) from None
                if time.monotonic() > began + ABSENT_SECONDS:
                    raise AbsentError(
                        f"rank {ranks.rank()} on {socket.gethostname()} has not reached rank 0 at {self._where} within "
                        f"{ABSENT_SECONDS:.0f} s ({one_line(error)})."
                    ) from None
            if not told and ranks.local_rank() == 0:
                told = True
                self._note(f"rank {ranks.rank()} on {socket.gethostname()} does not reach rank 0 at {self._where}")
            time.sleep(1.0)

    def _asked(self, ask: Callable[[], T]) -> T:
        from torch import distributed

        try:
            return ask()
        except distributed.DistError:
            who = f"rank {ranks.rank()} on {socket.gethostname()}"
            raise AbsentError(f"{who} has lost rank 0 at {self._where} before all ranks were there.") from None


# ---- connections ----

Connections = dict[socket.socket, int]


def connect(meeting: Meeting) -> tuple[Connections, dict[int, str], str | None]:
    """Connect all ranks to rank 0.

    Returns:
        The ranks that this one is connected to, and which process on which machine they are; why that is none, though
        there are others.
    """
    here = f"process {os.getpid()} on {socket.gethostname()}"
    peers: Connections = {}
    places: dict[int, str] = {}
    try:
        if ranks.rank() == 0:
            key, dual = os.urandom(16).hex(), socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            server = socket.create_server(("", 0), family=family, backlog=ranks.world_size(), dualstack_ipv6=dual)
            meeting.put("heartbeat", json.dumps([server.getsockname()[1], key, here]))
            _accept(server, key, peers, places)
        else:
            port, key, places[0] = json.loads(meeting.get("heartbeat"))
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_SECONDS)
            peer.sendall(f"{key} {ranks.rank()} {here}\n".encode())
            peers[peer] = 0
    except OSError as error:
        meeting.put("problem", f"rank {ranks.rank()}: {error}")
    meeting.wait_for_all("connected")
    if meeting.has("problem"):
        for peer in peers:
            peer.close()
        return {}, {}, meeting.get("problem")
    for peer in peers:
        peer.settimeout(1.0)
    return peers, places, None


def _accept(server: socket.socket, key: str, peers: Connections, places: dict[int, str]) -> None:
    deadline = time.monotonic() + CONNECT_SECONDS
    with server:
        while len(peers) < ranks.world_size() - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            peer, _ = server.accept()
            peer.settimeout(max(0.01, deadline - time.monotonic()))
            with peer.makefile("r", encoding="ascii", errors="replace") as lines:
                said, _, who = lines.readline(512).rstrip("\n").partition(" ")
            if said == key:
                rank, _, place = who.partition(" ")
                peers[peer], places[int(rank)] = int(rank), place
            else:  # whoever looks for open ports
                peer.close()
