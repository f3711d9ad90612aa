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
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
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
from ..models.cache import cache_root
from ..models.checkpoints import BUNDLED, silence_transformers
from ..runs import make_folder, user_path, write_text
from .losses import wide
from .updates import unedited

logger = logging.getLogger(__name__)

BUNDLED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Ends of names that PEFT takes for fused experts, by transformers' pattern for a model type.
RENAMED_BY_PEFT = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
# A merge that keeps less than this share of a change is warned of.
LITTLE_KEPT = 0.9


@contextmanager
def _new_files(folder: str | Path, what: str) -> Iterator[Path]:
    """A folder whose files are moved into `folder` at the end of the context."""
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
        """Rows of A."""
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


def _misread(folder: Path, base: BaseModel, loras: Mapping[str, LoRA]) -> list[str]:
    """The modules of which PEFT makes something else than A and B; `loras` by module."""
    # PEFT reads the files into a copy of the model that shares its weights. What holds of A and B
    # holds of the logits of any prompt. Without PEFT, or where a device map spreads the model,
    # PEFT's rule for renaming decides.
    peft: Any = None
    with suppress(ImportError):
        if not base.is_spread:
            peft = import_module("peft")
    if peft is None:
        from transformers import conversion_mapping

        patterns = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
        kind = base.model.config.model_type
        renamed = RENAMED_BY_PEFT.get(patterns.get(kind, kind), ())
        return [module for module in loras if module.rpartition(".")[2] in renamed]
    with unedited(base), warnings.catch_warnings(), silence_transformers():
        warnings.simplefilter("ignore")
        try:
            read = peft.PeftModel.from_pretrained(_copy_of(base), str(folder))
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            logger.warning("PEFT cannot load the adapter: %s", str(error).partition("\n")[0])
            return list(loras)
    adapted = {}
    for name, module in read.named_modules():
        if hasattr(module, "lora_A"):
            adapted[name.removeprefix("base_model.model.")] = module
    lost = []
    for module, lora in loras.items():
        layer: Any = adapted.get(module)
        if layer is None or layer.scaling != {"default": 1.0}:
            lost.append(module)
            continue
        for written, kept in ((lora.A, layer.lora_A), (lora.B, layer.lora_B)):
            missing = kept["default"].weight.double().cpu() - written.double()
            if missing.norm() > 0.01 * written.norm():  # half precision rounds less
                lost.append(module)
    return [*lost, *(module for module in adapted if module not in loras)]


def _copy_of(base: BaseModel, replaced: Mapping[int, nn.Parameter] | None = None) -> Any:
    shared = {id(parameter): parameter for parameter in base.model.parameters()}
    return copy.deepcopy(base.model, shared | dict(replaced or {}))


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
        lost = _misread(new, base, {modules[lora.name]: lora for lora in loras})
        if lost:
            raise MendkitError(
                f"PEFT reads an adapter of {lost[0]} otherwise than it is meant, for a model of "
                f"type {base.model.config.model_type}: such an edit would be lost; keep it by "
                "`save_merged` or `save`, or edit other layers (`inner_params`)"
            )


def _peft_config(base: BaseModel, ranks: Mapping[str, int]) -> dict[str, Any]:
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
        "base_model_name_or_path": _base_name(base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # scaling is alpha / r
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "target_modules": targets,
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _base_name(base: BaseModel) -> str:
    # a path means nothing on another machine, a hub id does
    place = base.model.name_or_path or base.name
    if place == str(cache_root() / BUNDLED):
        return BUNDLED_HUB_ID
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]", place)
    return "/".join(cached.groups()) if cached else place


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
    replaced, report = {}, []
    for site in base.sites:
        if site.name in changes:
            weight, change = base.site_module(site).weight, changes[site.name]
            merged = (wide(weight) + change).to(weight.dtype)
            replaced[id(weight)] = nn.Parameter(merged, requires_grad=False)
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
    with unedited(base):
        model = _copy_of(base, replaced)
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
    """Write a model and its tokenizer as a folder for transformers, not the model's own one."""
    if user_path(folder).resolve() == Path(edited.model.name_or_path or "/").resolve():
        raise MendkitError(f"{folder} holds the base model itself; give another folder")
    with silence_transformers(), _new_files(folder, "the edited model") as new:
        edited.model.save_pretrained(new)
        edited.tokenizer.save_pretrained(new)
