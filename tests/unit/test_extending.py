"""What docs/extending.md shows does what the text says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.optim import AMCS
from toolkit.state.codecs import BLOCK, FORMATS, Codec, decode_blocks, encode_blocks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("plugin", ["lion", "qhadam", "stableadamw", "adafactor", "muon"])
def test_the_documented_rules_are_the_tested_ones(plugin: str) -> None:
    """docs/extending.md shows the very files that the tests of one and of several ranks load."""
    code = (ROOT / "tests" / "plugins" / f"{plugin}.py").read_text()
    body = code[code.index('"""\n\n') + len('"""\n\n') :]
    assert f"```python\n{body}```" in (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture
def codec() -> Iterator[Codec]:
    """The documented codec, registered by the document's own code."""
    section = (ROOT / "docs" / "extending.md").read_text().split("## A codec")[1]
    before, names = dict(FORMATS), {}
    exec(section.split("```python\n")[1].split("```")[0], names)
    yield names["Linear8"]()
    FORMATS.clear()
    FORMATS.update(before)


def test_the_documented_codec_keeps_the_contract(codec: Codec) -> None:
    torch.manual_seed(0)
    x = torch.randn(2048, BLOCK)
    codes, scale = encode_blocks(codec, x)
    back = decode_blocks(codec, codes, scale)
    error = (back - x) / (scale / 127)
    assert error.abs().max() <= 1.001 and abs(error.mean()) < 1e-3
    assert torch.equal(encode_blocks(codec, back)[0], codes)
    zeros = torch.zeros(2, BLOCK)
    assert torch.equal(decode_blocks(codec, *encode_blocks(codec, zeros)), zeros)
    fresh = [torch.zeros(2, spec.per_block, dtype=spec.dtype) for spec in codec.specs()]
    assert torch.equal(decode_blocks(codec, *fresh), zeros)
    assert codec.bytes_per_element() == 1 + 4 / BLOCK


@pytest.mark.parametrize(
    ("state_format", "codecs"),
    [
        ("linear8", ["linear8", "linear8", "root8"]),
        ({"m_slow": "linear8", "m_fast": "4bit"}, ["residual4", "linear8", "root8"]),
    ],
)
def test_the_documented_codec_works_everywhere(codec: Codec, state_format: Any, codecs: list[str]) -> None:
    """In the compiled step, too, and with another state's codes relative to it."""
    moved = {}
    for name in ("fp32", state_format):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.zeros(64, 64))
        optimizer = AMCS([p], alpha=0.5, weight_decay=0.0, state_format=name)
        for _ in range(5):
            p.grad = 1.0 + torch.randn(64, 64, generator=generator)
            optimizer.step()
        moved[str(name)] = p.detach()
    kept = optimizer.begin(optimizer.param_groups[0], p)
    assert kept is not None and kept.function.fallback_reason is None
    layout = optimizer.layout(optimizer.param_groups[0], p.dtype)
    assert [kind.name for kind in layout.codecs] == codecs
    assert optimizer.state_bytes()["m_slow"] == p.numel() * (1 + 4 / BLOCK)
    exact = moved.pop("fp32")
    assert (moved[str(state_format)] - exact).norm() < 0.05 * exact.norm()
