"""The frozen trunk: everything below the lowest edited block, run once per text.

An edit changes only its sites, so the hidden states entering the lowest edited block (the *trunk states*) and the
unedited model's last hidden state at the scored positions (the *reference*) are constants of a frozen model.
`FrozenTrunk` computes both in one pass per text, keeps them in a file, and runs the rest of the model (the *suffix*)
from them: the block list is swapped for one whose lower entries hand the stored states on, so that any decoder's own
code does the work. Logits are computed only at scored positions. A model without a clean split runs whole, with the
same numbers. Axes: n texts, t padded tokens, d width, s scored positions, v vocabulary.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .data import Tokens
from .errors import ModelError
from .hollow import present, standing_in, trunk_names
from .models import BaseModel, model_fingerprint

logger = logging.getLogger(__name__)

TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class TextBatch:
    """Texts as right-padded tensors. Row-major order of `scored` is the order of all packed values."""

    input_ids: Int[Tensor, "n t"]
    attention_mask: Int[Tensor, "n t"]
    scored: Bool[Tensor, "n t"]
    targets: Int[Tensor, " s"]  # the token each scored position predicts, -100 where the text has no answer

    @property
    def rows(self) -> Int[Tensor, " s"]:
        """The text of each scored position."""
        return self.scored.nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.input_ids)


def collate(texts: Sequence[Tokens], pad_id: int, device: torch.device | str = "cpu", /) -> TextBatch:
    """Right-pad texts into one batch."""
    n, t = len(texts), max(len(text.ids) for text in texts)
    ids = torch.full((n, t), pad_id, dtype=torch.long)
    mask, scored = torch.zeros((n, t), dtype=torch.long), torch.zeros((n, t), dtype=torch.bool)
    targets: list[int] = []
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        mask[row, : len(text.ids)] = 1
        scored[row, list(text.scored)] = True
        targets.extend(text.targets or [-100] * len(text.scored))
    return TextBatch(ids.to(device), mask.to(device), scored.to(device), torch.tensor(targets, device=device))


@contextmanager
def _start_at(base: BaseModel, first: int, states: Tensor | None, *, last: int | None = None) -> Iterator[None]:
    """Within the context only the model's blocks `first` to `last` run, on `states` (n, t, d)."""
    path, as_tuple = base.blocks.path, base.blocks.as_tuple
    with standing_in(base.model, path, as_tuple, first=first, last=last, states=states):
        yield


@contextmanager
def only_scored(base: BaseModel, scored: Bool[Tensor, "n t"]) -> Iterator[list[Tensor]]:
    """Within the context the output layer sees only scored positions; yields a list that receives what it saw."""
    seen: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0][scored])
        return (seen[-1], *args[1:])

    handle = base.model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        handle.remove()


class FrozenTrunk:
    """Trunk states and references of a set of texts, for one base model and its edit sites.

    `fill(texts)` computes what is missing; `cache_dir` keeps the values of each filled set in one file, keyed by the
    model's and the texts' hashes and written atomically. States are kept in the model's dtype (bfloat16 as its bits in
    uint16, which numpy has). Blocks whose weights are not in memory are read from the checkpoint, one at a time.
    """

    def __init__(self, base: BaseModel, *, cache_dir: str | Path | None = None) -> None:
        self.base = base
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.split = base.blocks is not None and base.blocks.first > 0
        self._rows: dict[Any, tuple[np.ndarray, int, np.ndarray, int]] = {}

    def fill(self, texts: Sequence[Tokens], progress: Any = None) -> int:
        """Compute and keep the values of `texts`; returns how many were not already in memory."""
        if self.base.blocks is None:
            return 0
        missing = list({t.key: t for t in texts if t.key not in self._rows}.values())
        missing.sort(key=lambda t: (len(t.ids), t.key))
        if not missing:
            return 0
        states, reference = self._load(missing) or self._compute(missing, progress)
        at = scored_at = 0
        for text in missing:
            self._rows[text.key] = (states, at, reference, scored_at)
            at, scored_at = at + len(text.ids), scored_at + len(text.scored)
        return len(missing)

    def states(self, texts: Sequence[Tokens], t: int) -> Float[Tensor, "n t d"]:
        """Trunk states of `texts`, right-padded with zeros to `t` tokens."""
        rows = [self._rows[text.key] for text in texts]
        out = torch.zeros((len(texts), t, self._width), dtype=self.base.dtype)
        for own, text, (states, at, _, _) in zip(out, texts, rows, strict=True):
            own[: len(text.ids)] = _tensor(states[at : at + len(text.ids)], out.dtype)
        return out.to(self.base.device)

    def holds(self, texts: Sequence[Tokens]) -> bool:
        """Whether the values of all these texts are in memory."""
        return all(text.key in self._rows for text in texts)

    def references(self, texts: Sequence[Tokens]) -> Float[Tensor, "s d"]:
        """The unedited model's last hidden states at the scored positions of `texts`."""
        rows = [(self._rows[text.key], len(text.scored)) for text in texts]
        parts = [_tensor(reference[at : at + n], self.base.dtype) for (_, _, reference, at), n in rows]
        return torch.cat(parts).to(self.base.device)

    def suffix(self, texts: Sequence[Tokens], batch: TextBatch, /) -> Float[Tensor, "s v"]:
        """Logits at the scored positions, from the cached trunk where there is one.

        Side branches and hooks that are installed on the edit sites take effect; gradients flow to them.
        """
        with ExitStack() as stack:
            stack.enter_context(only_scored(self.base, batch.scored))
            if self.split and self.holds(texts):
                states = self.states(texts, batch.input_ids.shape[1])
                stack.enter_context(_start_at(self.base, self.base.blocks.first, states))
            return self._forward(batch)

    @torch.no_grad()
    def before(self, texts: Sequence[Tokens], batch: TextBatch, /) -> Float[Tensor, "s v"]:
        """The unedited model's logits at the scored positions: only the output layer runs on cached references."""
        if not self.holds(texts):
            return self.suffix(texts, batch)
        hidden = self.references(texts)[:, None]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.base.device)
        with _start_at(self.base, self.base.blocks.last + 1, hidden):
            return self.base.model(input_ids=ids, use_cache=False).logits[:, 0]

    # ------------------------------------------------------------------------------------------------- computing

    def _forward(self, batch: TextBatch) -> Tensor:
        model = self.base.model
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits

    @property
    def _width(self) -> int:
        return next(iter(self._rows.values()))[0].shape[1]

    @torch.no_grad()
    def _compute(self, texts: Sequence[Tokens], progress: Any) -> tuple[np.ndarray, np.ndarray]:
        first, streamed = self.base.blocks.first, self.base.released > 0
        states, references, done = self._stream(texts, progress) if streamed else [], [], 0
        for i, chunk in enumerate(_chunks(texts)):
            batch = collate(chunk, self.base.pad_id, self.base.device)
            keep = batch.attention_mask.bool()
            if streamed:
                leaving = self._run(batch, first, self.base.blocks.last, unpacked(states[i], keep, self.base.dtype))
            else:
                entering, leaving = self._watch(batch)
                states.append(_array(entering[keep]))
            references.append(_array(leaving[batch.scored]))
            done += len(chunk)
            if progress is not None:
                progress(done, len(texts))
        return self._store(texts, _joined(states), _joined(references))

    def _stream(self, texts: Sequence[Tokens], progress: Any) -> list[np.ndarray]:
        """States entering the lowest edited block, by chunk: each hollow block is read, run on all texts, freed."""
        base, path = self.base, self.base.blocks.path
        if base.weights is None or base.released < base.blocks.first:
            raise ModelError(
                f"{base.name} was released and {len(texts)} texts are not cached; load the model again, or call "
                "restore_trunk()"
            )
        names = trunk_names(base.model, path, base.blocks.first)
        states: list[np.ndarray] = []
        for block in range(base.blocks.first):
            wanted = f"{path}.{block}."
            own = [n for n in names if n.startswith(wanted) or (block == 0 and not n.startswith(f"{path}."))]
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

    def _watch(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Hidden states entering the lowest edited block and leaving the last block."""
        with self._seen(self.base.blocks.first, self.base.blocks.last) as seen:
            self._silently(batch)
        return seen["in"], seen["out"]

    def _silently(self, batch: TextBatch) -> None:
        with only_scored(self.base, batch.scored & False):
            self._forward(batch)

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

    # ------------------------------------------------------------------------------------------------- on disk

    def _path(self, texts: Sequence[Tokens]) -> Path | None:
        if self.cache_dir is None:
            return None
        digest = hashlib.sha256(json.dumps([text.key for text in texts]).encode())
        digest.update(json.dumps([model_fingerprint(self.base), self.base.blocks.first, str(self.base.dtype)]).encode())
        return self.cache_dir / f"trunk-{digest.hexdigest()[:32]}.npz"

    def _load(self, texts: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray] | None:
        path = self._path(texts)
        if path is None or not path.is_file():
            return None
        with np.load(path) as file:
            logger.info("trunk: %d texts read from %s", len(texts), path)
            return file["states"], file["reference"]

    def _store(
        self, texts: Sequence[Tokens], states: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        path = self._path(texts)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".trunk-")
            try:
                with os.fdopen(handle, "wb") as file:
                    np.savez(file, states=states, reference=reference)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        return states, reference


def _array(values: Tensor) -> np.ndarray:
    """Values in host memory, bit for bit: bfloat16, which numpy lacks, as uint16."""
    values = values.cpu()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """The rows of all parts, which are freed on the way."""
    out, at = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype), 0
    while parts:
        part = parts.pop(0)
        out[at : at + len(part)] = part
        at += len(part)
    return out


def _tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.view(dtype) if tensor.dtype == torch.uint16 else tensor.to(dtype)


def unpacked(values: np.ndarray, keep: Bool[Tensor, "n t"], dtype: torch.dtype) -> Float[Tensor, "n t d"]:
    """Packed values of the tokens to keep, zeros elsewhere."""
    out = torch.zeros((*keep.shape, values.shape[1]), dtype=dtype, device=keep.device)
    out[keep] = _tensor(values, dtype).to(keep.device)
    return out


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
