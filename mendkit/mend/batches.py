"""The texts of an edit example as tokens: what training, validation, editing and scoring read."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..data.examples import EditExample, Probe, join
from ..data.files import Examples, Skipped, hard_negatives
from ..errors import DataError, LimitError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.tokens import Tokens

logger = logging.getLogger(__name__)

RIVALS = "rivals"
"""The role of a neighbour with the edit's new answer in place of the neighbour's answer."""


def role_weights(h: MENDHyperParams) -> dict[str, float]:
    """The weight of each role's loss: `cpara` defaults to `cedit`, `cneigh` to `cloc`."""
    weights = {"edit": h.cedit, "paraphrases": h.cpara}
    weights |= {"neighbours": h.cneigh, "unrelated": h.cloc, RIVALS: h.cmargin}
    if h.cpara is None:
        weights["paraphrases"] = h.cedit
    if h.cneigh is None:
        weights["neighbours"] = h.cloc
    return weights


@dataclass(frozen=True)
class ExampleTexts:
    """The texts that training and validation read; targets end with end-of-text if `add_eos`."""

    example: EditExample
    edit: Tokens
    paraphrases: tuple[Tokens, ...]
    neighbours: tuple[Tokens, ...]
    unrelated: tuple[Tokens, ...]
    hard: tuple[Tokens, ...] = ()  # hard negatives, of training examples only
    # With `cmargin`: neighbours and hard negatives, each with its rival.
    rivals: Mapping[Tokens, Tokens] = field(default_factory=dict)

    def first(self, most: int | tuple[int, ...] | None) -> "ExampleTexts":
        """At most so many paraphrases, neighbours and unrelated texts; None keeps all."""
        p, n, u = most if isinstance(most, tuple) else (most,) * 3
        kept = self.neighbours[:n]
        return replace(
            self,
            paraphrases=self.paraphrases[:p],
            neighbours=kept,
            unrelated=self.unrelated[:u],
            hard=(),
            rivals={text: rival for text, rival in self.rivals.items() if text in kept},
        )

    def all(self) -> tuple[Tokens, ...]:
        """Every text."""
        targets = (self.edit, *self.paraphrases)
        preserved = (*self.neighbours, *self.unrelated, *self.hard)
        return (*targets, *preserved, *self.rivals.values())


def edit_tokens(
    base: BaseModel, hparams: MENDHyperParams, example: EditExample, prompt: str | None = None
) -> Tokens:
    """`prompt` (default: the edit prompt) with the new answer; raises LimitError if too long."""
    tokens = base.tokenize(
        example.prompt if prompt is None else prompt,
        example.target_new,
        add_eos=hparams.add_eos,
        max_length=hparams.max_length,
        subject=example.subject,
    )
    if len(tokens.targets) > hparams.max_target_tokens:
        raise LimitError(
            f"target_new {example.target_new[:60]!r} has {len(tokens.targets)} tokens, the limit is "
            f"{hparams.max_target_tokens}; shorten it or raise `max_target_tokens`"
        )
    return tokens


def told(example: EditExample, prompt: str) -> str:
    """A prompt with the example's new fact before it."""
    return f"{join(example.prompt, example.target_new)}.\n{prompt}"


def training_texts(
    base: BaseModel, h: MENDHyperParams, examples: Sequence[EditExample]
) -> list[ExampleTexts]:
    """The texts to train on: at most `texts_per_role`, and the hard negatives if asked for."""
    prepared = [texts.first(h.texts_per_role) for texts in prepare_texts(base, h, examples)]
    if not h.hard_negatives:
        return prepared
    with_hard = []
    for texts, hard in zip(prepared, hard_negatives(examples, seed=h.seed), strict=True):
        rivals = {**texts.rivals, **_rivals(base, h, texts.example, hard)}
        with_hard.append(replace(texts, hard=_probes(base, h, hard), rivals=rivals))
    return with_hard


def prepare_texts(
    base: BaseModel, h: MENDHyperParams, examples: Sequence[EditExample]
) -> list[ExampleTexts]:
    """Tokenise every text of the examples once."""
    prepared = []
    for example in examples:
        paraphrases = (edit_tokens(base, h, example, prompt) for prompt in example.paraphrases)
        prepared.append(
            ExampleTexts(
                example=example,
                edit=edit_tokens(base, h, example),
                paraphrases=tuple(paraphrases),
                neighbours=_probes(base, h, example.neighbours),
                unrelated=_probes(base, h, example.unrelated),
                rivals=_rivals(base, h, example, example.neighbours),
            )
        )
    return prepared


def usable(base: BaseModel, h: MENDHyperParams, examples: Sequence[EditExample]) -> Examples:
    """The examples that can be tokenised with all their texts.

    The others join `skipped`, and a warning says so. Raises DataError if none is left.
    """
    kept: list[EditExample] = []
    skipped: list[Skipped] = []
    for number, example in enumerate(examples, 1):
        try:
            prepare_texts(base, h, [example])
            kept.append(example)
        except DataError as error:
            skipped.append(Skipped(f"example {number}", str(error)))
    if skipped:
        first = f"{skipped[0].where}: {skipped[0].why}"
        if not kept:
            raise DataError(f"no example can be used; first problem: {first}")
        logger.warning("skipped %d of %d examples, first: %s", len(skipped), len(examples), first)
    return Examples.of(kept, (*getattr(examples, "skipped", ()), *skipped))


def _probes(
    base: BaseModel, h: MENDHyperParams, probes: Iterable[Probe], answer: str | None = None
) -> tuple[Tokens, ...]:
    """Prompts with their answers, or with `answer` in place of each."""
    read = []
    for probe in probes:
        said = probe.answer if answer is None else answer
        read.append(base.tokenize(probe.prompt, said, max_length=h.max_length))
    return tuple(read)


def _rivals(
    base: BaseModel, h: MENDHyperParams, example: EditExample, probes: Sequence[Probe]
) -> dict[Tokens, Tokens]:
    """With `cmargin` the probes whose answer is known and not the edit's, with their rivals."""
    if not h.cmargin:
        return {}
    known = [probe for probe in probes if probe.answer not in (None, example.target_new)]
    rivals = _probes(base, h, known, example.target_new)
    return dict(zip(_probes(base, h, known), rivals, strict=True))
