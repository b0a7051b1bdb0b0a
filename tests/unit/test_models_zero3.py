"""Models built under ZeRO stage 3, in processes of their own: deepspeed changes torch for good."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from small_models import qwen3

from toolkit.models import build_model

DIGEST = """
import contextlib, hashlib, torch

def digest(hf, gathered=contextlib.nullcontext):
    named = [*hf.named_parameters(remove_duplicate=False), *hf.named_buffers()]
    result = {}
    for name, tensor in named:
        with gathered(tensor):
            data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
            result[name] = hashlib.sha256(data).hexdigest()
    return result
"""

WORKER = (
    DIGEST
    + """
import json, sys
import deepspeed
from toolkit.models import build_model
from toolkit.zero import shared_memory

shared_memory.leave_out()  # its extension is compiled for two minutes
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
world, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
config = {"train_batch_size": world, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
results = []
for folder, load in json.loads(sys.argv[1]):
    model = build_model(folder, dtype=torch.bfloat16, seed=11, zero3_config=config, from_checkpoint=load)
    results.append(
        {
            "digest": digest(model.hf, deepspeed.zero.GatheredParameters),
            "held": sum(p.ds_tensor.numel() for p in model.parameters()),
            "tied": model.hf.lm_head.weight is model.hf.model.embed_tokens.weight,
        }
    )
if rank == world - 1:
    open(sys.argv[2], "w").write(json.dumps(results))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
)


def run_two_ranks(worker: Path, *arguments: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            log, _ = process.communicate(timeout=300)
            assert process.returncode == 0, log
    finally:
        for process in ranks:
            process.kill()


def test_zero3_holds_the_same_bits_in_parts(tmp_path: Path) -> None:
    tied = qwen3(tmp_path / "tied", tie_word_embeddings=True)
    untied = qwen3(tmp_path / "untied")
    build_model(tied, dtype=torch.bfloat16, seed=3).hf.save_pretrained(tied)
    cases = [(tied, False), (untied, False), (tied, True)]
    worker, out = tmp_path / "worker.py", tmp_path / "out.json"
    worker.write_text(WORKER)
    run_two_ranks(worker, json.dumps(cases), str(out))
    scope: dict[str, Any] = {}
    exec(DIGEST, scope)
    for (folder, load), result in zip(cases, json.loads(out.read_text()), strict=True):
        plain = build_model(folder, dtype=torch.bfloat16, seed=11, from_checkpoint=load)
        assert result["digest"] == scope["digest"](plain.hf)
        assert result["tied"] == (folder == tied)
        total = sum(parameter.numel() for parameter in plain.parameters())
        assert total / 2 <= result["held"] <= total / 2 + len(result["digest"])  # padding: one element each
