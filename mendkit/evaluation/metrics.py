"""Scores of an example and of held-out text, from what a model reads and writes.

EasyEdit's `rewrite_acc` and `rephrase_acc` are `edit_success.tf_token` and `paraphrase.tf_token`.
Its `locality` is `….argmax_agreement` with the given answers as prefixes.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from ..data.examples import UNSPACED
from ..errors import DataError
from ..mend.updates import Updates
from ..mend.validation import POSITIONS_PER_PASS, SHARE_NAMES, Forced, forced
from ..models.base import BaseModel
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk
from .results import is_said, normalise

# Roles of the prompts that should stay as they were. Neighbours share the edit prompt's words,
# reworded ones a paraphrase's: only those show an editor that answers for a whole relation.
STAY = ("neighbours", "unrelated", "reworded")

PART_OF_ROLE = {**SHARE_NAMES, "portability": "portability", "truths": "truth"}

RENAMED = {
    ("question", "free_exact"): "edit_success.free_exact_question",
    ("reasked", "free_exact"): "paraphrase.free_exact_question",
    ("reworded", "argmax_agreement"): "neighbourhood.reworded_agreement",
    ("reworded", "kl_nats"): "neighbourhood.reworded_kl_nats",
    ("edit", "log_p.new"): "log_p.new",
    ("edit", "log_p.old"): "log_p.old",
}

# The name by role of a win: the answer is likelier than its rival.
WINS = {"edit": "es", "paraphrases": "ps", "neighbours": "ns"}


@dataclass(frozen=True)
class ScoredPrompt:
    """One prompt of an example and the texts that are read after it.

    `role`: an example's, "question" (the edit prompt asked as one), "reasked" (a paraphrase), or
    "reworded".
    `text`: the prompt with y where it should follow the edit, else with the answer it had.
    `answers`: what may be written, or of a prompt that should stay is known to be right.
    `rival`: with the other answer, y° after the edit and its paraphrases, y after a neighbour, the
    wrong one after a true/false question.
    `greedy`: with what f writes, for prompts that should stay and are written out.
    `old`: the answer before the edit, where it should follow.
    """

    role: str
    prompt: str
    text: Tokens
    answers: tuple[str, ...] = ()
    rival: Tokens | None = None
    greedy: Tokens | None = None
    old: str | None = None
    domain: str | None = None  # of a consequence

    @property
    def stops(self) -> tuple[str, ...]:
        """Answers whose full stops do not end what is written, the old one among them."""
        return (*self.answers, self.old) if self.old else self.answers

    def all(self) -> list[Tokens]:
        """Every text."""
        return [text for text in (self.text, self.rival, self.greedy) if text is not None]


@dataclass(frozen=True)
class Reading:
    """What a model makes of a prompt's texts, and what it writes (None: not asked)."""

    text: Forced
    rival: Forced | None = None
    greedy: Forced | None = None
    written: str | None = None


def words(text: str) -> list[str]:
    """The words of a text; of a script without spaces its letters."""
    return UNSPACED.sub(r" \g<0> ", text).split()


def _spaced(text: str) -> str:
    return f" {' '.join(words(normalise(text)))} "


def begins_with(text: str, answer: str) -> bool:
    """Whether the first words of a text are the answer, normalised."""
    return _spaced(text).startswith(_spaced(answer))


def prompt_scores(prompt: ScoredPrompt, read: Reading, before: Reading) -> dict[str, float]:
    """The scores of one prompt.

    Its `score`: a right answer is written, or the share of the answer's argmaxes that are f's.
    Without an edit nothing is compared with f.
    """
    if prompt.role in STAY:
        return _staying(prompt, read, before)
    said = read.written or ""
    if prompt.role == "truths" and read.rival is not None:
        right = float(fmean(read.text.logp) > fmean(read.rival.logp))
        return {"score": right, "accuracy": right}
    # "not Lyon, but Paris" says Lyon; "not Paris, but Lyon" is right.
    if prompt.role == "negations":
        leak = float(begins_with(said, prompt.answers[0]))
        return {"score": 1 - leak, "leak": leak}
    right = float(is_said(said, prompt.answers, prompt.old))
    scores = {"score": right, "free_exact": right}
    if prompt.domain is not None:
        scores[f"free_exact_{prompt.domain}"] = right
    if not prompt.text.targets:  # an implied question is only written after
        return scores
    # Teacher forcing counts y's tokens, not the end of text.
    count = len(prompt.text.targets) - prompt.text.ends
    hits = list(map(int.__eq__, read.text.argmax[:count], prompt.text.targets[:count]))
    answer = prompt.answers[0]
    scores |= {
        "tf_token": fmean(hits),
        "tf_exact": float(all(hits)),
        "free_gold_length": float(begins_with(said, answer)),  # cut where y ends
        "free_contains": float(_spaced(answer) in _spaced(said)),
        "log_p.new": fmean(read.text.logp[:count]),
    }
    if read.rival is not None:
        scores["log_p.old"] = fmean(read.rival.logp)
        scores[WINS[prompt.role]] = float(scores["log_p.new"] > scores["log_p.old"])
    return scores


def _staying(prompt: ScoredPrompt, read: Reading, before: Reading) -> dict[str, float]:
    """Agreement with f on a prompt that should stay as it was."""
    scores: dict[str, float] = {}
    if read.text.same:
        agreement = fmean(read.text.same)
        scores |= {"score": agreement, "argmax_agreement": agreement}
        if read.text.kl:
            scores["kl_nats"] = fmean(read.text.kl)
        if before.text.argmax == prompt.text.targets:  # f was right
            scores["retained"] = float(read.text.argmax == prompt.text.targets)
        if read.greedy is not None:
            scores["greedy_agreement"] = float(all(read.greedy.same))
    if read.rival is not None:
        scores["ns"] = float(fmean(read.text.logp) > fmean(read.rival.logp))
    return scores


def example_values(roles: Sequence[str], scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """An example's values by metric: the mean of each score over the prompts of a role."""
    collected: dict[tuple[str, str], list[float]] = {}
    for role, found in zip(roles, scores, strict=True):
        for score, value in found.items():
            collected.setdefault((role, score), []).append(value)
    values: dict[str, float] = {}
    for (role, score), each in collected.items():
        name = RENAMED.get((role, score))
        plain = score not in ("score", "log_p.new", "log_p.old")
        if name is None and role in PART_OF_ROLE and plain:
            name = f"{PART_OF_ROLE[role]}.{score}"
        if name is not None:
            values[name] = fmean(each)
    if "edit_success.free_exact_question" in values:  # its name in published protocols
        values["context.free_exact"] = values["edit_success.free_exact_question"]
    # MEND, equation 1: exact correctness over the edit and its paraphrases
    exact = collected["edit", "tf_exact"] + collected.get(("paraphrases", "tf_exact"), [])
    return values | {"edit_success.paper": fmean(exact)}


# ---------------------------------------------------------- text that has nothing to do with edits

TEXT_TOKENS, TEXT_WINDOW = 2048, 256


class TextScore(NamedTuple):
    """How a model reads held-out text: exp(Σ nll / Σ tokens), share of next tokens guessed."""

    perplexity: float
    accuracy: float


class HeldOutText:
    """The first `tokens` tokens of a text, in overlapping windows.

    Every token counts once, in the first window that holds it. So all but the first window's have
    at least half a window before them. `before` is how the unedited model reads the text.
    Raises DataError for a text of fewer than two tokens.
    """

    def __init__(
        self,
        trunk: FrozenTrunk,
        text: str,
        *,
        tokens: int = TEXT_TOKENS,
        window: int = TEXT_WINDOW,
    ) -> None:
        self.ids = ids = trunk.base.encode(text)[:tokens]
        self.windows = windows(ids, first_token(trunk.base), window=window)
        self.count = sum(len(part.scored) for part in self.windows)
        if not self.count:
            raise DataError(f"held-out text has {len(ids)} tokens; at least two are needed")
        trunk.fill(self.windows)
        (self.before,) = self.read(trunk, None, 1)

    def read(self, trunk: FrozenTrunk, updates: Updates | None, n_edits: int) -> list[TextScore]:
        """The text under each of `n_edits` edits."""
        nll, hits = [0.0] * n_edits, [0] * n_edits
        size = max(1, POSITIONS_PER_PASS // max(len(part.scored) for part in self.windows))
        for at in range(0, len(self.windows), size):
            chunk = self.windows[at : at + size]
            for e, read in enumerate(forced(trunk, [chunk] * n_edits, updates)):
                for text, value in zip(chunk, read, strict=True):
                    nll[e] -= sum(value.logp)
                    hits[e] += sum(map(int.__eq__, value.argmax, text.targets))
        scores = []
        for total, right in zip(nll, hits, strict=True):
            # kept finite
            perplexity = math.exp(min(total / self.count, 700.0))
            scores.append(TextScore(perplexity, right / self.count))
        return scores


def first_token(base: BaseModel) -> list[int]:
    """The token with which the tokenizer begins every text, if it does."""
    first = base.tokenizer("a")["input_ids"][:1]
    return first if first == [base.tokenizer.bos_token_id] else []


def windows(ids: Sequence[int], prefix: Sequence[int], *, window: int) -> list[Tokens]:
    """Windows of at most `window` tokens with `prefix`; all but the first token are scored once."""
    begin_scored = len(prefix) - 1
    out, done, size = [], 0 if prefix else 1, window - len(prefix)
    while done < len(ids):
        end = min(len(ids), max(size, done + size // 2))
        begin = max(0, end - size)
        scored = range(begin_scored + done - begin, begin_scored + end - begin)
        out.append(Tokens((*prefix, *ids[begin:end]), tuple(scored), tuple(ids[done:end])))
        done = end
    return out


def ngram_entropy_bits(text: str) -> float:
    """Fluency (Meng et al., 2022): (⅔ H₂ + 4⁄3 H₃) / 2, H_n the entropy of word n-grams."""
    found, entropies = words(text), []
    for n in (2, 3):
        counts = Counter(zip(*(found[k:] for k in range(n)), strict=False))
        shares = [count / counts.total() for count in counts.values()]
        entropies.append(-sum(share * math.log2(share) for share in shares))
    two, three = entropies
    return (2 / 3 * two + 4 / 3 * three) / 2
