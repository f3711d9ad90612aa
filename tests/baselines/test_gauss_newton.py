"""Gauss–Newton editing against dense gradients and a dense solution; what it learns, keeps and rehearses."""

import random
import sys
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from mendkit.baselines.base import down_projections
from mendkit.baselines.gauss_newton import GaussNewton
from mendkit.baselines.rome import key_moments
from mendkit.data.examples import EditExample
from mendkit.errors import HyperParamError, ModelError
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.many import in_sequence, together
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.mend.batches import edit_tokens
from mendkit.mend.scoring import forced
from mendkit.mend.updates import side_branches
from mendkit.models.trunk import FrozenTrunk
from tests.baselines.test_rome import TEXT
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.families import other_base

GENTLE = {"most": 2.0, "epochs": 60, "stop": 4.7}
"""For tiny models: an edit is much of all they know, and two tokens cost them 3.3 nats at least, so flat are they."""
SHORT = EXAMPLES[:2]


def editor(base, **settings) -> GaussNewton:
    return GaussNewton(base, hparams(), TEXT, **settings)


def tokens(base, examples=EXAMPLES):
    return [edit_tokens(base, hparams(), example) for example in examples]


def learned(own: GaussNewton, texts, updates) -> list[bool]:
    return [
        v.argmax == t.targets
        for t, v in zip(texts, forced(FrozenTrunk(own.base), [texts], updates)[0], strict=True)
    ]


def dense_step(own: GaussNewton, texts, asked, *, ridge, floor):
    """ΔW of one step from the whole gradient of every weight, text by text."""
    base, names = own.base, [site.name for site in own.base.sites]
    weights = [base.site_weight(site) for site in base.sites]
    turned = [site.transposed for site in base.sites]
    losses, gradients, squares, count = [], [], torch.zeros(len(names)), 0
    outputs = {}
    handles = [
        base.site_module(s).register_forward_hook(
            lambda _, __, y, n=s.name: outputs.__setitem__(n, y)
        )
        for s in base.sites
    ]
    for weight in weights:
        weight.requires_grad_()
    for text in texts:
        logp = base.model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
        loss = -sum(logp[p, t] for p, t in zip(text.scored, text.targets, strict=True))
        every = torch.autograd.grad(loss, [*weights, *(outputs[name] for name in names)])
        gradients.append(
            [g.T if t else g for g, t in zip(every[: len(names)], turned, strict=True)]
        )
        squares = squares + torch.stack([(delta**2).sum() for delta in every[len(names) :]])
        last = text.scored[-1] + 1  # tokens that the answer can depend on
        count = count + torch.tensor(
            [len(text.scored) if s.scored_only else last for s in base.sites]
        )
        losses.append(loss.detach())
    for handle in handles:
        handle.remove()
    for weight in weights:
        weight.requires_grad_(False)
    moments = key_moments(base, hparams(), TEXT)
    changed = []
    for k, site in enumerate(base.sites):
        c = moments[site.name].double()
        inverse = torch.linalg.inv(c + floor * c.diagonal().mean() * torch.eye(len(c)))
        s = squares[k] / (count[k] * site.d_out)
        changed.append([own[k] @ inverse / s for own in gradients])
    n = len(texts)
    g = torch.tensor(
        [
            [
                sum((gradients[e][k] * changed[k][f]).sum() for k in range(len(names)))
                for f in range(n)
            ]
            for e in range(n)
        ]
    )
    a = torch.linalg.solve(
        g + ridge * g.diagonal().mean() * torch.eye(n), asked(torch.stack(losses))
    )
    return {name: -sum(a[e] * changed[k][e] for e in range(n)) for k, name in enumerate(names)}


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
@pytest.mark.parametrize("most", [3.0, 100.0])
def test_a_step_is_the_least_change_that_takes_every_loss_to_zero(family, most, request):
    base = request.getfixturevalue(family)
    own = editor(base, ridge=0.1, floor=0.05, epochs=1, most=most)
    texts = tokens(base, EXAMPLES[:3])
    update = own.updates(texts, at_once=True)
    assert list(update) == down_projections(base)
    expected = dense_step(own, texts, lambda losses: losses.clamp(max=most), ridge=0.1, floor=0.05)
    for name, change in expected.items():
        torch.testing.assert_close(update[name].dense(), change, rtol=1e-5, atol=1e-9)
    exact = editor(base, ridge=1e-12, epochs=1, most=0.01).updates(
        texts, at_once=True
    )  # a small step does what it says
    before, after = (
        torch.tensor([-sum(v.logp) for v in forced(FrozenTrunk(own.base), [texts], u)[0]])
        for u in (None, exact)
    )
    torch.testing.assert_close(
        before - after, torch.full((3,), 0.01, dtype=before.dtype), rtol=0.05, atol=0
    )


def test_independent_edits_are_those_made_alone(llama64):
    own, texts = editor(llama64, epochs=4), tokens(llama64)
    several = own.updates(texts)
    for k, text in enumerate(texts):
        alone = own.updates([text], at_once=True)
        for name, update in several.items():
            torch.testing.assert_close(
                update.select([k]).dense(), alone[name].dense(), rtol=1e-6, atol=1e-9
            )


def test_it_learns_edits_at_once_and_stops(llama):
    texts, own = tokens(llama, SHORT), editor(llama, **GENTLE)
    assert not any(learned(own, texts, None))
    updates = own.updates(texts, at_once=True)
    assert all(learned(own, texts, updates))
    longer = editor(llama, **GENTLE | {"epochs": 120}).updates(texts, at_once=True)
    for name, update in updates.items():
        assert torch.equal(update.dense(), longer[name].dense())  # all were below `stop` before
    small = editor(llama, **GENTLE, batch_size=2)
    assert all(learned(small, texts, small.updates(texts, at_once=True)))  # in mini-batches, too
    done = editor(llama, stop=1e6).updates(texts, at_once=True)
    assert all(float(update.dense().abs().max()) == 0 for update in done.values())


def test_texts_to_keep_are_other_texts_and_the_own_prompt_about_others(llama):
    own = editor(llama, keep=EXAMPLES[2:], kept=8)
    assert len(own.held) == 4 * 3
    (text, *_), seen = tokens(llama), set()
    for seed in range(20):
        chosen = own._others([text], 8, random.Random(seed))
        assert len(chosen) == 8
        seen |= {
            llama.tokenizer.decode(t.ids, skip_special_tokens=True).strip() for t in chosen[:4]
        }
    assert any(written.startswith("The capital of Norway") for written in seen)
    assert not any("France" in written for written in seen)
    assert editor(llama)._others([text], 8, random.Random(0)) == []  # none are known
    nameless = replace(text, subject=())
    assert all(t in own.held for t in own._others([nameless], 8, random.Random(0)))


def test_kept_texts_change_less(llama):
    """Measured on the very texts that are kept, by how far the unedited model's own argmax falls."""
    texts, drift = tokens(llama, EXAMPLES[:2]), {}
    for kept in (0, 16):
        own = editor(llama, keep=EXAMPLES[2:], kept=kept, **GENTLE)
        held = editor(llama, keep=EXAMPLES[2:], kept=1).held
        updates = own.updates(texts, at_once=True)
        assert all(learned(own, texts, updates))
        drift[kept] = fmean(
            fmean(v.kl) for v in forced(FrozenTrunk(own.base), [held], updates, compare=True)[0]
        )
    assert drift[16] < drift[0]


def test_a_sequence_rehearses(llama):
    texts, lost = tokens(llama, EXAMPLES[:3]), {}
    for rehearse in (0, 4):
        own = in_sequence(editor(llama, **GENTLE, rehearse=rehearse))
        assert own.memory == []
        made = []
        for text in texts:
            with _all(own.base, made):
                made.append(own.updates([text], at_once=True))
        assert own.memory == texts
        with _all(own.base, made):
            read = forced(FrozenTrunk(own.base), [texts[:1]], None)[0]
        lost[rehearse] = -sum(read[0].logp)
    assert lost[4] < 4.7 < lost[0]  # what the first edit is left with
    on = EvaluationSet(llama, hparams(), EXAMPLES[:3], max_new_tokens=4)
    report = evaluate(editor(llama, **GENTLE), on, mode="sequential")
    assert report.summary["retention.tf_token"].mean == 1.0 and len(report.rows) == 3


@pytest.mark.parametrize("mode", [{"mode": "batch", "k": 2}, {"mode": "sequential"}])
def test_scores_do_not_depend_on_how_many_edits_are_read_together(llama, mode, monkeypatch):
    on = EvaluationSet(llama, hparams(), EXAMPLES[:4], max_new_tokens=3)
    reports = []
    for numbers in (10**9, 1):
        monkeypatch.setattr(sys.modules["mendkit.evaluation.evaluate"], "NUMBERS", numbers)
        reports.append(evaluate(editor(llama, **GENTLE), on, **mode))
    for name, value in reports[0].summary.items():
        assert name == "edit.seconds" or reports[1].summary[name].mean == pytest.approx(
            value.mean, abs=1e-5
        ), name
    assert [row.index for row in reports[0].rows] == [row.index for row in reports[1].rows]


def test_the_weakest_of_the_edits_that_are_read_again_are_rehearsed(llama):
    own, texts = in_sequence(editor(llama, rehearse=2, reread=9)), tokens(llama)
    own.memory = list(texts)
    losses = [-sum(v.logp) for v in forced(FrozenTrunk(own.base), [texts], None)[0]]
    order = sorted(range(len(texts)), key=lambda k: -losses[k])
    assert own._weakest(FrozenTrunk(own.base), random.Random(0)) == [texts[k] for k in order[:2]]


def test_a_cached_trunk_changes_nothing(llama64):
    sites = down_projections(llama64)[2:]
    own, texts = editor(llama64, keep=EXAMPLES[2:], sites=sites, epochs=3), tokens(llama64, SHORT)
    trunk = FrozenTrunk(own.base)
    assert trunk.split
    trunk.fill(texts)
    cached = own.updates(texts, trunk=trunk, at_once=True)
    for name, update in own.updates(texts, at_once=True).items():
        torch.testing.assert_close(cached[name].dense(), update.dense(), rtol=1e-6, atol=1e-9)


def _all(base, made):
    """All updates in force."""
    return side_branches(base, together(*made))


def test_an_edit_is_computed_on_the_model_as_it_is(llama):
    own, (first, second) = editor(llama, **GENTLE), tokens(llama, SHORT)
    made = own.updates([first], at_once=True)
    with side_branches(own.base, made):
        nothing = own.updates([first], at_once=True)  # it is known already
        more = own.updates([second], at_once=True)
    assert all(float(update.dense().abs().max()) == 0 for update in nothing.values())
    with side_branches(own.base, made), side_branches(own.base, more):
        assert learned(own, [second], None) == [True]


def test_what_is_kept_is_what_the_unedited_model_says(llama):
    own = editor(llama, keep=EXAMPLES[2:])
    losses, texts = own._before(FrozenTrunk(own.base), [own.held])
    with side_branches(own.base, own.updates(tokens(llama, SHORT), at_once=True)):
        after, same = own._before(FrozenTrunk(own.base), [own.held])
    assert torch.equal(losses, after) and texts == same
    read = forced(FrozenTrunk(own.base), texts, None)[0]
    assert losses[0].tolist() == pytest.approx([-sum(v.logp) for v in read], rel=1e-5)
    assert all(v.argmax == text.targets for v, text in zip(read, texts[0], strict=True))


def test_editors_of_other_settings_share_the_moments(llama):
    first = editor(llama)
    assert editor(llama, ridge=1.0, kept=3).inverse is first.inverse
    sites = down_projections(llama)[2:]
    for other in (
        editor(llama, floor=0.1),
        editor(llama, sites=sites),
        GaussNewton(llama, hparams(), TEXT[:400]),
    ):
        assert not torch.equal(
            other.inverse[sites[0]], first.inverse[sites[0]]
        ) or other.inverse.keys() == set(sites)


def test_mistakes_are_told(llama):
    with pytest.raises(HyperParamError, match="must be positive"):
        editor(llama, ridge=0.0)
    with pytest.raises(HyperParamError, match="at least 0"):
        editor(llama, kept=-1)
    with pytest.raises(ModelError, match="Gauss-Newton edits causal models"):
        base = other_base("bert")
        GaussNewton(base, hparams(), TEXT)
    assert isinstance(editor(llama).edit(EditExample("Snow is", "green")).dense(), dict)
