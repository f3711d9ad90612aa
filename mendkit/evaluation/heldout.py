"""Text that has nothing to do with the edits: perplexity and accuracy on held-out text, fluency of free text.

Perplexity is exp(Σ nll / Σ tokens): every token of the text counts once and alike. The text is cut into overlapping
windows; a token is scored in the first window that holds it, so that all but the first window's have at least half a
window before them.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import DataError
from ..mend.scoring import POSITIONS_PER_PASS, Forced, forced
from ..mend.updates import Updates
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk

WINDOW, TEXT_TOKENS = 256, 2048


@dataclass(frozen=True)
class TextScore:
    """How a model reads the held-out text: mean negative log-likelihood (nats), share of next tokens guessed."""

    nll: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """exp(nll), kept finite."""
        return math.exp(min(self.nll, 700.0))

    def drawdown(self, before: "TextScore") -> dict[str, float]:
        """What was lost since `before`: perplexity gained, accuracy given up (MEND, section 3)."""
        lost = before.accuracy - self.accuracy
        return {
            "drawdown.perplexity": self.perplexity - before.perplexity,
            "drawdown.accuracy": lost,
        }


class HeldOutText:
    """The first `tokens` tokens of a text, prepared for one base model; `before` is how the unedited model reads it."""

    def __init__(
        self, trunk: FrozenTrunk, text: str, /, *, tokens: int = TEXT_TOKENS, window: int = WINDOW
    ) -> None:
        self.trunk, tokenizer = trunk, trunk.base.tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
        start = tokenizer("a")["input_ids"][0]
        prefix = (
            [start] if start == tokenizer.bos_token_id else []
        )  # where the tokenizer begins every text with it
        self.windows = windows(ids, prefix, window=window)
        self.count = sum(len(w.scored) for w in self.windows)
        if not self.count:
            raise DataError(f"held-out text has {len(ids)} tokens; at least two are needed")
        trunk.fill(self.windows)
        (self.before,) = self.read(None, 1)

    def at(self, trunk: FrozenTrunk, /) -> "HeldOutText":
        """The same text on another trunk of the same model."""
        other = copy.copy(self)
        other.trunk = trunk
        trunk.fill(self.windows)
        return other

    def read(self, updates: Updates | None, n_edits: int, /) -> list[TextScore]:
        """The text under each of `n_edits` edits."""
        nll, hits = [0.0] * n_edits, [0] * n_edits
        for chunk in self._chunks():
            for e, read in enumerate(forced(self.trunk, [chunk] * n_edits, updates)):
                nll[e] -= sum(sum(value.logp) for value in read)
                hits[e] += sum(_hits(text, value) for text, value in zip(chunk, read, strict=True))
        return [TextScore(a / self.count, b / self.count) for a, b in zip(nll, hits, strict=True)]

    def _chunks(self) -> Iterator[list[Tokens]]:
        chunk: list[Tokens] = []
        for window in self.windows:
            if chunk and sum(len(w.scored) for w in (*chunk, window)) > POSITIONS_PER_PASS:
                yield chunk
                chunk = []
            chunk.append(window)
        yield chunk


def _hits(text: Tokens, value: Forced) -> int:
    return sum(a == b for a, b in zip(value.argmax, text.targets, strict=True))


def windows(ids: Sequence[int], prefix: Sequence[int], /, *, window: int) -> list[Tokens]:
    """Windows of at most `window` tokens, `prefix` included; every token after the first one is scored exactly once."""
    p = len(prefix)
    out, done, size = [], 0 if prefix else 1, window - p
    while done < len(ids):
        end = min(len(ids), max(size, done + size // 2))
        begin = max(0, end - size)
        scored = tuple(p + t - begin - 1 for t in range(done, end))
        out.append(Tokens((*prefix, *ids[begin:end]), scored, tuple(ids[done:end])))
        done = end
    return out


def ngram_entropy_bits(text: str) -> float:
    """Fluency (Meng et al., 2022): (⅔ H₂ + 4⁄3 H₃) / 2 with H_n the entropy in bits of the text's word n-grams."""
    words = text.split()
    return (
        2 / 3 * _entropy(list(pairwise(words)))
        + 4 / 3 * _entropy(list(zip(words, words[1:], words[2:])))
    ) / 2  # noqa: B905


def _entropy(values: Sequence[tuple[str, ...]]) -> float:
    counts = Counter(values)
    return -sum(c / len(values) * math.log2(c / len(values)) for c in counts.values())
