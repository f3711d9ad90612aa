"""Many edits in one weight change: least squares in place of the sum of MEND's updates.

Each edit alone asks for a shift d = ΔW_e k of the layer's output at its keys k, the layer's inputs.
In a sum of updates every key gets the shifts of all edits.
Instead, one ΔW for the tokens t of all edits solves

    min_ΔW  Σ_t ‖ΔW k_t − d_t‖² / λ_k  +  Σ_t ‖ΔW ŷ_t − d_t‖² / λ_y  +  tr(ΔW C ΔWᵀ)

as MEMIT (Meng et al., 2023, equation 14), with MALMEN's values (Tan et al., 2024, section 4.1).
ŷ = C ũ (k·ũ) / (ũᵀ C ũ) is the part of k along MEND's ũ, for what a fact's wordings share.
C = E[x xᵀ] is over other prompts' keys, whose shift stays small. The ridges λ are learned.
`aggregate: normal_equation` (MALMEN, equation 6) has no C, no ŷ and no memory: with all keys and
shifts as columns of H and V, ΔW = V Hᵀ (H Hᵀ + λ I)⁻¹. Sequences add such solutions.
Axes: b updates, t tokens of an update (zero rows are padding), i layer input, o layer output.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from .normaliser import SecondMoment
from .updates import LowRankUpdate

# Floor on C's eigenvalues as a share of their mean: rare directions cost something, too.
FLOOR = 0.02


@dataclass
class Memory:
    """The edits of a sequence so far, by site name."""

    inverse: dict[str, Tensor] = field(default_factory=dict)  # (C + Σ z zᵀ / λ)⁻¹, (i, i), float64
    edits: int = 0
    held: dict[str, Tensor] = field(default_factory=dict)  # ΔW (o, i) in force before a new edit


class OtherKeys(SecondMoment):
    """C = E[x xᵀ] of a layer's inputs, with a floor on its eigenvalues."""

    moment: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("moment", torch.eye(width))
        self._inverse: tuple[int, Tensor] | None = None  # with the version of `moment`

    @torch.no_grad()
    def fit(self) -> None:
        """Compute C from the rows gathered."""
        moment = self._sums[0] / self.count
        floor = FLOOR * moment.diagonal().mean()
        self.moment.copy_(moment + floor * torch.eye(len(moment)).to(moment))
        self._forget()

    @torch.no_grad()
    def restore(self) -> None:
        """Give eigenvalues their floor again, where rounding (`export --compact`) took it."""
        moment = self.moment.double()
        if int(torch.linalg.cholesky_ex(moment).info) and bool(moment.isfinite().all()):
            values, vectors = torch.linalg.eigh(moment)
            least = FLOOR * moment.diagonal().mean()
            self.moment.copy_(vectors * values.clamp(min=least) @ vectors.T)

    @torch.no_grad()
    def inverse(self) -> Float[Tensor, "i i"]:
        """C⁻¹ in float64, computed once."""
        version = self.moment._version
        if self._inverse is None or self._inverse[0] != version:
            root = torch.linalg.cholesky(self.moment.double())
            self._inverse = version, torch.cholesky_inverse(root)
        return self._inverse[1]


def solve(
    keys: Float[Tensor, "b t i"],
    shared: Float[Tensor, "b t i"],
    other: OtherKeys,
    ridge: Float[Tensor, " 2"],
    *,
    memory: Float[Tensor, "i i"] | None = None,
) -> tuple[Float[Tensor, "b 2*t i"], Float[Tensor, "b 2*t i"], Float[Tensor, "b 2*t"]]:
    """The u of the solution ΔW = Σ_t d_t u_tᵀ, its keys z = [k; ŷ], and their ridges.

    `shared` is ũ; `ridge` is relative to the mean kᵀC⁻¹k of an update and each ŷᵀC⁻¹ŷ;
    `memory` is the inverse of C with earlier keys.
    """
    k, s, c, t = keys.double(), shared.double(), other.moment.double(), keys.shape[1]
    # 1. The keys z = [k; ŷ].
    sc = s @ c
    length = (sc * s).sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    along = (k * s).sum(-1, keepdim=True) / length
    z = torch.cat([k, along * sc], 1)
    # 2. P z, with P = C⁻¹ or the memory's, and the size zᵀ C⁻¹ z.
    if memory is None:
        zp = torch.cat([k @ other.inverse(), along * s], 1)
        size = (z * zp).sum(-1)
    else:
        zp = z @ memory
        size = (z * (z @ other.inverse())).sum(-1)
    # 3. The ridges; those of padding are 1.
    there = (size[:, :t] > 0).to(k)
    mean = (size[:, :t].sum(1) / there.sum(1).clamp(min=1))[:, None]
    lam = torch.cat([ridge[0] * mean.expand(-1, t), ridge[1] * size[:, t:]], 1)
    lam = torch.where(torch.cat([there, there], 1) * lam > 0, lam, 1.0)
    # 4. u = (zᵀ P z + λ)⁻¹ P z, or the same by the matrix inversion lemma.
    if 2 * t <= k.shape[2]:
        u = torch.linalg.solve(zp @ z.mT + torch.diag_embed(lam), zp)
    else:
        precision = c if memory is None else torch.linalg.inv(memory)
        weighted = z / lam[:, :, None]
        u = torch.linalg.solve(precision + weighted.mT @ z, weighted.mT).mT
    return u.to(keys), z.detach(), lam.detach()


def asked_shifts(
    update: LowRankUpdate, keys: Float[Tensor, "b t i"], coefficient: str
) -> Float[Tensor, "b t o"]:
    """The shift d of the output that each edit asks for at its keys (`value_coefficient`).

    That of its "update", ΔW k; or of a token's own term alone, c (k·ũ) δ̃ by the "key" (MALMEN),
    c ‖ũ‖² δ̃ by the "norm" (UltraEdit). c is the sign times α.
    """
    if coefficient == "update":
        return update.branch(keys)
    left = keys if coefficient == "key" else update.u
    return update.coefficient * (left * update.u).sum(-1, keepdim=True) * update.delta


def normal_equation(
    keys: Float[Tensor, "b t i"], ridge: Float[Tensor, " 1"]
) -> Float[Tensor, "b t i"]:
    """The u of ΔW = Σ_t d_t u_tᵀ, rows of (Hᵀ H + λ I)⁻¹ Hᵀ, or of the same by the width."""
    k = keys.double()
    if k.shape[1] <= k.shape[2]:
        u = torch.linalg.solve(k @ k.mT + ridge * torch.eye(k.shape[1]).to(k), k)
    else:
        u = torch.linalg.solve(k.mT @ k + ridge * torch.eye(k.shape[2]).to(k), k.mT).mT
    return u.to(keys)


def put_together(
    name: str,
    update: LowRankUpdate,
    asked: LowRankUpdate,
    other: OtherKeys,
    ridge: Float[Tensor, " 2"],
    *,
    at_once: int,
    memory: Memory | None = None,
) -> LowRankUpdate:
    """One update for each `at_once` edits in a row, from each one's `update` at a site.

    `asked` has the keys and the shifts asked for, of all edits that are made at once.
    With `memory` a single one makes what earlier edits leave of its shifts, and joins them
    (recursive least squares).
    """
    # 1. The least squares. λ_y grows with the number of edits, for what other wordings have
    #    besides ŷ adds to the last term once an edit.
    earlier = memory or Memory()
    before = earlier.inverse.get(name)
    ridge = ridge * ridge.new_tensor([1, earlier.edits + at_once])
    u, z, ridges = solve(asked.u, update.merged(at_once).u, other, ridge, memory=before)
    # 2. A single update is remembered.
    if memory is not None and len(z) == 1:
        before = other.inverse() if before is None else before
        memory.inverse[name] = remember(before, z[0], ridges[0])
    # 3. ΔW = Σ (d − ΔW_held z) uᵀ.
    if name in earlier.held:
        left = torch.cat([asked.delta, asked.delta], 1) - z.to(u) @ earlier.held[name].T.to(u)
        return LowRankUpdate(u, left, 1.0)
    t = asked.u.shape[1]
    return LowRankUpdate(u[:, :t] + u[:, t:], asked.delta, 1.0)


@torch.no_grad()
def remember(
    memory: Float[Tensor, "i i"], z: Float[Tensor, "n i"], ridge: Float[Tensor, " n"]
) -> Float[Tensor, "i i"]:
    """(P⁻¹ + Σ_t z zᵀ / λ)⁻¹ from P."""
    zp = z @ memory
    return memory - zp.T @ torch.linalg.solve(zp @ z.T + torch.diag(ridge), zp)
