"""A frozen model with its tokenizer: reading and writing text in each of the three families (`families.py`).

Decoding is greedy and takes nothing from the checkpoint's own generation settings but the tokens that start and end a
text. Axes: b rows, t tokens, l tokens of a decoder, v vocabulary or classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import DataError, HyperParamError
from .checkpoints import prepare_tokenizer
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
from .tokens import Tokens, tokenize, tokenize_claim, tokenize_pair

STOP = re.compile(r"[\n.]")
"""Where an answer ends, if it does not end by itself."""


class TextModel:
    """A model, frozen and in eval mode, with its family and its fast tokenizer.

    Takes the given model over: its parameters no longer require gradients, a tokenizer without a padding token pads
    with its end-of-text token, and a classifier's config gets the tokenizer's padding token. `name` is for people.
    Raises ModelError for a tokenizer without offsets or (but for classifiers) end-of-text token, for a decoder without
    a start token, and for classes without names.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str
    ) -> None:
        self.model, self.name, self.family = (
            model.eval().requires_grad_(False),
            name,
            family_of(model),
        )
        needs_end = self.family != CLASSIFIER
        self.tokenizer = prepare_tokenizer(tokenizer, _vocabulary(model), name, needs_end=needs_end)
        self._memo: dict[Hashable, Any] = {}
        self.head: Head | None = self._probe_head() if self.family == CLASSIFIER else None
        self.start_id: int | None = start_id(model) if self.family == SEQ2SEQ else None

    def _probe_head(self) -> Head:
        self.model.config.pad_token_id = (
            self.pad_id
        )  # some heads look for the last token before the padding
        ids = self.tokenizer("A claim that is true or false.")["input_ids"]
        return probe_head(self.model, torch.tensor([ids], device=self.device))

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def eos_id(self) -> int | None:
        """None for a classifier's tokenizer without one."""
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def labels(self) -> Labels | None:
        """A classifier's classes."""
        return None if self.head is None else self.head.labels

    def remembered(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, run once per key for this model and tokenizer, whatever the sites."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def tokenize(
        self,
        prompt: str,
        answer: str | None = None,
        /,
        *,
        add_eos: bool = False,
        max_length: int = 512,
        subject: str | None = None,
    ) -> Tokens:
        """A prompt and its answer as this family reads them; a classifier's answer is the name of a class.

        Only a causal model's text tells where it names `subject`. Raises DataError as `data.tokenize` and, for a label
        that the classifier does not have, `Labels.id`.
        """
        if self.head is not None:
            label = None if answer is None else self.head.labels.id(answer)
            return tokenize_claim(
                self.tokenizer,
                prompt,
                label,
                position=self.head.position or 0,
                max_length=max_length,
            )
        options = {"add_eos": add_eos, "max_length": max_length}
        if self.family == CAUSAL:
            return tokenize(self.tokenizer, prompt, answer, subject=subject, **options)
        return tokenize_pair(self.tokenizer, prompt, answer, start=self.start_id, **options)

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
        """An answer as the model says it: a classifier has one name for a class, whatever else it may be called."""
        return answer if self.labels is None else self.labels.names[self.labels.id(answer)]

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"],
        decoder_ids: Int[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "*n v"]:
        """Logits: (b, t, v); (b, l, v) of a decoder; (b, v) of a classifier, one logit being two classes."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.family == SEQ2SEQ:
            inputs["decoder_input_ids"] = decoder_ids
        if self.family != CLASSIFIER:  # which may not know the option
            inputs["use_cache"] = False
        logits = self.model(**inputs).logits
        return two_classes(logits) if self.family == CLASSIFIER and logits.shape[1] == 1 else logits

    def generate(self, prompt: str, *, max_new_tokens: int = 50, stop: bool = True) -> str:
        """Greedy continuation of one prompt; see `generate_batch`."""
        return self.generate_batch([prompt], max_new_tokens=max_new_tokens, stop=stop)[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 50,
        stop: bool = True,
        batch_size: int = 64,
    ) -> list[str]:
        """Greedy continuations (the new text only) of prompts, in their order; of a classifier the predicted labels.

        A row ends at the end-of-text token and, with `stop`, before the first newline or full stop. Raises
        DataError for a prompt without tokens, or too long for the model's positions.
        """
        if isinstance(prompts, str) or batch_size < 1:
            raise HyperParamError(
                f"generate_batch takes a list of prompts and batch_size >= 1, got {type(prompts).__name__} "
                f"and {batch_size}; for one prompt use `generate`"
            )
        encoded = [self.prompt_of(self.tokenize(prompt, max_length=10**9)) for prompt in prompts]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))
        texts = [""] * len(encoded)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = self.write(
                [encoded[index] for index in chosen], max_new_tokens=max_new_tokens, stop=stop
            )
            for index, row in zip(chosen, rows, strict=True):
                texts[index] = self.new_text(encoded[index], row, stop=stop)
        return texts

    def write(
        self, prompts: Sequence[Tokens], *, max_new_tokens: int, stop: bool
    ) -> list[list[int]]:
        """What the model writes after tokenised prompts (`prompt_of`), in one batch: ids as `generate_ids` gives them,
        or of each the class that a classifier predicts."""
        if self.family == CAUSAL:
            ids, mask = self.left_pad([prompt.ids for prompt in prompts])
            return self.generate_ids(ids, mask, max_new_tokens=max_new_tokens, stop=stop)
        ids, mask = self._pad(
            [prompt.ids for prompt in prompts], left=False
        )  # positions count from the left
        if self.family == CLASSIFIER:
            self._check_lengths(mask, 1)
            with torch.no_grad():
                return self.forward(ids, mask).argmax(-1, keepdim=True).tolist()
        begun = torch.tensor([prompt.decoder for prompt in prompts], device=self.device)
        return self.generate_ids(ids, mask, begun, max_new_tokens=max_new_tokens, stop=stop)

    def left_pad(
        self, rows: Sequence[Sequence[int]]
    ) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
        """Token ids and attention mask of rows of different lengths, the padding on the left.

        Raises DataError for a row without tokens.
        """
        return self._pad(rows, left=True)

    def _pad(
        self, rows: Sequence[Sequence[int]], *, left: bool
    ) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
        if not all(rows):
            raise DataError(
                "cannot generate from a prompt without tokens; give at least one character"
            )
        width = max(map(len, rows))

        def filled(row: Sequence[int], filler: int) -> list[int]:
            padding = [filler] * (width - len(row))
            return [*padding, *row] if left else [*row, *padding]

        ids, mask = (
            [filled(row, self.pad_id) for row in rows],
            [filled([1] * len(row), 0) for row in rows],
        )
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def new_text(
        self, prompt: Tokens | Sequence[int], new_ids: Sequence[int], *, stop: bool = True
    ) -> str:
        """Text of ids that follow a prompt (or its ids), without special tokens; of a classifier the class's label.

        `stop` cuts before the first newline or full stop. Decoded together with the prompt: alone, some tokenizers
        drop the space before the first word.
        """
        if self.labels is not None:
            return self.labels.names[new_ids[0]]
        prompt_ids = (prompt.decoder or prompt.ids) if isinstance(prompt, Tokens) else prompt
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self.tokenizer.decode(list(prompt_ids), **options)
        whole = self.tokenizer.decode([*prompt_ids, *new_ids], **options)
        joined = whole.startswith(before)
        text = whole[len(before) :] if joined else self.tokenizer.decode(list(new_ids), **options)
        return STOP.split(text, maxsplit=1)[0] if stop else text

    def generate_ids(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"],
        decoder_ids: Int[Tensor, "b l"] | None = None,
        *,
        max_new_tokens: int,
        stop: bool,
    ) -> list[list[int]]:
        """Greedy decoding: one `model.generate` on exactly these rows in this order.

        Rows are padded on the left or, if an encoder reads them, on the right, and `decoder_ids` are then what the
        decoder begins with. Returns the new ids of each row, without end-of-text and padding. With `stop` a row ends
        with the token that holds the newline or full stop (kept: "Inc." may be one token; `new_text` cuts it). Raises
        DataError if a row is padded on the other side, or too long for the model's positions.
        """
        self._check_lengths(attention_mask, max_new_tokens)
        ends, stops = self._end_ids(), self._stop_ids() if stop else frozenset()
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=self.pad_id,
        )
        criteria = StoppingCriteriaList(
            [_StopAt(stops, _vocabulary(self.model), self.device)] if stop else []
        )
        begun = {}
        if decoder_ids is not None:
            config.decoder_start_token_id = self.start_id
            cache = EncoderDecoderCache(
                DynamicCache(), DynamicCache()
            )  # its own counts the encoder's blocks
            begun = {"decoder_input_ids": decoder_ids.to(self.device), "past_key_values": cache}
        theirs = self.model.generation_config
        self.model.generation_config = (
            config  # transformers fills what `config` leaves open from the model's own
        )
        try:
            output = self.model.generate(
                input_ids=input_ids.to(self.device),
                attention_mask=attention_mask.to(self.device),
                generation_config=config,
                stopping_criteria=criteria,
                **begun,
            )
        finally:
            self.model.generation_config = theirs
        given = input_ids if decoder_ids is None else decoder_ids
        return [_until_end(row, ends, stops) for row in output[:, given.shape[1] :].tolist()]

    def _check_lengths(self, attention_mask: Int[Tensor, "b t"], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise HyperParamError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        side, at = ("left", -1) if self.family == CAUSAL else ("right", 0)
        if not attention_mask[:, at].all():
            raise DataError(f"rows to generate from must be padded on the {side}; use `write`")
        longest = int(attention_mask.sum(1).max())
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        needed = longest + max_new_tokens if self.family == CAUSAL else max(longest, max_new_tokens)
        if limit and needed > limit:
            raise DataError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {limit} positions of "
                f"{self.name}; shorten the prompt or lower max_new_tokens"
            )

    def _end_ids(self) -> frozenset[int]:
        """End-of-text ids: the tokenizer's and those that the checkpoint declares."""
        ends: set[int | None] = {self.eos_id}
        declared = self.model.generation_config.eos_token_id
        ends.update(declared if isinstance(declared, list) else [declared])
        return frozenset(
            end for end in ends if end is not None and 0 <= end < _vocabulary(self.model)
        )

    def _stop_ids(self) -> frozenset[int]:
        """The tokens whose text holds a newline or a full stop."""

        def compute() -> frozenset[int]:
            single = [[index] for index in range(_vocabulary(self.model))]
            texts = self.tokenizer.backend_tokenizer.decode_batch(single, skip_special_tokens=True)
            return frozenset(index for index, text in enumerate(texts) if STOP.search(text))

        return self.remembered("stop_ids", compute)


class _StopAt(StoppingCriteria):
    """Ends each row by itself at one of these tokens."""

    def __init__(self, ids: Collection[int], vocabulary: int, device: torch.device) -> None:
        self.mask = torch.tensor([index in ids for index in range(vocabulary)], device=device)

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Any, **_: Any) -> Bool[Tensor, " b"]:
        return self.mask[input_ids[:, -1]]


def _vocabulary(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _until_end(row: list[int], ends: Collection[int], stops: Collection[int]) -> list[int]:
    for index, token in enumerate(row):
        if token in ends or token in stops:
            return row[: index + (token not in ends)]
    return row
