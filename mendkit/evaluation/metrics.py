"""The scores of one example, from what a model reads and writes after its prompts: pure functions.

EasyEdit's `rewrite_acc` and `rephrase_acc` are `edit_success.tf_token` and `paraphrase.tf_token`;
its `locality` is `….argmax_agreement`, under the given answers as prefixes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..data.examples import Probe
from ..mend.validation import Forced
from ..models.tokens import Tokens
from .results import normalise

STAY = ("neighbours", "unrelated", "reworded")
"""Roles of the prompts that should stay as they were.

Neighbours share the edit prompt's words. Reworded ones are other subjects in a paraphrase's words:
only they show an editor that wins paraphrases by answering a whole relation.
"""

PART_OF_ROLE = {
    "edit": "edit_success",
    "paraphrases": "paraphrase",
    "neighbours": "neighbourhood",
    "unrelated": "locality",
    "portability": "portability",
}
WINS = {"edit": "es", "paraphrases": "ps", "neighbours": "ns"}
"""What it is called, by role, that the answer is likelier than its rival."""


@dataclass(frozen=True)
class ScoredPrompt:
    """One prompt of an example and the texts that are read after it.

    Its `role` is one of an example's, "question" (the edit prompt asked as one), or "reworded".
    `text` is the prompt with y where it should follow the edit, else with the answer it had.
    `rival` has the other answer: y° after the edit and its paraphrases, y after a neighbour.
    `greedy` has what f writes, where a prompt that should stay is written out.
    """

    role: str
    prompt: str
    text: Tokens
    rival: Tokens | None = None
    greedy: Tokens | None = None
    probe: Probe | None = None  # whose answer the edit implies

    def all(self) -> tuple[Tokens, ...]:
        """Every text."""
        return tuple(text for text in (self.text, self.rival, self.greedy) if text is not None)


@dataclass(frozen=True)
class Reading:
    """What one model makes of a prompt's texts, and what it writes (None: not asked)."""

    text: Forced
    rival: Forced | None = None
    greedy: Forced | None = None
    written: str | None = None


def answers_probe(said: str, probe: Probe) -> bool:
    """Whether a text is the probe's answer or one of its aliases."""
    return normalise(said) in {normalise(name) for name in (probe.answer or "", *probe.aliases)}


def prompt_scores(
    target: str, prompt: ScoredPrompt, read: Reading, before: Reading
) -> dict[str, float]:
    """The scores of one prompt of an edit to `target`.

    Its `score` is whether the right answer is written, or the share of the answer's tokens whose
    argmax is f's. Without an edit nothing is compared with f.
    """
    if prompt.probe is not None:
        right = float(answers_probe(read.written or "", prompt.probe))
        return {"score": right, "free_exact": right}
    if prompt.role in STAY:
        return _staying(prompt, read, before)
    return _following(target, prompt, read)


def _following(target: str, prompt: ScoredPrompt, read: Reading) -> dict[str, float]:
    """Success on a prompt that should follow the edit.

    Teacher forcing counts y's tokens, not the end of text. `free_gold_length` is free decoding
    that stops where y does: what follows is not looked at.
    """
    count = len(prompt.text.targets) - prompt.text.ends
    targets, argmax = prompt.text.targets[:count], read.text.argmax[:count]
    hits = [guess == token for guess, token in zip(argmax, targets, strict=True)]
    want, got = normalise(target), normalise(read.written or "")
    scores = {
        "score": float(got == want),
        "tf_token": fmean(hits),
        "tf_exact": float(all(hits)),
        "free_exact": float(got == want),
        "free_gold_length": float(f"{got} ".startswith(f"{want} ")),
        "free_contains": float(f" {want} " in f" {got} "),
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
        for name, value in found.items():
            collected.setdefault((role, name), []).append(value)
    means = {key: fmean(values) for key, values in collected.items()}
    values: dict[str, float] = {}
    for (role, name), mean in means.items():
        if name.startswith("log_p"):
            if role == "edit":
                values[name] = mean
        elif role in PART_OF_ROLE and name != "score":
            values[f"{PART_OF_ROLE[role]}.{name}"] = mean
    for (role, name), renamed in RENAMED.items():
        if (role, name) in means:
            values[renamed] = means[role, name]
    # MEND, equation 1: exact correctness over the edit and its paraphrases
    exact = collected["edit", "tf_exact"] + collected.get(("paraphrases", "tf_exact"), [])
    values["edit_success.paper"] = fmean(exact)
    return values


RENAMED = {
    ("question", "free_exact"): "edit_success.free_exact_question",
    ("reworded", "argmax_agreement"): "neighbourhood.reworded_agreement",
    ("reworded", "kl_nats"): "neighbourhood.reworded_kl_nats",
}
