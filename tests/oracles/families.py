"""Tiny random models of many families; what `auto` must pick in them is written out."""

from dataclasses import dataclass
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
_DELTA = {**_LLAMA, "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_DELTA |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_DELTA |= {"layer_types": ["linear_attention", "full_attention"] * 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_DEEPSEEK = {**_WIDE, **_MOE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1}
_DEEPSEEK |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 1}
_DEEPSEEK |= {"kv_lora_rank": 16, "q_lora_rank": 16}
_DEEPSEEK |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEBERTA = {**_WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_DEBERTA |= {"position_buckets": 16, "type_vocab_size": 0}
_H, _SHARED = "transformer.h.{}.mlp", "model.layers.{}.shared_mlp"
_GEMMA3N = {**_GEMMA, "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 8}
_GEMMA3N |= {"num_kv_shared_layers": 2, "laurel_rank": 4}
_LFM2 = {**_LLAMA, "layer_types": ["conv", "full_attention"] * 2}
_LFM2 |= {"block_auto_adjust_ff_dim": False}
_SHARE = {**_LLAMA, **_MOE, "shared_expert_intermediate_size": 24, "num_experts": 4}
_NEXT = {**_SHARE, **_DELTA}
_GRANITE = {**_LLAMA, **_MAMBA, "layer_types": ["mamba", "attention"] * 2}
_GRANITE |= {"shared_intermediate_size": FF, "num_local_experts": 2}
_RECURRENT = {**_HEADS, "intermediate_size": 2 * FF, "num_key_value_heads": 1}
_RECURRENT |= {"block_types": ["recurrent", "attention"], "attention_window_size": 16}
_STATE = {"hidden_size": D, "num_hidden_layers": 4, "state_size": 8}
_OSS = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
_OSS |= {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_WINDOW = {"attention_window": [8] * 4}
_NLLB = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
_PROPHET = {"hidden_size": D, "encoder_ffn_dim": FF, "num_encoder_layers": 2}
_PROPHET |= {"num_encoder_attention_heads": 4, "decoder_ffn_dim": FF, "num_decoder_layers": 2}
_PROPHET |= {"num_decoder_attention_heads": 4, "max_position_embeddings": POSITIONS}


@dataclass(frozen=True)
class Family:
    """A model class, its configuration, and the layers that are edited in it."""

    model: str
    config: str
    sizes: dict[str, Any]
    paths: dict[str, tuple[int, ...]]  # template of a layer's path -> blocks
    layers: tuple[str, ...]  # of each such block, in module order
    auto: bool = True  # False: `auto` finds nothing there, they are edited by name
    kind: str = "byte-level"  # of tokenizer
    spread: float = 0.15  # of the weights in `other_base`

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
        """Names of the weights that are edited, in module order."""
        names = []
        for path, blocks in self.paths.items():
            for block in blocks:
                names += [f"{path.format(block)}.{layer}.weight" for layer in self.layers]
        return names

    @property
    def inner_params(self) -> str | list[str]:
        return "auto" if self.auto else self.expected


_LAST = (1, 2, 3)  # of four blocks
_MLP, _FEED = "model.layers.{}.mlp", "model.layers.{}.feed_forward"
_GATED = "gate_proj up_proj down_proj"


def _causal(
    name: str, sizes: dict[str, Any], layers: str = _GATED, path: str = _MLP, **more: Any
) -> Family:
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    more = {"config": f"{name}Config", "paths": {path: _LAST}, **more}
    return Family(f"{name}{head}", sizes=sizes, layers=tuple(layers.split()), **more)


def _classifier(name: str, sizes: dict[str, Any], path: str, **more: Any) -> Family:
    layers = ("intermediate.dense", "output.dense")
    more = {"kind": "WordPiece, lower case", "spread": 0.6, **more}
    head = f"{name}ForSequenceClassification"
    return Family(head, f"{name}Config", sizes, {f"{path}.{{}}": _LAST}, layers, **more)


_BOS = {"kind": "metaspace, normaliser, BOS"}
_GEMMAS = {"kind": "metaspace, normaliser, no prefix, BOS"}
CAUSAL = {
    "gpt2": _causal("GPT2", _GPT2, "c_fc c_proj", "transformer.h.{}.mlp"),
    "gptj": _causal("GPTJ", {**_GPT2, "rotary_dim": 4}, "fc_in fc_out", "transformer.h.{}.mlp"),
    "gpt-neo": _causal("GPTNeo", _GPT_NEO, "c_fc c_proj", "transformer.h.{}.mlp"),
    "llama": _causal("Llama", _LLAMA, **_BOS),
    "mistral": _causal(
        "Mistral", {**_LLAMA, "sliding_window": 8}, kind="metaspace, pre-tokenizer, BOS"
    ),
    "qwen2": _causal("Qwen2", _LLAMA),
    "qwen3": _causal("Qwen3", {**_LLAMA, "head_dim": 8}),
    "gemma2": _causal("Gemma2", {**_GEMMA, "query_pre_attn_scalar": 8}, **_GEMMAS),
    "gemma3": _causal("Gemma3", _GEMMA, config="Gemma3TextConfig", **_GEMMAS),
    "phi": _causal("Phi", _WIDE, "fc1 fc2"),
    "phi3": _causal("Phi3", _LLAMA, "gate_up_proj down_proj", **_BOS),
    "opt": _causal("OPT", _OPT, "fc1 fc2", "model.decoder.layers.{}", kind="byte-level, BOS"),
}
_ATTENTION = {"auto": False, "path": "model.layers.{}.self_attn", "layers": "v_proj o_proj"}
_PYTHIA = "dense_h_to_4h dense_4h_to_h"
OTHERS = {
    "gpt-neox": _causal("GPTNeoX", _WIDE, _PYTHIA, "gpt_neox.layers.{}.mlp"),
    "bloom": _causal("Bloom", {"hidden_size": D, "n_layer": 4, "n_head": 4}, _PYTHIA, _H),
    "falcon": _causal("Falcon", _HEADS, _PYTHIA, _H),
    "olmo2": _causal("Olmo2", _LLAMA),
    "gemma3n": _causal("Gemma3n", _GEMMA3N, config="Gemma3nTextConfig"),
    # linear attention, convolutions and recurrences between the attention blocks, or beside
    "lfm2": _causal("Lfm2", _LFM2, "w1 w3 w2", _FEED),
    "qwen3-next": _causal("Qwen3Next", _NEXT, path=f"{_MLP}.shared_expert"),
    "qwen3.5": _causal("Qwen3_5", _DELTA, config="Qwen3_5TextConfig"),
    "olmo-hybrid": _causal("OlmoHybrid", _DELTA),
    "falcon-h1": _causal("FalconH1", {**_LLAMA, **_MAMBA, "mamba_d_ssm": 64}, path=_FEED),
    "granite-4": _causal("GraniteMoeHybrid", _GRANITE, "input_linear output_linear", _SHARED),
    "recurrent-gemma": _causal("RecurrentGemma", _RECURRENT, path="model.layers.{}.mlp_block"),
    "mamba": _causal("Mamba", _STATE, "out_proj", "backbone.layers.{}.mixer", auto=False),
    # mixtures of experts
    "qwen2-moe": _causal("Qwen2Moe", _SHARE, path=f"{_MLP}.shared_expert"),
    "deepseek-v3": _causal("DeepseekV3", _DEEPSEEK, path=f"{_MLP}.shared_experts"),
    "mixtral": _causal("Mixtral", {**_LLAMA, "num_local_experts": 4}, **_ATTENTION),
    "gpt-oss": _causal("GptOss", _OSS, **_ATTENTION),
}
_DENSE = {
    "encoder.block.{}.layer.1.DenseReluDense": (1, 2),
    "decoder.block.{}.layer.2.DenseReluDense": (2, 3),
}
_T5_MODEL = ("T5ForConditionalGeneration", "T5Config")
_GELU = {**_T5, "feed_forward_proj": "gated-gelu"}
_STACKS = {"model.encoder.layers.{}": (2, 3), "model.decoder.layers.{}": (1, 2)}
_UNIGRAM = {"kind": "unigram, EOS", "spread": 0.3}
_BOTH = {"kind": "byte-level, BOS and EOS"}
_CLASSES = {0: "Refutes", 1: "Supports", 2: "NEI"}
_NAMED = {"id2label": _CLASSES, "label2id": {name: i for i, name in _CLASSES.items()}}
WITH_ENCODER = {  # sequence-to-sequence models and classifiers
    "t5": Family(*_T5_MODEL, _T5, _DENSE, ("wi", "wo"), **_UNIGRAM),
    "t5-v1.1": Family(*_T5_MODEL, _GELU, _DENSE, ("wi_0", "wi_1", "wo"), **_UNIGRAM),
    "bart": Family(
        "BartForConditionalGeneration", "BartConfig", _BART, _STACKS, ("fc1", "fc2"), **_BOTH
    ),
    "bert": _classifier("Bert", {**_WIDE, "num_labels": 1}, "bert.encoder.layer"),
    "bert, 3 classes": _classifier("Bert", {**_WIDE, **_NAMED}, "bert.encoder.layer"),
    "deberta-v2": _classifier("DebertaV2", {**_DEBERTA, **_NAMED}, "deberta.encoder.layer"),
    "roberta": _classifier("Roberta", {**_WIDE, **_NAMED}, "roberta.encoder.layer", **_BOTH),
}
FAMILIES = CAUSAL | OTHERS | WITH_ENCODER

_START = {"decoder_start_token_id": 1}
_FUNNEL = {"d_model": D, "n_head": 4, "d_head": 8, "d_inner": FF, "block_sizes": [2, 2]}
REFUSED = {  # they pad, pool, reorder or route what a layer sees, or read the padding
    "fnet": ("FNetForSequenceClassification", "FNetConfig", _WIDE),
    "funnel": ("FunnelForSequenceClassification", "FunnelConfig", _FUNNEL),
    "led": ("LEDForConditionalGeneration", "LEDConfig", {**_BART, **_START, **_WINDOW}),
    "longformer": ("LongformerForSequenceClassification", "LongformerConfig", {**_WIDE, **_WINDOW}),
    "nllb-moe": ("NllbMoeForConditionalGeneration", "NllbMoeConfig", {**_BART, **_START, **_NLLB}),
    "prophetnet": (
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        {**_PROPHET, **_START},
    ),
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", {"d_model": D, "n_layer": 4, "n_head": 4}),
}


def other_base(case: str, kind: str | None = None) -> BaseModel:
    """A family with its kind of tokenizer, or with another. BERT has no end of text."""
    family, more = FAMILIES[case], {}
    tokenizer = tokenizer_of(kind or family.kind)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if family.kind.startswith("WordPiece"):
        backend = tokenizer.backend_tokenizer
        names = {"cls_token": BOS, "sep_token": EOS, "pad_token": PAD, "unk_token": UNK}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    elif case in ("t5", "t5-v1.1", "bart"):
        start = "eos_token_id" if case == "bart" else "pad_token_id"
        more = {"decoder_start_token_id": ids[start]}
    model = family.build(vocab_size=len(tokenizer), **ids, **more)
    model.config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() > 1):
            parameter.normal_(0, family.spread, generator=generator)
    return BaseModel(model, tokenizer, name=case, inner_params=family.inner_params)


NO_CHAIN = ("gemma3n", "t5", "t5-v1.1", "bart")  # nothing is cached below their edits


NO_ADAPTER = ("deepseek_v3", "mamba", "qwen3_next")  # PEFT renames or refuses their layers


def table_row(name: str) -> str:
    """A family's row in docs/DATA_AND_MODELS.md."""
    if name in REFUSED:
        return f"| {name} | `{REFUSED[name][0]}` | refused | |"
    family = FAMILIES[name]
    layers = ", ".join(f"`{layer}`" for layer in family.layers)
    how = "" if family.auto else " (by name)"
    cached = "no" if name in NO_CHAIN else "yes"
    return f"| {name} | `{family.model}` | {layers}{how} | {cached} |"


def linear_names(model: nn.Module) -> set[str]:
    """Weights of every layer that is linear, whatever it is for."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}
