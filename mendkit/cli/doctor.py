"""The command `doctor`: is all in place for training and editing?"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mendkit

from ..errors import MendkitError
from . import app as cli
from .app import Data, Words

if TYPE_CHECKING:
    from ..data.examples import EditExample
    from ..hparams import MENDHyperParams
    from ..models.base import BaseModel

# Edits that the statistics of an untrained editor come from.
FEW = 16


@cli.command("doctor configs/smollm2-135m.yaml --train-data my.jsonl")
def doctor(
    words: Words = None,
    *,
    train_data: Data = "facts:train",
    validation_data: Data = "facts:validation",
    data: Data = "facts:test",
) -> int:
    """Check settings, data, memory, archive and model; make one edit, and undo it.

    A line for each check: `ok`, or `failed` and what to do. The exit status is 1 if one failed.
    """
    failed: list[str] = []

    def check(name: str, look: Callable[..., tuple[Any, str]], *needed: Any) -> Any:
        """What `look` finds, or None; without something that it needs it is not asked."""
        if any(value is None for value in needed):
            cli.say(f"skipped {name}")
            return None
        try:
            value, said = look(*needed)
        except (MendkitError, OSError, RuntimeError) as error:
            failed.append(name)
            value, said = None, str(error) or type(error).__name__
        verdict = "failed " if name in failed else "ok     "
        cli.say(f"{verdict} {name}: {' '.join(said.split())}")
        return value

    h = check("settings", _look_at_settings, words or [])
    train = check(f"data {train_data}", _read_data, train_data, h)
    validation = check(f"data {validation_data}", _read_data, validation_data, h)
    test = check(f"data {data}", _read_data, data, h)
    check("memory", _memory, h, train, validation)
    check("archive", _look_at_archive, h)
    base = check("model", _load, h)
    for file, examples in ((train_data, train), (validation_data, validation), (data, test)):
        check(f"texts of {file}", _tokenise, base, h, examples)
    check("one edit", _edit_and_undo, base, h, train, test)
    return int(bool(failed))


def _look_at_settings(words: Sequence[str]) -> tuple["MENDHyperParams", str]:
    from ..mend.training import check_logger

    h = cli.hyperparameters(words)
    check_logger(h.logger)
    return h, f"model_name: {h.model_name}, inner_params: {h.inner_params}"


def _read_data(file: str, h: "MENDHyperParams") -> tuple[Sequence["EditExample"], str]:
    examples = mendkit.read_examples(file, columns=h.columns)
    return examples, f"{len(examples)} edits"


def _memory(
    h: "MENDHyperParams", train: Sequence["EditExample"], validation: Sequence["EditExample"]
) -> tuple[None, str]:
    from ..cost.plan import check_memory

    check_memory(h, train, validation)
    return None, "training fits; `plan` says how much it takes"


def _look_at_archive(h: "MENDHyperParams") -> tuple[None, str]:
    if h.archive is None:
        return None, "none; `train` writes one"
    name = mendkit.inspect_archive(h.archive)["base_model"]["name"]
    return None, f"{h.archive}, trained for {name}"


def _load(h: "MENDHyperParams") -> tuple["BaseModel", str]:
    base = mendkit.load_model(h)
    return base, f"{base!r}, the first site {base.sites[0].name}"


def _tokenise(
    base: "BaseModel", h: "MENDHyperParams", examples: Sequence["EditExample"]
) -> tuple[None, str]:
    from ..mend.batches import usable

    kept = usable(base, h, examples)
    if len(kept) == len(examples):
        return None, "all can be used"
    where, why = kept.skipped[-1].where, kept.skipped[-1].why
    many = f"{len(examples) - len(kept)} of {len(examples)} cannot be used"
    raise MendkitError(f"{many}, the last {where}: {why}; or give --skip-invalid")


def _edit_and_undo(
    base: "BaseModel",
    h: "MENDHyperParams",
    train: Sequence["EditExample"],
    test: Sequence["EditExample"],
) -> tuple[None, str]:
    """An edit of the archive, or of an untrained editor, changes the model and is undone."""
    from ..evaluation.inspection import open_editor

    by = ""
    if h.archive is None:
        by = " by an untrained editor"
        h = h.replace(whiten=None, whiten_pairs=False, unit_response=False)
    editor = open_editor(h, train[:FEW], base=base)
    prompt = test[0].prompt
    before, change = mendkit.next_tokens(base, prompt), editor.edit(test[0])
    with change.applied():
        during = mendkit.next_tokens(base, prompt)
        said = base.generate(prompt, max_new_tokens=8, answers=[test[0].target_new]).strip()
    if during == before:
        raise MendkitError("the edit changes no probability; raise `lr_scale` or `edit_lr`")
    if mendkit.next_tokens(base, prompt) != before:
        raise MendkitError("undoing did not restore the probabilities; load the model again")
    return None, f"{prompt!r} → {said!r}{by}; undone, the model is what it was"
