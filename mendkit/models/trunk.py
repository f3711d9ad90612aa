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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ModelError
from .base import BaseModel
from .cache import SHARD_BYTES, TextCache
from .families import CLASSIFIER
from .fingerprint import weights_sha256
from .streaming import present, standing_in, trunk_names
from .tokens import TextBatch, Tokens, collate

logger = logging.getLogger(__name__)

TOKENS_PER_PASS = 2048


@contextmanager
def _start_at(
    base: BaseModel, first: int, states: Tensor | None, *, last: int | None = None
) -> Iterator[None]:
    """Within the context only the model's blocks `first` to `last` run, on `states` (n, t, d)."""
    path, as_tuple = base.blocks.path, base.blocks.as_tuple
    with standing_in(base.model, path, as_tuple, first=first, last=last, states=states):
        yield


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
    model's dtype (bfloat16 as its bits in uint16, which numpy has). A text's values can differ in their last bits with
    the texts that shared its pass; those on disk are of the pass that came first. Blocks whose weights are not in
    memory are read from the checkpoint, one at a time. `label_only` false computes the logits of every position, as
    others do, to show what that costs.
    """

    def __init__(
        self, base: BaseModel, *, cache: TextCache | None = None, label_only: bool = True
    ) -> None:
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
        streamed = (
            left and self.base.released > 0
        )  # then the checkpoint is read once for all of them
        portions, done = [left] if streamed else list(_portions(left, self._portion)), 0
        if (
            self.cache is not None
        ):  # in any order: processes that fill the same texts at once share the work
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
        out = torch.zeros((len(texts), t, self._width), dtype=self.base.dtype)
        for own, text in zip(out, texts, strict=True):
            own[: len(text.ids)] = _tensor(self._rows[text.key][0], out.dtype)
        return out.to(self.base.device)

    def holds(self, texts: Sequence[Tokens]) -> bool:
        """Whether the values of all these texts are in memory."""
        return all(text.key in self._rows for text in texts)

    def references(self, texts: Sequence[Tokens]) -> Float[Tensor, "s d"]:
        """The unedited model's last hidden states at the scored positions of `texts`, or a classifier's logits."""
        parts = [_tensor(self._rows[text.key][1], self.base.dtype) for text in texts]
        return torch.cat(parts).to(self.base.device)

    def suffix(self, texts: Sequence[Tokens], batch: TextBatch, /) -> Float[Tensor, "s v"]:
        """Logits at the scored positions, from the cached trunk where there is one.

        Side branches and hooks that are installed on the edit sites take effect; gradients flow to them.
        """
        with ExitStack() as stack:
            if self.label_only:
                stack.enter_context(only_scored(self.base, batch.scored))
            if self.split and self.holds(texts):
                states = self.states(texts, batch.input_ids.shape[1])
                stack.enter_context(_start_at(self.base, self.base.blocks.first, states))
            logits = self._forward(batch)
        return logits if self.label_only else logits[batch.scored]

    @torch.no_grad()
    def before(self, texts: Sequence[Tokens], batch: TextBatch, /) -> Float[Tensor, "s v"]:
        """The unedited model's logits at the scored positions: only the output layer runs on cached references."""
        if not self.label_only or not self.holds(texts):
            return self.suffix(texts, batch)
        kept = self.references(texts)
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

    def _keep(
        self, texts: Sequence[Tokens], states: list[np.ndarray], references: list[np.ndarray]
    ) -> None:
        """Keep computed values, by chunks, which are freed: in memory, or on disk and as a memory map of it."""
        for portion in _portions(texts, self._portion):
            chunks = len(list(_chunks(portion)))
            arrays = _joined(states, chunks), _joined(references, chunks)
            counts = [(len(text.ids), len(text.scored)) for text in portion]
            ends = np.cumsum(counts, 0)[:-1].T
            values = zip(
                *(np.split(array, end) for array, end in zip(arrays, ends, strict=True)),
                strict=True,
            )
            self._rows |= {text.key: own for text, own in zip(portion, values, strict=True)}
            if self.cache is not None:
                self.cache.add([_digest(text) for text in portion], arrays, counts)
                self._read(portion)

    @property
    def _portion(self) -> int:
        """Tokens of a portion: its states fill a shard."""
        return SHARD_BYTES // (
            self.base.model.get_input_embeddings().weight.shape[1] * self.base.dtype.itemsize
        )

    def _forward(self, batch: TextBatch) -> Tensor:
        return self.base.forward(batch.input_ids, batch.attention_mask, batch.decoder_ids)

    @property
    def _width(self) -> int:
        return next(iter(self._rows.values()))[0].shape[1]

    @torch.no_grad()
    def _compute(
        self, texts: Sequence[Tokens], progress: Any
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """States and references of the texts, packed, chunk by chunk."""
        streamed = self.base.released > 0
        states, references, done = self._stream(texts, progress) if streamed else [], [], 0
        for i, chunk in enumerate(_chunks(texts)):
            batch = collate(chunk, self.base.pad_id, self.base.device)
            keep = batch.attention_mask.bool()
            given = unpacked(states[i], keep, self.base.dtype) if streamed else None
            entering, reference = self._watch(batch, given)
            if not streamed:
                states.append(_array(entering[keep.to(entering.device)]))
            references.append(_array(reference))
            done += len(chunk)
            if progress is not None:
                progress(done, len(texts))
        return states, references

    def _stream(self, texts: Sequence[Tokens], progress: Any) -> list[np.ndarray]:
        """States entering the lowest edited block, by chunk: each hollow block is read, run on all texts, freed."""
        base, path = self.base, self.base.blocks.path
        if base.weights is None or base.released < base.blocks.first:
            raise ModelError(
                f"{base.name} was released and {len(texts)} texts are not cached; load the model again"
            )
        names = trunk_names(base.model, path, base.blocks.first)
        states: list[np.ndarray] = []
        for block in range(base.blocks.first):
            wanted = f"{path}.{block}."
            own = [
                n
                for n in names
                if n.startswith(wanted) or (block == 0 and not n.startswith(f"{path}."))
            ]
            with present(base.model, own, base.weights, base.device):
                for i, chunk in enumerate(_chunks(texts)):
                    batch = collate(chunk, base.pad_id, base.device)
                    keep = batch.attention_mask.bool()
                    given = unpacked(states[i], keep, base.dtype) if block else None
                    leaving = _array(self._run(batch, block, block, given)[keep])
                    states[i : i + 1] = [leaving]
            if progress is not None:
                progress(block + 1, base.blocks.first)
        return states

    def _run(self, batch: TextBatch, first: int, last: int, states: Tensor | None) -> Tensor:
        """Hidden states (n, t, d) leaving block `last` if `states` enter block `first` (None: the embeddings)."""
        with _start_at(self.base, first, states, last=last), self._seen(first, last) as seen:
            self._silently(batch)
        return seen["out"]

    def _watch(self, batch: TextBatch, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states (n, t, d) entering the lowest edited block, and references (s, d): those leaving the last block
        at the scored positions, or a classifier's logits (n, v). With `states` nothing below that block runs."""
        first, last = self.base.blocks.first, self.base.blocks.last
        with ExitStack() as stack:
            if states is not None:
                stack.enter_context(_start_at(self.base, first, states))
            seen = stack.enter_context(self._seen(first, last))
            logits = self._silently(batch)
        out = seen["out"]
        return seen["in"], logits if self.base.family == CLASSIFIER else out[
            batch.scored.to(out.device)
        ]

    def _silently(self, batch: TextBatch) -> Tensor:
        """The model runs, its output layer (but a classifier's head) on no position."""
        with only_scored(self.base, batch.scored & False):
            return self._forward(batch)

    @contextmanager
    def _seen(self, first: int, last: int) -> Iterator[dict[str, Tensor]]:
        """Within the context what enters block `first` and what leaves block `last` is recorded."""
        blocks = self.base.model.get_submodule(self.base.blocks.path)
        seen: dict[str, Tensor] = {}

        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]

        def leaving(_: nn.Module, __: Any, output: Any) -> None:
            seen["out"] = output[0] if isinstance(output, tuple) else output

        handles = [
            blocks[first].register_forward_pre_hook(entering, with_kwargs=True),
            blocks[last].register_forward_hook(leaving),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def trunk_cache(base: BaseModel, folder: str | Path | None, *, limit: int) -> TextCache | None:
    """The cache on disk of this model's trunk; None if the model has no trunk, or with a limit of 0 bytes.

    The values depend on the weights, on what the model does with them, and on the split; not on the edit sites.
    """
    if base.blocks is None or limit == 0:
        return None
    config = base.model.config
    space = {
        "weights": weights_sha256(base),
        "model": [
            type(base.model).__name__,
            config.to_diff_dict() | dict.fromkeys(("_name_or_path", "dtype")),
        ],
        "runs as": [
            str(base.dtype),
            base.device.type,
            config._attn_implementation,
            torch.__version__,
        ],
        "split": [base.blocks.path, base.blocks.first, base.blocks.last],
    }
    return TextCache(folder, space, limit=limit)


def _array(values: Tensor) -> np.ndarray:
    """Values in host memory, bit for bit: bfloat16, which numpy lacks, as uint16."""
    values = values.cpu()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def _joined(parts: list[np.ndarray], count: int) -> np.ndarray:
    """The rows of the first parts, which are taken off the list and freed on the way."""
    sizes = list(map(len, parts[:count]))
    out, at = np.empty((sum(sizes), *parts[0].shape[1:]), parts[0].dtype), 0
    for size in sizes:
        out[at : at + size] = parts.pop(0)
        at += size
    return out


def _tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.view(dtype) if tensor.dtype == torch.uint16 else tensor.to(dtype)


def unpacked(
    values: np.ndarray, keep: Bool[Tensor, "n t"], dtype: torch.dtype
) -> Float[Tensor, "n t d"]:
    """Packed values of the tokens to keep, zeros elsewhere."""
    out = torch.zeros((*keep.shape, values.shape[1]), dtype=dtype, device=keep.device)
    out[keep] = _tensor(values, dtype).to(keep.device)
    return out


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
