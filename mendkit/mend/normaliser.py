"""The normaliser: statistics by which u and delta enter the hypernetwork (MEND, section 3.2).

norm(x) = (x − mean) / std, feature by feature, of training factors; `lifelong_norm` goes on with
the edits of a session. Ours: a floor on the std, a clip on the result (CORRECTNESS rows 3–6), and
`whiten`. StableEdit's: `whiten_values`.
Axes: n tokens (packed), d features.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import DataError

# A token's response, as a share of the mean one, below which its key is made no longer.
LEAST_RESPONSE = 0.2


class RunningMoments(nn.Module):
    """Mean and variance of each feature in float64; count == 0 means empty.

    Merged batch by batch (Chan, Golub & LeVeque 1979): batching does not matter.
    With `eps` as in published code: it is added to the std, which is stored to keep its bits.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    stored_std: Tensor

    def __init__(self, width: int, eps: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(width, dtype=torch.float64))
        if eps:
            self.register_buffer("stored_std", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def add(self, x: Float[Tensor, "n d"]) -> None:
        """Merge the rows of x."""
        if len(x) == 0:
            return
        x = x.double()
        n, before, mean = len(x), int(self.count), x.mean(0)
        shift = mean - self.mean
        self.m2 += self._squares(x - mean) + self._squares(shift[None]) * (
            before * n / (before + n)
        )
        self.mean += shift * (n / (before + n))
        self.count += n
        self._store()

    @torch.no_grad()
    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Join the statistics of several processes: `total` sums a tensor over them."""
        count = total(self.count)
        mean = total(self.count * self.mean) / count.clamp(min=1)
        self.m2.copy_(total(self.m2 + self.count * self._squares((self.mean - mean)[None])))
        self.mean.copy_(mean)
        self.count.copy_(count)
        self._store()

    def _squares(self, x: Float[Tensor, "n d"]) -> Tensor:
        return (x**2).sum(0)

    def _store(self) -> None:
        if self.eps:
            self.stored_std.copy_(self._sample_std())

    def _sample_std(self) -> Tensor:
        return (self.m2 / max(int(self.count) - 1, 1)).sqrt()

    def plain_std(self) -> Float[Tensor, " d"]:
        """Standard deviation of the rows added."""
        return self.stored_std if self.eps else self._sample_std()

    def std(self, floor: float) -> Float[Tensor, " d"]:
        """Standard deviation, at least `floor` times its median (units silent in training)."""
        std = self.plain_std()
        least = max(floor * float(std.median()), torch.finfo(torch.float32).tiny)
        return std.clamp(min=least) + self.eps

    def normalise(
        self, x: Float[Tensor, "n d"], *, floor: float, clip: float | None
    ) -> Float[Tensor, "n d"]:
        """(x − mean) / std, clipped to ±clip; x itself while empty."""
        if int(self.count) == 0:
            return x
        return _clipped((x - self.mean.to(x.dtype)) / self.std(floor).to(x.dtype), clip)


class FullWhitening(RunningMoments):
    """x ↦ (Σ + ridge · mean(diag Σ) · I)^(−1/2) (x − mean) with the covariance Σ (`whiten_values`).

    The symmetric root leaves x closest to what it was. Of the deltas of few tokens Σ has a low
    rank: the ridge bounds the rest.
    """

    def __init__(self, width: int, ridge: float) -> None:
        super().__init__(width)
        self.ridge = ridge
        self.register_buffer("m2", torch.zeros(width, width, dtype=torch.float64))
        # Eigenvectors of Σ and (their values + ridge)^(−1/2), with the version of `m2`.
        self._spectrum: tuple[int, Tensor, Tensor] | None = None

    def _squares(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
        return x.T @ x

    @torch.no_grad()
    def spectrum(self, dtype: torch.dtype) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
        """V and s, where V diag(s) Vᵀ whitens; computed once for the rows added so far."""
        if self._spectrum is None or self._spectrum[0] != self.m2._version:
            # The ridge bounds the condition number, so single precision does for float32 rows.
            covariance = self.m2 / max(int(self.count) - 1, 1)
            values, vectors = torch.linalg.eigh(covariance.to(dtype))
            floor = self.ridge * values.mean() + torch.finfo(dtype).tiny
            scale = (values.clamp(min=0) + floor).rsqrt()
            self._spectrum = self.m2._version, vectors, scale
        return self._spectrum[1:]

    def normalise(
        self, x: Float[Tensor, "n d"], *, floor: float, clip: float | None
    ) -> Float[Tensor, "n d"]:
        """The whitened rows, clipped to ±clip; x itself while empty. `floor` is for one feature."""
        if int(self.count) == 0:
            return x
        parts = self.spectrum(torch.promote_types(x.dtype, torch.float32))
        vectors, scale = (part.to(x.dtype) for part in parts)
        return _clipped((x - self.mean.to(x.dtype)) @ vectors * scale @ vectors.T, clip)


class SecondMoment(nn.Module):
    """Gathers C = E[x xᵀ] of a layer's inputs in float64, for `fit`."""

    count: Tensor

    def __init__(self, width: int, *, n_sums: int = 1) -> None:
        super().__init__()
        self.width, self.n_sums = width, n_sums
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._forget()

    def _forget(self) -> None:
        self._sums: list[Tensor | float] = [0.0] * self.n_sums  # the first is Σ x xᵀ

    @torch.no_grad()
    def add(self, x: Float[Tensor, "n i"]) -> None:
        """Gather rows."""
        self._sums[0] = x.double().T @ x.double() + self._sums[0]
        self.count += len(x)

    @torch.no_grad()
    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Join the rows of several processes: `total` sums a tensor over them."""
        # a process may have gathered none
        zeros = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.count.device)
        self._sums = [total(zeros + gathered) for gathered in self._sums]
        self.count.copy_(total(self.count))


class Whitening(SecondMoment):
    """Keys of the layer's inputs, x ↦ M x (`whiten`; not in the paper).

    M = K = (C + ridge · mean(diag C) · I)⁻¹ with C = E[x xᵀ], at unit mean square.
    With `pairs` M = K P K with P = E[x yᵀ] over pairs of a group, and first tokens of an answer
    have an M of their own. `unit_response`: each key is divided by its response xᵀ M x.
    """

    # A key is large only along directions that distinguish it from other prompts' keys, as in
    # ROME's update (Meng et al., 2022, equation 2). C is not centred, for the layer multiplies a
    # key with raw inputs. A group is an answer's token read after several wordings of its prompt.
    # K P K solves the least squares of yᵀ M x = 1 for pairs, 0 for others, and keeps what the
    # wordings share. First tokens carry the fact, later ones its spelling.
    # With `unit_response` an edit acts alike at all its tokens.

    matrix: Tensor
    response: Tensor

    def __init__(
        self, width: int, ridge: float, *, pairs: bool = False, unit_response: bool = False
    ) -> None:
        super().__init__(width, n_sums=1 + 2 * pairs)  # Σ x yᵀ of later tokens, of first ones
        self.ridge, self.pairs, self.unit_response = ridge, pairs, unit_response
        kinds = 1 + pairs
        self.register_buffer("matrix", torch.eye(width).repeat(kinds, 1, 1))
        self.register_buffer("response", torch.ones(kinds))  # mean of xᵀ M x over the rows seen

    @torch.no_grad()
    def add(
        self,
        x: Float[Tensor, "n d"],
        groups: Int[Tensor, " n"] | None = None,
        first: Bool[Tensor, " n"] | None = None,
    ) -> None:
        """Gather rows; with `pairs` the group of each (−1: none), and its kind."""
        super().add(x)
        if groups is None:
            return
        x = x.double()
        for kind in range(len(self.matrix)):
            chosen = (groups >= 0) & (first == bool(kind))
            rows = x[chosen]
            sums = x.new_zeros(int(groups.max()) + 1, x.shape[1])
            sums = sums.index_add(0, groups[chosen], rows)
            # all ordered pairs of a group, less each row with itself
            self._sums[1 + kind] = sums.T @ sums - rows.T @ rows + self._sums[1 + kind]

    @torch.no_grad()
    def fit(self) -> None:
        """Compute the matrices. Raises DataError if no two rows were paired."""
        moment = self._sums[0] / self.count
        floor = self.ridge * moment.diagonal().mean()
        inverse = torch.linalg.inv(moment + floor * torch.eye(len(moment)).to(moment))
        for kind in range(len(self.matrix)):
            matrix = inverse
            if self.pairs:
                pairs = self._sums[1 + kind]
                if isinstance(pairs, float) or not bool(pairs.any()):
                    raise DataError(
                        "whiten_pairs: no example has a paraphrase; set `whiten_pairs: false`"
                    )
                paired = inverse @ pairs @ inverse
                if float((paired * moment).sum()) > 0:  # else wordings share nothing
                    matrix = paired
            scale = (matrix @ moment @ matrix).diagonal().mean().sqrt()
            self.matrix[kind] = (matrix + matrix.T) / (2 * scale)  # symmetric to the bit
            self.response[kind] = (matrix * moment).sum() / scale
        self._forget()

    def normalise(
        self,
        x: Float[Tensor, "n d"],
        *,
        clip: float | None,
        first: Bool[Tensor, " n"] | None = None,
        floor: float = 0.0,
    ) -> Float[Tensor, "n d"]:
        """Keys of the rows, clipped to ±clip; `floor` is for moments."""
        key, mean = x @ self.matrix[0].to(x.dtype), self.response[0]
        if self.pairs:
            assert first is not None
            key = torch.where(first[:, None], x @ self.matrix[1].to(x.dtype), key)
            mean = self.response[first.long()]
        if self.unit_response:
            response = (x * key).sum(1) / mean.to(x.dtype)
            key = key / response.clamp(min=LEAST_RESPONSE)[:, None]
        return _clipped(key, clip)


def _clipped(x: Tensor, clip: float | None) -> Tensor:
    return x if clip is None else x.clamp(-clip, clip)
