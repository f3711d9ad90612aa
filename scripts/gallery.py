"""Run the notebooks and write docs/gallery: a page each, its figures, and a page of all.

`make gallery` runs what has changed; ARGS="02 06" names notebooks, ARGS="--again 02" repeats one.
An executed notebook stays under runs/gallery. It is run again if its code or parameters differ.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import papermill
from bs4 import BeautifulSoup
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[1]
PARAMETERS: dict[str, dict[str, Any]] = {  # what is not at its default, to end in half an hour
    "01_train_without_archive": {"train_limit": 1200, "overrides": ["max_iters=300"]},
    "07_what_training_costs": {"models": ["smollm2-135m"]},
    "08_compare_runs": {"sweep": "runs/gallery/sweep"},
}
SWEEP = {"grid": {"rank": [64, 256], "cneigh": [0.2, 0.8]}}  # what 08 compares
SWEPT = "train_limit=300 max_iters=60 validation_limit=20 test_limit=20"
WIDTH = 720  # pixels of a figure as notebooks show it
INLINE = "data:image/png;base64,"
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(root: Path, stem: str, parameters: dict[str, Any], *, again: bool) -> NotebookNode:
    """The executed notebook: the one that is there, if its code and parameters are these."""
    path, done = root / f"notebooks/{stem}.ipynb", root / f"runs/gallery/{stem}.ipynb"
    parameters = {**parameters, "out": f"runs/gallery/{stem}"}
    if done.is_file() and not again:
        source, executed = nbformat.read(path, as_version=4), nbformat.read(done, as_version=4)
        about = executed.metadata.papermill
        ended = about.end_time is not None and about.exception is None
        if ended and about.parameters == parameters and code(executed) == code(source):
            texts = {cell.id: cell.source for cell in source.cells}
            for cell in executed.cells:
                cell.source = texts.get(cell.id, cell.source)
            return executed
    print(f"{stem} runs", flush=True)
    done.parent.mkdir(parents=True, exist_ok=True)
    for left in done.with_suffix("").glob("*.unfinished.jsonl"):  # perhaps of other sizes
        left.unlink()
    if stem == "08_compare_runs":
        grid = done.with_name("sweep.json")  # JSON is YAML
        grid.write_text(json.dumps(SWEEP))
        command = f"-m mendkit report configs/smollm2-135m.yaml {SWEPT} --sweep".split()
        command = [sys.executable, *command, str(grid), "--out", parameters["sweep"]]
        subprocess.run(command, cwd=root, check=True)
    return papermill.execute_notebook(
        str(path), str(done), parameters, kernel_name="python3", cwd=root, progress_bar=False
    )


def code(notebook: NotebookNode) -> list[str]:
    """The sources of the code cells, without the one that papermill adds."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [c.source for c in cells if "injected-parameters" not in c.metadata.get("tags", [])]


def write_page(root: Path, stem: str, executed: NotebookNode, pages: Sequence[str]) -> None:
    """Write the page of an executed notebook and its figures."""
    folder = root / "docs/gallery" / stem
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    executed.cells = [cell for cell in executed.cells if cell.id != "install"]
    for cell in executed.cells:
        cell.source = cell.source.strip()
        if cell.cell_type == "markdown":
            cell.source = relative_links(cell.source, pages)
            continue
        outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.outputs = [output for output in outputs if WIDGET not in output.get("data", {})]
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                data["text/html"] = picture(data.pop("image/png"), folder, data["text/plain"])
            elif "text/html" in data:
                data["text/html"] = plain(data["text/html"], folder)
    text, _ = MarkdownExporter().from_notebook_node(executed)
    title, _, rest = text.partition("\n")
    text = re.sub(r"\n{3,}", "\n\n", f"{title}\n\n{provenance(root, stem, executed)}\n\n{rest}")
    folder.with_suffix(".md").write_text(text.strip() + "\n", encoding="utf-8")


def relative_links(text: str, pages: Sequence[str]) -> str:
    """Links as seen from docs/gallery: to the page of a notebook where there is one."""

    def seen(found: re.Match[str]) -> str:
        stem, suffix = os.path.splitext(found[1])
        if stem in pages and suffix == ".ipynb":
            return f"]({stem}.md)"
        return f"]({os.path.relpath(f'notebooks/{found[1]}', 'docs/gallery')})"

    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", seen, text)


def picture(encoded: str, folder: Path, text: str) -> str:
    """Save a picture with 64 colours, and the first one of a page small, too; its tag."""
    image = Image.open(io.BytesIO(b64decode(encoded))).convert("RGB")
    number = len(list(folder.glob("[0-9]*.png"))) + 1
    if number == 1:
        small = image.resize((480, round(480 * image.height / image.width)), Image.Resampling.BOX)
        small.quantize(64).save(folder / "small.png", optimize=True)
    reduced = image.quantize(64, dither=Image.Dither.NONE)
    reduced.save(folder / f"{number}.png", optimize=True)
    alt = " ".join(text.split()).replace('"', "'")
    return f'<img src="{folder.name}/{number}.png" alt="{alt}" width="{WIDTH}">'


def plain(html: str, folder: Path) -> str:
    """HTML that GitHub shows as it is: no styles, coloured cells bold, pictures below."""
    soup = BeautifulSoup(html, "html.parser")
    styles = "".join(style.extract().get_text() for style in soup.find_all("style"))
    coloured = "".join(re.findall(r"([^{}]*)\{\s*background-color", styles))
    pictures = [img.extract()["src"].removeprefix(INLINE) for img in soup.find_all("img")]
    for tag in soup.find_all(True):
        if tag.get("id") in re.findall(r"#(\w+)", coloured) and tag.get_text():
            inside = soup.new_tag("b")
            inside.extend(list(tag.contents))
            tag.append(inside)
        tag.attrs = {key: tag[key] for key in ("rowspan", "colspan") if tag.get(key)}
    text = re.sub(r">\s+<", "><", str(soup).strip())
    text = re.sub(r"\s*\n\s*", " ", text).replace("</tr>", "</tr>\n")
    return "\n\n".join([text, *(picture(each, folder, "") for each in pictures)])


def provenance(root: Path, stem: str, executed: NotebookNode) -> str:
    """When, where, at which commit, for how long and with which parameters a notebook ran."""
    told = json.loads((root / f"runs/gallery/{stem}/run.json").read_text(encoding="utf-8"))
    about, machine = executed.metadata.papermill, told["machine"]
    date = f"{datetime.fromisoformat(about.start_time):%d %B %Y}".lstrip("0")
    minutes, seconds = divmod(round(about.duration), 60)
    time = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    commit, _, dirty = str(told["commit"]).partition("-")
    given = [f"`{name}={value!r}`" for name, value in about.parameters.items() if name != "out"]
    given.append("otherwise the defaults" if given else "the defaults")
    return (
        f"> {date}, {time}, {machine['processor']}, {machine['cores']} cores, "
        f"threads: {machine['threads']}, torch {told['versions']['torch']}, "
        f"commit {commit[:7]}{' with changes' * bool(dirty)}.\n"
        f"> Parameters: {', '.join(given)}. "
        f"Notebook: [{stem}.ipynb](../../notebooks/{stem}.ipynb)."
    )


def write_page_of_all(folder: Path) -> None:
    """Write README.md: a small figure, question, time and commit of each page that is there."""
    lines = ["# Gallery", "", "The notebooks as they ran. `make gallery` writes these pages.", ""]
    lines += ["| figure | question |", "|---|---|"]
    for path in sorted(folder.glob("[0-9]*.md")):
        title, _, run, *_ = path.read_text(encoding="utf-8").splitlines()
        image = f"[![{path.stem}]({path.stem}/small.png)]({path.name})"
        name = f"[{title.lstrip('# ')}]({path.name})"
        lines.append(f"| {image} | {path.stem[:2]} {name}<br>{run.lstrip('> ')} |")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    root: Path, parameters: dict[str, dict[str, Any]], names: Sequence[str], again: bool = False
) -> None:
    """Run and write the notebooks whose name begins with one of `names`; all, if there is none."""
    stems = sorted(path.stem for path in root.glob("notebooks/*.ipynb"))
    asked = [stem for stem in stems if not names or stem.startswith(tuple(names))]
    written = [path.stem for path in root.glob("docs/gallery/[0-9]*.md")]
    # All pages after all runs: a run tells whether files differ from the commit.
    ran = {stem: run(root, stem, parameters.get(stem, {}), again=again) for stem in asked}
    for stem, executed in ran.items():
        write_page(root, stem, executed, [*written, *asked])
    write_page_of_all(root / "docs/gallery")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="numbers or names of notebooks")
    parser.add_argument("--again", action="store_true", help="run even what has not changed")
    given = parser.parse_args()
    main(ROOT, PARAMETERS, given.names, given.again)
