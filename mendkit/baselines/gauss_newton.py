"""Many facts by Gauss–Newton steps on the MLPs of all blocks: no hypernetwork, and a step size for each edit.

With L_e the negative log-likelihood of edit e's answer (sum over its tokens) a step makes the change that takes every
edit's loss to 0, to first order, and is least for the keys of other texts:

    min_ΔW Σ_l s_l tr(ΔW_l C_l ΔW_lᵀ)   so that   L_e + Σ_l ⟨∇_l L_e, ΔW_l⟩ = 0 for every e
    ΔW_l = −Σ_e a_e ∇_l L_e C_l⁻¹ / s_l
    (G + ridge · mean(diag G) · I) a = L,   G_ef = Σ_l ⟨∇_l L_e, ∇_l L_f C_l⁻¹⟩ / s_l

C_l = E[k kᵀ] are moments of the layer's inputs over a text, as in ROME (rome.py); s_l is the mean square of ∂L/∂y over
the step's tokens and the layer's outputs. This is a natural gradient in the metric of K-FAC (Martens & Grosse, 2015,
arXiv 1503.05671) with an isotropic output factor, and MEND's own form of update, Σ δ̃ ũᵀ, with ũ = C⁻¹ u and δ̃ = δ / s
in place of what a hypernetwork makes. All blocks share the shift, as in MEMIT (Meng et al., 2023, arXiv 2210.07229).

Texts that should stay as they are take part as rows of the same system, which ask for what their loss has changed.
They are other texts and an edit's own prompt about another subject; what they say is the unedited model's own argmax.
Axes: n texts, g groups (edits solved for by themselves), t tokens, i layer input, o layer output.
"""

import random
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.examples import EditExample
from ..errors import HyperParamError, ModelError
from ..evaluation.many import one_below_another, together
from ..hparams import MENDHyperParams
from ..mend.batches import prepare_texts
from ..mend.factors import Factors, factors_and_losses
from ..mend.losses import mean_by_row, wide
from ..mend.scoring import forced
from ..mend.updates import LowRankUpdate, Updates, padded, side_branches, side_by_side, unedited
from ..models.base import BaseModel
from ..models.families import CAUSAL
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk
from .base import Baseline, down_projections
from .rome import key_moments

LATEST = 4
"""How many of the latest edits of a sequence are read again with every new one, at least."""

KEPT_ALONE = 2
"""How many texts an independent edit keeps: its update holds their tokens."""

TINY = torch.finfo(torch.float32).tiny


class _Pace:
    """How many nats a step asks for at most: half as many whenever the loss of a group has risen."""

    def __init__(self, most: float, groups: int) -> None:
        self.most, self.last = torch.full((groups,), float(most)), torch.full((groups,), torch.inf)

    def after(self, losses: Float[Tensor, " g"]) -> None:
        """Take note of the losses at the start of a step, or of an epoch of steps."""
        losses = losses.to(self.last)
        self.most = torch.where(losses > self.last, self.most / 2, self.most)
        self.last = losses


class GaussNewton(Baseline):
    """Gauss–Newton editing of `sites` (default: the down-projection of every block); C comes from `text`.

    Edits made at once are learned in mini-batches of `batch_size`, over and over for at most `epochs`, until every loss
    is below `stop` (nats an answer); no step asks for more than `most` nats of an edit, and for half as many each time
    that the loss has risen. In a sequence (`remembering`, as `evaluate` makes one) `reread` earlier edits are read with
    each new one, and the `rehearse` of them that the model holds least are learned again together with it. Besides,
    every step holds `kept` texts: half of them neighbours and unrelated prompts of the examples `keep`, which must not
    be edited, half prompts of the step's edits about the subject of such an example; independent edits hold two each.

    Raises ModelError for a model that is not causal, HyperParamError for a number out of range.
    """

    most_together = 16  # independent edits

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        text: str,
        /,
        *,
        sites: Sequence[str] | None = None,
        keep: Sequence[EditExample] = (),
        ridge: float = 0.05,
        floor: float = 0.02,
        most: float = 20.0,
        epochs: int = 8,
        batch_size: int = 32,
        kept: int = 16,
        rehearse: int = 8,
        reread: int = 32,
        stop: float = 0.5,
    ) -> None:
        if base.family != CAUSAL:
            raise ModelError(
                f"Gauss-Newton edits causal models, {base.name} is of another family; use another baseline"
            )
        if (
            min(ridge, floor, most, epochs, batch_size, stop) <= 0
            or min(kept, rehearse, reread) < 0
        ):
            raise HyperParamError(
                "ridge, floor, most, epochs, batch_size, stop must be positive, kept, rehearse, reread at least 0, got "
                f"{ridge}, {floor}, {most}, {epochs}, {batch_size}, {stop}, {kept}, {rehearse}, {reread}"
            )
        sites = down_projections(base) if sites is None else sites
        super().__init__(
            base.with_sites(sites), hparams, "Gauss-Newton", {"ridge": ridge, "kept": kept}
        )
        self.ridge, self.most, self.epochs, self.batch_size = ridge, most, epochs, batch_size
        self.kept, self.rehearse, self.reread, self.stop = kept, rehearse, reread, stop
        self.memory: list[Tokens] | None = None  # edits of a sequence so far
        names = tuple(site.name for site in self.base.sites)
        self.inverse: dict[str, Tensor] = (
            self.base.remembered(  # editors of other settings share them
                ("inverse key moments", names, floor, text), lambda: self._inverses(text, floor)
            )
        )
        texts = prepare_texts(base, hparams, keep) if kept else []
        self.held = [text for own in texts for text in (*own.neighbours, *own.unrelated)]
        self.subjects: dict[
            int, list[tuple[int, ...]]
        ] = {}  # by place: tokens of a name differ where a text begins
        for text in (own.edit for own in texts if own.edit.subject):
            self.subjects.setdefault(min(text.subject[0], 2), []).append(
                tuple(text.ids[p] for p in text.subject)
            )

    def _inverses(self, text: str, floor: float) -> dict[str, Float[Tensor, "i i"]]:
        """C⁻¹ by site, with a floor on C's eigenvalues."""
        out, dtype = {}, torch.promote_types(self.base.dtype, torch.float32)
        for name, moment in key_moments(self.base, self.hparams, text).items():
            c = moment.double()
            c = c + floor * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
            out[name] = torch.linalg.inv(c).to(self.base.device, dtype)
        return out

    def remembering(self) -> "GaussNewton":
        """The same editor at the start of a sequence: it keeps its edits' texts, and rehearses them."""
        editor = copy(self)
        editor.memory = []
        return editor

    @torch.no_grad()
    def updates(
        self, texts: Sequence[Tokens], /, *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or one of all (in a sequence with what is rehearsed)."""
        trunk = trunk or FrozenTrunk(self.base)
        if not at_once or (len(texts) == 1 and self.memory is None):
            return self._apart(trunk, texts)
        draw = random.Random(f"{self.hparams.seed} {len(self.memory or ())}")
        texts = list(texts)
        if self.memory is None:
            return self._breadth_first(trunk, texts, draw)
        rehearsed = self._weakest(trunk, draw) if self.memory else []
        self.memory += texts
        return self._breadth_first(trunk, [*texts, *rehearsed], draw)

    def _weakest(self, trunk: FrozenTrunk, draw: random.Random) -> list[Tokens]:
        """Of the latest edits and some drawn at random, `reread` in all, the `rehearse` that the model holds least."""
        latest, rest = self.memory[-LATEST:], self.memory[:-LATEST]
        own = [*latest, *draw.sample(rest, max(0, min(self.reread - len(latest), len(rest))))]
        held = [sum(value.logp) for value in forced(trunk, [own], None)[0]]
        return [own[k] for k in sorted(range(len(own)), key=held.__getitem__)[: self.rehearse]]

    def _breadth_first(
        self, trunk: FrozenTrunk, texts: Sequence[Tokens], draw: random.Random
    ) -> Updates:
        """One update of all edits."""
        made: Updates = {}
        pace = _Pace(self.most, 1)
        for _ in range(self.epochs):
            order, losses = draw.sample(list(texts), len(texts)), []
            for at in range(0, len(order), self.batch_size):
                own = order[at : at + self.batch_size]
                loss, step = self._step(
                    trunk, [own], [self._others(own, self.kept, draw)], made, pace.most
                )
                losses.append(loss[0])
                if step:
                    made = together(*([made] if made else []), step)
            every = torch.cat(losses)
            if bool((every < self.stop).all()):
                break
            pace.after(every.mean()[None])
        return made or self._nothing(1)

    def _apart(self, trunk: FrozenTrunk, texts: Sequence[Tokens]) -> Updates:
        """Updates of edits that know nothing of one another, each with texts of its own to keep."""
        parts, draw = [], random.Random(self.hparams.seed)
        for at in range(0, len(texts), self.most_together):
            own = texts[at : at + self.most_together]
            made, groups = (
                self._nothing(len(own)),
                [self._others([t], min(self.kept, KEPT_ALONE), draw) for t in own],
            )
            pace = _Pace(self.most, len(own))
            for _ in range(self.epochs):
                loss, step = self._step(trunk, [[text] for text in own], groups, made, pace.most)
                if not step:
                    break
                made = {name: side_by_side([made[name], u]) for name, u in step.items()}
                pace.after(loss[:, 0])
            parts.append(made)
        return {
            site.name: one_below_another([part[site.name] for part in parts])
            for site in self.base.sites
        }

    def _step(
        self,
        trunk: FrozenTrunk,
        edits: Sequence[Sequence[Tokens]],
        others: Sequence[Sequence[Tokens]],
        made: Updates,
        most: Float[Tensor, " g"],
    ) -> tuple[Float[Tensor, "g n"], Updates]:
        """The edits' losses with `made`, and one more update of each group, 0 for a group that has learned its edits;
        no update at all if every group has."""
        groups, size, count = len(edits), len(edits[0]), len(edits[0]) + len(others[0])
        before, others = self._before(trunk, others)
        flat = [text for own, kept in zip(edits, others, strict=True) for text in (*own, *kept)]
        with side_branches(self.base, made):
            factors, losses = factors_and_losses(trunk, flat, reduction="sum")
        asked = losses.view(groups, count).clone()
        losses = asked[:, :size].clone()
        going = (losses >= self.stop).any(1)
        if not bool(going.any()):
            return losses, {}
        asked[:, :size] = torch.minimum(losses, most.to(losses)[:, None])
        asked[:, size:] -= before
        responses, step = self._responses(factors, groups, count)
        ridge = self.ridge * responses.diagonal(dim1=1, dim2=2).mean(1)
        system = responses + torch.diag_embed(ridge[:, None].expand(-1, count))
        share = torch.linalg.solve(system, (asked * going[:, None]).double())  # a
        out = {}
        for name, update in step.items():
            rows = factors[name].rows
            scale = padded(share.flatten()[rows][:, None], rows // count, groups).to(update.delta)
            out[name] = replace(update, delta=update.delta * scale)
        return losses, out

    def _responses(
        self, factors: Factors, groups: int, count: int
    ) -> tuple[Float[Tensor, "g n n"], Updates]:
        """G of each group, in float64, and −∇L C⁻¹ / s as updates whose tokens are still to be weighed by a."""
        total, step = 0.0, {}
        for name, f in factors.items():
            s = mean_by_row(f.delta.square().mean(1), f.rows // count, groups).clamp(min=TINY)
            u, delta = f.u @ self.inverse[name], f.delta / s[f.rows // count, None]
            step[name] = LowRankUpdate(
                *(padded(x, f.rows // count, groups) for x in (u, delta)), -1.0
            )
            keys, gradients = (padded(x, f.rows // count, groups) for x in (f.u, f.delta))
            product = torch.bmm(keys, step[name].u.mT) * torch.bmm(gradients, step[name].delta.mT)
            member = torch.nn.functional.one_hot(f.rows % count, count).to(product)
            member = padded(
                member, f.rows // count, groups
            )  # which text of its group each token belongs to
            total = total + (member.mT @ product @ member).double()
        return (total + total.mT) / 2, step

    # --------------------------------------------------------------------------------------- what should stay

    def _others(self, edits: Sequence[Tokens], count: int, draw: random.Random) -> list[Tokens]:
        """Texts to keep, `count` of them if there are any: half the edits' own prompts about other subjects."""
        taken = {self.base.prompt_of(text).ids for text in edits}
        if not self.held:
            return []
        swapped = [self._about_another(draw.choice(edits), draw) for _ in range((count + 1) // 2)]
        swapped = [text for text in swapped if text is not None and text.ids not in taken]
        return [*swapped, *(draw.choice(self.held) for _ in range(count - len(swapped)))]

    def _about_another(self, text: Tokens, draw: random.Random) -> Tokens | None:
        """An edit's prompt with another subject in place of its own; None if it does not name its own in one piece, or
        no other is known."""
        place, prompt = text.subject, self.base.prompt_of(text).ids
        names = self.subjects.get(min(place[0], 2), ()) if place and place[-1] < len(prompt) else ()
        if not names or len(place) != place[-1] - place[0] + 1:
            return None
        ids = (*prompt[: place[0]], *draw.choice(names), *prompt[place[-1] + 1 :])
        return Tokens(ids, (len(ids) - 1,))

    def _before(
        self, trunk: FrozenTrunk, groups: Sequence[Sequence[Tokens]]
    ) -> tuple[Float[Tensor, "g n"], list[list[Tokens]]]:
        """The unedited model's loss on its own argmax at the scored positions of each text, and the texts with that."""
        flat = [text for own in groups for text in own]
        if not flat:
            return torch.zeros(len(groups), 0, device=self.base.device), [[] for _ in groups]
        batch = collate(flat, self.base.pad_id, self.base.device)
        with unedited(self.base):
            if trunk.split:  # they will be read again
                trunk.fill(flat)
            best, token = wide(trunk.before(flat, batch)).log_softmax(-1).max(-1)
        losses = best.new_zeros(len(flat)).index_add(0, batch.rows, -best)
        said = token.split([len(text.scored) for text in flat])
        told = iter(
            replace(text, targets=tuple(own.tolist())) for text, own in zip(flat, said, strict=True)
        )
        return losses.view(len(groups), -1), [[next(told) for _ in own] for own in groups]

    def _nothing(self, count: int) -> Updates:
        """Updates of weight 0."""
        shapes = {site.name: (site.d_in, site.d_out) for site in self.base.sites}
        zero = lambda width: torch.zeros(count, 1, width, device=self.base.device)  # noqa: E731
        return {name: LowRankUpdate(zero(i), zero(o), 1.0) for name, (i, o) in shapes.items()}
