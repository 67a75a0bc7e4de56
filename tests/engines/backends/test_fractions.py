"""The progress of a build, from the phases that TensorRT's builder reports."""

import random

from turbochain.engines.backends.fractions import Fractions


def test_fractions_never_go_back() -> None:
    """Phases that nest, repeat, run at once, skip steps and end early."""
    for seed in range(50):
        draw, told, values, running = random.Random(seed), Fractions(), [0.0], []
        told.start("whole", None, 10)
        for i in range(300):
            if draw.random() < 0.4:
                name = f"phase {i % 7}"
                if name not in running:
                    told.start(name, draw.choice(["whole", None, *running]) if running else "whole", draw.randint(0, 5))
                    running.append(name)
            elif running and draw.random() < 0.5:
                told.step(draw.choice(running), draw.randint(0, 6))
            elif running:
                told.finish(running.pop(draw.randrange(len(running))))
            elif draw.random() < 0.1:
                told.step("whole", draw.randint(0, 9))
            values.append(told.value)
        told.finish("whole")
        values.append(told.value)
        assert values == sorted(values) and values[-1] == 1 and all(0 <= value <= 1 for value in values)


def test_a_fraction_counts_steps_and_what_is_inside_them() -> None:
    told = Fractions()
    told.start("whole", None, 4)
    told.step("whole", 0)
    assert told.value == 1 / 4
    told.start("part", "whole", 2)
    told.step("part", 0)
    assert 1 / 4 < told.value < 2 / 4
    told.finish("part")
    assert told.value < 2 / 4
    told.step("whole", 1)
    assert told.value == 2 / 4
