"""Validation loss of every state and weight format against fp32 state with fp32 master weights, on real text.

    python tests/benchmarks/quality.py --train '<fineweb>/fineweb_train.parquet' --val '<fineweb>/fineweb_val.parquet'

Trains Qwen3 of 5M parameters under ZeRO 2 (one rank, bf16), 640 steps by default, each format from the same weights
on the same batches, for several seeds. Prints the table of docs/benchmarks: mean loss, mean of the paired differences
from the fp32 run of the same seed, and twice its standard error. With `--out` results are kept as JSON lines and runs
that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

MAIN = ["fp32", "8bit, bf16+8", "compact, bf16+4", "minimal, bf16+4"]
MICRO_BATCH = 8


def settings_of(name: str) -> dict[str, Any]:
    """Optimizer parameters: "compact, bf16+4", or by state, "m=8bit v=factored, bf16"; others follow, ", mode=single".

    Without weights behind a comma they are "fp32".
    """
    state_format, *more = name.split(", ")
    by_state = dict(one.split("=") for one in state_format.split()) if "=" in state_format else state_format
    others = dict(one.split("=") for one in more[1:])
    return {"state_format": by_state, "weights": more[0] if more else "fp32"} | others


def config(rule: str, lr: float, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A ZeRO 2 config: bf16, clipping at 1, 10 % warm-up, half a cosine to a tenth."""
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "optimizer": {"type": rule, "params": {"lr": lr} | settings},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": steps,
                "warmup_num_steps": max(1, steps // 10),
                "warmup_type": "linear",
                "cos_min_ratio": 0.1,
            },
        },
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 4_194_304, "allgather_bucket_size": 4_194_304},
        "zero_allow_untested_optimizer": True,
    }


def train(model: Any, made: dict[str, Any], steps: int, batches: list[Any], held_out: list[Any]) -> dict[str, float]:
    """Final validation loss and mean training loss of the last 50 steps."""
    import torch

    import toolkit

    engine, *_ = toolkit.initialize(model=model, config=made, total_steps=steps)
    losses = []
    for tokens in batches:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        found = [float(engine(input_ids=tokens, labels=tokens).loss) for tokens in held_out]
    skipped = engine.skipped_steps
    engine.destroy()
    assert skipped == 0
    return {"val": statistics.fmean(found), "train": statistics.fmean(losses[-50:])}


def read(source: str, rows: int, seq_len: int, seed: int) -> list[Any]:
    """Batches of MICRO_BATCH packed sequences."""
    import torch

    from toolkit.data import PackedTokens, load_tokenizer, open_documents

    packed = PackedTokens(open_documents(source), load_tokenizer("python-4k"), seq_len, seed=seed).sequences()
    return list(torch.stack([torch.as_tensor(next(packed)) for _ in range(rows)]).split(MICRO_BATCH))


def summarize(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'':6}{'format':44}{'seeds':>6}{'val loss':>10}{'difference':>12}{'2 s.e.':>9}")
    for rule in dict.fromkeys(found["rule"] for found in results):
        by_format: dict[str, dict[int, float]] = {}
        for found in results:
            if found["rule"] == rule:
                by_format.setdefault(found["format"], {})[found["seed"]] = found["val"]
        exact = by_format.get("fp32", {})
        for name, by_seed in by_format.items():
            pairs = [value - exact[seed] for seed, value in by_seed.items() if seed in exact]
            error = 2 * statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
            mean = statistics.fmean(pairs) if pairs else float("nan")
            loss = statistics.fmean(by_seed.values())
            print(f"{rule:6}{name:44}{len(by_seed):6}{loss:10.4f}{mean:+12.4f}{error:9.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="stdlib", help="as launch/train.py's --data")
    parser.add_argument("--val", required=True)
    parser.add_argument("--rules", nargs="+", default=["AMCS", "SOAM"])
    parser.add_argument("--formats", nargs="+", default=MAIN, metavar="STATE_FORMAT[, WEIGHTS]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--lr", type=float, help="default: 1e-3 for AMCS, the rule's own for others")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from toolkit import models
    from toolkit.run import ranks

    ranks.prepare_environment()
    ranks.start()
    import torch
    from transformers import AutoModelForCausalLM

    done = (
        [json.loads(line) for line in options.out.read_text().splitlines()]
        if options.out and options.out.is_file()
        else []
    )
    held_out = read(options.val, 128, options.seq_len, seed=0)
    shape, _ = models.load_config("qwen3-tiny")
    shape.use_cache = False
    for seed in options.seeds:
        batches = read(options.train, options.steps * MICRO_BATCH, options.seq_len, seed=seed)
        for rule in options.rules:
            for name in options.formats:
                key = {"rule": rule, "format": name, "seed": seed, "steps": options.steps}
                if any(key.items() <= found.items() for found in done):
                    continue
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(shape)
                lr = options.lr or {"AMCS": 1e-3, "SOAM": 8e-3}.get(rule, 1e-3)
                started = time.perf_counter()
                made = config(rule, lr, options.steps, settings_of(name))
                result = train(model, made, options.steps, batches, held_out)
                done.append(key | result | {"seconds": time.perf_counter() - started})
                print(json.dumps(done[-1]), flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(done[-1]) + "\n")
    summarize(done)
    ranks.finish()


if __name__ == "__main__":
    main()
