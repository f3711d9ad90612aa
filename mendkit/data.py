"""Edit examples: reading them, and turning them into tokens whose scored positions are exact.

For a causal model a prompt and its answer are tokenised **once, as one text**, and the answer is found by character
offsets (CORRECTNESS rows 17 and 18): no slicing by length, no BOS or missing space inside a target. An encoder and a
decoder read two texts, tokenised one by one; a classifier reads the prompt, and its answer is a class.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError

logger = logging.getLogger(__name__)

FACTS = Path(__file__).parent / "facts"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Probe:
    """A prompt on which the model should stay as it was; `answer` (if known) is what it said or should say there."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class EditExample:
    """One edit: make `prompt` continue with `target_new`, and everything that should and should not follow from it.

    `paraphrases` should follow the edit; `neighbours` (same relation, other subject) and `unrelated` prompts not.
    For a classifier a prompt is a claim, and an answer the name of a class.
    `ground_truth` is the answer before the edit (y° in the metrics).
    """

    prompt: str
    target_new: str
    subject: str | None = None
    ground_truth: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Probe, ...] = ()
    unrelated: tuple[Probe, ...] = ()
    relation: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Tokens:
    """A tokenised text. Position `scored[k]` predicts `targets[k]`; without an answer the last position is scored.

    With a `decoder` (sequence to sequence) the encoder reads `ids`, and positions are the decoder's. A classifier's one
    scored position is that which its head reads, its target a class.
    """

    ids: tuple[int, ...]
    scored: tuple[int, ...]
    targets: tuple[int, ...] = ()  # empty if the text has no answer
    ends: bool = False  # whether the last target is the end-of-text token added to the answer
    decoder: tuple[int, ...] = ()  # what the decoder reads

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """What the frozen model's values for this text depend on."""
        return (self.ids, self.scored, self.decoder) if self.decoder else (self.ids, self.scored)


def join(prompt: str, answer: str) -> str:
    """Prompt and answer as one text, with a single space between unless one of them brings white space."""
    return prompt + answer if prompt[-1:].isspace() or answer[:1].isspace() else f"{prompt} {answer}"


def tokenize(
    tokenizer: Any, prompt: str, answer: str | None = None, /, *, add_eos: bool = False, max_length: int = 512
) -> Tokens:
    """Tokenise a prompt with its answer; the scored positions are exactly those that predict the answer's characters.

    `add_eos` appends the end-of-text token to the answer, so that an edit also teaches where to stop. Raises
    DataError if the text is longer than `max_length` tokens or the answer has no token.
    """
    text = prompt if answer is None else join(prompt, answer)
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, add_special_tokens=True)
    ids, own = list(encoded["input_ids"]), [not special for special in encoded["special_tokens_mask"]]
    _check_length(text, ids, max_length)
    if answer is None:
        return Tokens(tuple(ids), (max((p for p, kept in enumerate(own) if kept), default=len(ids) - 1),))
    # where a token ends decides: some tokenizers leave the space before it out of its offsets, or give a space none
    positions = [p for p, (_, end) in enumerate(encoded["offset_mapping"]) if own[p] and end > len(prompt)]
    if not positions or positions[0] == 0:
        raise DataError(
            f"answer {answer!r} of prompt {prompt!r} has no token to predict; give a non-empty prompt and answer"
        )
    ends = add_eos and ids[positions[-1]] != tokenizer.eos_token_id
    if ends:  # the tokenizer may have appended the end of text by itself, then what follows the answer goes
        ids = [*ids[: positions[-1] + 1], tokenizer.eos_token_id]
        positions.append(len(ids) - 1)
    return Tokens(tuple(ids), tuple(p - 1 for p in positions), tuple(ids[p] for p in positions), ends)


def tokenize_pair(
    tokenizer: Any,
    prompt: str,
    answer: str | None = None,
    /,
    *,
    start: int,
    add_eos: bool = False,
    max_length: int = 512,
) -> Tokens:
    """Tokenise a prompt for an encoder and its answer, by itself, for a decoder that starts with the token `start`.

    The tokenizer's special tokens before an answer (BART's `<s>`) are given to the decoder and not scored; without an
    answer the position that predicts its first token is. `add_eos` and errors as in `tokenize`.
    """
    ids = tokenizer(prompt)["input_ids"]
    encoded = tokenizer(text_target="a" if answer is None else answer, return_special_tokens_mask=True)
    written = [p for p, special in enumerate(encoded["special_tokens_mask"]) if not special]
    if not ids or not written:
        raise DataError(
            f"answer {answer!r} of prompt {prompt!r} has no token to predict; give a non-empty prompt and answer"
        )
    _check_length(prompt, ids, max_length)
    lead = (start, *encoded["input_ids"][: written[0]])
    if answer is None:
        return Tokens(tuple(ids), (len(lead) - 1,), decoder=lead)
    targets = tuple(encoded["input_ids"][written[0] : written[-1] + 1])
    ends = add_eos and targets[-1] != tokenizer.eos_token_id
    targets += (tokenizer.eos_token_id,) if ends else ()
    decoder = (*lead, *targets[:-1])
    _check_length(answer, decoder, max_length)
    return Tokens(tuple(ids), tuple(range(len(lead) - 1, len(decoder))), targets, ends, decoder)


def tokenize_claim(
    tokenizer: Any, claim: str, label: int | None = None, /, *, position: int, max_length: int = 512
) -> Tokens:
    """Tokenise a claim for a classifier whose head reads the token at `position` (0 or -1); `label` is its class.

    Raises DataError if the claim has no token, or more than `max_length`.
    """
    ids = tuple(tokenizer(claim)["input_ids"])
    if not ids:
        raise DataError("a claim without tokens cannot be classified; give at least one character")
    _check_length(claim, ids, max_length)
    return Tokens(ids, (position % len(ids),), () if label is None else (label,))


def _check_length(text: str, ids: Sequence[int], limit: int) -> None:
    if len(ids) > limit:
        raise DataError(f"{text[:60]!r}… has {len(ids)} tokens, the limit is {limit}; raise `max_length`")


# ---------------------------------------------------------------------------------------------------------- reading


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
    tokenizer: Any = None,
    max_target_tokens: int = 32,
) -> Examples:
    """Read edit examples from a file, or the kit's own facts by `"facts:train"`, `"facts:validation"`, `"facts:test"`.

    Recognised by their fields: CounterFact (EasyEdit's form), zsRE (MEND's form), and the kit's own JSON lines. Claims
    for a classifier, such as FEVER's, are the kit's own form with labels for answers: `{"prompt": claim, "target_new":
    "REFUTES", "paraphrases": [claim, …], "unrelated": [{"prompt": claim, "answer": "SUPPORTS"}, …]}`.
    A bad record raises DataError naming file, record and field; with `skip_invalid` it is left out, counted
    (`.skipped`) and logged. `limit` keeps the first n valid records. With a `tokenizer`, a target of more than
    `max_target_tokens` tokens is a bad record, too.
    """
    path = _resolve(source)
    examples: list[EditExample] = []
    skipped: list[Skipped] = []
    for where, record in _records(path, skip_invalid, skipped):
        if limit is not None and len(examples) >= limit:
            break
        try:
            example = _parse(record)
            if tokenizer is not None:
                _check_target(tokenizer, example, max_target_tokens)
            examples.append(example)
        except DataError as error:
            if not skip_invalid:
                raise DataError(f"{where}: {error}") from None
            skipped.append(Skipped(where, str(error)))
    if skipped:
        logger.warning("%s: skipped %d invalid records, first: %s: %s", path.name, len(skipped), *_words(skipped[0]))
    if not examples:
        raise DataError(f"{path}: no valid example in it; expected CounterFact, zsRE or mendkit JSON lines")
    return Examples.of(examples, skipped)


def write_examples(examples: Sequence[EditExample], path: str | Path) -> None:
    """Write examples as the kit's own JSON lines."""
    lines = []
    for example in examples:
        record = {k: v for k, v in vars(example).items() if v not in (None, ())}
        for role in ("neighbours", "unrelated"):
            if role in record:
                record[role] = [vars(probe) for probe in record[role]]
        lines.append(json.dumps(record, ensure_ascii=False))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _check_target(tokenizer: Any, example: EditExample, limit: int) -> None:
    count = len(tokenize(tokenizer, example.prompt, example.target_new, max_length=10**9).targets)
    if count > limit:
        raise DataError(f"field `target_new` has {count} tokens, the limit is {limit}; raise `max_target_tokens`")


def _words(skipped: Skipped) -> tuple[str, str]:
    return skipped.where, skipped.why


def _resolve(source: str | Path) -> Path:
    name = str(source)
    if name.startswith("facts:"):
        if name[6:] not in SPLITS:
            raise DataError(
                f"{name}: no such split of the kit's own facts; expected one of facts:{', facts:'.join(SPLITS)}"
            )
        return FACTS / f"{name[6:]}.jsonl"
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a data file, or facts:train, facts:validation, facts:test")
    return path


def _records(path: Path, skip_invalid: bool, skipped: list[Skipped]) -> Iterator[tuple[str, Any]]:
    """(where, record) of a JSON array or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if text.lstrip().startswith("["):
        try:
            array = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: invalid JSON: {error.msg}") from None
        yield from ((f"{path}: record {i}", record) for i, record in enumerate(array))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            if not skip_invalid:
                raise DataError(f"{where}: invalid JSON: {error.msg}") from None
            skipped.append(Skipped(where, f"invalid JSON: {error.msg}"))


def _parse(record: Any) -> EditExample:
    if not isinstance(record, dict):
        raise DataError(f"expected an object, got {type(record).__name__}")
    for key, parse in FORMS.items():
        if key in record:
            return parse(record)
    raise DataError(f"unknown record form with the fields {sorted(record)}; expected one of the fields {list(FORMS)}")


def _text(record: Mapping[str, Any], key: str, /, *, required: bool = True) -> str | None:
    value = record.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, str):
        found = "missing" if key not in record else f"{value!r} ({type(value).__name__})"
        raise DataError(f"field `{key}` must be text, is {found}")
    if not value.strip():
        raise DataError(f"field `{key}` is empty")
    return value


def _list(record: Mapping[str, Any], key: str, parse: Callable[[Any], Any], /) -> tuple[Any, ...]:
    value = record.get(key)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"field `{key}` must be a list, is {value!r} ({type(value).__name__})")
    out = []
    for i, item in enumerate(value):
        try:
            out.append(parse(item))
        except DataError as error:
            raise DataError(f"field `{key}[{i}]`: {error}") from None
    return tuple(out)


def _item_text(value: Any) -> str:
    return _text({"value": value}, "value")  # type: ignore[return-value]


def _probe(value: Any) -> Probe:
    if isinstance(value, str):
        return Probe(_item_text(value))
    if not isinstance(value, dict):
        raise DataError(f"must be text or an object with `prompt` and `answer`, is {value!r}")
    return Probe(_text(value, "prompt"), _text(value, "answer", required=False))  # type: ignore[arg-type]


OWN_FIELDS = [
    "prompt",
    "target_new",
    "subject",
    "ground_truth",
    "paraphrases",
    "neighbours",
    "unrelated",
    "relation",
    "id",
    "source",
]


def _own(record: Mapping[str, Any]) -> EditExample:
    unknown = sorted(set(record) - set(OWN_FIELDS))
    if unknown:
        raise DataError(f"unknown field `{unknown[0]}`; legal fields: {', '.join(OWN_FIELDS)}")
    return EditExample(
        prompt=_text(record, "prompt"),
        target_new=_text(record, "target_new"),
        subject=_text(record, "subject", required=False),
        ground_truth=_text(record, "ground_truth", required=False),
        paraphrases=_list(record, "paraphrases", _item_text),
        neighbours=_list(record, "neighbours", _probe),
        unrelated=_list(record, "unrelated", _probe),
        relation=_text(record, "relation", required=False),
        id=_text(record, "id", required=False),
    )


def _counterfact(record: Mapping[str, Any]) -> EditExample:
    """EasyEdit's flat CounterFact: the locality prompt has the edit's relation and answer, so it is a neighbour."""
    neighbour = Probe(_text(record, "locality_prompt"), _text(record, "locality_ground_truth"))
    return EditExample(
        prompt=_text(record, "prompt"),
        target_new=_text(record, "target_new"),
        subject=_text(record, "subject", required=False),
        ground_truth=_text(record, "ground_truth"),
        paraphrases=(_text(record, "rephrase_prompt"),),
        neighbours=(neighbour,),
        id=str(record["case_id"]) if "case_id" in record else None,
    )


def _zsre(record: Mapping[str, Any]) -> EditExample:
    """MEND's zsRE: `alt` is the new answer, `loc` an unrelated Natural Questions question."""
    answers = _list(record, "answers", _item_text)
    target = _text(record, "alt")
    if not answers:
        raise DataError("field `answers` must be a non-empty list")
    if target in answers:
        raise DataError(f"field `alt` {target!r} is among `answers`: nothing to edit")
    loc_answer = _text(record, "loc_ans", required=False)
    unrelated = Probe(_text(record, "loc"), None if loc_answer in (None, "---") else loc_answer)
    return EditExample(
        prompt=_text(record, "src"),
        target_new=target,
        subject=_text(record, "subject", required=False),
        ground_truth=answers[0],
        paraphrases=(_text(record, "rephrase"),),
        unrelated=(unrelated,),
    )


FORMS: dict[str, Callable[[Mapping[str, Any]], EditExample]] = {
    "src": _zsre,
    "rephrase_prompt": _counterfact,
    "target_new": _own,
}
"""Record forms by the field that tells them apart, most specific first."""
