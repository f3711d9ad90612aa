"""Base models: loading, edit sites, fingerprints.

A `BaseModel` is a frozen model of one of three families (`families.py`) with its fast tokenizer and its edit sites. It
comes from the hub, a local folder, a GGUF file or the bundled default, and is never written to afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import ModelError
from ..hparams import MENDHyperParams
from ..runs import free_memory, return_memory
from .base import BaseModel
from .bundled import BUNDLED, bundled_model
from .checkpoints import (
    DTYPES,
    choose_device,
    is_causal,
    locate,
    read_checkpoint,
    read_config,
    read_tokenizer,
    silence_transformers,
)
from .fingerprint import keeping_digests
from .sites import find_blocks, resolve_sites
from .streaming import (
    WHOLE,
    Weights,
    empty_out,
    fill_rest,
    hollow_model,
    is_hollow,
    trunk_names,
)

logger = logging.getLogger(__name__)


def load_model(
    source: str | Path | MENDHyperParams,
    *,
    inner_params: str | Sequence[str] = "auto",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    tokenizer: str | None = None,
) -> BaseModel:
    """Load a causal language model, a sequence-to-sequence model or a classifier to edit, as its config says.

    `source`: a local folder, a GGUF file, "smollm2-135m" (the bundled default), a hub id, or hyperparameters
    (then all options are theirs). `dtype` "auto" keeps the checkpoint's own (GGUF: float32), `device` "auto"
    takes the first GPU if there is one, `tokenizer` names another tokenizer's folder or hub id. Raises
    ModelError saying what was given and what to do.
    """
    if isinstance(source, MENDHyperParams):
        if (inner_params, dtype, device, trust_remote_code, tokenizer) != (
            "auto",
            "auto",
            "auto",
            False,
            None,
        ):
            raise ModelError(
                "load_model(hparams) takes all options from hparams; use hparams.replace(...)"
            )
        return load_model(
            source.model_name,
            inner_params=source.inner_params,
            dtype=source.dtype,
            device=source.device,
            trust_remote_code=source.trust_remote_code,
            tokenizer=source.tokenizer_name,
        )
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    start, target = time.perf_counter(), choose_device(device)
    place = bundled_model() if source == BUNDLED else locate(source)
    name = place.resolve().name if isinstance(place, Path) else place
    with silence_transformers():
        model, own = read_checkpoint(
            place, dtype=dtype, trust_remote_code=trust_remote_code, tokenizer=tokenizer
        )
        files = Weights.of(place, model.base_model_prefix)
        base = BaseModel(model.to(target), own, name=name, inner_params=inner_params, weights=files)
    logger.info(
        "%s loaded in %.1f s (%s, %s)", name, time.perf_counter() - start, base.dtype, base.device
    )
    return base


def load_for_training(hparams: MENDHyperParams) -> BaseModel:
    """`load_model`, or `load_streamed` where `stream_trunk` says so; raises as they do."""
    stream = hparams.stream_trunk
    if stream == "auto":
        place = bundled_model() if hparams.model_name == BUNDLED else locate(hparams.model_name)
        files, free = Weights.of(place, ""), free_memory(choose_device(hparams.device))
        need = files.bytes(DTYPES.get(hparams.dtype)) if files else 0
        stream = need > free and is_causal(
            read_config(place, trust_remote_code=hparams.trust_remote_code)
        )
        if stream:
            logger.warning(
                "%s needs %.1f GB, %.1f GB are free: its blocks are streamed",
                place,
                need / 1e9,
                free / 1e9,
            )
    return load_streamed(hparams) if stream else load_model(hparams)


def load_streamed(hparams: MENDHyperParams) -> BaseModel:
    """Load only what training needs after the trunk pass: the blocks from the lowest edited one on, and the output.

    The other weights stay in the checkpoint's safetensors files; `FrozenTrunk` reads them block by block. Raises
    ModelError as `load_model` does, and where no chain of blocks lies below the edits.
    """
    start, target = time.perf_counter(), choose_device(hparams.device)
    place = bundled_model() if hparams.model_name == BUNDLED else locate(hparams.model_name)
    name = place.resolve().name if isinstance(place, Path) else place
    trust = {"trust_remote_code": hparams.trust_remote_code}
    with silence_transformers():
        model, weights = hollow_model(place, dtype=hparams.dtype, **trust)
        sites, found = resolve_sites(model, hparams.inner_params), find_blocks(model)
        first = (
            0
            if found is None
            else min((-1 if site.block is None else site.block) for site in sites)
        )
        if first < 1:
            raise ModelError(
                f"{name}: no list of blocks lies below the edits, so nothing can be streamed; {WHOLE}"
            )
        below = trunk_names(model, found[0], first)
        fill_rest(model, below, weights, target)
        empty_out(model, below, target)
        tokenizer = read_tokenizer(place, hparams.tokenizer_name, **trust)
        base = BaseModel(
            model, tokenizer, name=name, inner_params=hparams.inner_params, weights=weights
        )
        if base.blocks is None:
            raise ModelError(
                f"{name}: its blocks are no plain chain, so nothing can be streamed; {WHOLE}"
            )
    logger.info(
        "%s: the last blocks loaded in %.1f s (%s)", name, time.perf_counter() - start, base.dtype
    )
    return base


def release_trunk(base: BaseModel) -> None:
    """Free the weights below the lowest edited block, and the input embeddings unless the output shares them.

    The model is changed for all who share it: what needs it whole raises ModelError from then on. Texts whose trunk
    states are cached need it no more. Raises ModelError if nothing lies below the lowest edited block.
    """
    if base.blocks is None or base.blocks.first == 0 or base.is_spread:
        raise ModelError(
            f"{base.name}: no plain chain of blocks lies below the edits, or a device map places them, so there is "
            "nothing to release; edit later blocks, or set `release_trunk: false`"
        )
    if base.released:
        return
    with keeping_digests(base):
        empty_out(
            base.model, trunk_names(base.model, base.blocks.path, base.blocks.first), base.device
        )
        for value in base.model.parameters():  # a view of a file would keep all its pages
            value.data = value.data if is_hollow(value) else value.data.clone()
    base.guard_released()
    return_memory()
