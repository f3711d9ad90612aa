"""Controls: what an editor must beat to have learned something.

MEND at identity initialisation, editors that nothing is trained for, and the new fact put before
every prompt, which changes no weight.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.examples import EditExample
from ..errors import DataError, HyperParamError, LimitError, ModelError
from ..evaluation.inspection import restarted
from ..evaluation.metrics import Reading, first_token
from ..evaluation.prepare import EvaluationSet
from ..evaluation.results import EvaluationReport, summarise
from ..hparams import MENDHyperParams
from ..mend.batches import edit_tokens, prepare_texts, told
from ..mend.edit import Edit
from ..mend.editor import MENDEditor
from ..mend.factors import capture_factors, capture_inputs
from ..mend.hypernetwork import MEND
from ..mend.losses import wide
from ..mend.updates import Updates
from ..mend.validation import best_edit_lr, strength_curve
from ..models.base import BaseModel
from ..models.families import CAUSAL
from ..models.sites import mlp_names
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk, trunk_cache

# Tokens of text in a pass and in all, for second moments of keys.
KEY_WINDOW, KEY_TOKENS = 256, 16_384
# And for those of gradients, which take a backward pass.
GRADIENT_TOKENS = 4096
# Of SmolLM2; other models have them as many times as large as their best step is.
IDENTITY_EDIT_LRS = (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3)
# Edits on which other models' power of 2 is measured.
SCALE_EDITS = 10


class Baseline:
    """An editor that nothing is trained for. `settings` are what is chosen for it.

    Other numbers are attributes of the class. Raises HyperParamError for a number that is not
    positive, ModelError for a model that is not causal where it must be.
    """

    needs_causal = False

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        name: str,
        settings: Mapping[str, float | str],
    ) -> None:
        for key, value in settings.items():
            if isinstance(value, float) and value <= 0:
                raise HyperParamError(f"{key} of {name} must be positive, got {value}")
        if self.needs_causal and base.family != CAUSAL:
            raise ModelError(f"{name} edits causal models; {base.name} needs another baseline")
        self.base, self.name, self.settings = base, name, settings
        # What is for MEND alone.
        self.hparams = hparams.replace(lr_scale=1.0, edit_on="answer")

    def __repr__(self) -> str:
        return f"<{self.name} of {self.base.name}, {self.settings}>"

    def updates(
        self, texts: Sequence[Tokens], *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or one of all."""
        raise NotImplementedError

    def edit(self, examples: EditExample | Sequence[EditExample]) -> Edit:
        """One edit from one example, or one from several at once."""
        several = [examples] if isinstance(examples, EditExample) else list(examples)
        texts = [edit_tokens(self.base, self.hparams, example) for example in several]
        return Edit(self.base, self.updates(texts, at_once=True), several)


def identity_editor(base: BaseModel, mend: MEND, *, edit_lr: float) -> MENDEditor:
    """MEND without training: the normalised gradient with one step size, `mend`'s statistics."""
    return MENDEditor(base, restarted(base, mend, edit_lr=edit_lr), name="identity")


def identity_edit_lrs(
    base: BaseModel,
    mend: MEND,
    examples: Sequence[EditExample],
    trunk: FrozenTrunk | None = None,
) -> tuple[float, ...]:
    """Step sizes to try: `IDENTITY_EDIT_LRS` times the power of 2 that suits the model."""
    texts = prepare_texts(base, mend.hparams, examples[:SCALE_EDITS])
    unit = identity_editor(base, mend, edit_lr=1.0).mend
    highest = 1.5 * best_edit_lr(trunk or FrozenTrunk(base), unit, texts, mend.hparams)
    power = math.ceil(math.log2(highest / IDENTITY_EDIT_LRS[-1]))
    return tuple(edit_lr * 2.0**power for edit_lr in IDENTITY_EDIT_LRS)


def tune_identity(
    base: BaseModel,
    mend: MEND,
    examples: Sequence[EditExample],
    *,
    edit_lrs: Sequence[float] | None = None,
) -> tuple[MENDEditor, tuple[dict[str, float], ...]]:
    """The identity control at the step size with the best validation score on `examples`.

    And a row for each step size: `edit_lr` and the values of `validate`. Where none are given, the
    three largest of `identity_edit_lrs` are tried, then twice as large or half as large ones until
    the score falls on both sides.
    """
    h, unit = mend.hparams, identity_editor(base, mend, edit_lr=1.0)
    # Training leaves the states of the texts that it validates on.
    trunk = FrozenTrunk(base, cache=trunk_cache(base, h.cache_dir, limit=h.disk_cache_bytes))
    validate = partial(strength_curve, unit, examples, trunk=trunk)
    tried = edit_lrs or identity_edit_lrs(base, mend, examples, trunk)[-3:]
    curve = validate(strengths=tried)
    while edit_lrs is None:
        best = max(curve, key=lambda row: row["score"])
        if best is curve[-1]:
            curve += validate(strengths=[2 * best["strength"]])
        elif best is curve[0] and best["score"]:
            curve = validate(strengths=[best["strength"] / 2]) + curve
        else:
            break
    rows = [{"edit_lr": row.pop("strength"), **row} for row in curve]
    best = max(rows, key=lambda row: row["score"])
    return identity_editor(base, mend, edit_lr=best["edit_lr"]), tuple(rows)


def fact_in_context(on: EvaluationSet) -> EvaluationReport:
    """The control that edits nothing: every prompt is read with the new fact before it.

    Success, paraphrases and neighbours' answers are what the unedited model makes of that;
    agreement is with what it says without the fact. Raises LimitError if a prompt gets too long.
    """
    start = time.perf_counter()
    examples = [*map(_with_fact, on.examples)]
    limit, follow = on.max_new_tokens, on.follow
    context = EvaluationSet(on.base, on.hparams, examples, max_new_tokens=limit, follow=follow)
    if len(context) != len(on):
        raise LimitError(f"with the fact before it: {context.skipped[0]}")
    read = []
    for i in on.to_edit:
        pairs = zip(context.read_before[i], on.read_before[i], strict=False)  # none is reworded
        read.append([_compared(with_fact, without) for with_fact, without in pairs])
    rows = on.rows_of(read, on.to_edit)
    counts = {"scored": len(rows), "already_true": len(on) - len(rows), "skipped": len(on.skipped)}
    return EvaluationReport(
        editor="fact in context",
        mode="single",
        rows=tuple(rows),
        summary=summarise(rows),
        counts=counts,
        seconds=time.perf_counter() - start,
    )


def _compared(with_fact: Reading, without: Reading) -> Reading:
    """A reading with the fact; its argmaxes are compared with those without."""
    same = map(int.__eq__, with_fact.text.argmax, without.text.argmax)
    return replace(with_fact, text=replace(with_fact.text, same=tuple(same)), greedy=None)


def _with_fact(example: EditExample) -> EditExample:
    """The example with the new fact before each of its prompts."""
    changed: dict[str, Any] = {}
    for role in ("neighbours", "unrelated", "consequences", "truths"):
        probes = getattr(example, role)
        changed[role] = tuple(replace(each, prompt=told(example, each.prompt)) for each in probes)
    for role in ("paraphrases", "negations"):
        changed[role] = tuple(told(example, prompt) for prompt in getattr(example, role))
    changed |= {"relation": None, "portability": (), "generation_prompts": ()}
    return replace(example, prompt=told(example, example.prompt), **changed)


def down_projections(base: BaseModel) -> list[str]:
    """The weight by which each block's MLP writes to the residual stream, lowest block first.

    Raises ModelError if the blocks have none, or several (experts).
    """
    sites = base.with_sites(mlp_names(base.model, everywhere=True)).sites
    width = base.model.get_input_embeddings().weight.shape[1]
    found = [site for site in sites if site.d_out == width != site.d_in]
    if not found or len({site.block for site in found}) != len(found):
        raise ModelError(
            f"{base.name}: no single down-projection in each block; leave this baseline out"
        )
    return [site.name for site in found]


def gradient_moments(
    base: BaseModel, text: str, *, ridge: float = 0.0, seed: int = 0
) -> dict[str, Tensor]:
    """S = E[δ δᵀ] (o, o) of δ = ∂L/∂y at every site's outputs y, over the first tokens of `text`.

    L is the NLL of tokens drawn from the model, which makes S the output factor of K-FAC's Fisher
    (Martens & Grosse, 2015, arXiv 1503.05671). `ridge`, dtype and DataError as for `key_moments`.
    """
    trunk, drawing = FrozenTrunk(base), torch.Generator(base.device).manual_seed(seed)
    sums: dict[str, Any] = {}
    count = 0
    for window in text_windows(base, text, GRADIENT_TOKENS):
        logits = trunk.suffix([window], collate([window], base.pad_id, base.device))
        drawn = torch.multinomial(wide(logits).softmax(-1), 1, generator=drawing)[:, 0]
        told = replace(window, targets=tuple(drawn.tolist()))
        for name, f in capture_factors(trunk, [told], reduction="sum").items():
            delta = f.delta.double()
            sums[name] = sums.get(name, 0.0) + (delta.T @ delta).cpu()
        count += len(told.targets)
    return {name: _with_ridge(total / count, ridge) for name, total in sums.items()}


def text_windows(
    base: BaseModel, text: str, most: int | None = None, *, size: int = KEY_WINDOW
) -> Iterator[Tokens]:
    """The first `most` tokens of a text in windows of `size`, every position scored."""
    ids = base.encode(text)[:most]
    if not ids:
        raise DataError("the text for the keys' covariance has no token; give a longer one")
    begin = first_token(base)
    for at in range(0, len(ids), size):
        window = (*begin, *ids[at : at + size])
        yield Tokens(window, tuple(range(len(begin), len(window))))


def key_moments(base: BaseModel, text: str, *, ridge: float = 0.0) -> dict[str, Tensor]:
    """C = E[k kᵀ] (i, i) of the inputs k of every site over the first tokens of `text`.

    In float64, plus `ridge` times the mean of C's diagonal on it. Raises DataError for a text
    without tokens.
    """
    trunk, count = FrozenTrunk(base), 0
    sums: dict[str, Any] = {}
    for window in text_windows(base, text, KEY_TOKENS):
        for name, inputs in capture_inputs(trunk, [window]).items():
            k = wide(inputs)
            sums[name] = sums.get(name, 0.0) + (k.T @ k).cpu().double()
        count += len(window.scored)
    return {name: _with_ridge(total / count, ridge) for name, total in sums.items()}


def _with_ridge(moments: Tensor, ridge: float) -> Tensor:
    return moments + ridge * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)


def held_moments(base: BaseModel, text: str, *, ridge: float) -> dict[str, Tensor]:
    """`key_moments` that stay with the model; the text is read for the sites that lack theirs."""
    held = base.remembered(("key moments", ridge, text), dict)
    missing = [site.name for site in base.sites if site.name not in held]
    if missing:
        held |= key_moments(base.with_sites(missing), text, ridge=ridge)
    return {site.name: held[site.name] for site in base.sites}
