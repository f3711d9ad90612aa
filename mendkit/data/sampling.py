"""Lists of examples: what stands beside a typed edit, hard negatives, splits by subject."""

import logging
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain

from ..errors import DataError
from .examples import EditExample, Probe
from .files import FACTS, read_examples

logger = logging.getLogger(__name__)

OPENINGS = (
    Probe("The best way to learn a language is to"),
    Probe("The brain uses so much energy because"),
)
CANDIDATES = 4  # test examples from which each one is drawn (`evaluation.prepare.half_known`)


def typed_example(
    prompt: str, target_new: str, *, most: int = 10, first: Sequence[str] = ()
) -> EditExample:
    """An edit that a user typed, with prompts that show what else it changes.

    Where one of the kit's own facts has its wording, the neighbours are the facts of that relation
    put in this wording: at most so many, the subjects of `first` and then well-known ones. Two
    paraphrases are those of such a fact. Elsewhere two general openings are the unrelated prompts.
    """
    facts = _own_facts()
    # 1. The wording: what stands before and after the subject.
    wordings: Counter[tuple[str, str, str | None]] = Counter()
    for fact in facts:
        before, subject, after = fact.prompt.partition(fact.subject or "\0")
        fits = prompt.startswith(before) and prompt.endswith(after)
        if subject and fits and len(prompt) > len(before + after):
            wordings[before, after, fact.relation] += 1
    if not wordings:
        return EditExample(prompt, target_new, unrelated=OPENINGS)
    before, after, relation = max(wordings, key=wordings.__getitem__)
    named = prompt[len(before) : len(prompt) - len(after)]
    # 2. Facts of the relation. A country of many cities is known to more people than one of few.
    kin = {str(f.subject): f for f in facts if f.relation == relation}
    like, cities = kin.pop(named, None), Counter(fact.ground_truth for fact in facts)
    names = [name for name, fact in kin.items() if f"the {name}" not in fact.prompt]
    names = sorted(names, key=lambda name: (name not in first, -cities[name]))[:most]
    shown = like or kin[names[0]]
    return EditExample(
        prompt,
        target_new,
        ground_truth=like.ground_truth if like else None,
        paraphrases=tuple(p.replace(str(shown.subject), named) for p in shown.paraphrases[:2]),
        neighbours=tuple(Probe(before + n + after, kin[n].ground_truth) for n in names),
        relation=relation,
    )


@cache
def _own_facts() -> list[EditExample]:
    return [*chain.from_iterable(map(read_examples, FACTS))]


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


def template_of(prompt: str, subject: str | None) -> str | None:
    """The prompt with {} for the last mention of its subject; None if it names none."""
    before, named, after = prompt.rpartition(subject or "\0")
    return before + "{}" + after if named else None


def _kinship(example: EditExample) -> list[tuple[str, str]]:
    """What an example whose prompt names its subject may share with others."""
    template = template_of(example.prompt, example.subject)
    if template is None:
        return []
    shared = [("wording", template)]
    if example.relation:
        shared.append(("relation", example.relation))
    return shared


def _subject(example: EditExample) -> str:
    return (example.subject or "").casefold()


def split_examples(
    examples: Sequence[EditExample],
    sizes: Mapping[str, int],
    *,
    apart_from: Sequence[EditExample] = (),
    seed: int = 0,
) -> dict[str, tuple[EditExample, ...]]:
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
    told = "%d of %d examples have a subject of the others, %d are in no part"
    logger.info(told, dropped, len(examples), len(examples) - sum(map(len, parts.values())))
    return parts
