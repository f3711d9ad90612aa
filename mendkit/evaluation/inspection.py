"""Looking inside an edit: what each part of MEND does to the update, and what training changed.

A gradient and an update are both low-rank, A = c Σ_t δ_t u_tᵀ, so a dense matrix is needed only to
check that this form is right (`rank_rows`; section 3.1 of the paper):

    cos = ⟨−ΔW, ∇L⟩ / (‖ΔW‖ ‖∇L‖), with ⟨A, B⟩ and ‖A‖ of `LowRankUpdate`,
    singular values of A = those of c R_δ R_uᵀ, with δᵀ = Q_δ R_δ and uᵀ = Q_u R_u.

All in float64. Axes: b edits, t tokens, i layer input, o layer output, k singular values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..data.examples import EditExample
from ..hparams import MENDHyperParams
from ..mend.batches import ExampleTexts
from ..mend.distributed import Team
from ..mend.edit import Edit
from ..mend.editor import MENDEditor
from ..mend.factors import capture_factors, edit_factors
from ..mend.hypernetwork import MEND
from ..mend.losses import edit_nll
from ..mend.preparation import Preparation
from ..mend.updates import LowRankUpdate, Updates, padded
from ..mend.validation import validate
from ..models.base import BaseModel
from ..models.load import load_model
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk

ALL, SCORED = "gradient, all tokens", "gradient, scored tokens"
PER_FEATURE, WHITENED = "normalised per feature", "whitened keys"
SMALLEST = torch.finfo(torch.float64).tiny
START = {"init": "id_xavier", "update_sign": -1}  # identity initialisation


def open_editor(
    hparams: MENDHyperParams, examples: Sequence[EditExample], *, base: BaseModel | None = None
) -> MENDEditor:
    """The archive's editor, named "trained"; an "untrained" one where `archive` is null.

    That one is where training would begin with statistics of all `examples`: the control at
    identity initialisation. Loads the base model unless it is given.
    """
    if hparams.archive is not None:
        editor = MENDEditor.from_hparams(hparams, base=base)
        editor.name = "trained"
        return editor
    base = base.with_sites(hparams.inner_params) if base else load_model(hparams)
    every = {"stats_examples": len(examples), "stats_held_out": False, "release_trunk": False}
    h = hparams.replace(**START, **every)
    mend, _ = Preparation(base, h, examples, (), team=Team()).make({})
    return MENDEditor(base, mend.eval(), name="untrained")


def about(editor: MENDEditor) -> dict[str, str]:
    """The base model and the hypernetwork of `open_editor`, in words."""
    known = "trained"
    if editor.name == "untrained":
        known = "NONE: the control, at identity initialisation, never trained"
    return {"base model": editor.base.name, "hypernetwork": known}


def answer_tokens(base: BaseModel, example: EditExample) -> dict[str, str | None]:
    """An edit's `prompt`, its `new` and `old` answer, and the first token of each after the prompt.

    The tokens are `new_token` and `old_token`; None where there is no such answer.
    """
    answers = {"new": example.target_new, "old": example.ground_truth}
    found: dict[str, str | None] = {"prompt": example.prompt, **answers}
    for name, answer in answers.items():
        token = base.said(answer) if base.labels and answer else None
        if answer and not base.labels:
            text = base.tokenize(example.prompt, answer, prefix=example.target_prefix)
            token = str(base.tokenizer.decode([text.targets[0]]))
        found[f"{name}_token"] = token
    return found


def restarted(base: BaseModel, mend: MEND, **settings: Any) -> MEND:
    """`mend` before training: its statistics, fresh blocks (`init`), one step size (`edit_lr`)."""
    h = mend.hparams.replace(**START | settings)
    fresh = MEND(mend.sites, h).to(base.device)
    fresh.moments.load_state_dict(mend.moments.state_dict())
    return fresh.eval()


def stages(base: BaseModel, mend: MEND, texts: Sequence[Tokens]) -> dict[str, MEND]:
    """Untrained editors from the plain gradient step to `mend`'s start, one difference at a time.

    `texts` give the per-feature statistics where `mend` has others.
    """
    h = mend.hparams
    out = {ALL: _untrained(base, h, (), edit_tokens="all")}
    if h.edit_tokens == "scored":
        out[SCORED] = _untrained(base, h, ())
    whitened = h.norm and (h.whiten, h.whiten_values) != (None, None)
    out[PER_FEATURE] = restarted(base, mend)
    if whitened or not h.norm:
        out[PER_FEATURE] = _untrained(base, h, texts)
    if whitened:
        out[WHITENED] = restarted(base, mend)
    return out


def _untrained(
    base: BaseModel, h: MENDHyperParams, texts: Sequence[Tokens], **settings: Any
) -> MEND:
    """MEND at identity initialisation, with per-feature statistics of `texts`, if there are any."""
    plain = {"whiten": None, "whiten_pairs": False, "unit_response": False, "archive": None}
    h = h.replace(norm=bool(texts), whiten_values=None, **START, **plain | settings)
    mend = MEND(base.sites, h).to(base.device)
    if texts:
        mend.warm_up([edit_factors(FrozenTrunk(base), h, texts)])
    return mend.eval()


# ------------------------------------------------------------------ the gradient and its rank


def weight_gradients(base: BaseModel, text: Tokens) -> dict[str, Tensor]:
    """autograd's dL/dW (o, i) of every site: the dense matrices that MEND never forms."""
    weights = [base.site_weight(site) for site in base.sites]
    batch = collate([text], base.pad_id, base.device)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            logits = FrozenTrunk(base).suffix([text], batch)
            loss = edit_nll(logits, batch.targets, batch.rows, 1).sum()
            gradients = torch.autograd.grad(loss, weights)
    finally:
        base.model.requires_grad_(False)  # frozen, as it was
    out = {}
    for site, gradient in zip(base.sites, gradients, strict=True):
        out[site.name] = gradient.T if site.transposed else gradient
    return out


def rank_rows(base: BaseModel, texts: Sequence[Tokens]) -> list[dict[str, Any]]:
    """A row for every text and site: is ∇L the sum of its rank-one terms?

    `error` is ‖Σ_t δ_t u_tᵀ − ∇L‖_F / ‖∇L‖_F, `scored_error` that of the scored tokens alone;
    besides the numerical `rank` of ∇L, the number of `tokens`, and the `full_rank`.
    """
    rows, trunk = [], FrozenTrunk(base)
    for k, text in enumerate(texts):
        every = capture_factors(trunk, [text])
        scored = capture_factors(trunk, [text], tokens="scored")
        for site, dense in weight_gradients(base, text).items():
            row = {"example": k, "site": site, "tokens": len(every[site].u)}
            row["full_rank"] = min(dense.shape)
            row["rank"] = int(torch.linalg.matrix_rank(dense.to(every[site].u.dtype)))
            for name, factors in (("error", every), ("scored_error", scored)):
                # In float64: not the product that autograd forms.
                terms = factors[site].delta.double().T @ factors[site].u.double()
                row[name] = float((terms - dense).norm() / dense.norm())
            rows.append(row)
    return rows


def true_gradients(trunk: FrozenTrunk, texts: Sequence[Tokens], *, reduction: str) -> Updates:
    """The true ∇L of every text and site, from all its tokens, as low-rank matrices."""
    out, count = {}, len(texts)
    for name, f in capture_factors(trunk, texts, reduction=reduction).items():
        u, delta = padded(f.u, f.rows, count), padded(f.delta, f.rows, count)
        out[name] = LowRankUpdate(u, delta, 1.0)
    return out


# -------------------------------------------------------------------------- what updates are like


@torch.no_grad()
def updates_of(trunk: FrozenTrunk, mend: MEND, texts: Sequence[Tokens]) -> Updates:
    """`mend`'s updates of independent edits, one per text."""
    return mend(edit_factors(trunk, mend.hparams, texts), len(texts))


def anatomy(
    base: BaseModel, updates: Mapping[str, Updates], gradient: Updates
) -> list[dict[str, Any]]:
    """A row per editor (`series`), site and edit.

    `cosine` of −ΔW with ∇L, `step` = ‖ΔW‖ / ‖∇L‖, `norm` = ‖ΔW‖ / ‖W‖.
    """
    rows = []
    for series, by_site in updates.items():
        for site in base.sites:
            update, true = by_site[site.name], gradient[site.name]
            size, slope = update.norms(), true.norms()
            cosine = -update.inner(true) / (size * slope).clamp(min=SMALLEST)
            columns = cosine, size / slope, size / base.site_weight(site).double().norm()
            for k, values in enumerate(torch.stack(columns, 1).tolist()):
                row = {"series": series, "site": site.name, "example": k}
                rows.append(row | dict(zip(("cosine", "step", "norm"), values, strict=True)))
    return rows


def energy_spectra(updates: Mapping[str, Updates], *, most: int = 8) -> list[dict[str, Any]]:
    """Share of ‖ΔW‖² in the first k = 1 … `most` singular directions, mean over edits and sites."""
    rows = []
    for series, by_site in updates.items():
        shares = []
        for update in by_site.values():
            share = normalize(update.singular_values(), dim=1) ** 2
            shares.append(pad(share, (0, most))[:, :most])
        for k, mean in enumerate(torch.cat(shares).cumsum(1).mean(0).tolist()):
            rows.append({"series": series, "directions": k + 1, "share": mean})
    return rows


def weight_change(edit: Edit) -> pd.DataFrame:
    """A row a site: ΔW's tokens, ‖ΔW‖, ‖ΔW‖ / ‖W‖, and the `share` of its first direction."""
    relative, rows = edit.relative_norm(), []
    for name, update in edit.updates.items():
        values = update.singular_values()[0]
        row = {"site": name, "tokens": update.u.shape[1], "norm": float(update.norms())}
        share = float(values[0] ** 2 / values.square().sum())
        rows.append(row | {"relative_norm": relative[name], "share": share})
    return pd.DataFrame(rows).set_index("site")


def sweep(
    trunk: FrozenTrunk, mend: MEND, examples: Sequence[ExampleTexts], *, sizes: Sequence[float]
) -> list[dict[str, float]]:
    """`validate` at step sizes that give an edit the mean relative norm ‖ΔW‖ / ‖W‖ of each `size`.

    The norms are over all sites. A negative size turns the sign round; 0 is the unedited model.
    """
    updates = updates_of(trunk, mend, [example.inner for example in examples])
    weights = [trunk.base.site_weight(site).double().norm() for site in mend.sites]
    norms = torch.stack([update.norms() for update in updates.values()])
    unit = float(norms.norm(dim=0).mean() / torch.stack(weights).norm())
    rows = []
    for size in sizes:
        found = validate(trunk, mend, examples, mend.hparams, strength=size / unit)
        rows.append({"size": size, "strength": size / unit, **found})
    return rows
