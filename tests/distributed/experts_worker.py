"""One rank of a training in which ranks run different modules, or the same in another order.

Every case is compared with one process that has both ranks' batches: `off` is the largest mean difference of any
parameter, in units of the largest mean way that a parameter should have gone.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import toolkit
from toolkit.errors import UserError
from toolkit.optim import AMCS, param_groups

STEPS = 3
LR = 1e-2


class Experts(nn.Module):
    """A layer that ranks run differently, between layers that they run alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(32, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.routed = Routed()
        self.out = nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor, expert: int, turned: bool) -> Tensor:
        return self.out(self.routed(self.frozen(self.inp(x)).relu(), expert, turned)).square().mean()


class Routed(nn.Module):
    """Experts of two sizes, one that nobody uses, and two towers that are run in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(32 + 16 * (number % 2)) for number in range(4))
        self.towers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, h: Tensor, expert: int, turned: bool) -> Tensor:
        first, second = self.towers[::-1] if turned else self.towers
        h = h + self.experts[expert](h) + first(h).tanh()
        return h + second(h).tanh()


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, width), nn.Linear(width, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Mixture(nn.Module):
    """A small Qwen3 mixture of experts in transformers' own code: experts in packed tensors, chosen by its routers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=250,
            hidden_size=40,
            intermediate_size=136,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=48,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
            use_cache=False,
        )
        self.routed = Qwen3MoeForCausalLM(config)

    def forward(self, x: Tensor, expert: int, turned: bool) -> Tensor:
        tokens = (100 * x).long() % 250
        return self.routed(input_ids=tokens, labels=tokens).loss


def made(case: dict[str, Any]) -> nn.Module:
    return Mixture() if case.get("mixture") else Experts()


def batch(step: int, micro: int, rank: int) -> Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(1000 * step + 10 * micro + rank))


def route(case: dict[str, Any], step: int, micro: int, rank: int) -> tuple[int, bool]:
    """The expert, of 0 to 2, and whether the towers are turned."""
    expert = {
        "rank": rank,
        "same": 0,
        "step": (step + micro + rank) % 3,
        "even": 2 * rank,
        "back": (step - micro) % 3,
    }[case["route"]]
    return expert, bool(rank) if case["turned"] else False


def reference(case: dict[str, Any], world_size: int) -> dict[str, Tensor]:
    model, micro_batches = made(case), case["config"].get("gradient_accumulation_steps", 1)
    adam = case["config"]["optimizer"]["type"] == "AdamW"
    kind: Any = torch.optim.AdamW if adam else AMCS
    more = {} if adam else {"total_steps": STEPS, "compile": False} | case.get("reference", {"state_format": "fp32"})
    params = model.parameters() if adam else param_groups(model)
    optimizer = kind(params, lr=LR, weight_decay=0.0, **more)
    for step in range(STEPS):
        for micro in range(micro_batches):
            for rank in range(world_size):
                loss = model(batch(step, micro, rank), *route(case, step, micro, rank))
                (loss / (world_size * micro_batches)).backward()
        for param in model.parameters():
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def train(case: dict[str, Any]) -> dict[str, Any]:
    model, rank = made(case), dist.get_rank()
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    if case.get("leaf"):
        deepspeed.utils.set_z3_leaf_modules(model, [Routed])
    engine, *_ = toolkit.initialize(model=model, config=copy.deepcopy(case["config"]), total_steps=STEPS)
    half = case["config"].get("bf16", {}).get("enabled")
    micro_batches = engine.gradient_accumulation_steps()
    for step in range(STEPS):
        for micro in range(micro_batches):
            x = batch(step, micro, rank)
            loss = engine(x.bfloat16() if half else x, *route(case, step, micro, rank))
            if case.get("twice"):  # two forward passes, then two backward passes
                second = engine(x, *route(case, step, micro, rank)) * 0.0
                engine.backward(loss)
                loss = second
            engine.backward(loss)
            engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=engine.zero_optimization_stage() == 3):
        found = {name: param.detach().float() for name, param in engine.module.named_parameters()}
    expected = reference(case, dist.get_world_size())
    moved = max((value - start[name]).abs().mean().item() for name, value in expected.items())
    off = {name: (found[name] - value).abs().mean().item() / moved for name, value in expected.items()}
    worst = max(off, key=lambda name: off[name])
    return {"off": off[worst], "worst": worst}


def said(caught: list[str], config: dict[str, Any], change: Any, steps: int = 2) -> list[str]:
    """Warnings of a training in which `change` is done to the model after its engine was made."""
    model = Experts()
    engine, *_ = toolkit.initialize(model=model, config=copy.deepcopy(config), total_steps=STEPS)
    change(model)
    del caught[:]
    for step in range(steps):
        engine.backward(engine(batch(step, 0, dist.get_rank()), 0, False))
        engine.step()
    return list(caught)


def scale(model: Experts) -> None:
    weight: Any = model.inp.weight
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=0, enabled=hasattr(weight, "ds_id")):
        weight.data.mul_(0.5)


def changes(case: dict[str, Any], caught: list[str]) -> dict[str, Any]:
    config = case["config"]
    found = {
        "thawed": said(caught, config, lambda model: model.frozen.requires_grad_(True)),
        "frozen": said(caught, config, lambda model: model.routed.experts[0].requires_grad_(False)),
        "written": said(caught, config, lambda model: model.load_state_dict(model.state_dict())),
        "scaled": said(caught, config, scale),
        "nothing": said(caught, config, lambda model: None),
    }
    if config["zero_optimization"]["stage"] < 3:  # where DeepSpeed fails on what it has not partitioned
        found["added"] = said(caught, config, lambda model: model.register_module("more", nn.Linear(2, 2)))
        found["replaced"] = said(caught, config, lambda model: setattr(model.routed.experts, "3", Expert(32)))
    return found


def compiled(case: dict[str, Any], caught: list[str]) -> dict[str, Any]:
    """Losses and names of a model that is plain, compiled, and compiled in parts."""
    found: dict[str, Any] = {}
    for how in ("plain", "whole", "parts"):
        torch._dynamo.reset()
        model: Any = Experts()
        if how == "parts":
            model.out = torch.compile(model.out, backend="eager")
            model.routed.experts[0] = torch.compile(model.routed.experts[0], backend="eager")
        if how == "whole":
            model = torch.compile(model, backend="eager")
        engine, *_ = toolkit.initialize(model=model, config=copy.deepcopy(case["config"]), total_steps=STEPS)
        losses = []
        graphs = counters["stats"]["unique_graphs"]
        for step in range(2):
            loss = engine(batch(step, 0, dist.get_rank()), 0, False)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        found[how] = {"losses": losses, "names": [name for name, _ in engine.module.named_parameters()]}
        found[how]["graphs"] = counters["stats"]["unique_graphs"] - graphs
    return found


def refused(case: dict[str, Any], caught: list[str]) -> dict[str, Any]:
    """What is said of models that cannot be trained, by kind."""
    models = {
        "fp64": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.float64)),
        "complex": nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64)),
        "sparse": nn.Sequential(nn.Embedding(8, 8, sparse=True)),
    }
    found = {}
    for name, model in models.items():
        for optimizer in ("AMCS", "AdamW") if case["config"]["zero_optimization"]["stage"] else ("AMCS",):
            config = copy.deepcopy(case["config"])
            if optimizer == "AdamW":
                config["optimizer"] = {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}}
            try:
                toolkit.initialize(model=model, config=config, total_steps=STEPS)
                found[f"{name}-{optimizer}"] = "nothing"
            except UserError as error:
                found[f"{name}-{optimizer}"] = str(error)
    return found


def empty(case: dict[str, Any], caught: list[str]) -> dict[str, Any]:
    """A parameter without elements, alone in its group."""
    model = nn.ModuleDict({"mlp": nn.Linear(32, 8, bias=False), "other": nn.Linear(0, 4, bias=False)})
    before = model["mlp"].weight.detach().clone()
    every = list(model.parameters())
    engine, *_ = toolkit.initialize(model=model, config=copy.deepcopy(case["config"]), total_steps=STEPS + 1)
    for step in range(4):
        x = batch(step, 0, dist.get_rank())
        engine.backward(engine.module["mlp"](x).square().mean() + engine.module["other"](x[:, :0]).sum())
        engine.step()
    with deepspeed.zero.GatheredParameters(every, enabled=engine.zero_optimization_stage() == 3):
        return {"moved": not torch.equal(engine.module["mlp"].weight.detach(), before)}


CHECKS = {"changes": changes, "compiled": compiled, "refused": refused, "empty": empty}


class Caught(logging.Handler):
    def __init__(self, into: list[str]) -> None:
        super().__init__()
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        self._into.append(record.getMessage())


def main() -> None:
    settings = json.loads(Path(sys.argv[-1]).read_text())
    toolkit.register()
    deepspeed.init_distributed(verbose=False)
    results: dict[str, Any] = {}
    caught: list[str] = []
    logging.getLogger("toolkit").addHandler(Caught(caught))
    for name, case in settings["cases"].items():
        try:
            results[name] = CHECKS[case["check"]](case, caught) if "check" in case else train(case)
        except UserError as error:
            results[name] = {"error": str(error)}
        except Exception:
            results[name] = {"broken": traceback.format_exc()}
        print(name, results[name], flush=True)
    torch.save(results, Path(settings["out"]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
