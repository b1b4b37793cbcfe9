"""Shares a number of bytes among images, so that the sum of their errors is as small as can be."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

CORE = 8  # images whose files are chosen together, from all combinations
RESOLUTION = 2**14  # of the limit: of combinations that take nearly as many bytes, only the best is kept

Table = Sequence[tuple[int, float]]


def share(tables: Sequence[Table], limit: int, least: int = 0) -> list[int]:
    """Chooses a file for each image.

    A Lagrange multiplier, one price of a byte for all images, chooses the files on the lower convex hull of each image.
    What is left of the limit is spent by choosing the files of a few images anew, those for which another file is
    worth nearly that price: of all combinations of their files that fit, the one with the smallest error is taken.

    Args:
        tables: for each image, the bytes and the error of every file that it may become.
        limit: the most bytes of all files together.
        least: the fewest bytes of all files together, if there are combinations that take so many.

    Returns:
        The place of the chosen file in the table of each image.

    Raises:
        ValueError: not even the smallest files fit.
    """
    hulls = [hull(table) for table in tables]
    chosen = [places[0] for places in hulls]
    taken = sum(table[place][0] for table, place in zip(tables, chosen, strict=True))
    if taken > limit:
        raise ValueError(f"the smallest files take {taken} bytes, more than {limit}")
    steps = [
        (_saved(tables[image], *step), image, step) for image, places in enumerate(hulls) for step in pairwise(places)
    ]
    steps.sort(key=lambda step: -step[0])  # stable, so that the steps of an image keep their order
    more = [tables[image][after][0] - tables[image][before][0] for _, image, (before, after) in steps]
    count = bisect_right(list(accumulate(more, initial=taken)), limit) - 1  # of the steps that fit one after another
    for _, image, (_, after) in steps[:count]:
        chosen[image] = after
    if count == len(steps):
        return chosen
    nearest = sorted(range(len(steps)), key=lambda number: abs(number - count))
    core = list(dict.fromkeys([*(steps[number][1] for number in nearest), *range(len(tables))]))[:CORE]
    others = sum(table[place][0] for i, (table, place) in enumerate(zip(tables, chosen, strict=True)) if i not in core)
    best = combined([tables[image] for image in core], limit - others, least - others)
    for image, place in zip(core, best, strict=True):
        chosen[image] = place
    return chosen


def hull(table: Table) -> list[int]:
    """The places in a table of the files on its lower convex hull, from the smallest file to that of least error."""
    kept: list[int] = []
    for place in sorted(range(len(table)), key=lambda place: table[place]):
        if kept and table[place][1] >= table[kept[-1]][1]:
            continue
        while len(kept) > 1 and _saved(table, *kept[-2:]) <= _saved(table, kept[-1], place):
            kept.pop()
        kept.append(place)
    return kept


def _saved(table: Table, before: int, after: int) -> float:
    """The error that each further byte saves, from one file to another."""
    return (table[before][1] - table[after][1]) / (table[after][0] - table[before][0])


def combined(tables: Sequence[Table], limit: int, least: int) -> list[int]:
    """The best combination of files of a few images; see `share`.

    Args:
        tables: as in `share`; the smallest files fit.
        limit: the most bytes of all together.
        least: likewise.
    """
    smallest = [min(table)[0] for table in tables]
    later = list(accumulate(reversed(smallest), initial=0))[-2::-1]  # the least that the images behind each will take
    sizes, errors = np.zeros(1, np.int64), np.zeros(1)  # of the combinations of the first images
    steps: list[np.ndarray] = []  # of each combination, the one that it continues and the last of its files
    for table, rest in zip(tables, later, strict=True):
        size = (sizes[:, None] + [file[0] for file in table]).ravel()
        error = (errors[:, None] + [file[1] for file in table]).ravel()
        fit = np.flatnonzero(size + rest <= limit)
        bucket = size[fit] * RESOLUTION // (limit + 1)
        order = np.lexsort((error[fit], bucket))
        best = fit[order[np.unique(bucket[order], return_index=True)[1]]]
        sizes, errors = size[best], error[best]
        steps.append(best)
    enough = np.flatnonzero(sizes >= least)
    candidates = enough if len(enough) else np.arange(len(sizes))
    end = int(candidates[errors[candidates].argmin()])
    chosen = []
    for table, best in zip(reversed(tables), reversed(steps), strict=True):
        end, place = divmod(int(best[end]), len(table))
        chosen.append(place)
    return chosen[::-1]
