"""Checks the annotations of mendkit while tests run: jaxtyping's shapes and the other types."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484
