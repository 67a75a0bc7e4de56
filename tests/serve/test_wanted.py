"""Which of the built sizes is drawn if another is asked for."""

import pytest

from turbochain.runtime.serve.wanted import nearest

SQUARE, SMALL, WIDE, TALL = (512, 512), (64, 64), (768, 1344), (1344, 768)  # height, width


@pytest.mark.parametrize(
    ("built", "asked", "expected"),
    [
        ([SMALL, SQUARE], None, SMALL),
        ([SMALL, SQUARE], (1024, 1024), SQUARE),
        ([SMALL, SQUARE], (1, 1), SMALL),
        ([SQUARE, WIDE, TALL], (1536, 1024), TALL),
        ([SQUARE, WIDE, TALL], (1024, 1536), WIDE),
        ([SQUARE, WIDE], TALL, SQUARE),  # WIDE has the area, and would turn a portrait into a landscape
        ([SMALL, (512, 768)], SQUARE, (512, 768)),  # SMALL has the shape, and would lose everything else
        ([SQUARE, WIDE], (65536, 1), SQUARE),
    ],
)
def test_nearest(built: list[tuple[int, int]], asked: tuple[int, int] | None, expected: tuple[int, int]) -> None:
    assert nearest(built, asked) == nearest(built[:1] + built[:0:-1], asked) == expected
