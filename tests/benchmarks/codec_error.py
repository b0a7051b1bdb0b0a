"""The error that coded state puts into a rule's update, by format and by kind of tensor.

    python tests/benchmarks/codec_error.py [--hidden 128] [--steps 60] [--rules AMCS Muon8] [--alone] [--codecs]

Every rule that keeps coded state is measured, as it declares it. A small Qwen3 trains on the standard library's source
with AMCS and fp32 state; every rule sees its gradients and weights, and keeps its own state in each format. The last
update is set against the one of the same rule with fp32 state: the norm of the difference over the norm, over all
matrices and by kind. It lies at 30 % of the training that schedules are told of. Rates of components and weight decay
are left out: they weigh tensors against each other, and cost no state. --alone also codes one state at a time, the
others in fp32; --codecs also has other codes than the shipped ones, and AMCS in its mode "mixed"; --shared has second
moments of which means over elements that follow one another, or over rows, are kept; --above P lists the tensors whose
update is more than P % wrong. --formats runs some of the shipped formats only.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from toolkit.data import PackedTokens, load_tokenizer, open_documents
from toolkit.optim import AMCS, RULES, RuleOptimizer, component_of, param_groups
from toolkit.optim.rule import all_states
from toolkit.state.codecs import FORMATS, MIXES, Format, Root, Scale, Signed
from toolkit.state.layout import elementwise

KINDS = ("embedding", "head", "attention", "ffn", "all")
SHIPPED = ("8bit", "compact", "minimal", "4bit", "factored", "lean", "leanest")
ROWS, SEQ_LEN = 8, 32
DONE = 0.3


class Linear(Signed):
    """Momentum in linear codes, right on average: code = 127 x / max|x|, or in 4 bits code = 7 x / max|x| + 8."""

    def encode(self, x: Tensor, scale: Scale, dither: Tensor) -> Tensor:
        zero = 8.0 if self.bits == 4 else 0.0
        return torch.floor(self.largest * (x * scale.inverse) + dither + zero).to(self.dtype)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        zero = 8.0 if self.bits == 4 else 0.0
        return (codes.float() - zero) / self.largest * scale


class SquareRoot(Root):
    """v as a square root: `Root`, which takes the fourth, of its square."""

    def scale_of(self, largest: Tensor) -> Tensor:
        return largest.sqrt()

    def encode(self, x: Tensor, scale: Scale, dither: Tensor) -> Tensor:
        return super().encode(x * x, scale, dither)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return super().decode(codes, scale).sqrt()


FORMATS.update(
    {
        "linear8": Format(Linear(8), SquareRoot(8)),
        "linear4": Format(Linear(4), SquareRoot(4), residual=Linear(4, relative=True)),
        "whole4": Format(Signed(4), Root(4)),
        "whole linear4": Format(Linear(4), Root(4)),
    }
)


def mix(name: str, **roles: str) -> dict[str, str]:
    """The formats by role of the mix `name`, but for `roles`."""
    eight = dict.fromkeys(("signed", "anchor", "residual", "second"), "8bit")
    return MIXES.get(name, eight) | roles


OTHERS = {
    "8bit, momenta linear": mix("8bit", signed="linear8", anchor="linear8", residual="linear8"),
    "8bit, v as square root": mix("8bit", second="linear8"),
    "compact, residual linear": mix("compact", residual="linear4"),
    "compact, no residual": mix("compact", residual="whole4"),
    "compact, momenta linear, no residual": mix("compact", signed="linear4", residual="whole linear4"),
    "minimal, v as square root": mix("minimal", second="linear4"),
    "8bit, v 4 bits": mix("8bit", second="4bit"),
    "compact, residual 2 bits": mix("compact", residual="2bit"),
}
MIXES.update(OTHERS)

SHARED = {f"8bit, v by {size} elements": size for size in (256, 32)} | {"8bit, v by row": 0}
"""Elements that share a number of the second moment; 0: those of a row."""


@dataclass
class Candidate:
    """One rule with one format, and parameters of its own."""

    name: str
    optimizer: RuleOptimizer
    parameters: dict[str, nn.Parameter]
    squares: dict[str, float] = field(default_factory=dict)
    """Of the difference from the exact update, by tensor."""

    def update(self, matrices: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Its update at these weights and gradients, by tensor."""
        for name, own in self.parameters.items():
            own.data.copy_(matrices[name])
            own.grad = matrices[name].grad
        self.optimizer.step()
        return {name: own.detach() - matrices[name].detach() for name, own in self.parameters.items()}

    def bytes_per_element(self) -> float:
        return sum(self.optimizer.state_bytes().values()) / sum(own.numel() for own in self.parameters.values())


@dataclass
class Shared(Candidate):
    """Of second moments, the mean over `size` elements that follow one another is all that outlives a step.

    As with "factored", the update itself has the latest gradient's square by element. Here each element holds the mean.
    """

    seconds: tuple[str, ...] = ()
    size: int = 0

    def update(self, matrices: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        found = super().update(matrices)
        for own in self.parameters.values():
            for name in self.seconds:
                if name in self.optimizer.state[own]:
                    v = self.optimizer.state[own][name].view(-1)[: own.numel()].view(-1, self.size or own.shape[-1])
                    v.copy_(v.mean(1, keepdim=True).expand_as(v))
        return found

    def bytes_per_element(self) -> float:
        means = spare = 0
        for own in self.parameters.values():
            kept = sum(name in self.optimizer.state[own] for name in self.seconds)
            means += kept * (own.numel() // (self.size or own.shape[-1]))
            spare += kept * own.numel()
        return super().bytes_per_element() + 4 * (means - spare) / sum(own.numel() for own in self.parameters.values())


def coded_states(optimizer: type[RuleOptimizer], seconds: bool = False) -> tuple[str, ...]:
    """The states, of all variants of its rule, that formats code; `seconds`: those that are never negative."""
    settings = {name: one.default for name, one in optimizer.rule.model_fields.items() if not one.is_required()}
    states = elementwise(all_states(optimizer.rule.variants(settings)))
    return tuple(state.name for state in states if not (seconds and state.signed))


def candidate(
    kind: type[RuleOptimizer], name: str, state_format: Any, like: Candidates, steps: int, **more: Any
) -> Candidate:
    given = {"lr": 1e-3, "weight_decay": 0.0, "total_steps": 1 + round((steps - 1) / DONE)}
    known = {key: value for key, value in given.items() if key in kind.rule.model_fields} | more
    parameters = {key: nn.Parameter(torch.empty_like(matrix)) for key, (matrix, _) in like.items()}
    groups: list[dict[str, Any]] = [
        {"params": [parameters[key]], "component": component, "lr_scale": 1.0} for key, (_, component) in like.items()
    ]
    return Candidate(name, kind(groups, state_format=state_format, compile=False, **known), parameters)


Candidates = Mapping[str, tuple[nn.Parameter, str]]


def candidates(
    kind: type[RuleOptimizer], like: Candidates, options: argparse.Namespace, **more: Any
) -> list[Candidate]:
    """The exact one first. Formats that come to the same as an earlier one are left out."""
    formats: dict[str, Any] = {name: name for name in ("fp32", *options.formats, *(OTHERS if options.codecs else ()))}
    states = coded_states(kind)
    if options.alone:
        formats |= {f"8bit, {one} alone": dict.fromkeys(states, "fp32") | {one: "8bit"} for one in states}
    found: dict[Any, Candidate] = {}
    for name, state_format in formats.items():
        made = candidate(kind, name, state_format, like, options.steps, **more)
        groups = made.optimizer.param_groups
        found.setdefault(tuple(made.optimizer.layout(group, torch.float32) for group in groups), made)
    seconds = coded_states(kind, seconds=True)
    shared = []
    for name, size in SHARED.items() if options.shared and seconds else ():
        made = candidate(kind, name, dict.fromkeys(seconds, "fp32"), like, options.steps, **more)
        shared.append(Shared(name, made.optimizer, made.parameters, seconds=seconds, size=size))
    return [*found.values(), *shared]


def small_model(hidden: int) -> tuple[nn.Module, Iterator[Tensor]]:
    """A Qwen3 of two layers, and batches of tokens [ROWS, SEQ_LEN] of the standard library's source; seed 0."""
    torch.manual_seed(0)
    shape = {"vocab_size": 4096, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4}
    model = Qwen3ForCausalLM(
        Qwen3Config(**shape, **heads, num_hidden_layers=2, tie_word_embeddings=False, use_cache=False)
    )
    documents, tokenizer = open_documents("stdlib"), load_tokenizer("python-4k")
    sequences = PackedTokens(documents, tokenizer, SEQ_LEN, seed=0, shuffle_window=256).sequences()
    return model, (torch.stack([torch.as_tensor(next(sequences)) for _ in range(ROWS)]) for _ in itertools.count())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rules", nargs="+", choices=sorted(RULES), default=sorted(RULES))
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--codecs", action="store_true")
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--formats", nargs="*", choices=SHIPPED, default=SHIPPED)
    parser.add_argument("--above", type=float, metavar="PERCENT")
    options = parser.parse_args()
    model, batches = small_model(options.hidden)
    trained = AMCS(param_groups(model), lr=1e-3, alpha=0.7, state_format="fp32")
    modules = dict(model.named_modules())
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    like = {name: (p, component_of(name, modules)) for name, p in matrices.items()}
    measured = {name: candidates(RULES[name], like, options) for name in options.rules if coded_states(RULES[name])}
    if options.codecs and "AMCS" in measured:
        measured["AMCS, mixed"] = candidates(AMCS, like, options, mode="mixed")
    exact: dict[str, dict[str, float]] = {}
    for _ in range(options.steps):
        tokens = next(batches)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rule, (first, *others) in measured.items():
            right = first.update(matrices)
            exact[rule] = {name: one.square().sum().item() for name, one in right.items()}
            for one in others:
                one.squares = {
                    n: (update - right[n]).square().sum().item() for n, update in one.update(matrices).items()
                }
        trained.step()
        trained.zero_grad()
    print(f"{'update error in %':48}{'bytes':>8}" + "".join(f"{kind:>11}" for kind in KINDS))
    for rule, (_, *others) in measured.items():
        for one in others:
            show(
                f"{rule} {one.name}", one, exact[rule], {name: kind for name, (_, kind) in like.items()}, options.above
            )


def show(title: str, one: Candidate, exact: Mapping[str, float], kinds: Mapping[str, str], above: float | None) -> None:
    def error(names: list[str]) -> float:
        return 100 * (sum(one.squares[name] for name in names) / sum(exact[name] for name in names)) ** 0.5

    errors = [error([name for name in exact if kind in (kinds[name], "all")]) for kind in KINDS]
    print(f"{title:48}{one.bytes_per_element():8.2f}" + "".join(f"{value:11.2f}" for value in errors), flush=True)
    for name in exact if above is not None else ():
        if above is not None and (wrong := error([name])) > above:
            print(f"    {name:52}{wrong:11.2f}")


if __name__ == "__main__":
    main()
