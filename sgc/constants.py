"""Numbers that every backend shares."""

FLOOR = 1e-4  # R and C count for at least this share of their mean
CLIP = 3.0  # |w| of a whitened entry is at most this; Adam's own ratio rarely exceeds it
RIDGE = 1e-5  # keeps equal or opposite columns of A, common at small k, from making the least squares singular
