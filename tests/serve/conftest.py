from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Serving, serving


@pytest.fixture(scope="session")
def server(sd: Path) -> Iterator[Serving]:
    """The SD miniature, served with the defaults: 64x64, text-to-image and image-to-image, 1 to 4 steps."""
    with serving(sd) as found:
        yield found
