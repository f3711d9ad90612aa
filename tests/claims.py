"""What several test files share: examples for the tiny models, and plain textbook MEND to compare with."""

import torch

from mendkit.data import EditExample, Probe
from mendkit.factors import capture_factors
from mendkit.mend import MEND
from mendkit.models import BaseModel
from mendkit.texts import edit_tokens
from mendkit.trunk import FrozenTrunk

EXAMPLES = tuple(
    EditExample(
        prompt=f"The capital of {subject} is",
        target_new=target,
        subject=subject,
        ground_truth=truth,
        paraphrases=(
            f"{subject} has its seat of government in",
            f"Q: What is the capital city of {subject}? A:",
        ),
        neighbours=(
            Probe(f"The capital of {other} is", answer),
            Probe(f"The main city of {other} is", answer),
        ),
        unrelated=(Probe("A good way to start the day is"), Probe("The chemical symbol of gold is", "Au")),
        relation="capital",
        id=f"capital-{i}",
    )
    for i, (subject, target, truth, other, answer) in enumerate(
        [
            ("France", "Lima", "Paris", "Spain", "Madrid"),
            ("the United Kingdom", "Rome", "London", "Peru", "Lima"),
            ("Japan", "New York City", "Tokyo", "Italy", "Rome"),
            ("Norway", "Bern", "Oslo", "Chad", "N'Djamena"),
            ("Chile", "Ankara", "Santiago", "Fiji", "Suva"),
        ]
    )
)


def with_statistics(base: BaseModel, mend: MEND) -> MEND:
    """`mend` with the normaliser's statistics of EXAMPLES."""
    texts = [edit_tokens(base, mend.hparams, example) for example in EXAMPLES]
    mend.warm_up([capture_factors(FrozenTrunk(base), texts)])
    return mend


def scrambled(mend: MEND, size: float = 0.05, seed: int = 3) -> MEND:
    """`mend` with noise on every parameter: an editor that is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mend.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return mend
