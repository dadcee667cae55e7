"""Disasters in British coal mines, for scripts about a rate that changes.

The explosions in British coal mines that killed ten or more, a count for each year from 1851 to 1962, 191 in all:
Jarrett (1979), A note on the intervals between coal-mining disasters, Biometrika 66, 191-193.
"""

import numpy as np

FIRST = 1851
# A row for each decade from 1851, and what is left.
COUNTS = """
4 5 4 1 0 4 3 4 0 6
3 3 4 0 2 6 3 3 5 4
5 3 1 4 4 1 5 5 3 4
2 5 2 2 3 4 2 1 3 2
2 1 1 1 1 3 0 0 1 0
1 1 0 0 3 1 0 3 2 2
0 1 1 1 0 1 0 1 0 0
0 2 1 0 0 0 1 1 0 2
3 3 1 1 2 1 1 1 1 2
4 2 0 0 0 1 4 0 0 0
1 0 0 0 0 0 1 0 0 1
0 1
"""


def series():
    """Return the years since 1851 and their counts, a row a year."""
    counts = np.array(COUNTS.split(), float)
    return np.column_stack([np.arange(len(counts)), counts])
