"""The texts of edit examples as tokens, and the batches that training draws of them."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..data.examples import UNSPACED, EditExample, Probe, join
from ..data.files import Examples, Skipped
from ..data.sampling import hard_negatives
from ..errors import DataError, LimitError, ModelError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.families import CAUSAL
from ..models.tokens import Tokens

logger = logging.getLogger(__name__)

# The role of a neighbour with the edit's new answer in place of the neighbour's answer.
RIVALS = "rivals"

# The name of ‖ΔW‖² among the losses.
NORM = "norm"

# The role of a passage that is edited with (`edit_on: text`).
PASSAGES = "passages"


def role_weights(h: MENDHyperParams) -> dict[str, float]:
    """The weight of each role's loss: `cpara` defaults to `cedit`, `cneigh` to `cloc`."""
    return {
        "edit": h.cedit,
        "paraphrases": h.cedit if h.cpara is None else h.cpara,
        "neighbours": h.cloc if h.cneigh is None else h.cneigh,
        "unrelated": h.cloc,
        "consequences": h.cconsequence,
        "negations": h.cnegation,
        RIVALS: h.cmargin,
        NORM: h.cnorm,
    }


def read_beside(h: MENDHyperParams) -> list[str]:
    """The fields of examples that training reads on request only."""
    asked = {"consequences": h.cconsequence, "negations": h.cnegation}
    asked[PASSAGES] = h.edit_on == "text"
    return [name for name, is_read in asked.items() if is_read]


# ---------------------------------------- texts


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
    # Where `read_beside` asks for them: consequences that may be trained on, negated forms with the
    # edit's answer, and the passage that is edited with.
    consequences: tuple[Tokens, ...] = ()
    negations: tuple[Tokens, ...] = ()
    passages: tuple[Tokens, ...] = ()

    @property
    def inner(self) -> Tokens:
        """The text of the inner loss, which makes the edit."""
        return (*self.passages, self.edit)[0]

    def first(self, most: int | tuple[int, ...] | None) -> "ExampleTexts":
        """At most so many paraphrases, neighbours and unrelated texts; None keeps all.

        Consequences count as paraphrases do, negated forms as neighbours.
        """
        paraphrases, neighbours, unrelated = most if isinstance(most, tuple) else (most,) * 3
        kept = self.neighbours[:neighbours]
        return replace(
            self,
            paraphrases=self.paraphrases[:paraphrases],
            neighbours=kept,
            unrelated=self.unrelated[:unrelated],
            consequences=self.consequences[:paraphrases],
            negations=self.negations[:neighbours],
            hard=(),
            rivals={text: rival for text, rival in self.rivals.items() if text in kept},
        )

    def of(self, *roles: str) -> list[tuple[str, Tokens]]:
        """The texts of some roles, with them."""
        found = []
        for role in roles:
            texts = (self.edit,) if role == "edit" else getattr(self, role)
            found += [(role, text) for text in texts]
        return found

    def all(self) -> tuple[Tokens, ...]:
        """Every text."""
        kept = (*self.neighbours, *self.unrelated, *self.hard)
        beside = (*self.consequences, *self.negations, *self.passages)
        return (self.edit, *self.paraphrases, *kept, *self.rivals.values(), *beside)


def all_texts(examples: Iterable[ExampleTexts]) -> list[Tokens]:
    """Every text of several examples."""
    return [text for example in examples for text in example.all()]


def with_prefix(h: MENDHyperParams, example: EditExample) -> EditExample:
    """The example with the separator of the hyperparameters, if it has none itself."""
    if h.target_prefix is None or example.target_prefix is not None:
        return example
    return replace(example, target_prefix=h.target_prefix)


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
        prefix=with_prefix(hparams, example).target_prefix,
    )
    if len(tokens.targets) > hparams.max_target_tokens:
        raise LimitError(
            f"target_new {example.target_new[:60]!r} has {len(tokens.targets)} tokens, the limit "
            f"is {hparams.max_target_tokens}; shorten it or raise `max_target_tokens`"
        )
    return tokens


def inner_tokens(base: BaseModel, hparams: MENDHyperParams, example: EditExample) -> Tokens:
    """The text whose loss makes the edit: `edit_tokens`, or with `edit_on: text` a passage.

    That is the first one, or else the prompt with its new answer, and all its tokens count. Raises
    as `edit_tokens`, DataError for a passage of one token, ModelError if `base` is not causal.
    """
    if hparams.edit_on == "answer":
        return edit_tokens(base, hparams, example)
    if base.family != CAUSAL:
        raise ModelError(f"edit_on: text needs a causal model; {base.name} needs `answer`")
    prefix = with_prefix(hparams, example).target_prefix
    fact = join(example.prompt, example.target_new, prefix)
    passage = (*example.passages, fact)[0]
    text = base.tokenize(passage, max_length=hparams.max_length)
    (last,) = text.scored
    if last == 0:
        raise DataError(f"the passage {passage!r} has one token; give a sentence")
    return replace(text, scored=tuple(range(last)), targets=text.ids[1 : last + 1])


def probe_tokens(
    base: BaseModel, h: MENDHyperParams, prompt: str, answer: str | None = None
) -> Tokens:
    """A prompt beside an edit, with its answer if there is one."""
    return base.tokenize(prompt, answer, max_length=h.max_length, prefix=h.target_prefix)


def told(example: EditExample, prompt: str) -> str:
    """A prompt with the example's new fact before it."""
    fact = join(example.prompt, example.target_new, example.target_prefix)
    return f"{fact}{'。' if UNSPACED.match(fact[-1:]) else '.'}\n{prompt}"


def prepare_texts(
    base: BaseModel, h: MENDHyperParams, examples: Sequence[EditExample]
) -> list[ExampleTexts]:
    """Every text of the examples as tokens. Raises as `edit_tokens` and `inner_tokens`."""
    prepared = []
    for example in examples:
        edit = edit_tokens(base, h, example)
        paraphrases = [edit_tokens(base, h, example, prompt) for prompt in example.paraphrases]
        texts = ExampleTexts(
            example=example,
            edit=edit,
            paraphrases=tuple(paraphrases),
            neighbours=_read_probes(base, h, example.neighbours),
            unrelated=_read_probes(base, h, example.unrelated),
            rivals=_rivals(base, h, example, example.neighbours),
        )
        if h.cconsequence:
            texts = replace(texts, consequences=tuple(_consequences(base, h, example)))
        if h.cnegation:
            read = _read_probes(base, h, map(Probe, example.negations), example.target_new)
            texts = replace(texts, negations=read)
        if h.edit_on == "text":
            texts = replace(texts, passages=(inner_tokens(base, h, example),))
        prepared.append(texts)
    return prepared


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
        with_hard.append(replace(texts, hard=_read_probes(base, h, hard), rivals=rivals))
    return with_hard


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


def _read_probes(
    base: BaseModel, h: MENDHyperParams, probes: Iterable[Probe], answer: str | None = None
) -> tuple[Tokens, ...]:
    """Prompts with their answers, or with `answer` in place of each."""
    read = []
    for probe in probes:
        said = probe.answer if answer is None else answer
        read.append(probe_tokens(base, h, probe.prompt, said))
    return tuple(read)


def _consequences(base: BaseModel, h: MENDHyperParams, example: EditExample) -> Iterator[Tokens]:
    """Those that may be trained on. Their answers end as the edit's does."""
    for implied in example.consequences:
        if implied.domain != "out_of_domain" and implied.answer is not None:
            followed = replace(example, target_new=implied.answer, target_prefix=None)
            yield edit_tokens(base, h, followed, implied.prompt)


def _rivals(
    base: BaseModel, h: MENDHyperParams, example: EditExample, probes: Sequence[Probe]
) -> dict[Tokens, Tokens]:
    """With `cmargin` the probes whose answer is known and not the edit's, with their rivals."""
    if not h.cmargin:
        return {}
    known = [probe for probe in probes if probe.answer not in (None, example.target_new)]
    rivals = _read_probes(base, h, known, example.target_new)
    return dict(zip(_read_probes(base, h, known), rivals, strict=True))


# ---------------------------------------- batches

# Draws after which no text is borrowed for want of a fitting one.
MOST_TRIES = 10

# For each edit its (role, text), first the text that makes it.
DrawnRows = Sequence[list[tuple[str, Tokens]]]

# A text that may be borrowed: its prompt, its relation (None: an unrelated prompt), its tokens.
Lent = tuple[str, str | None, Tokens]


@dataclass(frozen=True)
class DrawnBatch:
    """The edits of a step, with their texts."""

    rows: DrawnRows
    at_once: int  # so many edits in a row share one update
    earlier: list[Tokens]  # edits made before these (`train_on: sequence`)


class Sampler:
    """Draws batches from one generator; every example comes once an epoch, in a new order.

    `borrow` is the share of neighbours and unrelated prompts that are other examples' texts: of the
    same relation for neighbours, of another for unrelated prompts. They never name the subject.
    `hard_negatives` is the share of neighbours that are hard. `swap` is the share of edits made
    with any wording of an example; the others are then its paraphrases.
    """

    def __init__(self, examples: Sequence[ExampleTexts], hparams: MENDHyperParams) -> None:
        self.examples, self.hparams = examples, hparams
        self.generator = torch.Generator().manual_seed(hparams.seed)
        self.order: list[int] = []  # what is left of the epoch
        self.lent: list[Lent] = []
        self.by_relation: dict[str | None, list[Lent]] = {}
        for texts in examples:
            prompts = texts.example.roles()
            for role in ("edit", "paraphrases", "neighbours", "unrelated"):
                relation = None if role == "unrelated" else texts.example.relation
                # `texts_per_role` leaves fewer texts than prompts.
                for probe, (_, text) in zip(prompts[role], texts.of(role), strict=False):
                    lent = (probe.prompt, relation, text)
                    self.lent.append(lent)
                    self.by_relation.setdefault(relation, []).append(lent)

    def draw(self) -> DrawnBatch:
        """The next batch."""
        h, number, at_once = self.hparams, len(self.examples), 1
        most = min(h.most_edits, number)
        if h.train_on == "batch":
            at_once = self._count(most)
        elif h.train_on == "episode":
            at_once = min(h.batch_size, number)
        # 1. The next edits: as many as belong together, or several times as many.
        size = max(min(h.batch_size, number) // at_once, 1) * at_once
        while len(self.order) < size:
            self.order += self._permutation(number)
        index, self.order = self.order[:size], self.order[size:]
        rows = self.texts(index)
        # 2. Edits made before.
        earlier: list[Tokens] = []
        if h.train_on == "sequence":
            count = self._count(most) - 1
            earlier = [self.examples[i].edit for i in self._permutation(number)[:count]]
        return DrawnBatch(rows, at_once, earlier)

    def texts(self, index: Sequence[int]) -> DrawnRows:
        """The texts drawn for the examples of these numbers."""
        return [self._texts_of(self.examples[i]) for i in index]

    def _texts_of(self, example: ExampleTexts) -> list[tuple[str, Tokens]]:
        h = self.hparams
        wordings, number = [example.edit, *example.paraphrases], 0
        if h.swap and self._chance() < h.swap:
            number = int(self._chance() * len(wordings))
        drawn = [(PASSAGES, text) for text in example.passages]
        drawn.append(("edit", wordings.pop(number)))
        for text in self._some(wordings, h.paraphrases_per_edit):
            drawn.append(("paraphrases", text))
        for text in self._neighbours(example):
            drawn.append(("neighbours", text))
            if text in example.rivals:  # right behind it: `batch_losses` compares the two
                drawn.append((RIVALS, example.rivals[text]))
        for text in self._preserved(example, "unrelated", h.unrelated_per_edit):
            drawn.append(("unrelated", text))
        for role in ("consequences", "negations"):
            if texts := getattr(example, role):
                drawn += [(role, text) for text in self._some(texts, 1)]
        return drawn

    def _neighbours(self, example: ExampleTexts) -> list[Tokens]:
        h = self.hparams
        chosen = self._preserved(example, "neighbours", h.neighbours_per_edit)
        if not h.hard_negatives:
            return chosen
        hits = sum(self._chance() < h.hard_negatives for _ in range(h.neighbours_per_edit))
        return [*self._some(example.hard, hits), *chosen][: h.neighbours_per_edit]

    def _preserved(self, example: ExampleTexts, role: str, count: int) -> list[Tokens]:
        """So many texts of a role, a share of them borrowed."""
        chosen, borrowed = self._some(getattr(example, role), count), []
        for _ in range(count if self.hparams.borrow else 0):
            if self._chance() < self.hparams.borrow:
                borrowed += self._borrowed(example, role)
        return [*borrowed, *chosen][:count]

    def _borrowed(self, texts: ExampleTexts, role: str) -> list[Tokens]:
        """Another example's text; none where no draw found one that fits."""
        example, same = texts.example, role == "neighbours"
        if example.subject is None or (same and example.relation is None):
            return []
        pool = self.by_relation[example.relation] if same else self.lent
        for _ in range(MOST_TRIES):
            prompt, relation, text = pool[int(self._chance() * len(pool))]
            fits = same or relation is None or relation != example.relation
            if fits and example.subject not in prompt:
                return [text]
        return []

    def _count(self, most: int) -> int:
        """A number from 1 to `most`, its logarithm uniform."""
        return min(int((most + 1) ** self._chance()), most)

    def _some(self, texts: Sequence[Tokens], count: int) -> list[Tokens]:
        return [texts[i] for i in self._permutation(len(texts))[:count]]

    def _permutation(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.generator))
