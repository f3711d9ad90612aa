"""A text for covariances, and examples as tokens."""

import pytest

from mendkit.mend.batches import edit_tokens
from tests.oracles.claims import EXAMPLES, hparams
from tests.oracles.tiny import sentences


@pytest.fixture(scope="session")
def text() -> str:
    return "\n".join(sentences()[::7])


@pytest.fixture(scope="session")
def tokens():
    """The edit texts of the first `count` examples for a model."""

    def made(base, count=None):
        return [edit_tokens(base, hparams(), example) for example in EXAMPLES[:count]]

    return made
