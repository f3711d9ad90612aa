"""A tiny model on disk and an archive trained for it from the command line."""

from pathlib import Path

import pytest

from mendkit.__main__ import main
from tests.oracles.tiny import save_tiny

SIZES = "rank: 4\nbatch_size: 4\nmax_iters: 2\nval_interval: 1\n"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a config for a tiny model, and an archive trained from the command line."""
    folder = tmp_path_factory.mktemp("cli")
    model = save_tiny(folder / "model")
    settings = f"model_name: {model}\ncache_dir: {folder / 'cache'}\n{SIZES}"
    (folder / "tiny.yaml").write_text(settings, encoding="utf-8")
    words = ["train", str(folder / "tiny.yaml"), "--train-limit", "12", "--validation-limit", "4"]
    assert main([*words, "--ignore-memory", "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> Path:
    """A working directory with the config of `trained` and its archive, `archive.safetensors`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mendkit.cost.plan.check_memory", lambda *_: None)  # it has its own tests
    for name in ("tiny.yaml", "run/archive.safetensors"):
        Path(Path(name).name).write_bytes((trained / name).read_bytes())
    return tmp_path
