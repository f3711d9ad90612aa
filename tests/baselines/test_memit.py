"""MEMIT and AlphaEdit against their papers' equations with dense weights, layer by layer."""

import copy

import pytest
import torch

from mendkit.baselines.base import down_projections, key_moments
from mendkit.baselines.memit import MEMIT, AlphaEdit
from mendkit.errors import DataError
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.evaluation.sequences import in_sequence, one_after_another
from mendkit.mend.batches import edit_tokens
from mendkit.mend.updates import side_branches, unedited
from mendkit.models.sites import find_blocks, hidden_states
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, hparams

MADE = {
    "memit": lambda base, text, sites: MEMIT(base, hparams(), text, sites=sites, weight=30.0),
    "alphaedit": lambda base, text, sites: AlphaEdit(
        base, hparams(), text, sites=sites, threshold=middle(base, text, sites), l2=0.3
    ),
}


def middle(base, text, sites) -> float:
    """An eigenvalue bound that leaves about half of the keys' directions."""
    moments = key_moments(base.with_sites(sites), text, ridge=1e-2)
    return float(torch.linalg.eigvalsh(moments[sites[0]]).median()) * 1.01


@pytest.fixture
def editor(text):
    def made(kind, base):
        editor = MADE[kind](base, text, down_projections(base)[1:3])
        editor.rome.steps = 4
        return editor

    return made


def keys_and_states(editor, examples, k):
    """Of site k the mean input over contexts, and the last block's output without a context."""
    base, seen, out = editor.base, [], []
    block = find_blocks(base.model)[1][base.sites[-1].block]
    hooks = [
        base.site_module(base.sites[k]).register_forward_hook(
            lambda _, args, __: seen.append(args[0].reshape(-1, args[0].shape[-1])[-1])
        ),
        block.register_forward_hook(lambda _, __, y: out.append(hidden_states(y)[0, -1])),
    ]
    keys, states = [], []
    for example in examples:
        seen.clear(), out.clear()
        end = example.prompt.index(example.subject) + len(example.subject)
        begun = base.tokenizer(example.prompt[:end])["input_ids"]
        for context in editor.rome.contexts:
            base.model(input_ids=torch.tensor([[*context, *begun]]))
        keys.append(torch.stack(seen).mean(0))
        states.append(out[0])
    for hook in hooks:
        hook.remove()
    return torch.stack(keys).T, torch.stack(states).T  # a column each, as in the papers


@torch.no_grad()
def by_the_paper(editor, text, examples, earlier=None) -> dict[str, torch.Tensor]:
    """ΔW of every site; `earlier` has K_p of AlphaEdit, and gets the new keys."""
    base = copy.copy(editor.base)
    with unedited(base):
        c = key_moments(base, text)
    tokens = [edit_tokens(base, hparams(), e) for e in examples]
    z = torch.stack([editor.rome.key_and_change(t)[1] for t in tokens]).T
    goal, made, before = None, {}, {}
    for k, site in enumerate(base.sites):
        keys, h = keys_and_states(editor, examples, k)
        goal = h + z if goal is None else goal
        rest = (goal - h) / (len(base.sites) - k)
        moment = c[site.name].double()
        eye = torch.eye(len(moment), dtype=torch.float64)
        moment = moment + editor.rome.ridge * moment.diagonal().mean() * eye
        if isinstance(editor, AlphaEdit):
            values, vectors = torch.linalg.eigh(moment)
            null = vectors[:, values < editor.settings["threshold"]]
            assert 0 < null.shape[1] < len(eye)
            p, kp = null @ null.T, (earlier or {}).get(site.name, keys[:, :0])
            system = kp @ kp.T @ p + keys @ keys.T @ p + editor.settings["l2"] * eye
            change = rest @ keys.T @ p @ torch.linalg.inv(system)
            if earlier is not None:
                earlier[site.name] = torch.cat([kp, keys], 1)
        else:
            system = editor.settings["weight"] * moment + keys @ keys.T
            change = rest @ keys.T @ torch.linalg.inv(system)
        made[site.name] = change
        weight = base.site_module(site).weight
        before[site.name] = weight, weight.clone()
        weight.add_(change.T if site.transposed else change)
    for weight, old in before.values():
        weight.copy_(old)
    return made


@pytest.mark.parametrize("kind", MADE)
def test_edits_at_once_are_the_papers_equations(kind, base64, editor, text):
    made = editor(kind, base64)
    examples = EXAMPLES[:3]
    edit, expected = made.edit(examples), by_the_paper(made, text, examples)
    assert set(edit.updates) == set(expected) and len(expected) == 2
    for name, update in edit.updates.items():
        assert len(update) == 1 and update.u.shape[1] == 3
        torch.testing.assert_close(update.dense(), expected[name], rtol=1e-6, atol=1e-9)
        assert float(expected[name].norm()) > 1e-4
    # Independent edits are each the solution for itself.
    texts = [edit_tokens(made.base, hparams(), e) for e in examples]
    alone, first = made.updates(texts), by_the_paper(made, text, examples[:1])
    for name, update in alone.items():
        assert len(update) == 3
        torch.testing.assert_close(update.select([0]).dense(), first[name], rtol=1e-6, atol=1e-9)


def test_alphaedit_spares_the_texts_keys_and_those_of_earlier_edits(llama64, editor, text):
    made, earlier = in_sequence(editor("alphaedit", llama64)), {}
    texts = [edit_tokens(made.base, hparams(), e) for e in EXAMPLES[:2]]
    steps = one_after_another(made, texts, trunk=FrozenTrunk(made.base))
    first = by_the_paper(made, text, EXAMPLES[:1], earlier)
    with side_branches(made.base, steps[0]):
        # The oracle reads the model as edited, and adds its own changes to the weights.
        second = by_the_paper(made, text, EXAMPLES[1:2], earlier)
        forgetful = by_the_paper(made, text, EXAMPLES[1:2])
    for name, null in made.null.items():
        torch.testing.assert_close(steps[0][name].dense(), first[name], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(steps[1][name].dense(), second[name], rtol=1e-6, atol=1e-9)
        assert not torch.allclose(second[name], forgetful[name], rtol=1e-3)
        rest = torch.eye(len(null), dtype=null.dtype) - null
        assert float((second[name] @ rest).norm()) < 1e-9 * float(second[name].norm())


def test_the_protocol_takes_them_and_an_edit_without_its_subject_is_told(llama, editor):
    prepared = EvaluationSet(llama, hparams(), EXAMPLES[:3], max_new_tokens=4, brief=True)
    report = evaluate(editor("alphaedit", llama), prepared, mode="locft", k=2)
    assert report.mode == "locft_3_by_2" and report.editor == "AlphaEdit"
    with pytest.raises(DataError, match="needs the subject"):
        editor("memit", llama).edit(EXAMPLES[0].__class__(prompt="Gold is", target_new="blue"))
