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
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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
    read_tokenizer,
    silence_transformers,
)
from .errors import DataError, HyperParamError, ModelError
from .hollow import (
    WHOLE,
    Weights,
    empty_out,
    fill_rest,
    guard,
    hollow_model,
    is_hollow,
    probe_hollow,
    put,
    trunk_names,
)
from .hparams import MENDHyperParams
from .runs import free_memory, return_memory
from .sites import Blocks, Site, find_blocks, resolve_sites

_STOP = re.compile(r"[\n.]")

logger = logging.getLogger(__name__)


class BaseModel:
    """A causal language model, frozen and in eval mode, with its fast tokenizer and its edit sites.

    Takes the given model over: its parameters no longer require gradients, and a tokenizer without a padding
    token pads with its end-of-text token. `name` is for people, `weights` the files that the model came from. Raises
    ModelError for a tokenizer without offsets or end-of-text token, and as `resolve_sites`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        inner_params: str | Sequence[str] = "auto",
        weights: Weights | None = None,
    ) -> None:
        self.model, self.weights = model.eval().requires_grad_(False), weights
        self.tokenizer, self.name = prepare_tokenizer(tokenizer, _vocabulary(model), name), name
        self._memo: dict[Hashable, Any] = {}
        self.sites: tuple[Site, ...] = resolve_sites(model, inner_params)
        self.blocks: Blocks | None = self._find_blocks()
        if self.released:
            self._guard()

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

    def remembered(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, run once per key for this model and tokenizer, whatever the sites."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    @property
    def released(self) -> int:
        """How many blocks, from the first on, have no weights in memory."""
        found = find_blocks(self.model)
        hollow = [any(map(is_hollow, block.parameters())) for block in found[1]] if found else []
        return [*hollow, False].index(False)

    def release_trunk(self) -> None:
        """Free the weights below the lowest edited block, and the input embeddings unless they are the output's, too.

        The model is changed for all who share it: what needs it whole raises ModelError until `restore_trunk`. Texts
        whose trunk states are cached need it no more. Raises ModelError if nothing lies below the lowest edited block.
        """
        if self.blocks is None or self.blocks.first == 0:
            raise ModelError(
                f"{self.name}: no plain chain of blocks lies below the edits, so there is nothing to release; edit "
                "later blocks, or set `release_trunk: false`"
            )
        if self.released:
            return
        trunk = model_fingerprint(self)["trunk_sha256"]
        empty_out(self.model, trunk_names(self.model, self.blocks.path, self.blocks.first), self.device)
        for value in self.model.parameters():  # a view of a file would keep all its pages
            value.data = value.data if is_hollow(value) else value.data.clone()
        self._guard()
        self.remembered(_state(dict(_unedited(self))), lambda: trunk)
        return_memory()

    def restore_trunk(self) -> None:
        """Read back what `release_trunk` freed. Raises ModelError if the model did not come from safetensors files."""
        if not self.released:
            return
        if self.weights is None:
            raise ModelError(f"{self.name}: no safetensors files to read its weights from; load the model again")
        for name, value in list(self.model.named_parameters(remove_duplicate=False)):
            if is_hollow(value):
                put(self.model, [name], self.weights.read(name, value.dtype).to(self.device))
        for handle in self._memo.pop("guards"):
            handle.remove()

    def _guard(self) -> None:
        remedy = f"{self.name} was released or is streamed (`release_trunk`, `stream_trunk`): load it again"
        remedy += ", or call restore_trunk()" if self.weights else ""
        blocks = find_blocks(self.model)[1][: self.released]
        self._memo["guards"] = [guard(block, remedy) for block in blocks]

    def _find_blocks(self) -> Blocks | None:
        found = find_blocks(self.model)
        if found is None or any(site.block is None for site in self.sites):
            return None
        path, blocks = found
        as_tuple = self.remembered("as_tuple", lambda: probe_hollow(self.model, self.released, self.eos_id))
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
        files = Weights.of(place, model.base_model_prefix)
        base = BaseModel(model.to(target), own, name=name, inner_params=inner_params, weights=files)
    logger.info("%s loaded in %.1f s (%s, %s)", name, time.perf_counter() - start, base.dtype, base.device)
    return base


def load_for_training(hparams: MENDHyperParams) -> BaseModel:
    """`load_model`, or `load_streamed` where `stream_trunk` says so; raises as they do."""
    stream = hparams.stream_trunk
    if stream == "auto":
        place = bundled_model() if hparams.model_name == BUNDLED else locate(hparams.model_name)
        files, free = Weights.of(place, ""), free_memory(choose_device(hparams.device))
        need = files.bytes(DTYPES.get(hparams.dtype)) if files else 0
        stream = need > free
        if stream:
            logger.warning("%s needs %.1f GB, %.1f GB are free: its blocks are streamed", place, need / 1e9, free / 1e9)
    return load_streamed(hparams) if stream else load_model(hparams)


def load_streamed(hparams: MENDHyperParams) -> BaseModel:
    """Load only what training needs after the trunk pass: the blocks from the lowest edited one on, and the output.

    The other weights stay in the checkpoint's safetensors files; `FrozenTrunk` reads them block by block. Raises
    ModelError as `load_model` does, and where no chain of blocks lies below the edits.
    """
    start, target = time.perf_counter(), choose_device(hparams.device)
    place = bundled_model() if hparams.model_name == BUNDLED else locate(hparams.model_name)
    name = place.resolve().name if isinstance(place, Path) else place
    trust = {"trust_remote_code": hparams.trust_remote_code}
    with silence_transformers():
        model, weights = hollow_model(place, dtype=hparams.dtype, **trust)
        sites, found = resolve_sites(model, hparams.inner_params), find_blocks(model)
        first = 0 if found is None else min((-1 if site.block is None else site.block) for site in sites)
        if first < 1:
            raise ModelError(f"{name}: no list of blocks lies below the edits, so nothing can be streamed; {WHOLE}")
        below = trunk_names(model, found[0], first)
        fill_rest(model, below, weights, target)
        empty_out(model, below, target)
        tokenizer = read_tokenizer(place, hparams.tokenizer_name, **trust)
        base = BaseModel(model, tokenizer, name=name, inner_params=hparams.inner_params, weights=weights)
        if base.blocks is None:
            raise ModelError(f"{name}: its blocks are no plain chain, so nothing can be streamed; {WHOLE}")
    logger.info("%s: the last blocks loaded in %.1f s (%s)", name, time.perf_counter() - start, base.dtype)
    return base


def model_fingerprint(base: BaseModel) -> dict[str, Any]:
    """What tells this base model from another, as plain data for JSON.

    `sites_sha256` covers the edited layers' weights as float32, in site order, with names and shapes;
    `trunk_sha256` all other parameters in their own dtype (remembered until one changes in place);
    `tokenizer_sha256` the tokenizer's serialisation without the padding and truncation of its last call.
    """
    edited = [(site.name, base.site_module(site).weight) for site in base.sites]
    others = dict(_unedited(base))
    return {
        "name": base.name,
        "class": type(base.model).__name__,
        "sites": [{"name": name, "shape": list(weight.shape)} for name, weight in edited],
        "sites_sha256": _digest(edited, torch.float32),
        "trunk_sha256": base.remembered(_state(others), lambda: _digest(_whole(base, others), None)),
        "tokenizer_sha256": base.remembered("tokenizer", lambda: _tokenizer_digest(base.tokenizer)),
    }


def _unedited(base: BaseModel) -> Iterator[tuple[str, nn.Parameter]]:
    sites = {site.name for site in base.sites}
    return (item for item in base.model.named_parameters() if item[0] not in sites)


def _whole(base: BaseModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """The same with the values of hollow ones, one at a time."""
    for name, value in parameters.items():
        if is_hollow(value) and base.weights is None:
            raise ModelError(f"{base.name} was released, and now other sites are asked for; load the model again")
        yield name, base.weights.read(name, value.dtype) if is_hollow(value) else value


def _state(parameters: Mapping[str, nn.Parameter]) -> tuple[Any, ...]:
    """Changes when a parameter is replaced or written to in place."""
    return tuple((name, value.data_ptr(), value._version) for name, value in parameters.items())


def _digest(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
