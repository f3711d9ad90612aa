"""Claims about families: which layers `auto` picks, and that factors and trunk are right in every causal one.

The other families' factors and trunk: test_seq2seq_and_classifiers.py.
"""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedConfig, PreTrainedModel

from mendkit.errors import ModelError
from mendkit.mend.batches import edit_tokens, prepare_texts
from mendkit.mend.factors import capture_factors
from mendkit.mend.losses import edit_nll
from mendkit.models.sites import find_blocks, find_stacks, resolve_sites
from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.families import CAUSAL, FAMILIES, D, linear_names


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_picks_exactly_the_mlp_layers_of_the_last_blocks(family):
    family = FAMILIES[family]
    model = family.build()
    sites = resolve_sites(model, "auto")
    assert [site.name for site in sites] == family.expected
    assert set(family.expected) < linear_names(
        model
    )  # attention, and heads of their own, are left out
    assert all({D, site.d_in} - {site.d_out} for site in sites)
    for site in sites:
        weight = model.get_parameter(site.name)
        assert tuple(weight.shape) == (
            (site.d_in, site.d_out) if site.transposed else (site.d_out, site.d_in)
        )
        assert f".{site.block}." in site.name


def test_encoder_and_decoder_are_two_stacks_and_no_chain():
    for family, paths in {
        "t5": ["encoder.block", "decoder.block"],
        "bart": ["model.encoder.layers", "model.decoder.layers"],
    }.items():
        model = FAMILIES[family].build()
        assert list(find_stacks(model)) == paths and find_blocks(model) is None
        last = [site for site in resolve_sites(model, "auto") if site.scored_only]
        assert [site.name for site in last] == (
            FAMILIES[family].expected[-2:] if family == "bart" else []
        )


def test_a_second_tower_without_cross_attention_is_no_encoder():
    model = FAMILIES["llama"].build()
    model.vision = FAMILIES["llama"].build().model
    assert list(find_stacks(model)) == ["model.layers"]


class Unheard(PreTrainedModel):
    """A model of no known kind around another one."""

    config_class = PreTrainedConfig

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__(PreTrainedConfig())
        self.inner = inner

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_the_classes_nor_the_path_matter(family):
    model = FAMILIES[family].build()
    for module in model.modules():
        module.__class__ = type("Thing", (type(module),), {})
    names = [site.name for site in resolve_sites(Unheard(model), "auto")]
    assert names == [f"inner.{name}" for name in FAMILIES[family].expected]


def test_adapters_and_routers_are_never_picked():
    family = FAMILIES["llama"]
    model = family.build()
    block = model.model.layers[3]
    block.mlp.adapter_down, block.mlp.adapter_up = nn.Linear(D, 4), nn.Linear(4, D)
    block.mlp.up_proj = wrapped = nn.Module()
    wrapped.base_layer, wrapped.lora_A = (
        nn.Linear(D, 48),
        nn.ModuleDict({"default": nn.Linear(D, 2)}),
    )
    wrapped.lora_B = nn.ModuleDict({"default": nn.Linear(2, 48)})
    names = [site.name for site in resolve_sites(model, "auto")]
    at = family.expected.index("model.layers.3.mlp.up_proj.weight")
    assert names == [
        *family.expected[:at],
        "model.layers.3.mlp.up_proj.base_layer.weight",
        *family.expected[at + 1 :],
    ]
    block = model.model.layers[3] = family.build().model.layers[3]
    block.mlp.experts, block.mlp.gate = nn.ModuleList([nn.Linear(D, D)]), nn.Linear(D, 2)
    names = [site.name for site in resolve_sites(model, "auto")]
    assert (
        "model.layers.3.mlp.experts.0.weight" in names
        and "model.layers.3.mlp.gate.weight" not in names
    )


def test_what_stands_beside_an_mlp_that_is_called_so_is_not_picked():
    family = FAMILIES["llama"]
    model = family.build()
    model.model.layers[3].laurel = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, D))
    assert [site.name for site in resolve_sites(model, "auto")] == family.expected


def test_blocks_without_an_mlp_of_their_own_are_passed_over():
    family = FAMILIES["llama"]
    model = family.build()
    blocks = model.model.layers
    blocks[2].mlp = nn.Identity()
    assert [site.block for site in resolve_sites(model, "auto")] == [0, 0, 0, 1, 1, 1, 3, 3, 3]
    blocks[0].mlp = blocks[1].mlp  # one weight in two places
    assert [site.block for site in resolve_sites(model, "auto")] == [3, 3, 3]


def test_a_recurrent_or_convolutional_mixer_is_no_mlp():
    family = FAMILIES["llama"]
    model = family.build()
    mixer = model.model.layers[3].mixer = nn.Module()
    mixer.in_proj, mixer.conv = nn.Linear(D, D), nn.Conv1d(D, D, 3)
    assert [site.name for site in resolve_sites(model, "auto")] == family.expected


def test_experts_that_are_no_linear_layers_are_said_not_to_be_found():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"num_key_value_heads": 1, "num_local_experts": 2, "vocab_size": 40}
    with pytest.raises(
        ModelError, match=r"auto found no MLP of linear layers.*mendkit sites MODEL --all"
    ):
        resolve_sites(MixtralForCausalLM(MixtralConfig(**sizes)), "auto")


# ------------------------------------------------------------------------------- factors and trunk, causal families


@pytest.mark.parametrize("family", CAUSAL)  # OPT hands its MLP all tokens of a batch in one row
def test_factors_rebuild_the_gradient_of_the_weights(family):
    base = CAUSAL[family].base()
    texts = [edit_tokens(base, hparams(), example) for example in EXAMPLES[:3]]
    factors = capture_factors(FrozenTrunk(base), texts)
    weights = [base.site_module(site).weight.requires_grad_() for site in base.sites]
    batch = collate(texts, base.pad_id)
    logits = base.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    loss = edit_nll(logits[batch.scored], batch.targets, batch.rows, len(texts)).sum()
    for site, gradient in zip(base.sites, torch.autograd.grad(loss, weights), strict=True):
        expected = gradient.T if site.transposed else gradient
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(
            factors[site.name].weight_gradient(), expected, rtol=1e-3, atol=1e-4 * scale
        )


@pytest.mark.parametrize("family", CAUSAL)
def test_the_trunk_gives_the_whole_models_logits(family):
    base = CAUSAL[family].base()
    texts = [
        text for example in prepare_texts(base, hparams(), EXAMPLES[:2]) for text in example.all()
    ]
    trunk, batch = FrozenTrunk(base), collate(texts, base.pad_id)
    assert trunk.split and base.blocks.first == 1
    assert trunk.fill(texts) == len({text.key for text in texts})
    with torch.no_grad():
        alone = [
            base.model(input_ids=torch.tensor([t.ids]), use_cache=False).logits[0, list(t.scored)]
            for t in texts
        ]
        expected = torch.cat(alone)
        for got in (
            trunk.suffix(texts, batch),
            trunk.before(texts, batch),
            FrozenTrunk(base).suffix(texts, batch),
        ):
            torch.testing.assert_close(
                got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
            )


def test_a_model_that_is_no_chain_gives_the_same_numbers_without_a_cache():
    """Blocks that hand something else on than what the next one gets: nothing is cached, everything still works."""
    base = CAUSAL["llama"].base()
    base.model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))
    base = type(base)(base.model, base.tokenizer, name="no chain")
    assert base.blocks is None
    texts = [
        text for example in prepare_texts(base, hparams(), EXAMPLES[:2]) for text in example.all()
    ]
    trunk, batch = FrozenTrunk(base), collate(texts, base.pad_id)
    assert not trunk.split and trunk.fill(texts) == 0
    with torch.no_grad():
        alone = [
            base.model(input_ids=torch.tensor([t.ids]), use_cache=False).logits[0, list(t.scored)]
            for t in texts
        ]
        for got in (trunk.suffix(texts, batch), trunk.before(texts, batch)):
            torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-5)
