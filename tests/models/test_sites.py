"""Claims about edit sites and blocks (CORRECTNESS rows 10 and 25)."""

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from mendkit.errors import ModelError
from mendkit.models.base import BaseModel
from mendkit.models.sites import find_blocks, resolve_sites
from tests.oracles.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])


def tiny_opt() -> nn.Module:
    size = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "vocab_size": 400}
    return OPTForCausalLM(OPTConfig(num_hidden_layers=4, num_attention_heads=2, **size)).eval()


def test_auto_is_the_mlp_of_the_last_three_blocks(llama, gpt2):
    kinds = {"llama": ("gate_proj", "up_proj", "down_proj"), "gpt2": ("c_fc", "c_proj")}
    for base, path, names in (
        (llama, "model.layers", kinds["llama"]),
        (gpt2, "transformer.h", kinds["gpt2"]),
    ):
        expected = [f"{path}.{block}.mlp.{name}.weight" for block in (1, 2, 3) for name in names]
        assert [site.name for site in base.sites] == expected
        assert (base.blocks.path, base.blocks.first, base.blocks.last) == (path, 1, 3)


def test_auto_finds_linear_layers_that_are_children_of_the_block():
    names = [site.name for site in resolve_sites(tiny_opt(), "auto")]
    assert names == [
        f"model.decoder.layers.{b}.{fc}.weight" for b in (1, 2, 3) for fc in ("fc1", "fc2")
    ]


@FAMILIES
def test_orientation_is_that_of_the_module(family, request):
    base = request.getfixturevalue(family)
    for site in base.sites:
        module, x = base.site_module(site), torch.randn(3, site.d_in)
        weight = module.weight.T if site.transposed else module.weight
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), x @ weight.T + bias)
        assert module(x).shape == (3, site.d_out)
        assert f"{site.module}.weight" == site.name


def test_orientation_is_decided_per_module_not_per_model():
    model = tiny_gpt2().model
    block = model.transformer.h[3].mlp
    block.c_proj = nn.Linear(128, 32)
    sites = {s.name: s for s in resolve_sites(model, "auto")}
    assert not sites["transformer.h.3.mlp.c_proj.weight"].transposed
    assert sites["transformer.h.3.mlp.c_fc.weight"].transposed


@pytest.mark.parametrize("build", [lambda: tiny_llama().model, lambda: tiny_gpt2().model, tiny_opt])
def test_scored_only_sites_receive_no_gradient_elsewhere(build):
    """Oracle: the gradient of the last position's logits with respect to every site's output."""
    model = build()
    linear = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and "lm_head" not in n
    ]
    sites = resolve_sites(model, [f"{name}.weight" for name in linear])
    outputs = {}
    for site in sites:
        model.get_submodule(site.module).register_forward_hook(
            lambda _, args, y, name=site.name: outputs.setdefault(
                name, y.requires_grad_() if y.is_leaf else y
            )
        )
    ids = torch.arange(5, 11)[None]
    model.requires_grad_(False).eval()
    score = model(input_ids=ids).logits[0, -1].logsumexp(-1)
    gradients = torch.autograd.grad(score, list(outputs.values()), allow_unused=True)
    reach = {
        name: gradient.flatten(0, -2)[:-1].abs().max()
        for name, gradient in zip(outputs, gradients, strict=True)
    }
    assert any(site.scored_only for site in sites)
    for site in sites:
        mlp = "attn" not in site.name
        assert site.scored_only == (mlp and site.block == 3)
        if site.scored_only:
            assert reach[site.name] == 0
        elif site.block < 3 or "k_proj" in site.name:
            assert reach[site.name] > 0


def test_a_convolution_or_a_block_without_attention_is_never_scored_only():
    model = tiny_llama().model
    names = [f"model.layers.3.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert all(site.scored_only for site in resolve_sites(model, names))
    model.model.layers[3].mlp.conv = nn.Conv1d(4, 4, 3)
    assert not any(site.scored_only for site in resolve_sites(model, names))
    model = tiny_llama().model
    model.model.layers[3].self_attn = nn.Identity()
    assert not any(site.scored_only for site in resolve_sites(model, "auto"))


def test_explicit_sites_come_in_module_order_and_share_the_model(llama):
    names = ("model.layers.3.mlp.up_proj.weight", "model.layers.2.self_attn.v_proj.weight")
    other = llama.with_sites(names)
    assert [site.name for site in other.sites] == list(reversed(names))
    assert other.model is llama.model and other.tokenizer is llama.tokenizer
    assert other.blocks.first == 2 and llama.blocks.first == 1 and len(llama.sites) == 9


def test_a_site_outside_the_blocks_leaves_no_block_to_start_at(llama):
    other = llama.with_sites(["lm_head.weight", "model.layers.3.mlp.up_proj.weight"])
    assert other.blocks is None
    assert other.sites[1].block is None and not other.sites[1].scored_only


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("transformer.h.3.mlp.c_fx.weight", "nearest: transformer.h.3.mlp.c_fc.weight"),
        ("zzz", "names look like transformer.wte.weight"),
        ("transformer.h.3.mlp.c_fc.bias", "bias of a Conv1D"),
        ("transformer.h.3.ln_1.weight", "weight of a LayerNorm"),
        ("lm_head.weight", "shares its weight with transformer.wte.weight"),
    ],
)
def test_a_name_that_is_no_site_is_explained(gpt2, name, words):
    with pytest.raises(ModelError, match=words):
        gpt2.with_sites([name])


@pytest.mark.parametrize("given", ["model.layers.3.mlp.up_proj.weight", "", (), []])
def test_inner_params_must_be_auto_or_a_list(llama, given):
    with pytest.raises(ModelError, match="must be"):
        llama.with_sites(given)


def test_a_layer_used_twice_is_no_site():
    model = tiny_llama().model
    model.model.layers[3].mlp.up_proj = model.model.layers[2].mlp.up_proj
    with pytest.raises(
        ModelError, match=r"shares its weight with model.layers.2.mlp.up_proj.weight"
    ):
        resolve_sites(model, ["model.layers.3.mlp.up_proj.weight"])


def test_blocks_are_not_the_longest_list_inside_them():
    model = tiny_llama().model
    model.model.layers[0].mlp.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    model.vision = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))  # farther from the embeddings
    assert find_blocks(model)[0] == "model.layers"
    assert find_blocks(model)[1] is model.model.layers


def test_blocks_that_are_no_chain_are_not_used_as_one():
    model, tokenizer = tiny_llama().model, tiny_tokenizer()
    block = type(model.model.layers[1])
    model.model.layers[1].forward = lambda x, **options: block.forward(
        model.model.layers[1], x + 1, **options
    )
    assert (
        BaseModel(model, tokenizer, name="x").blocks is not None
    )  # what a block does inside is its own affair
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    assert BaseModel(model, tokenizer, name="x").blocks is None
