"""What is on disk is what would be computed: whoever wrote it, however they ended, and whatever room there is."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mendkit.mend.archive import inspect_archive
from mendkit.mend.training import train
from mendkit.models.base import BaseModel
from mendkit.models.cache import STALE_SECONDS, TextCache
from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk, trunk_cache
from tests.oracles.claims import EXAMPLES, every_text, hparams
from tests.oracles.tiny import tiny_llama

ROOM = 10**9


def trunk(base: BaseModel, folder: Path, limit: int = ROOM) -> FrozenTrunk:
    return FrozenTrunk(base, cache=trunk_cache(base, folder, limit=limit))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("trunk/*/trunk-*.safetensors"))


def logits(trunk: FrozenTrunk, texts) -> torch.Tensor:
    batch = collate(texts, trunk.base.pad_id)
    return torch.cat([trunk.suffix(texts, batch), trunk.before(texts, batch)])


def computed(trunk: FrozenTrunk, texts, monkeypatch) -> int:
    """How many texts `fill` sends through the trunk."""
    seen, compute = [], trunk._compute
    monkeypatch.setattr(trunk, "_compute", lambda some, *rest: seen.extend(some) or compute(some, *rest))
    trunk.fill(texts)
    return len(seen)


# ----------------------------------------------------------------------------------------------------- what is shared


def trunk_passes(base: BaseModel, run) -> int:
    """How often `run` sends texts through the model's first block."""
    passes = []
    block = base.model.get_submodule(f"{base.blocks.path}.0")
    handle = block.register_forward_hook(lambda *_: passes.append(1))
    run()
    handle.remove()
    return len(passes)


def test_a_second_run_with_another_rank_runs_no_trunk_pass_and_gives_the_same_bits(llama, tmp_path):
    quick = {
        "max_iters": 3,
        "val_interval": 3,
        "batch_size": 2,
        "stats_examples": 3,
        "cache_dir": str(tmp_path),
    }

    def run(name, base=llama, **changes):
        h = hparams(**quick).replace(**changes)
        train(h, EXAMPLES, EXAMPLES[:2], base=base, run_dir=tmp_path / name)

    turned = llama.with_sites([site.name for site in reversed(llama.sites)])
    assert trunk_passes(llama, lambda: run("first")) > 0
    assert (
        trunk_passes(llama, lambda: run("other", rank=4, lr=1e-3, seed=1, edit_tokens="scored"))
        == 0
    )
    assert trunk_passes(llama, lambda: run("turned", base=turned)) == 0
    assert trunk_passes(llama, lambda: run("cold", rank=4, lr=1e-3, seed=1, edit_tokens="scored",
                                           cache_dir=str(tmp_path / "cold-cache"))) > 0  # fmt: skip
    sums = [
        inspect_archive(tmp_path / name / "archive.safetensors")["sha256"]
        for name in ("other", "cold")
    ]
    assert sums[0] == sums[1]


def test_texts_in_common_are_computed_once(llama, tmp_path, monkeypatch):
    texts = list({text.key: text for text in every_text(llama)}.values())
    assert computed(trunk(llama, tmp_path), texts[:9], monkeypatch) == 9
    some = trunk(llama, tmp_path)
    assert computed(some, texts[4:14], monkeypatch) == 5
    torch.testing.assert_close(
        logits(some, texts[4:14]), logits(FrozenTrunk(llama), texts[4:14]), rtol=1e-5, atol=1e-5
    )
    assert computed(trunk(llama, tmp_path), texts[:14], monkeypatch) == 0


def test_values_belong_to_weights_split_and_precision(llama, llama64, tmp_path, monkeypatch):
    texts = every_text(llama)[:3]
    trunk(llama, tmp_path).fill(texts)
    other, lower = tiny_llama(seed=1), llama.with_sites(["model.layers.2.mlp.down_proj.weight"])
    changed = tiny_llama()
    changed.model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    for base in (other, lower, changed, llama64):
        assert computed(trunk(base, tmp_path), texts, monkeypatch) == 3
    assert computed(trunk(tiny_llama(), tmp_path), texts, monkeypatch) == 0


def test_a_limit_of_nothing_leaves_nothing(llama, tmp_path):
    trunk(llama, tmp_path, limit=0).fill(every_text(llama))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no shard at all"),
    ],
    ids=["truncated", "empty", "foreign"],
)
def test_a_damaged_shard_is_told_and_computed_again(llama, tmp_path, caplog, monkeypatch, damage):
    texts = every_text(llama)
    trunk(llama, tmp_path).fill(texts)
    (path,) = shards(tmp_path)
    path.with_name("copy").write_bytes(path.read_bytes())
    path.with_name("copy").replace(path)  # what the first trunk has mapped stays whole
    damage(path)
    again = trunk(llama, tmp_path)
    assert computed(again, texts, monkeypatch) == len({text.key for text in texts})
    assert "computed again" in caplog.text and path.name in caplog.text
    assert torch.equal(logits(again, texts), logits(trunk_in_memory(llama, texts), texts))
    assert computed(trunk(llama, tmp_path), texts, monkeypatch) == 0


def trunk_in_memory(base: BaseModel, texts) -> FrozenTrunk:
    filled = FrozenTrunk(base)
    filled.fill(texts)
    return filled


def test_a_full_disk_is_told_once_and_nothing_half_written_stays(llama, tmp_path, caplog):
    texts = every_text(llama)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (3000, hard)
    )  # a write beyond it fails as on a full disk
    try:
        full = trunk(llama, tmp_path)
        full.fill(texts[:10])
        full.fill(texts[10:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("cannot write") == 1 and "disk_cache_bytes: 0" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    torch.testing.assert_close(
        logits(full, texts), logits(FrozenTrunk(llama), texts), rtol=1e-5, atol=1e-5
    )


def test_a_folder_that_cannot_be_made_is_told(llama, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    texts = every_text(llama)
    blocked = trunk(llama, tmp_path / "file")
    assert blocked.fill(texts) == len({text.key for text in texts})
    assert caplog.text.count("cannot write") == 1 and str(tmp_path / "file") in caplog.text


# ---------------------------------------------------------------------------------------------------------- eviction

WIDTH = 1000


def some_cache(folder: Path, limit: int, name: str = "a") -> TextCache:
    return TextCache(folder, {"name": name}, limit=limit)


def put(cache: TextCache, name: str, rows: int = 25) -> bytes:
    """One shard of about `rows` · 4 kB."""
    key = name.encode().ljust(16)
    cache.add({key: (torch.full((rows, WIDTH), float(ord(name[0]))),)})
    return key


def test_what_was_not_used_for_longest_goes_first_whatever_its_space(tmp_path):
    keys = []
    for age, name, space in ((30, "u", "a"), (20, "v", "b"), (10, "w", "a")):
        before = set(shards(tmp_path))
        keys.append(put(some_cache(tmp_path, ROOM, space), name))
        (path,) = set(shards(tmp_path)) - before
        os.utime(path, (time.time() - age, time.time() - age))
    reader = some_cache(tmp_path, ROOM)
    assert reader.find(keys[:1])  # used now
    del reader
    put(some_cache(tmp_path, 320_000), "x")
    assert not some_cache(tmp_path, ROOM, "b").find(keys)
    assert set(some_cache(tmp_path, ROOM).find(keys)) == {keys[0], keys[2]}
    assert sum(path.stat().st_size for path in shards(tmp_path)) <= 320_000


def test_what_this_process_uses_stays_and_what_finds_no_room_is_not_kept(tmp_path):
    cache = some_cache(tmp_path, 250_000)
    keys = [put(cache, "u"), put(cache, "v")]
    mapped = cache.find(keys)
    assert not cache.find([put(cache, "x")])
    assert set(cache.find(keys)) == set(keys)
    assert [float(mapped[key][0].mean()) for key in keys] == [ord("u"), ord("v")]
    assert not some_cache(tmp_path, ROOM).find([put(some_cache(tmp_path, 90_000), "y")])


# ----------------------------------------------------------------------------------------------------- real processes

CHILD = """
import json, os, sys, time
from pathlib import Path
import mendkit.models.cache, mendkit.models.trunk
from tests.models.test_cache import logits, trunk
from tests.oracles.claims import every_text
from tests.oracles.tiny import tiny_llama
folder, what = Path(sys.argv[1]), sys.argv[2]
mendkit.models.trunk.SHARD_BYTES = mendkit.models.trunk.TOKENS_PER_PASS = 1  # every text is a pass and a shard
base = tiny_llama()
texts, own = every_text(base), trunk(base, folder)
if what == "dies":
    def half(tensors, path):
        Path(path).write_bytes(b"half of it")
        (folder / "writing").touch()
        time.sleep(600)
    mendkit.models.cache.save_file = half
else:
    count, compute = [], own._compute
    def slowly(some, *rest):
        time.sleep(0.05)
        count.extend(some)
        return compute(some, *rest)
    own._compute = slowly
    (folder / f"ready-{what}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.01)
own.fill(texts)
print(json.dumps([len(count), logits(own, texts).double().sum().item()]))
"""


def child(folder: Path, what: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(folder), what]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_two_processes_at_once_share_the_work_and_get_it_right(
    llama, tmp_path, caplog, monkeypatch
):
    texts = every_text(llama)
    results = []
    for process in [child(tmp_path, "a"), child(tmp_path, "b")]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
        results.append(json.loads(out))
    distinct = len({text.key for text in texts})
    assert distinct <= sum(count for count, _ in results) < 1.5 * distinct
    assert results[0][1] == pytest.approx(
        float(logits(FrozenTrunk(llama), texts).double().sum()), rel=1e-5
    )
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-6)
    assert computed(trunk(llama, tmp_path), texts, monkeypatch) == 0
    assert not [r for r in caplog.records if r.levelno > logging.INFO] and not list(
        tmp_path.glob("trunk/*/.*")
    )


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
    texts = every_text(llama)
    after = trunk(llama, tmp_path)
    assert computed(after, texts, monkeypatch) == len({text.key for text in texts})
    assert (
        torch.equal(logits(after, texts), logits(trunk_in_memory(llama, texts), texts))
        and not caplog.text
    )
    assert left.exists()  # it might still be written to
    os.utime(left, (time.time() - STALE_SECONDS - 60,) * 2)
    trunk(tiny_llama(seed=1), tmp_path).fill(texts)
    assert not left.exists()
