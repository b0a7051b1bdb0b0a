"""What a manifest may say: types, ranges and names, and that its sharding agrees with itself and with the files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from toolkit.optim.rule import COMPONENTS
from toolkit.paths import inside
from toolkit.state.codecs import BLOCK, FACTORED, FORMATS
from toolkit.state.remainders import MASTER, WEIGHTS
from toolkit.state.sharding import Flat, Sharding

RANKS_LIMIT = 1 << 16
SLACK = 16 * BLOCK
"""Elements of padding on each rank, at most: DeepSpeed aligns to a few, this package to a block."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = 1 << 53


def _below(name: str) -> str:
    inside(Path("the checkpoint"), name)
    return name


def _one_of(words: Iterable[str]) -> Callable[[str], str]:
    known = tuple(words)

    def check(word: str) -> str:
        if word not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return word

    return check


Count = Annotated[int, Field(ge=0, le=LARGEST)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
FileName = Annotated[str, AfterValidator(_below)]


class _Strict(BaseModel):
    """Every key is known and of its type: what is not understood is not taken for something else."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Facts(BaseModel):
    """What a run says of itself; later versions may say more."""

    model_config = ConfigDict(extra="allow", strict=True)


class _State(_Strict):
    name: Word
    signed: bool
    residual_of: Word | None
    of: Literal["rows", "columns", "parameter"] | None = None


class _Place(_Strict):
    name: Name
    shape: Annotated[list[Count], Field(max_length=64)]
    offset: Count
    elements_per_rank: Count = 0


class _Flat(_Strict):
    group: Count
    component: Annotated[str, AfterValidator(_one_of(COMPONENTS))]
    elements_per_rank: Count
    dtype: Annotated[str, AfterValidator(_one_of(DTYPES))]
    weights: Annotated[str, AfterValidator(_one_of([*WEIGHTS, MASTER]))]
    state_format: dict[Word, Name]  # a plug-in may bring formats: `unknown_formats`
    parameters: list[_Place]


class _Sharding(_Strict):
    stage: Annotated[int, Field(ge=1, le=3)]
    world_size: Annotated[int, Field(ge=1, le=RANKS_LIMIT)]
    rule: Word | None
    states: Annotated[list[_State], Field(max_length=32)]
    flat_tensors: list[_Flat]

    def unknown_formats(self) -> list[str]:
        """State formats that no codec here has."""
        named = {name for flat in self.flat_tensors for name in flat.state_format.values()}
        return sorted(named - FORMATS.keys() - {FACTORED})


class _File(_Strict):
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Position(_Strict):
    epoch: Count
    window: Count
    index: Count
    offset: Count
    mixed: Count
    skipped: Count = 0
    named: Annotated[list[str], Field(max_length=64)] = []
    replaced: Count = 0
    cut: Count = 0


class _Part(_Facts):
    name: str
    sha256: str


class _Data(_Part):
    part: str
    seq_len: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    windows: list[Count]
    template: str | None = None
    packing: Count | None = None


class _Identity(_Facts):
    __pydantic_extra__: dict[str, _Part] = Field(init=False)

    model: _Part
    tokenizer: _Part
    data: _Data


class _Validation(_Part):
    part: Literal["all", "validation"]
    subset: str | None
    text_column: str
    sequences: Annotated[int, Field(ge=1)]
    packing: Count | None = None


class ManifestFile(_Facts):
    """manifest.json, without its hash."""

    format: int
    step: Count
    block: int
    sharding: _Sharding
    files: dict[FileName, _File]
    position: _Position | None = None
    identity: _Identity | None = None
    validation: _Validation | None = None
    global_batch: Count | None = None
    saved: str | None = None
    versions: dict[str, str] = {}


def disagreement(sharding: Sharding) -> str | None:
    """What in `sharding` contradicts itself, in half a sentence; None where every element has one place.

    What passes needs no more memory than its parameters: padding is bounded.
    """
    names = [state.name for state in sharding.states]
    if len(set(names)) != len(names):
        return "a state appears twice"
    seen: set[str] = set()
    for number, flat in enumerate(sharding.flats):
        if flat.dtype not in DTYPES:
            return f"flat tensor {number} is {flat.dtype}"
        if not flat.formats.keys() <= set(names):
            return f"flat tensor {number} has formats of {', '.join(flat.formats)}"
        if any(state.of is not None and flat.formats[state.name] != "fp32" for state in sharding.kept(number)):
            return f"flat tensor {number} has states of rows, columns or parameters that are not fp32"
        if any(state.residual_of not in {None, *flat.formats} for state in sharding.layout(number).states):
            return f"a state of flat tensor {number} is a residual of one that there is not"
        if any(state.signed for _, state in sharding.layout(number).factored):
            return f"flat tensor {number} has rows and columns of a state that is no second moment"
        problem = _overlap(sharding, number, flat) or _alignment(sharding, number, flat)
        if problem is not None:
            return problem
        for place in flat.places:
            if place.name in seen:
                return f"{place.name!r} appears twice"
            seen.add(place.name)
    return None


def _overlap(sharding: Sharding, number: int, flat: Flat) -> str | None:
    world, three = sharding.world_size, sharding.stage == 3
    end = 0
    for place in sorted(flat.places, key=lambda place: (place.offset, place.numel)):
        if place.offset < end:
            return f"{place.name!r} overlaps the parameter before it in flat tensor {number}"
        if three and not 0 <= place.share * world - place.numel <= SLACK * world:
            return f"{place.name!r} has {place.numel} elements, {place.share} on each of {world} ranks"
        end = place.offset + (place.share if three else place.numel)
    there = flat.size if three else flat.size * world
    if not end <= there <= end + SLACK * (1 if three else world):
        return f"flat tensor {number} has room for {there} elements, and its parameters end at {end}"
    return None


def _alignment(sharding: Sharding, number: int, flat: Flat) -> str | None:
    """Blocks of codes must be whole on each rank."""
    if not sharding.layout(number).blocked:
        return None
    small = next((place.name for place in flat.places if len(place.shape) < 2), None)
    if small is not None:
        return f"{small!r} has compressed state, which only matrices have"
    cuts = [edge for place in flat.places for edge in (place.offset, place.share)]
    edges = cuts if sharding.stage == 3 else [flat.size]
    return f"flat tensor {number} cuts a block of {BLOCK} elements" if any(edge % BLOCK for edge in edges) else None


def claimed_bytes(sharding: Sharding) -> int:
    """Bytes of all weights, which are in the files as they are."""
    return sum(place.numel * flat.torch_dtype.itemsize for flat in sharding.flats for place in flat.places)
