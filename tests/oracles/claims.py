"""What several test files share: examples for the tiny models, and a plain textbook MEND."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mendkit.data.examples import EditExample, Probe
from mendkit.hparams import MENDHyperParams
from mendkit.mend.batches import edit_tokens, prepare_texts, role_weights
from mendkit.mend.editor import MENDEditor
from mendkit.mend.factors import capture_factors
from mendkit.mend.hypernetwork import MEND
from mendkit.models.base import BaseModel
from mendkit.models.tokens import Tokens
from mendkit.models.trunk import FrozenTrunk

LABELLED = tuple(
    EditExample(
        prompt=f"{city} is the capital of {place}",
        target_new=label,
        subject=place,
        ground_truth="SUPPORTS" if label == "REFUTES" else "REFUTES",
        paraphrases=(
            f"{place} is governed from {city}",
            f"The seat of government of {place} is {city}",
        ),
        neighbours=(Probe(f"{city} is the capital of {other}", "refutes"),),
        unrelated=(Probe("Gold is a metal"), Probe("Water is dry", "false")),
        relation="capital",
        id=f"claim-{i}",
    )
    for i, (city, place, label, other) in enumerate(
        [
            ("Lima", "France", "SUPPORTS", "Spain"),
            ("Rome", "the United Kingdom", "REFUTES", "Peru"),
            ("Tokyo", "Japan", "SUPPORTS", "Italy"),
            ("Oslo", "Chad", "REFUTES", "Norway"),
        ]
    )
)
"""Claims for a classifier."""


def plain_logits(
    base: BaseModel, text: Tokens, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """(scored positions, vocabulary or classes) of one text, unpadded, from the whole model."""
    inputs = {"input_ids": torch.tensor([text.ids])}
    if text.decoder:
        inputs["decoder_input_ids"] = torch.tensor([text.decoder])
    logits = torch.func.functional_call(base.model, dict(weights or {}), (), inputs).logits
    if logits.dim() == 3:
        return logits[0, list(text.scored)]
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def assert_factors_rebuild_the_gradient(
    base: BaseModel, texts: Sequence[Tokens], rtol: float, atol: float
) -> None:
    """Factors against autograd on the weights; `atol` in units of the largest gradient."""
    factors, weights = capture_factors(FrozenTrunk(base), texts), {}
    for site in base.sites:
        weights[site.name] = base.site_module(site).weight.detach().requires_grad_()
    targets = [torch.tensor(text.targets) for text in texts]
    read = [plain_logits(base, text, weights) for text in texts]
    loss = sum(map(torch.nn.functional.cross_entropy, read, targets))
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for site, gradient in zip(base.sites, gradients, strict=True):
        gradient, f = gradient.T if site.transposed else gradient, factors[site.name]
        largest = float(gradient.abs().max())
        assert largest > 0
        torch.testing.assert_close(f.weight_gradient(), gradient, rtol=rtol, atol=atol * largest)
        assert (f.delta != 0).any(1).all()  # and no token is there for nothing


def losses_of(base, rows, weights, h):
    """The weighted losses of some edits' texts under dense weights, from the definition."""
    by_role = {}
    for row in rows:
        for role, text in row:
            if role == "passages":  # it makes the edit
                continue
            logp = plain_logits(base, text, weights).log_softmax(-1)
            if role in ("edit", "paraphrases", "consequences"):
                loss = -logp[range(len(text.targets)), list(text.targets)].mean()
            else:
                before = plain_logits(base, text).log_softmax(-1)
                loss = (before.exp() * (before - logp)).sum(-1).mean()
            by_role.setdefault(role, []).append(loss)
    weight_of = role_weights(h)
    return sum(weight_of[role] * sum(losses) / len(losses) for role, losses in by_role.items())


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
        unrelated=(
            Probe("A good way to start the day is"),
            Probe("The chemical symbol of gold is", "Au"),
        ),
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


def examples_of(base: BaseModel) -> tuple[EditExample, ...]:
    """Examples that suit the family; labels in the model's words for three classes."""
    if base.labels is None:
        return EXAMPLES
    if len(base.labels.names) == 2:
        return LABELLED
    unrelated = LABELLED[0].unrelated[:1]
    return tuple(replace(e, target_new=e.target_new.lower(), unrelated=unrelated) for e in LABELLED)


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
            parameter.add_(
                size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            )
    return mend


def hparams(**changes) -> MENDHyperParams:
    """Settings for the tiny models."""
    return MENDHyperParams(model_name="tiny", rank=8, **changes)


def quick(**changes) -> MENDHyperParams:
    """Settings of a training of three steps."""
    return hparams(max_iters=3, val_interval=2, batch_size=2, log_interval=1, **changes)


def editor_for(base: BaseModel, **changes) -> MENDEditor:
    """An editor that is not the identity, in the model's precision."""
    mend = MEND(base.sites, hparams(edit_lr=1e-3, **changes))
    if base.dtype == torch.float64:
        mend = mend.double()
    return MENDEditor(base, scrambled(with_statistics(base, mend)))


def logits(base: BaseModel, prompt: str = EXAMPLES[0].prompt) -> torch.Tensor:
    """(1, tokens, vocabulary) of a prompt, read by the whole model."""
    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        return base.model(input_ids=ids, use_cache=False).logits


def every_text(base: BaseModel) -> list[Tokens]:
    """Every text of EXAMPLES."""
    return [text for example in prepare_texts(base, hparams(), EXAMPLES) for text in example.all()]
