"""Everything that a DeepSpeed engine holds, by name: what a memory report calls weights, state or buckets.

Reads the attributes of DeepSpeed 0.19.8's optimizer wrappers (stage_1_and_2.py, stage3.py, fp16/, bf16_optimizer.py);
one that is missing is passed over, and what it would have named is "other". This is no walk over groups (`shards.py`):
wrappers without shards are looked at as well, and a tensor needs a name here, not its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from toolkit.records import categories as c
from toolkit.records.by_category import Named
from toolkit.state.files import lies_in_file


def inventory(engine: Any) -> Iterator[Named]:
    """What `engine` holds in memory now. Several names may share one storage; the first one is the best.

    A plain (module, optimizer) pair works as well: an object with `module` and `basic_optimizer`.
    """
    yield from _weights(engine)
    yield from _states(engine)
    yield from gradients(engine)
    yield from _buckets(getattr(engine, "optimizer", None))


def _weights(engine: Any) -> Iterator[Named]:
    # Stages 1 and 2 lay the parameters of a group out in one tensor.
    storages: dict[int, tuple[Tensor, list[str]]] = {}
    for name, parameter in engine.module.named_parameters():
        own = getattr(parameter, "ds_tensor", None)
        tensor = parameter.data if own is None else own
        storages.setdefault(tensor.untyped_storage()._cdata, (tensor, []))[1].append(name)
        if own is not None and parameter.data.numel() > own.numel():
            yield c.GATHERED, name, parameter.data
    for tensor, names in storages.values():
        yield c.WEIGHTS, names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", tensor
    for name, buffer in engine.module.named_buffers():
        yield c.WEIGHTS, name, buffer
    wrapper = getattr(engine, "optimizer", None)
    for attribute in ("bit16_groups_flat", "fp16_partitioned_groups_flat", "lp_param_buffer"):
        for tensor in _tensors(getattr(wrapper, attribute, None)):
            yield c.WEIGHTS, attribute, tensor
    for attribute in (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups",
        "fp32_groups_flat_partition",
        "fp32_groups_flat",
    ):
        for tensor in _tensors(getattr(wrapper, attribute, None)):
            # Where they are the weights themselves, those were first; with offload, their host copy.
            wide = tensor.dtype == torch.float32
            yield (c.MASTER if wide else c.WEIGHTS), attribute if wide else "weights to step on", tensor


def _states(engine: Any) -> Iterator[Named]:
    basic = getattr(engine, "basic_optimizer", None)
    groups = {
        id(parameter): f"group {number}" + (f" ({group['component']})" if "component" in group else "")
        for number, group in enumerate(getattr(basic, "param_groups", ()))
        for parameter in group["params"]
    }
    for parameter, held in getattr(basic, "state", {}).items():
        for key, value in held.items():
            if isinstance(value, Tensor) and value.dim() > 0 and not lies_in_file(value):
                name = f"{key} of {groups[id(parameter)]}" if id(parameter) in groups else key
                yield c.category_of_state(key), name, value


def gradients(engine: Any) -> Iterator[Named]:
    """Gradients wherever they wait for the step."""
    for name, parameter in engine.module.named_parameters():
        if parameter.grad is not None:
            yield c.GRADIENTS, f"gradient of {name}", parameter.grad
    wrapper = getattr(engine, "optimizer", None)
    for attribute in (
        "_held",
        "_local",
        "_unapplied",
        "_host_gradients",
        "averaged_gradients",
        "all_grad_tensors",
        "grad_partitions_flat_buffer",
        "fp32_groups_gradients_flat",
        "grads_in_partition",
    ):
        for tensor in _tensors(getattr(wrapper, attribute, None)):
            yield c.GRADIENTS, attribute, tensor
    for attribute in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups"):
        for tensor in _tensors(getattr(wrapper, attribute, None)):
            if tensor.grad is not None:
                yield c.GRADIENTS, f"gradient of {attribute}", tensor.grad


def _buckets(wrapper: Any) -> Iterator[Named]:
    for bucket in getattr(wrapper, "ipg_buckets", {}).values():
        for tensor in _tensors(getattr(bucket, "buffer", None)):
            yield c.BUCKETS, "reduction bucket", tensor
    for attribute in ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload"):
        for tensor in _tensors(getattr(wrapper, attribute, None)):
            yield c.BUCKETS, attribute, tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
