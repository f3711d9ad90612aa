"""Adapters against PEFT itself, and truncation against the singular values of the dense change."""

import copy
import json
import sys

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel

from mendkit.errors import MendkitError
from mendkit.mend.export import LoRA
from mendkit.models.base import BaseModel
from mendkit.models.cache import cache_root
from mendkit.models.load import load_model
from tests.oracles.claims import EXAMPLES, editor_for, logits
from tests.oracles.tiny import save_tiny, tiny_llama, tiny_tokenizer

NAME = "model.layers.3.mlp.down_proj"


def with_adapter(base, folder) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base.model), folder)


def peft_logits(model, base):
    ids = torch.tensor([base.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_peft_finds_the_base_model_by_the_adapters_config(tmp_path):
    base = load_model(save_tiny(tmp_path / "model"))
    editor_for(base).edit(EXAMPLES[0]).save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    with editor_for(base).edit(EXAMPLES[0]).applied():
        wanted = logits(base)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(peft_logits(model, base), wanted, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize(("family", "rank"), [("llama64", 1), ("gpt264", 3)])
def test_truncation_is_the_best_of_its_rank_and_its_error_the_tail(family, rank, request, tmp_path):
    edit = editor_for(request.getfixturevalue(family)).edit(EXAMPLES[0])
    for site in edit.save_adapter(tmp_path, rank):
        update = edit.updates[site.name]
        dense = update.dense()
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        keep = min(rank, int((values > 1e-12 * values[0]).sum()))
        assert site.rank == keep
        assert site.relative_error == pytest.approx(
            float(values[keep:].norm() / values.norm()), rel=1e-6, abs=1e-12
        )
        lora = LoRA.of(site.name, update.u[0], update.delta[0] * update.coefficient, rank=rank)
        torch.testing.assert_close(lora.B @ lora.A, (left[:, :keep] * values[:keep]) @ right[:keep])


def test_more_tokens_than_features_and_repeated_tokens_have_no_more_rank_than_the_change():
    u, delta = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64)
    wide = LoRA.of("w", u, delta)
    torch.testing.assert_close(wide.B @ wide.A, delta.T @ u)
    assert len(wide.A) == 4 and len(LoRA.of("w", u[:1].repeat(9, 1), delta[:1].repeat(9, 1)).A) == 1
    none = LoRA.of("w", u, delta * 0)
    assert len(none.A) == 1 and none.relative_error == 0 and not (none.B @ none.A).any()


def test_a_layer_whose_name_ends_like_an_edited_ones_is_left_alone(tmp_path):
    base = tiny_llama()
    # draft.model.layers.3.mlp.down_proj ends with the site's whole name.
    base.model.draft = tiny_llama().model
    editor_for(base).edit(EXAMPLES[0]).save_adapter(tmp_path)
    model = with_adapter(base, tmp_path)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, m in model.named_modules()
        if hasattr(m, "lora_A")
    }
    assert adapted == {site.module for site in base.sites}


MIXTURES = {
    "DeepseekV3": {"first_k_dense_replace": 4, "kv_lora_rank": 16, "q_lora_rank": 16}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1},
    "Qwen3Moe": {"mlp_only_layers": [2, 3], "head_dim": 8},
}


def mixture(name: str, layer: str) -> BaseModel:
    """A random model of a class whose layers PEFT renames; `layer` of its last block is edited."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None}
    tokenizer = tiny_tokenizer()
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), **sizes, **MIXTURES[name]
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    site = f"model.layers.3.{layer}.weight"
    return BaseModel(model, tokenizer, name=name, inner_params=[site])


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("with_peft", [True, False])
def test_an_adapter_that_peft_would_lose_is_refused_by_name(name, with_peft, tmp_path, monkeypatch):
    """The control: attention's output, which PEFT does not rename."""
    dense = editor_for(mixture(name, "mlp.down_proj")).edit(EXAMPLES[0])
    base = mixture(name, "self_attn.o_proj")
    edit = editor_for(base).edit(EXAMPLES[0])
    with monkeypatch.context() as patch:
        if not with_peft:
            patch.setitem(sys.modules, "peft", None)
        with pytest.raises(MendkitError, match=r"of model\.layers\.3\.mlp\.down_proj otherwise"):
            dense.save_adapter(tmp_path)
        assert list(tmp_path.iterdir()) == []
        edit.save_adapter(tmp_path)
    with edit.applied():
        wanted = logits(base)
    assert float((wanted - logits(base)).abs().max()) > 1e-3
    got = peft_logits(with_adapter(base, tmp_path), base)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("owner/name", "owner/name"),
        ("/home/me/hub/models--owner--name/snapshots/3f1c", "owner/name"),
        (str(cache_root() / "smollm2-135m"), "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/me/models/mine", "/home/me/models/mine"),
    ],
)
def test_an_adapter_names_its_base_model_as_the_hub_does(place, name, tmp_path):
    base = tiny_llama()
    base.model.name_or_path = place
    editor_for(base).edit(EXAMPLES[0]).save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name


def test_misuse_is_named(llama, tmp_path):
    edit = editor_for(llama).edit(EXAMPLES[0])
    with pytest.raises(MendkitError, match="at least 1, got 0"):
        edit.save_adapter(tmp_path / "adapter", 0)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(MendkitError, match="cannot make the folder"):
        edit.save_adapter(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
