"""Files of examples, of questions to ask beside them, and of held-out text; lists of examples.

`layouts.py` says what one record means.
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
from .layouts import answers, parse, required

logger = logging.getLogger(__name__)

FACTS = {
    f"facts:{split}": Path(__file__).parent / "facts" / f"{split}.jsonl"
    for split in ("train", "validation", "test")
}
"""The kit's own facts."""


@dataclass(frozen=True)
class Skipped:
    """A record that was left out, and why."""

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
    source: str | Path, *, limit: int | None = None, skip_invalid: bool = False
) -> Examples:
    """Read edit examples from a file, or the kit's own facts by a name such as `"facts:train"`.

    Recognised by their fields: CounterFact (ROME's form and EasyEdit's), zsRE (the authors' file,
    and MEND's form with or without portability), KnowEdit, HalluEditBench's tables, and the kit's
    own JSON lines. FEVER-style claims are such lines: `prompt` is the claim, `target_new` its
    label, an answer another claim's label.

    A bad record raises DataError naming file, record and field. With `skip_invalid` it is left out,
    counted (`.skipped`) and logged. `limit` keeps the first n valid records.
    """
    if str(source).startswith("facts:") and str(source) not in FACTS:
        raise DataError(f"{source}: no such facts of the kit; expected one of {', '.join(FACTS)}")
    path = FACTS.get(str(source)) or _existing(source, f", or one of {', '.join(FACTS)}")
    examples: list[EditExample] = []
    skipped: list[Skipped] = []
    for where, record in _records(path):
        if limit is not None and len(examples) >= limit:
            break
        try:
            examples.append(parse(_sound(record)))
        except DataError as error:
            if not skip_invalid:
                raise DataError(f"{where}: {error}") from None
            skipped.append(Skipped(where, str(error)))
    if skipped:
        told = "%s: skipped %d invalid records, first: %s: %s"
        logger.warning(told, path.name, len(skipped), skipped[0].where, skipped[0].why)
    if not examples:
        expected = "CounterFact, zsRE, KnowEdit, HalluEditBench or mendkit JSON lines"
        raise DataError(f"{path}: no valid example in it; expected {expected}")
    return Examples.of(examples, skipped)


def write_examples(examples: Sequence[EditExample], path: str | Path) -> None:
    """Write examples as the kit's own JSON lines."""
    lines = []
    for example in examples:
        record = _filled(example)
        for role in ("neighbours", "unrelated", "portability"):
            if role in record:
                record[role] = [_filled(probe) for probe in record[role]]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def _filled(value: EditExample | Probe) -> dict[str, Any]:
    """The fields that hold something."""
    return {name: held for name, held in vars(value).items() if held not in (None, ())}


def read_questions(path: str | Path) -> tuple[Probe, ...]:
    """Questions with their answers from NQ-open's JSON lines.

    Each has a `question`, and as `answer` a list of the answer's names. Raises DataError.
    """
    found = []
    for where, record in _records(_existing(path)):
        try:
            if not isinstance(_sound(record), dict):
                raise DataError(f"expected an object, got {type(record).__name__}")
            names = answers(record, "answer")
            question = required(record, "question").removesuffix("?") + "?"
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        found.append(Probe(question, next(iter(names), None), names[1:]))
    if not found:
        expected = "JSON lines with `question` and `answer`"
        raise DataError(f"{path}: no question in it; expected {expected}")
    return tuple(found)


def read_text(path: str | Path) -> str:
    """Held-out text, as in WikiText's raw files.

    Raises DataError if it is missing, not UTF-8, or blank.
    """
    content = _content(_existing(path))
    if not content.strip():
        raise DataError(f"{path}: no text in it")
    return content


def with_unrelated(
    examples: Sequence[EditExample], questions: Sequence[Probe], *, each: int = 2, seed: int = 0
) -> Examples:
    """The examples with `each` more unrelated prompts, drawn without repetition while they last.

    A question that names the example's subject is not drawn for it. Raises DataError if no question
    is left for one.
    """
    rng, queue, out = random.Random(seed), list[Probe](), []
    for example in examples:
        subject = (example.subject or "\0").casefold()
        drawn: list[Probe] = []
        seen = 0
        while len(drawn) < each:
            if seen > 2 * len(questions):  # every question has come by
                raise DataError(
                    f"fewer than {each} questions do not name {example.subject!r}; "
                    "give more questions"
                )
            queue = queue or rng.sample(questions, len(questions))
            question = queue.pop()
            seen += 1
            if subject not in question.prompt.casefold() and question not in drawn:
                drawn.append(question)
        out.append(replace(example, unrelated=(*example.unrelated, *drawn)))
    return Examples.of(out, getattr(examples, "skipped", ()))


def hard_negatives(examples: Sequence[EditExample], *, seed: int = 0) -> list[tuple[Probe, ...]]:
    """For each example prompts that look like its own and are not its fact: up to two.

    The first is its prompt about the subject of another example that shares the relation or the
    prompt's wording, with the answer known there. The second is a beginning of its prompt, cut
    after some word, without an answer.
    """
    rng = random.Random(seed)
    kin: dict[tuple[str, str], list[EditExample]] = {}
    for example in examples:
        for key in _kinship(example):
            kin.setdefault(key, []).append(example)
    out = []
    for example in examples:
        relatives = [other for key in _kinship(example) for other in kin[key]]
        others = [o for o in relatives if _subject(o) != _subject(example)]
        found = []
        if others:
            other = rng.choice(others)
            prompt = example.prompt.replace(example.subject or "", other.subject or "")
            found.append(Probe(prompt, other.ground_truth))
        ends = [at.start() for at in re.finditer(r"(?<=\S)\s+\S", example.prompt)]
        if ends:
            found.append(Probe(example.prompt[: rng.choice(ends)]))
        out.append(tuple(found))
    return out


def _kinship(example: EditExample) -> list[tuple[str, str]]:
    """What an example whose prompt names its subject may share with others."""
    if not example.subject or example.subject not in example.prompt:
        return []
    shared = [("wording", example.prompt.replace(example.subject, "\0"))]
    if example.relation:
        shared.append(("relation", example.relation))
    return shared


def _subject(example: EditExample) -> str:
    return (example.subject or "").casefold()


@dataclass(frozen=True)
class Split:
    """Parts of a list of examples that share no subject with one another, nor with others."""

    parts: Mapping[str, tuple[EditExample, ...]]
    dropped: int  # their subject is among those to stay apart from
    left_out: int  # their subject is in an earlier part, or all parts were full


def split_examples(
    examples: Sequence[EditExample],
    sizes: Mapping[str, int],
    *,
    apart_from: Sequence[EditExample] = (),
    seed: int = 0,
) -> Split:
    """Split examples by subject, in a seeded random order, into parts of at most the given sizes.

    No subject (its capitals ignored) is in two parts, or in `apart_from`. Raises DataError for an
    example without a subject.
    """
    for example in (*apart_from, *examples):
        if example.subject is None:
            raise DataError(
                f"{example.prompt!r} names no subject; only examples with `subject` can be split"
            )
    taken = set(map(_subject, apart_from))
    free = [example for example in examples if _subject(example) not in taken]
    dropped = len(examples) - len(free)
    random.Random(seed).shuffle(free)
    parts = {}
    for name, size in sizes.items():
        parts[name] = tuple(free[:size])
        taken = set(map(_subject, parts[name]))
        free = [example for example in free[size:] if _subject(example) not in taken]
    left_out = len(examples) - dropped - sum(map(len, parts.values()))
    told = "%d of %d examples dropped: their subject is set aside; %d left out"
    logger.info(told, dropped, len(examples), left_out)
    return Split(parts, dropped, left_out)


def _existing(source: str | Path, other: str = "") -> Path:
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a data file{other}")
    return path


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a table, JSON lines, or a JSON array, which may stand as `records`.

    The record of a line that is no JSON is a DataError; see `_sound`.
    """
    content = _content(path)
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(content), restkey="further cells")
        try:
            for row in rows:
                yield f"{path}:{rows.line_num}", row
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num}: no table: {error}") from None
        return
    whole = _from_json(content)
    if isinstance(whole, dict):
        whole = whole.get("records")
    if isinstance(whole, list):
        for number, record in enumerate(whole):
            yield f"{path}: record {number}", record
        return
    first = content.lstrip().partition("\n")[0]
    if first.startswith("[") and isinstance(_from_json(first), DataError):
        raise DataError(f"{path}: {whole}")  # an array, not lines
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _from_json(line)


def _from_json(text: str) -> Any:
    """The value of a text, or a DataError that says why it has none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of too many digits
        return DataError(f"invalid JSON: {error}")


def _sound(record: Any) -> Any:
    if isinstance(record, DataError):
        raise record
    return record
