"""Which table a call follows: of its step count, its strength, and the guidance of an LCM."""

import math

from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.numbers import is_number


def table_of(chain: OpenChain, steps: int | None, strength: float | None, guidance_scale: float) -> str:
    """Return the name of the table that a call follows.

    `steps` None: the fewest that make a step at this strength. `strength` None: the bundle's default. A chain without
    an image has no strength; one whose timesteps depend on it has tables for some. Raises InputError if there is no
    such table, or if the steps at this strength are none.
    """
    tables = chain.chain.tables.values()
    guidance = _one_of(chain, "guidance_scale", guidance_scale, {t.guidance_scale for t in tables})
    if "strength" not in chain.chain.defaults:
        if strength is not None:
            raise InputError(f"strength was given, and the chain {chain.name} starts from no image; leave it out")
        return chain.find(chain.steps[0] if steps is None else steps, guidance_scale=guidance)
    strength = chain.chain.defaults["strength"] if strength is None else strength
    if not is_number(strength) or not 0 <= strength <= 1:
        raise InputError(f"strength={strength!r}: a number from 0 to 1 was expected")
    fixed = {t.strength for t in tables}
    if fixed != {None}:  # all steps are made, and the strength decides where they begin
        of = _one_of(chain, "strength", float(strength), fixed)
        return chain.find(chain.steps[0] if steps is None else steps, guidance_scale=guidance, strength=of)
    if chain.chain.stream:
        return _of_stream(chain, steps, strength, guidance)
    if steps is None:
        steps = next((n for n in chain.steps if _made(n, strength)), chain.steps[0])
    chain.find(steps, guidance_scale=guidance)  # of steps that the bundle lacks, that is what helps
    if not (made := _made(steps, strength)):
        raise InputError(_no_step(chain, steps, strength))
    return chain.find(steps, begin=steps - made, guidance_scale=guidance)


def _of_stream(chain: OpenChain, steps: int | None, strength: float, guidance_scale: float | None) -> str:
    """Return the name of the table of a stream, whose frames all make as many steps as it has rows."""
    made = chain.chain.stream
    if steps is not None and steps not in chain.steps:
        chain.find(steps)  # which says what there is
    for count in chain.steps if steps is None else [steps]:
        if _made(count, strength) == made:
            return chain.find(count, begin=count - made, guidance_scale=guidance_scale)
    ends = {n: (math.ceil(1000 * made / n) / 1000, math.floor(1000 * (made + 1) / n) / 1000) for n in chain.steps}
    told = {n: "1" if n == made else f"{least:g} to below {most:g}" for n, (least, most) in ends.items()}
    raise InputError(
        f"strength={strength}"
        + ("" if steps is None else f" with num_inference_steps={steps} makes {_made(steps, strength)} steps")
        + f": a frame of this stream makes {made}, so that there is "
        + ", ".join(f"num_inference_steps={n} with strength {of}" for n, of in told.items())
        + "; choose one, or build another bundle with build-engine SOURCE --stream-batch"
    )


def least_strength(steps: int) -> float:
    """Return the least strength, as a float, at which one of `steps` is made."""
    strength = 1 / steps
    return strength if _made(steps, strength) else math.nextafter(strength, 2)  # 49 · (1/49) is below 1


def _made(steps: int, strength: float) -> int:
    """Return how many of the steps diffusers makes at a strength: its own product of floats, rounded down."""
    return min(int(steps * strength), steps)


def _no_step(chain: OpenChain, steps: int, strength: float) -> str:
    least = next((n for n in range(1, 10_001) if _made(n, strength)), None)
    if least is None:
        return f"strength={strength} makes no step: a larger one was expected"
    built = "" if least in chain.steps else " (build another bundle with build-engine SOURCE --steps)"
    return (
        f"num_inference_steps={steps} at strength={strength} makes no step: at least {least} steps{built} or a "
        "larger strength was expected"
    )


def _one_of(chain: OpenChain, argument: str, value: float, built: set[float | None]) -> float | None:
    """Return the value if tables are made for it; None if they do not depend on it."""
    known = sorted(v for v in built if v is not None)
    if known and value not in known:
        raise InputError(
            f"{argument}={value!r}: the tables of the chain {chain.name} are made for {', '.join(map(str, known))}; "
            f"build another bundle with build-engine SOURCE --{argument.replace('_', '-')}s"
        )
    return value if known else None
