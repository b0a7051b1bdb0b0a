"""Tokenizers: two that need no network, any local one, or one from the hub."""

from __future__ import annotations

import importlib.util
import platform
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.files import read_file
from toolkit.data.stream import hub_reachable, stdlib_files
from toolkit.errors import UserError, nearest
from toolkit.models.presets import first_line
from toolkit.paths import cache_folder, replace_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TOKENIZERS = ("mistral-32k", "python-4k")
PYTHON_VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer called `spec`, with an end-of-text id in `eos_token_id`.

    Args:
        spec: ``mistral-32k`` (32,000 entries, from the package mistral_common), ``python-4k`` (4,096
            byte-level entries, trained on the standard library's source at first use), a folder or
            tokenizer.json, or a name on the Hugging Face hub.

    Raises:
        UserError: nothing of that name here or on the hub, an unreadable file, no vocabulary, or no end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(spec).expanduser()
    if spec == "mistral-32k":
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        return PreTrainedTokenizerFast(tokenizer_object=mistral_tokenizer(), **names)
    if spec == "python-4k":
        return PreTrainedTokenizerFast(tokenizer_object=_python_tokenizer(), eos_token=END_OF_TEXT)
    tokenizer: PreTrainedTokenizerBase
    try:
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        elif (path / "tokenizer.json").is_file():
            # This file says it all; AutoTokenizer would rebuild parts of it after the class named beside it.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False)
        elif path.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        elif path.is_absolute() or path.suffix == ".json" or len(path.parts) > 2 or spec.startswith("."):
            raise UserError(f"there is no tokenizer file or folder {spec!r}.")
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                spec, local_files_only=not hub_reachable(), trust_remote_code=False
            )
    except UserError:
        raise
    except Exception as error:  # the libraries raise anything from OSError to a bare Exception on a bad file
        if path.exists() or "trust_remote_code" in str(error):
            reason = first_line(error).rstrip(".")
            raise UserError(f"tokenizer {spec!r} cannot be loaded: {reason}.") from error
        raise UserError(
            f"unknown tokenizer {spec!r}: it is none of {', '.join(TOKENIZERS)}, no local folder or "
            "tokenizer.json, and the Hugging Face hub cannot be reached or has no such name."
            # Users meet this for a preset's tokenizer, which they did not name themselves.
            + (
                nearest(spec, TOKENIZERS)
                or f" With a network, 'hf download {spec}' fetches it; in training, --tokenizer names another."
            )
        ) from error
    _refuse_empty(spec, tokenizer)
    if tokenizer.eos_token_id is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.eos_token = next((token for token in END_TOKENS if token in vocabulary), None)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {spec!r} has no end-of-text token: name it as eos_token in its tokenizer_config.json."
        )
    return tokenizer


def _refuse_empty(spec: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where there is nothing but special tokens: all text would be nothing, or one unknown token.

    From a folder with a model and no tokenizer, transformers makes such a one of the model's family.
    """
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    # One may be left that families with SentencePiece always make, for a space.
    if len(set(tokenizer.get_vocab().values()) - special) <= 1:
        raise UserError(
            f"tokenizer {spec!r} has special tokens only and no vocabulary: its tokenizer.json is missing or empty. "
            "In training, --tokenizer names another."
        )


def mistral_tokenizer() -> Tokenizer:
    """Mistral's first tokenizer, 32,000 entries, made from the SentencePiece model in mistral_common.

    SentencePiece joins, again and again, the neighbouring pair whose joined piece has the best score; so the
    merges are all ways to split a piece into two others, best score first, equal scores (which only runs of
    spaces have) by entry number as in the published tokenizer.json of this model. No control piece (``</s>``)
    or byte piece (``<0x0A>``) of this model splits into two others, so that none is ever made from text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    scores = dict(_sentencepiece_pieces(_mistral_model().read_bytes()))
    ids = {piece: index for index, piece in enumerate(scores)}
    splits = (
        (-score, ids[piece], ids[piece[:at]], ids[piece[at:]], piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    )
    merges = [(left, right) for *_, left, right in sorted(splits)]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def _mistral_model() -> Path:
    # Found, not imported: importing mistral_common takes a second and needs more than its data file.
    package = importlib.util.find_spec("mistral_common")
    file = Path(package.origin).parent / "data" / "tokenizer.model.v1" if package and package.origin else None
    if file is None or not file.is_file():
        raise UserError("tokenizer 'mistral-32k' needs the package mistral-common with its tokenizer.model.v1.")
    return file


def _sentencepiece_pieces(model: bytes) -> Iterator[tuple[str, float]]:
    """(piece, score) of every entry of a SentencePiece ModelProto.

    Read from the protobuf wire format, where ModelProto.pieces is field 1 and holds piece = 1 and score = 2,
    so that neither sentencepiece nor protobuf has to be installed for one file.
    """
    for number, value in _protobuf_fields(model):
        if number == 1:
            fields = dict(_protobuf_fields(value))
            yield fields[1].decode(), struct.unpack("<f", fields.get(2, bytes(4)))[0]


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
        else:
            size = {1: 8, 5: 4}.get(wire_type) or varint()
            yield number, message[at : at + size]
            at += size


def train_bytes_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` entries; 0 is ``<|endoftext|>``. The same texts give the same one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _python_tokenizer() -> Tokenizer:
    """The trained tokenizer from the user's cache, or trained now and put there.

    Several ranks may train it at the same time: all write the same, and none ever reads half a file.
    """
    from tokenizers import Tokenizer

    cache = cache_folder()
    file = cache / f"python-{platform.python_version()}-{PYTHON_VOCABULARY}.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # absent or damaged (the library raises a bare Exception for both): train it
        pass
    # Every eighth file, about 4 MB, is text enough for this many entries and takes a second or two.
    sample = (document.text for source in stdlib_files()[::8] for document in read_file(source))
    tokenizer = train_bytes_bpe(sample, PYTHON_VOCABULARY)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        replace_text(file, tokenizer.to_str())
    except OSError as error:
        warnings.warn(f"the tokenizer python-4k is trained anew at every start: {error}", stacklevel=2)
    return tokenizer
