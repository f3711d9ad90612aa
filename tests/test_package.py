"""The package as a user imports it: light, and with every public name."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

import mendkit
from mendkit.runs import kit_files

FOLDER = Path(mendkit.__file__).parent
HEAVY = ("torch", "transformers", "pandas", "matplotlib", "IPython", "ipywidgets")


def test_every_public_name_is_found():
    assert len(mendkit.__all__) > 40 and "evaluate" in mendkit.__all__
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


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_need_and_an_installed_kit_finds_it(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    root, copy = FOLDER.parent, tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(root, copy, ignore=ignored)
    build = "from setuptools.build_meta import *; build_sdist('dist'); build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, check=True)
    (wheel,), (sdist,) = (copy / "dist").glob("*.whl"), (copy / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("configs", "docs", "mendkit", "notebooks", "scripts", "site", "tests"):
        for path in (copy / folder).rglob("*.*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(copy)) in held
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    install += ["--ignore-installed"]  # else pip uninstalls the kit that runs the tests
    subprocess.run([*install, "--prefix", tmp_path / "installed", wheel], check=True)
    (site,) = (tmp_path / "installed").rglob("site-packages")
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = """from pathlib import Path; from mendkit import places, read_examples, reporting, runs
for name in (
    "configs/gpt2.yaml",
    "configs/methods/smollm2-135m-malmen.yaml",
    "notebooks/08_compare_runs.ipynb",
):
    assert runs.kit_file(Path(name)).is_file() and places.project_path(name).is_file(), name
assert read_examples("facts:test", limit=1)
assert (Path(reporting.__file__).parent / "templates/report.html.j2").is_file()
print(runs.__file__)"""
    script = str(tmp_path / "installed/bin/mendkit")
    commands = {
        "code": [sys.executable, "-c", code],
        "copy": [script, "notebooks", "mine"],
        "again": [script, "notebooks", "mine"],
        "report": [script, "report", "archive=nowhere.safetensors", "--out", "run"],
    }
    said = {}
    for name, command in commands.items():
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        said[name] = done.stdout + done.stderr
        assert done.returncode == (0 if name in ("code", "copy") else 2), said[name]
    assert str(site) in said["code"]
    mine = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    copied = {path.relative_to(tmp_path / "mine"): path.read_bytes() for path in mine}
    assert copied == {name: path.read_bytes() for name, path in kit_files().items()}
    assert {path.parts[0] for path in copied} == {"configs", "notebooks"}
    assert "give another folder, or --overwrite" in said["again"]
    # it found its notebooks and configuration, and stopped at the archive
    assert "nowhere.safetensors: no such archive" in said["report"]
    assert not (tmp_path / "run").exists()


def test_the_files_that_state_the_version_agree():
    root = FOLDER.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{project['version']}]" in changes and "## [Unreleased]" in changes
