"""Edit sites and blocks are read from the module tree (CORRECTNESS rows 10 and 25)."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from mendkit.errors import ModelError
from mendkit.models.base import BaseModel
from mendkit.models.sites import find_blocks, find_stacks, resolve_sites
from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.families import FAMILIES, REFUSED, D, Family, linear_names
from tests.oracles.kinds import tokenizer_of
from tests.oracles.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer


def auto_names(model: nn.Module) -> list[str]:
    return [site.name for site in resolve_sites(model, "auto")]


AUTO = [name for name, family in FAMILIES.items() if family.auto]


@pytest.mark.parametrize("name", AUTO)
def test_auto_picks_exactly_the_mlp_layers_of_the_last_blocks(name):
    family = FAMILIES[name]
    model = family.build()
    sites = resolve_sites(model, "auto")
    assert [site.name for site in sites] == family.expected
    # attention, and output layers, are left out
    assert set(family.expected) < linear_names(model)
    for site in sites:
        shape = (site.d_in, site.d_out) if site.transposed else (site.d_out, site.d_in)
        assert tuple(model.get_parameter(site.name).shape) == shape
        assert f".{site.block}." in site.name


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in AUTO])
def test_where_auto_finds_nothing_the_error_names_what_can_be_edited(name):
    family = FAMILIES[name]
    model = family.build()
    said = r"experts are one parameter" if name != "mamba" else "no MLP of linear layers"
    with pytest.raises(ModelError, match=rf"{said}.*{family.expected[-1]}.*sites MODEL --all"):
        resolve_sites(model, "auto")
    assert [site.name for site in resolve_sites(model, family.expected)] == family.expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_layer_sees_out_of_order_is_refused_by_the_models_name(name):
    model, config, sizes = REFUSED[name]
    tokenizer = tokenizer_of("byte-level, BOS and EOS")
    model = Family(model, config, sizes, {}, ()).build(vocab_size=len(tokenizer))
    said = "reads the padding" if name == "fnet" else ".*texts × positions in order"
    with pytest.raises(ModelError, match=f"{type(model).__name__} {said}"):
        BaseModel(model, tokenizer, name=name)


class _Both(nn.Module):
    """A block that also needs what the first one made, besides its states."""

    def __init__(self, block: nn.Module, notes: list) -> None:
        super().__init__()
        self.block, self.notes = block, notes

    def forward(self, hidden, *args, **kwargs):
        self.notes.append(hidden)
        return self.block(hidden + self.notes[0].mean(), *args, **kwargs)


@dataclass
class _Output:
    """What a block may return."""

    states: torch.Tensor
    weights: torch.Tensor | None


@pytest.mark.parametrize("form", ["tuple of three", "dataclass"])
def test_the_whole_structure_that_a_block_returns_is_learnt(form):
    model = tiny_llama().model
    for block in model.model.layers:
        inside = block.forward
        make = _Output if form == "dataclass" else lambda states, extra: (states, extra, None)
        block.forward = lambda x, f=inside, m=make, **options: m(f(x, **options), x.mean())
        block.register_forward_hook(lambda *args: args[-1], prepend=True)
    blocks, take = list(model.model.layers), (lambda y: y.states if form == "dataclass" else y[0])

    def run(inputs_embeds=None, input_ids=None, **_):
        states = model.model.embed_tokens(input_ids)
        for block in model.model.layers:
            states = take(block(states, position_embeddings=turn(states)))
        return BaseModelOutputWithPast(last_hidden_state=model.model.norm(states))

    def turn(states):
        places = torch.arange(states.shape[1])[None]
        return model.model.rotary_emb(states, places)

    model.model.forward = run
    base = BaseModel(model, tiny_tokenizer(), name=form)
    assert base.blocks.first == 1 and len(blocks) == 4
    trunk, texts = FrozenTrunk(base), [base.tokenize("The capital of France is", "Lima")]
    batch = collate(texts, base.pad_id)
    whole = trunk.suffix(texts, batch)
    assert trunk.fill(texts) == 1
    torch.testing.assert_close(trunk.suffix(texts, batch), whole)


def test_blocks_that_hand_on_more_than_their_states_are_no_chain():
    model, notes = tiny_llama().model, []
    model.model.register_forward_pre_hook(lambda *_: notes.clear())
    model.model.layers = nn.ModuleList(_Both(block, notes) for block in model.model.layers)
    assert BaseModel(model, tiny_tokenizer(), name="x").blocks is None


class Unheard(PreTrainedModel):
    """A model of no known kind around another one."""

    config_class = PreTrainedConfig

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__(PreTrainedConfig())
        self.inner = inner

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()


@pytest.mark.parametrize("name", AUTO)
def test_neither_the_classes_nor_the_path_matter(name):
    model = FAMILIES[name].build()
    for module in model.modules():
        module.__class__ = type("Thing", (type(module),), {})
    assert auto_names(Unheard(model)) == [f"inner.{site}" for site in FAMILIES[name].expected]


def test_encoder_and_decoder_are_two_stacks_and_no_chain():
    for name, paths in {
        "t5": ["encoder.block", "decoder.block"],
        "bart": ["model.encoder.layers", "model.decoder.layers"],
    }.items():
        model, family = FAMILIES[name].build(), FAMILIES[name]
        assert list(find_stacks(model)) == paths and find_blocks(model) is None
        last = [site.name for site in resolve_sites(model, "auto") if site.scored_only]
        assert last == (family.expected[-2:] if name == "bart" else [])


def test_a_list_elsewhere_is_not_the_blocks():
    model = tiny_llama().model
    model.model.layers[0].mlp.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    model.vision = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))  # far from the embeddings
    assert find_blocks(model) == ("model.layers", model.model.layers)
    # a second tower without cross-attention is no encoder
    model = FAMILIES["llama"].build()
    model.vision = FAMILIES["llama"].build().model
    assert list(find_stacks(model)) == ["model.layers"]


def test_adapters_routers_mixers_and_what_stands_beside_an_mlp_are_not_picked():
    family = FAMILIES["llama"]
    model = family.build()
    block = model.model.layers[3]
    block.mlp.adapter_down, block.mlp.adapter_up = nn.Linear(D, 4), nn.Linear(4, D)
    block.laurel = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, D))
    mixer = block.mixer = nn.Module()
    mixer.in_proj, mixer.conv = nn.Linear(D, D), nn.Conv1d(D, D, 3)
    assert auto_names(model) == family.expected
    wrapped = block.mlp.up_proj = nn.Module()
    wrapped.base_layer, wrapped.lora_A = nn.Linear(D, 48), nn.ModuleDict({"x": nn.Linear(D, 2)})
    up = "model.layers.3.mlp.up_proj"
    expected = [name.replace(up, f"{up}.base_layer") for name in family.expected]
    assert auto_names(model) == expected
    block = model.model.layers[3] = family.build().model.layers[3]
    block.mlp.experts, block.mlp.gate = nn.ModuleList([nn.Linear(D, D)]), nn.Linear(D, 2)
    names = auto_names(model)
    assert "model.layers.3.mlp.experts.0.weight" in names
    assert "model.layers.3.mlp.gate.weight" not in names


def test_blocks_without_an_mlp_are_passed_over():
    model = FAMILIES["llama"].build()
    blocks = model.model.layers
    blocks[2].mlp = nn.Identity()
    assert [site.block for site in resolve_sites(model, "auto")] == [0, 0, 0, 1, 1, 1, 3, 3, 3]
    blocks[0].mlp = blocks[1].mlp  # one weight in two places
    assert [site.block for site in resolve_sites(model, "auto")] == [3, 3, 3]


def test_orientation_is_that_of_the_module(base32):
    for site in base32.sites:
        module, x = base32.site_module(site), torch.randn(3, site.d_in)
        weight = module.weight.T if site.transposed else module.weight
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), x @ weight.T + bias)


def test_orientation_is_decided_per_module_not_per_model():
    model = tiny_gpt2().model
    model.transformer.h[3].mlp.c_proj = nn.Linear(128, 32)
    sites = {site.name: site for site in resolve_sites(model, "auto")}
    assert not sites["transformer.h.3.mlp.c_proj.weight"].transposed
    assert sites["transformer.h.3.mlp.c_fc.weight"].transposed


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_scored_only_sites_receive_no_gradient_elsewhere(family):
    """Oracle: the gradient of the last position's logits with respect to every site's output."""
    model = FAMILIES[family].build().requires_grad_(False)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    sites = resolve_sites(
        model, [f"{name}.weight" for name in linear if ".layers." in name or ".h." in name]
    )
    outputs = {}

    def keep(name):
        def hook(_, args, y):
            outputs[name] = y.requires_grad_() if y.is_leaf else y

        return hook

    for site in sites:
        model.get_submodule(site.module).register_forward_hook(keep(site.name))
    score = model(input_ids=torch.arange(5, 11)[None]).logits[0, -1].logsumexp(-1)
    gradients = torch.autograd.grad(score, [outputs[site.name] for site in sites])
    assert any(site.scored_only for site in sites)
    for site, gradient in zip(sites, gradients, strict=True):
        elsewhere = gradient.reshape(6, -1)[:-1].abs().max()
        assert site.scored_only == (site.block == 3 and "attn" not in site.name)
        if site.scored_only:
            assert elsewhere == 0
        elif site.block < 3 or "k_proj" in site.name:
            assert elsewhere > 0


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
    with pytest.raises(ModelError, match="or the output's"):  # it reads scored positions alone
        llama.with_sites(["lm_head.weight", names[0]])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("transformer.h.3.mlp.c_fx.weight", "nearest: transformer.h.3.mlp.c_fc.weight"),
        ("transformer.h.3.mlp.c_fc.bias", "nearest: transformer.h.3.mlp.c_fc.weight"),
        ("transformer.h.3.ln_1.weight", "no weight of a Linear or Conv1D"),
        ("lm_head.weight", "that no other layer shares"),
    ],
)
def test_a_name_that_is_no_site_is_explained(gpt2, name, words):
    with pytest.raises(ModelError, match=words):
        gpt2.with_sites([name])


@pytest.mark.parametrize("given", ["model.layers.3.mlp.up_proj.weight", "", ()])
def test_inner_params_must_be_auto_or_a_list(llama, given):
    with pytest.raises(ModelError, match="must be"):
        llama.with_sites(given)


def test_blocks_that_are_no_chain_are_not_used_as_one():
    model, tokenizer = tiny_llama().model, tiny_tokenizer()
    layer = model.model.layers[1]
    inside = layer.forward
    layer.forward = lambda x, **options: inside(x + 1, **options)  # its affair
    assert BaseModel(model, tokenizer, name="x").blocks is not None
    layer.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    assert BaseModel(model, tokenizer, name="x").blocks is None
