"""Numbers that the columns of windows and their kernels share.

What a column keeps is stored under its number, so numbers never change.
"""

from __future__ import annotations

(FIRST, LAST, MIN, MAX, SUM, COUNT, MEAN, WEIGHTED, EWM, SKETCH,
 DISTINCT, TOP_COUNT, TOP_SUM) = range(13)  # fmt: skip
KEEPS_VALUES = DISTINCT  # from here on a column has a row for each of its values

# Words of a plan's row: the first word of the column's values (and of its weights), its place in a
# window's row, how many words a value has and whether it is text, a half-life or a number of
# places, and the limit of different values.
OP, COLUMN, WEIGHT, PLACE, WORDS, TEXT, SIZE, LIMIT, PLAN_WORDS = range(9)

CORRECTIONS, EVENTS, FIRST_TIME, LAST_TIME, AGGREGATES = range(5)  # words after a window's key
