"""Several runs at once, and places that cannot be written to: one clear error, no half a file."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mendkit.__main__ import main
from mendkit.errors import MendkitError
from mendkit.mend.training import train
from tests.oracles.claims import EXAMPLES, hparams

ROOT = Path(__file__).parents[2]
DATA = ["--train-limit", "12", "--validation-limit", "4"]


def start(*words: str, **environment: str) -> subprocess.Popen:
    """A process of its own on the command line."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "mendkit", *words],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_training_ends_at_once_and_one_after_a_kill_starts(here, llama, capsys):
    names = ("max_iters", "val_interval", "log_interval", "checkpoint_interval")
    long = [f"{name}=1000000" for name in names]
    first = start("train", "tiny.yaml", *long, "--ignore-memory", "--out", "run", *DATA)
    try:
        history = Path("run/history.jsonl")  # after steps 0 and 1 nothing is written for long
        while not history.exists() or history.read_text().count("\n") < 2:
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.05)
        before = contents(Path("run"))
        for more in ("--resume", "--overwrite"):
            assert main(["train", "tiny.yaml", more, "--out", "run", *DATA]) == 2
            last = capsys.readouterr().err.splitlines()[-1]
            assert last.startswith("error: run is in use by another run; wait")
        with pytest.raises(MendkitError, match="in use by another run"):
            train(hparams(max_iters=1), EXAMPLES, EXAMPLES[:2], base=llama, run_dir="run")
        assert first.poll() is None and contents(Path("run")) == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert main(["train", "tiny.yaml", "--overwrite", "--out", "run", *DATA]) == 0


# ---------------------------------------------------------------------------- places and networks

EDIT = ["edit", "tiny.yaml", "archive=archive.safetensors", "--max-new-tokens", "3"]
EDIT += ["--prompt", "The capital of France is", "--target", "Lima"]
ARCHIVE = ["tiny.yaml", "archive=archive.safetensors"]
WRITING = {
    "train": ["train", "tiny.yaml", *DATA, "--out", "PLACE"],
    "edit": [*EDIT, "--out", "PLACE"],
    "adapter": [*EDIT, "--save-adapter", "PLACE"],
    "merged": [*EDIT, "--save-merged", "PLACE"],
    "kept": [*EDIT, "--save-edit", "PLACE/edit"],
    "evaluate": ["evaluate", *ARCHIVE, "--limit", "2", "--max-new-tokens", "3", "--out", "PLACE"],
    "report": ["report", *ARCHIVE, "test_limit=2", "--out", "PLACE"],
}


# Of Linux's <linux/capability.h>: what lets root write (bit 1) and read (bit 2) everywhere.
CAPABILITY_VERSION = 0x20080522
BEYOND_PERMISSIONS = 0b110


@contextmanager
def without_rights(place: Path) -> Iterator[None]:
    """This process may not write there. Root keeps its user, who can read the interpreter."""
    place.chmod(0o555)
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    held = (ctypes.c_uint32 * 6)()  # the first word: which are in force
    assert libc.capget(header, held) == 0
    fewer = type(held)(held[0] & ~BEYOND_PERMISSIONS, *held[1:])
    assert libc.capset(header, fewer) == 0
    try:
        assert not os.access(place, os.W_OK, effective_ids=True)
        yield
    finally:
        libc.capset(header, held)


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """A file system that is mounted so."""
    with file_system(place, "ro"):
        yield


@contextmanager
def full(place: Path) -> Iterator[None]:
    """A file system with room for some files and no content."""
    with file_system(place, "size=4k"):
        (place / "..data").write_bytes(bytes(4096))
        yield


@contextmanager
def file_system(place: Path, options: str) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a file system needs root: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("state", [without_rights, read_only, full])
def test_where_nothing_can_be_written_there_is_one_clear_error_and_no_half_of_a_file(
    here, capsys, state
):
    place = here / "place"
    place.mkdir()
    with state(place):
        before = contents(place)
        for name, words in WRITING.items():
            status = main([word.replace("PLACE", str(place)) for word in words])
            said = capsys.readouterr().err.splitlines()[-1]
            assert status == 2 and said.startswith("error: ") and str(place) in said, (name, said)
            now = contents(place)
            for left in now.keys() - before.keys():
                assert not now[left], name
                (place / left).unlink()


def test_a_hub_model_without_a_network_is_one_clear_error(tmp_path):
    nowhere = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = str(tmp_path / "run")
    child = start("train", "model_name=someone/model", *DATA, "--out", run, **nowhere)
    _, said = child.communicate()
    (error,) = [line for line in said.splitlines() if "someone/model" in line]
    assert child.returncode == 2 and not Path(run).exists()
    assert error.startswith("error: ")
    assert "without a network give a local folder, or the bundled" in error
