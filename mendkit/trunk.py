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
    model's and the texts' hashes and written atomically. States are kept in the model's dtype (bfloat16 as float32).
    `label_only` false computes the logits of every position, as others do, to show what that costs.
    """

    def __init__(self, base: BaseModel, *, cache_dir: str | Path | None = None, label_only: bool = True) -> None:
        self.base, self.label_only = base, label_only
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
        out = torch.zeros((len(texts), t, self._width), dtype=self._store_dtype)
        for row, text in enumerate(texts):
            states, at, _, _ = self._rows[text.key]
            out[row, : len(text.ids)] = torch.from_numpy(states[at : at + len(text.ids)])
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
        parts = [
            torch.from_numpy(reference[at : at + len(text.scored)])
            for text, (_, _, reference, at) in ((text, self._rows[text.key]) for text in texts)
        ]
        hidden = torch.cat(parts).to(self.base.device, self.base.dtype)[:, None]
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

    @property
    def _store_dtype(self) -> torch.dtype:
        return torch.float32 if self.base.dtype == torch.bfloat16 else self.base.dtype

    @torch.no_grad()
    def _compute(self, texts: Sequence[Tokens], progress: Any) -> tuple[np.ndarray, np.ndarray]:
        states, references, done = [], [], 0
        for chunk in _chunks(texts):
            batch = collate(chunk, self.base.pad_id, self.base.device)
            entering, leaving = self._watch(batch)
            keep = batch.attention_mask.bool()
            states.append(entering[keep].to("cpu", self._store_dtype).numpy())
            references.append(leaving[batch.scored].to("cpu", self._store_dtype).numpy())
            done += len(chunk)
            if progress is not None:
                progress(done, len(texts))
        result = np.concatenate(states), np.concatenate(references)
        return self._store(texts, *result)

    def _watch(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Hidden states entering the lowest edited block and leaving the last block."""
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
                self._forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        return seen["in"], seen["out"]

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
