"""Many edits, and held-out text, against the long way: dense weights, sessions, plain reading."""

import copy
import math
import sys

import pytest
import torch

from mendkit.data.examples import EditExample
from mendkit.errors import DataError
from mendkit.evaluation.evaluate import evaluate, one_after_another, so_far, together
from mendkit.evaluation.metrics import HeldOutText, ngram_entropy_bits, windows
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.evaluation.results import normalise
from mendkit.mend.updates import LowRankUpdate, side_branches
from mendkit.models.tokens import Tokens
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, editor_for, hparams, logits
from tests.oracles.tiny import tiny_llama

EVALUATE = sys.modules["mendkit.evaluation.evaluate"]
TEXT = "The capital of France is Paris. The main city of Peru is not Oslo, I think. " * 4
FREE = "edit_success.free_exact"


def update(b: int, t: int, i: int, o: int, coefficient: float = -0.5) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(b + t)
    u, delta = (torch.randn(b, t, d, generator=generator, dtype=torch.float64) for d in (i, o))
    return LowRankUpdate(u, delta, coefficient)


@pytest.mark.parametrize(("i", "o"), [(4, 7), (7, 4), (5, 5)])
def test_edits_held_together_are_the_sum_of_their_weight_changes_and_do_not_grow(i, o):
    parts = [{"w": update(b, t, i, o)} for b, t in ((2, 3), (1, 2), (3, 9))]
    expected = sum(p["w"].dense() for p in parts)
    held: dict[str, LowRankUpdate] = {}
    for part in parts:
        held = together(held, part)
        assert len(held["w"]) == 1 and held["w"].u.shape[1] <= 2 * min(i, o)
    torch.testing.assert_close(held["w"].dense(), expected)
    torch.testing.assert_close(together(*parts)["w"].dense(), expected)
    assert together() == {}


def test_a_block_of_a_sequence_is_the_models_edited_one_after_another(base64):
    editor, trunk = editor_for(base64), FrozenTrunk(base64)
    texts = [editor.tokens(example) for example in EXAMPLES]
    before = together(*one_after_another(editor, texts[:2], trunk=trunk))
    ids = torch.tensor([base64.tokenizer("The capital of France is")["input_ids"]])
    with side_branches(base64, before):
        steps = one_after_another(editor, texts[2:], trunk=trunk)
        with side_branches(base64, so_far(steps)), torch.no_grad():
            block = base64.model(input_ids=ids.repeat(3, 1), use_cache=False).logits
    with editor.session() as session:
        for n, example in enumerate(EXAMPLES):
            session.edit(example)
            if n >= 2:
                torch.testing.assert_close(
                    block[n - 2 : n - 1], logits(base64), rtol=1e-8, atol=1e-9
                )
    assert float((block[0] - block[1]).abs().max()) > 1e-3
    # Negative control: an edit of the unedited model is another.
    alone = editor.updates(texts[4:], trunk=FrozenTrunk(base64))
    assert not any(torch.allclose(alone[name].delta, steps[2][name].delta) for name in alone)


def success(base, example: EditExample) -> tuple[float, str]:
    written = base.generate(example.prompt, max_new_tokens=8)
    return float(normalise(written) == normalise(example.target_new)), normalise(written)


@pytest.fixture(scope="module")
def prepared(llama):
    return EvaluationSet(llama, hparams(), EXAMPLES, max_new_tokens=8, text=TEXT)


def test_a_sequence_is_scored_as_a_session_would_be(llama, prepared, monkeypatch):
    monkeypatch.setattr(EVALUATE, "SEQUENCE_BLOCK", 2)
    monkeypatch.setattr(EVALUATE, "AFTER", (1, 4, 10))
    editor = editor_for(llama)
    report = evaluate(editor, prepared, mode="sequential", strength=0.4)
    reports = {len(r.rows): r for r in (*report.earlier, report)}
    assert [r.mode for r in reports.values()] == [f"sequential_{n}" for n in (1, 4, 5)]
    with editor.session() as session:
        for n, example in enumerate(EXAMPLES):
            session.edit(example)
            session.scale(n, 0.4)
            now, written = success(llama, example)
            assert report.rows[n].values[FREE] == now
            assert normalise(report.rows[n].outputs[0]["after"]) == written
            if n + 1 not in reports:
                continue
            found, left = reports[n + 1], [success(llama, e) for e in EXAMPLES[: n + 1]]
            retained = sum(s for s, _ in left) / len(left)
            assert found.summary["retention.all"].mean == pytest.approx(retained)
            ends = [normalise(row.outputs[0]["end"]) for row in found.rows]
            assert ends == [w for _, w in left]
            dense = [edit.dense() for edit in session.journal]
            total = {name: sum(d[name] for d in dense) for name in dense[0]}
            weights = {s.name: llama.site_module(s).weight for s in llama.sites}
            expected = max(float(total[name].norm() / w.norm()) for name, w in weights.items())
            assert found.values["norm.relative_max"] == pytest.approx(expected, rel=1e-4)
            gained = perplexity(llama, prepared.text.windows) - prepared.text.before.perplexity
            drawdown = found.values["drawdown.perplexity"]
            assert drawdown == pytest.approx(gained, rel=1e-3, abs=1e-2)


def test_what_follows_a_sequence_is_told_of_its_end_and_success_of_each_edit(
    llama, prepared, monkeypatch
):
    monkeypatch.setattr(EVALUATE, "AFTER", (2,))
    editor = editor_for(llama)
    report = evaluate(editor, prepared, mode="sequential")
    texts = [editor.tokens(e) for e in EXAMPLES]
    steps = one_after_another(editor, texts, trunk=prepared.trunk)
    (end,), (then,) = (
        [row.values for row in prepared.score(together(*held), [1])] for held in (steps, steps[:2])
    )
    values = report.rows[1].values
    for name in ("neighbourhood.kl_nats", "locality.kl_nats"):
        assert values[name] == pytest.approx(end[name], rel=1e-3)
    assert values["retention.tf_token"] == end["edit_success.tf_token"]
    assert values["log_p.new"] == pytest.approx(then["log_p.new"], rel=1e-3)
    assert values["log_p.new"] != pytest.approx(end["log_p.new"], rel=1e-3)
    results = report.to_dict()
    assert "sequential_2.retention.first_10" in results
    assert "sequential_5.norm.relative_max" in results
    assert results["sequential_5.edit_success.tf_token.n"] == 5
    assert not any("score." in name for name in results)


def test_a_batch_is_one_edit_from_several_examples(llama, prepared):
    editor = editor_for(llama)
    report = evaluate(editor, prepared, mode="batch", k=2)
    assert report.mode == "batch_2"
    assert report.counts["groups"] == 2 and report.counts["left_out"] == 1
    assert [row.index for row in report.rows] == [0, 1, 2, 3]
    largest = []
    for at in (0, 2):
        edit = editor.edit(list(EXAMPLES[at : at + 2]))
        largest.append(max(edit.relative_norm().values()))
        with edit.applied():
            for row, example in zip(report.rows[at:], EXAMPLES[at : at + 2], strict=False):
                assert row.values[FREE] == success(llama, example)[0]
                assert normalise(row.outputs[0]["after"]) == success(llama, example)[1]
    assert report.values["norm.relative_max"] == pytest.approx(sum(largest) / 2, rel=1e-4)
    names = {"batch_2.drawdown.perplexity", "batch_2.before.perplexity"}
    assert names <= set(report.to_dict())
    with pytest.raises(DataError, match="cannot make a batch of 9"):
        evaluate(editor, prepared, mode="batch", k=9)


def test_a_model_without_a_trunk_is_compared_with_its_unedited_self(llama, prepared):
    whole = copy.copy(llama)
    whole.blocks = None
    on = EvaluationSet(whole, hparams(), EXAMPLES, max_new_tokens=8)
    expected = evaluate(editor_for(llama), prepared, mode="sequential").summary
    got = evaluate(editor_for(whole), on, mode="sequential").summary
    for name in ("neighbourhood.kl_nats", "locality.kl_nats", "edit_success.tf_token"):
        assert got[name].mean == pytest.approx(expected[name].mean, rel=1e-3)
    assert got["locality.kl_nats"].mean > 1e-3


def test_edits_that_contradict_each_other_are_counted(llama):
    twice = [EXAMPLES[0], EXAMPLES[1], EditExample("The capital of France is", "Bern")]
    report = evaluate(editor_for(llama), twice, mode="sequential", max_new_tokens=4)
    assert report.counts["conflicting"] == 2


# ---------------------------------------------------------------------------------- held-out text


def perplexity(base, parts: list[Tokens]) -> float:
    nll, count = 0.0, 0
    for part in parts:
        with torch.no_grad():
            logp = base.model(input_ids=torch.tensor([part.ids])).logits[0].log_softmax(-1)
        for position, target in zip(part.scored, part.targets, strict=True):
            nll, count = nll - float(logp[position, target]), count + 1
    return math.exp(nll / count)


@pytest.mark.parametrize("prefix", [(), (9,)])
@pytest.mark.parametrize(("n", "window"), [(2, 8), (8, 8), (9, 8), (31, 8), (40, 7)])
def test_windows_score_every_token_once_with_what_stands_before_it(n, window, prefix):
    ids = [100 + k for k in range(n)]
    seen = []
    for part in windows(ids, prefix, window=window):
        assert len(part.ids) <= window and part.ids[: len(prefix)] == prefix
        for position, target in zip(part.scored, part.targets, strict=True):
            assert part.ids[position + 1] == target
            context = target - 100  # tokens before it in the text
            assert position + 1 - len(prefix) >= min(context, (window - len(prefix)) // 2)
            seen.append(target)
    assert seen == ids[0 if prefix else 1 :]


def test_perplexity_is_token_weighted_under_every_edit(llama, prepared):
    text = prepared.text
    assert text.count == len(llama.tokenizer(TEXT)["input_ids"]) - 1
    assert text.before.perplexity == pytest.approx(perplexity(llama, text.windows), rel=1e-4)
    short = HeldOutText(FrozenTrunk(llama), TEXT, window=16)
    before = short.before.perplexity
    assert len(short.windows) > 5
    assert before == pytest.approx(perplexity(llama, short.windows), rel=1e-4)
    editor = editor_for(llama)
    updates = editor.updates([editor.tokens(e) for e in EXAMPLES[:2]], trunk=FrozenTrunk(llama))
    read = short.read(FrozenTrunk(llama), updates, 2)
    for example, score in zip(EXAMPLES, read, strict=False):
        with editor.edit(example).applied():
            assert score.perplexity == pytest.approx(perplexity(llama, short.windows), rel=1e-3)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    base = tiny_llama()
    base.model.lm_head.weight.data.zero_()
    text = HeldOutText(FrozenTrunk(base), TEXT)
    assert text.before.perplexity == pytest.approx(len(base.tokenizer), rel=1e-5)
    assert text.before.accuracy == 0.0  # all alike: argmax is the first token
    with pytest.raises(DataError, match="at least two"):
        HeldOutText(FrozenTrunk(base), "a")


def test_entropy_of_words():
    five = (2 / 3 * math.log2(4) + 4 / 3 * math.log2(3)) / 2
    assert ngram_entropy_bits("a b c d e") == pytest.approx(five)
    two = (2 / 3 * 1 + 4 / 3 * (math.log2(3) - 2 / 3)) / 2
    assert ngram_entropy_bits("a b a b a") == pytest.approx(two)
    assert ngram_entropy_bits("a a a a") == ngram_entropy_bits("a") == ngram_entropy_bits("") == 0.0
