"""The frame of the command line: the app, options that several commands share, and common checks.

Results go to standard output; progress and messages go to standard error. A command checks all it
can before it writes anything. Files of an earlier run are replaced only with `--overwrite`.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from ..errors import MendkitError
from ..hparams import MENDHyperParams, parse_overrides
from ..places import HUB, archive_file
from ..runs import user_path

logger = logging.getLogger("mendkit")

PROGRAM = "python -m mendkit"
EXIT_STATUS = (
    "Exit status: 0 done; 1 a part failed, or an unexpected error (with traceback); "
    "2 a mistake in the command, its files or settings (one line); 130 interrupted."
)

CONFIG = "a YAML file (default: configs/smollm2-135m.yaml), and settings that win over it"
Words = Annotated[list[str] | None, Argument(metavar="[CONFIG] [KEY=VALUE]...", help=CONFIG)]
OUT = "folder for results.json and other files"
Out = Annotated[Path | None, Option(metavar="DIR", parser=user_path, help=OUT)]
Json = Annotated[bool, Option("--json", help="print JSON and nothing else")]
Overwrite = Annotated[bool, Option("--overwrite", help="replace the files of an earlier run")]
Data = Annotated[str, Option(metavar="FILE", help="examples, facts:SPLIT or hf:OWNER/NAME")]
Limit = Annotated[int | None, Option(min=1, metavar="N", help="use the first N examples")]
MaxNewTokens = Annotated[int, Option(min=1, metavar="N", help="tokens to write")]
SkipInvalid = Annotated[bool, Option("--skip-invalid", help="leave out bad records, count them")]
IgnoreMemory = Annotated[bool, Option("--ignore-memory", help="train even if memory seems short")]


def _archive(text: str) -> Path:
    """The path of an archive, also where it is given as the setting `archive=PATH`."""
    return user_path(text.removeprefix("archive="))


Archive = Annotated[Path, Argument(metavar="ARCHIVE", parser=_archive)]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=f"{PROGRAM} COMMAND --help says more. {EXIT_STATUS}",
)


def command(example: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command under the first word of `example`, which its `--help` shows."""
    return app.command(example.split()[0], epilog=f"\b\nExample:\n  {PROGRAM} {example}")


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            say(f"mendkit {version('mendkit')}")
        except PackageNotFoundError:
            say("mendkit of a checkout that is not installed")
        raise typer.Exit


@app.callback()
def start(
    context: typer.Context,
    _version: Annotated[bool, Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Train and use MEND model editors."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # started by torchrun or accelerate
    if several and context.invoked_subcommand != "train":
        raise MendkitError(
            f"{context.invoked_subcommand} runs in one process; only `train` can run in several"
        )


def show(values: Any, text: str, *, as_json: bool) -> None:
    """Print `values` as JSON, or the same as text for people."""
    say(json.dumps(values, indent=1, ensure_ascii=False) if as_json else text)


def say(text: str) -> None:
    """Print a line; characters that the terminal lacks are written as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def configuration(words: Sequence[str] | None) -> tuple[Path, list[str]]:
    """The path of the configuration, given or default, and the settings `key=value`."""
    words = list(words or ())
    if words and ("=" not in words[0] or user_path(words[0]).is_file()):
        if words[0].startswith(HUB) or archive_file(words[0]).suffix == ".safetensors":
            raise MendkitError(f"{words[0]} is no configuration; write archive={words[0]}")
        if user_path(words[0]).is_dir():
            raise MendkitError(f"{words[0]} is no configuration; write model_name={words[0]}")
        return user_path(words[0]), words[1:]
    from ..runs import kit_file

    default = kit_file(Path("configs/smollm2-135m.yaml"))
    logger.info("configuration: %s", default)
    return default, words


def hyperparameters(words: Sequence[str] | None) -> MENDHyperParams:
    """The hyperparameters of a configuration and settings. Raises HyperParamError."""
    config, settings = configuration(words)
    return MENDHyperParams.from_hparams(config, **parse_overrides(settings))


class RunFolder:
    """The folder that a command writes to, if it is given one.

    Raises MendkitError for a file, and for files `names` of an earlier run without `overwrite`.
    """

    def __init__(self, folder: Path | None, *names: str, overwrite: bool) -> None:
        self.folder = folder
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise MendkitError(f"{folder} is a file; give --out a folder")
        self.old = [folder / name for name in names if (folder / name).exists()]
        if self.old and not overwrite:
            held = ", ".join(path.name for path in self.old)
            raise MendkitError(
                f"{folder} holds {held} of an earlier run; give another --out, or --overwrite"
            )

    def clear(self, *, keep: str | None = None) -> None:
        """Remove the earlier run's files but `keep`, so that none is taken for a new one."""
        from ..runs import make_folder

        if self.folder is None:
            return
        make_folder(self.folder)
        for path in self.old:
            if keep is None or path.resolve() != Path(keep).resolve():
                path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder, which is made, while the context lasts."""
        from ..runs import locked, make_folder

        if self.folder is None:
            yield
            return
        with locked(make_folder(self.folder)):
            yield

    def write(self, results: Mapping[str, Any], rows: Sequence[Any] = ()) -> None:
        """Write results.json, and rows.jsonl if there are rows."""
        from ..runs import write_json, write_text

        if self.folder is None:
            return
        if rows:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_text(self.folder / "rows.jsonl", "".join(lines))
        write_json(self.folder / "results.json", results)
