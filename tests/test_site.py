"""The gallery's pages tell where they come from and show what ran; the site's links lead on."""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

from mendkit.reporting.tables import before_after
from tests.oracles.tiny import save_tiny

ROOT = Path(__file__).parents[1]
INSIDE = "03_inside_mend"


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "scripts/gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def png():
    """Noise, which needs more than 64 colours."""
    file = io.BytesIO()
    Image.frombytes("RGB", (200, 100), os.urandom(60_000)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_page_tells_its_run_and_shows_figures_and_tables_as_github_can(gallery, tmp_path):
    asked = [("edit", "The capital of <b>", "Lyon"), ("unrelated", "Two and two", None)]
    html = before_after(asked, ["Paris", "four"], ["Lyon", "four"]).to_html()
    html += f'<img src="data:image/png;base64,{png()}">'
    cells = [
        new_markdown_cell("# Why?\n\nSee [03](03_c.ipynb), [pages](../docs/x.md)."),
        new_code_cell("print('installed')", id="install"),
        new_code_cell("import sys\nn = 1\nout = ''", metadata={"tags": ["parameters"]}),
        new_code_cell(
            "from IPython.display import HTML, display\ndisplay(HTML(open('a.html').read()))\n"
            "print('stdout')\nprint('stderr', file=sys.stderr)\n"
            "display({'image/png': open('a.txt').read(), 'text/plain': 'The finding'}, raw=True)"
        ),
    ]
    done = tmp_path / "runs/gallery/02_a.ipynb"
    for folder in (tmp_path / "notebooks", done.with_suffix("")):
        folder.mkdir(parents=True)
    about = {"commit": "abcdef0123-dirty", "versions": {"torch": "2"}}
    about["machine"] = {"processor": "A chip", "cores": 2, "threads": 1}
    (folder / "run.json").write_text(json.dumps(about))
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "a.txt").write_text(png())
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=about), tmp_path / "notebooks/02_a.ipynb")
    gallery.main(tmp_path, {"02_a": {"n": 2}}, [])
    text = (tmp_path / "docs/gallery/02_a.md").read_text(encoding="utf-8")
    assert re.search(r"> \d+ \w+ 20\d\d, \d+ s, A chip, 2 cores, threads: 1, torch 2, ", text)
    assert "commit abcdef0 with changes.\n> Parameters: `n=2`, otherwise the defaults." in text
    assert "stdout" in text and "stderr\n" not in text and "installed" not in text
    assert "[03](../../notebooks/03_c.ipynb), [pages](../x.md)" in text
    assert "<td>The capital of &lt;b&gt;</td><td>Paris</td><td><b>Lyon</b></td>" in text
    assert "<style" not in text and "<td>four</td><td>four</td>" in text
    assert text.index('<img src="02_a/1.png"') < text.index('2.png" alt="The finding" width="720"')
    for name in ("1", "2", "small"):
        assert Image.open(tmp_path / f"docs/gallery/02_a/{name}.png").mode == "P"
    every = (tmp_path / "docs/gallery/README.md").read_text(encoding="utf-8")
    assert "[![02_a](02_a/small.png)](02_a.md) | 02 [Why?](02_a.md)<br>" in every
    first = done.read_bytes()
    gallery.main(tmp_path, {"02_a": {"n": 2}}, [])
    assert done.read_bytes() == first
    gallery.main(tmp_path, {"02_a": {"n": 3}}, [])
    assert done.read_bytes() != first


def test_pages_are_written_after_all_runs_so_that_none_sees_changed_files(
    gallery, monkeypatch, tmp_path
):
    (tmp_path / "docs/gallery").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    for stem in ("02_a", "03_b"):
        (tmp_path / f"notebooks/{stem}.ipynb").touch()
    ran, before_a_page = [], []
    monkeypatch.setattr(gallery, "run", lambda root, stem, given, again: ran.append(stem))
    monkeypatch.setattr(gallery, "write_page", lambda *page: before_a_page.append([*ran]))
    gallery.main(tmp_path, {}, [])
    assert before_a_page == [["02_a", "03_b"]] * 2


def test_the_gallery_that_is_here_is_light_and_every_page_is_linked_from_the_readme(gallery):
    files = [path for path in (ROOT / "docs/gallery").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e6
    assert all(path.stat().st_size <= 80_000 for path in files if path.suffix == ".png")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [path for path in files if path.parent.name == "gallery"]
    assert pages and all(f"](docs/gallery/{path.name})" in readme for path in pages)
    assert all((ROOT / f"notebooks/{stem}.ipynb").is_file() for stem in gallery.PARAMETERS)


@pytest.mark.slow
def test_the_site_is_built_from_a_small_run_and_its_links_lead_somewhere(gallery, tmp_path):
    tree, built = tmp_path / "tree", tmp_path / "built"
    heavy = shutil.ignore_patterns("*.safetensors", "__pycache__")
    for name in ("docs", "mendkit", "notebooks", "site"):  # Sphinx takes no page behind a link
        shutil.copytree(ROOT / name, tree / name, ignore=heavy)
    for name in ("configs", "scripts", "tests", "LICENSE"):
        (tree / name).symlink_to(ROOT / name)
    for path in ROOT.glob("*.md"):
        shutil.copy(path, tree)
    small = {"overrides": [f"model_name={save_tiny(tmp_path / 'model')}"], "archive": ""}
    small |= {"examples": 4, "statistics_limit": 6, "dense": 1, "sizes": [0.001]}
    gallery.main(tree, {INSIDE: small}, [INSIDE])
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", str(ROOT / "site"), tree, built]
    environment = os.environ | {"GITHUB_REPOSITORY": "someone/mendkit", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    page = (built / f"docs/gallery/{INSIDE}.html").read_text(encoding="utf-8")
    assert f"github/someone/mendkit/blob/main/notebooks/{INSIDE}.ipynb" in page
    assert f"gh/someone/mendkit/main?labpath=notebooks/{INSIDE}.ipynb" in page
    assert (built / "searchindex.js").is_file()
    assert 'id="mendkit.mend.editor.MENDEditor.edit"' in (built / "site/api.html").read_text(
        encoding="utf-8"
    )
    for path in sorted((ROOT / "notebooks/course").glob("*.ipynb")):
        lesson = f"notebooks/course/{path.stem}"
        sidebar, *others = (built / "index.html").read_text(encoding="utf-8").split("<main", 1)
        assert all(f'href="{lesson}.html"' in part for part in (sidebar, *others)), lesson
        page = BeautifulSoup((built / f"{lesson}.html").read_text(encoding="utf-8"), "html.parser")
        assert page.h1.get_text().strip("#").endswith("?") and "find_spec" not in page.get_text()
        assert f"github/someone/mendkit/blob/main/{lesson}.ipynb" in str(page)
        hidden = page.find_all("details", open=False)
        assert [each.summary.get_text() for each in hidden if each.find("pre")] == [
            f"Solution of exercise {number}" for number in range(1, len(hidden) + 1)
        ]
        stubs = [each for each in page.find_all("pre") if each.get_text().rstrip().endswith("...")]
        assert len(hidden) == len(stubs) >= 5
    pages = [path for path in built.rglob("*.html") if "_static" not in path.parts]
    soups = {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in pages}
    names = {path: {tag["id"] for tag in soup.find_all(id=True)} for path, soup in soups.items()}
    for path, soup in soups.items():
        for tag in soup.find_all(["a", "img", "link", "script"]):
            link = urlsplit(tag.get("href") or tag.get("src") or "")
            if not link.scheme and not link.netloc:
                target = path.parent / unquote(link.path) if link.path else path
                assert target.exists(), f"{path.name} links to {link.path}"
                known = names.get(target.resolve(), {link.fragment})
                assert link.fragment in known | {""}, f"{path.name} links to {link.geturl()}"
