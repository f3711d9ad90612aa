"""The normaliser: what stands before the hypernetwork's first block (MEND, section 3.2).

Axes: n tokens (packed), d features.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import DataError


class RunningMoments(nn.Module):
    """Mean and variance of each feature, merged batch by batch (Chan, Golub & LeVeque 1979) in float64.

    All state is in buffers; count == 0 means empty. Statistics do not depend on how the rows were batched.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def add(self, x: Float[Tensor, "n d"]) -> None:
        """Merge the rows of x."""
        if len(x) == 0:
            return
        x = x.double()
        n, before, mean = len(x), int(self.count), x.mean(0)
        shift = mean - self.mean
        self.m2 += ((x - mean) ** 2).sum(0) + shift**2 * (before * n / (before + n))
        self.mean += shift * (n / (before + n))
        self.count += n

    @torch.no_grad()
    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Join the statistics of several processes: `total` sums a tensor over them."""
        count = total(self.count)
        mean = total(self.count * self.mean) / count.clamp(min=1)
        self.m2.copy_(total(self.m2 + self.count * (self.mean - mean) ** 2))
        self.mean.copy_(mean)
        self.count.copy_(count)

    def std(self, floor: float) -> Float[Tensor, " d"]:
        """Standard deviation, at least `floor` times the median over the features (units silent in training)."""
        std = self.plain_std()
        return std.clamp(min=max(floor * float(std.median()), torch.finfo(torch.float32).tiny))

    def plain_std(self) -> Float[Tensor, " d"]:
        """Standard deviation of the rows added."""
        return (self.m2 / max(int(self.count) - 1, 1)).sqrt()

    def normalise(
        self, x: Float[Tensor, "n d"], *, floor: float, clip: float | None
    ) -> Float[Tensor, "n d"]:
        """(x − mean) / std, clipped to ±clip; x itself while empty."""
        if int(self.count) == 0:
            return x
        z = (x - self.mean.to(x.dtype)) / self.std(floor).to(x.dtype)
        return z if clip is None else z.clamp(-clip, clip)


class StoredMoments(RunningMoments):
    """As published code has them: with `eps` added to the standard deviation, which is stored and so keeps its bits."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width)
        self.eps = eps
        self.register_buffer("stored_std", torch.zeros(width, dtype=torch.float64))

    def add(self, x: Float[Tensor, "n d"]) -> None:
        """Merge the rows of x."""
        super().add(x)
        self.stored_std.copy_(super().plain_std())

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Join the statistics of several processes."""
        super().merge(total)
        self.stored_std.copy_(super().plain_std())

    def std(self, floor: float) -> Float[Tensor, " d"]:
        """Standard deviation with the floor, and eps on top."""
        return super().std(floor) + self.eps

    def plain_std(self) -> Float[Tensor, " d"]:
        """Standard deviation as stored."""
        return self.stored_std


class Whitening(nn.Module):
    """The inputs' normaliser with their second moments: x ↦ M x with M = (C + ridge · mean(diag C) · I)⁻¹, C = E[x xᵀ],
    scaled to unit mean square over the rows seen.

    Not in the paper (`whiten`): a key is then large only along directions that distinguish it from other prompts', as
    in ROME's rank-one update (Meng et al., 2022, equation 2). C is not centred, as there: the layer multiplies a key
    with raw inputs, and a centred key answers what all inputs have in common.

    With `pairs` (`whiten_pairs`) M = K P K, with K the inverse above and P = E[x yᵀ] over pairs x, y of a group: one
    answer token read after several wordings of its prompt. That solves the least squares of yᵀ M x = 1 for the pairs
    of a group, 0 for all others: keys of what the wordings share. An answer's first token, which carries the fact,
    has an M of its own; the others, which carry its spelling, have another.

    `unit_response`: each key is divided by its own response xᵀ M x, so that an edit acts alike at all its tokens.
    """

    def __init__(
        self, width: int, ridge: float, /, *, pairs: bool = False, unit_response: bool = False
    ) -> None:
        super().__init__()
        self.ridge, self.unit_response = ridge, unit_response
        kinds = 2 if pairs else 1  # later tokens, first tokens
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("matrix", torch.eye(width).repeat(kinds, 1, 1))
        self.register_buffer("response", torch.ones(kinds))  # mean of xᵀ M x over the rows seen
        self._second: Tensor | float = 0.0  # Σ x xᵀ while gathering
        self._pairs: list[Tensor | float] = [
            0.0
        ] * kinds  # Σ x yᵀ over ordered pairs of a group, by kind

    @torch.no_grad()
    def add(
        self,
        x: Float[Tensor, "n d"],
        groups: Int[Tensor, " n"] | None = None,
        first: Bool[Tensor, " n"] | None = None,
    ) -> None:
        """Gather rows; `fit` makes use of them. With pairs: the group of each, numbered from 0 in every call (−1: of no
        group), and which are first tokens."""
        x = x.double()
        self._second = x.T @ x + self._second
        self.count += len(x)
        for kind in range(len(self.matrix) if groups is not None else 0):
            chosen = (groups >= 0) & (first == bool(kind))
            rows, own = x[chosen], groups[chosen]
            sums = x.new_zeros(int(groups.max()) + 1, x.shape[1]).index_add(0, own, rows)
            self._pairs[kind] = sums.T @ sums - rows.T @ rows + self._pairs[kind]

    @torch.no_grad()
    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Join the rows that several processes gathered: `total` sums a tensor over them."""
        zeros = torch.zeros_like(
            self.matrix[0], dtype=torch.float64
        )  # a process may have gathered none
        self.count.copy_(total(self.count))
        self._second = total(zeros + self._second)
        self._pairs = [total(zeros + pairs) for pairs in self._pairs]

    @torch.no_grad()
    def fit(self) -> None:
        """Compute the matrices from the rows gathered, and forget them. Raises DataError if no two rows were paired."""
        moment = self._second / self.count
        floor = self.ridge * moment.diagonal().mean()
        inverse = torch.linalg.inv(
            moment + floor * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        )
        for kind, pairs in enumerate(self._pairs):
            matrix = inverse
            if len(self._pairs) == 2:
                if isinstance(pairs, float) or not bool(pairs.any()):
                    raise DataError(
                        "whiten_pairs: no example has a paraphrase; set `whiten_pairs: false`"
                    )
                paired = inverse @ pairs @ inverse
                matrix = (
                    paired if float((paired * moment).sum()) > 0 else inverse
                )  # else wordings share nothing
            scale = (matrix @ moment @ matrix).diagonal().mean().sqrt()
            self.matrix[kind] = matrix / scale
            self.response[kind] = (matrix * moment).sum() / scale
        self._second, self._pairs = 0.0, [0.0] * len(self._pairs)

    def normalise(
        self,
        x: Float[Tensor, "n d"],
        *,
        floor: float,
        clip: float | None,
        first: Bool[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n d"]:
        """Keys of the rows, clipped to ±clip (`floor` is the per-feature normaliser's)."""
        z, mean = x @ self.matrix[0].to(x.dtype), self.response[0].expand(len(x))
        if len(self.matrix) == 2:
            z, mean = (
                torch.where(first[:, None], x @ self.matrix[1].to(x.dtype), z),
                self.response[first.long()],
            )
        if self.unit_response:
            response = (x * z).sum(1) / mean.to(x.dtype)
            z = z / response.clamp(min=LEAST_RESPONSE)[:, None]
        return z if clip is None else z.clamp(-clip, clip)


LEAST_RESPONSE = 0.2
"""A token's own response, as a share of the mean one, below which its key is not made longer any more."""
