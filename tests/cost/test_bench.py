"""The benchmark: all ways to train agree, and what it reports is computed from what it measured."""

import json
import math

import pytest
import torch

from mendkit.cost import bench, textbook
from mendkit.cost.bench import KIT, NO_TRUNK, TEXTBOOK, WAYS
from mendkit.errors import MendkitError
from mendkit.hparams import MENDHyperParams
from tests.oracles.claims import EXAMPLES


@pytest.fixture
def hparams(tmp_path) -> MENDHyperParams:
    (tmp_path / "tiny.yaml").write_text("model_name: tiny\nrank: 999\n")
    return bench.recipe(str(tmp_path / "tiny.yaml"), batch=4, rank=8)


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
def test_every_way_to_train_has_the_textbooks_losses_and_gradients(family, hparams, request):
    base, h = request.getfixturevalue(family), hparams.replace(unrelated_per_edit=1)
    _, rows = bench.drawn(base, h, EXAMPLES)
    mend = textbook.trained_looking(base, h, rows).double()
    found = {n: bench.gradients(mend, bench.way_to_train(n, base, mend, rows)) for n in WAYS}
    assert {"edit", "paraphrases", "neighbours", "unrelated"} < set(found[TEXTBOOK])
    assert all(float(value.norm()) > 0 for value in found[TEXTBOOK].values())  # none is zero
    for name in WAYS:
        # transformers' RMSNorm rounds to float32 in a float64 Llama, too.
        bound = 1e-7 if family == "llama64" else 1e-10
        assert bench.largest_error(found[TEXTBOOK], found[name]) < bound, name


def test_what_is_compared_reports_ratios_and_equality(llama, hparams):
    before = [llama.site_module(site).weight.clone() for site in llama.sites]
    result = bench.compare_ways(llama, hparams, EXAMPLES, repeats=2)
    assert result["equal"] is True and set(result["error"]) == {*WAYS, "edit"}
    assert 0 < result["error"][KIT] < result["tolerance"][KIT]
    assert set(result["train"]) == set(WAYS) and result["train"][TEXTBOOK]["ratio"] == 1
    assert result["train_ratio"] == result["train"][KIT]["ratio"]
    plain, ours = (result["train"][name]["gflop_per_edit"] for name in (TEXTBOOK, KIT))
    assert plain > ours > 0 and "gflop_per_edit" not in result["train"][NO_TRUNK]
    assert result["workload"]["edits_per_step"] == 4 and result["workload"]["texts_per_edit"] == 3
    json.dumps(result, allow_nan=False)
    for site, weight in zip(llama.sites, before, strict=True):  # editing left no trace
        assert torch.equal(llama.site_module(site).weight, weight)
        assert not llama.site_module(site)._forward_hooks


def test_a_wrong_way_or_one_without_a_number_is_not_equal(llama, hparams, monkeypatch):
    right = bench.batch_losses

    def wrong(*args):
        losses = right(*args)
        return losses | {"edit": losses["edit"] * 1.01}

    monkeypatch.setattr(bench, "batch_losses", wrong)
    result = bench.compare_ways(llama, hparams, EXAMPLES, repeats=1)
    off = [name for name, error in result["error"].items() if error > result["tolerance"][name]]
    assert result["equal"] is False and off == [NO_TRUNK, KIT]
    one, nan = torch.ones(2), torch.tensor([1.0, math.nan])
    assert math.isnan(bench.largest_error({"a": one, "b": one}, {"a": nan, "b": one}))


def test_ratios_are_medians_of_textbook_over_kit_within_a_turn():
    turns = [{TEXTBOOK: 6.0, KIT: 2.0}, {TEXTBOOK: 40.0, KIT: 10.0}, {TEXTBOOK: 10.0, KIT: 2.0}]
    assert bench.in_turns(turns)[KIT] == (2.0, 4.0)


def test_random_weights_have_the_shape_and_spread_of_the_model():
    small = bench.open_model(bench.recipe("gpt2-shape"))
    assert small.model.config.n_embd == 768 and len(small.model.transformer.h) == 12
    assert float(small.model.transformer.wte.weight.detach().std()) == pytest.approx(0.02, rel=0.01)


def test_mistakes_are_errors(llama, hparams):
    with pytest.raises(MendkitError, match=r"no model 'gpt5-shape'.*gpt2-xl-shape"):
        bench.recipe("gpt5-shape")
    _, rows = bench.drawn(llama, hparams, EXAMPLES)
    mend = textbook.trained_looking(llama, hparams, rows)
    mend.hparams = hparams.replace(loss_reduction="sum")
    with pytest.raises(MendkitError, match="loss_reduction"):
        textbook.textbook_losses(llama, mend, rows[0])
