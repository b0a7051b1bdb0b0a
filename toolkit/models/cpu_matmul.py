"""bf16 matrix products on CPUs that have no instructions for them: computed in fp32, from bf16 to bf16.

Without AVX-512 torch multiplies bf16 matrices in a scalar loop, seven to a hundred times slower than fp32 ones. Here
`install()` takes the place of torch's CPU kernels of `mm`, `addmm`, `bmm`, `baddbmm`, `addbmm` and of attention, below
autograd, so that models need not know. Operands are widened to fp32, multiplied, and the result is rounded once;
weights, activations, gradients and what autograd keeps stay bf16. Other types go to torch's own kernels.

Widening is done by tiles: at most `TRANSIENT` bytes exist in fp32 at a time, whatever the shapes.
"""

from __future__ import annotations

import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import UserError, nearest

VARIABLE = "LEANSTATE_CPU_MATMUL"
"""Environment variable: `native` and `fp32` force the one or the other, `auto` (the default) looks at the CPU."""

EDGE = 2048
"""Rows and columns of a tile. Widening a tile takes a few percent of the time of a product of this size."""

TRANSIENT = 3 * EDGE * EDGE * 4
"""Most bytes that a product holds in fp32: a tile of each operand and of the result, 50 MB. Attention takes as many
heads at a time as fit, and one at least."""

_SLOW = 4.0
"""Times the fp32 product's time from which on bf16 counts as slow. Seen: 0.3 to 1.2, or 7 to 100."""

Call = Callable[..., Any]


def computes_in_fp32() -> bool:
    """Whether bf16 products on this machine's CPU are to be computed in fp32; decided once a process.

    Raises UserError if the environment variable has another value than the three.
    """
    return _decide(os.environ.get(VARIABLE, "auto"))


@functools.cache
def _decide(wanted: str) -> bool:
    choices = ("auto", "native", "fp32")
    if wanted not in choices:
        raise UserError(f"{VARIABLE} is {wanted!r}, but must be one of {', '.join(choices)}.{nearest(wanted, choices)}")
    if wanted != "auto":
        return wanted == "fp32"
    # What torch knows comes first: a timing alone could be wrong on a machine that is busy.
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported() and _measured_slow()


def _measured_slow() -> bool:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for one another where other processes run
    times: dict[torch.dtype, float] = {}
    for _ in range(5):
        for kind in (torch.float32, torch.bfloat16):
            x = torch.ones(64, 1024, dtype=kind)
            start = time.perf_counter()
            torch.mm(x, x.view(1024, 64))
            times[kind] = min(times.get(kind, math.inf), time.perf_counter() - start)
    torch.set_num_threads(threads)
    return times[torch.bfloat16] > _SLOW * times[torch.float32]


_library: torch.library.Library | None = None


def install() -> bool:
    """Let this process compute bf16 products on the CPU in fp32, if `computes_in_fp32()`; returns whether it does."""
    global _library
    if not computes_in_fp32():
        return False
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is replaced
            for name in _KERNELS:
                _library.impl(name, _dispatch(name), "CPU", with_keyset=True, allow_override=True)
    return True


def uninstall() -> None:
    """Give torch its own kernels back."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def _dispatch(name: str) -> Call:
    kernel, original = _KERNELS[name], torch.library.get_kernel(f"aten::{name}", "CPU")

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if _takes(name, (*args, *kwargs.values())):
            return kernel(*args, **kwargs)
        return original.call_boxed(keyset, *args, **kwargs)

    return call


def _takes(name: str, args: Sequence[Any]) -> bool:
    """Whether the kernel for `name` is for these arguments: bf16 matrices."""
    # Attention's first three; after them come masks and normalisers of other types.
    matrices = args[:3] if "attention" in name else args
    return all(x.dtype == torch.bfloat16 for x in matrices if isinstance(x, Tensor))


# ---- products ---------------------------------------------------------------------------------------------------


def _tiles(size: int) -> Iterator[slice]:
    return (slice(start, min(start + EDGE, size)) for start in range(0, size, EDGE))


def _product(a: Tensor, b: Tensor, out: Tensor, base: Tensor | None, beta: float, alpha: float) -> None:
    """out <- beta base + alpha a @ b, rounded once: a [m, k], b [k, n], base of a shape that expands to [m, n]."""
    (m, k), n = a.shape, b.shape[1]
    base = None if base is None or beta == 0 else base.expand(m, n)
    for rows in _tiles(m):
        for columns in _tiles(n):
            result: Tensor | None = None
            for inner in _tiles(k):
                left, right = a[rows, inner].float(), b[inner, columns].float()
                result = left @ right if result is None else result.addmm_(left, right)
                del left, right
            target = out[rows, columns]
            if result is None:  # k is 0
                result = torch.zeros(target.shape)
            _finish(result, None if base is None else base[rows, columns], beta, alpha, target)


def _finish(result: Tensor, base: Tensor | None, beta: float, alpha: float, target: Tensor) -> None:
    """target <- beta base + alpha result, rounded; changes `result`, fp32."""
    if alpha != 1:
        result *= alpha
    if base is not None:
        result += base if beta == 1 else beta * base.float()
    target.copy_(result)


def _together(m: int, k: int, n: int) -> int:
    """Matrices of a batch that are multiplied at a time; below two each goes by tiles of its own."""
    return EDGE * EDGE // max(m * k, k * n, m * n, 1)


def _batch_product(a: Tensor, b: Tensor, out: Tensor, base: Tensor | None, beta: float, alpha: float) -> None:
    """`_product` for each matrix of a batch: a [batch, m, k], b [batch, k, n]."""
    batch, m, k = a.shape
    n = b.shape[2]
    base = None if base is None or beta == 0 else base.expand(batch, m, n)
    together = _together(m, k, n)
    if together < 2 or k == 0:
        for i in range(batch):
            _product(a[i], b[i], out[i], None if base is None else base[i], beta, alpha)
        return
    for start in range(0, batch, together):
        some = slice(start, start + together)
        result = torch.bmm(a[some].float(), b[some].float())
        _finish(result, None if base is None else base[some], beta, alpha, out[some])
        del result  # before the next one is made


def workspace(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """fp32 elements of each temporary tensor that the kernel for the operation `func` holds at its peak.

    Empty for operations and types that stay torch's own.
    """
    name = func._schema.name.removeprefix("aten::")
    if name not in _KERNELS or not _takes(name, args):
        return []
    matrices = [x for x in args if isinstance(x, Tensor)]
    if "attention" in name:
        backward = name.endswith("backward")
        query, key = matrices[1:3] if backward else matrices[:2]
        sequences, heads = _share(query, key)
        one = sequences * heads * query.shape[3]
        q, kv = one * (query.shape[1] // key.shape[1]) * query.shape[2], one * key.shape[2]
        copies = [q, q, q, q, kv, kv, kv, kv] if backward else [q, q, kv, kv]
        mask = (kwargs or {}).get("attn_mask")
        return copies if mask is None else [*copies, min(sequences, mask.shape[0]) * mask[0].numel()]
    a, b = matrices[-2:]
    if a.dim() == 3:
        batch, m, k = a.shape
        n = b.shape[2]
        together = min(_together(m, k, n), batch)
        if together >= 2:
            return [together * size for size in (m * k, k * n, m * n)]
    m, k, n = (min(size, EDGE) for size in (*a.shape[-2:], b.shape[-1]))
    return [m * k, k * n, m * n]


def _mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _addmm(None, a, b, out=out)


def _addmm(
    base: Tensor | None, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({_by(a)} and {_by(b)})")
    return _into(out, (a.shape[0], b.shape[1]), (a, b), lambda target: _product(a, b, target, base, beta, alpha))


def _bmm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _baddbmm(None, a, b, out=out)


def _baddbmm(
    base: Tensor | None, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise RuntimeError(f"batch1 and batch2 shapes cannot be multiplied ({_by(a)} and {_by(b)})")
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return _into(out, shape, (a, b), lambda target: _batch_product(a, b, target, base, beta, alpha))


def _addbmm(
    base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    # The sum over the batch is a product over the batch and the inner dimension together.
    left, right = a.transpose(0, 1).reshape(a.shape[1], -1), b.reshape(-1, b.shape[2])
    return _addmm(base, left, right, beta=beta, alpha=alpha, out=out)


def _in_place(kernel: Call) -> Call:
    def call(base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        result: Tensor = kernel(base, a, b, beta=beta, alpha=alpha, out=base)
        return result

    return call


def _into(
    out: Tensor | None, shape: tuple[int, ...], operands: Sequence[Tensor], fill: Callable[[Tensor], None]
) -> Tensor:
    """The result of `shape` that `fill` writes, in `out` if one is given."""
    if out is None or any(torch._C._overlaps(out, x) for x in operands):
        result = torch.empty(shape, dtype=torch.bfloat16)
        fill(result)
        return result if out is None else out.resize_(shape).copy_(result)
    if out.shape != shape:
        out.resize_(shape)
    fill(out)
    return out


def _by(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


# ---- attention --------------------------------------------------------------------------------------------------


def _share(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Sequences, and heads of keys, that attention works on at a time."""
    sequences, heads = key.shape[:2]
    # Backward: query, output and their gradients, key, value and theirs.
    head = 4 * (query.shape[1] // heads * query.shape[2] + key.shape[2]) * query.shape[3]
    together = max(1, TRANSIENT // 4 // max(head, 1))
    return (min(sequences, together // heads), heads) if together >= heads else (1, together)


def _shares(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of sequences, of heads of queries and of heads of keys (several queries' heads may share one)."""
    sequences, heads = _share(query, key)
    group = query.shape[1] // key.shape[1]
    for start in range(0, key.shape[0], sequences):
        for head in range(0, key.shape[1], heads):
            yield (
                slice(start, start + sequences),
                slice(head * group, (head + heads) * group),
                slice(head, head + heads),
            )


def _mask(mask: Tensor | None, some: slice, heads: slice) -> Tensor | None:
    if mask is None or mask.dim() < 4:
        return mask if mask is None else mask.float()
    mask = mask[some] if mask.shape[0] > 1 else mask
    return (mask[:, heads] if mask.shape[1] > 1 else mask).float()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    sequences, heads, length, _ = query.shape
    out = torch.empty_like(query)
    normaliser = torch.empty(sequences, length, heads).transpose(1, 2)
    for some, queries, keys in _shares(query, key):
        found, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[some, queries].float(),
            key[some, keys].float(),
            value[some, keys].float(),
            dropout_p,
            is_causal,
            attn_mask=_mask(attn_mask, some, queries),
            scale=scale,
        )
        out[some, queries] = found
        normaliser[some, queries] = norm
    return out, normaliser


def _attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))
    for some, queries, keys in _shares(query, key):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient[some, queries].float(),
            query[some, queries].float(),
            key[some, keys].float(),
            value[some, keys].float(),
            out[some, queries].float(),
            logsumexp[some, queries],
            dropout_p,
            is_causal,
            attn_mask=_mask(attn_mask, some, queries),
            scale=scale,
        )
        of_query[some, queries], of_key[some, keys], of_value[some, keys] = found
    return of_query, of_key, of_value


_KERNELS: dict[str, Call] = {
    "mm": _mm,
    "mm.out": _mm,
    "addmm": _addmm,
    "addmm.out": _addmm,
    "addmm_": _in_place(_addmm),
    "bmm": _bmm,
    "bmm.out": _bmm,
    "baddbmm": _baddbmm,
    "baddbmm.out": _baddbmm,
    "baddbmm_": _in_place(_baddbmm),
    "addbmm": _addbmm,
    "addbmm.out": _addbmm,
    "addbmm_": _in_place(_addbmm),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
