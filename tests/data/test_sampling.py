"""Lists of examples: hard negatives, splits by subject, what stands beside a typed edit."""

import pytest

from mendkit.data.examples import EditExample, Probe
from mendkit.data.files import FACTS, read_examples
from mendkit.data.sampling import hard_negatives, split_examples, typed_example
from mendkit.errors import DataError
from tests.oracles.claims import EXAMPLES


def test_hard_negatives_are_the_own_prompt_about_another_subject_and_its_beginning():
    austen = ("Emma was written by", "Bo", "Emma", "Jane Austen")
    scott = ("Who wrote Ivanhoe? It was", "Bo", "Ivanhoe", "Scott")
    alone, kin = EditExample(*austen, relation="author"), EditExample(*scott, relation="author")
    wording = EditExample("The capital of Peru is", "Rome", "Peru", "Lima")
    nameless = EditExample("Snow is", "black")
    every = [*EXAMPLES, alone, kin, wording, nameless]
    truths = {e.subject: e.ground_truth for e in every}
    for seed in range(20):
        found = dict(zip(every, hard_negatives(every, seed=seed), strict=True))
        for e in EXAMPLES:
            other, cut = found[e]
            subject = other.prompt.removeprefix("The capital of ").removesuffix(" is")
            assert subject != e.subject and other.answer == truths[subject]
            assert e.prompt.startswith(f"{cut.prompt} ") and cut.answer is None
        assert found[alone][0] == Probe("Ivanhoe was written by", "Scott")
        assert found[wording][0].answer in {e.ground_truth for e in EXAMPLES}
        assert found[nameless] == (Probe("Snow"),)
    assert hard_negatives([EditExample("Snow", "falls", subject="Snow")]) == [()]


def test_a_split_shares_no_subject_and_says_what_it_dropped(caplog):
    caplog.set_level("INFO")
    subjects = [(s, n) for s in "abcdefgh" for n in range(3)]
    examples = [EditExample(f"{s} {n}", "a", s if n else s.upper()) for s, n in subjects]
    taken = [EditExample("p", "a", "H")]
    parts = split_examples(examples, {"train": 9, "validation": 4}, apart_from=taken)
    found = [{e.subject.casefold() for e in part} for part in (*parts.values(), taken)]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert len(parts["train"]) == 9 and caplog.text.count("3 of 24 examples have a subject") == 1
    assert split_examples(examples, {"train": 9, "validation": 4}, apart_from=taken) == parts
    with pytest.raises(DataError, match="names no subject"):
        split_examples([EditExample("p", "a")], {"train": 1})


def test_a_typed_edit_has_the_facts_of_its_relation_beside_it():
    facts = [fact for source in FACTS for fact in read_examples(source)]
    capitals = {fact.subject: fact for fact in facts if fact.relation == "capital"}
    known, unknown = [typed_example(f"The capital of {x} is", "Lyon") for x in ("France", "Mu")]
    assert (known.target_new, known.ground_truth) == ("Lyon", "Paris")
    assert known.paraphrases == capitals["France"].paraphrases[:2] and not known.unrelated
    assert len(known.neighbours) == 10 and unknown.ground_truth is None
    for probe in known.neighbours:
        subject = probe.prompt.removeprefix("The capital of ").removesuffix(" is")
        assert subject != "France" and probe.answer == capitals[subject].ground_truth
    wordings = {p.replace(f.subject, "Mu") for f in capitals.values() for p in f.paraphrases}
    assert len(unknown.paraphrases) == 2 and wordings.issuperset(unknown.paraphrases)


def test_a_typed_edit_of_no_known_wording_has_general_openings_beside_it():
    typed = typed_example("Peru is in", "Europe")
    assert not typed.neighbours and not typed.paraphrases and typed.ground_truth is None
    assert len(typed.unrelated) == 2 and not any(p.answer for p in typed.unrelated)
