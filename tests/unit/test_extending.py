"""What docs/extending.md shows does what the text says."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from small_checkpoints import call, cut, rewrite
from torch import Tensor, nn
from typer.testing import CliRunner

from toolkit.cli import app
from toolkit.config import load_config, validate
from toolkit.errors import UserError
from toolkit.optim import AMCS, RULES, NonNegative, Rule, State, as_optimizer
from toolkit.plugins import import_plugin
from toolkit.state.codecs import BLOCK, FORMATS, Codec, decode_blocks, encode_blocks

ROOT = Path(__file__).parents[2]
LION = ROOT / "tests" / "plugins" / "lion.py"


@pytest.fixture
def registered() -> Iterator[None]:
    """Rules and codecs that a test registers are gone after it."""
    rules, formats = dict(RULES), dict(FORMATS)
    yield
    for table, before in ((RULES, rules), (FORMATS, formats)):
        table.clear()
        table.update(before)


RULE_FILES = (
    "tests/plugins/lion.py",
    "toolkit/optim/rules/stableadamw.py",
    "toolkit/optim/rules/adafactor8.py",
    "toolkit/optim/rules/muon8.py",
)


@pytest.mark.parametrize("file", RULE_FILES)
def test_the_documented_rules_are_the_tested_ones(file: str) -> None:
    """docs/extending.md shows the very files that the tests of one and of several ranks load."""
    code = (ROOT / file).read_text()
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


def commands() -> dict[str, Any]:
    """All commands of `toolkit`, those of groups included, by name."""
    found: dict[str, Any] = {}

    def walk(group: Any, before: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{before}{name} ")
            else:
                found[before + name] = command

    walk(typer.main.get_command(app), "")
    return found


def test_every_command_takes_plugins() -> None:
    found = commands()
    assert {"plan", "estimate", "report", "export", "checkpoint inspect", "checkpoint convert"} <= found.keys()
    del found["doctor"]  # which looks at the machine alone
    del found["compare"]  # which takes launch/train.py's options, `--plugin` among them
    for name, command in found.items():
        options = [flag for parameter in command.params for flag in parameter.opts]
        assert "--plugin" in options, name


def test_a_rule_of_a_plugin_is_planned_with(registered: None, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    line = ["plan", "--model", "qwen3-tiny", "--gpu-memory", "1.6GB", "--seq-len", "128", "--nodes", "2"]
    line += ["--out", str(out)]
    refused = CliRunner().invoke(app, [*line, "--optimizer", "PlannedLion"])
    assert isinstance(refused.exception, UserError) and "but must be AMCS" in str(refused.exception)
    plugin = tmp_path / "lion.py"
    plugin.write_text(LION.read_text().replace("LionRule", "PlannedLionRule"))
    result = CliRunner().invoke(app, [*line, "--optimizer", "plannedlion", "--plugin", str(plugin)])
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "amcs_zero2 with PlannedLion" in said, "no shipped configuration has this rule"
    assert f"train --ranks 1 --hostfile hosts --nodes 2 --model qwen3-tiny --config {out} --plugin {plugin} " in said
    config = json.loads(out.read_text())
    assert config["optimizer"]["type"] == "PlannedLion" and config["optimizer"]["params"]["lr"] == 1e-4
    validate(config, origin="plan", world_size=1, total_steps=10)


def test_a_rule_that_is_not_registered_is_named_with_what_is_missing(tmp_path: Path) -> None:
    plugin = tmp_path / "forgotten.py"
    lines = LION.read_text().replace("LionRule", "ForgottenRule").splitlines()
    plugin.write_text("\n".join(line for line in lines if "= as_optimizer(" not in line))
    import_plugin(plugin)
    config = {"optimizer": {"type": "forgotten", "params": {"lr": 1e-3}}, "train_batch_size": 1}
    with pytest.raises(UserError) as caught:
        validate(config, origin="mine")
    assert f"ForgottenRule is defined in {plugin}, but not registered" in str(caught.value)
    assert str(caught.value).endswith("add Forgotten = as_optimizer(ForgottenRule) there.")


def test_a_checkpoint_in_the_format_of_a_plugin(registered: None, tmp_path: Path) -> None:
    folder = cut(tmp_path, 1, 2)

    def change(body: dict[str, Any]) -> None:
        # The documented codec stores what "8bit" does.
        formats = body["sharding"]["flat_tensors"][0]["state_format"]
        formats.update(dict.fromkeys(formats, "linear8"))

    rewrite(folder, change)
    before = call("checkpoint", "inspect", folder)
    assert isinstance(before.exception, UserError)
    assert 'in the format "linear8"' in str(before.exception) and "--plugin" in str(before.exception)
    plugin = tmp_path / "linear8.py"
    section = (ROOT / "docs" / "extending.md").read_text().split("## A codec")[1]
    plugin.write_text(section.split("```python\n")[1].split("```")[0])
    shown = call("checkpoint", "inspect", folder, "--plugin", plugin)
    assert shown.exit_code == 0 and "m_slow=linear8" in shown.output
    for line in (("checkpoint", "verify", folder), ("checkpoint", "convert", folder, "--out", tmp_path / "new")):
        done = call(*line, "--plugin", plugin)
        assert done.exit_code == 0, done.output


def test_needs_that_cannot_be_met_are_refused(registered: None) -> None:
    class NeedyRule(Rule):
        states = (State("m"),)
        needs = ("total_step",)
        lr: NonNegative = 1e-4

    with pytest.raises(UserError, match=r"NeedyRule: needs names 'total_step'.* known is total_steps\. Did you mean"):
        as_optimizer(NeedyRule)
    NeedyRule.needs = ("total_steps",)
    with pytest.raises(UserError, match="for which the rule must have a field"):
        as_optimizer(NeedyRule)
    assert "Needy" not in RULES


def test_what_a_rule_needs_comes_from_the_run(registered: None) -> None:
    class PacedRule(Rule):
        states = (State("m"),)
        needs = ("total_steps",)
        lr: NonNegative = 1e-4
        total_steps: int | None = None
        other_steps: int | None = None

        def check_ready(self) -> None:
            if self.total_steps is None:
                raise UserError("Paced: total_steps is missing")

        def scalars(self, t: int) -> dict[str, float]:
            return {"lr": self.lr}

        @staticmethod
        def update(theta: Tensor, g: Tensor, m: Tensor, *, lr: Tensor) -> tuple[Tensor, ...]:
            return theta - lr * g, m

    as_optimizer(PacedRule)
    config = load_config("amcs_zero2") | {"optimizer": {"type": "Paced", "params": {"lr": 1e-3}}}
    del config["scheduler"]
    with pytest.raises(UserError, match="total_steps is missing"):
        validate(config, origin="config", world_size=1)
    validate(config, origin="config", world_size=1, total_steps=5)
    assert PacedRule.supply({"lr": 1.0}, total_steps=5) == {"lr": 1.0, "total_steps": 5}
    assert PacedRule.supply({"total_steps": 7}, total_steps=5) == {"total_steps": 7}
    assert PacedRule.supply({"total_steps": None}, total_steps=None) == {"total_steps": None}


def test_all_modules_of_rules_are_imported() -> None:
    """A rule of the package is one file: it is registered without a line elsewhere."""
    folder = ROOT / "toolkit" / "optim" / "rules"
    named = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert named == {made.rule.__module__.rpartition(".")[2] for made in RULES.values()} & named
    for path in (ROOT / "toolkit").rglob("*.py"):
        if path.is_relative_to(folder) or path == folder.parent / "__init__.py":
            continue
        names = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        assert not set(RULES).intersection(name for name in names if isinstance(name, str)), path
