"""Tiny random models of many families; what `auto` must pick in them is written out."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from mendkit.models.base import BaseModel
from tests.oracles.kinds import BOS, EOS, PAD, UNK, tokenizer_of
from tests.oracles.tiny import POSITIONS, tiny_tokenizer

D, FF = 32, 48
_HEADS = {"num_attention_heads": 4, "num_hidden_layers": 4, "hidden_size": D}
_HEADS |= {"max_position_embeddings": POSITIONS}
_WIDE = {**_HEADS, "intermediate_size": FF}
_LLAMA = {**_WIDE, "num_key_value_heads": 2}
_GEMMA = {**_LLAMA, "head_dim": 8, "sliding_window": 8}
_GEMMA |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
_GPT2 = {"n_embd": D, "n_layer": 4, "n_head": 4, "n_positions": POSITIONS, "n_inner": FF}
_GPT_NEO = {"hidden_size": D, "num_layers": 4, "num_heads": 4, "intermediate_size": FF}
_GPT_NEO |= {"max_position_embeddings": POSITIONS, "window_size": 8}
_GPT_NEO |= {"attention_types": [[["global", "local"], 2]]}
_OPT = {**_HEADS, "ffn_dim": FF, "word_embed_proj_dim": 16}
_T5 = {"d_model": D, "d_kv": 8, "d_ff": FF, "num_heads": 4}
_T5 |= {"num_layers": 3, "num_decoder_layers": 4}
_BART = {"d_model": D, "encoder_layers": 4, "decoder_layers": 3, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": FF, "decoder_ffn_dim": FF}


@dataclass(frozen=True)
class Family:
    """A model class, its configuration, and the layers that `auto` must pick in it."""

    model: str
    config: str
    sizes: dict[str, Any]
    paths: dict[str, tuple[int, ...]]  # template of a layer's path -> blocks
    layers: tuple[str, ...]  # of each such block, in module order

    def build(self, **more: Any) -> PreTrainedModel:
        """A random float32 model in eval mode; `more` are further values of the configuration."""
        spread = "init_std" if self.config in ("BartConfig", "OPTConfig") else "initializer_range"
        values = {"vocab_size": len(tiny_tokenizer()), spread: 0.15, "bos_token_id": None}
        values |= {"eos_token_id": 0, "pad_token_id": 1, **self.sizes, **more}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = getattr(transformers, self.config)(**values)
            return getattr(transformers, self.model)(config).eval()

    def base(self) -> BaseModel:
        """The same with the tiny tokenizer, for causal models."""
        return BaseModel(self.build(), tiny_tokenizer(), name=self.model)

    @property
    def expected(self) -> list[str]:
        """Names of the weights that `auto` must pick, in module order."""
        names = []
        for path, blocks in self.paths.items():
            for block in blocks:
                names += [f"{path.format(block)}.{layer}.weight" for layer in self.layers]
        return names


def _causal(
    name: str, sizes: dict[str, Any], layers: str, path: str = "model.layers.{}.mlp"
) -> Family:
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return Family(f"{name}{head}", f"{name}Config", sizes, {path: (1, 2, 3)}, tuple(layers.split()))


_H, _GATED = "transformer.h.{}.mlp", "gate_proj up_proj down_proj"
CAUSAL = {
    "gpt2": _causal("GPT2", _GPT2, "c_fc c_proj", _H),
    "gptj": _causal("GPTJ", {**_GPT2, "rotary_dim": 4}, "fc_in fc_out", _H),
    "gpt-neo": _causal("GPTNeo", _GPT_NEO, "c_fc c_proj", _H),
    "llama": _causal("Llama", _LLAMA, _GATED),
    "mistral": _causal("Mistral", {**_LLAMA, "sliding_window": 8}, _GATED),
    "qwen2": _causal("Qwen2", _LLAMA, _GATED),
    "qwen3": _causal("Qwen3", {**_LLAMA, "head_dim": 8}, _GATED),
    "gemma2": _causal("Gemma2", {**_GEMMA, "query_pre_attn_scalar": 8}, _GATED),
    "gemma3": replace(_causal("Gemma3", _GEMMA, _GATED), config="Gemma3TextConfig"),
    "phi": _causal("Phi", _WIDE, "fc1 fc2"),
    "phi3": _causal("Phi3", _LLAMA, "gate_up_proj down_proj"),
    "opt": _causal("OPT", _OPT, "fc1 fc2", "model.decoder.layers.{}"),
}
_DENSE = {
    "encoder.block.{}.layer.1.DenseReluDense": (1, 2),
    "decoder.block.{}.layer.2.DenseReluDense": (2, 3),
}
_T5_MODEL = ("T5ForConditionalGeneration", "T5Config")
_GELU = {**_T5, "feed_forward_proj": "gated-gelu"}
_STACKS = {"model.encoder.layers.{}": (2, 3), "model.decoder.layers.{}": (1, 2)}
_BERT = {"bert.encoder.layer.{}": (1, 2, 3)}
_BERT_LAYERS = ("intermediate.dense", "output.dense")
FAMILIES = CAUSAL | {
    "t5": Family(*_T5_MODEL, _T5, _DENSE, ("wi", "wo")),
    "t5-v1.1": Family(*_T5_MODEL, _GELU, _DENSE, ("wi_0", "wi_1", "wo")),
    "bart": Family("BartForConditionalGeneration", "BartConfig", _BART, _STACKS, ("fc1", "fc2")),
    "bert": Family("BertForSequenceClassification", "BertConfig", _WIDE, _BERT, _BERT_LAYERS),
}
_CLASSES = {0: "Refutes", 1: "Supports", 2: "NEI"}
_NAMED = {"id2label": _CLASSES, "label2id": {name: i for i, name in _CLASSES.items()}}
KIND_OF = {  # case -> family, kind of tokenizer, spread of the weights, more of the configuration
    "t5": ("t5", "unigram, EOS", 0.3, {}),
    "t5-v1.1": ("t5-v1.1", "unigram, EOS", 0.3, {}),
    "bart": ("bart", "byte-level, BOS and EOS", 0.15, {}),
    "bert": ("bert", "WordPiece, lower case", 0.6, {"num_labels": 1}),
    "bert, 3 classes": ("bert", "WordPiece, lower case", 0.6, _NAMED),
}
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
    """A case of the two above, or one with another kind of tokenizer. BERT has no end of text."""
    family, usual, spread, more = (KIND_OF | CAUSAL_KIND_OF)[case]
    tokenizer = tokenizer_of(kind or usual)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if family == "bert":
        backend = tokenizer.backend_tokenizer
        names = {"cls_token": BOS, "sep_token": EOS, "pad_token": PAD, "unk_token": UNK}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    elif family not in CAUSAL:
        start = "eos_token_id" if family == "bart" else "pad_token_id"
        more = {"decoder_start_token_id": ids[start], **more}
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
