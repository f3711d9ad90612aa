"""ROME against its closed form in float64, its covariance against a naive loop; the baselines' tuning and undoing."""

import copy
from dataclasses import replace

import pytest
import torch

from mendkit.baselines.base import FineTuning, LocalisedFineTuning, best_of, down_projections
from mendkit.baselines.gauss_newton import GaussNewton
from mendkit.baselines.rome import ROME, key_moments
from mendkit.baselines.tuning import BUDGET, KINDS, running_text, tune
from mendkit.errors import DataError, HyperParamError, MendkitError, ModelError
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.mend.batches import edit_tokens
from mendkit.models.tokens import tokenize
from tests.oracles.claims import EXAMPLES, hparams, logits
from tests.oracles.families import other_base
from tests.oracles.kinds import KINDS as TOKENIZERS
from tests.oracles.kinds import tokenizer_of
from tests.oracles.tiny import sentences

TEXT = "\n".join(sentences()[::7])
FAST = {"steps": 8, "contexts": 2}


def rome(base, *, block: int = 1, **settings) -> ROME:
    return ROME(base, hparams(), TEXT, site=down_projections(base)[block], **{**FAST, **settings})


def keys_and_values(editor: ROME, example) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of the edited layer at the subject's last token, after each context: one text at a time."""
    base, seen = editor.base, []
    layer = base.site_module(editor.site)
    handle = layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    text = edit_tokens(base, hparams(), example)
    end = example.prompt.index(example.subject) + len(example.subject)
    own = tuple(base.tokenizer(example.prompt[:end])["input_ids"])
    assert own == text.ids[: len(own)]
    try:
        with torch.no_grad():
            for context in editor.contexts:
                base.model(input_ids=torch.tensor([[*context, *own]]))
    finally:
        handle.remove()
    return tuple(torch.stack([pair[k][0, -1] for pair in seen]) for k in range(2))


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
def test_the_update_is_the_least_squares_solution_with_its_constraint(family, request):
    base = request.getfixturevalue(family)
    editor = rome(base, ridge=0.05)
    edit = editor.edit(EXAMPLES[1])
    (update,) = edit.updates.values()
    change, (keys, values) = update.dense(), keys_and_values(editor, EXAMPLES[1])
    k, v = keys.mean(0), values.mean(0)
    moments = key_moments(editor.base, hparams(), TEXT)[editor.site.name].double()
    c = moments + 0.05 * moments.diagonal().mean() * torch.eye(len(moments))
    z = change @ k
    assert update.u.shape[1] == 1 and float(z.norm()) > 0.1 * float(v.norm())
    torch.testing.assert_close(
        change, torch.outer(z, torch.linalg.solve(c, k)) / (k @ torch.linalg.solve(c, k))
    )
    with edit.applied():
        torch.testing.assert_close(
            keys_and_values(editor, EXAMPLES[1])[1].mean(0), v + z
        )  # (W + ΔW) k* = v*
    # every other ΔW with ΔW k* = z moves the text's keys more: tr(ΔW C ΔWᵀ) is least
    other = torch.randn(change.shape, dtype=c.dtype, generator=torch.Generator().manual_seed(0))
    other = 0.1 * (other - torch.outer(other @ k, k) / (k @ k))

    def cost(m):
        return torch.trace(m @ c @ m.T)

    assert cost(change + other) > cost(change) and cost(change - other) > cost(change)
    assert abs(float(torch.trace(change @ c @ other.T))) < 1e-9 * float(cost(change))


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
def test_key_moments_are_those_of_a_loop_over_tokens_and_are_kept(family, request, monkeypatch):
    base = request.getfixturevalue(family)
    names = down_projections(base)[1:3]
    found = key_moments(base.with_sites(names), hparams(), TEXT)
    ids = base.tokenizer(TEXT)["input_ids"]
    for name in names:
        seen = []
        site = base.with_sites([name]).sites[0]
        handle = base.site_module(site).register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0][0])
        )
        for at in range(0, len(ids), 256):
            with torch.no_grad():
                base.model(input_ids=torch.tensor([ids[at : at + 256]]))
        handle.remove()
        expected = sum(torch.outer(k, k) for part in seen for k in part) / len(ids)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-7)
    monkeypatch.setattr("mendkit.baselines.rome._moments", None)  # would raise
    again = key_moments(base.with_sites(names[:1]), hparams(), TEXT)
    assert torch.equal(again[names[0]], found[names[0]])


def mean_nll(editor: ROME, example, z: torch.Tensor) -> float:
    """Mean NLL of the new answer over the contexts, with z added where the subject ends: one text at a time."""
    base, text, losses = editor.base, edit_tokens(editor.base, hparams(), example), []
    for context in editor.contexts:
        n, shift = len(context), torch.zeros(1, len(context) + len(text.ids), len(z), dtype=z.dtype)
        shift[0, n + text.subject[-1]] = z
        handle = base.site_module(editor.site).register_forward_hook(
            lambda _, __, out, shift=shift: out + shift
        )
        with torch.no_grad():
            logp = (
                base.model(input_ids=torch.tensor([[*context, *text.ids]]))
                .logits[0]
                .log_softmax(-1)
            )
        handle.remove()
        losses.append(
            -sum(float(logp[n + p, t]) for p, t in zip(text.scored, text.targets, strict=True))
        )
    return sum(losses) / len(losses) / len(text.targets)


def test_the_value_lowers_the_loss_and_independent_edits_are_each_their_own(llama64):
    editor = rome(llama64, lr=0.5)
    texts = [edit_tokens(llama64, hparams(), e) for e in EXAMPLES[:3]]
    several = editor.updates(texts)[editor.site.name]
    for k, example in enumerate(EXAMPLES[:3]):
        (own,) = editor.edit(example).updates.values()
        torch.testing.assert_close(several.select([k]).dense(), own.dense(), rtol=1e-5, atol=1e-7)
        (z,) = own.delta[0]
        assert mean_nll(editor, example, z) < mean_nll(editor, example, 0 * z) - 0.1


def test_rome_serves_every_mode(llama):
    on = EvaluationSet(
        llama, hparams(), [replace(e, unrelated=()) for e in EXAMPLES[:2]], max_new_tokens=2
    )
    editor = rome(llama, steps=2)
    assert evaluate(editor, on, mode="sequential").summary["retention.all"].n == 2
    assert evaluate(editor, on, mode="batch", k=2).summary["edit_success.free_exact"].n == 2


def test_the_size_of_the_change_is_bounded(llama64):
    for clamp in (0.5, 1.0):
        editor = rome(llama64, clamp=clamp, stop=0.0)
        (update,) = editor.edit(EXAMPLES[0]).updates.values()
        k, v = (x.mean(0) for x in keys_and_values(editor, EXAMPLES[0]))
        assert float((update.dense() @ k).norm()) == pytest.approx(
            clamp * float(v.norm()), rel=1e-5
        )


@pytest.mark.parametrize("kind", [name for name in TOKENIZERS if "WordPiece, lower" not in name])
def test_the_subject_is_found_by_its_tokens(kind):
    tokenizer = tokenizer_of(kind)
    for prompt, subject in (
        ("The capital of the United Kingdom is", "the United Kingdom"),
        ("Chad? Chad is in", "Chad"),
    ):
        text = tokenize(tokenizer, prompt, "Rome", subject=subject)
        named = tokenizer.decode([text.ids[p] for p in text.subject])
        assert named.strip() == subject
        assert max(text.subject) == len(text.ids) - 1 or subject not in tokenizer.decode(
            text.ids[max(text.subject) + 1 :]
        )
    assert tokenize(tokenizer, "Rome is in", "Peru", subject="Chad").subject == ()
    assert tokenize(tokenizer, "Rome is in", "Peru").subject == ()


def test_mistakes_are_told(llama, tmp_path):
    for example in (replace(EXAMPLES[0], subject=None), replace(EXAMPLES[0], subject="Atlantis")):
        with pytest.raises(DataError, match="does not contain its example's `subject`"):
            rome(llama).edit(example)
    with pytest.raises(HyperParamError, match="must be positive"):
        rome(llama, clamp=0.0)
    with pytest.raises(HyperParamError, match="at least 1"):
        LocalisedFineTuning(llama, hparams(), site=down_projections(llama)[0], epochs=0)
    with pytest.raises(DataError, match="has no token"):
        ROME(llama, hparams(), "", site=down_projections(llama)[0])
    with pytest.raises(MendkitError, match="expected one of identity"):
        tune("best", EvaluationSet(llama, hparams(), EXAMPLES[:1], max_new_tokens=2), text=TEXT)


# ------------------------------------------------------------------------------------------- localised fine-tuning


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
def test_localised_fine_tuning_is_adam_over_mini_batches_on_one_weight(family, request):
    base = request.getfixturevalue(family)
    name = down_projections(base)[2]
    editor = LocalisedFineTuning(base, hparams(), site=name, lr=2e-3, epochs=3, batch_size=2)
    edit = editor.edit(EXAMPLES[:3])
    assert list(edit.updates) == [name]
    model, texts = (
        copy.deepcopy(base.model),
        [edit_tokens(base, hparams(), e) for e in EXAMPLES[:3]],
    )
    weight = model.get_parameter(name).requires_grad_()
    start = weight.detach().clone()
    optimiser, generator = (
        torch.optim.Adam([weight], lr=2e-3),
        torch.Generator().manual_seed(hparams().seed),
    )
    for _ in range(3):
        for index in torch.randperm(3, generator=generator).split(2):
            losses = []
            for text in (texts[k] for k in index.tolist()):
                logp = model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
                losses.append(
                    -torch.stack(
                        [logp[p, t] for p, t in zip(text.scored, text.targets, strict=True)]
                    ).mean()
                )
            optimiser.zero_grad()
            torch.stack(losses).mean().backward()
            optimiser.step()
    torch.testing.assert_close(edit.dense()[name], weight.detach() - start, rtol=1e-4, atol=1e-6)
    assert float(edit.dense()[name].norm()) > 1e-3


def test_independent_localised_edits_stop_by_themselves(llama64):
    editor = LocalisedFineTuning(
        llama64, hparams(), site=down_projections(llama64)[2], lr=2e-2, epochs=12, stop=4.5
    )
    texts = [edit_tokens(llama64, hparams(), e) for e in EXAMPLES[:3]]
    several = editor.updates(texts)[editor.site.name]
    for k, example in enumerate(EXAMPLES[:3]):
        (own,) = editor.edit(example).updates.values()
        torch.testing.assert_close(several.select([k]).dense(), own.dense(), rtol=1e-5, atol=1e-7)
    longer = LocalisedFineTuning(
        llama64, hparams(), site=editor.site.name, lr=2e-2, epochs=24, stop=4.5
    )
    torch.testing.assert_close(
        longer.updates(texts)[editor.site.name].u, several.u
    )  # all were done before


# ------------------------------------------------------------------------------------------- tuning, undoing


def test_every_kind_has_the_same_budget_and_keeps_the_best(llama, monkeypatch):
    on = EvaluationSet(llama, hparams(), EXAMPLES[:1], max_new_tokens=2)
    for kind in ("finetune_capped", "localised", "rome", "gauss_newton"):
        assert len(KINDS[kind](on, TEXT, None)) == BUDGET
    two = [FineTuning(llama, hparams(), lr=lr, steps=1) for lr in (1e-6, 0.5)]
    monkeypatch.setitem(KINDS, "two", lambda *_: [(editor, editor.settings) for editor in two])
    monkeypatch.setattr(
        "mendkit.baselines.tuning.best_of", lambda own, on: (own[1], best_of(own, on)[1])
    )
    tuned = tune("two", on, text=TEXT)
    assert [row["settings"] for row in tuned.rows] == ["lr 1e-06, steps 1", "lr 0.5, steps 1"]
    assert tuned.editor is two[1] and [row["chosen"] for row in tuned.rows] == [False, True]
    assert (
        tuned.to_dict("x.")["x.tuning.kept"] == "lr 0.5, steps 1"
        and tuned.to_dict()["tuning.tried"] == 2
    )
    assert tuned.rows[1]["score"] == evaluate(two[1], on).harmonic["score.headline"]
    with pytest.raises(MendkitError, match="set `archive`"):
        tune("identity", on, text=TEXT)
    assert (
        running_text(EXAMPLES[:2])
        == "The capital of France is Paris.\nThe capital of the United Kingdom is London."
    )


def test_a_set_serves_editors_of_other_sites(llama64):
    """Scores do not depend on which sites the set was prepared with, below or above the editor's."""
    name = down_projections(llama64)[2]
    editor = LocalisedFineTuning(llama64, hparams(), site=name, lr=5e-3, epochs=3)
    own = evaluate(
        editor, EvaluationSet(editor.base, hparams(), EXAMPLES[:2], max_new_tokens=3, text=TEXT)
    )
    for block in (1, 3):
        base = llama64.with_sites([down_projections(llama64)[block]])
        report = evaluate(
            editor, EvaluationSet(base, hparams(), EXAMPLES[:2], max_new_tokens=3, text=TEXT)
        )
        for name, value in own.summary.items():
            assert name == "edit.seconds" or report.summary[name].mean == pytest.approx(
                value.mean, abs=1e-9
            ), name


@pytest.mark.parametrize("kind", ["rome", "localised", "plain", "capped", "gauss_newton"])
def test_every_baseline_undoes_to_the_same_bits(llama, kind):
    before = logits(llama)
    site = down_projections(llama)[1]
    editors = {
        "rome": lambda: rome(llama),
        "localised": lambda: LocalisedFineTuning(llama, hparams(), site=site, epochs=2),
        "plain": lambda: FineTuning(llama, hparams(), lr=0.1),
        "capped": lambda: FineTuning(llama, hparams(), lr=0.1, cap=0.01),
        "gauss_newton": lambda: GaussNewton(llama, hparams(), TEXT, keep=EXAMPLES[2:], epochs=2),
    }
    edit = editors[kind]().edit(EXAMPLES[:2])
    assert torch.equal(logits(llama), before)
    with edit.applied():
        assert not torch.equal(logits(llama), before)
    assert torch.equal(logits(llama), before)


def test_rome_refuses_what_is_not_causal():
    base = other_base("bert")
    with pytest.raises(ModelError, match="ROME edits causal models"):
        ROME(base, hparams(), TEXT, site=base.sites[0].name)
