"""The benchmark: all ways to train agree, and what it reports is computed from what it measured."""

import json
import math

import pytest
import torch

from mendkit.cost import bench, textbook, ways
from mendkit.cost.ways import KIT, NO_TRUNK, TEXTBOOK, WAYS, Settings, Way
from mendkit.errors import MendkitError
from mendkit.mend.hypernetwork import group_name
from tests.oracles.claims import EXAMPLES


@pytest.fixture
def settings(tmp_path) -> Settings:
    (tmp_path / "tiny.yaml").write_text("model_name: tiny\n")
    return Settings(str(tmp_path / "tiny.yaml"), batch=4, rank=8, repeats=2)


def drawn(base, settings):
    hparams = settings.recipe(base)
    return hparams, ways.draw_rows(base, hparams, EXAMPLES)[1]


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
def test_every_way_to_train_has_the_textbooks_losses_and_gradients(family, settings, request):
    base = request.getfixturevalue(family)
    hparams, rows = drawn(base, settings)
    mend = textbook.trained_looking(base, hparams, rows).double()
    found = {name: Way(name, base, mend, rows).gradients() for name in WAYS}
    losses, gradients = found[TEXTBOOK]
    assert set(losses) == {"edit", "paraphrases", "neighbours"}
    assert all(float(value.norm()) > 0 for value in gradients.values())  # none agrees as zero
    for name in WAYS:
        assert ways.largest_error(found[TEXTBOOK], found[name]) < 1e-10, name


def gates(base, mend, rows, *, off):
    """What the hypernetwork's ReLUs let pass if the factors are off by so much (relative)."""
    generator, passed = torch.Generator().manual_seed(0), []
    for row in rows:
        pairs = textbook.factors(base, row[0][1])
        for site in base.sites:
            group = group_name(site, mend.hparams.shared)
            noise = [torch.randn(x.shape, generator=generator) for x in pairs[site.name]]
            u, delta = (x * (1 + off * n) for x, n in zip(pairs[site.name], noise, strict=True))
            z = textbook.entering(mend, site, u, delta)
            for block in mend.blocks[group]:
                hidden = textbook.hidden(block, mend.groups[group].index(site.name), z)
                passed.append((hidden > 0).flatten())
                z = z + torch.relu(hidden)
    return torch.cat(passed)


def test_rounding_moves_nothing_across_a_hinge(llama, settings, monkeypatch):
    """Factors off by ten thousand times float32's rounding pass the same ReLUs."""
    hparams, rows = drawn(llama, settings)

    @torch.no_grad()
    def crossings() -> int:
        mend = textbook.trained_looking(llama, hparams, rows)
        before = gates(llama, mend, rows, off=0)
        assert 0.2 < float(before.float().mean()) < 0.8  # as ReLUs are in use
        return int((gates(llama, mend, rows, off=1e-3) != before).sum())

    assert crossings() == 0
    monkeypatch.setattr(textbook, "clear_hinges", lambda *_: None)
    assert crossings() > 0


def test_what_is_compared_reports_ratios_and_equality(llama, settings):
    before = [llama.site_module(site).weight.clone() for site in llama.sites]
    result = bench.compare_ways(llama, settings, EXAMPLES)
    assert result["equal"] is True and set(result["error"]) == {*WAYS, "edit"}
    assert 0 < result["error"][KIT] < result["tolerance"][KIT]
    assert set(result["train"]) == set(WAYS) and result["train"][TEXTBOOK]["ratio"] == 1
    assert result["train_ratio"] == result["train"][KIT]["ratio"]
    plain, ours = (result["train"][name]["gflop_per_edit"] for name in (TEXTBOOK, KIT))
    assert plain > ours > 0 and "gflop_per_edit" not in result["train"][NO_TRUNK]
    assert result["workload"]["edits_per_step"] == 4 and result["workload"]["texts_per_edit"] == 3
    assert result["threads"] == torch.get_num_threads()
    json.dumps(result, allow_nan=False)
    for site, weight in zip(llama.sites, before, strict=True):  # editing left no trace
        assert torch.equal(llama.site_module(site).weight, weight)
        assert not llama.site_module(site)._forward_hooks


def test_a_wrong_way_is_not_equal(llama, settings, monkeypatch):
    right = ways.batch_losses

    def wrong(*args):
        losses = right(*args)
        return losses | {"edit": losses["edit"] * 1.01}

    monkeypatch.setattr(ways, "batch_losses", wrong)
    result = bench.compare_ways(llama, settings, EXAMPLES)
    off = [name for name, error in result["error"].items() if error > result["tolerance"][name]]
    assert result["equal"] is False and off == [KIT, NO_TRUNK]


def test_what_is_missing_or_nan_is_an_infinite_error():
    one = {"edit": 1.0}, {"U": torch.ones(2)}
    nan = torch.tensor([1.0, math.nan])
    assert ways.largest_error(one, one) == 0
    assert ways.largest_error(one, ({"edit": 1.0}, {})) == math.inf
    assert ways.largest_error(one, ({"edit": math.nan}, one[1])) == math.inf
    assert ways.largest_error(one, ({"edit": 1.0}, {"U": nan})) == math.inf
    assert ways.largest_error(one, ({"edit": 1.1}, one[1])) == pytest.approx(0.1)


def test_ratios_are_textbook_over_kit():
    """The median of the ratios within a turn, whatever the turns' own speed."""
    turns = [{TEXTBOOK: 6.0, KIT: 2.0}, {TEXTBOOK: 40.0, KIT: 10.0}, {TEXTBOOK: 10.0, KIT: 2.0}]
    figures = bench.training_figures(turns, KIT, 4.0, 4.0)
    assert figures["ratio"] == 4.0 and figures["seconds_per_edit"] == 2.0
    assert figures["edits_per_second"] == 0.5
    assert figures["gflop_per_edit"] == 4.0 and figures["share_of_matmul_rate"] == 0.5


def test_mistakes_are_errors(llama, settings):
    with pytest.raises(MendkitError, match=r"no model 'gpt5'.*gpt2-xl-shape"):
        Settings("gpt5")
    hparams, rows = drawn(llama, settings)
    mend = textbook.trained_looking(llama, hparams, rows)
    mend.hparams = hparams.replace(loss_reduction="sum")
    with pytest.raises(MendkitError, match="loss_reduction"):
        textbook.textbook_losses(llama, mend, rows[0])
