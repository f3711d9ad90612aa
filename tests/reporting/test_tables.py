"""Sentences and tables tell what happened, also when it went badly, and no text can break them."""

from dataclasses import replace
from pathlib import Path
from statistics import harmonic_mean
from types import SimpleNamespace

import pytest

from mendkit.baselines.fine_tuning import FineTuning
from mendkit.baselines.tuning import Tuned
from mendkit.data.examples import EditExample, Probe
from mendkit.evaluation.results import EditRow, EvaluationReport, Interval
from mendkit.hparams import MENDHyperParams
from mendkit.mend.training import TrainingResult
from mendkit.models.base import BaseModel
from mendkit.reporting import findings, tables
from tests.oracles.claims import EXAMPLES

FREE = "edit_success.free_exact"


def summary(*means: float) -> dict[str, Interval]:
    return {name: Interval(m, m, m, 10) for name, m in zip(findings.HEADLINE, means, strict=True)}


def run(*scores: float, edit: tuple[float, ...] = (6.0, 1.0)) -> list[dict[str, float]]:
    """A history with these validation scores and edit losses."""
    val = [{"step": 10 * i, "seconds": 1.0, "val.score": s} for i, s in enumerate(scores)]
    return [*val, *({"step": i + 1, "loss": loss, "edit": loss} for i, loss in enumerate(edit))]


# --------------------------------------------------------------------------------------------------- findings


@pytest.mark.parametrize(
    ("trained", "control", "said"),
    [
        ((0.9, 0.8, 0.9, 1.0), (0.6, 0.2, 0.4, 0.9), "beats"),
        ((0.6, 0.2, 0.4, 0.9), (0.9, 0.8, 0.9, 1.0), "does not beat"),
        ((1.0, 0.0, 1.0, 1.0), (1.0, 0.0, 1.0, 1.0), "does not beat"),  # a tie has learned nothing
    ],
)
def test_the_verdict_compares_harmonic_means(trained: tuple, control: tuple, said: str) -> None:
    text = findings.verdict(summary(*trained), summary(*control))
    assert text.startswith(f"The trained editor {said} the identity control")
    assert f"{harmonic_mean(trained):.2f} against {harmonic_mean(control):.2f}" in text


@pytest.mark.parametrize(
    ("after", "said"), [(0.8, "raised"), (0.1, "did not raise"), (0.2, "did not raise")]
)
def test_validation_is_compared_with_before_the_first_step(after: float, said: str) -> None:
    history = run(0.2, after)
    assert f"Training {said} the validation score: 0.20 before" in findings.validation(
        history, history[1]
    )


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ((6.0, 1.0), "fell from 6.00 to 1.00"),
        ((1.0, 6.0), "rose from 1.00 to 6.00"),
        ((2.0, 2.0), "stayed at 2.00"),
    ],
)
def test_losses_fall_rise_or_stay(edit: tuple[float, ...], said: str) -> None:
    assert said in findings.losses(run(edit=edit))


def test_the_control_wins_a_tie_and_the_end_of_its_range_is_told() -> None:
    sweep = [{"edit_lr": a, "score": s} for a, s in ((1e-5, 0.1), (1e-4, 0.4), (1e-3, 0.3))]
    won, tied = (
        findings.control(sweep, {"val.score": 0.9}),
        findings.control(sweep, {"val.score": 0.4}),
    )
    assert (
        won.startswith("No step size brings")
        and "0.40 at its best α = 1.0e-04, trained 0.90" in won
    )
    assert tied.startswith("The trained editor does not beat")
    assert "end of the range" not in won and "end of the range" in findings.control(
        sweep[:2], {"val.score": 0.9}
    )


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ((0.1, 0.9, 0.3), "No other strength tried scores better than the trained one, 0.90"),
        ((0.1, 0.5, 0.7), "Strength 2 would score best: 0.70, against 0.50 as trained"),
        ((0.0, 0.0, 0.0), "No strength tried gives a score above 0"),
    ],
)
def test_strength(scores: tuple[float, ...], said: str) -> None:
    rows = [
        {"strength": s, "score": score} for s, score in zip((0.5, 1.0, 2.0), scores, strict=True)
    ]
    assert findings.strength(rows) == said


def test_relations_range_tie_or_stand_alone() -> None:
    one, two = Interval(0.5, 0.4, 0.6, 9), Interval(0.9, 0.8, 1.0, 9)
    assert "from 0.50 (us city) to 0.90 (capital) over 2" in findings.by_relation(
        {"us_city": one, "capital": two}
    )
    assert (
        findings.by_relation({"a": one, "b": one})
        == "Edit success is 0.50 on each of the 2 relations"
    )
    assert findings.by_relation({"None": one}).endswith("on the only relation, (no relation given)")


def test_shifts_gain_and_lose_and_an_unknown_old_answer_is_not_spoken_of() -> None:
    rows = [
        {"before.log_p.new": -3.0, "log_p.new": -5.0, "before.log_p.old": -4.0, "log_p.old": -1.0}
    ]
    both = "In the median, the new answer loses 2.0 and the old answer gains 3.0 nats per token"
    assert findings.shifts(rows) == both
    assert "old" not in findings.shifts([{"before.log_p.new": -3.0, "log_p.new": -1.0}])


def test_next_tokens_count_only_the_new_answers_own_token() -> None:
    fact = {
        "new_token": " Ly",
        "before": {" Paris": 0.9, " Ly": 0.1},
        "after": {" Ly": 0.8, " Lyon": 0.1},
    }
    miss = {"new_token": " T", "before": {" T": 0.1, " A": 0.9}, "after": {" The": 0.6, " T": 0.4}}
    assert "for 0 of 2 facts before the edit and for 1 after it" in findings.next_tokens(
        [fact, miss]
    )


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.layers.27.mlp.up_proj.weight", "27.mlp.up_proj"),
        ("transformer.h.9.mlp.c_fc.weight", "9.mlp.c_fc"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_short_site(name: str, short: str) -> None:
    assert findings.short_site(name) == short


# ----------------------------------------------------------------------------------------------------- tables


def test_texts_of_the_data_cannot_break_a_table() -> None:
    html = tables.table(("a <b>",), [("<script>x</script> $5 and $6\nnew",)])
    assert "<script>" not in html and "a &lt;b&gt;" in html and "\n" not in html
    assert "$5" not in html and "<span>$</span>5" in html  # no mathematics between two dollar signs


def test_before_after_ticks_the_new_answer_and_what_stayed() -> None:
    asked = tables.prompts_of(EXAMPLES[0])
    roles = ["edit", "paraphrase", "paraphrase", "neighbour", "neighbour", "unrelated"]
    assert [role for role, _, _ in asked] == roles
    before = ["Paris", "Paris", "Paris", "Madrid", "Rome", "tea"]
    html = tables.before_after(
        asked, before, [" lima.", "Lima and more", "Paris", "Madrid", "", "tea"]
    )
    assert [c for c in html if c in "✓✗"] == ["✓", "✗", "✗", "✓", "✗", "✓"]
    assert "(nothing)" in html and "as before" in html


def test_spread_takes_each_relation_once_before_any_twice() -> None:
    examples = [
        EditExample(prompt=str(i), target_new="x", relation=r) for i, r in enumerate("aaabbc")
    ]
    assert [e.prompt for e in tables.spread(examples, 4)] == ["0", "3", "5", "1"]
    assert len(tables.spread(examples, 99)) == 6


def test_overlap_counts_subjects_and_prompts() -> None:
    text = tables.overlap(EXAMPLES[:3], EXAMPLES[2:])
    assert text.startswith("1 of the 3 held-out subjects and 1 of the 3 held-out prompts")


def test_relations_are_counted_and_a_long_tail_is_summed_up() -> None:
    examples = [EditExample(prompt="p", target_new="x", relation=f"r{i // 2}") for i in range(60)]
    html = tables.relations({"training": examples, "validation": EXAMPLES})
    assert "capital" not in html.split("more")[1] and "5 more" not in html and "6 more" in html
    assert html.endswith(_row("all", 60, 5) + "</tbody></table>")


def test_an_example_is_shown_with_all_its_prompts() -> None:
    html = tables.example(EXAMPLES[1])
    probes = (*EXAMPLES[1].neighbours, *EXAMPLES[1].unrelated)
    for text in (EXAMPLES[1].prompt, *EXAMPLES[1].paraphrases, *(probe.prompt for probe in probes)):
        assert text in html
    assert "replaces London" in html
    assert "replaces" not in tables.example(
        EditExample(prompt="p", target_new="x", neighbours=(Probe("q"),))
    )


def test_answers_name_the_tokens_that_follow_the_prompt(llama: BaseModel) -> None:
    own = tables.answers(llama, EXAMPLES[0])
    assert own["new"].startswith(own["new_token"].strip()) and own["old"].startswith(
        own["old_token"].strip()
    )
    assert tables.answers(llama, EditExample(prompt="A b", target_new="c"))["old_token"] is None


def _row(*cells: object) -> str:
    return "<tr>" + "".join(f"<td {tables.CELL}>{cell}</td>" for cell in cells) + "</tr>"


def _report(name: str, successes: list[float]) -> EvaluationReport:
    rows = []
    for i, success in enumerate(successes):
        written = "new" if success else "wrong"
        outputs = tuple(
            {"prompt": f"{p} {i}", "before": "old", "after": f"{written} of {name}"} for p in "xqp"
        )
        outputs = ({**outputs[0], "after": written}, *outputs[1:])
        rows.append(EditRow(i, None, "r", f"x {i}", "new", "old", {FREE: success}, outputs))
    means = summary(0.5, 0.4, 0.9, 0.9) | {"edit.seconds": Interval(0.01, 0.01, 0.01, 9)}
    return EvaluationReport(
        name, "single", tuple(rows), means, {"scored": 9, "already_true": 2, "skipped": 1}, 1.0
    )


def test_generations_show_failures_first_but_not_only() -> None:
    trained, control = (
        _report("trained", [1, 0, 1, 0, 0, 1]),
        _report("control", [0, 0, 0, 0, 0, 0]),
    )
    html = tables.generations(trained, control, n=4)
    first = [prompt for prompt in (f"x {i}<" for i in range(6)) if prompt in html]
    assert first == ["x 0<", "x 1<", "x 2<", "x 3<"] and html.index("x 3<") < html.index("x 0<")
    assert "p 1<" in html and "q 1<" not in html  # the paraphrase, not the question form
    assert html.count("new of control") == 0 and "wrong of control" in html
    all_failed = tables.generations(
        _report("trained", [0, 0, 0]), _report("control", [0, 0, 0]), n=2
    )
    assert all_failed.count("✗") == 4 and "✓" not in all_failed


def test_scores_stand_side_by_side() -> None:
    trained, control = _report("trained", [1]), _report("control", [0])
    html = tables.scores(trained, control)
    assert "0.500 [0.500, 0.500]" in html and "edit.seconds" not in html
    assert f"{harmonic_mean([0.5, 0.4, 0.9, 0.9]):.3f}" in html
    assert tables.counts(trained).startswith(
        "9 edits were scored; 2 were left out"
    ) and "10 ms" in tables.counts(trained)


def test_editors_stand_side_by_side_with_what_they_cost(llama: BaseModel) -> None:
    reports = {"ours": _report("ours", [1]), "theirs": _report("theirs", [0])}
    del reports["theirs"].summary["edit.seconds"]
    html = tables.editors(reports)
    assert (
        "edit.seconds" in html and _row("edit.seconds", "", "0.010 [0.010, 0.010]", "", 9) in html
    )
    editor = FineTuning(llama, MENDHyperParams(model_name="tiny"), lr=1.0)
    tried = Tuned(
        editor,
        ({"editor": "ROME", "settings": "clamp 4", "score": 0.25, FREE: 0.5, "chosen": True},),
    )
    assert _row("ROME", "clamp 4", "0.500", "0.250", "✓") in tables.tried([tried])
    assert tried.to_dict("rome.") == {
        "rome.tuning.tried": 1,
        "rome.tuning.kept": "clamp 4",
        "rome.tuning.score": 0.25,
    }


def test_hidden_failures_come_first() -> None:
    forced, question = "edit_success.tf_exact", "edit_success.free_exact_question"
    report = _report("trained", [1, 0, 1])
    values = [
        {forced: 1.0, question: 1.0},
        {forced: 0.0, question: 0.0},
        {forced: 1.0, question: 0.0},
    ]
    rows = tuple(
        replace(r, values={**r.values, **v}) for r, v in zip(report.rows, values, strict=True)
    )
    html = tables.hidden(replace(report, rows=rows), n=2)
    assert _row("x 2", "new", "✓", "✓ new", "✗ new of trained") in html
    assert html.index("x 2") < html.index("x 1") and "x 0" not in html


def test_the_conclusion_over_baselines_names_who_is_not_beaten() -> None:
    forced = {"edit_success.tf_exact": Interval(1, 1, 1, 9)}
    own = {
        n: replace(_report(n, [1]), summary=summary(m, m, m, m) | forced)
        for n, m in (("a", 0.5), ("b", 0.7))
    }
    text = tables.baselines_conclusion(own)
    assert (
        "- a, 0.50, beats all but b (0.70)." in text
        and "Best of 2 by the headline score: b, 0.70" in text
    )
    assert "- b, 0.70, beats all 1 others." in tables.baselines_conclusion(
        dict(reversed(own.items()))
    )


def test_the_conclusion_names_the_weakest_share_and_the_failures() -> None:
    text = tables.editing_conclusion(
        _report("trained", [1, 0, 0]), _report("c", [0]), [{"strength": 1, "score": 0.5}]
    )
    assert (
        "does not beat" in text
        and "`paraphrase.free_exact`, 0.400" in text
        and "2 of 3 edits" in text
    )
    assert "in a paraphrase's" not in text


def test_the_conclusion_tells_of_other_subjects_in_a_paraphrases_wording() -> None:
    report, control = _report("trained", [1, 0, 0]), _report("c", [0])
    summary = {**report.summary, "neighbourhood.reworded_agreement": Interval(0.25, 0.2, 0.3, 3)}
    summary["neighbourhood.argmax_agreement"] = Interval(0.75, 0.7, 0.8, 3)
    text = tables.editing_conclusion(
        replace(report, summary=summary), control, [{"strength": 1, "score": 0.5}]
    )
    assert (
        "their argmax 0.750 [0.700, 0.800] in the edit prompt's wording and 0.250 [0.200, 0.300] in a par"
        in text
    )


def test_training_results_are_flat_and_hold_both_editors() -> None:
    best = {
        "step": 20,
        "seconds": 5.0,
        "val.edit_success": 0.9,
        "val.locality": 0.7,
        "val.score": 0.8,
    }
    history = (
        {"step": 0, "seconds": 1.0, "val.score": 0.1},
        best,
        {"step": 30, "seconds": 9.0, "loss": 1.0},
    )
    result = TrainingResult(
        Path("a"), history, best, 12.0, "all steps done", 9, {"trunk_seconds": 2.0}
    )
    control = {"edit_lr": 1e-4, "edit_success": 0.5, "locality": 0.5, "score": 0.5}
    flat = tables.training_results(result, control)
    assert (
        flat["train.steps"] == 30
        and flat["train.best_step"] == 20
        and flat["train.trunk_seconds"] == 2.0
    )
    assert flat["train.validation.score"] == 0.8 and flat["identity.validation.score"] == 0.5
    assert flat["identity.edit_lr"] == 1e-4 and "identity.validation.edit_lr" not in flat
    assert "The archive of step 20 was kept" in tables.training_summary(result)
    conclusion = tables.training_conclusion(result, control)
    assert "raised the validation score" in conclusion and "locality, 0.70" in conclusion
    assert "0.900" in tables.validation_scores(best, control)


def test_the_plan_says_what_will_run() -> None:
    hparams = MENDHyperParams(
        model_name="some-model", max_epochs=3, inner_params=("a.weight", "b.weight")
    )
    html = tables.plan(hparams, Path("runs/x"), examples={"training": EXAMPLES})
    for text in (
        "some-model",
        "3 epochs of 16 edits",
        "a.weight, b.weight",
        "initialised and trained",
        "runs/x",
    ):
        assert text in html
    assert "epochs" not in tables.plan(
        hparams.replace(archive="some/archive"), Path("x"), examples={}
    )


def test_an_archive_without_a_summary_is_shown_all_the_same() -> None:
    metadata = {
        "base_model": {"name": "m", "class": "C"},
        "training": {},
        "edit_lr": {"h.1.mlp.weight": 1e-4},
    }
    assert "unknown" in tables.archive(metadata) and "1.mlp" in tables.archive(metadata)


def test_means_may_come_from_anywhere() -> None:
    assert isinstance(SimpleNamespace(mean=0.1, low=0.0, high=0.2, n=3), findings.Mean)
