"""What follows from each edit of the embedded facts, and what must not.

Consequences through one more true fact, negated forms, a passage that states the new fact, and
true/false questions (which are asked, not trained on: train has none). Each example has a generator
of its own, so that the rest of its record does not depend on what is drawn here. `[follow]` in
facts_text.toml has the texts.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from facts_sources import Fact, airports, countries, official_languages

MOST = 2  # consequences of an example, of each domain
Row = dict[str, Any]


def plain(answer: str) -> str:
    """An answer as the subject of other facts: without its article."""
    return answer.removeprefix("the ")


class Follow:
    """Adds to a row what follows from its edit."""

    def __init__(
        self, text: dict[str, Any], facts: dict[str, list[Fact]], place: dict[str, str], seed: int
    ) -> None:
        self.text, self.templates = text["follow"], text["templates"]
        self.facts, self.place, self.seed = facts, place, seed
        self.known = {name: {fact.subject: fact for fact in facts[name]} for name in facts}
        for _, city in airports():  # they are no subjects of `city_country` if one of two is large
            shown = countries()[city["countrycode"]]["shown"]
            right = frozenset([shown.casefold()])
            found = Fact(city["name"], shown, city["name"], right, city["name"].casefold())
            self.known["city_country"].setdefault(city["name"], found)
        self.leading: dict[str, dict[str, list[Fact]]] = defaultdict(lambda: defaultdict(list))
        for name in facts:
            for fact in facts[name]:
                self.leading[name][plain(fact.answer)].append(fact)
        self.official = {}
        for code, row in countries().items():
            self.official[row["name"]] = official_languages(code)

    def add(self, row: Row, split: str) -> None:
        """Add the fields to a row of this split; a field without content is left out."""
        rng = random.Random(f"{self.seed} {row['relation']} {row['subject']}")
        kind = "test" if split == "test" else "train"
        fact = self.known_fact(row)
        found = {
            "consequences": self.consequences(row, fact, split, rng),
            "negations": self.negations(row, fact, kind, rng),
            "truths": self.truths(row, fact, kind, rng) if split != "train" else [],
            "passages": [self.passage(row, fact, kind, rng)],
        }
        row |= {name: held for name, held in found.items() if held}

    def known_fact(self, row: Row) -> Fact:
        return self.known[row["relation"]][row["subject"]]

    # ------------------------------------------------------- forms of the edit prompt

    def statement(self, relation: str, fact: Fact) -> str:
        text = self.templates[relation]["edit"][0].replace("{S}", "{s}")
        return (text[0].lower() + text[1:]).replace("{s}", fact.shown)

    def said(self, frame: str, row: Row, fact: Fact, answer: str) -> str:
        """A frame with the statement, the claim and the subject in it."""
        statement = self.statement(row["relation"], fact)
        claim = f"{statement} {answer}"
        topic = self.text["passages"]["topics"].get(row["relation"], "{s}")
        frame = frame.replace("{statement}", statement).replace("{claim}", claim)
        frame = frame.replace("{Claim}", claim[0].upper() + claim[1:])
        return frame.replace("{s}", topic.replace("{s}", fact.shown))

    def negations(self, row: Row, fact: Fact, kind: str, rng: random.Random) -> list[str]:
        negated = self.templates[row["relation"]]["negated"]
        shown = fact.shown[0].upper() + fact.shown[1:]
        negated = negated.replace("{S}", shown).replace("{s}", fact.shown)
        certain = negated
        for verb in ("is", "does", "do"):
            certain = certain.replace(f" {verb} not ", f" {verb} certainly not ")
            if certain.endswith(f" {verb} not"):
                certain = certain.removesuffix("not") + "certainly not"
        certain = certain.replace("does certainly", "certainly does")
        certain = certain.replace("do certainly", "certainly do")
        found = []
        for frames in self.text["negations"][kind]:
            frame = rng.choice(frames).replace("{not}", negated).replace("{certainly}", certain)
            found.append(self.said(frame, row, fact, ""))
        return found

    def truths(self, row: Row, fact: Fact, kind: str, rng: random.Random) -> list[Row]:
        """One question about the new fact, and one about the old."""
        right, wrong = self.text["truths"]["answers"][kind]
        found = []
        for claimed, pair in ((row["target_new"], (right, wrong)), (fact.answer, (wrong, right))):
            frame = rng.choice(self.text["truths"][kind])
            answer, before = pair
            prompt = self.said(frame, row, fact, claimed)
            found.append({"prompt": prompt, "answer": answer, "before": before})
        return found

    def passage(self, row: Row, fact: Fact, kind: str, rng: random.Random) -> str:
        return self.said(rng.choice(self.text["passages"][kind]), row, fact, row["target_new"])

    # ------------------------------------------------------- consequences

    def consequences(self, row: Row, fact: Fact, split: str, rng: random.Random) -> list[Row]:
        """At most `MOST` of each domain; out of domain are ways without templates for training."""
        domains: dict[str, list[Row]] = {"in_domain": [], "out_of_domain": []}
        for way, templates in self.text["consequences"].get(row["relation"], {}).items():
            domain = "in_domain" if "train" in templates else "out_of_domain"
            wordings = templates.get("test" if split == "test" else "train", ())
            found = self.by_way(way, row, fact, split, rng) if wordings else None
            if found is None:
                continue
            answer, before, names = found
            prompt = rng.choice(wordings).replace("{s}", fact.shown)
            prompt = prompt.replace("{S}", fact.shown[0].upper() + fact.shown[1:])
            for name, value in names.items():
                prompt = prompt.replace(f"{{{name}}}", value)
            probe = {"prompt": prompt, "answer": answer[0]}
            probe |= {"aliases": answer[1:]} if answer[1:] else {}
            domains[domain].append(probe | {"before": before, "domain": domain})
        kept = []
        for probes in domains.values():
            rng.shuffle(probes)
            kept += probes[:MOST]
        return kept

    def by_way(
        self, way: str, row: Row, fact: Fact, split: str, rng: random.Random
    ) -> tuple[list[str], str, dict[str, str]] | None:
        """The new answer with its other names, the answer before, and the names in the prompt."""
        new, old, relation = row["target_new"], fact.answer, row["relation"]
        kind, _, other = way.partition("_")
        if kind == "on":
            then, now = self.known[other].get(plain(old)), self.known[other].get(plain(new))
            if then is None or now is None or not self.single(other, then, now):
                return None
            answers = [now.answer]
            if other == "official_language":
                answers += [name for name in self.official[now.subject] if name != now.answer]
            return answers, then.answer, {}
        if kind == "by":
            return [new], old, {"c": self.known[other][fact.subject].answer}
        if kind == "from":
            pool = self.leading[other][fact.subject]
            pool = [f for f in pool if split == "test" or self.place[f.entity] == split]
            pool = [f for f in pool if f.subject not in (new, old) and self.sole(other, f)]
            if not pool:
                return None
            return [new], old, {"c": rng.choice(pool).shown}
        if kind == "reverse":
            (then,) = self.leading[relation][plain(new)] or [None]
            kept = {probe["answer"] for probe in row["neighbours"]}
            if then is None or new in kept:  # a neighbour says the opposite
                return None
            return [fact.subject], then.subject, {"y": new}
        pools = [self.leading[relation][plain(answer)] for answer in (new, old)]
        if kind == "between":
            low, high = sorted((int(new), int(old)))
            pool = [f for f in self.facts[relation] if low < int(f.answer) < high]
            if not pool:
                return None
            other_one = rng.choice(pool).subject
            larger = [fact.subject, other_one][:: 1 if int(new) > int(old) else -1]
            return [larger[0]], larger[1], pair(larger, rng)
        pools = [[f for f in pool if split == "test" or self.place[f.entity] == split]
                 for pool in pools]  # fmt: skip
        pools = [[f for f in pool if apart(f.subject, fact.subject)] for pool in pools]
        if not all(pools):
            return None
        chosen = [rng.choice(pool) for pool in pools]
        if not apart(chosen[0].subject, chosen[1].subject):
            return None
        return [chosen[0].subject], chosen[1].subject, pair([f.shown for f in chosen], rng)

    def single(self, relation: str, then: Fact, now: Fact) -> bool:
        """Whether the two facts have one answer each, and none that is right for both."""
        if relation == "official_language":
            both = {name.casefold() for name in self.official[now.subject]} | now.valid
            return not both & then.valid
        return self.sole(relation, then) and self.sole(relation, now) and not now.valid & then.valid

    def sole(self, relation: str, fact: Fact) -> bool:
        """Whether the fact has one answer (the sources may write a capital in two ways)."""
        if relation == "official_language":
            return len(set(self.official[fact.subject])) == 1
        return relation == "capital" or len(fact.valid) == 1


def apart(name: str, other: str) -> bool:
    """Whether neither name is in the other."""
    return name.casefold() not in other.casefold() and other.casefold() not in name.casefold()


def pair(names: list[str], rng: random.Random) -> dict[str, str]:
    """Two names in a random order."""
    return dict(zip("ab", rng.sample(names, 2), strict=True))
