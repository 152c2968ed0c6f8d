"""No test asks the network, nor leaves anything in a cache of its user's."""

import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that the hub would have to be asked about is refused at once


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHKEEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
