"""Bad input of every kind: an error of ours that names the place, or a right result.

hypothesis draws the input.
"""

import gzip
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mendkit.data.examples import EditExample, Probe, join
from mendkit.data.files import read_examples
from mendkit.data.layouts import ANSWERS, NAMES, PAIRS, parse
from mendkit.data.records import UNFOLD
from mendkit.errors import DataError, HyperParamError, MendkitError
from mendkit.evaluation.evaluate import EvaluationSet
from mendkit.hparams import EARLY_STOP_KEYS, MENDHyperParams
from mendkit.mend.batches import usable
from mendkit.mend.editor import MENDEditor
from mendkit.mend.hypernetwork import MEND
from tests.oracles.attacks import ODD_VALUES, with_each_replaced
from tests.oracles.claims import EXAMPLES, scrambled, with_statistics
from tests.oracles.records import EVERY_LAYOUT
from tests.oracles.tiny import END, tiny_llama

few = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NASTY = (
    *("", " ", "\n", "\t \r\n", "\x00", "\x1b[31mred\x07", "\u200b", "\ufeff", "\u202egnirts"),
    *("\ud800", "\udfff!", "Zürich", "東京", "القاهرة", "🙂👩‍👩‍👧", "e\u0301", "ﬁ", "𝔘𝔫𝔦", "नमस्ते"),
    *("<script>alert(1)</script>", "{{x}}", "${HOME}", "%s %d", "'; DROP TABLE x", "[a](x)", "\\"),
    *(END, f"{END} Paris", "null", "nan", "a" * 3000, "a b " * 600, "...", "The", "Paris\nand"),
)
COMMON = ("The capital of France is", "Lima")
texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=12), st.sampled_from(COMMON))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def said(call, *arguments, error=MendkitError, **named):
    """What a call gives, or the message of an error of ours; any other error fails the test."""
    try:
        return call(*arguments, **named)
    except error as problem:
        assert str(problem).strip()
        return str(problem)


def as_bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")


@few
@given(st.one_of(st.text(max_size=200), st.binary(max_size=200), st.sampled_from(NASTY)))
@example("&a [*a]")
@example("model_name: m\nlr: !!python/object/apply:os.system ['true']\n")
@example("model_name: m\n? [a, b]\n: 1\n")
@example("a: &x [1, 2]\nb: [*x, *x, *x, *x]\nmodel_name: m\n")
def test_any_file_is_hyperparameters_or_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(as_bytes(content))
    found = said(MENDHyperParams.from_hparams, path, error=HyperParamError)
    assert isinstance(found, MENDHyperParams) or found.startswith(str(path))


KEYS = [*MENDHyperParams.model_fields, "alg", "half", "dropout", "nonsense", ""]
keys = st.sampled_from(KEYS) | texts
EXTREME = [*EARLY_STOP_KEYS, "auto", "1e-6", "20GB", 10**400, 2**64, -1, 0, 1, 0.5]


@few
@given(st.dictionaries(keys, st.one_of(values, st.sampled_from(EXTREME)), max_size=4))
@example({"lr": 10**5000})
@example({"rank": 10**5000})
@example({"cache_bytes": "9" * 5000})
@example({"texts_per_role": [1, 2, 10**5000]})
def test_any_values_are_settings_that_come_back_or_an_error_that_names_the_key(given_values):
    given_values = {"model_name": "m"} | given_values
    found = said(MENDHyperParams(model_name="m").replace, **given_values)
    if isinstance(found, str):
        assert any(key in found or repr(key) in found for key in given_values), found
    else:
        assert MENDHyperParams(**json.loads(json.dumps(found.to_dict()))) == found
        assert not any(value != value for value in found.to_dict().values())  # no NaN


NAMES_IN_FILES = sorted(
    {*" ".join(NAMES.values()).replace("*", "x").split(), *PAIRS, *ANSWERS, *UNFOLD}
)
records = st.one_of(
    values,
    st.dictionaries(st.sampled_from(NAMES_IN_FILES), values, max_size=6),
    st.fixed_dictionaries(
        {"prompt": texts, "target_new": texts},
        optional={name: values for name in ("subject", "paraphrases", "neighbours", "pred", "id")},
    ),
)


def check_whole(*examples: EditExample) -> None:
    """Every text of an example is one: not blank, and Unicode."""
    for e in examples:
        found = [e.subject, e.ground_truth, e.relation, e.id, e.prompt, e.target_new]
        for probe in (probe for probes in e.roles().values() for probe in probes):
            found += [probe.prompt, probe.answer, *probe.aliases]
        assert e.prompt and e.target_new
        for value in found:
            assert value is None or (isinstance(value, str) and value.strip() and value.encode())


@few
@given(records)
@example({"prompt": "\ud800", "target_new": "x"})
@example({"prompt": "a", "target_new": "x", "id": 10**5000})
def test_any_record_is_an_example_or_an_error_that_names_a_field(record):
    found = said(parse, record, error=DataError)
    if isinstance(found, str):
        assert "field" in found or "object" in found
    else:
        check_whole(*found[0])


@pytest.mark.parametrize("record", EVERY_LAYOUT)
def test_any_value_anywhere_in_a_record_of_any_layout_is_read_or_refused_by_its_field(record):
    check_whole(*parse(record)[0])
    for odd in ODD_VALUES:
        for changed in with_each_replaced(record, odd):
            found = said(parse, changed, error=DataError)
            if isinstance(found, str):
                assert "field" in found, changed
            else:
                check_whole(*found[0])


@few
@given(
    st.one_of(st.text(max_size=80), st.binary(max_size=80)),
    st.sampled_from(["x.json", "x.csv", "x.txt", "x.jsonl.gz"]),
)
@example("[" * 100_000, "x.json")
@example('{"records": 3}', "x.json")
@example('{"a": ' + "9" * 5000 + "}", "x.json")
@example('a,"b\n', "x.csv")
@example("a\x00b,c\n1,2\n", "x.csv")
@example('"' + "a" * 200_000 + '"\n1\n', "x.csv")
def test_any_file_is_examples_or_an_error_that_names_it(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(as_bytes(content)) if name.endswith("gz") else as_bytes(content))
    for skip in (False, True):
        found = said(read_examples, path, skip_invalid=skip, error=DataError)
        assert isinstance(found, tuple) or found.startswith(str(path))


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
        assert any(word in found for word in ("no token", "limit", "Unicode"))
        return
    whole = base.tokenizer.decode(found.ids, clean_up_tokenization_spaces=False)
    assert whole == join(prompt, answer)
    assert found.targets == tuple(found.ids[p + 1] for p in found.scored)
    scored = base.tokenizer.decode(found.targets, clean_up_tokenization_spaces=False)
    blanks = len(prompt) - len(prompt.rstrip())
    answer = answer.rstrip()
    assert scored.endswith(answer) and len(scored) <= len(answer) + 1 + blanks


FRANCE = "The capital of France is"
requests = st.tuples(
    st.sampled_from([FRANCE, "The capital of Norway is"]) | texts,
    st.sampled_from(["Lima", "Rome", "Paris"]) | texts,
)


@settings(few, max_examples=15)
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
        assert edit in [message for message in alone if isinstance(message, str)]
    else:
        for name, change in edit.dense().items():
            total = sum(single.dense()[name] for single in alone)
            torch.testing.assert_close(change, total, rtol=1e-9, atol=1e-12)
            assert change.isfinite().all()
        with edit.applied():
            assert not torch.equal(editor.base.forward(probe, mask), before)
    assert torch.equal(editor.base.forward(probe, mask), before)


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
    some = [EXAMPLES[0], bad, EXAMPLES[2]]
    kept = usable(editor.base, editor.hparams, some)
    assert tuple(kept) == (EXAMPLES[0], EXAMPLES[2])
    assert [skip.where for skip in kept.skipped] == ["example 2"]
    assert "1 of 3" in caplog.text and "example 2" in caplog.text
    with pytest.raises(DataError, match="example 1"):
        usable(editor.base, editor.hparams, [bad])
    on = EvaluationSet(editor.base, editor.hparams, some, max_new_tokens=2)
    assert on.examples == [EXAMPLES[0], EXAMPLES[2]] and len(on.skipped) == 1
