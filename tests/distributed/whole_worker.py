"""One rank that saves and loads small models with much beside what is trained, and with every schedule.

Started by `ranks.launch` with the path of a JSON of settings as only argument; `steps` is a list of

* {"save": folder, "stage": s}: two steps, saved by `Saver` and, below `deepspeed`, by DeepSpeed alone;
* {"load": folder, "stage": s, ...}: a model with other weights takes that over; `convert` as in `load`, `variant`: a
  change to the model, `used`: it has made a step and been saved before;
* {"schedules": folder}: every schedule, stopped and resumed;
* {"hf": folder, "to": folder}: a step of the model that `folder` describes, saved with its files; a matrix is frozen,
  its router's bias is far from zero, and one weight is too large for fp16.

What each gave goes to rank<n>.pt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import lr_schedules
from ranks import answer
from torch import Tensor, nn
from torch.optim import lr_scheduler as torch_schedules

import toolkit
from toolkit.checkpoint.model_files import model_files
from toolkit.checkpoint.store import Store
from toolkit.checkpoint.universal import open_checkpoint
from toolkit.errors import UserError
from toolkit.run import ranks
from toolkit.run.saving import Saver
from toolkit.zero.checkpoint import load


class Scaled(nn.Module):
    """Keeps something that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"amax": torch.zeros(3), "steps": 0}

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


class Net(nn.Module):
    """Frozen matrices, one of them under two names and one of no whole blocks; a parameter that no optimizer has."""

    def __init__(self, variant: str | None) -> None:
        super().__init__()
        self.body = nn.Linear(32, 48, bias=variant == "wider")
        self.again = nn.Linear(32, 48, bias=False)
        self.again.weight = self.body.weight
        self.odd = nn.Linear(48, 5)
        self.head = nn.Linear(48, 32)
        self.left_out = nn.Parameter(torch.randn(3, 5))
        self.scaled = Scaled()
        for module in (self.body, self.odd):
            module.requires_grad_(False)
        if variant == "frozen":
            self.head.bias.requires_grad_(False)
        if variant == "unfrozen":
            self.odd.bias.requires_grad_(True)
        if variant == "shape":
            self.odd = nn.Linear(48, 6).requires_grad_(False)
        self.register_buffer("router", 8 + torch.linspace(0, 0.02, 8) * torch.rand(()))
        self.register_buffer("count", torch.randint(1 << 40, ()))
        self.register_buffer("mask", torch.rand(4) > 0.5)
        self.register_buffer("narrow", torch.randn(6).bfloat16())
        self.register_buffer("local", torch.zeros(2))
        self.register_buffer("computed", torch.zeros(2), persistent=False)
        if variant == "buffer":
            self.register_buffer("more", torch.zeros(2))
        if variant == "rounded":
            self.router = self.router.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x) + self.again(x)
        return (self.head(hidden).float() + self.odd(hidden).float().sum()).pow(2).mean()


def build(seed: int, stage: int, variant: str | None = None, optimizer: str = "AMCS", **more: Any) -> Any:
    torch.manual_seed(seed)
    net = Net(variant)
    net.left_out.requires_grad_(optimizer != "AMCS")  # which refuses to leave one out
    trained = [p for name, p in net.named_parameters() if p.requires_grad and name != "left_out"]
    return toolkit.initialize(model=net, config=config_of(optimizer, stage), model_parameters=trained, **more)[0]


def config_of(optimizer: str, stage: int) -> dict[str, Any]:
    own = {
        "AMCS": {"total_steps": 50, "compile": False},
        "SOAM": {"compile": False},
        "AdamW": {"torch_adam": True},  # DeepSpeed's own is built for minutes
    }
    return {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2} | own.get(optimizer, {})},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def train(engine: Any, steps: int) -> None:
    for _ in range(steps):
        step = engine.global_steps
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(10 * step + ranks.rank()))
        engine.backward(engine(x.bfloat16()))
        engine.step()


def save_with(engine: Any, folder: Path, files: dict[str, bytes] | None = None) -> None:
    saver = Saver(engine, Store(folder), files)
    saver.now(engine.global_steps, {})
    saver.close()


def whole(engine: Any) -> dict[str, Tensor]:
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_shape")):
            found[name] = param.detach().clone()
    found |= {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    seen = engine.module.scaled.seen
    return found | {"extra": torch.cat([seen["amax"], torch.tensor([seen["steps"]])])}


def save(folder: str, stage: int, optimizer: str = "AMCS") -> dict[str, Tensor]:
    engine = build(0, stage, optimizer=optimizer)
    engine.module.scaled.seen = {"amax": torch.arange(3.0), "steps": 7}
    engine.module.local.fill_(1.0 + ranks.rank())
    train(engine, 2)
    save_with(engine, Path(folder))
    engine.save_checkpoint(str(Path(folder) / "deepspeed"))
    return whole(engine)


def load_into(folder: str, stage: int, convert: bool = False, used: bool = False, **more: Any) -> Any:
    engine = build(1, stage, **more)
    if used:
        train(engine, 1)
        save_with(engine, Path(folder).parent / f"used-{stage}")
    before = whole(engine)
    try:
        said = load(engine, open_checkpoint(Path(folder)), convert=convert)
    except UserError as error:
        return {"refused": str(error), "changed": not _equal(before, whole(engine))}
    after = whole(engine)
    train(engine, 1)  # the model computes with it
    return {"said": said, "model": after}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def transformers_model(folder: str, to: str) -> dict[str, Tensor]:
    from toolkit import data, models

    model = models.build_model(folder, dtype=torch.bfloat16, seed=0)
    model.hf.get_input_embeddings().weight.requires_grad_(False)
    with torch.no_grad():
        model.hf.lm_head.weight[0, 0] = 1e5
    engine = toolkit.initialize(model=model, config=config_of("AMCS", 2))[0]
    for name, buffer in model.named_buffers():
        if "e_score" in name:
            buffer.copy_(8 + torch.linspace(0, 0.02, buffer.numel()))
    engine.backward(engine(torch.arange(40).view(4, 10)))
    engine.step()
    config, _ = models.load_config(folder)
    files = model_files(config, data.load_tokenizer("python-4k"), Path(folder))
    save_with(engine, Path(to), files)
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


# ---- schedules ----

STEPS, STOP = 9, 4
Maker = Callable[[Any], Any]
TORCH: dict[str, Maker] = {
    "LambdaLR": lambda o: torch_schedules.LambdaLR(o, lambda t: min(1.0, (t + 1) / 4) * (1 - t / 24)),
    "MultiplicativeLR": lambda o: torch_schedules.MultiplicativeLR(o, lambda t: 0.9 if t % 2 else 0.8),
    "StepLR": lambda o: torch_schedules.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: torch_schedules.MultiStepLR(o, [2, 5, 7], gamma=0.5),
    "ConstantLR": lambda o: torch_schedules.ConstantLR(o, 0.3, total_iters=6),
    "LinearLR": lambda o: torch_schedules.LinearLR(o, 0.1, total_iters=7),
    "ExponentialLR": lambda o: torch_schedules.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: torch_schedules.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: torch_schedules.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: torch_schedules.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
    "OneCycleLR": lambda o: torch_schedules.OneCycleLR(o, 1e-2, total_steps=12),
    "ReduceLROnPlateau": lambda o: torch_schedules.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: torch_schedules.SequentialLR(
        o, [torch_schedules.LinearLR(o, 0.1, total_iters=5), torch_schedules.CosineAnnealingLR(o, 8)], [5]
    ),
    "ChainedScheduler": lambda o: torch_schedules.ChainedScheduler(
        [torch_schedules.LinearLR(o, 0.1, total_iters=6), torch_schedules.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 1e-3, anneal_epochs=6),
}
DEEPSPEED: dict[str, Maker] = {
    "LRRangeTest": lambda o: lr_schedules.LRRangeTest(o, 1e-3, 2),
    "OneCycle": lambda o: lr_schedules.OneCycle(o, 1e-3, 1e-2, cycle_first_step_size=3, cycle_second_step_size=4),
    "WarmupLR": lambda o: lr_schedules.WarmupLR(o, 0.0, 1e-2, 6),
    "WarmupDecayLR": lambda o: lr_schedules.WarmupDecayLR(o, 12, 0.0, 1e-2, 6),
    "WarmupCosineLR": lambda o: lr_schedules.WarmupCosineLR(o, 12, warmup_num_steps=6),
}
OTHER_SETTINGS: dict[str, Maker] = {
    "LambdaLR": lambda o: torch_schedules.LambdaLR(o, lambda t: 1 / (t + 1)),
    "CosineAnnealingLR": lambda o: torch_schedules.CosineAnnealingLR(o, 20),
    "OneCycleLR": lambda o: torch_schedules.OneCycleLR(o, 2e-2, total_steps=20, final_div_factor=10),
    "SequentialLR": lambda o: torch_schedules.SequentialLR(
        o, [torch_schedules.LinearLR(o, 0.2, total_iters=3), torch_schedules.CosineAnnealingLR(o, 9)], [3]
    ),
    "WarmupLR": lambda o: lr_schedules.WarmupLR(o, 0.0, 2e-2, 12),
}


class Small(nn.Linear):
    """Has a bias, so that there are two parameter groups."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float().pow(2).mean()


def scheduled(maker: Maker | None) -> Any:
    torch.manual_seed(0)
    return toolkit.initialize(model=Small(8, 16), config=config_of("SOAM", 2), lr_scheduler=maker)[0]


def rates(engine: Any, last: int) -> list[Any]:
    """What each group's rate and betas are before each step up to `last`, and before the one after it."""
    found = []
    while True:
        found.append([(float(g["lr"]), tuple(g["betas"])) for g in engine.basic_optimizer.param_groups])
        if engine.global_steps == last:
            return found
        engine.backward(engine(torch.ones(4, 8).bfloat16()))
        plateau = isinstance(engine.lr_scheduler, torch_schedules.ReduceLROnPlateau)
        engine.step(lr_kwargs={"metrics": float(engine.global_steps)} if plateau else None)


def schedules(folder: str) -> dict[str, Any]:
    # Of torch, which would not see that the optimizer has made a step.
    warnings.filterwarnings("error", "Detected call of `lr_scheduler.step")
    makers: dict[str, Maker | None] = {**TORCH, **DEEPSPEED, "none": None}
    found: dict[str, Any] = {}
    for name, maker in makers.items():
        engine = scheduled(maker)
        first = rates(engine, STOP)[:-1]
        save_with(engine, Path(folder) / name)
        found[name] = {"whole": first + rates(engine, STEPS)}
    for name, maker in makers.items():
        found[name]["resumed"] = _resumed(folder, name, maker)
        found[name]["from none"] = _resumed(folder, "none", maker)
        if name in ("none", "WarmupLR", "CyclicLR", "ChainedScheduler", "ReduceLROnPlateau"):
            found[name]["from another"] = _resumed(folder, "ExponentialLR", maker)
    for name, maker in OTHER_SETTINGS.items():
        found[name]["other settings"] = rates(scheduled(maker), STEPS), _resumed(folder, name, maker)
    engine = scheduled(TORCH["CosineAnnealingLR"])
    rates(engine, STOP + 1)
    found["too late"] = _loaded(engine, folder, "none")
    found["too long"] = _loaded(scheduled(lambda o: torch_schedules.OneCycleLR(o, 1e-2, total_steps=2)), folder, "none")
    return found


def _resumed(folder: str, name: str, maker: Maker | None) -> Any:
    engine = scheduled(maker)
    said = _loaded(engine, folder, name)
    return said, rates(engine, STEPS)


def _loaded(engine: Any, folder: str, name: str) -> Any:
    try:
        return load(engine, open_checkpoint(Path(folder) / name / f"global_step{STOP}"))
    except UserError as error:
        return str(error)


KINDS: dict[str, Callable[..., Any]] = {
    "save": save,
    "load": load_into,
    "schedules": schedules,
    "hf": transformers_model,
}


def main() -> None:
    ranks.prepare_environment()
    ranks.start()
    toolkit.register()
    answer(KINDS)
    ranks.finish()


if __name__ == "__main__":
    main()
