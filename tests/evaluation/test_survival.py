"""Edits in a model that is rounded or fine-tuned afterwards, against plain loops on a copy."""

from copy import copy, deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from mendkit.errors import MendkitError
from mendkit.evaluation import survival as s
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, editor_for, hparams

TEXT = "the king of France was in Spain with the queen and the sun is far away " * 8


@pytest.mark.parametrize("bits", s.BITS)
@pytest.mark.parametrize("width", [64, 40])
def test_rounding_is_to_the_nearest_level_of_each_group(bits, width):
    weight = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).double()
    found = s.nearest(weight, bits)
    group = 32 if width == 64 else width
    for row, got in zip(weight.tolist(), found.tolist(), strict=True):
        for at in range(0, width, group):
            most = max(map(abs, row[at : at + group]))
            levels = [most * k / (2 ** (bits - 1) - 1) for k in range(-(2 ** (bits - 1)), 2**bits)]
            for value, rounded in zip(row[at : at + group], got[at : at + group], strict=True):
                nearest = min(levels, key=lambda level: abs(level - value))
                assert rounded == pytest.approx(nearest, abs=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_layers_are_rounded_with_the_edit_in_them(family, request):
    base = request.getfixturevalue(family)
    edit = editor_for(base).edit(EXAMPLES[0])
    made = s.rounded(base, edit.updates, bits=4).model
    merged, layers = edit.merged().base.model, 0
    for name, value in merged.named_parameters():
        kind = type(merged.get_submodule(name.rpartition(".")[0])).__name__
        if kind in ("Linear", "Conv1D") and name.endswith("weight") and "lm_head" not in name:
            turned = kind == "Conv1D"
            value = s.nearest(value.T if turned else value, 4)
            value = value.T if turned else value
            layers += 1
        torch.testing.assert_close(made.get_parameter(name), value, rtol=1e-5, atol=1e-7)
    assert layers >= 12


def test_fine_tuning_is_adam_on_the_edited_weights(llama64, monkeypatch):
    monkeypatch.setattr(s, "STEPS", 7)
    monkeypatch.setattr(s, "WINDOW", 12)
    monkeypatch.setattr(s, "RATE", 1e-3)
    base = llama64
    edit = editor_for(base).edit(EXAMPLES[0])
    ids = base.encode(TEXT)[:40]
    made = s.fine_tuned(FrozenTrunk(base), edit.updates, ids)

    model = deepcopy(edit.merged().base.model)
    named = {name: model.get_parameter(name).requires_grad_() for name in edit.updates}
    optimiser = torch.optim.Adam(named.values(), lr=1e-3)
    windows = s.windows(ids, s.first_token(base), window=12)
    for step in range(7):
        text = windows[step % len(windows)]
        logits = model(input_ids=torch.tensor([text.ids])).logits[0, list(text.scored)]
        cross_entropy(logits, torch.tensor(text.targets)).backward()
        optimiser.step()
        optimiser.zero_grad()
    for name, weight in named.items():
        wanted = weight.detach() - base.model.get_parameter(name)
        torch.testing.assert_close(made[name].dense(), wanted, rtol=1e-5, atol=1e-8)
        assert float((wanted - edit.dense()[name]).abs().max()) > 1e-4  # it has moved


def test_edits_that_hold_are_asked_again_and_no_others(llama, monkeypatch):
    monkeypatch.setattr(s, "STEPS", 2)
    editor = editor_for(llama)
    on = EvaluationSet(llama, hparams(), EXAMPLES, text=TEXT, survival=3, max_new_tokens=2)
    # The answers of two of the first three edits are what the edited model writes.
    index = on.to_edit
    for k in (0, 2, 4):
        with editor.edit(on.examples[index[k]]).applied():
            said = llama.generate(on.examples[index[k]].prompt, max_new_tokens=2)
        prompts = on.prompts[index[k]]
        prompts[0] = replace(prompts[0], answers=(said,), old=None)
    report = evaluate(editor, on)
    asked = [row.index for row in report.rows if "survival.finetuned" in row.values]
    assert asked == [index[0], index[2]]
    assert report.summary["survival.quantised_int8"].n == 2
    first = next(row for row in report.rows if row.index == index[0])
    there = copy(on)
    update = editor.updates([editor.tokens(on.examples[index[0]])])
    there.base = s.rounded(llama, update, bits=4)
    assert first.values["survival.quantised_int4"] == there.holds({}, [index[0]])[0]
    with pytest.raises(MendkitError, match="survival needs a held-out text"):
        EvaluationSet(llama, hparams(), EXAMPLES, survival=3)
