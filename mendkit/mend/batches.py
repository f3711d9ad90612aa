"""The texts of an edit example as tokens: what training, validation, editing and scoring read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..data.examples import EditExample, Probe, join
from ..data.files import Examples, Skipped, hard_negatives
from ..errors import DataError, LimitError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.tokens import Tokens

logger = logging.getLogger(__name__)

ROLES = ("edit", "paraphrases", "neighbours", "unrelated")
RIVALS = "rivals"
"""The role of a neighbour with the edit's new answer in place of its own, read for the margin between the two."""


def role_weights(h: MENDHyperParams) -> dict[str, float]:
    """The weight of each role's loss; what is not said of paraphrases and neighbours follows edit and unrelated."""
    para, neigh = (
        (h.cedit if h.cpara is None else h.cpara),
        (h.cloc if h.cneigh is None else h.cneigh),
    )
    return {
        "edit": h.cedit,
        "paraphrases": para,
        "neighbours": neigh,
        "unrelated": h.cloc,
        RIVALS: h.cmargin,
    }


@dataclass(frozen=True)
class ExampleTexts:
    """The texts that training and validation read: targets end with the end-of-text token if `add_eos`."""

    example: EditExample
    edit: Tokens
    paraphrases: tuple[Tokens, ...]
    neighbours: tuple[Tokens, ...]
    unrelated: tuple[Tokens, ...]
    hard: tuple[Tokens, ...] = ()  # hard negatives, of training examples only
    rivals: Mapping[Tokens, Tokens] = field(
        default_factory=dict
    )  # neighbours with the new answer, if `cmargin`

    def first(self, most: int | tuple[int, ...] | None) -> "ExampleTexts":
        """At most so many texts of each role besides the edit: one number for all or one each; all texts if None."""
        p, n, u = most if isinstance(most, tuple) else (most,) * 3
        kept = self.neighbours[:n]
        rivals = {text: rival for text, rival in self.rivals.items() if text in kept}
        return ExampleTexts(
            self.example,
            self.edit,
            self.paraphrases[:p],
            kept,
            self.unrelated[:u],
            rivals=rivals,
        )

    def all(self) -> tuple[Tokens, ...]:
        """Every text."""
        return (
            *(self.edit, *self.paraphrases, *self.neighbours, *self.unrelated, *self.hard),
            *self.rivals.values(),
        )


def edit_tokens(
    base: BaseModel, hparams: MENDHyperParams, example: EditExample, prompt: str | None = None
) -> Tokens:
    """`prompt` (default: the edit prompt) with the example's new answer; raises LimitError if that is too long."""
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
    """The texts to train on: at most `texts_per_role`, and with `hard_negatives` those besides."""
    texts = [own.first(h.texts_per_role) for own in prepare_texts(base, h, examples)]
    probes = hard_negatives(examples, seed=h.seed) if h.hard_negatives else [()] * len(texts)
    out = []
    for example, own, hard in zip(examples, texts, probes, strict=True):
        read = tuple(base.tokenize(p.prompt, p.answer, max_length=h.max_length) for p in hard)
        out.append(
            replace(own, hard=read, rivals={**own.rivals, **_rivals(base, h, example, hard)})
        )
    return out


def prepare_texts(
    base: BaseModel, h: MENDHyperParams, examples: Sequence[EditExample]
) -> list[ExampleTexts]:
    """Tokenise every text of the examples once."""

    def keep(probe: Probe) -> Tokens:
        return base.tokenize(probe.prompt, probe.answer, max_length=h.max_length)

    return [
        ExampleTexts(
            example=e,
            edit=edit_tokens(base, h, e),
            paraphrases=tuple(edit_tokens(base, h, e, prompt) for prompt in e.paraphrases),
            neighbours=tuple(map(keep, e.neighbours)),
            unrelated=tuple(map(keep, e.unrelated)),
            rivals=_rivals(base, h, e, e.neighbours),
        )
        for e in examples
    ]


def _rivals(
    base: BaseModel, h: MENDHyperParams, example: EditExample, probes: Sequence[Probe]
) -> dict[Tokens, Tokens]:
    """With `cmargin` the probes whose answers are known and not the edit's, each with the edit's in its place."""
    known = [p for p in probes if p.answer not in (None, example.target_new)] if h.cmargin else []
    read = lambda prompt, answer: base.tokenize(prompt, answer, max_length=h.max_length)  # noqa: E731
    return {read(p.prompt, p.answer): read(p.prompt, example.target_new) for p in known}


def usable(base: BaseModel, h: MENDHyperParams, examples: Sequence[EditExample], /) -> Examples:
    """The examples that can be tokenised with all their texts; the others join `skipped`, and a warning says so.

    Raises DataError if none is left.
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
