"""Controls against doing them by hand: descent on copies of weights, the fact before prompts."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from mendkit.baselines import base, tuning
from mendkit.baselines.base import down_projections, fact_in_context, tune_identity
from mendkit.baselines.fine_tuning import FineTuning, LocalisedFineTuning
from mendkit.baselines.gauss_newton import GaussNewton
from mendkit.baselines.rome import ROME
from mendkit.baselines.tuning import BUDGET, KINDS, best_of, candidates, running_text, tune
from mendkit.errors import HyperParamError, LimitError, MendkitError, ModelError
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.evaluation.results import normalise
from mendkit.mend.hypernetwork import MEND
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams, logits, with_statistics
from tests.oracles.families import other_base


def answer_loss(model, text) -> torch.Tensor:
    """Mean NLL of a text's answer, by the whole model."""
    logp = model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
    return -logp[list(text.scored), list(text.targets)].mean()


def descended(base, texts, *, lr: float, steps: int, cap: float | None) -> torch.Tensor:
    """Logits after plain gradient descent on the mean loss of `texts`, on a copy of the model."""
    model = copy.deepcopy(base.model)
    weights = [model.get_submodule(site.module).weight.requires_grad_() for site in base.sites]
    start = [w.detach().clone() for w in weights]
    for _ in range(steps):
        loss = torch.stack([answer_loss(model, text) for text in texts]).mean()
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, w0, g in zip(weights, start, gradients, strict=True):
                w -= lr * g
                if cap is not None and (w - w0).norm() > cap * w0.norm():
                    w.copy_(w0 + (w - w0) * cap * w0.norm() / (w - w0).norm())
    ids = torch.tensor([base.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("family", "n", "cap"), [("llama64", 1, 1e-2), ("gpt264", 3, None), ("llama64", 3, 1e-2)]
)
def test_fine_tuning_is_gradient_descent_on_the_weights(family, n, cap, tokens, request):
    base, settings = request.getfixturevalue(family), {"lr": 0.05, "steps": 4, "cap": cap}
    expected = descended(base, tokens(base, n), **settings)
    edit = FineTuning(base, hparams(), **settings).edit(EXAMPLES[:n])
    with edit.applied():
        # Norms are float32 in the model.
        torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-6)
    assert float((logits(base) - expected).abs().max()) > 1e-4
    if cap is not None:
        assert max(edit.relative_norm().values()) == pytest.approx(cap)


def test_independent_edits_are_each_tuned_alone(llama64, tokens):
    adam = LocalisedFineTuning(llama64, hparams(), site=down_projections(llama64)[2], lr=2e-2)
    adam.epochs, adam.stop = 12, 4.5
    for editor in (FineTuning(llama64, hparams(), lr=0.05, steps=3, cap=0.02), adam):
        several = editor.updates(tokens(llama64, 3), trunk=FrozenTrunk(editor.base))
        for k, example in enumerate(EXAMPLES[:3]):
            for name, change in editor.edit(example).updates.items():
                torch.testing.assert_close(several[name].select([k]).dense(), change.dense())


def test_localised_fine_tuning_is_adam_over_mini_batches_on_one_weight(base64, tokens):
    name, texts = down_projections(base64)[2], tokens(base64, 3)
    editor = LocalisedFineTuning(base64, hparams(), site=name, lr=2e-3)
    editor.epochs, editor.batch_size = 3, 2
    change = editor.edit(EXAMPLES[:3]).dense()
    model = copy.deepcopy(base64.model)
    weight = model.get_parameter(name).requires_grad_()
    start = weight.detach().clone()
    optimiser = torch.optim.Adam([weight], lr=2e-3)
    generator = torch.Generator().manual_seed(hparams().seed)
    for _ in range(3):
        for index in torch.randperm(3, generator=generator).split(2):
            optimiser.zero_grad()
            torch.stack([answer_loss(model, texts[k]) for k in index.tolist()]).mean().backward()
            optimiser.step()
    assert list(change) == [name] and float(change[name].norm()) > 1e-3
    torch.testing.assert_close(change[name], weight.detach() - start, rtol=1e-4, atol=1e-6)


def test_the_fact_in_context_is_read_before_every_prompt(llama):
    on = EvaluationSet(llama, hparams(), EXAMPLES[:3], max_new_tokens=8)
    report = fact_in_context(on)
    for row, example in zip(report.rows, EXAMPLES, strict=False):
        fact = f"{example.prompt} {example.target_new}.\n"
        written = normalise(llama.generate(fact + example.prompt, max_new_tokens=8))
        output = row.outputs[0]
        assert normalise(output["after"]) == written and output["prompt"] == example.prompt
        assert row.values["edit_success.free_exact"] == (written == normalise(example.target_new))
        same = []
        for probe in example.neighbours:
            best = []
            for before in ("", fact):
                text = llama.tokenize(before + probe.prompt, probe.answer)
                with torch.no_grad():
                    found = llama.model(input_ids=torch.tensor([text.ids])).logits[0]
                best.append(found[list(text.scored)].argmax(-1))
            same.append(float((best[0] == best[1]).double().mean()))
        assert row.values["neighbourhood.argmax_agreement"] == pytest.approx(sum(same) / len(same))
        before = on.before[row.index].values["log_p.new"]
        assert row.values["before.log_p.new"] == before != row.values["log_p.new"]
    denied = replace(EXAMPLES[0], negations=("The capital of France is not",))
    (row,) = fact_in_context(EvaluationSet(llama, hparams(), [denied], max_new_tokens=8)).rows
    fact = f"{denied.prompt} {denied.target_new}.\n"
    output = next(each for each in row.outputs if each["role"] == "negations")
    written = llama.generate(fact + denied.negations[0], max_new_tokens=8)
    assert output["after"] == written and output["prompt"] == denied.negations[0]
    short = EvaluationSet(llama, hparams(max_length=80), EXAMPLES[:2], max_new_tokens=4)
    with pytest.raises(LimitError, match=r"with the fact before it: .* raise `max_length`"):
        fact_in_context(short)


# ------------------------------------------------------------------------------------------ tuning


def test_the_identity_control_tries_steps_that_suit_the_model(llama):
    mend = with_statistics(llama, MEND(llama.sites, hparams(z_clip=None)))
    rates = [row["edit_lr"] for row in tune_identity(llama, mend, EXAMPLES)[1]]
    for moments in mend.moments.values():  # deltas 1024 times as large
        moments["delta"].m2 *= 2.0**-20
    smaller = [row["edit_lr"] for row in tune_identity(llama, mend, EXAMPLES)[1]]
    assert smaller == [rate / 1024 for rate in rates]


@pytest.mark.parametrize(("power", "tried"), [(3, range(-2, 5)), (-4, range(-5, 1))])
def test_the_identity_controls_range_grows_until_its_score_falls(llama, monkeypatch, power, tried):
    """A stand-in scores best at a step beyond the three that are tried first."""
    grid = base.IDENTITY_EDIT_LRS
    monkeypatch.setattr(base, "identity_edit_lrs", lambda *_: grid)

    def curve(_, __, *, strengths, trunk):
        best = grid[-1] * 2.0**power
        return [{"strength": s, "score": -abs(math.log(s / best)) - 1} for s in strengths]

    monkeypatch.setattr(base, "strength_curve", curve)
    mend = with_statistics(llama, MEND(llama.sites, hparams(z_clip=None)))
    editor, rows = tune_identity(llama, mend, EXAMPLES)
    expected = [grid[-1] * 2.0**k for k in tried]
    assert [row["edit_lr"] for row in rows] == pytest.approx(expected)
    assert editor.mend.hparams.edit_lr == pytest.approx(grid[-1] * 2.0**power)
    assert len(tune_identity(llama, mend, EXAMPLES, edit_lrs=grid)[1]) == len(grid)


def test_every_kind_has_the_same_budget_and_keeps_the_best(llama, text, monkeypatch):
    on = EvaluationSet(llama, hparams(), EXAMPLES[:2], max_new_tokens=2)
    for kind in KINDS[1:]:
        assert len(candidates(kind, on, text)) == BUDGET
    two = [FineTuning(llama, hparams(), lr=lr, steps=1) for lr in (1e-6, 0.5)]
    scores = [report.harmonic["score.headline"] for report in best_of(two, on)[1]]
    monkeypatch.setattr(tuning, "candidates", lambda *_: two)
    tuned = tune("finetune", on, text=text)
    assert [row["settings"] for row in tuned.rows] == ["lr 1e-06, steps 1", "lr 0.5, steps 1"]
    assert [row["score"] for row in tuned.rows] == scores
    best = scores.index(max(scores))
    assert tuned.editor is two[best] and tuned.rows[best]["chosen"]
    assert tuned.to_dict("x.")["x.tuning.kept"] == tuned.rows[best]["settings"]
    assert tuned.to_dict()["tuning.tried"] == 2
    monkeypatch.undo()
    with pytest.raises(MendkitError, match="set `archive`"):
        tune("identity", on, text=text)
    with pytest.raises(MendkitError, match="expected one of identity"):
        tune("best", on, text=text)
    france, kingdom = running_text(EXAMPLES[:2]).splitlines()
    assert france == "The capital of France is Paris." and kingdom.endswith("London.")


@pytest.mark.parametrize(("kind", "count"), [("rome", 2), ("memit", 4)])
def test_the_text_is_read_once_for_all_settings_of_a_kind(llama, text, monkeypatch, kind, count):
    seen, real = [], base.key_moments

    def counted(at, words, **options):
        seen.append([site.name for site in at.sites])
        return real(at, words, **options)

    monkeypatch.setattr(base, "key_moments", counted)
    monkeypatch.setattr(tuning, "MEMIT_DEPTHS", (0.25, 0.75))  # two spans in four blocks
    on = EvaluationSet(llama, hparams(), EXAMPLES)
    words = f"{text} {kind}"  # whose moments no other test has
    for _ in range(2):
        candidates(kind, on, words)
    (sites,) = seen
    assert len(sites) == len(set(sites)) == count


def test_a_set_serves_editors_of_other_sites(llama64):
    """Scores do not depend on which sites the set was prepared with, below or above."""
    names, options = down_projections(llama64), {"max_new_tokens": 3, "text": "Rome is in Italy."}
    editor = LocalisedFineTuning(llama64, hparams(), site=names[2], lr=5e-3)
    editor.epochs = 3
    expected = evaluate(editor, EvaluationSet(editor.base, hparams(), EXAMPLES[:2], **options))
    for block in (1, 3):
        base = llama64.with_sites([names[block]])
        report = evaluate(editor, EvaluationSet(base, hparams(), EXAMPLES[:2], **options))
        for name, value in expected.summary.items():
            if name != "edit.seconds":
                found = report.summary[name].mean
                assert found == pytest.approx(value.mean, abs=1e-9), name


def test_every_baseline_undoes_to_the_same_bits(llama, text):
    before, site = logits(llama), down_projections(llama)[1]
    for editor in (
        ROME(llama, hparams(), text, site=site),
        LocalisedFineTuning(llama, hparams(), site=site),
        FineTuning(llama, hparams(), lr=0.1, cap=0.01),
        GaussNewton(llama, hparams(), text, keep=EXAMPLES[2:]),
    ):
        editor.epochs, editor.steps = 2, 3
        edit = editor.edit(EXAMPLES[:2])
        assert torch.equal(logits(llama), before)
        with edit.applied():
            assert not torch.equal(logits(llama), before)
        assert torch.equal(logits(llama), before)


def test_numbers_out_of_range_and_other_models_are_told(llama, text):
    for wrong in ({"lr": 0.0}, {"lr": 1.0, "cap": 0.0}):
        with pytest.raises(HyperParamError, match="must be positive"):
            FineTuning(llama, hparams(), **wrong)
    with pytest.raises(HyperParamError, match="ridge of Gauss-Newton must be positive"):
        GaussNewton(llama, hparams(), text, ridge=0.0)
    with pytest.raises(ModelError, match="Gauss-Newton edits causal models"):
        GaussNewton(other_base("bert"), hparams(), text)
