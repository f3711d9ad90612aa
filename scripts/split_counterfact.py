"""Training and validation files from CounterFact without any subject of its evaluation file.

    python scripts/split_counterfact.py counterfact-train.json counterfact-val.json OUT [2000]

writes OUT/{train,validation}.jsonl: the first 2,000 (or so many) and the next 200 training records,
in a seeded random order. Their subjects are not in the evaluation file, and the two share none.
"""

import logging
import sys
from pathlib import Path

from mendkit import read_examples, split_examples, write_examples


def main(train: str, evaluation: str, out: str, size: str = "2000") -> None:
    """Write the two files and say how many records were dropped."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sizes = {"train": int(size), "validation": 200}
    parts = split_examples(read_examples(train), sizes, apart_from=read_examples(evaluation))
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, examples in parts.items():
        write_examples(examples, Path(out) / f"{name}.jsonl")


if __name__ == "__main__":
    main(*sys.argv[1:])
