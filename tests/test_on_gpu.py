"""scripts/on_gpu.py: every part on a tiny model on the CPU, and one clear line without a GPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.oracles.tiny import save_tiny

PATH = Path(__file__).parents[1] / "scripts/on_gpu.py"


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("on_gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_every_part_runs_on_a_tiny_model(main, tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    assert main(["--tiny", str(model), "--out", str(tmp_path / "out")]) == 0, (
        capsys.readouterr().out
    )
    rows = json.loads((tmp_path / "out/on_gpu.json").read_text())["rows"]
    parts = {row["part"] for row in rows}
    assert parts == {"equality", "speed, float32", "PEFT adapter", "device map"}
    assert all(row.get("ok", True) for row in rows)
    assert "| equality | model | logits, CPU against device |" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["on_gpu.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(main, capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
