"""Errors for users' mistakes: each names the value, what was expected and the remedy."""


class MendkitError(ValueError):
    """Base of every error that a user can mend."""


class HyperParamError(MendkitError):
    """A hyperparameter file or override is wrong."""


class DataError(MendkitError):
    """A record or data file is wrong: the message names file, record and field."""


class LimitError(DataError):
    """A text or target has more tokens than the settings allow."""


class ModelError(MendkitError):
    """A base model cannot be loaded, or has no such edit site."""


class ArchiveError(MendkitError):
    """An archive or a saved edit is missing, damaged, or belongs to another base model."""
