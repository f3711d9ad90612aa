"""Edit examples: what is to be edited, and what should and should not follow from it."""

from dataclasses import dataclass

from ..errors import DataError


@dataclass(frozen=True)
class Probe:
    """A prompt beside an edit; `answer` (if known) is what the model said or should say there.

    It should stay as it was there, or (portability) say what the edit implies; `aliases` are an answer's other names.
    """

    prompt: str
    answer: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditExample:
    """One edit: make `prompt` continue with `target_new`, and everything that should and should not follow from it.

    `paraphrases` should follow the edit; `neighbours` (same relation, other subject) and `unrelated` prompts not.
    For a classifier a prompt is a claim, and an answer the name of a class.
    `portability` are questions whose answers the edit implies; `generation_prompts` begin free text about the subject.
    `ground_truth` is the answer before the edit (y° in the metrics).
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


def join(prompt: str, answer: str) -> str:
    """Prompt and answer as one text, with a single space between unless one of them brings white space."""
    return (
        prompt + answer if prompt[-1:].isspace() or answer[:1].isspace() else f"{prompt} {answer}"
    )


def check_unicode(text: str, what: str = "a text") -> str:
    """The text itself. Raises DataError for half a surrogate pair, which JSON's escapes can write and no file holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is not Unicode: {text[:60]!r} has {text[error.start]!r} at {error.start}"
        ) from None
    return text
