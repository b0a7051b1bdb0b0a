"""Tokenizers: the embedded two against independent references, local ones, and mistakes in a sentence."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import transformers
from huggingface_hub import constants
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from toolkit.data import load_tokenizer, open_documents, tokenizers
from toolkit.errors import UserError

SAMPLE = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return {'a': x}\n\n\n                             # thirty spaces\n",
    "Größe, naïve, 日本語, 🙂, \u200b\x00\ttabs",
    " leading and trailing  ",
    "",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="module")
def mistral() -> PreTrainedTokenizerBase:
    return load_tokenizer("mistral-32k")


class SentencePiece:
    """SentencePiece's BPE by its definition: join the best-scored neighbours, the leftmost of equals."""

    def __init__(self) -> None:
        self.scores = dict(tokenizers._sentencepiece_pieces(tokenizers._mistral_model().read_bytes()))
        self.ids = {piece: index for index, piece in enumerate(self.scores)}

    def encode(self, text: str) -> list[int]:
        symbols = list("▁" + text.replace(" ", "▁")) if text else []
        while pairs := [
            (-self.scores[left + right], at)
            for at, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
            if left + right in self.scores
        ]:
            _, at = min(pairs)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return [
            number
            for symbol in symbols
            for number in (
                [self.ids[symbol]]
                if symbol in self.scores
                else [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            )
        ]


REFERENCE = SentencePiece()


def test_mistral_has_the_models_entries(mistral: PreTrainedTokenizerBase) -> None:
    assert len(mistral) == 32_000
    assert mistral.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>", "▁t"]) == [0, 1, 2, 3, 261]
    assert mistral.eos_token_id == 2


def test_mistral_equals_sentencepiece_on_source_code(mistral: PreTrainedTokenizerBase) -> None:
    documents = list(islice(open_documents("stdlib"), 0, 400, 10))
    texts = SAMPLE + [document[1000:1600] for document in documents]
    for text in texts:
        assert mistral(text)["input_ids"] == REFERENCE.encode(text)
    for spaces in range(1, 60):
        text = "x" + " " * spaces + "x"
        assert mistral(text)["input_ids"] == REFERENCE.encode(text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@example("a▁b")
def test_mistral_equals_sentencepiece_on_any_text(mistral: PreTrainedTokenizerBase, text: str) -> None:
    ids = mistral(text, split_special_tokens=True)["input_ids"]
    assert ids == REFERENCE.encode(text)
    assert mistral.decode(ids) == text.replace("▁", " ")  # SentencePiece writes spaces so, and has no other way for it


@pytest.mark.parametrize("text", ["a</s>b", "<s>", "<unk>", "<0x41>", "x<s></s>"])
def test_quoted_control_tokens_stay_text(mistral: PreTrainedTokenizerBase, text: str) -> None:
    ids = mistral(text, split_special_tokens=True)["input_ids"]
    assert ids == REFERENCE.encode(text)
    assert not {0, 1, 2} & set(ids)


def test_mistral_equals_the_published_tokenizer(mistral: PreTrainedTokenizerBase, shared_data: Path) -> None:
    published = load_tokenizer(str(shared_data / "tokenizers" / "mistral-v1-32k"))
    assert len(published) == 32_000 and published.eos_token_id == 2
    assert mistral.get_vocab() == published.get_vocab()
    ours, theirs = (json.loads(t.backend_tokenizer.to_str())["model"]["merges"] for t in (mistral, published))
    assert ours == theirs
    texts = list(open_documents(str(shared_data / "fineweb" / "fineweb_val.parquet")))
    texts += islice(open_documents("stdlib"), 100)
    for text in texts:
        assert mistral(text)["input_ids"] == published(text, add_special_tokens=False)["input_ids"]


def test_python_4k(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(load_tokenizer, ["python-4k"] * 2)
    again = load_tokenizer("python-4k")
    assert len(first) == 4096 and first.eos_token_id == 0
    assert first.get_vocab() == second.get_vocab() == again.get_vocab()
    files = list((cache / "leanstate").iterdir())
    assert [file.suffix for file in files] == [".json"], "one file, and no temporary one left"
    for text in SAMPLE:
        assert again.decode(again(text)["input_ids"]) == text
    source = next(iter(open_documents("stdlib")))
    assert len(again(source)["input_ids"]) < len(source) / 2.5

    monkeypatch.setattr(tokenizers, "PYTHON_VOCABULARY", 300)  # of which training takes less
    small = load_tokenizer("python-4k").get_vocab()
    (file,) = {*(cache / "leanstate").iterdir()} - {*files}
    written = file.read_bytes()
    file.write_bytes(written[:1000])
    assert load_tokenizer("python-4k").get_vocab() == small, "a damaged file is replaced"
    assert file.read_bytes() == written, "training is deterministic"


def test_python_4k_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tokenizers, "PYTHON_VOCABULARY", 300)
    with pytest.warns(UserWarning, match="trained anew"):
        assert len(load_tokenizer("python-4k")) == 300


def test_local_file_and_folder(tmp_path: Path) -> None:
    trained = tokenizers.train_bytes_bpe(["some text to learn from"] * 3, 270)
    trained.enable_truncation(4)
    trained.save(str(tmp_path / "tokenizer.json"))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(str(spec))
        assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0
    config = {"eos_token": "x", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eos_token_id == trained.token_to_id("x"), "the folder's own choice comes first"


def test_real_local_tokenizers(shared_data: Path) -> None:
    folder = shared_data / "tokenizers"
    gpt2 = load_tokenizer(str(folder / "gpt2"))
    assert (len(gpt2), gpt2.eos_token_id) == (50_257, 50_256)
    qwen = load_tokenizer(str(folder / "qwen3"))
    assert len(qwen) == 151_669 and qwen.eos_token in ("<|endoftext|>", "<|im_end|>")
    text = "The 134M-parameter model.\n"
    for tokenizer in (gpt2, qwen):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{")
    (tmp_path / "none").mkdir()
    nameless = tokenizers.train_bytes_bpe(["text"], 270).to_str().replace("<|endoftext|>", "<|nothing|>")
    (tmp_path / "nameless.json").write_text(nameless)
    # From a model's folder without a tokenizer, transformers makes one of that family with special tokens alone.
    transformers.Qwen3Config().save_pretrained(tmp_path / "qwen3")
    transformers.GemmaConfig().save_pretrained(tmp_path / "gemma")
    cases = {
        str(tmp_path / "qwen3"): [
            "has special tokens only and no vocabulary",
            "In training, --tokenizer names another",
        ],
        str(tmp_path / "gemma"): ["has special tokens only and no vocabulary"],
        "mistral-32": ["unknown tokenizer 'mistral-32'", "hub cannot be reached", "mean 'mistral-32k'?"],
        "someone/model": [
            "unknown tokenizer 'someone/model'",
            "mistral-32k, python-4k",
            "'hf download someone/model' fetches it",
            "--tokenizer names another.",
        ],
        str(tmp_path / "nowhere"): ["no tokenizer file or folder"],
        "tokeniser.json": ["no tokenizer file or folder 'tokeniser.json'"],
        str(tmp_path / "bad"): ["cannot be loaded"],
        str(tmp_path / "bad" / "tokenizer.json"): ["cannot be loaded"],
        str(tmp_path / "none"): ["cannot be loaded"],
        str(tmp_path / "nameless.json"): ["has no end-of-text token", "eos_token"],
    }
    for spec, parts in cases.items():
        with pytest.raises(UserError) as caught:
            load_tokenizer(spec)
        message = str(caught.value)
        assert "\n" not in message and message[-1] in ".?"
        for part in parts:
            assert part in message


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizers._mistral_model()
    package = tmp_path / "mistral_common"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "mistral_common", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="needs the package mistral-common"):
        load_tokenizer("mistral-32k")
    shutil.copy(model, package / "data")
    assert len(load_tokenizer("mistral-32k")) == 32_000
