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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError
from ..hparams import MENDHyperParams
from ..runs import free_memory, return_memory
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
from .families import SEQ2SEQ, encoder_sites
from .sites import Blocks, Site, find_blocks, resolve_sites
from .streaming import (
    WHOLE,
    Weights,
    empty_out,
    fill_rest,
    guard,
    hollow_model,
    is_hollow,
    probe_hollow,
    put,
    trunk_names,
)
from .tokens import TextModel

logger = logging.getLogger(__name__)


class BaseModel(TextModel):
    """A frozen model with its tokenizer and its edit sites.

    Takes the given model over, and raises, as `TextModel`; raises ModelError as `resolve_sites`, too. `weights` are the
    files that the model came from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        inner_params: str | Sequence[str] = "auto",
        weights: Weights | None = None,
    ) -> None:
        if (
            hasattr(model, "hf_device_map")
            and model.get_input_embeddings().weight.device.type == "meta"
        ):
            raise ModelError(
                f"{name}: the device map keeps the input embeddings on no device; give them cpu or a GPU"
            )
        super().__init__(model, tokenizer, name=name)
        self.weights = weights
        self._place(inner_params)
        if self.released:
            self._guard()

    def _place(self, inner_params: str | Sequence[str]) -> None:
        self.sites: tuple[Site, ...] = resolve_sites(self.model, inner_params)
        if (
            self.head is not None and self.head.position is None
        ):  # then no position is left without a gradient
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
        return _values(self, site.name, self.site_module(site).weight)

    @property
    def is_spread(self) -> bool:
        """Whether a device map decides where its weights lie."""
        return hasattr(self.model, "hf_device_map")

    @property
    def released(self) -> int:
        """How many blocks, from the first on, have no weights in memory."""
        found = None if self.is_spread else find_blocks(self.model)
        hollow = [any(map(is_hollow, block.parameters())) for block in found[1]] if found else []
        return [*hollow, False].index(False)

    def release_trunk(self) -> None:
        """Free the weights below the lowest edited block, and the input embeddings unless they are the output's, too.

        The model is changed for all who share it: what needs it whole raises ModelError until `restore_trunk`. Texts
        whose trunk states are cached need it no more. Raises ModelError if nothing lies below the lowest edited block.
        """
        if self.blocks is None or self.blocks.first == 0 or self.is_spread:
            raise ModelError(
                f"{self.name}: no plain chain of blocks lies below the edits, or a device map places them, so there is "
                "nothing to release; edit later blocks, or set `release_trunk: false`"
            )
        if self.released:
            return
        trunk, every = model_fingerprint(self)["trunk_sha256"], weights_sha256(self)
        empty_out(
            self.model, trunk_names(self.model, self.blocks.path, self.blocks.first), self.device
        )
        for value in self.model.parameters():  # a view of a file would keep all its pages
            value.data = value.data if is_hollow(value) else value.data.clone()
        self._guard()
        self.remembered(_state(dict(_unedited(self))), lambda: trunk)
        self.remembered(("all", _state(dict(self.model.named_parameters()))), lambda: every)
        return_memory()

    def restore_trunk(self) -> None:
        """Read back what `release_trunk` freed. Raises ModelError if the model did not come from safetensors files."""
        if not self.released:
            return
        if self.weights is None:
            raise ModelError(
                f"{self.name}: no safetensors files to read its weights from; load the model again"
            )
        for name, value in list(self.model.named_parameters(remove_duplicate=False)):
            if is_hollow(value):
                put(self.model, [name], self.weights.read(name, value.dtype).to(self.device))
        for handle in self._memo.pop("guards"):
            handle.remove()

    def _guard(self) -> None:
        remedy = f"{self.name} was released or is streamed (`release_trunk`, `stream_trunk`): load it again"
        remedy += ", or call restore_trunk()" if self.weights else ""
        blocks = find_blocks(self.model)[1][: self.released]
        self._memo["guards"] = [guard(block, remedy) for block in blocks]

    def _find_blocks(self) -> Blocks | None:
        found = find_blocks(self.model)
        if found is None or any(site.block is None for site in self.sites):
            return None
        path, blocks = found
        token = self.pad_id if self.eos_id is None else self.eos_id
        as_tuple = self.remembered(
            "as_tuple", lambda: probe_hollow(self.model, self.released, token)
        )
        if as_tuple is None:
            logger.info(
                "%s: %s is no plain chain of blocks, so nothing below the edits is cached",
                self.name,
                path,
            )
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


def model_fingerprint(base: BaseModel) -> dict[str, Any]:
    """What tells this base model from another, as plain data for JSON.

    `sites_sha256` covers the edited layers' weights as float32, in site order, with names and shapes;
    `trunk_sha256` all other parameters in their own dtype (remembered until one changes in place);
    `tokenizer_sha256` the tokenizer's serialisation without the padding and truncation of its last call.
    """
    edited = [(site.name, base.site_module(site).weight) for site in base.sites]
    others = dict(_unedited(base))
    return {
        "name": base.name,
        "class": type(base.model).__name__,
        "sites": [{"name": name, "shape": list(weight.shape)} for name, weight in edited],
        "sites_sha256": _digest(base, edited, torch.float32),
        "trunk_sha256": base.remembered(
            _state(others), lambda: _digest(base, others.items(), None)
        ),
        "tokenizer_sha256": base.remembered("tokenizer", lambda: _tokenizer_digest(base.tokenizer)),
    }


def weights_sha256(base: BaseModel) -> str:
    """SHA-256 over all parameters and buffers in their own dtype, whatever the sites; remembered likewise."""
    tensors = dict(base.model.named_parameters())
    every = [*tensors.items(), *base.model.named_buffers()]
    return base.remembered(("all", _state(tensors)), lambda: _digest(base, every, None))


def _unedited(base: BaseModel) -> Iterator[tuple[str, nn.Parameter]]:
    sites = {site.name for site in base.sites}
    return (item for item in base.model.named_parameters() if item[0] not in sites)


def _state(parameters: Mapping[str, nn.Parameter]) -> tuple[Any, ...]:
    """Changes when a parameter is replaced or written to in place."""
    return tuple((name, value.data_ptr(), value._version) for name, value in parameters.items())


def _values(base: BaseModel, name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer by its name, read from the files or from where a device map keeps it if it is not here."""
    if base.released and isinstance(tensor, nn.Parameter) and is_hollow(tensor):
        if base.weights is None:
            raise ModelError(
                f"{base.name} was released, and now other sites are asked for; load the model again"
            )
        return base.weights.read(name, tensor.dtype)
    if tensor.device.type != "meta":
        return tensor
    module, _, leaf = name.rpartition(".")
    with align_module_device(base.model.get_submodule(module), "cpu"):
        return getattr(base.model.get_submodule(module), leaf).detach().clone()


def _digest(
    base: BaseModel, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = _values(base, name, tensor).detach().to("cpu", dtype or tensor.dtype).contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
