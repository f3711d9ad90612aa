"""Several runs at once, and places that cannot be written to: one clear error, and nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mendkit.__main__ import main
from mendkit.errors import MendkitError
from mendkit.mend.training import train
from mendkit.runs import locked
from tests.cli.test_cli import DATA, here, trained
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.notebooks import write_notebooks

__all__ = ["here", "trained"]  # fixtures

ROOT = Path(__file__).parents[2]


def start(*words: str, **environment: str) -> subprocess.Popen:
    """A process of its own on the command line."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "mendkit", *words]
    own = os.environ | {"PYTHONPATH": paths} | environment
    return subprocess.Popen(
        command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------- two on one folder


def test_a_second_training_ends_at_once_and_one_after_a_kill_starts(here, llama, capsys):
    long = [
        "max_iters=1000000",
        "val_interval=1000000",
        "log_interval=1000000",
        "checkpoint_interval=1000000",
    ]
    first = start("train", "tiny.yaml", *long, "--ignore-memory", "--out", "run", *DATA)
    try:
        history = Path("run/history.jsonl")  # after steps 0 and 1 nothing is written for long
        while not history.exists() or history.read_text().count("\n") < 2:
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.05)
        before = contents(Path("run"))
        for more in ("--resume", "--overwrite"):
            assert main(["train", "tiny.yaml", more, "--out", "run", *DATA]) == 2
            assert (
                capsys.readouterr()
                .err.splitlines()[-1]
                .startswith("error: run is in use by another run; wait")
            )
        with pytest.raises(MendkitError, match="in use by another run"):
            train(hparams(max_iters=1), EXAMPLES, EXAMPLES[:2], base=llama, run_dir="run")
        assert first.poll() is None and contents(Path("run")) == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert main(["train", "tiny.yaml", "--overwrite", "--out", "run", *DATA]) == 0


def test_a_process_may_enter_again_and_a_folder_that_is_not_there_holds_nobody_up(tmp_path):
    held = (
        f"from pathlib import Path; from mendkit.runs import locked; "
        f"locked(Path({str(tmp_path)!r})).__enter__()"
    )
    other = [sys.executable, "-c", held]
    with locked(tmp_path), locked(tmp_path), locked(tmp_path / "none"):
        assert b"in use" in subprocess.run(other, cwd=ROOT, capture_output=True).stderr
    assert subprocess.run(other, cwd=ROOT, capture_output=True).returncode == 0


def test_where_nothing_can_be_locked_runs_go_on(tmp_path, monkeypatch):
    def unsupported(*_, **__):
        raise OSError("no locks here")

    monkeypatch.setattr("mendkit.runs.lock_descriptor", unsupported)
    with locked(tmp_path):
        pass


# ------------------------------------------------------------------------------------------ places and networks

EDIT = [
    "edit",
    "tiny.yaml",
    "archive=archive.safetensors",
    "--prompt",
    "The capital of France is",
    "--target",
    "Lima",
]
WRITING = {
    "train": ["train", "tiny.yaml", *DATA, "--out", "PLACE"],
    "edit": [*EDIT, "--out", "PLACE"],
    "adapter": [*EDIT, "--save-adapter", "PLACE"],
    "merged": [*EDIT, "--save-merged", "PLACE"],
    "page": [*EDIT, "--save-report", "PLACE/page.html"],
    "evaluate": [
        "evaluate",
        "tiny.yaml",
        "archive=archive.safetensors",
        "--limit",
        "2",
        "--out",
        "PLACE",
    ],
    "report": [
        "report",
        "tiny.yaml",
        "archive=archive.safetensors",
        "test_limit=2",
        "--out",
        "PLACE",
    ],
}


@contextmanager
def without_rights(place: Path) -> Iterator[None]:
    """This process may not write there."""
    place.chmod(0o555)
    with ExitStack() as stack:
        if os.geteuid() == 0:  # whom no rights hold back
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        yield


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
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"a file system of its own needs root: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("state", [without_rights, read_only, full])
def test_where_nothing_can_be_written_there_is_one_clear_error_and_no_half_of_a_file(
    here, trained, capsys, state
):
    place = here / "place"
    place.mkdir()
    write_notebooks(here / "notebooks")
    for path in (*trained.rglob("*"), trained, *place.parents[:3]):
        path.chmod(0o755)
    with state(place):
        before = contents(place)
        for name, words in WRITING.items():
            status = main(
                [str(place) + word[5:] if word.startswith("PLACE") else word for word in words]
            )
            said = capsys.readouterr().err.splitlines()[-1]
            assert status == 2 and said.startswith("error: ") and str(place) in said, (
                name,
                status,
                said,
            )
            assert not any(
                contents(place)[left] for left in contents(place).keys() - before.keys()
            ), name
            for left in contents(place).keys() - before.keys():
                (place / left).unlink()


def test_a_hub_model_without_a_network_is_one_clear_error(tmp_path):
    nowhere = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    child = start(
        "train", "model_name=someone/model", *DATA, "--out", str(tmp_path / "run"), **nowhere
    )
    _, said = child.communicate()
    (error,) = [line for line in said.splitlines() if "someone/model" in line]
    assert child.returncode == 2 and not (tmp_path / "run").exists()
    assert (
        error.startswith("error: ")
        and "without a network give a local folder, or the bundled" in error
    )
