"""Scores of single edits: teacher-forced and free decoding side by side, with intervals and per-edit rows.

f is the unedited model, f' the edited one; each edit is made on a fresh model (mode "single"). y is the new answer,
y° the old one. Teacher forcing reads the given answer; free decoding is greedy and stops at the end of text, a newline
or ".". Where reading y under f' shows that every argmax, the end included, is y's own token, greedy decoding must
retrace y and is not run; likewise f' writes what f wrote exactly if it retraces it. P(·) compares length-normalised
log-likelihoods. Edits whose new answer f already writes are counted, not scored. Intervals are 95 % bootstrap
intervals over edits. A classifier writes the label that it predicts; a question form and answers that compete on a
neighbour do not apply to it.
"""

import json
import re
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import numpy as np

from .data import EditExample, Tokens
from .edit import Updates, side_branches
from .editor import MENDEditor, scaled
from .errors import DataError, MendkitError
from .families import CLASSIFIER
from .hparams import MENDHyperParams
from .models import BaseModel
from .scoring import Forced, forced, select
from .texts import edit_tokens
from .trunk import FrozenTrunk

QUESTION = "Answer in a few words, without a full sentence.\nQuestion: {prompt} …?\nAnswer:"
EDIT_BATCH = 64
DECODE_BATCH = 64
RESAMPLES = 2000
REWORDED = 2
STOP = re.compile(r"[.\n]")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no a/an/the, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in text.split() if word not in {"a", "an", "the"})


@dataclass(frozen=True)
class Interval:
    """A mean over n edits with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], *, seed: int = 0) -> "Interval":
        """Bootstrap the mean of `values` (at least one)."""
        x = np.asarray(values, dtype=np.float64)
        draws = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
        low, high = np.quantile(x[draws].mean(1), [0.025, 0.975])
        return cls(float(x.mean()), float(low), float(high), len(x))


@dataclass(frozen=True)
class EditRow:
    """One edit: its values by metric name (`before.…` for the unedited model) and what the models wrote."""

    index: int
    id: str | None
    relation: str | None
    prompt: str
    target_new: str
    ground_truth: str | None
    values: Mapping[str, float]
    outputs: tuple[Mapping[str, Any], ...] = ()  # prompt, before, after: the edit, its question form, paraphrases


@dataclass(frozen=True)
class EvaluationReport:
    """Rows and their summary. `counts` tells how many edits were scored, already true, and skipped."""

    editor: str
    mode: str
    rows: tuple[EditRow, ...]
    summary: Mapping[str, Interval]
    counts: Mapping[str, int]
    seconds: float

    def results(self, prefix: str = "") -> dict[str, float]:
        """Flat results: `<prefix><mode>.<name>` with `.n`, `.low`, `.high` beside it, and the counts."""
        out: dict[str, float] = {}
        for name, interval in self.summary.items():
            key = f"{prefix}{self.mode}.{name}"
            out[key] = interval.mean
            out |= {f"{key}.n": interval.n, f"{key}.low": interval.low, f"{key}.high": interval.high}
        for name, shares in HARMONIC.items():
            means = [self.summary[s].mean for s in shares if s in self.summary]
            if len(means) == len(shares):
                out[f"{prefix}{self.mode}.{name}"] = harmonic_mean(means)
        return out | {f"{prefix}{self.mode}.edits.{name}": n for name, n in self.counts.items()}

    def by(self, key: str, metric: str) -> dict[str, Interval]:
        """A metric's interval by the values of a row attribute, as in `by("relation", "edit_success.free_exact")`."""
        groups: dict[str, list[float]] = {}
        for row in self.rows:
            if metric in row.values:
                groups.setdefault(str(getattr(row, key)), []).append(row.values[metric])
        return {name: Interval.of(values) for name, values in sorted(groups.items())}

    def save_rows(self, path: str | Path) -> Path:
        """Write the rows as JSON lines."""
        text = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in self.rows)
        Path(path).write_text(text, encoding="utf-8")
        return Path(path)


HARMONIC = {
    "score.harmonic": ("edit_success.es", "paraphrase.ps", "neighbourhood.ns"),
    "score.headline": (
        "edit_success.free_exact",
        "paraphrase.free_exact",
        "neighbourhood.argmax_agreement",
        "locality.argmax_agreement",
    ),
}
"""Harmonic means: of CounterFact's efficacy scores (S), and of the four shares that the kit's editors are chosen by."""


@dataclass(frozen=True)
class Card:
    """All texts of one example that are read under its edit. Target texts end with the end of text if `add_eos`."""

    prompts: tuple[str, ...]  # the edit prompt, its question form, the paraphrases
    targets: tuple[Tokens, ...]  # those with y
    old: tuple[Tokens, ...]  # the edit prompt and the paraphrases with y°; empty if y° is unknown
    neighbours: tuple[Tokens, ...]  # with their answers
    rivals: tuple[Tokens, ...]  # neighbours with known answers, with y instead
    unrelated: tuple[Tokens, ...]
    greedy: tuple[Tokens, ...] = ()  # one neighbour and one unrelated prompt, each with what f writes there
    reworded: tuple[Tokens, ...] = ()  # paraphrases of other examples of the relation, with their old answers


class EvaluationSet:
    """Examples prepared for scoring any number of editors: tokens, trunk, and the unedited model's values, once.

    Examples whose texts cannot be tokenised (target too long, say) are counted in `skipped`, not scored. Free decoding
    writes at most `max_new_tokens` tokens.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        examples: Sequence[EditExample],
        /,
        *,
        max_new_tokens: int = 50,
    ) -> None:
        self.base, self.hparams, self.max_new_tokens = base, hparams, max_new_tokens
        self.trunk = FrozenTrunk(base)
        self.examples: list[EditExample] = []
        self.skipped: list[str] = []
        cards: list[Card] = []
        for example in examples:
            try:
                cards.append(self._card(example))
                self.examples.append(example)
            except DataError as error:
                self.skipped.append(str(error))
        if not cards:
            raise DataError(f"no example can be scored; first problem: {(self.skipped or ['no example given'])[0]}")
        self.cards = self._with_greedy(self._with_reworded(cards))
        self.trunk.fill(
            [text for card in self.cards for text in (*card.targets, *card.old, *card.rivals, *_kept(card))]
        )
        self.kept_before = forced(self.trunk, [_kept(card) for card in self.cards], None)
        self.before, self.written = self.score(None, range(len(self.cards)))

    def __len__(self) -> int:
        return len(self.cards)

    def score(self, updates: Updates | None, index: Sequence[int], /) -> tuple[list[dict[str, float]], list[list[str]]]:
        """Values by metric, and what is written after each prompt, for the examples `index`, each under its own edit in
        `updates` (under none: the unedited model, without the values that compare with it)."""
        cards, examples = [self.cards[i] for i in index], [self.examples[i] for i in index]
        targets = forced(self.trunk, [card.targets for card in cards], updates)
        pairs = forced(self.trunk, [(*card.old, *card.rivals) for card in cards], updates)
        before = [self.kept_before[i] for i in index]
        after = forced(self.trunk, [_kept(c) for c in cards], updates, compare=True) if updates else before
        written = self._answers(cards, examples, targets, updates)
        values = []
        for card, e, target, pair, kept, old, texts in zip(
            cards, examples, targets, pairs, after, before, written, strict=True
        ):
            row = _target_values(self.base.said(e.target_new), card, target, texts) | _probability_values(
                card, target, pair, kept
            )
            values.append(row | (_locality_values(card, kept, old) if updates else {}))
        return values, written

    # ------------------------------------------------------------------------------------------------- preparing

    def _card(self, e: EditExample) -> Card:
        base, h = self.base, self.hparams
        classifies = base.family == CLASSIFIER
        prompts = (e.prompt, e.prompt if classifies else QUESTION.format(prompt=e.prompt), *e.paraphrases)

        def read(prompt: str, answer: str | None) -> Tokens:
            return base.tokenize(prompt, answer, max_length=h.max_length)

        known = [p for p in e.neighbours if p.answer is not None]
        return Card(
            prompts=prompts,
            targets=tuple(edit_tokens(base, h, e, prompt) for prompt in prompts),
            old=tuple(read(p, e.ground_truth) for p in (e.prompt, *e.paraphrases)) if e.ground_truth else (),
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
            others = [self.examples[j] for j in kin if e.subject and e.subject not in self.examples[j].paraphrases[0]]
            texts = [
                self.base.tokenize(o.paraphrases[0], o.ground_truth, max_length=self.hparams.max_length)
                for o in others[:REWORDED]
            ]
            out.append(replace(card, reworded=tuple(texts)))
        return out

    def _with_greedy(self, cards: Sequence[Card]) -> list[Card]:
        """Add to each card what f writes freely after its first neighbour and its first unrelated prompt."""
        firsts = [text for card in cards for text in (*card.neighbours[:1], *card.unrelated[:1])]
        prompts = [self.base.prompt_of(text) for text in firsts]
        unique = sorted(set(prompts), key=lambda prompt: (len(prompt.ids), prompt.key))
        written = dict(zip(unique, self._write(unique, None), strict=True))
        queue = iter(prompts)
        out = []
        for card in cards:
            own = [next(queue) for _ in (*card.neighbours[:1], *card.unrelated[:1])]
            out.append(replace(card, greedy=tuple(self.base.continued(prompt, written[prompt]) for prompt in own)))
        return out

    def _write(self, prompts: Sequence[Tokens], updates: Updates | None) -> list[list[int]]:
        """Free decoding after each prompt, prompt r under edit r; an end of text is part of the result."""
        out: list[list[int]] = []
        for at in range(0, len(prompts), DECODE_BATCH):
            rows = prompts[at : at + DECODE_BATCH]
            own = select(updates, range(at, at + len(rows))) if updates else {}
            with side_branches(self.base, own):
                new = self.base.write(rows, max_new_tokens=self.max_new_tokens, stop=True)
            if self.base.family == CLASSIFIER:
                out += new
                continue
            ended = [
                len(row) < self.max_new_tokens and not STOP.search(self.base.new_text([], row, stop=False))
                for row in new
            ]
            out += [row + [self.base.eos_id] * end for row, end in zip(new, ended, strict=True)]
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
        own = select(updates, [i for i, _ in todo]) if updates and todo else None
        for (i, j), prompt, new in zip(todo, prompts, self._write(prompts, own) if todo else [], strict=True):
            answers[i][j] = self.base.new_text(prompt, new)
        return answers


def _kept(card: Card) -> tuple[Tokens, ...]:
    """What should stay as it was."""
    return (*card.neighbours, *card.unrelated, *card.greedy, *card.reworded)


def _target_values(target: str, card: Card, read: Sequence[Forced], written: Sequence[str]) -> dict[str, float]:
    """Success on the edit prompt (bare and as a question) and on the paraphrases."""
    scores = [_success(target, t, v, w) for t, v, w in zip(card.targets, read, written, strict=True)]
    bare, question, paraphrases = scores[0], scores[1], scores[2:]
    out = {f"edit_success.{name}": value for name, value in bare.items()}
    if card.prompts[1] != card.prompts[0]:
        out["edit_success.free_exact_question"] = question["free_exact"]
    if paraphrases:
        out |= {f"paraphrase.{name}": fmean(s[name] for s in paraphrases) for name in bare}
    out["edit_success.paper"] = fmean(s["tf_exact"] for s in (bare, *paraphrases))  # MEND, equation 1
    return out


def _success(target: str, text: Tokens, value: Forced, written: str) -> dict[str, float]:
    """The four scores of one prompt; teacher forcing counts y's own tokens, not the end of text."""
    n = len(text.targets) - text.ends
    hits = [a == b for a, b in zip(value.argmax[:n], text.targets[:n], strict=True)]
    want, got = normalise(target), normalise(written)
    return {
        "tf_token": fmean(hits),
        "tf_exact": float(all(hits)),
        "free_exact": float(got == want),
        "free_contains": float(f" {want} " in f" {got} "),
    }


def _probability_values(
    card: Card, targets: Sequence[Forced], pairs: Sequence[Forced], kept: Sequence[Forced]
) -> dict[str, float]:
    """Efficacy scores: P(y) > P(y°) on the prompt and the paraphrases, P(answer) > P(y) on neighbours."""
    new = [fmean(v.logp[: len(t.targets) - t.ends]) for t, v in zip(card.targets, targets, strict=True)]
    del new[1]  # the question form has no y° beside it
    out = {"log_p.new": new[0]}
    n_old = len(card.old)
    if n_old:
        old = [fmean(v.logp) for v in pairs[:n_old]]
        wins = [float(a > b) for a, b in zip(new, old, strict=True)]
        out |= {"edit_success.es": wins[0], "log_p.old": old[0]}
        if len(wins) > 1:
            out["paraphrase.ps"] = fmean(wins[1:])
    if card.rivals:
        wins = [float(fmean(a.logp) > fmean(b.logp)) for a, b in zip(kept, pairs[n_old:], strict=False)]
        out["neighbourhood.ns"] = fmean(wins)
    return out


def _locality_values(card: Card, kept: Sequence[Forced], before: Sequence[Forced]) -> dict[str, float]:
    """Agreement with f: argmax and KL at answer positions, right answers retained, and f's own greedy output.

    Neighbours share the edit prompt's wording. `reworded_…` are other subjects in a paraphrase's wording: an editor can
    win paraphrases by answering a whole relation, and only these would show it.
    """
    n, m = len(card.neighbours), len(card.neighbours) + len(card.unrelated)
    parts = {"neighbourhood": (0, n), "locality": (n, m)}
    out: dict[str, float] = {}
    for name, (a, b) in parts.items():
        if a == b:
            continue
        texts = (*card.neighbours, *card.unrelated)[a:b]
        out[f"{name}.argmax_agreement"] = fmean(fmean(v.same) for v in kept[a:b])
        out[f"{name}.kl_nats"] = fmean(fmean(v.kl) for v in kept[a:b])
        right = [
            v.argmax == t.targets
            for t, f, v in zip(texts, before[a:b], kept[a:b], strict=True)
            if f.argmax == t.targets
        ]
        if right:
            out[f"{name}.retained"] = fmean(right)
    if card.reworded:
        rest = kept[-len(card.reworded) :]
        out["neighbourhood.reworded_agreement"] = fmean(fmean(v.same) for v in rest)
        out["neighbourhood.reworded_kl_nats"] = fmean(fmean(v.kl) for v in rest)
    greedy = zip([name for name, (a, b) in parts.items() if a < b], kept[m : m + len(card.greedy)], strict=True)
    return out | {f"{name}.greedy_agreement": float(all(v.same)) for name, v in greedy}


def evaluate(
    editor: MENDEditor,
    examples: Sequence[EditExample] | EvaluationSet,
    /,
    *,
    mode: str = "single",
    strength: float = 1.0,
    max_new_tokens: int = 50,
) -> EvaluationReport:
    """Score an editor on examples, each edit made on a fresh model (mode "single").

    Pass an `EvaluationSet` to score several editors on the same examples without preparing them again (then
    `max_new_tokens` is the set's own). `strength` multiplies every update. Raises MendkitError for another mode.
    """
    if mode != "single":
        raise MendkitError(f"mode {mode!r}: this version scores single edits only; use mode='single'")
    start = time.perf_counter()
    if not isinstance(examples, EvaluationSet):
        examples = EvaluationSet(editor.base, editor.mend.hparams, examples, max_new_tokens=max_new_tokens)
    rows, already, seconds = [], 0, []
    for at in range(0, len(examples), EDIT_BATCH):
        index = range(at, min(at + EDIT_BATCH, len(examples)))
        t0 = time.perf_counter()
        updates = editor.updates([examples.cards[i].targets[0] for i in index], trunk=examples.trunk)
        seconds.append((time.perf_counter() - t0) / len(index))
        values, written = examples.score(scaled(updates, strength * editor.mend.hparams.lr_scale), index)
        for i, after, texts in zip(index, values, written, strict=True):
            before = examples.before[i]
            if before["edit_success.free_exact"] == 1.0:
                already += 1
                continue
            after["edit.seconds"] = seconds[-1]
            rows.append(_row(i, examples, after, texts))
    if not rows:
        raise DataError(f"the unedited model already writes the new answer of all {already} examples; nothing to score")
    names = sorted({name for row in rows for name in row.values})
    summary = {name: Interval.of([row.values[name] for row in rows if name in row.values]) for name in names}
    counts = {"scored": len(rows), "already_true": already, "skipped": len(examples.skipped)}
    return EvaluationReport(editor.name, mode, tuple(rows), summary, counts, time.perf_counter() - start)


def _row(i: int, examples: EvaluationSet, after: dict[str, float], written: Sequence[str]) -> EditRow:
    e, card = examples.examples[i], examples.cards[i]
    values = after | {f"before.{name}": value for name, value in examples.before[i].items()}
    outputs = [
        {"prompt": prompt, "before": old, "after": new}
        for prompt, old, new in zip(card.prompts, examples.written[i], written, strict=True)
    ]
    return EditRow(i, e.id, e.relation, e.prompt, e.target_new, e.ground_truth, values, tuple(outputs))
