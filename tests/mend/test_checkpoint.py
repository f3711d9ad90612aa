"""A run that was stopped, by whatever and whenever, ends with the archive of one that never was."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mendkit.__main__ import main
from mendkit.errors import ArchiveError, MendkitError
from mendkit.mend.archive import CHECKPOINT_FILE as FILE
from mendkit.mend.archive import Checkpoint
from mendkit.mend.training import Trainer, train
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.tiny import save_tiny, tiny_llama

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("MENDKIT_KILLS", "3"))  # `make soak`: 20
STEPS = dict(max_iters=6, val_interval=2, batch_size=2, log_interval=1, lr=1e-2, edit_lr=1e-3)
PAIRED = dict(whiten=0.1, whiten_pairs=True, unit_response=True, edit_tokens="scored")
KINDS = {
    "plain": dict(
        edit_lr="auto", swap=0.5, borrow=0.3, accumulate_bs=2, checkpoint_interval=1, lr_lr=0.05
    )
    | dict(ema_decay=0.6),
    "sequence": dict(train_on="sequence", most_edits=3, opt="AdamW", aggregate="least_squares")
    | PAIRED,
    "batch": dict(train_on="batch", most_edits=2, cache_bytes=0, checkpoint_interval=2)
    | dict(ema_decay=0.9),
}


def run(folder: Path, base=None, **settings):
    h = hparams(**(STEPS | settings))
    return train(h, EXAMPLES, EXAMPLES[:2], base=base or tiny_llama(), run_dir=folder)


def outcome(folder: Path) -> tuple[bytes, list]:
    """The archive's bytes, and the history on disk without times."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return (folder / "archive.safetensors").read_bytes(), rows


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def stopping(call, at: int):
    """`call`, but with KeyboardInterrupt instead of its `at`-th time (from 1)."""
    left = iter(range(at - 1, -1, -1))

    def instead(*args):
        if next(left, 1) == 0:
            raise KeyboardInterrupt
        return call(*args)

    return instead


def stopped(folder: Path, base=None, *, at: int, **settings) -> None:
    """A run interrupted in step `at`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", stopping(Trainer.step, at))
        run(folder, base, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, llama) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, llama)
    return folder


# ---------------------------------------- the same bits


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_twice_is_the_run_that_never_was(kind, llama, tmp_path):
    run(tmp_path / "whole", llama, **KINDS[kind])
    stopped(tmp_path / "parts", llama, at=4, **KINDS[kind])
    stopped(tmp_path / "parts", llama, at=3, **KINDS[kind])
    result = run(tmp_path / "parts", llama, **KINDS[kind])
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    lines = (tmp_path / "parts" / "history.jsonl").read_text().splitlines()
    assert list(result.history) == list(map(json.loads, lines))


def test_a_run_that_went_on_from_an_archive_goes_on_even_where_it_has_overwritten_it(
    llama, tmp_path
):
    source = run(tmp_path / "source", llama, max_iters=1).archive
    more = dict(aggregate="least_squares", stats_examples=3, val_interval=1, max_iters=4)
    run(tmp_path / "whole", llama, archive=str(source), **more)
    folder = tmp_path / "parts"
    folder.mkdir()
    own = folder / "archive.safetensors"
    own.write_bytes(source.read_bytes())
    stopped(folder, llama, at=3, archive=str(own), **more)
    assert own.read_bytes() != source.read_bytes()
    result = run(folder, llama, archive=str(own), **more)
    assert outcome(folder)[1] == outcome(tmp_path / "whole")[1]
    assert result.normaliser_examples == 3
    a, b = (load_file(path / "archive.safetensors") for path in (folder, tmp_path / "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_whichever_file_was_not_replaced_any_more_nothing_is_lost(llama, tmp_path, monkeypatch):
    replace, number, short = os.replace, 0, dict(max_iters=2, val_interval=1)
    run(tmp_path / "whole", llama, **short)
    done = False
    while not done:
        number += 1
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr("mendkit.runs.os.replace", stopping(replace, number))
            try:
                run(folder, llama, **short)
                done = True
            except KeyboardInterrupt:
                assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        run(folder, llama, **short)
        assert outcome(folder) == outcome(tmp_path / "whole")
    assert number > 6  # run.json, checkpoints at steps 0, 1, 2 and the end, one archive at least


def test_seconds_and_a_used_up_time_budget_go_on(llama, tmp_path):
    budget = dict(max_seconds=1e6, **STEPS)
    stopped(tmp_path / "a", llama, at=4, max_seconds=1e6)
    checkpoint = Checkpoint(tmp_path / "a", hparams(**budget), EXAMPLES, EXAMPLES[:2])
    course, tensors = checkpoint.unfinished(), checkpoint.tensors(llama)
    assert course.step == 2 and 0 < course.elapsed < course.seconds
    course.elapsed = 1000.0
    checkpoint.write(llama, course, tensors)
    stopped(tmp_path / "a", llama, at=2, max_seconds=1e6)  # in the second step from there
    last = json.loads((tmp_path / "a" / "history.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and 1000 < last["seconds"] < 2000
    course.elapsed = 2e6
    checkpoint.write(llama, course, tensors)
    result = run(tmp_path / "a", llama, max_seconds=1e6)
    assert "time budget" in result.stopped and max(row["step"] for row in result.history) == 2
    assert result.seconds > course.seconds and result.archive.is_file()


KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from mendkit.mend.archive import CHECKPOINT_FILE as FILE
from tests.mend.test_checkpoint import outcome, run
from tests.oracles.tiny import tiny_llama
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
chance, base = random.Random(1), tiny_llama()

def start(name):
    child = os.fork()
    if child == 0:
        settings = {"max_iters": 24, "val_interval": 4, "checkpoint_interval": 3, "swap": 0.5}
        os.environ["MENDKIT_CACHE"] = str(folder / name / "cache")
        run(folder / name, base, **settings)
        os._exit(0)
    return child

began = time.monotonic()
os.waitpid(start("whole"), 0)
took, runs, done, went_on = time.monotonic() - began, 1, 0, 0
while done < kills:
    path = folder / str(runs)
    had, child = (path / FILE).exists(), start(str(runs))
    time.sleep(chance.uniform(0, took))
    os.kill(child, signal.SIGKILL)  # one that has ended waits to be asked for, and is not hurt
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        done, went_on = done + 1, went_on + had
    else:
        assert status == 0 and outcome(path) == outcome(folder / "whole")
        runs += 1
_, status = os.waitpid(start(str(runs)), 0)
assert status == 0 and outcome(folder / str(runs)) == outcome(folder / "whole")
print(json.dumps({"kills": done, "went_on": went_on}))
"""


def test_a_process_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLER, str(tmp_path), str(KILLS)]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["kills"] == KILLS and (KILLS < 20 or said["went_on"] > 3)


# ---------------------------------------- no room


def test_a_full_disk_is_an_error_and_the_run_goes_on_when_there_is_room(llama, tmp_path, whole):
    stopped(tmp_path / "try", llama, at=4)
    # Less than two checkpoints, which a replacement needs.
    size = int(1.6 * (tmp_path / "try" / FILE).stat().st_size)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system of its own needs root: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(MendkitError, match="cannot write"):
            run(disk / "run", llama)
        held = {path.name for path in (disk / "run").iterdir()}
        assert held == {"archive.safetensors", FILE, "history.jsonl", "run.json"}
        outcome(disk / "run")  # every line is whole
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        run(disk / "run", llama)
        assert outcome(disk / "run") == outcome(whole)
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------- what is said and refused


def test_an_interrupt_says_how_to_go_on(llama, tmp_path, caplog):
    stopped(tmp_path, llama, at=4)
    said = "interrupted after step 4 of 6; this call, or --resume, goes on from"
    assert f"{said} {tmp_path / FILE}" in caplog.text
    run(tmp_path, llama)
    assert "from step 2 of 6" in caplog.text


def test_the_checkpoint_of_another_run_is_refused_and_kept(llama, tmp_path):
    stopped(tmp_path, llama, at=4)
    before = contents(tmp_path)
    with pytest.raises(MendkitError, match=r"lr 0.01, here 0.1\), at step 2 of 6.*delete the file"):
        run(tmp_path, llama, lr=0.1)
    with pytest.raises(MendkitError, match="other examples"):
        train(hparams(**STEPS), EXAMPLES[1:], EXAMPLES[:2], base=llama, run_dir=tmp_path)
    with pytest.raises(ArchiveError, match="written for another model"):
        run(tmp_path, tiny_llama(seed=1))
    assert contents(tmp_path) == before
    # These change no bit, and may change.
    run(tmp_path, llama, cache_dir=str(tmp_path / "cache"), checkpoint_interval=1)


@pytest.mark.parametrize("damage", ["metadata", "tensor", "archive"])
def test_a_damaged_checkpoint_is_refused(damage, llama, tmp_path):
    stopped(tmp_path, llama, at=4, val_interval=1, checkpoint_interval=1)
    path = tmp_path / FILE
    content = path.read_bytes()
    if damage == "metadata":
        path.write_bytes(content.replace(b'\\"in_a_row\\": 0', b'\\"in_a_row\\": 1', 1))
    if damage == "tensor":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if damage == "archive":
        (tmp_path / "archive.safetensors").write_bytes(content[:1000])
    with pytest.raises(MendkitError, match=r"damaged|not a readable archive"):
        run(tmp_path, llama, val_interval=1, checkpoint_interval=1)


def test_resume_from_the_command_line(tmp_path, monkeypatch, capsys, caplog):
    model = save_tiny(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(
        f"model_name: {model}\nrank: 4\nbatch_size: 4\nmax_iters: 3\nval_interval: 1\n"
        f"cache_dir: {tmp_path}\n"
    )
    words = ["train", "tiny.yaml", "--train-limit", "12", "--validation-limit", "4"]
    words += ["--ignore-memory", "--out"]
    assert main([*words, "whole", "--resume"]) == 0  # nothing there yet: a run as any
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping(Trainer.step, 3))
        assert main([*words, "parts"]) == 130
    assert main([*words, "parts"]) == 2
    assert "--resume to go on with it, or --overwrite" in capsys.readouterr().err
    assert main([*words, "parts", "--resume"]) == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert not load_file(Path("parts", FILE))  # a run that has ended needs no tensors
    with caplog.at_level(logging.INFO), monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", None)
        Path("parts/results.json").unlink()
        assert main([*words, "parts", "--resume"]) == 0
    assert "has ended" in caplog.text and Path("parts/results.json").exists()
    Path("parts", FILE).unlink()
    assert main([*words, "parts", "--resume"]) == 2  # an archive alone is nothing to go on with
