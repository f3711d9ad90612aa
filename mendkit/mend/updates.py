"""Edits as low-rank side branches: y += (x ũᵀ) c δ̃, one branch per edit in the batch; no dense ΔW appears.

An edit's weight change at a site is ΔW = c Σ_t δ̃_t ũ_tᵀ with c = sign · α · strength (sign −1: MEND, Algorithm 2).
While an edit is applied, a forward hook on the layer adds its branch; the weights are never written.
Axes: b independent edits, t tokens of an edit, i layer input, o layer output.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import MendkitError
from ..models.base import BaseModel
from ..models.sites import Site


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW of b independent edits at one site: ΔW_b = coefficient · Σ_t delta_bt u_btᵀ (padding tokens are zero rows)."""

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

    def to(self, device: torch.device) -> "LowRankUpdate":
        """The same update on a device."""
        c = self.coefficient
        c = c.to(device) if isinstance(c, Tensor) else c
        return replace(self, u=self.u.to(device), delta=self.delta.to(device), coefficient=c)

    def dense(self) -> Float[Tensor, "o i"]:
        """Σ_b ΔW_b as a matrix in (output, input) orientation."""
        return self.coefficient * torch.einsum("bto,bti->oi", self.delta, self.u)

    def inner(self, other: "LowRankUpdate") -> Float[Tensor, " b"]:
        """⟨ΔW_b, ΔW'_b⟩ of every edit, in float64 and without ΔW: c c' Σ_st (u_s · u'_t)(delta_s · delta'_t)."""
        keys = torch.bmm(self.u.double(), other.u.double().mT)
        values = torch.bmm(self.delta.double(), other.delta.double().mT)
        return (keys * values).sum((1, 2)) * (float(self.coefficient) * float(other.coefficient))

    def norms(self) -> Float[Tensor, " b"]:
        """‖ΔW_b‖_F of every edit."""
        return self.inner(self).clamp(min=0).sqrt()

    def merged(self, at_once: int) -> "LowRankUpdate":
        """One update for each `at_once` edits in a row: their sum. `at_once` divides b."""
        n = len(self.u) // at_once
        return replace(
            self,
            u=self.u.reshape(n, -1, self.u.shape[2]),
            delta=self.delta.reshape(n, -1, self.delta.shape[2]),
        )

    def branch(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """What the update adds to the layer's output for inputs x: (n, l, i), row r under edit r // (n / b).

        Some models' layers see rows and positions as one axis, (n · l, i): the order is the same.
        """
        b, width = len(self.u), x.shape[-1]
        if x.shape[0] % b:
            raise MendkitError(
                f"{x.shape[0]} rows cannot be shared by {b} edits; give every edit the same number of texts"
            )
        keys = torch.bmm(x.reshape(b, -1, width).to(self.u.dtype), self.u.transpose(1, 2))
        return torch.bmm(keys * self.coefficient, self.delta).view(*x.shape[:-1], -1)


Updates = dict[str, LowRankUpdate]
"""Updates by site name."""


def side_by_side(parts: Sequence[LowRankUpdate], /) -> LowRankUpdate:
    """The sum of several updates of the same b edits at one site: their tokens side by side, with coefficient 1."""
    u, delta = (
        torch.cat([p.u for p in parts], 1),
        torch.cat([p.delta * p.coefficient for p in parts], 1),
    )
    return LowRankUpdate(u, delta, 1.0)


def summed(update: LowRankUpdate, /) -> LowRankUpdate:
    """The sum of an update's b edits as one edit (b = 1)."""
    return update.merged(len(update.u))


def relative_norms(
    base: BaseModel, updates: Mapping[str, LowRankUpdate], /
) -> dict[str, Float[Tensor, " b"]]:
    """‖ΔW_b‖_F / ‖W‖_F of every site and edit."""
    weights = {site.name: base.site_weight(site) for site in base.sites}
    return {
        name: update.norms() / float(weights[name].double().norm())
        for name, update in updates.items()
    }


def in_force(base: BaseModel, site: Site, /) -> Float[Tensor, "o i"]:
    """The sum of the edits that the model holds at a site."""
    hooks = base.site_module(site)._forward_hooks.values()
    none = torch.zeros(site.d_out, site.d_in, device=base.site_weight(site).device)
    return sum((hook.update.dense() for hook in hooks if isinstance(hook, SideBranch)), none)


@contextmanager
def unedited(base: BaseModel, /) -> Iterator[None]:
    """Within the context no site adds a branch; afterwards those that did do so again, in their order."""
    every = [base.site_module(site)._forward_hooks for site in base.sites]
    kept = [dict(hooks) for hooks in every]
    try:
        for hooks in every:
            for key in [key for key, hook in hooks.items() if isinstance(hook, SideBranch)]:
                del hooks[key]
        yield
    finally:
        for hooks, own in zip(every, kept, strict=True):
            hooks.clear()
            hooks.update(own)


def capped(base: BaseModel, updates: Updates, most: float, /, *, strength: float = 1.0) -> Updates:
    """Updates that leave ‖T + ΔW_b‖_F / ‖W‖_F ≤ `most` at every site, T being the sum of the edits in force.

    An update that goes beyond, taken at its `strength`, is made c times as strong, with the largest c in [0, 1] that
    does not: ‖T‖² + 2 c ⟨T, ΔW⟩ + c² ‖ΔW‖² = (most ‖W‖)². Where none does, as T is too large, c gives the least norm.
    """
    out = dict(updates)
    for site in base.sites:
        unit = updates[site.name]
        update, total = unit.scaled(strength), in_force(base, site).to(unit.u)
        along = (
            torch.einsum("bto,oi,bti->b", update.delta, total, update.u) * update.coefficient
        ).double()
        room = (most * float(base.site_weight(site).double().norm())) ** 2 - float(
            total.double().square().sum()
        )
        own = update.norms().square()
        c = (
            (((along**2 + own * room).clamp(min=0).sqrt() - along) / own)
            .nan_to_num(1.0)
            .clamp(0, 1)
        )
        out[site.name] = replace(unit, delta=unit.delta * c.to(unit.delta)[:, None, None])
    return out


def padded(
    values: Float[Tensor, "n d"], rows: Int[Tensor, " n"], n_edits: int, /
) -> Float[Tensor, "{n_edits} t d"]:
    """Packed per-token values (rows ascending) as one zero-padded matrix per edit."""
    counts = torch.bincount(rows, minlength=n_edits)
    starts = counts.cumsum(0) - counts
    slots = torch.arange(len(rows), device=rows.device) - starts[rows]
    out = values.new_zeros(n_edits, int(counts.max()), values.shape[1])
    return out.index_put((rows, slots), values)


@contextmanager
def side_branches(base: BaseModel, updates: Mapping[str, LowRankUpdate]) -> Iterator[None]:
    """Within the context every site adds its update's branch; afterwards the hooks are gone. Contexts nest (add up)."""
    handles = attach(base, updates)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SideBranch:
    """The forward hook of one update at one site."""

    def __init__(self, update: LowRankUpdate) -> None:
        self.update = update

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.update.branch(args[0].to(self.update.u.device)).to(output)


def attach(
    base: BaseModel, updates: Mapping[str, LowRankUpdate]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Let every site add its update's branch from now on, until the handles are removed."""
    sites = {site.name: site for site in base.sites}
    return [
        base.site_module(sites[name]).register_forward_hook(SideBranch(u))
        for name, u in updates.items()
    ]


def scaled(updates: Updates, strength: float) -> Updates:
    """Updates at another strength."""
    return {name: update.scaled(strength) for name, update in updates.items()}


def select(updates: Updates, index: Sequence[int]) -> dict[str, LowRankUpdate]:
    """The updates of some of the edits, in the order of `index`; a single edit serves them all as it is."""
    return {name: u if len(u) == 1 else u.select(list(index)) for name, u in updates.items()}
