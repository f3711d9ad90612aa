"""What a user may write for a place: an archive's path or name, a path below the project's root."""

import os
from functools import cache
from pathlib import Path

from .errors import ArchiveError, reason
from .runs import kit_file, user_path

ARCHIVE_FILE = "archive.safetensors"
ARCHIVES = Path(__file__).with_name("archives")  # those that come with the kit
HUB = "hub:"


def in_the_box() -> dict[str, Path]:
    """The archives that come with the kit, by name."""
    return {path.stem: path for path in sorted(ARCHIVES.glob("*.safetensors"))}


def archive_file(archive: str | Path) -> Path:
    """The file of an archive: a path, a run folder that holds it, or a name.

    `hub:user/name[@revision]` is downloaded. `smollm2-135m` comes with the kit, unless a file or
    run folder here has that name. Raises ArchiveError if it cannot be downloaded.
    """
    name, path = str(archive), user_path(archive)
    if name.startswith(HUB):
        return _downloaded(name)
    held = path / ARCHIVE_FILE
    if held.is_file():
        return held
    return path if path.is_file() else in_the_box().get(name, path)


@cache
def _downloaded(name: str) -> Path:
    """The file in the cache of `huggingface_hub`, which goes on with a broken download."""
    from huggingface_hub import hf_hub_download

    repo, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(hf_hub_download(repo, ARCHIVE_FILE, revision=revision or None))
    except Exception as error:  # the hub's client has many
        raise ArchiveError(
            f"{name}: no archive could be downloaded ({reason(error)}); check name and network "
            "(without one, or with HF_HUB_OFFLINE, only what was downloaded is found), or "
            "give a file"
        ) from None


def archives_of_runs() -> list[str]:
    """The archives below `runs/`, newest first."""
    found = project_path("runs").glob(f"*/{ARCHIVE_FILE}")
    return list(map(str, sorted(found, key=os.path.getmtime, reverse=True)))


def archives_here() -> str:
    """Some archives of runs, and those that come with the kit, to end an error with."""
    there = [*archives_of_runs()[:5], *in_the_box()]
    return f"; here are {', '.join(there)}" if there else ""


def project_path(path: str | Path) -> Path:
    """A path as seen from the project's root, also in JupyterLab, whose folder is `notebooks/`.

    There a relative path that does not exist is taken below the root, so that outputs go there,
    too. A config or notebook of the kit is found wherever the kit is (`kit_file`). Names of data
    and archives (`facts:train`, `hf:owner/name`) are no paths and stay as they are.
    """
    path, here = user_path(path), Path.cwd()
    is_name = str(path).startswith(("facts:", "hf:", HUB)) or str(path) in in_the_box()
    if path.is_absolute() or path.exists() or is_name:
        return path
    below_root = here.parent / path if here.name == "notebooks" else path
    if below_root.exists() or path.parts[0] not in ("configs", "notebooks"):
        return below_root
    return kit_file(path)
