"""The scores of one edit, from what the models read and wrote: pure functions.

EasyEdit's `rewrite_acc` and `rephrase_acc` are `edit_success.tf_token` and `paraphrase.tf_token` (target tokens guessed
with the right ones before them); its `locality` is `….argmax_agreement`, under the given answers as prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..data.examples import Probe
from ..mend.scoring import Forced
from ..models.tokens import Tokens
from .results import normalise


@dataclass(frozen=True)
class Card:
    """All texts of one example that are read under its edit. Target texts end with the end of text if `add_eos`."""

    prompts: tuple[str, ...]  # the edit prompt, its question form, the paraphrases
    targets: tuple[Tokens, ...]  # those with y
    old: tuple[Tokens, ...]  # the edit prompt and the paraphrases with y°; empty if y° is unknown
    neighbours: tuple[Tokens, ...]  # with their answers
    rivals: tuple[Tokens, ...]  # neighbours with known answers, with y instead
    unrelated: tuple[Tokens, ...]
    greedy: tuple[
        Tokens, ...
    ] = ()  # one neighbour and one unrelated prompt, each with what f writes there
    reworded: tuple[
        Tokens, ...
    ] = ()  # paraphrases of other examples of the relation, with their old answers


def answers_probe(said: str, probe: Probe) -> bool:
    return normalise(said) in {normalise(name) for name in (probe.answer or "", *probe.aliases)}


def target_values(
    target: str, card: Card, read: Sequence[Forced], written: Sequence[str]
) -> dict[str, float]:
    """Success on the edit prompt (bare and as a question) and on the paraphrases."""
    scores = [
        _success(target, t, v, w) for t, v, w in zip(card.targets, read, written, strict=True)
    ]
    bare, question, paraphrases = scores[0], scores[1], scores[2:]
    out = {f"edit_success.{name}": value for name, value in bare.items()}
    if card.prompts[1] != card.prompts[0]:  # a classifier has no question form
        out["edit_success.free_exact_question"] = question["free_exact"]
    if paraphrases:
        out |= {f"paraphrase.{name}": fmean(s[name] for s in paraphrases) for name in bare}
    out["edit_success.paper"] = fmean(
        s["tf_exact"] for s in (bare, *paraphrases)
    )  # MEND, equation 1
    return out


def _success(target: str, text: Tokens, value: Forced, written: str) -> dict[str, float]:
    """The scores of one prompt; teacher forcing counts y's own tokens, not the end of text.

    `free_gold_length` is free decoding that stops where y does: what follows is not looked at.
    """
    n = len(text.targets) - text.ends
    hits = [a == b for a, b in zip(value.argmax[:n], text.targets[:n], strict=True)]
    want, got = normalise(target), normalise(written)
    return {
        "tf_token": fmean(hits),
        "tf_exact": float(all(hits)),
        "free_exact": float(got == want),
        "free_gold_length": float(f"{got} ".startswith(f"{want} ")),
        "free_contains": float(f" {want} " in f" {got} "),
    }


def probability_values(
    card: Card, targets: Sequence[Forced], pairs: Sequence[Forced], kept: Sequence[Forced]
) -> dict[str, float]:
    """Efficacy scores: P(y) > P(y°) on the prompt and the paraphrases, P(answer) > P(y) on neighbours."""
    new = [
        fmean(v.logp[: len(t.targets) - t.ends]) for t, v in zip(card.targets, targets, strict=True)
    ]
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
        wins = [
            float(fmean(a.logp) > fmean(b.logp)) for a, b in zip(kept, pairs[n_old:], strict=False)
        ]
        out["neighbourhood.ns"] = fmean(wins)
    return out


def locality_values(
    card: Card, kept: Sequence[Forced], before: Sequence[Forced]
) -> dict[str, float]:
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
    greedy = zip(
        [name for name, (a, b) in parts.items() if a < b],
        kept[m : m + len(card.greedy)],
        strict=True,
    )
    return out | {f"{name}.greedy_agreement": float(all(v.same)) for name, v in greedy}
