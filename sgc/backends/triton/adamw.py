"""AdamW of the tensors that are too small to be compressed, many in a launch: the kernels of `sgc.moments.adamw`.

`sgc.backends.triton.whitened` lists them with the others, their formulas and the bytes that they move.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgc.backends.triton.table import (
    BETA1,
    BETA2,
    EPS,
    FIRST,
    GRADIENT,
    KEEP,
    LOG_BETA1,
    LOG_BETA2,
    LR,
    NUMEL,
    SECOND,
    SEED,
    TILE_AT,
    WEIGHT,
    correction,
    count_of,
    eights,
    mixed,
    noise_of,
    rate,
    read,
    sum_of,
    word,
    write,
)

BLOCK = tl.constexpr(1024)  # entries of a program for a tensor kept dense


@triton.jit(do_not_specialize=["tensors"])
def adamw_sums(table, owner, totals, tensors, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Σ g² of every block of many tensors.

    Args: table, owner as in `tile_sums`; totals (programs, 2) fp32, the first column is stored.
    """
    program = tl.program_id(0)
    number = tl.load(owner + program)
    numel = eights(word(table, tensors, number, NUMEL), ALIGNED)
    at = (program - word(table, tensors, number, TILE_AT)) * BLOCK + tl.arange(0, BLOCK)
    x = read(word(table, tensors, number, GRADIENT), at, at < numel, DTYPE, ALIGNED)
    tl.store(totals + 2 * program, tl.sum(x * x, 0))


@triton.jit(do_not_specialize=["tensors"])
def adamw_step(
    table, owner, totals, missed, norms, missed_now, tensors,
    DTYPE: tl.constexpr, WEIGHTS: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """AdamW in fp32 on many tensors: m, v ← EMA, W ← (1 − decay)·W − lr·m̂/(√v̂ + ε), after `adamw_sums`.

    Args: as in `move_moments` and `adamw_sums`.
    """
    program = tl.program_id(0)
    number = tl.load(owner + program)
    numel = eights(word(table, tensors, number, NUMEL), ALIGNED)
    first = word(table, tensors, number, TILE_AT)
    local = program - first
    norm = tl.sqrt_rn(sum_of(totals, first, tl.cdiv(numel, BLOCK), 2))
    count, moves, none = count_of(table, tensors, number, missed, norm)
    if local == 0:
        tl.store(norms + number, norm)
        tl.store(missed_now + number, none)

    keep = rate(table, tensors, number, KEEP).to(tl.float32)
    decays = (keep != 1.0) & (norm < float("inf"))
    at = local * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(moves, numel, 0)
    x = read(word(table, tensors, number, GRADIENT), at, inside, DTYPE, ALIGNED)
    m_at, v_at = word(table, tensors, number, FIRST), word(table, tensors, number, SECOND)
    m = read(m_at, at, inside, tl.float32, ALIGNED)
    v = read(v_at, at, inside, tl.float32, ALIGNED)
    beta1, beta2 = rate(table, tensors, number, BETA1), rate(table, tensors, number, BETA2)
    m += (1 - beta1).to(tl.float32) * (x - m)
    v = beta2.to(tl.float32) * v + (1 - beta2).to(tl.float32) * x * x
    write(m_at, at, m, inside, 0, tl.float32, ALIGNED, False)
    write(v_at, at, v, inside, 0, tl.float32, ALIGNED, False)
    mean = m / correction(rate(table, tensors, number, LOG_BETA1), count)
    root = tl.sqrt_rn(v) / tl.sqrt_rn(correction(rate(table, tensors, number, LOG_BETA2), count))
    eps = rate(table, tensors, number, EPS).to(tl.float32)
    u = tl.where(inside, mean / (root + eps), 0.0)
    lr = rate(table, tensors, number, LR).to(tl.float32)
    weight = word(table, tensors, number, WEIGHT)
    touched = at < tl.where(moves | decays, numel, 0)
    w = read(weight, at, touched, WEIGHTS, ALIGNED)
    key = mixed(word(table, tensors, number, SEED).to(tl.uint32))
    noise = noise_of(key, mixed(at.to(tl.uint32)))
    write(weight, at, w * keep - lr * u, touched, noise, WEIGHTS, ALIGNED, STOCHASTIC)
