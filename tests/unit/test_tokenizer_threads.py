"""Threads that tokenize: the same tokens, files and errors for any number of them, and none that others wait for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.run import ranks

SCRIPT = """
import hashlib, json, os, sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from toolkit.data import Documents, PackedTokens, Position, TokenCache, rank_batches
from toolkit.data.tokenizers import END_OF_TEXT, train_bytes_bpe

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
WORDS = ["one", "two", "three", "four", "five", "six", "seven"]
TEXTS = [" ".join(WORDS[(number * step) % 7] for step in range(1, number % 90 + 2)) for number in range(400)]
BYTES = PreTrainedTokenizerFast(tokenizer_object=train_bytes_bpe(TEXTS, 300), eos_token=END_OF_TEXT)

def packed(texts=TEXTS, tokenizer=BYTES, bad="skip", seq_len=24):
    documents = Documents("given", lambda: iter(texts), bad=bad)
    return PackedTokens(documents, tokenizer, seq_len, seed=3, shuffle_window=100, sequence_window=16)

def known_words():  # fails at a text with another word, in the thread that tokenizes it
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*WORDS, END_OF_TEXT])}, "none"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
"""

SAME = f"""{SCRIPT}
own, others = map(Path, sys.argv[1:3])
PackedTokens._ids(packed(), TEXTS)
started = threads() - before

def read(folder, number, start=None):
    cache = TokenCache(folder, "run")
    batches = rank_batches(packed(), rank=0, world_size=1, micro_batch=5, start=start, cache=cache)
    rows = []
    for _ in range(number):
        rows += next(batches).tolist()
    position = asdict(batches.position)
    batches.close()
    return rows, position

first, middle = read(own, 30)
rest, _ = read(own, 30, Position(**middle))
resumed, _ = read(others, 30, Position(**middle))
files = {{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in own.glob("*.npy")}}
texts = [text + " zero" * (number in (7, 8, 250)) for number, text in enumerate(TEXTS)]
skipping = packed(texts, known_words())
kept = [tokens.tolist() for tokens in islice(skipping.sequences(), 900)]
try:
    list(islice(packed(texts, known_words(), bad="stop").sequences(), 900))
    stopped = "no"
except Exception as error:
    stopped = str(error)
told = {{"rows": [first, rest], "kept": kept, "bad": asdict(skipping.read_to), "stopped": stopped}}
print(json.dumps({{"started": started, "files": files, "resumed": resumed, "told": told}}))
"""


def call(threads: int, script: str, *arguments: str) -> Any:
    environment = os.environ | {ranks.TOKENIZER_THREADS: str(threads), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "neither warnings nor what a thread says when it fails"
    return json.loads(done.stdout)


def test_any_number_of_threads_gives_the_same_tokens_files_and_errors(tmp_path: Path) -> None:
    one, four = (call(threads, SAME, str(tmp_path / str(threads)), str(tmp_path / "1")) for threads in (1, 4))
    assert four["started"] == one["started"] + 3, "the environment says how many"
    assert one["told"] == four["told"]
    both = one["files"].keys() & four["files"].keys()  # how far each has worked ahead is a matter of chance
    assert len(both) >= 300 // 16 and all(one["files"][name] == four["files"][name] for name in both)
    told = four["told"]
    assert four["resumed"] == told["rows"][1] and len(told["rows"][1]) == 150
    assert told["bad"]["skipped"] == 3 and told["bad"]["epoch"] > 0
    assert "cannot be tokenized: " in told["stopped"] and "\n" not in told["stopped"]


FORKED = f"""{SCRIPT}
from toolkit.run.ranks import prepare_environment
prepare_environment()
expected = PackedTokens._ids(packed(), TEXTS)
if (child := os.fork()) == 0:
    os._exit(PackedTokens._ids(packed(), TEXTS) != expected)
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_tokenizes_without_the_threads() -> None:
    assert call(3, FORKED) == 0


INTERRUPTED = f"""{SCRIPT}
batches = rank_batches(packed(TEXTS * 500), rank=0, world_size=1, micro_batch=5)
try:
    for number, _ in enumerate(batches):
        if number == 3:
            print("reading", flush=True)
finally:
    batches.close()
"""


def test_an_interrupt_ends_a_process_whose_threads_tokenize() -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    environment = os.environ | {ranks.TOKENIZER_THREADS: "3", "TOKENIZERS_PARALLELISM": "true"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        reader.send_signal(signal.SIGINT)
        _, said = reader.communicate(timeout=60)
    assert reader.returncode == -signal.SIGINT and said.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize(("cores", "local", "threads"), [(1, 1, 1), (2, 1, 1), (16, 1, 15), (16, 4, 3), (4, 8, 1)])
def test_threads_are_this_ranks_cores_but_one(
    cores: int, local: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], "LOCAL_SIZE": str(local)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    ranks.prepare_environment()
    assert os.environ[ranks.TOKENIZER_THREADS] == str(threads)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
