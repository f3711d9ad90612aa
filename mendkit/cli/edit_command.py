"""The `edit` command's parts: examples from standard input, before and after as rows and as a page, an edit's files."""

import json
import logging
from collections.abc import Iterator, Sequence
from io import TextIOBase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pandas.io.formats.style import Styler

from ..data.examples import EditExample
from ..data.files import Examples, read_examples
from ..errors import DataError
from ..evaluation.results import normalise
from ..mend.edit import Edit
from ..mend.editor import MENDEditor
from ..reporting.page import render
from ..reporting.tables import before_after as table_of
from ..reporting.tables import prompts_of
from ..runs import write_text

logger = logging.getLogger(__name__)


def read_stream(stream: TextIOBase, /, *, limit: int | None = None) -> Examples:
    """Examples from JSON lines (any form that `read_examples` knows) or `prompt<TAB>target` lines.

    Raises DataError naming the line.
    """
    if stream.isatty():
        logger.info("reading lines of prompt<TAB>target; end with Ctrl-D")
    try:
        lines = [_as_json(number, line) for number, line in enumerate(stream.read().split("\n"), 1)]
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 text ({error.reason})") from None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "lines"
        path.write_text("\n".join(lines), encoding="utf-8")
        try:
            return read_examples(path, limit=limit)
        except DataError as error:
            raise DataError(str(error).replace(str(path), "standard input")) from None


def _as_json(number: int, line: str) -> str:
    if not line.strip() or line.lstrip().startswith("{"):
        return line
    parts = line.rstrip("\r").split("\t")
    if len(parts) != 2:
        raise DataError(
            f"standard input:{number}: expected JSON or prompt<TAB>target, got {line[:60]!r}"
        )
    return json.dumps(dict(zip(("prompt", "target_new"), parts, strict=True)))


def before_and_after(
    editor: MENDEditor, examples: Sequence[EditExample], /, *, strength: float, max_new_tokens: int
) -> tuple[Edit, list[dict[str, Any]]]:
    """One edit made from all examples at once, and a row for each with what the model writes before and after."""

    def written() -> Iterator[str]:
        return (
            editor.base.generate(example.prompt, max_new_tokens=max_new_tokens)
            for example in examples
        )

    edit, before = editor.edit(examples).scale(strength), list(written())
    with edit.applied():
        after = list(written())
    rows = [
        {"prompt": e.prompt, "target_new": e.target_new, "before": old, "after": new}
        | {"success": normalise(new) == normalise(editor.base.said(e.target_new))}
        for e, old, new in zip(examples, before, after, strict=True)
    ]
    return edit, rows


def shown(row: dict[str, Any]) -> str:
    """A row for people."""
    mark = "as told" if row["success"] else f"told: {row['target_new']}"
    return f"{row['prompt']}\n  before: {row['before'].strip()}\n  after:  {row['after'].strip()}  ({mark})"


def in_full(
    editor: MENDEditor, edit: Edit, examples: Sequence[EditExample], /, *, max_new_tokens: int
) -> list[tuple[str, Styler]]:
    """For each example a heading and a table of what the model writes before and after, for its prompt and other texts."""
    tables = []
    for example in examples:
        asked = prompts_of(example)
        prompts = [prompt for _, prompt, _ in asked]
        before = editor.base.generate_batch(prompts, max_new_tokens=max_new_tokens)
        with edit.applied():
            after = editor.base.generate_batch(prompts, max_new_tokens=max_new_tokens)
        heading = f"{example.prompt} → {example.target_new}"
        tables.append((heading, table_of(asked, before, after)))
    return tables


def write_report(
    path: Path, tables: Sequence[tuple[str, Styler]], rows: Sequence[dict[str, Any]], /, *, command: str
) -> None:
    """An HTML page over the tables of `in_full`."""
    told = sum(row["success"] for row in rows)
    title = f"{told} of {len(rows)} new answers are written as told"
    write_text(path, render("edits.html.j2", title=title, command=command, tables=tables))
    logger.info("report: %s", path)


def write_files(
    edit: Edit,
    /,
    *,
    merged: Path | None,
    adapter: Path | None,
    rank: int | None,
    saved: Path | None,
) -> dict[str, Any]:
    """Write what is asked for; the paths, and what each loses, by the names that `results.json` has for them."""
    results: dict[str, Any] = {}
    if merged is not None:
        sites = edit.save_merged(merged)
        results |= {
            "edit.merged": str(merged),
            "edit.merged.kept": min(site.kept for site in sites),
        }
        results["edit.merged.relative_error"] = max(site.relative_error for site in sites)
    if adapter is not None:
        sites = edit.save_adapter(adapter, rank)
        results |= {
            "edit.adapter": str(adapter),
            "edit.adapter.rank": max(site.rank for site in sites),
        }
        results["edit.adapter.relative_error"] = max(site.relative_error for site in sites)
    if saved is not None:
        results["edit.saved"] = str(edit.save(saved))
    for name, value in results.items():
        logger.info("%s: %s", name, f"{value:.4g}" if isinstance(value, float) else value)
    return results
