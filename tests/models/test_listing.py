"""`python -m mendkit sites` lists a model's layers from its configuration alone."""

import json

import pytest
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mendkit.__main__ import main
from mendkit.models import listing
from mendkit.models.load import load_model, skeleton
from tests.oracles.families import FAMILIES, linear_names
from tests.oracles.tiny import save_tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a folder per family that holds a configuration and no weights."""
    monkeypatch.chdir(tmp_path)
    for name, family in FAMILIES.items():
        config = family.build().config
        config.architectures = [family.model]
        config.save_pretrained(tmp_path / name)
    return tmp_path


def listed(capsys, *words: str) -> dict:
    assert main(["sites", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_family_is_listed_without_weights(folder, capsys):
    for name, family in FAMILIES.items():
        found, whole = listed(capsys, name), family.build()
        layers = {layer["name"]: layer for layer in found["layers"]}
        assert (found["model"], found["kind"]) == (name, family.model)
        assert [name for name, layer in layers.items() if layer["auto"]] == family.expected
        head, table = whole.get_output_embeddings(), whole.get_input_embeddings()
        tied = {"lm_head.weight"} if head is not None and head.weight is table.weight else set()
        assert set(layers) == linear_names(whole) - tied
        for layer in layers.values():
            module = whole.get_submodule(layer["name"].removesuffix(".weight"))
            assert layer["shape"] == list(module.weight.shape)
            assert layer["parameters"] == module.weight.numel()
            assert (layer["kind"] == "Linear") == isinstance(module, nn.Linear)
            assert layer["block"] is None or f".{layer['block']}." in layer["name"]
        assert all(value.is_meta for value in skeleton(folder / name).parameters())


def test_auto_is_what_a_loaded_model_has(tmp_path, llama, capsys):
    model = save_tiny(tmp_path / "model", llama)
    auto = [layer["name"] for layer in listed(capsys, str(model))["layers"] if layer["auto"]]
    assert auto == [site.name for site in load_model(model).sites]


def test_people_see_the_mlps_or_everything_and_what_a_configuration_names(folder, capsys):
    def lines(*words):
        assert main(["sites", *words]) == 0
        return capsys.readouterr().out.splitlines()

    shown = lines("gpt2")
    assert shown[0] == "gpt2  (GPT2LMHeadModel; 4 blocks in transformer.h)"
    assert shown[2].split()[-3:] == ["0", "1,536", "transformer.h.0.mlp.c_fc.weight"]
    assert shown[9].split()[0] == "*" and len(shown) == 2 + 8 + 2
    assert shown[-2] == "*  inner_params: auto: 6 layers, 9,216 parameters"
    assert shown[-1] == "   --all shows 8 more layers that may be edited"
    shown = lines("gpt2", "--all")
    assert len(shown) == 2 + 16 + 1 and sum(line.startswith("* ") for line in shown) == 6 + 1
    named = "transformer.h.3.attn.c_attn.weight"
    (folder / "c.yaml").write_text(f"model_name: gpt2\ninner_params: [{named}]\n")
    shown = lines("c.yaml")
    assert [line.split()[-1] for line in shown if line.startswith(" +")] == [named]
    assert shown[-2] == "+  the inner_params given: 1 layer, 3,072 parameters"
    assert "LlamaForCausalLM" in lines("c.yaml", "model_name=llama", "inner_params=auto")[0]


MISTAKES = {
    "nowhere/model/x": "no such file or folder: 'nowhere/model/x'",
    "empty": "the folder empty has no config.json",
    "gpt2 inner_params=[h.9.mlp.c_fc.weight]": "no parameter 'h.9.mlp.c_fc.weight'; nearest: ",
    "broken": "cannot load the configuration of 'broken'",
    "odd": "odd is no model that can be edited",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(folder, typed, capsys):
    (folder / "empty").mkdir()
    for name, text in {"broken": "{", "odd": '{"model_type": "vit"}'}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    assert main(["sites", *typed.split()]) == 2
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert said.out == "" and last.startswith("error: ") and MISTAKES[typed] in last


class Plain(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.table, self.out = nn.Embedding(3, 2), nn.Linear(2, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def test_a_model_without_a_list_of_blocks_still_lists_its_layers():
    found = listing.describe(Plain(), "plain")
    assert found.stacks == {} and [layer.name for layer in found.layers] == ["out.weight"]
    assert listing.table(found, everything=True).startswith("plain  (Plain; no list of blocks)")
