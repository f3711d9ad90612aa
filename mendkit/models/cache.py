"""Values of texts on disk, shared by all runs: shards that are written once and read through memory maps.

    <folder>/trunk/<space>/trunk-<texts>.safetensors

A *space* is whatever the values depend on besides the text: weights, configuration, split, versions. A *shard* holds
some texts' arrays one after the other, a key and the lengths of each, and a checksum over all of it. Shards never
change, and a shard gets its name in one rename: whoever is killed leaves at most a temporary file that nobody reads,
and processes that write at once need no locks. Shards that were not used for longest go when the limit is reached.
"""

import hashlib
import json
import logging
import os
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..runs import DAMAGE, atomically
from .bundled import cache_root

logger = logging.getLogger(__name__)

SHARD_BYTES = 16_000_000
"""What whoever fills the cache aims at for one shard: little to lose in a crash, and few files."""

STALE_SECONDS = 3600
"""Temporary files older than this were left by a process that was killed: a shard is written in less than a minute."""

Values = tuple[np.ndarray, ...]
"""The arrays of one text, each (its own length, width)."""

_open_caches: weakref.WeakSet["TextCache"] = weakref.WeakSet()


class TextCache:
    """Arrays of texts by key, in one space; `folder` null is the platform's cache folder, `limit` is in bytes.

    The limit holds for all spaces of a folder together. Nothing raises: a damaged shard is dropped with a warning, and
    where nothing can be written, one warning says so and the values are not kept.
    """

    def __init__(
        self, folder: str | Path | None, space: Mapping[str, Any], /, *, limit: int
    ) -> None:
        self.root = default_folder() if folder is None else Path(folder).expanduser() / "trunk"
        self.folder = (
            self.root
            / hashlib.sha256(json.dumps(space, sort_keys=True, default=str).encode()).hexdigest()[
                :32
            ]
        )
        self.limit, self.writable = limit, True
        self.used: set[Path] = set()  # shards whose maps are in use
        self._where: dict[bytes, Path] = {}
        self._seen: set[Path] = set()
        _open_caches.add(self)

    def find(self, keys: Collection[bytes], /) -> dict[bytes, Values]:
        """The values of those keys that are on disk now, whoever wrote them."""
        self._look()
        wanted, found = set(keys), {}
        for path in sorted({self._where[key] for key in wanted if key in self._where}):
            found |= {key: values for key, values in self._read(path).items() if key in wanted}
        return found

    def add(
        self,
        keys: Sequence[bytes],
        arrays: Sequence[np.ndarray],
        counts: Sequence[Sequence[int]],
        /,
    ) -> None:
        """Write one shard: the rows of each array belong to the keys in turn, `counts[k]` (one per array) to key k."""
        tensors = {f"array{i}": torch.from_numpy(array) for i, array in enumerate(arrays)}
        tensors |= {
            "keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8),
            "counts": torch.tensor(counts),
        }
        path = self.folder / f"trunk-{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
        if not self.writable or not self._make_room(sum(t.nbytes for t in tensors.values())):
            return
        try:
            atomically(
                path,
                lambda temporary: save_file(
                    tensors, temporary, metadata={"sha256": _checksum(tensors)}
                ),
            )
        except (OSError, SafetensorError) as error:
            self.writable = False
            logger.warning(
                "cache: cannot write to %s (%s); going on without keeping these values: free some space, set "
                "`cache_dir` or MENDKIT_CACHE to another folder, or `disk_cache_bytes: 0`",
                self.folder,
                error,
            )

    def _look(self) -> None:
        """Take note of shards that are new since the last look."""
        for path in sorted(self.folder.glob("trunk-*.safetensors")):
            if path not in self._seen:
                self._seen.add(path)
                try:
                    with safe_open(path, "pt") as file:
                        self._where |= dict.fromkeys(_keys(file.get_tensor("keys")), path)
                except DAMAGE as error:
                    self._drop(path, error)

    def _read(self, path: Path) -> dict[bytes, Values]:
        """All values of a shard, as views of its memory map; none if it is damaged or gone."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get("sha256")
            if _checksum(tensors) != expected:
                raise SafetensorError("its checksum is another")
        except DAMAGE as error:
            self._drop(path, error)
            return {}
        self.used.add(path)
        with suppress(OSError):  # a folder that is read-only can be read all the same
            os.utime(path)
        keys, ends = _keys(tensors.pop("keys")), tensors.pop("counts").cumsum(0).tolist()
        arrays = [tensors[f"array{i}"].numpy() for i in range(len(tensors))]
        starts = [[0] * len(arrays), *ends[:-1]]
        return {
            key: tuple(array[a:b] for array, a, b in zip(arrays, start, end, strict=True))
            for key, start, end in zip(keys, starts, ends, strict=True)
        }

    def _drop(self, path: Path, error: Exception) -> None:
        """Forget a shard that cannot be read, and remove it if it is damaged."""
        self._where = {key: where for key, where in self._where.items() if where != path}
        self._seen.discard(path)
        if path.exists():  # else another process made room in the meantime
            logger.warning(
                "cache: %s cannot be read (%s); its values are computed again", path, error
            )
        if not isinstance(error, OSError):
            with suppress(OSError):
                path.unlink()

    def _make_room(self, size: int) -> bool:
        """Remove what was left half-written, and the shards that were not used for longest; is there room now?"""
        for path in self.root.glob("*/.trunk-*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
        shards = []
        for path in self.root.glob("*/trunk-*.safetensors"):
            with suppress(OSError):
                shards.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        held, kept = (
            sum(own for _, own, _ in shards),
            set().union(*(cache.used for cache in _open_caches)),
        )
        for _, own, path in sorted(shards):
            if held + size > self.limit and path not in kept:
                with suppress(OSError):
                    path.unlink()
                    held -= own
        if held + size > self.limit:
            logger.info(
                "cache: full (%.1f GB, `disk_cache_bytes`); further values are not kept", held / 1e9
            )
        return held + size <= self.limit


def default_folder() -> Path:
    """Where shards go if `cache_dir` does not say."""
    return cache_root() / "trunk"


def _keys(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.numpy()]


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
