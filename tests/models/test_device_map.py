"""A model that a device map spreads, partly onto the disk, is edited as if it were in one place."""

from pathlib import Path

import pytest
from accelerate import dispatch_model
from safetensors.torch import load_file

from mendkit.errors import ModelError
from mendkit.mend.editor import MENDEditor
from mendkit.mend.training import train
from mendkit.models.base import BaseModel
from mendkit.models.fingerprint import model_fingerprint, tensors_sha256
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.tiny import tiny_llama


def spread(folder: Path, **elsewhere: str) -> BaseModel:
    """The tiny Llama with its first, second and last block on disk (the last two hold sites)."""
    places = dict.fromkeys(
        ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu"
    )
    places |= {f"model.layers.{i}": "cpu" if i == 2 else "disk" for i in range(4)} | elsewhere
    base, options = tiny_llama(), {"main_device": "cpu", "force_hooks": True}
    model = dispatch_model(base.model, places, offload_dir=str(folder), **options)
    return BaseModel(model, base.tokenizer, name="tiny-llama")


def test_training_and_editing_give_the_same_bits(llama, tmp_path):
    base = spread(tmp_path / "offload")
    assert base.site_module(base.sites[0]).weight.is_meta
    assert model_fingerprint(base) == model_fingerprint(llama)
    found = {}
    for name, each in {"whole": llama, "spread": base}.items():
        h = hparams(max_iters=3, val_interval=3, batch_size=2, cache_dir=str(tmp_path / name))
        archive = train(h, EXAMPLES, EXAMPLES[:2], base=each, run_dir=tmp_path / name).archive
        editor = MENDEditor.from_hparams(h.replace(archive=str(archive)), base=each)
        edit = editor.edit(EXAMPLES[0]).scale(1000)
        with edit.applied():
            said = each.generate(EXAMPLES[0].prompt, max_new_tokens=8)
        tensors = tensors_sha256(sorted(load_file(archive).items()))
        norms = [float(each.site_weight(site).detach().norm()) for site in each.sites]
        found[name] = (tensors, edit.relative_norm(), said, norms)
    assert found["whole"] == found["spread"]
    assert found["whole"][2] != llama.generate(EXAMPLES[0].prompt, max_new_tokens=8)


def test_input_embeddings_on_no_device_are_refused(tmp_path):
    with pytest.raises(ModelError, match="input embeddings"):
        spread(tmp_path, **{"model.embed_tokens": "disk", "lm_head": "disk"})
