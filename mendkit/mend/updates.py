"""A weight change ΔW = −α Σ_t δ̃_t ũ_tᵀ (MEND, section 3.1) as a side branch: y += c (x ũᵀ) δ̃.

c = sign · α · strength. A forward hook adds a branch for each edit; no dense ΔW appears.
Axes: b independent edits, t tokens of an edit, i layer input, o layer output.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.sites import Site
from ..models.tokens import Tokens
from ..runs import sha256


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW_b = coefficient · Σ_t delta_bt u_btᵀ of b edits at one site; padding tokens are zero."""

    u: Float[Tensor, "b t i"]
    delta: Float[Tensor, "b t o"]
    coefficient: Float[Tensor, ""] | float  # sign · α · strength

    def __len__(self) -> int:
        return len(self.u)

    def scaled(self, factor: float) -> "LowRankUpdate":
        """The same update, `factor` times as strong."""
        return replace(self, coefficient=self.coefficient * factor)

    def select(self, index: Sequence[int] | slice) -> "LowRankUpdate":
        """The updates of some of the edits."""
        return replace(self, u=self.u[index], delta=self.delta[index])

    def merged(self, at_once: int | None = None) -> "LowRankUpdate":
        """One update for each `at_once` edits in a row, or for all: their sum."""
        n = len(self.u) // (at_once or len(self.u))
        u = self.u.reshape(n, -1, self.u.shape[2])
        return replace(self, u=u, delta=self.delta.reshape(n, -1, self.delta.shape[2]))

    def dense(self) -> Float[Tensor, "o i"]:
        """Σ_b ΔW_b as a matrix in (output, input) orientation."""
        return self.coefficient * torch.einsum("bto,bti->oi", self.delta, self.u)

    def inner(self, other: "LowRankUpdate") -> Float[Tensor, " b"]:
        """⟨ΔW_b, ΔW'_b⟩ of every edit, in float64."""
        # c c' Σ_st (u_s · u'_t)(delta_s · delta'_t)
        keys = torch.bmm(self.u.double(), other.u.double().mT)
        values = torch.bmm(self.delta.double(), other.delta.double().mT)
        return (keys * values).sum((1, 2)) * (float(self.coefficient) * float(other.coefficient))

    def norms(self) -> Float[Tensor, " b"]:
        """‖ΔW_b‖_F of every edit."""
        return self.inner(self).clamp(min=0).sqrt()

    def singular_values(self) -> Float[Tensor, "b k"]:
        """Those of every ΔW_b that may be other than 0, largest first, in float64."""
        # Of uᵀ = Q_u R_u and δᵀ = Q_δ R_δ the Q keep lengths: R_δ R_uᵀ has the same values.
        small_u, small_delta = (torch.linalg.qr(x.double().mT).R for x in (self.u, self.delta))
        return torch.linalg.svdvals(small_delta @ small_u.mT) * abs(float(self.coefficient))

    def branch(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """What is added to the layer's output for inputs x, (n, l, i) or (n · l, i).

        Row r is under edit r // (n / b). Raises MendkitError if b does not divide n.
        """
        b, width = len(self.u), x.shape[-1]
        if x.shape[0] % b:
            raise MendkitError(
                f"{x.shape[0]} rows cannot be shared by {b} edits; give each as many texts"
            )
        keys = torch.bmm(x.reshape(b, -1, width).to(self.u.dtype), self.u.transpose(1, 2))
        return torch.bmm(keys * self.coefficient, self.delta).view(*x.shape[:-1], -1)


# Updates by site name.
Updates = dict[str, LowRankUpdate]


def of_matrices(changes: Float[Tensor, "b o i"]) -> LowRankUpdate:
    """ΔW of b edits as it is: a sum over the rows of a unit matrix."""
    one = torch.eye(changes.shape[1], dtype=changes.dtype, device=changes.device)
    return LowRankUpdate(changes, one.expand(len(changes), -1, -1), 1.0)


def padded(
    values: Float[Tensor, "n d"], rows: Int[Tensor, " n"], n_edits: int
) -> Float[Tensor, "{n_edits} t d"]:
    """Packed values (rows ascending) as one zero-padded matrix an edit."""
    counts = torch.bincount(rows, minlength=n_edits)
    starts = counts.cumsum(0) - counts
    slots = torch.arange(len(rows), device=rows.device) - starts[rows]
    out = values.new_zeros(n_edits, int(counts.max()), values.shape[1])
    return out.index_put((rows, slots), values)


def side_by_side(parts: Sequence[LowRankUpdate]) -> LowRankUpdate:
    """The sum of several updates of the same b edits at one site, with coefficient 1."""
    u = torch.cat([part.u for part in parts], 1)
    delta = torch.cat([part.delta * part.coefficient for part in parts], 1)
    return LowRankUpdate(u, delta, 1.0)


def one_below_another(parts: Sequence[Updates]) -> Updates:
    """The edits of several updates, each of one edit, as independent ones in order."""
    joined: Updates = {}
    for name in parts[0]:
        plain = [side_by_side([part[name]]) for part in parts]  # coefficient 1
        u = pad_sequence([part.u[0] for part in plain], batch_first=True)
        delta = pad_sequence([part.delta[0] for part in plain], batch_first=True)
        joined[name] = LowRankUpdate(u, delta, 1.0)
    return joined


def scaled(updates: Updates, strength: float) -> Updates:
    """Updates at another strength."""
    return {name: update.scaled(strength) for name, update in updates.items()}


def select(updates: Updates, index: Sequence[int]) -> Updates:
    """The updates of some of the edits; a single edit serves them all as it is."""
    chosen = list(index)
    return {name: u if len(u) == 1 else u.select(chosen) for name, u in updates.items()}


def at_some_sites(updates: Updates, texts: Sequence[Tokens], h: MENDHyperParams) -> Updates:
    """Each update at a random `site_share` of the sites, at least at one, and zero elsewhere.

    With the seed the texts of its edits decide, so that an edit always has the same sites.
    """
    if h.site_share == 1:
        return updates
    number = len(next(iter(updates.values())))
    at_once, kept = len(texts) // number, max(1, round(h.site_share * len(updates)))
    chosen = []
    for k in range(number):
        edits = [(text.ids, text.targets) for text in texts[k * at_once : (k + 1) * at_once]]
        generator = torch.Generator().manual_seed(int(sha256(f"{h.seed} {edits}")[:15], 16))
        chosen.append(torch.randperm(len(updates), generator=generator) < kept)
    some: Updates = {}
    for (name, update), at_site in zip(updates.items(), torch.stack(chosen, 1), strict=True):
        some[name] = replace(update, delta=update.delta * at_site.to(update.delta)[:, None, None])
    return some


def squared_norm(updates: Updates) -> Float[Tensor, ""]:
    """‖ΔW‖² over all sites, the mean of the edits, for a loss."""
    folded = [side_by_side([update]) for update in updates.values()]  # `inner` cuts coefficients
    return torch.stack([update.inner(update).mean() for update in folded]).sum()


def relative_norms(base: BaseModel, updates: Updates) -> dict[str, Float[Tensor, " b"]]:
    """‖ΔW_b‖_F / ‖W‖_F of every site and edit."""
    shares = {}
    for site in base.sites:
        if site.name in updates:
            norm = float(base.site_weight(site).double().norm())
            shares[site.name] = updates[site.name].norms() / norm
    return shares


# ---------------------------------------- on a model


class SideBranch:
    """The forward hook of one update at one site."""

    def __init__(self, update: LowRankUpdate) -> None:
        self.update = update

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.update.branch(args[0].to(self.update.u.device)).to(output)


def attach(base: BaseModel, updates: Updates) -> list[RemovableHandle]:
    """Let every site add its update's branch until the handles are removed."""
    handles = []
    for site in base.sites:
        if site.name in updates:
            branch = SideBranch(updates[site.name])
            handles.append(base.site_module(site).register_forward_hook(branch))
    return handles


@contextmanager
def side_branches(base: BaseModel, updates: Updates) -> Iterator[None]:
    """`attach` within the context. Contexts nest (add up)."""
    handles = attach(base, updates)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unedited(base: BaseModel) -> Iterator[None]:
    """Within the context no site adds a branch; afterwards they do so again, in their order."""
    hooks_of = [base.site_module(site)._forward_hooks for site in base.sites]
    before = [dict(hooks) for hooks in hooks_of]
    try:
        for hooks in hooks_of:
            for key, hook in list(hooks.items()):
                if isinstance(hook, SideBranch):
                    del hooks[key]
        yield
    finally:
        for hooks, kept in zip(hooks_of, before, strict=True):
            hooks.clear()
            hooks.update(kept)


def in_force(base: BaseModel, site: Site) -> Float[Tensor, "o i"]:
    """The sum of the edits that the model holds at a site."""
    total = torch.zeros(site.d_out, site.d_in, device=base.site_weight(site).device)
    for hook in base.site_module(site)._forward_hooks.values():
        if isinstance(hook, SideBranch):
            total = total + hook.update.dense()
    return total


def capped(base: BaseModel, updates: Updates, most: float, *, strength: float = 1.0) -> Updates:
    """Updates with ‖T + ΔW_b‖_F / ‖W‖_F ≤ `most` at their `strength`, T being the edits in force.

    One that goes beyond gets the largest factor c in [0, 1] that does not.
    If T is too large by itself, c is that of the least norm.
    """
    out = dict(updates)
    for site in base.sites:
        update = updates[site.name].scaled(strength)
        total = in_force(base, site).to(update.u)
        # ‖T + c ΔW‖² = ‖T‖² + 2 c ⟨T, ΔW⟩ + c² ‖ΔW‖² = (most ‖W‖)²
        inner = torch.einsum("bto,oi,bti->b", update.delta, total, update.u) * update.coefficient
        inner, square = inner.double(), update.norms().square()
        limit = (most * float(base.site_weight(site).double().norm())) ** 2
        room = limit - float(total.double().square().sum())
        c = ((inner**2 + square * room).clamp(min=0).sqrt() - inner) / square
        c = c.nan_to_num(1.0).clamp(0, 1)
        delta = updates[site.name].delta * c.to(update.delta)[:, None, None]
        out[site.name] = replace(updates[site.name], delta=delta)
    return out
