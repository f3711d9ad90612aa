"""Imports inside the package go down only."""

import ast
from pathlib import Path

import mendkit

LEVELS = [
    {"errors", "findings", "runs"},
    {
        "scores",
        "hparams",
        "losses",
        "plots",
        "checkpoints",
        "sites",
        "distributed",
        "architectures",
        "dryrun",
    },
    {"bundled", "data", "families", "hollow", "loggers"},
    {"text_model", "cache", "layouts"},
    {"models", "listing", "readers"},
    {"texts", "trunk", "files"},
    {"factors", "adapter", "merge", "least_squares"},
    {"edit"},
    {"mend", "scoring", "many"},
    {"archive", "heldout", "metrics", "decoding", "resume"},
    {"editor", "foreign"},
    {"conformance"},
    {"validation", "evaluate"},
    {"baselines", "inspection", "training", "textbook"},
    {"ways", "plan", "rome"},
    {"gauss_newton"},
    {"tuning"},
    {
        *(
            "tables",
            "notebook",
            "report_page",
            "report",
            "bench",
            "sweep",
            "compare",
            "edit_command",
        ),
        *("playground", "widgets", "__init__"),
    },
    {"commands"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").startswith("mendkit")
        ):
            module = (node.module or "").removeprefix("mendkit").strip(".")
            found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
    return found & set(LEVEL)


def test_imports_go_down_only():
    upward = []
    for path in Path(mendkit.__file__).parent.glob("*.py"):
        for name in imports(path):
            if LEVEL[name] >= LEVEL[path.stem] and LEVEL[path.stem] < LEVEL["tables"]:
                upward.append(f"{path.stem} imports {name}")
    assert upward == []
