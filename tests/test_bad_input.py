"""Bad input of every kind: an error of ours that names the place, or a right result (hypothesis draws the input)."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mendkit.data.examples import EditExample, Probe, join
from mendkit.data.files import read_examples, write_examples
from mendkit.data.layouts import LAYOUTS, OWN_FIELDS, parse
from mendkit.errors import DataError, HyperParamError, MendkitError
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.hparams import EARLY_STOP_KEYS, MENDHyperParams, parse_overrides
from mendkit.mend.batches import usable
from mendkit.mend.editor import MENDEditor
from mendkit.mend.hypernetwork import MEND
from tests.data.test_files import (
    COUNTERFACT,
    KNOWEDIT_ZSRE,
    LISTS,
    OWN,
    PORTABLE,
    RECENT,
    ROME,
    STRUCTURED,
    WIKIBIO,
    ZSRE,
)  # fmt: skip
from tests.oracles.attacks import ODD_VALUES, with_each_replaced
from tests.oracles.claims import EXAMPLES, scrambled, with_statistics
from tests.oracles.tiny import END, tiny_llama
from tests.test_hparams import FIELDS

few = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# ------------------------------------------------------------------------------------------------------- strategies

NASTY = (
    *(
        "",
        " ",
        "\n",
        "\t \r\n",
        "\x00",
        "\x1b[31mred\x07",
        "\u200b",
        "\ufeff",
        "\u202egnirts",
        "\ud800",
        "\udfff!",
    ),
    *("Zürich", "東京", "Москва", "القاهرة", "🙂👩‍👩‍👧", "e\u0301", "ﬁ", "𝔘𝔫𝔦", "नमस्ते"),
    *(
        "<b>bold</b>",
        "<script>alert(1)</script>",
        "{{x}}",
        "${HOME}",
        "%s %d",
        "'; DROP TABLE x",
        "[link](x)",
        "\\",
    ),
    *(
        END,
        f"{END} Paris",
        "null",
        "nan",
        "a" * 3000,
        "a b " * 600,
        "...",
        "The",
        ".",
        "Paris\nand more",
    ),
)
texts = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=12),
    st.sampled_from(["The capital of France is", "Lima"]),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    scalars,
    lambda own: st.lists(own, max_size=3) | st.dictionaries(texts, own, max_size=3),
    max_leaves=6,
)


def said(call, *arguments, error=MendkitError, **named):
    """What a call gives, or the message of an error of ours; any other error fails the test."""
    try:
        return call(*arguments, **named)
    except error as problem:
        assert str(problem).strip()
        return str(problem)


# --------------------------------------------------------------------------------------------------- hyperparameters


@few
@given(st.one_of(st.text(max_size=200), st.binary(max_size=200), st.sampled_from(NASTY)))
@example("&a [*a]")
@example("model_name: m\nlr: !!python/object/apply:os.system ['true']\n")
@example("model_name: m\n? [a, b]\n: 1\n")
@example("a: &x [1, 2]\nb: [*x, *x, *x, *x]\nmodel_name: m\n")
def test_any_file_is_hyperparameters_or_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    found = said(MENDHyperParams.from_hparams, path, error=HyperParamError)
    assert isinstance(found, MENDHyperParams) or found.startswith(str(path))


keys = st.sampled_from([*FIELDS, "alg", "half", "dropout", "nonsense", ""]) | texts
of_keys = st.one_of(
    values,
    st.sampled_from([*EARLY_STOP_KEYS, "auto", "1e-6", "20GB", 10**400, 2**64, -1, 0, 1, 0.5]),
)


@few
@given(st.dictionaries(keys, of_keys, max_size=4))
@example({"lr": 10**5000})
@example({"cache_bytes": "9" * 5000})
@example({"texts_per_role": [1, 2, 10**5000]})
def test_any_values_are_settings_that_come_back_or_an_error_that_names_the_key(given_values):
    given_values = {"model_name": "m"} | given_values
    found = said(MENDHyperParams(model_name="m").replace, **given_values)
    if isinstance(found, str):
        assert any(key in found or repr(key) in found for key in given_values), found
    else:
        assert MENDHyperParams(**json.loads(json.dumps(found.to_dict()))) == found
        assert {key: value for key, value in found.to_dict().items() if value != value} == {}


@few
@given(st.lists(st.one_of(texts, st.builds("{}={}".format, keys, texts)), max_size=3))
def test_any_overrides_are_typed_or_refused(overrides):
    found = said(parse_overrides, overrides, error=HyperParamError)
    assert (
        isinstance(found, dict)
        or "override" in found
        or any(o.split("=")[0] in found for o in overrides)
    )


# ----------------------------------------------------------------------------------------------------------- records

QUESTIONS = {
    "subject": "X", "relation": "made of", "object": "basalt", "question": "What is X made of?", "output_m": "Granite",
    "paraphrased_question": "From what is X made?", "locality_question": "Where is X?",
    "question_2hop": "What mineral?", "answer_2hop": "Olivine",
}  # fmt: skip

FIELD_NAMES = sorted(
    {*OWN_FIELDS, *LAYOUTS, "locality_ground_truth", "answers", "alt", "loc", "rephrase", "output"}
)
records = st.one_of(
    values,
    st.dictionaries(st.sampled_from(FIELD_NAMES), values, max_size=6),
    st.fixed_dictionaries(
        {"prompt": texts, "target_new": texts}, optional={name: values for name in OWN_FIELDS[2:]}
    ),
)


def is_text(value: str | None) -> bool:
    return value is None or (
        isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    )


def is_whole(e: EditExample) -> bool:
    """Whether every text of an example is one: not blank, and Unicode."""
    probes = (*e.neighbours, *e.unrelated, *e.portability)
    own = (
        e.prompt,
        e.target_new,
        e.subject,
        e.ground_truth,
        e.relation,
        e.id,
        *e.paraphrases,
        *e.generation_prompts,
    )
    return all(map(is_text, (*own, *(t for p in probes for t in (p.prompt, p.answer, *p.aliases)))))


@few
@given(records)
@example({"prompt": "\ud800", "target_new": "x"})
@example({"prompt": "a", "target_new": "x", "id": 10**5000})
def test_any_record_is_an_example_or_an_error_that_names_a_field(record):
    found = said(parse, record, error=DataError)
    assert (
        is_whole(found) if isinstance(found, EditExample) else "field" in found or "object" in found
    )


@pytest.mark.parametrize(
    "record",
    [
        COUNTERFACT,
        ZSRE,
        OWN,
        ROME,
        RECENT,
        WIKIBIO,
        KNOWEDIT_ZSRE,
        LISTS,
        STRUCTURED,
        PORTABLE,
        QUESTIONS,
    ],
)
def test_any_value_anywhere_in_a_record_of_any_layout_is_read_or_refused_by_its_field(record):
    assert is_whole(parse(record))
    for odd in ODD_VALUES:
        for changed in with_each_replaced(record, odd):
            found = said(parse, changed, error=DataError)
            assert is_whole(found) if isinstance(found, EditExample) else "field" in found, changed


@few
@given(st.lists(records, min_size=1, max_size=4), st.integers(0, 3))
def test_a_bad_record_costs_only_itself_and_is_named(tmp_path, some, at):
    good = EXAMPLES[0]
    write_examples([good], tmp_path / "good")
    lines = [json.dumps(record) for record in some]
    lines.insert(at, (tmp_path / "good").read_text().strip())
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = read_examples(path, skip_invalid=True)
    bad = [
        n
        for n, line in enumerate(lines, 1)
        if isinstance(said(parse, json.loads(line), error=DataError), str)
    ]
    assert [skip.where for skip in found.skipped] == [f"{path}:{n}" for n in bad]
    assert good in found and len(found) == len(lines) - len(bad)
    if bad:
        assert said(read_examples, path, error=DataError).startswith(f"{path}:{bad[0]}: ")
    write_examples(found, path)
    assert tuple(read_examples(path)) == tuple(found)


@few
@given(
    st.one_of(st.text(max_size=80), st.binary(max_size=80)),
    st.sampled_from(["x.json", "x.csv", "x.jsonl"]),
)
@example("[" * 100_000, "x.json")
@example('{"records": 3}', "x.json")
@example('{"a": ' + "9" * 5000 + "}", "x.json")
@example('a,"b\n', "x.csv")
@example("a\x00b,c\n1,2\n", "x.csv")
@example('"' + "a" * 200_000 + '"\n1\n', "x.csv")
def test_any_file_is_examples_or_an_error_that_names_it(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    for skip in (False, True):
        found = said(read_examples, path, skip_invalid=skip, error=DataError)
        assert isinstance(found, tuple) or found.startswith(str(path))


# ---------------------------------------------------------------------------------------------- prompts and requests


@pytest.fixture(scope="module")
def editor() -> MENDEditor:
    base = tiny_llama(dtype=torch.float64, layers=2, d=8)
    mend = MEND(base.sites, MENDHyperParams(model_name="tiny", rank=2)).double()
    return MENDEditor(base, scrambled(with_statistics(base, mend)))


@few
@given(texts, texts)
@example("The capital of France is", "\ud800")
@example("\ud800", "Lima")
def test_a_target_is_tokenised_exactly_or_refused_by_name(editor, prompt, answer):
    base = editor.base
    found = said(base.tokenize, prompt, answer, error=DataError)
    if isinstance(found, str):
        assert "no token" in found or "limit" in found or "Unicode" in found
        return
    whole = base.tokenizer.decode(found.ids, clean_up_tokenization_spaces=False)
    assert whole == join(prompt, answer)
    assert found.targets == tuple(found.ids[p + 1] for p in found.scored)
    scored = base.tokenizer.decode(found.targets, clean_up_tokenization_spaces=False)
    assert scored.endswith(answer) and len(scored) <= len(answer) + 1 + len(prompt) - len(
        prompt.rstrip()
    )


@few
@given(st.lists(texts, min_size=1, max_size=3))
@example(["\ud800"])
def test_any_prompt_is_answered_or_refused_and_a_batch_answers_as_each_alone(editor, prompts):
    alone = [said(editor.base.generate, p, max_new_tokens=2, error=DataError) for p in prompts]
    together = said(editor.base.generate_batch, prompts, max_new_tokens=2, error=DataError)
    if isinstance(together, list):
        assert together == alone
    else:
        assert together in alone


requests = st.tuples(
    st.sampled_from(["The capital of France is", "The capital of Norway is"]) | texts,
    st.sampled_from(["Lima", "Rome", "Paris"]) | texts,
)
FRANCE = "The capital of France is"


@settings(few, max_examples=20)
@given(st.lists(requests, min_size=1, max_size=3))
@example([(FRANCE, "Lima"), (FRANCE, "Lima")])
@example([(FRANCE, "Lima"), (FRANCE, "Oslo")])
@example([(FRANCE, "Paris")])
def test_any_batch_of_requests_is_the_sum_of_its_edits_or_refused_by_name(editor, batch):
    batch = [EditExample(prompt, target, ground_truth="Paris") for prompt, target in batch]
    probe = torch.tensor([editor.base.tokenize("The capital of Peru is").ids])
    mask = torch.ones_like(probe)
    before = editor.base.forward(probe, mask)
    alone = [said(editor.edit, request, error=DataError) for request in batch]
    edit = said(editor.edit, batch, error=DataError)
    if isinstance(edit, str):
        assert edit in [own for own in alone if isinstance(own, str)]
    else:
        for name, change in edit.dense().items():
            torch.testing.assert_close(
                change, sum(own.dense()[name] for own in alone), rtol=1e-9, atol=1e-12
            )
            assert change.isfinite().all()
        with edit.applied():
            assert not torch.equal(editor.base.forward(probe, mask), before)
    assert torch.equal(editor.base.forward(probe, mask), before)


def test_contradictory_requests_in_a_batch_are_told(editor, caplog):
    caplog.set_level(logging.WARNING)
    editor.edit([EXAMPLES[0], EXAMPLES[0], EXAMPLES[1]])
    assert not caplog.records
    editor.edit([EXAMPLES[0], replace(EXAMPLES[0], target_new="Oslo")])
    assert "'The capital of France is' is given 2 answers: 'Lima', 'Oslo'" in caplog.text


def test_a_refused_request_leaves_a_session_as_it_was(editor):
    with editor.session() as session:
        session.edit(EXAMPLES[0])
        with pytest.raises(DataError, match="Peru"):
            session.edit([EXAMPLES[1], EditExample(prompt="The capital of Peru is", target_new="")])
        assert len(session.journal) == len(session.active) == 1
    assert not any(editor.base.site_module(site)._forward_hooks for site in editor.base.sites)


BAD = (
    EditExample(prompt="The capital of Peru is", target_new=""),
    EditExample(prompt="", target_new="Lima"),
    EditExample(prompt="The capital of Peru is", target_new="Rome " * 60),
    EditExample(prompt="word " * 600, target_new="Lima"),
    EditExample(prompt="The capital of \ud800 is", target_new="Lima"),
    replace(EXAMPLES[1], unrelated=(Probe("word " * 600),)),
)


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_example_costs_training_editing_and_scoring_only_itself(editor, bad, caplog):
    kept = usable(editor.base, editor.hparams, [EXAMPLES[0], bad, EXAMPLES[2]])
    assert tuple(kept) == (EXAMPLES[0], EXAMPLES[2]) and [skip.where for skip in kept.skipped] == [
        "example 2"
    ]
    assert "1 of 3" in caplog.text and "example 2" in caplog.text
    with pytest.raises(DataError, match="example 1"):
        usable(editor.base, editor.hparams, [bad])
    on = EvaluationSet(
        editor.base, editor.hparams, [EXAMPLES[0], bad, EXAMPLES[2]], max_new_tokens=2
    )
    assert on.examples == [EXAMPLES[0], EXAMPLES[2]] and len(on.skipped) == 1
