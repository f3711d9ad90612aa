"""Layouts of published editing data: one record of a file becomes one `EditExample`.

A layout is recognised by a field that only it has (`LAYOUTS`). It says under which names it keeps
the fields of an example, and adds what needs more than a name. What a benchmark calls locality but
asks about the edit's own subject (KnowEdit's Relation_Specificity and Forgetfulness) is read as
`unrelated`: `neighbours` are other subjects of the same relation, and nothing else.

Everything here raises DataError naming the field.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import DataError, shown
from .examples import EditExample, Probe, check_unicode

Record = Mapping[str, Any]


def parse(record: Any) -> EditExample:
    """The example in a record of any known layout."""
    if not isinstance(record, dict):
        raise DataError(f"expected an object, got {type(record).__name__}")
    for key, layout in LAYOUTS.items():
        if key in record:
            return layout(record)
    found = sorted(map(str, record))
    raise DataError(
        f"unknown record form with the fields {found}; expected one of the fields {list(LAYOUTS)}"
    )


def _as_text(value: Any, name: str = "value") -> str:
    if not isinstance(value, str):
        raise DataError(f"field `{name}` must be text, is {shown(value)}")
    if not value.strip():
        raise DataError(f"field `{name}` is empty")
    return check_unicode(value, f"field `{name}`")


def required(record: Record, key: str) -> str:
    """A text field that must be there."""
    if key not in record:
        raise DataError(f"field `{key}` must be text, is missing")
    return _as_text(record[key], key)


def optional(record: Record, key: str) -> str | None:
    """A text field, or None where it is missing or null."""
    return None if record.get(key) is None else required(record, key)


def name_or_number(record: Record, key: str) -> str | None:
    """What identifies a record, as text."""
    value = record.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return shown(value)
    return optional(record, key)


def cell(record: Record, key: str) -> str | None:
    """A cell of a table; None where it is blank."""
    return required(record, key) if str(record.get(key) or "").strip() else None


def items(record: Record, key: str, parse_item: Callable[[Any], Any] = _as_text) -> tuple[Any, ...]:
    """A list field, each item parsed; a lone text is a list of one; empty where it is missing."""
    value = record.get(key)
    if value is None:
        return ()
    if isinstance(value, str):
        value = [required(record, key)]
    if not isinstance(value, list):
        raise DataError(f"field `{key}` must be a list, is {shown(value)}")
    parsed = []
    for i, item in enumerate(value):
        try:
            parsed.append(parse_item(item))
        except DataError as error:
            raise DataError(f"field `{key}[{i}]`: {error}") from None
    return tuple(parsed)


def answers(record: Record, key: str) -> tuple[str, ...]:
    """Every name of an answer, from a text or lists (of lists) of texts; blank ones left out."""

    def names(value: Any) -> Iterator[str]:
        if isinstance(value, list):
            for part in value:
                yield from names(part)
        elif not isinstance(value, str):
            raise DataError(f"field `{key}` must be text or lists of texts, has {shown(value)}")
        elif value.strip():
            yield check_unicode(value, f"field `{key}`")

    return tuple(names(record[key])) if record.get(key) is not None else ()


def first_answer(record: Record, key: str) -> str | None:
    """The first name of an answer."""
    return next(iter(answers(record, key)), None)


def probes(record: Record, key: str) -> tuple[Probe, ...]:
    """Prompts beside an edit: a list of them, or lists by kind (KnowEdit)."""
    value = record.get(key)
    groups = {key: value}
    if isinstance(value, dict) and "prompt" not in value:
        groups = {f"{key}.{kind}": group for kind, group in value.items()}
    found: list[Probe] = []
    for name, group in groups.items():
        listed = [group] if isinstance(group, dict) else group
        for several in items({name: listed}, name, _probes):
            found += several
    return tuple(found)


def _probes(value: Any) -> tuple[Probe, ...]:
    """A text, or an object.

    The kit's own objects have `prompt`, `answer` and `aliases`; those of benchmarks a prompt and
    its `ground_truth`, or lists of both.
    """
    if isinstance(value, str):
        return (Probe(_as_text(value)),)
    if not isinstance(value, dict):
        raise DataError(f"must be text or an object with the field `prompt`, is {shown(value)}")
    if "answer" in value or "aliases" in value:
        aliases = items(value, "aliases")
        return (Probe(required(value, "prompt"), optional(value, "answer"), aliases),)
    if not isinstance(value.get("prompt"), list):
        names = answers(value, "ground_truth")
        return (Probe(required(value, "prompt"), next(iter(names), None), names[1:]),)
    prompts, truths = items(value, "prompt"), value.get("ground_truth")
    if isinstance(truths, str):
        truths = [truths]
    if not isinstance(truths, list) or len(truths) != len(prompts):
        expected = f"an answer for each of {len(prompts)} prompts"
        raise DataError(f"field `ground_truth` must have {expected}, is {shown(truths)}")
    found: list[Probe] = []
    for prompt, truth in zip(prompts, truths, strict=True):
        found += _probes({"prompt": prompt, "ground_truth": truth})
    return tuple(found)


def portability(record: Record, key: str) -> tuple[Probe, ...]:
    """Implied questions: EasyEdit's single `New Question`, or a list; only those with answers."""
    value = record.get(key)
    if isinstance(value, dict) and "New Question" in value:
        return (Probe(required(value, "New Question"), required(value, "New Answer")),)
    return tuple(probe for probe in probes(record, key) if probe.answer is not None)


FIELDS: dict[str, Callable[[Record, str], Any]] = {
    "prompt": required,
    "target_new": required,
    "subject": optional,
    "ground_truth": first_answer,
    "paraphrases": items,
    "neighbours": probes,
    "unrelated": probes,
    "portability": portability,
    "generation_prompts": items,
    "relation": optional,
    "id": name_or_number,
}
"""The fields of an example, and how each is read. These are also the kit's own JSON lines."""


def _read_record(record: Record, **names: str) -> EditExample:
    """An example whose fields stand under these `names`, the others under their own."""
    values = {field: read(record, names.get(field, field)) for field, read in FIELDS.items()}
    return EditExample(**values)


def _check_new(target: str, truths: Sequence[str], key: str, among: str) -> None:
    if target in truths:
        raise DataError(f"field `{key}` {target!r} is among `{among}`: nothing to edit")


def _own(record: Record) -> EditExample:
    legal = [*FIELDS, "source"]
    unknown = sorted(set(record) - set(legal))
    if unknown:
        raise DataError(f"unknown field `{unknown[0]}`; legal fields: {', '.join(legal)}")
    return _read_record(record)


def _counterfact(record: Record) -> EditExample:
    """EasyEdit's flat CounterFact.

    Its locality prompt has the edit's relation and answer, so it is a neighbour.
    """
    answer = required(record, "locality_ground_truth")
    neighbour = Probe(required(record, "locality_prompt"), answer)
    example = _read_record(record, paraphrases="rephrase_prompt", id="case_id")
    return replace(example, neighbours=(neighbour,))


def _rome(record: Record) -> EditExample:
    """ROME's CounterFact, whose neighbours have the old answer unless they bring their own.

    Its `attribute_prompts`, for which the new answer is true, enter no score and are not read.
    """
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, dict):
        raise DataError(f"field `requested_rewrite` must be an object, is {shown(rewrite)}")
    flat = {**record, **rewrite}
    for name, key in {"ground_truth": "target_true", "target_new": "target_new"}.items():
        value = rewrite.get(key)
        flat[name] = value.get("str") if isinstance(value, dict) else value
    flat["prompt"] = required(rewrite, "prompt").replace("{}", required(rewrite, "subject"))
    example = _read_record(
        flat, paraphrases="paraphrase_prompts", relation="relation_id", id="case_id"
    )

    def neighbour(value: Any) -> Probe:
        if isinstance(value, dict):
            return Probe(required(value, "prompt"), required(value, "target"))
        return Probe(_as_text(value), example.ground_truth)

    return replace(example, neighbours=items(record, "neighborhood_prompts", neighbour))


def _zsre(record: Record) -> EditExample:
    """MEND's zsRE, and EasyEdit's with portability: `loc` is a question of Natural Questions."""
    example = _read_record(
        record, prompt="src", target_new="alt", ground_truth="answers", paraphrases="rephrase"
    )
    truths = answers(record, "answers")
    if not truths:
        raise DataError("field `answers` must be a non-empty list")
    _check_new(example.target_new, truths, "alt", "answers")
    answer = optional(record, "loc_ans")
    question = Probe(required(record, "loc"), None if answer == "---" else answer)
    return replace(example, unrelated=(question,))


def _structured(record: Record) -> EditExample:
    """The authors' zsRE and FEVER files (JSON lines): the first alternative is the new answer."""

    def output(value: Any) -> str:
        return required(value if isinstance(value, dict) else {}, "answer")

    truths = items(record, "output", output)
    others = [name for name in items(record, "alternatives") if name not in truths]
    if not others:
        raise DataError("field `alternatives` has no answer other than `output`: nothing to edit")
    flat = {**record, "target_new": others[0], "ground_truth": list(truths)}
    example = _read_record(flat, prompt="input", paraphrases="filtered_rephrases")
    others = [prompt for prompt in example.paraphrases if prompt != example.prompt]
    return replace(example, paraphrases=tuple(others))


def _knowedit(record: Record) -> EditExample:
    """KnowEdit's four fact files, and other layouts with `locality` and `portability`."""
    names = {"paraphrases": "rephrase_prompt", "unrelated": "locality", "id": "case_id"}
    if "labels" in record:  # WikiBio: a passage, and the sentence that should follow
        names |= {"prompt": "text", "target_new": "labels", "subject": "concept"}
    example = _read_record(record, **names)
    truths = answers(record, "ground_truth")
    _check_new(example.target_new, truths, names.get("target_new", "target_new"), "ground_truth")
    return example


def _hallu(record: Record) -> EditExample:
    """HalluEditBench's tables. What the recorded model said (`output_…`) is the old answer.

    Questions of two to six hops are portability; yes/no, multiple-choice and reversed questions are
    not read.
    """
    outputs = [cell(record, key) for key in record if key.startswith("output_")]
    said = [answer for answer in outputs if answer]
    hops = []
    for n in range(2, 7):
        question, answer = cell(record, f"question_{n}hop"), cell(record, f"answer_{n}hop")
        if question and answer:
            hops.append(Probe(question, answer))
    locality = cell(record, "locality_question")
    flat = {**record, "ground_truth": said, "unrelated": [locality] if locality else []}
    example = _read_record(
        flat, prompt="question", target_new="object", paraphrases="paraphrased_question"
    )
    _check_new(example.target_new, said, "object", "output_…")
    return replace(example, portability=tuple(hops))


LAYOUTS: dict[str, Callable[[Record], EditExample]] = {
    "requested_rewrite": _rome,
    "paraphrased_question": _hallu,
    "src": _zsre,
    "alternatives": _structured,
    "locality_prompt": _counterfact,
    "locality": _knowedit,
    "rephrase_prompt": _knowedit,
    "labels": _knowedit,
    "target_new": _own,
}
"""Layouts by the field that tells them apart, most specific first."""
