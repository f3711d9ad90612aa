"""Finding answers in tokens (CORRECTNESS rows 17, 18)."""

import pytest

from mendkit.data.examples import join
from mendkit.errors import DataError
from mendkit.mend.batches import edit_tokens
from mendkit.models.tokens import collate, tokenize
from tests.oracles.claims import EXAMPLES, hparams


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
    assert [tuple(row.nonzero()[:, 0].tolist()) for row in batch.scored] == [
        t.scored for t in texts
    ]
    assert batch.rows.tolist() == [0] * len(texts[0].scored) + [1] * len(texts[1].scored)
