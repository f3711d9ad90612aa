"""What tells one base model from another: SHA-256 over its weights and its tokenizer."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..runs import sha256
from .base import BaseModel


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_fingerprint(base: BaseModel) -> dict[str, Any]:
    """What tells this base model from another, as plain data for JSON.

    `sites_sha256` covers the edited weights as float32, `trunk_sha256` all other parameters in
    their dtype, `tokenizer_sha256` the tokenizer without the padding and truncation of its last
    call.
    """
    edited = [(site.name, base.site_weight(site)) for site in base.sites]
    return {
        "name": base.name,
        "class": type(base.model).__name__,
        "sites": [{"name": name, "shape": list(weight.shape)} for name, weight in edited],
        "sites_sha256": tensors_sha256((name, weight.float()) for name, weight in edited),
        "trunk_sha256": _trunk_sha256(base),
        "tokenizer_sha256": base.remembered("tokenizer", lambda: _tokenizer_sha256(base)),
    }


def weights_sha256(base: BaseModel) -> str:
    """SHA-256 over all parameters and buffers in their dtype, whatever the sites."""
    tensors = [*base.model.named_parameters(), *base.model.named_buffers()]
    return base.remembered(("all", _state(base)), lambda: _values_sha256(base, tensors))


def _trunk_sha256(base: BaseModel) -> str:
    sites = {site.name for site in base.sites}
    others = [item for item in base.model.named_parameters() if item[0] not in sites]
    return base.remembered(_trunk_key(base), lambda: _values_sha256(base, others))


@contextmanager
def keeping_digests(base: BaseModel) -> Iterator[None]:
    """Within the context weights may leave memory; the digests stay those from before."""
    trunk, every = _trunk_sha256(base), weights_sha256(base)
    yield
    base.remembered(_trunk_key(base), lambda: trunk)
    base.remembered(("all", _state(base)), lambda: every)


def _trunk_key(base: BaseModel) -> tuple[Any, ...]:
    sites = {site.name for site in base.sites}
    return ("trunk", tuple(item for item in _state(base) if item[0] not in sites))


def _state(base: BaseModel) -> tuple[tuple[str, int, int], ...]:
    """Changes when a parameter is replaced or written to in place."""
    return tuple((n, p.data_ptr(), p._version) for n, p in base.model.named_parameters())


def _values_sha256(base: BaseModel, tensors: Iterable[tuple[str, Tensor]]) -> str:
    return tensors_sha256((name, base.value_of(name, tensor)) for name, tensor in tensors)


def _tokenizer_sha256(base: BaseModel) -> str:
    state = json.loads(base.tokenizer.backend_tokenizer.to_str())
    # What the last call left in the tokenizer is no part of it.
    state["padding"] = state["truncation"] = None
    return sha256(json.dumps(state, sort_keys=True))
