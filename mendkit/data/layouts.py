"""Layouts of published editing data: one record of a file becomes one edit, or several.

`NAMES` says under which names files keep a field of an `EditExample`, `PAIRS` where a prompt and
its answer are two fields. All names are known in every record, so layouts may be mixed; a name in
none of the lists is refused. docs/DATA_AND_MODELS.md has the table by layout.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from ..errors import DataError
from .examples import TEXTS, EditExample, check_unicode
from .records import UNFOLD, Record, answers, implied, items, name_or_number, pairs, probes, text

Columns = Mapping[str, tuple[str, ...]]

LEAST = '{"prompt": "The capital of France is", "target_new": "Lyon"}'
"""The smallest record."""

NAMES = {
    "prompt": "prompt prompts src question input text update prefix",
    "target_new": "target_new alt labels ans answer target suffix object",
    "subject": "subject concept ent",
    "relation": "relation relation_id",
    "id": "id case_id",
    "ground_truth": "ground_truth target_true answers target_old output",
    "told": "pred prediction output_*",  # what the model, or a recorded one, says before the edit
    "paraphrases": "paraphrases paraphrase_prompts rephrase_prompt rephrase_prompts rephrase"
    " filtered_rephrases para_question paraphrased_question personas*",
    "neighbours": "neighbours neighborhood_prompts",
    "unrelated": "unrelated locality locality_question",
    "portability": "portability portability_inputs",
    "generation_prompts": "generation_prompts",
    **{role: role for role in ("consequences", "negations", "truths", "passages")},
    "target_prefix": "target_prefix",
    "metadata": "metadata _*",
    "left out": "answer_* attribute* bert_score cond dataset eval_* example_type fact_new*"
    " fact_true* index label loc_prompts meta multiple_choice* new_answer_alias* new_single_hops"
    " no_question* object_id orig pararel_idx path prompt_full rephrases reversed_* single_hops"
    " source* split subject_id tag target_id time_* topic type unsfact_* yes_question* Unnamed:*",
}
"""Names (patterns) in files, by field. Of two names for one text the first counts."""

PAIRS = {
    "locality_prompt": ("locality_ground_truth", "neighbours"),
    "loc": ("loc_ans", "unrelated"),
    "mhop": ("mhop_ans", "portability"),
    "sub_question": ("sub_answer", "portability"),
    "questions": ("new_answer", "portability"),
    **{f"question_{n}hop": (f"answer_{n}hop", "portability") for n in range(2, 7)},
}
"""Fields of prompts, the fields of their answers, and the field of an example."""

ANSWERS = {answer for answer, _ in PAIRS.values()}

READ: dict[str, Callable[[Record, str], list[Any]]] = {
    "prompt": lambda record, name: [text(record, name)],
    "target_prefix": lambda record, name: [text(record, name, empty=True)],
    **dict.fromkeys(("target_new", "subject", "relation", "id"), name_or_number),
    **dict.fromkeys(("ground_truth", "told"), answers),
    **dict.fromkeys(TEXTS, items),
    **dict.fromkeys(("neighbours", "unrelated", "portability"), probes),
    **dict.fromkeys(("consequences", "truths"), implied),
}
"""How the values of a field are read."""

NOT_BLANK = ("prompt", "target_new", "target_prefix", "metadata")
"""Fields in which a blank text is not the same as none."""

SINGLE = ("prompt", "target_new", "target_prefix", "subject", "relation", "id", "ground_truth")
"""Fields with one value: the first."""


def parse(record: Any, columns: Columns | None = None) -> tuple[list[EditExample], list[str]]:
    """The edits in a record, and the names of what was left out.

    `columns` gives the record's names for some fields; then its other names may be anything.
    Raises DataError naming the field.
    """
    if not isinstance(record, dict):
        raise DataError(f"expected an object such as {LEAST}, got {type(record).__name__}")
    flats, left = [_given(record)], list[str]()
    try:
        for mark, unfold in UNFOLD.items():
            if mark in flats[0]:
                flats = unfold(flats[0], left)
                break
        examples = [_example(_given(flat), columns or {}, left) for flat in flats]
    except RecursionError:
        raise DataError("a field is nested too deeply") from None
    return examples, left


def _given(record: Record) -> dict[str, Any]:
    """The record without null and NaN, and without blank halves of pairs."""
    given = {}
    for name, value in record.items():
        blank = (name in PAIRS or name in ANSWERS) and isinstance(value, str) and not value.strip()
        if value is not None and value == value and not blank:
            given[name] = value
    return given


@cache
def _place(name: str) -> tuple[str | None, int]:
    """The field that a name in a file stands for, and which of the field's names it is."""
    for field, patterns in NAMES.items():
        for number, pattern in enumerate(patterns.split()):
            if fnmatchcase(name, pattern):
                return field, number
    return None, 0


def _example(record: Record, columns: Columns, left: list[str]) -> EditExample:
    mapped: dict[str, str] = {}
    for key, names in columns.items():
        mapped |= dict.fromkeys(names, key)
    halves = {name: field for name, field in mapped.items() if field in PAIRS or field in ANSWERS}
    record = {halves.get(name, name): value for name, value in record.items()}
    values: dict[str, list[Any]] = {field: [] for field in READ}
    metadata: dict[str, Any] = {}
    asked = {PAIRS[name][0] for name in record if name in PAIRS}
    # 1. every name, the first of its field first
    for name in sorted(record, key=lambda name: _place(name)[1]):
        field = mapped.get(name) or _place(name)[0]
        if name in PAIRS and name not in mapped:
            answer, role = PAIRS[name]
            values[role] += pairs(record[name], record.get(answer), name)
        elif name in ANSWERS and name not in mapped:
            left += [name] if name not in asked else []
        elif field not in NOT_BLANK and isinstance(record[name], str) and not record[name].strip():
            continue
        elif field is None and not columns:
            raise _unknown(name, record)
        elif field == "metadata":
            metadata |= _plain(record[name] if name == "metadata" else {name: record[name]})
        elif field in (None, "left out") or (field in columns and name not in mapped):
            left.append(name)
        else:
            values[field] += READ[field](record, name)
    # 2. one prompt and one new answer
    for field in ("prompt", "target_new"):
        if len(set(values[field])) > 1:
            raise DataError(f"field `{field}` is given under two names; choose one in `columns`")
        if not values[field]:
            found = ", ".join(record)
            raise DataError(f"field `{field}` is missing in {found}; expected at least {LEAST}")
    prompt = values["prompt"][0]
    if values["subject"] and "{}" in prompt:  # ROME's template
        subject = values["subject"][0]
        if not re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt):
            values["prompt"][0] = prompt.replace("{}", subject)
    left += [f"{field} after the first" for field in SINGLE if len(values[field]) > 1]
    # 3. what the model says, not what is true, decides whether there is something to edit
    new, told = values["target_new"][0], values.pop("told")
    if new in told:
        raise DataError(f"the model says {new!r} already (field `pred`): nothing to edit")
    values["ground_truth"] = [old for old in (*values["ground_truth"], *told) if old != new]
    # 4. an implied question needs an answer
    for role in ("portability", "consequences"):
        answered = [probe for probe in values[role] if probe.answer is not None]
        if len(answered) < len(values[role]):
            left.append(f"{role} without an answer")
        values[role] = answered
    texts: dict[str, Any] = {field: next(iter(values.pop(field)), None) for field in SINGLE}
    lists: dict[str, Any] = {field: tuple(found) for field, found in values.items()}
    return EditExample(**texts, **lists, metadata=metadata)


def _plain(values: Any) -> dict[str, Any]:
    """Metadata as JSON can hold them."""
    if not isinstance(values, dict):
        raise DataError("field `metadata` must be an object")
    content = json.dumps(values, ensure_ascii=False, default=str)
    return json.loads(check_unicode(content, "field `metadata`"))


def _unknown(name: str, record: Record) -> DataError:
    known = [known for known in " ".join(NAMES.values()).split() if "*" not in known]
    close = difflib.get_close_matches(name, [*known, *PAIRS, *ANSWERS], 1, 0.6)
    hint = f"the nearest is `{close[0]}`" if close else "no field resembles it"
    if not any(_place(key)[0] in ("prompt", "target_new") for key in record):
        hint = f"expected at least {LEAST}"
    return DataError(
        f"unknown field `{name}`; {hint}; in the hyperparameter file "
        f"`columns: {{metadata: [{name}]}}` keeps it, "
        "`columns: {prompt: NAME, target_new: NAME}` reads other names"
    )
