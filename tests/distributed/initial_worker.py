"""One rank that builds models and engines: which weights they have before the first step, which rank
is slow, and which experts the tokens of a step are sent to."""

from __future__ import annotations

import contextlib
import hashlib
import time
from typing import Any

import deepspeed
import torch
from ranks import answer
from torch import nn

import toolkit
from toolkit.config import DeepSpeedSettings
from toolkit.models import build_model
from toolkit.records.activations import Activations
from toolkit.run.pace import Pace
from toolkit.run.routers import Routers
from toolkit.zero.places import places


def digest(hf: nn.Module, gathered: Any = contextlib.nullcontext) -> dict[str, str]:
    """Of the bits of every parameter and buffer, by name."""
    named = [*hf.named_parameters(remove_duplicate=False), *hf.named_buffers()]
    result = {}
    for name, tensor in named:
        with gathered(tensor):
            data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
            result[name] = hashlib.sha256(data).hexdigest()
    return result


def build(folder: str, config: dict[str, Any], load: bool) -> dict[str, Any]:
    """Weights of the model, and of its engine, in which DeepSpeed has sent rank 0's to all."""
    whole = config["zero_optimization"]["stage"] < 3
    gathered = contextlib.nullcontext if whole else deepspeed.zero.GatheredParameters
    model = build_model(
        folder,
        dtype=torch.bfloat16,
        seed=11,
        zero3_config=None if whole else config,
        from_checkpoint=load,
        place=places(DeepSpeedSettings.read(config)),
    )
    found: dict[str, Any] = {"tied": model.hf.get_output_embeddings().weight is model.hf.get_input_embeddings().weight}
    found["model"] = digest(model.hf, gathered)
    toolkit.initialize(model=model, config=config, total_steps=4)
    found["engine"] = digest(model.hf, gathered)
    if not whole:
        found["held"] = sum(param.ds_tensor.numel() for param in model.parameters())
    return found


def pace(folder: str, config: dict[str, Any], seconds: float) -> dict[str, float | None]:
    """What is known of this rank's pace when the last one sleeps before its second layer; and its whole passes."""
    zero3 = config if config["zero_optimization"]["stage"] == 3 else None
    model = build_model(folder, dtype=torch.bfloat16, seed=11, zero3_config=zero3)
    engine, *_ = toolkit.initialize(model=model, config=config, total_steps=6)
    known = Pace(engine, config["zero_optimization"]["stage"])
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        model.hf.model.layers[1].register_forward_pre_hook(lambda *_: time.sleep(seconds))
    passes = []
    for _ in range(6):
        torch.distributed.barrier()
        began = time.perf_counter()
        loss = engine(torch.zeros(1, 9, dtype=torch.int64))
        passes.append(time.perf_counter() - began)
        engine.backward(loss)
        engine.step()
        known.step(0.0)()
    return {"alone": known.median(), "passes": sorted(passes[2:])[2]}


def routed(folder: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each step what is counted, and the experts of each token by the logits of the routers, by layer."""
    stage, rank = config["zero_optimization"]["stage"], torch.distributed.get_rank()
    model = build_model(
        folder,
        dtype=torch.bfloat16,
        seed=11,
        zero3_config=config if stage == 3 else None,
        activations=Activations.read("checkpoint"),  # which runs the experts again in the backward pass
    )
    engine, *_ = toolkit.initialize(model=model, config=config, total_steps=6)
    routers, found = Routers(engine), []
    draw = torch.Generator().manual_seed(rank)
    for _ in range(2):
        chosen: list[list[int]] = [[], []]
        for _ in range(config["gradient_accumulation_steps"]):
            tokens = torch.randint(0, 96, (1, 9), generator=draw)
            engine.eval()
            with torch.no_grad():
                engine(tokens)  # not training: not counted
                logits = model.hf(tokens[:, :-1], output_router_logits=True).router_logits
            engine.train()
            for layer, of in enumerate(logits):
                chosen[layer] += of.float().softmax(-1).topk(2).indices.flatten().tolist()
            engine.backward(engine(tokens))
            engine.step()
        found.append({"counted": routers.step()(), "chosen": chosen})
    return found


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    toolkit.register()
    answer({"build": build, "pace": pace, "routed": routed})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
