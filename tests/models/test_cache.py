"""What is on disk is what would be computed, whoever wrote it and however they ended."""

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mendkit.mend.training import train
from mendkit.models.base import BaseModel
from mendkit.models.cache import TextCache
from mendkit.models.fingerprint import tensors_sha256
from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk, trunk_cache
from tests.oracles.claims import EXAMPLES, every_text, hparams
from tests.oracles.tiny import tiny_llama


def cached(base: BaseModel, folder: Path) -> FrozenTrunk:
    return FrozenTrunk(base, cache=trunk_cache(base, folder, limit=10**9))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("trunk/*/trunk-*.safetensors"))


def logits(trunk: FrozenTrunk, texts) -> torch.Tensor:
    batch = collate(texts, trunk.base.pad_id)
    return torch.cat([trunk.suffix(texts, batch), trunk.before(texts, batch)])


def assert_right(trunk: FrozenTrunk, texts) -> None:
    expected = logits(FrozenTrunk(trunk.base), texts)
    torch.testing.assert_close(logits(trunk, texts), expected, rtol=1e-5, atol=1e-5)


def computed(trunk: FrozenTrunk, texts, monkeypatch) -> int:
    """How many texts `fill` sends through the trunk."""
    seen, compute = [], trunk._compute

    def counting(group, states):
        seen.extend(group)
        compute(group, states)

    monkeypatch.setattr(trunk, "_compute", counting)
    trunk.fill(texts)
    return len(seen)


def distinct(texts) -> int:
    return len({text.key for text in texts})


def test_a_second_run_runs_no_trunk_pass_and_gives_the_same_bits(llama, tmp_path):
    passes = []
    small = {"max_iters": 3, "val_interval": 3, "batch_size": 2, "stats_examples": 3}

    def run(name, base=llama, **changes) -> int:
        h = hparams(**small, cache_dir=str(tmp_path)).replace(**changes)
        del passes[:]
        train(h, EXAMPLES, EXAMPLES[:2], base=base, run_dir=tmp_path / name)
        return len(passes)

    other = {"rank": 4, "lr": 1e-3, "seed": 1, "edit_tokens": "scored"}
    below = llama.model.model.layers[0].mlp
    with below.register_forward_hook(lambda *_: passes.append(1)):
        assert run("first") > 0 and run("other", **other) == 0
        assert run("turned", llama.with_sites([s.name for s in reversed(llama.sites)])) == 0
        assert run("cold", **other, cache_dir=str(tmp_path / "cold-cache")) > 0
    archives = [load_file(tmp_path / name / "archive.safetensors") for name in ("other", "cold")]
    assert len({tensors_sha256(sorted(tensors.items())) for tensors in archives}) == 1


def test_texts_in_common_are_computed_once(llama, tmp_path, monkeypatch):
    texts = list({text.key: text for text in every_text(llama)}.values())
    assert computed(cached(llama, tmp_path), texts[:9], monkeypatch) == 9
    some = cached(llama, tmp_path)
    assert computed(some, texts[4:14], monkeypatch) == 5
    assert_right(some, texts[4:14])
    assert computed(cached(llama, tmp_path), texts[:14], monkeypatch) == 0


def test_values_belong_to_weights_split_and_precision(llama, llama64, tmp_path, monkeypatch):
    texts = every_text(llama)[:3]
    cached(llama, tmp_path).fill(texts)
    lower = llama.with_sites(["model.layers.2.mlp.down_proj.weight"])
    changed = tiny_llama()
    changed.model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    for base in (tiny_llama(seed=1), lower, changed, llama64):
        assert computed(cached(base, tmp_path), texts, monkeypatch) == 3
    assert computed(cached(tiny_llama(), tmp_path), texts, monkeypatch) == 0


def test_a_damaged_file_is_told_and_computed_again(llama, tmp_path, caplog, monkeypatch):
    texts = every_text(llama)
    cached(llama, tmp_path).fill(texts)
    (path,) = shards(tmp_path)
    whole = path.read_bytes()
    path.unlink()  # what the first trunk has mapped stays whole
    path.write_bytes(whole[: len(whole) // 2])
    again = cached(llama, tmp_path)
    assert computed(again, texts, monkeypatch) == distinct(texts)
    assert "computed again" in caplog.text and path.name in caplog.text
    assert_right(again, texts)
    assert computed(cached(llama, tmp_path), texts, monkeypatch) == 0


def test_what_finds_no_room_is_not_kept_and_told_once(tmp_path, caplog):
    def add(key: str) -> None:
        cache.add({key: (torch.zeros(25, 1000), torch.zeros(1))})  # 100 kB

    cache = TextCache(tmp_path, {}, limit=250_000)
    for key in "uvxy":
        add(key)
    assert set(cache.find("uvxy")) == set("uv") and caplog.text.count("is reached") == 1


def test_a_file_that_another_process_renames_meanwhile_stops_no_writing(tmp_path, caplog):
    cache = TextCache(tmp_path, {}, limit=10**9)
    cache.folder.mkdir(parents=True)
    (cache.folder / ".trunk-renamed").symlink_to("nowhere")  # listed, but gone when looked at
    cache.add({"u": (torch.zeros(3), torch.zeros(1))})
    assert set(cache.find("u")) == {"u"} and not caplog.text


# ---------------------------------------------------------------------------------- real processes

CHILD = """
import json, sys, time
from pathlib import Path
import mendkit.models.cache as cache, mendkit.models.trunk as trunk
from mendkit.models.fingerprint import tensors_sha256
from mendkit.models.tokens import collate
from tests.oracles.claims import every_text
from tests.oracles.tiny import tiny_llama
folder, what = Path(sys.argv[1]), sys.argv[2]
trunk.TOKENS_PER_PASS = 1  # every text is a pass and a file
base = tiny_llama()
texts = every_text(base)
filled = trunk.FrozenTrunk(base, cache=trunk.trunk_cache(base, folder, limit=10**9))
count, compute = [], filled._compute
if what == "dies":
    def half(tensors, path):
        Path(path).write_bytes(b"half of it")
        (folder / "writing").touch()
        time.sleep(600)
    cache.save_file = half
else:
    def slowly(group, states):
        time.sleep(0.05)
        count.extend(group)
        compute(group, states)
    filled._compute = slowly
    (folder / f"ready-{what}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.01)
filled.fill(texts)
total = filled.suffix(texts, collate(texts, base.pad_id)).double().sum().item()
print(json.dumps([len(count), total]))
"""


def child(folder: Path, what: str) -> subprocess.Popen:
    command, root = [sys.executable, "-c", CHILD, str(folder), what], Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_at_once_share_the_work_and_get_it_right(
    llama, tmp_path, caplog, monkeypatch
):
    texts, results = every_text(llama), []
    for process in [child(tmp_path, "a"), child(tmp_path, "b")]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
        assert b"cache:" not in err  # neither stopped writing
        results.append(json.loads(out))
    assert distinct(texts) <= sum(count for count, _ in results) < 1.5 * distinct(texts)
    expected = FrozenTrunk(llama).suffix(texts, collate(texts, llama.pad_id)).double().sum()
    assert [total for _, total in results] == pytest.approx([float(expected)] * 2, rel=1e-5)
    assert computed(cached(llama, tmp_path), texts, monkeypatch) == 0
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert not list(tmp_path.glob("trunk/*/.*"))


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_read(
    llama, tmp_path, caplog, monkeypatch
):
    process = child(tmp_path, "dies")
    while not (tmp_path / "writing").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = tmp_path.glob("trunk/*/.trunk-*")
    texts, after = every_text(llama), cached(llama, tmp_path)
    assert computed(after, texts, monkeypatch) == distinct(texts)
    assert_right(after, texts)
    assert not caplog.text and left.exists()  # until the limit is reached
