"""Tiny random models with a real tokenizer, shaped like the real ones.

The tokenizer is a byte-level BPE trained here on sentences made of facts, so names split into
several tokens. Weights are drawn so wide that greedy decoding has no near ties.
"""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mendkit.models.base import BaseModel

END, PAD = "<|end|>", "<|pad|>"
POSITIONS = 256

_PLACES = (
    *["France", "Spain", "Japan", "Italy", "Norway", "Peru", "Chad", "Fiji", "Chile"],
    "the United Kingdom",
)
_CITIES = ["Paris", "Madrid", "Tokyo", "Rome", "Oslo", "Lima", "Bern", "Suva", "Santiago", "London"]
_FORMS = (
    "The capital of {place} is {city}.",
    "{place} has its seat of government in {city}.",
    "Q: What is the capital city of {place}? A: {city}\n",
    "The main city of {place} is not {city}, I think.",
)


def sentences() -> list[str]:
    """Four hundred sentences about places and cities."""
    return [form.format(place=p, city=c) for form, p, c in product(_FORMS, _PLACES, _CITIES)]


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, pad: bool = True) -> PreTrainedTokenizerFast:
    """A fresh byte-level BPE tokenizer; without a padding token if `pad` is false."""
    backend = Tokenizer.from_str(_trained())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD if pad else None
    )


def _base(
    model: type, config: type, sizes: dict[str, Any], dtype: torch.dtype, seed: int
) -> BaseModel:
    tokenizer = tiny_tokenizer()
    values = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "architectures": [model.__name__],
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = model(config(**values, **sizes)).to(dtype)
    return BaseModel(built, tokenizer, name=f"tiny-{built.config.model_type}")


def tiny_llama(
    *, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 4, d: int = 32
) -> BaseModel:
    """A random Llama with a separate output layer, of `nn.Linear`: weights are (d_out, d_in)."""
    sizes = {"hidden_size": d, "intermediate_size": 2 * d, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes["max_position_embeddings"] = POSITIONS
    return _base(LlamaForCausalLM, LlamaConfig, sizes, dtype, seed)


def tiny_gpt2(
    *, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 4, d: int = 32
) -> BaseModel:
    """A random GPT-2 with tied embeddings, of `Conv1D` layers: weights are (d_in, d_out)."""
    sizes = {"n_embd": d, "n_layer": layers, "n_head": 4, "n_positions": POSITIONS}
    return _base(GPT2LMHeadModel, GPT2Config, sizes, dtype, seed)


def save_tiny(folder: str | Path, base: BaseModel | None = None) -> Path:
    """Save a tiny model (default: `tiny_llama()`) and its tokenizer as a model folder."""
    base = base or tiny_llama()
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return Path(folder)
