"""Reading editing data: every layout and kind of file, and errors that name place and remedy."""

import bz2
import csv
import gzip
import json
import logging
import lzma
import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest

from mendkit.data.examples import EditExample, Implied, Probe
from mendkit.data.files import read_examples, read_text, write_examples
from mendkit.data.layouts import NAMES, PAIRS, READ
from mendkit.errors import DataError
from tests.oracles.claims import EXAMPLES
from tests.oracles.records import (
    AKEW,
    ARGUMENTS,
    CANONICAL,
    CONVSENT,
    COUNTERFACT,
    HALLUEDIT,
    KNOWEDIT_ZSRE,
    MQUAKE,
    OWN,
    PORTABLE,
    QAEDIT,
    RECENT,
    RIPPLE,
    ROME,
    STRUCTURED,
    UNKE,
    WIKIBIGEDIT,
    WIKIBIO,
    ZSRE,
)
from tests.oracles.records import LISTS as SEVERAL


def write(path, records, *, lines=False):
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


X_MADE = ("Who made X?", "Bo", "X", "Al", ("X was made by whom?",))
NORWAY = EditExample(
    *("X is a citizen of", "Norway", "X", "Chile", ("Of which country is X a citizen?",)),
    relation="P27",
    id="1",
)
READ_AS = {
    "EasyEdit's CounterFact": (
        COUNTERFACT,
        EditExample(
            *("The mother tongue of X is", "Greek", "X", "French", ("X speaks",)),
            neighbours=(Probe("The mother tongue of Y is", "French"),),
            id="7",
        ),
    ),
    "MEND's zsRE": (ZSRE, EditExample(*X_MADE, unrelated=(Probe("nq question: who", "me"),))),
    "zsRE with portability": (
        PORTABLE,
        EditExample(
            *X_MADE,
            unrelated=(Probe("nq question: who", "me"),),
            portability=(Probe("Where was X's maker?", "Rome"),),
        ),
    ),
    "the authors' own file": (
        STRUCTURED,
        EditExample("Who made X?", "Bo", None, "Al", ("By whom was X made?",), id="s1"),
    ),
    "own": (
        OWN,
        EditExample(
            *("The capital of X is", "Lima"),
            paraphrases=("X is run from",),
            neighbours=(Probe("The capital of Y is", "Rome"), Probe("The capital of Z is")),
            relation="capital",
        ),
    ),
    "ROME's CounterFact": (
        ROME,
        EditExample(
            *("X plays the", "harp", "X", "viola", tuple(ROME["paraphrase_prompts"])),
            neighbours=(Probe("Y plays the", "viola"), Probe("Z plays the", "flute")),
            relation="P1303",
            id="3",
            generation_prompts=("X is known for",),
        ),
    ),
    "KnowEdit recent": (
        RECENT,
        EditExample(
            *("The birthplace of X is", "Bonn", "X"),
            unrelated=(Probe("The father of X is", "Y", ("Sir Y",)),),
            portability=(
                Probe("Is X German?", "yes", ("true",)),
                Probe("Its river is", "Rhine", ("Rhein",)),
            ),
        ),
    ),
    "KnowEdit WikiBio": (
        WIKIBIO,
        EditExample(
            *(WIKIBIO["text"], "He studied in London.", "X"),
            unrelated=(Probe("X worked in", "medicine"),),
        ),
    ),
    "KnowEdit zsRE": (
        KNOWEDIT_ZSRE,
        EditExample(
            *("Which family has X?", "Noctua", "X", "Aspido", ("What family is X of?",)),
            unrelated=(Probe("X rank", "genus"),),
            portability=(Probe("What are they called?", "Owls"),),
        ),
    ),
    "lists": (
        SEVERAL,
        EditExample(
            *("Where is X?", "Peru", "X", "Chad", ("In which state is X?", "X is where?")),
            unrelated=(Probe("Who is Y?", "Z"),),
            id="z0",
        ),
    ),
    "QAEdit": (
        QAEDIT,
        EditExample(
            *("Who made X?", "Bo", "X"),
            paraphrases=("X was made by whom?",),
            unrelated=(Probe("nq question: who", "me"),),
        ),
    ),
    "UnKE": (
        UNKE,
        EditExample(
            *("Why do they like X?", "They like X. It was made in a pit."),
            paraphrases=("What makes X dear?",),
            portability=(Probe("Where was X made?", "In a pit."),),
            id="e0",
        ),
    ),
    "RippleEdits": (
        RIPPLE,
        EditExample(
            *("The name of the country of citizenship of X is", "Norway", "X", "Nepal"),
            unrelated=(Probe("The name of the mother of X is", "Eve Bell", ("Eve",)),),
            consequences=(Implied("X's capital is", "Oslo"),),
            relation="COUNTRY_OF_CITIZENSHIP",
        ),
    ),
    "WikiBigEdit": (
        WIKIBIGEDIT,
        EditExample(
            *("Where is X?", "Harwick", "X"),
            paraphrases=("In which town is X?", "Matey, where be X?"),
            neighbours=(Probe("Where is Y?", "Elsfield"),),
        ),
    ),
    "ConvSent": (
        CONVSENT,
        EditExample("What of X?", "I love X.", "X", "I dislike X.", ("And X?",), id="0"),
    ),
    "canonical examples": (CANONICAL, EditExample("The capital of X is", "Oslo")),
    "EasyEdit's arguments": (
        ARGUMENTS,
        EditExample(
            *("The capital of X is", "Oslo", None, "Lima", ("X is run from",)),
            neighbours=(Probe("The capital of Y is", "Rome"),),
            unrelated=(Probe("Snow is", "white"),),
            portability=(Probe("X's river is", "Akers"),),
        ),
    ),
}


@pytest.mark.parametrize("name", READ_AS)
def test_every_layout_is_read_from_lines_arrays_and_objects_with_records(tmp_path, name):
    record, expected = READ_AS[name]
    for content in ([record], {"dataset": name, "records": [record]}, {"data": [record]}):
        assert tuple(read_examples(write(tmp_path / "x.json", content))) == (expected,)
    lines = write(tmp_path / "x.jsonl", [record, record], lines=True)
    assert tuple(read_examples(lines)) == (expected, expected)


def test_a_record_of_several_edits_gives_them_all_and_says_what_it_leaves_out(tmp_path):
    one = read_examples(write(tmp_path / "m.json", [MQUAKE]))
    asked = tuple(Implied(text, "Oslo", (), "Santiago") for text in MQUAKE["questions"])
    assert one[0] == EditExample(**{**vars(NORWAY), "consequences": asked})
    assert not {"questions", "new_answer", "answer"} & one.left_out.keys()
    record = MQUAKE | {"new_answer_alias": ["Kristiania"]}
    named = read_examples(write(tmp_path / "n.json", [record]))[0].consequences[0]
    assert (named.answer, named.aliases) == ("Oslo", ("Kristiania",))
    several = read_examples(write(tmp_path / "a.json", [AKEW]))
    assert [(e.id, e.subject, e.target_new) for e in several] == [
        ("1.1", "X", "Norway"),
        ("1.2", "Y", "Norway"),
    ]
    assert not any(
        e.portability or e.consequences for e in several
    )  # these questions need both edits
    assert several.left_out["questions"] == 1 and several.left_out["fact_new_uns"] == 2
    columns = {"target_new": "fact_new_uns"}  # the long answer instead
    read = read_examples(tmp_path / "a.json", columns=columns, skip_invalid=True)
    assert [e.target_new for e in read] == [] or read[0].target_new.startswith("X left")


def test_mixed_layouts_lose_nothing_and_typos_are_refused(tmp_path):
    mixed = {**COUNTERFACT, **OWN, "unrelated": ["Snow is"], "id": "mine"}
    (example,) = read_examples(write(tmp_path / "x.json", [mixed]))
    assert set(example.paraphrases) == {"X speaks", "X is run from"}
    assert {probe.prompt[:21] for probe in example.neighbours} == {
        "The mother tongue of ",
        "The capital of Y is",
        "The capital of Z is",
    }
    assert (example.id, example.unrelated) == ("mine", (Probe("Snow is"),))
    named = {**COUNTERFACT, "id": "mine", "ground_truth": ["French", "la langue"]}
    read = read_examples(write(tmp_path / "x.json", [named]))
    assert read.left_out == {"id after the first": 1, "ground_truth after the first": 1}
    for typo, nearest in {
        "subjct": "subject",
        "localty": "locality",
        "rephrase_promt": "reph",
    }.items():
        with pytest.raises(DataError, match=rf"unknown field `{typo}`; the nearest is `{nearest}"):
            read_examples(write(tmp_path / "x.json", [{**COUNTERFACT, typo: "x"}]))
    with pytest.raises(DataError, match=r"neighbours\[0\]`: unknown field `anwser`"):
        wrong = {**OWN, "neighbours": [{"prompt": "p", "anwser": "a"}]}
        read_examples(write(tmp_path / "x.json", [wrong]))


def test_what_the_model_says_decides_and_not_the_listed_truth(tmp_path):
    def read(record):
        return read_examples(write(tmp_path / "x.json", [record]))[0]

    correction = {**ZSRE, "alt": "Al"}  # the truth; the model says "a"
    assert (read(correction).target_new, read(correction).ground_truth) == ("Al", "a")
    assert read({**correction, "pred": None}).ground_truth is None
    assert read({**KNOWEDIT_ZSRE, "target_new": "Aspido"}).ground_truth is None
    assert read({**ZSRE, "answers": []}).ground_truth == "a"
    with pytest.raises(DataError, match=r"says 'a' already .*nothing to edit"):
        read({**ZSRE, "alt": "a"})
    for needless in ("ground_truth", "locality_ground_truth", "rephrase_prompt", "subject"):
        assert read({k: v for k, v in COUNTERFACT.items() if k != needless}).target_new == "Greek"


def test_halluedit_tables(tmp_path):
    path = tmp_path / "h.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, HALLUEDIT)
        table.writeheader()
        table.writerows([HALLUEDIT, {**HALLUEDIT, "object": "Granite"}])
    with pytest.raises(DataError, match=r"h\.csv:3: the model says 'Granite' already"):
        read_examples(path)
    (example,) = read_examples(path, skip_invalid=True)
    assert example == EditExample(
        *("What is X made of?", "basalt", "X", "Granite", ("From what is X made?",)),
        unrelated=(Probe("Where is X?"),),
        relation="made of",
        portability=(Probe("What mineral?", "Olivine, mostly"),),
    )


LYON = ({"prompt": "The capital of France is", "target_new": "Lyon"},)
LINE = json.dumps(LYON[0]).encode()
TABLE = "prompt{0}target_new\nThe capital of France is{0}Lyon\n"
FILES = {
    "one.json": json.dumps(LYON[0], indent=1).encode(),
    "columns.json": json.dumps({key: [text] for key, text in LYON[0].items()}).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINE,
    "utf16.jsonl": LINE.decode().encode("utf-16"),
    "unmarked.jsonl": LINE.decode().encode("utf-16-le"),
    "utf32.jsonl": LINE.decode().encode("utf-32"),
    "crlf.jsonl": LINE + b"\r\n",
    "a.jsonl.gz": gzip.compress(LINE),
    "named wrongly.jsonl": gzip.compress(LINE),
    "a.json.bz2": bz2.compress(LINE),
    "a.json.xz": lzma.compress(LINE),
    "a.csv": TABLE.format(",").encode(),
    "a.tsv": TABLE.format("\t").encode(),
    "semicolon.csv": TABLE.format(";").encode(),
    "a.txt": TABLE.format("\t").encode("utf-16"),
    "a.csv.gz": gzip.compress(TABLE.format(",").encode()),
    "nan.json": LINE[:-1] + b', "subject": NaN, "id": null}',
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert tuple(read_examples(tmp_path / name)) == (EditExample(**LYON[0]),)


def test_lists_and_numbers_in_tables_are_lists_and_numbers(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "prompt,target_new,paraphrases,neighbours\n"
        'The treaty is of,1969,"[\'It is of\', \'Signed in\']","[{""prompt"": ""p""}]"\n'
        "[MASK] is [MASK],1970,\"['a', 'b']\",\n"
    )
    first, second = read_examples(path)
    assert first.target_new == "1969" and first.paraphrases == ("It is of", "Signed in")
    assert first.neighbours == (Probe("p"),)
    assert (second.prompt, second.paraphrases) == ("[MASK] is [MASK]", ("a", "b"))
    write(tmp_path / "n.json", [{"prompt": "The treaty is of", "target_new": 1969}])
    assert read_examples(tmp_path / "n.json")[0].target_new == "1969"


def test_a_column_without_name_is_left_out_and_a_cell_too_many_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(pd.DataFrame(LYON).to_csv())
    assert read_examples(path).left_out == {"index": 1}
    path.write_text("prompt,target_new\nIn May, it is,Lyon\n")
    with pytest.raises(DataError, match=r"x\.csv:2: more cells than columns; put .* in quotes"):
        read_examples(path, columns={"prompt": "prompt"})


def test_a_template_is_filled_and_code_is_not(tmp_path):
    made = {"prompt": "{} is in", "subject": "X", "target_new": {"str": "A"}}
    for record in (made, {"requested_rewrite": made}):
        assert read_examples(write(tmp_path / "x.json", record))[0].prompt == "X is in"
    code = {"prompt": "'{}'.format(1) calls", "subject": "format", "target_new": "A"}
    assert read_examples(write(tmp_path / "x.json", code))[0].prompt == code["prompt"]


def test_one_record_of_sentiments_is_no_table_of_columns(tmp_path):
    path = write(tmp_path / "x.json", CONVSENT | {"prompts": ["a?", "b?"], "pos": ["c", "d"]})
    assert len(read_examples(path)) == 1


def test_blank_texts_are_none_and_an_answer_without_prompt_is_counted(tmp_path):
    blank = dict.fromkeys(("subject", "relation", "rephrase", "unrelated", "mhop"), " ")
    read = read_examples(write(tmp_path / "x.json", {**LYON[0], **blank, "mhop_ans": "A"}))
    assert tuple(read) == (EditExample(**LYON[0]),) and read.left_out == {"mhop_ans": 1}


def test_parquet_is_read_by_pandas_or_refused_rightly(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1....PAR1")
    columns = {"prompt": ["P", "Q"], "target_new": ["T", "U"], "id": [7, None]}
    reader = Mock(return_value=pd.DataFrame({**columns, "paraphrases": [["R"], []]}))
    monkeypatch.setattr(pd, "read_parquet", reader)
    first = EditExample("P", "T", id="7", paraphrases=("R",))
    assert tuple(read_examples(path)) == (first, EditExample("Q", "U"))
    for error, told in {ImportError(): "pip install pyarrow", ValueError("x"): "damaged"}.items():
        reader.side_effect = error
        with pytest.raises(DataError, match=rf"x\.parquet: .*{told}"):
            read_examples(path)


def test_a_data_set_of_the_hub_is_read_with_columns(monkeypatch):
    frame = pd.DataFrame({"question": ["Who made X?"], "new": ["Bo"], "url": ["http"]})
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if split == "nowhere":
            raise ValueError("Unknown split\nand more")
        return SimpleNamespace(to_pandas=lambda: frame)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    columns = {"target_new": "new", "metadata": ["url"]}
    (example,) = read_examples("hf:owner/name", columns=columns)
    assert example == EditExample("Who made X?", "Bo") and example.metadata == {"url": "http"}
    read_examples("hf:owner/name:validation", columns=columns)
    assert asked == [("owner/name", "train"), ("owner/name", "validation")]
    with pytest.raises(DataError, match="hf:owner/name:nowhere: Unknown split; expected hf:"):
        read_examples("hf:owner/name:nowhere")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs `datasets`: pip install"):
        read_examples("hf:owner/name")


def test_columns_read_any_names_and_are_checked(tmp_path, caplog):
    path = write(tmp_path / "x.json", [{"q": "Who made X?", "a": "Bo", "alt": "no", "url": 1}])
    columns = {"prompt": "q", "target_new": "a"}
    read = read_examples(path, columns=columns)
    assert tuple(read) == (EditExample("Who made X?", "Bo"),)
    assert read.left_out == {"alt": 1, "url": 1}
    with pytest.raises(DataError, match="columns: no record has 'aa'; the nearest: a, alt,"):
        read_examples(path, columns=columns | {"target_new": "aa"})
    with pytest.raises(DataError, match="columns: no field 'promt'; the nearest: prompt,"):
        read_examples(path, columns={"promt": "q"})
    table = write(tmp_path / "z.json", [{"q": "Q", "a": "A", "near": "N", "said": ["B", "C"]}])
    halves = {"locality_prompt": "near", "locality_ground_truth": "said"}
    (example,) = read_examples(table, columns=columns | halves)
    assert example == EditExample("Q", "A", neighbours=(Probe("N", "B", ("C",)),))
    plain = write(tmp_path / "y.json", LYON)
    assert len(read_examples(plain, columns=columns)) == 1  # another file of the same run
    assert "none of the names in `columns`" in caplog.text
    assert len(read_examples("facts:test", columns=columns, limit=1)) == 1


def test_metadata_are_kept_and_change_nothing(tmp_path):
    record = {**LYON[0], "_split": "a", "metadata": {"n": 1}, "url": "u"}
    path = write(tmp_path / "x.json", [record])
    with pytest.raises(DataError, match=r"`columns: \{metadata: \[url\]\}` keeps it"):
        read_examples(path)
    examples = read_examples(path, columns={"metadata": ["url"]})
    assert examples[0].metadata == {"_split": "a", "n": 1, "url": "u"}
    assert examples[0] == EditExample(**LYON[0])
    write_examples(examples, tmp_path / "y.jsonl")
    assert read_examples(tmp_path / "y.jsonl")[0].metadata == examples[0].metadata


def test_own_form_round_trips_and_its_lines_end_at_newlines_only(tmp_path):
    probe = Probe("p", "a", ("b",))
    odd = EditExample("A\u2028X is", "Rome", portability=(probe,), generation_prompts=("g",))
    follow = EditExample(
        *("The capital of X is", "Lima"),
        consequences=(
            Implied("X's mayor speaks", "Spanish", ("Castilian",), "Greek", "in_domain"),
        ),
        negations=("The capital of X is not",),
        truths=(Implied("Is it Lima?", "Yes", before="No"),),
        passages=("X moved its capital to Lima.",),
    )
    write_examples([*EXAMPLES, odd, follow], tmp_path / "x.jsonl")
    assert tuple(read_examples(tmp_path / "x.jsonl")) == (*EXAMPLES, odd, follow)
    lines = (tmp_path / "x.jsonl").read_text().split("\n")
    assert not re.search("consequences|negations|truths|passages", "".join(lines[:-2]))
    # training's checksum of the data is of what it reads
    assert repr(follow) == repr(EditExample("The capital of X is", "Lima"))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_kits_own_facts_are_read_by_name(split, caplog):
    caplog.set_level(logging.INFO)
    examples = read_examples(f"facts:{split}")
    assert len(examples) > 100 and caplog.text == ""
    assert all(e.ground_truth and e.paraphrases and e.neighbours and e.unrelated for e in examples)


NO_ANSWERS = {"locality": {"Forgetfulness": [{"ground_truth": "a"}]}}
WRONG = [
    ({**OWN, "prompt": ""}, "`prompt` is empty"),
    ({**OWN, "target_new": None}, "`target_new` is missing .*expected at least {"),
    ({**OWN, "prompt": 3}, "`prompt` must be text, is 3"),
    ({**OWN, "src": "another"}, "`prompt` is given under two names"),
    ({**OWN, "paraphrases": 3}, "`paraphrases` must be a list"),
    ({**OWN, "paraphrases": ["x", 1]}, r"`paraphrases\[1\]`"),
    ({**OWN, "neighbours": [{"prompt": ""}]}, r"`neighbours\[0\]` is empty"),
    ({**OWN, "promt": "x"}, "unknown field `promt`; the nearest is `prompt"),
    ({k: v for k, v in ZSRE.items() if k != "rephrase"} | {"alt": True}, "`alt` must be text"),
    ({**OWN, "target_new": ["Lyon", "Nice"]}, "`target_new` must be text"),
    ({"a": 1}, "unknown field `a`; expected at least {"),
    ({**OWN, "consequences": ["It is"]}, "`consequences` must be an object"),
    ({**OWN, "consequences": [{"answer": "Lima"}]}, r"`consequences\[0\]` has no `prompt`"),
    ({**OWN, "consequences": [{"prompt": "It is", "wert": 1}]}, "unknown field `wert`"),
    ({**OWN, "consequences": {"prompt": "a", "answer": "b", "domain": "x"}}, "domain must be in_"),
    ({**OWN, "negations": [1]}, r"`negations\[0\]` must be text"),
    ({**OWN, "truths": [{"prompt": "Is it?", "answer": "Yes"}]}, "needs `answer` and `before`"),
    ([1], "expected an object such as {"),
    ({**ROME, "requested_rewrite": {"prompt": "{} is"}}, "`subject` is missing"),
    ({**ROME, "neighborhood_prompts": ["a", 3]}, r"`neighborhood_prompts\[1\]`"),
    ({**RECENT, **NO_ANSWERS}, r"`locality\.Forgetfulness\[0\]` has no `prompt`"),
    ({**SEVERAL, "locality": [{"prompt": ["a", "b"], "ground_truth": ["c"]}]}, "for each of 2"),
    ({**STRUCTURED, "alternatives": ["Al"], "prediction": "Al"}, "the model says 'Al' already"),
    ({**STRUCTURED, "alternatives": []}, "nothing to edit"),
    ({**CONVSENT, "target": "good"}, "`target` must be pos or neg"),
    ({**RIPPLE, "edit": {"prompt": "X moved."}}, "`edit.prompt` has no ` is `"),
]


@pytest.mark.parametrize(("record", "words"), WRONG)
def test_a_bad_record_is_named_by_file_record_and_field(tmp_path, record, words):
    path = write(tmp_path / "d.json", [OWN, record])
    with pytest.raises(DataError, match=rf"d\.json: record 1: .*{words}"):
        read_examples(path)
    kept = read_examples(path, skip_invalid=True)
    assert len(kept) == 1 and len(kept.skipped) == 1 and "record 1" in kept.skipped[0].where


def test_files_that_cannot_be_read_say_what_they_are(tmp_path):
    def refusal(name, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_examples(tmp_path / name)
        return str(caught.value)

    assert "no such file; give a data file, hf:owner/name, or one of facts:train" in refusal(
        "none.json"
    )
    assert "no valid example" in refusal("e.json", b"[]")
    said = "not UTF-8 text .* at byte 2.*; save it as UTF-8, or give JSON"
    assert re.search(said, refusal("gbk.jsonl", "{'法国'}".encode("gbk")))
    assert "UTF-8" in refusal("b.json", b"\xff\xfe\x00")
    assert "cannot be read" in refusal("a.json.gz", gzip.compress(LINE * 9)[:-12])
    assert "d.json:2: invalid JSON" in refusal("d.json", LINE + b"\n{oops\n" + LINE)
    assert len(read_examples(tmp_path / "d.json", skip_invalid=True)) == 2
    assert "array.json: invalid JSON" in refusal("array.json", b"[\n{]")
    assert "a key is given twice" in refusal("twice.json", LINE[:-1] + b', "prompt": "P"}')
    assert "a column is given twice" in refusal("twice.csv", b"prompt,prompt\na,b\n")
    short = json.dumps({"prompt": ["a", "b"], "target_new": ["c"]}).encode()
    assert "2 prompts, `target_new`: only 1 values" in refusal("columns.json", short)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.json").write_bytes(LINE)
    assert refusal("folder").endswith("folder is a folder; give one of its files: x.json")
    with pytest.raises(DataError, match="facts:train"):
        read_examples("facts:tset")


def test_limit_keeps_the_first(tmp_path):
    path = write(tmp_path / "d.json", [{**OWN, "id": str(i)} for i in range(5)])
    assert [e.id for e in read_examples(path, limit=2)] == ["0", "1"]
    several = write(tmp_path / "a.json", [AKEW, AKEW])
    assert [e.id for e in read_examples(several, limit=1)] == ["1.1"]


def test_held_out_text_is_read_or_refused(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(" = A = \n some text\n", encoding="utf-8")
    assert read_text(path) == " = A = \n some text\n"
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no text"):
        read_text(path)


def test_no_name_stands_for_two_fields_and_the_page_lists_them_all(request):
    assert {*READ, "metadata", "left out"} == set(NAMES)
    names = [name for patterns in NAMES.values() for name in patterns.split()]
    assert len(names) == len(set(names)) and not {*names} & {*PAIRS}
    page = (request.config.rootpath / "docs" / "DATA_AND_MODELS.md").read_text(encoding="utf-8")
    assert [name for name in [*names, *PAIRS] if f"`{name}`" not in page] == []
