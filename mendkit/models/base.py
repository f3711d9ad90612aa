"""A base model: a frozen model with its tokenizer and its edit sites."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace

from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError
from .families import SEQ2SEQ, encoder_sites
from .sites import Blocks, Site, find_blocks, resolve_sites
from .streaming import Weights, guard, is_hollow, probe_hollow
from .text import TextModel

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
            self.guard_released()

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
        return self.value_of(site.name, self.site_module(site).weight)

    def value_of(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter or buffer by its name, from the files or from where a device map keeps it if it is not here."""
        if self.released and isinstance(tensor, nn.Parameter) and is_hollow(tensor):
            if self.weights is None:
                raise ModelError(
                    f"{self.name} was released, and now other sites are asked for; load the model again"
                )
            return self.weights.read(name, tensor.dtype)
        if tensor.device.type != "meta":
            return tensor
        module, _, leaf = name.rpartition(".")
        with align_module_device(self.model.get_submodule(module), "cpu"):
            return getattr(self.model.get_submodule(module), leaf).detach().clone()

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

    def guard_released(self) -> None:
        remedy = f"{self.name} was released or is streamed (`release_trunk`, `stream_trunk`): load it again"
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
