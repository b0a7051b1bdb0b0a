"""Conversations: found in data, rendered, packed whole, and predicted in their answers alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from small_models import SHAPE
from transformers import PreTrainedTokenizerFast

from toolkit.data import (
    BadDocument,
    PackedConversations,
    Position,
    conversations,
    open_documents,
    rank_batches,
    read_template,
)
from toolkit.data.chat import Chat, Unusable
from toolkit.data.tokenizers import END_OF_TEXT, train_bytes_bpe
from toolkit.errors import UserError
from toolkit.models.build import CausalLM, predictions
from toolkit.models.loss import CHUNKABLE, IGNORED, LossHead, plain_loss
from toolkit.run.weighing import check_apart

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)
# As Qwen3's: the last answer has its thoughts, or an empty place for them, and those before have none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<t></t>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token for each byte, and ChatML's own."""
    made = PreTrainedTokenizerFast(tokenizer_object=train_bytes_bpe([""], 257), eos_token=END_OF_TEXT)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def reference(messages: list[dict[str, str]], thoughts: str = "") -> tuple[list[int], list[bool]]:
    """Tokens and mask, put together by hand: of ChatML an answer's text and the end of its turn."""
    plain, ids, mask = tokenizer(), list[int](), list[bool]()
    for number, message in enumerate(messages):
        answer = message["role"] == "assistant"
        own = thoughts if answer and number + 1 == len(messages) else ""
        for text, counts in (
            (f"<|im_start|>{message['role']}\n", False),
            (f"{own}{message['content']}<|im_end|>", answer),
            ("\n", False),
        ):
            found = plain(text)["input_ids"]
            ids += found
            mask += [counts] * len(found)
    return ids, mask


def written(folder: Path, rows: list[Any], name: str = "chat.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def packed(data: str, seq_len: int, template: str | None = CHATML, **options: Any) -> PackedConversations:
    documents = open_documents(data, bad=options.pop("bad", "skip"))
    fixed = {"seed": 0, "shuffle_window": 1, "sequence_window": 1}
    return PackedConversations(documents, tokenizer(template), seq_len, **(fixed | options))


THREE = [
    [{"role": "system", "content": "Be kind."}, *said("Hi", "Hello", "And?", "é\n\n")],
    said("a", "b"),
    said("Why?", "Because <b>.", "So?", ""),
]


@pytest.mark.parametrize("messages", THREE)
@pytest.mark.parametrize(("template", "thoughts"), [(CHATML, ""), (MARKED, ""), (THINKING, "<t></t>")])
def test_the_mask_is_the_reference_mask(messages: list[dict[str, str]], template: str, thoughts: str) -> None:
    ids, answered = Chat(tokenizer(template), "data").encode(json.dumps({"messages": messages}))
    wanted, mask = reference(messages, thoughts)
    assert ids.tolist() == wanted
    assert answered.tolist() == mask
    if template == MARKED:
        theirs: Any = tokenizer(template).apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert (ids.tolist(), answered.astype(int).tolist()) == (theirs["input_ids"], theirs["assistant_masks"])


def test_chatml_without_the_tokens_of_its_own_ends_with_the_end_of_text() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=train_bytes_bpe([""], 257), eos_token=END_OF_TEXT)
    plain.chat_template = read_template("chatml")
    chat = Chat(plain, "data")
    ids, answered = chat.encode(json.dumps({"messages": said("Hi", "Yes")}))
    assert plain.decode(ids[answered]) == "Yes" + END_OF_TEXT
    assert chat.ends == (plain.eos_token_id,)
    assert plain.decode(ids).startswith("<|im_start|>user\nHi") and chat.prompt(said("Hi")) in plain.decode(ids)


def test_what_a_template_does_not_show_is_said() -> None:
    merged = PreTrainedTokenizerFast(tokenizer_object=train_bytes_bpe(["://"] * 9, 300), eos_token=END_OF_TEXT)
    merged.chat_template = PLAIN
    with pytest.raises(Unusable, match="is part of an answer and of what is around it"):
        Chat(merged, "data").encode(json.dumps({"messages": said("q", "//")}))
    with pytest.raises(Unusable, match="writes what is before answer 1 otherwise"):
        changing = CHATML.replace("{{ m.content }}", "{{ loop.length if loop.first else m.content }}")
        Chat(tokenizer(changing), "data").encode(json.dumps({"messages": said("q", "a", "q", "a")}))
    with pytest.raises(Unusable, match="holds no answer"):
        Chat(tokenizer(), "data").encode(json.dumps({"messages": said("q")}))
    mistyped = [{"role": "usr", "content": "q"}, *said("q", "a")]
    with pytest.raises(Unusable, match="knows no role 'usr'; usual are system, developer, user, assistant, tool"):
        Chat(tokenizer(), "data").encode(json.dumps({"messages": mistyped}))
    Chat(tokenizer(CHATML + "{# a 'usr' is known #}"), "data").encode(json.dumps({"messages": mistyped}))
    with pytest.raises(Unusable, match="template does not take it .*alternate"):
        refusing = "{{ raise_exception('roles must alternate') }}"
        Chat(tokenizer(refusing), "data").encode(json.dumps({"messages": said("q", "a")}))
    with pytest.raises(UserError, match="--chat-template, a file or .chatml."):
        Chat(tokenizer(None), "data")
    with pytest.raises(UserError, match="no such file|No such file"):
        read_template("nowhere.jinja")


ROWS: dict[str, Any] = {
    "messages": {"messages": said("q", "a"), "source": 1},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "pair": {"prompt": "q", "completion": "a"},
    "pair of messages": {"prompt": said("q"), "completion": [{"role": "assistant", "content": "a"}]},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_are_found_by_their_columns(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    path = str(tmp_path / f"data.{kind}")
    if kind == "jsonl":
        written(tmp_path, [row, row], "data.jsonl")
    else:
        pq.write_table(pa.Table.from_pylist([row, row]), path)
    documents = open_documents(path)
    assert documents.conversations
    assert [json.loads(text)["messages"] for text in documents] == [said("q", "a")] * 2


def test_text_stays_text_and_a_named_column_may_hold_conversations(tmp_path: Path) -> None:
    path = written(tmp_path, [{"text": "plain", "messages": said("q", "a"), "chat": said("x", "y")}])
    assert list(open_documents(path)) == ["plain"] and not open_documents(path).conversations
    assert json.loads(next(iter(open_documents(path, text_column="chat"))))["messages"] == said("x", "y")
    context = written(tmp_path, [{"instruction": "q", "input": "more", "output": "a"}], "alpaca.jsonl")
    assert json.loads(next(iter(open_documents(context))))["messages"] == said("q\n\nmore", "a")


def test_conversations_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    bad = [{"messages": "text"}, {"messages": [5]}, {"messages": [{"content": "a"}]}, {"other": 1}]
    bad += [{"messages": [{"role": "user", "content": 5}]}, {"messages": None}, {"messages": said("no answer")}]
    path = written(tmp_path, [{"messages": said("q", "a")}, *bad, {"messages": said("long" * 50, "a")}])
    stream = packed(path, 40)
    blocks = list(stream.once())
    assert len(blocks) == 1 and stream.position.skipped == 7 and stream.position.epoch == 1
    assert [problem.split(":")[-1].strip() for problem in stream.position.named[:3]] == [
        "'messages' holds text, not a list of messages.",
        "'messages' holds a number where a message should be.",
        "'messages' holds a message without 'role' (or 'from').",
    ]
    with pytest.raises(BadDocument, match="holds no answer.*--bad-documents skip"):
        list(packed(written(tmp_path, [{"messages": said("q")}]), 40, bad="stop").once())
    with pytest.raises(UserError, match="line 1 of .* cannot be used: it holds no answer"):
        packed(written(tmp_path, [{"messages": said("q")}] * 3), 40).require(1)


def test_sequences_hold_whole_conversations_whose_answers_alone_are_predicted(tmp_path: Path) -> None:
    """Nothing is lost, but for what is longer than a sequence; the rest of a sequence is filled."""
    rng = np.random.default_rng(0)
    chats = [said(*(f"{chat}" * int(n) for n in rng.integers(1, 7, 2 * int(rng.integers(1, 3))))) for chat in range(40)]
    stream = packed(written(tmp_path, [{"messages": chat} for chat in chats]), 63)
    found, starts, lengths = [], [], []
    for block in stream.once():
        tokens, labels, places = block
        starts.append(len(found))
        assert block.shape == (3, 64) and ((labels == IGNORED) | (labels == tokens)).all()
        edges = [*np.flatnonzero(places == 0), 64]
        for begin, end in zip(edges, edges[1:], strict=False):
            assert (places[begin:end] == np.arange(end - begin)).all()
            if tokens[begin] == stream.tokenizer.eos_token_id:
                assert end == 64 and (labels[begin:] == IGNORED).all()
                continue
            found.append((tokens[begin:end].tolist(), (labels[begin:end] != IGNORED).tolist()))
            lengths.append(end - begin)
    whole = [reference(chat) for chat in chats]
    assert stream.position.cut == sum(len(tokens) > 64 for tokens, _ in whole) > 0
    wanted = [(tokens[:64], mask[:64]) for tokens, mask in whole]
    assert sorted(found) == sorted(wanted)
    places = [wanted.index(found[start]) for start in starts]
    assert places == sorted(places) and found[0] == wanted[0], "sequences come as their first conversations did"
    mask = [one for _, one in found]
    answers = sum(len(m["content"].encode()) for chat in chats for m in chat if m["role"] == "assistant")
    predicted = sum(map(sum, mask))
    assert stream.text_bytes() <= answers and predicted - stream.text_bytes() <= 2 * len(chats)


def test_little_of_the_sequences_is_filling(tmp_path: Path) -> None:
    """Beside what is left where conversations are taken in their order, as long as they fit."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(4.5, 0.8, 600), 10, 230).astype(int)
    stream = packed(written(tmp_path, [{"messages": said("q", "a" * int(size))} for size in sizes]), 255)
    blocks = list(stream.once())
    lengths = [int((block[0] != stream.tokenizer.eos_token_id).sum()) for block in blocks]
    in_order, room = 1, 256
    for _, _, tokens in islice(stream._tokenized(Position()), len(sizes)):
        in_order, room = (in_order, room) if tokens.shape[1] <= room else (in_order + 1, 256)
        room -= tokens.shape[1]
    assert len(blocks) * 256 < 1.05 * sum(lengths) < 1.15 * sum(lengths) < in_order * 256


def test_the_order_is_resumed_anywhere_and_the_same_at_every_number_of_ranks(tmp_path: Path) -> None:
    rows = [{"messages": said(f"q{n}", "a" * (n % 7))} for n in range(23)] + [{"messages": said("no answer")}]
    path = written(tmp_path, rows)

    def stream() -> PackedConversations:
        return packed(path, 60, seed=3, shuffle_window=8, sequence_window=4)

    one = stream()
    blocks, positions = [], []
    for block in islice(one.sequences(), 40):
        blocks.append(block)
        positions.append(Position(**json.loads(json.dumps(asdict(one.position)))))
    assert positions[-1].epoch >= 2 and positions[-1].skipped == 1
    assert max(position.offset for position in positions) > 0, "some lie among sequences that are fitted together"
    for number in (0, 1, 2, 3, 5, 17, 30):
        again = list(islice(stream().sequences(positions[number]), 9))
        assert np.array_equal(again, blocks[number + 1 : number + 10])
    two = [rank_batches(stream(), rank=rank, world_size=2, micro_batch=2) for rank in range(2)]
    dealt = torch.cat([next(batches) for _ in range(3) for batches in two])
    assert dealt.dtype == torch.int64 and np.array_equal(dealt, blocks[:12])
    for batches in two:
        batches.close()


def test_a_pass_ends_with_its_last_conversation_whatever_is_skipped_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that one fills a group."""
    monkeypatch.setattr(conversations, "TOGETHER", 1)
    rows = [{"messages": said(f"q{n}", "a" * 99)} for n in range(3)]
    bad = [{"messages": said("no answer")}] * 2
    plain, stream = packed(written(tmp_path, rows, "plain.jsonl"), 60), packed(written(tmp_path, rows + bad), 60)
    assert len(list(plain.once())) == 3 and np.array_equal(list(stream.once()), list(plain.once()))
    assert (stream.position.epoch, stream.position.skipped) == (1, 2)
    assert np.array_equal(stream.first_pass(9), plain.first_pass(9))
    wanted = list(islice(plain.sequences(), 8))
    for number, block in enumerate(islice(stream.sequences(), 7), start=1):
        assert np.array_equal(block, wanted[number - 1])
        assert np.array_equal(next(packed(str(tmp_path / "chat.jsonl"), 60).sequences(stream.position)), wanted[number])


def test_a_small_corpus_holds_out_whole_conversations(tmp_path: Path) -> None:
    path = written(tmp_path, [{"messages": said(f"q{n}", "a")} for n in range(25)])
    parts = {part: packed(path, 60, part=part) for part in ("train", "validation")}
    held = {
        part: [json.loads(d.text)["messages"][0]["content"] for d in one._documents()] for part, one in parts.items()
    }
    assert held == {"train": [f"q{n}" for n in range(23)], "validation": ["q23", "q24"]}
    with pytest.raises(UserError, match="fill .* sequences of 60 tokens, the global batch needs 99"):
        parts["train"].require(99)


@pytest.mark.parametrize(("kind", "loss"), [*((kind, "chunked") for kind in sorted(CHUNKABLE)), ("qwen3", "plain")])
def test_the_loss_is_that_of_each_conversation_alone(kind: str, loss: str) -> None:
    """Against transformers' own loss of one conversation at a time, with the same labels: attention does not cross."""
    torch.manual_seed(0)
    names = {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    shape = names if kind == "gpt2" else SHAPE
    config = transformers.AutoConfig.for_model(kind, vocab_size=64, max_position_embeddings=32, **shape)
    for name, value in {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 2}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    hf: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    if loss == "chunked":
        LossHead.adopt(hf.get_output_embeddings())
    rows = []
    for lengths in ((7, 5, 4), (16,)):
        tokens = torch.randint(0, 64, (16,))
        labels = torch.where(torch.rand(16) < 0.5, tokens, IGNORED)
        labels[[sum(lengths[:n]) for n in range(len(lengths))]] = IGNORED
        rows.append(torch.stack([tokens, labels, torch.cat([torch.arange(n) for n in lengths])]))
    batch = torch.stack(rows)
    value = CausalLM(hf)(batch)
    value.backward()
    mine = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in hf.parameters()]
    hf.zero_grad()
    total: Any = 0.0
    for row in batch:
        for piece in row.split(np.diff([*np.flatnonzero(row[2] == 0), 16]).tolist(), dim=1):
            logits = hf(input_ids=piece[:1], use_cache=False).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, piece[1, 1:], reduction="sum")
    theirs = total / predictions(batch)
    theirs.backward()
    torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-6)
    for got, parameter in zip(mine, hf.parameters(), strict=True):
        wanted = torch.zeros_like(got) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


class Engine(torch.nn.Module):
    def __init__(self, kind: str, **shape: Any) -> None:
        super().__init__()
        config = transformers.AutoConfig.for_model(kind, vocab_size=64, **shape)
        self.module = CausalLM(transformers.AutoModelForCausalLM.from_config(config))
        self.device = torch.device("cpu")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.module(tokens)
        return value


def test_a_model_that_mixes_conversations_is_refused() -> None:
    check_apart(Engine("olmo2", **SHAPE))
    with pytest.raises(UserError, match="'mamba' models do not keep the conversations of a sequence apart"):
        check_apart(Engine("mamba", hidden_size=32, num_hidden_layers=2))


@pytest.mark.parametrize("loss", ["chunked", "plain"])
def test_without_any_prediction_loss_and_gradients_are_0(loss: str) -> None:
    head = torch.nn.Linear(8, 20, bias=False)
    hidden, targets = torch.randn(1, 4, 8, requires_grad=True), torch.full((1, 4), IGNORED)
    if loss == "chunked":
        value = LossHead.adopt(head)(hidden, targets, True)
    else:
        value = plain_loss(head(hidden), targets, True)
    value.backward()
    assert value.item() == 0 and hidden.grad is not None and not hidden.grad.any() and not head.weight.grad.any()  # type: ignore[union-attr]
