"""Texts as tokens whose scored positions are exact.

For a causal model a prompt and its answer are tokenised **once, as one text**, and the answer is found by character
offsets (CORRECTNESS rows 17 and 18): no slicing by length, no BOS or missing space inside a target. An encoder and a
decoder read two texts, tokenised one by one; a classifier reads the prompt, and its answer is a class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..data.examples import check_unicode, join
from ..errors import DataError, LimitError


@dataclass(frozen=True)
class Tokens:
    """A tokenised text. Position `scored[k]` predicts `targets[k]`; without an answer the last position is scored.

    With a `decoder` (sequence to sequence) the encoder reads `ids`, and positions are the decoder's. A classifier's one
    scored position is that which its head reads, its target a class.
    """

    ids: tuple[int, ...]
    scored: tuple[int, ...]
    targets: tuple[int, ...] = ()  # empty if the text has no answer
    ends: bool = False  # whether the last target is the end-of-text token added to the answer
    decoder: tuple[int, ...] = ()  # what the decoder reads
    subject: tuple[
        int, ...
    ] = ()  # positions of an edit's subject (a causal model's), where its prompt names it

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """What the frozen model's values for this text depend on."""
        return (self.ids, self.scored, self.decoder) if self.decoder else (self.ids, self.scored)


def tokenize(
    tokenizer: Any,
    prompt: str,
    answer: str | None = None,
    /,
    *,
    add_eos: bool = False,
    max_length: int = 512,
    subject: str | None = None,
) -> Tokens:
    """Tokenise a prompt with its answer; the scored positions are exactly those that predict the answer's characters.

    `add_eos` appends the end-of-text token to the answer, so that an edit also teaches where to stop; the tokens of
    `subject` are those of its last mention in the prompt. Raises DataError if the text is longer than `max_length`
    tokens, is not Unicode, or the answer has no token.
    """
    text = check_unicode(prompt if answer is None else join(prompt, answer))
    encoded = tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, add_special_tokens=True
    )
    ids, own = (
        list(encoded["input_ids"]),
        [not special for special in encoded["special_tokens_mask"]],
    )
    _check_length(text, ids, max_length)
    if answer is None:
        return Tokens(
            tuple(ids), (max((p for p, kept in enumerate(own) if kept), default=len(ids) - 1),)
        )
    # where a token ends decides: some tokenizers leave the space before it out of its offsets, or give a space none
    positions = [
        p for p, (_, end) in enumerate(encoded["offset_mapping"]) if own[p] and end > len(prompt)
    ]
    if (
        not positions or positions[0] == 0 or not answer.strip()
    ):  # else the space between the two would be taught
        raise DataError(
            f"answer {answer!r} of prompt {prompt!r} has no token to predict; give a non-empty prompt and answer"
        )
    ends = add_eos and ids[positions[-1]] != tokenizer.eos_token_id
    if ends:  # the tokenizer may have appended the end of text by itself, then what follows the answer goes
        ids = [*ids[: positions[-1] + 1], tokenizer.eos_token_id]
        positions.append(len(ids) - 1)
    begin, end = (at := prompt.rfind(subject or "\0")), at + len(subject or "")
    named = tuple(
        p
        for p, (a, b) in enumerate(encoded["offset_mapping"])
        if own[p] and a < end and b > begin >= 0
    )
    scored, targets = tuple(p - 1 for p in positions), tuple(ids[p] for p in positions)
    return Tokens(tuple(ids), scored, targets, ends, subject=named)


def tokenize_pair(
    tokenizer: Any,
    prompt: str,
    answer: str | None = None,
    /,
    *,
    start: int,
    add_eos: bool = False,
    max_length: int = 512,
) -> Tokens:
    """Tokenise a prompt for an encoder and its answer, by itself, for a decoder that starts with the token `start`.

    The tokenizer's special tokens before an answer (BART's `<s>`) are given to the decoder and not scored; without an
    answer the position that predicts its first token is. `add_eos` and errors as in `tokenize`.
    """
    ids = tokenizer(check_unicode(prompt))["input_ids"]
    answered = "a" if answer is None else check_unicode(answer)
    encoded = tokenizer(text_target=answered, return_special_tokens_mask=True)
    written = [p for p, special in enumerate(encoded["special_tokens_mask"]) if not special]
    if not ids or not written or not answered.strip():
        raise DataError(
            f"answer {answer!r} of prompt {prompt!r} has no token to predict; give a non-empty prompt and answer"
        )
    _check_length(prompt, ids, max_length)
    lead = (start, *encoded["input_ids"][: written[0]])
    if answer is None:
        return Tokens(tuple(ids), (len(lead) - 1,), decoder=lead)
    targets = tuple(encoded["input_ids"][written[0] : written[-1] + 1])
    ends = add_eos and targets[-1] != tokenizer.eos_token_id
    targets += (tokenizer.eos_token_id,) if ends else ()
    decoder = (*lead, *targets[:-1])
    _check_length(answer, decoder, max_length)
    return Tokens(tuple(ids), tuple(range(len(lead) - 1, len(decoder))), targets, ends, decoder)


def tokenize_claim(
    tokenizer: Any, claim: str, label: int | None = None, /, *, position: int, max_length: int = 512
) -> Tokens:
    """Tokenise a claim for a classifier whose head reads the token at `position` (0 or -1); `label` is its class.

    Raises DataError if the claim has no token, or more than `max_length`.
    """
    ids = tuple(tokenizer(check_unicode(claim))["input_ids"])
    if not ids:
        raise DataError("a claim without tokens cannot be classified; give at least one character")
    _check_length(claim, ids, max_length)
    return Tokens(ids, (position % len(ids),), () if label is None else (label,))


def _check_length(text: str, ids: Sequence[int], limit: int) -> None:
    if len(ids) > limit:
        raise LimitError(
            f"{text[:60]!r}… has {len(ids)} tokens, the limit is {limit}; raise `max_length`"
        )


@dataclass(frozen=True)
class TextBatch:
    """Texts as right-padded tensors. Row-major order of `scored` is the order of all packed values."""

    input_ids: Int[Tensor, "n t"]
    attention_mask: Int[Tensor, "n t"]
    scored: Bool[Tensor, "n l"]
    targets: Int[
        Tensor, " s"
    ]  # the token each scored position predicts, -100 where the text has no answer
    decoder_ids: Int[Tensor, "n l"] | None = None  # causal attention: its padding needs no mask

    @property
    def rows(self) -> Int[Tensor, " s"]:
        """The text of each scored position."""
        return self.scored.nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.input_ids)


def collate(
    texts: Sequence[Tokens], pad_id: int, device: torch.device | str = "cpu", /
) -> TextBatch:
    """Right-pad texts into one batch."""

    def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)

    ids = padded([text.ids for text in texts], pad_id)
    mask = padded([[1] * len(text.ids) for text in texts], 0)
    decoder = padded([text.decoder for text in texts], pad_id) if texts[0].decoder else None
    scored = torch.zeros((ids if decoder is None else decoder).shape, dtype=torch.bool)
    targets: list[int] = []
    for row, text in enumerate(texts):
        scored[row, list(text.scored)] = True
        targets.extend(text.targets or [-100] * len(text.scored))
    return TextBatch(ids, mask, scored.to(device), torch.tensor(targets, device=device), decoder)
