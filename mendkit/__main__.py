"""Command line: `python -m mendkit {train,edit,evaluate,inspect,import,export,conformance,sites,plan,bench,report}`.

The options of every command; commands.py has what they do.
"""

from __future__ import annotations

import argparse
import errno
import logging
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .baselines.tuning import BUDGET, KINDS
from .cli import commands
from .cli.commands import DEFAULT_K
from .cost.ways import MODELS, Settings
from .errors import MendkitError
from .evaluation.evaluate import MODES
from .evaluation.heldout import TEXT_TOKENS
from .hparams import MENDHyperParams
from .mend.distributed import process_count

logger = logging.getLogger("mendkit")

PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
PLACE += (errno.ENOTDIR, errno.EEXIST)
"""Errors of the system that are the place's fault, which the user may mend."""

EXIT_CODES = """\
exit status: 0 all of it was done; 1 a notebook or a run of a sweep failed, a comparison missed, or an unexpected error
(with traceback); 2 a mistake in the command, its files or settings (usage, or one line `error: ...`);
130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        _top_parser().parse_args(words)  # --help and mistakes end here
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    command = COMMANDS[words[0]]
    parser = _parser(words[0], command)
    args = parser.parse_intermixed_args(words[1:])
    args.parser, args.name, args.command = (
        parser,
        words[0],
        shlex.join(["python", "-m", "mendkit", *words]),
    )
    try:
        if process_count() > 1 and args.name != "train":
            raise MendkitError(
                f"{args.name} runs in one process; only `train` can be started in several"
            )
        return command.run(args)
    except MendkitError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        if error.errno not in PLACE:
            raise
        sys.stderr.write(
            f"error: cannot read or write there: {error}; make room, or give another place\n"
        )
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    return MENDHyperParams(model_name="any", cache_bytes=text).cache_bytes


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


# ---------------------------------------------------------------------------------------------------- parsers


def _options_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out that was stopped: same settings, same data, same archive",
    )
    _option_memory(parser)
    _options_data(parser)


def _option_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-memory",
        action="store_true",
        help="train even if it is planned to need more memory than is free",
    )


def _options_data(parser: argparse.ArgumentParser) -> None:
    for split in ("train", "validation"):
        source = f"facts:{split}"
        parser.add_argument(
            f"--{split}-data", default=source, metavar="FILE", help=f"default: {source}"
        )
        parser.add_argument(
            f"--{split}-limit", type=_count, metavar="N", help="use the first N examples"
        )
    _option_skip(parser)


def _option_skip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-invalid", action="store_true", help="leave invalid records out and count them"
    )


def _options_plan(parser: argparse.ArgumentParser) -> None:
    _options_data(parser)
    parser.add_argument(
        "--data", dest="train_data", metavar="FILE", help="the same as --train-data"
    )
    parser.add_argument(
        "--memory",
        type=_bytes,
        metavar="SIZE",
        help="propose settings that fit, such as 8GB (default: what is free)",
    )


def _options_edit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", metavar="P", help="what to edit, such as 'The capital of France is'"
    )
    parser.add_argument("--target", metavar="T", help="how the prompt shall go on")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="examples instead, or facts:test; -: lines of JSON or prompt<TAB>target from stdin",
    )
    _option_skip(parser)
    parser.add_argument(
        "--together", action="store_true", help="make all examples one edit (default: each alone)"
    )
    parser.add_argument(
        "--strength", type=_number, default=1.0, metavar="S", help="times the update (default: 1)"
    )
    parser.add_argument(
        "--save-adapter", type=Path, metavar="DIR", help="write the edit as a PEFT LoRA adapter"
    )
    parser.add_argument(
        "--adapter-rank",
        type=_count,
        metavar="N",
        help="its rank at most (default: the edit's own)",
    )
    parser.add_argument(
        "--save-merged", type=Path, metavar="DIR", help="write the edited model for transformers"
    )
    parser.add_argument(
        "--save-edit", type=Path, metavar="FILE", help="write the edit for `Edit.load`"
    )
    parser.add_argument(
        "--save-report",
        type=Path,
        metavar="FILE",
        help="write an HTML page of before and after, other texts included",
    )
    _options_decoding(parser)


def _options_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="facts:test", metavar="FILE", help="default: facts:test")
    parser.add_argument(
        "--mode",
        default="single",
        choices=MODES,
        help="each edit on a fresh model (default), k at once, or all in a row",
    )
    parser.add_argument(
        "--k",
        type=_count,
        metavar="K",
        help=f"edits made at once in mode batch (default: {DEFAULT_K})",
    )
    parser.add_argument(
        "--editor",
        default="mend",
        choices=("mend", *KINDS, "context"),
        help=f"the archive's (default), or a baseline at the best of {BUDGET} settings, or the fact in the context",
    )
    parser.add_argument(
        "--tune-data", default="facts:validation", metavar="FILE", help="edits for these settings"
    )
    parser.add_argument(
        "--tune-limit",
        type=_count,
        default=12,
        metavar="N",
        help="the first N of them (default: 12)",
    )
    parser.add_argument(
        "--key-text",
        metavar="FILE",
        help="text for covariances (ROME, Gauss-Newton; default: facts:train's prompts)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="held-out text for drawdown of perplexity and accuracy (slow)",
    )
    parser.add_argument(
        "--text-tokens",
        type=_count,
        default=TEXT_TOKENS,
        metavar="N",
        help=f"of its tokens (default: {TEXT_TOKENS})",
    )
    parser.add_argument(
        "--fluency", action="store_true", help="entropy of 100 freely written tokens, too (slow)"
    )
    parser.add_argument(
        "--unrelated", metavar="FILE", help="NQ-open questions as further unrelated prompts"
    )
    _option_skip(parser)
    _options_decoding(parser)


def _options_sites(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all", action="store_true", help="attention and output layers, too (JSON has all, always)"
    )


def _options_bench(parser: argparse.ArgumentParser) -> None:
    known = ",".join(MODELS)
    parser.add_argument(
        "--models",
        default=known,
        metavar="A,B",
        help=f"of {known}, or YAML files; default: {known}",
    )
    for name, of in (
        ("repeats", "turns"),
        ("batch", "edits a step"),
        ("rank", "rank of the hypernetwork's blocks"),
    ):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name}", type=_count, metavar="N", help=f"{of}; default: {default}")
    parser.add_argument(
        "--depths",
        type=_counts,
        default=(),
        metavar="A,B",
        help="also measure random models of so many layers",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a trial: few repeats, a small rank, a small random model",
    )


def _options_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sweep",
        metavar="FILE",
        help="a YAML file with a `grid` of settings to run it with; see docs/QUESTIONS.md",
    )
    parser.add_argument(
        "--cell-timeout", type=_count, metavar="S", help="fail if a cell takes longer, in seconds"
    )
    _option_memory(parser)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _options_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=_count, metavar="N", help="use the first N examples")
    parser.add_argument(
        "--max-new-tokens", type=_count, default=50, metavar="N", help="default: 50"
    )


@dataclass(frozen=True)
class _Command:
    run: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], None] | None
    does: str
    example: str
    out: str = ""  # the default of --out, in words
    given: tuple[str, ...] = (
        "words",
    )  # what it takes: "archive", "words" (CONFIG and settings), "folders"


COMMANDS = {
    "train": _Command(
        commands.do_train, _options_train,
        "train a hypernetwork and print its archive's path;\n`archive: null` starts anew, a path goes on",
        "configs/smollm2-135m.yaml max_iters=500 --out runs/first",
        "<results_dir>/train",
    ),
    "edit": _Command(
        commands.do_edit, _options_edit,
        "make edits with an archive and print what the model writes before and after;\n"
        "one edit can be kept: as an adapter, as an edited model, or as a file; a page tells of all",
        "archive=runs/first/archive.safetensors --prompt 'The capital of France is' --target Lyon",
    ),
    "evaluate": _Command(
        commands.do_evaluate, _options_evaluate,
        "score an archive's edits on examples, or a baseline's",
        "archive=runs/first/archive.safetensors --limit 50 --mode sequential --out runs/scores",
    ),
    "inspect": _Command(
        commands.do_inspect, None, "print what an archive says of itself", "runs/first/archive.safetensors --json",
        given=("archive",),
    ),
    "import": _Command(
        commands.do_import, None,
        "turn an archive of the original MEND or EasyEdit into one of this kit, without\nrunning anything in it; "
        "CONFIG is its configuration (inner_params in its order)",
        "models/MEND/gpt2-xl gpt2-xl.yaml --out runs/imported", given=("archive", "words"),
    ),
    "export": _Command(
        commands.do_export, None, "write an archive of this kit as the file that EasyEdit reads",
        "runs/imported/archive.safetensors gpt2-xl.yaml --out runs/exported", given=("archive", "words"),
    ),
    "conformance": _Command(
        commands.do_conformance, None,
        "compare with numbers recorded from the published code: factors, updates, logits,\nscalars, training losses",
        "../shared/reference", given=("folders",),
    ),
    "sites": _Command(
        commands.do_sites, _options_sites,
        "list what can be edited in a model, or in the model of a configuration, and what\n"
        "`inner_params: auto` picks there; reads the model's configuration only, no weights",
        "openai-community/gpt2 --all",
    ),
    "plan": _Command(
        commands.do_plan, _options_plan,
        "predict memory and time of every phase of training, before anything is loaded: from the\n"
        "shapes of model and texts, and a short measurement of this machine",
        "configs/llama-7b.yaml --memory 8GB",
    ),
    "bench": _Command(
        commands.do_bench, _options_bench,
        "measure what training and editing cost, against a textbook MEND on the same model;\n"
        "about 12 minutes, 14 GB and 2 CPU cores for both models",
        "--models smollm2-135m --depths 12,24,48 --out runs/bench", given=(),
    ),
    "report": _Command(
        commands.do_report, _options_report,
        "run the notebooks and lay index.html over them: `archive: null` trains, then edits;\n"
        "a path only edits. Settings are hyperparameters, or the notebooks' parameters (test_limit=50).\n"
        "--sweep runs it once for every combination of a grid",
        "max_iters=500 test_limit=50 --out runs/quick",
        "runs/report, or runs/sweep",
    ),
}  # fmt: skip


WRITES = {"conformance": "", "bench": " and figures"}
"""What commands write besides results.json, where it is not rows."""

READERS = ("inspect", "plan", "sites")
"""Commands that write nothing."""


def _top_parser() -> argparse.ArgumentParser:
    indent = "\n" + " " * 14
    listing = "".join(
        f"\n  {name:12}{c.does.replace(chr(10), indent)}" for name, c in COMMANDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m mendkit",
        usage="python -m mendkit COMMAND ...  (COMMAND --help says more)",
        description=f"Train and use MEND model editors.\n{listing}",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=[*COMMANDS], metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _parser(name: str, command: _Command) -> argparse.ArgumentParser:
    usage = {"archive": "ARCHIVE", "words": "[CONFIG] [key=value ...]", "folders": "DIR ..."}
    usage["words"] = "[MODEL|CONFIG] [key=value ...]" if name == "sites" else usage["words"]
    given = " ".join(usage[kind] for kind in command.given)
    parser = argparse.ArgumentParser(
        prog=f"python -m mendkit {name}",
        usage=f"python -m mendkit {name} {given} [options]",
        description=command.does,
        epilog=f"example:\n  python -m mendkit {name} {command.example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if "archive" in command.given:
        parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="an archive's path")
    if "folders" in command.given:
        parser.add_argument(
            "folders",
            type=Path,
            nargs="+",
            metavar="DIR",
            help="folders of reference vectors, or of such folders",
        )
    if "words" in command.given:
        words = "a YAML file (default: configs/smollm2-135m.yaml) and settings that win over it"
        words = f"a hub id, a model folder, a GGUF file, or {words}" if name == "sites" else words
        parser.add_argument("words", nargs="*", metavar="CONFIG key=value", help=words)
    if name not in READERS:
        needed = name in ("import", "export")
        writes = "the archive" if needed else "results.json" + WRITES.get(name, " and rows.jsonl")
        out = f"default: {command.out}" if command.out else f"write {writes} there"
        parser.add_argument("--out", type=Path, required=needed, metavar="DIR", help=out)
    parser.add_argument("--json", action="store_true", help="JSON on stdout and nothing else there")
    if name not in (*READERS, "report"):
        parser.add_argument(
            "--overwrite", action="store_true", help="replace an earlier run's files"
        )
    if command.options is not None:
        command.options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
