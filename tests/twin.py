"""The whole optimizer once more, in float64 and plain loops, from the formulas and with no code of the package.

Only the numbers that the package may retune are read from it (floor, clip, ridge, candidates per entry, passes).
"""

import math

import numpy as np

from sgc.codec.recover import GOMP_PASSES
from sgc.constants import CLIP, FLOOR, RIDGE

WORD = 2**32


def scramble(x):
    x ^= x >> 16
    x = x * 0x7FEB352D % WORD
    x ^= x >> 15
    x = x * 0x846CA68B % WORD
    return x ^ x >> 16


def sign(seed, row, column):
    hashed = scramble(column ^ scramble(seed % WORD))
    hashed = scramble(hashed ^ scramble(seed // WORD))
    hashed = scramble(hashed ^ scramble((1 + row // 32) * 0x9E3779B1 % WORD))
    return 1 if hashed // 2 ** (row % 32) % 2 else -1


def sign_matrix(k, n, seed):
    return np.array([[sign(seed, row, column) / math.sqrt(k) for column in range(n)] for row in range(k)])


def matrix_sides(shape):
    best = None
    for at in range(1, len(shape)):
        sides = math.prod(shape[:at]), math.prod(shape[at:])
        if best is None or sum(sides) < sum(best):
            best = sides
    return best or (1, math.prod(shape))


def lay_out(shape, wanted, within_rows=False):
    """Return the flat positions of each chunk, the padded length n, and the grid column count."""
    numel = math.prod(shape)
    rows, cols = matrix_sides(shape)
    if rows == 1 or (not within_rows and rows + cols > max(numel // 16, 256)):
        n = numel if wanted is None else min(wanted, numel)
        return [list(range(at, min(at + n, numel))) for at in range(0, numel, n)], n, n
    if wanted is None and not within_rows:
        return [list(range(numel))], numel, cols
    if wanted is None:
        wanted = cols
    if 2 * cols < wanted and not within_rows:
        n = min(rows, round(wanted / cols)) * cols
        return [list(range(at, min(at + n, numel))) for at in range(0, numel, n)], n, cols
    n = None
    for candidate in range(1, cols + 1):
        near = wanted <= 2 * candidate and candidate <= 2 * wanted
        if near and cols % candidate == 0 and (n is None or abs(candidate - wanted) < abs(n - wanted)):
            n = candidate
    if n is None:
        pieces = -(-cols // wanted)
        n = -(-cols // pieces)
    chunks = []
    for row in range(rows):
        starts = range(row * cols, row * cols + cols, n)
        chunks += [list(range(at, min(at + n, row * cols + cols))) for at in starts]
    return chunks, n, cols


class Twin:
    """One tensor. `step` takes and returns flat float64 weights; `margin` is the closest choice made so far."""

    def __init__(
        self,
        shape,
        *,
        lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        chunk_size=256,
        sketch_size=32,
        sparsity=4,
        recovered=None,
        moments="residual",
        recovery="omp",
        scale=1.0,
        rank=None,
        refresh_every=200,
        maximize=False,
        seed=0,
        dense=False,
    ):
        self.shape, self.lr, self.betas, self.eps, self.decay = shape, lr, betas, eps, weight_decay
        self.k, self.s, self.taken = sketch_size, sparsity, recovered or sparsity or 10**9
        self.rule, self.recovery, self.scale, self.ascend = moments, recovery, scale, maximize
        self.rank, self.refresh_every, self.dense = rank, refresh_every, dense
        self.t, self.margin, self.moved = 0, math.inf, []
        if dense:
            self.first, self.second = np.zeros(math.prod(shape)), np.zeros(math.prod(shape))
            return
        sides = matrix_sides(shape)
        self.tall = sides[0] > sides[1]
        self.coded_shape = shape if rank is None else (rank, max(sides))
        self.chunks, self.n, self.cols = lay_out(self.coded_shape, chunk_size, within_rows=rank is not None)
        self.width = min(sketch_size, self.n)
        self.projects = 0 < sketch_size < self.n
        self.A = sign_matrix(sketch_size, self.n, seed) if self.projects else np.eye(self.n)
        self.M = [np.zeros(self.width) for _ in self.chunks]
        self.V = [np.zeros(self.width) for _ in self.chunks]
        numel = math.prod(self.coded_shape)
        self.R, self.C = np.zeros(-(-numel // self.cols)), np.zeros(self.cols)
        self.P = None

    def step(self, weight, gradient, basis=None):
        self.t += 1
        if self.dense:
            update = self._adam(gradient)
        elif self.rank is None:
            update = self._coded(gradient)
        else:
            update = self._low_rank(gradient, basis)
        way = 1 if self.ascend else -1
        return weight - self.lr * self.decay * weight + way * self.lr * (1 if self.dense else self.scale) * update

    def _adam(self, gradient):
        b1, b2 = self.betas
        self.first = b1 * self.first + (1 - b1) * gradient
        self.second = b2 * self.second + (1 - b2) * gradient**2
        root = np.sqrt(self.second / (1 - b2**self.t))
        return self.first / (1 - b1**self.t) / (root + self.eps)

    def _low_rank(self, gradient, basis):
        matrix = gradient.reshape(matrix_sides(self.shape))
        matrix = matrix.T if self.tall else matrix
        if (self.t - 1) % self.refresh_every == 0:
            if self.P is not None:
                self._turn(basis.T @ self.P)
            self.P = basis
        small = self._coded((self.P.T @ matrix).reshape(-1)).reshape(self.rank, -1)
        update = self.P @ small
        return (update.T if self.tall else update).reshape(-1)

    def _turn(self, rotation):
        pieces = len(self.chunks) // self.rank
        old_m, old_v, old_r = self.M, self.V, self.R
        self.M = [np.zeros(self.width) for _ in self.chunks]
        self.V = [np.zeros(self.width) for _ in self.chunks]
        for new in range(self.rank):
            for old in range(self.rank):
                for piece in range(pieces):
                    self.M[new * pieces + piece] += rotation[new, old] * old_m[old * pieces + piece]
                    self.V[new * pieces + piece] += rotation[new, old] ** 2 * old_v[old * pieces + piece]
        self.R = rotation**2 @ old_r if self.rank > 1 else rotation[0, 0] ** 2 * old_r

    def _coded(self, gradient):
        if self.rule in ("residual", "whitened"):
            x = gradient / (self._root(gradient) + self.eps)
        else:
            x = gradient
        self.moved = []
        update = np.zeros(gradient.size)
        solved = []
        for number, chunk in enumerate(self.chunks):
            piece = x[chunk]
            count = self.taken if self.k == 0 else self.s
            kept = self._top(np.abs(piece), count, exact=self.rule not in ("residual", "whitened"))
            value = {at: piece[at] for at in kept}
            if self.rule in ("residual", "whitened"):
                value = {at: max(-CLIP, min(CLIP, v)) for at, v in value.items()}
            found = value if self.k == 0 else self._move_and_recover(number, value, len(chunk), solved)
            for at, v in found.items():
                update[chunk[at]] = v
            self.moved.append(sorted(chunk[at] for at in found))
        if self.rule == "sketched":
            mean = np.mean([max(v, 0.0) for _, _, v in solved])
            for position, m, v in solved:
                update[position] = m / (math.sqrt(max(v, m * m, mean)) + self.eps)
        return update

    def _root(self, gradient):
        rows, b2 = len(self.R), self.betas[1]
        row_sum, row_count, col_sum, col_count = (
            np.zeros(rows),
            np.zeros(rows),
            np.zeros(self.cols),
            np.zeros(self.cols),
        )
        for at, g in enumerate(gradient):
            row_sum[at // self.cols] += g * g
            row_count[at // self.cols] += 1
            col_sum[at % self.cols] += g * g
            col_count[at % self.cols] += 1
        self.R = b2 * self.R + (1 - b2) * row_sum / row_count
        self.C = b2 * self.C + (1 - b2) * col_sum / col_count
        row, col = self.R / (1 - b2**self.t), self.C / (1 - b2**self.t)
        mean_row, mean_col = sum(row) / rows, sum(col) / self.cols
        row, col = np.maximum(row, FLOOR * mean_row), np.maximum(col, FLOOR * mean_col)
        return np.array(
            [math.sqrt(row[at // self.cols] * col[at % self.cols] / mean_row) for at in range(gradient.size)]
        )

    def _top(self, size, count, exact=False, whole=None):
        """The positions of the largest, lowest first among equals; note how clear the cut was."""
        order = sorted(range(len(size)), key=lambda at: (-size[at], at))
        if not exact and count < len(order) and size[order[count - 1]] > 0:
            gap = size[order[count - 1]] - size[order[count]]
            self.margin = min(self.margin, gap / (size[order[0]] if whole is None else whole))
        return order[:count]

    def _project(self, value):
        y = np.zeros(self.width)
        for at, v in value.items():
            y += v * self.A[:, at]
        return y

    def _move_and_recover(self, number, value, length, solved):
        (b1, b2), t = self.betas, self.t
        p = self._project(value)
        if self.rule == "residual":
            self.M[number] = b1 * self.M[number] + p
            found = self._recover(self.M[number], length)
            self.M[number] = self.M[number] - self._project(found)
            return found
        self.M[number] = b1 * self.M[number] + (1 - b1) * p
        m_hat = self.M[number] / (1 - b1**t)
        if self.rule == "whitened":
            return self._recover(m_hat, length)
        q = p**2 if self.rule == "subspace" else self._project({at: v**2 for at, v in value.items()})
        self.V[number] = b2 * self.V[number] + (1 - b2) * q
        v_hat = self.V[number] / (1 - b2**t)
        if self.rule == "subspace":
            return self._recover(m_hat / (np.sqrt(v_hat) + self.eps), length)
        found = self._recover(m_hat, length)
        support = sorted(found)
        for at, v in zip(support, self._solve(v_hat, support), strict=True):
            solved.append((self.chunks[number][at], found[at], v))
        return found

    def _solve(self, y, support):
        if not self.projects:
            return y[support]
        columns = self.A[:, support]
        if len(support) == 1:
            return columns.T @ y
        return np.linalg.solve(columns.T @ columns + RIDGE * np.eye(len(support)), columns.T @ y)

    def _recover(self, y, length):
        taken = min(self.taken, self.n)
        if not self.projects:
            return {at: y[at] for at in self._top(np.abs(y[:length]), taken)}
        allowed = list(range(length))
        taken = min(taken, length)
        first = np.abs(self.A[:, allowed].T @ y)
        whole = max(first) or 1.0
        passes = {"omp": self.taken, "gomp": min(GOMP_PASSES, self.taken), "threshold": 1}
        support, rest, value = [], y, []
        for number in range(passes[self.recovery]):
            more = self.taken * (number + 1) // passes[self.recovery] - self.taken * number // passes[self.recovery]
            free = [at for at in allowed if at not in support]
            chosen = self._top(np.abs(self.A[:, free].T @ rest), min(more, taken - len(support)), whole=whole)
            support += [free[at] for at in chosen]
            value = self._solve(y, support)
            rest = y - self.A[:, support] @ value
        return dict(zip(support, value, strict=True))
