"""Scores against oracles: models whose answers are known, and decoding done the long way."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from mendkit.baselines.base import down_projections, fact_in_context
from mendkit.baselines.fine_tuning import LocalisedFineTuning
from mendkit.data.examples import EditExample, Implied, Probe
from mendkit.data.files import Examples
from mendkit.errors import DataError, HyperParamError
from mendkit.evaluation import prepare
from mendkit.evaluation.evaluate import _run_of, evaluate
from mendkit.evaluation.metrics import (
    Reading,
    ScoredPrompt,
    begins_with,
    example_values,
    ngram_entropy_bits,
    prompt_scores,
)
from mendkit.evaluation.prepare import EvaluationSet, half_known
from mendkit.evaluation.results import normalise
from mendkit.mend.validation import Forced, forced
from mendkit.models.text import cut
from mendkit.models.tokens import Tokens
from tests.oracles.claims import EXAMPLES, editor_for, hparams, plain_logits

STAY = {"neighbours": "neighbourhood", "unrelated": "locality"}


@pytest.fixture(scope="module")
def prepared(llama):
    return EvaluationSet(llama, hparams(), EXAMPLES, max_new_tokens=8)


def test_no_edit_changes_nothing(llama, prepared):
    report = evaluate(editor_for(llama), prepared, strength=0.0)
    for name in STAY.values():
        assert report.summary[f"{name}.argmax_agreement"].mean == 1.0
        assert report.summary[f"{name}.greedy_agreement"].mean == 1.0
        assert report.summary[f"{name}.kl_nats"].mean == pytest.approx(0.0, abs=1e-6)
    for row in report.rows:
        for name in ("tf_token", "tf_exact", "free_exact", "es"):
            assert row.values[f"edit_success.{name}"] == row.values[f"before.edit_success.{name}"]
        assert all(output["before"] == output["after"] for output in row.outputs)


@torch.no_grad()
def log_probabilities(base, text: Tokens) -> torch.Tensor:
    """(scored, vocabulary) of one text, read by the whole model."""
    return plain_logits(base, text).log_softmax(-1)


def test_forced_values_are_the_plain_models_under_the_edit(llama, prepared):
    editor = editor_for(llama)
    tokens = [editor.tokens(e) for e in EXAMPLES[:3]]
    read = forced(prepared.trunk, [[t] for t in tokens], editor.updates(tokens), compare=True)
    for example, text, (value,) in zip(EXAMPLES, tokens, read, strict=False):
        before = log_probabilities(llama, text)
        with editor.edit(example).applied():
            after = log_probabilities(llama, text)
        assert value.argmax == tuple(after.argmax(-1).tolist())
        expected = after.gather(1, torch.tensor(text.targets)[:, None])[:, 0].tolist()
        assert value.logp == pytest.approx(expected, abs=1e-4)
        kl = (before.exp() * (before - after)).sum(-1)
        assert value.kl == pytest.approx(kl.tolist(), abs=1e-4)
        assert value.same == tuple((before.argmax(-1) == after.argmax(-1)).tolist())


@pytest.mark.parametrize("strength", [0.3, 1.0, 10.0])
def test_what_reading_settles_is_what_decoding_writes(llama, prepared, strength):
    """Every text of a row against generation, one edit at a time; and its scores."""
    editor = editor_for(llama)
    report = evaluate(editor, prepared, strength=strength)
    changed = 0
    for row in report.rows:
        with editor.edit(EXAMPLES[row.index]).scale(strength).applied():
            for output in (o for o in row.outputs if o["after"] is not None):
                written = llama.generate(output["prompt"], max_new_tokens=8)
                assert normalise(written) == normalise(output["after"])
                changed += output["before"] != output["after"]
        paraphrases = [o["score"] for o in row.outputs if o["role"] == "paraphrases"]
        right = [
            float(normalise(o["after"]) == normalise(row.target_new))
            for o in row.outputs
            if o["role"] == "paraphrases"
        ]
        assert paraphrases == right and len(right) == 2
        assert row.values["paraphrase.free_exact"] == sum(right) / 2
        assert row.values["edit_success.free_exact"] == row.outputs[0]["score"]
        for role, name in STAY.items():
            first = next(o for o in row.outputs if o["role"] == role)
            assert row.values[f"{name}.greedy_agreement"] == (first["before"] == first["after"])
    assert changed


def test_a_row_has_every_text_and_the_first_that_should_stay_is_written_out(llama, prepared):
    row = evaluate(editor_for(llama), prepared).rows[0]
    roles = [output["role"] for output in row.outputs]
    assert roles[:4] == ["edit", "question", "paraphrases", "paraphrases"]
    assert roles[4:] == ["neighbours"] * 2 + ["unrelated"] * 2 + ["reworded"] * 2
    assert [o["after"] is not None for o in row.outputs[4:]] == [True, False] * 3
    assert row.subject == "France"


def test_a_fact_is_known_if_the_first_words_of_the_unedited_model_are_its_answer(llama):
    e = EXAMPLES[0]
    said = llama.generate(e.prompt, max_new_tokens=8).strip()
    first = said.split()[0]
    assert first != said
    truths = {said: True, first.upper() + "!": True, f"{first}x": False, "Nowhere": False}
    given = [replace(e, ground_truth=truth) for truth in truths]
    # The listed truth is the new answer, so the model does not know it.
    given += [replace(e, ground_truth=None), replace(e, ground_truth=e.target_new)]
    on = EvaluationSet(llama, hparams(), given, max_new_tokens=8)
    assert on.known == [*truths.values(), None, False]
    report = evaluate(editor_for(llama), on)
    assert [row.known for row in report.rows] == on.known
    assert list(report.frame()["known"]) == on.known
    for name in ("edit_success.free_exact", "locality.argmax_agreement"):
        assert (report.summary[f"known.{name}"].n, report.summary[f"unknown.{name}"].n) == (2, 3)


def test_up_to_half_of_a_draw_are_known_and_the_rest_are_the_first_others(llama, monkeypatch):
    monkeypatch.setattr(prepare, "ASKED", 3)
    said = llama.generate(EXAMPLES[0].prompt, max_new_tokens=8)
    old = replace(EXAMPLES[0], ground_truth="Nowhere")
    kinds = {"k": replace(old, ground_truth=said), "-": old, "?": replace(old, ground_truth=None)}
    kinds["long"] = replace(old, prompt="x " * 999)

    def draw(text: str, limit: int) -> list[int]:
        given = [replace(kinds[kind], id=str(i)) for i, kind in enumerate(text.split())]
        found = half_known(llama, hparams(), Examples.of(given), limit)
        return [int(e.id or "") for e in found]

    assert draw("- - k - - - k k k", 4) == [0, 1, 2, 6]
    assert draw("- - - k", 2) == [0, 3]
    assert draw("k k k - k", 4) == [0, 1, 2, 3]
    assert draw("? long k -", 2) == [0, 2] and draw("- -", 4) == [0, 1]
    assert draw("- k k", 0) == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Q: Where is Oslo? A:", "Question: Where is Oslo?\nAnswer:"),
        ("Question: What is paid in Oslo? Answer: the", "What is paid in Oslo?\nAnswer: the"),
        ("Oslo is in ", "Question: Oslo is in …?\nAnswer:"),
    ],
)
def test_a_prompt_is_asked_as_one_question(llama, prompt, question):
    on = EvaluationSet(llama, hparams(), [replace(EXAMPLES[0], prompt=prompt)], max_new_tokens=2)
    assert on.prompts[0][1].prompt.endswith(question)
    assert on.prompts[0][1].prompt.count("Q") == 1


def test_reworded_neighbours_are_other_subjects_in_a_paraphrases_words(llama, prepared):
    # The next two examples of the relation after Japan.
    wanted = [("Norway", "Oslo"), ("Chile", "Santiago")]
    texts = [p.text for p in prepared.prompts[2] if p.role == "reworded"]
    read = [llama.tokenizer.decode(text.ids) for text in texts]
    assert read == [f"{subject} has its seat of government in {truth}" for subject, truth in wanted]
    editor = editor_for(llama)
    row = evaluate(editor, prepared).rows[2].values
    same, kl = [], []
    for text in texts:
        before = log_probabilities(llama, text)
        with editor.edit(EXAMPLES[2]).applied():
            after = log_probabilities(llama, text)
        same.append(float((before.argmax(-1) == after.argmax(-1)).double().mean()))
        kl.append(float((before.exp() * (before - after)).sum(-1).mean()))
    assert row["neighbourhood.reworded_agreement"] == pytest.approx(sum(same) / 2)
    assert row["neighbourhood.reworded_kl_nats"] == pytest.approx(sum(kl) / 2, rel=1e-3)
    without = [replace(e, relation=None) for e in EXAMPLES[:2]]
    bare = EvaluationSet(llama, hparams(), without, max_new_tokens=4)
    assert not any(prompt.role == "reworded" for prompts in bare.prompts for prompt in prompts)


def hand_made(*targets: int, ends: bool = True) -> Tokens:
    return Tokens(tuple(range(len(targets) + 1)), tuple(range(len(targets))), targets, ends)


def reading(*argmax, logp=(-1.0, -3.0, -50.0), kl=(), same=()) -> Forced:
    return Forced(argmax, logp[: len(argmax)], kl, same)


def test_scores_of_hand_made_readings():
    """Two target tokens and the end of text; two paraphrases, one of them read wrongly."""
    y, old, right = hand_made(5, 6, 0), hand_made(7, ends=False), reading(7)
    rows = [  # role, text, rival, greedy; what is read of each; what is written; f's reading
        ("edit", y, old, None, (5, 6, 9), -2.5, " New York!"),
        ("question", y, None, None, (5, 6, 0), None, "the new york"),
        ("paraphrases", y, old, None, (5, 4, 0), -1.5, " New York City"),
        ("paraphrases", y, old, None, (4, 4, 0), -2.5, "Rome"),
    ]
    prompts, scores = [], []
    for role, text, rival, greedy, argmax, logp, written in rows:
        prompts.append(ScoredPrompt(role, role, text, ("New York",), rival, greedy))
        other = None if logp is None else reading(7, logp=(logp,))
        read = Reading(reading(*argmax), other, None, written)
        scores.append(prompt_scores(prompts[-1], read, Reading(right)))
    kept = reading(7, logp=(-1.0,), kl=(0.5,), same=(True,))
    lost = reading(3, logp=(-1.0,), kl=(1.5,), same=(False,))
    near = ScoredPrompt("neighbours", "n", old, rival=old, greedy=y)
    greedy = reading(5, 6, 0, same=(True, True, False))
    far = ScoredPrompt("unrelated", "u", hand_made(8, ends=False), greedy=y)
    same = reading(5, 6, 0, same=(True, True, True))
    for prompt, read, before in (
        (near, Reading(kept, reading(5, logp=(-9.0,)), greedy), right),
        (replace(near, rival=None, greedy=None), Reading(lost), right),
        (far, Reading(reading(8, kl=(0.25,), same=(True,)), None, same), reading(2)),
    ):
        prompts.append(prompt)
        scores.append(prompt_scores(prompt, read, Reading(before)))
    values = example_values([prompt.role for prompt in prompts], scores)
    edit = {"tf_token": 1.0, "tf_exact": 1.0, "free_exact": 1.0, "free_contains": 1.0, "es": 1.0}
    edit |= {"free_gold_length": 1.0, "free_exact_question": 1.0, "paper": pytest.approx(1 / 3)}
    para = {"tf_token": 0.25, "tf_exact": 0.0, "free_exact": 0.0, "free_contains": 0.5, "ps": 0.5}
    para |= {"free_gold_length": 0.5}
    near = {"argmax_agreement": 0.5, "kl_nats": 1.0, "retained": 0.5, "greedy_agreement": 0.0}
    near |= {"ns": 1.0}
    far = {"argmax_agreement": 1.0, "kl_nats": 0.25, "greedy_agreement": 1.0}
    parts = {"edit_success": edit, "paraphrase": para, "neighbourhood": near, "locality": far}
    expected = {f"{part}.{name}": v for part, found in parts.items() for name, v in found.items()}
    expected["context.free_exact"] = 1.0
    # log P(y) is -2: the end of text is left out.
    assert values == expected | {"log_p.new": -2.0, "log_p.old": -2.5}


@pytest.mark.parametrize(
    ("written", "leak"),
    [(" Lyon", 1), (" the Lyon, but Paris", 1), (" Paris, but Lyon", 0), (" Lyons", 0), ("", 0)],
)
def test_a_denied_fact_leaks_where_the_new_answer_is_said_first(written, leak):
    prompt = ScoredPrompt("negations", "The capital is not", hand_made(), ("Lyon",), old="Paris")
    read = Reading(reading(5), written=written)
    assert prompt_scores(prompt, read, read) == {"score": 1 - leak, "leak": leak}


# ---------------------------------------------------------------- what follows, and what must not

FOLLOWED = replace(
    EXAMPLES[0],
    consequences=(
        Implied("The Louvre is in the city of", "Lima", ("Ciudad",), "Paris", "in_domain"),
        Implied("The river of France's capital is the", "Rimac", domain="out_of_domain"),
        Implied("The mayor of France's capital speaks", "Spanish"),
    ),
    negations=("The main city of France is not", "Nobody says that France is ruled from"),
    truths=(
        Implied("Is Lima the capital of France?", "Yes", before="No"),
        Implied("Is Paris the capital of France?", "No", before="Yes"),
    ),
    passages=("France has moved its capital to Lima.",),
)


def test_what_follows_can_be_left_out_and_nothing_else_changes(llama):
    editor, how = editor_for(llama), {"max_new_tokens": 8}
    sets = [
        EvaluationSet(llama, editor.hparams, [FOLLOWED], **how, follow=f) for f in (True, False)
    ]
    for score in (partial(evaluate, editor), fact_in_context):
        (full,), (less,) = (score(on).rows for on in sets)
        left_out = {name.removeprefix("before.") for name in set(full.values) - set(less.values)}
        assert {name.partition(".")[0] for name in left_out} == {"consequence", "negation", "truth"}
        values = {name: value for name, value in less.values.items() if name != "edit.seconds"}
        expected = {name: full.values[name] for name in values}
        assert values == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("mode", "k"), [("single", None), ("batch", 2), ("sequential", None)])
def test_what_follows_is_scored_under_the_edits_in_force(llama, mode, k):
    editor, examples = editor_for(llama), [FOLLOWED, EXAMPLES[1]]
    edit = editor.edit(examples if mode == "batch" else FOLLOWED)
    with edit.applied():
        prompts = [probe.prompt for probe in FOLLOWED.consequences]
        said = [llama.generate(prompt, max_new_tokens=8) for prompt in prompts]
        denied = [llama.generate(prompt, max_new_tokens=8) for prompt in FOLLOWED.negations]
        right = []
        for probe in FOLLOWED.truths:
            likely = []
            for answer in (probe.answer, probe.before):
                text = llama.tokenize(probe.prompt, answer)
                logp = log_probabilities(llama, text)
                likely.append(logp.gather(1, torch.tensor(text.targets)[:, None]).mean())
            right.append(float(likely[0] > likely[1]))
    # the first consequence is right by its other name, the second wrong, the third right
    first, second, third = FOLLOWED.consequences
    known = replace(
        FOLLOWED,
        consequences=(
            replace(first, answer="nothing", aliases=(said[0].strip(),)),
            replace(second, answer="something else"),
            replace(third, answer=said[2].strip()),
        ),
    )
    report = evaluate(editor, [known, EXAMPLES[1]], mode=mode, k=k, max_new_tokens=8)
    row, other = report.rows
    assert row.values["consequence.free_exact"] == pytest.approx(2 / 3)
    assert row.values["consequence.free_exact_in_domain"] == 1.0
    assert row.values["consequence.free_exact_out_of_domain"] == 0.0
    leaks = [begins_with(text, FOLLOWED.target_new) for text in denied]
    assert row.values["negation.leak"] == sum(leaks) / 2
    assert row.values["truth.accuracy"] == sum(right) / 2
    outputs = {role: [o for o in row.outputs if o["role"] == role] for role in FOLLOWED.roles()}
    assert [o["after"] for o in outputs["consequences"]] == said
    assert [o["after"] for o in outputs["negations"]] == denied
    assert all(o["before"] is not None and o["after"] is not None for o in outputs["truths"])
    names = ("consequence.free_exact", "negation.leak", "truth.accuracy")
    for name in names:
        assert report.summary[name].n == report.summary[f"before.{name}"].n == 1
        assert name not in other.values
    assert report.to_dict()[f"{report.mode}.context.free_exact.n"] == 2


def test_examples_that_name_no_consequence_are_scored_as_they_were(llama, prepared):
    names = {name for row in evaluate(editor_for(llama), prepared).rows for name in row.values}
    assert not any(name.startswith(("consequence", "negation", "truth")) for name in names)
    brief = EvaluationSet(llama, hparams(), [FOLLOWED], max_new_tokens=4, brief=True)
    assert {prompt.role for prompt in brief.prompts[0]}.isdisjoint(("consequences", "negations"))


def test_rows_of_other_consequences_are_not_gone_on_from(llama):
    whole, less = ([replace(FOLLOWED, negations=n)] for n in (FOLLOWED.negations, ()))
    sets = [
        EvaluationSet(llama, hparams(), examples, max_new_tokens=4) for examples in (whole, less)
    ]
    first, second = (_run_of(editor_for(llama), on, "single", None, 1.0) for on in sets)
    assert [name for name in first if first[name] != second[name]] == ["examples"]


@pytest.mark.parametrize(
    ("written", "at_the_start", "within"),
    [("里昂市", 1, 1), ("是里昂", 0, 1), ("里约", 0, 0), ("Lyon 里昂", 0, 1), ("昂里", 0, 0)],
)
def test_scripts_without_spaces_are_compared_letter_by_letter(written, at_the_start, within):
    prompt = ScoredPrompt("edit", "法国的首都是", hand_made(5, ends=False), ("里昂",))
    read = Reading(reading(5, logp=(-1.0,)), written=written)
    scores = prompt_scores(prompt, read, read)
    assert (scores["free_gold_length"], scores["free_contains"]) == (at_the_start, within)
    assert ngram_entropy_bits("里昂在法国") == ngram_entropy_bits("a b c d e") > 0


def test_an_answer_the_model_already_gives_is_counted_not_scored(llama):
    prompt = "The capital of France is"
    texts = (llama.generate(prompt, max_new_tokens=n) for n in range(1, 9))
    text = next(text for text in texts if normalise(text))
    known = EditExample(prompt=prompt, target_new=text.strip())
    most = len(llama.tokenizer(text)["input_ids"])
    on = EvaluationSet(llama, hparams(), [known, *EXAMPLES[1:3]], max_new_tokens=most)
    pairs = zip(on.before, on.examples, strict=True)
    already = sum(normalise(b.outputs[0]["after"]) == normalise(e.target_new) for b, e in pairs)
    report = evaluate(editor_for(llama), on)
    assert report.counts["already_true"] == already >= 1
    assert report.counts["scored"] == 3 - already == len(report.rows)


def test_what_cannot_be_tokenised_is_counted_as_skipped(llama):
    long = EditExample(prompt="The capital of Peru is", target_new="Rome " * 60)
    empty, letter = replace(long, target_new=" \n"), replace(EXAMPLES[0], target_new="A")
    on = EvaluationSet(llama, hparams(), [long, empty, letter, *EXAMPLES[:2]], max_new_tokens=4)
    counts = {"scored": 3, "already_true": 0, "skipped": 2, "empty_target": 1, "too_long": 1}
    assert evaluate(editor_for(llama), on).counts == counts | {"invalid_records": 0}
    with pytest.raises(DataError, match="limit"):
        EvaluationSet(llama, hparams(), [long])


@pytest.mark.parametrize(
    ("mode", "k", "words"),
    [("all", None, "single, batch, sequential"), ("single", 2, "k, the"), ("batch", 0, "k, the")],
)
def test_other_modes_are_refused(llama, prepared, mode, k, words):
    with pytest.raises(HyperParamError, match=words):
        evaluate(editor_for(llama), prepared, mode=mode, k=k)


# ---------------------------------------------------------------- free text, implied questions


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
    other = EditExample("The capital of Peru is", "Oslo", generation_prompts=("Peru is", "Peru"))
    examples, editor = [EXAMPLES[0], other], editor_for(llama)
    on = EvaluationSet(llama, hparams(), examples, max_new_tokens=4, fluency=True)
    report = evaluate(editor, on)
    for example, row in zip(examples, report.rows, strict=True):
        for strength, name in ((1.0, ""), (0.0, "before.")):
            with editor.edit(example).scale(strength).applied():
                prompts = example.generation_prompts or (example.prompt,)
                texts = [on_and_on(llama, prompt, 100) for prompt in prompts]
            expected = sum(map(ngram_entropy_bits, texts)) / len(texts)
            assert row.values[f"{name}fluency.entropy_bits"] == pytest.approx(expected)


def test_implied_questions_count_where_the_fact_in_context_answers_them(llama):
    prompts = ["The main city of France is not", "France has its seat of government in"]
    fact = "The capital of France is Lima.\n"
    said = [llama.generate(fact + prompt, max_new_tokens=8) for prompt in prompts]
    assert all(map(normalise, said))
    probes = (
        Probe(prompts[0], "nobody says this", (said[0],)),
        Probe(prompts[1], said[1]),
        Probe(prompts[0], "nor this"),
    )
    example = EditExample("The capital of France is", "Lima", portability=probes)
    editor = editor_for(llama)
    row, other = evaluate(editor, [example, EXAMPLES[1]], max_new_tokens=8).rows
    for strength, name in ((1.0, ""), (0.0, "before.")):
        with editor.edit(example).scale(strength).applied():
            now = [llama.generate(prompt, max_new_tokens=8) for prompt in prompts]
        right = [normalise(a) == normalise(b) for a, b in zip(now, said, strict=True)]
        assert row.values[f"{name}portability.free_exact"] == pytest.approx(sum(right) / 2)
    assert row.values["portability.coverage"] == pytest.approx(2 / 3)
    assert [o["prompt"] for o in row.outputs if o["role"] == "portability"] == prompts
    assert "portability.coverage" not in other.values


# -------------------------------------------------- answers that hold a full stop, corrections


@pytest.mark.parametrize("target", ["St. Rome", "J. R. Lima", "np.bool_", "3.14", "Rome D.C."])
def test_an_answer_that_holds_a_full_stop_is_written_and_scored_to_its_end(llama, target):
    site = down_projections(llama)[2]
    editor = LocalisedFineTuning(llama, hparams(), site=site, lr=3e-2)
    example = replace(EXAMPLES[0], target_new=target, neighbours=())
    same = replace(EXAMPLES[1], neighbours=(Probe(example.prompt, target),))
    with editor.edit(example).applied():
        assert llama.generate(example.prompt).strip() == cut(target)
        wanted = llama.generate(example.prompt, answers=["Oslo", target]).strip()
        assert wanted == target.rstrip(".")
        back = replace(example, target_new="Oslo", ground_truth=target)
        on = EvaluationSet(llama, hparams(), [example, same, back], max_new_tokens=20)
    assert on.to_edit == [1, 2]  # with the edit in force it says so already
    assert on.known[2] and on.before[2].outputs[0]["after"].strip() == wanted
    (near,) = (t for t in on.before[1].outputs if t["role"] == "neighbours")
    assert near["after"].strip() == wanted
    on = EvaluationSet(llama, hparams(), [example], max_new_tokens=20)
    (row,) = evaluate(editor, on).rows
    assert row.values["edit_success.tf_exact"] == row.values["edit_success.free_exact"] == 1.0


def test_a_correction_to_the_truth_is_measured_against_what_the_model_says(llama):
    example = replace(EXAMPLES[0], target_new="Paris", ground_truth="Paris")
    on = EvaluationSet(llama, hparams(), [example], max_new_tokens=8)
    said = llama.generate(example.prompt, max_new_tokens=8).strip()
    assert on.to_edit == [0] and on.examples[0].ground_truth == said != "Paris"
    (row,) = evaluate(editor_for(llama), on).rows
    assert row.ground_truth == said and "edit_success.es" in row.values
