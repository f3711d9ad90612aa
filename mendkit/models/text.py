"""Reading and writing text with a frozen model of any of the three families (`families.py`).

Decoding is greedy. Of the checkpoint's generation settings it takes only the tokens that start and
end a text. Axes: b rows, t tokens, l tokens of a decoder, v vocabulary or classes.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput

from ..data.examples import BLANKS
from ..errors import DataError, HyperParamError, ModelError
from .families import (
    CAUSAL,
    CLASSIFIER,
    SEQ2SEQ,
    Head,
    Labels,
    family_of,
    probe_head,
    start_id,
    two_classes,
)
from .tokens import Tokens, pad_rows, tokenize, tokenize_claim, tokenize_pair

STOP = re.compile(r"[\n。｡！？।]|(?<!\d)\.|\.(?!\d)")
"""Where an answer ends, if it does not end by itself. The full stop of 3.5 is none."""

# Rows that are written at once, and the tokens after which those that have ended leave.
ROWS_PER_BATCH, PART_TOKENS = 128, 2
# The longest row of a batch is at most so many times as long as the shortest.
MOST_PADDING = 1.5

# Tokens that are written unless a caller says otherwise.
NEW_TOKENS = 50

# What `generate` calls its cache: the last field of its output, renamed in transformers 5.24.
CACHE = fields(GenerateDecoderOnlyOutput)[-1].name


def cut(text: str, answers: Sequence[str] = ()) -> str:
    """A written text before its first stop mark that none of `answers` holds at that place."""
    at_end = rf"(\s|{STOP.pattern})+$"
    wanted = [re.sub(at_end, "", answer).strip().casefold() for answer in answers]
    for mark in STOP.finditer(text):
        begun = text[: mark.end()].lstrip().casefold()
        if not begun or not any(answer.startswith(begun) for answer in wanted):
            return text[: mark.start()]
    return text


class TextModel:
    """A model, frozen and in eval mode, with its family and its fast tokenizer.

    The given model and tokenizer are changed: parameters no longer require gradients, and a
    missing padding token becomes the end-of-text token. Raises ModelError for a tokenizer without
    offsets or end of text, and as `family_of`, `start_id` and `probe_head`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str
    ) -> None:
        self.model, self.name = model.eval().requires_grad_(False), name
        model.config.return_dict = True  # outputs are read by name
        self.family = family_of(model)
        self.tokenizer = tokenizer
        _prepare_tokenizer(self)
        self._memo: dict[Hashable, Any] = {}
        self.start_id: int | None = start_id(model) if self.family == SEQ2SEQ else None
        self.head: Head | None = None
        self.labels: Labels | None = None  # a classifier's classes
        if self.family == CLASSIFIER:
            model.config.pad_token_id = self.pad_id  # some heads look for the last other token
            ids = tokenizer("A claim that is true or false.")["input_ids"]
            self.head = probe_head(model, torch.tensor([ids], device=self.device))
            self.labels = self.head.labels

    @property
    def _embeddings(self) -> Tensor:
        return self.model.get_input_embeddings().weight

    @property
    def device(self) -> torch.device:
        return self._embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embeddings.dtype

    @property
    def vocabulary(self) -> int:
        return self._embeddings.shape[0]

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def remembered(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, run once per key, whatever the sites."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    # ---------------------------------------------------------------------------------- reading

    def tokenize(
        self,
        prompt: str,
        answer: str | None = None,
        *,
        add_eos: bool = False,
        max_length: int = 512,
        subject: str | None = None,
        prefix: str | None = None,
    ) -> Tokens:
        """A prompt and its answer (of a classifier a class's name) as this family reads them.

        Raises DataError as `tokens.tokenize` and `Labels.id`, ModelError for an unknown token.
        """
        options: dict[str, Any] = {"add_eos": add_eos, "max_length": max_length}
        if self.head is not None:
            label, at = None, self.head.position or 0
            if answer is not None:
                label = self.head.labels.id(answer)
            text = tokenize_claim(self.tokenizer, prompt, label, position=at, max_length=max_length)
        elif self.start_id is not None:
            text = tokenize_pair(self.tokenizer, prompt, answer, start=self.start_id, **options)
        else:
            text = tokenize(
                self.tokenizer, prompt, answer, subject=subject, prefix=prefix, **options
            )
        self._check_known((*text.ids, *text.decoder))
        return text

    def encode(self, text: str) -> list[int]:
        """The ids of a text without special tokens. Raises ModelError as `tokenize`."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self._check_known(ids)
        return ids

    def _check_known(self, ids: Sequence[int]) -> None:
        # torch would say no more than "index out of range".
        highest = max(ids, default=0)
        if highest >= self.vocabulary:
            raise ModelError(
                f"{self.name}: token {self.tokenizer.convert_ids_to_tokens(highest)!r} has id "
                f"{highest}, the model has {self.vocabulary} embeddings; call "
                "`model.resize_token_embeddings(len(tokenizer))`, train the new rows, save both, "
                "or give the tokenizer that the model was trained with"
            )

    def prompt_of(self, text: Tokens) -> Tokens:
        """A text without its answer: what `write` goes on from."""
        at = text.scored[0]
        if self.family == CAUSAL:
            return Tokens(text.ids[: at + 1], (at,))
        return Tokens(text.ids, (at,), decoder=text.decoder[: at + 1])

    def continued(self, prompt: Tokens, new_ids: Sequence[int]) -> Tokens:
        """A prompt (`prompt_of`) with what the model wrote as its answer."""
        new, at = tuple(new_ids), prompt.scored[0]
        if self.family == CLASSIFIER:
            return replace(prompt, targets=new)
        scored = tuple(range(at, at + len(new)))
        if self.family == CAUSAL:
            return Tokens((*prompt.ids, *new), scored, new)
        return Tokens(prompt.ids, scored, new, decoder=(*prompt.decoder, *new[:-1]))

    def said(self, answer: str) -> str:
        """An answer as the model says it: a classifier has one name for each class."""
        return answer if self.labels is None else self.labels.names[self.labels.id(answer)]

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"],
        decoder_ids: Int[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "*n v"]:
        """Logits: (b, t, v), of a decoder (b, l, v), of a classifier (b, v) with v ≥ 2."""
        if self.family == CLASSIFIER:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            return two_classes(logits) if logits.shape[1] == 1 else logits
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.family == SEQ2SEQ:
            inputs["decoder_input_ids"] = decoder_ids
        return self.model(**inputs, use_cache=False).logits

    # ---------------------------------------------------------------------------------- writing

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = NEW_TOKENS,
        stop: bool = True,
        answers: Sequence[str] = (),
    ) -> str:
        """Greedy continuation of one prompt; see `generate_batch`."""
        return self.generate_batch(
            [prompt], max_new_tokens=max_new_tokens, stop=stop, answers=[answers]
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = NEW_TOKENS,
        stop: bool = True,
        answers: Sequence[Sequence[str]] = (),
    ) -> list[str]:
        """Greedy continuations (new text only) of prompts; a classifier's labels.

        A row ends at the end-of-text token and, with `stop`, before the first newline or full stop
        that none of its expected `answers` holds there. Raises DataError as `write`.
        """
        if isinstance(prompts, str):
            raise HyperParamError(
                f"generate_batch needs a list of prompts, got {prompts!r:.40}; use `generate`"
            )
        encoded = [self.prompt_of(self.tokenize(prompt, max_length=10**9)) for prompt in prompts]
        answers = answers or [()] * len(encoded)
        new = self.write_all(encoded, max_new_tokens=max_new_tokens, stop=stop, answers=answers)
        texts = []
        for k, ids in enumerate(new):
            text = self.new_text(encoded[k], ids, stop=stop, answers=answers[k])
            # The model goes on from the prompt without the blanks at its end.
            if prompts[k] != prompts[k].rstrip(BLANKS):
                text = text.lstrip(BLANKS)
            texts.append(text)
        return texts

    def write_all(
        self,
        prompts: Sequence[Tokens],
        *,
        max_new_tokens: int,
        stop: bool = True,
        answers: Sequence[Sequence[str]] = (),
        under: Callable[[list[int]], AbstractContextManager[Any]] = nullcontext,
        begun: Sequence[Sequence[int]] = (),
    ) -> list[list[int]]:
        """The new ids after each prompt, with the end of text if it was written.

        A row ends as in `generate_batch`, but after the stop mark. Rows of one batch are written
        within `under(rows)`, and leave it as they end. What is known of them is in `begun`; a row
        that ends there is not run. A row with an answer of more than `max_new_tokens` has room for
        it, unless less than the default was asked for. Raises as `write`.
        """
        if max_new_tokens < 1:
            raise HyperParamError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        written = [[*ids] for ids in begun] or [[] for _ in prompts]
        answers = answers or [()] * len(prompts)
        limits = [self._limit(max_new_tokens, expected) for expected in answers]

        def goes_on(k: int) -> bool:
            """Whether row k has not ended; what it has beyond its end is removed."""
            ids = written[k]
            if self.labels or not ids:
                return not ids
            del ids[limits[k] :]
            stopped = stop and self._stopped(prompts[k], ids, answers[k])
            return not stopped and len(ids) < limits[k] and ids[-1] != self.eos_id

        going, size = list(filter(goes_on, range(len(prompts)))), PART_TOKENS
        while going:
            longer = [_longer(prompts[k], written[k]) for k in going]
            # Rows whose cache cannot be cut are read again, so their parts become longer.
            again: list[int] = []
            for batch in self._batches(longer):
                rows, past = [going[at] for at in batch], Past()
                texts = [longer[at] for at in batch]
                while rows:
                    count = min(size, *(limits[k] - len(written[k]) for k in rows))
                    with under(rows):
                        new = self.write(texts, max_new_tokens=count, past=past)
                    for k, ids in zip(rows, new, strict=True):
                        written[k] += ids
                        if len(ids) < count and not self.labels:
                            written[k].append(self.tokenizer.eos_token_id)
                    kept = [at for at, k in enumerate(rows) if goes_on(k)]
                    rows = [rows[at] for at in kept]
                    if not past.keep(kept):
                        again += rows
                        break
            going, size = again, 2 * size
        return written

    def _limit(self, tokens: int, answers: Sequence[str]) -> int:
        """The tokens of a row at most: more than `tokens` if an expected answer needs them."""
        if tokens < NEW_TOKENS or self.labels:
            return tokens
        longest = max((len(self.encode(answer)) for answer in answers), default=0)
        return longest + 8 if longest > tokens else tokens  # and its end

    def _stopped(self, prompt: Tokens, ids: list[int], answers: Sequence[str]) -> bool:
        """Whether a stop mark ends the ids; what was written behind it to see that is removed."""
        # After `3.` a digit may follow.
        text, count = f"{self.new_text(prompt, ids, stop=False)}0", len(ids)
        if cut(text, answers) == text:
            return False
        while cut(text, answers) != text:
            count -= 1
            text = self.new_text(prompt, ids[:count], stop=False)
        del ids[count + 1 :]
        return True

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Tokens], *, max_new_tokens: int, past: "Past | None" = None
    ) -> list[list[int]]:
        """The new ids after each prompt (`prompt_of`), in one batch; of a classifier the class.

        With a `past` that was kept, its rows go on. Raises DataError for a prompt without tokens,
        or too long for the model's positions.
        """
        past = past or Past()
        if past.cache is None:
            # An encoder counts positions from the left.
            left = self.family == CAUSAL
            past.ids, past.mask = self.left_pad([prompt.ids for prompt in prompts], left=left)
        ids, mask, begun = past.ids, past.mask, {CACHE: past.cache}
        self._check_lengths(mask, max_new_tokens)
        if self.family == CLASSIFIER:
            return self.forward(ids, mask).argmax(-1, keepdim=True).tolist()
        width, ends = ids.shape[1], self.end_ids()
        if self.family == SEQ2SEQ:
            given = torch.tensor([prompt.decoder for prompt in prompts], device=self.device)
            # transformers' default cache would count the encoder's blocks.
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            begun, width = {"decoder_input_ids": given, CACHE: cache}, given.shape[1]
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": sorted(ends)}
        out = self._greedily(ids, mask, begun, **how)
        past.ids, past.cache = out.sequences, out.get(CACHE)
        past.mask = pad(mask, (0, out.sequences.shape[1] - width), value=1)
        rows = out.sequences[:, width:].tolist()
        return [[*takewhile(lambda token: token not in ends, row)] for row in rows]

    def _greedily(self, ids: Tensor, mask: Tensor, begun: dict[str, Any], **options: Any) -> Any:
        """What transformers generates, none of the checkpoint's settings being heeded."""
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=self.pad_id,
            decoder_start_token_id=self.start_id,
            return_dict_in_generate=True,
            **options,
        )
        # transformers fills what `config` leaves open from the model's settings, so these go aside.
        settings = self.model.generation_config
        self.model.generation_config = config
        try:
            return self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, **begun
            )
        finally:
            self.model.generation_config = settings

    def _batches(self, prompts: Sequence[Tokens]) -> Iterator[list[int]]:
        """The numbers of prompts to write after together, by length for little padding.

        They have one length where padding changes what is written, as in RecurrentGemma, and where
        a decoder reads them.
        """
        sizes = [(len(prompt.decoder), len(prompt.ids)) for prompt in prompts]
        pads = self.family != CAUSAL or self.remembered("pads", self._probe_padding)
        batch: list[int] = []
        for index in sorted(range(len(prompts)), key=sizes.__getitem__):
            decoder, ids = sizes[batch[0] if batch else index]
            most = ids * MOST_PADDING if pads else ids
            alike = decoder == sizes[index][0] and sizes[index][1] <= most
            if len(batch) == ROWS_PER_BATCH or not alike:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.no_grad()
    def _probe_padding(self) -> bool:
        """Whether padding on the left changes nothing."""
        plain = [i for i in range(self.vocabulary) if i not in (self.pad_id, self.eos_id)]
        found = []
        for rows in ([plain[:2]], [plain[:2], plain[:5]]):
            ids, mask = self.left_pad(rows)
            output = self._greedily(ids, mask, {}, max_new_tokens=1, output_logits=True)
            found.append(output.logits[0][0])
        alone, padded = found
        return torch.allclose(alone, padded, rtol=0.0, atol=0.05 * float(alone.abs().max()))

    def left_pad(
        self, rows: Sequence[Sequence[int]], *, left: bool = True
    ) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
        """Token ids and attention mask, padded on one side. Raises DataError for an empty row."""
        if not all(rows):
            raise DataError(
                "cannot generate from a prompt without tokens; give at least one character"
            )
        ids = pad_rows(rows, self.pad_id, left=left, device=self.device)
        ones = [[1] * len(row) for row in rows]
        return ids, pad_rows(ones, 0, left=left, device=self.device)

    def new_text(
        self,
        prompt: Tokens | Sequence[int],
        new_ids: Sequence[int],
        *,
        stop: bool = True,
        answers: Sequence[str] = (),
    ) -> str:
        """The text of ids that follow a prompt, without special tokens; a classifier's label.

        `stop` cuts as `generate_batch`.
        """
        if self.labels is not None:
            return self.labels.names[new_ids[0]]
        before = (prompt.decoder or prompt.ids) if isinstance(prompt, Tokens) else prompt
        # Decoded together with the prompt: alone, some tokenizers drop the first word's space.
        head, whole = self._decoded(before), self._decoded([*before, *new_ids])
        text = whole.removeprefix(head)
        if not whole.startswith(head):
            text = self._decoded(new_ids)
        return cut(text, answers) if stop else text

    def _decoded(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # a list only for several rows
        return text

    def _check_lengths(self, attention_mask: Int[Tensor, "b t"], max_new_tokens: int) -> None:
        longest = int(attention_mask.sum(1).max())
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        needed = max(longest, max_new_tokens)
        if self.family == CAUSAL:
            needed = longest + max_new_tokens
        if limit and needed > limit:
            raise DataError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {limit} "
                f"positions of {self.name}; shorten the prompt or lower max_new_tokens"
            )

    def end_ids(self) -> frozenset[int]:
        """End-of-text ids: the tokenizer's and those that the checkpoint declares."""
        # Chat models declare the end of a turn beside the end of text.
        declared = self.model.generation_config.eos_token_id
        if not isinstance(declared, list):
            declared = [declared]
        ends = [self.eos_id, *declared]
        return frozenset(end for end in ends if end is not None and 0 <= end < self.vocabulary)


@dataclass
class Past:
    """Rows as far as they are written, with what the model keeps of them."""

    ids: Any = None
    mask: Any = None
    cache: Any = None

    def keep(self, rows: list[int]) -> bool:
        """Go on with some rows only; False if the model must read them again."""
        layers = set(map(type, getattr(self.cache, "layers", ())))
        if type(self.cache) is not DynamicCache or layers != {DynamicLayer}:
            return False
        if rows and len(rows) < len(self.ids):
            self.ids, self.mask = self.ids[rows], self.mask[rows]
            self.cache.batch_select_indices(torch.tensor(rows))
        return True


def _prepare_tokenizer(base: TextModel) -> None:
    tokenizer, vocabulary = base.tokenizer, base.vocabulary
    if not getattr(tokenizer, "is_fast", False) or not tokenizer("a")["input_ids"]:
        raise ModelError(
            f"{base.name}: {type(tokenizer).__name__} is not a fast tokenizer with a vocabulary, "
            "whose offsets tell where a target is; give a folder with a tokenizer.json, or set "
            "`tokenizer_name`"
        )
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pads = pad is not None and pad < vocabulary
    if (base.family != CLASSIFIER or not pads) and (end is None or end >= vocabulary):
        raise ModelError(
            f"{base.name}: the tokenizer's end-of-text token is {tokenizer.eos_token!r} "
            f"(id {end}), the model has {vocabulary} tokens; set `eos_token` in "
            "tokenizer_config.json, or another `tokenizer_name`"
        )
    if not pads:
        tokenizer.pad_token = tokenizer.eos_token


def _longer(prompt: Tokens, new: Sequence[int]) -> Tokens:
    """A prompt with what was written after it as part of it."""
    at = (prompt.scored[0] + len(new),)
    if prompt.decoder:
        return replace(prompt, scored=at, decoder=(*prompt.decoder, *new))
    return replace(prompt, scored=at, ids=(*prompt.ids, *new))
