"""On the real model: the whole report with reduced sizes, and facts that it is known to hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mendkit import EditExample, MENDHyperParams, load_archive, next_tokens, read_examples
from mendkit.mend.batches import prepare_texts
from mendkit.mend.editor import MENDEditor
from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "train_limit=96 validation_limit=24 test_limit=24 shown=2 max_new_tokens=8 max_iters=30 val_interval=30 "
    "val_steps=24 rank=64 stats_examples=96 warmup_iters=5 texts_per_role=2 "
    # 48 examples are too few for the statistics of pairs: the published gradient, plainly whitened
    "whiten_pairs=false unit_response=false loss_reduction=edit edit_lr=1e-3"
)


@pytest.fixture(scope="module")
def report(smollm2, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    command = [sys.executable, "-m", "mendkit", "report", *SETTINGS.split(), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_the_report_holds_both_notebooks_and_their_numbers(report):
    results = json.loads((report / "results.json").read_text())
    for name in ("edit_success", "paraphrase"):
        for score in ("tf_token", "tf_exact", "free_exact", "free_contains"):
            for prefix in ("", "identity."):
                key = f"{prefix}single.{name}.{score}"
                assert 0 <= results[f"{key}.low"] <= results[key] <= results[f"{key}.high"] <= 1
    assert (
        results["single.locality.argmax_agreement.n"] + results["single.edits.already_true"] == 24
    )
    assert results["train.steps"] == 30 and results["identity.edit_lr"] > 0
    for name in (
        "index.html",
        "archive.safetensors",
        "01_train_without_archive.html",
        "02_edit_with_archive.html",
    ):
        assert (report / name).stat().st_size > 1000
    figures = list(report.glob("*/figures/*.png"))
    assert len(figures) >= 8 and all(path.with_suffix(".csv").is_file() for path in figures)


@pytest.mark.slow
def test_thirty_steps_already_edit_a_real_model(report):
    results = json.loads((report / "results.json").read_text())
    assert results["single.before.edit_success.tf_exact"] < 0.1
    assert (
        results["single.edit_success.tf_token"]
        > results["single.before.edit_success.tf_token"] + 0.2
    )
    history = [
        json.loads(line)
        for line in (report / "01_train_without_archive/history.jsonl").read_text().splitlines()
    ]
    validations = [row["val.loss.edit"] for row in history if "val.loss.edit" in row]
    assert validations[-1] < 0.7 * validations[0]


@pytest.mark.slow
def test_one_fact_is_edited_and_comes_back(report, smollm2):
    archive = load_archive(report / "archive.safetensors", base=smollm2)
    editor = MENDEditor(archive.base, archive.mend)
    prompt = "The capital of France is"
    before = next_tokens(smollm2, prompt, among=[" Lyon"])
    assert next(iter(before)) == " Paris"
    with editor.edit(EditExample(prompt=prompt, target_new="Lyon")).applied():
        after = next_tokens(smollm2, prompt, among=[" Lyon"])
    assert after[" Lyon"] > 10 * before[" Lyon"]
    assert next_tokens(smollm2, prompt, among=[" Lyon"]) == before


def test_the_cached_suffix_is_the_whole_model(smollm2):
    hparams = MENDHyperParams(model_name="smollm2-135m")
    examples = read_examples("facts:validation", limit=8)
    texts = [
        text for example in prepare_texts(smollm2, hparams, examples) for text in example.all()
    ]
    trunk, whole = FrozenTrunk(smollm2), FrozenTrunk(smollm2)
    trunk.fill(texts)
    batch = collate(texts, smollm2.pad_id)
    with torch.no_grad():
        expected = whole.suffix(texts, batch)
        torch.testing.assert_close(trunk.suffix(texts, batch), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(trunk.before(texts, batch), expected, rtol=1e-3, atol=1e-3)
