"""One rank of a training by the Hugging Face Trainer with DeepSpeed, for `toolkit bench train`.

The only argument is the path of a JSON of settings. Nothing of this package takes part in a step, but for the bf16
products of CPUs that have none (`toolkit.models.cpu_matmul`), which both sides get.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from toolkit.agreed import everyones
from toolkit.run import leftovers, ranks


def trainer_config(config: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed JSON whose batch is the Trainer's: what the Trainer insists on setting is "auto"."""
    auto = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    return {key: value for key, value in config.items() if key != "scheduler"} | auto


def main() -> None:
    settings = json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))
    ranks.prepare_environment()
    ranks.place_alone()
    ranks.settle_accelerator()
    leftovers.own_build_folder()

    import torch
    import transformers
    from torch.utils.data import Dataset

    from toolkit import config as configs
    from toolkit.memory.watermarks import ResidentSet
    from toolkit.models import build_model, cpu_matmul, flops_per_token, load_config
    from toolkit.models.build import skeleton
    from toolkit.run.moment import Moment
    from toolkit.run.summary import peak_of_ranks
    from toolkit.zero import shared_memory

    gpu = torch.cuda.is_available()
    if not gpu:
        cpu_matmul.install()
    shared_memory.leave_out()
    model = build_model(settings["model"], dtype=torch.bfloat16, seed=settings["seed"], loss="plain").hf
    given = configs.settle(
        configs.load_config(settings["config"]),
        lambda: configs.Shape.of(skeleton(load_config(settings["model"])[0])),
        on_gpu=gpu,
        world_size=ranks.world_size(),
    )
    config, params, length = trainer_config(given), given["optimizer"]["params"], settings["seq_len"]
    rows = settings["steps"] * settings["micro_batch"] * settings["grad_accum"] * ranks.world_size()
    vocabulary = model.config.vocab_size

    class Tokens(Dataset[dict[str, torch.Tensor]]):
        """Random tokens that are there already: reading text costs the Trainer nothing."""

        def __init__(self) -> None:
            generator = torch.Generator().manual_seed(settings["seed"])
            self.tokens = torch.randint(vocabulary, (rows, length), generator=generator)

        def __len__(self) -> int:
            return rows

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.tokens[index], "labels": self.tokens[index]}

    resident = ResidentSet()

    class Clock(transformers.TrainerCallback):
        """From the end of a step to the end of the next: waiting for data and what is done between steps count."""

        ends: list[Moment] = []

        def _now(self) -> None:
            self.ends.append(Moment(model.device))

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            resident.begin()
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            self._now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self._now()

    clock = Clock()
    arguments = transformers.TrainingArguments(
        output_dir=str(Path(settings["out"]).parent / "trainer"),
        deepspeed=config,
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["grad_accum"],
        learning_rate=params["lr"],
        weight_decay=params["weight_decay"],
        adam_beta1=params["betas"][0],
        adam_beta2=params["betas"][1],
        adam_epsilon=params["eps"],
        max_grad_norm=given["gradient_clipping"],
        max_steps=settings["steps"],
        bf16=True,
        use_cpu=not gpu,
        logging_steps=settings["steps"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Tokens(), callbacks=[clock])
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if gpu else resident.read()[1]
    peaks = everyones(peak)
    if ranks.rank() == 0:
        seconds = [begin.until(end) for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]
        can = peak_of_ranks(model.device, "bf16", ranks.world_size(), settings.get("peak_tflops"))
        mfu = None if can is None else flops_per_token(model.config, length) / can
        found = {"seconds": seconds, "peak_bytes": max(peaks), "mfu_of_a_token": mfu}
        Path(settings["out"]).write_text(json.dumps(found), encoding="utf-8")
    ranks.finish()


if __name__ == "__main__":
    main()
