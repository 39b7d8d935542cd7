"""One update of one tensor, the stages in order: whiten, sparsify, project, move the moments, recover, apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgc import backends, moments
from sgc.backends import fused
from sgc.backends import numba as compiled
from sgc.codec import place
from sgc.codec.layout import BLOCK_ENTRIES, Layout, matrix_shape
from sgc.codec.lowrank import leading_basis, turn
from sgc.codec.project import Projection
from sgc.codec.recover import least_squares, recover
from sgc.codec.sparsify import top_entries
from sgc.state import read_held, stochastic_round, write_held

PROBED_CHUNKS = 16  # chunks of a tensor that a probe looks at


class Whitening(NamedTuple):
    """√v̂ᵢⱼ = aᵢ·bⱼ, and where gradient is."""

    a: Tensor  # (rows,)
    b: Tensor  # (cols,)
    busy: Tensor | None  # (rows,) whether a row has any gradient; None: all have


@dataclass(frozen=True)
class Update:
    """The sparse update of a tensor, before `scale` and lr."""

    index: Tensor  # (c, s') positions inside the chunks
    value: Tensor  # (c, s') fp32
    target: Tensor | None  # the first chunks of what was recovered from, for a probe


def compressed_update(
    gradient: Tensor,
    state: dict[str, Any],
    layout: Layout,
    projection: Projection | None,
    group: Mapping[str, Any],
    generator: torch.Generator | None,
    sums: tuple[Tensor, Tensor] | None = None,
) -> Update:
    """Advance the state of one tensor by one gradient, and recover its update u.

    Args:
        gradient: finite and not all zero, of `layout.shape`, any floating dtype.
        state: of this tensor, with "step" already counting this update.
        layout: its chunks.
        projection: A, or None for the memoryless rule, which applies what it selects.
        group: the hyperparameters.
        generator: for the stochastic rounding of bf16 sketches.
        sums: of g² over the rows and columns of the grid, where they are known; they are changed.
    """
    grid, whitening = layout.grid(gradient), None
    if group["moments"] in moments.FACTORED:
        row, col = mean_squares(grid, layout) if sums is None else means(*sums, layout)
        whitening = whiten_by(state, row, col, group["betas"][1], int(state["step"]))
    return whitened_update(grid, whitening, state, layout, projection, group, generator)


def whitened_update(
    grid: Tensor,
    whitening: Whitening | None,
    state: dict[str, Any],
    layout: Layout,
    projection: Projection | None,
    group: Mapping[str, Any],
    generator: torch.Generator | None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Update:
    """Do the rest of `compressed_update`, given the gradient's grid and, where the rule whitens, by what."""
    if projection is None:
        index, value = select(grid, layout, whitening, group["recovered"] or layout.chunk, group["eps"])
        return Update(index, value, None)
    rule, beta, eps = group["moments"], group["betas"][0], group["eps"]
    if rule in moments.FACTORED:
        m = read_held(state, "sketch")
        if fused.encode_into(m, beta, rule, grid, layout, whitening, projection, group["sparsity"], eps):
            target = m if rule == "residual" else m / (1 - beta ** int(state["step"]))
            return _recovered_update(m, target, None, state, layout, projection, group, generator, total)
    p, q = encode(grid, layout, whitening, projection, group)
    return sketched_update(p, q, state, layout, projection, group, generator, total)


def sketched_update(
    p: Tensor,
    q: Tensor | None,
    state: dict[str, Any],
    layout: Layout,
    projection: Projection,
    group: Mapping[str, Any],
    generator: torch.Generator | None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Update:
    """Advance the moments of one tensor by one sketch, and recover its update u.

    Args:
        p: A·top_s of the gradient, whitened where the rule says so, (c, min(k, n)) fp32.
        q: A·(top_s)² for "sketched", else None.
        state: of this tensor, with "step" already counting this update.
        layout: its chunks.
        projection: A.
        group: the hyperparameters.
        generator: for the stochastic rounding of bf16 sketches.
        total: as in `moments.sketched_ratio`.
    """
    t, rule, betas, square = int(state["step"]), group["moments"], group["betas"], None
    m = read_held(state, "sketch")
    if rule == "residual":
        target = moments.residual(m, p, betas[0])
    elif rule == "whitened":
        target = moments.whitened(m, p, betas[0], t)
    elif rule == "subspace":
        v = read_held(state, "sketch_sq")
        target = moments.subspace(m, v, p, betas, group["eps"], t)
        write_held(state, "sketch_sq", v, generator)
    else:
        v = read_held(state, "square_sketch")
        assert q is not None  # encoded for this rule
        target, square = moments.sketched(m, v, p, q, betas, t)
        write_held(state, "square_sketch", v, generator)
    return _recovered_update(m, target, square, state, layout, projection, group, generator, total)


def _recovered_update(
    m: Tensor,
    target: Tensor,
    square: Tensor | None,
    state: dict[str, Any],
    layout: Layout,
    projection: Projection,
    group: Mapping[str, Any],
    generator: torch.Generator | None,
    total: Callable[[Tensor], Tensor] | None,
) -> Update:
    """Recover the update from what the moments (c, k) give, hold m, and for "sketched" divide by the square's root."""
    first, lengths = target[:PROBED_CHUNKS].clone(), layout.lengths(target.device)
    index, value = _recover_busy(target, layout, projection, group, lengths, take=group["moments"] == "residual")
    if square is not None:
        v = least_squares(square, index, layout.chunk, projection, lengths)
        real = None if lengths is None else index < lengths[:, None]
        value = moments.sketched_ratio(value, v, real, group["eps"], total)
    write_held(state, "sketch", m, generator)
    return Update(index, value, first)


def _recover_busy(
    target: Tensor, layout: Layout, projection: Projection, group: Mapping[str, Any], lengths: Tensor | None, take: bool
) -> tuple[Tensor, Tensor]:
    """Recover index and value (c, s') of every chunk whose sketch holds anything; `take` takes them out of it."""
    found = fused.decode(target, layout, projection, group["recovered"], group["recovery"], take=take)
    if found is not None:
        return found
    busy = target.abs().amax(1) != 0  # `any` is several times slower on a CPU
    arguments = (layout.chunk, projection, group["recovered"], group["recovery"])
    if busy.all():
        index, value = recover(target, *arguments, lengths)
    else:
        found = recover(target[busy], *arguments, None if lengths is None else lengths[busy])
        index, value = _spread(*found, busy)
    if take:
        target.sub_(projection.project(index, value, layout.chunk))
    return index, value


def gradient_norm(gradient: Tensor) -> Tensor:
    """Give ‖g‖₂ in fp32, () shaped, of float64 by way of fp32; no fp32 copy of a 16-bit gradient is made whole."""
    if gradient.dtype is torch.float64:
        gradient = gradient.float()
    if gradient.dtype is torch.float32 or gradient.is_cuda or not gradient.is_contiguous():  # a GPU casts as it reads
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    parts = [
        torch.linalg.vector_norm(part, dtype=torch.float32) for part in gradient.view(-1).split(16 * BLOCK_ENTRIES)
    ]
    return torch.linalg.vector_norm(torch.stack(parts)) if len(parts) > 1 else parts[0]


def mean_squares(grid: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Give the row and column means of g², (rows,) and (cols,) in fp32, padding left out."""
    return means(*square_sums(grid, layout), layout)


def square_sums(grid: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Give the row and column sums of g², (rows,) and (cols,) in fp32."""
    sums = fused.square_sums(grid, layout)
    if sums is not None:
        return sums
    if compiled.usable(grid):
        return compiled.square_sums(grid)
    row = grid.new_empty(layout.rows, dtype=torch.float32)
    col = grid.new_zeros(layout.cols, dtype=torch.float32)
    for rows, _ in layout.blocks():
        square = grid[rows].float().square()
        row[rows] = square.sum(1)
        col += square.sum(0)
    return row, col


def means(row: Tensor, col: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Turn the sums over rows and columns into means, in place, padding left out."""
    row /= layout.cols
    col /= layout.rows
    ragged = layout.rows * layout.cols - layout.numel  # a vector's last grid row ends early
    if ragged:
        row[-1:] *= layout.cols / (layout.cols - ragged)
    if ragged and layout.rows > 1:
        col[-ragged:] *= layout.rows / (layout.rows - 1)
    return row, col


def whiten_by(
    state: Mapping[str, Tensor], row: Tensor, col: Tensor, beta2: float, t: int, mean: Tensor | None = None
) -> Whitening:
    """Move R and C of `state` by the row and column means of g², and whiten by them; `mean` as in `moments.factor`."""
    busy = row > 0  # of an embedding, only the rows of tokens that were seen are
    a, b = moments.factor(state["row"], state["col"], row, col, beta2, t, mean)
    waits = not backends.choose("encode", row.device).fused  # a kernel looks at each row's, and spares the host a wait
    return Whitening(a, b, None if waits and busy.all() else busy)


def select(
    grid: Tensor, layout: Layout, whitening: Whitening | None, sparsity: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Take the top entries of the (whitened) gradient of every chunk: index and value (c, s)."""
    found = fused.select(grid, layout, whitening, sparsity, eps)
    if found is not None:
        return found
    blocks = layout.blocks(_block_entries(sparsity))
    parts = [_select_block(grid[rows], layout, whitening, rows, sparsity, eps) for rows, _ in blocks]
    index, value = zip(*parts, strict=True)
    return torch.cat(index), torch.cat(value)


def _block_entries(sparsity: int) -> int:
    """Entries to select from at a time: so many that calls cost little, so few that temporaries do."""
    return compiled.BLOCK_ENTRIES if compiled.selects(sparsity) else 4 * BLOCK_ENTRIES


def _select_block(
    block: Tensor, layout: Layout, whitening: Whitening | None, rows: slice, sparsity: int, eps: float
) -> tuple[Tensor, Tensor]:
    if whitening is None:
        return _top(block.float(), layout, None, None, sparsity, eps)
    a, b = whitening.a[rows], whitening.b
    busy = None if whitening.busy is None or layout.rows_per_chunk > 1 else whitening.busy[rows]
    if busy is None or busy.all():
        return _top(block.float(), layout, a, b, sparsity, eps)
    found = _top(block[busy].float(), layout, a[busy], b, sparsity, eps)
    return _spread(*found, busy.repeat_interleave(layout.pieces))


def _top(
    block: Tensor, layout: Layout, a: Tensor | None, b: Tensor | None, sparsity: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Take the top entries of every chunk of some rows in fp32, whitened and clipped where a and b are given."""
    if sparsity < layout.chunk and compiled.selects(sparsity) and compiled.usable(block):
        shape = (layout.chunk, layout.pieces, layout.rows_per_chunk)
        return compiled.select(block, a, b, shape, sparsity, eps, moments.CLIP)
    if a is None or b is None:
        return top_entries(layout.cut(block), sparsity)
    index, value = top_entries(layout.cut(_whiten(block, a, b, eps)), sparsity)
    return index, value.clamp_(-moments.CLIP, moments.CLIP)


def _spread(index: Tensor, value: Tensor, busy: Tensor) -> tuple[Tensor, Tensor]:
    """Put what was found in the busy chunks in its place among all; the others get the first positions, and zeros."""
    all_index = torch.arange(index.shape[1], device=index.device).repeat(len(busy), 1)
    all_value = value.new_zeros(all_index.shape)
    all_index[busy], all_value[busy] = index, value
    return all_index, all_value


def _whiten(block: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    """w = g / (√v̂ + ε) for some rows of the grid."""
    return block.float() / torch.outer(a, b).add_(eps)


def encode(
    grid: Tensor,
    layout: Layout,
    whitening: Whitening | None,
    projection: Projection,
    group: Mapping[str, Any],
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sparsify and project a gradient's grid, whitened where the rule is: p (c, min(k, n)); for "sketched" also q.

    With a factor, () shaped, it is the gradient times that.
    """
    squares, sparsity, eps = group["moments"] == "sketched", group["sparsity"], group["eps"]
    made = fused.encode(grid, layout, whitening, projection, sparsity, eps, factor=factor, squares=squares)
    if made is not None:
        return made
    shape = (layout.chunks, min(projection.sketch_size, layout.chunk))
    p = torch.empty(shape, dtype=torch.float32, device=grid.device)
    q = torch.empty_like(p) if squares else None
    for rows, chunks in layout.blocks(_block_entries(group["sparsity"])):
        block = grid[rows] if factor is None else grid[rows].to(torch.float32, copy=True).mul_(factor)
        index, value = _select_block(block, layout, whitening, rows, group["sparsity"], group["eps"])
        p[chunks] = projection.project(index, value, layout.chunk)
        if q is not None:
            q[chunks] = projection.project(index, value.square(), layout.chunk)
    return p, q


def apply_memoryless(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    layout: Layout,
    group: Mapping[str, Any],
    lr: float,
    decay: float,
    generator: torch.Generator | None,
    sums: tuple[Tensor, Tensor] | None = None,
) -> None:
    """W ← (1 − decay)·W − lr·w: without a sketch and without sparsity, the whitened gradient is the update.

    Args:
        weight: contiguous.
        gradient: finite and not all zero, of the same shape.
        state: of this tensor, with "step" already counting this update.
        layout: its grid.
        group: the hyperparameters.
        lr: learning rate times scale, negative to maximize.
        decay: learning rate times weight decay.
        generator: for stochastic rounding, or None.
        sums: as in `compressed_update`.
    """
    grid = layout.grid(gradient)
    row, col = mean_squares(grid, layout) if sums is None else means(*sums, layout)
    whitening = whiten_by(state, row, col, group["betas"][1], int(state["step"]))
    apply_whitened(weight, grid, layout, whitening, group["eps"], lr, decay, generator)


def apply_whitened(
    weight: Tensor,
    grid: Tensor,
    layout: Layout,
    whitening: Whitening,
    eps: float,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
    offset: int = 0,
) -> None:
    """W ← (1 − decay)·W − lr·w for the grid of a gradient and its whitening; `offset` entries of it precede W's."""
    if not offset and weight.numel() == grid.numel() and compiled.usable(weight, grid):
        compiled.apply_whitened(weight, grid, whitening.a, whitening.b, eps, moments.CLIP, lr, decay)
        return
    if fused.apply_whitened(weight, grid, layout, whitening, eps, lr, decay, generator, offset):
        return
    flat = weight.view(-1)
    for rows, _ in layout.blocks():
        start, stop = (min(max(edge * layout.cols - offset, 0), flat.numel()) for edge in (rows.start, rows.stop))
        part, skipped = flat[start:stop], start + offset - rows.start * layout.cols
        if whitening.busy is not None and not whitening.busy[rows].any():
            apply_dense(part, None, 0.0, decay, generator)
            continue
        update = _whiten(grid[rows], whitening.a[rows], whitening.b, eps)
        update = update.clamp_(-moments.CLIP, moments.CLIP).view(-1)[skipped : skipped + part.numel()]
        apply_dense(part, update, lr, decay, generator)


def apply_sampled(
    weight: Tensor,
    value: Tensor,
    first: int,
    every: int,
    layout: Layout,
    whitening: Whitening,
    eps: float,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
) -> None:
    """W ← (1 − decay)·W − lr·w where only every m-th entry of the gradient is known, and w is 0 elsewhere.

    Args:
        weight: contiguous.
        value: entries first, first + m, … of the gradient, (⌈d/m⌉,) fp32; what is beyond the tensor is not read.
        first: below m.
        every: m.
        layout: its grid.
        whitening: of the gradient.
        eps: ε.
        lr: learning rate times scale, negative to maximize.
        decay: learning rate times weight decay.
        generator: for stochastic rounding, or None.
    """
    if every == 1:
        grid = layout.grid(value[: layout.numel])
        apply_whitened(weight, grid, layout, whitening, eps, lr, decay, generator)
        return
    flat, exact = weight.view(-1), torch.promote_types(weight.dtype, torch.float32)
    for rows, _ in layout.blocks():
        start, stop = rows.start * layout.cols, min(rows.stop * layout.cols, layout.numel)
        skip = (first - start) % every
        part = flat[start:stop]
        here = part[skip::every]
        known = value[(start + skip - first) // every :][: len(here)]
        root = torch.outer(whitening.a[rows], whitening.b).view(-1)[: stop - start][skip::every].add(eps)
        new = here.to(exact).mul(1 - decay).sub_((known / root).clamp_(-moments.CLIP, moments.CLIP), alpha=lr)
        if decay and every > 1:
            apply_dense(part, None, 0.0, decay, generator)
        here.copy_(rounded(new, weight.dtype, generator))


def apply_sparse(
    weight: Tensor, layout: Layout, update: Update, lr: float, decay: float, generator: torch.Generator | None
) -> None:
    """W ← (1 − decay)·W − lr·u, u scattered at its coordinates; bf16 is rounded stochastically given a generator.

    Args:
        weight: contiguous.
        layout: its chunks.
        update: u.
        lr: learning rate times scale, negative to maximize.
        decay: learning rate times weight decay.
        generator: for stochastic rounding, or None.
    """
    if not fused.apply(weight, layout, update.index, update.value, lr, decay, generator):
        apply_entries(weight, *entries(layout, update), lr, decay, generator)


def entries(layout: Layout, update: Update) -> tuple[Tensor, Tensor]:
    """Give the positions in the flattened tensor that an update moves and the values there, padding left out."""
    position, value = layout.flat_index(update.index), update.value
    lengths = layout.lengths(position.device)
    if lengths is not None:
        real = update.index < lengths[:, None]
        position, value = position[real], value[real]
    return position.reshape(-1), value.reshape(-1)


def apply_entries(
    weight: Tensor, position: Tensor, value: Tensor, lr: float, decay: float, generator: torch.Generator | None
) -> None:
    """W ← (1 − decay)·W − lr·u for the values of u at some positions of the flattened W, each position once."""
    flat = weight.view(-1)
    if weight.dtype is torch.float32:
        if decay:
            flat.mul_(1 - decay)
        flat.index_add_(0, position, value, alpha=-lr)
        return
    exact = torch.promote_types(weight.dtype, torch.float32)
    new = flat[position].to(exact).mul_(1 - decay).sub_(value, alpha=lr)
    for part in flat.split(BLOCK_ENTRIES) if decay else ():  # in fp32 and rounded it would be five times as large
        apply_dense(part, None, 0.0, decay, generator)
    flat[position] = rounded(new, weight.dtype, generator)


def apply_dense(
    weight: Tensor, update: Tensor | None, lr: float, decay: float, generator: torch.Generator | None
) -> None:
    """W ← (1 − decay)·W − lr·u for a dense u in fp32, or for none."""
    if update is None and not decay:
        return
    exact = torch.promote_types(weight.dtype, torch.float32)
    new = weight if weight.dtype is exact else weight.to(exact)  # in place where nothing is rounded
    if decay:
        new.mul_(1 - decay)
    if update is not None:
        new.sub_(update, alpha=lr)
    if new is not weight:
        weight.copy_(rounded(new, weight.dtype, generator))


def rounded(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Round to the dtype of the weights: stochastically to bf16 given a generator, else to nearest."""
    return stochastic_round(x, generator) if dtype is torch.bfloat16 and generator is not None else x.to(dtype)


def lowrank_update(
    gradient: Tensor,
    state: dict[str, Any],
    layout: Layout,
    projection: Projection | None,
    group: Mapping[str, Any],
    generator: torch.Generator | None,
) -> tuple[Tensor, Update]:
    """Advance a tensor under double compression: the codec works on PᵀG, the recovered update is P·U.

    Args:
        gradient: as in `compressed_update`.
        state: with "basis" P (m, r), all zero before the first update.
        layout: of PᵀG, (r, m').
        projection: A, or None.
        group: the hyperparameters.
        generator: for the stochastic rounding of bf16 sketches.

    Returns:
        P·U in the shape of the gradient, fp32, and U.
    """
    matrix = gradient.float().reshape(matrix_shape(tuple(gradient.shape)))
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    t, rank = int(state["step"]), layout.shape[0]
    if (t - 1) % group["refresh_every"] == 0:
        basis = leading_basis(wide, rank, seed=group["seed"] + t)
        if t > 1:
            _turn_state(state, state["basis"], basis, generator)
        state["basis"].copy_(basis)
    update = compressed_update(state["basis"].T @ wide, state, layout, projection, group, generator)
    small = wide.new_zeros(layout.numel)
    place(small, layout.flat_index(update.index), update.value, update.index, layout.lengths(small.device))
    dense = state["basis"] @ small.view(layout.shape)
    return (dense if wide is matrix else dense.T).reshape(gradient.shape), update


def _turn_state(state: dict[str, Any], old: Tensor, new: Tensor, generator: torch.Generator | None) -> None:
    for name in ("sketch", "sketch_sq", "square_sketch"):
        if name in state:
            write_held(state, name, turn(read_held(state, name), old, new, squared=name != "sketch"), generator)
    if "row" in state:
        state["row"].copy_(turn(state["row"], old, new, squared=True))


def adamw_update(gradient: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
    """AdamW's update of a tensor that is kept dense, in fp32: m̂ / (√v̂ + ε)."""
    t, gradient = int(state["step"]), gradient.float()
    m = moments.ema(state["exp_avg"], gradient, betas[0])
    v = state["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    return (m / (1 - betas[0] ** t)).div_((v.sqrt() / (1 - betas[1] ** t) ** 0.5).add_(eps))
