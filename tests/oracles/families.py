"""Tiny random models of many families, built from their configuration classes; what `auto` must pick is written out."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from mendkit.models.base import BaseModel
from tests.oracles.kinds import BOS, EOS, PAD, UNK, tokenizer_of
from tests.oracles.tiny import POSITIONS, tiny_tokenizer

D, FF, LAYERS = 32, 48, 4
_HEADS = {
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "hidden_size": D,
    "max_position_embeddings": POSITIONS,
}
_LLAMA = {**_HEADS, "intermediate_size": FF, "num_key_value_heads": 2}
_GEMMA = {
    **_LLAMA,
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GPT2 = {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS, "n_inner": FF}
_GPT_NEO = {
    "hidden_size": D,
    "num_layers": LAYERS,
    "num_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GPT_NEO |= {
    "attention_types": [[["global", "local"], 2]],
    "window_size": 8,
    "intermediate_size": FF,
}
_OPT = {**_HEADS, "ffn_dim": FF, "word_embed_proj_dim": 16}
_T5 = {
    "d_model": D,
    "d_kv": 8,
    "d_ff": FF,
    "num_layers": 3,
    "num_decoder_layers": 4,
    "num_heads": 4,
}
_BART = {"d_model": D, "encoder_layers": 4, "decoder_layers": 3, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": FF, "decoder_ffn_dim": FF}


@dataclass(frozen=True)
class Family:
    """A model class, its configuration's class and values, and the layers `auto` must pick in it."""

    model: str
    config: str
    sizes: dict[str, Any]
    paths: dict[str, tuple[int, ...]]  # template of a layer's path -> blocks
    layers: tuple[str, ...]  # of each such block, in module order

    def build(self, **more: Any) -> PreTrainedModel:
        """A random float32 model in eval mode; `more` are further values of the configuration."""
        spread = "init_std" if self.config in ("BartConfig", "OPTConfig") else "initializer_range"
        values = {
            "vocab_size": len(tiny_tokenizer()),
            spread: 0.15,
            "bos_token_id": None,
            "eos_token_id": 0,
        } | self.sizes
        values = {**values, "pad_token_id": 1, **more}
        config = getattr(transformers, self.config)(**values)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(transformers, self.model)(config).eval()

    def base(self) -> BaseModel:
        """The same with the tiny tokenizer, for causal models."""
        return BaseModel(self.build(), tiny_tokenizer(), name=self.model)

    @property
    def expected(self) -> list[str]:
        """Names of the weights that `auto` must pick, in module order."""
        return [
            f"{path.format(block)}.{layer}.weight"
            for path, blocks in self.paths.items()
            for block in blocks
            for layer in self.layers
        ]


def _gated(name: str, **more: Any) -> Family:
    layers = ("gate_proj", "up_proj", "down_proj")
    return Family(
        f"{name}ForCausalLM",
        f"{name}Config",
        {**_LLAMA, **more},
        {"model.layers.{}.mlp": (1, 2, 3)},
        layers,
    )


_H, _FC = {"transformer.h.{}.mlp": (1, 2, 3)}, ("fc1", "fc2")
_DENSE = {
    "encoder.block.{}.layer.1.DenseReluDense": (1, 2),
    "decoder.block.{}.layer.2.DenseReluDense": (2, 3),
}
_BERT = {"bert.encoder.layer.{}": (1, 2, 3)}
CAUSAL = {
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", _GPT2, _H, ("c_fc", "c_proj")),
    "gptj": Family(
        "GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}, _H, ("fc_in", "fc_out")
    ),
    "gpt-neo": Family("GPTNeoForCausalLM", "GPTNeoConfig", _GPT_NEO, _H, ("c_fc", "c_proj")),
    "llama": _gated("Llama"),
    "mistral": _gated("Mistral", sliding_window=8),
    "qwen2": _gated("Qwen2"),
    "qwen3": _gated("Qwen3", head_dim=8),
    "gemma2": _gated("Gemma2", **_GEMMA, query_pre_attn_scalar=8),
    "gemma3": replace(_gated("Gemma3", **_GEMMA), config="Gemma3TextConfig"),
    "phi": Family(
        "PhiForCausalLM", "PhiConfig", {**_HEADS, "intermediate_size": FF}, _gated("Phi").paths, _FC
    ),
    "phi3": Family(
        "Phi3ForCausalLM", "Phi3Config", _LLAMA, _gated("Phi3").paths, ("gate_up_proj", "down_proj")
    ),
    "opt": Family("OPTForCausalLM", "OPTConfig", _OPT, {"model.decoder.layers.{}": (1, 2, 3)}, _FC),
}
OTHERS = {
    "t5": Family("T5ForConditionalGeneration", "T5Config", _T5, _DENSE, ("wi", "wo")),
    "t5-v1.1": Family(
        "T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}, _DENSE,
        ("wi_0", "wi_1", "wo"),
    ),
    "bart": Family(
        "BartForConditionalGeneration", "BartConfig", _BART,
        {"model.encoder.layers.{}": (2, 3), "model.decoder.layers.{}": (1, 2)}, _FC,
    ),
    "bert": Family(
        "BertForSequenceClassification", "BertConfig", {**_HEADS, "intermediate_size": FF}, _BERT,
        ("intermediate.dense", "output.dense"),
    ),
}  # fmt: skip
FAMILIES = CAUSAL | OTHERS
_CLASSES = {0: "Refutes", 1: "Supports", 2: "NEI"}
KIND_OF = {  # case -> its family above, its kind of tokenizer, the spread of its weights, more of its configuration
    "t5": ("t5", "unigram, EOS", 0.3, {}),
    "t5-v1.1": ("t5-v1.1", "unigram, EOS", 0.3, {}),
    "bart": ("bart", "byte-level, BOS and EOS", 0.15, {}),
    "bert": ("bert", "WordPiece, lower case", 0.6, {"num_labels": 1}),
    "bert, 3 classes": (
        "bert", "WordPiece, lower case", 0.6,
        {"id2label": _CLASSES, "label2id": {name: i for i, name in _CLASSES.items()}},
    ),
}  # fmt: skip
"""Sequence-to-sequence models and classifiers with the tokenizer that they come with."""

_OF_CAUSAL = {
    "byte-level": ("gpt2", "gptj", "gpt-neo", "qwen2", "qwen3", "phi", "llama"),
    "byte-level, BOS": ("opt", "llama"),
    "metaspace, normaliser, BOS": ("llama", "phi3"),
    "metaspace, normaliser, no prefix, BOS": ("gemma2", "gemma3"),
    "metaspace, pre-tokenizer, BOS": ("mistral",),
}
CAUSAL_KIND_OF = {
    f"{f}: {kind}": (f, kind, 0.15, {}) for kind, families in _OF_CAUSAL.items() for f in families
}
"""The causal families, with the tokenizers of SmolLM, Llama 3 and Llama 2 for Llama's."""


def other_base(case: str, kind: str | None = None) -> BaseModel:
    """A case of the two above as a base model, or with another kind of tokenizer. BERT's has no end of text."""
    family, own, spread, more = (KIND_OF | CAUSAL_KIND_OF)[case]
    tokenizer = tokenizer_of(kind or own)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if family == "bert":
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            cls_token=BOS,
            sep_token=EOS,
            pad_token=PAD,
            unk_token=UNK,
        )
    elif family not in CAUSAL:
        more = {
            "decoder_start_token_id": ids["eos_token_id" if family == "bart" else "pad_token_id"],
            **more,
        }
    model = FAMILIES[family].build(vocab_size=len(tokenizer), **ids, **more)
    model.config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() > 1):
            parameter.normal_(0, spread, generator=generator)
    return BaseModel(model, tokenizer, name=case)


def linear_names(model: nn.Module) -> set[str]:
    """Weights of every layer that is linear, whatever it is for."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}
