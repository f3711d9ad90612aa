"""Numbers that are not finite are counted or stop training; what has no effect raises."""

import json

import pytest
import torch

from mendkit.errors import MendkitError, ModelError
from mendkit.evaluation.results import EditRow, summarise
from mendkit.mend import steps, training
from mendkit.mend.archive import Checkpoint, load_archive
from mendkit.mend.distributed import Team
from mendkit.mend.editor import MENDEditor
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.preparation import Preparation
from mendkit.mend.training import MOST_SKIPPED, Trainer, train
from tests.oracles.claims import EXAMPLES, hparams, scrambled, with_statistics
from tests.oracles.tiny import tiny_llama

SETTINGS = dict(val_interval=2, batch_size=2, log_interval=100, lr=1e-2, schedule="constant")


def run(base, folder, **settings):
    h = hparams(**(SETTINGS | {"warmup_iters": 0} | settings))
    return train(h, EXAMPLES, EXAMPLES[:1], base=base, run_dir=folder)


def spoiled(monkeypatch, spoil, calls) -> None:
    """Let `spoil` change the losses of these calls of `batch_losses` (from 1)."""
    losses, made = steps.batch_losses, []

    def other(*args, **named):
        made.append(1)
        found = losses(*args, **named)
        if len(made) in calls:
            found = {name: spoil(value) for name, value in found.items()}
        return found

    monkeypatch.setattr(steps, "batch_losses", other)


def not_a_number(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def steep(loss: torch.Tensor) -> torch.Tensor:
    """The same value, whose gradient is not a number."""
    return loss + ((loss - loss.detach()).abs() + 0.0).sqrt()


@pytest.mark.parametrize("spoil", [not_a_number, steep])
def test_a_step_that_is_not_finite_is_skipped_and_counted_and_leaves_no_trace(
    spoil, llama, tmp_path, monkeypatch
):
    weights = {}
    for name, count, calls in (("short", 2, ()), ("skipped", 4, (3, 4))):
        with monkeypatch.context() as patch:
            spoiled(patch, spoil, calls)
            h = hparams(max_iters=count, warmup_iters=0, **SETTINGS)
            (tmp_path / name).mkdir()
            prepared = Preparation(llama, h, EXAMPLES, EXAMPLES[:1], team=Team())
            trainer = Trainer(prepared, Checkpoint(tmp_path / name, h, EXAMPLES, EXAMPLES[:1]))
            result = trainer.run()
        weights[name] = trainer.learner.tensors()
    assert result.skipped == 2
    rows = [row for row in result.history if "skipped" in row]
    assert [row["skipped"] for row in rows] == [1, 2] and "loss" not in rows[0]
    for name, value in weights["short"].items():
        drawn = name in ("generator", "order")
        assert drawn or torch.equal(weights["skipped"][name], value)


def test_too_many_in_a_row_stop_training_and_the_last_good_archive_stays(
    llama, tmp_path, monkeypatch
):
    spoiled(monkeypatch, not_a_number, range(5, 100))
    said = r"step 14: .* not finite in 10 steps in a row; .* the best archive is that of step"
    with pytest.raises(MendkitError, match=said):
        run(llama, tmp_path, max_iters=50)
    archive = load_archive(tmp_path / "archive.safetensors", base=llama)
    assert archive.metadata["training"]["best"]["step"] in (2, 4)
    assert all(value.isfinite().all() for value in archive.mend.state_dict().values())
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if "skipped" in row] == list(range(1, MOST_SKIPPED))


def test_a_validation_that_is_not_finite_is_never_the_best(llama, tmp_path, monkeypatch):
    losses = iter([1.0, float("nan"), 2.0, float("inf"), *[float("nan")] * 4])
    scores = lambda *_, at_once: {"score": 0.9, "loss": next(losses)}  # noqa: E731
    monkeypatch.setattr(training, "validate", scores)
    best = run(llama, tmp_path / "a", max_iters=6, early_stop_key="loss").best
    assert best["step"] == 4
    with pytest.raises(MendkitError, match="no validation gave finite numbers"):
        run(llama, tmp_path / "b", max_iters=6)
    assert not (tmp_path / "b" / "archive.safetensors").exists()


# ---------------------------------------- without effect


def cut(change):
    """A model whose last MLP gives `change(output)`: what is edited there reaches no answer."""
    base = tiny_llama()
    mlp = base.model.model.layers[-1].mlp
    mlp.register_forward_hook(lambda module, args, output: change(output))
    return base


def test_a_site_outside_the_graph_is_named(tmp_path):
    base = cut(lambda output: output.detach() + 0 * output.detach().clone())
    last = [site.name for site in base.sites if "layers.3" in site.name]
    said = rf"{last[0]}.*{last[-1]}: the answer does not depend on it"
    with pytest.raises(ModelError, match=said):
        run(base, tmp_path, max_iters=2)


def test_a_gradient_of_zero_at_the_first_step_is_named(tmp_path):
    said = r"the gradient is exactly zero at model.layers.3.mlp.*inner_params"
    with pytest.raises(MendkitError, match=said):
        run(cut(lambda output: 0 * output), tmp_path, max_iters=2)
    assert not (tmp_path / "archive.safetensors").exists()


@pytest.mark.parametrize(("log_lr", "found"), [("-inf", "zero"), ("nan", "not finite")])
def test_an_edit_without_effect_raises(log_lr, found, llama):
    mend = scrambled(with_statistics(llama, MEND(llama.sites, hparams())))
    edit = MENDEditor(llama, mend).edit(EXAMPLES[0])
    assert any(norm > 0 for norm in edit.relative_norm().values())
    with torch.no_grad():
        mend.log_edit_lr.fill_(float(log_lr))
    said = f"the weight change for 'The capital of France is' is {found}"
    with pytest.raises(MendkitError, match=said):
        MENDEditor(llama, mend).edit(EXAMPLES[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("locality.argmax_agreement", 1.01), ("neighbourhood.kl_nats", float("nan"))],
)
def test_an_impossible_score_raises(name, value):
    row = lambda i, v: EditRow(i, None, None, "p", "t", None, v)  # noqa: E731
    assert summarise([row(0, {name: 0.5})])[name].n == 1
    with pytest.raises(MendkitError, match=f"{name} of edit 1 is {value}, expected a"):
        summarise([row(0, {name: 0.5}), row(1, {name: value})])
    assert summarise([row(0, {"locality.kl_nats": 3.0, "log_p.new": -2.0})])
