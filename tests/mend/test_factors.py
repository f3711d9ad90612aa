"""Gradient factors against autograd on the weights themselves (CORRECTNESS rows 10–14)."""

import pytest
import torch

from mendkit.mend.batches import edit_tokens
from mendkit.mend.factors import FactorCache, capture_factors, capture_inputs
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, assert_factors_rebuild_the_gradient, hparams


def texts_of(base):
    return [edit_tokens(base, hparams(), example) for example in EXAMPLES]


def test_the_gradient_is_the_sum_of_rank_one_terms(base64):
    assert_factors_rebuild_the_gradient(base64, texts_of(base64), 1e-10, 1e-11)
    assert all(p.grad is None and not p.requires_grad for p in base64.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base64.model.modules())


@pytest.mark.parametrize("cached", [True, False])
def test_each_edit_has_the_scale_of_a_single_edit(llama64, cached):
    texts, trunk = texts_of(llama64), FrozenTrunk(llama64)
    if cached:
        trunk.fill(texts)
    together, cache = capture_factors(trunk, texts), FactorCache(trunk, hparams())
    for row, text in enumerate(texts):
        for name, alone in capture_factors(trunk, [text]).items():
            f = together[name]
            torch.testing.assert_close(f.u[f.rows == row], alone.u, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(f.delta[f.rows == row], alone.delta, rtol=1e-9, atol=1e-12)
    cache.fill(texts[:1])  # the cache packs what it holds and what it computes alike
    for name, f in cache.get(texts).items():
        assert torch.equal(f.rows, together[name].rows)
        torch.testing.assert_close(f.delta, together[name].delta, rtol=1e-9, atol=1e-12)


def test_a_summed_loss_counts_every_token_alike(llama64):
    texts, trunk = texts_of(llama64), FrozenTrunk(llama64)
    means, sums = (capture_factors(trunk, texts, reduction=r) for r in ("edit", "sum"))
    counts = torch.tensor([len(text.targets) for text in texts])
    assert len(set(counts.tolist())) > 1
    for name, mean in means.items():
        expected = mean.delta * counts[mean.rows, None]
        # Llama's norms compute in float32.
        torch.testing.assert_close(sums[name].delta, expected, rtol=1e-3, atol=1e-6)


def test_captured_inputs_are_those_of_the_scored_tokens_factors(llama):
    texts, trunk = texts_of(llama), FrozenTrunk(llama)
    seen: list[int] = []
    head = llama.model.get_output_embeddings()
    with head.register_forward_hook(lambda _, args, __: seen.append(args[0].numel())):
        inputs = capture_inputs(trunk, texts)
    assert seen == [0]  # the output layer has nothing to do
    for name, f in capture_factors(trunk, texts, tokens="scored").items():
        torch.testing.assert_close(inputs[name], f.u)


def test_tokens_left_out_are_those_that_cannot_receive_a_gradient(llama):
    text = texts_of(llama)[0]
    one = type(text)(text.ids[: text.scored[0] + 2], text.scored[:1], text.targets[:1])
    assert {site.scored_only for site in llama.sites} == {True, False}
    for tokens in (text, one):  # a target of one token works, too
        factors = capture_factors(FrozenTrunk(llama), [tokens])
        for site in llama.sites:
            count = len(tokens.scored) if site.scored_only else max(tokens.scored) + 1
            assert len(factors[site.name].u) == count
            assert float(factors[site.name].delta.abs().sum()) > 0


def test_the_cache_keeps_the_shortest_texts_within_its_budget(llama):
    trunk, texts = FrozenTrunk(llama), texts_of(llama)
    texts.sort(key=lambda text: (len(text.ids), text.key))
    whole = FactorCache(trunk, hparams())
    whole.fill(texts)
    sizes = [sum(u.nbytes + d.nbytes for u, d in whole.kept[text].values()) for text in texts]
    assert whole.bytes == sum(sizes)
    for spare, kept in ((0, 2), (-1, 1), (1, 2)):
        some = FactorCache(trunk, hparams(cache_bytes=sum(sizes[:2]) + spare))
        some.fill(texts)
        assert list(some.kept) == texts[:kept] and some.bytes == sum(sizes[:kept])
