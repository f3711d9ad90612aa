"""MEMIT and AlphaEdit: many facts as one closed-form change of several MLP down-projections.

MEMIT (Meng et al., 2023, arXiv 2210.07229, section 4). For every edit, δ is the change of the
hidden state h at the subject's last token, behind the last of the layers, that makes the model say
y: z of ROME (rome.py). From the lowest layer on, each of those left makes an equal part of what is
missing, R = (h* − h) / layers left (equation 20), at the keys K of all edits (a column each):

    ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹,   C = E[k kᵀ] over a text          (equations 14 and 15; λ = 15,000)

AlphaEdit (Fang et al., 2025, arXiv 2410.02355, equation 11) lets ΔW act where the text's keys are
not: P projects on the eigenvectors of C whose eigenvalues are below a threshold, and the keys K_p
of earlier edits of a sequence stay as they are:

    ΔW = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + l2 I)⁻¹ = R K̂ᵀ (K̂_p K̂_pᵀ + K̂ K̂ᵀ + l2 I)⁻¹,   K̂ = P K

Deviations: those of ROME's z; numbers that depend on the keys' size are tuned.
Axes: n edits, c contexts of an edit, i layer input, o layer output.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..hparams import MENDHyperParams
from ..mend.factors import FACTOR_BATCH
from ..mend.losses import wide
from ..mend.updates import LowRankUpdate, Updates, one_below_another, side_branches
from ..models.base import BaseModel
from ..models.sites import Site, find_blocks, hidden_states
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk
from .base import Baseline, held_moments
from .rome import ROME


class MEMIT(Baseline):
    """MEMIT on the weights `sites`, lowest first; C comes from `text`, z from ROME at the last.

    `weight` is λ, `clamp` is ROME's. When editing, raises DataError as ROME.
    """

    needs_causal = True
    title = "MEMIT"
    numbers: Mapping[str, float] = {"clamp": 4.0, "weight": 15_000.0}  # that can be chosen

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        text: str,
        *,
        sites: Sequence[str],
        **chosen: float,
    ) -> None:
        if unknown := chosen.keys() - self.numbers:
            raise TypeError(
                f"{self.title} has no {', '.join(unknown)}, but {', '.join(self.numbers)}"
            )
        self.chosen = {**self.numbers, **chosen}
        named: dict[str, float | str] = {"last site": sites[-1], "sites": len(sites), **self.chosen}
        super().__init__(base.with_sites(sites), hparams, self.title, named)
        moments = held_moments(self.base, text, ridge=ROME.ridge)
        self.rome = ROME(base, hparams, text, site=sites[-1], clamp=self.chosen["clamp"])
        self.memory: dict[str, Tensor] | None = None  # K_p K_pᵀ of a sequence, if it is kept
        self._prepare(moments)

    def _prepare(self, moments: Mapping[str, Float[Tensor, "i i"]]) -> None:
        """What solving needs of C, by site name."""
        self.prior = {name: self.chosen["weight"] * c for name, c in moments.items()}

    def updates(
        self, texts: Sequence[Tokens], *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text, or one of all. `trunk` is not used, as in ROME."""
        if at_once:
            return self._spread(texts)
        return one_below_another([self._spread([text]) for text in texts])

    @torch.no_grad()
    def _spread(self, texts: Sequence[Tokens]) -> Updates:
        """One update of all edits: each layer makes an equal part of what is missing."""
        # 1. What h should be: z is added where h is read.
        change = torch.stack([self.rome.key_and_change(text)[1] for text in texts])
        made: Updates = {}
        goal: Tensor | None = None
        for number, site in enumerate(self.base.sites):
            # 2. h with the layers changed so far, and the layer's keys.
            with side_branches(self.base, made):
                keys, h = self._read(texts, site)
            goal = h + change if goal is None else goal
            # 3. This layer's part.
            missing = (goal - h) / (len(self.base.sites) - number)
            u = self._solved(site.name, keys.double()).to(h)
            made[site.name] = LowRankUpdate(u[None], missing[None], 1.0)
        return made

    def _solved(self, name: str, keys: Float[Tensor, "n i"]) -> Float[Tensor, "n i"]:
        """(prior + K Kᵀ)⁻¹ K, a row an edit."""
        return torch.linalg.solve(self.prior[name].to(keys) + keys.T @ keys, keys.T).T

    def _read(
        self, texts: Sequence[Tokens], site: Site
    ) -> tuple[Float[Tensor, "n i"], Float[Tensor, "n o"]]:
        """At each subject's last token, the inputs of `site`, averaged over contexts, and h."""
        contexts, base = self.rome.contexts, self.base
        found, last = find_blocks(base.model), self.rome.site.block
        assert found is not None and last is not None  # with a down-projection in each block
        modules = base.site_module(site), found[1][last]
        size, parts = max(1, FACTOR_BATCH // len(contexts)), []
        for at in range(0, len(texts), size):
            rows = [self.rome.after(c, text) for text in texts[at : at + size] for c in contexts]
            with _seen(*modules) as seen:
                FrozenTrunk(base).suffix(rows, collate(rows, base.pad_id, base.device))
            places = range(len(rows)), [row.subject[-1] for row in rows]
            values = [each.view(len(rows), -1, each.shape[-1])[places] for each in seen]
            parts.append([wide(each).unflatten(0, (-1, len(contexts))) for each in values])
        keys, states = map(torch.cat, zip(*parts, strict=True))
        return keys.mean(1), states[:, 0]  # h without a context


@contextmanager
def _seen(layer: nn.Module, block: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context the list gets a layer's inputs and a block's output, of one pass."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, args, __: seen.append(args[0])),
        block.register_forward_hook(lambda _, __, output: seen.append(hidden_states(output))),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class AlphaEdit(MEMIT):
    """AlphaEdit on the weights `sites`, as MEMIT; eigenvalues of C below `threshold` are null.

    In a sequence (`remembering`) it keeps the keys of its edits.
    """

    title = "AlphaEdit"
    numbers: Mapping[str, float] = {"clamp": 4.0, "threshold": 2e-2, "l2": 10.0}

    def _prepare(self, moments: Mapping[str, Float[Tensor, "i i"]]) -> None:
        self.prior, self.null = {}, {}
        for name, c in moments.items():
            self.prior[name] = self.chosen["l2"] * torch.eye(len(c), dtype=c.dtype)
            values, vectors = torch.linalg.eigh(c)
            vectors = vectors[:, values < self.chosen["threshold"]]
            self.null[name] = vectors @ vectors.T

    def remembering(self) -> "AlphaEdit":
        """The same editor at the start of a sequence."""
        editor = copy.copy(self)
        editor.memory = {}
        return editor

    def _solved(self, name: str, keys: Float[Tensor, "n i"]) -> Float[Tensor, "n i"]:
        keys = keys @ self.null[name].to(keys)
        earlier = self.memory.get(name, 0.0) if self.memory is not None else 0.0
        total = keys.T @ keys + earlier
        if self.memory is not None:
            self.memory[name] = total
        return torch.linalg.solve(self.prior[name].to(keys) + total, keys.T).T
