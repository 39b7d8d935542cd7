"""The default path fused: row and column means of g² in one read, then W ← (1 − decay)·W − lr·w in another.

The twins are `sgc.whiten.square_sums` and `sgc.apply.apply_whitened`, and for tensors that are not compressed
`sgc.moments.adamw` with `sgc.apply.move`. One launch serves many tensors, through `sgc.backends.triton.table`. No
atomics: sums of a tensor are added in the same order every time, so equal gradients make equal bits. For a tensor of d
entries of b bytes and a weight of b' bytes:

| kernel | formula | bytes moved |
|---|---|---|
| `tile_sums` | Σⱼ gᵢⱼ², Σᵢ gᵢⱼ² of every tile | b·d read, d/22 written |
| `fold_sums` | the sums of the tiles of a row, a column; Σ of R and C as they will be | d/22 read |
| `move_moments` | ‖g‖; R ← EMA, C ← EMA; a, b | 4 times 4·(rows + cols) |
| `whiten_and_apply` | W ← (1 − decay)·W − lr·clip(g/(aᵢ·bⱼ + ε)) | b·d + b'·d read, b'·d written |
| `adamw_sums` | Σ g² of blocks | b·d read |
| `adamw_step` | ‖g‖; m, v ← EMA; W ← (1 − decay)·W − lr·m̂/(√v̂ + ε) | (b + b' + 8)·d read, (b' + 8)·d written |

Whether a gradient is finite, and not all zero, is decided on the device: `move_moments` and what follows leave alone
what must not move, and ‖g‖ is noted for the host to read later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgc import constants
from sgc.backends.triton.chunks import on_device_of
from sgc.backends.triton.table import (
    BETA2,
    COL_AT,
    COLS,
    EPS,
    FIRST,
    FOLD_AT,
    FOUR_WARPS,
    GRADIENT,
    KEEP,
    LOG_BETA2,
    LR,
    NUMEL,
    ONE_WARP,
    ROW_AT,
    ROWS,
    SECOND,
    SEED,
    SUMS_AT,
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

if TYPE_CHECKING:
    from sgc.codec.layout import Layout

CLIP = tl.constexpr(constants.CLIP)
FLOOR = tl.constexpr(constants.FLOOR)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

TILE = 1 << 15  # entries of a tile, which leave one sum for each of its rows and columns: 1/85 of the entries
SMALL_TILE = 1 << 13  # where such large ones would leave most of a GPU idle
SMALL_WAVE = 1 << 26  # entries that are few
SUMMED = 1024  # entries that the one warp of `tile_sums` loads at a time, 4 loads of 16 bytes a thread in bf16
MOVED = 2048  # entries that the four warps of `whiten_and_apply` load at a time
FOLDED = tl.constexpr(128)  # rows, or columns, that a program of `fold_sums` and `move_moments` finishes
FOLD = tl.constexpr(32)  # partial sums of each that it loads at a time


@triton.jit
def sum_tile(
    gradient, rows, cols, numel, local, row_part, col_part, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Row and column sums of g² of tile `local` of a grid: BM·STEPS rows, BN columns."""
    cols, numel = eights(cols, ALIGNED), eights(numel, ALIGNED)
    wide = tl.cdiv(cols, BN)
    across, down = local % wide, local // wide
    col = across * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(STEPS):
        row = (down * STEPS + step) * BM + tl.arange(0, BM)
        at = row[:, None] * cols + col[None, :]
        inside = (col < cols)[None, :] & (at < numel)
        x = read(gradient, at, inside, DTYPE, ALIGNED)
        square = x * x
        total += square
        tl.store(row_part + across * rows + row, tl.sum(square, 1), mask=row < rows)
    tl.store(col_part + down * cols + col, tl.sum(total, 0), mask=col < cols)


@triton.jit
def fold(part, count, size, at):
    """Sums (FOLDED,) of `count` partial sums of `size` entries each, of the entries `at`."""
    total = tl.zeros((FOLD, FOLDED), tl.float32)
    for start in range(0, count, FOLD):
        number = start + tl.arange(0, FOLD)
        inside = (number < count)[:, None] & (at < size)[None, :]
        total += tl.load(part + number[:, None].to(tl.int64) * size + at[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["tensors"])
def tile_sums(
    table, owner, parts, tensors,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Row and column sums of g² of every tile of many tensors, in one read of their gradients.

    Args: table (WORDS, tensors) int64; owner (programs,) int32, the tensor of each; parts fp32, where ROW_AT and COL_AT
    point to.
    """
    program = tl.program_id(0)
    number = tl.load(owner + program)
    rows, cols = word(table, tensors, number, ROWS), word(table, tensors, number, COLS)
    local = program - word(table, tensors, number, TILE_AT)
    row_part = parts + word(table, tensors, number, ROW_AT)
    col_part = parts + word(table, tensors, number, COL_AT)
    gradient, numel = word(table, tensors, number, GRADIENT), word(table, tensors, number, NUMEL)
    sum_tile(gradient, rows, cols, numel, local, row_part, col_part, DTYPE, ALIGNED, BM, BN, STEPS)


@triton.jit
def means(total, at, size, across, numel, is_row):
    """Turn sums over rows (over columns) into means, padding left out: a vector's last grid row ends early.

    Args: at, among `size` rows (cols); across: cols (rows), the entries of a sum.
    """
    ragged = size * across - numel
    ended = tl.where(is_row, at == size - 1, (at >= size - ragged) & (across > 1))
    real = across - tl.where(ended, tl.where(is_row, ragged, 1), 0)
    return total / real.to(tl.float32)


@triton.jit
def locate(table, owner, tensors, program):
    """Find what a program of `fold_sums` and `move_moments` finishes: rows, or columns, of a tensor.

    Returns the tensor, the program's number among its own, whether it has rows, how many rows (cols) there are, how
    many entries each has, and which of them are the program's.
    """
    number = tl.load(owner + program)
    rows, cols = word(table, tensors, number, ROWS), word(table, tensors, number, COLS)
    local = program - word(table, tensors, number, FOLD_AT)
    blocks = tl.cdiv(rows, FOLDED)
    is_row = local < blocks
    block = tl.where(is_row, local, local - blocks)
    at = block * FOLDED + tl.arange(0, FOLDED)
    return number, local, is_row, tl.where(is_row, rows, cols), tl.where(is_row, cols, rows), at


@triton.jit
def moved(table, tensors, number, is_row, total, at, size, across):
    """The address of R (of C), and its entries as they will be: R + (1 − β2)(mean − R)."""
    mean = means(total, at, size, across, word(table, tensors, number, NUMEL), is_row)
    address = tl.where(is_row, word(table, tensors, number, FIRST), word(table, tensors, number, SECOND))
    pointer = address.to(tl.pointer_type(tl.float32)) + at
    held = tl.load(pointer, mask=at < size, other=0.0)
    return pointer, held + (1 - rate(table, tensors, number, BETA2)).to(tl.float32) * (mean - held)


@triton.jit(do_not_specialize=["tensors"])
def fold_sums(table, owner, parts, totals, tensors, BN: tl.constexpr, BR: tl.constexpr):
    """Add up what the tiles of each row and column have summed, and what all rows have; R and C as they will be, too.

    Args: table, parts as in `tile_sums`; owner (programs,) int32; totals (programs, 2) fp32: Σg² of the program's rows,
    and the sum of its part of R or C after this update.
    """
    program = tl.program_id(0)
    number, _, is_row, size, across, at = locate(table, owner, tensors, program)
    part = parts + tl.where(is_row, word(table, tensors, number, ROW_AT), word(table, tensors, number, COL_AT))
    count = tl.where(is_row, tl.cdiv(across, BN), tl.cdiv(across, BR))
    total = fold(part, count, size, at)
    inside = at < size
    sums = parts + word(table, tensors, number, SUMS_AT) + tl.where(is_row, 0, across)
    tl.store(sums + at, total, mask=inside)
    _, new = moved(table, tensors, number, is_row, total, at, size, across)
    tl.store(totals + 2 * program, tl.sum(tl.where(at < tl.where(is_row, size, 0), total, 0.0), 0))
    tl.store(totals + 2 * program + 1, tl.sum(tl.where(inside, new, 0.0), 0))


@triton.jit(do_not_specialize=["tensors"])
def move_moments(table, owner, parts, totals, missed, norms, missed_now, tensors):
    """R ← EMA, C ← EMA of the means of g²; a, b of √v̂ᵢⱼ = aᵢ·bⱼ as `sgc.whiten.factor`, a = 0 in a row of zeros.

    Args: table, owner, parts, totals as in `fold_sums`; missed (slots,) int32, calls that were no updates; norms
    (tensors,) fp32, ‖g‖ is stored; missed_now (tensors,) int32: `missed` after this call.
    """
    program = tl.program_id(0)
    number, local, is_row, size, across, at = locate(table, owner, tensors, program)
    rows, cols = tl.where(is_row, size, across), tl.where(is_row, across, size)
    first, row_blocks, col_blocks = program - local, tl.cdiv(rows, FOLDED), tl.cdiv(cols, FOLDED)
    norm = tl.sqrt_rn(sum_of(totals, first, row_blocks, 2))
    count, moves, none = count_of(table, tensors, number, missed, norm)
    if local == 0:
        tl.store(norms + number, norm)
        tl.store(missed_now + number, none)

    sums = parts + word(table, tensors, number, SUMS_AT) + tl.where(is_row, 0, across) + at
    inside = at < size
    total = tl.load(sums, mask=inside, other=0.0)
    pointer, new = moved(table, tensors, number, is_row, total, at, size, across)
    tl.store(pointer, new, mask=at < tl.where(moves, size, 0))
    corrected = correction(rate(table, tensors, number, LOG_BETA2), count)
    blocks = tl.where(is_row, row_blocks, col_blocks)
    of_new = sum_of(totals + 1, tl.where(is_row, first, first + row_blocks), blocks, 2)
    mean = tl.where(moves, of_new / size.to(tl.float32), 0.0) / corrected
    mean = tl.where(is_row, tl.maximum(mean, TINY), mean)
    hat = tl.maximum(tl.where(moves, new, 0.0) / corrected, FLOOR * mean)
    root = tl.sqrt_rn(hat / tl.where(is_row, mean, 1.0))
    tl.store(sums, tl.where(is_row & (total == 0), 0.0, root), mask=inside)


@triton.jit
def move_tile(
    gradient, weight, rows_at, cols_at, rows, cols, first, last, local, moves, keep, lr, eps, seed, decays,
    DTYPE: tl.constexpr, WEIGHTS: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, FROM_0: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """W ← (1 − decay)·W − lr·clip(g / (aᵢ·bⱼ + ε)) in tile `local` of a grid, whose entries first to last are W's.

    Args: rows_at and cols_at point to a and b; a is 0 in a row without gradient. Without `moves`, W only decays.
    """
    cols, first, last = eights(cols, ALIGNED), eights(first, ALIGNED), eights(last, ALIGNED)
    wide = tl.cdiv(cols, BN)
    across, down = local % wide, local // wide
    col = across * BN + tl.arange(0, BN)
    b = tl.load(cols_at + col, mask=col < tl.where(moves, cols, 0), other=1.0)
    col_key = mixed(col.to(tl.uint32))
    for step in range(tl.where(moves | decays, STEPS, 0)):
        row = (down * STEPS + step) * BM + tl.arange(0, BM)
        a = tl.load(rows_at + row, mask=row < tl.where(moves, rows, 0), other=0.0)
        busy = a > 0
        at = row[:, None] * cols + col[None, :]
        inside = (col < cols)[None, :] & (at < last)
        if not FROM_0:
            inside &= at >= first
        touched = inside & (a > tl.where(decays, -1.0, 0.0))[:, None]
        x = read(gradient, at, inside & busy[:, None], DTYPE, ALIGNED)
        place = at if FROM_0 else at - first
        w = read(weight, place, touched, WEIGHTS, ALIGNED)
        u = x / (tl.where(busy, a, 1.0)[:, None] * b[None, :] + eps)
        u = tl.minimum(tl.maximum(u, -CLIP), CLIP)
        noise = noise_of(mixed(row.to(tl.uint32) ^ seed)[:, None], col_key[None, :])
        write(weight, place, w * keep - lr * u, touched, noise, WEIGHTS, ALIGNED, STOCHASTIC)


@triton.jit(do_not_specialize=["tensors"])
def whiten_and_apply(
    table, owner, parts, norms, tensors,
    DTYPE: tl.constexpr, WEIGHTS: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """W ← (1 − decay)·W − lr·clip(g / (aᵢ·bⱼ + ε)) for many tensors; a row without gradient is decayed, or not read.

    Args: table, owner, norms as above; parts, where SUMS_AT points to a and b. A norm that is not finite leaves W
    alone, a norm of 0 decays it.
    """
    program = tl.program_id(0)
    number = tl.load(owner + program)
    rows, cols = word(table, tensors, number, ROWS), word(table, tensors, number, COLS)
    local = program - word(table, tensors, number, TILE_AT)
    norm = tl.load(norms + number)
    moves = (norm > 0) & (norm < float("inf"))
    keep = rate(table, tensors, number, KEEP).to(tl.float32)
    decays = (keep != 1.0) & (norm < float("inf"))
    factors = parts + word(table, tensors, number, SUMS_AT)
    move_tile(
        word(table, tensors, number, GRADIENT), word(table, tensors, number, WEIGHT), factors, factors + rows,
        rows, cols, 0, word(table, tensors, number, NUMEL), local, moves, keep,
        rate(table, tensors, number, LR).to(tl.float32), rate(table, tensors, number, EPS).to(tl.float32),
        word(table, tensors, number, SEED).to(tl.uint32), decays,
        DTYPE, WEIGHTS, STOCHASTIC, ALIGNED, True, BM, BN, STEPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "cols", "numel"])
def tile_sums_of_one(
    grid, parts, rows, cols, numel,
    ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """`tile_sums` of one tensor: parts (⌈cols / BN⌉, rows), then (⌈rows / BR⌉, cols)."""
    rows, cols, numel = rows.to(tl.int64), cols.to(tl.int64), numel.to(tl.int64)
    col_part = parts + tl.cdiv(cols, BN) * rows
    address = grid.to(tl.int64)
    DTYPE: tl.constexpr = grid.dtype.element_ty
    sum_tile(address, rows, cols, numel, tl.program_id(0), parts, col_part, DTYPE, ALIGNED, BM, BN, STEPS)


@triton.jit(do_not_specialize=["rows", "cols"])
def fold_sums_of_one(parts, sums, rows, cols, BN: tl.constexpr, BR: tl.constexpr):
    """`fold_sums` of one tensor: sums (rows + cols,) fp32."""
    rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    program, blocks = tl.program_id(0), tl.cdiv(rows, FOLDED)
    is_row = program < blocks
    size = tl.where(is_row, rows, cols)
    at = tl.where(is_row, program, program - blocks) * FOLDED + tl.arange(0, FOLDED)
    part = parts + tl.where(is_row, 0, tl.cdiv(cols, BN) * rows)
    total = fold(part, tl.where(is_row, tl.cdiv(cols, BN), tl.cdiv(rows, BR)), size, at)
    tl.store(sums + tl.where(is_row, 0, rows) + at, total, mask=at < size)


@triton.jit(do_not_specialize=["rows", "cols", "first", "last", "keep", "lr", "eps", "seed"])
def whiten_and_apply_one(
    grid, weight, a, b, rows, cols, first, last, keep, lr, eps, seed,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """`whiten_and_apply` of one tensor, entries first to last of whose grid are W's."""
    rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    first, last = first.to(tl.int64), last.to(tl.int64)
    DTYPE: tl.constexpr = grid.dtype.element_ty
    WEIGHTS: tl.constexpr = weight.dtype.element_ty
    move_tile(
        grid.to(tl.int64), weight.to(tl.int64), a, b, rows, cols, first, last, tl.program_id(0), rows > 0, keep, lr,
        eps, seed.to(tl.uint32), keep != 1.0, DTYPE, WEIGHTS, STOCHASTIC, ALIGNED, False, BM, BN, STEPS,
    )  # fmt: skip


def tile_width(cols: int, itemsize: int) -> int:
    """Choose the columns of a tile: a warp loads a row of it at once, 16 bytes a thread, and sums it without others."""
    return min(256 if itemsize == 2 else 128, max(32, triton.next_power_of_2(cols)))


def tile_height(across: int, entries: int) -> int:
    """Choose the rows of a tile, of tensors of so many entries in all."""
    return (TILE if entries > SMALL_WAVE else SMALL_TILE) // across


def passes(across: int, down: int, loaded: int) -> dict[str, int]:
    """Return how a program goes through a tile, so many entries at a time: STEPS times BM rows by BN columns."""
    return {"BM": loaded // across, "BN": across, "STEPS": down * across // loaded}


def aligned(layout: Layout, *addresses: int) -> bool:
    """Whether a grid can be read 16 bytes at a time: no row begins, and the tensor does not end, in the middle."""
    return layout.cols % 8 == 0 and layout.numel % 8 == 0 and all(address % 16 == 0 for address in addresses)


def square_sums(gradient: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the row and column sums of g² in one read; the first add up to ‖g‖².

    Args:
        gradient: of `layout.numel` entries in any shape, fp32, bf16 or fp16; a vector needs no padding to its grid.
        layout: its grid.

    Returns:
        (rows,) and (cols,) fp32, views of one tensor (rows + cols,).
    """
    flat = gradient.reshape(-1)
    rows, cols = layout.rows, layout.cols
    wide = tile_width(cols, flat.element_size())
    high = tile_height(wide, layout.numel)
    down, across = triton.cdiv(rows, high), triton.cdiv(cols, wide)
    parts = torch.empty(across * rows + down * cols, dtype=torch.float32, device=flat.device)
    sums = torch.empty(rows + cols, dtype=torch.float32, device=flat.device)
    folds = triton.cdiv(rows, FOLDED.value) + triton.cdiv(cols, FOLDED.value)
    shape = (rows, cols, layout.numel, aligned(layout, flat.data_ptr()))
    with on_device_of(flat):
        tile_sums_of_one[(down * across,)](flat, parts, *shape, **passes(wide, high, SUMMED), **ONE_WARP)
        fold_sums_of_one[(folds,)](parts, sums, rows, cols, wide, high, **FOUR_WARPS)
    row, col = sums.split([rows, cols])
    return row, col


def apply_whitened(
    weight: Tensor,
    grid: Tensor,
    layout: Layout,
    a: Tensor,
    b: Tensor,
    eps: float,
    lr: float,
    decay: float,
    seed: int | None,
    offset: int = 0,
) -> None:
    """W ← (1 − decay)·W − lr·w in one launch, as `sgc.apply.apply_whitened`.

    Args:
        weight: contiguous.
        grid: of the gradient, (rows, cols), contiguous.
        layout: of the grid.
        a: (rows,) fp32, 0 in a row without gradient.
        b: (cols,) fp32.
        eps: ε.
        lr: learning rate times scale, negative to maximize.
        decay: learning rate times weight decay.
        seed: 32 bits, of the stochastic rounding of bf16 weights; None: to nearest.
        offset: entries of the grid that precede W's.
    """
    wide = tile_width(layout.cols, grid.element_size())
    high = tile_height(wide, grid.numel())
    fits = all(size % 8 == 0 for size in (layout.cols, offset, weight.numel()))
    fits = fits and all(tensor.data_ptr() % 16 == 0 for tensor in (grid, weight))
    programs = triton.cdiv(layout.rows, high) * triton.cdiv(layout.cols, wide)
    stochastic = seed is not None and weight.dtype is torch.bfloat16
    signed = (seed or 0) - ((seed or 0) >> 31 << 32)  # always an int32, whatever the seed
    with on_device_of(weight):
        whiten_and_apply_one[(programs,)](
            grid, weight, a, b, layout.rows, layout.cols, offset, offset + weight.numel(), 1.0 - decay,
            float(lr), float(eps), signed, stochastic, fits, **passes(wide, high, MOVED), **FOUR_WARPS,
        )  # fmt: skip
    torch.autograd.graph.increment_version(weight)
