"""The scores of one example, from what a model reads and writes after its prompts: pure functions.

EasyEdit's `rewrite_acc` and `rephrase_acc` are `edit_success.tf_token` and `paraphrase.tf_token`;
its `locality` is `….argmax_agreement`, under the given answers as prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..data.examples import Probe
from ..mend.scoring import Forced
from ..models.tokens import Tokens
from .results import normalise

FOLLOW = ("edit", "question", "paraphrases")
"""Roles of the prompts that should follow the edit; `question` is the edit prompt asked as one."""

STAY = ("neighbours", "unrelated", "reworded")
"""Roles of the prompts that should stay as they were.

Neighbours share the edit prompt's words. Reworded ones are other subjects in a paraphrase's words:
only they show an editor that wins paraphrases by answering a whole relation.
"""

PARTS = {
    "edit": "edit_success",
    "paraphrases": "paraphrase",
    "neighbours": "neighbourhood",
    "unrelated": "locality",
}
REWORDED_NAMES = {"argmax_agreement": "reworded_agreement", "kl_nats": "reworded_kl_nats"}
WINS = {"edit": "es", "paraphrases": "ps", "neighbours": "ns"}


@dataclass(frozen=True)
class ScoredPrompt:
    """One prompt of an example and the texts that are read after it.

    `text` is the prompt with its answer: y where it should follow the edit, else the answer it had.
    `rival` has the other answer: y° after the edit and its paraphrases, y after a neighbour.
    `greedy` has what f writes, where a prompt that should stay is written out.
    """

    role: str
    prompt: str
    text: Tokens
    rival: Tokens | None = None
    greedy: Tokens | None = None

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


def following_scores(target: str, prompt: ScoredPrompt, read: Reading) -> dict[str, float]:
    """Success on one prompt that should follow the edit to `target`.

    Teacher forcing counts y's tokens, not the end of text. `free_gold_length` is free decoding
    that stops where y does: what follows is not looked at.
    """
    count = len(prompt.text.targets) - prompt.text.ends
    targets, argmax = prompt.text.targets[:count], read.text.argmax[:count]
    hits = [guess == token for guess, token in zip(argmax, targets, strict=True)]
    want, got = normalise(target), normalise(read.written or "")
    scores = {
        "tf_token": fmean(hits),
        "tf_exact": float(all(hits)),
        "free_exact": float(got == want),
        "free_gold_length": float(f"{got} ".startswith(f"{want} ")),
        "free_contains": float(f" {want} " in f" {got} "),
        "log_p": fmean(read.text.logp[:count]),
    }
    if read.rival is not None:
        scores["log_p_old"] = fmean(read.rival.logp)
        scores[WINS[prompt.role]] = float(scores["log_p"] > scores["log_p_old"])
    return scores


def staying_scores(prompt: ScoredPrompt, read: Reading, before: Reading) -> dict[str, float]:
    """Agreement with f on one prompt that should stay as it was; without an edit only `ns`."""
    scores = {}
    if read.rival is not None:
        scores["ns"] = float(fmean(read.text.logp) > fmean(read.rival.logp))
    if read.text.same:
        scores["argmax_agreement"] = fmean(read.text.same)
        scores["kl_nats"] = fmean(read.text.kl)
        if before.text.argmax == prompt.text.targets:  # f was right
            scores["retained"] = float(read.text.argmax == prompt.text.targets)
    if read.greedy is not None:
        scores["greedy_agreement"] = float(all(read.greedy.same))
    return scores


def example_values(
    prompts: Sequence[ScoredPrompt], scores: Sequence[dict[str, float]]
) -> dict[str, float]:
    """An example's values by metric: the mean of each score over the prompts of a role."""
    values: dict[str, float] = {}
    by_role: dict[str, list[dict[str, float]]] = {}
    for prompt, found in zip(prompts, scores, strict=True):
        by_role.setdefault(prompt.role, []).append(found)
    for role, part in PARTS.items():
        for name, mean in _means(by_role.get(role, [])).items():
            if not name.startswith("log_p"):
                values[f"{part}.{name}"] = mean
    reworded = _means(by_role.get("reworded", []))
    for name, short in REWORDED_NAMES.items():
        if name in reworded:
            values[f"neighbourhood.{short}"] = reworded[name]
    (edit,), paraphrases = by_role["edit"], by_role.get("paraphrases", [])
    # MEND, equation 1: exact correctness over the edit and its paraphrases
    values["edit_success.paper"] = fmean(found["tf_exact"] for found in (edit, *paraphrases))
    if "question" in by_role:
        values["edit_success.free_exact_question"] = by_role["question"][0]["free_exact"]
    values["log_p.new"] = edit["log_p"]
    if "log_p_old" in edit:
        values["log_p.old"] = edit["log_p_old"]
    return values


def _means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over the prompts that have it."""
    collected: dict[str, list[float]] = {}
    for found in scores:
        for name, value in found.items():
            collected.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in collected.items()}
