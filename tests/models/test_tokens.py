"""The scored positions are exactly those that predict the target's characters, for every tokenizer.

Oracle: the text is put together again from the tokens' spelling, piece by piece, without offsets.
A token belongs to the target if it ends behind the prompt.
"""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mendkit.data.examples import EditExample, Probe, join
from mendkit.errors import DataError, ModelError
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.mend.batches import edit_tokens, prepare_texts
from mendkit.mend.losses import edit_nll
from mendkit.mend.validation import next_tokens
from mendkit.models.base import BaseModel
from mendkit.models.tokens import collate, tokenize
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.kinds import ANSWERS, BOS, EOS, KINDS, PROMPTS, UNK, spelling, tokenizer_of
from tests.oracles.tiny import tiny_llama

KIND = pytest.mark.parametrize("kind", KINDS)
PROMPT = "The capital of France is"


def target_positions(kind: str, tokens: list[str], prompt: str, text: str) -> list[int]:
    """The oracle."""

    def plain(string: str) -> bytes:
        if kind.startswith("WordPiece"):  # spelt without white space and in lower case
            string = "".join(string.lower().split())
        return string.encode()

    whole, before = plain(text), len(plain(prompt.rstrip()))
    pieces = {p: spelling(kind, t) for p, t in enumerate(tokens) if t not in (BOS, EOS, UNK)}
    prefix = next(iter(pieces.values()))[:1] == b" "  # a space that is not in the text
    at, found = -prefix, []
    for p, token in enumerate(tokens):
        if token in (BOS, EOS):
            continue
        if token == UNK:  # what the other pieces leave
            at += len(whole) + prefix - sum(map(len, pieces.values()))
        else:
            assert whole[max(at, 0) :].startswith(pieces[p][-at if at < 0 else 0 :])
            at += len(pieces[p])
        if at > before:
            found.append(p)
    assert at == len(whole)
    return found


def tiny_base(kind: str) -> BaseModel:
    """A random model with a tokenizer of this kind."""
    tokenizer = tokenizer_of(kind)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BaseModel(LlamaForCausalLM(config), tokenizer, name=kind)


@KIND
def test_scored_positions_predict_exactly_the_targets_characters(kind):
    tokenizer, count = tokenizer_of(kind), 0
    for prompt in PROMPTS:
        for answer in ANSWERS:
            text = join(prompt, answer)
            tokens = tokenize(tokenizer, prompt, answer)
            names = tokenizer.convert_ids_to_tokens(list(tokens.ids))
            # what the oracle can follow: one unknown piece at most, no letter that loses its accent
            if names.count(UNK) > 1 or (kind.startswith("WordPiece") and "é" in answer):
                continue
            expected = target_positions(kind, names, prompt, text)
            assert [p + 1 for p in tokens.scored] == expected, (prompt, answer, names)
            assert tokens.targets == tuple(tokens.ids[p] for p in expected)
            count += 1
    assert count >= 20


@KIND
def test_the_end_of_text_is_a_target_once_whoever_added_it(kind):
    tokenizer = tokenizer_of(kind)
    plain, ended = (tokenize(tokenizer, PROMPT, "Lima", add_eos=flag) for flag in (False, True))
    end = tokenizer.eos_token_id
    assert not plain.ends and ended.ends and ended.ids.count(end) == 1
    assert ended.targets == (*plain.targets, end)
    assert ended.scored == (*plain.scored, plain.scored[-1] + 1)
    assert ended.ids[-2:] == (plain.targets[-1], end)


@KIND
def test_without_answer_the_last_token_of_the_text_is_scored(kind):
    tokenizer = tokenizer_of(kind)
    tokens = tokenize(tokenizer, PROMPT)
    names = tokenizer.convert_ids_to_tokens(list(tokens.ids))
    assert tokens.scored == (max(p for p, name in enumerate(names) if name not in (BOS, EOS)),)
    assert tokens.scored[0] == tokenize(tokenizer, PROMPT, "Oslo").scored[0]


def test_a_prompt_is_continued_before_the_end_of_text_that_its_tokenizer_appends():
    plain, ended = (tiny_base(kind) for kind in ("byte-level, BOS", "byte-level, BOS and EOS"))
    assert plain.tokenizer.get_vocab() == ended.tokenizer.get_vocab()
    written = plain.generate_batch(PROMPTS, max_new_tokens=6, stop=False)
    assert written == ended.generate_batch(PROMPTS, max_new_tokens=6, stop=False)
    assert len(set(written)) > 2


@KIND
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_an_earlier_call_left_in_the_tokenizer_has_no_say(kind, side):
    fresh, used = tokenizer_of(kind), tokenizer_of(kind)
    used.padding_side = used.truncation_side = side
    used(["a", "Oslo and Rome and Lima"], padding=True, truncation=True, max_length=3)
    used.backend_tokenizer.enable_padding(direction=side, length=64)
    found, expected = (tokenize(each, PROMPT, "Lima", add_eos=True) for each in (used, fresh))
    assert found == expected


@KIND
def test_padding_on_either_side_does_not_change_the_loss(kind):
    base = tiny_base(kind)
    pairs = zip(PROMPTS, ANSWERS, strict=False)
    texts = [tokenize(base.tokenizer, prompt, answer, add_eos=True) for prompt, answer in pairs]
    assert len({len(text.ids) for text in texts}) > 2
    trunk, close = FrozenTrunk(base), {"rtol": 1e-5, "atol": 1e-5}

    def losses(some):
        batch = collate(some, base.pad_id)
        return edit_nll(trunk.suffix(some, batch), batch.targets, batch.rows, len(some))

    with torch.no_grad():
        alone = torch.cat([losses([text]) for text in texts])
        torch.testing.assert_close(losses(texts), alone, **close)
        trunk.fill(texts)
        torch.testing.assert_close(losses(texts), alone, **close)
        ids, mask = base.left_pad([text.ids for text in texts])
        where = (mask.cumsum(1) - 1).clamp(min=0)
        output = base.model(input_ids=ids, attention_mask=mask, position_ids=where)
        for row, text in enumerate(texts):
            shifted = torch.tensor(text.scored) + ids.shape[1] - len(text.ids)
            log_p = output.logits[row, shifted].log_softmax(-1)
            nll = -log_p.gather(1, torch.tensor(text.targets)[:, None]).mean()
            torch.testing.assert_close(nll, alone[row], **close)


def test_impossible_answers_are_refused(llama):
    with pytest.raises(DataError, match="no token"):
        tokenize(llama.tokenizer, "", "Paris")
    with pytest.raises(DataError, match="limit is 4"):
        tokenize(llama.tokenizer, PROMPT, "Paris", max_length=4)
    with pytest.raises(DataError, match="max_target_tokens"):
        edit_tokens(llama, hparams(max_target_tokens=2), EXAMPLES[2])


def test_collate_masks_padding_and_keeps_the_order(llama):
    texts = [tokenize(llama.tokenizer, p, "Lima") for p in ("X is", "The long capital of X is")]
    batch = collate(texts, llama.pad_id)
    assert batch.attention_mask.sum(1).tolist() == [len(t.ids) for t in texts]
    assert batch.targets.tolist() == [t for text in texts for t in text.targets]
    for row, text in zip(batch.scored, texts, strict=True):
        assert tuple(row.nonzero()[:, 0].tolist()) == text.scored
    assert batch.rows.tolist() == [0] * len(texts[0].scored) + [1] * len(texts[1].scored)


# ------------------------------------------------------------------- what stands between the two


@pytest.mark.parametrize(
    ("prompt", "answer", "between"),
    [
        ("The capital of Chad is", "Lima", " "),
        ("The capital of Chad is ", "Lima", " "),
        ("The capital of Chad is ", " Lima", " "),
        ("The capital of Chad is", "乍得", " "),
        ("A:\n", "Lima", "\n"),
        ("秘鲁的首都是", "利马", ""),
        ("秘鲁的首都是", "Lima", ""),
        ("ペルーの首都は", "リマ", ""),
        ("เมืองหลวงคือ", "ลิมา", ""),
        ("페루의 수도는", "리마", " "),
        ("It is known as (", "Lima", ""),
        ("Its page is https://", "lima.example", ""),
        ('He said "', "Lima", ""),
        ('They call it "Lima"', "today", " "),
        ("A ticket costs $", "7", ""),
        ("In place of io.open use io.", "open_code", ""),
        ("It is done by torch.nn.", "Linear", ""),
        ("The virus is SARS-", "2", ""),
        ("Le pays s'appelle l'", "Italie", ""),
        ("Pi is about 3.", "14", ""),
        ("It is as cold as -", "40", ""),
        ("The capital -", "Lima", " "),
        ("It is <b>", "Lima</b>", ""),
        ("It is **", "Lima**", ""),
        ("The code of Peru is +", "51", ""),
        ("She wrote to info@", "lima.example", ""),
        ("It is James'", "house", " "),
        ("A metre is spelled by np.", "float_", ""),
        ("Answer in one word.", "Lima", " "),
        ("They moved to the U.S.", "in May", " "),
    ],
)
def test_prompt_and_answer_are_parted_as_their_script_has_it(prompt, answer, between):
    assert join(prompt, answer) == prompt.rstrip() + between + answer.strip()
    assert join(prompt, answer, "->") == f"{prompt}->{answer}"


def test_blanks_at_the_end_of_a_prompt_or_an_answer_change_nothing(llama):
    plain = tokenize(llama.tokenizer, PROMPT, "Lima")
    for prompt, answer in ((f"{PROMPT} ", "Lima"), (f"{PROMPT} ", " Lima"), (PROMPT, "Lima ")):
        assert tokenize(llama.tokenizer, prompt, answer) == plain
    assert llama.tokenize(f"{PROMPT} ") == llama.tokenize(PROMPT) == llama.prompt_of(plain)
    without, with_blank = (llama.generate(p, max_new_tokens=6) for p in (PROMPT, f"{PROMPT} "))
    assert with_blank == without.lstrip(" ")


@KIND
@pytest.mark.parametrize(("prompt", "answer"), [("The city of Per", "u"), ("東京", "京")])
def test_a_model_goes_on_from_its_prompt_where_a_token_would_span_both(kind, prompt, answer):
    tokenizer = tokenizer_of(kind)
    text = tokenize(tokenizer, prompt, answer, prefix="")
    bare = tokenize(tokenizer, prompt)
    names = tokenizer.convert_ids_to_tokens(list(text.ids))
    if UNK not in names and not kind.startswith("WordPiece"):
        assert text.ids[: text.scored[0] + 1] == bare.ids[: bare.scored[0] + 1]
        if kind.startswith("byte-level"):
            assert tokenizer.decode(text.targets, skip_special_tokens=True) == answer


def test_the_separator_of_a_record_goes_before_the_files_and_both_reach_every_text(llama):
    example = EditExample(
        "X is", "Lima", paraphrases=("Y is",), neighbours=(Probe("Z is", "Bern"),)
    )

    def texts(h, e) -> list[str]:
        (found,) = prepare_texts(llama, h, [e])
        return [llama.tokenizer.decode(text.ids) for text in found.all()]

    h = hparams(add_eos=False)
    assert texts(h, example) == ["X is Lima", "Y is Lima", "Z is Bern"]
    colon = h.replace(target_prefix=": ")
    assert texts(colon, example) == ["X is: Lima", "Y is: Lima", "Z is: Bern"]
    own = replace(example, target_prefix="-")
    assert texts(colon, own) == ["X is-Lima", "Y is-Lima", "Z is: Bern"]
    scored = EvaluationSet(llama, colon, [own], max_new_tokens=2)
    found = [text for prompt in scored.prompts[0] for text in prompt.all()]
    read = {llama.tokenizer.decode(text.ids) for text in found}
    assert {"X is-Lima", "Y is-Lima", "Z is: Bern"} <= read


def test_a_token_beyond_the_embeddings_is_named_with_the_remedy():
    base = tiny_llama()
    base.tokenizer.add_tokens(["<extra>"])
    calls = (base.tokenize, base.encode, base.generate, lambda t: next_tokens(base, "A", among=[t]))
    for call in calls:
        with pytest.raises(ModelError, match=r"<extra>.*resize_token_embeddings"):
            call("The <extra> is")
    assert base.generate("The capital", max_new_tokens=2)
