"""Texts as token ids, with the positions that predict the answer.

A causal model reads prompt and answer as one text, tokenised once; character offsets tell which
tokens are the answer's (CORRECTNESS rows 17 and 18). An encoder and a decoder read two texts. A
classifier reads the prompt, and its answer is a class.

Axes: n texts, t padded tokens, l padded tokens of a decoder (else t), s scored positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.examples import BLANKS, check_unicode, join
from ..errors import DataError, LimitError

SPECIAL = -1


@dataclass(frozen=True)
class Tokens:
    """A tokenised text. Position `scored[k]` predicts `targets[k]`.

    Without an answer the last position is scored. With a `decoder`, the encoder reads `ids`, and
    positions are the decoder's. A classifier scores the position that its head reads.
    """

    ids: tuple[int, ...]
    scored: tuple[int, ...]
    targets: tuple[int, ...] = ()  # empty without an answer; of a classifier the class
    ends: bool = False  # the last target is an end-of-text token that was added to the answer
    decoder: tuple[int, ...] = ()  # what the decoder reads
    subject: tuple[int, ...] = ()  # positions of the edit's subject in a causal model's prompt

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """What the frozen model's values for this text depend on."""
        return self.ids, self.scored, self.decoder


def tokenize(
    tokenizer: Any,
    prompt: str,
    answer: str | None = None,
    *,
    add_eos: bool = False,
    max_length: int = 512,
    subject: str | None = None,
    prefix: str | None = None,
) -> Tokens:
    """Tokenise prompt and answer as one text, with `prefix` between them as `join` takes it.

    `add_eos` appends the end-of-text token to the answer: an edit also teaches where to stop.
    Raises DataError for a text that is not Unicode or an answer without tokens, LimitError beyond
    `max_length` tokens.
    """
    before = prompt.rstrip(BLANKS)
    text = before
    if answer is not None:
        text = join(prompt, answer, prefix)
    read = _spans(tokenizer, check_unicode(text), len(before))
    ids = [token for token, _, _ in read]
    ordinary = [p for p, (_, _, end) in enumerate(read) if end != SPECIAL]
    _check_length(text, ids, max_length)
    if answer is None:
        # The next token follows the last ordinary one, not a special token behind it.
        return Tokens(tuple(ids), ([len(ids) - 1, *ordinary][-1],))

    # A token belongs to the answer if it ends there. Its start does not tell: some tokenizers leave
    # the space before a word out of its offsets, others give a space no offsets at all.
    positions = [p for p in ordinary if read[p][2] > len(before)]
    if not positions or positions[0] == 0 or not answer.strip():
        raise _nothing_to_predict(prompt, answer)
    ends = add_eos and ids[positions[-1]] != tokenizer.eos_token_id
    if ends:  # in place of what the tokenizer itself puts behind a text
        ids = [*ids[: positions[-1] + 1], tokenizer.eos_token_id]
        positions.append(len(ids) - 1)

    # The last mention of the subject is what the prompt asks about.
    named: tuple[int, ...] = ()
    if subject and subject in prompt:
        begin = prompt.rindex(subject)
        end = begin + len(subject)
        named = tuple(p for p in ordinary if read[p][1] < end and read[p][2] > begin)
    scored = tuple(p - 1 for p in positions)
    targets = tuple(ids[p] for p in positions)
    return Tokens(tuple(ids), scored, targets, ends, subject=named)


def tokenize_pair(
    tokenizer: Any,
    prompt: str,
    answer: str | None = None,
    *,
    start: int,
    add_eos: bool = False,
    max_length: int = 512,
) -> Tokens:
    """Tokenise a prompt for an encoder, and its answer for a decoder that starts with `start`.

    Special tokens before an answer (BART's `<s>`) are given to the decoder and not scored. Without
    an answer, the position that predicts its first token is scored. Otherwise as `tokenize`.
    """
    ids = tuple(tokenizer(check_unicode(prompt).rstrip(BLANKS))["input_ids"])
    answered = "a" if answer is None else check_unicode(answer).rstrip()
    encoded = tokenizer(text_target=answered, return_special_tokens_mask=True)
    ordinary = [p for p, special in enumerate(encoded["special_tokens_mask"]) if not special]
    if not ids or not ordinary or not answered.strip():
        raise _nothing_to_predict(prompt, answer)
    _check_length(prompt, ids, max_length)
    # What the decoder is given before the answer.
    lead = (start, *encoded["input_ids"][: ordinary[0]])
    if answer is None:
        return Tokens(ids, (len(lead) - 1,), decoder=lead)
    targets = tuple(encoded["input_ids"][ordinary[0] : ordinary[-1] + 1])
    ends = add_eos and targets[-1] != tokenizer.eos_token_id
    if ends:
        targets += (tokenizer.eos_token_id,)
    decoder = (*lead, *targets[:-1])
    _check_length(answer, decoder, max_length)
    scored = tuple(range(len(lead) - 1, len(decoder)))
    return Tokens(ids, scored, targets, ends, decoder)


def tokenize_claim(
    tokenizer: Any, claim: str, label: int | None = None, *, position: int, max_length: int = 512
) -> Tokens:
    """Tokenise a claim of class `label` for a head that reads the token at `position` (0 or -1).

    Raises DataError for a claim without tokens, LimitError as `tokenize`.
    """
    ids = tuple(tokenizer(check_unicode(claim))["input_ids"])
    if not ids:
        raise DataError("a claim without tokens cannot be classified; give at least one character")
    _check_length(claim, ids, max_length)
    text = Tokens(ids, (position % len(ids),))
    return text if label is None else replace(text, targets=(label,))


def _spans(tokenizer: Any, text: str, boundary: int) -> list[tuple[int, int, int]]:
    """Each token of a text with its first and last character; special tokens have SPECIAL.

    A token that spans the boundary of prompt and answer (`是里`) is never written by a model that
    goes on from the prompt, so the two are read apart.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    columns = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
    read = []
    for token, (start, end), special in zip(*columns, strict=True):
        if special:
            start = end = SPECIAL
        read.append((token, start, end))
    # Blanks before an answer belong to its first token, so those do not count.
    crossing = any(start < boundary < end for _, start, end in read)
    if not crossing or text[boundary].isspace():
        return read
    before = _spans(tokenizer, text[:boundary], 0)
    while before and before[-1][2] == SPECIAL:
        before.pop()
    # Behind a new line the answer has no mark of the start of a text.
    after = _spans(tokenizer, "\n" + text[boundary:], 0)
    first = next((p for p, (_, _, end) in enumerate(after) if end > 1), None)
    if first is None or after[first][1] == 0:
        return read
    for token, _, end in after[first:]:
        if end != SPECIAL:
            end = len(text)
        before.append((token, boundary, end))
    return before


def _nothing_to_predict(prompt: str, answer: str | None) -> DataError:
    return DataError(
        f"answer {answer!r} of prompt {prompt!r} has no token to predict; "
        "give a non-empty prompt and answer"
    )


def _check_length(text: str, ids: Sequence[int], limit: int) -> None:
    if len(ids) > limit:
        raise LimitError(
            f"{text[:60]!r}… has {len(ids)} tokens, the limit is {limit}; raise `max_length`"
        )


@dataclass(frozen=True)
class TextBatch:
    """Right-padded texts. Packed values follow the row-major order of `scored`."""

    input_ids: Int[Tensor, "n t"]
    attention_mask: Int[Tensor, "n t"]
    scored: Bool[Tensor, "n l"]
    targets: Int[Tensor, " s"]  # -100 where a text has no answer
    decoder_ids: Int[Tensor, "n l"] | None = None  # needs no mask: a decoder looks back only

    @property
    def rows(self) -> Int[Tensor, " s"]:
        """The text of each scored position."""
        return self.scored.nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.input_ids)


def collate(texts: Sequence[Tokens], pad_id: int, device: torch.device | str = "cpu") -> TextBatch:
    """Right-pad texts into one batch."""
    ids = pad_rows([text.ids for text in texts], pad_id, device=device)
    mask = pad_rows([[1] * len(text.ids) for text in texts], 0, device=device)
    read, decoder = ids, None
    if texts[0].decoder:  # positions are the decoder's
        read = decoder = pad_rows([text.decoder for text in texts], pad_id, device=device)
    scored = torch.zeros(read.shape, dtype=torch.bool)
    targets: list[int] = []
    for row, text in enumerate(texts):
        scored[row, list(text.scored)] = True
        targets.extend(text.targets or [-100] * len(text.scored))
    return TextBatch(ids, mask, scored.to(device), torch.tensor(targets, device=device), decoder)


def pad_rows(
    rows: Sequence[Sequence[int]],
    filler: int,
    *,
    left: bool = False,
    device: torch.device | str = "cpu",
) -> Int[Tensor, "n t"]:
    """Rows of different lengths as one tensor."""
    padded = pad_sequence(
        [torch.tensor(row) for row in rows],
        batch_first=True,
        padding_value=filler,
        padding_side="left" if left else "right",
    )
    return padded.to(device)


@dataclass(frozen=True)
class PackedBatch:
    """Groups of texts, a row of nodes each; texts of a group that begin alike share those nodes.

    A node attends to itself and to those before it in its texts.
    """

    input_ids: Int[Tensor, "r t"]
    position_ids: Int[Tensor, "r t"]
    attends: Bool[Tensor, "r t t"]
    nodes: Sequence[Int[Tensor, " _"]]  # of each text, as places in the flattened rows
    shared: Sequence[int]  # of each text: its first nodes that an earlier text made

    def scored(self, texts: Sequence[Tokens]) -> Int[Tensor, " s"]:
        """The places of the scored positions of all texts, in their order."""
        places = [nodes[list(t.scored)] for nodes, t in zip(self.nodes, texts, strict=True)]
        return torch.cat(places)


def pack(groups: Sequence[Sequence[Tokens]], pad_id: int) -> PackedBatch:
    """Groups of texts as one batch of rows, without a decoder."""
    rows, paths, shared = [], [], []
    for number, texts in enumerate(groups):
        made: dict[tuple[int, int], int] = {}  # a node by the one before it and its token
        befores: list[int] = []
        ids: list[int] = []
        places: list[int] = []
        for text in texts:
            node, path, known = -1, [], len(made)
            for place, token in enumerate(text.ids):
                before, node = node, made.setdefault((node, token), len(made))
                if node == len(ids):
                    befores.append(before)
                    ids.append(token)
                    places.append(place)
                path.append(node)
            paths.append((number, path))
            shared.append(sum(node < known for node in path))
        rows.append((ids, places, befores))
    length = max(len(ids) for ids, _, _ in rows)
    attends = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    for matrix, (_, _, befores) in zip(attends.numpy(), rows, strict=True):
        for node, before in enumerate(befores):
            if before >= 0:
                matrix[node] |= matrix[before]
    return PackedBatch(
        pad_rows([ids for ids, _, _ in rows], pad_id),
        pad_rows([places for _, places, _ in rows], 0),
        attends,
        [torch.tensor(path, dtype=torch.long) + number * length for number, path in paths],
        shared,
    )
