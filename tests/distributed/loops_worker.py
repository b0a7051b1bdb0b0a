"""One rank of loops that do more than forward pass, backward pass and step; each is compared with a plain loop.

Started by `ranks.launch` from `test_loops.py`. `off` is the largest mean difference of any parameter from that of one
process with all batches, in units of the largest mean way that a parameter should have gone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from ranks import answer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import toolkit
from toolkit.errors import UserError
from toolkit.optim import RULES, param_groups

LR = 1e-2
PARAMS = {"lr": LR, "weight_decay": 0.1, "compile": False, "state_format": "fp32"}


class Net(nn.Module):
    """Matrices of whole blocks and of others, a norm; `last` may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.norm = nn.Linear(16, 32), nn.LayerNorm(32)
        self.mlp, self.last = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 7)

    def forward(self, x: Tensor, last: bool = True) -> Tensor:
        h = self.norm(self.inp(x)).relu()
        h = h + self.mlp(h).tanh()
        if last:
            h = h + self.last(h).tanh()
        return self.head(h).float().square().mean()


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + rank))


def here() -> int:
    return torch.distributed.get_rank()


class Run:
    """An engine, the plain loop that it should do the same as, and both losses of this rank."""

    def __init__(self, kind: str, net: Callable[[], nn.Module] = Net) -> None:
        self.stage, how = int(kind[0]), kind[1:]
        self.dtype = {"": torch.float32, "fp16": torch.float16}.get(how, torch.bfloat16)
        params = PARAMS | {"weights": "bf16+16" if self.dtype == torch.bfloat16 else "fp32"}
        params |= {"release_gradients": True} if how == "released" else {}
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": 1500}
        zero |= {"offload_optimizer": {"device": "cpu"}} if how == "offload" else {}
        zero |= {"stage3_param_persistence_threshold": 0} if how == "cut" else {}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW8", "params": params},
            "zero_optimization": zero,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
        }
        config |= {"bf16": {"enabled": True}} if self.dtype == torch.bfloat16 else {}
        config |= {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}} if how == "fp16" else {}
        self.engine, *_ = toolkit.initialize(model=net(), config=config)
        self.plain = net()
        self.optimizer = RULES["AdamW8"](param_groups(self.plain), **PARAMS)
        self.start = {name: param.detach().clone() for name, param in self.plain.named_parameters()}

    def forward(self, step: int, last: bool = True) -> Tensor:
        return self.engine(batch(step, here()).to(self.dtype), last)

    def backward(self, step: int, last: bool = True, times: float = 1.0) -> float:
        """Of the plain loop, with all ranks' batches; this rank's loss."""
        ranks = torch.distributed.get_world_size()
        losses = [self.plain(batch(step, rank), last) for rank in range(ranks)]
        (times * sum(losses) / ranks).backward()
        return losses[here()].item()

    def step(self) -> None:
        for param in self.plain.parameters():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        self.optimizer.step()
        self.optimizer.zero_grad()

    def both(self, step: int) -> tuple[float, float]:
        loss = self.forward(step)
        self.engine.backward(loss)
        self.engine.step()
        wanted = self.backward(step)
        self.step()
        return loss.item(), wanted

    def weights(self) -> dict[str, Tensor]:
        every = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(every, enabled=self.stage == 3):
            return {name: param.detach().float().clone() for name, param in self.engine.module.named_parameters()}

    def off(self) -> float:
        found = self.weights()
        wanted = {name: value for name, value in self.plain.named_parameters() if value.numel()}
        moved = max((value - self.start[name]).abs().mean().item() for name, value in wanted.items())
        return max((found[name] - value).abs().mean().item() for name, value in wanted.items()) / moved


def values(net: nn.Module, size: float) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return {name: size * torch.randn(param.shape, generator=drawn) for name, param in net.named_parameters()}


def weights_set(kind: str) -> dict[str, Any]:
    """All weights are set after two steps: what all ranks' models hold at once, what is read, and two steps more."""
    run = Run(kind)
    for step in range(2):
        run.both(step)
    new = values(run.plain, 0.3)
    for name, param in run.engine.module.named_parameters():
        safe_set_full_fp32_param(param, new[name])
        run.plain.get_parameter(name).data.copy_(new[name])
    seen = run.weights()
    # Half up in magnitude, which differs from torch's rounding to bf16 in exact ties.
    rounding = 0.0 if run.dtype == torch.float32 else 2.0**-8
    at_once = all(torch.allclose(seen[name], value, rtol=rounding, atol=0.0) for name, value in new.items())
    named = dict(run.engine.module.named_parameters())
    read = all(torch.equal(safe_get_full_fp32_param(named[name]), value) for name, value in new.items())
    losses = run.both(2)
    run.both(3)
    return {"at once": at_once, "read": read, "losses": losses, "off": run.off()}


def state_set(kind: str) -> dict[str, Any]:
    """Both states, to those of the plain loop's third step; and what is said of one that there is not."""
    run = Run(kind)
    run.both(0)
    new = {name: (one, one.square() + 0.01) for name, one in values(run.plain, 0.1).items()}
    read = True
    for name, param in run.engine.module.named_parameters():
        held = run.optimizer.state[run.plain.get_parameter(name)]
        for key, value in zip(("m", "v"), new[name], strict=True):
            held[key].view(-1)[: value.numel()] = value.view(-1)
            safe_set_full_optimizer_state(param, value, key)
            read &= torch.equal(safe_get_full_optimizer_state(param, key), value)
    run.both(1)
    return {"read": read, "off": run.off(), "said": said(lambda: safe_get_full_optimizer_state(param, "mm"))}


def gradients_set(kind: str) -> dict[str, Any]:
    """Read and set between backward pass and step, also of a matrix that has none in this step."""
    run = Run(kind)
    run.both(0)
    run.engine.backward(run.forward(1, last=False))
    run.backward(1, last=False)
    new, read = values(run.plain, 0.01), 0.0
    for name, param in run.engine.module.named_parameters():
        grad = run.plain.get_parameter(name).grad
        wanted = torch.zeros(()) if grad is None else grad
        read = max(read, (safe_get_full_grad(param).float() - wanted).abs().max().item())
        safe_set_full_grad(param, new[name])
        run.plain.get_parameter(name).grad = new[name].clone()
    run.engine.step()
    run.step()
    return {"read": read, "off": run.off(), "said": said(lambda: safe_get_full_grad(param))}


def twice(kind: str) -> dict[str, Any]:
    """Two backward passes over one graph in each step, and then `zero_grad` of a bad batch."""
    run = Run(kind)
    for step in range(2):
        loss = run.forward(step)
        run.engine.backward(loss, retain_graph=True)
        run.engine.backward(3.0 * loss)
        run.engine.step()
        run.backward(step, times=4.0)
        run.step()
    run.engine.backward(run.forward(7))
    run.engine.zero_grad()
    run.both(2)
    return {"off": run.off()}


class Judge(nn.Module):
    """Of what `Maker` makes; its first weight is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.mlp, self.head = nn.Linear(16, 32), nn.Linear(32, 1)
        self.mlp.weight = nn.Parameter(self.mlp.weight.detach().t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x).relu()).float()


class Maker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mlp, self.head = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x).tanh())


def adversarial(kind: str) -> dict[str, Any]:
    """Two engines: the loss of one goes through the model of the other, whose gradients are dropped."""
    made, judged = Run(kind, Maker), Run(kind, Judge)
    for step in range(3):
        ranks = range(torch.distributed.get_world_size())
        ways = (made.engine, judged.engine, [here()], made.dtype), (made.plain, judged.plain, ranks, torch.float32)
        for maker, judge, seen, dtype in ways:
            real, drawn = (torch.stack([batch(2 * step + i, rank) for rank in seen]).to(dtype) for i in (0, 1))
            judge.zero_grad()
            loss = (judge(real) - 1.0).square().mean() + judge(maker(drawn).detach()).square().mean()
            finish(judge, judged, loss)
            finish(maker, made, (judge(maker(drawn)) - 1.0).square().mean())
    return {"off": max(made.off(), judged.off())}


def finish(model: Any, run: Run, loss: Tensor) -> None:
    if model is run.engine:
        model.backward(loss)
        model.step()
    else:
        loss.backward()
        run.step()


class Odd(nn.Module):
    """Parameters that are tied, empty or not in the usual order of memory, in parts that are computed again."""

    def __init__(self, parts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.parts = parts
        """Whether the gradient of the tied weight comes in parts."""
        self.inp, self.head = nn.Linear(16, 32), nn.Linear(32, 7)
        self.mlp, self.tied = nn.Linear(32, 32), nn.Linear(32, 32)
        self.tied.weight = self.mlp.weight
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.nothing = nn.Parameter(torch.zeros(0, 32))

    def forward(self, x: Tensor, last: bool = True) -> Tensor:
        h = self.inp(x)
        h = checkpoint(lambda h: h + self.mlp(h).tanh(), h, use_reentrant=self.parts)
        h = checkpoint(lambda h: h + self.tied(h).tanh(), h, use_reentrant=False)
        h = checkpoint(self.convolved, h, use_reentrant=True)
        return self.head(h + self.nothing.sum()).float().square().mean()

    def convolved(self, h: Tensor) -> Tensor:
        seen = h.view(-1, 4, 4, 2).contiguous(memory_format=torch.channels_last)
        return h + self.conv(seen).reshape(h.shape)


def odd(kind: str) -> dict[str, Any]:
    """A model of unusual parameters; evaluated between forward and backward pass; micro-batches of the loop's own."""
    run = Run(kind, partial(Odd, parts=kind < "3"))
    run.both(0)
    loss = run.forward(1)
    run.engine.eval()
    with torch.no_grad():
        run.forward(7)
    run.engine.train()
    run.engine.backward(loss)
    run.engine.step()
    run.backward(1)
    run.step()
    for last in (False, True):
        run.engine.set_gradient_accumulation_boundary(last)
        run.engine.backward(run.forward(2 + last))
        run.engine.step()
        run.backward(2 + last)
    run.step()
    if run.stage == 0:
        with run.engine.no_sync():
            run.engine.backward(run.forward(4))
        run.backward(4)
    run.both(5)
    return {"off": run.off()}


def scaled(kind: str) -> dict[str, Any]:
    """fp16 with a loss scale that is too large at first; the plain loop is in fp32 and skips the same steps."""
    run, made, norms = Run(kind), 0, []
    for _ in range(9):
        run.engine.backward(run.forward(made))
        run.engine.step()
        if run.engine.was_step_applied():
            run.backward(made)
            plain = torch.cat([param.grad.flatten() for param in run.plain.parameters() if param.grad is not None])
            norms.append(float(run.engine.get_global_grad_norm()) / plain.norm().item())
            run.step()
            made += 1
    return {"off": run.off(), "made": made, "norms": norms}


def refused(kind: str) -> dict[str, str]:
    """What cannot be done right, and what is said of it; then a new engine takes over."""
    run = Run(kind)
    model, config = run.engine.module, run.engine._config._param_dict
    run.both(0)
    found = {
        "group": said(lambda: run.engine.basic_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})),
        "second": said(lambda: toolkit.initialize(model=model, config=config)),
    }
    if kind.endswith("released"):
        run.engine.backward(run.forward(1))
        found["dropped"] = said(run.engine.zero_grad)
        found["gradient"] = said(lambda: safe_get_full_grad(model.mlp.weight))
    else:
        for key, value in (("state_format", "8bit"), ("weights", "bf16+4")):
            group = run.engine.optimizer.param_groups[0]
            group[key], was = value, group[key]
            run.engine.backward(run.forward(1))
            found[key] = said(run.engine.step)
            group[key] = was
    found["no_sync"] = said(run.engine.no_sync)
    found["engine"] = said(lambda: copy.deepcopy(run.engine))
    if run.stage == 3:
        found["model"] = said(lambda: copy.deepcopy(model))
        parts = Run("3", partial(Odd, parts=True))
        found["parts"] = said(lambda: parts.engine.backward(parts.forward(0)))
        mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16())
        found["mixed"] = said(lambda: toolkit.initialize(model=mixed, config=parts.engine._config._param_dict))
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = nn.Parameter(one.weight.data)
    scale = nn.ParameterList([nn.Parameter(torch.tensor(1.0))])
    found["scalar"] = said(lambda: toolkit.initialize(model=scale, config=config))
    found["memory"] = said(
        lambda: toolkit.initialize(model=nn.Sequential(one, other), config=run.engine._config._param_dict)
    )
    return found


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    toolkit.register()
    deepspeed.init_distributed(verbose=False)
    get_accelerator().is_fp16_supported = lambda: True
    loops = (weights_set, state_set, gradients_set, twice, adversarial, odd, scaled, refused)
    answer({one.__name__: one for one in loops})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
