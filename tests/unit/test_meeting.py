"""Where ranks meet before they have a process group: who is missing, and which network gloo takes."""

from __future__ import annotations

import os
import re
import socket
import threading

import psutil
import pytest

from toolkit.errors import UserError
from toolkit.run import meeting, ranks
from toolkit.run.meeting import AbsentError, Meeting


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> str:
    """Rank 0 of two on a free port, which is patient for less than two seconds."""
    monkeypatch.setattr(meeting, "LATE_SECONDS", 0.3)
    monkeypatch.setattr(meeting, "ABSENT_SECONDS", 1.2)
    port = str(ranks.free_port())
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return f"127.0.0.1:{port}"


@pytest.mark.parametrize(("others", "names"), [(1, "rank 1 has"), (2, "ranks 1, 2 have"), (9, "ranks 1 to 9 have")])
def test_ranks_that_do_not_come_are_named(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], others: int, names: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(others + 1))
    with pytest.raises(AbsentError, match=re.escape(f"{names} not come to rank 0 at {place} within 1 s.")):
        Meeting()
    said = capsys.readouterr().err
    assert said.startswith(f"note: {names} not come to rank 0 at {place} yet") and said.count("\n") == 1


def test_a_rank_that_finds_nobody_says_where_it_has_looked(
    place: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(AbsentError, match=f"rank 1 on .* has not reached rank 0 at {place} within 1 s"):
        Meeting()
    assert capfd.readouterr().err.count(f"does not reach rank 0 at {place}: is the run started on every machine") == 1


def test_a_port_that_is_taken_is_refused_in_a_sentence(place: str) -> None:
    with socket.create_server(("", int(place.partition(":")[2]))), pytest.raises(UserError, match="of this machine is"):
        Meeting()


def test_a_meeting_of_a_start_before_this_one_is_not_joined(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose rank 0 is still there, though rank 1 has ended and is started again."""
    from torch.distributed import PrefixStore, TCPStore

    port = int(place.partition(":")[2])
    before = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    old = PrefixStore("leanstate/0/5", before)
    for name in ("here/0", "here/1", "here/all"):
        old.set(name, "")
    waits: list[float] = []

    def slept(seconds: float) -> None:
        if seconds == 1.0 and not waits:  # the old run's store goes, as far as this rank can see
            for name in ("here/0", "here/1", "here/all"):
                old.delete_key(name)
        waits.append(seconds)

    monkeypatch.setattr(meeting, "_meetings", iter((5,)))
    monkeypatch.setattr(meeting.time, "sleep", slept)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(AbsentError, match="rank 0 has not come"):
        Meeting()
    assert waits[0] == 1.0


def test_a_missing_port_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, and MASTER_PORT is not set"):
        Meeting()


def test_two_ranks_meet_twice_and_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """In threads, each of which is a rank; the second time as a run that follows in the same processes."""
    own = threading.local()
    monkeypatch.setattr(ranks, "rank", lambda: own.rank)
    numbers = iter((7, 7, 8, 8))
    monkeypatch.setattr(meeting, "_meetings", numbers)
    monkeypatch.setattr(meeting, "ABSENT_SECONDS", 20.0)
    found: dict[int, tuple[list[int], dict[int, str], str | None]] = {}
    meetings: list[Meeting] = []

    def meet(rank: int) -> None:
        own.rank = rank
        here = Meeting()
        peers, places, problem = meeting.connect(here)
        found[rank] = list(peers.values()), places, problem
        meetings.append(here)  # the store lives as long
        for peer in peers:
            peer.close()

    for _ in range(2):
        found.clear()
        threads = [threading.Thread(target=meet, args=[rank]) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        who = f"process {os.getpid()} on {socket.gethostname()}"
        assert found == {0: ([1], {1: who}, None), 1: ([0], {0: who}, None)}


def test_gloo_takes_the_network_of_rank_0_on_several_machines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {
        name: [one.address for one in found if one.family == socket.AF_INET and not one.address.startswith("127.")]
        for name, found in psutil.net_if_addrs().items()
    }
    settled = []
    for size, own in (("2", {}), ("1", {}), ("1", {"GLOO_SOCKET_IFNAME": "mine"})):
        for name in ("GLOO_SOCKET_IFNAME", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("LOCAL_SIZE", size)
        monkeypatch.setenv("MASTER_ADDR", next((a for found in addresses.values() for a in found), "127.0.0.1"))
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        ranks._settle_interface()
        settled.append(os.environ.get("GLOO_SOCKET_IFNAME"))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    expected = next((name for name, found in addresses.items() if found), None)  # a machine may have no network
    assert settled == [None, expected, "mine"]


def test_ranks_of_mpi_that_do_not_know_their_number_do_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="MPI has started 4 processes and told none of them its RANK"):
        ranks.place_alone()
    assert "RANK" not in os.environ
