"""Examples prepared for scoring: their texts as tokens, the trunk, and the unedited model's values.

f is the unedited model, f' the edited one, y the new answer.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain, takewhile
from operator import eq
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from ..data.examples import BLANKS, EditExample, Probe
from ..data.files import Examples
from ..errors import DataError, LimitError, MendkitError
from ..hparams import MENDHyperParams
from ..mend.batches import edit_tokens, probe_tokens, told, with_prefix
from ..mend.updates import Updates, select, side_branches
from ..mend.validation import Forced, forced
from ..models.base import BaseModel
from ..models.families import CAUSAL, CLASSIFIER
from ..models.sites import Site
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk, trunk_cache
from .metrics import (
    STAY,
    TEXT_TOKENS,
    HeldOutText,
    Reading,
    ScoredPrompt,
    begins_with,
    example_values,
    ngram_entropy_bits,
    prompt_scores,
)
from .results import ABOUT, EditRow, is_said, normalise

QUESTION = "Answer in a few words, without a full sentence.\nQuestion: {}\nAnswer:{}"
REWORDED = 2
GENERATIONS, FLUENCY_TOKENS = 3, 100
BRIEF_TOKENS = 4  # that are written before a look whether they begin an answer
ASKED, FIRST_TOKENS = 64, 8  # facts that are asked at once, and for how much of an answer


class EvaluationSet:
    """Examples prepared for scoring any number of editors of one model.

    Examples whose texts cannot be tokenised are counted in `skipped` and `reasons`, not scored.
    On request: drawdown on the first `text_tokens` tokens of a held-out `text`, and `fluency`.
    `survival`: so many edits, each alone, also in a model whose weights are rounded, or fine-tuned
    on that text (survival.py).
    `brief`: what thousands of edits allow. No rivals, reworded or implied prompts; paraphrases are
    asked as questions, too; the unedited model writes after edit prompts only; writing ends once
    the text cannot become an answer. Trunk states are kept on disk, as in training, for other
    editors and for a run that was stopped. `follow` false leaves out consequences, negated forms
    and true/false questions, which take as long as everything else.
    Raises DataError if no example is left, MendkitError for text of a model that writes none.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        examples: Sequence[EditExample],
        *,
        max_new_tokens: int = 50,
        text: str | None = None,
        text_tokens: int = TEXT_TOKENS,
        fluency: bool = False,
        survival: int = 0,
        brief: bool = False,
        follow: bool = True,
    ) -> None:
        if base.family != CAUSAL and (fluency or text is not None):
            raise MendkitError(f"{base.name}: fluency and held-out text need a causal model")
        if survival and text is None:
            raise MendkitError("survival needs a held-out text to fine-tune on")
        self.survival = survival
        self.base, self.hparams = base, hparams
        self.max_new_tokens, self.fluency, self.brief = max_new_tokens, fluency, brief
        self.follow = follow and not brief
        self._elsewhere: dict[tuple[Site, ...], EvaluationSet] = {}
        self.examples: list[EditExample] = []
        self.prompts: list[list[ScoredPrompt]] = []
        self.skipped: list[str] = []
        self.reasons = {"empty_target": 0, "too_long": 0}
        self.reasons["invalid_records"] = len(getattr(examples, "skipped", ()))
        for example in examples:
            self._take(with_prefix(hparams, example))
        if not self.examples:
            first = self.skipped[0] if self.skipped else "no example given"
            raise DataError(f"no example can be scored; first problem: {first}")
        self._take_said_now()
        self.coverage: dict[int, float] = {}
        if not brief:
            for i, prompts in enumerate(self.prompts):
                prompts += _reworded(base, hparams, self.examples, i)
            self._add_implied()
            self._add_greedy()
        limit = hparams.disk_cache_bytes if brief else 0
        disk = trunk_cache(base, hparams.cache_dir, limit=limit)
        self.trunk = FrozenTrunk(base, cache=disk)
        self._fill()
        self.text = None
        if text is not None:
            self.text = HeldOutText(self.trunk, text, tokens=text_tokens)
        every = range(len(self))
        self.read_before = self._read(None, every)
        self.known = [self._is_known(i) for i in every]
        self.before: list[EditRow] = []
        self.before = self.rows_of(self.read_before, every, self._fluency(None, every))

    def __len__(self) -> int:
        return len(self.examples)

    def at(self, base: BaseModel) -> "EvaluationSet":
        """This set for editors of other sites of its model, with a trunk for them."""
        if base.sites == self.base.sites:
            return self
        if base.sites not in self._elsewhere:
            other = copy.copy(self)
            other.trunk = self.trunk.at(base)
            other.base = other.trunk.base
            other._fill()
            self._elsewhere[base.sites] = other
        return self._elsewhere[base.sites]

    @property
    def to_edit(self) -> list[int]:
        """The examples whose new answer f does not write already."""
        return [row.index for row in self.before if not row.values["edit_success.free_exact"]]

    def holds(self, updates: Updates, index: Sequence[int]) -> list[bool]:
        """Whether one edit makes the model write each example's new answer."""
        prompts = [self.prompts[i][0] for i in index]
        written = self._write(prompts, updates, [0] * len(index))
        held = []
        for prompt, (start, ids) in zip(prompts, written, strict=True):
            text = self.base.new_text(start, ids, answers=prompt.stops)
            held.append(is_said(text, prompt.answers, prompt.old))
        return held

    def score(self, updates: Updates, index: Sequence[int]) -> list[EditRow]:
        """Rows of the examples `index`, each under its edit in `updates`."""
        return self.rows_of(self._read(updates, index), index, self._fluency(updates, index))

    @property
    def protocol(self) -> str:
        """How answers are written and compared, in words."""
        return (
            f"greedy decoding of at most {self.max_new_tokens} tokens, to the end of text, a "
            "newline or a full stop; answers equal without case, punctuation and articles; a fact "
            "is known if what the unedited model writes begins with the right answer; a question "
            f'is asked as "{QUESTION.format("…", "").replace(chr(10), " / ")}"'
        )

    def rows_of(
        self, read: Sequence[Sequence[Reading]], index: Sequence[int], fluency: Sequence[float] = ()
    ) -> list[EditRow]:
        """Rows of the examples `index` from what was read and written at each of their prompts."""
        rows = []
        for row, i in enumerate(index):
            scores, outputs = [], []
            columns = self.prompts[i], read[row], self.read_before[i]
            for prompt, after, before in zip(*columns, strict=False):
                scores.append(prompt_scores(prompt, after, before))
                if self.brief:  # what would follow is not written
                    scores[-1].pop("free_contains", None)
                text: dict[str, Any] = {"role": prompt.role, "prompt": prompt.prompt}
                text |= {"before": before.written, "after": after.written}
                outputs.append(text | scores[-1])
            values = example_values([text["role"] for text in outputs], scores)
            if i in self.coverage:
                values["portability.coverage"] = self.coverage[i]
            if fluency:
                values["fluency.entropy_bits"] = fluency[row]
            if self.before:
                for name, value in self.before[i].values.items():
                    values[f"before.{name}"] = value
            about: dict[str, Any] = {name: getattr(self.examples[i], name) for name in ABOUT}
            about["known"] = self.known[i]
            rows.append(EditRow(index=i, values=values, outputs=tuple(outputs), **about))
        return rows

    # ------------------------------------------------------------------------------- preparing

    def _take(self, example: EditExample) -> None:
        """Tokenise an example, or count it as skipped."""
        try:
            if not example.target_new.strip():  # any silence would pass for it
                self.reasons["empty_target"] += 1
                about = f"target_new {example.target_new!r} of {example.prompt!r}"
                raise DataError(f"{about} has no words")
            self.prompts.append(self._prompts_of(example))
            self.examples.append(example)
        except DataError as error:
            self.skipped.append(str(error))
            self.reasons["too_long"] += isinstance(error, LimitError)

    def _take_said_now(self) -> None:
        """What f says is the old answer where the listed truth is the new one."""
        self.corrected: dict[int, EditExample] = {}
        for i, example in enumerate(self.examples):
            if example.ground_truth == example.target_new:
                self.corrected[i] = example
        asked = [example.prompt for example in self.corrected.values()]
        said = self.base.generate_batch(asked, max_new_tokens=self.max_new_tokens)
        for (i, example), answer in zip(self.corrected.items(), said, strict=True):
            self.examples[i] = replace(example, ground_truth=answer.strip() or None)
            self.prompts[i] = self._prompts_of(self.examples[i])

    def _prompts_of(self, example: EditExample) -> list[ScoredPrompt]:
        prompts = list(_prompts(self.base, self.hparams, example, brief=self.brief))
        if self.follow:
            prompts += _following(self.base, self.hparams, example)
        return prompts

    def _is_known(self, i: int) -> bool | None:
        """Whether f writes the listed truth; None where there is none."""
        truth = self.examples[i].ground_truth
        if i in self.corrected:  # the listed truth is what f should write from now on
            return False
        written = self.read_before[i][0].written or ""
        return None if truth is None else begins_with(written, self.base.said(truth))

    def _add_implied(self) -> None:
        """The implied questions that f answers when told the new fact, and their share."""
        implied: list[tuple[int, Probe]] = []
        for i, example in enumerate(self.examples):
            implied += [(i, probe) for probe in example.portability]
        asked = [told(self.examples[i], probe.prompt) for i, probe in implied]
        answers = [(probe.answer or "", *probe.aliases) for _, probe in implied]
        limit = self.max_new_tokens
        written = self.base.generate_batch(asked, max_new_tokens=limit, answers=answers)
        known: dict[int, list[bool]] = {}
        for (i, probe), right, text in zip(implied, answers, written, strict=True):
            known.setdefault(i, []).append(is_said(text, right))
            if known[i][-1]:
                tokens = probe_tokens(self.base, self.hparams, probe.prompt)
                self.prompts[i].append(ScoredPrompt("portability", probe.prompt, tokens, right))
        self.coverage = {i: fmean(each) for i, each in known.items()}

    def _add_greedy(self) -> None:
        """What f writes after the first prompt of each role that should stay."""
        chosen = []
        for prompts in self.prompts:
            roles = [prompt.role for prompt in prompts]
            chosen += [(prompts, roles.index(role)) for role in STAY if role in roles]
        new = self._write([prompts[k] for prompts, k in chosen])
        for (prompts, k), (start, ids) in zip(chosen, new, strict=True):
            prompts[k] = replace(prompts[k], greedy=self.base.continued(start, ids))

    def _texts_of(self, i: int) -> list[Tokens]:
        return [text for prompt in self.prompts[i] for text in prompt.all()]

    def _fill(self) -> None:
        """Let the trunk read every text that is not written."""
        self.trunk.fill([*chain.from_iterable(map(self._texts_of, range(len(self))))])

    # -------------------------------------------------------------------- reading and writing

    def _read(self, updates: Updates | None, index: Sequence[int]) -> list[list[Reading]]:
        """What the model reads and writes at each prompt of the examples `index`."""
        # 1. Read every text once, and see which prompts are to be written after.
        texts = [self._texts_of(i) for i in index]
        read = forced(self.trunk, texts, updates, compare=updates is not None)
        readings: list[list[Reading]] = []
        todo: list[tuple[int, int, ScoredPrompt]] = []
        begun: list[list[int]] = []
        for row, i in enumerate(index):
            found: dict[Tokens | None, Any] = dict(zip(texts[row], read[row], strict=True))
            readings.append([])
            for k, prompt in enumerate(self.prompts[i]):
                others = found.get(prompt.rival), found.get(prompt.greedy)
                readings[row].append(Reading(found[prompt.text], *others))
                asked = prompt.role not in STAY or prompt.greedy is not None
                if self.brief and updates is None:
                    asked = prompt.role == "edit"
                if asked:
                    todo.append((row, k, prompt))
                    begun.append(self._begun(prompt, found))
        # 2. Write what reading did not tell.
        rows, _, left = zip(*todo, strict=True)
        new = self._write(left, updates, rows, begun)
        for (row, k, prompt), (start, ids) in zip(todo, new, strict=True):
            written = self.base.new_text(start, ids, answers=prompt.stops)
            readings[row][k] = replace(readings[row][k], written=written)
        return readings

    def _write(
        self,
        prompts: Sequence[ScoredPrompt],
        updates: Updates | None = None,
        edits: Sequence[int] = (),
        begun: Sequence[Sequence[int]] = (),
    ) -> list[tuple[Tokens, list[int]]]:
        """Where each prompt ends, and the new ids after it; prompt r under `edits[r]`."""
        starts = [self.base.prompt_of(prompt.text) for prompt in prompts]
        new = [[*ids] for ids in begun] or [[] for _ in prompts]
        going = list(range(len(prompts)))
        limits = [self.max_new_tokens]
        if self.brief:
            limits.insert(0, min(BRIEF_TOKENS, self.max_new_tokens))
        for limit in limits:
            if self.brief:
                going = [k for k in going if self._may_be(prompts[k], starts[k], new[k])]
            longer = self.base.write_all(
                [starts[k] for k in going],
                max_new_tokens=limit,
                answers=[prompts[k].stops for k in going],
                under=partial(self._under, updates, [edits[k] for k in going if edits]),
                begun=[new[k] for k in going],
            )
            for k, ids in zip(going, longer, strict=True):
                new[k] = ids
        return list(zip(starts, new, strict=True))

    def _may_be(self, prompt: ScoredPrompt, start: Tokens, ids: Sequence[int]) -> bool:
        """Whether a text that goes on may still become one of the prompt's answers."""
        if self.base.labels:
            return False
        text = self.base.new_text(start, ids, stop=False)
        begun, (*whole, last) = [normalise(text)], ["", *text.split()]
        if any(article.startswith(last.lower()) for article in ("a", "an", "the")):
            begun.append(normalise(" ".join([*whole, "x"]))[:-1])  # it may not count
        # What comes next decides whether a mark at the end counts.
        beginnings = tuple(re.sub(r"\W+$", "", each) for each in begun)
        return any(answer.startswith(beginnings) for answer in map(normalise, prompt.stops))

    def _under(
        self, updates: Updates | None, edits: Sequence[int], rows: list[int]
    ) -> AbstractContextManager[None]:
        """Each row of a batch under its edit."""
        chosen = select(updates, [edits[k] for k in rows]) if updates else {}
        return side_branches(self.base, chosen)

    def _begun(self, prompt: ScoredPrompt, found: Mapping[Tokens | None, Forced]) -> list[int]:
        """The first ids that greedy decoding must write, by what was found in the texts.

        It retraces a text while every argmax is the text's next token, and leaves it by the next.
        """
        start = self.base.prompt_of(prompt.text)
        ends = self.base.end_ids() if self.base.labels is None else ()
        longest: list[int] = []
        for text in prompt.all():
            if self.base.prompt_of(text) != start:
                continue
            argmax = found[text].argmax
            agreed = [*takewhile(bool, map(eq, argmax, text.targets))]
            retraced = argmax[: len(agreed) + 1]
            ids = [*takewhile(lambda token: token not in ends, retraced)]
            if len(ids) < len(retraced):
                ids.append(self.base.tokenizer.eos_token_id)
            longest = max(longest, ids, key=len)
        return longest

    def _fluency(self, updates: Updates | None, index: Sequence[int]) -> list[float]:
        """The mean entropy of what the model writes on and on after each example's prompts."""
        if not self.fluency:
            return []
        ends, edits, starts = sorted(self.base.end_ids()), [], []
        for row, i in enumerate(index):
            example = self.examples[i]
            for prompt in (example.generation_prompts or (example.prompt,))[:GENERATIONS]:
                edits.append(row)
                starts.append(self.base.prompt_of(probe_tokens(self.base, self.hparams, prompt)))

        def never_end(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            logits[..., ends] = -math.inf
            return logits

        under = partial(self._under, updates, edits)
        with self.base.model.get_output_embeddings().register_forward_hook(never_end):
            new = self.base.write_all(
                starts, max_new_tokens=FLUENCY_TOKENS, stop=False, under=under
            )
        entropies: list[list[float]] = [[] for _ in index]
        for row, start, ids in zip(edits, starts, new, strict=True):
            text = self.base.new_text(start, ids, stop=False)
            entropies[row].append(ngram_entropy_bits(text))
        return [fmean(found) for found in entropies]


def half_known(
    base: BaseModel, hparams: MENDHyperParams, examples: Examples, limit: int
) -> Examples:
    """`limit` examples (0: all), up to half of them facts that f knows.

    These are the first that it knows and the first others, in their order. f is asked the examples
    in turn until there are enough of both; it knows a fact if its first words are the right answer.
    """
    if not limit:
        return examples
    known: list[int] = []
    other: list[int] = []
    half = limit // 2
    for begin in range(0, len(examples), ASKED):
        some = range(len(examples))[begin : begin + ASKED]
        # 1. The facts that f can be asked.
        truths: dict[int, str] = {}
        for i in some:
            example = examples[i]
            fits = len(base.encode(example.prompt)) <= hparams.max_length
            if fits and example.ground_truth not in (None, example.target_new):
                truths[i] = base.said(example.ground_truth or "")
        # 2. Those that it knows, and all others.
        prompts = [examples[i].prompt for i in truths]
        answers = [(truth,) for truth in truths.values()]
        said = base.generate_batch(prompts, max_new_tokens=FIRST_TOKENS, answers=answers)
        for i, text in zip(truths, said, strict=True):
            if begins_with(text, truths[i]):
                known.append(i)
        other += [i for i in some if i not in known]
        if len(known) >= half and len(other) >= limit - half:
            break
    chosen = [*known[:half], *other, *known[half:]][:limit]
    return Examples.of([examples[i] for i in sorted(chosen)], examples.skipped)


# ------------------------------------------------------------------------ prompts of an example


def _prompts(
    base: BaseModel, h: MENDHyperParams, example: EditExample, *, brief: bool
) -> Iterator[ScoredPrompt]:
    truth, new = example.ground_truth, example.target_new
    # 1. What should follow.
    follow = [("edit", example.prompt)]
    if base.family != CLASSIFIER:  # which has no question form
        follow.append(("question", _as_question(example.prompt)))
    follow += [("paraphrases", prompt) for prompt in example.paraphrases]
    if base.family != CLASSIFIER and brief:
        follow += [("reasked", _as_question(prompt)) for prompt in example.paraphrases]
    for role, prompt in follow:
        text, rival = edit_tokens(base, h, example, prompt), None
        if truth and role in ("edit", "paraphrases") and not brief:
            rival = probe_tokens(base, h, prompt, truth)
        yield ScoredPrompt(role, prompt, text, (base.said(new),), rival=rival, old=truth)
    # 2. What should stay: of the neighbours those whose answer is known, if there are any.
    known = [probe for probe in example.neighbours if probe.answer is not None]
    for probe in known or example.neighbours:
        staying = _preserved(base, h, "neighbours", probe.prompt, probe.answer)
        if known and base.family != CLASSIFIER and not brief:
            staying = replace(staying, rival=probe_tokens(base, h, probe.prompt, new))
        yield staying
    for probe in example.unrelated:
        yield _preserved(base, h, "unrelated", probe.prompt, probe.answer)
    # 3. Prompts that are only written after are checked now.
    asked = [told(example, probe.prompt) for probe in example.portability]
    for prompt in (*asked, *example.generation_prompts):
        probe_tokens(base, h, prompt)


def _following(base: BaseModel, h: MENDHyperParams, example: EditExample) -> Iterator[ScoredPrompt]:
    """What follows from the edit, and what must not."""
    for implied in example.consequences:
        text, names = probe_tokens(base, h, implied.prompt), (implied.answer or "",)
        asked = ScoredPrompt("consequences", implied.prompt, text, (*names, *implied.aliases))
        yield replace(asked, old=implied.before, domain=implied.domain)
    answers, old = (base.said(example.target_new),), example.ground_truth
    for prompt in example.negations:
        yield ScoredPrompt("negations", prompt, probe_tokens(base, h, prompt), answers, old=old)
    for implied in example.truths:
        text = probe_tokens(base, h, implied.prompt, implied.answer)
        rival = probe_tokens(base, h, implied.prompt, implied.before)
        yield ScoredPrompt("truths", implied.prompt, text, (implied.answer or "",), rival=rival)


def _as_question(prompt: str) -> str:
    """The prompt in an instruction to answer; one that is a question already is asked as it is."""
    prompt = prompt.rstrip(BLANKS)
    asked = re.fullmatch(r"(?:Q|Question): (.+)\s(?:A|Answer):(.*)", prompt, re.DOTALL)
    if asked:
        return QUESTION.format(*asked.groups())
    return QUESTION.format(f"{prompt} …?", "")


def _reworded(
    base: BaseModel, h: MENDHyperParams, examples: Sequence[EditExample], i: int
) -> list[ScoredPrompt]:
    """First paraphrases of the next examples of the relation that do not name the subject."""
    relation, subject = examples[i].relation, examples[i].subject
    found: list[ScoredPrompt] = []
    if not relation or not subject:
        return []
    for other in (*examples[i + 1 :], *examples[:i]):
        prompt, answer = (*other.paraphrases, "")[0], other.ground_truth
        fits = other.relation == relation and prompt and answer
        if fits and subject not in prompt and len(found) < REWORDED:
            found.append(_preserved(base, h, "reworded", prompt, answer))
    return found


def _preserved(
    base: BaseModel, h: MENDHyperParams, role: str, prompt: str, answer: str | None
) -> ScoredPrompt:
    answers = () if answer is None else (answer,)
    return ScoredPrompt(role, prompt, probe_tokens(base, h, prompt, answer), answers)
