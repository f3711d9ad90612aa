"""Models with linear attention, convolutions or recurrences are scored like any causal model."""

import pytest
import torch
import transformers

from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.models.base import BaseModel
from tests.oracles.claims import EXAMPLES, editor_for, hparams
from tests.oracles.tiny import tiny_tokenizer

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
LINEAR |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2}
CONV = {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48, "block_multiple_of": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "mlp_only_layers": [0, 1, 2, 3]}
HYBRIDS = {
    "Lfm2": ("Lfm2Config", CONV),
    "Qwen3Next": ("Qwen3NextConfig", LINEAR | EXPERTS),
    "Qwen3_5": ("Qwen3_5TextConfig", LINEAR),
    "OlmoHybrid": ("OlmoHybridConfig", LINEAR),
    "RecurrentGemma": ("RecurrentGemmaConfig", {"lru_width": 32, "attention_window_size": 8}),
}


def tiny(name: str) -> BaseModel:
    config, sizes = HYBRIDS[name]
    tokenizer = tiny_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None}
    ids |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = getattr(transformers, config)(**WIDE, **sizes, **ids)
        model = getattr(transformers, f"{name}ForCausalLM")(settings)
    return BaseModel(model, tokenizer, name=name)


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_is_written_in_a_batch_is_what_each_edit_writes_alone(name):
    base = tiny(name)
    editor = editor_for(base)
    on = EvaluationSet(base, hparams(), EXAMPLES[:3], max_new_tokens=10)
    seen = set()
    for row in evaluate(editor, on).rows:
        texts = [text for text in row.outputs if text["after"] is not None]
        assert len(texts) > 4
        for text in texts:
            assert text["before"] == base.generate(text["prompt"], max_new_tokens=10)
            with editor.edit(EXAMPLES[row.index]).applied():
                assert (
                    text["after"].strip()
                    == base.generate(text["prompt"], max_new_tokens=10).strip()
                )
            seen.add(text["after"])
    assert len(seen) > 4
