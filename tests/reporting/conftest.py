"""Fixtures of the report and of sweeps."""

from pathlib import Path

import pytest

from tests.oracles.notebooks import write_notebooks
from tests.oracles.tiny import save_tiny


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path, model_folder, monkeypatch) -> Path:
    """A working directory with a configuration, stub notebooks and a file for an archive."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(f"model_name: {model_folder}\nrank: 4\n", encoding="utf-8")
    Path("given.safetensors").write_bytes(b"an archive")
    write_notebooks(tmp_path / "notebooks")
    return tmp_path
