"""A model that a device map spreads, partly onto the disk, is edited as if it were in one place."""

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from mendkit.errors import ModelError
from mendkit.mend.archive import inspect_archive
from mendkit.mend.editor import MENDEditor
from mendkit.mend.training import train
from mendkit.models.base import BaseModel
from mendkit.models.fingerprint import model_fingerprint
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.tiny import tiny_llama


def spread(folder: Path, **elsewhere: str) -> BaseModel:
    """The tiny Llama with its first, second and last block on disk (the last two hold sites)."""
    parts = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    blocks = {f"model.layers.{i}": "cpu" if i == 2 else "disk" for i in range(4)}
    base, places = tiny_llama(), parts | blocks | elsewhere
    model = dispatch_model(
        base.model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )
    return BaseModel(model, base.tokenizer, name="tiny-llama")


def test_training_and_editing_give_the_same_bits(llama, tmp_path):
    base = spread(tmp_path / "offload")
    assert base.site_module(base.sites[0]).weight.device.type == "meta"
    assert model_fingerprint(base) == model_fingerprint(llama)
    edits = {}
    for name, own in {"whole": llama, "spread": base}.items():
        h = hparams(max_iters=3, val_interval=3, batch_size=2, cache_dir=str(tmp_path / name))
        archive = train(h, EXAMPLES, EXAMPLES[:2], base=own, run_dir=tmp_path / name).archive
        edit = (
            MENDEditor.from_hparams(h.replace(archive=str(archive)), base=own)
            .edit(EXAMPLES[0])
            .scale(1000)
        )
        with edit.applied():
            said = own.generate(EXAMPLES[0].prompt, max_new_tokens=8)
        edits[name] = (inspect_archive(archive)["sha256"], edit.relative_norm(), said)
    assert edits["whole"] == edits["spread"]
    assert edits["whole"][2] != llama.generate(EXAMPLES[0].prompt, max_new_tokens=8)
    with torch.no_grad():
        dense = {site.name: float(base.site_weight(site).norm()) for site in base.sites}
    assert dense == {
        site.name: float(llama.site_module(site).weight.detach().norm()) for site in llama.sites
    }


def test_input_embeddings_on_no_device_are_refused(tmp_path):
    with pytest.raises(ModelError, match="input embeddings"):
        spread(tmp_path, **{"model.embed_tokens": "disk", "lm_head": "disk"})
