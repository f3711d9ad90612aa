"""ROME: one fact as one rank-one change of an MLP down-projection (Meng et al., 2022, section 3.1).

arXiv 2202.05262. The down-projection W is read as a memory of keys k and values v = W k. For an
edit, k* is the layer's input at the last token of the subject, averaged over contexts before the
prompt (equation 3), and v* = W k* + z with the z that minimises

    mean over contexts of NLL(y) + kl · KL(edited ‖ unedited | "{subject} is a")
        + decay · (‖z‖ / ‖W k*‖)²                                            (equation 4)

when added to the layer's output there. The least-squares solution that keeps W K = V and makes
W k* = v* is then

    ΔW = z (C⁻¹ k*)ᵀ / (k*ᵀ C⁻¹ k*),   C = E[k kᵀ] over a text               (equation 2)

Deviations: y ends with the end of text if `add_eos`; contexts are pieces of the text, one line
each, not samples from the model; z is measured in ‖W k*‖, so that one step size serves all layers;
`decay` is on its square; C has a ridge, for texts much shorter than Wikipedia.
Axes: n texts of an edit, i input, o output.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import DataError
from ..evaluation.metrics import first_token
from ..hparams import MENDHyperParams
from ..mend.losses import edit_nll, locality_kl, wide
from ..mend.updates import LowRankUpdate, Updates
from ..models.base import BaseModel
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk
from .base import Baseline, held_moments


class ROME(Baseline):
    """Rank-one editing of the weight `site`; C and the contexts come from `text`.

    Edits made at once are the sum of single ones. `clamp` bounds ‖z‖ / ‖W k*‖; an edit is done once
    its loss (equation 4) is below `stop`. When editing, raises DataError for a prompt that does not
    name its subject.
    """

    needs_causal = True
    lr, steps, stop = 1.5, 12, 0.1
    kl, decay, ridge, n_contexts = 0.0625, 5e-4, 1e-2, 2

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        text: str,
        *,
        site: str,
        clamp: float = 4.0,
    ) -> None:
        super().__init__(base, hparams, "ROME", {"site": site, "clamp": clamp})
        self.base, self.clamp = base.with_sites([site]), clamp
        self.site = self.base.sites[0]
        c = held_moments(self.base, text, ridge=self.ridge)[site]
        self.cholesky = torch.linalg.cholesky(c).to(base.device)
        self.contexts = ((), *self._contexts(text))
        self.start = len(first_token(base))  # where a context goes
        self.essence = tuple(base.encode(" is a"))

    def _contexts(self, text: str) -> list[tuple[int, ...]]:
        """Short pieces of the text, of different lengths, each ending with a new line."""
        words, generator = text.split(), torch.Generator().manual_seed(self.hparams.seed)
        size = (self.n_contexts,)
        starts = torch.randint(max(1, len(words) - 8), size, generator=generator).tolist()
        contexts = []
        for k, at in enumerate(starts):
            piece = " ".join(words[at : at + 3 + k % 4]) + ".\n"
            contexts.append(tuple(self.base.encode(piece)))
        return contexts

    def updates(
        self, texts: Sequence[Tokens], *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text: independent ones, also if made `at_once`.

        `trunk` is not used: texts with contexts have one of their own.
        """
        u, z = [], []
        for text in texts:
            key, change = self.key_and_change(text)
            solved = torch.cholesky_solve(key.double()[:, None], self.cholesky)[:, 0]
            u.append((solved / (solved @ key.double())).to(key))
            z.append(change)
        update = LowRankUpdate(torch.stack(u)[:, None], torch.stack(z)[:, None], 1.0)
        return {self.site.name: update}

    def key_and_change(self, text: Tokens) -> tuple[Float[Tensor, " i"], Float[Tensor, " o"]]:
        """k* and z of an edit. Raises DataError for a text that does not name its subject."""
        if not text.subject:
            prompt = self.base.tokenizer.decode(list(text.ids))
            raise DataError(
                f"ROME needs the subject, and {prompt!r} does not contain its example's "
                "`subject`; give examples that name it, or use another editor"
            )
        rows = [self.after(context, text) for context in self.contexts]
        rows.append(self._essence(text))
        trunk, layer = FrozenTrunk(self.base), self.base.site_module(self.site)
        trunk.fill(rows)
        batch = collate(rows, self.base.pad_id, self.base.device)
        places = [row.subject[-1] for row in rows]

        def read(z: Float[Tensor, " o"] | None) -> tuple[Tensor, Tensor, Tensor]:
            """Inputs at the subject, logits after the essence, NLL: all with z added."""
            with _shifted(layer, places, z) as inputs:
                logits = trunk.suffix(rows, batch)
            nll = edit_nll(logits, batch.targets, batch.rows, len(rows))
            return inputs[0][:-1], logits[-1:], nll[:-1].mean()

        # 1. k* and W k*, with the edits that are in force.
        with torch.no_grad():
            keys, before, _ = read(None)
            key = wide(keys).mean(0)
            v = wide(layer(key.to(self.base.dtype)[None, None])[0, 0])
        root = len(v) ** 0.5
        unit = v.norm() / root
        # 2. z = unit · w, by Adam on equation 4.
        w = torch.zeros_like(v).requires_grad_()
        optimiser = torch.optim.Adam([w], lr=self.lr)
        only = torch.zeros(1, dtype=torch.long, device=v.device)
        for _ in range(self.steps):
            with torch.enable_grad():
                _, after, nll = read(unit * w)
                kl = locality_kl(after, before, only, 1).sum()
                loss = nll + self.kl * kl + self.decay * (w**2).mean()
            if loss.item() < self.stop:
                break
            (w.grad,) = torch.autograd.grad(loss, w)
            optimiser.step()
            with torch.no_grad():
                w.copy_(w[None].renorm(2, 0, self.clamp * root)[0])
        return key, unit * w.detach()

    def after(self, context: Sequence[int], text: Tokens) -> Tokens:
        """An edit's text with a context before it."""
        scored = tuple(place + len(context) for place in text.scored)
        subject = tuple(place + len(context) for place in text.subject)
        ids = (*text.ids[: self.start], *context, *text.ids[self.start :])
        return replace(text, ids=ids, scored=scored, subject=subject)

    def _essence(self, text: Tokens) -> Tokens:
        """What the model says of the subject without the prompt."""
        named = tuple(text.ids[place] for place in text.subject)
        ids = text.ids[: self.start] + named + self.essence
        return Tokens(ids, (len(ids) - 1,), subject=(self.start + len(named) - 1,))


@contextmanager
def _shifted(
    layer: nn.Module, places: Sequence[int], z: Float[Tensor, " o"] | None
) -> Iterator[list[Float[Tensor, "n i"]]]:
    """Within the context z is added to row r's output of `layer` at `places[r]`. Gives a list that
    notes the layer's inputs there.
    """
    inputs: list[Tensor] = []
    at = range(len(places)), places

    def by_row(x: Tensor) -> Tensor:  # some layers see (n · t, d)
        return x.reshape(len(places), -1, x.shape[-1])

    def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(by_row(args[0])[at].detach())
        if z is None:
            return output
        shift = torch.zeros_like(by_row(output))
        shift[at] = z.to(shift)
        return output + shift.view_as(output)

    handle = layer.register_forward_hook(add)
    try:
        yield inputs
    finally:
        handle.remove()
