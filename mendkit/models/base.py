"""A base model: a frozen model with its tokenizer and its edit sites."""

import copy
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import takewhile
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from .families import CAUSAL, CLASSIFIER, SEQ2SEQ, seen_lengths
from .sites import Blocks, Site, embedding_matrix, find_blocks, only_at, resolve_sites, watch_chain
from .streaming import guard, is_away, standing_in
from .text import TextModel
from .tokens import PackedBatch, Tokens, pack, pad_rows

logger = logging.getLogger(__name__)


class BaseModel(TextModel):
    """A `TextModel` with its edit sites; raises as it does and as `resolve_sites`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        inner_params: str | Sequence[str] = "auto",
    ) -> None:
        self.is_spread = hasattr(model, "hf_device_map")  # a device map places the weights
        if self.is_spread and embedding_matrix(model).is_meta:
            raise ModelError(
                f"{name}: the device map keeps the input embeddings on no device; "
                "give them cpu or a GPU"
            )
        super().__init__(model, tokenizer, name=name)
        self.blocks: Blocks | None = None
        self.streamed = False  # the trunk runs block by block
        self._place(inner_params)

    def __repr__(self) -> str:
        shown = f"{self.name!r}, {type(self.model).__name__}, {len(self.sites)} sites"
        return f"BaseModel({shown}, {self.device}, {self.dtype})"

    def _place(self, inner_params: str | Sequence[str]) -> None:
        self.sites: tuple[Site, ...] = resolve_sites(self.model, inner_params)
        if self.head is not None and self.head.position is None:
            # The head reads several positions, so all of them receive a gradient.
            self.sites = tuple(replace(site, scored_only=False) for site in self.sites)
        self.blocks = self._find_blocks()
        if not self.released:
            self.lengths: dict[str, int] = self.remembered(
                ("lengths", self.sites), self._probe_rows
            )
            self.packs: bool = self.family == CAUSAL and self.blocks is not None
            if self.packs:
                self.packs = self.remembered(("packs", self._last_mlp), self._probe_packing)

    def _find_blocks(self) -> Blocks | None:
        found = find_blocks(self.model)
        numbers = [site.block for site in self.sites if site.block is not None]
        if found is None or len(numbers) < len(self.sites):
            return None
        path, blocks = found
        first = min(numbers)
        if self.released and self.blocks is not None:  # known from before
            form = self.blocks.form
        else:
            form = self.remembered(("form", first), lambda: self._probe(path, blocks, first))
        if form is None:
            logger.info(
                "%s: %s is no plain chain of blocks, so nothing below the edits is cached",
                self.name,
                path,
            )
            return None
        return Blocks(path, first, len(blocks) - 1, form)

    @torch.no_grad()
    def _probe(self, path: str, blocks: nn.ModuleList, first: int) -> Any:
        """The form of what the blocks return; None if those from `first` on need more than that."""
        above = range(first, len(blocks))
        try:
            form, entering, whole = watch_chain(blocks, self._read)
            if form is None or first == 0:
                return form
            # The same again, from the states that enter the lowest edited block.
            chain = Blocks(path, first, above[-1], form)
            with standing_in(self.model, chain, above, entering[first]):
                again = self._read()
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return None  # the decoder needs more than the states
        close = torch.allclose(again, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
        return form if close else None

    @property
    def _last_mlp(self) -> str | None:
        """What of the last block holds sites that only scored positions reach."""
        for site in self.sites:
            if self.blocks is not None and site.scored_only:
                block = f"{self.blocks.path}.{self.blocks.last}."
                child = site.module.removeprefix(block).partition(".")[0]
                if site.module.startswith(f"{block}{child}."):
                    return block + child
        return None

    @torch.no_grad()
    def _probe_packing(self) -> bool:
        """Whether texts read as one row of nodes have the logits that they have alone."""
        a, b, c, d = self._plain_ids()
        texts = Tokens((a, b, c), (1, 2)), Tokens((a, d), (1,))
        alone = []
        for text in texts:
            ids = torch.tensor([text.ids], device=self.device)
            alone.append(self.forward(ids, torch.ones_like(ids))[0, list(text.scored)])
        batch = pack([texts], self.pad_id)
        try:
            packed = self.forward_packed(batch, batch.scored(texts))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False  # the decoder takes no mask or positions of such a form
        expected = torch.cat(alone)
        atol = 1e-3 * float(expected.abs().max())
        same_shape = packed.shape == expected.shape
        return same_shape and torch.allclose(packed, expected, rtol=1e-3, atol=atol)

    def forward_packed(
        self, batch: PackedBatch, scored: Int[Tensor, " s"], *, head: bool = True
    ) -> Float[Tensor, "_ v"]:
        """Logits of packed texts at the `scored` places of the flattened rows; none without `head`.

        Where only these reach the MLP of the last block, it runs there alone.
        """
        shape, scored = batch.input_ids.shape, scored.to(self.device)
        attends = batch.attends[:, None].to(self.device)
        mask = torch.zeros(attends.shape, dtype=self.dtype, device=self.device)

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].flatten(0, 1)[scored if head else scored[:0]], *args[1:])

        with ExitStack() as stack:
            hook = self.model.get_output_embeddings().register_forward_pre_hook(select)
            stack.enter_context(hook)
            if self._last_mlp is not None:
                rows = [
                    (scored[scored // shape[1] == r] % shape[1]).unique().tolist()
                    for r in range(shape[0])
                ]
                places = pad_rows(rows, 0, device=self.device).long()
                module = self.model.get_submodule(self._last_mlp)
                stack.enter_context(only_at(module, places, shape))
            return self.model(
                input_ids=batch.input_ids.to(self.device),
                attention_mask=mask.masked_fill(~attends, torch.finfo(self.dtype).min),
                position_ids=batch.position_ids.to(self.device),
                use_cache=False,
            ).logits

    def with_sites(self, inner_params: str | Sequence[str]) -> "BaseModel":
        """The same shared model with other edit sites; raises as `resolve_sites`."""
        # What was probed is remembered by both: they share the model.
        other = copy.copy(self)
        other._place(inner_params)
        return other

    @torch.no_grad()
    def _probe_rows(self) -> dict[str, int]:
        """Number of positions that each site sees of a text of three tokens, two of a decoder."""
        possible = (2, 3) if self.family == SEQ2SEQ else (3,)
        lengths = seen_lengths(self.model, self.sites, self._read, possible)
        if self.family == CLASSIFIER:
            alone, padded = self._read(1), self._read(1, padding=3)
            if not torch.allclose(alone, padded, rtol=0.0, atol=0.05 * float(alone.abs().max())):
                raise ModelError(
                    f"{type(self.model).__name__} reads the padding beside a text, so that texts "
                    "read together would have other answers; give another model"
                )
        return lengths

    def _plain_ids(self) -> list[int]:
        """Four tokens that are not special."""
        special = set(self.tokenizer.all_special_ids)
        return [i for i in range(self.vocabulary) if i not in special][:4]

    def _read(self, n: int = 2, padding: int = 0) -> Tensor:
        """Logits of `n` texts of three tokens, two of a decoder."""
        plain = self._plain_ids()
        end = plain[0] if self.eos_id is None else self.eos_id  # some heads look for it
        ids = torch.tensor([[*plain[:2], end], [*plain[2:], end]], device=self.device)[:n]
        mask = pad(torch.ones_like(ids), (0, padding))
        return self.forward(pad(ids, (0, padding), value=self.pad_id), mask, ids[:, :2])

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
        """A parameter or buffer, by the device map if it is not here."""
        if not tensor.is_meta:
            return tensor
        if self.is_spread:
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            with align_module_device(module, "cpu"):
                return getattr(module, leaf).detach().clone()
        raise ModelError(
            f"{self.name} was released, and now other sites are asked for; load the model again"
        )

    @property
    def released(self) -> int:
        """How many blocks, from the first on, are away."""
        # A device map brings a block's weights when it runs.
        found = None if self.is_spread else find_blocks(self.model)
        blocks = found[1] if found else ()
        return len(list(takewhile(lambda block: is_away(block, self.device), blocks)))

    def guard_released(self) -> None:
        """`guard` the blocks that are away."""
        found = find_blocks(self.model)
        for block in found[1][: self.released] if found else ():
            guard(self.model, block, self.name)
