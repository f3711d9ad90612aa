"""Errors for users' mistakes: each names the value, what was expected and the remedy."""

import json
from typing import Any


class MendkitError(ValueError):
    """Base of every error that a user can mend."""


class HyperParamError(MendkitError):
    """A hyperparameter file or override is wrong; `key` is the key at fault, where there is one."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class DataError(MendkitError):
    """A record or data file is wrong: the message names file, record and field."""


class LimitError(DataError):
    """A text or target has more tokens than the settings allow."""


class ModelError(MendkitError):
    """A base model cannot be loaded, or has no such edit site."""


class ArchiveError(MendkitError):
    """An archive or a saved edit is missing, damaged, or belongs to another base model."""


def reason(error: Exception) -> str:
    """The first line of what a library says, or its error's class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(value: Any) -> str:
    """A user's value for an error message: null, true and false as files spell them; cut."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "a number of too many digits"
    return text if len(text) <= 80 else text[:77] + "..."
