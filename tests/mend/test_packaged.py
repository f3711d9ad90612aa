"""The archive in the box: its size, what it says of itself, and that it edits."""

import json

import pytest

from mendkit import EditExample, MENDEditor, MENDHyperParams, inspect_archive, read_examples
from mendkit.mend.batches import prepare_texts
from mendkit.mend.validation import validate
from mendkit.models.trunk import FrozenTrunk
from mendkit.places import archive_file
from mendkit.runs import file_sha256

NAME = "smollm2-135m"


def test_it_is_small_and_its_card_is_of_this_file():
    path = archive_file(NAME)
    assert path.stat().st_size < 20e6
    card = (path.parent / "README.md").read_text()
    assert file_sha256(path) in card


def test_it_holds_no_path_of_the_machine_that_trained_it():
    metadata = inspect_archive(NAME)
    assert metadata["hparams"]["model_name"] == NAME
    told = json.dumps({key: metadata[key] for key in ("hparams", "training")})
    assert "/" not in told.replace("edit/", "")


@pytest.mark.slow
def test_it_edits_what_the_model_says_rightly_and_little_else(smollm2):
    hparams = MENDHyperParams(model_name=NAME, archive=NAME)
    editor = MENDEditor.from_hparams(hparams, base=smollm2)
    edit = editor.edit(EditExample(prompt="The capital of France is", target_new="Lyon"))
    said = {"The capital of France is": "Lyon", "The capital of Japan is": "Tokyo"}
    with edit.applied():
        assert {prompt: smollm2.generate(prompt).strip() for prompt in said} == said
    examples, trunk = read_examples("facts:test", limit=24), FrozenTrunk(editor.base)
    texts = prepare_texts(smollm2, editor.hparams, examples)
    trunk.fill([text for each in texts for text in each.all()])
    scores = validate(trunk, editor.mend, texts, editor.hparams)
    assert scores["edit_success"] > 0.85 and scores["paraphrase"] > 0.6
    assert scores["neighbourhood"] > 0.7 and scores["locality"] > 0.8
