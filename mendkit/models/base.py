"""A base model: a frozen model with its tokenizer and its edit sites."""

import copy
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from .families import SEQ2SEQ, seen_lengths
from .sites import Blocks, Site, embedding_matrix, find_blocks, resolve_sites
from .streaming import Weights, is_hollow, probe_blocks, standing_in
from .text import TextModel

logger = logging.getLogger(__name__)


class BaseModel(TextModel):
    """A frozen model with its tokenizer and its edit sites.

    Takes the given model over as `TextModel` does, and raises as it does and as `resolve_sites`.
    `weights` are the files that the model came from.
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
        spread = hasattr(model, "hf_device_map")
        if spread and embedding_matrix(model).is_meta:
            raise ModelError(
                f"{name}: the device map keeps the input embeddings on no device; "
                "give them cpu or a GPU"
            )
        super().__init__(model, tokenizer, name=name)
        self.is_spread = spread  # a device map decides where the weights lie
        self.weights = weights
        self._place(inner_params)
        self.guard_released()

    def __repr__(self) -> str:
        layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", "?")
        width = embedding_matrix(self.model).shape[1]
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"BaseModel({self.name!r}, {type(self.model).__name__}, {layers} layers, "
            f"width {width}, {len(self.sites)} sites, {self.device}, {dtype})"
        )

    def _place(self, inner_params: str | Sequence[str]) -> None:
        self.sites: tuple[Site, ...] = resolve_sites(self.model, inner_params)
        if self.head is not None and self.head.position is None:
            # The head reads several positions, so all of them receive a gradient.
            self.sites = tuple(replace(site, scored_only=False) for site in self.sites)
        self.blocks: Blocks | None = self._find_blocks()
        below: AbstractContextManager[None] = nullcontext()
        if self.released:
            if self.blocks is None:
                return
            below = standing_in(self.model, self.blocks, first=self.released)
        with below:
            self.lengths: dict[str, int] = self.remembered(
                ("lengths", self.sites), lambda: seen_lengths(self.model, self.sites, self._read)
            )

    def _find_blocks(self) -> Blocks | None:
        found = find_blocks(self.model)
        numbers = [site.block for site in self.sites if site.block is not None]
        if found is None or len(numbers) < len(self.sites):
            return None
        path, blocks = found
        first = min(numbers)
        form = self.remembered(
            ("form", first),
            lambda: probe_blocks(self.model, self._read, released=self.released, first=first),
        )
        if form is None:
            logger.info(
                "%s: %s is no plain chain of blocks, so nothing below the edits is cached",
                self.name,
                path,
            )
            return None
        return Blocks(path, first, len(blocks) - 1, form)

    def with_sites(self, inner_params: str | Sequence[str]) -> "BaseModel":
        """The same shared model with other edit sites; raises as `resolve_sites`."""
        other = copy.copy(self)
        other._place(inner_params)
        return other

    def _read(self, n: int = 2) -> Tensor:
        """Logits of `n` texts of three tokens, two of a decoder: what the model is probed with."""
        special = set(self.tokenizer.all_special_ids)
        plain = [i for i in range(self.vocabulary) if i not in special][:4]
        end = plain[0] if self.eos_id is None else self.eos_id  # some heads look for it
        ids = torch.tensor([[*plain[:2], end], [*plain[2:], end]], device=self.device)[:n]
        return self.forward(ids, torch.ones_like(ids), ids[:, :2])

    def sees_encoder(self, site: Site) -> bool:
        """Whether a site sees the encoder's positions while the decoder has others."""
        return self.family == SEQ2SEQ and self.lengths[site.name] == 3

    def site_module(self, site: Site) -> nn.Linear | Conv1D:
        """The layer of a site."""
        return cast("nn.Linear | Conv1D", self.model.get_submodule(site.module))

    def site_weight(self, site: Site) -> Tensor:
        """A site's weight, from wherever it is kept."""
        return self.value_of(site.name, self.site_module(site).weight)

    def value_of(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter or buffer, from its file or by the device map if it is not here."""
        if isinstance(tensor, nn.Parameter) and is_hollow(tensor) and self.released:
            if self.weights is None:
                raise ModelError(
                    f"{self.name} was released, and now other sites are asked for; "
                    "load the model again"
                )
            return self.weights.read(name, tensor.dtype)
        if not tensor.is_meta:
            return tensor
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        with align_module_device(module, "cpu"):
            return getattr(module, leaf).detach().clone()

    @property
    def released(self) -> int:
        """How many blocks, from the first on, have no weights in memory."""
        found = None if self.is_spread else find_blocks(self.model)
        count = 0
        for block in found[1] if found else ():
            if not any(map(is_hollow, block.parameters())):
                break
            count += 1
        return count

    def guard_released(self) -> None:
        """Make blocks without weights say so if they run."""
        name = self.name

        def refuse(block: nn.Module, _: Any) -> None:
            if any(map(is_hollow, block.parameters())):
                raise ModelError(
                    f"the weights below the lowest edited block are not in memory; {name} was "
                    "released or is streamed (`release_trunk`, `stream_trunk`): load it again"
                )

        released, found = self.released, find_blocks(self.model)
        if released and found is not None:
            for block in found[1][:released]:
                block.register_forward_pre_hook(refuse)
