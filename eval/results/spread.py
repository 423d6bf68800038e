"""Spreads of repeated measurements as plain numbers."""

import statistics
from collections.abc import Sequence
from typing import TypedDict


class SpreadFields(TypedDict):
    """The fields of `speedstack.eval.results.schema.Spread`."""

    median: float
    q1: float
    q3: float
    minimum: float
    maximum: float
    num_repeats: int


def spread_fields(values: Sequence[float]) -> SpreadFields:
    """Median, quartiles (linear interpolation between closest ranks) and extremes of at least one value."""
    ordered = sorted(values)
    # One value has no quartiles; two or more interpolate as numpy's default does.
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": statistics.median(ordered),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "minimum": ordered[0],
        "maximum": ordered[-1],
        "num_repeats": len(ordered),
    }
