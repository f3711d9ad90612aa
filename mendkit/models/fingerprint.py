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
    their dtype.
    """
    edited = [(site.name, base.site_weight(site)) for site in base.sites]
    return {
        "name": base.name,
        "class": type(base.model).__name__,
        "sites": [{"name": name, "shape": list(weight.shape)} for name, weight in edited],
        "sites_sha256": tensors_sha256((name, weight.float()) for name, weight in edited),
        "trunk_sha256": _base_sha256(base, whole=False),
        "tokenizer_sha256": base.remembered("tokenizer", lambda: _tokenizer_sha256(base)),
    }


def weights_sha256(base: BaseModel) -> str:
    """SHA-256 over all parameters and buffers in their dtype, whatever the sites."""
    return _base_sha256(base, whole=True)


def _base_sha256(base: BaseModel, *, whole: bool, known: str | None = None) -> str:
    """Of all parameters and buffers or, if not `whole`, of the parameters besides the sites."""
    tensors = list(base.model.named_parameters())
    if not whole:
        sites = {site.name for site in base.sites}
        tensors = [(name, value) for name, value in tensors if name not in sites]
    # The key changes when a parameter is replaced or written to in place.
    state = tuple((name, value.data_ptr(), value._version) for name, value in tensors)
    if whole:
        tensors += base.model.named_buffers()

    def compute() -> str:
        return known or tensors_sha256((name, base.value_of(name, x)) for name, x in tensors)

    return base.remembered(("sha256", whole, state), compute)


@contextmanager
def keeping_digests(base: BaseModel) -> Iterator[None]:
    """Within the context weights may leave memory; the digests stay those from before."""
    digests = {whole: _base_sha256(base, whole=whole) for whole in (True, False)}
    yield
    for whole, known in digests.items():
        _base_sha256(base, whole=whole, known=known)


def _tokenizer_sha256(base: BaseModel) -> str:
    state = json.loads(base.tokenizer.backend_tokenizer.to_str())
    # What the last call left in the tokenizer is no part of it.
    state["padding"] = state["truncation"] = None
    return sha256(json.dumps(state, sort_keys=True))
