"""Layouts of published editing data: one record of a file to one `EditExample`.

A layout is recognised by a field that only it has (`LAYOUTS`). What a benchmark calls locality but asks about the
edit's own subject (KnowEdit's Relation_Specificity and Forgetfulness) is read as `unrelated`: `neighbours` are other
subjects of the same relation, and nothing else. Raises DataError naming the field.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import DataError
from .examples import EditExample, Probe, check_unicode

Record = Mapping[str, Any]


def parse(record: Any) -> EditExample:
    """The example in a record of any known layout."""
    if not isinstance(record, dict):
        raise DataError(f"expected an object, got {type(record).__name__}")
    for key, layout in LAYOUTS.items():
        if key in record:
            return layout(record)
    raise DataError(
        f"unknown record form with the fields {sorted(map(str, record))}; expected one of the fields {list(LAYOUTS)}"
    )


# ----------------------------------------------------------------------------------------------------------- fields


def text(record: Record, key: str, /, *, required: bool = True) -> str | None:
    """A non-empty text field; None where it is neither there nor required."""
    value = record.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, str):
        found = "missing" if key not in record else _shown(value)
        raise DataError(f"field `{key}` must be text, is {found}")
    if not value.strip():
        raise DataError(f"field `{key}` is empty")
    return check_unicode(value, f"field `{key}`")


def _shown(value: Any) -> str:
    """A value of another kind than expected, with its kind, cut to fit a message."""
    try:
        return f"{repr(value)[:200]} ({type(value).__name__})"
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a value too long to show ({type(value).__name__})"


def _id(record: Record, key: str) -> str | None:
    """A number or text that names a record."""
    value = record.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return text({key: _shown(value).rpartition(" (")[0]} if number else record, key, required=False)


def _cell(record: Record, key: str) -> str | None:
    """A cell of a table; None where it is blank."""
    return text(record, key) if str(record.get(key) or "").strip() else None


def items(record: Record, key: str, parse_item: Callable[[Any], Any], /) -> tuple[Any, ...]:
    """A list field, each item parsed; empty where it is missing."""
    value = record.get(key)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"field `{key}` must be a list, is {_shown(value)}")
    out = []
    for i, item in enumerate(value):
        try:
            out.append(parse_item(item))
        except DataError as error:
            raise DataError(f"field `{key}[{i}]`: {error}") from None
    return tuple(out)


def _item(value: Any) -> str:
    return text({"value": value}, "value")  # type: ignore[return-value]


def answers(record: Record, key: str, /) -> tuple[str, ...]:
    """Every name of an answer: a text, a list of texts, or (KnowEdit) a list of lists of them; empty ones left out."""

    def names(value: Any) -> Iterator[str]:
        if isinstance(value, list):
            for part in value:
                yield from names(part)
        elif not isinstance(value, str):
            raise DataError(f"field `{key}` must be text or lists of texts, has {_shown(value)}")
        elif value.strip():
            yield check_unicode(value, f"field `{key}`")

    return tuple(names(record[key])) if record.get(key) is not None else ()


def _texts(record: Record, key: str) -> tuple[str, ...]:
    """One text or a list of texts; () where the field is missing."""
    value = record.get(key)
    if value is None or isinstance(value, list):
        return items(record, key, _item)
    return (text(record, key),)  # type: ignore[return-value]


def _probe(value: Any) -> Probe:
    if isinstance(value, str):
        return Probe(_item(value))
    if not isinstance(value, dict):
        raise DataError(f"must be text or an object with `prompt` and `answer`, is {_shown(value)}")
    aliases = items(value, "aliases", _item)
    return Probe(text(value, "prompt"), text(value, "answer", required=False), aliases)  # type: ignore[arg-type]


def _questions(value: Any) -> tuple[Probe, ...]:
    """A benchmark's `{"prompt", "ground_truth"}`, each a text or a list (of prompts, with an answer each)."""
    if not isinstance(value, dict):
        raise DataError(f"must be an object with `prompt` and `ground_truth`, is {_shown(value)}")
    if not isinstance(value.get("prompt"), list):
        names = answers(value, "ground_truth")
        return (Probe(text(value, "prompt"), *names[:1], aliases=names[1:]),)  # type: ignore[arg-type]
    prompts, truths = items(value, "prompt", _item), value.get("ground_truth")
    if len(prompts) == 1 and not (isinstance(truths, list) and len(truths) == 1):
        truths = [truths]
    if not isinstance(truths, list) or len(truths) != len(prompts):
        expected = f"an answer for each of {len(prompts)} prompts"
        raise DataError(f"field `ground_truth` must have {expected}, is {_shown(truths)}")
    pairs = zip(prompts, truths, strict=True)
    return tuple(
        probe for p, truth in pairs for probe in _questions({"prompt": p, "ground_truth": truth})
    )


def _grouped(record: Record, key: str) -> tuple[Probe, ...]:
    """Questions in a list, or in a dictionary of lists by kind (KnowEdit)."""
    value = record.get(key)
    groups = value if isinstance(value, dict) and "prompt" not in value else {"": value}
    out: list[Probe] = []
    for kind, group in groups.items():
        where = f"{key}.{kind}" if kind else key
        group = [group] if isinstance(group, dict) else group
        out += [probe for many in items({where: group}, where, _questions) for probe in many]
    return tuple(out)


def _portability(record: Record) -> tuple[Probe, ...]:
    """Implied questions: EasyEdit's single `New Question`, or KnowEdit's groups; one without an answer is left out."""
    value = record.get("portability")
    if isinstance(value, dict) and "New Question" in value:
        return (Probe(text(value, "New Question"), text(value, "New Answer")),)  # type: ignore[arg-type]
    return tuple(probe for probe in _grouped(record, "portability") if probe.answer is not None)


def _new(target: str | None, truths: Sequence[str], key: str, among: str) -> str | None:
    if target in truths:
        raise DataError(f"field `{key}` {target!r} is among `{among}`: nothing to edit")
    return target


# ---------------------------------------------------------------------------------------------------------- layouts

OWN_FIELDS = [
    "prompt",
    "target_new",
    "subject",
    "ground_truth",
    "paraphrases",
    "neighbours",
    "unrelated",
    "portability",
    "generation_prompts",
    "relation",
    "id",
    "source",
]


def _own(record: Record) -> EditExample:
    unknown = sorted(set(record) - set(OWN_FIELDS))
    if unknown:
        raise DataError(f"unknown field `{unknown[0]}`; legal fields: {', '.join(OWN_FIELDS)}")
    return EditExample(
        prompt=text(record, "prompt"),
        target_new=text(record, "target_new"),
        subject=text(record, "subject", required=False),
        ground_truth=text(record, "ground_truth", required=False),
        paraphrases=items(record, "paraphrases", _item),
        neighbours=items(record, "neighbours", _probe),
        unrelated=items(record, "unrelated", _probe),
        relation=text(record, "relation", required=False),
        id=text(record, "id", required=False),
        portability=items(record, "portability", _probe),
        generation_prompts=items(record, "generation_prompts", _item),
    )


def _counterfact(record: Record) -> EditExample:
    """EasyEdit's flat CounterFact: the locality prompt has the edit's relation and answer, so it is a neighbour."""
    neighbour = Probe(text(record, "locality_prompt"), text(record, "locality_ground_truth"))
    return EditExample(
        prompt=text(record, "prompt"),
        target_new=text(record, "target_new"),
        subject=text(record, "subject", required=False),
        ground_truth=text(record, "ground_truth"),
        paraphrases=(text(record, "rephrase_prompt"),),
        neighbours=(neighbour,),
        id=_id(record, "case_id"),
        portability=_portability(record),
    )


def _rome(record: Record) -> EditExample:
    """ROME's CounterFact. Its neighbours have the old answer; its `attribute_prompts`, for which the new answer is
    true, enter none of its scores and are not read."""
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, dict):
        raise DataError(f"field `requested_rewrite` must be an object, is {_shown(rewrite)}")
    subject, old, new = (
        text(rewrite, "subject"),
        rewrite.get("target_true"),
        rewrite.get("target_new"),
    )
    truth = (
        text(old, "str") if isinstance(old, dict) else text(rewrite, "target_true", required=False)
    )

    def neighbour(value: Any) -> Probe:  # conversions of other data give each its own answer
        own = isinstance(value, dict)
        return (
            Probe(text(value, "prompt"), text(value, "target"))
            if own
            else Probe(_item(value), truth)
        )

    return EditExample(
        prompt=text(rewrite, "prompt").replace("{}", subject),  # type: ignore[union-attr,arg-type]
        target_new=text(new, "str") if isinstance(new, dict) else text(rewrite, "target_new"),
        subject=subject,
        ground_truth=truth,
        paraphrases=items(record, "paraphrase_prompts", _item),
        neighbours=items(record, "neighborhood_prompts", neighbour),
        relation=text(rewrite, "relation_id", required=False),
        id=_id(record, "case_id"),
        generation_prompts=items(record, "generation_prompts", _item),
    )


def _zsre(record: Record) -> EditExample:
    """MEND's zsRE, and EasyEdit's with portability: `alt` is the new answer, `loc` a Natural Questions question."""
    truths = items(record, "answers", _item)
    if not truths:
        raise DataError("field `answers` must be a non-empty list")
    loc_answer = text(record, "loc_ans", required=False)
    return EditExample(
        prompt=text(record, "src"),
        target_new=_new(text(record, "alt"), truths, "alt", "answers"),
        subject=text(record, "subject", required=False),
        ground_truth=truths[0],
        paraphrases=(text(record, "rephrase"),),
        unrelated=(
            Probe(text(record, "loc"), None if loc_answer in (None, "---") else loc_answer),
        ),
        portability=_portability(record),
    )


def _structured(record: Record) -> EditExample:
    """The authors' zsRE and FEVER files (JSON lines): the first alternative is the new answer."""
    truths = items(
        record, "output", lambda item: text(item if isinstance(item, dict) else {}, "answer")
    )
    others = [other for other in items(record, "alternatives", _item) if other not in truths]
    if not others:
        raise DataError("field `alternatives` has no answer other than `output`: nothing to edit")
    prompt = text(record, "input")
    return EditExample(
        prompt=prompt,
        target_new=others[0],
        ground_truth=truths[0] if truths else None,
        paraphrases=tuple(p for p in items(record, "filtered_rephrases", _item) if p != prompt),
        id=_id(record, "id"),
    )


def _knowedit(record: Record) -> EditExample:
    """KnowEdit's four fact files, and other layouts with `locality` and `portability`, grouped by kind or plain lists.

    WikiBio's passage, subject and wanted sentence are `text`, `concept` and `labels`.
    """
    prompt, target, subject = (
        ("text", "labels", "concept") if "labels" in record else ("prompt", "target_new", "subject")
    )
    truths = answers(record, "ground_truth")
    return EditExample(
        prompt=text(record, prompt),
        target_new=_new(text(record, target), truths, target, "ground_truth"),
        subject=text(record, subject, required=False),
        ground_truth=truths[0] if truths else None,
        paraphrases=_texts(record, "rephrase_prompt"),
        unrelated=_grouped(record, "locality"),
        id=_id(record, "case_id"),
        portability=_portability(record),
    )


def _hallu(record: Record) -> EditExample:
    """HalluEditBench's tables: the object is the new answer, what the recorded model said the old one; questions of
    two to six hops are its portability. Yes/no, multiple-choice and reversed questions are not read."""
    said = [value for key in record if key.startswith("output_") and (value := _cell(record, key))]
    hops = [
        (_cell(record, f"question_{n}hop"), _cell(record, f"answer_{n}hop")) for n in range(2, 7)
    ]
    locality = _cell(record, "locality_question")
    return EditExample(
        prompt=text(record, "question"),
        target_new=_new(text(record, "object"), said, "object", "output_…"),
        subject=text(record, "subject"),
        ground_truth=said[0] if said else None,
        paraphrases=(text(record, "paraphrased_question"),),
        unrelated=(Probe(locality),) if locality else (),
        relation=text(record, "relation"),
        portability=tuple(
            Probe(question, answer) for question, answer in hops if question and answer
        ),
    )


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
