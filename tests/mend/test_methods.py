"""Methods as settings of one trainer: each against a loop over tokens of its paper's equations."""

import pytest

from mendkit.errors import HyperParamError
from mendkit.hparams import MENDHyperParams
from mendkit.mend.archive import load_archive, save_archive
from mendkit.mend.editor import MENDEditor
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.training import train
from mendkit.methods import METHODS
from tests.oracles.claims import EXAMPLES, hparams, scrambled
from tests.oracles.methods import Methods

# what makes the tiny model's edits large, and training short
TRAINED = dict(lr=1e-2, edit_lr=1e-2, max_iters=2, val_interval=2, batch_size=2, warmup_iters=0)
SETTINGS = {
    "mend": TRAINED,
    "malmen": TRAINED | dict(most_edits=2),
    "ultraedit": dict(edit_lr=1e-2),
    "stableedit": dict(edit_lr=1e-2),
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
    "value_coefficient: key needs `aggregate: normal_equation`": {"value_coefficient": "key"},
    "stats_examples: 0 needs `lifelong_norm: true`": {"stats_examples": 0},
}


@pytest.mark.parametrize("words", SENSELESS)
def test_settings_of_methods_that_make_no_sense_are_refused(words):
    with pytest.raises(HyperParamError, match=words):
        hparams(**SENSELESS[words])
