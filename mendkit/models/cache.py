"""Values of texts on disk, shared by all runs: <folder>/trunk/<space>/trunk-<texts>.safetensors.

A *space* is what the values depend on besides the text: weights, configuration, versions. A
*shard* holds the tensors of some texts. It gets its name in one rename and never changes, so
processes need no lock, and a killed one leaves at most a temporary file that nobody reads. When
the limit is reached, the least recently used shards go.
"""

import json
import logging
import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..runs import DAMAGE, atomically, sha256

logger = logging.getLogger(__name__)

SHARD_BYTES = 16_000_000
"""The size of a shard to aim at: little to lose in a crash, and few files."""

STALE_SECONDS = 3600
"""Older temporary files belong to a killed process: a shard is written in less than a minute."""

TextValues = tuple[Tensor, ...]
"""The tensors of one text, each (its length, width)."""


def cache_root() -> Path:
    """$MENDKIT_CACHE, else $XDG_CACHE_HOME/mendkit, else ~/.cache/mendkit."""
    if given := os.environ.get("MENDKIT_CACHE"):
        return Path(given).expanduser()
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given).expanduser() / "mendkit"
    return Path.home() / ".cache" / "mendkit"


def default_folder() -> Path:
    """Where shards go if `cache_dir` does not say."""
    return cache_root() / "trunk"


class TextCache:
    """Tensors of texts by key, in one space. `folder` None is `default_folder()`; `limit` is in
    bytes.

    The limit holds for all spaces of a folder. Nothing raises: a shard that cannot be read is
    dropped with a warning, and where nothing can be written, one warning says so.
    """

    def __init__(self, folder: str | Path | None, space: Mapping[str, Any], *, limit: int) -> None:
        self.root = default_folder() if folder is None else Path(folder).expanduser() / "trunk"
        described = json.dumps(space, sort_keys=True, default=str)
        self.folder = self.root / sha256(described)[:32]
        self.limit, self.writable = limit, True
        self._in_use: set[Path] = set()  # shards that this cache has mapped
        self._where: dict[bytes, Path] = {}
        self._seen: set[Path] = set()

    def find(self, keys: Collection[bytes]) -> dict[bytes, TextValues]:
        """The values of those keys that are on disk now, whoever wrote them."""
        self._look_for_new_shards()
        paths = {self._where[key] for key in keys if key in self._where}
        found: dict[bytes, TextValues] = {}
        for path in sorted(paths):
            values = self._read(path)
            found.update((key, values[key]) for key in keys if key in values)
        return found

    def add(self, values: Mapping[bytes, TextValues]) -> None:
        """Write one shard."""
        rows = list(values.values())
        tensors = {
            "keys": torch.tensor([list(key) for key in values], dtype=torch.uint8),
            "counts": torch.tensor([[len(tensor) for tensor in row] for row in rows]),
        }
        for i, column in enumerate(zip(*rows, strict=True)):
            tensors[f"array{i}"] = torch.cat(column)
        # One failure is told; after it nothing is tried again.
        if not self.writable or not self._make_room(sum(t.nbytes for t in tensors.values())):
            return
        path = self.folder / f"trunk-{sha256(*values)[:32]}.safetensors"
        try:
            atomically(path, lambda temporary: save_file(tensors, temporary))
        except (OSError, SafetensorError) as error:
            self.writable = False
            logger.warning(
                "cache: cannot write to %s (%s); values are not kept: free some space, set "
                "`cache_dir` or MENDKIT_CACHE to another folder, or `disk_cache_bytes: 0`",
                self.folder,
                error,
            )

    def _look_for_new_shards(self) -> None:
        for path in sorted(self.folder.glob("trunk-*.safetensors")):
            if path not in self._seen:
                self._seen.add(path)
                for key in self._tensors(path, "keys").get("keys", ()):
                    self._where[bytes(key.tolist())] = path

    def _read(self, path: Path) -> dict[bytes, TextValues]:
        """All values of a shard, as views of its memory map; none if it is damaged or gone."""
        tensors = self._tensors(path)
        if not tensors:
            return {}
        self._in_use.add(path)
        with suppress(OSError):  # a read-only folder can be read all the same
            os.utime(path)
        columns = []
        for i, lengths in enumerate(tensors["counts"].T.tolist()):
            columns.append(tensors[f"array{i}"].split(lengths))
        keys = [bytes(key.tolist()) for key in tensors["keys"]]
        return dict(zip(keys, zip(*columns, strict=True), strict=True))

    def _tensors(self, path: Path, *names: str) -> dict[str, Tensor]:
        """The named tensors of a shard, or all. None if it cannot be read: then it is forgotten."""
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in names or file.keys()}
        except DAMAGE as error:
            self._where = {key: where for key, where in self._where.items() if where != path}
            self._seen.discard(path)
            if path.exists():  # otherwise another process has made room
                logger.warning(
                    "cache: %s cannot be read (%s); its values are computed again", path, error
                )
            if not isinstance(error, OSError):
                with suppress(OSError):
                    path.unlink()
            return {}

    def _make_room(self, size: int) -> bool:
        """Remove stale temporary files and the least recently used shards; is there room now?"""
        for path in self.root.glob("*/.trunk-*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
        # Reading a shard sets its time, so the oldest is the one that was not used for longest.
        shards = []
        for path in self.root.glob("*/trunk-*.safetensors"):
            with suppress(OSError):
                shards.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        held = sum(bytes_held for _, bytes_held, _ in shards)
        for _, bytes_held, path in sorted(shards):
            if held + size > self.limit and path not in self._in_use:
                with suppress(OSError):
                    path.unlink()
                    held -= bytes_held
        if held + size > self.limit:
            logger.info(
                "cache: full (%.1f GB, `disk_cache_bytes`); further values are not kept", held / 1e9
            )
        return held + size <= self.limit
