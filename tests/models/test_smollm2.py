"""On the bundled model: the whole report with reduced sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mendkit import EditExample, load_archive, next_tokens
from mendkit.mend.editor import MENDEditor

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "train_limit=32 validation_limit=4 test_limit=5 shown=1 max_new_tokens=4 max_iters=15 "
    "val_interval=15 val_steps=4 batch_size=8 rank=16 stats_examples=32 warmup_iters=3 "
    "texts_per_role=1 "
    # 32 examples are too few for the statistics of pairs: the published gradient, plainly whitened
    "whiten_pairs=false unit_response=false loss_reduction=edit edit_lr=1e-3"
)


@pytest.mark.slow
def test_fifteen_steps_already_edit_a_real_model(smollm2, tmp_path):
    command = [sys.executable, "-m", "mendkit", "report", *SETTINGS.split()]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for key in ("single.edit_success.tf_token", "identity.single.paraphrase.free_contains"):
        assert 0 <= results[f"{key}.low"] <= results[key] <= results[f"{key}.high"] <= 1
    before, after = (results[f"single.{when}edit_success.tf_token"] for when in ("before.", ""))
    assert results["train.steps"] == 15 and after > before + 0.2
    # One fact is edited and comes back.
    archive = load_archive(tmp_path / "archive.safetensors", base=smollm2)
    edit = MENDEditor(archive.base, archive.mend).edit(
        EditExample(prompt="The capital of France is", target_new="Lyon")
    )
    unedited = next_tokens(smollm2, "The capital of France is", among=[" Lyon"])
    with edit.applied():
        edited = next_tokens(smollm2, "The capital of France is", among=[" Lyon"])
    assert next(iter(unedited)) == " Paris" and edited[" Lyon"] > 10 * unedited[" Lyon"]
    assert next_tokens(smollm2, "The capital of France is", among=[" Lyon"]) == unedited
