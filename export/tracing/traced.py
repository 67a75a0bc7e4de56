"""What the traced modules have in common."""

from torch import nn


class Traced(nn.Module):
    """A module that is all the arithmetic of a graph."""

    folded: frozenset[str] = frozenset()
    """The component's parameters that are in the table, or that this module holds a part of."""
