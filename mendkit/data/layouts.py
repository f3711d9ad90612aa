"""Layouts of published editing data: one record of a file becomes one edit, or several.

`NAMES` says under which names files keep a field of an `EditExample`, `PAIRS` where a prompt and
its answer are two fields. All names are known in every record, so layouts may be mixed; a name in
none of the lists is refused. docs/DATA_AND_MODELS.md has the table by layout.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from ..errors import DataError
from .examples import EditExample, check_unicode
from .records import UNFOLD, Record, answers, identity, items, pairs, probes, target, text

Columns = Mapping[str, tuple[str, ...]]

LEAST = '{"prompt": "The capital of France is", "target_new": "Lyon"}'
"""The smallest record."""

NAMES = {
    "prompt": "prompt prompts src question input text update prefix",
    "target_new": "target_new alt labels ans answer target suffix object",
    "subject": "subject concept ent",
    "relation": "relation relation_id",
    "id": "id case_id",
    "paraphrases": "paraphrases paraphrase_prompts rephrase_prompt rephrase_prompts rephrase"
    " filtered_rephrases para_question paraphrased_question personas*",
    "neighbours": "neighbours neighborhood_prompts",
    "unrelated": "unrelated locality locality_question",
    "portability": "portability portability_inputs",
    "generation_prompts": "generation_prompts",
    "ground_truth": "ground_truth target_true answers target_old output",
    "told": "pred prediction output_*",  # what the model, or a recorded one, says before the edit
    "metadata": "metadata _*",
    "left out": "answer_alias* attribute attribute_prompts bert_score cond dataset eval_*"
    " example_type fact_new_* fact_true_* label loc_prompts meta multiple_choice* new_answer_alias*"
    " new_single_hops no_question* object_id orig pararel_idx path prompt_full rephrases"
    " reversed_relation* single_hops source source_case_id split subject_id tag target_id time_*"
    " topic type unsfact_* yes_question*",
}
"""Names (patterns) in files, by field. Of two names for one text the first counts."""

PAIRS = {
    "locality_prompt": ("locality_ground_truth", "neighbours"),
    "loc": ("loc_ans", "unrelated"),
    "mhop": ("mhop_ans", "portability"),
    "sub_question": ("sub_answer", "portability"),
    "questions": ("new_answer", "portability"),
    "question_2hop": ("answer_2hop", "portability"),
    "question_3hop": ("answer_3hop", "portability"),
    "question_4hop": ("answer_4hop", "portability"),
    "question_5hop": ("answer_5hop", "portability"),
    "question_6hop": ("answer_6hop", "portability"),
}
"""Fields of prompts, the fields of their answers, and the field of an example."""

PAIRED = {*PAIRS, *(answer for answer, _ in PAIRS.values())}

TEXTS: dict[str, Callable[[Record, str], str | None]] = {
    "prompt": text,
    "target_new": target,
    "subject": text,
    "relation": text,
    "id": identity,
}
LISTS: dict[str, Callable[[Record, str], list[Any]]] = {
    "paraphrases": items,
    "neighbours": probes,
    "unrelated": probes,
    "portability": probes,
    "generation_prompts": items,
    "ground_truth": answers,
    "told": answers,
}
"""How a field is read."""


def parse(record: Any, columns: Columns | None = None) -> tuple[list[EditExample], list[str]]:
    """The edits in a record, and the names of what was left out.

    `columns` gives the record's names for some fields; then its other names may be anything.
    Raises DataError naming the field.
    """
    if not isinstance(record, dict):
        raise DataError(f"expected an object such as {LEAST}, got {type(record).__name__}")
    given: dict[str, Any] = {}
    for key, value in record.items():
        blank = key in PAIRED and isinstance(value, str) and not value.strip()
        if value is not None and value == value and not blank:  # neither null nor NaN
            given[key] = value
    left: list[str] = []
    try:
        flats = [given]
        for mark, unfold in UNFOLD.items():
            if mark in given:
                flats = unfold(given, left)
                break
        examples = [_example(flat, columns or {}, left) for flat in flats]
    except RecursionError:
        raise DataError("a field is nested too deeply") from None
    return examples, left


@cache
def _field(name: str) -> str | None:
    """The field that a name in a file stands for."""
    for field, patterns in NAMES.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return field
    return None


def _names_by_field(record: Record, columns: Columns, left: list[str]) -> dict[str, list[str]]:
    """The record's names by the field they hold, the first of `NAMES` first; the rest is `left`."""
    mapped = {name: field for field, names in columns.items() for name in names}
    found: dict[str, list[str]] = {"left out": left, "paired": []}
    for name, value in record.items():
        field = mapped.get(name) or ("paired" if name in PAIRED else _field(name))
        if field is None and not columns:
            raise _unknown(name, record)
        if field is None or (field in columns and name not in mapped):
            field = "left out"
        if value is not None:
            found.setdefault(field, []).append(name)
    for field in TEXTS:
        order = NAMES[field].split()
        found.setdefault(field, []).sort(
            key=lambda name: order.index(name) if name in order else -1
        )
    return found


def _example(record: Record, columns: Columns, left: list[str]) -> EditExample:
    names = _names_by_field(record, columns, left)
    # 1. texts: the first name counts
    values: dict[str, Any] = {}
    for field, read in TEXTS.items():
        for name in names[field]:
            value = read(record, name)
            if values.setdefault(field, value) != value and field in ("prompt", "target_new"):
                raise DataError(f"field `{name}`: a second text for `{field}`; choose in `columns`")
        left += names[field][1:]
        if field in ("prompt", "target_new") and values.get(field) is None:
            found = ", ".join(record)
            raise DataError(f"field `{field}` is missing in {found}; expected at least {LEAST}")
    # 2. lists: all names together
    lists: dict[str, list[Any]] = {}
    for field, read_all in LISTS.items():
        lists[field] = []
        for name in names.get(field, ()):
            lists[field] += read_all(record, name)
    for name, (answer, field) in PAIRS.items():
        if name in names["paired"]:
            lists[field] += pairs(record[name], record.get(answer), name)
    # 3. implied questions need an answer
    implied = [probe for probe in lists["portability"] if probe.answer is not None]
    if len(implied) < len(lists["portability"]):
        left.append("portability without an answer")
    lists["portability"] = implied
    # 4. what the model says, not what is true, decides whether there is something to edit
    told = lists.pop("told")
    if values["target_new"] in told:
        raise DataError(f"field `{names['told'][0]}` is the new answer already: nothing to edit")
    old = [
        answer for answer in (*lists.pop("ground_truth"), *told) if answer != values["target_new"]
    ]
    values |= {field: tuple(found) for field, found in lists.items()}
    metadata = _metadata(record, names.get("metadata", []))
    return EditExample(**values, ground_truth=next(iter(old), None), metadata=metadata)


def _metadata(record: Record, names: list[str]) -> dict[str, Any]:
    """What is kept beside an edit, in plain values."""
    kept: dict[str, Any] = {}
    for name in names:
        whole = name == "metadata" and isinstance(record[name], dict)
        kept |= record[name] if whole else {name: record[name]}
    content = json.dumps(kept, ensure_ascii=False, default=str)
    return json.loads(check_unicode(content, "field `metadata`"))


def _unknown(name: str, record: Record) -> DataError:
    known = " ".join(NAMES.values()).split()
    close = difflib.get_close_matches(name, [*known, *PAIRED], 1, 0.6)
    hint = f"the nearest is `{close[0]}`" if close else "no field resembles it"
    if not any(_field(key) in ("prompt", "target_new") for key in record):
        hint = f"expected at least {LEAST}"
    return DataError(
        f"unknown field `{name}`; {hint}; `columns: {{metadata: [{name}]}}` keeps it, "
        "`columns: {prompt: NAME, target_new: NAME}` reads other names"
    )
