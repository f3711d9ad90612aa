"""Who may import whom inside the package, by folder, and that no import goes round in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mendkit

FOLDER = Path(mendkit.__file__).parent
# what every folder may import
FREE = {"errors", "strict_yaml", "hparams", "places", "runs", "data"}
MAY_IMPORT = {
    "data": set(),
    "models": set(),
    "mend": {"models"},
    "evaluation": {"models", "mend"},
    "interop": {"models", "mend"},
    "cost": {"models", "mend"},
    "baselines": {"models", "mend", "evaluation"},
    "reporting": {"evaluation.results"},
    "playground": {"models", "mend", "evaluation", "reporting"},
    "cli": {"models", "mend", "evaluation", "interop", "cost", "baselines", "reporting"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts)


MODULES = {module_name(path) for path in FOLDER.rglob("*.py")} - {"__init__"}


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, inside functions too."""
    package, found = module_name(path).split(".")[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = package[: len(package) + 1 - node.level]
            target = ".".join([*folder, *(node.module or "").split(".")]).strip(".")
            found |= {target} if target in MODULES else set()
            found |= {f"{target}.{alias.name}".strip(".") for alias in node.names} & MODULES
    return found


def test_every_folder_imports_what_lies_below_it_only():
    wrong = set()
    for path in FOLDER.rglob("*.py"):
        folder = module_name(path).split(".")[0]
        for target in imported(path) if folder in MAY_IMPORT else ():
            above = target.split(".")[0]
            allowed = {target, above} & (MAY_IMPORT[folder] | FREE | {folder})
            if not allowed:
                wrong.add(f"{module_name(path)} imports {target}")
    assert wrong == set()


def test_no_import_goes_round_in_a_circle():
    graph = {module_name(path): imported(path) for path in FOLDER.rglob("*.py")}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
    assert len(graph) > 50 and graph["mend.training"]
