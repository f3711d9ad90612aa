"""The site: README, docs, gallery and course as they stand in the checkout, and the API.

`make site` builds it under build/site. Links to pages, notebooks and modules lead to their pages
here; other files can be downloaded, or are read in the repository where its address is known.
"""

import inspect
import os
import re
import shutil
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from nbconvert import MarkdownExporter

import mendkit
from mendkit.runs import CHECKOUT

PAGES = ["README*", "AGENTS", "CONTRIBUTING", "CHANGELOG", "docs/*", "docs/gallery/*", "site/*"]
PAGES += ["mendkit/archives/README", "mendkit/data/facts/README"]
TREE = """
```{{toctree}}
:hidden:
:caption: {caption}
:glob:

{pages}
```
"""
TREES = {
    "Notebooks": "docs/gallery/README\ndocs/gallery/[0-9]*",
    "Course": "notebooks/course/*",
    "Guide": "docs/ARCHIVE\ndocs/QUESTIONS\ndocs/[!AQ]*\n"
    "mendkit/archives/README\nmendkit/data/facts/README",
    "Code": "site/api\nsite/modules",
    "Project": "CONTRIBUTING\nAGENTS\nCHANGELOG",
    "中文": "README.zh-CN\ndocs/ARCHIVE.zh-CN",
}
FOLDERS = ["hparams", "data", "models", "mend", "evaluation", "baselines", "interop", "errors"]

project, author, root_doc = "mendkit", "mendkit authors", "README"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
include_patterns = [*(f"{page}.md" for page in PAGES), "notebooks/course/*.ipynb"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}  # lessons: `adapt` makes Markdown of them
myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
html_theme = "sphinx_book_theme"
html_title = "mendkit"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = False
html_context = {"default_mode": "auto"}
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "navbar_persistent": []}


LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\]\([^)]*\))+)\]\(([^)#: ]+)(#[^)]*)?\)")
DOCUMENTED = set(re.findall(r"automodule:: (\S+)", (CHECKOUT / "site/modules.md").read_text()))


def repository() -> str:
    """The address of the repository on GitHub; "" where nothing tells it."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    named = os.environ.get("GITHUB_REPOSITORY")  # in a workflow
    told = f"https://github.com/{named}" if named else project.get("urls", {}).get("Repository", "")
    return told.rstrip("/").removesuffix(".git")


def setup(app):
    app.connect("source-read", adapt)
    app.connect("autodoc-process-signature", parsed)
    app.connect("build-finished", add_index)


def adapt(app, docname, source):
    """Make a page of the checkout one of the site."""
    folder, text = Path(app.srcdir, docname).parent, source[0]
    notebook = f"{docname.replace('docs/gallery', 'notebooks')}.ipynb"
    if notebook.startswith("notebooks/course/"):
        text = lesson(text, Path(notebook).name)
    lead = LINK.sub(lambda found: link(app, folder, *found.groups()), text)
    if repository() and Path(notebook).name[:1].isdigit():
        name = urlsplit(repository()).path
        colab = f"[Colab](https://colab.research.google.com/github{name}/blob/main/{notebook})"
        binder = f"[Binder](https://mybinder.org/v2/gh{name}/main?labpath={notebook})"
        lead = lead.replace("Notebook: ", f"Run it on {colab} or {binder}. Notebook: ", 1)
    if docname == "site/api":
        lead += api()
    if docname == "site/modules":
        lead = re.sub(r"(automodule:: mendkit\.(\S+)\n   :members:)", without_public, lead)
    if docname == root_doc:
        lead += "".join(TREE.format(caption=name, pages=TREES[name]) for name in TREES)
    source[0] = lead


def lesson(text, name):
    """A lesson of the course as Markdown, without the cell that installs the kit."""
    notebook = nbformat.reads(text, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id != "install"]
    title, _, rest = MarkdownExporter().from_notebook_node(notebook)[0].partition("\n")
    return f"{title}\n\n> Notebook: {{download}}`{name}`.\n{rest}"


def link(app, folder, text, target, anchor):
    """A link of a page in `folder` as one of the site."""
    path = Path(os.path.normpath(folder / target))
    place = path.relative_to(app.srcdir)
    page = Path(app.srcdir, "docs/gallery", f"{path.stem}.md")
    name = ".".join(place.with_suffix("").parts)
    if path.suffix == ".ipynb" and page.is_file() and folder != page.parent:
        target = os.path.relpath(page, folder)
    elif path.suffix == ".py" and name in DOCUMENTED:
        source = os.path.relpath(Path(app.srcdir, "_modules", place.with_suffix(".html")), folder)
        return f'<a href="{source}">{text}</a>'
    elif place.match("notebooks/course/*.ipynb"):
        target = os.path.relpath(path, folder)
    elif path.is_dir() or path.suffix in (".py", ".ipynb", ".yaml", ""):
        return f"[{text}]({repository()}/blob/main/{place})" if repository() else text
    return f"[{text}]({target}{anchor or ''})"


def api():
    """Directives for the public names, each as in the module that defines it."""
    lines = []
    for folder in FOLDERS:
        lines += ["", f"## {folder}", "", "```{eval-rst}"]
        for name, module in mendkit._MODULE_OF.items():
            if module.partition(".")[0] == folder:
                value, place = getattr(mendkit, name), f"mendkit.{module}.{name}"
                if inspect.isclass(value):
                    lines += ["", f".. autoclass:: {place}", "   :members:"]
                    lines += ["   :exclude-members: model_config"]
                else:
                    lines += ["", f".. auto{'function' if callable(value) else 'data'}:: {place}"]
        lines.append("```")
    return "\n".join(lines)


def without_public(found):
    """A module's directive that leaves out what the page of the public names has."""
    names = [name for name, module in mendkit._MODULE_OF.items() if module == found[2]]
    return found[1] + f"\n   :exclude-members: {', '.join(names)}" * bool(names)


def parsed(app, what, name, value, options, signature, returns):
    """Signatures that Sphinx can read; fields of pydantic have a page, docs/HYPERPARAMETERS.md."""
    if "Annotated[" in (signature or ""):
        signature = "(**keys)"
    return signature and signature.replace("<factory>", "..."), returns


def add_index(app, failure):
    """The README is the first page."""
    if not failure and app.builder.format == "html":
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))
