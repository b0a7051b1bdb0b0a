"""Threads that tokenize: tokens a second by their number, in turn, and what the calling thread does alone.

    python tests/benchmarks/tokenizer_threads.py '<fineweb>/fineweb_train.parquet' 1,2 7

Times are of the first 3,200 sequences of 256 tokens. The last figure is the calling thread's share of the processor
time, which no number of threads makes less: reading, packing, and arrays of what the threads have found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from statistics import quantiles

SEQUENCES, SEQ_LEN = 3200, 256


def measure(source: str) -> None:
    """A measurement for each line of stdin, after one that does not count."""
    from toolkit.data import PackedTokens, load_tokenizer, open_documents

    packed = PackedTokens(open_documents(source), load_tokenizer("mistral-32k"), SEQ_LEN, seed=0)
    packed.require(SEQUENCES // 10)
    for _ in sys.stdin:
        wall, alone, together = time.perf_counter(), time.thread_time(), time.process_time()
        read = len(packed.first_pass(SEQUENCES))
        wall, alone, together = time.perf_counter() - wall, time.thread_time() - alone, time.process_time() - together
        print(json.dumps([read * SEQ_LEN / wall, alone / together]), flush=True)


def main(source: str, numbers: str = "1,2", rounds: str = "7") -> None:
    readers: dict[str, subprocess.Popen[str]] = {}
    for threads in numbers.split(","):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, __file__, "--measure", source]
        pipe = subprocess.PIPE
        readers[threads] = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    found: dict[str, list[list[float]]] = {threads: [] for threads in readers}
    for _ in range(int(rounds)):
        for threads, reader in readers.items():
            assert reader.stdin is not None and reader.stdout is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
            found[threads].append(json.loads(reader.stdout.readline()))
    for reader in readers.values():
        reader.communicate()
    print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    first = next(iter(found.values()))
    for threads, figures in found.items():
        ratio = quantiles([own[0] / base[0] for own, base in zip(figures, first, strict=True)], method="inclusive")
        rate, alone = (quantiles(values, method="inclusive")[1] for values in zip(*figures, strict=True))
        print(
            f"{threads} threads: {rate:,.0f} tokens/s, {ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f}) times the "
            f"first's; {alone:.1%} of the processor time in the calling thread"
        )


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(sys.argv[2])
    else:
        main(*sys.argv[1:])
