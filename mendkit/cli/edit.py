"""The command `edit`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

import mendkit

from ..errors import MendkitError
from . import app as cli
from .app import Json, Limit, MaxNewTokens, Out, Overwrite, SkipInvalid, Words, logger

if TYPE_CHECKING:
    from ..data.examples import EditExample
    from ..mend.edit import Edit
    from ..mend.editor import MENDEditor
    from .before_after import HeadedTable

MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
ADAPTER_OUTPUTS = ("adapter_config.json", "adapter_model.safetensors")

Together = Annotated[bool, Option("--together", help="make one edit of all examples")]
Adapter = Annotated[Path | None, Option(metavar="DIR", help="write a PEFT LoRA adapter")]
Rank = Annotated[int | None, Option(min=1, metavar="N", help="largest rank of the adapter")]
Merged = Annotated[Path | None, Option(metavar="DIR", help="write the edited model")]
Saved = Annotated[Path | None, Option(metavar="FILE", help="write the edit for `Edit.load`")]
Page = Annotated[Path | None, Option(metavar="FILE", help="write a page of before and after")]


@cli.command("edit archive=runs/first/archive.safetensors --prompt 'Peru is in' --target Europe")
def edit(
    context: typer.Context,
    words: Words = None,
    *,
    prompt: Annotated[str, Option(metavar="P", help="the prompt to edit")] = "",
    target: Annotated[str, Option(metavar="T", help="how the prompt should go on")] = "",
    data: Annotated[str, Option(metavar="FILE", help="examples instead, or facts:SPLIT")] = "",
    limit: Limit = None,
    skip_invalid: SkipInvalid = False,
    together: Together = False,
    strength: Annotated[float, Option(metavar="S", help="multiplies the update")] = 1.0,
    max_new_tokens: MaxNewTokens = 50,
    save_adapter: Adapter = None,
    adapter_rank: Rank = None,
    save_merged: Merged = None,
    save_edit: Saved = None,
    save_report: Page = None,
    out: Out = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> int:
    """Edit with an archive, and print what the model writes before and after.

    Every example is edited alone, or all of them --together. One edit can be kept: as an adapter,
    as an edited model for transformers, or as a file.
    """
    from .before_after import write_page

    _check_request(prompt, target, data, strength=strength)
    hparams = cli.hyperparameters(words)
    place = cli.RunFolder(out, "results.json", "rows.jsonl", overwrite=overwrite)
    files = [save_edit, save_report]
    _check_places(save_merged, save_adapter, adapter_rank, files, overwrite=overwrite)
    examples: Sequence[EditExample] = [mendkit.EditExample(prompt, target)]
    if data:
        examples = mendkit.read_examples(
            data, limit=limit, skip_invalid=skip_invalid, columns=hparams.columns
        )
    if len(examples) > 1 and (save_merged or save_adapter or save_edit) and not together:
        raise MendkitError("one edit can be saved; give --together, or --limit 1")
    editor = mendkit.MENDEditor.from_hparams(hparams)
    examples, skipped = _editable(editor, examples, skip_invalid=skip_invalid)
    groups = [examples] if together else [[example] for example in examples]
    asked = {"max_new_tokens": max_new_tokens, "all_prompts": save_report is not None}
    change, rows, tables = _edit_each(editor, groups, asked, strength=strength, as_json=as_json)
    results = _shares(rows) | _save(change, save_merged, save_adapter, save_edit, adapter_rank)
    if skip_invalid:
        results["edit.skipped"] = skipped
    if save_report:
        write_page(save_report, tables, rows, command=context.obj)
    place.write(results, rows)
    return 0


def _check_request(prompt: str, target: str, data: str, *, strength: float) -> None:
    """Raises MendkitError unless there is one edit, or data, and a strength."""
    if bool(data) == bool(prompt) or bool(prompt) != bool(target):
        raise MendkitError("give --prompt and --target, or --data")
    if not math.isfinite(strength):
        raise MendkitError(f"--strength must be a finite number, got {strength}")


def _editable(
    editor: "MENDEditor", examples: Sequence["EditExample"], *, skip_invalid: bool
) -> tuple[Sequence["EditExample"], int]:
    """The examples that can be edited, and how many were left out.

    Without `skip_invalid` one that cannot be edited is an error.
    """
    from ..mend.batches import usable

    skipped = 0
    if skip_invalid:
        kept = usable(editor.base, editor.hparams, examples)
        examples, skipped = kept, len(kept.skipped)
    for example in examples:
        editor.tokens(example)
    return examples, skipped


def _edit_each(
    editor: "MENDEditor",
    groups: Sequence[Sequence["EditExample"]],
    asked: dict[str, Any],
    *,
    strength: float,
    as_json: bool,
) -> tuple["Edit", list[dict[str, Any]], list["HeadedTable"]]:
    """Make one edit of each group, and print rows; returns the last edit, rows and tables.

    `asked` is what `row_of` wants to know.
    """
    from .before_after import row_of, text_of

    rows, tables = [], []
    for group in groups:  # each on the model as it was
        change = editor.edit(group).scale(strength)
        for example in group:
            row, table = row_of(editor.base, change, example, **asked)
            rows.append(row)
            tables.append(table)
            if not as_json:
                cli.show(row, text_of(row), as_json=False)
    if as_json:
        cli.show(rows, "", as_json=True)
    return change, rows, tables


def _shares(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of the edits whose new answer is written, by its name in results.json."""
    count = len(rows)
    return {
        "edit.free_exact": sum(row["success"] for row in rows) / count,
        "edit.free_exact.n": count,
    }


def _check_places(
    merged: Path | None,
    adapter: Path | None,
    rank: int | None,
    files: Sequence[Path | None],
    *,
    overwrite: bool,
) -> None:
    """Raises MendkitError if something is in the way, or two outputs would share a folder."""
    if merged and adapter and merged.resolve() == adapter.resolve():
        raise MendkitError(
            f"--save-merged and --save-adapter are both {merged}; give each a folder of its own"
        )
    if rank and not adapter:
        raise MendkitError("--adapter-rank needs --save-adapter")
    # transformers reads a model and an adapter in one folder as one
    for option, folder in (("--save-merged", merged), ("--save-adapter", adapter)):
        cli.RunFolder(folder, *MODEL_FILES, *ADAPTER_OUTPUTS, overwrite=overwrite, option=option)
    for option, path in zip(("--save-edit", "--save-report"), files, strict=True):
        if path and path.is_dir():
            raise MendkitError(f"{path} is a folder; give {option} a file")
        if path:
            cli.RunFolder(path.parent, path.name, overwrite=overwrite, option=option)


def _save(
    change: "Edit", merged: Path | None, adapter: Path | None, file: Path | None, rank: int | None
) -> dict[str, Any]:
    """Write the edit; returns paths and losses by their names in results.json."""
    results: dict[str, Any] = {}
    if merged:
        sites = change.save_merged(merged)
        results["edit.merged"] = str(merged)
        results["edit.merged.kept"] = min(site.kept for site in sites)
        results["edit.merged.relative_error"] = max(site.relative_error for site in sites)
    if adapter:
        adapted = change.save_adapter(adapter, rank)
        results["edit.adapter"] = str(adapter)
        results["edit.adapter.rank"] = max(site.rank for site in adapted)
        results["edit.adapter.relative_error"] = max(site.relative_error for site in adapted)
    if file:
        results["edit.saved"] = str(change.save(file))
    for name, value in results.items():
        logger.info("%s: %s", name, value)
    return results
