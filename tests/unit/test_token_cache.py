"""Tokens on disk: made once, the same as without, and never trusted where they are not whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from toolkit.data import (
    BadDocument,
    Documents,
    PackedTokens,
    Position,
    TokenCache,
    open_cache,
    open_documents,
    rank_batches,
    token_cache,
)
from toolkit.data import batches as data_batches
from toolkit.data.tokenizers import END_OF_TEXT, train_bytes_bpe

BYTES: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
    tokenizer_object=train_bytes_bpe([""], 257), eos_token=END_OF_TEXT
)
CORPUS = [f"document {number} " * (number % 5 + 1) for number in range(60)]


def packed(documents: Any = CORPUS, seed: int = 0, **options: Any) -> PackedTokens:
    windows = {"shuffle_window": 16, "sequence_window": 8}
    return PackedTokens(documents, BYTES, 12, seed=seed, **(windows | options))


def plain(number: int, start: Position | None = None, **options: Any) -> list[list[int]]:
    return [tokens.tolist() for tokens in islice(packed(**options).sequences(start), number)]


def through(cache: TokenCache, number: int, start: Position | None = None, **options: Any) -> list[list[int]]:
    stream = packed(**options)
    groups = cache.groups(stream.groups, replace(start or Position(), mixed=0))
    return [tokens.tolist() for tokens in islice(stream.sequences(start, groups), number)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.text("abcdef", min_size=1, max_size=30), min_size=1, max_size=12),
    st.integers(0, 2**63 - 1),
    st.integers(1, 5),
    st.integers(0, 30),
    st.integers(1, 30),
)
def test_the_sequences_are_those_without_a_cache(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[str], seed: int, window: int, given_out: int, number: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    options: dict[str, Any] = {"documents": corpus, "seed": seed, "shuffle_window": window, "sequence_window": window}
    whole = packed(**options)
    stream = whole.sequences()
    for _ in islice(stream, given_out):
        pass
    start = whole.position
    expected = [tokens.tolist() for tokens in islice(stream, number)]
    first, second = TokenCache(folder, "first"), TokenCache(folder, "second")
    assert through(first, number, start, **options) == expected
    assert through(second, number, start, **options) == expected
    assert first.made > 0 and second.made == 0


def test_ranks_tokenize_once_and_stops_change_nothing(tmp_path: Path) -> None:
    """Two and then three ranks, in threads, over two epochs: together they make each group once."""
    expected = plain(12 * 20)
    position, rows, made = None, [], 0
    for world, steps in ((2, 8), (3, 12)):
        caches = [TokenCache(tmp_path / "cache", "run") for _ in range(world)]
        ranks = [
            rank_batches(packed(), rank=r, world_size=world, micro_batch=12 // world, start=position, cache=caches[r])
            for r in range(world)
        ]
        for _ in range(steps):
            rows += [row for batches in ranks for row in next(batches).tolist()]
            assert len({batches.position for batches in ranks}) == 1
        position = ranks[0].position
        for rank in sorted(range(world), key=lambda rank: caches[rank].made):  # who makes ends last: nobody takes over
            ranks[rank].close()
        assert sum(cache.made > 0 for cache in caches) == 1, "one makes, the others read"
        made += sum(cache.made for cache in caches)
    assert rows == expected
    ahead = 2 * (data_batches.BATCHES_AHEAD * 12 // 8 + data_batches.GROUPS_AHEAD + 3)
    assert made == len(files(tmp_path / "cache")) <= 12 * 20 // 8 + ahead
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".npy"], "no lock, no draft is left"


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "garbage", "facts"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    through(TokenCache(tmp_path, "first"), 24)
    victim = max(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    whole = victim.read_bytes()
    flipped = bytearray(whole)
    flipped[140] ^= 1  # in the first sequence: a header of numpy has 128 bytes
    other = {"cut": whole[:-9], "empty": b"", "flipped": bytes(flipped), "garbage": b"x" * len(whole)}
    victim.write_bytes(other.get(damage, whole.replace(b'"epoch"', b'"month"')))
    again = TokenCache(tmp_path, "second")
    assert through(again, 24) == plain(24)
    assert again.made == 1 and victim.read_bytes() == whole


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import numpy as np
from test_token_cache import TokenCache, packed, through
import toolkit.data.token_cache as module
def half(file, tokens):
    file.write(b"x" * 100)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
cache = TokenCache(Path(sys.argv[1]), "run")
through(cache, 16)
cache.close()
np.save = half
through(TokenCache(Path(sys.argv[1]), "run"), 40)
"""


def test_what_a_killed_process_leaves_is_not_trusted_and_its_lock_is_free(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), here], env=os.environ, check=False, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".*.npy.*")) and list(tmp_path.glob("*.lock")), "it died in the middle of a file"
    after = TokenCache(tmp_path, "run")
    assert through(after, 40) == plain(40)
    assert after.made == 3


def test_who_waits_takes_over_from_one_that_ends(tmp_path: Path) -> None:
    first, second = TokenCache(tmp_path, "run"), TokenCache(tmp_path, "run")
    stream = packed()
    groups = first.groups(stream.groups, Position())
    next(groups)
    found: list[list[list[int]]] = []
    waiting = threading.Thread(target=lambda: found.append(through(second, 40)))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive() and second.made == 0
    first.close()
    waiting.join(30)
    assert found == [plain(40)] and second.made == 4


def test_one_that_is_closed_takes_no_lock(tmp_path: Path) -> None:
    """Its thread may look for a group just after `close`: a lock taken then would stay."""
    cache = TokenCache(tmp_path, "run")
    cache.close()
    with pytest.raises(token_cache.Closed):
        next(cache.groups(packed().groups, Position()))
    assert not list(tmp_path.iterdir())


def test_a_lock_that_its_owner_has_just_removed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before it was removed, it would be locked by one rank, and its successor by another."""
    lock, flock = token_cache.fcntl.flock, []

    def removed(*arguments: Any) -> None:
        flock.append(arguments)
        if len(flock) == 1:
            next(tmp_path.glob("*.lock")).unlink()
        lock(*arguments)

    monkeypatch.setattr(token_cache.fcntl, "flock", removed)
    cache, other = TokenCache(tmp_path, "run"), TokenCache(tmp_path, "run")
    assert through(cache, 8) == plain(8) and len(flock) == 2
    groups = other.groups(packed().groups, next(packed().groups(Position())).following)
    threading.Timer(0.2, other.close).start()
    with pytest.raises(token_cache.Closed):
        next(groups)
    assert other.made == 0


def test_one_that_waits_can_be_ended(tmp_path: Path) -> None:
    first = TokenCache(tmp_path, "run")
    groups = first.groups(packed().groups, Position())
    next(groups)
    second = TokenCache(tmp_path, "run")
    batches = rank_batches(packed(), rank=1, world_size=2, micro_batch=4, cache=second)
    next(batches)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("data")]
    assert threads and second.made == 0
    batches.close()
    assert not any(thread.is_alive() for thread in threads)


def test_another_run_does_not_wait(tmp_path: Path) -> None:
    slow = TokenCache(tmp_path, "slow")
    groups = slow.groups(packed().groups, Position())
    next(groups)
    fast = TokenCache(tmp_path, "fast")
    assert through(fast, 40) == plain(40) and fast.made == 4


def test_full_disks_and_folders_that_cannot_be_written_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert through(TokenCache(tmp_path / "file" / "cache", "run"), 40) == plain(40)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Not a directory" in caplog.text and "LEANSTATE_TOKEN_CACHE" in caplog.text
    caplog.clear()
    save, written = np.save, []

    def full(file: Any, tokens: Any) -> None:
        if len(written) == 2:
            file.write(b"x" * 10)
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(1)
        save(file, tokens)

    monkeypatch.setattr(np, "save", full)
    first, second = TokenCache(tmp_path / "cache", "run"), TokenCache(tmp_path / "cache", "run")
    assert through(first, 60) == plain(60)
    assert through(second, 60) == plain(60), "the lock of one that has given up is free"
    assert caplog.text.count("No space left on device") == 2
    assert len(files(tmp_path / "cache")) == 2 and not list((tmp_path / "cache").glob(".*"))


def test_an_error_reaches_every_rank_at_the_same_place(tmp_path: Path) -> None:
    texts = [*CORPUS[:40], "half \ud83d", *CORPUS[40:]]
    ends = []
    for number in range(3):
        stream = packed(Documents("x", lambda: iter(texts), bad="stop"))
        groups = TokenCache(tmp_path, "run").groups(stream.groups, Position())
        given_out = 0
        with pytest.raises(BadDocument, match="surrogate"):
            for _ in stream.sequences(None, groups):
                given_out += 1
        ends.append(given_out)
        assert len(files(tmp_path)) > 0, number
    assert len(set(ends)) == 1


def test_skipped_documents_are_counted_from_disk_too(tmp_path: Path) -> None:
    texts = ["half \ud83d", *CORPUS, "another \ud83d"]
    counts = set()
    for _ in range(2):
        stream = packed(texts)
        cache = TokenCache(tmp_path, "run")
        for _ in islice(stream.sequences(None, cache.groups(stream.groups, Position())), 200):
            pass
        cache.close()
        counts.add((stream.position, stream.read_to))
    [(_, read_to)] = counts
    assert read_to.skipped == 2 and read_to.epoch > 0


def test_room_is_made_by_removing_what_was_not_used_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, name in enumerate((24 * "a", 24 * "b", 24 * "c"), start=1):
        through(TokenCache(tmp_path / name, name), 16, seed=age)
        os.utime(tmp_path / name, (0, 10**9 - age))
    size = sum(path.stat().st_size for path in files(tmp_path / (24 * "a")))
    limit = 2 * size + size // 2
    monkeypatch.setattr(token_cache, "LIMIT", limit)
    cache = TokenCache(tmp_path / "mine", "mine")
    assert through(cache, 60, seed=9) == plain(60, seed=9)
    assert {path.name for path in tmp_path.iterdir()} == {24 * "a", 24 * "b", "mine"}
    assert sum(path.stat().st_size for path in files(tmp_path / "mine")) <= limit


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    file = tmp_path / "a.txt"
    file.write_text("".join(CORPUS))
    return file


def keys_of(file: Path, identity: dict[str, Any], **options: Any) -> Path:
    cache = open_cache(packed(open_documents(str(file), **options)), identity, "run")
    assert cache is not None
    return cache.folder


def test_the_folder_changes_with_whatever_changes_the_tokens(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(token_cache.FOLDER, str(tmp_path / "cache"))
    first = keys_of(corpus_file, {"seed": 0})
    assert first.parent.parent == tmp_path / "cache" and not first.exists()
    assert keys_of(corpus_file, {"seed": 0}) == first
    others = [keys_of(corpus_file, {"seed": 1}), keys_of(corpus_file, {"seed": 0}, bad="stop")]
    times = corpus_file.stat()
    corpus_file.write_text("".join(CORPUS).replace("9", "8"))
    os.utime(corpus_file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size, the same date
    others.append(keys_of(corpus_file, {"seed": 0}))
    assert len({first, *others}) == 4
    monkeypatch.setenv(token_cache.FOLDER, "off")
    assert open_cache(packed(), {}, "run") is None


def test_what_cannot_be_told_from_another_is_kept_for_its_run_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(token_cache.FOLDER, str(tmp_path))
    corpora = [packed(), packed(Documents("hub", lambda: iter(CORPUS)))]
    folders = {cache.folder for corpus in corpora for run in "ab" if (cache := open_cache(corpus, {}, run))}
    assert len(folders) == 2


def test_waiting_is_measured() -> None:
    def slow() -> Iterator[str]:
        for text in CORPUS:
            time.sleep(0.005)
            yield text

    batches = rank_batches(packed(Documents("slow", slow)), rank=0, world_size=1, micro_batch=4)
    began = time.perf_counter()
    next(batches)
    assert 0.08 < batches.waited <= time.perf_counter() - began  # 16 documents of the first window
    before = batches.waited
    time.sleep(0.2)
    next(batches)
    assert batches.waited - before < 0.05, "it was worked out meanwhile"
    batches.close()


def test_other_folders_beside_the_caches_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that the user names may be anything, such as a disk with data sets on it."""
    monkeypatch.setenv(token_cache.FOLDER, str(tmp_path))
    monkeypatch.setattr("toolkit.data.token_cache.LIMIT", 1)
    others = [tmp_path / "fineweb", tmp_path / "leanstate-tokens" / "mine"]
    for other in others:
        other.mkdir(parents=True)
        (other / "train.parquet").write_bytes(bytes(1000))
    cache = open_cache(packed(), {}, "run")
    assert cache is not None
    stream = cache.groups(packed().groups, Position())
    next(stream)
    cache.close()
    assert all((other / "train.parquet").exists() for other in others)
    assert cache.folder.parent == tmp_path / "leanstate-tokens"


def test_a_nearly_full_disk_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=100 << 30, free=4 << 30))
    cache = TokenCache(tmp_path / "tokens", "run")
    next(cache.groups(packed().groups, Position()))
    cache.close()
    assert not list((tmp_path / "tokens").glob("*.npy")) and "the disk is nearly full" in caplog.text
