"""What `toolkit checkpoint inspect` lists."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from small_checkpoints import STEP, call, refile, stock, whole

from toolkit.checkpoint import universal
from toolkit.checkpoint.source import Source, model_file


def test_files_of_a_folder_of_many_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "universal"
    universal.write(Source(stock(tmp_path / "stock")), folder)
    files = universal.open_checkpoint(folder).manifest.files
    many = {name: entry["bytes"] for name, entry in files.items() if name.startswith("zero/")}
    monkeypatch.setattr("toolkit.commands.checkpoint._LISTED", len(many))
    shown = call("checkpoint", "inspect", folder).output
    assert all(name in shown for name in files)
    monkeypatch.setattr("toolkit.commands.checkpoint._LISTED", len(many) - 1)
    shown = call("checkpoint", "inspect", folder).output
    assert f"{sum(many.values()):,}  zero/ ({len(many)} files)" in shown
    assert [name for name in files if name in shown] == [name for name in files if name not in many]


def test_json_is_for_programs(tmp_path: Path) -> None:
    folder = whole(tmp_path / "own").path(STEP)
    found = json.loads(call("checkpoint", "inspect", folder, "--json", "--digest").output)
    assert all(re.fullmatch("[a-z_]+", key) for key in found)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
    matrices, others = 48 * 32 + 16 * 16, 48 + 40
    expected = {
        "step": STEP,
        "ranks": 1,
        "zero_stage": 1,
        "optimizer": "AMCS",
        "states": ["m_fast", "m_slow", "v"],
        "parameters": matrices + others,
        "frozen_parameters": 0,
        "buffer_elements": 4,
        "base": None,
        "bytes": sum(sizes.values()),
        "bytes_per_parameter": pytest.approx(sum(sizes.values()) / (matrices + others)),
        "identity": {"model": "qwen3-tiny", "tokenizer": "python-4k", "data": "d"},
        "data_position": {"epoch": 0, "window": 0, "document": 3},
        "files": sizes,
        "digest": Source(folder).digest(),
    }
    assert {key: found[key] for key in expected} == expected
    states = ("m_fast", "m_slow", "v")
    assert [(one["kinds"], one["parameters"], one["formats"], one["weights"]) for one in found["stored_as"]] == [
        (["matrices"], matrices, dict.fromkeys(states, "8bit"), "bf16+8"),
        (["1-D parameters"], others, dict.fromkeys(states, "fp32"), "bf16+16"),
    ]


def test_bytes_are_divided_by_all_parameters_in_the_files(tmp_path: Path) -> None:
    folder, name = whole(tmp_path).path(STEP), model_file(1, 0)
    trained = json.loads(call("checkpoint", "inspect", folder, "--json").output)["parameters"]
    content = torch.load(folder / name)
    content["module"]["f.weight"] = torch.empty(0)
    content["frozen_param_shapes"] = OrderedDict({"f.weight": torch.Size([300, 20])})
    content["frozen_param_fragments"] = OrderedDict({"f.weight": torch.zeros(300, 20)})
    refile(folder, name, content)
    found = json.loads(call("checkpoint", "inspect", folder, "--json").output)
    assert (found["parameters"], found["frozen_parameters"]) == (trained, 6000)
    assert found["bytes_per_parameter"] == pytest.approx(found["bytes"] / (trained + 6000))
    shown = call("checkpoint", "inspect", folder).output
    assert f"{found['bytes']:,} ({found['bytes'] / (trained + 6000):.2f} per parameter)" in shown


def test_each_format_is_after_the_parameters_that_it_is_of(tmp_path: Path) -> None:
    shown = call("checkpoint", "inspect", whole(tmp_path).path(STEP)).output
    matrices, others = (f"m_fast={kept} m_slow={kept} v={kept}" for kept in ("8bit", "fp32"))
    assert f"matrices: {matrices} weights=bf16+8; 1-D parameters: {others} weights=bf16+16" in shown


def test_of_deepspeeds_own_what_is_not_known_is_null_and_files_are_counted(tmp_path: Path) -> None:
    folder = stock(tmp_path / "stock")
    found = json.loads(call("checkpoint", "inspect", folder, "--json").output)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert (found["files"], found["bytes"]) == (sizes, sum(sizes.values()))
    assert found["saved"] is None and found["data_position"] is None and found["identity"] == found["versions"] == {}
    shown = call("checkpoint", "inspect", folder).output
    assert "exp_avg=fp32 exp_avg_sq=fp32 weights=float32" in shown and "matrices" not in shown
