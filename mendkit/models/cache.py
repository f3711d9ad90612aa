"""Values of texts on disk, shared by all runs: <folder>/trunk/<space>/trunk-<texts>.safetensors.

A *space* is what the values depend on besides the text: weights, configuration, versions. A file
gets its name in one rename and never changes, so processes need no lock, and a killed one leaves at
most a temporary file that nobody reads. At the limit no more is kept: delete the folder.
"""

import json
import logging
import os
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..runs import DAMAGE, atomically, sha256, user_path

logger = logging.getLogger(__name__)

TextValues = tuple[Tensor, Tensor]


def cache_root() -> Path:
    """$MENDKIT_CACHE, else $XDG_CACHE_HOME/mendkit, else ~/.cache/mendkit."""
    if given := os.environ.get("MENDKIT_CACHE"):
        return user_path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return user_path(given) / "mendkit"
    return Path.home() / ".cache" / "mendkit"


def default_folder() -> Path:
    """Where texts' values go if `cache_dir` does not say."""
    return cache_root() / "trunk"


class TextCache:
    """Two tensors of each text by its key, in one space; `limit` in bytes is of all spaces.

    Nothing raises: a file that cannot be read is dropped, one that cannot be written is left out,
    with a warning.
    """

    def __init__(self, folder: str | Path | None, space: Mapping[str, Any], *, limit: int) -> None:
        self.root = default_folder() if folder is None else user_path(folder) / "trunk"
        described = json.dumps(space, sort_keys=True, default=str)
        self.folder = self.root / sha256(described)[:32]
        self.limit, self.writable = limit, True
        self._names: dict[Path, set[str]] = {}  # of the texts in each file

    def find(self, keys: Collection[Hashable]) -> dict[Any, TextValues]:
        """The values of those keys that are on disk now, whoever wrote them, as memory maps."""
        by_name = {_name(key): key for key in keys}
        found: dict[Any, TextValues] = {}
        # The folder is looked through each time: another process may have written meanwhile.
        for path in sorted(self.folder.glob("trunk-*.safetensors")):
            try:
                for name, values in self._read(path, by_name):
                    found[by_name[name]] = values
            except DAMAGE as error:
                logger.warning(
                    "cache: %s cannot be read (%s); its values are computed again", path, error
                )
                self._names.pop(path, None)
                with suppress(OSError):
                    path.unlink()
        return found

    def _read(self, path: Path, names: Collection[str]) -> Iterator[tuple[str, TextValues]]:
        # 1. What a file holds is read once: it never changes.
        if path not in self._names:
            with safe_open(path, "pt") as file:
                names_held = file.keys()
            self._names[path] = {name.partition(".")[0] for name in names_held}
        chosen = self._names[path].intersection(names)
        # 2. Tensors are views of the file's pages, so they take no memory of the process.
        if chosen:
            with safe_open(path, "pt") as file:
                for name in chosen:
                    yield name, (file.get_tensor(f"{name}.0"), file.get_tensor(f"{name}.1"))

    def _bytes(self) -> int:
        """What all spaces hold. Another process may rename or remove a file meanwhile."""
        total = 0
        for file in self.root.glob("*/*"):
            with suppress(FileNotFoundError):
                total += file.stat().st_size
        return total

    def add(self, values: Mapping[Hashable, TextValues]) -> None:
        """Write one file."""
        tensors: dict[str, Tensor] = {}
        for key, pair in values.items():
            for i, tensor in enumerate(pair):
                tensors[f"{_name(key)}.{i}"] = tensor
        if not self.writable:
            return
        # The same texts have the same name, so two processes that computed them write one file.
        path = self.folder / f"trunk-{sha256(*tensors)[:32]}.safetensors"
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            if size + self._bytes() > self.limit:
                raise OSError("`disk_cache_bytes` is reached")
            atomically(path, lambda temporary: save_file(tensors, temporary))
        except (OSError, SafetensorError) as error:
            self.writable = False  # one failure is told, then nothing is tried again
            logger.warning(
                "cache: cannot write to %s (%s); values are not kept: free some space, set "
                "`cache_dir` or MENDKIT_CACHE to another folder, or `disk_cache_bytes: 0`",
                self.folder,
                error,
            )


def _name(key: Hashable) -> str:
    return sha256(repr(key))[:32]
