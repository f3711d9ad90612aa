"""Base models: loading, greedy decoding, fingerprints.

A `BaseModel` is a frozen causal language model with its fast tokenizer and its edit sites. It comes from the
hub, a local folder, a GGUF file or the bundled default, and is never written to afterwards. Decoding is
greedy and takes nothing from the checkpoint's own generation settings but its end-of-text tokens.
Axes: b rows, t tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .bundled import BUNDLED, bundled_model
from .checkpoints import (
    DTYPES,
    choose_device,
    locate,
    prepare_tokenizer,
    read_checkpoint,
    silence_transformers,
)
from .errors import DataError, HyperParamError, ModelError
from .hparams import MENDHyperParams
from .sites import Blocks, Site, find_blocks, probe_chain, resolve_sites

_STOP = re.compile(r"[\n.]")

logger = logging.getLogger(__name__)


class BaseModel:
    """A causal language model, frozen and in eval mode, with its fast tokenizer and its edit sites.

    Takes the given model over: its parameters no longer require gradients, and a tokenizer without a padding
    token pads with its end-of-text token. `name` is for people. Raises ModelError for a tokenizer without
    offsets or end-of-text token, and as `resolve_sites`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        inner_params: str | Sequence[str] = "auto",
    ) -> None:
        if model.get_input_embeddings().weight.device.type == "meta":
            raise ModelError(f"{name}: the device map keeps the input embeddings on no device; give them cpu or a GPU")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.name = prepare_tokenizer(tokenizer, _vocabulary(model), name), name
        self._memo: dict[Hashable, Any] = {}
        self.sites: tuple[Site, ...] = resolve_sites(model, inner_params)
        self.blocks: Blocks | None = self._find_blocks()

    def with_sites(self, inner_params: str | Sequence[str]) -> BaseModel:
        """The same model and tokenizer, shared, with other edit sites; raises as `resolve_sites`."""
        other = copy.copy(self)
        other.sites = resolve_sites(self.model, inner_params)
        other.blocks = other._find_blocks()
        return other

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def site_module(self, site: Site) -> nn.Module:
        """The Linear or Conv1D of a site."""
        return self.model.get_submodule(site.module)

    def site_weight(self, site: Site) -> Tensor:
        """A site's weight, from wherever a device map keeps it."""
        return _values(self.model, site.name, self.site_module(site).weight)

    def remembered(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, run once per key for this model and tokenizer, whatever the sites."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def _find_blocks(self) -> Blocks | None:
        found = find_blocks(self.model)
        if found is None or any(site.block is None for site in self.sites):
            return None
        path, blocks = found
        as_tuple = self.remembered("as_tuple", lambda: probe_chain(self.model, blocks, self.eos_id))
        if as_tuple is None:
            logger.info("%s: %s is no plain chain of blocks, so nothing below the edits is cached", self.name, path)
            return None
        return Blocks(path, min(site.block for site in self.sites), len(blocks) - 1, as_tuple)

    def generate(self, prompt: str, *, max_new_tokens: int = 50, stop: bool = True) -> str:
        """Greedy continuation of one prompt; see `generate_batch`."""
        return self.generate_batch([prompt], max_new_tokens=max_new_tokens, stop=stop)[0]

    def generate_batch(
        self, prompts: Sequence[str], *, max_new_tokens: int = 50, stop: bool = True, batch_size: int = 64
    ) -> list[str]:
        """Greedy continuations (the new text only) of prompts, in their order.

        A row ends at the end-of-text token and, with `stop`, before the first newline or full stop. Raises
        DataError for a prompt without tokens, or too long for the model's positions.
        """
        if isinstance(prompts, str) or batch_size < 1:
            raise HyperParamError(
                f"generate_batch takes a list of prompts and batch_size >= 1, got {type(prompts).__name__} "
                f"and {batch_size}; for one prompt use `generate`"
            )
        encoded = [self._prompt_ids(prompt) for prompt in prompts]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        texts = [""] * len(encoded)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = self.left_pad([encoded[index] for index in chosen])
            rows = self.generate_ids(ids, mask, max_new_tokens=max_new_tokens, stop=stop)
            for index, row in zip(chosen, rows, strict=True):
                texts[index] = self.new_text(encoded[index], row, stop=stop)
        return texts

    def _prompt_ids(self, prompt: str) -> list[int]:
        """A prompt's ids; what the tokenizer puts behind a text, such as an end of text, does not belong to it."""
        encoded = self.tokenizer(prompt, return_special_tokens_mask=True)
        own = [p for p, special in enumerate(encoded["special_tokens_mask"]) if not special]
        return encoded["input_ids"][: own[-1] + 1] if own else encoded["input_ids"]

    def left_pad(self, rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
        """Token ids and attention mask of rows of different lengths, the padding on the left.

        Raises DataError for a row without tokens.
        """
        if not all(rows):
            raise DataError("cannot generate from a prompt without tokens; give at least one character")
        width = max(map(len, rows))
        ids = [[self.pad_id] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def new_text(self, prompt_ids: Sequence[int], new_ids: Sequence[int], *, stop: bool = True) -> str:
        """Text of generated ids without special tokens; `stop` cuts before the first newline or full stop.

        Decoded together with the prompt: alone, some tokenizers drop the space before the first word.
        """
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self.tokenizer.decode(list(prompt_ids), **options)
        whole = self.tokenizer.decode([*prompt_ids, *new_ids], **options)
        joined = whole.startswith(before)
        text = whole[len(before) :] if joined else self.tokenizer.decode(list(new_ids), **options)
        return _STOP.split(text, maxsplit=1)[0] if stop else text

    def generate_ids(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"],
        *,
        max_new_tokens: int,
        stop: bool,
    ) -> list[list[int]]:
        """Greedy decoding of left-padded rows: one `model.generate` on exactly these rows in this order.

        Returns the new ids of each row, without end-of-text and padding. With `stop` a row ends with the
        token that holds the newline or full stop (kept: "Inc." may be one token; `new_text` cuts it). Raises
        DataError if a row is right-padded, or too long for the model's positions.
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
        criteria = StoppingCriteriaList([_StopAt(stops, _vocabulary(self.model), self.device)] if stop else [])
        theirs = self.model.generation_config
        self.model.generation_config = config  # transformers fills what `config` leaves open from the model's own
        try:
            output = self.model.generate(
                input_ids=input_ids.to(self.device),
                attention_mask=attention_mask.to(self.device),
                generation_config=config,
                stopping_criteria=criteria,
            )
        finally:
            self.model.generation_config = theirs
        return [_until_end(row, ends, stops) for row in output[:, input_ids.shape[1] :].tolist()]

    def _check_lengths(self, attention_mask: Int[Tensor, "b t"], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise HyperParamError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not attention_mask[:, -1].all():
            raise DataError("rows to generate from must be padded on the left; use `left_pad`")
        longest = int(attention_mask.sum(1).max())
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and longest + max_new_tokens > limit:
            raise DataError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {limit} positions of "
                f"{self.name}; shorten the prompt or lower max_new_tokens"
            )

    def _end_ids(self) -> frozenset[int]:
        """End-of-text ids: the tokenizer's and those that the checkpoint declares."""
        ends: set[int | None] = {self.eos_id}
        declared = self.model.generation_config.eos_token_id
        ends.update(declared if isinstance(declared, list) else [declared])
        return frozenset(end for end in ends if end is not None and 0 <= end < _vocabulary(self.model))

    def _stop_ids(self) -> frozenset[int]:
        """The tokens whose text holds a newline or a full stop."""

        def compute() -> frozenset[int]:
            single = [[index] for index in range(_vocabulary(self.model))]
            texts = self.tokenizer.backend_tokenizer.decode_batch(single, skip_special_tokens=True)
            return frozenset(index for index, text in enumerate(texts) if _STOP.search(text))

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


def load_model(
    source: str | Path | MENDHyperParams,
    *,
    inner_params: str | Sequence[str] = "auto",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    tokenizer: str | None = None,
) -> BaseModel:
    """Load a causal language model to edit.

    `source`: a local folder, a GGUF file, "smollm2-135m" (the bundled default), a hub id, or hyperparameters
    (then all options are theirs). `dtype` "auto" keeps the checkpoint's own (GGUF: float32), `device` "auto"
    takes the first GPU if there is one, `tokenizer` names another tokenizer's folder or hub id. Raises
    ModelError saying what was given and what to do.
    """
    if isinstance(source, MENDHyperParams):
        if (inner_params, dtype, device, trust_remote_code, tokenizer) != (
            "auto",
            "auto",
            "auto",
            False,
            None,
        ):
            raise ModelError("load_model(hparams) takes all options from hparams; use hparams.replace(...)")
        return load_model(
            source.model_name,
            inner_params=source.inner_params,
            dtype=source.dtype,
            device=source.device,
            trust_remote_code=source.trust_remote_code,
            tokenizer=source.tokenizer_name,
        )
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    start, target = time.perf_counter(), choose_device(device)
    place = bundled_model() if source == BUNDLED else locate(source)
    name = place.resolve().name if isinstance(place, Path) else place
    with silence_transformers():
        model, own = read_checkpoint(place, dtype=dtype, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
        base = BaseModel(model.to(target), own, name=name, inner_params=inner_params)
    logger.info("%s loaded in %.1f s (%s, %s)", name, time.perf_counter() - start, base.dtype, base.device)
    return base


def model_fingerprint(base: BaseModel) -> dict[str, Any]:
    """What tells this base model from another, as plain data for JSON.

    `sites_sha256` covers the edited layers' weights as float32, in site order, with names and shapes;
    `trunk_sha256` all other parameters in their own dtype (remembered until one changes in place);
    `tokenizer_sha256` the tokenizer's serialisation without the padding and truncation of its last call.
    """
    parameters = dict(base.model.named_parameters())
    edited = [(site.name, parameters.pop(site.name)) for site in base.sites]
    return {
        "name": base.name,
        "class": type(base.model).__name__,
        "sites": [{"name": name, "shape": list(weight.shape)} for name, weight in edited],
        "sites_sha256": _digest(base.model, edited, torch.float32),
        "trunk_sha256": base.remembered(_state(parameters), lambda: _digest(base.model, parameters.items(), None)),
        "tokenizer_sha256": base.remembered("tokenizer", lambda: _tokenizer_digest(base.tokenizer)),
    }


def weights_sha256(base: BaseModel) -> str:
    """SHA-256 over all parameters and buffers in their own dtype, whatever the sites; remembered likewise."""
    tensors = dict(base.model.named_parameters())
    every = [*tensors.items(), *base.model.named_buffers()]
    return base.remembered(("all", _state(tensors)), lambda: _digest(base.model, every, None))


def _state(parameters: Mapping[str, nn.Parameter]) -> tuple[Any, ...]:
    """Changes when a parameter is replaced or written to in place."""
    return tuple((name, value.data_ptr(), value._version) for name, value in parameters.items())


def _values(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer by its name, read from where a device map keeps it if that is no device."""
    if tensor.device.type != "meta":
        return tensor
    module, _, leaf = name.rpartition(".")
    with align_module_device(model.get_submodule(module), "cpu"):
        return getattr(model.get_submodule(module), leaf).detach().clone()


def _digest(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = _values(model, name, tensor).detach().to("cpu", dtype or tensor.dtype).contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
