"""MEND: a hypernetwork that maps an edit's gradient factors to a better low-rank update (Mitchell et al., ICLR 2022).

For each token z = [norm(u); norm(delta)] (section 3.2; u, delta: factors.py) passes through low-rank residual blocks

    h = z + max(0, s ⊙ (U V z + b) + o)                                    (equation 3; s, o: one row per layer)

and is split into ũ, δ̃. The edit is W − α Σ_t δ̃_t ũ_tᵀ, with one learned step size α per layer (Algorithm 2).
With `combine: false` u and delta pass through blocks of their own, or one of them as it is (`x_only`, `delta_only`;
`one_sided`: the wider of the two), and with `shared: false` each layer has its blocks, without s and o.

Parity facts, kept from the authors' implementation: `n_hidden: 1` means two blocks, the last block clamps too, the
clamp passes the gradient at 0 (U starts at zero: the first output is the identity), `init: xavier` has no residual
path, one transform is shared by all layers of a shape. Decisions of ours: V is Xavier-uniform (`init: id_xavier`; the
paper's appendix), statistics are per layer, gathered over training factors and then frozen, with a floor on the std and
a clip on the result; log α is learned with its own learning rate, the sign is fixed (CORRECTNESS rows 1–9).
Axes: n tokens (packed), i layer input, o layer output, d = i + o.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..hparams import MENDHyperParams
from ..models.sites import Site
from .factors import Factors, GradientFactors, Inputs
from .least_squares import Memory, OtherKeys, remember, solve
from .normaliser import RunningMoments, StoredMoments, Whitening
from .updates import LowRankUpdate, Updates, padded

Wordings = tuple[Inputs, Int[Tensor, " n"], Bool[Tensor, " n"]]
"""Layer inputs, the group of each (−1: none), and whether it predicts the first token of an answer (`Whitening`)."""


class LowRankResidual(nn.Module):
    """One block: z + max(0, s ⊙ (U V z + b) + o), with s and o chosen per token by its layer (equation 3).

    `n_layers` None: a block of one layer, without s and o. `init: xavier` draws U, too, and leaves out the `z +`.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        n_layers: int | None,
        /,
        *,
        init: str,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        rank = min(rank, width)
        self.V = nn.Parameter(torch.empty(rank, width))
        self.U = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = None if n_layers is None else nn.Parameter(torch.ones(n_layers, width))
        self.shift = None if n_layers is None else nn.Parameter(torch.zeros(n_layers, width))
        self.residual = init != "xavier"
        if init == "xavier":
            nn.init.xavier_uniform_(
                self.U, gain=nn.init.calculate_gain("relu"), generator=generator
            )
        if init == "id":
            nn.init.normal_(self.V, generator=generator)
        else:
            nn.init.xavier_uniform_(self.V, generator=generator)

    def forward(self, z: Float[Tensor, "n d"], counts: Sequence[int]) -> Float[Tensor, "n d"]:
        """Transform tokens sorted by layer, `counts[l]` of layer l."""
        hidden = (z @ self.V.T) @ self.U.T + self.bias
        if self.scale is not None:
            layers = zip(hidden.split(counts), self.scale, self.shift, strict=True)
            hidden = torch.cat([h * scale + shift for h, scale, shift in layers])
        hidden = hidden.clamp(min=0)
        return z + hidden if self.residual else hidden


class MEND(nn.Module):
    """The hypernetwork for a tuple of edit sites. Parameters, step sizes and moments are float32/float64 buffers.

    `shared: true` uses one stack of blocks for all sites of a shape, else each site has its own. The step size of a
    site is `edit_lr_unit` · exp(`log_edit_lr`): the unit is 1, or an imported step size, which may be negative.
    """

    def __init__(self, sites: Sequence[Site], hparams: MENDHyperParams) -> None:
        super().__init__()
        self.sites, self.hparams = tuple(sites), hparams
        generator = torch.Generator().manual_seed(hparams.seed)
        groups: dict[str, list[Site]] = {}
        for site in self.sites:
            groups.setdefault(group_name(site, hparams.shared), []).append(site)
        self.groups = {name: [site.name for site in members] for name, members in groups.items()}
        self.blocks = nn.ModuleDict(
            {
                name + part: self._stack(width, len(members) if hparams.shared else None, generator)
                for name, members in groups.items()
                for part, width in transformed(members[0], hparams).items()
            }
        )
        self.moments = nn.ModuleDict(
            {
                stats_name(site, hparams): nn.ModuleDict(
                    {
                        "u": self._statistics(site.d_in, hparams.whiten),
                        "delta": self._statistics(site.d_out),
                    }
                )
                for site in self.sites
            }
        )
        self.log_edit_lr = nn.Parameter(
            torch.full((len(self.sites),), float(hparams.edit_lr)).log()
        )
        self.register_buffer("edit_lr_unit", torch.ones(len(self.sites)))
        if hparams.aggregate == "least_squares":
            self.others = nn.ModuleDict(
                {stats_name(site, hparams): OtherKeys(site.d_in) for site in self.sites}
            )
            start = torch.tensor([hparams.ridge, hparams.ridge_shared])
            self.log_ridge = nn.Parameter(start.log().repeat(len(self.sites), 1))

    def _stack(self, width: int, n_layers: int | None, generator: torch.Generator) -> nn.ModuleList:
        h = self.hparams
        make = lambda: LowRankResidual(
            width, h.rank or width, n_layers, init=h.init, generator=generator
        )  # noqa: E731
        return nn.ModuleList(make() for _ in range(h.n_hidden + 1))

    def _statistics(self, width: int, whiten: float | None = None) -> RunningMoments | Whitening:
        if whiten is not None:
            h = self.hparams
            return Whitening(width, whiten, pairs=h.whiten_pairs, unit_response=h.unit_response)
        return (
            StoredMoments(width, self.hparams.std_eps)
            if self.hparams.std_eps
            else RunningMoments(width)
        )

    def steps(self) -> Float[Tensor, " s"]:
        """The step sizes α in the order of the sites; gradients flow through them."""
        return self.edit_lr_unit * self.log_edit_lr.exp()

    @property
    def edit_lrs(self) -> dict[str, float]:
        """The learned step size α of every site."""
        return dict(zip((s.name for s in self.sites), self.steps().detach().tolist(), strict=True))

    def warm_up(
        self,
        batches: Iterable[Factors],
        wordings: Iterable[Wordings] = (),
        *,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Gather the normaliser's statistics from training factors; they stay frozen afterwards.

        With `whiten_pairs` the statistics of u come from `wordings` instead, and with `aggregate: least_squares` so do
        the keys to keep. Where several processes gather, `total` sums a tensor over them.
        """
        for factors in batches:
            for site in self.sites:
                self._gather(site, factors[site.name])
        for inputs, groups, first in wordings:
            for site in self.sites if self.hparams.whiten_pairs else ():
                self.moments[stats_name(site, self.hparams)]["u"].add(
                    inputs[site.name], groups, first
                )
            self._add_keys(inputs)
        for module in self.modules():
            if total is not None and isinstance(module, (RunningMoments, Whitening, OtherKeys)):
                module.merge(total)
            if isinstance(module, (Whitening, OtherKeys)):
                module.fit()

    def with_least_squares(
        self, inputs: Iterable[Inputs], /, *, ridge: float, ridge_shared: float
    ) -> "MEND":
        """A copy that puts many edits together by least squares; `inputs` are the keys to spare."""
        h = self.hparams.replace(aggregate="least_squares", ridge=ridge, ridge_shared=ridge_shared)
        made = MEND(self.sites, h)
        made = made.to(self.log_edit_lr.device)
        made.load_state_dict(
            {name: value.clone() for name, value in self.state_dict().items()}, False, assign=True
        )
        for own in inputs:
            made._add_keys(own)
        for other in made.others.values():
            other.fit()
        return made

    def _add_keys(self, inputs: Inputs) -> None:
        for site in self.sites if self.hparams.aggregate == "least_squares" else ():
            self.others[stats_name(site, self.hparams)].add(inputs[site.name])

    def _gather(self, site: Site, factors: GradientFactors, *, fitted: bool = False) -> None:
        moments = self.moments[stats_name(site, self.hparams)]
        if isinstance(moments["u"], RunningMoments) or not (fitted or self.hparams.whiten_pairs):
            moments["u"].add(factors.u)
        moments["delta"].add(factors.delta)

    def forward(
        self,
        factors: Factors,
        n_edits: int,
        /,
        *,
        gather: Sequence[str] = (),
        at_once: int = 1,
        memory: Memory | None = None,
        held: Mapping[str, Tensor] | None = None,
    ) -> Updates:
        """Updates of `n_edits` independent edits from their packed factors, as padded low-rank branches; with `at_once`
        one update for each so many in a row. The edits that `memory` holds are kept; a single update joins them, and
        does what `held`, the weight changes (o, i) in force by site name, leave to be done.

        With `gather`, all sites' names, the statistics run on, as the authors' code does while it trains: each
        layer's tokens join them just before they are normalised, layer by layer in this order (not those of `whiten`).
        """
        coefficient = dict(
            zip((s.name for s in self.sites), self.hparams.update_sign * self.steps(), strict=True)
        )
        by_name, normal = {site.name: site for site in self.sites}, {}
        for name in gather or by_name:
            if gather:
                self._gather(by_name[name], factors[name], fitted=True)
            normal[name] = self._normalised(by_name[name], factors[name])
        updates: Updates = {}
        for group, names in self.groups.items():
            counts = [len(factors[name].rows) for name in names]
            outputs = self._transform(
                group, by_name[names[0]], [normal[name] for name in names], counts
            )
            for name, u, delta in zip(names, *outputs, strict=True):
                rows = factors[name].rows
                own = LowRankUpdate(
                    padded(u, rows, n_edits), padded(delta, rows, n_edits), coefficient[name]
                )
                if self.hparams.aggregate == "least_squares":
                    keys = padded(factors[name].u, rows, n_edits)
                    updates[name] = self._least_squares(
                        by_name[name], own, keys, at_once, memory, (held or {}).get(name)
                    )
                else:
                    updates[name] = own.merged(at_once)
        return {site.name: updates[site.name] for site in self.sites}

    def _least_squares(
        self,
        site: Site,
        own: LowRankUpdate,
        keys: Float[Tensor, "b t i"],
        at_once: int,
        memory: Memory | None,
        held: Float[Tensor, "o i"] | None,
    ) -> LowRankUpdate:
        """One update for each `at_once` edits, from the update and the keys of each (least_squares.py)."""
        shifts = LowRankUpdate(keys, own.branch(keys), 1.0).merged(at_once)
        other = self.others[stats_name(site, self.hparams)]
        ridge = self.log_ridge[self.sites.index(site)].exp().double()
        kept, earlier = (memory or {}).get(site.name, (None, 0))
        ridge = ridge * ridge.new_tensor([1, earlier + at_once])
        u, z, ridges = solve(shifts.u, own.merged(at_once).u, other, ridge, memory=kept)
        if memory is not None and len(z) == 1:
            grown = remember(other.inverse() if kept is None else kept, z[0], ridges[0])
            memory[site.name] = grown, earlier + at_once
        if held is not None:
            return LowRankUpdate(u, torch.cat([shifts.delta] * 2, 1) - z.to(u) @ held.T.to(u), 1.0)
        half = u.shape[1] // 2
        return LowRankUpdate(u[:, :half] + u[:, half:], shifts.delta, 1.0)

    def _transform(
        self, group: str, site: Site, pairs: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """ũ and δ̃ of every layer of a group, from its normalised pairs (u, delta)."""

        def run(z: Tensor, part: str) -> Tensor:
            if group + part in self.blocks:
                for block in self.blocks[group + part]:
                    z = block(z, counts)
            return z

        if self.hparams.combine:
            z = run(torch.cat([torch.cat(pair, 1) for pair in pairs]), "")
            u, delta = z.split([site.d_in, site.d_out], dim=1)
        else:
            u, delta = (
                run(torch.cat(z), part)
                for z, part in zip(zip(*pairs, strict=True), PARTS, strict=True)
            )
        return u.split(counts), delta.split(counts)

    def _normalised(
        self, site: Site, factors: GradientFactors
    ) -> tuple[Float[Tensor, "n i"], Float[Tensor, "n o"]]:
        h = self.hparams
        if not h.norm:
            return factors.u, factors.delta
        moments, limits = (
            self.moments[stats_name(site, h)],
            {"floor": h.std_floor, "clip": h.z_clip},
        )
        delta = moments["delta"].normalise(factors.delta, **limits)
        if (
            h.whiten_pairs
        ):  # only scored tokens make the update, so an edit's first one predicts its answer's first
            limits["first"] = torch.diff(factors.rows, prepend=factors.rows.new_full((1,), -1)) != 0
        return moments["u"].normalise(factors.u, **limits), delta


PARTS = (":u", ":delta")
"""What the names of blocks of their own end with; combined blocks have the bare name of their group."""


def transformed(site: Site, h: MENDHyperParams) -> dict[str, int]:
    """Which stacks of blocks a site needs: the end of the name, and the width."""
    if h.combine:
        return {"": site.d_in + site.d_out}
    u, delta = ({part: width} for part, width in zip(PARTS, (site.d_in, site.d_out), strict=True))
    if h.one_sided:  # the published code transforms delta where u is the wider, else u
        return delta if site.d_in > site.d_out else u
    return u if h.x_only else delta if h.delta_only else u | delta


def group_name(site: Site, shared: bool) -> str:
    """The sites with this name in common share what it names."""
    return f"{site.d_in}x{site.d_out}" if shared else site.name.replace(".", "-")


def stats_name(site: Site, hparams: MENDHyperParams) -> str:
    """The key of a site's statistics."""
    return group_name(site, hparams.norm_stats == "shape")
