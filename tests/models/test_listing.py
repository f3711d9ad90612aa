"""Claims about `python -m mendkit sites`: what it lists, from the configuration alone, and what mistakes are told."""

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
        model = family.build()
        model.config.architectures = [family.model]
        model.config.save_pretrained(tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["config.json"]
    return tmp_path


def listed(capsys, *words: str) -> dict:
    assert main(["sites", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_family_is_listed_without_weights(folder, capsys):
    for name, family in FAMILIES.items():
        found, whole = listed(capsys, name), family.build()
        assert (found["model"], found["kind"]) == (name, family.model)
        assert [layer["name"] for layer in found["layers"] if layer["auto"]] == family.expected
        head, table = whole.get_output_embeddings(), whole.get_input_embeddings()
        tied = {"lm_head.weight"} if head is not None and head.weight is table.weight else set()
        assert {layer["name"] for layer in found["layers"]} == linear_names(whole) - tied
        for layer in found["layers"]:
            weight = whole.get_parameter(layer["name"])
            assert (layer["shape"], layer["parameters"]) == (list(weight.shape), weight.numel())
            assert (layer["kind"] == "Linear") == isinstance(
                whole.get_submodule(layer["name"][:-7]), nn.Linear
            )
            assert layer["block"] is None or f".{layer['block']}." in layer["name"]
            assert layer["block"] is not None or not layer["auto"]
        assert all(value.is_meta for value in skeleton(folder / name).parameters())


def test_auto_is_what_a_loaded_model_has(tmp_path, llama, capsys):
    model = save_tiny(tmp_path / "model", llama)
    found = listed(capsys, str(model))
    assert tuple(la["name"] for la in found["layers"] if la["auto"]) == tuple(
        s.name for s in load_model(model).sites
    )


def test_people_see_the_mlps_or_everything_and_what_a_configuration_names(folder, capsys):
    assert main(["sites", "gpt2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "gpt2  (GPT2LMHeadModel; 4 blocks in transformer.h)"
    assert lines[2].split() == [
        "Conv1D",
        "32",
        "×",
        "48",
        "0",
        "1,536",
        "transformer.h.0.mlp.c_fc.weight",
    ]
    assert lines[9].split()[0] == "*" and len(lines) == 2 + 8 + 2
    assert lines[-2] == "*  inner_params: auto: 6 layers, 9,216 parameters"
    assert lines[-1] == "   --all shows 8 more layers that may be edited"
    assert main(["sites", "gpt2", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 16 + 1 and sum(line.startswith("* ") for line in lines) == 6 + 1
    (folder / "c.yaml").write_text(
        "model_name: gpt2\ninner_params: [transformer.h.3.attn.c_attn.weight]\n"
    )
    assert main(["sites", "c.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(" +")] == [lines[-6]]
    assert lines[-6].endswith("transformer.h.3.attn.c_attn.weight")
    assert lines[-2] == "+  the inner_params given: 1 layer, 3,072 parameters"
    assert main(["sites", "c.yaml", "model_name=llama", "inner_params=auto"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_the_bundled_model_is_read_from_its_converted_folder(folder, monkeypatch, capsys):
    monkeypatch.setattr("mendkit.models.load.bundled_model", lambda: folder / "llama")
    found = listed(capsys, "smollm2-135m")
    assert found["model"] == "smollm2-135m" and sum(layer["auto"] for layer in found["layers"]) == 9


MISTAKES = {
    "nowhere/model/x": "no such file or folder: 'nowhere/model/x'",
    "nowhere.yaml": "nowhere.yaml: cannot be read",
    "empty": "the folder empty has no config.json",
    "gpt2 rank=0": "rank must be >= 1",
    "gpt2 inner_params=[h.9.mlp.c_fc.weight]": "the model has no parameter 'h.9.mlp.c_fc.weight'; nearest: ",
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
    assert (
        said.out == ""
        and said.err.splitlines()[-1].startswith("error: ")
        and MISTAKES[typed] in said.err
    )


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
    lines = listing.table(found, everything=True).splitlines()
    assert lines[0] == "plain  (Plain; no list of blocks)" and lines[-1].startswith(
        "*  inner_params: auto: 0 layers"
    )
