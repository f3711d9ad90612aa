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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from .tokens import TextBatch, Tokens, collate

logger = logging.getLogger(__name__)

TOKENS_PER_PASS = 2048
"""The states of a pass are also a file of the cache: little to lose in a crash, and few files."""


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
        """A trunk for other sites of the same model; it shares the values where the sites allow."""
        other = FrozenTrunk(base)
        if base.blocks and self.blocks and self.blocks.first <= base.blocks.first:
            other.blocks, other._values = self.blocks, self._values
        return other

    # ---------------------------------------------------------------------------------- reading

    def suffix(self, texts: Sequence[Tokens], batch: TextBatch) -> Float[Tensor, "s v"]:
        """Logits at the scored positions, from cached trunk states where there are any.

        Hooks and side branches on the edit sites take effect, and gradients flow to them.
        """
        # Behind a text's end the states are zeros; no position before it looks there.
        below: AbstractContextManager[None] = nullcontext()
        blocks, values = self.blocks, self._values_of(texts)
        if blocks is not None and blocks.first > 0 and values:
            rows = [states for states, _ in values]
            t, d = batch.input_ids.shape[1], rows[0].shape[1]
            states = torch.zeros((len(rows), t, d), dtype=self.base.dtype)
            for padded, row in zip(states, rows, strict=True):
                padded[: len(row)] = row
            run = range(blocks.first, blocks.last + 1)
            below = standing_in(self.base.model, blocks, run, states.to(self.base.device))
        with only_scored(self.base, batch.scored), below:
            return self._forward(batch)

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

    def _forward(self, batch: TextBatch) -> Tensor:
        return self.base.forward(batch.input_ids, batch.attention_mask, batch.decoder_ids)

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
        # 1. Texts that are not in memory, by length, so that a pass has little padding.
        missing = list({text.key: text for text in texts if text.key not in self._values}.values())
        missing.sort(key=lambda text: (len(text.ids), text.key))
        # 2. Those on disk are read, the others computed; of a streamed model a block runs for all
        #    of them before the next one.
        left = self._read(missing)
        groups = list(passes(left))
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

    def _read(self, texts: Sequence[Tokens]) -> list[Tokens]:
        found = self.cache.find([text.key for text in texts]) if self.cache else {}
        self._values |= found
        return [text for text in texts if text.key not in found]

    @torch.no_grad()
    def _compute(self, group: Sequence[Tokens], states: Tensor | None) -> None:
        assert self.blocks is not None  # `fill` computes nothing without a chain of blocks
        batch = collate(group, self.base.pad_id, self.base.device)
        first = 0
        if states is not None:
            first = self.blocks.first
        entering, leaving, logits = self._run(batch, range(first, self.blocks.last + 1), states)
        reference = logits
        if self.base.family != CLASSIFIER:
            reference = leaving[batch.scored.to(leaving.device)]
        # Rows without their padding, cut into texts.
        packed = entering[batch.attention_mask.bool().to(entering.device)].cpu()
        rows = packed.split([len(text.ids) for text in group])
        references = reference.cpu().split([len(text.scored) for text in group])
        for text, row, kept in zip(group, rows, references, strict=True):
            self._values[text.key] = row, kept
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
                    batch, first = collate(group, base.pad_id, base.device), group[0].key
                    entering, _, _ = self._run(batch, range(i, i + 1), states.get(first))
                    states[first] = entering.cpu()
        return states

    def _run(
        self, batch: TextBatch, run: range, states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States (n, t, d) entering the lowest edited block and leaving the last, and logits.

        Only the blocks in `run` run, from `states` if given. The output layer runs on no position.
        """
        assert self.blocks is not None
        seen: dict[str, Tensor] = {}

        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]

        def leaving(_: nn.Module, __: Any, output: Any) -> None:
            seen["out"] = hidden_states(output)

        if states is not None:
            states = states.to(self.base.device)
        model, blocks = self.base.model, self.blocks
        modules = model.get_submodule(blocks.path)
        before = modules[blocks.first].register_forward_pre_hook(entering, with_kwargs=True)
        after = modules[blocks.last].register_forward_hook(leaving)
        nothing = only_scored(self.base, torch.zeros_like(batch.scored))
        with before, after, nothing, standing_in(model, blocks, run, states):
            logits = self._forward(batch)
        return seen["in"], seen["out"], logits


def trunk_cache(base: BaseModel, folder: str | Path | None, *, limit: int) -> TextCache | None:
    """The cache on disk of this model's trunk. None without a trunk, or with a limit of 0 bytes."""
    if base.blocks is None or limit == 0:
        return None
    config = base.model.config
    settings = config.to_diff_dict() | {"_name_or_path": None, "dtype": None}
    space = {
        "format": 3,
        "weights": weights_sha256(base),
        "model": [type(base.model).__name__, settings, config._attn_implementation],
        "runs as": [str(base.dtype), base.device.type, torch.__version__],
        "blocks": [base.blocks.path, base.blocks.first, base.blocks.last],
    }
    return TextCache(folder, space, limit=limit)


def passes(texts: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    """Texts, sorted by length, in groups of at most `TOKENS_PER_PASS` tokens with padding."""
    group: list[Tokens] = []
    for text in texts:
        if group and (len(group) + 1) * max(len(text.ids), len(group[0].ids)) > TOKENS_PER_PASS:
            yield group
            group = []
        group.append(text)
    if group:
        yield group
