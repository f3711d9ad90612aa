"""Rows of an evaluation kept as they are made, so that one that was stopped goes on.

Beside the file of rows stands another until the evaluation has ended. Its first line says what the
evaluation is of, every other one is a part: the rows of some edits, and values of their model.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MendkitError
from ..runs import append_line, locked, make_folder, user_path, write_text
from .results import EditRow

logger = logging.getLogger(__name__)

Part = tuple[list[EditRow], dict[str, float]]


@dataclass
class Kept:
    """The parts made so far, in their order; without a `path` nothing is kept."""

    path: Path | None = None
    parts: list[Part] = field(default_factory=list)
    done: int = 0

    @property
    def state(self) -> Path | None:
        """The file for the model as it is edited so far."""
        return self.path and self.path.with_suffix(".pt")

    def once(self, make: Callable[[], Part]) -> Part:
        """The next part: kept from an earlier run, or made and kept now."""
        if self.done == len(self.parts):
            rows, values = make()
            self.parts.append((rows, values))
            if self.path is not None:
                line = {"rows": [vars(row) for row in rows], "values": values}
                append_line(self.path, json.dumps(line, ensure_ascii=False))
        self.done += 1
        return self.parts[self.done - 1]


@contextmanager
def keeping(rows: str | Path | None, run_of: Callable[[], dict[str, Any]]) -> Iterator[Kept]:
    """The parts kept for the file `rows` by an evaluation of the same; its folder is locked.

    Raises MendkitError if another process is within, or for parts of another evaluation.
    """
    if rows is None:
        yield Kept()
        return
    path = user_path(rows).with_suffix(".unfinished.jsonl")
    with locked(make_folder(path.parent)):
        now = run_of()
        if path.exists():
            # The last piece is empty, or what a write that failed has left.
            *lines, _ = path.read_text("utf-8").split("\n")
        else:
            lines = [json.dumps(now, ensure_ascii=False)]
            path.with_suffix(".pt").unlink(missing_ok=True)
        try:
            theirs, parts = json.loads(lines[0]), [_part_of(line) for line in lines[1:]]
        except (ValueError, LookupError, TypeError):
            raise MendkitError(f"{path} is damaged; delete it to start anew") from None
        _check(path, theirs, json.loads(json.dumps(now)))
        write_text(path, "".join(f"{line}\n" for line in lines))
        try:
            yield Kept(path, parts)
        except KeyboardInterrupt:
            logger.warning(
                "stopped; %s keeps the rows, and the same call continues from them", path
            )
            raise
        path.unlink()
        path.with_suffix(".pt").unlink(missing_ok=True)


def _check(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    other = [name for name in ours if theirs.get(name) != ours[name]]
    if other:
        raise MendkitError(
            f"{path} holds rows of another evaluation (other {', '.join(other)}); give the same "
            "to go on with it, give another folder, or delete the file to start anew"
        )


def _part_of(line: str) -> Part:
    part = json.loads(line)
    rows = [EditRow.from_dict(row) for row in part["rows"]]
    return rows, part["values"]
