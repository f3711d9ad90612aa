"""Base models in half precision: factors, losses and gradients are those of a float32 model."""

import pytest
import torch

from mendkit.mend.batches import Sampler, prepare_texts
from mendkit.mend.factors import capture_factors
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.steps import batch_losses, make_optimiser, total_loss
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams, scrambled, with_statistics
from tests.oracles.tiny import tiny_gpt2, tiny_llama


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def one_step(base, mend):
    """Factors, losses and gradients of one step, its texts' trunk states cached."""
    h = hparams()
    examples = prepare_texts(base, h, EXAMPLES)
    trunk = FrozenTrunk(base)
    trunk.fill([text for example in examples for text in example.all()])
    factors = capture_factors(trunk, [e.edit for e in examples])
    losses = batch_losses(trunk, mend, factors, Sampler(examples, h).texts(range(len(examples))))
    parameters = list(mend.parameters())
    return (
        factors,
        losses,
        torch.autograd.grad(total_loss(losses, h), parameters, retain_graph=True),
    )


@pytest.mark.parametrize(
    ("build", "dtype", "rounding"),
    [(tiny_llama, torch.bfloat16, 2**-8), (tiny_gpt2, torch.float16, 2**-11)],
)
def test_factors_losses_and_gradients_are_float32_and_those_of_a_float32_model(
    build, dtype, rounding
):
    half, same, another = build(dtype=dtype), build(), build(seed=1)
    same.model.load_state_dict(half.model.state_dict())  # the rounded weights, in float32
    mend = scrambled(with_statistics(same, MEND(same.sites, hparams(edit_lr=1e-3))))
    expected = one_step(same, mend)

    def errors(base):
        """Relative errors of factors and of gradients, and the losses' in nats."""
        factors, losses, gradients = one_step(base, mend)
        parts = [
            (getattr(f, p), getattr(expected[0][n], p))
            for n, f in factors.items()
            for p in ("u", "delta")
        ]
        assert {x.dtype for x in (*(part for part, _ in parts), *losses.values(), *gradients)} == {
            torch.float32
        }
        return (
            [distance(*part) for part in parts],
            [abs(float((losses[role] - value).detach())) for role, value in expected[1].items()],
            [distance(*pair) for pair in zip(gradients, expected[2], strict=True)],
        )

    factors, losses, gradients = errors(half)
    assert 0 < max(factors) < 5 * rounding and max(losses) < 5 * rounding
    # The normaliser divides by small deviations, and ReLUs are near 0.
    assert 0 < max(gradients) < 80 * rounding
    assert min(*errors(another)[0], *errors(another)[2]) > 250 * rounding


def test_statistics_are_float64_and_the_optimisers_moments_float32():
    half, same = tiny_llama(dtype=torch.bfloat16), tiny_llama()
    same.model.load_state_dict(half.model.state_dict())
    mend, expected = (with_statistics(base, MEND(base.sites, hparams())) for base in (half, same))
    for key, moments in mend.moments.items():
        for part in ("u", "delta"):
            assert moments[part].mean.dtype == moments[part].m2.dtype == torch.float64
            assert 0 < distance(moments[part].m2, expected.moments[key][part].m2) < 5 * 2**-8
    optimiser = make_optimiser(mend, hparams())
    total_loss(one_step(half, mend)[1], hparams()).backward()
    optimiser.step()
    state = [value for kept in optimiser.state.values() for value in kept.values() if value.dim()]
    assert state and {value.dtype for value in (*state, *mend.parameters())} == {torch.float32}
