"""Methods as settings of one trainer: each against a loop over tokens of its paper's equations."""

from pathlib import Path

import pytest
import torch

from mendkit.errors import HyperParamError
from mendkit.hparams import MENDHyperParams
from mendkit.mend.archive import load_archive, save_archive
from mendkit.mend.batches import Sampler, prepare_texts
from mendkit.mend.distributed import Team
from mendkit.mend.editor import MENDEditor
from mendkit.mend.factors import FactorCache, edit_factors
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.steps import Learner, batch_losses, total_loss
from mendkit.mend.training import train
from mendkit.mend.updates import LowRankUpdate, side_branches
from mendkit.mend.validation import validate
from mendkit.methods import METHODS
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import (
    EXAMPLES,
    editor_for,
    hparams,
    losses_of,
    scrambled,
    with_statistics,
)
from tests.oracles.methods import Methods

FILES = Path(__file__).parents[2] / "configs"

# what makes the tiny model's edits large, and training short
TRAINED = dict(lr=1e-2, edit_lr=1e-2, max_iters=2, val_interval=2, batch_size=2, warmup_iters=0)
SETTINGS = {
    "mend": TRAINED,
    "malmen": TRAINED | dict(most_edits=2),
    "rledit": TRAINED | dict(most_edits=4),
    "ultraedit": dict(edit_lr=1e-2),
    "stableedit": dict(edit_lr=1e-2),
    "propmend": TRAINED | dict(cedit=0.1),
}


def trained(method, base, run_dir, **more):
    h = hparams(method=method, **SETTINGS[method] | more)
    return train(h, EXAMPLES, EXAMPLES[:2], base=base, run_dir=run_dir).archive


@pytest.mark.parametrize("method", SETTINGS)
def test_edits_in_turns_are_those_of_the_papers_equations(llama, llama64, tmp_path, method):
    """Trained in float32 by the public way, compared in float64: single edits, then several."""
    mend = load_archive(trained(method, llama, tmp_path), base=llama).mend
    editor = MENDEditor(llama64, mend.double())
    oracle = Methods(llama64, editor.hparams, mend.state_dict())
    tokens = [editor.tokens(example) for example in EXAMPLES]
    for text in tokens if editor.hparams.stats_examples else ():
        oracle.observe(oracle.factors(text))
    with editor.session() as session:
        for turn in ([0, 1, 2], [3], [4], [1, 2]):
            made = session.edit([EXAMPLES[i] for i in turn]).dense()
            with session.suspended():
                wanted = oracle.turn([tokens[i] for i in turn])
            for name, expected in wanted.items():
                error = float((made[name] - expected).norm() / expected.norm())
                assert error < 2e-5, (method, turn, name, error)


def test_a_file_and_overrides_win_over_the_method_key_by_key(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name: m\nmethod: malmen\nridge: 0.5\n")
    h = MENDHyperParams.from_hparams(path, most_edits=7)
    assert (h.ridge, h.most_edits, h.value_coefficient) == (0.5, 7, "key")
    assert h.model_fields_set == {"most_edits"}
    assert MENDHyperParams.from_hparams(path, method="mend").cedit == 0.1
    assert h.replace(method="ultraedit", ridge=2.0).to_dict() == {
        **h.to_dict(),
        **METHODS["ultraedit"],
        "method": "ultraedit",
        "ridge": 2.0,
    }
    with pytest.raises(
        HyperParamError, match=r"c.yaml:2: method must be 'mend', .* or 'mendkit', got 'memit'"
    ):
        path.write_text("model_name: m\nmethod: memit\n")
        MENDHyperParams.from_hparams(path)
    for method in METHODS:
        assert hparams(method=method) != hparams(method=method).replace(method=None, seed=1)


def test_an_archive_does_not_depend_on_later_presets(llama, tmp_path, monkeypatch):
    h = hparams(method="malmen")
    path = save_archive(tmp_path / "a.safetensors", llama, scrambled(MEND(llama.sites, h)))
    monkeypatch.setitem(METHODS, "malmen", {"ridge": 9.0, "checkpoint_interval": 7})
    assert load_archive(path, base=llama).mend.hparams == h.replace(model_name=llama.name)


SENSELESS = {
    "value_coefficient: 'key' needs `aggregate: normal_equation`": {"value_coefficient": "key"},
    "train_on: 'episode' needs another `aggregate`": {
        "train_on": "episode",
        "aggregate": "least_squares",
    },
    "site_share: 0.5 needs another `aggregate`": {"site_share": 0.5, "aggregate": "least_squares"},
    "stats_examples: 0 needs `lifelong_norm: true`": {"stats_examples": 0},
}


@pytest.mark.parametrize("words", SENSELESS)
def test_settings_of_methods_that_make_no_sense_are_refused(words):
    with pytest.raises(HyperParamError, match=words):
        hparams(**SENSELESS[words])


@pytest.mark.parametrize("aggregate", ["sum", "normal_equation"])
def test_an_episodes_gradient_is_that_of_its_loss_with_dense_weights(llama64, aggregate):
    """RLEdit: after each batch the loss of the last ones, `time_decay` a step back, and ‖ΔW‖²."""
    h = hparams(method="rledit", aggregate=aggregate, value_coefficient="update")
    h = h.replace(batch_size=1, most_edits=3, back_depth=2, time_decay=0.5, cnorm=0.1, edit_lr=0.1)
    mend = with_statistics(llama64, scrambled(MEND(llama64.sites, h).double()))
    trunk, base = FrozenTrunk(llama64), llama64
    sampler = Sampler(prepare_texts(base, h, EXAMPLES[:3]), h)
    learner = Learner(mend, FactorCache(trunk, h), sampler, h=h, team=Team())
    batches = [sampler.draw() for _ in range(3)]
    told = learner._play(batches)
    found = {name: p.grad.clone() for name, p in mend.named_parameters()}
    mend.zero_grad()

    weights = {site.name: base.site_weight(site) for site in base.sites}
    total, count = 0.0, 0.0
    for time, batch in enumerate(batches):
        change = {name: w.detach() - base.model.get_parameter(name) for name, w in weights.items()}
        held = {}
        for name, d in change.items():  # ΔW = ΔW I, as an update
            held[name] = LowRankUpdate(torch.eye(d.shape[1]).double()[None], d.T[None], 1.0)
        with side_branches(base, held):
            factors = edit_factors(trunk, h, [batch.rows[0][0][1]])
        made = {name: update.dense() for name, update in mend(factors, 1).items()}
        weights = {name: weights[name] + change for name, change in made.items()}
        for back in range(min(time + 1, 2)):
            total += 0.5**back * losses_of(base, batches[time - back].rows, weights, h)
            count += 0.5**back
        total += 0.1 * sum((change**2).sum() for change in made.values())
    (total / count).backward()
    assert told["loss"] == pytest.approx(float((total / count).detach()), rel=1e-9)
    for name, parameter in mend.named_parameters():
        error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
        assert float(error) < 1e-8, (name, float(error))


def test_the_penalty_on_the_weight_change_is_part_of_a_steps_loss(llama64):
    h = hparams(edit_lr=1e-2)
    mend = with_statistics(llama64, scrambled(MEND(llama64.sites, h).double()))
    trunk, rows = (
        FrozenTrunk(llama64),
        Sampler(prepare_texts(llama64, h, EXAMPLES), h).texts([0, 1]),
    )
    factors = edit_factors(trunk, h, [row[0][1] for row in rows])
    plain = total_loss(batch_losses(trunk, mend, factors, rows), h)
    mend.hparams = h = h.replace(cnorm=0.3)
    more = total_loss(batch_losses(trunk, mend, factors, rows), h)
    editor = MENDEditor(llama64, mend)
    squares = [
        sum((change**2).sum() for change in editor.edit(example).dense().values())
        for example in EXAMPLES[:2]
    ]
    assert (more - plain).item() == pytest.approx(0.3 * float(sum(squares)) / 2, rel=1e-9)
    (slope,) = torch.autograd.grad(more - plain, mend.log_edit_lr)
    assert float(slope.sum()) == pytest.approx(2 * (more - plain).item(), rel=1e-9)  # of α²


def test_an_edit_changes_a_share_of_the_sites_and_always_the_same(llama64):
    editor = editor_for(llama64, site_share=0.5)
    tokens = [editor.tokens(example) for example in EXAMPLES]

    def changed(updates, k):
        return {name for name, update in updates.items() if update.delta[k].any()}

    together, sites = editor.updates(tokens), []
    for k, text in enumerate(tokens):
        sites.append(changed(together, k))
        assert len(sites[-1]) == 4  # of nine
        assert sites[-1] == changed(editor.updates([text], at_once=True), 0)
    assert len(set.union(*sites)) > 6  # edits differ
    editor.mend.hparams = editor.hparams.replace(seed=5)
    assert [changed(editor.updates(tokens), k) for k in range(5)] != sites
    editor.mend.hparams = editor.hparams.replace(seed=42, site_share=1.0)
    whole = editor.updates(tokens)
    for name, update in together.items():
        kept = update.delta.flatten(1).any(1)
        assert torch.equal(update.delta[kept], whole[name].delta[kept])
    validated = hparams(site_share=0.5).replace(edit_lr=1e-3)
    texts = prepare_texts(llama64, validated, EXAMPLES[:1])
    scores = validate(FrozenTrunk(llama64), editor.mend, texts, validated)
    editor.mend.hparams = validated
    with editor.edit(EXAMPLES[0]).applied():
        plain = validate(FrozenTrunk(llama64), editor.mend, texts, validated, strength=0.0)
    assert scores["loss.edit"] == pytest.approx(plain["loss.edit"], rel=1e-6)


def test_without_statistics_each_edit_has_its_own(llama64):
    """As a session's first edit has, and whatever else is made in the same pass."""
    h = hparams(method="ultraedit", edit_lr=1e-2)
    editor = MENDEditor(llama64, MEND(llama64.sites, h).double())
    tokens = [editor.tokens(example) for example in EXAMPLES[:4]]
    pairs = editor.mend(edit_factors(FrozenTrunk(llama64), h, tokens), 4, at_once=2)
    for k in (0, 1):
        with editor.session() as session:
            alone = session.edit(EXAMPLES[2 * k : 2 * k + 2]).dense()
        for name, update in pairs.items():
            torch.testing.assert_close(update.select([k]).dense(), alone[name])
    assert not any(int(part.count) for m in editor.mend.moments.values() for part in m.values())


def test_statistics_that_run_on_keep_their_bits_in_a_compact_archive(llama, tmp_path):
    path = trained("stableedit", llama, tmp_path / "run")
    exact = load_archive(path, base=llama)
    small = save_archive(tmp_path / "small.safetensors", llama, exact.mend, compact=True)
    assert small.stat().st_size < path.stat().st_size
    changes = []
    for archive in (exact, load_archive(small, base=llama)):
        with MENDEditor(llama, archive.mend).session() as session:
            session.edit(EXAMPLES[0])
            changes.append(session.edit(list(EXAMPLES[1:3])).dense())
    for name, change in changes[0].items():
        assert torch.equal(changes[1][name], change)


def test_every_method_has_a_file_and_the_kits_is_its_recipe():
    paths = {path.stem.partition("-135m-")[2]: path for path in FILES.glob("methods/*.yaml")}
    assert set(paths) == {*METHODS, "what-follows"}
    for name, path in paths.items():
        method = "mendkit" if name == "what-follows" else name
        assert MENDHyperParams.from_hparams(path).method == method
    recipe = MENDHyperParams.from_hparams(FILES / "smollm2-135m.yaml")
    ours = MENDHyperParams.from_hparams(paths["mendkit"], aggregate="sum").to_dict()
    assert ours == recipe.to_dict() | {"method": "mendkit"}
