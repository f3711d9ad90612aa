"""`doctor`: one line a check, exit status 0 or 1, and nothing left behind."""

from pathlib import Path

import pytest

from mendkit.__main__ import main
from mendkit.data.files import write_examples
from tests.oracles.claims import EXAMPLES

CHECKS = ["settings", "data some.jsonl", "memory", "archive", "model", "texts of some.jsonl"]
CHECKS += ["one edit"]


@pytest.fixture
def checked(here, capsys):
    """Runs `doctor`; gives its status and, by check, the verdict and what is said."""
    write_examples(EXAMPLES, "some.jsonl")

    def run(*words: str) -> tuple[int, dict[str, tuple[str, str]]]:
        files = [f"--{name}=some.jsonl" for name in ("train-data", "validation-data", "data")]
        status, lines = main(["doctor", "tiny.yaml", *files, *words]), {}
        for line in capsys.readouterr().out.splitlines():
            verdict, rest = line[:8].strip(), line[8:]
            name, _, said = rest.partition(":")
            lines[name.strip()] = verdict, said
        return status, lines

    return run


def test_all_is_well_with_and_without_an_archive(checked):
    for words, by in (((), "untrained"), (("archive=archive.safetensors",), "undone")):
        status, lines = checked(*words)
        assert status == 0 and list(lines) == CHECKS
        assert {verdict for verdict, _ in lines.values()} == {"ok"}
        assert by in lines["one edit"][1]


@pytest.mark.parametrize(
    ("words", "failed", "said"),
    [
        (["raank=4"], "settings", "nearest key is 'rank'"),
        (["--data=nowhere.json"], "data nowhere.json", "no such file"),
        (["archive=nowhere.safetensors"], "archive", "no such archive"),
        (["model_name=nowhere/at/all"], "model", "no such file or folder"),
        (["inner_params=[no.weight]"], "model", "'no.weight' cannot be edited"),
        (["max_length=3"], "texts of some.jsonl", "raise `max_length`"),
        (["lr_scale=0"], "one edit", "lr_scale"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy_and_the_other_checks_are_made(
    checked, words, failed, said
):
    status, lines = checked(*words)
    assert status == 1 and lines[failed][0] == "failed" and said in lines[failed][1]
    assert set(CHECKS) <= set(lines)
    assert Path("tiny.yaml").is_file()
