"""A low-rank weight change as a PEFT LoRA adapter: ΔW = B A, with scaling 1.

The product δ̃ᵀ ũ is factored without a dense matrix: QR of both factors, SVD of the small core (Golub & Van Loan,
section 5.4.5 for the idea), in float64. B and A share the singular values' square roots. A truncated adapter is the
best one of its rank (Eckart & Young, 1936): its error is the singular values left out.
Axes: t tokens, i layer input, o layer output, r rank.
"""

import copy
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.base import BaseModel
from ..models.sites import Site
from ..runs import atomically, write_text
from .files import make_folder
from .losses import wide

logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class LoRA:
    """One site's adapter, ΔW ≈ B A in (output, input) orientation, on the CPU."""

    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    relative_error: float  # ‖ΔW − B A‖_F / ‖ΔW‖_F by truncation, besides the rounding of A and B

    @classmethod
    def of(
        cls, u: Float[Tensor, "t i"], delta: Float[Tensor, "t o"], /, *, rank: int | None = None
    ) -> "LoRA":
        """The adapter of ΔW = deltaᵀ u, of its own rank or of `rank` at most; at least 1, as PEFT has no rank 0."""
        q_out, r_out = torch.linalg.qr(delta.cpu().double().T)
        q_in, r_in = torch.linalg.qr(u.cpu().double().T)
        left, values, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
        noise = values[0] * max(u.shape[1], delta.shape[1]) * torch.finfo(values.dtype).eps
        r = max(1, min(int((values > noise).sum()), rank or len(values)))
        root, whole = values[:r].sqrt(), float(values.norm())
        return cls(
            A=(root[:, None] * (right[:r] @ q_in.T)).to(u.dtype),
            B=((q_out @ left[:, :r]) * root).to(delta.dtype),
            relative_error=float(values[r:].norm()) / whole if whole else 0.0,
        )


@dataclass(frozen=True)
class AdapterSite:
    """What an adapter keeps of an edit at one site."""

    name: str
    rank: int
    relative_error: float  # ‖ΔW − B A‖_F / ‖ΔW‖_F


def write_adapter(
    folder: str | Path, base: BaseModel, loras: Mapping[str, LoRA], /
) -> tuple[AdapterSite, ...]:
    """Write the adapters of some of the model's sites (by name) as one that `peft.PeftModel.from_pretrained` loads."""
    sites, tensors = [site for site in base.sites if site.name in loras], {}
    for site in sites:
        prefix = f"base_model.model.{site.module}"
        tensors[f"{prefix}.lora_A.weight"] = loras[site.name].A.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = loras[site.name].B.contiguous()
    ranks = {site.module: len(loras[site.name].A) for site in sites}
    config = json.dumps(_config(base, sites, ranks), indent=2) + "\n"
    weights, settings = (make_folder(folder) / name for name in ADAPTER_FILES)
    atomically(weights, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    write_text(settings, config)
    return tuple(AdapterSite(s.name, ranks[s.module], loras[s.name].relative_error) for s in sites)


def _config(base: BaseModel, sites: Sequence[Site], ranks: Mapping[str, int]) -> dict[str, object]:
    """PEFT's settings. Its patterns are regular expressions that also match at the end of a name, unless anchored."""
    rank = max(ranks.values())
    odd = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": _task(base),
        "base_model_name_or_path": base.model.name_or_path or base.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # scaling is alpha / r
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": _targets(base, list(ranks)),
        "fan_in_fan_out": any(site.transposed for site in sites),
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _targets(base: BaseModel, modules: list[str]) -> list[str] | str:
    """The modules' names. PEFT also takes what ends like one of a list; where a layer does, one expression, exactly."""
    others = {name for name, _ in base.model.named_modules()} - set(modules)
    if any(other.endswith(f".{module}") for module in modules for other in others):
        return "|".join(map(re.escape, modules))
    return modules


def _task(base: BaseModel) -> str | None:
    """PEFT's class for the model; None: the plain one."""
    if not base.model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if base.model.config.is_encoder_decoder else "CAUSAL_LM"


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
