"""Claims about the benchmark: all ways to train agree, and what it reports is computed from what it measured."""

import json
import math

import pytest
import torch

from mendkit.cost import bench, textbook, ways
from mendkit.cost.ways import KIT, TEXTBOOK, WAYS, Settings, Way
from mendkit.errors import MendkitError
from mendkit.mend.hypernetwork import group_name
from mendkit.mend.steps import make_optimiser
from tests.oracles.claims import EXAMPLES

TINY = {"batch": 4, "rank": 8, "repeats": 2}


@pytest.fixture
def settings(tmp_path) -> Settings:
    (tmp_path / "tiny.yaml").write_text("model_name: tiny\n")
    return Settings(str(tmp_path / "tiny.yaml"), **TINY)


def gradients(base, settings):
    """What every way finds, double throughout."""
    h = ways.recipe(settings, base)
    _, rows = ways.draw(base, h, EXAMPLES)
    mend = ways.make_mend(base, h, rows).double()
    adam = make_optimiser(mend, h)
    own = {name: Way(base, mend, rows, savings=use, optimiser=adam) for name, use in WAYS.items()}
    return {name: ways.gradients(way) for name, way in own.items()}


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
def test_every_way_to_train_has_the_textbooks_losses_and_gradients(family, settings, request):
    found = gradients(request.getfixturevalue(family), settings)
    losses, grads = found[TEXTBOOK]
    assert set(losses) == {"edit", "paraphrases", "neighbours"}
    assert all(float(g.norm()) > 0 for g in grads.values())  # nothing agrees for being zero
    for name in WAYS:
        assert ways.largest_error(found[TEXTBOOK], found[name]) < 1e-10, name


def gates(base, mend, rows, *, off):
    """Which values the hypernetwork's ReLUs let pass, if the factors are off by so much (relative)."""
    generator, passed = torch.Generator().manual_seed(0), []
    for row in rows:
        for name, pair in textbook.factors(base, row[0][1]).items():
            site = next(site for site in base.sites if site.name == name)
            group = group_name(site, mend.hparams.shared)
            u, delta = (x * (1 + off * torch.randn(x.shape, generator=generator)) for x in pair)
            z = textbook.entering(mend, site, u, delta)
            for block in mend.blocks[group]:
                hidden = textbook.hidden(block, mend.groups[group].index(name), z)
                passed.append(hidden > 0)
                z = z + torch.relu(hidden)
    return torch.cat([some.flatten() for some in passed])


def test_rounding_moves_nothing_across_a_hinge(llama, settings, monkeypatch):
    """Factors off by ten thousand times float32's rounding pass the same ReLUs, unless hinges are not cleared."""
    h = ways.recipe(settings, llama)
    _, rows = ways.draw(llama, h, EXAMPLES)

    def crossings() -> int:
        mend = ways.make_mend(llama, h, rows)
        with torch.no_grad():
            before = gates(llama, mend, rows, off=0)
            assert 0.2 < float(before.float().mean()) < 0.8  # as ReLUs are in use
            return int((gates(llama, mend, rows, off=1e-3) != before).sum())

    assert crossings() == 0
    monkeypatch.setattr(ways, "clear_hinges", lambda *_: None)
    assert crossings() > 0


def test_one_token_has_no_gap_to_move_a_hinge_to(llama, settings):
    h = ways.recipe(settings, llama)
    _, rows = ways.draw(llama, h, EXAMPLES)
    mend = ways.make_mend(llama, h, rows)
    before = {name: p.detach().clone() for name, p in mend.named_parameters()}
    ways.clear_hinges(
        mend, {s.name: (torch.ones(1, s.d_in), torch.ones(1, s.d_out)) for s in llama.sites}
    )
    assert all(torch.equal(p, before[name]) for name, p in mend.named_parameters())


def test_what_is_compared_reports_ratios_and_equality(llama, settings):
    result = bench.compare(llama, settings, EXAMPLES)
    assert result["equal"] is True and set(result["error"]) == {*WAYS, "edit"}
    assert 0 < result["error"][KIT] < result["tolerance"]
    assert set(result["train"]) == set(WAYS) and result["train"][TEXTBOOK]["ratio"] == 1
    assert (
        result["train_ratio"] == result["train"][KIT]["ratio"]
        and result["edit_ratio"] == result["edit"]["kit_ratio"]
    )
    plain, ours = (result["train"][name]["gflop_per_edit"] for name in (TEXTBOOK, KIT))
    assert plain > ours > 0
    assert result["workload"]["edits_per_step"] == 4 and result["workload"]["texts_per_edit"] == 3
    json.dumps(result, allow_nan=False)


def test_a_wrong_way_is_not_equal(llama, settings, monkeypatch):
    right = ways.batch_losses

    def wrong(trunk, *rest):
        losses = right(trunk, *rest)
        return losses | {"edit": losses["edit"] * (1 if trunk._values else 1.01)}

    monkeypatch.setattr(ways, "batch_losses", wrong)
    result = bench.compare(llama, settings, EXAMPLES)
    assert result["equal"] is False
    assert [n for n, error in result["error"].items() if error > result["tolerance"]] == [
        "without trunk cache"
    ]


def test_what_is_missing_or_nan_is_an_infinite_error():
    one = {"edit": 1.0}, {"U": torch.ones(2)}
    assert ways.largest_error(one, one) == 0
    assert ways.largest_error(one, ({"edit": 1.0}, {})) == math.inf
    assert ways.largest_error(one, ({"edit": math.nan}, one[1])) == math.inf
    assert (
        ways.largest_error(one, ({"edit": 1.0}, {"U": torch.tensor([1.0, math.nan])})) == math.inf
    )
    assert ways.largest_error(one, ({"edit": 1.1}, {"U": torch.ones(2)})) == pytest.approx(0.1)


def test_editing_leaves_the_model_as_it_was(settings, llama):
    before = [llama.site_module(site).weight.clone() for site in llama.sites]
    bench.compare(llama, settings, EXAMPLES)
    assert all(
        torch.equal(llama.site_module(s).weight, w)
        for s, w in zip(llama.sites, before, strict=True)
    )
    assert not any(llama.site_module(site)._forward_hooks for site in llama.sites)


def test_ratios_are_textbook_over_kit():
    """The median of the ratios within a turn, whatever the turns' own speed."""
    turns = [{TEXTBOOK: 6.0, KIT: 2.0}, {TEXTBOOK: 40.0, KIT: 10.0}, {TEXTBOOK: 10.0, KIT: 2.0}]
    figures = bench._figures(turns, KIT, 4e9, 4e9)
    assert (
        figures["ratio"] == 4.0
        and figures["seconds_per_edit"] == 2.0
        and figures["edits_per_second"] == 0.5
    )
    assert figures["gflop_per_edit"] == 4.0 and figures["share_of_matmul_rate"] == 0.5


def test_a_cache_pays_when_its_cost_is_saved():
    turns = [{"trunk cache": 6.0, "factors cache": 1.0}] * 3
    train = {KIT: {"seconds_per_edit": 1.0}, "without trunk cache": {"seconds_per_edit": 3.0}}
    train["without factor cache"] = {"seconds_per_edit": 0.5}
    caches = bench._caches(turns, train)
    assert caches["trunk_pays_after_epochs"] == 3.0 and caches["factor_pays_after_epochs"] is None


def test_a_model_that_is_not_there_is_an_error():
    with pytest.raises(MendkitError, match=r"no model 'gpt5'.*gpt2-xl-shape"):
        Settings("gpt5")


def test_the_textbook_refuses_what_it_does_not_do(llama, settings):
    h = ways.recipe(settings, llama)
    _, rows = ways.draw(llama, h, EXAMPLES)
    mend = ways.make_mend(llama, h, rows)
    mend.hparams = h.replace(loss_reduction="sum")
    with pytest.raises(MendkitError, match="loss_reduction"):
        textbook.textbook_losses(llama, mend, rows[0])
