"""Fine-tuning in real ranks: the loss on answers against a plain computation, and adapters beside a frozen model."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from ranks import launch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from toolkit import cli
from toolkit.checkpoint import universal
from toolkit.checkpoint.convert import convert
from toolkit.checkpoint.export import export, load_model, moved
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.commands.checkpoint import find
from toolkit.data import PackedConversations, open_documents
from toolkit.data.tokenizers import END_OF_TEXT, train_bytes_bpe
from toolkit.errors import UserError
from toolkit.models import cpu_matmul
from toolkit.records.run import read_metrics
from toolkit.run import ranks

WORKER = Path(__file__).with_name("checkpoint_worker.py")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SEQ_LEN, BATCH, STEPS = 64, 4, 6
FP32 = ["--config", "amcs_zero2", "--set", "bf16.enabled=false", "--set", "optimizer.params.weights=fp32"]
PRETRAINED = "--from-checkpoint"
LORA = ["--lora", "r=4,targets=all-linear"]


class Tuning:
    """A pretrained model with a chat template, conversations, and runs of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.base, self.data = root, root / "base", root / "chat.jsonl"
        self.other = root / "other"
        self.said: list[str] = []
        small: Tokenizer = train_bytes_bpe([""], 257)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=small, eos_token=END_OF_TEXT, chat_template=TEMPLATE)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.save_pretrained(self.base)
        tokenizer.save_pretrained(self.other)
        config = transformers.Qwen3Config(
            vocab_size=272,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=False,
        )
        for seed, folder in enumerate((self.base, self.other)):
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
        self.adapted = Path(shutil.copytree(self.base, root / "adapted"))
        (self.adapted / "adapter_config.json").write_text("{}")
        rng = np.random.default_rng(0)
        rows = []
        for n in range(120):
            short, long = (int(size) for size in (rng.integers(1, 4), rng.integers(1, 20)))
            messages = [{"role": "user", "content": "q" * short}, {"role": "assistant", "content": f"{n}" + "a" * long}]
            rows.append({"messages": messages})
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, run: str, ranks: int, way: list[str], *more: str, accumulation: int = 1) -> list[str]:
        fixed = (
            f"--model {self.base} --from-checkpoint --data {self.data} --seq-len {SEQ_LEN} --global-batch {BATCH} "
            f"--micro-batch {BATCH // ranks // accumulation} --steps {STEPS} --lr 0.05 --warmup 1 --eval-every 0 "
            f"--save-every 2 --keep-last 9 --memory-profile off --run-dir {self.root / run} "
            "--set optimizer.params.compile=false"
        )
        return [*fixed.split(), *way, *more]

    def losses(self, run: str) -> list[float]:
        return [record["loss"] for record in self.records(run)]

    def records(self, run: str) -> list[dict[str, Any]]:
        return read_metrics(self.root / run / "metrics.jsonl")


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    """All runs; those of two ranks in one start of the processes, and those of one in another."""
    pytest.importorskip("peft")
    found = Tuning(tmp_path_factory.mktemp("tuning"))
    two = [
        {"run": found.arguments("two", 2, FP32, *f"--eval-every 6 --val-data {found.data} --eval-sequences 3".split())},
        {"run": found.arguments("accumulated", 2, FP32, accumulation=2)},
        *({"run": found.arguments(f"lora-{n}", 2, ["--config", f"amcs_zero{n}"], *LORA)} for n in (2, 3)),
        {"run": found.arguments("cut", 2, ["--config", "amcs_zero2"], *LORA), "stop_at": 3},
        {"run": found.arguments("cut", 2, ["--config", "amcs_zero2"])},
        {"run": found.arguments("cut", 2, ["--config", "amcs_zero2"], "--lora", "r=2")},
        {"run": found.arguments("cut", 2, ["--config", "amcs_zero2"], "--model", str(found.other))},
        {"run": [one for one in found.arguments("cut", 2, ["--config", "amcs_zero2"]) if one != PRETRAINED]},
        {"run": found.arguments("adapted", 2, ["--config", "amcs_zero2"], "--model", str(found.adapted))},
        {
            "carry": found.arguments("carried", 2, ["--config", "amcs_zero3"], *LORA),
            "source": str(found.root / "lora-3"),
            "to": str(found.root / "carried"),
            "beside": str(found.other),
        },
    ]
    refusals = (
        "with --lora r=4,.* --lora r=2",
        f"beside the weights in {found.base},.* in {found.other}",
        "random",
        r"adapted holds adapters beside its weights \(adapter_config.json\)",
        f"{found.other} has other weights than the model beside them",  # found by the first rank alone, in a gather
    )
    random = found.arguments("random", 1, ["--config", "amcs_zero1"], *LORA)
    one = [
        {"run": found.arguments("one", 1, FP32)},
        {"run": found.arguments("lora-1", 1, ["--config", "amcs_zero1"], *LORA, "--activations", "checkpoint")},
        {"run": [*(word for word in random if word != PRETRAINED), "--steps", "2"]},
        {"run": random},
    ]
    for number, steps in ((2, two), (1, one)):
        said, *others = launch(found.root / f"ranks-{number}", number, WORKER, {"steps": steps})
        for place, answer in enumerate(said):
            refused = number == 2 and place >= len(steps) - len(refusals)
            assert isinstance(answer, str) == refused, answer
            if refused:
                assert re.search(refusals[place - len(steps)], answer), answer
                assert all(other[place] == answer for other in others), "every rank says the same"
            else:
                found.said.append(answer["said"])
    return found


def test_the_loss_and_gradient_are_those_of_a_plain_computation(tuning: Tuning) -> None:
    """Of the first step: every answer's token counts the same, on 1 and 2 ranks and with accumulation."""
    model: Any = AutoModelForCausalLM.from_pretrained(tuning.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tuning.base)
    packed = PackedConversations(open_documents(str(tuning.data)), tokenizer, SEQ_LEN, seed=0)
    total, counts = torch.zeros(()), []
    for tokens, labels, places in islice(packed.sequences(), BATCH):
        edges = [*np.flatnonzero(places == 0), SEQ_LEN + 1]
        for begin, end in zip(edges, edges[1:], strict=False):
            ids, wanted = (torch.from_numpy(x[None, begin:end]) for x in (tokens, labels))
            logits = model(input_ids=ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, wanted[0, 1:], reduction="sum")
        counts.append(int((labels[1:] != -100).sum()))
    assert len(set(counts)) > 1, "a mean of means would be another one"
    loss = total / sum(counts)
    loss.backward()
    norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in model.parameters()))
    for run in ("one", "two", "accumulated"):
        first = tuning.records(run)[0]
        assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_curve_is_the_same_at_every_number_of_ranks_and_of_micro_batches(tuning: Tuning) -> None:
    for run in ("two", "accumulated"):  # whose 8-bit state is rounded elsewhere
        assert tuning.losses(run) == pytest.approx(tuning.losses("one"), rel=5e-4)
    assert tuning.losses("one")[-1] < tuning.losses("one")[0] - 0.1


@pytest.mark.parametrize("run", ["lora-1", "lora-2", "lora-3", "cut", "random"])
def test_under_lora_the_base_is_unchanged_to_the_bit_and_not_in_checkpoints(tuning: Tuning, run: str) -> None:
    source = open_checkpoint(find(tuning.root / run))
    frozen = {name.removeprefix("hf.").replace(".base_layer.", "."): name for name in source.frozen}
    if run == "random":  # of its second part, with --from-checkpoint, too: the first one's weights are nowhere else
        first = load_model(open_checkpoint(find(tuning.root / run, 2)))
        base = {name.replace(".base_layer.", "."): value for name, value in first.state_dict().items()}
        base = {name: value for name, value in base.items() if ".lora_" not in name}
        assert not source.based and source.manifest.step == STEPS
    else:
        base = AutoModelForCausalLM.from_pretrained(tuning.base, dtype=torch.bfloat16).state_dict()
        assert source.based.keys() == source.frozen.keys()
        saved = source.model_states()
        assert not saved["frozen_param_fragments"] and not any(saved["module"][name].numel() for name in source.based)
    noted = json.loads((source.folder / "manifest.json").read_text())
    assert noted["format"] == (2 if run == "random" else 3)
    assert frozen.keys() == base.keys()
    for name, kept in frozen.items():
        assert torch.equal(source.frozen_weight(kept), base[name]), name
    trained = source.sharding.by_name
    assert len(trained) == 2 * 2 * 7 and all(".lora_" in name for name in trained)
    assert all(source.weights(name, 0, place.numel).any() for name, (_, place) in trained.items()), "B has moved"
    summary = json.loads((tuning.root / run / "summary.json").read_text())
    assert summary["trained_parameters"] == source.manifest.parameters < summary["parameters"]
    held = sum(summary["state_bytes_by_name"].values())  # of rank 0; ranks are padded to the same size
    assert summary["state_bytes_per_parameter_per_rank"] * summary["trained_parameters"] == pytest.approx(held)


def test_adapters_are_the_same_at_every_stage_and_number_of_ranks_and_resumed_exactly(tuning: Tuning) -> None:
    for run in ("lora-2", "lora-3"):
        assert tuning.losses(run) == pytest.approx(tuning.losses("lora-1"), rel=3e-3)
    exact = ("loss", "grad_norm", "lr", "step")
    cut, whole = ([[record[key] for key in exact] for record in tuning.records(run)] for run in ("cut", "lora-2"))
    assert cut == whole
    digests = {open_checkpoint(find(tuning.root / run)).digest() for run in ("cut", "lora-2")}
    assert len(digests) == 1
    assert tuning.losses("lora-1")[-1] < tuning.losses("lora-1")[0] - 0.05


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """What a command prints that succeeds."""
    monkeypatch.setattr(ranks, "prepare_environment", lambda: None)  # it is for a process of its own

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["toolkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.out

    yield run
    cpu_matmul.uninstall()


def test_peft_loads_the_adapters_and_anything_the_merged_model(
    tuning: Tuning, tmp_path: Path, call: Callable[..., str]
) -> None:
    import peft

    source = open_checkpoint(find(tuning.root / "lora-3"))
    tokens = torch.arange(30)[None] * 7
    own: Any = load_model(source).eval()
    call("export", tuning.root / "lora-3", "--out", tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir())[:2] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (tmp_path / "adapter" / "config.json").exists()
    base: Any = AutoModelForCausalLM.from_pretrained(tuning.base, dtype=torch.bfloat16)
    theirs: Any = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        wanted = own(tokens).logits
        assert torch.equal(theirs(tokens).logits, wanted)
        export(source, tmp_path / "merged", merge=True, dtype="fp32")
        merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(tokens).logits, wanted.float(), rtol=0.05, atol=0.05)
        plain: Any = AutoModelForCausalLM.from_pretrained(tuning.base, dtype=torch.float32).eval()
        assert (plain(tokens).logits - wanted).abs().max() > 0.1, "the adapters matter"
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template == TEMPLATE


def test_a_base_is_found_where_it_was_moved_to_and_no_other_is_taken(
    tuning: Tuning, tmp_path: Path, call: Callable[..., str]
) -> None:
    line = ("eval", tuning.root / "lora-2", "--data", tuning.data, "--json")
    before, there = json.loads(call(*line)), tuning.root / "moved"
    tuning.base.rename(there)
    try:
        with pytest.raises(UserError, match="beside them, .*, is not there; --model names the folder"):
            load_model(open_checkpoint(find(tuning.root / "lora-2")))
        assert json.loads(call(*line, "--model", there)) == before
        call("export", tuning.root / "lora-2", "--out", tmp_path / "merged", "--merge", "--model", there)
        call("export", tuning.root / "lora-2", "--out", tmp_path / "adapter")
        source = open_checkpoint(find(tuning.root / "lora-2"))
        moved(source, tuning.other)
        with pytest.raises(UserError, match="has other weights"):
            load_model(source)
    finally:
        there.rename(tuning.base)
    with pytest.raises(UserError, match="holds all its weights"):
        moved(open_checkpoint(find(tuning.root / "random")), tuning.base)


def test_a_checkpoint_without_its_base_is_cut_anew(tuning: Tuning, tmp_path: Path) -> None:
    source = open_checkpoint(find(tuning.root / "lora-3"))
    convert(source, tmp_path / "one", stage=2, world_size=1)
    universal.write(source, tmp_path / "universal" / source.folder.name)
    for folder in (find(tmp_path / "one"), tmp_path / "universal" / source.folder.name):
        made = open_checkpoint(folder)
        assert made.based == source.based and made.base == source.base
        assert made.digest() == source.digest()


def test_the_audit_waits_for_what_the_first_step_cannot_move(tuning: Tuning) -> None:
    """B is zero at first, and so are the gradients of A."""
    said = next(text for text in tuning.said if "--lora r=4" in text)
    first, *_, last = (line for line in said.splitlines() if line.startswith("audit: "))
    assert "each in one group; 14 moved by" in first and "; 14 whose gradient is zero so far: " in first, first
    assert "in 28 tensors (25 more are frozen), each in one group, moved by step " in last, last


def test_a_tuned_model_answers_and_is_evaluated(tuning: Tuning, call: Callable[..., str]) -> None:
    found = json.loads(call("eval", tuning.root / "two", "--json"))
    assert found["loss"] == pytest.approx(tuning.records("two")[-1]["val_loss"], rel=1e-5)
    assert 0 < found["bytes"] < found["tokens"] < found["sequences"] * SEQ_LEN
    found = json.loads(call("eval", tuning.root / "lora-2", "--data", tuning.data, "--json"))
    # All answers, and an end of each.
    answers = [json.loads(line)["messages"][1]["content"] for line in tuning.data.read_text().splitlines()]
    assert (found["bytes"], found["tokens"]) == (sum(map(len, answers)), sum(map(len, answers)) + len(answers))
    line = ("sample", tuning.root / "two", "--chat", "qq", "--tokens", "8", "--temperature", "0", "--json")
    said = json.loads(call(*line))["samples"][0]
    assert said["prompt"] == "qq" and 0 < said["tokens"] <= 8
