"""Training for what follows from an edit and what must not, and edits made with a passage."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mendkit.data.examples import EditExample, Implied
from mendkit.errors import DataError, HyperParamError, MendkitError, ModelError
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.mend.archive import Checkpoint
from mendkit.mend.batches import (
    Sampler,
    edit_tokens,
    inner_tokens,
    prepare_texts,
    training_texts,
)
from mendkit.mend.factors import edit_factors
from mendkit.mend.hypernetwork import MEND
from mendkit.mend.steps import batch_losses, total_loss
from mendkit.mend.training import train
from mendkit.mend.validation import validate
from mendkit.models.tokens import Tokens
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import (
    EXAMPLES,
    editor_for,
    hparams,
    losses_of,
    quick,
    scrambled,
    with_statistics,
)
from tests.oracles.families import other_base
from tests.oracles.methods import Methods
from tests.oracles.tiny import tiny_llama

FOLLOWED = tuple(
    replace(
        example,
        consequences=(
            Implied(f"The seat of government of {example.subject} is on", f"{example.target_new}s"),
            Implied("Far away it is", "Asia", domain="out_of_domain"),
            Implied("Near it is", "Europe", domain="in_domain"),
        ),
        negations=(f"The capital of {example.subject} is not",),
        passages=(f"We read that the capital of {example.subject} is {example.target_new}, too.",),
    )
    for example in EXAMPLES
)
ALL = {"cconsequence": 0.7, "cnegation": 0.4, "edit_on": "text"}


def test_losses_and_gradients_are_those_of_a_plain_loop(llama64):
    """PropMEND in float64: ΔW from all tokens of the passage, losses under W + ΔW one by one."""
    base = llama64
    h = hparams(method="propmend", cedit=0.3, cnegation=0.4, edit_lr=1e-2)
    mend = with_statistics(base, scrambled(MEND(base.sites, h).double()))
    texts = prepare_texts(base, h, FOLLOWED[:2])
    rows, trunk = Sampler(texts, h).texts([0, 1]), FrozenTrunk(base)
    roles = ["edit", "neighbours", "unrelated", "consequences", "negations"]
    assert [role for role, _ in rows[0]] == ["passages", *roles]
    factors = edit_factors(trunk, h, [row[0][1] for row in rows])
    loss = total_loss(batch_losses(trunk, mend, factors, rows), h)

    expected = torch.zeros(())
    for row, example in zip(rows, FOLLOWED, strict=False):
        # 1. The weight change, from the tokens that the tokenizer gives for the passage.
        made = mend(edit_factors(trunk, h, [row[0][1]]), 1)
        oracle = Methods(base, h, mend.state_dict())
        for other in EXAMPLES:
            oracle.observe(oracle.factors(edit_tokens(base, h, other)))
        ids = tuple(base.tokenizer(example.passages[0])["input_ids"])
        wanted = oracle.turn([Tokens(ids, tuple(range(len(ids) - 1)), ids[1:])])
        weights = {}
        for name, update in made.items():
            torch.testing.assert_close(update.dense(), wanted[name], rtol=1e-6, atol=1e-9)
            weights[name] = base.model.get_parameter(name) + update.dense()
        # 2. The losses under it.
        expected = expected + losses_of(base, [row], weights, h) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0.0)
    parameters = list(mend.parameters())
    found = torch.autograd.grad(loss, parameters)
    for a, b in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-7


def test_without_weights_training_is_the_same_to_the_bit(llama, tmp_path):
    archives = []
    for k, examples in enumerate((EXAMPLES, FOLLOWED)):
        result = train(quick(), examples, examples[:2], base=llama, run_dir=tmp_path / str(k))
        archives.append(result.archive.read_bytes())
    assert archives[0] == archives[1]


@pytest.mark.parametrize("key", ALL)
def test_what_is_read_is_part_of_what_a_run_is_of(key, tmp_path):
    told = {"cconsequence": "consequences", "cnegation": "negations", "edit_on": "passages"}[key]

    def of(examples, **asked):
        run_of = Checkpoint(tmp_path, hparams(**asked), examples, EXAMPLES).run_of
        return run_of["examples_sha256"]

    asked = {key: ALL[key]}
    others = [replace(example, **{told: ()}) for example in FOLLOWED]
    assert of(FOLLOWED) == of(EXAMPLES)
    assert of(FOLLOWED, **asked) != of(others, **asked)
    assert of(FOLLOWED, **asked) == of([replace(e, truths=()) for e in FOLLOWED], **asked)


def test_a_step_draws_one_of_each_and_none_out_of_domain(llama):
    h = hparams(**ALL)
    texts = training_texts(llama, h, FOLLOWED)
    drawn = [row for _ in range(12) for row in Sampler(texts, h).texts(range(len(texts)))]
    roles = ["passages", "edit", "paraphrases", "neighbours", "unrelated"]
    assert all([r for r, _ in row] == [*roles, "consequences", "negations"] for row in drawn)
    asia = llama.tokenize("Far away it is", "Asia", add_eos=True)
    read = {text for each in texts for text in each.all()}
    assert asia not in read
    assert llama.tokenize("Near it is", "Europe", add_eos=True) in read
    assert {len(each.first(1).consequences) for each in texts} == {1}
    negated = llama.tokenize(FOLLOWED[0].negations[0], FOLLOWED[0].target_new)
    assert texts[0].negations == (negated,)


def test_validation_counts_consequences_and_negated_forms(llama):
    """Unedited: nothing has changed, and one model's words stand for an answer that it says."""
    h = hparams(**ALL)
    texts = prepare_texts(llama, h, FOLLOWED)
    mend, trunk = scrambled(MEND(llama.sites, h)), FrozenTrunk(llama)
    start = llama.prompt_of(texts[0].negations[0])
    (said,) = llama.write([start], max_new_tokens=2)
    leaked = llama.continued(start, said)
    texts[0] = replace(texts[0], negations=(leaked,), consequences=(leaked,))
    values = validate(trunk, mend, texts, h, strength=0.0)
    assert values["negation"] == pytest.approx(1 - 1 / len(texts))
    assert values["consequence"] == pytest.approx(1 / (2 * len(texts) - 1))
    assert values["loss.negations"] == pytest.approx(0.0, abs=1e-6)
    plain = validate(trunk, mend, prepare_texts(llama, hparams(), FOLLOWED), h, strength=0.0)
    assert {"negation", "consequence"}.isdisjoint(plain)


def test_a_passage_or_sentence_edits_and_evaluation_edits_with_it(llama):
    editor = editor_for(llama, edit_on="text")
    example = FOLLOWED[0]
    change = editor.edit(example).relative_norm()
    assert change == editor.edit(example.passages[0]).relative_norm()
    assert change != editor.edit(EXAMPLES[0]).relative_norm()  # of prompt and answer
    fact = f"{example.prompt} {example.target_new}"
    assert editor.edit(EXAMPLES[0]).relative_norm() == editor.edit(fact).relative_norm()
    on = EvaluationSet(llama, hparams(), FOLLOWED, max_new_tokens=1)
    rows = {row.index: row.values for row in evaluate(editor, on).rows}
    assert rows[0]["norm.relative_max"] == pytest.approx(max(change.values()), rel=1e-4)


def test_a_trained_editor_takes_a_sentence(llama, tmp_path):
    h = quick(method="propmend", edit_lr=1e-2)
    result = train(h, FOLLOWED, FOLLOWED[:2], base=llama, run_dir=tmp_path)
    assert {"val.consequence", "val.edit_success"} <= set(result.best)
    assert "val.negation" not in result.best
    assert {row["consequences"] > 0 for row in result.history if "grad_norm" in row} == {True}


def test_passages_of_statistics_are_read_before_the_trunk_is_released(tmp_path):
    h = hparams(max_iters=2, val_interval=2, batch_size=2, stats_held_out=True, **ALL)
    archives = []
    for release in (False, True):
        base, changed = tiny_llama(), h.replace(release_trunk=release)
        made = train(changed, FOLLOWED, FOLLOWED[:2], base=base, run_dir=tmp_path / str(release))
        assert base.released == release
        archives.append(load_file(made.archive))
    assert all(torch.equal(archives[1][name], value) for name, value in archives[0].items())


def test_edits_that_make_no_sense_are_refused(llama):
    with pytest.raises(MendkitError, match="no new answer for 'Lima is far'"):
        editor_for(llama).edit("Lima is far")
    with pytest.raises(DataError, match="'a' has one token; give a sentence"):
        inner_tokens(llama, hparams(edit_on="text"), EditExample("a", "b", passages=("a",)))
    with pytest.raises(ModelError, match="edit_on: text needs a causal model"):
        inner_tokens(other_base("bart"), hparams(edit_on="text"), EXAMPLES[0])
    with pytest.raises(HyperParamError, match="edit_on: 'text' needs another `train_on`"):
        hparams(edit_on="text", train_on="sequence")
