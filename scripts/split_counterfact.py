"""Training and validation files from CounterFact without any subject of its evaluation file.

    python scripts/split_counterfact.py counterfact-train.json counterfact-val.json runs/counterfact

writes runs/counterfact/{train,validation}.jsonl: the first 2,000 and the next 200 training records (in a seeded random
order) whose subject is not in the evaluation file, sharing no subject with one another either.
"""

import random
import sys
from pathlib import Path

from mendkit import read_examples, write_examples

SIZES = {"train": 2000, "validation": 200}


def main(train: str, evaluation: str, out: str) -> None:
    """Write the two files and say how many records were dropped."""
    taken = {example.subject.casefold() for example in read_examples(evaluation)}
    records = list(read_examples(train))
    free = [example for example in records if example.subject.casefold() not in taken]
    sys.stderr.write(f"{len(records) - len(free)} of {len(records)} records dropped: subject in {evaluation}\n")
    random.Random(0).shuffle(free)
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        chosen, free = free[:size], free[size:]
        write_examples(chosen, Path(out) / f"{name}.jsonl")
        used = {example.subject.casefold() for example in chosen}
        free = [example for example in free if example.subject.casefold() not in used]


if __name__ == "__main__":
    main(*sys.argv[1:])
