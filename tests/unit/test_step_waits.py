"""What a step's record takes from the device is read with the record: the host does not wait for it in the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from small_runs import answer_of
from torch import Tensor, nn

from toolkit.optim import AMCS

WORKER = """
import json, sys
from collections import Counter
from pathlib import Path
import torch
import toolkit.train
from toolkit.run import training
from toolkit.run.settings import parse
from toolkit.zero.gradients import HostCopy

folder, data = Path(sys.argv[1]), sys.argv[2]
line = f"--data {data} --model {folder}/model --tokenizer python-4k --eval-every 0 --save-every 0 --seq-len 16"
line += " --steps 4 --micro-batch 1 --memory-profile off --set optimizer.params.compile=false"
both = ["--set", "optimizer.params.alpha=agreement", "--set", "optimizer.params.component_scales=dynamic"]
waits, inside, whole = Counter(), [], training.Run.step

def count(kind, name):
    plain = getattr(kind, name)

    def call(*args, **kwargs):
        waits[name] += bool(inside)  # what is called later, with the record, is not of the step
        return plain(*args, **kwargs)

    setattr(kind, name, call)

for name in ("item", "cpu", "tolist", "numpy", "__float__", "__int__", "__bool__", "nonzero"):
    count(torch.Tensor, name)
count(HostCopy, "wait")

def step(run, number, ledger):
    inside.append(number)
    try:
        return whole(run, number, ledger)
    finally:
        inside.clear()

training.Run.step, found = step, {}
for config in ("amcs_zero2", "amcs_zero3"):
    for name, options in (("fixed", []), ("found", both)):
        waits.clear()
        out = folder / f"{config}-{name}"
        toolkit.train.train(parse([*line.split(), "--config", config, *options, "--run-dir", str(out)]))
        found[out.name] = dict(+waits)
print(json.dumps(found))
"""


def test_what_a_step_finds_makes_the_host_wait_nowhere_in_the_step(tmp_path: Path) -> None:
    waits = answer_of(WORKER, tmp_path)
    for config in ("amcs_zero2", "amcs_zero3"):
        assert waits[f"{config}-found"] == waits[f"{config}-fixed"]
        assert waits[f"{config}-found"]["wait"] == 4, "the norm, once a step"
        lines = (tmp_path / f"{config}-found" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["alpha"] for record in records][0] == 1.0 and len(records) == 4
        scales = {"scale_embedding", "scale_attention", "scale_ffn", "scale_norm"}
        assert all(scales <= set(record) for record in records)
        assert len({record["scale_ffn"] for record in records}) == 4, "each step has its own"


def test_what_is_read_later_is_that_of_its_step_and_one_copy() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
    groups = [
        {"params": list(net["up"].parameters()), "component": "ffn"},
        {"params": list(net["down"].parameters()), "component": "attention"},
    ]
    optimizer = AMCS(groups, alpha="agreement", component_scales="dynamic", compile=False, lr=1e-2)
    copies: list[Tensor] = []

    def copied(found: Tensor) -> Callable[[], Tensor]:
        copies.append(found)
        return lambda: found

    assert optimizer.report_later(copied)() == {} and not copies
    later, at_once = [], []
    for _ in range(5):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter) + 0.1
        optimizer.step()
        later.append(optimizer.report_later(copied))
        at_once.append(optimizer.report())
    assert len(copies) == 5
    assert [read() for read in later] == at_once
    assert set(at_once[0]) == {"alpha", "scale_ffn", "scale_attention"}
    assert len({report["scale_ffn"] for report in at_once}) == 5
