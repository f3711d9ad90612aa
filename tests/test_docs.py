"""The pages that name tests are held to the suite, and the README to its budget."""

import ast
import re
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

import mendkit
from mendkit.__main__ import app

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(?:tests/)?([\w/]+\.py)::(\w+)`")


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page, rows", [("RELIABILITY.md", 20), ("CORRECTNESS.md", 27)])
def test_every_row_names_tests_and_every_test_that_is_named_is_there(page, rows):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(table) >= rows
    for line in table:
        named = NAMED.findall(line)
        assert named, f"{page} names no test in: {line}"
        for path, name in named:
            assert name in names_in(path), f"{page} names {path}::{name}, which is not there"
    assert "::" not in NAMED.sub("", text)  # no test is named in a form that is not checked


def test_the_correctness_page_has_every_row_of_its_numbering():
    text = (ROOT / "docs/CORRECTNESS.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == [str(n) for n in range(1, 28)]


def test_links_between_pages_lead_somewhere():
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "mendkit/data/facts/README.md",
    ]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_first_pages_are_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    assert len((ROOT / "docs/CODE.md").read_text(encoding="utf-8").splitlines()) <= 80


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                assert ".test_" not in node.module, f"{path.name} imports {node.module}"


def test_the_drawing_of_mend_has_the_equations_of_the_code():
    drawn = ElementTree.parse(ROOT / "docs/mend.svg").getroot()
    texts = [element for element in drawn.iter() if element.get("class") == "eq"]
    equations = {"".join(element.itertext()) for element in texts}
    pages = (ROOT / "mendkit/mend/hypernetwork.py", ROOT / "docs/CODE.md")
    written = "".join(page.read_text(encoding="utf-8") for page in pages)
    written = written.replace("_t", "").replace("delta", "δ")
    assert len(equations) == 4
    for equation in equations:
        assert equation in written, equation


def test_the_page_for_assistants_names_commands_errors_and_names_that_there_are():
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    known = {command.name for command in app.registered_commands}
    named = set(re.findall(r"(?m)(?:^|`)mendkit ([a-z]+) ", text))
    assert len(named) >= 8 and named <= known
    listed = text.partition("among it ")[2].partition(". Other modules")[0]
    names = set(re.findall(r"`(\w+)`", listed)) | set(re.findall(r"`(\w+Error)`", text))
    assert len(names) >= 19 and names <= set(mendkit.__all__) | {"LimitError"}


def kept(text: str) -> list[str]:
    """What a translation does not change: code spans, links, images, numbers; in any order."""
    spans, text = re.findall(r"`[^`]+`", text), re.sub(r"`[^`]+`", "", text)
    links, text = re.findall(r"!\[|\]\([^)]+\)", text), re.sub(r"\]\([^)]+\)", "", text)
    return sorted(spans + links + re.findall(r"\.?\d+(?:[.,]\d+)*", text))


def sections(page: Path) -> list[tuple[list[str], ...]]:
    """Of each section what its code (without comments), its tables' cells and its prose keep."""
    parts = []
    for section in re.split("^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        blocks = re.findall("^```.*?^```$", section, re.MULTILINE | re.DOTALL)
        code = re.sub(r"(?m) *#.*$", "", "\n".join(blocks)).splitlines()
        lines = re.sub("(?ms)^```.*?^```$", "", section).replace(".zh-CN", "").splitlines()
        cells = [c for line in lines if line[:1] == "|" for c in line.split("|")[1:-1]]
        prose = "\n".join(line for line in lines if line[:1] != "|")
        parts.append((code, [" ".join(kept(cell)) for cell in cells], kept(prose)))
    return parts


@pytest.mark.parametrize("name", ["README", "docs/ARCHIVE"])
def test_a_page_says_the_same_in_chinese(name):
    english, chinese = ROOT / f"{name}.md", ROOT / f"{name}.zh-CN.md"
    for page, other in ((english, chinese), (chinese, english)):
        first = page.read_text(encoding="utf-8").splitlines()[:5]
        assert any(f"]({other.name})" in line for line in first), f"{page.name}: link {other.name}"
    translated = chinese.read_text(encoding="utf-8").split("\n## ")
    assert all(len(re.findall("[\u4e00-\u9fff]", part)) > 30 for part in translated)
    pairs = zip(sections(english), sections(chinese), strict=True)
    for section, (ours, theirs) in zip(translated, pairs, strict=True):
        heading = section.splitlines()[0]
        for what, there, here in zip(("code", "table", "prose"), ours, theirs, strict=True):
            assert here == there, f"{chinese.name}, {heading}, {what}: keep it as in {english.name}"
