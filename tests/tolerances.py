"""Every tolerance of the tests of the core, with its formula. A comparison that is not here is exact."""

import math

EPS = 2.0**-23  # fp32: distance from 1 to the next number
EPS_BF16 = 2.0**-7

# fp32 against the float64 twin, relative to the largest entry: a step adds up about k·s' ≤ 2¹¹ products (√2¹¹·EPS),
# divides by roots of sums, solves systems of condition < 10 and sums over 3 to 5 steps.
TWIN = 2**8 * EPS

# The twin's choices are clear where the gap to the next candidate, relative to the largest, is this much: TWIN, once on
# each side.
MARGIN = 2 * TWIN

# 50 steps against torch.optim.AdamW, relative to lr: each step's quotient is rounded a few times, errors add up as a
# walk of 50 steps with |u| ≤ 10 (1/(1 − β1)); W itself, |W| < 8, is rounded once a step by half a unit.
ADAMW = 4 * math.sqrt(50) * 10 * EPS
ADAMW_WEIGHT = math.sqrt(50) * 8 * EPS

# Two orders of one fp32 sum of m terms of size 1: √m·EPS, here m ≤ 2¹².
SUM = 2**6 * EPS

# A correlation of k ≤ 128 terms from three bf16 parts, relative to the norm of the sketch: tensor cores cut off each
# sum at 2⁻²⁴ of its largest term, some three times k/16 times. Two parts alone would be wrong by up to 2⁻¹⁷ of a term.
CORRELATION = 2**3 * EPS

# Unit vectors: the norm of k signs of 1/√k, each rounded once.
UNIT = 2**4 * EPS

# Least squares with a ridge of 1e-5 on Gram matrices of condition < 10: the ridge moves the values by at most
# ridge·‖G⁻¹‖ < 1e-4 of their norm, and leaves the rest at most so far from orthogonal.
RIDGE_VALUE = 1e-4

# A rotation applied to fp32 numbers, relative to their norm: sums of r ≤ 16 products, twice.
TURN = 2**5 * EPS

# Standard deviations that chance alone exceeds in one of 10⁶ tries (two sides).
SIGMAS = 4.9
