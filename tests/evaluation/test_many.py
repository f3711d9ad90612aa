"""Many edits against doing them the long way: dense weights, sessions, plain generation, plain perplexity."""

import copy
import math
import sys

import pytest
import torch

from mendkit.data.examples import EditExample, Probe
from mendkit.errors import DataError
from mendkit.evaluation.evaluate import EvaluationSet, evaluate
from mendkit.evaluation.heldout import HeldOutText, ngram_entropy_bits, windows
from mendkit.evaluation.many import one_after_another, so_far, together
from mendkit.evaluation.results import normalise
from mendkit.mend.updates import LowRankUpdate, side_branches
from mendkit.models.tokens import Tokens
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, editor_for, hparams, logits
from tests.oracles.tiny import tiny_llama

EVALUATE = sys.modules[
    "mendkit.evaluation.evaluate"
]  # the package's attribute of this name is the function
TEXT = "The capital of France is Paris. The main city of Peru is not Oslo, I think. " * 4


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
        held = together(*([held] if held else []), part)
        assert len(held["w"]) == 1 and held["w"].u.shape[1] <= 2 * min(i, o)
    torch.testing.assert_close(held["w"].dense(), expected)
    torch.testing.assert_close(together(*parts)["w"].dense(), expected)
    assert together() == {}


def test_norms_of_low_rank_changes_are_those_of_the_matrices(llama):
    several = update(3, 5, 6, 4)
    dense = [float(several.select([b]).dense().norm()) for b in range(3)]
    assert several.norms().tolist() == pytest.approx(dense)
    edit = editor_for(llama).edit(list(EXAMPLES[:2]))
    weights = {site.name: llama.site_module(site).weight for site in llama.sites}
    expected = {
        name: float(change.norm() / weights[name].norm()) for name, change in edit.dense().items()
    }
    assert edit.relative_norm() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------- in a row


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
def test_a_block_of_a_sequence_is_the_models_edited_one_after_another(family, request):
    base = request.getfixturevalue(family)
    editor = editor_for(base)
    texts = [editor.tokens(example) for example in EXAMPLES]
    first = one_after_another(editor, texts[:2], before={}, trunk=FrozenTrunk(base), strength=1.0)
    before = together(*first)
    steps = one_after_another(
        editor, texts[2:], before=before, trunk=FrozenTrunk(base), strength=1.0
    )
    ids = torch.tensor([base.tokenizer("The capital of France is")["input_ids"]])
    with side_branches(base, so_far(steps, before)), torch.no_grad():
        block = base.model(input_ids=ids.repeat(3, 1), use_cache=False).logits
    with editor.session() as session:
        for n, example in enumerate(EXAMPLES):
            session.edit(example)
            if n >= 2:
                torch.testing.assert_close(block[n - 2 : n - 1], logits(base), rtol=1e-8, atol=1e-9)
    assert float((block[0] - block[1]).abs().max()) > 1e-3
    alone = editor.updates(texts[4:], trunk=FrozenTrunk(base))  # not computed on the edited model
    assert not any(torch.allclose(alone[name].delta, steps[2][name].delta) for name in alone)


def success(base, example: EditExample) -> tuple[float, str]:
    written = base.generate(example.prompt, max_new_tokens=8)
    return float(normalise(written) == normalise(example.target_new)), written


@pytest.fixture(scope="module")
def prepared(llama):
    return EvaluationSet(llama, hparams(), EXAMPLES, max_new_tokens=8, text=TEXT)


def test_a_sequence_is_scored_as_a_session_would_be(llama, prepared, monkeypatch):
    monkeypatch.setattr(EVALUATE, "SEQUENCE_BLOCK", 2)
    monkeypatch.setattr(EVALUATE, "AFTER", (1, 4, 10))
    editor = editor_for(llama)
    report = evaluate(editor, prepared, mode="sequential", strength=0.4)
    assert [r.mode for r in (*report.earlier, report)] == [
        "sequential_1",
        "sequential_4",
        "sequential_5",
    ]
    reports = {len(r.rows): r for r in (*report.earlier, report)}
    with editor.session() as session:
        for n, example in enumerate(EXAMPLES):
            session.edit(example)
            session.scale(n, 0.4)
            now, written = success(llama, example)
            assert report.rows[n].values["edit_success.free_exact"] == now
            assert normalise(report.rows[n].outputs[0]["after"]) == normalise(written)
            if n + 1 in reports:
                left = [success(llama, e) for e in EXAMPLES[: n + 1]]
                own = reports[n + 1]
                assert own.summary["retention.all"].mean == pytest.approx(
                    sum(s for s, _ in left) / len(left)
                )
                assert [normalise(r.outputs[0]["end"]) for r in own.rows] == [
                    normalise(w) for _, w in left
                ]
                dense = [edit.dense() for edit in session.journal]
                total = {name: sum(d[name] for d in dense) for name in dense[0]}
                weights = {s.name: llama.site_module(s).weight for s in llama.sites}
                expected = max(float(total[name].norm() / w.norm()) for name, w in weights.items())
                assert own.values["norm.relative_max"] == pytest.approx(expected, rel=1e-4)
                assert own.values["drawdown.perplexity"] == pytest.approx(
                    perplexity(llama, prepared.text.windows) - prepared.text.before.perplexity,
                    rel=1e-3,
                    abs=1e-2,
                )


def test_what_follows_a_sequence_is_told_of_its_end_and_success_of_each_edit(
    llama, prepared, monkeypatch
):
    monkeypatch.setattr(EVALUATE, "AFTER", (2,))
    report = evaluate(editor_for(llama), prepared, mode="sequential")
    texts = [editor_for(llama).tokens(e) for e in EXAMPLES]
    steps = one_after_another(
        editor_for(llama), texts, before={}, trunk=prepared.trunk, strength=1.0
    )
    (end,) = prepared.score(together(*steps), [1])[0]
    (then,) = prepared.score(together(*steps[:2]), [1])[0]
    values = report.rows[1].values
    assert values["neighbourhood.kl_nats"] == pytest.approx(end["neighbourhood.kl_nats"], rel=1e-3)
    assert values["locality.kl_nats"] == pytest.approx(end["locality.kl_nats"], rel=1e-3)
    assert values["retention.tf_token"] == end["edit_success.tf_token"]
    assert (
        values["log_p.new"]
        == pytest.approx(then["log_p.new"], rel=1e-3)
        != pytest.approx(end["log_p.new"], rel=1e-3)
    )
    results = report.to_dict()
    assert (
        "sequential_2.retention.first_10" in results and "sequential_5.norm.relative_max" in results
    )
    assert results["sequential_5.edit_success.tf_token.n"] == 5 and not any(
        "score." in name for name in results
    )


# ------------------------------------------------------------------------------------------------- at once


@pytest.mark.parametrize("rows", [64, 2], ids=["groups scored together", "one group at a time"])
def test_a_batch_is_one_edit_from_several_examples(llama, prepared, monkeypatch, rows):
    monkeypatch.setattr(EVALUATE, "EDIT_BATCH", rows)
    editor = editor_for(llama)
    report = evaluate(editor, prepared, mode="batch", k=2)
    assert (
        report.mode == "batch_2" and report.counts["groups"] == 2 and report.counts["left_out"] == 1
    )
    assert [row.index for row in report.rows] == [0, 1, 2, 3]
    worst = []
    for group in (EXAMPLES[:2], EXAMPLES[2:4]):
        edit = editor.edit(list(group))
        worst.append(max(edit.relative_norm().values()))
        own = prepared.score(edit.updates, [EXAMPLES.index(example) for example in group])[0]
        log_p = [values["log_p.new"] for values in own]
        with edit.applied():
            for example in group:
                (row,) = [row for row in report.rows if row.id == example.id]
                assert row.values["edit_success.free_exact"] == success(llama, example)[0]
                assert row.values["log_p.new"] == pytest.approx(log_p.pop(0), rel=1e-4)
                assert normalise(row.outputs[0]["after"]) == normalise(success(llama, example)[1])
    assert report.values["norm.relative_max"] == pytest.approx(sum(worst) / 2, rel=1e-4)
    assert (
        "batch_2.drawdown.perplexity" in report.to_dict()
        and "batch_2.before.perplexity" in report.to_dict()
    )
    with pytest.raises(DataError, match="cannot make a batch of 9"):
        evaluate(editor, prepared, mode="batch", k=9)


def test_a_model_without_a_trunk_is_compared_with_its_unedited_self(llama, prepared):
    whole = copy.copy(llama)
    whole.blocks = None
    on = EvaluationSet(whole, hparams(), EXAMPLES, max_new_tokens=8)
    for mode, k in (("batch", 2), ("sequential", None)):
        expected = evaluate(editor_for(llama), prepared, mode=mode, k=k).summary
        got = evaluate(editor_for(whole), on, mode=mode, k=k).summary
        for name in ("neighbourhood.kl_nats", "locality.kl_nats", "edit_success.tf_token"):
            assert got[name].mean == pytest.approx(expected[name].mean, rel=1e-3)
    assert got["locality.kl_nats"].mean > 1e-3


def test_no_edit_draws_nothing_down(llama, prepared):
    report = evaluate(editor_for(llama), prepared, strength=0.0)
    for name in ("drawdown.perplexity", "drawdown.accuracy", "norm.relative_max"):
        assert report.summary[name].mean == pytest.approx(0.0, abs=1e-3)
    sequence = evaluate(editor_for(llama), prepared, mode="sequential", strength=0.0)
    before = sum(prepared.before[i]["edit_success.tf_token"] for i in range(5)) / 5
    assert sequence.summary["retention.tf_token"].mean == pytest.approx(before)


def test_edits_that_contradict_each_other_are_counted(llama):
    twice = [EXAMPLES[0], EXAMPLES[1], EditExample("The capital of France is", "Bern")]
    report = evaluate(editor_for(llama), twice, mode="sequential", max_new_tokens=4)
    assert report.counts["conflicting"] == 2


# ------------------------------------------------------------------------------------------------- held-out text


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
    assert len(text.windows) >= 1 and text.count == len(llama.tokenizer(TEXT)["input_ids"]) - 1
    assert text.before.perplexity == pytest.approx(perplexity(llama, text.windows), rel=1e-4)
    short = HeldOutText(FrozenTrunk(llama), TEXT, window=16)
    assert len(short.windows) > 5 and short.before.perplexity == pytest.approx(
        perplexity(llama, short.windows), rel=1e-4
    )
    editor = editor_for(llama)
    updates = editor.updates([editor.tokens(e) for e in EXAMPLES[:2]], trunk=FrozenTrunk(llama))
    for example, score in zip(EXAMPLES, short.read(updates, 2), strict=False):
        with editor.edit(example).applied():
            assert score.perplexity == pytest.approx(perplexity(llama, short.windows), rel=1e-3)
        lost = score.drawdown(short.before)
        assert lost["drawdown.perplexity"] == pytest.approx(
            score.perplexity - short.before.perplexity
        )
        assert lost["drawdown.accuracy"] == pytest.approx(short.before.accuracy - score.accuracy)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    base = tiny_llama()
    base.model.lm_head.weight.data.zero_()
    text = HeldOutText(FrozenTrunk(base), TEXT)
    assert text.before.perplexity == pytest.approx(len(base.tokenizer), rel=1e-5)
    assert text.before.accuracy == 0.0  # all alike: argmax is the first token
    with pytest.raises(DataError, match="at least two"):
        HeldOutText(FrozenTrunk(base), "a")


def test_entropy_of_words():
    assert ngram_entropy_bits("a b c d e") == pytest.approx(
        (2 / 3 * math.log2(4) + 4 / 3 * math.log2(3)) / 2
    )
    assert ngram_entropy_bits("a b a b a") == pytest.approx(
        (2 / 3 * 1 + 4 / 3 * (math.log2(3) - 2 / 3)) / 2
    )
    assert ngram_entropy_bits("a a a a") == ngram_entropy_bits("a") == ngram_entropy_bits("") == 0.0


def on_and_on(base, prompt: str, n: int) -> str:
    """Greedy text of n tokens of which none ends it."""
    ids = base.tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            row = base.model(input_ids=torch.tensor([ids])).logits[0, -1]
        row[base.eos_id] = -torch.inf
        ids = [*ids, int(row.argmax())]
    return base.new_text(ids[:start], ids[start:], stop=False)


def test_fluency_is_of_what_each_edited_model_writes_on_and_on(llama):
    examples = [
        EXAMPLES[0],
        EditExample("The capital of Peru is", "Oslo", generation_prompts=("Peru is", "Peru has")),
    ]
    editor = editor_for(llama)
    report = evaluate(editor, examples, max_new_tokens=4, fluency=True)
    for example, row in zip(examples, report.rows, strict=True):
        prompts = example.generation_prompts or (example.prompt,)
        for applied, name in (
            (editor.edit(example), ""),
            (editor.edit(example).scale(0.0), "before."),
        ):
            with applied.applied():
                texts = [on_and_on(llama, prompt, 100) for prompt in prompts]
            expected = sum(map(ngram_entropy_bits, texts)) / len(texts)
            assert row.values[f"{name}fluency.entropy_bits"] == pytest.approx(expected)
    assert "fluency.entropy_bits" not in evaluate(editor, examples, max_new_tokens=4).summary


# ------------------------------------------------------------------------------------------------- implied questions


def test_implied_questions_count_where_the_fact_in_context_answers_them(llama):
    prompts = ["The main city of France is not", "France has its seat of government in"]
    said = [
        llama.generate(f"The capital of France is Lima.\n{p}", max_new_tokens=8) for p in prompts
    ]
    assert all(map(normalise, said))
    probes = (
        Probe(prompts[0], "nobody says this", (said[0],)),
        Probe(prompts[1], said[1]),
        Probe(prompts[0], "nor this"),
    )
    example = EditExample("The capital of France is", "Lima", portability=probes)
    on = EvaluationSet(llama, hparams(), [example, EXAMPLES[1]], max_new_tokens=8)
    assert on.implied == [[True, True, False], []]
    editor = editor_for(llama)
    row, other = evaluate(editor, on).rows
    with editor.edit(example).applied():
        right = [
            normalise(llama.generate(p, max_new_tokens=8)) == normalise(s)
            for p, s in zip(prompts, said, strict=True)
        ]
    assert row.values["portability.coverage"] == pytest.approx(2 / 3)
    assert row.values["portability.free_exact"] == pytest.approx(sum(right) / 2)
    assert "portability.coverage" not in other.values
    plain = [
        normalise(llama.generate(p, max_new_tokens=8)) == normalise(s)
        for p, s in zip(prompts, said, strict=True)
    ]
    assert row.values["before.portability.free_exact"] == pytest.approx(sum(plain) / 2)
