"""MEND: a hypernetwork that maps an edit's gradient factors to a better low-rank update (Mitchell et al., ICLR 2022).

For each token z = [norm(u); norm(delta)] (section 3.2; u, delta: factors.py) passes through low-rank residual blocks

    h = z + max(0, s ⊙ (U V z + b) + o)                                    (equation 3; s, o: one row per layer)

and is split into ũ, δ̃. The edit is W − α Σ_t δ̃_t ũ_tᵀ, with one learned step size α per layer (Algorithm 2).

Parity facts, kept from the authors' implementation: `n_hidden: 1` means two blocks, the last block clamps too, the
clamp passes the gradient at 0 (U starts at zero: the first output is the identity), one transform is shared by all
layers of a shape. Decisions of ours: V is Xavier-uniform (`init: id_xavier`; the paper's appendix), statistics are
per layer, gathered over training factors and then frozen, with a floor on the std and a clip on the result; log α is
learned with its own learning rate, the sign is fixed (CORRECTNESS rows 1–9).
Axes: n tokens (packed), i layer input, o layer output, d = i + o.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .edit import LowRankUpdate, Updates, padded
from .errors import HyperParamError
from .factors import Factors
from .hparams import MENDHyperParams
from .models import Site


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

    def std(self, floor: float) -> Float[Tensor, " d"]:
        """Standard deviation, at least `floor` times the median over the features (units silent in training)."""
        std = (self.m2 / max(int(self.count) - 1, 1)).sqrt()
        return std.clamp(min=max(floor * float(std.median()), torch.finfo(torch.float32).tiny))

    def normalise(self, x: Float[Tensor, "n d"], *, floor: float, clip: float | None) -> Float[Tensor, "n d"]:
        """(x − mean) / std, clipped to ±clip; x itself while empty."""
        if int(self.count) == 0:
            return x
        z = (x - self.mean.to(x.dtype)) / self.std(floor).to(x.dtype)
        return z if clip is None else z.clamp(-clip, clip)


class Whitening(nn.Module):
    """The inputs' normaliser with their full covariance C: x ↦ (C + ridge · mean(diag C) · I)⁻¹ (x − mean), scaled to
    unit mean square over the rows seen.

    Not in the paper (`whiten`): a key is then large only along directions that distinguish it from other prompts', as
    in ROME's rank-one update (Meng et al., 2022, equation 2), so that an edit disturbs its neighbours less.
    """

    def __init__(self, width: int, ridge: float) -> None:
        super().__init__()
        self.ridge = ridge
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("matrix", torch.eye(width))
        self._second: Tensor | None = None  # Σ x xᵀ while gathering

    @torch.no_grad()
    def add(self, x: Float[Tensor, "n d"]) -> None:
        """Gather the rows of x; `fit` makes use of them."""
        x = x.double()
        self._second = x.T @ x + (0 if self._second is None else self._second)
        self.mean *= int(self.count) / max(int(self.count) + len(x), 1)
        self.count += len(x)
        self.mean += x.sum(0) / max(int(self.count), 1)

    @torch.no_grad()
    def fit(self) -> None:
        """Compute the matrix from the rows gathered, and forget them."""
        covariance = self._second / self.count - torch.outer(self.mean, self.mean)
        floor = self.ridge * covariance.diagonal().mean()
        inverse = torch.linalg.inv(covariance + floor * torch.eye(len(self.mean), dtype=covariance.dtype))
        power = (inverse @ covariance @ inverse).diagonal().mean()  # mean square of the rows after the inverse
        self.matrix.copy_(inverse / power.sqrt())
        self._second = None

    def normalise(self, x: Float[Tensor, "n d"], *, floor: float, clip: float | None) -> Float[Tensor, "n d"]:
        """Whitened rows, clipped to ±clip (`floor` is the per-feature normaliser's)."""
        z = (x - self.mean.to(x.dtype)) @ self.matrix.to(x.dtype)
        return z if clip is None else z.clamp(-clip, clip)


class LowRankResidual(nn.Module):
    """One block: z + max(0, s ⊙ (U V z + b) + o), with s and o chosen per token by its layer (equation 3)."""

    def __init__(self, width: int, rank: int, n_layers: int, /, *, init: str, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, width)
        self.V = nn.Parameter(torch.empty(rank, width))
        self.U = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(n_layers, width))
        self.shift = nn.Parameter(torch.zeros(n_layers, width))
        if init == "id":
            nn.init.normal_(self.V, generator=generator)
        else:
            nn.init.xavier_uniform_(self.V, generator=generator)

    def forward(self, z: Float[Tensor, "n d"], counts: Sequence[int]) -> Float[Tensor, "n d"]:
        """Transform tokens sorted by layer, `counts[l]` of layer l."""
        hidden = (z @ self.V.T) @ self.U.T + self.bias
        layers = zip(hidden.split(counts), self.scale, self.shift, strict=True)
        return z + torch.cat([h * scale + shift for h, scale, shift in layers]).clamp(min=0)


class MEND(nn.Module):
    """The hypernetwork for a tuple of edit sites. Parameters, step sizes and moments are float32/float64 buffers.

    `shared: true` uses one stack of blocks for all sites of a shape, else each site has its own.
    """

    def __init__(self, sites: Sequence[Site], hparams: MENDHyperParams) -> None:
        super().__init__()
        _check_supported(hparams)
        self.sites, self.hparams = tuple(sites), hparams
        generator = torch.Generator().manual_seed(hparams.seed)
        groups: dict[str, list[Site]] = {}
        for site in self.sites:
            groups.setdefault(_key(site, hparams.shared), []).append(site)
        self.groups = {name: [site.name for site in members] for name, members in groups.items()}
        self.blocks = nn.ModuleDict({n: self._stack(members, generator) for n, members in groups.items()})
        self.moments = nn.ModuleDict(
            {
                _stats_key(site, hparams): nn.ModuleDict(
                    {"u": self._input_statistics(site.d_in), "delta": RunningMoments(site.d_out)}
                )
                for site in self.sites
            }
        )
        self.log_edit_lr = nn.Parameter(torch.full((len(self.sites),), float(hparams.edit_lr)).log())

    def _stack(self, members: Sequence[Site], generator: torch.Generator) -> nn.ModuleList:
        width, h = members[0].d_in + members[0].d_out, self.hparams
        rank = h.rank or width
        make = lambda: LowRankResidual(width, rank, len(members), init=h.init, generator=generator)  # noqa: E731
        return nn.ModuleList(make() for _ in range(h.n_hidden + 1))

    def _input_statistics(self, width: int) -> RunningMoments | Whitening:
        return RunningMoments(width) if self.hparams.whiten is None else Whitening(width, self.hparams.whiten)

    @property
    def edit_lrs(self) -> dict[str, float]:
        """The learned step size α of every site."""
        return dict(zip((s.name for s in self.sites), self.log_edit_lr.detach().exp().tolist(), strict=True))

    def warm_up(self, batches: Iterable[Factors]) -> None:
        """Gather the normaliser's statistics from training factors; they stay frozen afterwards."""
        for factors in batches:
            for site in self.sites:
                moments = self.moments[_stats_key(site, self.hparams)]
                moments["u"].add(factors[site.name].u)
                moments["delta"].add(factors[site.name].delta)
        for module in self.modules():
            if isinstance(module, Whitening):
                module.fit()

    def forward(self, factors: Factors, n_edits: int, /) -> Updates:
        """Updates of `n_edits` independent edits from their packed factors, as padded low-rank branches."""
        sign = self.hparams.update_sign
        coefficient = dict(zip((s.name for s in self.sites), sign * self.log_edit_lr.exp(), strict=True))
        by_name = {site.name: site for site in self.sites}
        updates: Updates = {}
        for group, names in self.groups.items():
            z = torch.cat([self._normalised(by_name[name], factors) for name in names])
            counts = [len(factors[name].rows) for name in names]
            for block in self.blocks[group]:
                z = block(z, counts)
            for name, part in zip(names, z.split(counts), strict=True):
                u, delta = part.split([by_name[name].d_in, by_name[name].d_out], dim=1)
                rows = factors[name].rows
                updates[name] = LowRankUpdate(padded(u, rows, n_edits), padded(delta, rows, n_edits), coefficient[name])
        return {site.name: updates[site.name] for site in self.sites}

    def _normalised(self, site: Site, factors: Factors) -> Float[Tensor, "n d"]:
        f, h = factors[site.name], self.hparams
        if not h.norm:
            return torch.cat([f.u, f.delta], 1)
        moments = self.moments[_stats_key(site, h)]
        parts = (moments[k].normalise(x, floor=h.std_floor, clip=h.z_clip) for k, x in (("u", f.u), ("delta", f.delta)))
        return torch.cat(list(parts), 1)


def _key(site: Site, shared: bool) -> str:
    return f"{site.d_in}x{site.d_out}" if shared else site.name.replace(".", "-")


def _stats_key(site: Site, hparams: MENDHyperParams) -> str:
    return _key(site, hparams.norm_stats == "shape")


def _check_supported(h: MENDHyperParams) -> None:
    """Reject rather than ignore (CORRECTNESS row 8)."""
    wanted = {"combine": True, "one_sided": False, "x_only": False, "delta_only": False}
    for key, value in wanted.items():
        if getattr(h, key) is not value:
            raise HyperParamError(f"{key}: only {value} is supported by this version, got {getattr(h, key)}")
    if h.init == "xavier":
        raise HyperParamError("init: 'xavier' is not supported by this version; use 'id_xavier' or 'id'")
