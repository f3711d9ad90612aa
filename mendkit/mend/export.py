"""A weight change for other programs: as a PEFT LoRA adapter, or merged into a copy of the model.

Adapter: ΔW = B A with scaling 1. QR of both factors of δ̃ᵀ ũ and SVD of the small core, in float64,
need no dense matrix. B and A share the singular values' square roots. A truncated adapter is the
best one of its rank (Eckart & Young, 1936); its error is the singular values left out.
Merge: W + ΔW in float32 at least, then rounded to the weight's dtype. Half precision loses small
changes by that rounding (CORRECTNESS row 16), so every merge reports what is left.
Axes: t tokens, i layer input, o layer output, r rank.
"""

import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import MendkitError
from ..models.base import BaseModel
from ..models.checkpoints import silence_transformers
from ..runs import make_folder, write_text
from .losses import wide

logger = logging.getLogger(__name__)

LITTLE_KEPT = 0.9
"""A merge that keeps less than this share of a change is warned of."""


@contextmanager
def _new_files(folder: str | Path, what: str) -> Iterator[Path]:
    """A folder to write files to, which are moved into `folder` at the end of the context."""
    folder = make_folder(folder)
    try:
        with TemporaryDirectory(dir=folder, prefix=".new-") as new:
            yield Path(new)
            for path in Path(new).iterdir():
                path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:
        raise MendkitError(f"cannot write {what} to {folder}: {error}; make room there") from None


# ---------------------------------------- adapter


@dataclass(frozen=True)
class LoRA:
    """One site's adapter, ΔW ≈ B A in (output, input) orientation, on the CPU."""

    name: str
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    relative_error: float  # ‖ΔW − B A‖_F / ‖ΔW‖_F by truncation, besides the rounding of A and B

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.A)

    @classmethod
    def of(
        cls,
        name: str,
        u: Float[Tensor, "t i"],
        delta: Float[Tensor, "t o"],
        *,
        rank: int | None = None,
    ) -> "LoRA":
        """The adapter of ΔW = deltaᵀ u, of `rank` at most; at least 1, as PEFT has no rank 0."""
        q_out, r_out = torch.linalg.qr(delta.cpu().double().T)
        q_in, r_in = torch.linalg.qr(u.cpu().double().T)
        left, values, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
        noise = values[0] * max(u.shape[1], delta.shape[1]) * torch.finfo(values.dtype).eps
        needed = int((values > noise).sum())
        r = max(1, min(needed, rank or needed))
        root, norm = values[:r].sqrt(), float(values.norm())
        error = float(values[r:].norm()) / norm if norm else 0.0
        a = root[:, None] * (right[:r] @ q_in.T)
        b = (q_out @ left[:, :r]) * root
        return cls(name, a.to(u.dtype).contiguous(), b.to(delta.dtype).contiguous(), error)


def write_adapter(folder: str | Path, base: BaseModel, loras: Sequence[LoRA]) -> None:
    """Write adapters as one that `peft.PeftModel.from_pretrained` loads."""
    modules = {site.name: site.module for site in base.sites}
    tensors, ranks = {}, {}
    for lora in loras:
        prefix = f"base_model.model.{modules[lora.name]}"
        tensors[f"{prefix}.lora_A.weight"] = lora.A
        tensors[f"{prefix}.lora_B.weight"] = lora.B
        ranks[modules[lora.name]] = lora.rank
    transposed = any(site.transposed for site in base.sites if site.module in ranks)
    config = _peft_config(base, ranks) | {"fan_in_fan_out": transposed}
    with _new_files(folder, "the adapter") as new:
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        write_text(new / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def _peft_config(base: BaseModel, ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's settings; `ranks` by module."""
    rank = max(ranks.values())
    # PEFT's patterns are regular expressions that also match at the end of a name, unless anchored
    lower = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    # a list of modules matches by the ends of names, too
    targets: list[str] | str = list(ranks)
    endings = tuple(f".{module}" for module in ranks)
    names = [name for name, _ in base.model.named_modules()]
    if any(name.endswith(endings) and name not in ranks for name in names):
        targets = "|".join(map(re.escape, ranks))
    task = None  # the plain class of PEFT
    if base.model.can_generate():
        task = "SEQ_2_SEQ_LM" if base.model.config.is_encoder_decoder else "CAUSAL_LM"
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base.model.name_or_path or base.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # scaling is alpha / r
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "target_modules": targets,
        "bias": "none",
        "lora_dropout": 0.0,
    }


# ---------------------------------------- merge


@dataclass(frozen=True)
class MergedSite:
    """What is left of a change ΔW after merging it into a weight, whose dtype rounds it."""

    name: str
    relative_error: float  # ‖W_merged − (W + ΔW)‖_F / ‖ΔW‖_F
    kept: float  # ⟨W_merged − W, ΔW⟩ / ‖ΔW‖²: 1 if all of it is there, 0 if nothing is


@dataclass(frozen=True)
class Merged:
    """A model with a change in its weights; it shares all other weights with the base model."""

    base: BaseModel
    sites: tuple[MergedSite, ...]


def merge(base: BaseModel, changes: Mapping[str, Float[Tensor, "m n"]]) -> Merged:
    """A new model with each site's ΔW, in the weight's orientation; `base` stays as it is."""
    shared = {id(parameter): parameter for parameter in base.model.parameters()}
    report = []
    for site in base.sites:
        if site.name in changes:
            weight, change = base.site_module(site).weight, changes[site.name]
            merged = (wide(weight) + change).to(weight.dtype)
            shared[id(weight)] = nn.Parameter(merged, requires_grad=False)
            report.append(_what_is_left(site.name, merged.double() - weight.double(), change))
    worst = min(report, key=lambda site: site.kept)
    if worst.kept < LITTLE_KEPT:
        logger.warning(
            "merging in %s keeps %.0f %% of the edit at %s; use an adapter, or load the model with "
            "`dtype: float32`",
            base.dtype,
            100 * worst.kept,
            worst.name,
        )
    names = tuple(site.name for site in base.sites)
    # a copy that takes each parameter from `shared` instead of copying it
    model = copy.deepcopy(base.model, shared)
    edited = BaseModel(model, base.tokenizer, name=f"{base.name} (edited)", inner_params=names)
    return Merged(edited, tuple(report))


def _what_is_left(name: str, got: Tensor, change: Tensor) -> MergedSite:
    wanted = change.double()
    norm = float(wanted.norm())
    if norm == 0:
        return MergedSite(name, 0.0, 1.0)
    error = float((got - wanted).norm()) / norm
    return MergedSite(name, error, float((got * wanted).sum()) / norm**2)


def write_model(folder: str | Path, edited: BaseModel) -> None:
    """Write a model and its tokenizer as a folder for transformers.

    Raises MendkitError if the folder is a file, cannot be written to, or is the model's own.
    """
    if Path(folder).resolve() == Path(edited.model.name_or_path or "/").resolve():
        raise MendkitError(f"{folder} holds the base model itself; give another folder")
    with silence_transformers(), _new_files(folder, "the edited model") as new:
        edited.model.save_pretrained(new)
        edited.tokenizer.save_pretrained(new)
