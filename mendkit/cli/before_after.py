"""What a model writes before and after an edit: as rows, and as an HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pandas.io.formats.style import Styler

from ..data.examples import EditExample
from ..evaluation.results import normalise
from ..mend.edit import Edit
from ..models.base import BaseModel
from ..reporting.report import render
from ..reporting.tables import before_after, prompts_of
from ..runs import write_text
from .app import logger

HeadedTable = tuple[str, Styler]


def row_of(
    base: BaseModel, edit: Edit, example: EditExample, *, max_new_tokens: int, all_prompts: bool
) -> tuple[dict[str, Any], HeadedTable]:
    """A row on the example's prompt, and a table of the same.

    With `all_prompts` the table has the paraphrases and the prompts that should stay, too.
    """
    asked = prompts_of(example) if all_prompts else prompts_of(example)[:1]
    prompts = [prompt for _, prompt, _ in asked]
    before = base.generate_batch(prompts, max_new_tokens=max_new_tokens)
    with edit.applied():
        after = base.generate_batch(prompts, max_new_tokens=max_new_tokens)
    row: dict[str, Any] = {"prompt": example.prompt, "target_new": example.target_new}
    row |= {"before": before[0], "after": after[0]}
    row["success"] = normalise(after[0]) == normalise(base.said(example.target_new))
    heading = f"{example.prompt} → {example.target_new}"
    return row, (heading, before_after(asked, before, after))


def text_of(row: dict[str, Any]) -> str:
    """A row for people."""
    mark = "as told" if row["success"] else f"told: {row['target_new']}"
    before, after = row["before"].strip(), row["after"].strip()
    return f"{row['prompt']}\n  before: {before}\n  after:  {after}  ({mark})"


def write_page(
    path: Path, tables: Sequence[HeadedTable], rows: Sequence[dict[str, Any]], *, command: str
) -> None:
    """Write an HTML page over the tables of `row_of`; `command` is what was typed."""
    told = sum(row["success"] for row in rows)
    title = f"{told} of {len(rows)} new answers are written as told"
    write_text(path, render("edits.html.j2", title=title, command=command, tables=tables))
    logger.info("report: %s", path)
