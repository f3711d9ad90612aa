"""Edits as low-rank side branches: y += (x ũᵀ) c δ̃, one branch per edit in the batch; no dense ΔW appears.

An edit's weight change at a site is ΔW = c Σ_t δ̃_t ũ_tᵀ with c = sign · α · strength (sign −1: MEND, Algorithm 2).
While an edit is applied, a forward hook on the layer adds its branch; the weights are never written, so undoing an
edit restores the model bit for bit (CORRECTNESS row 16). Only `dense` and `merged` know a weight's orientation.
Axes: b independent edits, t tokens of an edit, i layer input, o layer output.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .data import EditExample
from .errors import MendkitError
from .models import BaseModel


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

    def dense(self) -> Float[Tensor, "o i"]:
        """Σ_b ΔW_b as a matrix in (output, input) orientation."""
        return self.coefficient * torch.einsum("bto,bti->oi", self.delta, self.u)

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


def padded(values: Float[Tensor, "n d"], rows: Int[Tensor, " n"], n_edits: int, /) -> Float[Tensor, "{n_edits} t d"]:
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


def attach(base: BaseModel, updates: Mapping[str, LowRankUpdate]) -> list[torch.utils.hooks.RemovableHandle]:
    """Let every site add its update's branch from now on, until the handles are removed."""

    def hook_for(update: LowRankUpdate):
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + update.branch(args[0]).to(output.dtype)

        return hook

    sites = {site.name: site for site in base.sites}
    return [base.site_module(sites[name]).register_forward_hook(hook_for(u)) for name, u in updates.items()]


class Edit:
    """A weight change of one base model, made from one example or several at once (their updates are summed).

    `applied()` is the way to use it; `apply()` and `undo()` are for interactive work. `strength` multiplies the update.
    """

    def __init__(
        self, base: BaseModel, updates: Updates, examples: Sequence[EditExample], /, *, strength: float = 1.0
    ) -> None:
        self.base, self.examples, self.strength = base, tuple(examples), float(strength)
        self._unit = updates
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def updates(self) -> Updates:
        """The updates at the edit's strength, all examples' tokens side by side as one edit (b = 1)."""
        return {name: _summed(u).scaled(self.strength) for name, u in self._unit.items()}

    @property
    def active(self) -> bool:
        """Whether the edit is applied now."""
        return bool(self._handles)

    def apply(self) -> "Edit":
        """Apply until `undo`. Raises MendkitError if it is applied already."""
        if self.active:
            raise MendkitError("this edit is applied already; undo it first")
        self._handles = attach(self.base, self.updates)
        return self

    def undo(self) -> None:
        """Take the edit back: the model is bit for bit what it was. Raises MendkitError if it is not applied."""
        if not self.active:
            raise MendkitError("this edit is not applied; nothing to undo")
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def applied(self) -> Iterator["Edit"]:
        """Apply within the context."""
        self.apply()
        try:
            yield self
        finally:
            if self.active:
                self.undo()

    def scale(self, factor: float) -> "Edit":
        """A new edit, `factor` times as strong (0: none, 1: the same, 2: twice)."""
        return Edit(self.base, self._unit, self.examples, strength=self.strength * factor)

    def dense(self) -> dict[str, Tensor]:
        """ΔW of every site as a matrix in the orientation of the site's own weight, float32."""
        transposed = {site.name: site.transposed for site in self.base.sites}
        return {n: (u.dense().T if transposed[n] else u.dense()) for n, u in self.updates.items()}

    def relative_norm(self) -> dict[str, float]:
        """‖ΔW‖_F / ‖W‖_F of every site."""
        weight = {site.name: self.base.site_module(site).weight for site in self.base.sites}
        return {n: float(d.norm() / weight[n].float().norm()) for n, d in self.dense().items()}


def _summed(update: LowRankUpdate) -> LowRankUpdate:
    return replace(update, u=update.u.flatten(0, 1)[None], delta=update.delta.flatten(0, 1)[None])
