"""Text that has nothing to do with the edits: perplexity on held-out text, fluency of free text.

Perplexity is exp(Σ nll / Σ tokens): every token of the text counts once and alike. The text is cut
into overlapping windows. A token is scored in the first window that holds it, so all but the first
window's have at least half a window before them.
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError
from ..mend.updates import Updates
from ..mend.validation import POSITIONS_PER_PASS, forced
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk

WINDOW, TEXT_TOKENS = 256, 2048


@dataclass(frozen=True)
class TextScore:
    """How a model reads the held-out text: mean NLL (nats), share of next tokens guessed."""

    nll: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """exp(nll), kept finite."""
        return math.exp(min(self.nll, 700.0))

    def drawdown(self, before: "TextScore") -> dict[str, float]:
        """Perplexity gained and accuracy lost since `before` (MEND, section 3)."""
        gained = self.perplexity - before.perplexity
        lost = before.accuracy - self.accuracy
        return {"drawdown.perplexity": gained, "drawdown.accuracy": lost}


class HeldOutText:
    """The first `tokens` tokens of a text for one model; `before` is how the unedited one reads it.

    Raises DataError for a text of fewer than two tokens.
    """

    def __init__(
        self, trunk: FrozenTrunk, text: str, *, tokens: int = TEXT_TOKENS, window: int = WINDOW
    ) -> None:
        tokenizer = trunk.base.tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
        # What the tokenizer begins every text with, every window begins with.
        first = tokenizer("a")["input_ids"][:1]
        prefix = first if first == [tokenizer.bos_token_id] else []
        self.windows = windows(ids, prefix, window=window)
        self.count = sum(len(part.scored) for part in self.windows)
        if not self.count:
            raise DataError(f"held-out text has {len(ids)} tokens; at least two are needed")
        self.trunk = trunk
        trunk.fill(self.windows)
        (self.before,) = self.read(None, 1)

    def at(self, trunk: FrozenTrunk) -> "HeldOutText":
        """The same text on another trunk of the same model."""
        other = copy.copy(self)
        other.trunk = trunk
        trunk.fill(self.windows)
        return other

    def read(self, updates: Updates | None, n_edits: int) -> list[TextScore]:
        """The text under each of `n_edits` edits."""
        nll, hits = [0.0] * n_edits, [0] * n_edits
        size = max(1, POSITIONS_PER_PASS // max(len(part.scored) for part in self.windows))
        for at in range(0, len(self.windows), size):
            chunk = self.windows[at : at + size]
            for e, read in enumerate(forced(self.trunk, [chunk] * n_edits, updates)):
                for text, value in zip(chunk, read, strict=True):
                    nll[e] -= sum(value.logp)
                    hits[e] += sum(map(int.__eq__, value.argmax, text.targets))
        scores = zip(nll, hits, strict=True)
        return [TextScore(total / self.count, right / self.count) for total, right in scores]


def windows(ids: Sequence[int], prefix: Sequence[int], *, window: int) -> list[Tokens]:
    """Windows of at most `window` tokens with `prefix`; all but the first token are scored once."""
    begin_scored = len(prefix) - 1
    out, done, size = [], 0 if prefix else 1, window - len(prefix)
    while done < len(ids):
        end = min(len(ids), max(size, done + size // 2))
        begin = max(0, end - size)
        scored = tuple(begin_scored + at - begin for at in range(done, end))
        out.append(Tokens((*prefix, *ids[begin:end]), scored, tuple(ids[done:end])))
        done = end
    return out


def ngram_entropy_bits(text: str) -> float:
    """Fluency (Meng et al., 2022): (⅔ H₂ + 4⁄3 H₃) / 2.

    H_n is the entropy in bits of the text's word n-grams.
    """
    words = text.split()
    two = _entropy([tuple(words[at : at + 2]) for at in range(len(words) - 1)])
    three = _entropy([tuple(words[at : at + 3]) for at in range(len(words) - 2)])
    return (2 / 3 * two + 4 / 3 * three) / 2


def _entropy(values: Sequence[tuple[str, ...]]) -> float:
    shares = [count / len(values) for count in Counter(values).values()]
    return -sum(share * math.log2(share) for share in shares)
