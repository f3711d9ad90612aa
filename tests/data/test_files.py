"""Reading files of editing data: every layout, and errors that name file, record and field."""

import csv
import json

import pytest

from mendkit.data.examples import EditExample, Probe
from mendkit.data.files import (
    Examples,
    hard_negatives,
    read_examples,
    read_questions,
    read_text,
    split_examples,
    with_unrelated,
    write_examples,
)
from mendkit.errors import DataError
from tests.oracles.claims import EXAMPLES
from tests.oracles.records import (
    COUNTERFACT,
    HALLUEDIT,
    KNOWEDIT_ZSRE,
    LISTS,
    OWN,
    PORTABLE,
    RECENT,
    ROME,
    STRUCTURED,
    WIKIBIO,
    ZSRE,
)


def write(path, records, *, lines=False):
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


READ_AS = {
    "EasyEdit's CounterFact": (
        COUNTERFACT,
        EditExample(
            *("The mother tongue of X is", "Greek", "X", "French", ("X speaks",)),
            neighbours=(Probe("The mother tongue of Y is", "French"),),
            id="7",
        ),
    ),
    "MEND's zsRE": (
        ZSRE,
        EditExample(
            *("Who made X?", "Bo", "X", "Al", ("X was made by whom?",)),
            unrelated=(Probe("nq question: who", "me"),),
        ),
    ),
    "zsRE with portability": (
        PORTABLE,
        EditExample(
            *("Who made X?", "Bo", "X", "Al", ("X was made by whom?",)),
            unrelated=(Probe("nq question: who", "me"),),
            portability=(Probe("Where was X's maker?", "Rome"),),
        ),
    ),
    "the authors' own file": (
        STRUCTURED,
        EditExample("Who made X?", "Bo", None, "Al", ("By whom was X made?",), id="s1"),
    ),
    "own": (
        OWN,
        EditExample(
            *("The capital of X is", "Lima"),
            paraphrases=("X is run from",),
            neighbours=(Probe("The capital of Y is", "Rome"), Probe("The capital of Z is")),
            relation="capital",
        ),
    ),
    "ROME's CounterFact": (
        ROME,
        EditExample(
            *("X plays the", "harp", "X", "viola", tuple(ROME["paraphrase_prompts"])),
            neighbours=(Probe("Y plays the", "viola"), Probe("Z plays the", "flute")),
            relation="P1303",
            id="3",
            generation_prompts=("X is known for",),
        ),
    ),
    "KnowEdit recent": (
        RECENT,
        EditExample(
            *("The birthplace of X is", "Bonn", "X"),
            unrelated=(Probe("The father of X is", "Y", ("Sir Y",)),),
            portability=(
                Probe("Is X German?", "yes", ("true",)),
                Probe("Its river is", "Rhine", ("Rhein",)),
            ),
        ),
    ),
    "KnowEdit WikiBio": (
        WIKIBIO,
        EditExample(
            *(WIKIBIO["text"], "He studied in London.", "X"),
            unrelated=(Probe("X worked in", "medicine"),),
        ),
    ),
    "KnowEdit zsRE": (
        KNOWEDIT_ZSRE,
        EditExample(
            *("Which family has X?", "Noctua", "X", "Aspido", ("What family is X of?",)),
            unrelated=(Probe("X rank", "genus"),),
            portability=(Probe("What are they called?", "Owls"),),
        ),
    ),
    "lists": (
        LISTS,
        EditExample(
            *("Where is X?", "Peru", "X", "Chad", ("In which state is X?", "X is where?")),
            unrelated=(Probe("Who is Y?", "Z"),),
            id="z0",
        ),
    ),
}


@pytest.mark.parametrize("name", READ_AS)
def test_every_layout_is_read_from_lines_arrays_and_objects_with_records(tmp_path, name):
    record, expected = READ_AS[name]
    for content in ([record], {"dataset": name, "records": [record]}):
        assert tuple(read_examples(write(tmp_path / "x.json", content))) == (expected,)
    lines = write(tmp_path / "x.jsonl", [record, record], lines=True)
    assert tuple(read_examples(lines)) == (expected, expected)


def test_columns_of_questions(tmp_path):
    columns = {"near": {"prompt": ["Who is Y?", "Who is W?"], "ground_truth": ["Z", "V"]}}
    (example,) = read_examples(write(tmp_path / "z.json", [{**LISTS, "locality": columns}]))
    assert example.unrelated == (Probe("Who is Y?", "Z"), Probe("Who is W?", "V"))


def test_halluedit_tables(tmp_path):
    path = tmp_path / "h.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, HALLUEDIT)
        table.writeheader()
        table.writerows([HALLUEDIT, {**HALLUEDIT, "object": "Granite"}])
    with pytest.raises(DataError, match=r"h\.csv:3: field `object` 'Granite' is among `output_…`"):
        read_examples(path)
    (example,) = read_examples(path, skip_invalid=True)
    assert example == EditExample(
        *("What is X made of?", "basalt", "X", "Granite", ("From what is X made?",)),
        unrelated=(Probe("Where is X?"),),
        relation="made of",
        portability=(Probe("What mineral?", "Olivine, mostly"),),
    )


def test_own_form_round_trips_and_its_lines_end_at_newlines_only(tmp_path):
    probe = Probe("p", "a", ("b",))
    odd = EditExample("A\u2028X is", "Rome", portability=(probe,), generation_prompts=("g",))
    write_examples([*EXAMPLES, odd], tmp_path / "x.jsonl")
    assert tuple(read_examples(tmp_path / "x.jsonl")) == (*EXAMPLES, odd)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_kits_own_facts_are_read_by_name(split):
    examples = read_examples(f"facts:{split}")
    assert len(examples) > 100
    assert all(e.ground_truth and e.paraphrases and e.neighbours and e.unrelated for e in examples)


NO_ANSWERS = {"locality": {"Forgetfulness": [{"ground_truth": "a"}]}}
WRONG = [
    ({**OWN, "prompt": ""}, "`prompt` is empty"),
    ({**OWN, "target_new": None}, "`target_new` must be text, is null"),
    ({**OWN, "prompt": 3}, "`prompt` must be text, is 3"),
    ({**OWN, "paraphrases": 3}, "`paraphrases` must be a list"),
    ({**OWN, "paraphrases": ["x", 1]}, r"`paraphrases\[1\]`"),
    ({**OWN, "neighbours": [{"prompt": ""}]}, r"`neighbours\[0\]`.*empty"),
    ({**OWN, "promt": "x"}, "unknown field `promt`"),
    ({k: v for k, v in ZSRE.items() if k != "rephrase"} | {"alt": 1}, "`alt` must be text"),
    ({**ZSRE, "alt": "Al"}, "nothing to edit"),
    ({**ZSRE, "answers": []}, "`answers`"),
    ({"a": 1}, "unknown record form"),
    ([1], "expected an object"),
    ({**ROME, "requested_rewrite": {"prompt": "{} is"}}, "`subject` must be text, is missing"),
    ({**ROME, "neighborhood_prompts": ["a", 3]}, r"`neighborhood_prompts\[1\]`"),
    ({**RECENT, **NO_ANSWERS}, r"`locality\.Forgetfulness\[0\]`.*`prompt`"),
    ({**LISTS, "locality": [{"prompt": "p", "ground_truth": 3}]}, r"\[0\]`.*ground_truth"),
    ({**LISTS, "locality": [{"prompt": ["a", "b"], "ground_truth": ["c"]}]}, "for each of 2"),
    ({**KNOWEDIT_ZSRE, "target_new": "Aspido"}, "nothing to edit"),
    ({**STRUCTURED, "alternatives": ["Al"]}, "nothing to edit"),
]


@pytest.mark.parametrize(("record", "words"), WRONG)
def test_a_bad_record_is_named_by_file_record_and_field(tmp_path, record, words):
    path = write(tmp_path / "d.json", [OWN, record])
    with pytest.raises(DataError, match=rf"d\.json: record 1: .*{words}"):
        read_examples(path)
    kept = read_examples(path, skip_invalid=True)
    assert len(kept) == 1 and len(kept.skipped) == 1 and "record 1" in kept.skipped[0].where


def test_invalid_json_names_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(OWN) + "\n{oops\n" + json.dumps(OWN), encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl:2: invalid JSON"):
        read_examples(path)
    assert len(read_examples(path, skip_invalid=True)) == 2
    path.write_text("[\n{]", encoding="utf-8")
    with pytest.raises(DataError, match=r"invalid JSON: .*line 2"):
        read_examples(path)


def test_files_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "none.json")
    with pytest.raises(DataError, match="facts:train"):
        read_examples("facts:tset")
    with pytest.raises(DataError, match="no valid example"):
        read_examples(write(tmp_path / "e.json", []))
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_examples(tmp_path / "b.json")


def test_limit_keeps_the_first(tmp_path):
    path = write(tmp_path / "d.json", [{**OWN, "id": str(i)} for i in range(5)])
    assert [e.id for e in read_examples(path, limit=2)] == ["0", "1"]


QUESTIONS = [
    {"question": "who is y", "answer": ["Z", "Z Z"]},
    {"question": "Who is X?", "answer": ["W"]},
    *({"question": f"what is {n}", "answer": []} for n in range(4)),
]


def test_unrelated_questions_do_not_name_the_subject(tmp_path):
    questions = read_questions(write(tmp_path / "nq.jsonl", QUESTIONS, lines=True))
    first = (Probe("who is y?", "Z", ("Z Z",)), Probe("Who is X?", "W"), Probe("what is 0?"))
    assert questions[:3] == first
    examples = Examples.of([EditExample("X is", "a", "x", unrelated=(Probe("own"),))] * 5)
    drawn = with_unrelated(examples, questions, each=2)
    for example in drawn:
        assert example.unrelated[0] == Probe("own") and len(set(example.unrelated)) == 3
        assert Probe("Who is X?", "W") not in example.unrelated
    used = [probe for example in drawn[:2] for probe in example.unrelated[1:]]
    assert len(set(used)) == 4  # nothing twice while there are others
    assert with_unrelated(examples, questions) == drawn
    assert with_unrelated(examples, questions, seed=1) != drawn
    with pytest.raises(DataError, match="fewer than 6 questions"):
        with_unrelated(examples, questions, each=6)
    with pytest.raises(DataError, match=r"nq\.jsonl:1: field `question`"):
        read_questions(write(tmp_path / "nq.jsonl", [{"answer": "a"}], lines=True))


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


def test_held_out_text_is_read_or_refused(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(" = A = \n some text\n", encoding="utf-8")
    assert read_text(path) == " = A = \n some text\n"
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no text"):
        read_text(path)


def test_a_split_shares_no_subject_and_says_what_it_dropped():
    subjects = [(s, n) for s in "abcdefgh" for n in range(3)]
    examples = [EditExample(f"{s} {n}", "a", s if n else s.upper()) for s, n in subjects]
    taken = [EditExample("p", "a", "H")]
    split = split_examples(examples, {"train": 9, "validation": 4}, apart_from=taken)
    found = [{e.subject.casefold() for e in part} for part in (*split.parts.values(), taken)]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert split.dropped == 3 and len(split.parts["train"]) == 9
    assert split.dropped + split.left_out + sum(map(len, split.parts.values())) == len(examples)
    assert split_examples(examples, {"train": 9, "validation": 4}, apart_from=taken) == split
    with pytest.raises(DataError, match="names no subject"):
        split_examples([EditExample("p", "a")], {"train": 1})
