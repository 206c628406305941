"""The warm process whose forks are killed, one for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .killable import Victims


@pytest.fixture(scope="session")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victims]:
    if not hasattr(os, "fork"):
        pytest.skip("forks the processes that it stops")
    found = Victims(tmp_path_factory.mktemp("victims") / "errors")
    yield found
    found.close()
