"""The trunk gives the whole model's numbers, and leaves the model as it found it."""

import pytest
import torch

from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import every_text


def plain_logits(base, text):
    with torch.no_grad():
        return base.model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[
            0, list(text.scored)
        ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_suffix_and_reference_are_the_whole_models_logits(family, request):
    base = request.getfixturevalue(family)
    texts = every_text(base)
    trunk = FrozenTrunk(base)
    assert trunk.split and trunk.fill(texts) == len({t.key for t in texts})
    batch = collate(texts, base.pad_id)
    expected = torch.cat([plain_logits(base, text) for text in texts])
    with torch.no_grad():
        torch.testing.assert_close(trunk.suffix(texts, batch), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trunk.before(texts, batch), expected, rtol=1e-5, atol=1e-5)
        uncached = FrozenTrunk(base)
        torch.testing.assert_close(uncached.suffix(texts, batch), expected, rtol=1e-5, atol=1e-5)


def test_the_suffix_runs_no_block_below_the_lowest_site(llama):
    texts = every_text(llama)
    trunk = FrozenTrunk(llama)
    trunk.fill(texts)
    ran = []
    blocks = llama.model.get_submodule(llama.blocks.path)
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)
    ]
    trunk.suffix(texts, collate(texts, llama.pad_id))
    for handle in handles:
        handle.remove()
    assert ran == list(range(llama.blocks.first, len(blocks)))


def test_the_model_is_left_as_it_was(llama):
    texts = every_text(llama)
    before = {name: id(module) for name, module in llama.model.named_modules()}
    trunk = FrozenTrunk(llama)
    trunk.fill(texts)
    trunk.suffix(texts, collate(texts, llama.pad_id))
    with pytest.raises(RuntimeError):
        trunk.suffix(
            texts, collate(texts[:-1], llama.pad_id)
        )  # states of another shape than the mask
    assert {name: id(module) for name, module in llama.model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())


def test_padding_does_not_change_a_text(llama):
    texts = every_text(llama)
    trunk = FrozenTrunk(llama)
    trunk.fill(texts)
    longest = max(texts, key=lambda t: len(t.ids))
    for text in texts[:4]:
        alone = trunk.suffix([text], collate([text], llama.pad_id))
        padded = trunk.suffix([longest, text], collate([longest, text], llama.pad_id))
        torch.testing.assert_close(padded[len(longest.scored) :], alone, rtol=1e-5, atol=1e-5)
