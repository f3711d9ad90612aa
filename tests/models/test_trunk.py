"""The trunk gives the whole model's numbers in every family, and leaves no trace."""

import pytest
import torch

from mendkit.mend.batches import edit_tokens, prepare_texts
from mendkit.models import trunk as trunk_module
from mendkit.models.base import BaseModel
from mendkit.models.tokens import Tokens, collate, pack
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import (
    EXAMPLES,
    assert_factors_rebuild_the_gradient,
    every_text,
    examples_of,
    hparams,
    plain_logits,
)
from tests.oracles.families import CAUSAL, NO_CHAIN, other_base
from tests.oracles.tiny import tiny_llama


@torch.no_grad()
def alone(base: BaseModel, texts) -> torch.Tensor:
    """Oracle: each text by itself through the whole model."""
    return torch.cat([plain_logits(base, text) for text in texts])


@pytest.mark.parametrize("family", [*CAUSAL, "t5", "bart", "bert", "bert, 3 classes"])
def test_the_trunk_gives_the_whole_models_logits(family):
    base = other_base(family)
    examples = prepare_texts(base, hparams(), examples_of(base)[:2])
    texts = [text for example in examples for text in example.all()]
    trunk, batch, expected = FrozenTrunk(base), collate(texts, base.pad_id), alone(base, texts)
    assert trunk.split == (family not in NO_CHAIN)
    assert trunk.fill(texts) == trunk.split * len({text.key for text in texts})
    close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
    with torch.no_grad():
        torch.testing.assert_close(trunk.suffix(texts, batch), expected, **close)
        torch.testing.assert_close(trunk.before(texts, batch), expected, **close)
        torch.testing.assert_close(FrozenTrunk(base).suffix(texts, batch), expected, **close)


@pytest.mark.parametrize("family", CAUSAL)
def test_texts_of_a_group_in_one_row_have_the_logits_that_they_have_alone(family):
    base = CAUSAL[family].base()
    texts = every_text(base)[:11]
    groups, order = [texts[:5], [], texts[5:9], texts[9:]], [3, 10, *range(3), *range(4, 10)]
    parts = alone(base, texts).split([len(text.scored) for text in texts])
    expected = torch.cat([parts[i] for i in order])
    close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
    trunk = FrozenTrunk(base)
    with torch.no_grad():
        torch.testing.assert_close(trunk.suffix_of(groups, order), expected, **close)
        trunk.fill(texts)
        torch.testing.assert_close(trunk.suffix_of(groups, order), expected, **close)
        base.packs = False
        torch.testing.assert_close(trunk.suffix_of(groups, order), expected, **close)


def test_only_models_that_take_masks_and_positions_read_packed_texts():
    packs = {family for family in CAUSAL if CAUSAL[family].base().packs}
    assert {"llama", "gpt2", "qwen3"} <= packs, packs
    assert "bloom" not in packs  # it counts distances in the row


def test_long_texts_make_no_large_rows(llama, monkeypatch):
    monkeypatch.setattr(trunk_module, "NODES_PER_ROW", 12)
    monkeypatch.setattr(trunk_module, "MOST_NODES", 16)
    monkeypatch.setattr(trunk_module, "TOKENS_PER_PASS", 40)
    texts = every_text(llama) + [llama.tokenize("word " * k) for k in (13, 14, 20, 25)]
    texts += [Tokens((a, b), (1,)) for a in range(9, 30) for b in range(9, 12)]
    lengths = [len(text.ids) for text in texts]
    assert min(lengths) < 12 and sum(12 < length <= 16 for length in lengths) and max(lengths) > 16
    trunk, shapes, forward = FrozenTrunk(llama), [], llama.model.forward

    def watched(input_ids, **options):
        shapes.append((input_ids.shape, "position_ids" in options))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(llama.model, "forward", watched)
    trunk.fill(texts)
    assert {packed for _, packed in shapes} == {True, False}
    for (rows, length), packed in shapes:
        assert rows == 1 or rows * length <= 40
        assert length <= 16 or not packed
    shapes.clear()
    pair = [texts[0], max(texts, key=lambda text: len(text.ids))]
    with torch.no_grad():
        found = trunk.suffix_of([[text] for text in pair])
    assert not shapes[0][1]  # one of them is too long
    torch.testing.assert_close(found, alone(llama, pair), rtol=1e-4, atol=1e-5)


def test_a_beginning_in_common_is_read_once(llama):
    texts = [llama.tokenize("The capital of Peru is", answer) for answer in ("Lima", "Rome")]
    batch = pack([texts, texts[:1]], llama.pad_id)
    a, b = texts[0].ids, texts[1].ids
    same = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    assert same > 3 and batch.shared == [0, same, 0]
    assert batch.input_ids.shape == (2, len(a) + len(b) - same)
    assert batch.input_ids.flatten()[batch.nodes[1]].tolist() == list(b)
    assert batch.position_ids.flatten()[batch.nodes[1]].tolist() == list(range(len(b)))
    row = batch.attends[0, batch.nodes[1][-1]]
    assert row.nonzero()[:, 0].tolist() == batch.nodes[1].tolist()


@pytest.mark.parametrize("family", CAUSAL)  # OPT hands its MLP all tokens of a batch in one row
def test_factors_rebuild_the_gradient_of_the_weights(family):
    base = CAUSAL[family].base()
    texts = [edit_tokens(base, hparams(), example) for example in EXAMPLES[:3]]
    assert_factors_rebuild_the_gradient(base, texts, 1e-3, 1e-4)


def test_a_model_that_is_no_chain_gives_the_same_numbers_without_a_cache():
    base = tiny_llama()
    halved = base.model.model.layers[1]
    halved.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))
    base = BaseModel(base.model, base.tokenizer, name="no chain")
    texts = every_text(base)
    trunk, batch = FrozenTrunk(base), collate(texts, base.pad_id)
    assert base.blocks is None and not trunk.split and trunk.fill(texts) == 0
    with torch.no_grad():
        for got in (trunk.suffix(texts, batch), trunk.before(texts, batch)):
            torch.testing.assert_close(got, alone(base, texts), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was(llama):
    texts, ran = every_text(llama), []
    trunk = FrozenTrunk(llama)
    trunk.fill(texts)
    for i, block in enumerate(llama.model.model.layers):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    trunk.suffix(texts, collate(texts, llama.pad_id))
    assert ran == [1, 2, 3]
    for block in llama.model.model.layers:
        block.mlp._forward_hooks.clear()
    with pytest.raises(RuntimeError):  # states of another shape than the mask
        trunk.suffix(texts, collate(texts[:-1], llama.pad_id))
    assert not any("forward" in vars(module) for module in llama.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())


def test_padding_does_not_change_a_text(llama):
    texts = every_text(llama)
    trunk = FrozenTrunk(llama)
    trunk.fill(texts)
    longest = max(texts, key=lambda text: len(text.ids))
    for text in texts[:4]:
        by_itself = trunk.suffix([text], collate([text], llama.pad_id))
        padded = trunk.suffix([longest, text], collate([longest, text], llama.pad_id))
        found = padded[len(longest.scored) :]
        torch.testing.assert_close(found, by_itself, rtol=1e-5, atol=1e-5)
