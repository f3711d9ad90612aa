"""ROME against its closed form in float64, its covariance against a naive loop."""

from dataclasses import replace

import pytest
import torch

from mendkit.baselines.base import down_projections, key_moments
from mendkit.baselines.rome import ROME
from mendkit.errors import DataError, ModelError
from mendkit.mend.batches import edit_tokens
from mendkit.models.tokens import tokenize
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.families import other_base
from tests.oracles.kinds import KINDS as TOKENIZERS
from tests.oracles.kinds import tokenizer_of


@pytest.fixture
def rome(text):
    def made(base, **settings) -> ROME:
        editor = ROME(base, hparams(), text, site=down_projections(base)[1])
        editor.steps = 8
        for name, value in settings.items():
            setattr(editor, name, value)
        return editor

    return made


def keys_and_values(editor: ROME, example) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of the edited layer at the subject's end, after each context."""
    base, seen = editor.base, []
    layer = base.site_module(editor.site)
    handle = layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    text = edit_tokens(base, hparams(), example)
    end = example.prompt.index(example.subject) + len(example.subject)
    begun = tuple(base.tokenizer(example.prompt[:end])["input_ids"])
    assert begun == text.ids[: len(begun)]
    with torch.no_grad():
        for context in editor.contexts:
            base.model(input_ids=torch.tensor([[*context, *begun]]))
    handle.remove()
    return tuple(torch.stack([pair[k][0, -1] for pair in seen]) for k in range(2))


def test_the_update_is_the_least_squares_solution_with_its_constraint(base64, rome, text):
    editor = rome(base64)
    edit = editor.edit(EXAMPLES[1])
    (update,) = edit.updates.values()
    change, (keys, values) = update.dense(), keys_and_values(editor, EXAMPLES[1])
    k, v = keys.mean(0), values.mean(0)
    c = key_moments(editor.base, text)[editor.site.name].double()
    c = c + editor.ridge * c.diagonal().mean() * torch.eye(len(c))
    z, solved = change @ k, torch.linalg.solve(c, k)
    assert update.u.shape[1] == 1 and float(z.norm()) > 0.1 * float(v.norm())
    torch.testing.assert_close(change, torch.outer(z, solved) / (k @ solved))
    with edit.applied():  # (W + ΔW) k* = v*
        after = keys_and_values(editor, EXAMPLES[1])[1].mean(0)
    torch.testing.assert_close(after, v + z)
    # Every other ΔW with ΔW k* = z moves the text's keys more: tr(ΔW C ΔWᵀ) is least.
    other = torch.randn(change.shape, dtype=c.dtype, generator=torch.Generator().manual_seed(0))
    other = 0.1 * (other - torch.outer(other @ k, k) / (k @ k))
    cost, more, less = (
        float(torch.trace(m @ c @ m.T)) for m in (change, change + other, change - other)
    )
    assert cost < min(more, less)


def test_key_moments_are_those_of_a_loop_over_tokens(base64, text):
    names = down_projections(base64)[1:3]
    found, ids = key_moments(base64.with_sites(names), text), base64.tokenizer(text)["input_ids"]
    for site in base64.with_sites(names).sites:
        seen: list[torch.Tensor] = []
        handle = base64.site_module(site).register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0][0])
        )
        for at in range(0, len(ids), 256):
            with torch.no_grad():
                base64.model(input_ids=torch.tensor([ids[at : at + 256]]))
        handle.remove()
        expected = sum(torch.outer(k, k) for part in seen for k in part) / len(ids)
        torch.testing.assert_close(found[site.name].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [name for name in TOKENIZERS if "WordPiece, lower" not in name])
def test_the_subject_is_found_by_its_tokens(kind):
    tokenizer = tokenizer_of(kind)
    for prompt, subject in (
        ("The capital of the United Kingdom is", "the United Kingdom"),
        ("Chad? Chad is in", "Chad"),
    ):
        text = tokenize(tokenizer, prompt, "Rome", subject=subject)
        named = tokenizer.decode([text.ids[place] for place in text.subject])
        assert named.strip() == subject
        assert subject not in tokenizer.decode(text.ids[max(text.subject) + 1 :])
    assert tokenize(tokenizer, "Rome is in", "Peru", subject="Chad").subject == ()


def test_mistakes_are_told(llama, rome):
    for example in (replace(EXAMPLES[0], subject=None), replace(EXAMPLES[0], subject="Atlantis")):
        with pytest.raises(DataError, match="does not contain its example's `subject`"):
            rome(llama).edit(example)
    with pytest.raises(DataError, match="has no token"):
        ROME(llama, hparams(), "", site=down_projections(llama)[0])
    with pytest.raises(ModelError, match="ROME edits causal models"):
        ROME(other_base("bert"), hparams(), "a text", site="any")
