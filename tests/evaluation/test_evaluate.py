"""Scores against oracles: models whose answers are known, and decoding done the long way."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from mendkit.data.examples import EditExample
from mendkit.errors import DataError, HyperParamError, ModelError
from mendkit.evaluation.decoding import write
from mendkit.evaluation.evaluate import EvaluationSet, evaluate
from mendkit.evaluation.metrics import Card, locality_values, probability_values, target_values
from mendkit.evaluation.results import normalise
from mendkit.mend.scoring import Forced, forced, next_tokens
from mendkit.mend.updates import select, side_branches
from mendkit.models.tokens import Tokens
from tests.oracles.claims import EXAMPLES, editor_for, hparams, logits


@pytest.fixture(scope="module")
def prepared(llama):
    return EvaluationSet(llama, hparams(), EXAMPLES, max_new_tokens=8)


def test_no_edit_changes_nothing(llama, prepared):
    report = evaluate(editor_for(llama), prepared, strength=0.0)
    for name in ("neighbourhood", "locality"):
        assert report.summary[f"{name}.argmax_agreement"].mean == 1.0
        assert report.summary[f"{name}.greedy_agreement"].mean == 1.0
        assert report.summary[f"{name}.kl_nats"].mean == pytest.approx(0.0, abs=1e-6)
    for row in report.rows:
        for name in ("tf_token", "tf_exact", "free_exact", "es"):
            assert row.values[f"edit_success.{name}"] == row.values[f"before.edit_success.{name}"]
        assert all(output["before"] == output["after"] for output in row.outputs)


def test_forced_values_are_the_plain_models_under_the_edit(llama):
    editor = editor_for(llama)
    tokens = [editor.tokens(e) for e in EXAMPLES[:3]]
    updates = editor.updates(tokens)
    prepared = EvaluationSet(llama, hparams(), EXAMPLES[:3], max_new_tokens=4)
    read = forced(prepared.trunk, [[t] for t in tokens], updates, compare=True)
    for example, text, (value,) in zip(EXAMPLES, tokens, read, strict=False):
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            before = llama.model(input_ids=ids).logits[0, list(text.scored)].log_softmax(-1)
            with editor.edit(example).applied():
                after = llama.model(input_ids=ids).logits[0, list(text.scored)].log_softmax(-1)
        assert value.argmax == tuple(after.argmax(-1).tolist())
        expected = after.gather(1, torch.tensor(text.targets)[:, None])[:, 0].tolist()
        assert value.logp == pytest.approx(expected, abs=1e-4)
        assert value.kl == pytest.approx(
            (before.exp() * (before - after)).sum(-1).tolist(), abs=1e-4
        )
        assert value.same == tuple((before.argmax(-1) == after.argmax(-1)).tolist())


@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0, 10.0])
def test_reading_the_answer_settles_decoding_as_decoding_itself_does(
    llama, prepared, strength, monkeypatch
):
    """The short cut of `_answers` against generation for every prompt, one edit at a time."""
    editor = editor_for(llama)
    report = evaluate(editor, prepared, strength=strength)
    for row in report.rows:
        with editor.edit(EXAMPLES[row.index]).scale(strength).applied():
            for output in row.outputs:
                written = llama.generate(output["prompt"], max_new_tokens=8)
                assert normalise(written) == normalise(output["after"])
        assert row.values["edit_success.free_exact"] == float(
            normalise(row.outputs[0]["after"]) == normalise(row.target_new)
        )


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_greedy_agreement_is_the_same_text_written(llama, prepared, strength):
    editor = editor_for(llama)
    report = evaluate(editor, prepared, strength=strength)
    for row in report.rows:
        example = EXAMPLES[row.index]
        for name, probe in (
            ("neighbourhood", example.neighbours[0]),
            ("locality", example.unrelated[0]),
        ):
            ids, mask = llama.left_pad([llama.tokenizer(probe.prompt)["input_ids"]])
            before = llama.generate_ids(ids, mask, max_new_tokens=8, stop=True)
            with editor.edit(example).scale(strength).applied():
                after = llama.generate_ids(ids, mask, max_new_tokens=8, stop=True)
            assert row.values[f"{name}.greedy_agreement"] == float(before == after)


def test_reworded_neighbours_are_other_subjects_in_a_paraphrases_words(llama, prepared):
    wanted = [
        ("Norway", "Oslo"),
        ("Chile", "Santiago"),
    ]  # the next two examples of the relation after Japan
    read = [llama.tokenizer.decode(text.ids) for text in prepared.cards[2].reworded]
    assert read == [f"{subject} has its seat of government in {truth}" for subject, truth in wanted]
    editor = editor_for(llama)
    row = evaluate(editor, prepared).rows[2].values
    same, kl = [], []
    for text in prepared.cards[2].reworded:
        ids, at = torch.tensor([text.ids]), list(text.scored)
        with torch.no_grad():
            before = llama.model(input_ids=ids).logits[0, at].log_softmax(-1)
            with editor.edit(EXAMPLES[2]).applied():
                after = llama.model(input_ids=ids).logits[0, at].log_softmax(-1)
        same.append(float((before.argmax(-1) == after.argmax(-1)).double().mean()))
        kl.append(float((before.exp() * (before - after)).sum(-1).mean()))
    assert row["neighbourhood.reworded_agreement"] == pytest.approx(sum(same) / 2)
    assert row["neighbourhood.reworded_kl_nats"] == pytest.approx(sum(kl) / 2, rel=1e-3)
    bare = EvaluationSet(
        llama, hparams(), [replace(e, relation=None) for e in EXAMPLES[:2]], max_new_tokens=4
    )
    assert not any(card.reworded for card in bare.cards)
    two = EvaluationSet(
        llama, hparams(), EXAMPLES[:2], max_new_tokens=4
    )  # nobody is a neighbour of their own
    assert [len(card.reworded) for card in two.cards] == [1, 1]


def test_efficacy_scores_compare_length_normalised_likelihoods(llama, prepared):
    values = prepared.before[2]  # Japan: New York City (several tokens) against Tokyo
    scores = {}
    for answer in ("New York City", "Tokyo"):
        ids = llama.tokenizer(f"The capital of Japan is {answer}")["input_ids"]
        start = len(llama.tokenizer("The capital of Japan is")["input_ids"])
        with torch.no_grad():
            logp = llama.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        scores[answer] = sum(float(logp[p - 1, ids[p]]) for p in range(start, len(ids))) / (
            len(ids) - start
        )
    assert values["log_p.new"] == pytest.approx(scores["New York City"], abs=1e-4)
    assert values["log_p.old"] == pytest.approx(scores["Tokyo"], abs=1e-4)
    assert values["edit_success.es"] == float(scores["New York City"] > scores["Tokyo"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("n", "stop"), [(1, True), (9, True), (9, False)])
def test_rows_that_leave_the_batch_change_nothing_of_what_is_written(
    family, n, stop, request, monkeypatch
):
    """Two prompts under each edit, of different lengths and ends, against each alone; and with all rows kept."""
    base = request.getfixturevalue(family)
    editor = editor_for(base)
    updates = editor.updates([editor.tokens(e) for e in EXAMPLES])
    texts = [p for e in EXAMPLES for p in (e.prompt, e.neighbours[0].prompt)] + ["Q: Who? A:"] * 5
    edits = [k // 2 if k < 10 else k - 10 for k in range(15)]
    ids = [base.tokenizer(p)["input_ids"] for p in texts]
    monkeypatch.setattr("mendkit.evaluation.decoding.ROWS", 7)
    base._stop_ids()
    monkeypatch.setitem(
        base._memo, "stop_ids", frozenset(range(0, 400, 2))
    )  # half of all tokens end a row
    written = write(base, ids, updates, edits, max_new_tokens=n, stop=stop)
    for row, prompt, edit in zip(written, ids, edits, strict=True):
        with editor.edit(EXAMPLES[edit]).applied():
            (alone,) = base.generate_ids(*base.left_pad([prompt]), max_new_tokens=n, stop=stop)
        assert row == alone
    assert len({len(row) for row in written}) > 1 or n == 1 or not stop
    whole = copy.copy(base)
    whole._memo = {**base._memo, "cache_bytes": 0}
    assert write(whole, ids, updates, edits, max_new_tokens=n, stop=stop) == written
    with pytest.raises(ModelError, match="leave `fluency` out"):
        write(whole, ids, updates, edits, max_new_tokens=n, stop=False, endless=True)
    assert write(base, ids[:3], None, [0] * 3, max_new_tokens=n, stop=stop) == [
        base.generate_ids(*base.left_pad([prompt]), max_new_tokens=n, stop=stop)[0]
        for prompt in ids[:3]
    ]


def test_scores_of_hand_made_readings():
    """Two target tokens and the end of text; two paraphrases, one of them read wrongly; y° and a neighbour."""

    def text(*targets, ends=True):
        return Tokens(tuple(range(len(targets) + 1)), tuple(range(len(targets))), targets, ends)

    def read(*argmax, logp=(-1.0, -3.0, -50.0), kl=(), same=()):
        return Forced(argmax, logp[: len(argmax)], kl, same)

    y, old = text(5, 6, 0), text(7, ends=False)
    card = Card(
        ("p", "?", "q", "r"),
        (y,) * 4,
        (old,) * 3,
        (old, old),
        (old,),
        (text(8, ends=False),),
        (y, y),
    )
    targets = [read(5, 6, 9), read(5, 6, 0), read(5, 4, 0), read(4, 4, 0)]
    values = target_values(
        "New York", card, targets, [" New York!", "the new york", " New York City", "Rome"]
    )
    assert values == {
        "edit_success.tf_token": 1.0, "edit_success.tf_exact": 1.0, "edit_success.free_exact": 1.0,
        "edit_success.free_contains": 1.0, "edit_success.free_exact_question": 1.0,
        "edit_success.free_gold_length": 1.0, "paraphrase.free_gold_length": 0.5,
        "paraphrase.tf_token": 0.25, "paraphrase.tf_exact": 0.0, "paraphrase.free_exact": 0.0,
        "paraphrase.free_contains": 0.5, "edit_success.paper": pytest.approx(1 / 3),
    }  # fmt: skip
    longer = target_values(
        "New York", card, targets, ["old New York", "", "New Yorkers", "New York and so on"]
    )
    assert (
        longer["edit_success.free_gold_length"] == 0.0
        and longer["paraphrase.free_gold_length"] == 0.5
    )
    pairs = [
        read(7, logp=(-2.5,)),
        read(7, logp=(-1.5,)),
        read(7, logp=(-2.5,)),
        read(5, logp=(-9.0,)),
    ]
    kept = [
        read(7, logp=(-1.0,), kl=(0.5,), same=(True,)),
        read(3, logp=(-1.0,), kl=(1.5,), same=(False,)),
        read(8, kl=(0.25,), same=(True,)),
        read(5, 6, 0, same=(True, True, False)),
        read(5, 6, 0, same=(True, True, True)),
    ]
    chances = probability_values(
        card, targets, pairs, kept
    )  # log P(y) is -2, the end of text left out
    assert chances == {
        "log_p.new": -2.0, "log_p.old": -2.5, "edit_success.es": 1.0, "paraphrase.ps": 0.5, "neighbourhood.ns": 1.0
    }  # fmt: skip
    locality = locality_values(card, kept, [read(7), read(7), read(2)])
    assert locality == {
        "neighbourhood.argmax_agreement": 0.5, "neighbourhood.kl_nats": 1.0, "neighbourhood.retained": 0.5,
        "neighbourhood.greedy_agreement": 0.0,
        "locality.argmax_agreement": 1.0, "locality.kl_nats": 0.25, "locality.greedy_agreement": 1.0,
    }  # fmt: skip


def test_an_answer_the_model_already_gives_is_counted_not_scored(llama):
    prompt = "The capital of France is"
    text = next(
        t for t in (llama.generate(prompt, max_new_tokens=n) for n in range(1, 9)) if normalise(t)
    )
    known = EditExample(prompt=prompt, target_new=text.strip())
    prepared = EvaluationSet(
        llama,
        hparams(),
        [known, *EXAMPLES[1:3]],
        max_new_tokens=len(llama.tokenizer(text)["input_ids"]),
    )
    wrote = [w[0] for w in prepared.written]
    report = evaluate(editor_for(llama), prepared)
    expected = sum(
        normalise(w) == normalise(e.target_new)
        for w, e in zip(wrote, prepared.examples, strict=True)
    )
    assert report.counts["already_true"] == expected
    assert report.counts["scored"] == 3 - expected == len(report.rows)


def test_what_cannot_be_tokenised_is_counted_as_skipped(llama):
    long = EditExample(prompt="The capital of Peru is", target_new="Rome " * 60)
    prepared = EvaluationSet(llama, hparams(), [long, *EXAMPLES[:2]], max_new_tokens=4)
    counts = evaluate(editor_for(llama), prepared).counts
    assert counts == {
        "scored": 2, "already_true": 0, "skipped": 1, "empty_target": 0, "too_long": 1, "invalid_records": 0
    }  # fmt: skip
    empty = EvaluationSet(
        llama, hparams(), [replace(long, target_new=" The."), EXAMPLES[0]], max_new_tokens=4
    )
    assert (empty.reasons["empty_target"], empty.reasons["too_long"]) == (1, 0)
    with pytest.raises(DataError, match="limit"):
        EvaluationSet(llama, hparams(), [long])


def test_results_carry_mode_n_and_interval(llama, prepared):
    report = evaluate(editor_for(llama), prepared)
    results = report.to_dict("identity.")
    for name in (
        "edit_success.free_exact",
        "paraphrase.tf_token",
        "neighbourhood.ns",
        "locality.argmax_agreement",
    ):
        key = f"identity.single.{name}"
        assert results[f"{key}.low"] <= results[key] <= results[f"{key}.high"] and results[
            f"{key}.n"
        ] == len(EXAMPLES)
    assert (
        "identity.single.before.edit_success.free_exact" in results
        and "identity.single.score.harmonic" in results
    )
    assert all(math.isfinite(value) for value in results.values())
    groups = report.by("relation", "edit_success.tf_token")
    assert groups["capital"].mean == pytest.approx(report.summary["edit_success.tf_token"].mean)


@pytest.mark.parametrize(
    ("mode", "k", "words"),
    [
        ("all", None, "single, batch, sequential"),
        ("batch", None, "k, the"),
        ("single", 2, "k, the"),
        ("batch", 0, "k, the"),
    ],
)
def test_other_modes_are_refused(llama, prepared, mode, k, words):
    with pytest.raises(HyperParamError, match=words):
        evaluate(editor_for(llama), prepared, mode=mode, k=k)


def test_next_tokens_are_the_models(llama):
    table = next_tokens(llama, "The capital of France is", k=3, among=[" Lima"])
    p = logits(llama)[0, -1].softmax(-1)
    assert next(iter(table.values())) == pytest.approx(float(p.max())) and len(table) in (3, 4)
    assert list(table.values()) == sorted(table.values(), reverse=True)


def test_select_keeps_the_order(llama):
    editor = editor_for(llama)
    updates = editor.updates([editor.tokens(e) for e in EXAMPLES[:3]])
    swapped = select(updates, [2, 0])
    for name, update in updates.items():
        assert torch.equal(swapped[name].u[0], update.u[2]) and torch.equal(
            swapped[name].u[1], update.u[0]
        )
    with side_branches(llama, swapped):
        pass
