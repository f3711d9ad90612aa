"""The scored positions are exactly those that predict the target's characters, for every kind of tokenizer.

Oracle: the text is put together again from the tokens' own spelling, piece by piece, without any offsets; a token
belongs to the target if it ends behind the prompt. What stands between prompt and answer is the target's.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mendkit.data.examples import join
from mendkit.mend.losses import edit_nll
from mendkit.models.base import BaseModel
from mendkit.models.tokens import collate, tokenize
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.kinds import BOS, BYTES, EOS, KINDS, UNK, tokenizer_of

PROMPTS = [
    "The capital of France is",
    "Q: What is the capital city of Peru? A:",
    "The city of Spain is ",
    "It said '",
]
ANSWERS = [
    "Lima",
    "the United Kingdom",
    "Santiago",
    " Paris",
    "N'Lima-Oslo",
    "Oslo qux",
    "Rome  Bern",
    "東京",
    "é",
]
KIND = pytest.mark.parametrize("kind", KINDS)
_BYTE = {char: bytes([byte]) for byte, char in bytes_to_unicode().items()}


def spelling(kind: str, token: str) -> bytes:
    """The bytes of a text that a token stands for; for WordPiece without white space and in lower case."""
    if kind.startswith("byte-level"):
        return b"".join(_BYTE[char] for char in token)
    if token in BYTES:
        return bytes([int(token[3:5], 16)])
    if kind.startswith("WordPiece"):
        return token.removeprefix("##").lower().encode()
    return token.replace("▁", " ").encode()


def target_positions(kind: str, tokens: list[str], prompt: str, text: str) -> list[int]:
    """The oracle."""
    plain = (
        (lambda s: "".join(s.lower().split()).encode())
        if kind.startswith("WordPiece")
        else str.encode
    )
    whole, before = plain(text), len(plain(prompt))
    pieces = {
        p: spelling(kind, token) for p, token in enumerate(tokens) if token not in (BOS, EOS, UNK)
    }
    unknown = [p for p, token in enumerate(tokens) if token == UNK]
    assert len(unknown) <= 1
    prefix = next(iter(pieces.values()))[:1] == b" "  # a space that is not in the text
    at, found = -prefix, []
    for p, token in enumerate(tokens):
        if token in (BOS, EOS):
            continue
        if token == UNK:
            at += len(whole) + prefix - sum(map(len, pieces.values()))
        else:
            assert whole[max(at, 0) :].startswith(pieces[p][-at if at < 0 else 0 :])
            at += len(pieces[p])
        found += [p] if at > before else []
    assert at == len(whole)
    return found


def tiny_base(kind: str) -> BaseModel:
    """A random model with a tokenizer of this kind."""
    tokenizer = tokenizer_of(kind)
    size = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(
        **size,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BaseModel(LlamaForCausalLM(config), tokenizer, name=kind)


def cases(kind: str, tokenizer: PreTrainedTokenizerFast):
    """(prompt, answer) whose spelling the oracle can follow: at most one unknown piece, no letter with an accent."""
    for prompt in PROMPTS:
        for answer in ANSWERS:
            text = join(prompt, answer)
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
            spelt = not kind.startswith("WordPiece") or "é" not in answer
            if tokens.count(UNK) <= 1 and spelt:
                yield prompt, answer, text, tokens


@KIND
def test_scored_positions_predict_exactly_the_targets_characters(kind):
    tokenizer, count = tokenizer_of(kind), 0
    for prompt, answer, text, names in cases(kind, tokenizer):
        tokens = tokenize(tokenizer, prompt, answer)
        expected = target_positions(kind, names, prompt, text)
        assert tuple(p + 1 for p in tokens.scored) == tuple(expected), (prompt, answer, names)
        assert tokens.targets == tuple(tokens.ids[p] for p in expected)
        assert not {BOS, EOS} & set(tokenizer.convert_ids_to_tokens(list(tokens.targets)))
        if (
            UNK not in names
            and "lower" not in kind
            and "Rome" not in answer
            and not kind.startswith("WordPiece")
        ):
            assert tokenizer.decode(tokens.targets).strip() == answer.strip()
        count += 1
    assert count >= 20


@KIND
def test_the_end_of_text_is_a_target_once_whoever_added_it(kind):
    tokenizer = tokenizer_of(kind)
    plain, ended = (
        tokenize(tokenizer, "The capital of France is", "Lima", add_eos=flag)
        for flag in (False, True)
    )
    end = tokenizer.eos_token_id
    assert not plain.ends and ended.ends
    assert ended.targets == (*plain.targets, end) and ended.scored == (
        *plain.scored,
        plain.scored[-1] + 1,
    )
    assert ended.ids[-2:] == (plain.targets[-1], end) and ended.ids.count(end) == 1


@KIND
def test_without_answer_the_last_token_of_the_text_is_scored(kind):
    tokenizer = tokenizer_of(kind)
    tokens = tokenize(tokenizer, "The capital of France is")
    names = tokenizer.convert_ids_to_tokens(list(tokens.ids))
    assert tokens.scored == (max(p for p, name in enumerate(names) if name not in (BOS, EOS)),)
    assert tokens.scored[0] == tokenize(tokenizer, "The capital of France is", "Oslo").scored[0]


def test_a_prompt_is_continued_before_the_end_of_text_that_its_tokenizer_appends():
    plain, ended = bases = [
        tiny_base(kind) for kind in ("byte-level, BOS", "byte-level, BOS and EOS")
    ]
    assert plain.tokenizer.get_vocab() == ended.tokenizer.get_vocab()
    texts = [base.generate_batch(PROMPTS, max_new_tokens=6, stop=False) for base in bases]
    assert texts[0] == texts[1] and len(set(texts[0])) > 2


@KIND
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_an_earlier_call_left_in_the_tokenizer_has_no_say(kind, side):
    fresh, used = tokenizer_of(kind), tokenizer_of(kind)
    used.padding_side = used.truncation_side = side
    used(["a", "Oslo and Rome and Lima"], padding=True, truncation=True, max_length=3)
    used.backend_tokenizer.enable_padding(direction=side, length=64)
    for prompt in PROMPTS:
        assert tokenize(used, prompt, "Lima", add_eos=True) == tokenize(
            fresh, prompt, "Lima", add_eos=True
        )


@KIND
def test_padding_on_either_side_does_not_change_the_loss(kind):
    base = tiny_base(kind)
    pairs = zip(PROMPTS, ANSWERS, strict=False)
    texts = [tokenize(base.tokenizer, prompt, answer, add_eos=True) for prompt, answer in pairs]
    assert len({len(text.ids) for text in texts}) > 2
    trunk = FrozenTrunk(base)

    def losses(some):
        batch = collate(some, base.pad_id)
        return edit_nll(trunk.suffix(some, batch), batch.targets, batch.rows, len(some))

    with torch.no_grad():
        alone = torch.cat([losses([text]) for text in texts])
        torch.testing.assert_close(losses(texts), alone, rtol=1e-5, atol=1e-5)
        trunk.fill(texts)
        torch.testing.assert_close(losses(texts), alone, rtol=1e-5, atol=1e-5)
        ids, mask = base.left_pad([text.ids for text in texts])
        where = (mask.cumsum(1) - 1).clamp(min=0)
        logits = base.model(
            input_ids=ids, attention_mask=mask, position_ids=where
        ).logits.log_softmax(-1)
        for row, text in enumerate(texts):
            shifted = torch.tensor(text.scored) + ids.shape[1] - len(text.ids)
            nll = -logits[row, shifted, torch.tensor(text.targets)].mean()
            torch.testing.assert_close(nll, alone[row], rtol=1e-5, atol=1e-5)
