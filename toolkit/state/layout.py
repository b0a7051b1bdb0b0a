"""What is stored for one tensor: the codec of each state, the remainder of its weights, and the keys they go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from toolkit.errors import UserError, nearest
from toolkit.state.codecs import BLOCK, FACTORED, FORMATS, MIXES, Codec, TensorSpec, decode_blocks, encode_blocks
from toolkit.state.files import StateFiles
from toolkit.state.remainders import DEFAULT_WEIGHTS, MASTER, WEIGHTS, Remainder

REMAINDER = "remainder"
"""Key of the lower bits of bf16 weights in a tensor's state."""

DEFAULT_FORMAT = "8bit"
LEAN, LEANEST = "lean", "leanest"
"""The mixes of least state, which settle `weights`, too, where these are not given."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of weights that can be trained. fp64 weights are updated in fp64, from states in fp32."""


@dataclass(frozen=True)
class State:
    """One state tensor per parameter, zero at the start.

    `signed=False`: a second moment, never negative. `residual_of` names another state of the rule that this one stays
    close to, like a second average of the same gradients: formats that can store the difference.

    `of` "rows" or "columns": one fp32 number for each row or column of a parameter, whole on every rank; "parameter":
    one number.
    """

    name: str
    signed: bool = True
    residual_of: str | None = None
    of: str | None = None


def elementwise(states: tuple[State, ...]) -> tuple[State, ...]:
    """Those with a number for every element, which are sharded and coded."""
    return tuple(state for state in states if state.of is None)


def kept_whole(states: tuple[State, ...], formats: Mapping[str, str]) -> tuple[State, ...]:
    """What every rank keeps whole: states of rows, columns and parameters, and what stands for one that is factored."""
    found: list[State] = []
    for state in states:
        if state.of is not None:
            found.append(state)
        elif formats.get(state.name) == FACTORED:
            found += lines_of(state.name)
    return tuple(found)


def lines_of(name: str) -> tuple[State, State]:
    """What is kept of the state `name` whose format is FACTORED."""
    rows, columns = (State(f"{name}.{of}", signed=False, of=of) for of in ("rows", "columns"))
    return rows, columns


@dataclass(frozen=True)
class Layout:
    """The codec of each of `states`, in their order, and the remainder, or None for weights that are whole.

    `factored`: the states of which rows and columns are kept, with their places among all. A step has their elements
    in a buffer: `opened` is the layout that it works on.
    """

    states: tuple[State, ...]
    codecs: tuple[Codec, ...]
    remainder: Remainder | None
    factored: tuple[tuple[int, State], ...] = ()

    def __hash__(self) -> int:
        return self._hash  # looked up for every tensor of every step

    @cached_property
    def _hash(self) -> int:
        return hash((self.states, self.codecs, self.remainder, self.factored))

    @cached_property
    def opened(self) -> Layout:
        """With an fp32 number for each element of what is factored."""
        states, codecs = list(self.states), list(self.codecs)
        for place, state in self.factored:
            states.insert(place, state)
            codecs.insert(place, FORMATS["fp32"].second)
        return Layout(tuple(states), tuple(codecs), self.remainder) if self.factored else self

    @cached_property
    def specs(self) -> tuple[tuple[str, TensorSpec], ...]:
        """The stored tensors by key, in the order that the compiled step takes them."""
        held = [(s.name, codec.specs()) for s, codec in zip(self.states, self.codecs, strict=True)]
        if self.remainder is not None:
            held.append((REMAINDER, self.remainder.specs()))
        return tuple((f"{name}.{spec.suffix}" if spec.suffix else name, spec) for name, specs in held for spec in specs)

    @property
    def every(self) -> tuple[State, ...]:
        """All states with a number for each element, factored ones among them."""
        return self.opened.states

    @property
    def blocked(self) -> bool:
        """Whether elements of a block are stored together: under one scale, or two to a byte."""
        return any(spec.per_block != BLOCK for _, spec in self.specs)

    def allocate(self, numel: int, device: torch.device, files: StateFiles | None = None) -> dict[str, Tensor]:
        """Zeros for a tensor of `numel` elements: each stored tensor as [ceil(numel / BLOCK), per_block].

        On the host they lie in a file of `files`, where that is given.
        """
        wanted = {key: ((-(-numel // BLOCK), spec.per_block), spec.dtype) for key, spec in self.specs}
        if files is not None and device.type == "cpu":
            return files.zeros(wanted)
        return {key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype) in wanted.items()}

    def keys(self, name: str) -> list[str]:
        """The keys of the stored tensors of a state, or of the remainder."""
        return [key for key, _ in self.specs if state_of(key) == name]

    def decode(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every state as fp32 [blocks, BLOCK], from its stored tensors by key."""
        states = {}
        for state, codec in zip(self.states, self.codecs, strict=True):
            states[state.name] = decode_blocks(codec, *(stored[key] for key in self.keys(state.name)))
        for state, codec in zip(self.states, self.codecs, strict=True):
            if codec.relative and state.residual_of is not None:
                states[state.name] = states[state.name] + states[state.residual_of]
        return states

    def encode(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `decode`, as far as the codes go."""
        stored: dict[str, Tensor] = {}
        for state, codec in zip(self.states, self.codecs, strict=True):
            values = states[state.name]
            if codec.relative and state.residual_of is not None:
                values = values - states[state.residual_of]
            stored.update(zip(self.keys(state.name), encode_blocks(codec, values), strict=True))
        return stored

    def bytes_per_element(self) -> dict[str, float]:
        """Stored bytes per element, scales included, by state and for the remainder, where bits of it are kept."""
        held = {s.name: codec.bytes_per_element() for s, codec in zip(self.states, self.codecs, strict=True)}
        kept = self.remainder
        return held | ({REMAINDER: kept.bytes_per_element()} if kept is not None and kept.bits else {})


def state_of(key: str) -> str:
    """The state, or `REMAINDER`, that the stored tensor `key` belongs to."""
    return key.partition(".")[0]


def layout(states: tuple[State, ...], formats: Mapping[str, str], weights: str, dtype: torch.dtype) -> Layout:
    """The layout of a tensor of `dtype`. Remainders belong to bf16 tensors; all others hold their weights whole.

    Raises UserError for bf16 tensors without remainder, and for types that are none of DTYPES.
    """
    check_dtype(dtype, "optimizer")
    if dtype == torch.bfloat16 and weights == MASTER:
        raise UserError(
            f"weights is {MASTER!r}, but the parameters are bf16; use 'bf16+16', which holds the same 32 bits, or "
            "parameters in fp32"
        )
    return layout_of(states, formats, weights if dtype == torch.bfloat16 else MASTER)


def dtype_name(dtype: torch.dtype) -> str:
    """As files and sentences have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def check_dtype(dtype: torch.dtype, where: str, allowed: Sequence[torch.dtype] = DTYPES) -> None:
    """Raise UserError unless weights of `dtype` can be trained."""
    if dtype not in allowed:
        names = [dtype_name(one) for one in (dtype, *allowed)]
        raise UserError(f"{where}: trainable weights are {names[0]}, but must be one of {', '.join(names[1:])}")


def layout_of(states: tuple[State, ...], formats: Mapping[str, str], weights: str) -> Layout:
    """The layout of a tensor with these `states`; `weights` "fp32": without remainder."""
    every = elementwise(states)
    kept = tuple(state for state in every if formats[state.name] != FACTORED)
    codecs = tuple(_codec(state, formats[state.name]) for state in kept)
    factored = tuple((place, state) for place, state in enumerate(every) if state not in kept)
    return Layout(kept, codecs, WEIGHTS.get(weights), factored)


def _codec(state: State, name: str) -> Codec:
    entry = FORMATS[name]
    if not state.signed:
        return entry.second
    return entry.residual if state.residual_of is not None and entry.residual is not None else entry.signed


def state_formats(
    states: tuple[State, ...], wanted: str | Mapping[str, str], *, known: tuple[State, ...] = (), where: str
) -> dict[str, str]:
    """The format of each of `states`, from one name or a mapping from state to name; `known`: others that it may name.

    Raises UserError.
    """
    states = elementwise(states)
    names = list(dict.fromkeys(state.name for state in (*states, *elementwise(known))))
    if not isinstance(wanted, (str, Mapping)):
        raise UserError(f"{where}: state_format is {wanted!r}, but must be a name or a mapping from state to name")
    if isinstance(wanted, str) and wanted in MIXES:
        return {state.name: MIXES[wanted][_role(state, states)] for state in states}
    given = dict.fromkeys(names, wanted) if isinstance(wanted, str) else dict(wanted)
    for state in given:
        if state not in names:
            raise UserError(
                f"{where}: state_format names the unknown state {state!r}; its states are "
                f"{', '.join(names)}.{nearest(state, names)}"
            )
    second = [state.name for state in (*states, *elementwise(known)) if not state.signed]
    for name, value in given.items():
        formats = [*FORMATS, *(MIXES if isinstance(wanted, str) else [FACTORED] if name in second else [])]
        if str(value) not in formats:
            what = "state_format" if isinstance(wanted, str) else "the format of a single state,"
            raise UserError(
                f"{where}: {what} {value!r} is unknown; known are {', '.join(formats)}.{nearest(str(value), formats)}"
            )
    return {state.name: given.get(state.name, DEFAULT_FORMAT) for state in states}


def _role(state: State, states: tuple[State, ...]) -> str:
    if not state.signed:
        return "second"
    if state.residual_of is not None:
        return "residual"
    return "anchor" if any(other.residual_of == state.name for other in states) else "signed"


def format_text(formats: str | Mapping[str, str]) -> str:
    """A state format as records show it: its name, or "m 8bit, v 4bit" for one by state."""
    return formats if isinstance(formats, str) else ", ".join(f"{state} {name}" for state, name in formats.items())


def default_weights(state_format: object) -> str:
    """How weights are kept where nobody says it."""
    return Remainder(0).name if state_format in (LEAN, LEANEST) else DEFAULT_WEIGHTS


def check_weights(value: object, *, where: str) -> None:
    """Raise UserError unless `value` names a way of holding weights."""
    known = [*WEIGHTS, MASTER]
    if value not in known:
        hint = nearest(value, known) if isinstance(value, str) else ""
        raise UserError(f"{where}: weights is {value!r}, but must be one of {', '.join(known)}.{hint}")
