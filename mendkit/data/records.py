"""The values of one record of editing data, and the layouts that need more than a name.

Everything here raises DataError naming the field.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import DataError, shown
from .examples import Implied, Probe, check_unicode

Record = Mapping[str, Any]
Flat = dict[str, Any]

# names in an object of a field of probes
PROMPTS = ("prompt", "loc", "question", "New Question")
TRUTHS = ("answer", "ground_truth", "target", "loc_ans", "answers", "New Answer", "aliases")
BESIDE = ("metric", "id", "type", "relation", "Recalled Relation", "Other")


def text(record: Record, key: str, *, empty: bool = False) -> str | None:
    """A text field, which may be blank if `empty`; None where it is missing or null."""
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"field `{key}` must be text, is {shown(value)}")
    if not value.strip() and not empty:
        raise DataError(f"field `{key}` is empty")
    return check_unicode(value, f"field `{key}`")


def name_or_number(record: Record, key: str) -> list[str]:
    """A text, a whole number, or `{"str": …}`, as text."""
    value = record[key]
    if isinstance(value, dict) and "str" in value:
        value = value["str"]
    found = str(value) if is_count(value) else text({key: value}, key)
    return [found] if found is not None else []


def is_count(value: Any) -> bool:
    """Whether a value is a whole number that may be read as text."""
    return type(value) is int and abs(value) < 10**40


def items(record: Record, key: str) -> list[str]:
    """A list of texts, or a lone text."""
    value = record.get(key)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"field `{key}` must be a list, is {shown(value)}")
    found = []
    for i, item in enumerate(value):
        place = f"{key}[{i}]"
        item = text({place: item}, place)
        if item is not None:
            found.append(item)
    return found


def answers(record: Record, key: str) -> list[str]:
    """Every name of an answer: texts, whole numbers, lists, `{"str": …}`; blank ones left out."""
    found: list[str] = []
    parts = [record.get(key)]
    while parts:
        value = parts.pop(0)
        if isinstance(value, list):
            parts = value + parts
        elif isinstance(value, dict) and {"str", "value", "answer"} & value.keys():
            parts += [value.get("str"), value.get("value"), value.get("answer")]
            parts.append(value.get("aliases"))
        elif is_count(value):
            found.append(str(value))
        elif isinstance(value, str):
            if value.strip() and value != "---":
                found.append(check_unicode(value, f"field `{key}`"))
        elif value is not None:
            raise DataError(f"field `{key}` must be text or lists of texts, has {shown(value)}")
    return list(dict.fromkeys(found))


def pairs(prompts: Any, truths: Any, place: str) -> list[Probe]:
    """Probes of a prompt and its answers, or of a list of prompts and their answers."""
    if not isinstance(prompts, list):
        prompts, truths = [prompts], [truths]
    elif not isinstance(truths, list):
        truths = [truths] * len(prompts)
    elif len(truths) != len(prompts):
        wanted = f"an answer for each of {len(prompts)} prompts"
        raise DataError(f"field `{place}` must have {wanted}, has {shown(truths)}")
    found = []
    for prompt, truth in zip(prompts, truths, strict=True):
        asked = text({place: prompt}, place)
        if asked is None:
            raise DataError(f"field `{place}` has no `prompt`")
        names = answers({f"{place}.answer": truth}, f"{place}.answer")
        found.append(Probe(asked, next(iter(names), None), tuple(names[1:])))
    return found


def probes(record: Record, key: str) -> list[Probe]:
    """Prompts beside an edit: a text, an object, a list of them, or lists by kind (KnowEdit)."""
    value = record[key]
    if isinstance(value, list):
        groups = {f"{key}[{i}]": item for i, item in enumerate(value)}
    elif not isinstance(value, dict):
        return pairs(value, None, key)
    elif any(name in value for name in (*PROMPTS, *TRUTHS)):
        return _probe(value, key)
    else:
        groups = {f"{key}.{kind}": group for kind, group in value.items()}
    found: list[Probe] = []
    for place, group in groups.items():
        if group is not None:
            found += probes({place: group}, place)
    return found


def _probe(value: Record, place: str) -> list[Probe]:
    """The probes of one object: a prompt and its answers, or lists of both."""
    prompts, truths = [], []
    for name, part in value.items():
        if name in PROMPTS:
            prompts.append(part)
        elif name in TRUTHS:
            truths.append(part)
        elif name not in BESIDE:
            raise DataError(f"field `{place}`: unknown field `{name}`; known: prompt, answer")
    if not prompts:
        raise DataError(f"field `{place}` has no `prompt`")
    if len(truths) == 1:
        truths = truths[0]
    return pairs(prompts[0], truths, place)


def implied(record: Record, key: str) -> list[Implied]:
    """Probes whose answer the edit changes: objects with a prompt, its answers, and `before`."""
    found = []
    for number, item in enumerate(_objects(record, key) if record[key] else ()):
        before = next(iter(answers(item, "before")), None)
        domain, place = text(item, "domain"), f"{key}[{number}]"
        asked = {name: part for name, part in item.items() if name not in ("before", "domain")}
        for probe in probes({place: asked}, place):
            found.append(Implied(**vars(probe), before=before, domain=domain))
    return found


def _objects(record: Record, key: str) -> list[Flat]:
    """A list of objects, or a lone object; the objects are copied."""
    value = record.get(key)
    listed: list[Any] = value if isinstance(value, list) and value else [value]
    for item in listed:
        if not isinstance(item, dict):
            raise DataError(f"field `{key}` must be an object, is {shown(item)}")
    return [dict(item) for item in listed]


def _drop(record: Flat, left: list[str], *names: str) -> None:
    """Remove what is not read, noting it in `left`."""
    left += [name for name in names if record.pop(name, None)]


def _rewrites(record: Flat, left: list[str]) -> list[Flat]:
    """ROME's CounterFact; MQuAKE and AKEW, whose records may have several edits.

    Neighbours have the old answer unless they bring their own. The questions are consequences of
    the edit; those that need several edits are left out.
    """
    rewrites = _objects(record, "requested_rewrite")
    asked = items(record, "questions") if "questions" in record else []
    if len(rewrites) == 1 and asked:
        new = [record.get("new_answer"), record.get("new_answer_alias")]
        probe = {"answer": new, "before": record.get("answer")}
        record["consequences"] = [{"prompt": question, **probe} for question in asked]
        for name in ("questions", "new_answer", "new_answer_alias", "answer"):
            record.pop(name, None)
    if isinstance(record.pop("requested_rewrite"), list):
        _drop(record, left, "answer", "questions", "new_answer")
    flats = []
    for number, rewrite in enumerate(rewrites, 1):
        flat = record | rewrite
        prompt, subject = text(flat, "prompt") or "", text(flat, "subject")
        if "{}" in prompt and subject is None:
            raise DataError("field `subject` is missing; the prompt has `{}` in its place")
        flat["prompt"] = prompt.replace("{}", subject or "")
        if "question" in flat:
            flat["rephrase"] = flat.pop("question")
        if len(rewrites) > 1 and "case_id" in flat:
            flat["case_id"] = f"{flat['case_id']}.{number}"
        near = flat.get("neighborhood_prompts")
        if isinstance(near, list):
            near = [_with_answer(value, flat.get("target_true")) for value in near]
            flat["neighborhood_prompts"] = near
        flats.append(flat)
    return flats


def _with_answer(prompt: Any, truth: Any) -> Any:
    return {"prompt": prompt, "answer": truth} if isinstance(prompt, str) else prompt


RIPPLES = {
    "Relation_Specifity": "unrelated",  # the files spell it so
    "Relation_Specificity": "unrelated",
    "Forgetfulness": "unrelated",
    "Subject_Aliasing": "portability",
    "Logical_Generalization": "consequences",
    "Compositionality_I": "consequences",
    "Compositionality_II": "consequences",
}


def _ripple(record: Flat, left: list[str]) -> list[Flat]:
    """RippleEdits: the edit is a sentence, whose answer begins after its last ` is `."""
    edit, old = _objects(record, "edit")[0], ""
    del record["edit"]
    sentence, relation = text(edit, "prompt") or "", text(edit, "relation") or ""
    if edit.get("original_fact"):
        old = text(_objects(edit, "original_fact")[0], "prompt") or ""
        del edit["original_fact"]
    # 1. the answer begins after the last ` is ` that the new and the old sentence share
    same = sentence
    while old and not old.startswith(same):
        same = same[:-1]
    stem, verb, _ = same.rpartition(" is ")
    if not verb:
        raise DataError("field `edit.prompt` has no ` is `, after which the answer would begin")
    start = len(stem + verb)
    flat = edit | {"prompt": f"{stem} is", "target_new": sentence[start:].removesuffix(".")}
    flat["ground_truth"] = old[start:].removesuffix(".")
    # 2. "the name of the country of citizenship of X": the relation, then the subject
    _, named, subject = stem.rpartition(f" {relation.replace('_', ' ').lower()} of ")
    if named:
        flat["subject"] = subject
    # 3. the queries, by what should become of their answers
    for kind in record:
        if kind not in RIPPLES:
            flat[kind] = record[kind]
            continue
        for test in _objects(record, kind) if record[kind] else ():
            _drop(test, left, "condition_queries")
            for query in _objects(test, "test_queries") if test.get("test_queries") else ():
                asked = {"prompt": query.get("prompt"), "answer": query.get("answers")}
                flat.setdefault(RIPPLES[kind], []).append(asked)
    return [flat]


def _sentiment(record: Flat, left: list[str]) -> list[Flat]:
    """ConvSent: the first reply of the wished sentiment is the new answer."""
    wished = record.pop("target", None)
    if wished not in ("pos", "neg"):
        raise DataError(f"field `target` must be pos or neg, is {shown(wished)}")
    prompts, new = items(record, "prompts"), items(record, wished)
    if not prompts or not new:
        raise DataError(f"field `{wished}` or `prompts` is empty")
    old = record.get({"pos": "neg", "neg": "pos"}[wished])
    _drop(record, left, "pos", "neg")
    first = {"prompts": prompts[0], "paraphrases": prompts[1:], "target_new": new[0]}
    return [record | first | {"ground_truth": old}]


def _wikibigedit(record: Flat, left: list[str]) -> list[Flat]:
    """WikiBigEdit: `loc` asks for the edit's relation of another subject, so it is a neighbour."""
    _drop(record, left, "object")
    for old, new in {"loc": "locality_prompt", "loc_ans": "locality_ground_truth"}.items():
        if old in record:
            record[new] = record.pop(old)
    return [record]


def _alternatives(record: Flat, left: list[str]) -> list[Flat]:
    """The authors' zsRE and FEVER files: the first alternative, at best no truth, is the answer."""
    truths = answers(record, "output")
    others = sorted(answers(record, "alternatives"), key=truths.__contains__)
    if not others:
        raise DataError("field `alternatives` has no answer: nothing to edit")
    record["target_new"] = others[0]
    del record["alternatives"]
    wordings = record.get("filtered_rephrases")
    if isinstance(wordings, list):
        wordings = [wording for wording in wordings if wording != record.get("input")]
        record["filtered_rephrases"] = wordings
    return [record]


def _arguments(record: Flat, left: list[str]) -> list[Flat]:
    """The arguments of EasyEdit's `edit`: of `locality_inputs`, `neighborhood` are neighbours."""
    kinds = _objects(record, "locality_inputs")[0]
    del record["locality_inputs"]
    record["neighborhood_prompts"] = kinds.pop("neighborhood", None)
    record["locality"] = kinds
    return [record]


UNFOLD = {
    "requested_rewrite": _rewrites,
    "edit": _ripple,
    "pos": _sentiment,
    "update": _wikibigedit,
    "alternatives": _alternatives,
    "locality_inputs": _arguments,
}
"""Layouts that need more than a name, by the field that tells them."""
