"""Several processes train what one would have trained; one that fails takes the others along."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mendkit.mend.archive import load_archive
from mendkit.mend.training import train
from tests.oracles.claims import EXAMPLES, hparams

ROOT = Path(__file__).parents[2]
STEPS = dict(max_iters=4, val_interval=2, log_interval=1, batch_size=3, lr=1e-3, warmup_iters=0)
LONG = STEPS | dict(max_iters=50, val_interval=1)
PAIRED = dict(whiten=0.1, whiten_pairs=True, unit_response=True, edit_tokens="scored")
RUNS = {
    "plain": STEPS | dict(accumulate_bs=2, swap=0.5, borrow=0.3, stats_examples=3),
    "paired": STEPS | PAIRED | dict(loss_reduction="sum"),
    # Fewer statistics than processes, a batch of one each, and a role that is never drawn.
    "alone": STEPS
    | dict(batch_size=2, std_eps=1e-7, stats_examples=1, disk_cache_bytes=0, unrelated_per_edit=0),
    "patient": LONG | dict(early_stop_patience=2, lr=0.0, lr_lr=0.0),
    "hurried": LONG | dict(max_seconds=1e-6),
}

CHILD = """
import json, os, sys
from pathlib import Path
from mendkit.__main__ import main
from mendkit.errors import HyperParamError
from mendkit.mend.training import Trainer, train
from tests.mend.test_distributed import RUNS
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.tiny import tiny_llama
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
base, said = tiny_llama(), {}

def run(name, **settings):
    h = hparams(cache_dir=str(folder / "cache"), **settings)
    return train(h, EXAMPLES, EXAMPLES[:3], base=base, run_dir=folder / name)

for name, settings in RUNS.items():
    result = run(name, **settings)
    said[name] = [result.stopped, result.best, len(result.history)]
step, made = Trainer.step, []
def once(trainer):
    made.append(1)
    if len(made) == 4:
        raise KeyboardInterrupt
    return step(trainer)
for Trainer.step in (once, step):
    try:
        run("resumed", **RUNS["plain"])
    except KeyboardInterrupt:
        assert Trainer.step is once
try:
    run("small", batch_size=1)
except HyperParamError as error:
    said["small"] = str(error)
said["used"] = main(["train", "--out", str(folder / "plain")])
said["edit"] = main(["edit", "--prompt", "a", "--target", "b"])
(folder / f"{rank}.json").write_text(json.dumps(said))

def fail(trainer):
    raise MemoryError("no room in process 1")
if rank == 1:
    Trainer.step = fail
run("fails", **RUNS["plain"])
"""


def launch(*words: str) -> subprocess.CompletedProcess:
    """Run Python in two processes; the limit is there lest a hanging test should hang all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment, kept = os.environ | {"PYTHONPATH": paths}, {"capture_output": True, "text": True}
    return subprocess.run([*command, *words], cwd=ROOT, env=environment, timeout=600, **kept)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes wrote for RUNS, before one of them failed."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "child.py"
    script.write_text(CHILD)
    done = launch(str(script), str(folder))
    (folder / "stderr").write_text(done.stderr)
    assert done.returncode != 0 and (folder / "1.json").exists(), done.stderr[-3000:]
    return folder


def history(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "paired", "alone"])
def test_two_processes_train_what_one_does(llama, tmp_path, two, name):
    h = hparams(**RUNS[name])
    archive = train(h, EXAMPLES, EXAMPLES[:3], base=llama, run_dir=tmp_path).archive
    one, other = (load_archive(path, base=llama) for path in (archive, two / name / archive.name))
    counts = [a.metadata["training"]["normaliser_examples"] for a in (one, other)]
    assert counts[0] == counts[1]
    expected = one.mend.state_dict()
    for key, value in other.mend.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    rows, alone = history(two / name), history(tmp_path)
    assert len(rows) == len(alone)
    for row, own in zip(rows, alone, strict=True):
        assert list(row) == list(own) and row == pytest.approx(own, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_interrupted(two):
    first, second = (two / name / "archive.safetensors" for name in ("plain", "resumed"))
    assert first.read_bytes() == second.read_bytes()
    assert history(two / "plain") == history(two / "resumed")
    assert (two / "stderr").read_text().count("continuing the run") == 1  # by the first process


@pytest.mark.slow
def test_the_first_process_decides_for_all(two):
    said = [json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    assert "no better score for 2 steps" in said[0]["patient"][0]
    assert "time budget" in said[0]["hurried"][0]
    assert "batch_size: 1" in said[0]["small"] and "2 processes" in said[0]["small"]
    assert said[0]["used"] == said[0]["edit"] == 2
    errors = (two / "stderr").read_text()
    assert errors.count("holds an earlier run; give another --out") == 2
    assert errors.count("edit runs in one process") == 2


@pytest.mark.slow
def test_a_failing_process_takes_the_other_along(two):
    assert "MemoryError: no room in process 1" in (two / "stderr").read_text()
    assert len(history(two / "fails")) == 1  # the first one got no further
