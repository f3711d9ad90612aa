"""The frozen trunk: everything below the lowest edited block, run once per text.

An edit changes only its sites, so the hidden states entering the lowest edited block (the *trunk states*) and the
unedited model's last hidden state at the scored positions (the *reference*) are constants of a frozen model.
`FrozenTrunk` computes both in one pass per text, keeps them in a file, and runs the rest of the model (the *suffix*)
from them: the block list is swapped for one whose lower entries hand the stored states on, so that any model's own code
does the work. Logits are computed only at scored positions. A classifier's reference is its logits. A model without a
clean split, such as one of an encoder and a decoder, runs whole, with the same numbers.
Axes: n texts, t padded tokens, l padded tokens of a decoder (else t), d width, s scored positions, v vocabulary.
"""

import copy
import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .cache import SHARD_BYTES, TextCache
from .data import Tokens
from .families import CLASSIFIER
from .models import BaseModel, weights_sha256

logger = logging.getLogger(__name__)

TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class TextBatch:
    """Texts as right-padded tensors. Row-major order of `scored` is the order of all packed values."""

    input_ids: Int[Tensor, "n t"]
    attention_mask: Int[Tensor, "n t"]
    scored: Bool[Tensor, "n l"]
    targets: Int[Tensor, " s"]  # the token each scored position predicts, -100 where the text has no answer
    decoder_ids: Int[Tensor, "n l"] | None = None  # causal attention: its padding needs no mask

    @property
    def rows(self) -> Int[Tensor, " s"]:
        """The text of each scored position."""
        return self.scored.nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.input_ids)


def collate(texts: Sequence[Tokens], pad_id: int, device: torch.device | str = "cpu", /) -> TextBatch:
    """Right-pad texts into one batch."""

    def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)

    ids = padded([text.ids for text in texts], pad_id)
    mask = padded([[1] * len(text.ids) for text in texts], 0)
    decoder = padded([text.decoder for text in texts], pad_id) if texts[0].decoder else None
    scored = torch.zeros((ids if decoder is None else decoder).shape, dtype=torch.bool)
    targets: list[int] = []
    for row, text in enumerate(texts):
        scored[row, list(text.scored)] = True
        targets.extend(text.targets or [-100] * len(text.scored))
    return TextBatch(ids, mask, scored.to(device), torch.tensor(targets, device=device), decoder)


class _Handover(nn.Module):
    """Stands in for a block below the first that runs; index 0 hands the stored states in, the others pass them on."""

    def __init__(self, block: nn.Module, states: Tensor | None, as_tuple: bool) -> None:
        super().__init__()
        self._block = [block]  # a list: its parameters stay out of this module
        self._states, self._as_tuple = states, as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_block")[0], name)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        out = hidden if self._states is None else self._states
        return (out,) if self._as_tuple else out


@contextmanager
def _start_at(base: BaseModel, first: int, states: Tensor) -> Iterator[None]:
    """Within the context the model's blocks below `first` are replaced by `states` (n, t, d)."""
    parent_name, _, name = base.blocks.path.rpartition(".")
    parent = base.model.get_submodule(parent_name)
    blocks = getattr(parent, name)
    lower = [_Handover(b, states if i == 0 else None, base.blocks.as_tuple) for i, b in enumerate(blocks[:first])]
    setattr(parent, name, nn.ModuleList([*lower, *blocks[first:]]))
    try:
        yield
    finally:
        setattr(parent, name, blocks)


@contextmanager
def only_scored(base: BaseModel, scored: Bool[Tensor, "n l"]) -> Iterator[None]:
    """Within the context the output layer sees only scored positions; a classifier's head reads one anyway."""
    if base.family == CLASSIFIER:
        yield
        return

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][scored.to(args[0].device)], *args[1:])

    handle = base.model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


class FrozenTrunk:
    """Trunk states and references of a set of texts, for one base model and its edit sites.

    `fill(texts)` computes what is missing, unless `cache` has it on disk, and puts it there. States are kept in the
    model's dtype (bfloat16 as float32). A text's values can differ in their last bits with the texts that shared its
    pass; those on disk are of the pass that came first. `label_only` false computes the logits of every position, as
    others do, to show what that costs.
    """

    def __init__(self, base: BaseModel, *, cache: TextCache | None = None, label_only: bool = True) -> None:
        self.base, self.cache, self.label_only = base, cache, label_only
        self.split = base.blocks is not None and base.blocks.first > 0
        self._rows: dict[Any, tuple[np.ndarray, np.ndarray]] = {}  # states, reference

    def at(self, base: BaseModel, /) -> "FrozenTrunk":
        """A trunk for other sites of the same model, with this one's values if they enter no block above those."""
        other = FrozenTrunk(base, label_only=self.label_only)
        if base.blocks and self.base.blocks and self.base.blocks.first <= base.blocks.first:
            other.base, other.split, other._rows = copy.copy(base), self.split, self._rows
            other.base.blocks = self.base.blocks
        return other

    def fill(self, texts: Sequence[Tokens], progress: Any = None) -> int:
        """Keep the values of `texts`, read or computed; returns how many were not there already."""
        if self.base.blocks is None:
            return 0
        missing = list({t.key: t for t in texts if t.key not in self._rows}.values())
        missing.sort(key=lambda t: (len(t.ids), t.key))
        left = self._read(missing)
        if len(left) < len(missing):
            logger.info("trunk: %d texts read from %s", len(missing) - len(left), self.cache.folder)
        portions, done = list(_portions(left, self._portion)), 0
        if self.cache is not None:  # in any order: processes that fill the same texts at once share the work
            random.SystemRandom().shuffle(portions)
        for portion in portions:
            own = self._read(portion)
            if own:
                show = progress and (lambda n, _, before=done: progress(before + n, len(left)))
                self._keep(own, *self._compute(own, show))
            done += len(portion)
        return len(missing)

    def states(self, texts: Sequence[Tokens], t: int) -> Float[Tensor, "n t d"]:
        """Trunk states of `texts`, right-padded with zeros to `t` tokens."""
        out = torch.zeros((len(texts), t, self._width), dtype=self._store_dtype)
        for row, text in enumerate(texts):
            out[row, : len(text.ids)] = torch.from_numpy(self._rows[text.key][0])
        return out.to(self.base.device, self.base.dtype)

    def suffix(self, texts: Sequence[Tokens], batch: TextBatch, /) -> Float[Tensor, "s v"]:
        """Logits at the scored positions, from the cached trunk where there is one.

        Side branches and hooks that are installed on the edit sites take effect; gradients flow to them.
        """
        with ExitStack() as stack:
            if self.label_only:
                stack.enter_context(only_scored(self.base, batch.scored))
            if self.split and all(text.key in self._rows for text in texts):
                states = self.states(texts, batch.input_ids.shape[1])
                stack.enter_context(_start_at(self.base, self.base.blocks.first, states))
            logits = self._forward(batch)
        return logits if self.label_only else logits[batch.scored]

    @torch.no_grad()
    def before(self, texts: Sequence[Tokens], batch: TextBatch, /) -> Float[Tensor, "s v"]:
        """The unedited model's logits at the scored positions: only the output layer runs on cached references."""
        if not self.label_only or any(text.key not in self._rows for text in texts):
            return self.suffix(texts, batch)
        parts = [torch.from_numpy(self._rows[text.key][1]) for text in texts]
        kept = torch.cat(parts).to(self.base.device, self.base.dtype)
        if self.base.family == CLASSIFIER:
            return kept
        hidden = kept[:, None]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.base.device)
        with _start_at(self.base, self.base.blocks.last + 1, hidden):
            return self.base.model(input_ids=ids, use_cache=False).logits[:, 0]

    # --------------------------------------------------------------------------------------- keeping and computing

    def _read(self, texts: Sequence[Tokens]) -> list[Tokens]:
        """Take the values that are on disk from there; returns the texts without."""
        if self.cache is None or not texts:
            return list(texts)
        keys = {_digest(text): text for text in texts}
        found = self.cache.find(keys)
        self._rows |= {keys[key].key: values for key, values in found.items()}
        return [text for key, text in keys.items() if key not in found]

    def _keep(self, texts: Sequence[Tokens], states: np.ndarray, reference: np.ndarray) -> None:
        """Keep computed values: in memory, or on disk and as a memory map of it."""
        at = scored_at = 0
        for text in texts:
            self._rows[text.key] = states[at : at + len(text.ids)], reference[scored_at : scored_at + len(text.scored)]
            at, scored_at = at + len(text.ids), scored_at + len(text.scored)
        if self.cache is not None:
            counts = [(len(text.ids), len(text.scored)) for text in texts]
            self.cache.add([_digest(text) for text in texts], (states, reference), counts)
            self._read(texts)

    @property
    def _portion(self) -> int:
        """Tokens of a portion: its states fill a shard."""
        return SHARD_BYTES // (self.base.model.get_input_embeddings().weight.shape[1] * self._store_dtype.itemsize)

    def _forward(self, batch: TextBatch) -> Tensor:
        return self.base.forward(batch.input_ids, batch.attention_mask, batch.decoder_ids)

    @property
    def _width(self) -> int:
        return next(iter(self._rows.values()))[0].shape[1]

    @property
    def _store_dtype(self) -> torch.dtype:
        return torch.float32 if self.base.dtype == torch.bfloat16 else self.base.dtype

    @torch.no_grad()
    def _compute(self, texts: Sequence[Tokens], progress: Any) -> tuple[np.ndarray, np.ndarray]:
        states, references, done = [], [], 0
        for chunk in _chunks(texts):
            batch = collate(chunk, self.base.pad_id, self.base.device)
            entering, reference = self._watch(batch)
            keep = batch.attention_mask.bool()
            states.append(entering[keep.to(entering.device)].to("cpu", self._store_dtype).numpy())
            references.append(reference.to("cpu", self._store_dtype).numpy())
            done += len(chunk)
            if progress is not None:
                progress(done, len(texts))
        return np.concatenate(states), np.concatenate(references)

    def _watch(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Hidden states (n, t, d) entering the lowest edited block, and references (s, d): those leaving the last block
        at the scored positions, or a classifier's logits (n, v)."""
        blocks = self.base.model.get_submodule(self.base.blocks.path)
        seen: dict[str, Tensor] = {}

        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]

        def leaving(_: nn.Module, __: Any, output: Any) -> None:
            seen["out"] = output[0] if isinstance(output, tuple) else output

        handles = [
            blocks[self.base.blocks.first].register_forward_pre_hook(entering, with_kwargs=True),
            blocks[self.base.blocks.last].register_forward_hook(leaving),
        ]
        try:
            with only_scored(self.base, batch.scored & False):
                logits = self._forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        out = seen["out"]
        return seen["in"], logits if self.base.family == CLASSIFIER else out[batch.scored.to(out.device)]


def trunk_cache(base: BaseModel, folder: str | Path | None, *, limit: int) -> TextCache | None:
    """The cache on disk of this model's trunk; None if the model has no trunk, or with a limit of 0 bytes.

    The values depend on the weights, on what the model does with them, and on the split; not on the edit sites.
    """
    if base.blocks is None or limit == 0:
        return None
    config = base.model.config
    space = {
        "weights": weights_sha256(base),
        "model": [type(base.model).__name__, config.to_diff_dict() | dict.fromkeys(("_name_or_path", "dtype"))],
        "runs as": [str(base.dtype), base.device.type, config._attn_implementation, torch.__version__],
        "split": [base.blocks.path, base.blocks.first, base.blocks.last],
    }
    return TextCache(folder, space, limit=limit)


def _digest(text: Tokens) -> bytes:
    """What a text's values are found by on disk."""
    return hashlib.sha256(repr(text.key).encode()).digest()[:16]


def _portions(texts: Sequence[Tokens], size: int) -> Iterator[list[Tokens]]:
    """Consecutive chunks joined until they have `size` tokens; the chunks of a portion are the same ones."""
    portion: list[Tokens] = []
    for chunk in _chunks(texts):
        portion += chunk
        if sum(len(text.ids) for text in portion) >= size:
            yield portion
            portion = []
    if portion:
        yield portion


def _chunks(texts: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    """Consecutive texts whose padded size stays within TOKENS_PER_PASS."""
    chunk: list[Tokens] = []
    for text in texts:
        if chunk and (len(chunk) + 1) * max(len(text.ids), len(chunk[0].ids)) > TOKENS_PER_PASS:
            yield chunk
            chunk = []
        chunk.append(text)
    if chunk:
        yield chunk
