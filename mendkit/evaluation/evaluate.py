"""Scores of edits: teacher-forced and free decoding side by side, with intervals and per-edit rows.

f is the unedited model, f' the edited one. An edit is made on a fresh model (mode "single"), with others at once
(mode "batch"), or after others (mode "sequential"). y is the new answer, y° the old one. Teacher forcing reads the
given answer; free decoding is greedy and stops at the end of text, a newline or ".". Where reading y under f' shows
that every argmax, the end included, is y's own token, greedy decoding must retrace y and is not run; likewise f' writes
what f wrote exactly if it retraces it. P(·) compares length-normalised log-likelihoods. Edits whose new answer f
already writes are counted, not scored. Intervals are 95 % bootstrap intervals over edits; edits that one model holds
together are not independent, and then the intervals are too narrow. A classifier writes the label that it predicts;
a question form and answers that compete on a neighbour do not apply to it.
"""

import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import Any

import torch

from ..data.examples import EditExample
from ..errors import DataError, HyperParamError, LimitError, MendkitError
from ..hparams import MENDHyperParams
from ..mend.batches import edit_tokens, told
from ..mend.scoring import Forced, forced
from ..mend.updates import Updates, relative_norms, scaled, select, side_branches
from ..models.base import BaseModel
from ..models.families import CAUSAL, CLASSIFIER
from ..models.sites import Site
from ..models.text import STOP
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk
from .decoding import WHOLE_ROWS, write
from .heldout import TEXT_TOKENS, HeldOutText, ngram_entropy_bits
from .many import Editor, apart, in_sequence, most_together, one_after_another, so_far, together
from .metrics import (
    Card,
    answers_probe,
    locality_values,
    probability_values,
    target_values,
)
from .results import EditRow, EvaluationReport, normalise, summarise

logger = logging.getLogger(__name__)

MODES = ("single", "batch", "sequential")
QUESTION = "Answer in a few words, without a full sentence.\nQuestion: {prompt} …?\nAnswer:"
EDIT_BATCH = 64
SEQUENCE_BLOCK = 16
NUMBERS = 200_000_000  # in the updates that one pass reads texts under, at most
AFTER = (1, 10, 100, 1000)
REWORDED = 2
GENERATIONS, FLUENCY_TOKENS = 3, 100


class EvaluationSet:
    """Examples prepared for scoring any number of editors: tokens, trunk, and the unedited model's values, once.

    Examples whose texts cannot be tokenised are counted in `skipped` (and by reason in `reasons`), not scored. Free
    decoding writes at most `max_new_tokens` tokens. Two scores cost much and are made on request: drawdown on the first
    `text_tokens` tokens of a held-out `text`, and `fluency`.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        examples: Sequence[EditExample],
        /,
        *,
        max_new_tokens: int = 50,
        text: str | None = None,
        text_tokens: int = TEXT_TOKENS,
        fluency: bool = False,
    ) -> None:
        self.base, self.hparams, self.max_new_tokens, self.fluency = (
            base,
            hparams,
            max_new_tokens,
            fluency,
        )
        if base.family != CAUSAL and (fluency or text is not None):
            raise MendkitError(
                f"{base.name} writes no text of its own: fluency and held-out text need a causal model"
            )
        self.trunk = FrozenTrunk(base)
        self.examples: list[EditExample] = []
        self.skipped: list[str] = []
        self.reasons: Counter[str] = Counter(invalid_records=len(getattr(examples, "skipped", ())))
        cards: list[Card] = []
        for example in examples:
            if not normalise(example.target_new):  # any silence would pass for it
                self.skipped.append(
                    f"target_new {example.target_new!r} of {example.prompt!r} has no words"
                )
                self.reasons["empty_target"] += 1
                continue
            try:
                card = self._card(example)
                for prompt in (
                    *(told(example, p.prompt) for p in example.portability),
                    *example.generation_prompts,
                ):
                    base.tokenize(prompt, max_length=hparams.max_length)
                cards.append(card)
                self.examples.append(example)
            except DataError as error:
                self.skipped.append(str(error))
                self.reasons["too_long"] += isinstance(error, LimitError)
        if not cards:
            raise DataError(
                f"no example can be scored; first problem: {(self.skipped or ['no example given'])[0]}"
            )
        self.cards = self._with_greedy(self._with_reworded(cards))
        self.trunk.fill(self._texts())
        self.kept_before = forced(self.trunk, [_kept(card) for card in self.cards], None)
        self.implied = self._implied()
        self.text = None if text is None else HeldOutText(self.trunk, text, tokens=text_tokens)
        self.before, self.written = self.score(None, range(len(self.cards)))
        self._elsewhere: dict[tuple[Site, ...], EvaluationSet] = {}

    def __len__(self) -> int:
        return len(self.cards)

    def at(self, base: BaseModel, /) -> "EvaluationSet":
        """This set for editors of other sites of its model: with a trunk for them, and f's values as they are here."""
        if base.sites == self.base.sites:
            return self
        if base.sites not in self._elsewhere:
            other = copy.copy(self)
            other.trunk = self.trunk.at(base)
            other.base = other.trunk.base
            other.trunk.fill(self._texts())
            other.text = self.text and self.text.at(other.trunk)
            self._elsewhere[base.sites] = other
        return self._elsewhere[base.sites]

    def score(
        self, updates: Updates | None, index: Sequence[int], /
    ) -> tuple[list[dict[str, float]], list[list[str]]]:
        """Values by metric, and what is written after each prompt, for the examples `index`, each under its own edit in
        `updates` (under none: the unedited model, without the values that compare with it)."""
        cards, examples = [self.cards[i] for i in index], [self.examples[i] for i in index]
        targets = forced(self.trunk, [card.targets for card in cards], updates)
        pairs = forced(self.trunk, [(*card.old, *card.rivals) for card in cards], updates)
        before = [self.kept_before[i] for i in index]
        after = (
            forced(self.trunk, [_kept(c) for c in cards], updates, compare=True)
            if updates
            else before
        )
        written = self._answers(cards, examples, targets, updates)
        values = []
        for card, e, target, pair, kept, old, texts in zip(
            cards, examples, targets, pairs, after, before, written, strict=True
        ):
            row = target_values(self.base.said(e.target_new), card, target, texts)
            row |= probability_values(card, target, pair, kept)
            values.append(row | (locality_values(card, kept, old) if updates else {}))
        for row, more in zip(values, self._free_values(index, updates), strict=True):
            row |= more
        return values, written

    @property
    def to_edit(self) -> list[int]:
        """The examples whose new answer f does not write already."""
        return [
            i for i, values in enumerate(self.before) if values["edit_success.free_exact"] != 1.0
        ]

    def row(self, i: int, after: dict[str, float], written: Sequence[str]) -> EditRow:
        """One example's values and texts after an edit, beside those before it."""
        e, values = (
            self.examples[i],
            after | {f"before.{name}": value for name, value in self.before[i].items()},
        )
        outputs = [
            {"prompt": prompt, "before": old, "after": new}
            for prompt, old, new in zip(
                self.cards[i].prompts, self.written[i], written, strict=True
            )
        ]
        return EditRow(
            i, e.id, e.relation, e.prompt, e.target_new, e.ground_truth, values, tuple(outputs)
        )

    # ------------------------------------------------------------------------------------------------- preparing

    def _texts(self) -> list[Tokens]:
        """Every text that is read, not written."""
        return [
            text
            for card in self.cards
            for text in (*card.targets, *card.old, *card.rivals, *_kept(card))
        ]

    def _card(self, e: EditExample) -> Card:
        base, h = self.base, self.hparams
        classifies = base.family == CLASSIFIER
        prompts = (
            e.prompt,
            e.prompt if classifies else QUESTION.format(prompt=e.prompt),
            *e.paraphrases,
        )

        def read(prompt: str, answer: str | None) -> Tokens:
            return base.tokenize(prompt, answer, max_length=h.max_length)

        known = [p for p in e.neighbours if p.answer is not None]
        return Card(
            prompts=prompts,
            targets=tuple(edit_tokens(base, h, e, prompt) for prompt in prompts),
            old=tuple(read(p, e.ground_truth) for p in (e.prompt, *e.paraphrases))
            if e.ground_truth
            else (),
            neighbours=tuple(read(p.prompt, p.answer) for p in known or e.neighbours),
            rivals=() if classifies else tuple(read(p.prompt, e.target_new) for p in known),
            unrelated=tuple(read(p.prompt, p.answer) for p in e.unrelated),
        )

    def _with_reworded(self, cards: Sequence[Card]) -> list[Card]:
        """Add to each card the first paraphrases of the next examples of its relation that do not name its subject."""
        by_relation: dict[str | None, list[int]] = {}
        for i, e in enumerate(self.examples):
            if e.relation and e.paraphrases and e.ground_truth:
                by_relation.setdefault(e.relation, []).append(i)
        out = []
        for i, (e, card) in enumerate(zip(self.examples, cards, strict=True)):
            kin = sorted(by_relation.get(e.relation, ()), key=lambda j: (j <= i, j))
            others = [
                self.examples[j]
                for j in kin
                if e.subject and e.subject not in self.examples[j].paraphrases[0]
            ]
            texts = [
                self.base.tokenize(
                    o.paraphrases[0], o.ground_truth, max_length=self.hparams.max_length
                )
                for o in others[:REWORDED]
            ]
            out.append(replace(card, reworded=tuple(texts)))
        return out

    def _with_greedy(self, cards: Sequence[Card]) -> list[Card]:
        """Add to each card what f writes freely after its first neighbour and its first unrelated prompt."""
        firsts = [text for card in cards for text in (*card.neighbours[:1], *card.unrelated[:1])]
        prompts = [self.base.prompt_of(text) for text in firsts]
        unique = sorted(set(prompts), key=lambda prompt: (len(prompt.ids), prompt.key))
        written = dict(zip(unique, self._write(unique, range(len(unique)), None), strict=True))
        queue = iter(prompts)
        out = []
        for card in cards:
            own = [next(queue) for _ in (*card.neighbours[:1], *card.unrelated[:1])]
            out.append(
                replace(
                    card,
                    greedy=tuple(self.base.continued(prompt, written[prompt]) for prompt in own),
                )
            )
        return out

    def _write(
        self, prompts: Sequence[Tokens], edits: Sequence[int], updates: Updates | None
    ) -> list[list[int]]:
        """Free decoding after each prompt, prompt r under edit `edits[r]`; an end of text is part of the result."""
        new = self._decode(prompts, edits, updates)
        if self.base.family == CLASSIFIER:
            return new
        ended = [
            len(row) < self.max_new_tokens
            and not STOP.search(self.base.new_text([], row, stop=False))
            for row in new
        ]
        return [row + [self.base.eos_id] * end for row, end in zip(new, ended, strict=True)]

    def _decode(
        self,
        prompts: Sequence[Tokens],
        edits: Sequence[int],
        updates: Updates | None,
        *,
        tokens: int | None = None,
    ) -> list[list[int]]:
        """The new ids of an answer to each prompt, or `tokens` tokens without end (causal models only)."""
        limits = {
            "max_new_tokens": self.max_new_tokens if tokens is None else tokens,
            "stop": tokens is None,
        }
        if self.base.family == CAUSAL:
            ids = [prompt.ids for prompt in prompts]
            return write(self.base, ids, updates, edits, endless=tokens is not None, **limits)
        out: list[list[int]] = []
        for at in range(0, len(prompts), WHOLE_ROWS):
            own = select(updates, edits[at : at + WHOLE_ROWS]) if updates else {}
            with side_branches(self.base, own):
                out += self.base.write(prompts[at : at + WHOLE_ROWS], **limits)
        return out

    def _answers(
        self,
        cards: Sequence[Card],
        examples: Sequence[EditExample],
        targets: list[list[Forced]],
        updates: Updates | None,
    ) -> list[list[str]]:
        """What the model writes after each prompt of each card; decoded only where reading y did not settle it."""
        answers: list[list[str]] = [[""] * len(card.prompts) for card in cards]
        todo: list[tuple[int, int]] = []
        for i, (card, example, read) in enumerate(zip(cards, examples, targets, strict=True)):
            may_retrace = self.hparams.add_eos and not STOP.search(example.target_new)
            for j, (text, value) in enumerate(zip(card.targets, read, strict=True)):
                if may_retrace and value.argmax == text.targets:
                    answers[i][j] = f" {self.base.said(example.target_new)}"
                else:
                    todo.append((i, j))
        todo.sort(key=lambda at: len(cards[at[0]].targets[at[1]].ids))
        prompts = [self.base.prompt_of(cards[i].targets[j]) for i, j in todo]
        for (i, j), prompt, new in zip(
            todo, prompts, self._write(prompts, [i for i, _ in todo], updates), strict=True
        ):
            answers[i][j] = self.base.new_text(prompt, new)
        return answers

    # ------------------------------------------------------------------------------- implied questions, free text

    def _implied(self) -> list[list[bool]]:
        """For each implied question of each example, whether f answers it when told the new fact before it."""
        prompts = [told(e, probe.prompt) for e in self.examples for probe in e.portability]
        said = iter(self._say(prompts, range(len(prompts)), None))
        return [
            [answers_probe(next(said), probe) for probe in e.portability] for e in self.examples
        ]

    def _free_values(self, index: Sequence[int], updates: Updates | None) -> list[dict[str, float]]:
        """Portability of the examples that have implied questions, and fluency if asked for."""
        asked = [
            (row, j)
            for row, i in enumerate(index)
            for j, known in enumerate(self.implied[i])
            if known
        ]
        prompts = [self.examples[index[row]].portability[j].prompt for row, j in asked]
        said = self._say(prompts, [row for row, _ in asked], updates)
        right: dict[int, list[bool]] = {}
        for (row, j), text in zip(asked, said, strict=True):
            right.setdefault(row, []).append(
                answers_probe(text, self.examples[index[row]].portability[j])
            )
        out: list[dict[str, float]] = [{} for _ in index]
        for row, i in enumerate(index):
            if self.implied[i]:
                out[row]["portability.coverage"] = fmean(self.implied[i])
            if row in right:
                out[row]["portability.free_exact"] = fmean(right[row])
        if self.fluency:
            begun = [
                (self.examples[i].generation_prompts or (self.examples[i].prompt,))[:GENERATIONS]
                for i in index
            ]
            flat = [(row, prompt) for row, prompts in enumerate(begun) for prompt in prompts]
            texts = iter(
                self._say(
                    [p for _, p in flat], [row for row, _ in flat], updates, tokens=FLUENCY_TOKENS
                )
            )
            for row, prompts in enumerate(begun):
                out[row]["fluency.entropy_bits"] = fmean(
                    ngram_entropy_bits(next(texts)) for _ in prompts
                )
        return out

    def _say(
        self,
        prompts: Sequence[str],
        edits: Sequence[int],
        updates: Updates | None,
        *,
        tokens: int | None = None,
    ) -> list[str]:
        """Greedy text after each prompt, prompt r under edit `edits[r]`: an answer, or `tokens` tokens without end."""
        texts = [
            self.base.prompt_of(self.base.tokenize(p, max_length=self.hparams.max_length))
            for p in prompts
        ]
        order = sorted(range(len(texts)), key=lambda r: len(texts[r].ids))
        rows = [texts[r] for r in order]
        new = self._decode(rows, [edits[r] for r in order], updates, tokens=tokens)
        out = [""] * len(texts)
        for r, prompt, row in zip(order, rows, new, strict=True):
            out[r] = self.base.new_text(prompt, row, stop=tokens is None)
        return out


def _kept(card: Card) -> tuple[Tokens, ...]:
    """What should stay as it was."""
    return (*card.neighbours, *card.unrelated, *card.greedy, *card.reworded)


# ------------------------------------------------------------------------------------------------------------ modes


def evaluate(
    editor: Editor,
    examples: Sequence[EditExample] | EvaluationSet,
    /,
    *,
    mode: str = "single",
    k: int | None = None,
    strength: float = 1.0,
    max_new_tokens: int = 50,
    text: str | None = None,
    fluency: bool = False,
) -> EvaluationReport:
    """Score an editor: each edit on a fresh model ("single"), `k` at once ("batch"), or all in a row ("sequential").

    Pass an `EvaluationSet` to score several editors of one model, whatever their sites, on the same examples without
    preparing them again (then
    `max_new_tokens`, `text` and `fluency` are the set's own). `strength` multiplies every update. The number of edits
    is part of the result's name: `batch_25`, and `sequential_1`, `_10`, `_100`, `_1000` and the last. Raises
    HyperParamError for another mode, or a `k` that does not go with it.
    """
    if mode not in MODES:
        raise HyperParamError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if (mode == "batch") != (k is not None) or (k is not None and k < 1):
        raise HyperParamError(
            f"k, the number of edits made at once, goes with mode 'batch' only, got {mode!r} and {k!r}"
        )
    start = time.perf_counter()
    if not isinstance(examples, EvaluationSet):
        examples = EvaluationSet(
            editor.base,
            editor.hparams,
            examples,
            max_new_tokens=max_new_tokens,
            text=text,
            fluency=fluency,
        )
    if not examples.to_edit:
        n = len(examples)
        raise DataError(
            f"the unedited model already writes the new answer of all {n} examples; nothing to score"
        )
    run = _Run(editor, examples.at(editor.base), strength * editor.hparams.lr_scale, start)
    return run.batches(k) if k is not None else run.single() if mode == "single" else run.sequence()


@dataclass(frozen=True)
class _Run:
    """One editor on one set of examples."""

    editor: Editor
    on: EvaluationSet
    strength: float
    start: float

    def single(self) -> EvaluationReport:
        """Each edit on a fresh model."""
        rows = []
        for index in _chunks(self.on.to_edit, most_together(self.editor, EDIT_BATCH)):
            t0 = time.perf_counter()
            updates = scaled(self._updates(index, at_once=False), self.strength)
            seconds = (time.perf_counter() - t0) / len(index)
            values, written = self.on.score(updates, index)
            drawdown = self._drawdowns(updates, len(index))
            norm = (
                torch.stack(list(relative_norms(self.editor.base, updates).values()))
                .amax(0)
                .tolist()
            )
            for i, after, texts, lost, most in zip(
                index, values, written, drawdown, norm, strict=True
            ):
                after |= {"edit.seconds": seconds, "norm.relative_max": most} | lost
                rows.append(self.on.row(i, after, texts))
        return self._report("single", rows, {})

    def batches(self, k: int) -> EvaluationReport:
        """Groups of k edits in the examples' order, each group made at once on a fresh model; an incomplete last group
        is left out and counted."""
        index = self.on.to_edit
        groups = [g for g in _chunks(index, k) if len(g) == k]
        if not groups:
            raise DataError(
                f"{len(index)} edits cannot make a batch of {k}; lower k or give more examples"
            )
        rows, models = [], []
        for pool in _chunks(groups, EDIT_BATCH // k if k * k <= EDIT_BATCH else 1):
            made, seconds = [], {}
            for group in pool:
                t0 = time.perf_counter()
                made.append(together(scaled(self._updates(group, at_once=True), self.strength)))
                seconds |= dict.fromkeys(group, (time.perf_counter() - t0) / k)
                models.append(self._model_values(made[-1]))
            several = k * sum(map(_numbers, made)) <= NUMBERS
            for own, update in (
                [(pool, made)] if several else [([g], [m]) for g, m in zip(pool, made, strict=True)]
            ):
                updates = update[0] if len(own) == 1 else apart(update, texts=k)
                for part in _chunks(list(chain(*own)), EDIT_BATCH):
                    values, written = self.on.score(updates, part)
                    rows += [
                        self.on.row(i, v | {"edit.seconds": seconds[i]}, w)
                        for i, v, w in zip(part, values, written, strict=True)
                    ]
        shared = {name: fmean(values[name] for values in models) for name in models[0]}
        counts = {"groups": len(groups), "left_out": len(index) - k * len(groups)}
        return self._report(f"batch_{k}", rows, shared, counts)

    def sequence(self) -> EvaluationReport:
        """One edit after another, never reset; scored right after each edit, and again after 1, 10, … and all edits."""
        index, total, rows, editor = self.on.to_edit, {}, [], in_sequence(self.editor)
        stops = sorted({*(t for t in AFTER if t < len(index)), len(index)})
        reports: list[EvaluationReport] = []
        for begin, end in zip([0, *stops], stops, strict=False):
            for block in _chunks(index[begin:end], SEQUENCE_BLOCK):
                t0 = time.perf_counter()
                texts = [self.on.cards[i].targets[0] for i in block]
                steps = one_after_another(
                    editor, texts, before=total, trunk=self.on.trunk, strength=self.strength
                )
                seconds = (time.perf_counter() - t0) / len(block)
                for part in _chunks(list(zip(block, steps, strict=True)), _scored_together(steps)):
                    own, made = zip(*part, strict=True)
                    values, written = self.on.score(so_far(made, total), own)
                    rows += [
                        self.on.row(i, v | {"edit.seconds": seconds}, w)
                        for i, v, w in zip(own, values, written, strict=True)
                    ]
                    total = together(*([total] if total else []), *made)
            reports.append(self._after(rows, total))
            logger.info("sequence: %d of %d edits", end, len(index))
        return replace(reports[-1], earlier=tuple(reports[:-1]))

    def _after(self, rows: Sequence[EditRow], total: Updates) -> EvaluationReport:
        """The report after the edits of `rows`: success as it was right after each, the rest as it is now."""
        out: list[EditRow] = []
        for part in _chunks(rows, EDIT_BATCH):
            values, written = self.on.score(total, [row.index for row in part])
            for row, now, texts in zip(part, values, written, strict=True):
                success = now["edit_success.free_exact"]
                kept = {
                    name: value for name, value in row.values.items() if not name.startswith(NOW)
                }
                kept |= {name: value for name, value in now.items() if name.startswith(NOW)}
                kept |= {
                    "retention.all": success,
                    "retention.tf_token": now["edit_success.tf_token"],
                }
                kept |= {"retention.first_10": success} if len(out) < 10 else {}
                outputs = tuple(
                    {**o, "end": text} for o, text in zip(row.outputs, texts, strict=True)
                )
                out.append(replace(row, values=kept, outputs=outputs))
        return self._report(f"sequential_{len(rows)}", out, self._model_values(total))

    def _updates(self, index: Sequence[int], *, at_once: bool) -> Updates:
        texts = [self.on.cards[i].targets[0] for i in index]
        return self.editor.updates(texts, trunk=self.on.trunk, at_once=at_once)

    def _drawdowns(self, updates: Updates, n_edits: int) -> list[dict[str, float]]:
        """What each of the edits costs on the held-out text, if there is one."""
        text = self.on.text
        return (
            [s.drawdown(text.before) for s in text.read(updates, n_edits)]
            if text
            else [{} for _ in range(n_edits)]
        )

    def _model_values(self, updates: Updates) -> dict[str, float]:
        """Norms and drawdown of a model that holds many edits."""
        each = {
            name: float(norm) for name, norm in relative_norms(self.editor.base, updates).items()
        }
        norms = {"norm.relative_max": max(each.values())} | {
            f"norm.relative.{name}": v for name, v in each.items()
        }
        return norms | self._drawdowns(updates, 1)[0]

    def _report(
        self,
        mode: str,
        rows: Sequence[EditRow],
        values: Mapping[str, float],
        counts: Mapping[str, int] | None = None,
    ) -> EvaluationReport:
        on, already = self.on, len(self.on) - len(self.on.to_edit)
        why = {name: on.reasons[name] for name in ("empty_target", "too_long", "invalid_records")}
        answers: dict[str, set[str]] = {}
        for row in rows:
            answers.setdefault(row.prompt, set()).add(row.target_new)
        clash = (
            {}
            if mode == "single"
            else {"conflicting": sum(len(answers[row.prompt]) > 1 for row in rows)}
        )
        if on.text:
            values = {**values, "before.perplexity": on.text.before.perplexity}
            values["before.accuracy"] = on.text.before.accuracy
        all_counts = {
            "scored": len(rows),
            "already_true": already,
            "skipped": len(on.skipped),
            **why,
            **clash,
        }
        return EvaluationReport(
            editor=self.editor.name,
            mode=mode,
            rows=tuple(rows),
            summary=summarise(rows),
            counts=all_counts | dict(counts or {}),
            seconds=time.perf_counter() - self.start,
            values=values,
        )


NOW = ("neighbourhood.", "locality.", "fluency.")
"""What a sequence's report tells of the model as it is at its end, not right after each edit."""


def _numbers(updates: Updates) -> int:
    """How many numbers updates hold."""
    return sum(u.u.numel() + u.delta.numel() for u in updates.values())


def _scored_together(steps: Sequence[Updates]) -> int:
    """How many edits of a sequence to score in one pass: each of them holds the tokens of all of them."""
    return max(1, math.isqrt(NUMBERS // max(map(_numbers, steps))))


def _chunks(values: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for at in range(0, len(values), size):
        yield list(values[at : at + size])
