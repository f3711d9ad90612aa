"""Data of the packaged archive: the kit's own facts and CounterFact, without what is evaluated.

    python scripts/packaged_data.py OUT counterfact-train.json EVALUATED.json...

writes OUT/train.jsonl, OUT/validation.jsonl and OUT/unseen.jsonl. No subject of the own facts'
validation and test parts or of the EVALUATED files is trained on. Records about instruments,
positions of players, religions and sports are left out of training: `unseen.jsonl` holds those
whose subjects are free, as relations that the archive has never met. Each CounterFact record gets
a general opening of the own facts as its unrelated prompt.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from mendkit import EditExample, Probe, read_examples, split_examples, write_examples

# Answers of the four relations that training does not see.
UNSEEN = """piano guitar violin trumpet organ cello saxophone bass clarinet flute harp midfielder
quarterback goaltender pitcher linebacker goalkeeper outfielder catcher center defenseman shortstop
Islam Christianity Buddhism Hinduism Judaism Catholicism Zoroastrianism basketball football soccer
baseball hockey cricket tennis rugby golf volleyball"""


def is_unseen(example: EditExample) -> bool:
    """Whether a CounterFact record is of a relation that is left out."""
    answers = UNSEEN.split()
    return example.target_new in answers or example.ground_truth in answers


def openings(examples: Sequence[EditExample]) -> list[Probe]:
    """The unrelated prompts that are beginnings of any text, each once."""
    found = {}
    for example in examples:
        for probe in example.unrelated:
            if probe.answer is None and example.subject not in probe.prompt:
                found[probe.prompt] = probe
    return list(found.values())


def with_opening(
    examples: Sequence[EditExample], general: Sequence[Probe], *, seed: int
) -> list[EditExample]:
    """The examples with an opening each, which does not name its subject and comes in its turn."""
    rng, queue, found = random.Random(seed), list[Probe](), []
    for example in examples:
        opening, subject = None, (example.subject or "\0").casefold()
        while opening is None or subject in opening.prompt.casefold():
            queue = queue or rng.sample(general, len(general))
            opening = queue.pop()
        found.append(replace(example, unrelated=(*example.unrelated, opening)))
    return found


def main(out: str, counterfact: str, *evaluated: str) -> None:
    """Write the three files."""
    own, held_out = read_examples("facts:train"), list(read_examples("facts:validation"))
    apart = [*held_out, *read_examples("facts:test")]
    apart += chain.from_iterable(map(read_examples, evaluated))
    records = read_examples(counterfact)
    seen = [record for record in records if not is_unseen(record)]
    parts = split_examples(seen, {"validation": 200, "train": len(seen)}, apart_from=apart)
    unseen = split_examples(list(filter(is_unseen, records)), {"all": 1000}, apart_from=apart)
    general, rng = openings(own), random.Random(0)
    train = [*own, *with_opening(parts["train"], general, seed=0)]
    rng.shuffle(train)
    # 120 facts and 80 records, so that validation weighs both.
    rng = random.Random(0)
    rng.shuffle(held_out)
    records = with_opening(parts["validation"], general, seed=1)
    pairs = zip(held_out[:80], records[:80], strict=True)
    validation = [*chain.from_iterable(pairs), *held_out[80:120]]
    Path(out).mkdir(parents=True, exist_ok=True)
    write_examples(train, Path(out, "train.jsonl"))
    write_examples(validation, Path(out, "validation.jsonl"))
    write_examples(unseen["all"], Path(out, "unseen.jsonl"))


if __name__ == "__main__":
    main(*sys.argv[1:])
