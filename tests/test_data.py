"""Reading examples and finding answers in tokens (CORRECTNESS rows 17, 18)."""

import json

import pytest

from mendkit.data import EditExample, Probe, join, read_examples, tokenize, write_examples
from mendkit.errors import DataError
from mendkit.texts import edit_tokens
from mendkit.trunk import collate
from tests.claims import EXAMPLES
from tests.test_mend import hparams

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
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("prompt", ["The capital of France is", "Q: Who? A:", "He said: '"])
@pytest.mark.parametrize("answer", ["Lima", "New York City", "N'Djamena", " Lima", "42", "東京"])
def test_scored_positions_predict_exactly_the_answers_characters(llama, prompt, answer):
    tokens = tokenize(llama.tokenizer, prompt, answer)
    text = join(prompt, answer)
    assert llama.tokenizer.decode(tokens.targets) == text[len(prompt) :]
    assert llama.tokenizer.decode(tokens.ids[: tokens.scored[0] + 1]) == prompt
    assert tokens.targets == tuple(tokens.ids[p + 1] for p in tokens.scored)


def test_the_answer_is_not_the_answer_tokenised_alone(llama):
    alone = llama.tokenizer("Paris")["input_ids"]
    assert list(tokenize(llama.tokenizer, "The capital of France is", "Paris").targets) != alone


def test_the_end_of_text_is_added_once_and_marked(llama):
    plain, ended = (tokenize(llama.tokenizer, "A is", "B", add_eos=flag) for flag in (False, True))
    assert not plain.ends and ended.ends
    assert ended.targets == (*plain.targets, llama.eos_id) and ended.ids[-1] == llama.eos_id


def test_a_text_without_answer_scores_its_last_position(llama):
    tokens = tokenize(llama.tokenizer, "A good way to start the day is")
    assert tokens.scored == (len(tokens.ids) - 1,) and tokens.targets == ()


def test_impossible_answers_are_refused(llama):
    with pytest.raises(DataError, match="no token"):
        tokenize(llama.tokenizer, "", "Paris")
    with pytest.raises(DataError, match="limit is 4"):
        tokenize(llama.tokenizer, "The capital of France is", "Paris", max_length=4)
    with pytest.raises(DataError, match="max_target_tokens"):
        edit_tokens(llama, hparams(max_target_tokens=2), EXAMPLES[2])


def test_collate_masks_padding_and_keeps_the_order(llama):
    texts = [tokenize(llama.tokenizer, p, "Lima") for p in ("X is", "The long capital of X is")]
    batch = collate(texts, llama.pad_id)
    assert batch.attention_mask.sum(1).tolist() == [len(t.ids) for t in texts]
    assert batch.targets.tolist() == [t for text in texts for t in text.targets]
    assert [tuple(row.nonzero()[:, 0].tolist()) for row in batch.scored] == [t.scored for t in texts]
    assert batch.rows.tolist() == [0] * len(texts[0].scored) + [1] * len(texts[1].scored)


# ------------------------------------------------------------------------------------------------- reading


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


def test_a_target_beyond_the_limit_is_named_when_the_tokenizer_is_known(tmp_path, llama):
    path = write(tmp_path / "d.json", [OWN, {**OWN, "target_new": "Rome " * 50}])
    with pytest.raises(DataError, match=r"record 1: field `target_new`.* tokens, the limit is 32"):
        read_examples(path, tokenizer=llama.tokenizer)
    assert len(read_examples(path, tokenizer=llama.tokenizer, skip_invalid=True).skipped) == 1


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
