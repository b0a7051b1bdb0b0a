"""The C++ that Inductor writes for the step on a CPU: one loop over blocks, in vector registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_AVX2_LANES = 8
"""Lanes at a time where a register holds 8 of fp32: what a chain of operations has made stays in registers. Of int8 or
bf16 that is a part of a register, which ATen loads, stores and converts by way of memory, where the load waits for the
store; the instructions below do it in registers. With AVX-512, which loads parts under a mask, Inductor's own choice is
the fastest."""

_INT8, _UINT8, _BF16, _FP16 = torch.int8, torch.uint8, torch.bfloat16, torch.float16
_INT32, _FP32 = torch.int32, torch.float32
_BYTES = (_INT8, _UINT8)

_PART = "_mm256_castsi256_si128({x})"
_WIDER = {_INT8: f"_mm256_cvtepi8_epi32({_PART})", _UINT8: f"_mm256_cvtepu8_epi32({_PART})"}
_LOW_BYTES = (  # of each number of 32 bits, without saturation, in the lowest 8 bytes
    "_mm256_permutevar8x32_epi32(_mm256_shuffle_epi8({x}, _mm256_set1_epi32(0x0c080400)), "
    "_mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4))"
)
_CONVERT: dict[tuple[torch.dtype, torch.dtype], str] = {
    **{(byte, _INT32): _WIDER[byte] for byte in _BYTES},
    **{(byte, _FP32): f"_mm256_cvtepi32_ps({_WIDER[byte]})" for byte in _BYTES},
    **{(_INT32, byte): _LOW_BYTES for byte in _BYTES},
    **{(_FP32, byte): _LOW_BYTES.format(x="_mm256_cvttps_epi32({x})") for byte in _BYTES},
    (_BF16, _FP32): f"_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32({_PART}), 16))",
    (_FP16, _FP32): f"_mm256_cvtph_ps({_PART})",
    (_FP32, _BF16): "_mm256_castsi128_si256(at::vec::cvtfp32_bf16({x}))",
    (_FP32, _FP16): "_mm256_castsi128_si256(at::vec::cvtfp32_fp16({x}))",
}
"""Of _AVX2_LANES lanes, by the types from and to."""
_UPPER_HALVES = (  # of each number of 32 bits: bf16, where the lower half is 0
    "_mm256_permute4x64_epi64(_mm256_packus_epi32({x}, {x}), 0xd8)".format(
        x="_mm256_srli_epi32(_mm256_castps_si256({x}), 16)"
    )
)

_LOAD = {
    1: "_mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>({place})))",
    2: "_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>({place})))",
}
_STORE = {
    1: f"_mm_storel_epi64(reinterpret_cast<__m128i*>({{place}}), {_PART});",
    2: f"_mm_storeu_si128(reinterpret_cast<__m128i*>({{place}}), {_PART});",
}
"""Of _AVX2_LANES lanes, by the bytes of each."""


@contextmanager
def vector_code(*, avx2: bool) -> Iterator[None]:
    """Let C++ that Inductor writes be one loop over blocks that works in vector registers.

    * What there is one of in a block is computed for one block at a time. Inductor would take 8 or 16 blocks at a time,
      in a loop of its own. Loops that take the same steps it joins, so that a block is read once, and not once for its
      largest values and again, from memory, for all else.
    * Vectors are seen as another type where they are. Inductor would store them, and load them again.
    * Numbers of lanes are a constant vector and a number, not 16 sums of single numbers.
    * With AVX2, vectors have _AVX2_LANES lanes, and are loaded, converted and stored in registers.
    """
    from torch._inductor.codegen.common import IndentedBuffer
    from torch._inductor.codegen.cpp import CppVecKernel, CppVecOverrides, TilingSelect, cexpr_index
    from torch._inductor.virtualized import V

    select, convert = TilingSelect.select_tiling, CppVecKernel.get_to_dtype_expr
    load, store = CppVecKernel._get_vec_load_line, CppVecKernel._get_store_line

    def select_tiling(self: Any, functions: Any, sizes: Any) -> Any:
        factors, indices, *rest = select(self, functions, sizes)
        if all(len(size) == 1 and size[0].is_symbol and not reduced for size, reduced in sizes):  # one for each block
            factors, indices = [], []
        elif avx2 and len(factors) == 1 and indices == [1]:  # along a block
            factors = [_AVX2_LANES]
        return factors, indices, *rest

    def to_dtype_bitcast(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> str:
        return f"__builtin_bit_cast({V.kernel._get_vec_type(dtype)}, {x})"

    def arange(self: Any, index: Any, stride: Any) -> Any:
        vector = self._get_vec_type(index.dtype)
        lane = self.cse.generate(self.compute, f"{vector}::arange(0, {stride}) + {vector}({index})", dtype=index.dtype)
        lane.is_vec = True
        return lane

    def in_registers(self: Any) -> bool:
        return avx2 and self.tiling_factor == self.num_elems == _AVX2_LANES

    def get_to_dtype_expr(self: Any, src: Any, dtype: Any, src_dtype: Any, rounding: bool = False) -> Any:
        text = _CONVERT.get((src_dtype, dtype)) if src.is_vec and not rounding and in_registers(self) else None
        if text is None:
            return convert(self, src, dtype, src_dtype, rounding)
        if dtype == _BF16 and _lower_half_is_zero(V.interpreter.current_node):
            text = _UPPER_HALVES
        return f"{self._get_vec_type(dtype)}({text.format(x=src)})"

    def _get_vec_load_line(self: Any, var: Any, index: Any, dtype: Any, load_mask: Any = None) -> Any:
        text = _LOAD.get(dtype.itemsize) if dtype != torch.bool and load_mask is None and in_registers(self) else None
        if text is None:
            return load(self, var, index, dtype, load_mask)
        return f"{self._get_vec_type(dtype)}({text.format(place=f'{var} + {cexpr_index(index)}')})"

    def _get_store_line(self: Any, value: Any, var: Any, index: Any, dtype: Any, accu_store: bool = False) -> Any:
        text = _STORE.get(dtype.itemsize) if dtype != torch.bool and not accu_store and in_registers(self) else None
        if text is None or self._try_get_const_stride(index, self.itervars[self.tiling_idx]) != 1:
            return store(self, value, var, index, dtype, accu_store)
        code = IndentedBuffer()
        code.writeline(text.format(place=f"{var} + {cexpr_index(index)}", x=value))
        return code

    with ExitStack() as stack:
        for owner, value in (
            (TilingSelect, select_tiling),
            (CppVecOverrides, staticmethod(to_dtype_bitcast)),
            (CppVecKernel, arange),
            (CppVecKernel, get_to_dtype_expr),
            (CppVecKernel, _get_vec_load_line),
            (CppVecKernel, _get_store_line),
        ):
            stack.enter_context(_replaced(owner, value.__name__, value))
        yield


def _lower_half_is_zero(conversion: torch.fx.Node) -> bool:
    """Whether what is converted is a whole number shifted left by 16, seen as fp32: there is nothing to round."""
    seen = conversion.args[1]
    if not isinstance(seen, torch.fx.Node) or seen.target != "to_dtype_bitcast":
        return False
    shifted = seen.args[1]
    if not isinstance(shifted, torch.fx.Node) or shifted.target != "bitwise_left_shift":
        return False
    by = shifted.args[2]
    return isinstance(by, torch.fx.Node) and by.target == "constant" and by.args[1:2] == (16,)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
