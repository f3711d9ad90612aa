"""Files of examples, and of held-out text.

`layouts.py` says what one record means.
"""

import ast
import bz2
import csv
import difflib
import gzip
import io
import json
import logging
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, reason
from ..runs import user_path, without_repeats
from .examples import PROBES, EditExample, Probe
from .layouts import ANSWERS, LEAST, PAIRS, Columns, parse
from .records import UNFOLD

logger = logging.getLogger(__name__)

FACTS = {
    f"facts:{split}": Path(__file__).parent / "facts" / f"{split}.jsonl"
    for split in ("train", "validation", "test")
}
"""The kit's own facts."""

READABLE = "JSON, JSON lines, CSV, TSV or parquet, plain or as .gz, .bz2 or .xz"
COMPRESSED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma}


@dataclass(frozen=True)
class Skipped:
    """A record that was left out, and why."""

    where: str
    why: str


class Examples(tuple[EditExample, ...]):
    """A tuple of examples that knows which records were skipped, and which fields left out."""

    skipped: tuple[Skipped, ...] = ()
    left_out: Mapping[str, int] = {}

    @classmethod
    def of(cls, examples: Sequence[EditExample], skipped: Sequence[Skipped] = ()) -> "Examples":
        """Freeze `examples`, remembering the `skipped` records."""
        self = cls(examples)
        self.skipped = tuple(skipped)
        return self


def read_examples(
    source: str | Path,
    *,
    limit: int | None = None,
    skip_invalid: bool = False,
    columns: Any = None,
) -> Examples:
    """Read edit examples from a file, from the hub, or the kit's own facts by name.

    `source` is a path, `"hf:owner/name[:split]"`, or one of `FACTS`. The layouts of published data
    are recognised, see docs/DATA_AND_MODELS.md. `columns` maps fields of an example to the names of
    a table, such as `{"prompt": "question"}`.

    A bad record raises DataError naming file, record and field. With `skip_invalid` it is left out,
    counted (`.skipped`) and logged. Fields that are not read are counted (`.left_out`).
    `limit` keeps the first n valid examples.
    """
    records: Iterable[tuple[str, Any]] = _records(source)
    names: Columns = {}
    if columns and str(source) not in FACTS:
        records = list(records)
        names = _columns(columns, source, records)
    examples: list[EditExample] = []
    skipped: list[Skipped] = []
    left_out: Counter[str] = Counter()
    for where, record in records:
        if limit is not None and len(examples) >= limit:
            break
        try:
            found, left = parse(_sound(record), names)
        except DataError as error:
            if not skip_invalid:
                raise DataError(f"{where}: {error}") from None
            skipped.append(Skipped(where, str(error)))
            continue
        examples += found
        left_out.update(left)
    if skipped:
        told = "%s: skipped %d invalid records, first: %s: %s"
        logger.warning(told, source, len(skipped), skipped[0].where, skipped[0].why)
    if left_out and str(source) not in FACTS:
        logger.info("%s: fields not read, and how often: %s", source, dict(left_out))
    if not examples:
        raise DataError(f"{source}: no valid example in it; expected records such as {LEAST}")
    read = Examples.of(examples[:limit], skipped)
    read.left_out = left_out
    return read


def _columns(columns: Any, source: object, records: Sequence[Any]) -> Columns:
    """The names of a table by field, checked against the fields of an example and the records."""
    names: dict[str, tuple[str, ...]] = {}
    for field, listed in dict(columns).items():
        names[field] = (listed,) if isinstance(listed, str) else tuple(listed)
        if field not in (legal := [*EditExample.__dataclass_fields__, *PAIRS, *ANSWERS]):
            raise DataError(f"columns: no field {field!r}; the nearest: {_nearest(field, legal)}")
    there = json.dumps([record for _, record in records], default=str, ensure_ascii=False)
    wanted = [name for listed in names.values() for name in listed]
    missing = [name for name in wanted if json.dumps(name, ensure_ascii=False) + ":" not in there]
    if missing and len(missing) == len(wanted):
        logger.warning("%s has none of the names in `columns`: read without them", source)
        return {}
    if missing:
        found = {name: None for _, record in records if isinstance(record, dict) for name in record}
        near = f"the nearest: {_nearest(missing[0], [*found])}"
        raise DataError(f"{source}: columns: no record has {', '.join(map(repr, missing))}; {near}")
    return names


def _nearest(name: str, names: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, names, 3, 0))


def write_examples(examples: Sequence[EditExample], path: str | Path) -> None:
    """Write examples as the kit's own JSON lines."""
    lines = []
    for example in examples:
        record = _filled(example)
        for role in PROBES:
            if role in record:
                record[role] = [_filled(probe) for probe in record[role]]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    user_path(path).write_text("".join(lines), encoding="utf-8")


def _filled(value: EditExample | Probe) -> dict[str, Any]:
    """The fields that hold something."""
    return {name: held for name, held in vars(value).items() if held not in (None, (), {})}


def read_text(path: str | Path) -> str:
    """Held-out text, as in WikiText's raw files.

    Raises DataError if it is missing, no text, or blank.
    """
    content = _decoded(*_content(path))
    if not content.strip():
        raise DataError(f"{path}: no text in it")
    return content


def _content(source: str | Path) -> tuple[Path, bytes]:
    """The path of a file, and its bytes, decompressed."""
    path = user_path(source)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        raise DataError(f"{path} is a folder; give one of its files: {', '.join(files[:5])}")
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; give a data file, hf:owner/name, or one of {', '.join(FACTS)}"
        )
    try:
        content = path.read_bytes()
        for magic, module in COMPRESSED.items():
            if content.startswith(magic):
                return path, module.decompress(content)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return path, content


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        told = f"not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8, or give"
        raise DataError(f"{path}: {told} {READABLE}") from None


def _records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of every record. The record of a line that is no JSON is a DataError."""
    name = str(source)
    if name.startswith("facts:") and name not in FACTS:
        raise DataError(f"{name}: no such facts of the kit; expected one of {', '.join(FACTS)}")
    if name.startswith("hf:"):
        yield from _numbered(name, _from_hub(name))
        return
    path, content = _content(FACTS.get(name, source))
    if content.startswith(b"PAR1"):
        yield from _numbered(path, _from_parquet(path, content))
        return
    decoded = _decoded(path, content)
    kind = re.sub(r"\.(gz|bz2|xz)$", "", path.name.lower()).rpartition(".")[2]
    is_json = kind.startswith("json") or decoded.lstrip()[:1] in ("{", "[")
    if kind in ("csv", "tsv") or not is_json:
        yield from _from_table(path, decoded)
        return
    rows = _from_json(path, decoded)
    if rows is not None:
        yield from _numbered(path, rows)
        return
    for number, line in enumerate(decoded.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _value(line)


def _numbered(place: object, rows: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows):
        yield f"{place}: record {number}", row


def _value(content: str) -> Any:
    """The value of JSON, or a DataError that says why it has none."""
    try:
        return json.loads(content, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:  # also for numbers of too many digits
        return DataError(f"invalid JSON: {error}")


def _from_json(path: Path, content: str) -> list[Any] | None:
    """The records of a JSON file: a list, `records`, one object, columns; None for lines."""
    whole = _value(content)
    if isinstance(whole, DataError):
        first = content.lstrip().partition("\n")[0].strip()
        if first != "{" and (first[:1] != "[" or not isinstance(_value(first), DataError)):
            return None
        raise DataError(f"{path}: {whole}")
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else [whole]
    for name in ("records", "data", "examples", "edits"):
        if isinstance(whole.get(name), list):
            return whole[name]
    prompts = whole.get("prompts", whole.get("prompt"))
    if UNFOLD.keys() & whole.keys() - {"locality_inputs"} or not isinstance(prompts, list):
        return [whole]  # one record, though its values may be objects or lists
    return [_at(whole, i, f"{path}: {len(prompts)} prompts") for i in range(len(prompts))]


def _at(column: Any, row: int, place: str) -> Any:
    """The value of one row in columns, which may stand in objects by kind."""
    if isinstance(column, dict):
        return {key: _at(value, row, f"{place}, `{key}`") for key, value in column.items()}
    if not isinstance(column, list):
        return column
    if row >= len(column):
        raise DataError(f"{place}: only {len(column)} values")
    return column[row]


def _from_table(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    """The rows of a table, whose header has the separator; blank cells are missing fields."""
    header = content.lstrip().partition("\n")[0]
    separator = max(",\t;|", key=header.count)
    rows = csv.DictReader(io.StringIO(content), delimiter=separator, restkey="further cells")
    try:
        if len(set(rows.fieldnames or ())) < len(rows.fieldnames or ()):
            raise csv.Error("a column is given twice")
        for row in rows:
            record: Any = {name or "index": _cell(value) for name, value in row.items()}
            if "further cells" in row:
                record = DataError(
                    f"more cells than columns; put a cell with {separator!r} in quotes"
                )
            yield f"{path}:{rows.line_num}", record
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: no table: {error}") from None


def _cell(value: Any) -> Any:
    """A cell; a list or object in it, as JSON or as Python writes it, is one."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    if value.strip()[0] + value.strip()[-1] in ("[]", "{}"):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(value)
    return value


def _from_parquet(path: Path, content: bytes) -> list[Any]:
    import pandas as pd

    try:
        return _from_frame(pd.read_parquet(io.BytesIO(content)))
    except ImportError:
        raise DataError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    except Exception as error:  # pyarrow's errors have no common base
        raise DataError(f"{path}: damaged parquet: {error}") from None


def _from_hub(source: str) -> list[Any]:
    """The rows of a data set on the hub, or of a folder that `datasets` reads."""
    name, _, split = source.removeprefix("hf:").partition(":")
    try:
        from datasets import load_dataset

        return _from_frame(load_dataset(str(user_path(name)), split=split or "train").to_pandas())
    except ImportError:
        raise DataError(f"{source} needs `datasets`: pip install datasets pyarrow") from None
    except Exception as error:  # the hub's client and the readers have many
        said = f"{reason(error)}; expected hf:owner/name or hf:owner/name:split"
        raise DataError(f"{source}: {said}") from None


def _from_frame(frame: Any) -> list[Any]:
    whole = frame.convert_dtypes()  # whole numbers stay whole beside missing ones
    return json.loads(whole.to_json(orient="records", force_ascii=False, date_format="iso"))


def _sound(record: Any) -> Any:
    if isinstance(record, DataError):
        raise record
    return record
