"""Decoding is greedy, each row by itself, whatever the checkpoint's settings say."""

from dataclasses import replace

import pytest
import torch

from mendkit.errors import DataError, HyperParamError
from mendkit.models.base import BaseModel
from mendkit.models.text import cut
from mendkit.models.tokens import Tokens
from tests.oracles.claims import plain_logits
from tests.oracles.families import other_base
from tests.oracles.tiny import POSITIONS, sentences, tiny_llama

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
PROMPTS = tuple(s[: 8 + 3 * i] for i, s in enumerate(sentences()[::37]))


@torch.no_grad()
def naive_greedy(base: BaseModel, text: Tokens, steps: int) -> list[int]:
    """One token after another by a full forward without cache."""
    new: list[int] = []
    part = "decoder" if text.decoder else "ids"
    for _ in range(steps):
        ids = (*getattr(text, part), *new)
        longer = replace(text, **{part: ids}, scored=(len(ids) - 1,))
        new.append(int(plain_logits(base, longer).argmax()))
        if new[-1] == base.eos_id:
            return new[:-1]
    return new


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_decoding_is_greedy_whatever_the_checkpoint_says(family):
    base = other_base(family)
    settings = base.model.generation_config
    settings.update(repetition_penalty=5.0, num_beams=3, do_sample=True, max_length=3)
    settings.update(forced_bos_token_id=5, forced_eos_token_id=6, no_repeat_ngram_size=1)
    texts = [base.tokenize(prompt) for prompt in PROMPTS[:4]]
    expected = [naive_greedy(base, text, 9) for text in texts]
    assert [base.write([text], max_new_tokens=9)[0] for text in texts] == expected
    assert base.write(texts, max_new_tokens=9) == expected and len(set(map(tuple, expected))) > 2
    assert base.model.generation_config is settings


@FAMILIES
@pytest.mark.parametrize("stop", [True, False])
def test_batched_and_single_generation_agree(family, stop, request, monkeypatch):
    base = request.getfixturevalue(family)
    singles = [base.generate(prompt, max_new_tokens=16, stop=stop) for prompt in PROMPTS]
    assert base.generate_batch(PROMPTS, max_new_tokens=16, stop=stop) == singles
    monkeypatch.setattr("mendkit.models.text.ROWS_PER_BATCH", 3)
    assert base.generate_batch(PROMPTS, max_new_tokens=16, stop=stop) == singles
    assert len(set(singles)) > 3 and base.generate_batch([]) == []


@FAMILIES
def test_rows_keep_their_order_and_stop_by_themselves(family, request):
    """Oracle: rows that nothing stopped, cut by hand. Full stops and newlines are made likely."""
    base = request.getfixturevalue(family)
    rows = [base.tokenize(prompt) for prompt in PROMPTS]
    stops = [token for end in ".\n" for token in base.tokenizer(end)["input_ids"]]
    bonus = torch.zeros(len(base.tokenizer))
    bonus[stops] = 1.0
    head = base.model.get_output_embeddings()
    with head.register_forward_hook(lambda _, args, logits: logits + bonus):
        free = base.write(rows, max_new_tokens=24)
        stopped = base.write_all(rows, max_new_tokens=24)
        together = base.generate_batch(PROMPTS, max_new_tokens=24)
    by_hand = []
    for row in free:
        spelt = [base.tokenizer.decode([token]) for token in row]
        ends = [i for i, text in enumerate(spelt) if set(text) & set(".\n")]
        by_hand.append(row[: ends[0] + 1] if ends else row)
    stopped = [[token for token in row if token != base.eos_id] for row in stopped]
    assert stopped == by_hand and len({len(row) for row in stopped}) > 2
    written = [base.tokenizer.decode(row, skip_special_tokens=True) for row in by_hand]
    cut = [text.split("\n")[0].split(".")[0] for text in written]
    assert cut == [base.new_text(a, b) for a, b in zip(rows, stopped, strict=True)]
    for text, prompt, expected in zip(together, PROMPTS, cut, strict=True):
        # A prompt that ends in a space brings the answer's.
        assert text == (expected.lstrip(" ") if prompt.endswith(" ") else expected)


def test_every_declared_end_of_text_ends_a_row():
    base = tiny_llama()
    prompt = [base.tokenize(PROMPTS[0])]
    (row,) = base.write(prompt, max_new_tokens=8)
    base.model.generation_config.eos_token_id = [base.eos_id, row[2], 10**6]
    (cut,) = base.write(prompt, max_new_tokens=8)
    assert cut == row[: row.index(row[2])]


def test_new_text_keeps_the_leading_space_and_drops_special_tokens(llama):
    prompt = llama.tokenizer("The capital of France is")["input_ids"]
    new = [*llama.tokenizer(" Paris")["input_ids"], llama.eos_id]
    assert llama.new_text(prompt, new) == llama.new_text([], new) == " Paris"
    longer = llama.tokenizer(" a.b\nc")["input_ids"]
    assert llama.new_text(prompt, longer) == " a"
    assert llama.new_text(prompt, longer, stop=False) == " a.b\nc"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda b: b.generate(""), DataError, "without tokens"),
        (lambda b: b.generate("a", max_new_tokens=0), HyperParamError, "at least 1, got 0"),
        (lambda b: b.generate("Paris" * 200), DataError, f"{POSITIONS} positions"),
        (lambda b: b.generate_batch("Paris"), HyperParamError, "list of prompts"),
    ],
)
def test_misuse_of_generation_is_explained(llama, call, error, words):
    with pytest.raises(error, match=words):
        call(llama)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (" Lyon. It is", ["St. Malo"], " Lyon"),
        (" St. Malo. It is", ["St. Malo"], " St. Malo"),
        (" st. malo", ["St. Malo."], " st. malo"),
        (" St. Malo. It is", [], " St"),
        (" Washington D.C. is", ["Washington D.C."], " Washington D.C"),
        (" J. R. Alder\nwrote", ["Ann Bell", "J. R. Alder"], " J. R. Alder"),
        ("np.bool_", ["np.bool_"], "np.bool_"),
        (" 3.14。然后", ["3.14"], " 3.14"),
        ("\nSt. Malo", ["St. Malo"], ""),
        (" No. 1. Then", ["No. 10"], " No. 1"),
        (" 3.5 million", ["3"], " 3.5 million"),
        (" in 1998. Then", [], " in 1998"),
    ],
)
def test_a_stop_mark_that_the_answer_holds_there_does_not_end_it(text, answers, expected):
    assert cut(text, answers) == expected


@pytest.mark.parametrize(
    ("written", "kept", "text"), [(" 3.5.", " 3.5.", " 3.5"), (" 3. Go on", " 3.", " 3")]
)
def test_a_point_between_digits_does_not_end_a_number(llama, written, kept, text):
    ids, prompt = llama.encode(written), llama.prompt_of(llama.tokenize(PROMPTS[0]))
    coming = iter(ids)

    def forced(_, __, logits):
        logits[:, -1] = torch.eye(llama.vocabulary)[next(coming)]
        return logits

    with llama.model.get_output_embeddings().register_forward_hook(forced):
        (new,) = llama.write_all([prompt], max_new_tokens=len(ids))
    assert new == llama.encode(kept) and llama.new_text(prompt, new) == text


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_rows_written_together_are_those_written_alone(family, request, monkeypatch):
    """Prompts of different lengths and ends; most go on after two tokens."""
    base = other_base("t5") if family == "t5" else request.getfixturevalue(family)
    prompts = [base.prompt_of(base.tokenize(prompt)) for prompt in PROMPTS]
    monkeypatch.setattr("mendkit.models.text.ROWS_PER_BATCH", 3)
    written = base.write_all(prompts, max_new_tokens=9)
    for prompt, together in zip(prompts, written, strict=True):
        (free,) = base.write([prompt], max_new_tokens=9)
        assert base.new_text(prompt, together) == cut(base.new_text(prompt, free, stop=False))
    begun = [ids[: index % 4] for index, ids in enumerate(written)]
    assert base.write_all(prompts, max_new_tokens=9, begun=begun) == written
    answers = [[f"{base.generate(p, max_new_tokens=30, stop=False)} end"] for p in PROMPTS]
    whole = base.generate_batch(PROMPTS, max_new_tokens=9, stop=False)
    # A stop mark ends no text that goes on as the answer; a newline before it does.
    expected = [cut(text, told) for text, told in zip(whole, answers, strict=True)]
    assert base.generate_batch(PROMPTS, max_new_tokens=9, answers=answers) == expected
    monkeypatch.setattr(base.model, "forward", None)  # nothing is left to be written
    assert base.write_all(prompts, max_new_tokens=9, begun=written) == written


def test_an_answer_of_more_tokens_than_the_default_is_written_to_its_end(llama):
    answer = llama.generate(PROMPTS[0], max_new_tokens=80, stop=False).rstrip("\ufffd")
    assert not llama.generate(PROMPTS[0], stop=False).startswith(answer)
    assert llama.generate(PROMPTS[0], answers=[answer]).startswith(answer)
