"""Several pictures in one pass: which requests can be drawn together, and the request of them all."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.inputs.arrays import Array
from turbochain.runtime.request import Request


def kind(bundle: Bundle, request: Request) -> Hashable:
    """Return what requests of one picture must have in common to be drawn in one pass.

    Their chain's task and size, the table, the modes, and all numbers that they give.
    """
    chain = bundle.open_chain(request.chain)
    feeds = chain.chain.feeds
    numbers = tuple((name, value) for name, value in request.inputs if feeds[name].is_ == "number")
    names = tuple(name for name, _ in request.inputs)
    return chain.chain.task, chain.size, request.table, request.modes, request.output_type, names, numbers


def most(bundle: Bundle, request: Request) -> int:
    """Return the largest batch that a request's task and size are built for."""
    return max(bundle.open_chain(name).batch for name in _chains(bundle, request))


def together(bundle: Bundle, requests: Sequence[Request]) -> Request:
    """Return one request for the pictures of all, which are of one kind; its chain is the smallest that holds them."""
    if len(requests) == 1:
        return requests[0]
    first, feeds = requests[0], bundle.open_chain(requests[0].chain).chain.feeds
    inputs = []
    for at, (name, value) in enumerate(first.inputs):
        if feeds[name].is_ != "number":
            value = Array(np.concatenate([request.inputs[at][1].value for request in requests]))
        inputs.append((name, value))
    chain = bundle.open_chain(first.chain)
    return replace(
        first,
        chain=bundle.find_chain(chain.chain.task, chain.size, len(requests)),
        prompts=tuple(p for request in requests for p in request.prompts),
        negative_prompts=tuple(p for request in requests for p in request.negative_prompts),
        seeds=tuple(s for request in requests for s in request.seeds),
        inputs=tuple(inputs),
    )


def _chains(bundle: Bundle, request: Request) -> list[str]:
    own = bundle.open_chain(request.chain)
    chains = bundle.manifest.chains
    return [name for name, c in chains.items() if c.task == own.chain.task and tuple(c.size) == own.size]
