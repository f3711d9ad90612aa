"""Base models: loading, edit sites, fingerprints.

A `BaseModel` is a frozen model of one of three families (`families.py`) with its fast tokenizer and its edit sites. It
comes from the hub, a local folder, a GGUF file or the bundled default, and is never written to afterwards.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .bundled import BUNDLED, bundled_model
from .checkpoints import DTYPES, choose_device, locate, read_checkpoint, silence_transformers
from .errors import ModelError
from .families import SEQ2SEQ, encoder_sites
from .hparams import MENDHyperParams
from .sites import Blocks, Site, find_blocks, probe_chain, resolve_sites
from .text_model import TextModel

logger = logging.getLogger(__name__)


class BaseModel(TextModel):
    """A frozen model with its tokenizer and its edit sites.

    Takes the given model over, and raises, as `TextModel`; raises ModelError as `resolve_sites`, too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        inner_params: str | Sequence[str] = "auto",
    ) -> None:
        if model.get_input_embeddings().weight.device.type == "meta":
            raise ModelError(f"{name}: the device map keeps the input embeddings on no device; give them cpu or a GPU")
        super().__init__(model, tokenizer, name=name)
        self._place(inner_params)

    def _place(self, inner_params: str | Sequence[str]) -> None:
        self.sites: tuple[Site, ...] = resolve_sites(self.model, inner_params)
        if self.head is not None and self.head.position is None:  # then no position is left without a gradient
            self.sites = tuple(replace(site, scored_only=False) for site in self.sites)
        self.blocks: Blocks | None = self._find_blocks()

    def with_sites(self, inner_params: str | Sequence[str]) -> BaseModel:
        """The same model and tokenizer, shared, with other edit sites; raises as `resolve_sites`."""
        other = copy.copy(self)
        other._place(inner_params)
        return other

    def sees_encoder(self, site: Site) -> bool:
        """Whether a site sees the encoder's positions while the decoder has others."""
        key = ("encoder", self.sites)
        return self.family == SEQ2SEQ and site.name in self.remembered(
            key, lambda: encoder_sites(self.model, self.sites, self.eos_id)
        )

    def site_module(self, site: Site) -> nn.Module:
        """The Linear or Conv1D of a site."""
        return self.model.get_submodule(site.module)

    def site_weight(self, site: Site) -> Tensor:
        """A site's weight, from wherever a device map keeps it."""
        return _values(self.model, site.name, self.site_module(site).weight)

    def _find_blocks(self) -> Blocks | None:
        found = find_blocks(self.model)
        if found is None or any(site.block is None for site in self.sites):
            return None
        path, blocks = found
        token = self.pad_id if self.eos_id is None else self.eos_id
        as_tuple = self.remembered("as_tuple", lambda: probe_chain(self.model, blocks, token))
        if as_tuple is None:
            logger.info("%s: %s is no plain chain of blocks, so nothing below the edits is cached", self.name, path)
            return None
        return Blocks(path, min(site.block for site in self.sites), len(blocks) - 1, as_tuple)


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
            raise ModelError("load_model(hparams) takes all options from hparams; use hparams.replace(...)")
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
        model, own = read_checkpoint(place, dtype=dtype, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
        base = BaseModel(model.to(target), own, name=name, inner_params=inner_params)
    logger.info("%s loaded in %.1f s (%s, %s)", name, time.perf_counter() - start, base.dtype, base.device)
    return base


def model_fingerprint(base: BaseModel) -> dict[str, Any]:
    """What tells this base model from another, as plain data for JSON.

    `sites_sha256` covers the edited layers' weights as float32, in site order, with names and shapes;
    `trunk_sha256` all other parameters in their own dtype (remembered until one changes in place);
    `tokenizer_sha256` the tokenizer's serialisation without the padding and truncation of its last call.
    """
    parameters = dict(base.model.named_parameters())
    edited = [(site.name, parameters.pop(site.name)) for site in base.sites]
    return {
        "name": base.name,
        "class": type(base.model).__name__,
        "sites": [{"name": name, "shape": list(weight.shape)} for name, weight in edited],
        "sites_sha256": _digest(base.model, edited, torch.float32),
        "trunk_sha256": base.remembered(_state(parameters), lambda: _digest(base.model, parameters.items(), None)),
        "tokenizer_sha256": base.remembered("tokenizer", lambda: _tokenizer_digest(base.tokenizer)),
    }


def weights_sha256(base: BaseModel) -> str:
    """SHA-256 over all parameters and buffers in their own dtype, whatever the sites; remembered likewise."""
    tensors = dict(base.model.named_parameters())
    every = [*tensors.items(), *base.model.named_buffers()]
    return base.remembered(("all", _state(tensors)), lambda: _digest(base.model, every, None))


def _state(parameters: Mapping[str, nn.Parameter]) -> tuple[Any, ...]:
    """Changes when a parameter is replaced or written to in place."""
    return tuple((name, value.data_ptr(), value._version) for name, value in parameters.items())


def _values(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer by its name, read from where a device map keeps it if that is no device."""
    if tensor.device.type != "meta":
        return tensor
    module, _, leaf = name.rpartition(".")
    with align_module_device(model.get_submodule(module), "cpu"):
        return getattr(model.get_submodule(module), leaf).detach().clone()


def _digest(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = _values(model, name, tensor).detach().to("cpu", dtype or tensor.dtype).contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
