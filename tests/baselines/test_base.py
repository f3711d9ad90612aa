"""Controls against doing them by hand: gradient descent on copies of the weights, prompts with the fact before them."""

import copy

import pytest
import torch

from mendkit.baselines.base import FineTuning, best_of, fact_in_context
from mendkit.errors import HyperParamError, LimitError
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.evaluation.results import normalise
from mendkit.mend.batches import edit_tokens
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams, logits


def descend(base, texts, *, lr: float, steps: int, cap: float | None = None) -> torch.Tensor:
    """Logits after plain gradient descent on the mean loss of `texts`, on a copy of the model."""
    model = copy.deepcopy(base.model)
    weights = [model.get_submodule(site.module).weight.requires_grad_() for site in base.sites]
    start = [w.detach().clone() for w in weights]
    for _ in range(steps):
        loss = torch.zeros((), dtype=weights[0].dtype)
        for text in texts:
            logp = model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
            loss = loss - sum(
                logp[p, t] for p, t in zip(text.scored, text.targets, strict=True)
            ) / len(text.targets)
        gradients = torch.autograd.grad(loss / len(texts), weights)
        with torch.no_grad():
            for w, w0, g in zip(weights, start, gradients, strict=True):
                w -= lr * g
                if cap is not None and (w - w0).norm() > cap * w0.norm():
                    w.copy_(w0 + (w - w0) * cap * w0.norm() / (w - w0).norm())
    ids = torch.tensor([base.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
@pytest.mark.parametrize(("n", "cap"), [(1, None), (1, 1e-2), (3, None), (3, 1e-2)])
def test_fine_tuning_is_gradient_descent_on_the_weights(family, n, cap, request):
    base, settings = request.getfixturevalue(family), {"lr": 0.05, "steps": 4, "cap": cap}
    tuning = FineTuning(base, hparams(), **settings)
    expected = descend(base, [edit_tokens(base, hparams(), e) for e in EXAMPLES[:n]], **settings)
    edit = tuning.edit(EXAMPLES[:n])
    with edit.applied():
        torch.testing.assert_close(
            logits(base), expected, rtol=1e-5, atol=1e-6
        )  # norms are float32 in the model
    assert float((logits(base) - expected).abs().max()) > 1e-4
    if cap is not None:
        assert max(edit.relative_norm().values()) == pytest.approx(cap)


def test_independent_edits_are_each_tuned_alone(llama64):
    tuning = FineTuning(llama64, hparams(), lr=0.05, steps=3, cap=0.02)
    texts = [edit_tokens(llama64, hparams(), e) for e in EXAMPLES[:3]]
    several = tuning.updates(texts, trunk=FrozenTrunk(llama64))
    for k, example in enumerate(EXAMPLES[:3]):
        for name, change in tuning.edit(example).updates.items():
            torch.testing.assert_close(several[name].select([k]).dense(), change.dense())


def test_the_best_of_several_editors_is_chosen_and_all_modes_take_them(llama):
    on = EvaluationSet(llama, hparams(), EXAMPLES[:3], max_new_tokens=4)
    editors = [FineTuning(llama, hparams(), lr=lr) for lr in (1e-6, 0.3)]
    best, reports = best_of(editors, on)
    success = [r.summary["edit_success.tf_token"].mean for r in reports]
    assert success[1] > success[0] + 0.2 and best.name == "fine-tuning" and len(reports) == 2
    assert evaluate(editors[1], on, mode="batch", k=3).mode == "batch_3"
    assert evaluate(editors[1], on, mode="sequential").summary["retention.all"].n == 3
    for wrong in ({"lr": 0.0}, {"lr": 1.0, "steps": 0}, {"lr": 1.0, "cap": 0.0}):
        with pytest.raises(HyperParamError, match="must be positive"):
            FineTuning(llama, hparams(), **wrong)


def test_the_fact_in_context_is_read_before_every_prompt(llama):
    on = EvaluationSet(llama, hparams(), EXAMPLES[:3], max_new_tokens=8)
    report = fact_in_context(on)
    for row, example in zip(report.rows, EXAMPLES, strict=False):
        fact = f"{example.prompt} {example.target_new}.\n"
        written = llama.generate(fact + example.prompt, max_new_tokens=8)
        assert (
            normalise(row.outputs[0]["after"]) == normalise(written)
            and row.outputs[0]["prompt"] == example.prompt
        )
        assert row.values["edit_success.free_exact"] == float(
            normalise(written) == normalise(example.target_new)
        )
        same = []
        for probe in example.neighbours:
            answer = llama.tokenizer(f" {probe.answer}")["input_ids"]
            best = []
            for before in ("", fact):
                ids = torch.tensor(
                    [llama.tokenizer(f"{before}{probe.prompt} {probe.answer}")["input_ids"]]
                )
                with torch.no_grad():
                    best.append(
                        llama.model(input_ids=ids).logits[0, -len(answer) - 1 : -1].argmax(-1)
                    )
            same.append(float((best[0] == best[1]).double().mean()))
        assert row.values["neighbourhood.argmax_agreement"] == pytest.approx(sum(same) / len(same))
        assert (
            row.values["before.log_p.new"]
            == on.before[row.index].values["log_p.new"]
            != row.values["log_p.new"]
        )
    short = EvaluationSet(llama, hparams(max_length=80), EXAMPLES[:2], max_new_tokens=4)
    with pytest.raises(LimitError, match=r"with the fact before it: .* raise `max_length`"):
        fact_in_context(short)
