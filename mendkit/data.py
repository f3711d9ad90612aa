"""Edit examples, and turning them into tokens whose scored positions are exact.

A prompt and its answer are tokenised **once, as one text**, and the answer is found by character offsets
(CORRECTNESS rows 17 and 18): no slicing by length, no BOS or missing space inside a target.
"""

from dataclasses import dataclass
from typing import Any

from .errors import DataError, LimitError


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


@dataclass(frozen=True)
class Tokens:
    """A tokenised text. Position `scored[k]` predicts `targets[k]`; without an answer the last position is scored."""

    ids: tuple[int, ...]
    scored: tuple[int, ...]
    targets: tuple[int, ...] = ()  # empty if the text has no answer
    ends: bool = False  # whether the last target is the end-of-text token added to the answer

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the frozen model's values for this text depend on."""
        return self.ids, self.scored


def join(prompt: str, answer: str) -> str:
    """Prompt and answer as one text, with a single space between unless one of them brings white space."""
    return prompt + answer if prompt[-1:].isspace() or answer[:1].isspace() else f"{prompt} {answer}"


def tokenize(
    tokenizer: Any, prompt: str, answer: str | None = None, /, *, add_eos: bool = False, max_length: int = 512
) -> Tokens:
    """Tokenise a prompt with its answer; the scored positions are exactly those that predict the answer's characters.

    `add_eos` appends the end-of-text token to the answer, so that an edit also teaches where to stop. Raises
    DataError if the text is longer than `max_length` tokens or the answer has no token.
    """
    text = prompt if answer is None else join(prompt, answer)
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, add_special_tokens=True)
    ids, own = list(encoded["input_ids"]), [not special for special in encoded["special_tokens_mask"]]
    if len(ids) > max_length:
        raise LimitError(f"{text[:60]!r}… has {len(ids)} tokens, the limit is {max_length}; raise `max_length`")
    if answer is None:
        return Tokens(tuple(ids), (max((p for p, kept in enumerate(own) if kept), default=len(ids) - 1),))
    # where a token ends decides: some tokenizers leave the space before it out of its offsets, or give a space none
    positions = [p for p, (_, end) in enumerate(encoded["offset_mapping"]) if own[p] and end > len(prompt)]
    if not positions or positions[0] == 0:
        raise DataError(
            f"answer {answer!r} of prompt {prompt!r} has no token to predict; give a non-empty prompt and answer"
        )
    ends = add_eos and ids[positions[-1]] != tokenizer.eos_token_id
    if ends:  # the tokenizer may have appended the end of text by itself, then what follows the answer goes
        ids = [*ids[: positions[-1] + 1], tokenizer.eos_token_id]
        positions.append(len(ids) - 1)
    return Tokens(tuple(ids), tuple(p - 1 for p in positions), tuple(ids[p] for p in positions), ends)
