"""Examples prepared for scoring: their texts as tokens, the trunk, and the unedited model's values.

f is the unedited model, f' the edited one, y the new answer. Where reading y under f' shows that
every argmax, the end included, is y's own token, greedy decoding must retrace y and is not run.
Likewise f' writes what f wrote if it retraces that.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ..data.examples import EditExample
from ..errors import DataError, LimitError, MendkitError
from ..hparams import MENDHyperParams
from ..mend.batches import edit_tokens, told
from ..mend.updates import Updates
from ..mend.validation import forced
from ..models.base import BaseModel
from ..models.families import CAUSAL, CLASSIFIER
from ..models.sites import Site
from ..models.text import STOP
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk
from .decoding import write
from .heldout import TEXT_TOKENS, HeldOutText, ngram_entropy_bits
from .metrics import STAY, Reading, ScoredPrompt, answers_probe, example_values, prompt_scores
from .results import EditRow, normalise

QUESTION = "Answer in a few words, without a full sentence.\nQuestion: {prompt} …?\nAnswer:"
REWORDED = 2
GENERATIONS, FLUENCY_TOKENS = 3, 100


@dataclass(frozen=True)
class Scores:
    """What one example comes to under one edit."""

    values: dict[str, float]  # by metric
    written: list[str | None]  # after each prompt
    scores: list[dict[str, float]]  # of each prompt


class EvaluationSet:
    """Examples prepared for scoring any number of editors of one model.

    Examples whose texts cannot be tokenised are counted in `skipped` and `reasons`, not scored.
    On request: drawdown on the first `text_tokens` tokens of a held-out `text`, `fluency`, and what
    is written after more than the first `written` neighbours, unrelated and reworded prompts.
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
        written: int = 1,
    ) -> None:
        if base.family != CAUSAL and (fluency or text is not None):
            raise MendkitError(f"{base.name}: fluency and held-out text need a causal model")
        self.base, self.hparams = base, hparams
        self.max_new_tokens, self.fluency = max_new_tokens, fluency
        self._elsewhere: dict[tuple[Site, ...], EvaluationSet] = {}
        self._prepare(examples)
        self._add_reworded()
        self._add_implied()
        self._add_greedy(written)
        self.trunk = FrozenTrunk(base)
        self.trunk.fill(self._texts())
        self.text = None if text is None else HeldOutText(self.trunk, text, tokens=text_tokens)
        self.read_before = self._read(None, range(len(self)))
        self.before = self.score(None, range(len(self)))

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
            other.trunk.fill(self._texts())
            other.text = self.text and self.text.at(other.trunk)
            self._elsewhere[base.sites] = other
        return self._elsewhere[base.sites]

    @property
    def to_edit(self) -> list[int]:
        """The examples whose new answer f does not write already."""
        written = [scores.values["edit_success.free_exact"] for scores in self.before]
        return [index for index, already in enumerate(written) if not already]

    def score(self, updates: Updates | None, index: Sequence[int]) -> list[Scores]:
        """Scores of the examples `index`, each under its edit in `updates` (None: unedited)."""
        read = self.read_before if updates is None else self._read(updates, index)
        fluency = self._fluency(updates, index) if self.fluency else None
        out = []
        for row, i in enumerate(index):
            target = self.base.said(self.examples[i].target_new)
            columns = zip(self.prompts[i], read[row], self.read_before[i], strict=True)
            scores = [prompt_scores(target, *column) for column in columns]
            values = example_values([prompt.role for prompt in self.prompts[i]], scores)
            coverage = self.coverage[i]
            if coverage is not None:
                values["portability.coverage"] = coverage
            if fluency is not None:
                values["fluency.entropy_bits"] = fluency[row]
            out.append(Scores(values, [reading.written for reading in read[row]], scores))
        return out

    def row(self, i: int, after: Scores, more: dict[str, float]) -> EditRow:
        """One example's scores after an edit, with `more` values, beside those before it."""
        example, before = self.examples[i], self.before[i]
        values = after.values | more
        values |= {f"before.{name}": value for name, value in before.values.items()}
        outputs = []
        columns = zip(self.prompts[i], before.written, after.written, after.scores)  # noqa: B905
        for prompt, old, new, scores in columns:
            about = {"role": prompt.role, "prompt": prompt.prompt, "before": old, "after": new}
            outputs.append(about | scores)
        return EditRow(
            index=i,
            id=example.id,
            relation=example.relation,
            prompt=example.prompt,
            target_new=example.target_new,
            ground_truth=example.ground_truth,
            values=values,
            outputs=tuple(outputs),
            subject=example.subject,
        )

    # ------------------------------------------------------------------------------- preparing

    def _prepare(self, examples: Sequence[EditExample]) -> None:
        """Tokenise the examples; count those that cannot be."""
        self.examples: list[EditExample] = []
        self.prompts: list[list[ScoredPrompt]] = []
        self.skipped: list[str] = []
        self.reasons = Counter(invalid_records=len(getattr(examples, "skipped", ())))
        for example in examples:
            try:
                if not normalise(example.target_new):  # any silence would pass for it
                    self.reasons["empty_target"] += 1
                    about = f"target_new {example.target_new!r} of {example.prompt!r}"
                    raise DataError(f"{about} has no words")
                self.prompts.append(self._prompts_of(example))
                self.examples.append(example)
            except DataError as error:
                self.skipped.append(str(error))
                self.reasons["too_long"] += isinstance(error, LimitError)
        if not self.examples:
            first = self.skipped[0] if self.skipped else "no example given"
            raise DataError(f"no example can be scored; first problem: {first}")

    def _prompts_of(self, e: EditExample) -> list[ScoredPrompt]:
        classifies = self.base.family == CLASSIFIER
        out = []
        for role, prompt in (("edit", e.prompt), *(("paraphrases", p) for p in e.paraphrases)):
            rival = self._tokens(prompt, e.ground_truth) if e.ground_truth else None
            out.append(ScoredPrompt(role, prompt, self._target_tokens(e, prompt), rival))
        if not classifies:  # which has no question form
            question = QUESTION.format(prompt=e.prompt)
            out.insert(1, ScoredPrompt("question", question, self._target_tokens(e, question)))
        known = [probe for probe in e.neighbours if probe.answer is not None]
        for probe in known or e.neighbours:
            competes = bool(known) and not classifies
            rival = self._tokens(probe.prompt, e.target_new) if competes else None
            text = self._tokens(probe.prompt, probe.answer)
            out.append(ScoredPrompt("neighbours", probe.prompt, text, rival))
        for probe in e.unrelated:
            text = self._tokens(probe.prompt, probe.answer)
            out.append(ScoredPrompt("unrelated", probe.prompt, text))
        # Prompts that are only written after are checked now.
        for prompt in (*(told(e, p.prompt) for p in e.portability), *e.generation_prompts):
            self._tokens(prompt)
        return out

    def _target_tokens(self, e: EditExample, prompt: str) -> Tokens:
        return edit_tokens(self.base, self.hparams, e, prompt)

    def _tokens(self, prompt: str, answer: str | None = None) -> Tokens:
        return self.base.tokenize(prompt, answer, max_length=self.hparams.max_length)

    def _add_reworded(self) -> None:
        """First paraphrases of the next examples of the relation that do not name the subject."""
        for i, example in enumerate(self.examples):
            if not example.relation or not example.subject:
                continue
            others = [
                other
                for other in (*self.examples[i + 1 :], *self.examples[:i])
                if other.relation == example.relation
                and other.paraphrases
                and other.ground_truth
                and example.subject not in other.paraphrases[0]
            ]
            for other in others[:REWORDED]:
                text = self._tokens(other.paraphrases[0], other.ground_truth)
                self.prompts[i].append(ScoredPrompt("reworded", other.paraphrases[0], text))

    def _add_implied(self) -> None:
        """The implied questions that f answers when told the new fact, and their share."""
        asked = [(i, probe) for i, e in enumerate(self.examples) for probe in e.portability]
        prompts = [told(self.examples[i], probe.prompt) for i, probe in asked]
        said = self.base.generate_batch(prompts, max_new_tokens=self.max_new_tokens)
        known: list[list[bool]] = [[] for _ in self.examples]
        for (i, probe), text in zip(asked, said, strict=True):
            known[i].append(answers_probe(text, probe))
            if known[i][-1]:
                tokens = self._tokens(probe.prompt)
                prompt = ScoredPrompt("portability", probe.prompt, tokens, probe=probe)
                self.prompts[i].append(prompt)
        self.coverage = [fmean(found) if found else None for found in known]

    def _add_greedy(self, most: int) -> None:
        """What f writes after the first `most` prompts of each role that should stay."""
        chosen: list[tuple[int, int]] = []
        for i, prompts in enumerate(self.prompts):
            seen: Counter[str] = Counter()
            for k, prompt in enumerate(prompts):
                seen[prompt.role] += 1
                if prompt.role in STAY and seen[prompt.role] <= most:
                    chosen.append((i, k))
        starts = [self.base.prompt_of(self.prompts[i][k].text) for i, k in chosen]
        unique = list(dict.fromkeys(starts))
        limit = self.max_new_tokens
        new = write(self.base, unique, None, range(len(unique)), max_new_tokens=limit)
        if self.base.eos_id is not None and self.base.family != CLASSIFIER:
            for ids in new:  # the end of text is part of what f wrote
                stopped = STOP.search(self.base.new_text([], ids, stop=False))
                if len(ids) < limit and not stopped:
                    ids.append(self.base.eos_id)
        written = dict(zip(unique, new, strict=True))
        for (i, k), start in zip(chosen, starts, strict=True):
            greedy = self.base.continued(start, written[start])
            self.prompts[i][k] = replace(self.prompts[i][k], greedy=greedy)

    def _texts(self) -> list[Tokens]:
        """Every text that is read, not written."""
        return [text for prompts in self.prompts for prompt in prompts for text in prompt.all()]

    # -------------------------------------------------------------------- reading and writing

    def _read(self, updates: Updates | None, index: Sequence[int]) -> list[list[Reading]]:
        """What the model reads and writes at each prompt of the examples `index`."""
        # 1. Read every text once.
        texts = [[text for p in self.prompts[i] for text in p.all()] for i in index]
        read = forced(self.trunk, texts, updates, compare=updates is not None)
        out: list[list[Reading]] = []
        for i, values in zip(index, read, strict=True):
            queue = iter(values)
            out.append([])
            for prompt in self.prompts[i]:
                text, rival, greedy = next(queue), None, None
                if prompt.rival is not None:
                    rival = next(queue)
                if prompt.greedy is not None:
                    greedy = next(queue)
                out[-1].append(Reading(text, rival, greedy))
        # 2. Write after each prompt where reading did not settle what is written.
        todo: list[tuple[int, int, Tokens]] = []
        for row, i in enumerate(index):
            for k, prompt in enumerate(self.prompts[i]):
                written = self._settled(self.examples[i], prompt, out[row][k])
                out[row][k] = replace(out[row][k], written=written)
                if written is None and (prompt.role not in STAY or prompt.greedy is not None):
                    todo.append((row, k, self.base.prompt_of(prompt.text)))
        starts, edits = [start for _, _, start in todo], [row for row, _, _ in todo]
        new = write(self.base, starts, updates, edits, max_new_tokens=self.max_new_tokens)
        for (row, k, start), ids in zip(todo, new, strict=True):
            out[row][k] = replace(out[row][k], written=self.base.new_text(start, ids))
        return out

    def _settled(self, example: EditExample, prompt: ScoredPrompt, read: Reading) -> str | None:
        """What greedy decoding must write, if reading says so."""
        if prompt.greedy and read.greedy and all(read.greedy.same):
            return self.base.new_text(self.base.prompt_of(prompt.greedy), prompt.greedy.targets)
        target = example.target_new
        may_retrace = prompt.text.targets and prompt.role not in STAY and self.hparams.add_eos
        if may_retrace and read.text.argmax == prompt.text.targets and not STOP.search(target):
            return f" {self.base.said(target)}"
        return None

    def _fluency(self, updates: Updates | None, index: Sequence[int]) -> list[float]:
        """The mean entropy of what the model writes on and on after each example's prompts."""
        edits, starts = [], []
        for row, i in enumerate(index):
            prompts = self.examples[i].generation_prompts or (self.examples[i].prompt,)
            for prompt in prompts[:GENERATIONS]:
                edits.append(row)
                starts.append(self.base.prompt_of(self._tokens(prompt)))
        limit = FLUENCY_TOKENS
        new = write(self.base, starts, updates, edits, max_new_tokens=limit, endless=True)
        entropies: list[list[float]] = [[] for _ in index]
        for row, start, ids in zip(edits, starts, new, strict=True):
            text = self.base.new_text(start, ids, stop=False)
            entropies[row].append(ngram_entropy_bits(text))
        return [fmean(found) for found in entropies]
