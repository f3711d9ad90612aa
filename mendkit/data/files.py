"""Files of editing data: examples, questions to ask beside them, held-out text, and splits without shared subjects.

What one record means is said in `layouts.py`; here are files (JSON, JSON lines, CSV), their errors, and what is done
with whole lists of examples.
"""

import csv
import io
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from .examples import EditExample, Probe
from .layouts import answers, parse, text

logger = logging.getLogger(__name__)

FACTS = Path(__file__).parent / "facts"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Skipped:
    """A record that `read_examples(skip_invalid=True)` left out, and why."""

    where: str
    why: str


class Examples(tuple[EditExample, ...]):
    """A tuple of examples that knows which records were skipped."""

    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def of(cls, examples: Sequence[EditExample], skipped: Sequence[Skipped] = ()) -> "Examples":
        """Freeze `examples`, remembering the `skipped` records."""
        self = cls(examples)
        self.skipped = tuple(skipped)
        return self


def read_examples(
    source: str | Path,
    /,
    *,
    limit: int | None = None,
    skip_invalid: bool = False,
) -> Examples:
    """Read edit examples from a file, or the kit's own facts by `"facts:train"`, `"facts:validation"`, `"facts:test"`.

    Recognised by their fields: CounterFact (ROME's form and EasyEdit's), zsRE (the authors' file, MEND's form as in
    EasyEdit, with or without portability), KnowEdit, HalluEditBench's tables, and the kit's own JSON lines.
    FEVER-style claims are such lines: `prompt` is the claim, `target_new` its label, an answer another claim's.
    A bad record raises DataError naming file, record and field; with `skip_invalid` it is left out, counted
    (`.skipped`) and logged. `limit` keeps the first n valid records.
    """
    path = _resolve(source)
    examples: list[EditExample] = []
    skipped: list[Skipped] = []
    for where, record in _records(path, skip_invalid, skipped):
        if limit is not None and len(examples) >= limit:
            break
        try:
            examples.append(parse(record))
        except DataError as error:
            if not skip_invalid:
                raise DataError(f"{where}: {error}") from None
            skipped.append(Skipped(where, str(error)))
    if skipped:
        first = skipped[0]
        logger.warning(
            "%s: skipped %d invalid records, first: %s: %s",
            path.name,
            len(skipped),
            first.where,
            first.why,
        )
    if not examples:
        raise DataError(
            f"{path}: no valid example in it; expected CounterFact, zsRE, KnowEdit or mendkit JSON lines"
        )
    return Examples.of(examples, skipped)


def write_examples(examples: Sequence[EditExample], path: str | Path) -> None:
    """Write examples as the kit's own JSON lines."""

    def given(value: EditExample | Probe) -> dict[str, Any]:
        return {k: v for k, v in vars(value).items() if v not in (None, ())}

    lines = []
    for example in examples:
        record = given(example)
        for role in ("neighbours", "unrelated", "portability"):
            if role in record:
                record[role] = [given(probe) for probe in record[role]]
        lines.append(json.dumps(record, ensure_ascii=False))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ beside the edits


def read_questions(path: str | Path, /) -> tuple[Probe, ...]:
    """Questions with their answers from NQ-open's JSON lines: `question`, and `answer`, a list of its names."""
    out = []
    for where, record in _records(_file(path), False, []):
        try:
            if not isinstance(record, dict):
                raise DataError(f"expected an object, got {type(record).__name__}")
            names, question = answers(record, "answer"), str(text(record, "question"))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        out.append(
            Probe(
                question if question.endswith("?") else f"{question}?",
                *names[:1],
                aliases=names[1:],
            )
        )
    if not out:
        raise DataError(
            f"{path}: no question in it; expected JSON lines with `question` and `answer`"
        )
    return tuple(out)


def with_unrelated(
    examples: Sequence[EditExample], questions: Sequence[Probe], /, *, each: int = 2, seed: int = 0
) -> Examples:
    """The examples with `each` more unrelated prompts, drawn without repetition while they last.

    A question that names the example's subject is not drawn for it. Raises DataError if no question is left for one.
    """
    rng, queue, out = random.Random(seed), [], []
    for example in examples:
        subject, drawn, seen = (example.subject or "\0").casefold(), [], 0
        while len(drawn) < each:
            if seen > 2 * len(questions):  # every question has come by
                raise DataError(
                    f"fewer than {each} questions do not name {example.subject!r}; give more questions"
                )
            queue, seen = queue or rng.sample(questions, len(questions)), seen + 1
            question = queue.pop()
            if subject not in question.prompt.casefold() and question not in drawn:
                drawn.append(question)
        out.append(replace(example, unrelated=(*example.unrelated, *drawn)))
    return Examples.of(out, getattr(examples, "skipped", ()))


def hard_negatives(examples: Sequence[EditExample], /, *, seed: int = 0) -> list[tuple[Probe, ...]]:
    """For each example prompts that look like its own and are not its fact: its prompt about the subject of another
    example, which shares the relation or the prompt's wording, with the answer known there; and a beginning of its
    prompt, cut after some word, without an answer. None where there is no such subject, or no word to cut after."""
    rng, kin = random.Random(seed), {}
    for e in examples:
        for key in _kinship(e):
            kin.setdefault(key, []).append(e)
    out = []
    for e in examples:
        others = [
            o
            for key in _kinship(e)
            for o in kin[key]
            if o.subject.casefold() != e.subject.casefold()
        ]
        found = []
        if others:
            other = rng.choice(others)
            found.append(Probe(e.prompt.replace(e.subject, other.subject), other.ground_truth))
        ends = [at.start() for at in re.finditer(r"(?<=\S)\s+\S", e.prompt)]
        if ends:
            found.append(Probe(e.prompt[: rng.choice(ends)]))
        out.append(tuple(found))
    return out


def _kinship(e: EditExample) -> list[tuple[str, str]]:
    """What an example, whose prompt names its subject, may share with others: the relation, the prompt's wording."""
    if not e.subject or e.subject not in e.prompt:
        return []
    wording = ("wording", e.prompt.replace(e.subject, "\0"))
    return [wording, ("relation", e.relation)] if e.relation else [wording]


def read_text(path: str | Path, /) -> str:
    """Held-out text, as in WikiText's raw files; raises DataError if it is missing, not UTF-8, or blank."""
    content = _content(_file(path))
    if not content.strip():
        raise DataError(f"{path}: no text in it")
    return content


@dataclass(frozen=True)
class Split:
    """Parts of a list of examples that share no subject with one another, nor with examples set aside."""

    parts: Mapping[str, tuple[EditExample, ...]]
    dropped: int  # their subject is among those set aside
    left_out: int  # their subject is in an earlier part, or all parts were full


def split_examples(
    examples: Sequence[EditExample],
    sizes: Mapping[str, int],
    /,
    *,
    apart_from: Sequence[EditExample] = (),
    seed: int = 0,
) -> Split:
    """Split examples by subject, in a seeded random order, into parts of at most the given sizes.

    No subject (its capitals ignored) is in two parts, or in `apart_from`. Raises DataError for an example without a
    subject.
    """
    for example in (*apart_from, *examples):
        if example.subject is None:
            raise DataError(
                f"{example.prompt!r} names no subject; only examples with `subject` can be split by it"
            )
    taken = {example.subject.casefold() for example in apart_from}
    free = [example for example in examples if example.subject.casefold() not in taken]
    dropped = len(examples) - len(free)
    random.Random(seed).shuffle(free)
    parts = {}
    for name, size in sizes.items():
        parts[name], rest = tuple(free[:size]), free[size:]
        used = {example.subject.casefold() for example in parts[name]}
        free = [example for example in rest if example.subject.casefold() not in used]
    left_out = len(examples) - dropped - sum(map(len, parts.values()))
    logger.info(
        "%d of %d examples dropped: their subject is set aside; %d left out",
        dropped,
        len(examples),
        left_out,
    )
    return Split(parts, dropped, left_out)


# ------------------------------------------------------------------------------------------------------------ files


def _resolve(source: str | Path) -> Path:
    name = str(source)
    if name.startswith("facts:"):
        if name[6:] not in SPLITS:
            raise DataError(
                f"{name}: no such split of the kit's own facts; expected one of facts:{', facts:'.join(SPLITS)}"
            )
        return FACTS / f"{name[6:]}.jsonl"
    return _file(source, ", or facts:train, facts:validation, facts:test")


def _file(source: str | Path, other: str = "") -> Path:
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a data file{other}")
    return path


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


_JSON_ERRORS = (
    ValueError,
    RecursionError,
)  # what is no JSON, a number of too many digits, lists within lists


def _records(path: Path, skip_invalid: bool, skipped: list[Skipped]) -> Iterator[tuple[str, Any]]:
    """(where, record) of a JSON array, an object with such an array as `records`, JSON lines, or a table (CSV)."""
    content = _content(path)
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(content), restkey="further cells")
        try:
            yield from ((f"{path}:{rows.line_num}", row) for row in rows)
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num}: no table: {error}") from None
        return
    whole = _whole(path, content)
    if whole is not None:
        yield from ((f"{path}: record {i}", record) for i, record in enumerate(whole))
        return
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, json.loads(line)
        except _JSON_ERRORS as error:
            why = f"invalid JSON: {getattr(error, 'msg', error)}"
            if not skip_invalid:
                raise DataError(f"{where}: {why}") from None
            skipped.append(Skipped(where, why))


def _whole(path: Path, content: str) -> list[Any] | None:
    """The records of a file that is one JSON value; None if it is JSON lines."""
    array = content.lstrip().startswith("[")
    try:
        value = json.loads(content)
    except _JSON_ERRORS as error:
        if array:
            line = f"{path}:{getattr(error, 'lineno', 1)}"
            raise DataError(f"{line}: invalid JSON: {getattr(error, 'msg', error)}") from None
        return None
    if isinstance(value, dict) and isinstance(value.get("records"), list):
        return value["records"]
    return value if array else None
