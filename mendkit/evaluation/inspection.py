"""Looking inside an edit: what each ingredient of MEND does to the update, and what training changed.

A gradient and an update are both low-rank, A = c Σ_t δ_t u_tᵀ, so no dense matrix is needed except in the check that
this form is right (`rank_rows`; section 3.1 of the paper):

    cos = ⟨−ΔW, ∇L⟩ / (‖ΔW‖ ‖∇L‖), with ⟨A, B⟩ and ‖A‖ of `LowRankUpdate`,
    singular values of A = those of |c| R_δ R_uᵀ, with δᵀ = Q_δ R_δ and uᵀ = Q_u R_u.

All in float64. Axes: b edits, t (s) tokens of an edit, i layer input, o layer output, k singular values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.examples import EditExample
from ..hparams import MENDHyperParams
from ..mend.batches import ExampleTexts, edit_tokens
from ..mend.editor import MENDEditor
from ..mend.factors import capture_factors
from ..mend.hypernetwork import MEND
from ..mend.losses import edit_nll
from ..mend.updates import LowRankUpdate, Updates, padded
from ..mend.validation import validate
from ..models.base import BaseModel
from ..models.load import load_model
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk

ALL, SCORED = "gradient, all tokens", "gradient, scored tokens"
PER_FEATURE, WHITENED = "normalised per feature", "whitened keys"
_PLAIN = {"whiten": None, "whiten_pairs": False, "unit_response": False}


def open_editor(
    hparams: MENDHyperParams, examples: Sequence[EditExample], /, *, base: BaseModel | None = None
) -> MENDEditor:
    """The archive's editor, named "trained"; where `archive` is null one at identity initialisation, named "untrained",
    with the paper's per-feature statistics of `examples` (`whiten` needs more examples than that). Loads the base model
    unless it is given."""
    if hparams.archive is not None:
        editor = MENDEditor.from_hparams(hparams, base=base)
        return MENDEditor(editor.base, editor.mend, name="trained", archive=editor.archive)
    base = base.with_sites(hparams.inner_params) if base else load_model(hparams)
    texts = [edit_tokens(base, hparams, example) for example in examples]
    return MENDEditor(base, _fresh(base, hparams, texts, norm=True), name="untrained")


def about(editor: MENDEditor) -> dict[str, str]:
    """The base model and the hypernetwork of `open_editor`, in words."""
    known = "trained"
    if editor.name == "untrained":
        known = "NONE: a MEND at identity initialisation, per-feature statistics, never trained"
    return {"base model": editor.base.name, "hypernetwork": known}


def answer_tokens(base: BaseModel, example: EditExample) -> dict[str, str | None]:
    """An edit's `prompt`, its `new` and `old` answer, and the first token of each after the prompt.

    The tokens are `new_token` and `old_token`; None where there is no such answer.
    """

    def first(answer: str | None) -> str | None:
        if not answer:
            return None
        if base.labels:
            return base.said(answer)
        return base.tokenizer.decode([base.tokenize(example.prompt, answer).targets[0]])

    return {
        "prompt": example.prompt,
        "new": example.target_new,
        "old": example.ground_truth,
        "new_token": first(example.target_new),
        "old_token": first(example.ground_truth),
    }


def restarted(base: BaseModel, mend: MEND, /, *, init: str = "id_xavier") -> MEND:
    """`mend` before training: its statistics, fresh blocks, one step size."""
    fresh = MEND(mend.sites, mend.hparams.replace(init=init, update_sign=-1)).to(base.device)
    fresh.moments.load_state_dict(mend.moments.state_dict())
    return fresh


def stages(base: BaseModel, mend: MEND, texts: Sequence[Tokens], /) -> dict[str, MEND]:
    """Untrained editors on the way from the plain gradient step to `mend`'s start, one difference at a time.

    `texts` give the per-feature statistics where `mend` has others.
    """
    h = mend.hparams
    out = {ALL: _fresh(base, h.replace(edit_tokens="all", **_PLAIN), texts, norm=False)}
    if h.edit_tokens == "scored":
        out[SCORED] = _fresh(base, h, texts, norm=False)
    if h.norm and h.whiten is None:
        return out | {PER_FEATURE: restarted(base, mend)}
    out[PER_FEATURE] = _fresh(base, h, texts, norm=True)
    return out | ({WHITENED: restarted(base, mend)} if h.norm else {})


def _fresh(base: BaseModel, h: MENDHyperParams, texts: Sequence[Tokens], /, *, norm: bool) -> MEND:
    """MEND at identity initialisation, without a normaliser or with per-feature statistics of `texts`."""
    h = h.replace(**_PLAIN, norm=norm, init="id_xavier", update_sign=-1, archive=None)
    mend = MEND(base.sites, h).to(base.device)
    if norm:
        mend.warm_up(
            [
                capture_factors(
                    FrozenTrunk(base), texts, tokens=h.edit_tokens, reduction=h.loss_reduction
                )
            ]
        )
    return mend.eval()


def weight_gradients(
    base: BaseModel, text: Tokens, /, *, reduction: str = "edit"
) -> dict[str, Tensor]:
    """autograd's dL/dW (o, i) of every site for one text: the dense matrices that MEND never forms."""
    weights = {site.name: base.site_weight(site) for site in base.sites}
    batch = collate([text], base.pad_id, base.device)
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            loss = edit_nll(
                FrozenTrunk(base).suffix([text], batch), batch.targets, batch.rows, 1
            ).sum()
            loss = loss * len(text.targets) if reduction == "sum" else loss
            gradients = torch.autograd.grad(loss, list(weights.values()))
    finally:
        base.model.requires_grad_(False)  # frozen, as it was
    return {
        s.name: (g.T if s.transposed else g) for s, g in zip(base.sites, gradients, strict=True)
    }


def rank_rows(
    base: BaseModel, texts: Sequence[Tokens], /, *, reduction: str = "edit"
) -> list[dict[str, Any]]:
    """For every text and site: ‖Σ_t δ_t u_tᵀ − ∇L‖_F / ‖∇L‖_F (`error`), the numerical rank of ∇L, the number of
    tokens; `scored_error` is the error of the sum over the scored tokens only (`edit_tokens: scored`)."""
    rows, trunk = [], FrozenTrunk(base)
    for k, text in enumerate(texts):
        every, scored = (
            capture_factors(trunk, [text], tokens=t, reduction=reduction) for t in ("all", "scored")
        )
        for site, dense in weight_gradients(base, text, reduction=reduction).items():
            own = {"tokens": len(every[site].u), "full_rank": min(dense.shape)}
            own["rank"] = int(torch.linalg.matrix_rank(dense.to(every[site].u.dtype)))
            for name, factors in (("error", every), ("scored_error", scored)):
                terms = (
                    factors[site].delta.double().T @ factors[site].u.double()
                )  # not the product that autograd forms
                own[name] = float((terms - dense).norm() / dense.norm())
            rows.append({"example": k, "site": site, **own})
    return rows


def cosines(a: LowRankUpdate, b: LowRankUpdate, /) -> Float[Tensor, " b"]:
    """cos(A, B) of every edit; 0 where one of them is 0."""
    size = a.norms() * b.norms()
    return torch.where(size > 0, a.inner(b) / size, 0.0)


def singular_values(a: LowRankUpdate, /) -> Float[Tensor, "b k"]:
    """Singular values of every edit's A, descending, k = min(t, i, o)."""
    small_u, small_delta = (torch.linalg.qr(x.double().transpose(1, 2)).R for x in (a.u, a.delta))
    return torch.linalg.svdvals(small_delta @ small_u.transpose(1, 2)) * abs(float(a.coefficient))


def gradients(trunk: FrozenTrunk, texts: Sequence[Tokens], /, *, reduction: str) -> Updates:
    """The true ∇L of every text and site, from all its tokens, as low-rank matrices."""
    factors, n = capture_factors(trunk, texts, reduction=reduction), len(texts)
    return {
        name: LowRankUpdate(padded(f.u, f.rows, n), padded(f.delta, f.rows, n), 1.0)
        for name, f in factors.items()
    }


@torch.no_grad()
def updates_of(trunk: FrozenTrunk, mend: MEND, texts: Sequence[Tokens], /) -> Updates:
    """`mend`'s updates of independent edits, one per text."""
    h = mend.hparams
    factors = capture_factors(trunk, texts, tokens=h.edit_tokens, reduction=h.loss_reduction)
    return {
        name: LowRankUpdate(u.u, u.delta, float(u.coefficient))
        for name, u in mend(factors, len(texts)).items()
    }


def anatomy(
    base: BaseModel, updates: Mapping[str, Updates], gradient: Updates, /
) -> list[dict[str, Any]]:
    """A row per editor (`series`), site and edit: cosine of −ΔW with ∇L, ‖ΔW‖ / ‖∇L‖ (`step`), ‖ΔW‖ / ‖W‖ (`norm`)."""
    rows = []
    for series, own in updates.items():
        for site in base.sites:
            update, true = own[site.name], gradient[site.name]
            size, weight = update.norms(), float(base.site_weight(site).double().norm())
            values = {
                "cosine": -cosines(update, true),
                "step": size / true.norms(),
                "norm": size / weight,
            }
            for k in range(len(size)):
                numbers = {name: float(value[k]) for name, value in values.items()}
                rows.append({"series": series, "site": site.name, "example": k, **numbers})
    return rows


def spectra(updates: Mapping[str, Updates], /, *, most: int = 8) -> list[dict[str, Any]]:
    """Mean over edits and sites of the share of ‖ΔW‖² in the first k = 1 … `most` singular directions, per editor."""
    rows = []
    for series, own in updates.items():
        shares = [
            torch.nn.functional.normalize(singular_values(update), dim=1) ** 2
            for update in own.values()
        ]
        equal = torch.cat([torch.nn.functional.pad(share, (0, most))[:, :most] for share in shares])
        means = equal.cumsum(1).mean(0)
        rows += [
            {"series": series, "directions": k + 1, "share": float(x)} for k, x in enumerate(means)
        ]
    return rows


def sweep(
    trunk: FrozenTrunk, mend: MEND, examples: Sequence[ExampleTexts], /, *, sizes: Sequence[float]
) -> list[dict[str, Any]]:
    """`validate` at step sizes that give an edit the mean relative norm ‖ΔW‖ / ‖W‖ (over all sites) of each of `sizes`.

    A negative size turns the update's sign round, 0 is the unedited model.
    """
    updates = updates_of(trunk, mend, [example.edit for example in examples])
    weight = (
        sum(float(trunk.base.site_weight(site).double().norm()) ** 2 for site in mend.sites) ** 0.5
    )
    unit = float(sum(update.norms() ** 2 for update in updates.values()).sqrt().mean()) / weight
    pairs, h = [(size, size / unit) for size in sizes], mend.hparams
    return [
        {"size": r, "strength": s, **validate(trunk, mend, examples, h, strength=s)}
        for r, s in pairs
    ]
