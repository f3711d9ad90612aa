"""YAML with the scalars of version 1.2 (`1e-6` is a number, `no` is text)."""

import logging
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from .errors import HyperParamError, shown
from .runs import user_path

logger = logging.getLogger(__name__)

# what PyYAML raises, a faulty explicit tag such as `!!int x` included
_YAML_ERRORS = (yaml.YAMLError, AttributeError, LookupError, RecursionError, ValueError)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 (and `_` in integers), without merge keys."""

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]  # the stubs: an instance's
        None: [
            (f"tag:yaml.org,2002:{kind}", re.compile(rf"({pattern})\Z"))
            for kind, pattern in (
                ("null", "~|null|Null|NULL|"),
                ("bool", "true|True|TRUE|false|False|FALSE"),
                ("int", r"[-+]?(0|[1-9][0-9_]*)"),
                ("float", r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?"),
            )
        ]
    }


def read_value(text: str) -> Any:
    """The value of a YAML text. Raises ValueError that says what is wrong with it."""
    try:
        return yaml.load(text, _StrictLoader)
    except _YAML_ERRORS as error:
        raise ValueError(f"not valid YAML: {getattr(error, 'problem', None) or error}") from None


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The top-level mapping of a YAML file, and the line of each key.

    Raises HyperParamError naming file and line.
    """
    path = user_path(path)
    try:
        loader = _StrictLoader(path.read_bytes())
        root = loader.get_single_node()
        nodes = root.value if isinstance(root, yaml.MappingNode) else []
        pairs = [(key, loader.construct_object(value, deep=True)) for key, value in nodes]
    except OSError as error:
        raise HyperParamError(
            f"{path}: cannot be read ({error.strerror}); expected a YAML file"
        ) from None
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or error
        raise HyperParamError(f"{place}: not valid YAML: {problem}") from None
    if not pairs:
        raise HyperParamError(f"{path}: no keys found; expected lines `key: value`")
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for node, value in pairs:
        line, key = node.start_mark.line + 1, node.value
        if node.tag != "tag:yaml.org,2002:str":
            raise HyperParamError(f"{path}:{line}: a key must be text, got {shown(key)}")
        if key in lines:
            told = f"{path}:{line}: the key {key!r} is given twice, see line {lines[key]}"
            if value != values[key]:
                raise HyperParamError(told)
            logger.warning("%s, with the same value", told)
        values[key], lines[key] = value, line
    return values, lines
