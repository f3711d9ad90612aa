"""The frozen trunk: everything below the lowest edited block, run once per text.

An edit changes only its sites. So the *trunk states* that enter the lowest edited block are
constants of a frozen model, and so is the *reference*: the last block's output at the scored
positions, or a classifier's logits. The *suffix*, the rest of the model, runs from trunk states by
the model's code, while stand-ins take the place of lower blocks. A model without a chain of blocks
runs whole.

Axes: n texts, t padded tokens, l padded tokens of a decoder (else t), d width, s scored positions,
v vocabulary.
"""

import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ModelError
from ..runs import sha256
from .base import BaseModel
from .cache import SHARD_BYTES, TextCache
from .families import CLASSIFIER
from .fingerprint import weights_sha256
from .sites import embedding_matrix, hidden_states
from .streaming import present, standing_in, trunk_names
from .tokens import TextBatch, Tokens, collate

logger = logging.getLogger(__name__)

TOKENS_PER_PASS = 2048


@contextmanager
def only_scored(base: BaseModel, scored: Bool[Tensor, "n l"]) -> Iterator[None]:
    """Within the context the output layer sees only scored positions."""
    if base.family == CLASSIFIER:  # its head reads one position anyway
        yield
        return

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][scored.to(args[0].device)], *args[1:])

    with base.model.get_output_embeddings().register_forward_pre_hook(select):
        yield


class FrozenTrunk:
    """Trunk states and references of texts, for one base model and its edit sites.

    `fill(texts)` reads them from `cache` or computes them. The last bits of a text's values depend
    on the texts that shared its pass. Blocks whose weights are not in memory are read from the
    checkpoint.
    """

    def __init__(self, base: BaseModel, *, cache: TextCache | None = None) -> None:
        self.base, self.cache = base, cache
        self.split = base.blocks is not None and base.blocks.first > 0
        self._values: dict[Any, tuple[Tensor, Tensor]] = {}  # states (t, d), reference (s, d)

    def at(self, base: BaseModel) -> "FrozenTrunk":
        """A trunk for other sites of the same model; it shares the values where the sites allow."""
        other = FrozenTrunk(base)
        if base.blocks and self.base.blocks and self.base.blocks.first <= base.blocks.first:
            other.base = copy.copy(base)
            other.base.blocks = self.base.blocks
            other.split, other._values = self.split, self._values
        return other

    def holds(self, texts: Sequence[Tokens]) -> bool:
        """Whether the values of all these texts are in memory."""
        return all(text.key in self._values for text in texts)

    def states(self, texts: Sequence[Tokens], t: int) -> Float[Tensor, "n t d"]:
        """Trunk states of `texts`, right-padded with zeros to `t` tokens."""
        rows = [self._values[text.key][0] for text in texts]
        out = torch.zeros((len(rows), t, rows[0].shape[1]), dtype=self.base.dtype)
        for padded, row in zip(out, rows, strict=True):
            padded[: len(row)] = row
        return out.to(self.base.device)

    def references(self, texts: Sequence[Tokens]) -> Float[Tensor, "s d"]:
        """The unedited model's references at the scored positions of `texts`."""
        return torch.cat([self._values[text.key][1] for text in texts]).to(self.base.device)

    def suffix(self, texts: Sequence[Tokens], batch: TextBatch) -> Float[Tensor, "s v"]:
        """Logits at the scored positions, from cached trunk states where there are any.

        Hooks and side branches on the edit sites take effect, and gradients flow to them.
        """
        below: AbstractContextManager[None] = nullcontext()
        blocks = self.base.blocks
        if blocks is not None and self.split and self.holds(texts):
            states = self.states(texts, batch.input_ids.shape[1])
            below = standing_in(self.base.model, blocks, first=blocks.first, states=states)
        with only_scored(self.base, batch.scored), below:
            return self._forward(batch)

    @torch.no_grad()
    def before(self, texts: Sequence[Tokens], batch: TextBatch) -> Float[Tensor, "s v"]:
        """The unedited model's logits at the scored positions.

        From cached references only the output layer runs.
        """
        if not self.holds(texts):
            return self.suffix(texts, batch)
        references, blocks = self.references(texts), self.base.blocks
        if self.base.family == CLASSIFIER:
            return references
        assert blocks is not None  # else no text has values
        hidden = references[:, None]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.base.device)
        with standing_in(self.base.model, blocks, first=blocks.last + 1, states=hidden):
            return self.base.model(input_ids=ids, use_cache=False).logits[:, 0]

    def fill(
        self, texts: Sequence[Tokens], progress: Callable[[int, int], None] | None = None
    ) -> int:
        """Read or compute the values of `texts`. Returns how many were not in memory.

        `progress` gets the number of texts done and in all, of a streamed model also of blocks.
        """
        if self.base.blocks is None:
            return 0
        # 1. Texts that are not in memory, by length, so that a pass has little padding.
        missing = list({text.key: text for text in texts if text.key not in self._values}.values())
        missing.sort(key=lambda text: (len(text.ids), text.key))
        # 2. Those on disk are read.
        left = self._read(missing)
        if self.cache is not None and len(left) < len(missing):
            logger.info("trunk: %d texts read from %s", len(missing) - len(left), self.cache.folder)
        # 3. The others are computed by shards. A streamed model takes all of them at once, because
        #    each call reads its blocks from the disk.
        portions = list(self._shards(left))
        if self.base.released and left:
            portions = [left]
        if self.cache is not None:
            # Processes that fill the same texts at once share the work if their order differs.
            random.SystemRandom().shuffle(portions)
        done = 0
        for portion in portions:
            todo = self._read(portion)
            if todo:
                self._compute(todo, progress)
            done += len(portion)
            if progress is not None:
                progress(done, len(left))
        return len(missing)

    # ------------------------------------------------------------------------ keeping and computing

    def _read(self, texts: Sequence[Tokens]) -> list[Tokens]:
        """Take values from the disk. Returns the texts that are not there."""
        if self.cache is None or not texts:
            return list(texts)
        by_digest = {_digest(text): text for text in texts}
        found = self.cache.find(by_digest)
        for digest, (states, references) in found.items():
            self._values[by_digest[digest].key] = states, references
        return [text for digest, text in by_digest.items() if digest not in found]

    def _shards(self, texts: Sequence[Tokens]) -> Iterator[list[Tokens]]:
        """Whole passes, joined until their states fill a shard of the cache."""
        width = embedding_matrix(self.base.model).shape[1]
        enough = SHARD_BYTES // (width * self.base.dtype.itemsize)
        shard: list[Tokens] = []
        for group in passes(texts):
            shard += group
            if sum(len(text.ids) for text in shard) >= enough:
                yield shard
                shard = []
        if shard:
            yield shard

    @torch.no_grad()
    def _compute(self, texts: Sequence[Tokens], progress: Any) -> None:
        """Compute values and keep them in memory, or as maps of the cache's files."""
        groups = list(passes(texts))
        batches = [collate(group, self.base.pad_id, self.base.device) for group in groups]
        streamed = self._stream(batches, progress) if self.base.released else None
        for i, (group, batch) in enumerate(zip(groups, batches, strict=True)):
            keep = batch.attention_mask.bool()
            if streamed is None:
                entering, leaving, logits = self._run(batch)
                packed = entering[keep.to(entering.device)].cpu()
            else:
                packed = streamed[i]
                _, leaving, logits = self._run(batch, states=_unpacked(packed, keep))
            reference = logits
            if self.base.family != CLASSIFIER:
                reference = leaving[batch.scored.to(leaving.device)]
            # Packed rows are cut into texts again.
            states = packed.split([len(text.ids) for text in group])
            references = reference.cpu().split([len(text.scored) for text in group])
            for text, entered, kept in zip(group, states, references, strict=True):
                self._values[text.key] = entered, kept
        if self.cache is not None:
            for shard in self._shards(texts):
                self.cache.add({_digest(text): self._values[text.key] for text in shard})
                self._read(shard)  # a map of the file takes their place and frees the memory

    def _stream(self, batches: Sequence[TextBatch], progress: Any) -> list[Tensor]:
        """Packed states that enter the lowest edited block.

        Each block below is read from the checkpoint, run on all batches, and freed.
        """
        base, blocks = self.base, self.base.blocks
        assert blocks is not None  # `fill` computes nothing without a chain of blocks
        path, first = blocks.path, blocks.first
        if base.weights is None or base.released < first:
            raise ModelError(
                f"{base.name} was released and {sum(map(len, batches))} texts are not cached; "
                "load the model again"
            )
        names = trunk_names(base.model, path, first)
        states: list[Any] = [None] * len(batches)
        for block in range(first):
            here = [name for name in names if name.startswith(f"{path}.{block}.")]
            if block == 0:  # with the input embeddings
                here += [name for name in names if not name.startswith(f"{path}.")]
            with present(base.model, here, base.weights, base.device):
                for i, batch in enumerate(batches):
                    keep = batch.attention_mask.bool()
                    given = _unpacked(states[i], keep) if block else None
                    _, leaving, _ = self._run(batch, states=given, alone=block)
                    states[i] = leaving[keep].cpu()
            if progress is not None:
                progress(block + 1, first)
        return states

    def _run(
        self, batch: TextBatch, *, states: Tensor | None = None, alone: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States (n, t, d) entering the lowest edited block and leaving the last, and logits.

        With `states` nothing runs below the lowest edited block. If a block runs `alone`, it takes
        the place of both. The output layer runs on no position.
        """
        blocks = self.base.blocks
        assert blocks is not None
        first, last = blocks.first, blocks.last
        if alone is not None:
            first = last = alone
        seen: dict[str, Tensor] = {}

        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]

        def leaving(_: nn.Module, __: Any, output: Any) -> None:
            seen["out"] = hidden_states(output)

        modules = self.base.model.get_submodule(blocks.path)
        others: AbstractContextManager[None] = nullcontext()
        if states is not None or alone is not None:
            others = standing_in(self.base.model, blocks, first=first, last=last, states=states)
        before = modules[first].register_forward_pre_hook(entering, with_kwargs=True)
        after = modules[last].register_forward_hook(leaving)
        with before, after, others, only_scored(self.base, torch.zeros_like(batch.scored)):
            logits = self._forward(batch)
        return seen["in"], seen["out"], logits

    def _forward(self, batch: TextBatch) -> Tensor:
        return self.base.forward(batch.input_ids, batch.attention_mask, batch.decoder_ids)


def trunk_cache(base: BaseModel, folder: str | Path | None, *, limit: int) -> TextCache | None:
    """The cache on disk of this model's trunk. None without a trunk, or with a limit of 0 bytes.

    Its space is the weights, what the model does with them, and the lowest edited block.
    """
    if base.blocks is None or limit == 0:
        return None
    config = base.model.config
    settings = config.to_diff_dict() | {"_name_or_path": None, "dtype": None}
    space = {
        "format": 2,
        "weights": weights_sha256(base),
        "model": [type(base.model).__name__, settings, config._attn_implementation],
        "runs as": [str(base.dtype), base.device.type, torch.__version__],
        "blocks": [base.blocks.path, base.blocks.first, base.blocks.last],
    }
    return TextCache(folder, space, limit=limit)


def passes(texts: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    """Consecutive texts whose padded size stays within TOKENS_PER_PASS."""
    group: list[Tokens] = []
    for text in texts:
        if group and (len(group) + 1) * max(len(text.ids), len(group[0].ids)) > TOKENS_PER_PASS:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _unpacked(packed: Tensor, keep: Bool[Tensor, "n t"]) -> Float[Tensor, "n t d"]:
    """Packed states of the tokens to keep, zeros elsewhere."""
    out = torch.zeros((*keep.shape, packed.shape[1]), dtype=packed.dtype, device=keep.device)
    out[keep] = packed.to(keep.device)
    return out


def _digest(text: Tokens) -> bytes:
    """What a text's values are found by on disk."""
    return bytes.fromhex(sha256(repr(text.key))[:32])
