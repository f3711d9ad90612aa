"""Edit examples: what is to be edited, and what should and should not follow from it."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import harmonic_mean
from typing import Any

from ..errors import DataError

HEADLINE_ROLES = ("edit", "paraphrases", "neighbours", "unrelated")
"""The roles whose four shares tell how good an editor is. Other roles are reported beside them."""

# The fields of several probes, and those of several texts.
PROBES = ("neighbours", "unrelated", "portability", "consequences", "truths")
TEXTS = ("paraphrases", "generation_prompts", "negations", "passages")

DOMAINS = ("in_domain", "out_of_domain")


def headline_mean(shares: Iterable[float]) -> float:
    """The harmonic mean of the headline shares that are known; NaN if none is."""
    known = list(shares)
    return harmonic_mean(known) if known else math.nan


@dataclass(frozen=True)
class Probe:
    """A prompt beside an edit.

    `answer`, if known, is what the model said and should go on saying there, or (portability) what
    the edit implies. `aliases` are other names of the answer.
    """

    prompt: str
    answer: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Implied(Probe):
    """A prompt whose answer the edit changes: `answer` follows from it, `before` held before it.

    `domain` of a consequence: "in_domain" if training reads consequences of its kind,
    "out_of_domain" if none; None: not told.
    """

    before: str | None = None
    domain: str | None = None

    def __post_init__(self) -> None:
        if self.domain not in (*DOMAINS, None):
            expected = " or ".join(DOMAINS)
            raise DataError(f"domain must be {expected}, got {self.domain!r}")


@dataclass(frozen=True)
class EditExample:
    """One edit: make `prompt` continue with `target_new`; and what should and should not follow.

    `paraphrases` should follow the edit. `neighbours` (the same relation, another subject) and
    `unrelated` prompts should not. `portability` are questions whose answers the edit implies;
    `generation_prompts` begin free text about the subject. `ground_truth` is the answer before the
    edit (y° in the metrics). For a classifier a prompt is a claim, and an answer names a class.
    `consequences` follow from the new fact and another one; `negations` are negated forms of the
    prompt, after which `target_new` is wrong; `truths` ask whether a fact is true (`before` is the
    other answer); `passages` state the new fact in running text. Training reads `truths` never, the
    others on request (`cconsequence`, `cnegation`, `edit_on: text`).
    `metadata` is kept beside the edit and changes nothing.
    `target_prefix` stands between a prompt and `target_new`; None: as `join` says.
    """

    prompt: str
    target_new: str
    subject: str | None = None
    ground_truth: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Probe, ...] = ()
    unrelated: tuple[Probe, ...] = ()
    relation: str | None = None
    id: str | None = None
    portability: tuple[Probe, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    target_prefix: str | None = None
    # Not in `repr`, of which training takes its checksum of the data.
    consequences: tuple[Implied, ...] = field(default=(), repr=False)
    negations: tuple[str, ...] = field(default=(), repr=False)
    truths: tuple[Implied, ...] = field(default=(), repr=False)
    passages: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in (*TEXTS, *PROBES):
            if isinstance(held := getattr(self, name), str):  # it would be read letter by letter
                raise DataError(f"{name} must be a tuple, got the text {held[:60]!r}")
        for asked in self.truths:
            if asked.answer is None or asked.before is None:
                raise DataError(
                    f"truths: {asked.prompt!r} needs `answer` and `before`, the other one"
                )

    def roles(self) -> dict[str, tuple[Probe, ...]]:
        """Every prompt of the example by its role; the headline roles come first.

        The answer of the edit and of its paraphrases is `target_new`.
        """
        return {
            "edit": (Probe(self.prompt, self.target_new),),
            "paraphrases": tuple(Probe(prompt, self.target_new) for prompt in self.paraphrases),
            "neighbours": self.neighbours,
            "unrelated": self.unrelated,
            "portability": self.portability,
            "generation_prompts": tuple(map(Probe, self.generation_prompts)),
            "consequences": self.consequences,
            "negations": tuple(map(Probe, self.negations)),
            "truths": self.truths,
            "passages": tuple(map(Probe, self.passages)),
        }


BLANKS = " \t\u00a0\u3000"

UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
"""Characters of scripts that part no words by spaces: Chinese, Japanese, Thai, Lao, Burmese, …"""

_OPEN = re.compile(
    r"""
    (?:[(\[{<«„‚¿¡/\\]|<\w+>)$                                # a bracket, a slash, a tag
    | (?:^|(?<!\d)[\s(\[{:=])(?:["'`“‘$€£¥#@+]|\*{1,3})$      # a quotation, a price begins
    | \w[-_=@]$                                               # a word goes on
    | \b(?:[cdjlmnst]|qu)['’]$                                # l'
    | \b(?:www|[A-Za-z_]\w+(?:\.\w\w+)+)\.$                   # torch.nn.
    """,
    re.VERBOSE | re.IGNORECASE,
)


def join(prompt: str, answer: str, prefix: str | None = None) -> str:
    """Prompt and answer as one text without white space at its end, with `prefix` between them.

    Without `prefix` there is a space between, unless one of them brings white space, their script
    has none there, or the prompt ends in the middle of something: `(`, `https://`, `said "`.
    """
    answer = answer.rstrip()
    if prefix is not None:
        return prompt + prefix + answer
    if prompt[-1:] in tuple(BLANKS):
        return prompt + answer.lstrip(BLANKS)
    return prompt + _separator(prompt, answer) + answer


def _separator(prompt: str, answer: str) -> str:
    last, first = prompt[-1:], answer[:1]
    unspaced = UNSPACED.match(last) or (UNSPACED.match(first) and UNSPACED.search(prompt))
    number = first.isdigit() and re.search(r"(?:\b\d+\.|(?:^|\s)[-−])$", prompt)  # 3.14, -40
    if last.isspace() or first.isspace() or unspaced or number or _OPEN.search(prompt):
        return ""
    # `np.` before a name with an underscore, or where the prompt also speaks of `np.bool`
    name = re.search(r"\b(\w\w+)\.$", prompt)
    dotted = name and (re.match(r"\w*_", answer) or re.search(rf"\b{name[1]}\.\w", prompt))
    return "" if dotted else " "


def check_unicode(text: str, what: str = "a text") -> str:
    """The text itself. Raises DataError for half a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise DataError(f"{what} is not Unicode: {text[:60]!r} has {text[at]!r} at {at}") from None
    return text
