"""One rank of a real multi-rank run: trains a small Qwen3 under ZeRO and writes what each rank holds.

Started by `ranks.launch` from the tests in this folder, with the path of a JSON of settings as
only argument. It runs several cases one after the other, since starting the processes takes longer than a case.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch._dynamo.utils import counters
from transformers import Qwen3Config, Qwen3ForCausalLM

import toolkit
from toolkit.models import CausalLM, cpu_matmul, tiled
from toolkit.models.activations import keep_activations
from toolkit.models.loss import LossHead
from toolkit.records.activations import Activations
from toolkit.state.codecs import BLOCK
from toolkit.zero import compile_step, full_precision_state_dict, optimizer_state_bytes, rule_optimizer


def small_model(seed: int = 0, layers: int = 1) -> Qwen3ForCausalLM:
    """Matrices of 40 x 136 and the like: no whole number of blocks, so that every padding is exercised."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=250,
        hidden_size=40,
        intermediate_size=136,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)


def loss_model(loss: str, activations: str) -> CausalLM:
    """The model that computes its own loss, with tied embeddings; its MLPs run in several tiles, where they do."""
    tiled.TILE, tiled._ROWS = 16, 8
    model = small_model(layers=2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    keep_activations(model, Activations.read(activations))
    if loss == "chunked":
        LossHead.adopt(model.lm_head)
    return CausalLM(model)


def held_state(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's state tensors and master weights by "<group or parameter>/<key>", flat."""
    optimizer = rule_optimizer(engine)
    assert optimizer is not None
    held: dict[str, torch.Tensor] = {}
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # stage 3: the grid restarts at each parameter
        names = {id(p): name for name, p in engine.module.named_parameters()}
        for flat, params in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True):
            start = 0
            for param in params:
                size = param.partition_numel()
                tensors = optimizer.state[flat] | {"master": flat.detach()}
                for key, value in tensors.items():
                    if key == "step":
                        continue
                    # 1-D parameters are cut anywhere; of all others whole blocks are here.
                    per_block = BLOCK if value.dim() == 1 else value.shape[1]
                    assert len(param.ds_shape) == 1 or size % BLOCK == 0
                    cut = slice(start * per_block // BLOCK, (start + size) * per_block // BLOCK)
                    held[f"{names[id(param)]}/{key}"] = value.reshape(-1)[cut].clone()
                start += size
        return held
    for index, flat in enumerate(wrapper.single_partition_of_fp32_groups):
        for key, value in optimizer.state[flat].items():
            if key != "step":
                held[f"{index}/{key}"] = value[: flat.numel() // BLOCK].flatten()
        held[f"{index}/master"] = flat.detach().clone()
    return held


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Train by one case's settings; returns what this rank saw and holds."""
    cpu_matmul.uninstall()
    os.environ[cpu_matmul.VARIABLE] = case["products"]
    cpu_matmul.install()
    model: Any = loss_model(case["loss"], case["activations"]) if case["loss"] else small_model(layers=case["layers"])
    if case["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if case["unused"]:
        model.unused = torch.nn.Linear(40, 40)
    engine, *_ = toolkit.initialize(model=model, config=case["config"], total_steps=case["steps"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = case["global_batch"] // world_size
    losses, rates = [], []
    optimizer = rule_optimizer(engine)
    compile_step(engine)
    compiled = sum(counters["inductor"].values())
    for step in range(case["steps"]):
        if step and step == case["save_at"]:
            with tempfile.TemporaryDirectory() as mine:
                shared = [mine]
                dist.broadcast_object_list(shared)
                engine.save_checkpoint(shared[0])
                engine.destroy()
                model = small_model(seed=1, layers=case["layers"])
                engine, *_ = toolkit.initialize(model=model, config=case["config"], total_steps=case["steps"])
                engine.load_checkpoint(shared[0])
                dist.barrier()
            optimizer = rule_optimizer(engine)
        generator = torch.Generator().manual_seed(100 + step)
        starts = torch.randint(0, 250, (case["global_batch"], 1), generator=generator)
        tokens = (starts + torch.arange(24)) % 250  # counting: something that can be learned
        if not case["same_data"]:
            tokens = tokens[rank * share : (rank + 1) * share]
        total = 0.0
        micro_batches = tokens.chunk(engine.gradient_accumulation_steps())
        for micro in micro_batches:
            loss = engine(micro) if case["loss"] else engine(input_ids=micro, labels=micro).loss
            engine.backward(loss * (float("nan") if step == case["poison_at"] else 1.0))
            engine.step()
            total += loss.item() / len(micro_batches)
        mean = torch.tensor(total, dtype=torch.float64)
        dist.all_reduce(mean)
        losses.append(mean.item() / world_size)
        if optimizer is not None:
            rates.append([group["lr"] * group["lr_scale"] for group in optimizer.param_groups])
    result = {
        "losses": losses,
        "state_bytes": optimizer_state_bytes(engine),
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "rates": rates,
        "audit": engine.leanstate_audit.line,
        "skipped": engine.skipped_steps,
        "grad_norm": engine.get_global_grad_norm(),
        "compiled_late": sum(counters["inductor"].values()) - compiled,
        "loss_scale": engine.loss_scale() if case["config"].get("fp16") else None,
    }
    if optimizer is not None:
        result["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        result["steps"] = sorted({held["step"] for held in optimizer.state.values()})
        if case["dump"]:
            result["held"] = held_state(engine)
    if case["full"]:
        result["full"] = full_precision_state_dict(engine)
        result["parts"] = full_precision_state_dict(engine, gather=False)
        stage = engine.zero_optimization_stage()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            result["model"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.destroy()
    return result


def main() -> None:
    settings = json.loads(Path(sys.argv[-1]).read_text())
    # Half precision computes correctly on any CPU; DeepSpeed refuses it where the hardware has no fast path.
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    for plugin in settings["plugins"]:
        runpy.run_path(plugin)
    results = {name: train(case) for name, case in settings["cases"].items()}
    torch.save(results, Path(settings["out"]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
