"""A training loop of one's own on DeepSpeed's engine: ZeRO 2, AMCS, a checkpoint for any number of ranks.

    deepspeed --num_gpus 2 docs/examples/deepspeed_loop.py

Without GPUs: DS_ACCELERATOR=cpu before it. A small Qwen3 learns the bytes of a Python file; nothing is downloaded.
"""

from pathlib import Path

import torch
from torch import distributed
from transformers import Qwen3Config, Qwen3ForCausalLM

import toolkit
from toolkit.checkpoint.store import Store
from toolkit.config import load_config
from toolkit.run.saving import Saver

STEPS, BATCH, LENGTH = 20, 4, 128
RUN = Path("runs/own-loop")

torch.manual_seed(0)  # the same weights on every rank
shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "head_dim": 32}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=256, max_position_embeddings=LENGTH, **shape, **heads))

config = load_config("amcs_zero2")  # a shipped one, changed; a dict of one's own is fine, too
config["train_micro_batch_size_per_gpu"] = BATCH
config["optimizer"]["params"]["lr"] = 3e-3
config["scheduler"]["params"] |= {"total_num_steps": STEPS, "warmup_num_steps": 2}
engine, *_ = toolkit.initialize(model=model, config=config, total_steps=STEPS)

rank = distributed.get_rank()
drawn = torch.Generator().manual_seed(rank)  # other text on every rank
text = torch.tensor(list(Path(torch.nn.functional.__file__).read_bytes()))
RUN.mkdir(parents=True, exist_ok=True)

with toolkit.memory.watch(engine, run_dir=RUN):  # for `toolkit report runs/own-loop`
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=drawn)
        tokens = text[starts + torch.arange(LENGTH)].to(engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        if rank == 0 and (step == 1 or step % 10 == 0):
            print(f"step {step}: loss {loss.item():.3f}")

saver = Saver(engine, Store(RUN / "checkpoints"))
saver.now(STEPS, {})  # for `toolkit checkpoint inspect runs/own-loop`
saver.close()
distributed.destroy_process_group()
