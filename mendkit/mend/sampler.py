"""Which edits a training step makes, and the texts that it reads under each (MEND, Algorithm 1)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..hparams import MENDHyperParams
from ..models.tokens import Tokens
from .batches import RIVALS, ExampleTexts

MOST_TRIES = 10
"""Draws after which no text is borrowed for want of a fitting one."""

Rows = list[list[tuple[str, Tokens]]]
"""For each edit the same number of (role, text), the edit first; the role "" only fills up."""


@dataclass(frozen=True)
class Batch:
    """The edits of a step, with their texts."""

    rows: Rows
    at_once: int  # so many edits in a row share one update
    earlier: list[Tokens]  # edits made before these (`train_on: sequence`)


@dataclass(frozen=True)
class Lent:
    """A text that other examples may borrow."""

    prompt: str
    relation: str | None  # of the fact; None if not known, and of unrelated prompts
    text: Tokens


class Sampler:
    """Draws batches from one generator; every example comes once an epoch, in a new order.

    `borrow` is the share of neighbours and unrelated prompts that are other examples' texts: of the
    same relation for neighbours, of another for unrelated prompts. A borrowed text never names the
    edit's subject. `hard_negatives` is the share of neighbours that are hard ones (data.files).
    `swap` is the share of edits made with any of an example's wordings; the others are then its
    paraphrases.
    """

    def __init__(self, examples: Sequence[ExampleTexts], hparams: MENDHyperParams) -> None:
        self.examples, self.hparams = examples, hparams
        self.generator = torch.Generator().manual_seed(hparams.seed)
        self.order: list[int] = []  # what is left of the epoch
        self.lent = [lent for texts in examples for lent in _lendable(texts)]
        self.by_relation: dict[str | None, list[Lent]] = {}
        for lent in self.lent:
            self.by_relation.setdefault(lent.relation, []).append(lent)

    def draw(self) -> Batch:
        """The next batch."""
        h, at_once = self.hparams, 1
        if h.train_on == "batch":
            at_once = self._count(min(h.most_edits, len(self.examples)))
        size = max(min(h.batch_size, len(self.examples)) // at_once, 1) * at_once
        while len(self.order) < size:
            self.order += self._permutation(len(self.examples))
        index, self.order = self.order[:size], self.order[size:]
        return Batch(self.texts(index), at_once, self._earlier())

    def texts(self, index: Sequence[int]) -> Rows:
        """The texts drawn for the examples of these numbers."""
        rows = [self._texts_of(self.examples[i]) for i in index]
        most = max(map(len, rows))
        return [drawn + [("", drawn[0][1])] * (most - len(drawn)) for drawn in rows]

    def _texts_of(self, example: ExampleTexts) -> list[tuple[str, Tokens]]:
        h = self.hparams
        wordings, number = [example.edit, *example.paraphrases], 0
        if h.swap and self._chance() < h.swap:
            number = int(self._chance() * len(wordings))
        drawn = [("edit", wordings.pop(number))]
        for text in self._some(wordings, h.paraphrases_per_edit):
            drawn.append(("paraphrases", text))
        for text in self._neighbours(example):
            drawn.append(("neighbours", text))
            if text in example.rivals:  # right behind it: `batch_losses` compares the two
                drawn.append((RIVALS, example.rivals[text]))
        for text in self._preserved(example, "unrelated", h.unrelated_per_edit):
            drawn.append(("unrelated", text))
        return drawn

    def _neighbours(self, example: ExampleTexts) -> list[Tokens]:
        h = self.hparams
        chosen = self._preserved(example, "neighbours", h.neighbours_per_edit)
        if not h.hard_negatives:
            return chosen
        hits = sum(self._chance() < h.hard_negatives for _ in range(h.neighbours_per_edit))
        hard = self._some(example.hard, hits)
        return [*hard, *chosen][: h.neighbours_per_edit]

    def _preserved(self, example: ExampleTexts, role: str, count: int) -> list[Tokens]:
        """So many texts of a role, a share of them borrowed."""
        chosen, borrowed = self._some(getattr(example, role), count), []
        for _ in range(count if self.hparams.borrow else 0):
            if self._chance() < self.hparams.borrow:
                borrowed.append(self._borrowed(example, role))
        found = [text for text in borrowed if text is not None]
        return [*found, *chosen][:count]

    def _borrowed(self, texts: ExampleTexts, role: str) -> Tokens | None:
        """Another example's text; None where no draw found one that may be borrowed."""
        example, same_relation = texts.example, role == "neighbours"
        if example.subject is None or (same_relation and example.relation is None):
            return None
        pool = self.by_relation[example.relation] if same_relation else self.lent
        for _ in range(MOST_TRIES):
            lent = pool[int(self._chance() * len(pool))]
            fits = same_relation or lent.relation is None or lent.relation != example.relation
            if fits and example.subject not in lent.prompt:
                return lent.text
        return None

    def _earlier(self) -> list[Tokens]:
        """With `train_on: sequence` up to `most_edits` less one edits made before."""
        if self.hparams.train_on != "sequence":
            return []
        count = self._count(min(self.hparams.most_edits, len(self.examples))) - 1
        return [self.examples[i].edit for i in self._permutation(len(self.examples))[:count]]

    def _count(self, most: int) -> int:
        """A number from 1 to `most`, its logarithm uniform."""
        return min(int((most + 1) ** self._chance()), most)

    def _some(self, texts: Sequence[Tokens], count: int) -> list[Tokens]:
        return [texts[i] for i in self._permutation(len(texts))[:count]]

    def _permutation(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.generator))


def _lendable(texts: ExampleTexts) -> Iterator[Lent]:
    """The texts of an example that others may borrow: those that training reads."""
    example = texts.example
    yield Lent(example.prompt, example.relation, texts.edit)
    for prompt, text in zip(example.paraphrases, texts.paraphrases, strict=False):
        yield Lent(prompt, example.relation, text)
    for probe, text in zip(example.neighbours, texts.neighbours, strict=False):
        yield Lent(probe.prompt, example.relation, text)
    for probe, text in zip(example.unrelated, texts.unrelated, strict=False):
        yield Lent(probe.prompt, None, text)
