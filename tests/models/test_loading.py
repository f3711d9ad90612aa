"""Loading from folders, files and hub ids; every way in which they are wrong; fingerprints."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import AutoConfig, BertConfig, PreTrainedTokenizerFast, ViTConfig
from transformers.utils import logging as transformers_logging

from mendkit.__main__ import main
from mendkit.cost.plan import check_memory, plan
from mendkit.errors import MendkitError, ModelError
from mendkit.hparams import MENDHyperParams
from mendkit.models import checkpoints
from mendkit.models.base import BaseModel
from mendkit.models.fingerprint import model_fingerprint
from mendkit.models.load import load_model, site_rows, skeleton
from tests.oracles.claims import EXAMPLES
from tests.oracles.families import linear_names
from tests.oracles.tiny import save_tiny, tiny_llama, tiny_tokenizer

UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path, llama) -> Path:
    return save_tiny(tmp_path / "my-model", llama)


def test_a_folder_loads_as_it_was_saved_frozen_and_silently(folder, llama, capfd):
    base = load_model(str(folder))
    assert base.name == "my-model" and base.sites == llama.sites and base.blocks == llama.blocks
    assert (base.dtype, base.device.type) == (torch.float32, "cpu")
    loaded, saved = (dict(b.model.named_parameters()) for b in (base, llama))
    assert list(loaded) == list(saved)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert not base.model.training and not any(p.requires_grad for p in loaded.values())
    assert capfd.readouterr().err == ""  # no bars, no advice
    shown = "BaseModel('my-model', LlamaForCausalLM, 9 sites, cpu, torch.float32)"
    assert repr(base) == shown


def test_a_tokenizer_that_does_not_fit_is_refused(llama, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-text token is None"):
        BaseModel(llama.model, tokenizer, name="x")
    tokenizer.add_special_tokens({"eos_token": "<|new|>"})
    with pytest.raises(ModelError, match="the model has 400"):
        BaseModel(llama.model, tokenizer, name="x")
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ModelError, match="not a fast tokenizer"):
        BaseModel(llama.model, tiny_tokenizer(), name="x")


def test_hyperparameters_bring_all_options(folder, tmp_path):
    other = tmp_path / "tokenizer"
    tiny_tokenizer(pad=False).save_pretrained(other)
    h = MENDHyperParams(model_name=str(folder), dtype="bfloat16", inner_params=(UP,))
    base = load_model(h.replace(tokenizer_name=str(other)))
    assert base.dtype == torch.bfloat16 and base.blocks.first == 3
    assert base.pad_id == base.eos_id and len(base.sites) == 1
    # EasyEdit's files repeat the model's name there.
    assert load_model(h.replace(tokenizer_name=str(folder))).pad_id != base.eos_id
    with pytest.raises(ModelError, match="device 'cuda:99' cannot be used"):
        load_model(h.replace(device="cuda:99"))


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "lost.gguf", ""])
def test_a_path_that_is_not_there_is_explained(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MendkitError, match=r"no such file or folder|model_name"):
        load_model(source)


def test_folders_and_files_that_are_no_model_are_explained(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json; give a model folder"):
        load_model(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GG")
    with pytest.raises(ModelError, match=r"it holds m\.gguf: give that file"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="not GGUF"):
        load_model(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelError, match="cannot load the configuration"):
        load_model(tmp_path / "m.gguf")


def test_a_hub_id_without_network_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub\nand more")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    words = r"'someone/model'.*couldn't connect.*local folder, or the bundled smollm2"
    with pytest.raises(ModelError, match=words):
        load_model("someone/model")


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(architectures=["BertForMaskedLM"]),
        ViTConfig(architectures=["ViTForImageClassification"]),
    ],
)
def test_what_neither_writes_nor_classifies_text_is_refused(config, tmp_path):
    config.save_pretrained(tmp_path)
    words = f"no model that can be edited.*{config.architectures[0]}.*trained head"
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path)


def test_a_model_whose_tokenizer_or_weights_are_lost_is_refused(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(folder)
    tensors = load(whole)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights \(model\.norm\.weight\)"):
        load_model(folder)
    weights.write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_model(folder)


def test_code_in_a_models_folder_runs_only_if_told_and_says_what_that_means(
    folder, tmp_path, monkeypatch, caplog
):
    modules, ran = tmp_path / "modules", tmp_path / "ran"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)
    bodies = {
        "Config": "model_type = 'my'",
        "ForCausalLM": "from .my_Config import MyConfig as config_class",
    }
    for name, body in bodies.items():
        (folder / f"my_{name}.py").write_text(
            f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
            f"from transformers import Llama{name}\nclass My{name}(Llama{name}):\n    {body}\n"
        )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my", "architectures": ["MyForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "my_Config.MyConfig",
        "AutoModelForCausalLM": "my_ForCausalLM.MyForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    h = MENDHyperParams(model_name=str(folder))
    meaning = r"was not run; such code may do whatever you may.*trust_remote_code: true"
    for act in (
        load_model,
        site_rows,
        lambda h: plan(h, EXAMPLES, EXAMPLES),
        lambda h: check_memory(h, EXAMPLES, EXAMPLES),
    ):
        with pytest.raises(ModelError, match=meaning):
            act(h)
    checkpoints.read_tokenizer(folder)
    assert not ran.exists() and "is run" not in caplog.text
    assert checkpoints.read_config(folder, trust_remote_code=True).model_type == "my"
    assert ran.exists() and "code from there is run; such code may do whatever" in caplog.text
    ran.unlink()
    loaded = load_model(h.replace(trust_remote_code=True))
    assert type(loaded.model).__name__ == "MyForCausalLM" and ran.exists()


def test_transformers_is_loud_again_after_loading(folder):
    def loudness():
        bars = transformers_logging.is_progress_bar_enabled()
        return transformers_logging.get_verbosity(), bars

    before = loudness()
    with pytest.raises(RuntimeError), checkpoints.silence_transformers():
        assert transformers_logging.get_verbosity() == logging.ERROR
        raise RuntimeError
    load_model(folder)
    assert loudness() == before and transformers_logging.set_tqdm_hook(None) is None


# ------------------------------------------------------------------------------ what can be edited


def test_the_command_lists_what_can_be_edited_without_weights(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = llama.model.config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained("model")
    assert all(value.is_meta for value in skeleton("model").parameters())
    h = MENDHyperParams(model_name="model")

    query = "model.layers.0.self_attn.q_proj.weight"
    assert main(["sites", "model", f"inner_params=[{query}]", "--json"]) == 0
    rows = {row.pop("name"): row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == linear_names(llama.model) - {"lm_head.weight"}
    assert [name for name, row in rows.items() if row["chosen"]] == [query]
    for name, row in rows.items():
        assert tuple(row["shape"]) == tuple(llama.model.get_parameter(name).shape)
        assert row["mlp"] == (".mlp." in name)
        assert (f".{row['block']}." in name) != (row["block"] is None)
    chosen = [site.name for site in llama.sites]
    assert [row["name"] for row in site_rows(h) if row["chosen"]] == chosen
    for more, count in (([], 12), (["--all"], len(rows))):
        assert main(["sites", "model", *more]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1 + count
    assert main(["sites", "model", "inner_params=[x.weight]"]) == 2
    assert "error: inner_params: 'x.weight' cannot be edited" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ fingerprints


def test_the_fingerprint_tells_sites_trunk_and_tokenizer_apart(folder):
    def differing(a, b):
        return {key for key in a if a[key] != b[key]}

    base = tiny_llama()
    before = model_fingerprint(base)
    assert differing(before, model_fingerprint(load_model(folder))) == {"name"}
    # a call leaves its mark in the tokenizer's backend
    base.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert model_fingerprint(base) == before == model_fingerprint(tiny_llama())
    with torch.no_grad():
        base.model.model.norm.weight[0] += 1
    trunk = model_fingerprint(base)
    assert differing(before, trunk) == {"trunk_sha256"}
    with torch.no_grad():
        base.site_module(base.sites[0]).weight[0, 0] += 1
    sites = model_fingerprint(base)
    assert differing(trunk, sites) == {"sites_sha256"}
    other = model_fingerprint(base.with_sites([base.sites[0].name]))
    assert differing(sites, other) == {"sites", "sites_sha256", "trunk_sha256"}
    assert other["sites"] == [{"name": base.sites[0].name, "shape": [64, 32]}]


def test_the_hash_of_the_sites_is_over_float32_bytes(llama_bf16):
    base = tiny_llama().with_sites([UP])
    values = base.site_module(base.sites[0]).weight.numpy().tobytes()
    by_hand = hashlib.sha256(f"{UP} torch.float32 (64, 32)\n".encode() + values).hexdigest()
    assert model_fingerprint(base)["sites_sha256"] == by_hand
    base.model.to(torch.float64)
    assert model_fingerprint(base)["sites_sha256"] == by_hand
    assert len(model_fingerprint(llama_bf16)["trunk_sha256"]) == 64
