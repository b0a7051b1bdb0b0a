"""How well a trained model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch

from toolkit.config.batch import MICRO
from toolkit.data import PackedTokens
from toolkit.errors import UserError
from toolkit.inference.opened import Opened
from toolkit.models import predictions
from toolkit.records.sizes import counted
from toolkit.run.settings import RunSettings
from toolkit.run.texts import digest, open_text

_SEQ_LEN = "identity.data.seq_len"
"""Where a checkpoint notes the run's; an exported folder notes nothing."""
_FOREVER = ("fineweb",)
"""Texts that nobody reads to their end."""


@dataclass(frozen=True)
class Evaluation:
    """`loss`: mean cross-entropy in nats of `tokens` predictions, which stand for `bytes` of text in UTF-8.

    The last of the `sequences` may have fewer than `seq_len` predictions.
    """

    data: str
    sequences: int
    seq_len: int
    last_seq_len: int
    tokens: int
    bytes: int
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan


@dataclass
class Sequences:
    """Tokens to predict, in the passes that the model is given, and what there is to say of them."""

    name: str
    seq_len: int
    packed: PackedTokens
    passes: Iterable[list[np.ndarray]]
    count: int | None
    remarks: list[str]


def own_text(opened: Opened, sequences: int | None, seq_len: int | None) -> Sequences:
    """What the run validates on, as its ranks are given it. None: as many sequences as the run, of its length.

    Raises:
        UserError: the checkpoint does not say what that is, or it cannot be read.
    """
    text, trained = opened.note("validation"), opened.note("identity.data")
    if text is None or trained is None:
        raise UserError(f"{opened.folder} notes no text that its run validates on; give one with --data.")
    length = _length(opened, seq_len)
    try:
        packed = open_text(text, opened.tokenizer, length, trained["seed"])
        packed.require(1)
    except UserError as error:
        raise UserError(
            f"the text that the run validates on: {str(error).rstrip('.')}; give one with --data."
        ) from None
    found = packed.first_pass(sequences or text["sequences"])
    remarks = []
    same = (length, sequences or text["sequences"]) == (trained["seq_len"], text["sequences"])
    if same and digest(found) != text["sha256"]:
        why = "the text has changed since the run"
        if text.get("packing") != packed.packing:
            why = "another version of this package fitted the run's conversations into sequences"
        remarks.append(f"{why}: the loss is not that of its validation.")
    size = _micro_batch(opened, length)
    # As `Run.validate` deals them out: in another grouping the last digits would differ.
    shares = (found[rank :: opened.ranks] for rank in range(opened.ranks))
    passes = [share[at : at + size] for share in shares for at in range(0, len(share), size)]
    return Sequences(text["name"], length, packed, passes, len(found), remarks)


def text_of(opened: Opened, name: str, text_column: str, sequences: int | None, seq_len: int | None) -> Sequences:
    """Another text, in its own order, from its beginning: all of it, or so many sequences.

    Raises:
        UserError: it cannot be read, or has no end.
    """
    if name in _FOREVER and sequences is None:
        raise UserError(f"--data {name} is read without end: say with --sequences how much of it.")
    length, remarks = _length(opened, seq_len), []
    if seq_len is None and opened.note(_SEQ_LEN) is None:
        remarks.append(
            f"{opened.folder} does not say how long the sequences of its run were: here they have at most {length} "
            "tokens, and the loss depends on it; --seq-len gives another number."
        )
    text = {"name": name, "part": "all", "subset": None, "text_column": text_column}
    packed = open_text(text, opened.tokenizer, length, 0, shuffle_window=1)
    taken = islice(packed.once(), sequences)
    passes = _passes(taken, _micro_batch(opened, length))
    return Sequences(name, length, packed, passes, sequences, remarks)


def _passes(sequences: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    for _, alike in groupby(sequences, len):  # the last one may be shorter
        while together := list(islice(alike, size)):
            yield together


def _length(opened: Opened, seq_len: int | None) -> int:
    length = seq_len or opened.note(_SEQ_LEN)
    if length is None:
        length = min(RunSettings().seq_len, opened.positions or RunSettings().seq_len)
    if opened.positions is not None and length > opened.positions:
        raise UserError(f"--seq-len is {length}, but the model has {counted(opened.positions, 'position')}.")
    return int(length)


def _micro_batch(opened: Opened, seq_len: int) -> int:
    """Sequences of a pass: the run's, and of longer ones no more tokens."""
    micro, trained = opened.note(f"run.terms.{MICRO}"), opened.note(_SEQ_LEN) or seq_len
    return max(1, micro * trained // max(trained, seq_len)) if isinstance(micro, int) else 1


@torch.no_grad()
def evaluate(opened: Opened, text: Sequences, done: Callable[[int], None]) -> Evaluation:
    """The mean loss over `text`; `done` is called with the number of sequences since its last call.

    Raises:
        UserError: the text has nothing to predict.
    """
    total: Any = 0.0
    tokens = sequences = last = 0
    for rows in text.passes:
        batch = torch.from_numpy(np.stack(rows)).to(opened.device)
        predicted = int(predictions(batch))
        total = total + opened.model(batch).double() * predicted
        tokens += predicted
        sequences += len(rows)
        last = batch.shape[-1] - 1
        done(len(rows))
    if not tokens:
        raise UserError(f"the text {text.name!r} is a single token: there is nothing to predict.")
    covered = text.packed.text_bytes()
    return Evaluation(text.name, sequences, text.seq_len, last, tokens, covered, float(total) / tokens)
