"""Many facts by Gauss–Newton steps on the MLPs of all blocks; every edit gets its own step size.

With L_e the negative log-likelihood of edit e's answer (sum over its tokens) a step makes the
change that takes every edit's loss to 0, to first order, and is least for the keys of other texts:

    min_ΔW Σ_l s_l tr(ΔW_l C_l ΔW_lᵀ)   so that   L_e + Σ_l ⟨∇_l L_e, ΔW_l⟩ = 0 for every e
    ΔW_l = −Σ_e a_e ∇_l L_e C_l⁻¹ / s_l
    (G + ridge · mean(diag G) · I) a = L,   G_ef = Σ_l ⟨∇_l L_e, ∇_l L_f C_l⁻¹⟩ / s_l

C_l = E[k kᵀ] are moments of the layer's inputs over a text, as in ROME (rome.py); s_l is the mean
square of ∂L/∂y over the step's tokens and the layer's outputs. This is a natural gradient in the
metric of K-FAC (Martens & Grosse, 2015, arXiv 1503.05671) with an isotropic output factor, and
MEND's form of update, Σ δ̃ ũᵀ, with ũ = C⁻¹ u and δ̃ = δ / s in place of what a hypernetwork makes.
With `output_factor` S_l⁻¹ stands for 1 / s_l: K-FAC's other factor, of the same text's predictions.
All blocks share the shift, as in MEMIT (Meng et al., 2023, arXiv 2210.07229).

Other rows of the same system (text_pool.py) are the edits in other wordings, for a change that is
solved for one prompt alone matches that prompt alone, and texts that should stay as they are. These
ask for what their loss has changed; their answer is the unedited model's argmax.
Axes: n texts, t tokens, i layer input, o layer output.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from ..data.examples import EditExample
from ..errors import HyperParamError
from ..evaluation.sequences import together
from ..hparams import MENDHyperParams
from ..mend.factors import FACTOR_BATCH, Factors, GradientFactors, factors_and_losses
from ..mend.losses import wide
from ..mend.updates import (
    LowRankUpdate,
    Updates,
    of_matrices,
    one_below_another,
    side_branches,
    unedited,
)
from ..mend.validation import forced
from ..models.base import BaseModel
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk
from .base import Baseline, down_projections, gradient_moments, key_moments
from .text_pool import TextPool

LATEST = 4  # of the latest edits of a sequence are read again with every new one, at least
PART = 32  # texts whose responses with later ones are found at a time
KEPT_ALONE = 2  # texts that an independent edit keeps: its update holds their tokens


class GaussNewton(Baseline):
    """Gauss–Newton editing of `sites` (default: every down-projection); C comes from `text`.

    Edits made at once are learned in mini-batches of `batch_size`, for at most `epochs`, until
    every loss is below `stop` (nats an answer). No step asks for more than `most` nats of an edit,
    and for half as many each time that the loss has risen. In a sequence (`remembering`)
    `reread` earlier edits are read with each new one, and the `rehearse` of them that the model
    holds least are learned again with it. `kept`, `reworded` and `passages` are those of a
    `TextPool` of the examples `keep`, which must not be edited, and of `text`; independent edits
    keep two texts each, and no passage.
    """

    needs_causal = True
    floor, most, stop = 0.02, 20.0, 0.5
    epochs, batch_size, rehearse, reread = 8, 32, 8, 32

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        text: str,
        *,
        sites: Sequence[str] | None = None,
        keep: Sequence[EditExample] = (),
        ridge: float = 0.05,
        kept: int = 16,
        reworded: int = 0,
        passages: int = 0,
        output_factor: bool = False,
    ) -> None:
        counts = {"kept": kept, "reworded": reworded, "passages": passages}
        settings = {"ridge": ridge, **counts}
        if output_factor:
            settings["output_factor"] = True
        super().__init__(base, hparams, "Gauss-Newton", settings)
        self.base = base.with_sites(sites or down_projections(base))
        self.ridge, self.output_factor = ridge, output_factor
        self.pool = TextPool(self.base, hparams, keep, text=text, **counts)
        self.memory: list[Tokens] | None = None  # edits of a sequence so far
        # Editors of other settings share C⁻¹.
        of = type(self).__name__, self.base.sites, self.floor, output_factor, text
        self.metric: dict[str, Any] = base.remembered(of, lambda: self._metric(text))

    def _metric(self, text: str) -> dict[str, Any]:
        """C⁻¹ (i, i), and S⁻¹ (o, o) if asked for, by site; a floor on eigenvalues of both."""
        dtype = torch.promote_types(self.base.dtype, torch.float32)
        moments = [key_moments(self.base, text, ridge=self.floor)]
        if self.output_factor:
            seed = self.hparams.seed
            moments.append(gradient_moments(self.base, text, ridge=self.floor, seed=seed))
        inverses: dict[str, Any] = {}
        for site in self.base.sites:
            found = (torch.linalg.inv(each[site.name]) for each in moments)
            inverses[site.name] = [inverse.to(self.base.device, dtype) for inverse in found]
        return inverses

    def remembering(self) -> "GaussNewton":
        """The same editor at the start of a sequence: it keeps its edits, and rehearses them."""
        editor = copy.copy(self)
        editor.memory = []
        return editor

    @torch.no_grad()
    def updates(
        self, texts: Sequence[Tokens], *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or one of all and what it rehearses."""
        trunk, seed = trunk or FrozenTrunk(self.base), self.hparams.seed
        if not at_once or (len(texts) == 1 and self.memory is None):
            draw, made = random.Random(seed), []
            for text in texts:
                others = self.pool.others([text], draw, most=KEPT_ALONE)
                made.append(self._learn(trunk, [text], draw, others=others))
            return one_below_another(made)
        draw = random.Random(f"{seed} {len(self.memory or ())}")
        rehearsed = self._weakest(trunk, draw) if self.memory else []
        if self.memory is not None:
            self.memory += texts
        return self._learn(trunk, [*texts, *rehearsed], draw)

    def _weakest(self, trunk: FrozenTrunk, draw: random.Random) -> list[Tokens]:
        """Of the latest edits and some drawn at random, those that the model holds least."""
        memory = self.memory or []
        latest, earlier = memory[-LATEST:], memory[:-LATEST]
        more = max(0, min(self.reread - len(latest), len(earlier)))
        chosen = [*latest, *draw.sample(earlier, more)]
        log_p = [sum(value.logp) for value in forced(trunk, [chosen], None)[0]]
        order = sorted(range(len(chosen)), key=log_p.__getitem__)
        return [chosen[k] for k in order[: self.rehearse]]

    def _learn(
        self,
        trunk: FrozenTrunk,
        texts: Sequence[Tokens],
        draw: random.Random,
        *,
        others: Sequence[Tokens] | None = None,
    ) -> Updates:
        """One update of all edits; `others` are kept (None: drawn anew for every step)."""
        made: Updates = {}
        for site in self.base.sites:
            u, delta = torch.zeros(1, 1, site.d_in), torch.zeros(1, 1, site.d_out)
            made[site.name] = LowRankUpdate(u.to(self.base.device), delta.to(self.base.device), 1.0)
        most, last = self.most, float("inf")
        for _ in range(self.epochs):
            order, epoch = list(texts), []
            if others is None:
                order = draw.sample(order, len(order))
            for at in range(0, len(order), self.batch_size):
                edits = order[at : at + self.batch_size]
                kept = self.pool.others(edits, draw) if others is None else others
                edits += self.pool.other_words(edits, draw)
                losses, step = self._step(trunk, edits, kept, made=made, most=most)
                epoch.append(losses)
                made = together(made, step)
            losses = torch.cat(epoch)
            if bool((losses < self.stop).all()):
                break
            # Ask for half as much where the loss has risen.
            if float(losses.mean()) > last:
                most /= 2
            last = float(losses.mean())
        return made

    def _step(
        self,
        trunk: FrozenTrunk,
        edits: Sequence[Tokens],
        others: Sequence[Tokens],
        *,
        made: Updates,
        most: float,
    ) -> tuple[Float[Tensor, " n"], Updates]:
        """The edits' losses with `made`, and one more update; none if all are learned."""
        # 1. Losses and gradients of all texts on the model as it is.
        before, kept = self._before(trunk, others)
        with side_branches(self.base, made):
            factors, losses = _in_passes(trunk, [*edits, *kept])
        learned = losses[: len(edits)]
        if bool((learned < self.stop).all()):
            return learned, {}
        # 2. What the step asks for: the edits' losses, and what the others' have changed.
        asked = torch.cat([learned.clamp(max=most), losses[len(edits) :] - before])
        # 3. Solve for the share a of each text's gradient.
        turned = {name: self._turned(name, f) for name, f in factors.items()}
        responses = self._responses(factors, turned, len(asked))
        ridge = self.ridge * responses.diagonal().mean() * torch.eye(len(asked)).to(responses)
        share = torch.linalg.solve(responses + ridge, asked.double())
        step: Updates = {}
        for name, f in factors.items():
            step[name] = self._change(name, turned[name], share[f.rows][:, None].to(f.delta))
        return learned, step

    def _turned(self, name: str, f: GradientFactors) -> GradientFactors:
        """The factors of ∇L C⁻¹ / s, or of S⁻¹ ∇L C⁻¹."""
        inverse, *of_outputs = self.metric[name]
        if of_outputs:
            return replace(f, u=f.u @ inverse, delta=f.delta @ of_outputs[0])
        scale = f.delta.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
        return replace(f, u=f.u @ inverse, delta=f.delta / scale)

    def _responses(self, factors: Factors, turned: Factors, count: int) -> Float[Tensor, "n n"]:
        """G in float64; it is symmetric, so each text meets those of later parts only."""
        total = torch.zeros(count, count, dtype=torch.float64, device=self.base.device)
        for name, f in factors.items():
            # Which text each token belongs to, and where each text's tokens begin.
            member = one_hot(f.rows, count).to(f.delta)
            begin = [0, *torch.bincount(f.rows, minlength=count).cumsum(0).tolist()]
            for first in range(0, count, PART):
                last = min(first + PART, count)
                some, later = slice(begin[first], begin[last]), slice(begin[first], None)
                by_token = turned[name].u[some] @ f.u[later].T
                by_token *= turned[name].delta[some] @ f.delta[later].T
                by_text = member[some, first:last].T @ by_token @ member[later, first:]
                total[first:last, first:] += by_text.double()
        return total.triu() + total.triu(1).T

    def _change(
        self, name: str, turned: GradientFactors, share: Float[Tensor, "t 1"]
    ) -> LowRankUpdate:
        """−Σ_e a_e ∇L_e C⁻¹ / s of a site; `share` is a of each token's text."""
        return LowRankUpdate(turned.u[None], (turned.delta * share)[None], -1.0)

    def _before(
        self, trunk: FrozenTrunk, texts: Sequence[Tokens]
    ) -> tuple[Float[Tensor, " n"], list[Tokens]]:
        """The texts with the unedited model's argmax as answer, and its losses on that."""
        if not texts:
            return torch.zeros(0, device=self.base.device), []
        batch = collate(texts, self.base.pad_id, self.base.device)
        with unedited(self.base):
            if trunk.split:  # they will be read again
                trunk.fill(texts)
            best, token = wide(trunk.before(texts, batch)).log_softmax(-1).max(-1)
        losses = best.new_zeros(len(texts)).index_add(0, batch.rows, -best)
        answers = token.split([len(text.scored) for text in texts])
        pairs = zip(texts, answers, strict=True)
        return losses, [replace(text, targets=tuple(ids.tolist())) for text, ids in pairs]


class CrispEdit(GaussNewton):
    """Gauss–Newton steps in directions of low curvature (Ikram et al., 2026, arXiv 2602.15823).

    The curvature of a text's loss is K-FAC's, A ⊗ S, with A = C and S of `gradient_moments`. Turned
    into their eigenvectors, a weight change Qᵀ_S ΔW Q_A has curvature σ_o λ_i at (o, i). The places
    of most curvature, which hold the share `spared` of it, stay as they are. Of all changes at the
    others, a step is the least. The paper descends with Adam in this space; here steps are solved.
    Raises HyperParamError unless 0 < spared < 1.
    """

    spared = 0.9

    def __init__(
        self, base: BaseModel, hparams: MENDHyperParams, text: str, **options: Any
    ) -> None:
        self.spared = options.pop("spared", self.spared)
        if not 0 < self.spared < 1:
            raise HyperParamError(f"spared must be between 0 and 1, got {self.spared}", "spared")
        super().__init__(base, hparams, text, **options)
        self.name, self.settings = "CrispEdit", {**self.settings, "spared": self.spared}

    def _metric(self, text: str) -> dict[str, Any]:
        """Q_S, Q_A, and where curvature is low (o, i), by site."""
        metric, dtype = {}, torch.promote_types(self.base.dtype, torch.float32)
        outputs = gradient_moments(self.base, text, seed=self.hparams.seed)
        for name, a in key_moments(self.base, text).items():
            (values_a, q_a), (values_s, q_s) = map(torch.linalg.eigh, (a, outputs[name]))
            curvature = torch.outer(values_s.clamp(min=0), values_a.clamp(min=0))
            most = curvature.flatten().sort(descending=True).values
            share = most.cumsum(0) / most.sum()
            least_spared = most[int((share < self.spared).sum())]
            turned = [q.to(self.base.device, dtype) for q in (q_s, q_a)]
            metric[name] = (*turned, (curvature < least_spared).to(self.base.device))
        return metric

    def _turned(self, name: str, f: GradientFactors) -> GradientFactors:
        q_s, q_a, _ = self.metric[name]
        return replace(f, u=f.u @ q_a, delta=f.delta @ q_s)

    def _responses(self, factors: Factors, turned: Factors, count: int) -> Float[Tensor, "n n"]:
        """G in float64: inner products of gradients at the places of low curvature."""
        total = torch.zeros(count, count, dtype=torch.float64, device=self.base.device)
        for name, f in factors.items():
            g, low = turned[name], self.metric[name][2]
            counts = torch.bincount(f.rows, minlength=count).tolist()
            parts = zip(g.delta.split(counts), g.u.split(counts), strict=True)
            at_low = torch.stack([(delta.T @ u)[low] for delta, u in parts])
            total = total + (at_low @ at_low.T).double()
        return total

    def _change(
        self, name: str, turned: GradientFactors, share: Float[Tensor, "t 1"]
    ) -> LowRankUpdate:
        """−Σ_e a_e ∇L_e at the places of low curvature."""
        q_s, q_a, low = self.metric[name]
        change = q_s @ ((turned.delta * share).T @ turned.u * low) @ q_a.T
        return of_matrices(-change[None])


def _in_passes(trunk: FrozenTrunk, texts: Sequence[Tokens]) -> tuple[Factors, Float[Tensor, " n"]]:
    """Factors and losses of all texts; the activations of `FACTOR_BATCH` take memory at a time."""
    parts: dict[str, list[GradientFactors]] = {}
    losses = []
    # Texts of about one length share a pass, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda k: len(texts[k].ids))
    for at in range(0, len(order), FACTOR_BATCH):
        places = order[at : at + FACTOR_BATCH]
        some = [texts[k] for k in places]
        factors, loss = factors_and_losses(trunk, some, reduction="sum")
        losses.append(loss)
        for name, f in factors.items():
            parts.setdefault(name, []).append(replace(f, rows=f.rows.new_tensor(places)[f.rows]))
    joined: Factors = {}
    for name, several in parts.items():
        columns = zip(*((f.u, f.delta, f.rows) for f in several), strict=True)
        u, delta, rows = map(torch.cat, columns)
        by_text = rows.argsort(stable=True)
        joined[name] = GradientFactors(u[by_text], delta[by_text], rows[by_text])
    place = torch.tensor(order).argsort()
    return joined, torch.cat(losses)[place.to(trunk.base.device)]
