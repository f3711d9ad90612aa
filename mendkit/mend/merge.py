"""A weight change merged into a copy of a model: W + ΔW in float32 at least, then rounded to the weight's own dtype.

Half-precision weights lose small changes by that rounding (CORRECTNESS row 16), so every merge reports what is left.
"""

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..models.load import BaseModel
from ..models.sites import Site
from .losses import wide

logger = logging.getLogger(__name__)

LITTLE_KEPT = 0.9
"""A merge that keeps less than this share of a change is warned of."""


@dataclass(frozen=True)
class MergedSite:
    """What is left of a change ΔW after merging it into a weight, whose dtype rounds it."""

    name: str
    relative_error: float  # ‖W_merged − (W + ΔW)‖_F / ‖ΔW‖_F
    kept: float  # ⟨W_merged − W, ΔW⟩ / ‖ΔW‖²: 1 if all of it is there, 0 if nothing is


@dataclass(frozen=True)
class Merged:
    """A model with a change in its weights. All other weights are the base model's own, shared and not copied."""

    base: BaseModel
    sites: tuple[MergedSite, ...]


def merge(base: BaseModel, changes: Iterable[tuple[Site, Float[Tensor, "m n"]]], /) -> Merged:
    """A new model with each ΔW, in the orientation of its site's own weight, added to it; `base` stays as it is."""
    report, memo = [], {id(parameter): parameter for parameter in base.model.parameters()}
    for site, change in changes:
        weight = base.site_module(site).weight
        merged, row = _merge(weight, change, site.name)
        memo[id(weight)] = nn.Parameter(merged, requires_grad=False)
        report.append(row)
    _warn(report, base.dtype)
    model, names = copy.deepcopy(base.model, memo), tuple(site.name for site in base.sites)
    return Merged(
        BaseModel(model, base.tokenizer, name=f"{base.name} (edited)", inner_params=names),
        tuple(report),
    )


def _merge(weight: Tensor, change: Tensor, name: str) -> tuple[Tensor, MergedSite]:
    """W + ΔW in W's own dtype, and what its rounding leaves of ΔW (measured in float64)."""
    merged = (wide(weight) + change).to(weight.dtype)
    wanted, got = change.double(), merged.double() - weight.double()
    norm = float(wanted.norm())
    if norm == 0:
        return merged, MergedSite(name, 0.0, 1.0)
    return merged, MergedSite(
        name, float((got - wanted).norm()) / norm, float((got * wanted).sum()) / norm**2
    )


def _warn(report: Sequence[MergedSite], dtype: torch.dtype) -> None:
    worst = min(report, key=lambda site: site.kept)
    if worst.kept < LITTLE_KEPT:
        logger.warning(
            "merging in %s keeps %.0f %% of the edit at %s; use an adapter, or load the model with `dtype: float32`",
            dtype,
            100 * worst.kept,
            worst.name,
        )
