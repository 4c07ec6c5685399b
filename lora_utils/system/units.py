"""Units of memory, apart from ``device``, which loads torch."""

GIB = 2**30
