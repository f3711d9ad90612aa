"""Run folders: parameters, provenance, locks, whole files, memory, progress. Imports no torch."""

import ctypes
import errno
import hashlib
import json
import logging
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import psutil
from filelock import lock_descriptor
from safetensors import SafetensorError
from tqdm import tqdm

from .errors import MendkitError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("mendkit", "torch", "transformers", "safetensors", "papermill", "matplotlib")

DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, BadZipFile, SafetensorError, UnpicklingError),
)
"""What reading a damaged file may raise."""


def user_path(path: str | Path) -> Path:
    """A path as a shell would read it: `~` is the home folder."""
    return Path(os.path.expanduser(path))


def make_folder(path: str | Path) -> Path:
    """Make a folder if it is not there. Raises MendkitError if it cannot be made."""
    path = user_path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MendkitError(f"cannot make the folder {path}: {error}; give another") from None
    return path


_until_exit = ExitStack()


def open_run(
    folder: str | Path,
    hparams: Any = None,
    *,
    keep: bool = False,
    data: Mapping[str, Sequence[Any]] | None = None,
) -> Path:
    """Make the run folder, and write into it what will run (`hparams`, if any), on what and where.

    `data`: examples by what they are for, of which number and SHA-256 are written. With `keep` no
    other process gets the folder until this one ends (`locked`).
    """
    folder = make_folder(folder)
    if keep:
        _until_exit.enter_context(locked(folder))
    run: dict[str, Any] = {"hparams": None if hparams is None else hparams.to_dict(), "data": {}}
    for name, examples in (data or {}).items():
        digest = sha256(repr(tuple(examples)))
        run["data"][name] = {"examples": len(examples), "sha256": digest}
    write_json(folder / "run.json", run | provenance())
    return folder


def provenance() -> dict[str, Any]:
    """Commit, versions, machine and time: what one needs to run it again."""
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "commit": _commit(),
        "versions": versions | {"python": platform.python_version()},
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": _processor(),
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


@cache
def _commit() -> str | None:
    """The checkout's commit, "-dirty" if files differ from it; None for an installed kit."""
    if not (CHECKOUT / ".git").exists():  # git would find a repository around it
        return None
    command = "git --no-optional-locks describe --always --dirty --abbrev=40 --exclude=*"
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            command.split(), cwd=CHECKOUT, capture_output=True, text=True, timeout=10, check=True
        )
        return found.stdout.strip()
    return None


@cache
def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for name in re.findall(r"model name\s*: (.+)", info.read_text()):
            return name
    return platform.machine()


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (the kit itself draws from generators that are passed)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def kit_files() -> dict[Path, Path]:
    """Configurations and notebooks by their path in a checkout: there, else as installed."""
    if (CHECKOUT / "pyproject.toml").is_file():
        held = [*CHECKOUT.glob("configs/**/*.yaml"), *CHECKOUT.glob("notebooks/**/*.ipynb")]
        paths = [path for path in sorted(held) if path.parent.name != ".ipynb_checkpoints"]
        return {path.relative_to(CHECKOUT): path for path in paths}
    found = {}
    with suppress(PackageNotFoundError):
        for file in files("mendkit") or ():
            _, shared, name = file.as_posix().partition("share/mendkit/")
            if shared:
                found[Path(name)] = Path(str(file.locate())).resolve()
    return found


def kit_file(path: Path) -> Path:
    """One of `kit_files`, unless it is here; the path itself where there is none."""
    return path if path.is_file() else kit_files().get(path, path)


_held: set[tuple[int, int]] = set()  # device and inode of the folders that this process locks


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of a folder while the context lasts.

    The lock is the system's, on the folder itself: it ends with the process, and leaves no file.
    The process that holds it may enter again. Nothing is locked where there is no folder yet, or
    where the file system has no locks. Raises MendkitError if another process is within.
    """
    with ExitStack() as stack:
        try:
            handle = os.open(user_path(folder), os.O_RDONLY)
            stack.callback(os.close, handle)
            status = os.fstat(handle)
            inode = (status.st_dev, status.st_ino)
            free = inode in _held or lock_descriptor(handle, blocking=False)
            if free and inode not in _held:
                _held.add(inode)
                stack.callback(_held.discard, inode)
        except OSError as error:
            logger.debug("%s is not locked: %s", folder, error)
            free = True
        if not free:
            raise MendkitError(
                f"{folder} is in use by another run; wait until it has ended, or give another "
                "folder"
            )
        yield


def sha256(*parts: str | bytes | memoryview) -> str:
    """The SHA-256 of all parts in a row, in hexadecimal; text is read as UTF-8."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomically(path: str | Path, write: Callable[[str], object]) -> Path:
    """Let `write` fill a temporary file, and rename it to `path`.

    What was there stays if that, or the power, fails. Raises OSError that names `path`.
    """
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
        write(temporary)
        os.chmod(temporary, 0o644)
        with open(temporary, "rb+") as file:  # a rename may reach the disk before the data
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            os.unlink(temporary)
        if isinstance(error, SafetensorError):
            raise OSError(errno.EIO, str(error), str(path)) from None
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)
        raise
    return path


def append_line(path: Path, text: str) -> None:
    """Append a line as a whole or not at all. Raises OSError if there is no room."""
    with path.open("ab", buffering=0) as file:
        size, line = file.tell(), text.encode() + b"\n"
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def write_json(path: str | Path, values: Any) -> Path:
    """Write JSON atomically."""
    return write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 atomically."""
    return atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def peak_memory_gb() -> float:
    """Peak resident memory of this process, or since its peak was restarted, in GB (10⁹ bytes)."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says may be the peak of the process that started this one
        return int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0]) * 1024 / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory(device: "torch.device") -> int:
    """Bytes that a new allocation may take; on the CPU within the limit of the control group."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return free


def return_memory() -> None:
    """Give freed memory back to the system where the C library keeps it for later (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class Progress:
    """One live line, unless `silent`.

    A terminal rewrites its line, a notebook (live, executed or exported) updates one display.
    Elsewhere a log line comes now and then.
    """

    def __init__(self, title: str, *, silent: bool = False) -> None:
        self.title, self.silent = title, silent
        self._line: Any = None  # tqdm's, or a notebook's display
        self._next = 0.0

    def show(self, text: str, *, force: bool = False) -> None:
        """Show `text` as the live line, at most four times a second unless forced."""
        now = time.monotonic()
        if self.silent or (now < self._next and not force):
            return
        line = f"{self.title}: {text}"
        self._next = now + 0.25
        if _in_kernel():
            from IPython.display import Markdown, display

            if self._line is None:
                self._line = display(Markdown(line), display_id=True)
            else:
                self._line.update(Markdown(line))
        elif sys.stderr.isatty():
            self._line = self._line or tqdm(bar_format="{desc}", dynamic_ncols=True)
            self._line.set_description_str(line)
        else:
            self._next = now + 30.0
            logger.info("%s", line)

    def phase(self, name: str, *, before: int = 0) -> Callable[..., None]:
        """A callback (done, total, note) for a phase of work, `before` of which is done already."""
        began = time.monotonic()

        def update(done: int, total: int, note: str = "") -> None:
            pace = (time.monotonic() - began) / max(done - before, 1)
            line = f"{name} {done}/{total} {note}".strip()
            self.show(f"{line}, {clock(pace * (total - done))} left", force=done == total)

        return update

    def close(self) -> None:
        """End the live line."""
        if isinstance(self._line, tqdm):
            self._line.close()


def _in_kernel() -> bool:
    """Whether a Jupyter kernel runs this code."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
