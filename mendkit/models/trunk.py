"""The frozen trunk: everything below the lowest edited block, run once per text.

An edit changes only its sites. So the *trunk states* that enter the lowest edited block are
constants of a frozen model, and so is the *reference*: the last block's output at the scored
positions, or a classifier's logits. The *suffix*, the rest of the model, runs from trunk states by
the model's code. A model without a chain of blocks runs whole.

Axes: n texts, t padded tokens, l padded tokens of a decoder (else t), d width, s scored positions,
v vocabulary.
"""

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import chain, takewhile
from operator import eq
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .base import BaseModel
from .cache import TextCache, TextValues
from .families import CLASSIFIER
from .fingerprint import weights_sha256
from .sites import hidden_states
from .streaming import standing_in, visiting
from .tokens import PackedBatch, TextBatch, Tokens, collate, pack

logger = logging.getLogger(__name__)

TOKENS_PER_PASS = 2048
"""The states of a pass are also a file of the cache: little to lose in a crash, and few files."""

NODES_PER_ROW, MOST_NODES = 256, 1024
"""Attention costs nodes² of a row, sharing of beginnings ends with it; at most so many fit."""


class FrozenTrunk:
    """Trunk states and references of texts, for one base model and its edit sites.

    `fill` reads them from `cache` or computes them. The last bits of a text's values depend on the
    texts that shared its pass.
    """

    def __init__(self, base: BaseModel, *, cache: TextCache | None = None) -> None:
        self.base, self.cache, self.blocks = base, cache, base.blocks
        self._values: dict[Any, TextValues] = {}  # states (t, d), reference (s, d)

    @property
    def split(self) -> bool:
        """Whether blocks lie below the lowest edited one."""
        return self.blocks is not None and self.blocks.first > 0

    def at(self, base: BaseModel) -> "FrozenTrunk":
        """A trunk for other sites of the same model; values are shared where the sites allow."""
        other = FrozenTrunk(base)
        if base.blocks and self.blocks and self.blocks.first <= base.blocks.first:
            other.blocks, other._values = self.blocks, self._values
        return other

    # ---------------------------------------------------------------------------------- reading

    def suffix(
        self, texts: Sequence[Tokens], batch: TextBatch, *, head: bool = True
    ) -> Float[Tensor, "s v"]:
        """Logits at the scored positions, from cached trunk states where there are any.

        Hooks and side branches on the edit sites take effect, and gradients flow to them. Without
        `head` the output layer runs on no position (s = 0).
        """
        t = batch.input_ids.shape[1]
        places = [slice(r * t, r * t + len(text.ids)) for r, text in enumerate(texts)]
        below = self._from_states(texts, places, [0] * len(texts), batch.input_ids.shape)
        with below:
            return self._forward(batch, batch.scored if head else torch.zeros_like(batch.scored))

    def _from_states(
        self,
        texts: Sequence[Tokens],
        places: Sequence[slice | Tensor],
        shared: Sequence[int],
        shape: torch.Size,
    ) -> AbstractContextManager[None]:
        """Within the context the suffix runs from trunk states, if all texts have them.

        `places` are those of each text in the flattened rows of `shape`; the first `shared` of them
        belong to an earlier text.
        """
        blocks, values = self.blocks, self._values_of(texts)
        if blocks is None or blocks.first == 0 or not values:
            return nullcontext()
        # Behind a text's end the states are zeros; no position before it looks there.
        states = torch.zeros((shape.numel(), values[0][0].shape[1]), dtype=self.base.dtype)
        for (row, _), place, first in zip(values, places, shared, strict=True):
            if isinstance(place, Tensor):
                place = place[first:]
            states[place] = row[first:]
        states = states.view(*shape, -1).to(self.base.device)
        run = range(blocks.first, blocks.last + 1)
        return standing_in(self.base.model, blocks, run, states)

    def suffix_of(
        self, groups: Sequence[Sequence[Tokens]], order: Sequence[int] | None = None
    ) -> Float[Tensor, "s v"]:
        """Logits as `suffix`, where the edit sites see an equal number of rows of each group.

        `order`: which of the groups' texts, counted from the first one's, comes when.
        """
        texts, base = [*chain.from_iterable(groups)], self.base
        order = range(len(texts)) if order is None else order
        # A group is one row of nodes. Where no such rows are read, a text is a row, and the groups
        # with fewer texts are filled up.
        if max(sum(len(text.ids) for text in group) for group in groups) <= self._longest_row():
            packed = pack(groups, base.pad_id)
            scored = packed.scored(texts).split([len(text.scored) for text in texts])
            shape = packed.input_ids.shape
            with self._from_states(texts, packed.nodes, packed.shared, shape):
                return base.forward_packed(packed, torch.cat([scored[i] for i in order]))
        most, rows, places = max(map(len, groups)), list[Tokens](), list[int]()
        for group in groups:
            places += range(len(rows), len(rows) + len(group))
            rows += [*group, *texts[:1] * (most - len(group))]
        logits = self.suffix(rows, collate(rows, base.pad_id, base.device))
        parts = logits.split([len(text.scored) for text in rows])
        return torch.cat([parts[places[i]] for i in order])

    def _longest_row(self) -> int:
        """The most nodes of a row; 0 if none are read. A window of attention must not end in it."""
        if not self.base.packs:
            return 0
        config = self.base.model.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
        return min(filter(None, [MOST_NODES, *windows]))

    @torch.no_grad()
    def before(self, texts: Sequence[Tokens], batch: TextBatch) -> Float[Tensor, "s v"]:
        """The unedited model's logits there; from cached references by the output layer alone."""
        values = self._values_of(texts)
        if self.blocks is None or not values:
            return self.suffix(texts, batch)
        references = torch.cat([reference for _, reference in values]).to(self.base.device)
        if self.base.family == CLASSIFIER:
            return references
        # Each reference as a text of one position; no block runs, so the ids do not matter.
        hidden = references[:, None]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.base.device)
        with standing_in(self.base.model, self.blocks, range(0), hidden):
            return self.base.model(input_ids=ids, use_cache=False).logits[:, 0]

    def _values_of(self, texts: Sequence[Tokens]) -> list[TextValues]:
        if not all(text.key in self._values for text in texts):
            return []
        return [self._values[text.key] for text in texts]

    def _forward(self, batch: TextBatch, scored: Bool[Tensor, "n l"]) -> Tensor:
        """Logits at the `scored` positions; the output layer sees only these."""
        base, hooks = self.base, ExitStack()

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0][scored.to(args[0].device)], *args[1:])

        if base.family != CLASSIFIER:  # whose head reads one position anyway
            output = base.model.get_output_embeddings()
            hooks.enter_context(output.register_forward_pre_hook(select))
        with hooks:
            return base.forward(batch.input_ids, batch.attention_mask, batch.decoder_ids)

    # ---------------------------------------------------------------------------------- filling

    def fill(
        self, texts: Sequence[Tokens], progress: Callable[[int, int], None] | None = None
    ) -> int:
        """Read or compute the values of `texts`. Returns how many were not in memory.

        `progress` gets the number of texts done and in all. Raises ModelError if the trunk was
        released.
        """
        if self.blocks is None:
            return 0
        # 1. Texts that are not in memory.
        missing = list({text.key: text for text in texts if text.key not in self._values}.values())
        # 2. Those on disk are read, the others computed; of a streamed model a block runs for all
        #    of them before the next one.
        left = self._read(missing)
        groups = self._groups(left)
        entering: dict[Any, Tensor] = {}
        if self.base.streamed:
            entering = self._stream(groups)
        # 3. Processes that fill the same texts at once share the work if their order differs.
        if self.cache is not None:
            random.SystemRandom().shuffle(groups)
        done = 0
        for group in groups:
            todo = group if entering else self._read(group)
            if todo:
                self._compute(todo, entering.get(group[0].key))
            done += len(group)
            if progress is not None:
                progress(done, len(left))
        return len(missing)

    def _groups(self, texts: Sequence[Tokens]) -> list[list[Tokens]]:
        """Texts in passes: with others that begin alike, or where they are too long, as long."""
        most = self._longest_row()
        packed, others = list[Tokens](), list[Tokens]()
        for text in texts:
            fits = max(NODES_PER_ROW, len(text.ids)) <= most
            (packed if fits else others).append(text)
        packed.sort(key=lambda text: text.key)
        others.sort(key=lambda text: (len(text.ids), text.key))
        groups = passes([[text] for text in others])
        return [*passes(packed_rows(packed)), *groups]

    def _read(self, texts: Sequence[Tokens]) -> list[Tokens]:
        found = self.cache.find([text.key for text in texts]) if self.cache else {}
        self._values |= found
        return [text for text in texts if text.key not in found]

    @torch.no_grad()
    def _compute(self, group: Sequence[Tokens], states: Tensor | None) -> None:
        assert self.blocks is not None  # `fill` computes nothing without a chain of blocks
        first = 0 if states is None else self.blocks.first
        above = range(first, self.blocks.last + 1)
        entering, reference, batch = self._run(group, above, states)
        rows = entering.flatten(0, 1)
        references = reference.split([len(text.scored) for text in group])
        for text, nodes, kept in zip(group, batch.nodes, references, strict=True):
            self._values[text.key] = rows[nodes], kept
        if self.cache is not None:
            self.cache.add({text.key: self._values[text.key] for text in group})
            self._read(group)  # a map of the file takes their place and frees the memory

    @torch.no_grad()
    def _stream(self, groups: Sequence[Sequence[Tokens]]) -> dict[Any, Tensor]:
        """What enters the lowest edited block, for each group by its first text."""
        base, blocks = self.base, self.blocks
        assert blocks is not None
        states: dict[Any, Tensor] = {}
        modules = list(base.model.get_submodule(blocks.path).children())
        for i in range(blocks.first):
            with visiting(modules[i], base.device):
                for group in groups:
                    first = group[0].key
                    states[first], *_ = self._run(group, range(i, i + 1), states.get(first))
        return states

    def _run(
        self, group: Sequence[Tokens], run: range, states: Tensor | None
    ) -> tuple[Tensor, Tensor, PackedBatch]:
        """States (r, t, d) entering the lowest edited block, references of the texts, and the rows.

        Only the blocks in `run` run, from `states` if given. The output layer runs on no position.
        """
        assert self.blocks is not None
        base, seen = self.base, dict[str, Tensor]()

        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]

        def leaving(_: nn.Module, __: Any, output: Any) -> None:
            seen["out"] = hidden_states(output)

        if states is not None:
            states = states.to(base.device)
        longest = max(len(text.ids) for text in group)
        packs = max(NODES_PER_ROW, longest) <= self._longest_row()
        rows = [*packed_rows(group)] if packs else [[text] for text in group]
        packed = pack(rows, base.pad_id)
        scored, logits = packed.scored(group), torch.empty(0)
        modules = base.model.get_submodule(self.blocks.path)
        before = modules[self.blocks.first].register_forward_pre_hook(entering, with_kwargs=True)
        after = modules[self.blocks.last].register_forward_hook(leaving)
        with before, after, standing_in(base.model, self.blocks, run, states):
            if packs:
                base.forward_packed(packed, scored, head=False)
            else:
                batch = collate(group, base.pad_id, base.device)
                logits = self._forward(batch, torch.zeros_like(batch.scored))
        if base.family != CLASSIFIER:
            logits = seen["out"].flatten(0, 1)[scored.to(seen["out"].device)]
        return seen["in"].cpu(), logits.cpu(), packed


def trunk_cache(base: BaseModel, folder: str | Path | None, *, limit: int) -> TextCache | None:
    """The cache on disk of this model's trunk. None without a trunk, or with a limit of 0 bytes."""
    if base.blocks is None or limit == 0:
        return None
    config = base.model.config
    settings = config.to_diff_dict() | {"_name_or_path": None, "dtype": None}
    space = {
        "format": 4,
        "weights": weights_sha256(base),
        "model": [type(base.model).__name__, settings, config._attn_implementation],
        "runs as": [str(base.dtype), base.device.type, torch.__version__],
        "blocks": [base.blocks.path, base.blocks.first, base.blocks.last],
    }
    return TextCache(folder, space, limit=limit)


def packed_rows(texts: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    """Texts, sorted by their ids, in rows of at most `NODES_PER_ROW` different beginnings."""
    row: list[Tokens] = []
    nodes = 0
    for text in texts:
        new = len(text.ids)
        if row:  # an earlier text shares no more than the last one does
            same = map(eq, row[-1].ids, text.ids)
            new -= sum(takewhile(bool, same))
        if row and nodes + new > min(NODES_PER_ROW, TOKENS_PER_PASS):
            yield row
            row, nodes, new = [], 0, len(text.ids)
        row.append(text)
        nodes += new
    if row:
        yield row


def passes(rows: Iterable[list[Tokens]]) -> Iterator[list[Tokens]]:
    """The texts of rows in groups of at most `TOKENS_PER_PASS` tokens with padding."""
    group: list[Tokens] = []
    count = longest = 0
    for row in rows:
        length = max(len(text.ids) for text in row)
        if len(row) > 1:
            length = NODES_PER_ROW
        if group and (count + 1) * max(longest, length) > TOKENS_PER_PASS:
            yield group
            group, count, longest = [], 0, 0
        group += row
        count, longest = count + 1, max(longest, length)
    if group:
        yield group
