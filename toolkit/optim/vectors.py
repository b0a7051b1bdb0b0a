"""The C++ that Inductor writes for the step on a CPU: one loop over blocks, in vector registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_AVX2_TILE = 32
"""Lanes at a time where a register holds 8 of fp32: as many as it holds of int8. Inductor takes 8 or 16; then parts of
registers are loaded by way of memory, and the load waits for the store. With AVX-512, which loads parts under a mask,
Inductor's own choice is the fastest."""

# Conversions of _AVX2_TILE lanes. ATen's are by way of memory, one number after the other. Packing works within halves
# of a register, whose order is mended last.
_WIDEN = """[&] {{
    at::vec::VectorizedN<{to}, 4> y;
    const __m256i bytes = {x};
    y[0] = at::vec::convert<{to}>(at::vec::Vectorized<{of}>(bytes));
    y[1] = at::vec::convert<{to}>(at::vec::Vectorized<{of}>(_mm256_permute4x64_epi64(bytes, 1)));
    y[2] = at::vec::convert<{to}>(at::vec::Vectorized<{of}>(_mm256_permute4x64_epi64(bytes, 2)));
    y[3] = at::vec::convert<{to}>(at::vec::Vectorized<{of}>(_mm256_permute4x64_epi64(bytes, 3)));
    return y;
}}()"""
_NARROW = """[&] {{
    const __m256i mask = _mm256_set1_epi32(255);
    const auto whole = [&](int i) {{ return _mm256_and_si256(at::vec::convert<int32_t>({x}[i]), mask); }};
    const __m256i low = _mm256_packs_epi32(whole(0), whole(1)), high = _mm256_packs_epi32(whole(2), whole(3));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return at::vec::Vectorized<{to}>(_mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
}}()"""
_WHOLE = """[&] {{
    at::vec::VectorizedN<{to}, 4> y;
    for (int i = 0; i < 4; i++) y[i] = at::vec::convert<{to}>({x}[i]);
    return y;
}}()"""
_FROM_HALF = """[&] {{
    at::vec::VectorizedN<{to}, 4> y;
    for (int i = 0; i < 2; i++) {{
        const auto two = at::vec::convert<{to}, 2, {of}, 1>({x}[i]);
        y[2 * i] = two[0];
        y[2 * i + 1] = two[1];
    }}
    return y;
}}()"""
_TO_HALF = """[&] {{
    at::vec::VectorizedN<{to}, 2> y;
    for (int i = 0; i < 2; i++) {{
        y[i] = at::vec::convert<{to}, 1, {of}, 2>(at::vec::VectorizedN<{of}, 2>({x}[2 * i], {x}[2 * i + 1]));
    }}
    return y;
}}()"""

_BYTES, _WORDS, _HALVES = (torch.int8, torch.uint8), (torch.int32, torch.float32), (torch.bfloat16, torch.float16)
_AVX2: dict[tuple[torch.dtype, torch.dtype], str] = {
    **{(byte, word): _WIDEN for byte in _BYTES for word in _WORDS},
    **{(word, byte): _NARROW for byte in _BYTES for word in _WORDS},
    **{(half, torch.float32): _FROM_HALF for half in _HALVES},
    **{(torch.float32, half): _TO_HALF for half in _HALVES},
    (torch.float32, torch.int32): _WHOLE,
    (torch.int32, torch.float32): _WHOLE,
}
"""By the types from and to."""


@contextmanager
def vector_code(*, avx2: bool) -> Iterator[None]:
    """Let C++ that Inductor writes be one loop over blocks that works in vector registers.

    * What there is one of in a block is computed for one block at a time. Inductor would take 8 or 16 blocks at a time,
      in a loop of its own. Loops that take the same steps it joins, so that a block is read once, and not once for its
      largest values and again, from memory, for all else.
    * Vectors are seen as another type where they are. Inductor would store them, and load them again.
    * Numbers of lanes are a constant vector and a number, not 16 sums of single numbers.
    * With AVX2, vectors have at least _AVX2_TILE lanes, and are converted in registers.
    """
    from torch._inductor.codegen.cpp import DTYPE_TO_CPP, CppVecKernel, CppVecOverrides, TilingSelect
    from torch._inductor.virtualized import V

    select, convert = TilingSelect.select_tiling, CppVecKernel.get_to_dtype_expr

    def select_tiling(self: Any, functions: Any, sizes: Any) -> Any:
        factors, indices, *rest = select(self, functions, sizes)
        if all(len(size) == 1 and size[0].is_symbol and not reduced for size, reduced in sizes):  # one for each block
            factors, indices = [], []
        elif len(factors) == 1 and indices == [1]:  # along a block
            factors = [max(factors[0], _AVX2_TILE if avx2 else 0)]
        return factors, indices, *rest

    def to_dtype_bitcast(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> str:
        return f"__builtin_bit_cast({V.kernel._get_vec_type(dtype)}, {x})"

    def arange(self: Any, index: Any, stride: Any) -> Any:
        vector = self._get_vec_type(index.dtype)
        lane = self.cse.generate(self.compute, f"{vector}::arange(0, {stride}) + {vector}({index})", dtype=index.dtype)
        lane.is_vec = True
        return lane

    def get_to_dtype_expr(self: Any, src: Any, dtype: Any, src_dtype: Any, rounding: bool = False) -> Any:
        text = _AVX2.get((src_dtype, dtype)) if avx2 and src.is_vec and not rounding else None
        if text is None or self.tiling_factor != _AVX2_TILE:
            return convert(self, src, dtype, src_dtype, rounding)
        return " ".join(text.format(x=src, to=DTYPE_TO_CPP[dtype], of=DTYPE_TO_CPP[src_dtype]).split("\n"))

    with ExitStack() as stack:
        for owner, value in (
            (TilingSelect, select_tiling),
            (CppVecOverrides, staticmethod(to_dtype_bitcast)),
            (CppVecKernel, arange),
            (CppVecKernel, get_to_dtype_expr),
        ):
            stack.enter_context(_replaced(owner, value.__name__, value))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
