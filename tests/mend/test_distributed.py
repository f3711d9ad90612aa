"""Several processes train what one would have trained; a process that fails takes the others along."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml

from mendkit.mend.archive import inspect_archive, load_archive
from mendkit.mend.normaliser import RunningMoments, StoredMoments, Whitening
from mendkit.mend.training import train
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.tiny import save_tiny

ROOT = Path(__file__).parents[2]
STEPS = {
    "max_iters": 4,
    "val_interval": 2,
    "log_interval": 1,
    "batch_size": 3,
    "lr": 1e-3,
    "warmup_iters": 0,
}
RUNS = {
    "plain": STEPS | {"accumulate_bs": 2, "swap": 0.5, "borrow": 0.3, "stats_examples": 3},
    "paired": STEPS
    | {
        "whiten": 0.1,
        "whiten_pairs": True,
        "unit_response": True,
        "edit_tokens": "scored",
        "loss_reduction": "sum",
    },
    "alone": STEPS
    | {
        "batch_size": 2,
        "std_eps": 1e-7,
        "stats_examples": 1,
        "disk_cache_bytes": 0,
        "unrelated_per_edit": 0,
    },
    "patient": STEPS
    | {"max_iters": 50, "val_interval": 1, "early_stop_patience": 2, "lr": 0.0, "lr_lr": 0.0},
    "hurried": STEPS | {"max_iters": 50, "max_seconds": 1e-6},
}

CHILD = """
import json, os, sys
from pathlib import Path
from mendkit.__main__ import main
from mendkit.errors import HyperParamError
from mendkit.mend.training import Trainer, train
from tests.oracles.claims import EXAMPLES
from tests.mend.test_distributed import RUNS
from tests.oracles.claims import hparams
from tests.oracles.tiny import tiny_llama
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
base, said = tiny_llama(), {}
for name, settings in RUNS.items():
    h = hparams(cache_dir=str(folder / "cache"), **settings)
    result = train(h, EXAMPLES, EXAMPLES[:3], base=base, run_dir=folder / name)
    said[name] = [result.stopped, result.best, len(result.history)]
step, made = Trainer.step, []
def once(*words):
    made.append(1)
    if len(made) == 4:
        raise KeyboardInterrupt
    return step(*words)
h = hparams(cache_dir=str(folder / "cache"), **RUNS["plain"])
for Trainer.step in (once, step):
    try:
        train(h, EXAMPLES, EXAMPLES[:3], base=base, run_dir=folder / "resumed")
    except KeyboardInterrupt:
        assert Trainer.step is once
try:
    train(hparams(batch_size=1), EXAMPLES, EXAMPLES[:3], base=base, run_dir=folder / "small")
except HyperParamError as error:
    said["small"] = str(error)
said["used"] = main(["train", "--out", str(folder / "plain")])
said["edit"] = main(["edit", "--prompt", "a", "--target", "b"])
(folder / f"{rank}.json").write_text(json.dumps(said))

def fail(*_):
    raise MemoryError("no room in process 1")
if rank == 1:
    Trainer.step = fail
train(hparams(**RUNS["plain"]), EXAMPLES, EXAMPLES[:2], base=base, run_dir=folder / "fails")
"""


def launch(*words: str) -> subprocess.CompletedProcess:
    """Run Python in two processes; the limit is there lest a hanging test should hang all of them."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *words,
    ]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "paired", "alone"])
def test_two_processes_train_what_one_does(llama, tmp_path, two, name):
    result = train(hparams(**RUNS[name]), EXAMPLES, EXAMPLES[:3], base=llama, run_dir=tmp_path)
    one, other = (
        load_archive(path, base=llama)
        for path in (result.archive, two / name / "archive.safetensors")
    )
    assert (
        one.metadata["training"]["normaliser_examples"]
        == other.metadata["training"]["normaliser_examples"]
    )
    expected = one.mend.state_dict()
    for key, value in other.mend.state_dict().items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    rows = [json.loads(line) for line in (two / name / "history.jsonl").read_text().splitlines()]
    assert len(rows) == len(result.history)
    for row, own in zip(rows, result.history, strict=True):
        assert list(row) == list(own)
        assert {k: v for k, v in row.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in own.items() if k != "seconds"}, rel=1e-4, abs=1e-6
        )


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_interrupted(llama, two):
    one, other = (
        load_archive(two / name / "archive.safetensors", base=llama)
        for name in ("plain", "resumed")
    )
    expected = one.mend.state_dict()
    for (
        key,
        value,
    ) in other.mend.state_dict().items():  # factors are kept as needed, so their batches are others
        torch.testing.assert_close(
            value, expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    rows = [
        (two / name / "history.jsonl").read_text().splitlines() for name in ("plain", "resumed")
    ]
    assert [json.loads(row)["step"] for row in rows[0]] == [
        json.loads(row)["step"] for row in rows[1]
    ]
    assert (two / "stderr").read_text().count(
        "going on with the run"
    ) == 1  # the first process says so


@pytest.mark.slow
def test_the_first_process_decides_for_all(two):
    said = [json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    assert (
        "no better score for 2 steps" in said[0]["patient"][0]
        and "time budget" in said[0]["hurried"][0]
    )
    assert "batch_size: 1" in said[0]["small"] and "2 processes" in said[0]["small"]
    assert said[0]["used"] == said[0]["edit"] == 2
    errors = (two / "stderr").read_text()
    assert (
        errors.count("holds archive.safetensors") == 2
        and errors.count("edit runs in one process") == 2
    )


@pytest.mark.slow
def test_a_failing_process_takes_the_other_along(two):
    assert "MemoryError: no room in process 1" in (two / "stderr").read_text()
    assert (
        len((two / "fails" / "history.jsonl").read_text().splitlines()) == 1
    )  # the first one got no further


@pytest.mark.slow
def test_the_command_line_in_two_processes(tmp_path):
    model = save_tiny(tmp_path / "model")
    config = tmp_path / "tiny.yaml"
    config.write_text(
        yaml.safe_dump({"model_name": str(model), "rank": 8, "cache_dir": str(tmp_path), **STEPS})
    )
    words = ["-m", "mendkit", "train", str(config), "--train-limit", "6", "--validation-limit", "2"]
    done = launch(*words, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(tmp_path / "run" / "archive.safetensors")]
    assert inspect_archive(tmp_path / "run" / "archive.safetensors")["training"]["examples"] == 6
    assert json.loads((tmp_path / "run" / "results.json").read_text())["train.best_step"] in (2, 4)


# -------------------------------------------------------------------------------------------- statistics, in threads


def merge_together(modules: list) -> None:
    """Merge every module in a thread of its own; what `total` gives is the sum over the threads."""
    barrier, box = threading.Barrier(len(modules)), [None] * len(modules)

    def merge(index: int) -> None:
        def total(x: torch.Tensor) -> torch.Tensor:
            box[index] = x.clone()
            barrier.wait()
            whole = torch.stack(box).sum(0)
            barrier.wait()
            return whole

        modules[index].merge(total)

    threads = [threading.Thread(target=merge, args=(index,)) for index in range(len(modules))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]


@pytest.mark.parametrize("split", [8, 0])
@pytest.mark.parametrize(
    "make",
    [
        lambda: RunningMoments(6),
        lambda: StoredMoments(6, 1e-7),
        lambda: Whitening(6, 0.1),
        lambda: Whitening(6, 0.1, pairs=True, unit_response=True),
    ],
    ids=["moments", "stored", "whitening", "pairs"],
)
def test_merged_statistics_are_those_of_all_rows(split, make):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 3 + 100
    extra = (
        (torch.arange(40) // 4, torch.arange(40) % 2 == 0)
        if len(getattr(make(), "matrix", ())) == 2
        else ()
    )
    whole, first, second = make(), make(), make()
    whole.add(x, *extra)
    first.add(x[:split], *(values[:split] for values in extra)) if split else None
    second.add(x[split:], *(values[split:] for values in extra))
    merge_together([first, second])
    for module in (whole, first, second):
        if isinstance(module, Whitening):
            module.fit()
    for module in (first, second):
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-9, atol=1e-9)
