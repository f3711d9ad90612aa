"""Many edits in one weight change: least squares against plain algebra in float64."""

import pytest
import torch
from torch import Tensor

from mendkit.evaluation.evaluate import one_after_another, together
from mendkit.mend.archive import load_archive
from mendkit.mend.batches import Sampler, prepare_texts
from mendkit.mend.distributed import Team
from mendkit.mend.factors import FactorCache, capture_factors, capture_inputs
from mendkit.mend.least_squares import OtherKeys, remember, solve
from mendkit.mend.losses import edit_nll
from mendkit.mend.steps import Learner, batch_losses
from mendkit.mend.training import train
from mendkit.mend.updates import padded, side_branches
from mendkit.mend.validation import validate
from mendkit.models.tokens import collate
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, editor_for, hparams


def problem(t: int, i: int, b: int = 2, seed: int = 0) -> tuple[OtherKeys, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    other = OtherKeys(i).double()
    other.add(draw(40, i) * torch.linspace(0.2, 2, i))
    other.fit()
    return other, draw(b, t, i), draw(b, t, i), draw(b, t, 3)


def parts(other: OtherKeys, keys: Tensor, shared: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """z and λ of one update, a token at a time, from the definition."""
    c = other.moment
    inverse = torch.linalg.inv(c)
    likeness = [(k @ s) / (s @ c @ s) * (c @ s) for k, s in zip(keys, shared, strict=True)]
    size = [k @ inverse @ k for k in keys]
    mean = sum(size) / len(size)
    ridges = [ridge[0] * mean] * len(keys) + [ridge[1] * (y @ inverse @ y) for y in likeness]
    return torch.stack([*keys, *likeness]), torch.stack(ridges)


@pytest.mark.parametrize("t", [2, 9])  # solved in the tokens, in the width
def test_the_weight_change_is_the_minimum(t):
    other, keys, shared, shifts = problem(t, 8)
    ridge = torch.tensor([0.05, 0.4], dtype=torch.float64)
    u, *_ = solve(keys, shared, other, ridge)
    for b in range(len(keys)):
        z, ridges = parts(other, keys[b], shared[b], ridge)
        change = (shifts[b].repeat(2, 1).T @ u[b]).requires_grad_()
        wanted = torch.cat([shifts[b], shifts[b]])
        cost = (((z @ change.T - wanted) ** 2).sum(1) / ridges).sum() + (
            change @ other.moment * change
        ).sum()
        (slope,) = torch.autograd.grad(cost, change)
        assert float(slope.norm()) < 1e-9 * float(cost.detach())


def test_padding_changes_nothing():
    other, keys, shared, _ = problem(3, 8)
    ridge = torch.tensor([0.05, 0.4], dtype=torch.float64)
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 2)) for x in (keys, shared)]
    u, *_ = solve(*longer, other, ridge)
    torch.testing.assert_close(u[:, [0, 1, 2, 5, 6, 7]], solve(keys, shared, other, ridge)[0])
    assert not u[:, [3, 4, 8, 9]].any()


def test_one_after_another_with_memory_is_all_at_once():
    """Recursive least squares: the increments add up to the joint solution."""
    other, keys, shared, shifts = problem(3, 8, b=1)
    later_keys, later_shared, later_shifts = problem(2, 8, b=1, seed=1)[1:]
    ridge = torch.tensor([0.05, 0.4], dtype=torch.float64)
    u, z, ridges = solve(keys, shared, other, ridge)
    first = shifts[0].repeat(2, 1).T @ u[0]
    memory = remember(other.inverse(), z[0], ridges[0])
    v, later, later_ridges = solve(later_keys, later_shared, other, ridge, memory=memory)
    every, weights = torch.cat([z[0], later[0]]), torch.cat([ridges[0], later_ridges[0]])
    precision = other.moment + (every.T / weights) @ every
    wanted = torch.cat([shifts[0], shifts[0], later_shifts[0], later_shifts[0]])
    joint = (wanted.T / weights) @ every @ torch.linalg.inv(precision)
    missing = wanted[6:] - later[0] @ first.T
    torch.testing.assert_close(first + missing.T @ v[0], joint)


# ---------------------------------------- in the editor


def least_squares_editor(base, **ridges):
    return editor_for(base, edit_tokens="scored").by_least_squares(EXAMPLES, **ridges)


def test_keys_to_keep_are_those_of_the_examples_texts(llama64):
    editor, h = least_squares_editor(llama64), hparams()
    texts = [text for e in prepare_texts(llama64, h, EXAMPLES) for text in e.first(1).all()]
    trunk = FrozenTrunk(llama64)
    for site in llama64.sites:
        rows = torch.cat([capture_inputs(trunk, [text])[site.name] for text in texts]).double()
        moment = sum(torch.outer(row, row) for row in rows) / len(rows)
        moment += 0.02 * moment.diagonal().mean() * torch.eye(len(moment))
        found = next(o for n, o in editor.mend.others.items() if n == site.name.replace(".", "-"))
        torch.testing.assert_close(found.moment, moment.to(found.moment), rtol=1e-5, atol=1e-7)


def test_a_tight_ridge_gives_every_key_the_shift_that_its_own_edit_asks_for(llama64):
    """The claim of the method. Negative control: the sum adds the other edits' shifts."""
    summing = editor_for(llama64, edit_tokens="scored")
    editor = summing.by_least_squares(EXAMPLES, ridge=1e-7, ridge_shared=1e9)
    texts = [editor.tokens(example) for example in EXAMPLES[:2]]
    factors = capture_factors(FrozenTrunk(llama64), texts, tokens="scored")
    alone = summing.updates(texts[:1])
    summed = summing.updates(texts, at_once=True)
    solved = editor.updates(texts, at_once=True)
    for name, at_site in factors.items():
        key = at_site.u[at_site.rows == 0]
        wanted = key @ alone[name].dense().T
        error = (key @ solved[name].dense().T - wanted).norm() / wanted.norm()
        spoilt = (key @ summed[name].dense().T - wanted).norm() / wanted.norm()
        assert float(error) < 1e-3 < 1e-2 < float(spoilt)


def test_the_ridge_on_what_wordings_share_grows_with_the_number_of_edits(llama64):
    summing = editor_for(llama64, edit_tokens="scored")
    editor = summing.by_least_squares(EXAMPLES, ridge=0.05, ridge_shared=0.2)
    texts = [editor.tokens(example) for example in EXAMPLES[:2]]
    factors = capture_factors(FrozenTrunk(llama64), texts, tokens="scored")
    found, alone = editor.updates(texts, at_once=True), summing.updates(texts)
    ridges = editor.mend.log_ridge.detach().exp().double()  # of float32 numbers
    for (name, update), ridge in zip(found.items(), ridges, strict=True):
        assert ridge.tolist() == pytest.approx([0.05, 0.2])
        keys = padded(factors[name].u, factors[name].rows, 2).flatten(0, 1)[None]
        other = editor.mend.others[name.replace(".", "-")]
        shared = alone[name].u.flatten(0, 1)[None]
        u, *_ = solve(keys, shared, other, ridge * ridge.new_tensor([1, 2]))
        torch.testing.assert_close(update.u, sum(u.chunk(2, 1)), rtol=1e-6, atol=1e-9)


def test_edits_in_a_row_come_to_what_they_come_to_at_once(llama64):
    """The control: without memory each is made on the edited model, and the sum is another."""
    strength = 0.5
    editor = least_squares_editor(llama64, ridge=1e-6, ridge_shared=1e9)
    editor.mend.hparams = editor.mend.hparams.replace(lr_scale=strength)
    texts, trunk = [editor.tokens(example) for example in EXAMPLES[:3]], FrozenTrunk(llama64)
    expected = editor.updates(texts, trunk=trunk, at_once=True)
    for making, same in ((editor.remembering(), True), (editor, False)):
        total = together(*one_after_another(making, texts, trunk=trunk, strength=strength))
        for name, update in expected.items():
            wanted = strength * update.dense()
            error = float((total[name].dense() - wanted).norm() / wanted.norm())
            assert error < 1e-4 if same else error > 1e-2
    assert not llama64.site_module(llama64.sites[0])._forward_hooks


# ---------------------------------------- training


def loss_of(base, trunk, text):
    """Nats a token of one text's target, under the edits in force."""
    batch = collate([text], base.pad_id, base.device)
    return edit_nll(trunk.suffix([text], batch), batch.targets, batch.rows, 1)[0]


@pytest.mark.parametrize("aggregate", ["sum", "least_squares"])
def test_losses_of_a_batch_are_read_under_the_edits_made_at_once(llama64, aggregate):
    editor = editor_for(llama64, edit_tokens="scored")
    editor = editor if aggregate == "sum" else editor.by_least_squares(EXAMPLES)
    trunk, texts = FrozenTrunk(llama64), [editor.tokens(example) for example in EXAMPLES[:4]]
    factors = capture_factors(trunk, texts, tokens="scored")
    found = batch_losses(
        trunk, editor.mend, factors, [[("edit", text)] for text in texts], at_once=2
    )
    losses = []
    for pair in (texts[:2], texts[2:]):
        with side_branches(llama64, editor.updates(pair, at_once=True)), torch.no_grad():
            losses += [loss_of(llama64, trunk, text) for text in pair]
    torch.testing.assert_close(
        found["edit"].detach(), torch.stack(losses).mean(), rtol=1e-9, atol=1e-11
    )


def test_numbers_of_edits_are_drawn_up_to_the_most(llama):
    h = hparams(train_on="batch", most_edits=4, batch_size=4)
    sampler = Sampler(prepare_texts(llama, h, EXAMPLES), h)
    drawn = [sampler.draw() for _ in range(60)]
    assert {batch.at_once for batch in drawn} == {1, 2, 3, 4}
    assert all(len(b.rows) % b.at_once == 0 and len(b.rows) <= 4 for b in drawn)
    assert not any(batch.earlier for batch in drawn)
    sequences = Sampler(prepare_texts(llama, h, EXAMPLES), h.replace(train_on="sequence"))
    assert {len(sequences.draw().earlier) for _ in range(60)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("aggregate", "train_on"), [("sum", "sequence"), ("least_squares", "batch")]
)
def test_training_on_many_edits_lowers_their_loss(llama, tmp_path, aggregate, train_on):
    kind = dict(train_on=train_on, aggregate=aggregate, most_edits=3, edit_tokens="scored")
    rates = dict(lr=1e-2, edit_lr=1e-2, lr_lr=0.1, warmup_iters=0, cloc=0.01)
    h = hparams(batch_size=3, max_iters=12, val_interval=12, **kind, **rates)
    result = train(h, EXAMPLES, EXAMPLES[:3], base=llama, run_dir=tmp_path)
    start, end = (row["val.loss.edit"] for row in result.history if "val.loss.edit" in row)
    assert end < start
    assert load_archive(result.archive, base=llama).mend.hparams.aggregate == aggregate


def test_a_sequence_is_trained_on_the_edited_model(llama64):
    """Losses after earlier edits: their branch is in place, and factors are the edited model's."""
    editor = editor_for(llama64, edit_tokens="scored", train_on="sequence")
    trunk = FrozenTrunk(llama64)
    factors = FactorCache(trunk, editor.hparams)
    sampler = Sampler([], editor.hparams)
    learner = Learner(editor.mend, factors, sampler, h=editor.hparams, team=Team())
    first, second = (editor.tokens(example) for example in EXAMPLES[:2])
    found = learner.losses([[("edit", second)]], 1, [first])
    losses = []
    with torch.no_grad(), side_branches(llama64, editor.updates([first], at_once=True)):
        made = editor.updates([second], at_once=True)
        with side_branches(llama64, made):
            losses += [loss_of(llama64, trunk, text) for text in (second, first)]
    torch.testing.assert_close(
        found["edit"].detach(), torch.stack(losses).mean(), rtol=1e-9, atol=1e-11
    )


def test_going_on_from_an_archive_of_sums_adds_least_squares(llama, tmp_path):
    h = hparams(max_iters=1, val_interval=1, batch_size=2, edit_tokens="scored")
    single = train(h, EXAMPLES, EXAMPLES[:2], base=llama, run_dir=tmp_path / "single")
    h = h.replace(
        archive=str(single.archive), aggregate="least_squares", train_on="batch", lr=0.0, lr_lr=0.0
    )
    many = train(h, EXAMPLES, EXAMPLES[:2], base=llama, run_dir=tmp_path / "many")
    before, after = (
        load_archive(result.archive, base=llama).mend.state_dict() for result in (single, many)
    )
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert set(after) > set(before)


def test_validation_of_batches_reads_texts_under_all_of_a_batch(llama):
    editor = editor_for(llama, edit_tokens="scored")
    trunk, h = FrozenTrunk(llama), editor.hparams
    texts = prepare_texts(llama, h, EXAMPLES[:4])
    found = validate(trunk, editor.mend, texts, h, at_once=4)
    with editor.edit(list(EXAMPLES[:4])).applied():
        plain = validate(trunk, editor.mend, texts, h, strength=0.0)
    assert found["loss.edit"] == pytest.approx(plain["loss.edit"], rel=1e-4)
    assert found["loss.edit"] != pytest.approx(
        validate(trunk, editor.mend, texts, h)["loss.edit"], rel=1e-3
    )
