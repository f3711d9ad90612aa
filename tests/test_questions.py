"""Every block of ARCHIVE.md and QUESTIONS.md runs, in order, on a tiny model in SmolLM2's place."""

import re
import shlex
import subprocess
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from mendkit.__main__ import main
from mendkit.reporting.sweep import plan_sweep, read_sweep
from tests.oracles.tiny import save_tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("ARCHIVE", "QUESTIONS")]
TEXT = "".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
CONFIG = "configs/smollm2-135m.yaml"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_line(line: str, monkeypatch, capsys) -> None:
    """One line of a shell block; a comment says which exit status, and a part of the error."""
    typed, _, comment = line.partition("  # ")
    if " | " in typed:
        given, typed = typed.split(" | ")
        shell = ["sh", "-c", given]
        said = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
        monkeypatch.setattr("sys.stdin", StringIO(said))
    words = shlex.split(typed)
    assert words[:3] == ["python", "-m", "mendkit"]
    status, _, message = comment.removeprefix("exit status ").partition(": ")
    assert main(words[3:]) == int(status or 0), typed
    out, err = capsys.readouterr()
    assert bool(out) == (not status) and message in err


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> None:
    """A working directory with the default configuration, of a tiny model."""
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    settings = (ROOT / CONFIG).read_text(encoding="utf-8")
    for given, small in (
        ("model_name: smollm2-135m", f"model_name: {save_tiny('model')}"),
        ("rank: 256", "rank: 8"),
    ):
        assert given in settings
        settings = settings.replace(given, small)
    Path(CONFIG).write_text(settings, encoding="utf-8")


@pytest.mark.slow
def test_every_block_runs(checkout, monkeypatch, capsys):
    names: dict[str, object] = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "docs/QUESTIONS.md", "exec"), names)
            capsys.readouterr()
        elif kind == "sh":
            for line in block.splitlines():
                run_line(line, monkeypatch, capsys)
        else:
            Path("sweep.yaml").write_text(block, encoding="utf-8")
            runs = plan_sweep(read_sweep("sweep.yaml"), CONFIG, [], out=Path("runs/sweep"))
            assert [run.values for run in runs] == [
                {"rank": r, "seed": s} for r in (64, 256) for s in (1, 2)
            ]
    assert {kind for kind, _ in BLOCKS} == {"python", "sh", "yaml"}


def test_every_question_has_an_example():
    sections = PAGES[-1].read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(sections) >= 11 and all("\n```" in section for section in sections)


@pytest.mark.slow
def test_the_script_for_users_of_easyedit_runs_and_names_metrics_that_there_are(checkout):
    page = (ROOT / "docs" / "FROM_EASYEDIT.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(script, "docs/FROM_EASYEDIT.md", "exec"), names)
    scored = names["report"].frame()
    metrics = re.findall(r"`(\w+\.(?:tf_token|free_exact|argmax_agreement))`", page)
    answered = set(metrics) - {"portability.free_exact"}  # this fact implies none
    assert len(answered) >= 5 and answered <= set(scored)
    assert len(page.splitlines()) <= 90 and "docs/FROM_EASYEDIT.md" in README
