"""What tells one base model from another: SHA-256 over its weights and its tokenizer."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .base import BaseModel


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
        "sites_sha256": _digest(base, edited, torch.float32),
        "trunk_sha256": base.remembered(
            parameter_state(others), lambda: _digest(base, others.items(), None)
        ),
        "tokenizer_sha256": base.remembered("tokenizer", lambda: _tokenizer_digest(base.tokenizer)),
    }


def weights_sha256(base: BaseModel) -> str:
    """SHA-256 over all parameters and buffers in their own dtype, whatever the sites; remembered likewise."""
    tensors = dict(base.model.named_parameters())
    every = [*tensors.items(), *base.model.named_buffers()]
    return base.remembered(("all", parameter_state(tensors)), lambda: _digest(base, every, None))


@contextmanager
def keeping_digests(base: BaseModel) -> Iterator[None]:
    """The digests from before the context stay those of the base model, whatever becomes of its tensors within."""
    trunk, every = model_fingerprint(base)["trunk_sha256"], weights_sha256(base)
    yield
    base.remembered(parameter_state(dict(_unedited(base))), lambda: trunk)
    base.remembered(("all", parameter_state(dict(base.model.named_parameters()))), lambda: every)


def _unedited(base: BaseModel) -> Iterator[tuple[str, nn.Parameter]]:
    sites = {site.name for site in base.sites}
    return (item for item in base.model.named_parameters() if item[0] not in sites)


def parameter_state(parameters: Mapping[str, nn.Parameter]) -> tuple[Any, ...]:
    """Changes when a parameter is replaced or written to in place."""
    return tuple((name, value.data_ptr(), value._version) for name, value in parameters.items())


def _digest(
    base: BaseModel, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = base.value_of(name, tensor).detach().to("cpu", dtype or tensor.dtype).contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
