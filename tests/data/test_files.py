"""Reading files of editing data: every published layout, and errors that name file, record and field."""

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

COUNTERFACT = {
    "case_id": 7, "prompt": "The mother tongue of X is", "target_new": "Greek", "subject": "X",
    "ground_truth": "French",
    "rephrase_prompt": "X speaks", "locality_prompt": "The mother tongue of Y is", "locality_ground_truth": "French",
}  # fmt: skip
ZSRE = {
    "subject": "X", "src": "Who made X?", "pred": "a", "rephrase": "X was made by whom?", "alt": "Bo",
    "answers": ["Al"],
    "loc": "nq question: who", "loc_ans": "me", "cond": "",
}  # fmt: skip
OWN = {
    "prompt": "The capital of X is", "target_new": "Lima", "paraphrases": ["X is run from"],
    "neighbours": [{"prompt": "The capital of Y is", "answer": "Rome"}, "The capital of Z is"], "relation": "capital",
}  # fmt: skip


def write(path, records, *, lines=False):
    path.write_text(
        "\n".join(map(json.dumps, records)) if lines else json.dumps(records), encoding="utf-8"
    )
    return path


def test_the_three_forms(tmp_path):
    (a,) = read_examples(write(tmp_path / "c.json", [COUNTERFACT]))
    assert a == EditExample(
        "The mother tongue of X is", "Greek", "X", "French", ("X speaks",),
        (Probe("The mother tongue of Y is", "French"),), (), None, "7",
    )  # fmt: skip
    (b,) = read_examples(write(tmp_path / "z.json", [ZSRE]))
    assert (b.prompt, b.target_new, b.ground_truth, b.paraphrases) == (
        "Who made X?",
        "Bo",
        "Al",
        ("X was made by whom?",),
    )
    assert b.unrelated == (Probe("nq question: who", "me"),) and b.neighbours == ()
    (c,) = read_examples(write(tmp_path / "o.jsonl", [OWN], lines=True))
    assert c.neighbours == (Probe("The capital of Y is", "Rome"), Probe("The capital of Z is"))


def test_own_form_round_trips(tmp_path):
    write_examples(EXAMPLES, tmp_path / "x.jsonl")
    assert tuple(read_examples(tmp_path / "x.jsonl")) == EXAMPLES


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_kits_own_facts_are_read_by_name(split):
    examples = read_examples(f"facts:{split}")
    assert len(examples) > 100 and all(
        e.ground_truth and e.paraphrases and e.neighbours and e.unrelated for e in examples
    )


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({**OWN, "prompt": ""}, "`prompt` is empty"),
        ({**OWN, "target_new": "   "}, "`target_new` is empty"),
        ({**OWN, "target_new": None}, "`target_new` must be text"),
        ({**OWN, "prompt": 3}, r"`prompt` must be text, is 3 \(int\)"),
        ({**OWN, "paraphrases": "x"}, "`paraphrases` must be a list"),
        ({**OWN, "paraphrases": ["x", 1]}, r"`paraphrases\[1\]`"),
        ({**OWN, "neighbours": [{"prompt": ""}]}, r"`neighbours\[0\]`.*empty"),
        ({**OWN, "promt": "x"}, "unknown field `promt`"),
        (
            {k: v for k, v in COUNTERFACT.items() if k != "ground_truth"},
            "`ground_truth` must be text, is missing",
        ),
        ({**ZSRE, "alt": "Al"}, "nothing to edit"),
        ({**ZSRE, "answers": []}, "`answers`"),
        ({"a": 1}, "unknown record form"),
        ([1], "expected an object"),
    ],
)
def test_a_bad_record_is_named_by_file_record_and_field(tmp_path, record, words):
    good = {**OWN} if not isinstance(record, dict) or "src" not in record else ZSRE
    path = write(tmp_path / "d.json", [good, record])
    with pytest.raises(DataError, match=words) as error:
        read_examples(path)
    assert "d.json: record 1" in str(error.value)
    kept = read_examples(path, skip_invalid=True)
    assert len(kept) == 1 and len(kept.skipped) == 1 and "record 1" in kept.skipped[0].where


def test_invalid_json_names_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(OWN) + "\n{oops\n" + json.dumps(OWN), encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl:2: invalid JSON"):
        read_examples(path)
    assert len(read_examples(path, skip_invalid=True)) == 2
    path.write_text("[{]", encoding="utf-8")
    with pytest.raises(DataError, match="invalid JSON"):
        read_examples(path)


def test_files_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "none.json")
    with pytest.raises(DataError, match="facts:train"):
        read_examples("facts:tset")
    (tmp_path / "e.json").write_text("[]")
    with pytest.raises(DataError, match="no valid example"):
        read_examples(tmp_path / "e.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_examples(tmp_path / "b.json")


def test_limit_keeps_the_first(tmp_path):
    path = write(tmp_path / "d.json", [{**OWN, "id": str(i)} for i in range(5)])
    assert [e.id for e in read_examples(path, limit=2)] == ["0", "1"]


# ------------------------------------------------------------------------------------------------- layouts

ROME = {
    "case_id": 3, "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "{} plays the", "relation_id": "P1303", "subject": "X",
        "target_new": {"str": "harp", "id": "Q1"}, "target_true": {"str": "viola", "id": "Q2"},
    },
    "paraphrase_prompts": ["Early life. X performs on the", "X, a master of the"],
    "neighborhood_prompts": ["Y plays the", "Z plays the"], "attribute_prompts": ["W plays the"],
    "generation_prompts": ["X is known for"],
}  # fmt: skip
RECENT = {
    "subject": "X", "prompt": "The birthplace of X is", "target_new": "Bonn",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is X German?", "ground_truth": [["yes"], ["true"]]}],
        "Reasoning": [{"prompt": "The river at the birthplace of X is", "ground_truth": [["Rhine", "Rhein"]]}],
        "Subject_Aliasing": [{"prompt": "The birthplace of Mr X is", "ground_truth": []}],
    },
    "locality": {"Relation_Specificity": [{"prompt": ["The father of X is"], "ground_truth": [["Y", "Sir Y"]]}]},
}  # fmt: skip
WIKIBIO = {
    "text": "This is a passage about X. X was a doctor.", "labels": "He studied in London.", "concept": "X",
    "locality": {"Relation_Specificity": [{"prompt": "X worked in", "ground_truth": ["medicine"]}]},
}  # fmt: skip
KNOWEDIT_ZSRE = {
    "subject": "X", "target_new": "Noctua", "prompt": "Which family has X?", "ground_truth": ["Aspido"],
    "rephrase_prompt": "What family is X of?", "cond": "",
    "locality": {"Relation_Specificity": [{"prompt": "X rank", "ground_truth": ["genus"]}], "Forgetfulness": None},
    "portability": {"Reasoning": [{"prompt": "What is the common name for X's family?", "ground_truth": "Owls"}]},
}  # fmt: skip
LISTS = {
    "case_id": "z0", "prompt": "Where is X?", "subject": "X", "target_new": "Peru", "ground_truth": "Chad",
    "rephrase_prompt": ["In which state is X?", "X is where?"], "portability": [],
    "locality": [{"prompt": "Who is Y?", "ground_truth": "Z", "metric": "m"}],
}  # fmt: skip
STRUCTURED = {
    "id": "s1", "input": "Who made X?", "prediction": "Al", "alternatives": ["Al", "Bo"], "output": [{"answer": "Al"}],
    "filtered_rephrases": ["Who made X?", "By whom was X made?"],
}  # fmt: skip
PORTABLE = {
    **ZSRE,
    "portability": {
        "Recalled Relation": "(Bo, x, y)",
        "New Question": "Where was X's maker?",
        "New Answer": "Rome",
    },
}
TABLE = (
    "topic,subject,relation,object,question,output_m,eval_m,multiple_choices,paraphrased_question,locality_question,"
    "question_2hop,answer_2hop,question_3hop,answer_3hop\n"
    "rock,X,made of,basalt,What is X made of?,Granite,0.0,\"['a', 'b']\",From what is X made?,Where is X?,"
    'What mineral?,"Olivine, mostly",,\n'
    "rock,Y,made of,Lava,What is Y made of?,Lava,0.0,[],From what is Y made?,Where is Y?,,,,\n"
)


def one(tmp_path, record) -> EditExample:
    (example,) = read_examples(write(tmp_path / "r.jsonl", [record], lines=True))
    return example


def test_romes_counterfact(tmp_path):
    assert one(tmp_path, ROME) == EditExample(
        "X plays the", "harp", "X", "viola", ("Early life. X performs on the", "X, a master of the"),
        (Probe("Y plays the", "viola"), Probe("Z plays the", "viola")), (), "P1303", "3", (), ("X is known for",),
    )  # fmt: skip


def test_knowedits_four_files(tmp_path):
    assert one(tmp_path, RECENT) == EditExample(
        "The birthplace of X is", "Bonn", "X", unrelated=(Probe("The father of X is", "Y", ("Sir Y",)),),
        portability=(
            Probe("Is X German?", "yes", ("true",)), Probe("The river at the birthplace of X is", "Rhine", ("Rhein",)),
        ),
    )  # fmt: skip
    assert one(tmp_path, WIKIBIO) == EditExample(
        WIKIBIO["text"], "He studied in London.", "X", unrelated=(Probe("X worked in", "medicine"),)
    )
    assert one(tmp_path, KNOWEDIT_ZSRE) == EditExample(
        "Which family has X?", "Noctua", "X", "Aspido", ("What family is X of?",),
        unrelated=(Probe("X rank", "genus"),), portability=(Probe("What is the common name for X's family?", "Owls"),),
    )  # fmt: skip


def test_lists_of_locality_prompts_in_a_file_with_records(tmp_path):
    (example,) = read_examples(write(tmp_path / "z.json", {"dataset": "zsre", "records": [LISTS]}))
    assert example == EditExample(
        "Where is X?", "Peru", "X", "Chad", ("In which state is X?", "X is where?"),
        unrelated=(Probe("Who is Y?", "Z"),), id="z0",
    )  # fmt: skip
    columns = {
        **LISTS,
        "locality": {"near": {"prompt": ["Who is Y?", "Who is W?"], "ground_truth": ["Z", "V"]}},
    }
    assert one(tmp_path, columns).unrelated == (Probe("Who is Y?", "Z"), Probe("Who is W?", "V"))


def test_zsre_with_portability_and_the_authors_own_file(tmp_path):
    assert one(tmp_path, PORTABLE).portability == (Probe("Where was X's maker?", "Rome"),)
    assert one(tmp_path, STRUCTURED) == EditExample(
        "Who made X?", "Bo", None, "Al", ("By whom was X made?",), id="s1"
    )


def test_halluedit_tables(tmp_path):
    path = tmp_path / "h.csv"
    path.write_text(TABLE, encoding="utf-8")
    with pytest.raises(DataError, match=r"h\.csv:3: field `object` 'Lava' is among `output_…`"):
        read_examples(path)
    (example,) = read_examples(path, skip_invalid=True)
    assert example == EditExample(
        "What is X made of?", "basalt", "X", "Granite", ("From what is X made?",), (), (Probe("Where is X?"),),
        "made of", None, (Probe("What mineral?", "Olivine, mostly"),),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({**ROME, "requested_rewrite": {"prompt": "{} is"}}, "`subject` must be text, is missing"),
        ({**ROME, "neighborhood_prompts": ["a", 3]}, r"`neighborhood_prompts\[1\]`"),
        (
            {**RECENT, "locality": {"Forgetfulness": [{"ground_truth": "a"}]}},
            r"`locality\.Forgetfulness\[0\]`.*`prompt`",
        ),
        (
            {**RECENT, "portability": {"Reasoning": [{"prompt": "p", "ground_truth": 3}]}},
            r"Reasoning\[0\]`.*ground_truth",
        ),
        (
            {**LISTS, "locality": [{"prompt": ["a", "b"], "ground_truth": ["c"]}]},
            "an answer for each of 2 prompts",
        ),
        ({**KNOWEDIT_ZSRE, "target_new": "Aspido"}, "nothing to edit"),
        ({**STRUCTURED, "alternatives": ["Al"]}, "nothing to edit"),
    ],
)
def test_a_bad_field_of_a_published_layout_is_named(tmp_path, record, words):
    with pytest.raises(DataError, match=words) as error:
        read_examples(write(tmp_path / "d.json", [record]))
    assert "d.json: record 0" in str(error.value)


def test_lines_end_at_newlines_only(tmp_path):
    odd = EditExample(
        "The capital\u2028of X is",
        "Rome",
        portability=(Probe("p", "a", ("b",)),),
        generation_prompts=("g",),
    )
    write_examples([odd, odd], tmp_path / "x.jsonl")
    assert tuple(read_examples(tmp_path / "x.jsonl")) == (odd, odd)


# ------------------------------------------------------------------------------------------------- beside the edits

QUESTIONS = [
    {"question": "who is y", "answer": ["Z", "Z Z"]},
    {"question": "Who is X?", "answer": ["W"]},
]
QUESTIONS += [{"question": f"what is {n}", "answer": []} for n in range(4)]


def test_unrelated_questions_do_not_name_the_subject(tmp_path):
    questions = read_questions(write(tmp_path / "nq.jsonl", QUESTIONS, lines=True))
    assert questions[:3] == (
        Probe("who is y?", "Z", ("Z Z",)),
        Probe("Who is X?", "W"),
        Probe("what is 0?"),
    )
    examples = Examples.of([EditExample("X is", "a", "x", unrelated=(Probe("own"),))] * 5)
    drawn = with_unrelated(examples, questions, each=2)
    for example in drawn:
        assert example.unrelated[0] == Probe("own") and len(set(example.unrelated)) == 3
        assert Probe("Who is X?", "W") not in example.unrelated
    used = [probe for example in drawn[:2] for probe in example.unrelated[1:]]
    assert len(set(used)) == 4  # nothing twice while there are others
    assert (
        with_unrelated(examples, questions) == drawn != with_unrelated(examples, questions, seed=1)
    )
    with pytest.raises(DataError, match="fewer than 6 questions"):
        with_unrelated(examples, questions, each=6)
    with pytest.raises(DataError, match=r"nq\.jsonl:1: field `question`"):
        read_questions(write(tmp_path / "nq.jsonl", [{"answer": "a"}], lines=True))


def test_hard_negatives_are_the_own_prompt_about_another_subject_and_its_beginning():
    alone = EditExample(
        "Emma was written by", "Bo", subject="Emma", ground_truth="Jane Austen", relation="author"
    )
    kin = EditExample(
        "Who wrote Ivanhoe? It was",
        "Bo",
        subject="Ivanhoe",
        ground_truth="Scott",
        relation="author",
    )
    wording = EditExample("The capital of Peru is", "Rome", subject="Peru", ground_truth="Lima")
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
    (tmp_path / "t.txt").write_text(" = A = \n some text\n", encoding="utf-8")
    assert read_text(tmp_path / "t.txt") == " = A = \n some text\n"
    (tmp_path / "t.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no text"):
        read_text(tmp_path / "t.txt")


def test_a_split_shares_no_subject_and_says_what_it_dropped():
    examples = [
        EditExample(f"{s} {n}", "a", s if n else s.upper()) for s in "abcdefgh" for n in range(3)
    ]
    taken = [EditExample("p", "a", "H")]
    split = split_examples(examples, {"train": 9, "validation": 4}, apart_from=taken)
    subjects = [{e.subject.casefold() for e in part} for part in (*split.parts.values(), taken)]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])
    assert split.dropped == 3 and len(split.parts["train"]) == 9
    assert split.dropped + split.left_out + sum(map(len, split.parts.values())) == len(examples)
    assert split_examples(examples, {"train": 9, "validation": 4}, apart_from=taken) == split
    with pytest.raises(DataError, match="names no subject"):
        split_examples([EditExample("p", "a")], {"train": 1})
