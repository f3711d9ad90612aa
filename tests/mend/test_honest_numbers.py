"""Numbers that are not finite are counted or stop training; sites and edits without effect, impossible scores raise."""

import json

import pytest
import torch

from mendkit.errors import MendkitError, ModelError
from mendkit.evaluation.results import EditRow, summarise
from mendkit.mend import steps, training
from mendkit.mend.archive import inspect_archive, load_archive
from mendkit.mend.checkpoint import Checkpoint
from mendkit.mend.distributed import Team
from mendkit.mend.editor import MENDEditor
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.preparation import Preparation
from mendkit.mend.training import MOST_SKIPPED, Trainer, train
from tests.oracles.claims import EXAMPLES, hparams, scrambled, with_statistics
from tests.oracles.tiny import tiny_llama

STEPS = dict(
    val_interval=2, batch_size=2, log_interval=100, lr=1e-2, schedule="constant", warmup_iters=0
)


def spoiled(monkeypatch, spoil, calls) -> None:
    """Let `spoil` change the losses of these calls of `batch_losses` (from 1)."""
    losses, made = steps.batch_losses, []

    def other(*args, **named):
        made.append(1)
        found = losses(*args, **named)
        return (
            {name: spoil(value) for name, value in found.items()} if len(made) in calls else found
        )

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
            h = hparams(max_iters=count, **STEPS)
            (tmp_path / name).mkdir()
            prepared = Preparation(llama, h, EXAMPLES, EXAMPLES[:1], team=Team())
            checkpoint = Checkpoint(tmp_path / name, h, EXAMPLES, EXAMPLES[:1])
            trainer = Trainer(prepared, checkpoint)
            result = trainer.run()
        weights[name] = trainer.learner.tensors()
    assert result.skipped == 2
    assert [row["skipped"] for row in result.history if "skipped" in row] == [1, 2]
    assert "loss" not in next(row for row in result.history if "skipped" in row)
    for name, value in weights["short"].items():
        drawn = name in ("generator", "order")
        assert drawn or torch.equal(weights["skipped"][name], value)


def test_too_many_in_a_row_stop_training_and_the_last_good_archive_stays(
    llama, tmp_path, monkeypatch
):
    spoiled(monkeypatch, not_a_number, range(5, 100))
    with pytest.raises(
        MendkitError, match=r"step 14: .* not finite in 10 steps in a row; the archive of step"
    ):
        train(hparams(max_iters=50, **STEPS), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    archive = load_archive(tmp_path / "archive.safetensors", base=llama)
    assert archive.metadata["training"]["best"]["step"] in (2, 4)
    assert all(value.isfinite().all() for value in archive.mend.state_dict().values())
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if "skipped" in row] == list(range(1, MOST_SKIPPED))


def test_steps_between_start_the_count_anew(llama, tmp_path, monkeypatch):
    calls = [call for call in range(2, 25) if call % MOST_SKIPPED]
    spoiled(monkeypatch, not_a_number, calls)
    result = train(
        hparams(max_iters=24, **STEPS), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path
    )
    assert result.skipped == len(calls) > 2 * MOST_SKIPPED


def test_a_validation_that_is_not_finite_is_never_the_best(llama, tmp_path, monkeypatch):
    losses = iter([1.0, float("nan"), 2.0, float("inf")])
    monkeypatch.setattr(
        training, "validate", lambda *_, at_once: {"score": 0.9, "loss": next(losses)}
    )
    h = hparams(max_iters=6, early_stop_key="loss", **STEPS)
    assert train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "a").best["step"] == 4
    monkeypatch.setattr(
        training, "validate", lambda *_, at_once: {"score": 0.9, "loss": float("nan")}
    )
    with pytest.raises(MendkitError, match="no validation gave finite numbers"):
        train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "b")
    assert not (tmp_path / "b" / "archive.safetensors").exists()


def test_no_steps_write_the_untrained_archive(llama, tmp_path):
    result = train(hparams(max_iters=0), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    assert (
        result.best["step"] == 0
        and inspect_archive(result.archive)["training"]["best"]["step"] == 0
    )


# ----------------------------------------------------------------------------------------------- without effect


def cut(base, change) -> None:
    """Let the last block's MLP give `change(output)`: what is edited there does not reach the answer."""
    base.model.model.layers[-1].mlp.register_forward_hook(
        lambda module, args, output: change(output)
    )


def test_a_site_outside_the_graph_is_named(tmp_path):
    base = tiny_llama()
    cut(base, lambda output: output.detach() + 0 * output.detach().clone())
    last = [site.name for site in base.sites if "layers.3" in site.name]
    with pytest.raises(
        ModelError, match=rf"{last[0]}.*{last[-1]}: the answer does not depend on it"
    ):
        train(hparams(max_iters=2, **STEPS), EXAMPLES, EXAMPLES[:1], base=base, run_dir=tmp_path)


def test_a_gradient_of_zero_at_the_first_step_is_named(tmp_path):
    base = tiny_llama()
    cut(base, lambda output: 0 * output)
    with pytest.raises(
        MendkitError,
        match=r"the gradient is exactly zero at model.layers.3.mlp.*inner_params",
    ):
        train(hparams(max_iters=2, **STEPS), EXAMPLES, EXAMPLES[:1], base=base, run_dir=tmp_path)
    assert not (tmp_path / "archive.safetensors").exists()


@pytest.mark.parametrize(
    ("log_lr", "found"), [(-float("inf"), "zero"), (float("nan"), "not finite")]
)
def test_an_edit_without_effect_raises(log_lr, found, llama):
    mend = scrambled(with_statistics(llama, MEND(llama.sites, hparams())))
    edit = MENDEditor(llama, mend).edit(EXAMPLES[0])
    assert any(norm > 0 for norm in edit.relative_norm().values())
    with torch.no_grad():
        mend.log_edit_lr.fill_(log_lr)
    with pytest.raises(
        MendkitError, match=f"the weight change for 'The capital of France is' is {found}"
    ):
        MENDEditor(llama, mend).edit(EXAMPLES[0])


# ------------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("locality.argmax_agreement", 1.01),
        ("before.edit_success.es", -0.1),
        ("neighbourhood.kl_nats", float("nan")),
        ("norm.relative_max", float("inf")),
    ],
)
def test_an_impossible_score_raises(name, value):
    rows = [
        EditRow(i, None, None, "p", "t", None, {name: own}) for i, own in enumerate([0.5, value])
    ]
    assert summarise(rows[:1])[name].n == 1
    with pytest.raises(MendkitError, match=f"{name} of edit 1 is {value}, expected a"):
        summarise(rows)
    assert summarise(
        [EditRow(0, None, None, "p", "t", None, {"locality.kl_nats": 3.0, "log_p.new": -2.0})]
    )
