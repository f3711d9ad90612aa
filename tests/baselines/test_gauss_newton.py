"""Gauss–Newton editing against dense gradients and a dense solution; what it keeps, rehearses."""

import random
import sys
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from mendkit.baselines import gauss_newton
from mendkit.baselines.base import (
    down_projections,
    gradient_moments,
    key_moments,
    text_windows,
)
from mendkit.baselines.gauss_newton import CrispEdit, GaussNewton
from mendkit.errors import HyperParamError
from mendkit.evaluation.evaluate import evaluate, in_sequence, together
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.mend.batches import edit_tokens
from mendkit.mend.factors import capture_factors
from mendkit.mend.updates import side_branches
from mendkit.mend.validation import forced
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams

# For tiny models: an edit is much of all they know, and two tokens cost them 3.3 nats at least.
GIVEN = ("sites", "keep", "ridge", "kept", "reworded", "passages", "output_factor")
GENTLE = {"most": 2.0, "epochs": 60, "stop": 4.7}


@pytest.fixture
def editor(text):
    def made(base, **settings):
        given = {name: settings.pop(name) for name in GIVEN if name in settings}
        editor = GaussNewton(base, hparams(), text, **given)
        for name, value in settings.items():
            setattr(editor, name, value)
        return editor

    return made


def losses_of(base, texts, updates=None) -> list[float]:
    return [-sum(value.logp) for value in forced(FrozenTrunk(base), [texts], updates)[0]]


def learned(editor: GaussNewton, texts, updates) -> list[bool]:
    read = forced(FrozenTrunk(editor.base), [texts], updates)[0]
    return [value.argmax == text.targets for text, value in zip(texts, read, strict=True)]


def longest_first(texts) -> list:
    order = sorted(texts, key=lambda text: -len(text.ids))
    assert len(order[0].ids) > len(order[-1].ids)
    return order


def text_gradients(base, text, outputs) -> tuple[torch.Tensor, list, list]:
    """A text's loss, ∂L/∂W of every site (o, i), and Σ δ² of every site."""
    weights = [base.site_weight(site).requires_grad_() for site in base.sites]
    logp = base.model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
    loss = -logp[list(text.scored), list(text.targets)].sum()
    every = torch.autograd.grad(loss, [*weights, *(outputs[site.name] for site in base.sites)])
    gradients = [
        g.T if site.transposed else g
        for g, site in zip(every[: len(weights)], base.sites, strict=True)
    ]
    squares = [(delta**2).sum() for delta in every[len(weights) :]]
    for weight in weights:
        weight.requires_grad_(False)
    return loss.detach(), gradients, squares


def dense_step(editor: GaussNewton, words: str, texts, *, most: float) -> dict[str, torch.Tensor]:
    """ΔW of one step from the whole gradient of every weight, text by text."""
    base, outputs = editor.base, {}
    handles = [
        base.site_module(site).register_forward_hook(
            lambda _, __, y, name=site.name: outputs.__setitem__(name, y)
        )
        for site in base.sites
    ]
    read = [text_gradients(base, text, outputs) for text in texts]
    for handle in handles:
        handle.remove()
    moments, n = key_moments(base, words), len(texts)
    of_outputs = gradient_moments(base, words, seed=hparams().seed)
    g, changed = torch.zeros(n, n, dtype=torch.float64), {}
    for k, site in enumerate(base.sites):
        # Tokens that the answer can depend on.
        counts = [len(t.scored) if site.scored_only else t.scored[-1] + 1 for t in texts]
        s = sum(squares[k] for _, _, squares in read) / (sum(counts) * site.d_out)
        c = moments[site.name].double()
        inverse = torch.linalg.inv(c + 0.02 * c.diagonal().mean() * torch.eye(len(c)))
        gradients = torch.stack([found[k] for _, found, _ in read])
        changed[site.name] = gradients @ inverse / s
        if editor.output_factor:
            s = of_outputs[site.name]
            s = s + 0.02 * s.diagonal().mean() * torch.eye(len(s))
            changed[site.name] = torch.linalg.solve(s, gradients @ inverse)
        g += torch.einsum("eoi,foi->ef", gradients, changed[site.name])
    asked = torch.stack([loss for loss, _, _ in read]).clamp(max=most)
    a = torch.linalg.solve(g + 0.1 * g.diagonal().mean() * torch.eye(n), asked)
    return {name: -torch.einsum("e,eoi->oi", a, change) for name, change in changed.items()}


@pytest.mark.parametrize(
    ("family", "most", "factor"),
    [("llama64", 3.0, False), ("gpt264", 100.0, False), ("llama64", 3.0, True)],
)
def test_a_step_is_the_least_change_that_takes_every_loss_to_zero(
    family, most, factor, editor, text, tokens, request, monkeypatch
):
    monkeypatch.setattr(gauss_newton, "FACTOR_BATCH", 2)  # passes hold texts in another order
    monkeypatch.setattr(gauss_newton, "PART", 2)
    base = request.getfixturevalue(family)
    given = {"ridge": 0.1, "output_factor": factor}
    one, texts = editor(base, **given, epochs=1, most=most), longest_first(tokens(base, 3))
    update = one.updates(texts, at_once=True)
    assert list(update) == down_projections(base)
    assert editor(base, output_factor=not factor).metric is not one.metric
    for name, change in dense_step(one, text, texts, most=most).items():
        torch.testing.assert_close(update[name].dense(), change, rtol=1e-5, atol=1e-9)
    # A small step does what it says.
    given = {"ridge": 1e-12, "output_factor": factor}
    small = editor(base, **given, epochs=1, most=0.01).updates(texts, at_once=True)
    pairs = zip(losses_of(one.base, texts), losses_of(one.base, texts, small), strict=True)
    assert [a - b for a, b in pairs] == pytest.approx([0.01] * 3, rel=0.05)


def test_independent_edits_are_those_made_alone(llama64, editor, tokens):
    made, texts = editor(llama64, epochs=4), tokens(llama64)
    several = made.updates(texts)
    for k, text in enumerate(texts):
        alone = made.updates([text], at_once=True)
        for name, update in several.items():
            one = update.select([k]).dense()
            torch.testing.assert_close(one, alone[name].dense(), rtol=1e-6, atol=1e-9)


def test_it_learns_edits_at_once_and_stops(llama, editor, tokens):
    texts, made = tokens(llama, 2), editor(llama, **GENTLE)
    assert not any(learned(made, texts, None))
    updates = made.updates(texts, at_once=True)
    assert all(learned(made, texts, updates))
    longer = editor(llama, **GENTLE | {"epochs": 120}).updates(texts, at_once=True)
    for name, update in updates.items():  # all were below `stop` before
        assert torch.equal(update.dense(), longer[name].dense())
    small = editor(llama, **GENTLE, batch_size=1)
    assert all(learned(small, texts, small.updates(texts, at_once=True)))
    done = editor(llama, stop=1e6).updates(texts, at_once=True)
    assert all(float(update.dense().abs().max()) == 0 for update in done.values())


def test_kept_texts_change_less(llama, editor, tokens):
    """Measured on the very texts that are kept."""
    texts, drift = tokens(llama, 2), {}
    held = editor(llama, keep=EXAMPLES[2:], kept=1).pool.held
    for kept in (0, 16):
        made = editor(llama, keep=EXAMPLES[2:], kept=kept, **GENTLE)
        updates = made.updates(texts, at_once=True)
        assert all(learned(made, texts, updates))
        read = forced(FrozenTrunk(made.base), [held], updates, compare=True)[0]
        drift[kept] = fmean(fmean(value.kl) for value in read)
    assert drift[16] < drift[0]


def test_running_text_changes_less_where_passages_are_kept(llama, editor, tokens):
    """Measured on the text's own passages."""
    texts, drift = tokens(llama, 2), {}
    running = editor(llama, kept=0, passages=1).pool.running
    assert len(running) > 1 and not any(text.targets for text in running)
    for passages in (0, 8):
        made = editor(llama, kept=0, passages=passages, **GENTLE)
        drawn = made.pool.others(texts, random.Random(0))
        assert len(drawn) == min(passages, len(running)) and set(drawn) <= set(running)
        assert made.pool.others(texts, random.Random(0), most=2) == []
        updates = made.updates(texts, at_once=True)
        assert all(learned(made, texts, updates))
        read = forced(FrozenTrunk(made.base), [running], updates, compare=True)[0]
        drift[passages] = fmean(fmean(value.kl) for value in read)
    assert drift[8] < drift[0]


def test_passages_begin_as_the_model_has_every_text_begin(llama, editor, monkeypatch):
    plain = editor(llama, kept=0, passages=1).pool.running
    monkeypatch.setattr("mendkit.baselines.base.first_token", lambda _: [5])
    running = editor(llama, kept=0, passages=1).pool.running
    assert [text.ids for text in running] == [(5, *text.ids) for text in plain]
    for text in running:
        assert text.scored == tuple(range(text.scored[0], len(text.ids))) and text.scored[0] == 9


def test_edits_are_learned_in_the_wordings_that_examples_have(llama, editor, tokens):
    """Paraphrases of examples that differ from the edit in their subject only."""
    edit, *others = EXAMPLES
    made, draw = editor(llama, keep=others, reworded=2, kept=8, **GENTLE), random.Random(0)
    text, told = edit_tokens(llama, made.hparams, edit), []
    for prompt in edit.paraphrases:  # the others' with this subject
        told.append(edit_tokens(llama, made.hparams, edit, prompt))
    assert set(made.pool.other_words([text], draw)) == set(told)
    # What is kept is about other subjects.
    for kept in made.pool.others([text], draw):
        assert not kept.targets and edit.subject not in llama.tokenizer.decode(kept.ids)
    # Without them, other wordings are worse off.
    left = {}
    for reworded in (0, 2):
        made.pool.reworded = reworded
        left[reworded] = losses_of(made.base, told, made.updates([text], at_once=True))
    assert max(left[2]) < max(left[0])


def test_a_sequence_rehearses(llama, editor, tokens):
    texts, lost = tokens(llama, 3), {}
    for rehearse in (0, 4):
        made = in_sequence(editor(llama, **GENTLE, rehearse=rehearse))
        assert made.memory == []
        total = {}
        for text in texts:
            with side_branches(made.base, total):
                total = together(total, made.updates([text], at_once=True))
        assert made.memory == texts
        lost[rehearse] = losses_of(made.base, texts[:1], total)[0]
    assert lost[4] < 4.7 < lost[0]  # what the first edit is left with


def test_scores_do_not_depend_on_how_many_edits_are_read_together(llama, editor, monkeypatch):
    on, reports = EvaluationSet(llama, hparams(), EXAMPLES[:3], max_new_tokens=3), []
    for numbers in (10**9, 1):
        monkeypatch.setattr(sys.modules["mendkit.evaluation.evaluate"], "NUMBERS", numbers)
        reports.append(evaluate(editor(llama, **GENTLE), on, mode="sequential"))
    first, second = reports
    for name, value in first.summary.items():
        if name != "edit.seconds":
            assert second.summary[name].mean == pytest.approx(value.mean, abs=1e-5), name
    assert [row.index for row in first.rows] == [row.index for row in second.rows]
    assert first.summary["retention.tf_token"].mean == 1.0


def test_an_edit_is_computed_on_the_model_as_it_is(llama, editor, tokens):
    made, (first, second) = editor(llama, **GENTLE), tokens(llama, 2)
    update = made.updates([first], at_once=True)
    with side_branches(made.base, update):
        nothing = made.updates([first], at_once=True)  # it is known already
        more = made.updates([second], at_once=True)
    assert all(float(part.dense().abs().max()) == 0 for part in nothing.values())
    with side_branches(made.base, update), side_branches(made.base, more):
        assert learned(made, [second], None) == [True]


def test_crispedit_steps_are_the_least_at_places_of_low_curvature(
    llama64, text, tokens, monkeypatch
):
    """Against dense gradients, turned and masked by hand; most of the curvature is left alone."""
    monkeypatch.setattr(gauss_newton, "FACTOR_BATCH", 2)
    sites, texts = down_projections(llama64)[-2:], longest_first(tokens(llama64, 3))
    editor = CrispEdit(llama64, hparams(), text, sites=sites, kept=0, ridge=0.1, spared=0.7)
    editor.epochs = 1
    made = editor.updates(texts, at_once=True)
    # 1. Gradients at the places that are not spared.
    base, inputs = editor.base, key_moments(llama64.with_sites(sites), text)
    outputs, places = gradient_moments(editor.base, text, seed=hparams().seed), []
    for name in sites:
        (values_a, q_a), (values_s, q_s) = map(torch.linalg.eigh, (inputs[name], outputs[name]))
        curvature, total = torch.outer(values_s, values_a), values_s.sum() * values_a.sum()
        order = curvature.flatten().argsort(descending=True)
        spared, held = torch.zeros_like(curvature).flatten(), 0.0
        for at in order.tolist():  # until they hold the share
            spared[at] = 1.0
            held += float(curvature.flatten()[at] / total)
            if held >= 0.7:
                break
        places.append((q_a, q_s, spared.view_as(curvature)))
        assert 0 < spared.mean() < 0.7
        turned = q_s.T @ made[name].dense().double() @ q_a
        assert turned[places[-1][2] == 1].abs().max() < 1e-9 * turned.abs().max()
    found = []
    for one in texts:
        alone = capture_factors(FrozenTrunk(base), [one], reduction="sum")
        gradients = []
        for name, (q_a, q_s, spared) in zip(sites, places, strict=True):
            gradient = alone[name].weight_gradient().double()
            gradients.append(q_s @ ((q_s.T @ gradient @ q_a) * (1 - spared)) @ q_a.T)
        found.append(gradients)
    # 2. The step: least squares with a ridge over the texts.
    flat = torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in found])
    g = flat @ flat.T
    losses = torch.tensor(losses_of(base, texts), dtype=torch.float64).clamp(max=editor.most)
    a = torch.linalg.solve(g + 0.1 * g.diagonal().mean() * torch.eye(3), losses)
    for k, name in enumerate(sites):
        change = -sum(a[e] * found[e][k] for e in range(3))
        torch.testing.assert_close(made[name].dense().double(), change, rtol=1e-5, atol=1e-9)


def test_moments_of_gradients_are_those_of_tokens_drawn_from_the_model(llama64):
    base, words = llama64.with_sites(down_projections(llama64)[-1:]), "One two three four five."
    made = gradient_moments(base, words, seed=3)[base.sites[0].name]
    (window,) = text_windows(base, words, 100)
    ids = torch.tensor([window.ids])
    logits = base.model(input_ids=ids).logits[0, list(window.scored)]
    drawing = torch.Generator().manual_seed(3)
    drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=drawing)[:, 0]
    told = replace(window, targets=tuple(drawn.tolist()))
    factors = capture_factors(FrozenTrunk(base), [told], reduction="sum")[base.sites[0].name]
    expected = factors.delta.double().T @ factors.delta.double() / len(drawn)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("spared", [0.0, 1.0, -0.5])
def test_a_share_that_spares_all_or_nothing_is_refused(llama, text, spared):
    with pytest.raises(HyperParamError, match="spared must be between 0 and 1"):
        CrispEdit(llama, hparams(), text, spared=spared)
