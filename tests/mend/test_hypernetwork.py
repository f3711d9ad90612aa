"""The hypernetwork against numpy, closed forms and negative controls."""

import numpy as np
import pytest
import torch

from mendkit.errors import DataError
from mendkit.mend.batches import edit_tokens
from mendkit.mend.factors import capture_factors
from mendkit.mend.hypernetwork import MEND, LowRankResidual
from mendkit.mend.losses import edit_nll
from mendkit.mend.normaliser import LEAST_RESPONSE, RunningMoments, Whitening
from mendkit.mend.updates import side_branches
from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams, with_statistics

# ---------------------------------------- normaliser


def test_moments_are_numpys_and_do_not_depend_on_batching():
    x = torch.randn(1000, 5, dtype=torch.float64) * torch.tensor([1.0, 1e-4, 1e3, 1.0, 0.0]) + 7
    tiny = torch.finfo(torch.float32).tiny
    whole, parts = RunningMoments(5), RunningMoments(5)
    whole.add(x)
    for part in x.split([1, 499, 1, 0, 499]):
        parts.add(part)
    for moments in (whole, parts):
        assert int(moments.count) == 1000
        np.testing.assert_allclose(moments.mean.numpy(), x.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            moments.std(0.0).numpy(), np.maximum(x.numpy().std(0, ddof=1), tiny), rtol=1e-9
        )


def test_a_single_row_is_no_nan_and_a_count_beyond_float32_keeps_counting():
    moments = RunningMoments(2)
    moments.add(torch.ones(1, 2))
    assert torch.isfinite(moments.normalise(torch.randn(3, 2), floor=0.1, clip=10.0)).all()
    moments.count.fill_(2**24)
    moments.add(torch.ones(1, 2))
    assert int(moments.count) == 2**24 + 1


def test_statistics_survive_save_and_load():
    moments, loaded = RunningMoments(3), RunningMoments(3)
    moments.add(torch.randn(50, 3))
    loaded.load_state_dict(moments.state_dict())
    more = torch.randn(1, 3)
    moments.add(more), loaded.add(more)
    assert all(torch.equal(a, b) for a, b in zip(moments.buffers(), loaded.buffers(), strict=True))
    assert int(loaded.count) == 51


def test_a_unit_silent_in_training_does_not_blow_up():
    moments = RunningMoments(4)
    moments.add(torch.randn(100, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0]))
    x = torch.tensor([[0.0, 0.0, 0.0, 1e-3]])
    assert float(moments.normalise(x, floor=0.1, clip=None)[0, 3].abs()) < 0.05
    assert float(moments.normalise(x * 1e9, floor=0.1, clip=10.0)[0, 3]) == 10.0


def keys_and_groups(n_groups: int = 60, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in groups of one to four: what the group shares, noise, and a common offset."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.repeat_interleave(torch.arange(n_groups), torch.arange(n_groups) % 4 + 1)
    shared = torch.randn(n_groups, width, generator=generator, dtype=torch.float64) * torch.tensor(
        [2.0, 2, 1, 0, 0, 0]
    )
    noise = torch.randn(len(groups), width, generator=generator, dtype=torch.float64)
    return shared[groups] + noise + 3, groups


def fitted(x: torch.Tensor, groups: torch.Tensor | None = None, **options) -> Whitening:
    """Fitted in two parts; every third group is one of first tokens."""
    whitening = Whitening(x.shape[1], 0.1, pairs=groups is not None, **options).double()
    for part in (torch.arange(len(x)) < 80, torch.arange(len(x)) >= 80):  # row 80 starts a group
        own = None if groups is None else groups[part] - int(groups[part].min())
        whitening.add(x[part], own, None if groups is None else groups[part] % 3 == 0)
    whitening.fit()
    return whitening


def test_whitening_is_the_ridge_inverse_of_the_second_moment_at_unit_mean_square():
    x, _ = keys_and_groups()
    moment = x.numpy().T @ x.numpy() / len(x)
    expected = x.numpy() @ np.linalg.inv(moment + 0.1 * moment.diagonal().mean() * np.eye(6))
    expected /= np.sqrt((expected**2).mean())
    whitening = fitted(x)
    np.testing.assert_allclose(
        whitening.normalise(x, floor=0.1, clip=None).numpy(), expected, rtol=1e-8
    )
    assert int(whitening.count) == len(x)
    assert float(whitening.response) == pytest.approx(
        float((x * whitening.normalise(x, floor=0, clip=None)).sum(1).mean())
    )


def test_paired_whitening_solves_the_least_squares_of_what_a_groups_rows_share():
    x, groups = keys_and_groups()
    assert groups[79] != groups[80]
    paired, plain = fitted(x, groups), fitted(x)
    moment = x.numpy().T @ x.numpy() / len(x)
    ridge = 0.1 * moment.diagonal().mean() * np.eye(6)
    for first in (False, True):
        rows = [i for i in range(len(x)) if (int(groups[i]) % 3 == 0) == first]
        target = sum(
            np.outer(x[i], x[j]) for i in rows for j in rows if i != j and groups[i] == groups[j]
        )
        residual = (
            (moment + ridge) @ paired.matrix[int(first)].numpy() @ (moment + ridge)
        )  # the normal equations
        np.testing.assert_allclose(
            residual / np.linalg.norm(residual), target / np.linalg.norm(target), atol=1e-9
        )

    def separation(matrix: torch.Tensor) -> float:
        scores = x @ matrix @ x.T
        same = (groups[:, None] == groups) & ~torch.eye(len(x), dtype=torch.bool)
        other = groups[:, None] != groups
        return float((scores[same].mean() - scores[other].mean()) / scores[other].std())

    assert separation(paired.matrix.sum(0)) > 1.1 * separation(plain.matrix[0])


def test_rows_without_a_group_are_no_pairs_and_some_pair_is_needed():
    x, groups = keys_and_groups()
    lone, twice = torch.full((len(x),), -1), torch.cat([groups, groups])
    plain, more = (Whitening(6, 0.1, pairs=True).double() for _ in range(2))
    plain.add(x, groups, groups % 3 == 0)
    more.add(torch.cat([x, 5 * x]), torch.cat([groups, lone]), twice % 3 == 0)
    torch.testing.assert_close(more._sums[1:], plain._sums[1:])
    torch.testing.assert_close(more._sums[0], 26 * x.T @ x)
    single = Whitening(6, 0.1, pairs=True)
    single.add(x.float(), torch.arange(len(x)), groups % 3 == 0)
    with pytest.raises(DataError, match="no example has a paraphrase"):
        single.fit()


def test_unit_response_makes_every_token_answer_itself_alike():
    x, groups = keys_and_groups()
    whitening, first = fitted(x, groups, unit_response=True), groups % 3 == 0
    plain = torch.where(first[:, None], x @ whitening.matrix[1], x @ whitening.matrix[0])
    z = whitening.normalise(x, floor=0.1, clip=None, first=first)
    mean = whitening.response[first.long()]
    enough = (x * plain).sum(1) > LEAST_RESPONSE * mean
    assert float(enough.double().mean()) > 0.95
    torch.testing.assert_close((x * z).sum(1)[enough], mean[enough])
    faint = (
        0.1 * x
    )  # a tenth of the input answers itself a hundredth as much: not made longer without end
    z = whitening.normalise(faint, floor=0.1, clip=None, first=first)
    torch.testing.assert_close(z, 0.1 * plain / LEAST_RESPONSE)


# ---------------------------------------- blocks


def new_block(width: int, rank: int, n_layers: int, init: str = "id_xavier") -> LowRankResidual:
    h = hparams(init=init).replace(rank=rank)
    return LowRankResidual(width, n_layers, h, torch.Generator().manual_seed(0))


def test_block_is_equation_3_in_a_plain_loop():
    block, generator = new_block(6, 3, 2).double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    z, layer = torch.randn(4, 6, dtype=torch.float64), [0, 0, 0, 1]
    out = block(z, [3, 1])
    for t in range(4):
        inner = (
            block.scale[layer[t]] * (block.U @ (block.V @ z[t]) + block.bias)
            + block.shift[layer[t]]
        )
        expected = z[t] + torch.tensor([max(0.0, v) for v in inner.tolist()], dtype=torch.float64)
        assert torch.allclose(out[t], expected, atol=1e-12)


def test_identity_at_the_start_but_not_a_dead_one():
    block = new_block(6, 3, 1)
    z = torch.randn(4, 6)
    assert torch.equal(block(z, [4]), z)
    block(z, [4]).square().sum().backward()
    assert float(block.U.grad.abs().sum()) > 0  # the clamp passes the gradient at 0


def test_xavier_keeps_the_scale_that_the_old_normal_start_inflates():
    width = 2000
    stds = {}
    for init in ("id_xavier", "id"):
        block = new_block(width, width, 1, init)
        stds[init] = float((torch.randn(64, width) @ block.V.detach().T).std())
    assert stds["id_xavier"] < 1.5 and stds["id"] > 30


def test_xavier_has_no_residual_path_and_starts_alive():
    block, z = new_block(6, 3, 1, "xavier"), torch.randn(4, 6)
    torch.testing.assert_close(block(z, [4]), ((z @ block.V.T) @ block.U.T).clamp(min=0))
    large = new_block(400, 100, 1, "xavier")  # U stands before a ReLU: √2 times
    assert float(large.V.detach().std()) == pytest.approx((2 / 500) ** 0.5, rel=0.02)
    assert float(large.U.detach().std()) == pytest.approx((2 * 2 / 500) ** 0.5, rel=0.02)


def test_a_rank_is_at_most_the_width_and_unshared_blocks_have_no_scale(llama):
    for rank in (None, 10_000):
        mend = MEND(llama.sites, hparams(shared=False).replace(rank=rank))
        assert {n.rpartition(".")[2] for n, _ in mend.blocks.named_parameters()} == {*"UV", "bias"}
        for stack, site in zip(mend.blocks.values(), llama.sites, strict=True):
            assert stack[0].V.shape == (site.d_in + site.d_out,) * 2
            assert len(stack) == 2  # n_hidden: 1 means two blocks


def test_statistics_are_per_layer_unless_asked_otherwise(llama):
    assert len(MEND(llama.sites, hparams()).moments) == len(llama.sites)
    assert len(MEND(llama.sites, hparams(norm_stats="shape")).moments) == 2


# ---------------------------------------- the update


def loss_after(base, texts, updates) -> float:
    trunk = FrozenTrunk(base)
    batch = collate(texts, base.pad_id)
    with torch.no_grad(), side_branches(base, updates):
        logits = trunk.suffix(texts, batch)
    return float(edit_nll(logits, batch.targets, batch.rows, len(texts)).mean())


def test_the_sign_descends_and_the_published_plus_ascends(base32):
    losses = {}
    for sign in (-1, 1):
        h = hparams(update_sign=sign, edit_lr=1e-3)
        mend = with_statistics(base32, MEND(base32.sites, h))
        texts = [edit_tokens(base32, h, e) for e in EXAMPLES]
        with torch.no_grad():
            updates = mend(capture_factors(FrozenTrunk(base32), texts), len(texts))
        losses[sign] = loss_after(base32, texts, updates)
    before = loss_after(base32, texts, {})
    assert losses[-1] < before - 0.01 and losses[1] > before + 0.01


def test_an_edits_update_does_not_depend_on_the_batch_around_it(llama):
    h = hparams()
    mend = with_statistics(llama, MEND(llama.sites, h))
    with torch.no_grad():
        for parameter in mend.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            )
    texts = [edit_tokens(llama, h, e) for e in EXAMPLES]
    trunk = FrozenTrunk(llama)
    together = mend(capture_factors(trunk, texts), len(texts))
    for i, text in enumerate(texts):
        alone = mend(capture_factors(trunk, [text]), 1)
        for name, update in alone.items():
            torch.testing.assert_close(
                together[name].select([i]).dense(), update.dense(), rtol=1e-4, atol=1e-7
            )


def test_the_step_sizes_and_every_transform_receive_a_gradient(llama):
    h = hparams()
    mend = with_statistics(llama, MEND(llama.sites, h))
    texts = [edit_tokens(llama, h, e) for e in EXAMPLES]
    trunk = FrozenTrunk(llama)
    factors = capture_factors(trunk, texts)
    batch = collate(texts, llama.pad_id)
    with side_branches(llama, mend(factors, len(texts))):
        logits = trunk.suffix(texts, batch)
    edit_nll(logits, batch.targets, batch.rows, len(texts)).mean().backward()
    assert (mend.log_edit_lr.grad != 0).all()
    assert all(
        float(p.grad.abs().sum()) > 0
        for n, p in mend.named_parameters()
        if n.endswith(("U", "bias", "shift"))
    )
    assert all(p.grad is None for p in llama.model.parameters())
