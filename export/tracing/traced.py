"""What the traced modules have in common."""

from torch import nn


class Traced(nn.Module):
    """A module that is all the arithmetic of a graph."""

    folded: frozenset[str] = frozenset()
    """Parameters of the component that are in the table, or of which this module holds a part."""
