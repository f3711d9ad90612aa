"""The command line: `mendkit COMMAND ...`, or `python -m mendkit COMMAND ...`."""

import logging
import shlex
import sys
from collections.abc import Sequence

from typer.exceptions import TyperException

from .cli import archives, doctor, edit, train
from .cli.app import PROGRAM, app
from .errors import MendkitError
from .hparams import MENDHyperParams

__all__ = ["archives", "doctor", "edit", "main", "train"]  # each registers its commands

ORDER = ["train", "edit", "evaluate", "inspect", "import", "export", "push", "conformance"]
ORDER += ["sites", "plan", "doctor", "bench", "report", "notebooks"]
"""Of the commands in `--help`, as in the README."""

app.registered_commands.sort(key=lambda each: ORDER.index(each.name or ""))


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. A mistake of the user is one line on stderr."""
    words = list(sys.argv[1:] if words is None else words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mendkit").setLevel(logging.INFO)
    for chatty in ("papermill", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    typed = shlex.join([*PROGRAM.split(), *words])
    try:
        status = app(words, prog_name=PROGRAM, standalone_mode=False, obj=typed)
    except MendkitError as error:
        message = str(error)
    except TyperException as error:  # wrong usage
        message = error.format_message().replace("Value error, ", "")
        message += "" if message.endswith((".", "?", ")")) else "."
        asked = [PROGRAM, *words[: not message.startswith("No such command")], "--help"]
        message = f"{message} See {' '.join(asked)}"
        key = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
        if key in MENDHyperParams.model_fields:
            message = f"{key} is a setting: write {key}=..., without --"
    except OSError as error:
        if error.errno is None:  # not of the system: a library's
            raise
        message = f"cannot read or write there: {error}; make room, or give another place"
    else:
        if status == 130:
            sys.stderr.write("interrupted\n")
        return status or 0
    sys.stderr.write(f"error: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
