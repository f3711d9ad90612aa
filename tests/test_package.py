"""The package as a user imports it: light, and with every public name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mendkit

FOLDER = Path(mendkit.__file__).parent
HEAVY = ("torch", "transformers", "pandas", "matplotlib", "IPython", "ipywidgets")


def test_every_public_name_is_found_and_the_stub_has_the_same_names():
    typed = {}
    for node in ast.parse((FOLDER / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            typed |= {alias.asname: node.module for alias in node.names}
    assert typed == mendkit._MODULE_OF
    for name in mendkit.__all__:
        assert getattr(mendkit, name) is not None
    assert set(mendkit.__all__) <= set(dir(mendkit))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mendkit.trian  # noqa: B018


def test_the_package_alone_imports_no_heavy_library():
    code = f"import sys, mendkit; mendkit.MENDHyperParams; print(*set({HEAVY}) & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
