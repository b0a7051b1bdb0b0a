"""The Hugging Face Trainer with AMCS, by name: `toolkit.register()`, and an `optimizer` section in the JSON.

    deepspeed --num_gpus 2 docs/examples/hf_trainer.py

Without GPUs: DS_ACCELERATOR=cpu before it. A small Qwen3 learns the bytes of a Python file; nothing is downloaded.
"""

from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

import toolkit

STEPS, BATCH, LENGTH = 20, 4, 128

toolkit.register()  # from here on "type" may be AMCS, SOAM, AdamW8, ...
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AMCS", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"},
    },
}


class Bytes(Dataset):
    """Sequences of the bytes of a Python file."""

    def __init__(self) -> None:
        self.text = torch.tensor(list(Path(torch.nn.functional.__file__).read_bytes()))

    def __len__(self) -> int:
        return len(self.text) // LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.text[index * LENGTH : (index + 1) * LENGTH]
        return {"input_ids": tokens, "labels": tokens}


arguments = TrainingArguments(
    output_dir="runs/trainer",
    deepspeed=CONFIG,  # before the model: the Trainer reads it when it is made
    per_device_train_batch_size=BATCH,
    max_steps=STEPS,
    learning_rate=3e-3,
    weight_decay=0.1,
    warmup_steps=2,
    max_grad_norm=1.0,
    bf16=True,
    use_cpu=not torch.accelerator.is_available(),
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "head_dim": 32}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=256, max_position_embeddings=LENGTH, **shape, **heads))

trainer = Trainer(model=model, args=arguments, train_dataset=Bytes())
trainer.train()
if distributed.get_rank() == 0:
    print(f"stepped by {type(trainer.model_wrapped.basic_optimizer).__name__}")
distributed.destroy_process_group()
