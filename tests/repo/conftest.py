"""Syntax trees are kept for the tests of one module, and not for whatever runs in this process afterwards."""

from collections.abc import Iterator

import pytest
from repo.source_tree import parse


@pytest.fixture(scope="module", autouse=True)
def _forget_trees() -> Iterator[None]:
    yield
    parse.cache_clear()
