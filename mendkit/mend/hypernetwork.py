"""MEND: a hypernetwork from gradient factors to a better low-rank update (Mitchell et al., 2022).

Section 3.2, for each token of a layer:

    z = [norm(u); norm(delta)]                      normalise (normaliser.py)
    [ũ; δ̃] = z + max(0, s ⊙ (U V z + b) + o)        transform: equation 3, block after block
    ΔW = −α Σ_t δ̃_t ũ_tᵀ                            scale: Algorithm 2 (α, s, o: one for each layer)

`combine: false`: u and delta have separate blocks, or one of them has (`x_only`, `delta_only`,
`one_sided`). `shared: false`: each layer has its blocks, without s and o.
Axes: n tokens of all edits (packed), i layer input, o layer output, d = i + o.
"""

# Kept from the authors' implementation: `n_hidden: 1` means two blocks, the last block clamps too,
# the clamp passes the gradient at 0 (U starts at zero: the first output is the identity),
# `init: xavier` has no residual path, all layers of a shape share a transform. Decisions of ours:
# V is Xavier-uniform (`init: id_xavier`, the paper's appendix), statistics are per layer, log α is
# learned with a learning rate of its own, the sign is fixed (CORRECTNESS rows 1–9).

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..hparams import MENDHyperParams
from ..models.sites import Site
from .factors import Factors, GradientFactors, Inputs
from .least_squares import Memory, OtherKeys, asked_shifts, normal_equation, put_together
from .normaliser import FullWhitening, RunningMoments, SecondMoment, Whitening
from .updates import LowRankUpdate, Updates, padded

# Ends of the names of separate blocks; combined ones have the group's bare name.
PARTS = (":u", ":delta")

# Layer inputs, the group of each (−1: none), whether it predicts an answer's first token.
Wordings = tuple[Inputs, Int[Tensor, " n"], Bool[Tensor, " n"]]

# u (n, i) and delta (n, o), or what became of them, by site name.
Pairs = dict[str, tuple[Tensor, Tensor]]


class LowRankResidual(nn.Module):
    """One block: z + max(0, s ⊙ (U V z + b) + o), with s and o of each token's layer (equation 3).

    `n_layers` None: without s and o. `init: xavier` draws U, too, and leaves out the `z +`.
    """

    def __init__(
        self, width: int, n_layers: int | None, h: MENDHyperParams, generator: torch.Generator
    ) -> None:
        super().__init__()
        rank = min(h.rank or width, width)
        self.V = nn.Parameter(torch.empty(rank, width))
        self.U = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = self.shift = None
        if n_layers is not None:
            self.scale = nn.Parameter(torch.ones(n_layers, width))
            self.shift = nn.Parameter(torch.zeros(n_layers, width))
        self.residual = h.init != "xavier"
        if not self.residual:
            gain = nn.init.calculate_gain("relu")
            nn.init.xavier_uniform_(self.U, gain=gain, generator=generator)
        if h.init == "id":
            nn.init.normal_(self.V, generator=generator)
        else:
            nn.init.xavier_uniform_(self.V, generator=generator)

    def forward(self, z: Float[Tensor, "n d"], counts: Sequence[int]) -> Float[Tensor, "n d"]:
        """Transform tokens sorted by layer, `counts[l]` of layer l."""
        hidden = (z @ self.V.T) @ self.U.T + self.bias
        if self.scale is not None and self.shift is not None:
            layers = zip(hidden.split(counts), self.scale, self.shift, strict=True)
            hidden = torch.cat([h * scale + shift for h, scale, shift in layers])
        hidden = hidden.clamp(min=0)
        return z + hidden if self.residual else hidden


class MEND(nn.Module):
    """The hypernetwork for a tuple of edit sites.

    The step size α of a site is `edit_lr_unit` · exp(`log_edit_lr`).
    The unit is 1, or an imported step size, which may be negative.
    """

    edit_lr_unit: Tensor
    # torch does not say what its containers hold:
    blocks: Any  # LowRankResidual, by group and part, in a list
    moments: Any  # RunningMoments or a whitening, by statistics' name and then "u" or "delta"
    others: Any  # OtherKeys, by statistics' name, with least squares

    def __init__(self, sites: Sequence[Site], hparams: MENDHyperParams) -> None:
        super().__init__()
        self.sites, self.hparams = tuple(sites), hparams
        # 1. Statistics of each layer, or of all layers of a shape.
        self.stats_of = {site.name: stats_name(site, hparams) for site in self.sites}
        self.moments, self.others = nn.ModuleDict(), nn.ModuleDict()
        for site in self.sites:
            self.moments[self.stats_of[site.name]] = _normalisers(site, hparams)
            if hparams.aggregate == "least_squares":
                self.others[self.stats_of[site.name]] = OtherKeys(site.d_in)
        # 2. Blocks of each group of layers.
        groups: dict[str, list[Site]] = {}
        for site in self.sites:
            groups.setdefault(group_name(site, hparams.shared), []).append(site)
        self.groups = {group: [site.name for site in alike] for group, alike in groups.items()}
        self.blocks = nn.ModuleDict()
        generator = torch.Generator().manual_seed(hparams.seed)
        for group, alike in groups.items():
            n_layers = len(alike) if hparams.shared else None
            for part, width in transformed(alike[0], hparams).items():
                stack = nn.ModuleList()
                for _ in range(hparams.n_hidden + 1):
                    stack.append(LowRankResidual(width, n_layers, hparams, generator))
                self.blocks[group + part] = stack
        # 3. Step sizes, and the ridges of what solves for several edits.
        edit_lr = 1.0 if hparams.edit_lr == "auto" else hparams.edit_lr
        start = torch.full((len(self.sites),), float(edit_lr))
        self.log_edit_lr = nn.Parameter(start.log())
        self.register_buffer("edit_lr_unit", torch.ones(len(self.sites)))
        if hparams.aggregate != "sum":
            ridges = torch.tensor([hparams.ridge, hparams.ridge_shared][: 1 + bool(self.others)])
            self.log_ridge = nn.Parameter(ridges.log().repeat(len(self.sites), 1))

    def steps(self) -> Float[Tensor, " s"]:
        """The step sizes α in the order of the sites."""
        return self.edit_lr_unit * self.log_edit_lr.exp()

    @property
    def edit_lrs(self) -> dict[str, float]:
        """The learned step size α of every site."""
        return dict(zip(self.stats_of, self.steps().detach().tolist(), strict=True))

    @torch.no_grad()
    def start_at(self, edit_lr: float) -> None:
        """Give every site this step size, as `edit_lr` would."""
        self.hparams = self.hparams.replace(edit_lr=edit_lr)
        self.log_edit_lr.copy_(torch.full_like(self.log_edit_lr, edit_lr).log())

    # ---------------------------------------- an edit

    def forward(
        self,
        factors: Factors,
        n_edits: int,
        *,
        at_once: int = 1,
        memory: Memory | None = None,
        gather: Sequence[str] = (),
    ) -> Updates:
        """Updates of `n_edits` independent edits, or one for each `at_once` in a row.

        `memory`: earlier edits of a sequence (least squares); `gather`: as `normalise`.
        """
        # Algorithm 2: normalise, transform, scale.
        normalised = self.normalise(factors, gather, at_once=at_once)
        transformed = self.transform(normalised)
        updates = self.scale(transformed, factors, n_edits)
        if self.hparams.aggregate != "sum":
            return self._solved(updates, factors, at_once, memory)
        return {name: update.merged(at_once) for name, update in updates.items()}

    def normalise(self, factors: Factors, gather: Sequence[str] = (), *, at_once: int = 1) -> Pairs:
        """norm(u) and norm(delta) of every site.

        With `gather`, all sites' names, the statistics run on (but those of `whiten`), as in the
        authors' code: layer by layer, tokens join them before they are normalised. While there are
        none (`stats_examples: 0`), those of every `at_once` edits in a row are their own.
        """
        h, normalised = self.hparams, {}
        for name in gather or self.stats_of:
            u, delta, rows = factors[name].u, factors[name].delta, factors[name].rows
            moments = self.moments[self.stats_of[name]]
            if gather:
                self._add(name, factors[name], once_fitted=True)
            if h.norm:
                limits: dict[str, Any] = {"floor": h.std_floor, "clip": h.z_clip}
                alone = None
                if h.stats_examples == 0 and not int(moments["delta"].count):
                    alone = torch.bincount(rows // at_once).tolist()
                delta = _normalised(moments["delta"], delta, alone, limits)
                if h.whiten_pairs:
                    # only scored tokens make the update: an edit's first predicts its answer's
                    limits["first"] = torch.diff(rows, prepend=rows.new_full((1,), -1)) != 0
                u = _normalised(moments["u"], u, alone, limits)
            normalised[name] = u, delta
        return normalised

    def transform(self, normalised: Pairs) -> Pairs:
        """ũ and δ̃ of every site; a group's layers pass through its blocks together."""
        moved: Pairs = {}
        for group, names in self.groups.items():
            us, deltas = zip(*(normalised[name] for name in names), strict=True)
            counts = [len(u) for u in us]
            u, delta = torch.cat(us), torch.cat(deltas)
            if self.hparams.combine:
                widths = [u.shape[1], delta.shape[1]]
                z = self._through(group, torch.cat([u, delta], 1), counts)
                u, delta = z.split(widths, dim=1)
            else:
                u = self._through(group + PARTS[0], u, counts)
                delta = self._through(group + PARTS[1], delta, counts)
            pairs = zip(u.split(counts), delta.split(counts), strict=True)
            moved |= zip(names, pairs, strict=True)
        return moved

    def _through(self, name: str, z: Tensor, counts: Sequence[int]) -> Tensor:
        if name in self.blocks:
            for block in self.blocks[name]:
                z = block(z, counts)
        return z

    def scale(self, transformed: Pairs, factors: Factors, n_edits: int) -> Updates:
        """ΔW = −α Σ_t δ̃_t ũ_tᵀ of every edit and site."""
        updates: Updates = {}
        for name, step in zip(self.stats_of, self.hparams.update_sign * self.steps(), strict=True):
            (u, delta), rows = transformed[name], factors[name].rows
            u, delta = padded(u, rows, n_edits), padded(delta, rows, n_edits)
            updates[name] = LowRankUpdate(u, delta, step)
        return updates

    def _solved(
        self, updates: Updates, factors: Factors, at_once: int, memory: Memory | None
    ) -> Updates:
        # each site has ridges of its own; a memory spans all sites, so edits are counted once
        solved: Updates = {}
        for (name, each), log_ridge in zip(updates.items(), self.log_ridge, strict=True):
            keys, ridge = padded(factors[name].u, factors[name].rows, len(each)), log_ridge.exp()
            shifts = asked_shifts(each, keys, self.hparams.value_coefficient)
            asked, ridge = LowRankUpdate(keys, shifts, 1.0).merged(at_once), ridge.double()
            if not self.others:
                solved[name] = replace(asked, u=normal_equation(asked.u, ridge))
                continue
            solved[name] = put_together(
                name,
                each,
                asked,
                self.others[self.stats_of[name]],
                ridge,
                at_once=at_once,
                memory=memory,
            )
        if memory is not None and len(each) == at_once:
            memory.edits += at_once
        return solved

    # ---------------------------------------- statistics

    def warm_up(
        self,
        batches: Iterable[Factors],
        wordings: Iterable[Wordings] = (),
        *,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Gather the statistics from training factors.

        `wordings` give those of u with `whiten_pairs`, and the keys to keep with least squares.
        Where several processes gather, `total` sums a tensor over them.
        """
        for factors in batches:
            for name in self.stats_of:
                self._add(name, factors[name])
        for inputs, groups, first in wordings:
            if self.hparams.whiten_pairs:
                for name, stats in self.stats_of.items():
                    self.moments[stats]["u"].add(inputs[name], groups, first)
            self._add_keys(inputs)
        for module in self.modules():
            if total is not None and isinstance(module, RunningMoments | SecondMoment):
                module.merge(total)
            if isinstance(module, Whitening | OtherKeys):
                module.fit()

    def with_least_squares(
        self, inputs: Iterable[Inputs], *, ridge: float, ridge_shared: float
    ) -> "MEND":
        """A copy that solves least squares; `inputs` are the keys to spare."""
        h = self.hparams.replace(aggregate="least_squares", ridge=ridge, ridge_shared=ridge_shared)
        made = MEND(self.sites, h).to(self.log_edit_lr.device)
        state = {name: value.clone() for name, value in self.state_dict().items()}
        made.load_state_dict(state, strict=False, assign=True)
        for keys in inputs:
            made._add_keys(keys)
        for other in made.others.values():
            other.fit()
        return made

    def _add_keys(self, inputs: Inputs) -> None:
        if self.others:
            for name, stats in self.stats_of.items():
                self.others[stats].add(inputs[name])

    def _add(self, name: str, factors: GradientFactors, *, once_fitted: bool = False) -> None:
        moments = self.moments[self.stats_of[name]]
        runs_on = isinstance(moments["u"], RunningMoments)
        if runs_on or not (once_fitted or self.hparams.whiten_pairs):
            moments["u"].add(factors.u)
        moments["delta"].add(factors.delta)


def _normalised(
    moments: Any, x: Tensor, alone: Sequence[int] | None, limits: dict[str, Any]
) -> Tensor:
    """Rows as the statistics normalise them; or `alone` so many in a row, by their own."""
    if alone is None:
        return moments.normalise(x, **limits)
    parts = []
    for rows in x.split(alone):
        own = deepcopy(moments)
        own.add(rows)
        parts.append(own.normalise(rows, **limits))
    return torch.cat(parts)


def _normalisers(site: Site, h: MENDHyperParams) -> nn.ModuleDict:
    u: nn.Module = RunningMoments(site.d_in, h.std_eps)
    if h.whiten is not None:
        u = Whitening(site.d_in, h.whiten, pairs=h.whiten_pairs, unit_response=h.unit_response)
    delta: nn.Module = RunningMoments(site.d_out, h.std_eps)
    if h.whiten_values is not None:
        delta = FullWhitening(site.d_out, h.whiten_values)
    return nn.ModuleDict({"u": u, "delta": delta})


def transformed(site: Site, h: MENDHyperParams) -> dict[str, int]:
    """The stacks of blocks that a site needs: the name's end, and the width."""
    if h.combine:
        return {"": site.d_in + site.d_out}
    u, delta = {PARTS[0]: site.d_in}, {PARTS[1]: site.d_out}
    if h.one_sided:  # the published code transforms delta where u is the wider, else u
        return delta if site.d_in > site.d_out else u
    if h.x_only:
        return u
    return delta if h.delta_only else u | delta


def group_name(site: Site, shared: bool) -> str:
    """The sites with this name in common share what it names."""
    return f"{site.d_in}x{site.d_out}" if shared else site.name.replace(".", "-")


def stats_name(site: Site, hparams: MENDHyperParams) -> str:
    """The key of a site's statistics."""
    return group_name(site, hparams.norm_stats == "shape")
