"""Many edits in one weight change: least squares in place of the sum of MEND's updates.

Every edit asks for a shift of the layer's output at its own keys, D = ΔW_e K, where ΔW_e is the update that MEND makes
of it alone. A sum of k updates gives each key the shifts of all edits; the weight change here answers, over all tokens
t of all edits,

    min_ΔW  Σ_t ‖ΔW k_t − d_t‖² / λ_k  +  Σ_t ‖ΔW ŷ_t − d_t‖² / λ_y  +  tr(ΔW C ΔWᵀ)

with k the layer's input (the key), ŷ = C ũ (k·ũ) / (ũᵀ C ũ) its part along MEND's own ũ (what the hypernetwork holds to
be common to a fact's wordings; the projection is orthogonal under C⁻¹), and C = E[x xᵀ] over the keys of other prompts,
whose shift is held small: as in MEMIT (Meng et al., 2023, arXiv 2210.07229, equation 14) with the values of MALMEN (Tan
et al., 2024, arXiv 2311.04661, section 4.1). The ridges λ are relative to the size of what they stand for, and learned;
λ_y grows with the number of edits, for ŷ is an estimate, and what other wordings have besides it adds to the last term
once an edit. For a sequence C grows by the keys of the edits so far (`Memory`), and an edit is asked for what they
leave to be done of its shift, with keys and gradients of the unedited model: recursive least squares, the solution of
all together.
Axes: b updates, t tokens of an update (zero rows are padding), i layer input, o layer output.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Memory = dict[str, tuple[Tensor, int]]
"""By site name (C + Σ_t z zᵀ / λ)⁻¹ over the keys of earlier edits, (i, i) in float64, and how many edits that were."""


class OtherKeys(nn.Module):
    """C = E[x xᵀ] of a layer's inputs, with a floor on its eigenvalues of `FLOOR` times their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("moment", torch.eye(width))
        self._sum: Tensor | float = 0.0
        self._inverse: tuple[Tensor, int] | None = None

    @torch.no_grad()
    def add(self, x: Float[Tensor, "n i"]) -> None:
        """Gather rows; `fit` makes use of them."""
        self._sum = x.double().T @ x.double() + self._sum
        self.count += len(x)

    @torch.no_grad()
    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Join the rows that several processes gathered: `total` sums a tensor over them."""
        self._sum = total(torch.zeros_like(self.moment, dtype=torch.float64) + self._sum)
        self.count.copy_(total(self.count))

    @torch.no_grad()
    def fit(self) -> None:
        """Compute C from the rows gathered, and forget them."""
        moment = self._sum / self.count
        floor = FLOOR * moment.diagonal().mean()
        self.moment.copy_(
            moment + floor * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        )
        self._sum = 0.0

    @torch.no_grad()
    def inverse(self) -> Float[Tensor, "i i"]:
        """C⁻¹ in float64, computed once."""
        if self._inverse is None or self._inverse[1] != self.moment._version:
            self._inverse = (
                torch.cholesky_inverse(torch.linalg.cholesky(self.moment.double())),
                self.moment._version,
            )
        return self._inverse[0]


FLOOR = 0.02
"""The floor on C's eigenvalues, as a share of their mean: directions that few prompts use are not free of cost."""


def solve(
    keys: Float[Tensor, "b t i"],
    shared: Float[Tensor, "b t i"],
    other: OtherKeys,
    ridge: Float[Tensor, " 2"],
    /,
    *,
    memory: Float[Tensor, "i i"] | None = None,
) -> tuple[Float[Tensor, "b 2*t i"], Float[Tensor, "b 2*t i"], Float[Tensor, "b 2*t"]]:
    """The u for which ΔW = Σ_t d_t u_tᵀ solves the least squares, the keys z = [k; ŷ] that they are of, their ridges.

    With `memory` d is what the edits so far leave to be done, d − ΔW z: their sum is then the solution of all together.

    `shared` is ũ, `ridge` (λ_k, λ_y) in units of the mean kᵀC⁻¹k of the update and of each ŷᵀC⁻¹ŷ. Solved in float64 in
    the number of tokens, or in the width where that is smaller.
    """
    k, s, c = keys.double(), shared.double(), other.moment.double()
    sc = s @ c
    along = (k * s).sum(-1, keepdim=True) / (sc * s).sum(-1, keepdim=True).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    z = torch.cat([k, along * sc], 1)
    zp = torch.cat([k @ other.inverse(), along * s], 1) if memory is None else z @ memory
    size = (z * zp).sum(-1) if memory is None else (z * (z @ other.inverse())).sum(-1)
    t = k.shape[1]
    there = (size[:, :t] > 0).to(k)
    mean = (size[:, :t].sum(1) / there.sum(1).clamp(min=1))[:, None]
    lam = torch.cat([ridge[0] * mean.expand(-1, t), ridge[1] * size[:, t:]], 1)
    lam = torch.where(torch.cat([there, there], 1) * lam > 0, lam, 1.0)
    if 2 * t <= k.shape[2]:
        u = torch.linalg.solve(zp @ z.mT + torch.diag_embed(lam), zp)
    else:
        precision = c if memory is None else torch.linalg.inv(memory)
        weighted = z / lam[:, :, None]
        u = torch.linalg.solve(precision + weighted.mT @ z, weighted.mT).mT
    return u.to(keys), z.detach(), lam.detach()


@torch.no_grad()
def remember(
    memory: Float[Tensor, "i i"], z: Float[Tensor, "n i"], ridge: Float[Tensor, " n"]
) -> Float[Tensor, "i i"]:
    """(P⁻¹ + Σ_t z zᵀ / λ)⁻¹ from P."""
    zp = z @ memory
    return memory - zp.T @ torch.linalg.solve(zp @ z.T + torch.diag(ridge), zp)
