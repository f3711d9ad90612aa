"""Published architectures of the models in configs/: what a plan needs without a network."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

_32 = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_BART = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}
_BERT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_GPTJ = {
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "n_inner": 16384,
    "vocab_size": 50400,
}
_LLAMA = {**_32, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
_LLAMA3 = {**_32, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
_QWEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
}
_SMOL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
}
_T5 = {
    "d_model": 1024,
    "d_ff": 16384,
    "d_kv": 128,
    "num_layers": 24,
    "num_heads": 32,
    "vocab_size": 32128,
}
_T5 |= {"decoder_start_token_id": 0}

PUBLISHED = {  # `model_name` -> class and sizes
    "openai-community/gpt2": ("GPT2LMHeadModel", {}),
    "openai-community/gpt2-xl": ("GPT2LMHeadModel", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "EleutherAI/gpt-j-6b": ("GPTJForCausalLM", _GPTJ),
    "huggyllama/llama-7b": ("LlamaForCausalLM", _LLAMA),
    "meta-llama/Meta-Llama-3-8B": ("LlamaForCausalLM", _LLAMA3),
    "mistralai/Mistral-7B-v0.1": ("MistralForCausalLM", {**_LLAMA3, "vocab_size": 32000}),
    "Qwen/Qwen2.5-7B": (
        "Qwen2ForCausalLM",
        {**_QWEN, "num_key_value_heads": 4, "vocab_size": 152064},
    ),
    "smollm2-135m": (
        "LlamaForCausalLM",
        {**_SMOL, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    ),
    "google-t5/t5-3b": ("T5ForConditionalGeneration", _T5),
    "facebook/bart-base": (
        "BartForConditionalGeneration",
        {
            **_BART,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
            "vocab_size": 50265,
        },
    ),
    "google-bert/bert-base-uncased": ("BertForSequenceClassification", _BERT),
}


def published(model_name: str) -> PreTrainedModel | None:
    """A model of `PUBLISHED` on the meta device; None for another name."""
    if model_name not in PUBLISHED:
        return None
    kind, sizes = PUBLISHED[model_name]
    made = getattr(transformers, kind)
    with torch.device("meta"):
        return made(made.config_class(**sizes))
