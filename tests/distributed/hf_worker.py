"""One rank that trains without `toolkit.initialize`: by the HF Trainer, and by a plain `deepspeed.initialize`.

Started by `ranks.launch` from test_hf_trainer.py, with the path of a JSON of settings as only argument.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from worker import small_model

import toolkit
from toolkit.zero import optimizer_state_bytes, rule_optimizer

ROWS, LENGTH, VOCABULARY = 256, 24, 250


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Rows that count up from a random start: something that can be learned."""

    def __init__(self) -> None:
        starts = torch.randint(0, VOCABULARY, (ROWS, 1), generator=torch.Generator().manual_seed(0))
        self.tokens = (starts + torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Watch(TrainerCallback):
    """Keeps what the optimizer reports after every step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.alphas: list[float] = []
        self.rates: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        optimizer = rule_optimizer(self.trainer.model_wrapped)
        assert optimizer is not None
        self.alphas.append(optimizer.report()["alpha"])
        self.rates.append(optimizer.param_groups[0]["lr"])


def found(engine: Any) -> dict[str, Any]:
    """What this rank's engine runs."""
    optimizer = rule_optimizer(engine)
    assert optimizer is not None, type(engine.basic_optimizer)
    tensors = [value for held in optimizer.state.values() for value in held.values() if torch.is_tensor(value)]
    return {
        "optimizer": type(optimizer).__name__,
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        "steps": sorted({held["step"] for held in optimizer.state.values()}),
        "dtypes": sorted({str(tensor.dtype) for tensor in tensors}),
        "state_bytes": optimizer_state_bytes(engine),
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "clipping": engine.gradient_clipping(),
        "accumulation": engine.gradient_accumulation_steps(),
    }


def by_trainer(config: str, steps: int, folder: Path, lora: bool = False) -> dict[str, Any]:
    watch, model = Watch(), small_model()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: p.detach().bfloat16() for name, p in model.named_parameters() if not p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        deepspeed=config,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.05,
        warmup_steps=2,
        max_grad_norm=0.5,
        max_steps=steps,
        bf16=True,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Counting(), callbacks=[watch])
    watch.trainer = trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    engine: Any = trainer.model_wrapped
    result = found(engine) | {"losses": losses, "alphas": watch.alphas, "rates": watch.rates}
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    result["unchanged"] = before.keys() == frozen.keys() and all(torch.equal(p, before[n]) for n, p in frozen.items())
    result["trained"] = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    engine.destroy()
    return result


def by_deepspeed(config: dict[str, Any], steps: int) -> dict[str, Any]:
    model = small_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    tokens = Counting().tokens
    rank, world_size, losses = dist.get_rank(), dist.get_world_size(), []
    for step in range(steps):
        start = (step * world_size + rank) * 4
        rows = tokens[start : start + 4]
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    result = found(engine) | {"losses": losses}
    engine.destroy()
    return result


def main() -> None:
    settings = json.loads(Path(sys.argv[-1]).read_text())
    out = Path(settings["out"])
    toolkit.register()
    results = {
        "trainer": by_trainer(settings["trainer"], settings["steps"], out),
        "adapters": by_trainer(settings["trainer"], settings["steps"], out, lora=True),
        "deepspeed": by_deepspeed(settings["deepspeed"], settings["steps"]),
    }
    torch.save(results, out / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
