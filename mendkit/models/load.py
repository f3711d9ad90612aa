"""Loading a base model: its name → where it is → tokenizer and weights → edit sites.

The blocks below the edits may be released once they have run, or run one at a time.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ModelError
from ..hparams import MENDHyperParams
from ..runs import return_memory
from .base import BaseModel
from .checkpoints import (
    choose_device,
    explained,
    loader_of,
    locate,
    locate_tokenizer,
    read_config,
    read_model,
    read_tokenizer,
    silence_transformers,
)
from .fingerprint import keeping_digests
from .sites import editable_names, mlp_names, resolve_sites
from .streaming import move, trunk_names

logger = logging.getLogger(__name__)


def load_model(source: str | Path | MENDHyperParams) -> BaseModel:
    """Load a model to edit, of any of the three families.

    `source` is hyperparameters with all options, or a `model_name` alone: a local folder, a GGUF
    file, "smollm2-135m" (the bundled model) or a hub id. Raises ModelError.
    """
    h = source
    if not isinstance(h, MENDHyperParams):
        h = MENDHyperParams(model_name=str(source))
    start, target = time.perf_counter(), choose_device(h.device)
    remote = {"trust_remote_code": h.trust_remote_code}
    with silence_transformers():
        # 1. Where the model is, and of which family.
        place = locate(h.model_name)
        loader = loader_of(read_config(place, **remote), place)
        # 2. What is wrong with the tokenizer shows before the weights are read.
        tokenizer = read_tokenizer(locate_tokenizer(h), **remote)
        model = read_model(place, loader, dtype=h.dtype, **remote)
        model.to(target)  # type: ignore[arg-type]  # transformers wraps `to` and loses its type
        # 3. The edit sites.
        name = str(place)
        if isinstance(place, Path):
            name = place.resolve().name
        base = BaseModel(model, tokenizer, name=name, inner_params=h.inner_params)
    logger.info("loaded in %.1f s: %r", time.perf_counter() - start, base)
    return base


def load_for_training(hparams: MENDHyperParams) -> BaseModel:
    """`load_model`, or `load_streamed` where `stream_trunk` says so; raises as they do."""
    if hparams.stream_trunk is True:
        return load_streamed(hparams)
    return load_model(hparams)


def load_streamed(hparams: MENDHyperParams) -> BaseModel:
    """Load a model whose trunk runs block by block, each for all texts before the next one.

    On the CPU the weights of safetensors files are mapped: the system reads a block when it runs
    and forgets it when memory is short. Beside a GPU the blocks below the edits stay there, and
    visit the GPU one at a time. Raises ModelError as `load_model` does, and where no plain chain of
    blocks lies below the edits.
    """
    base, target = load_model(hparams.replace(device="cpu")), choose_device(hparams.device)
    if base.blocks is None or base.blocks.first == 0:
        raise ModelError(
            f"{base.name}: no plain chain of blocks lies below the edits, so nothing can be "
            "streamed; set `stream_trunk: false`"
        )
    below = trunk_names(base.model, base.blocks.path, base.blocks.first)
    names = {name for name, _ in base.model.named_parameters()}
    move(base.model, names.difference(below), target)
    for module in base.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(target)
    base.model.tie_weights()
    base.streamed = True
    base.guard_released()
    return base


def release_trunk(base: BaseModel) -> None:
    """Free the weights of the blocks below the lowest edited one, for all who share the model.

    Raises ModelError where there are none; so does from then on what needs the model whole.
    """
    if base.blocks is None or base.blocks.first == 0 or base.is_spread:
        raise ModelError(
            f"{base.name}: no plain chain of blocks lies below the edits, or a device map places "
            "them, so there is nothing to release; edit later blocks, or set `release_trunk: false`"
        )
    if base.released:
        return
    with keeping_digests(base):
        below = trunk_names(base.model, base.blocks.path, base.blocks.first)
        move(base.model, below, "meta")
        for value in base.model.parameters():
            if not value.is_meta:  # a view of a file would keep all its pages
                value.data = value.data.clone()
    base.guard_released()
    return_memory()


def skeleton(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a source without weights: all parameters are on the meta device.

    Needs the configuration only. Raises ModelError as `load_model` does.
    """
    place = locate(source)
    config = read_config(place, trust_remote_code=trust_remote_code)
    loader = loader_of(config, place)
    with explained("a model from the configuration of", place), torch.device("meta"):
        return loader.from_config(config, trust_remote_code=trust_remote_code)


def site_rows(hparams: MENDHyperParams) -> list[dict[str, Any]]:
    """The weights that `inner_params` may name, from the configuration alone.

    `shape` is (d_out, d_in). `chosen` says whether `inner_params` picks it, `mlp` whether it
    belongs to an MLP. Raises ModelError as `load_model` does.
    """
    with silence_transformers():
        model = skeleton(hparams.model_name, trust_remote_code=hparams.trust_remote_code)
    chosen = set(mlp_names(model))
    if hparams.inner_params != "auto":
        chosen = {site.name for site in resolve_sites(model, hparams.inner_params)}
    mlp, rows = set(mlp_names(model, everywhere=True)), []
    for site in resolve_sites(model, editable_names(model)):
        row = {"name": site.name, "block": site.block, "shape": (site.d_out, site.d_in)}
        rows.append(row | {"mlp": site.name in mlp, "chosen": site.name in chosen})
    return rows
