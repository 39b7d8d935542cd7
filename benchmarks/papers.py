"""Optimizers that no package has for a CPU, written from their papers: FRUGAL, LDAdam, SCALE and SinkGD.

Each holds dense AdamW for what it leaves alone, and a direction of its own for the groups that say `own=True`. Moments
and arithmetic are fp32. `tests/benchmarks/test_papers.py` holds each to a limit in which it is something known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Group = dict[str, Any]


def adam(grad: Tensor, state: State, group: Group) -> Tensor:
    """Return Adam's direction m̂ / (√v̂ + ε), and keep its moments in `state`."""
    beta1, beta2 = group["betas"]
    if "exp_avg" not in state:
        state |= {"exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad)}
    state["moments"] = state.get("moments", 0) + 1
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    divisor = (square / (1 - beta2 ** state["moments"])).sqrt_().add_(group["eps"])
    return mean / (1 - beta1 ** state["moments"]) / divisor


class _Paper(torch.optim.Optimizer):
    """AdamW, with `direction` in the place of Adam's for groups of own=True."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **defaults: Any,
    ) -> None:
        fixed = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "own": False}
        super().__init__(params, fixed | defaults)

    def direction(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """Return what a parameter moves by, against its sign and per learning rate."""
        raise NotImplementedError  # each of the papers has its own

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            rule = self.direction if group["own"] else adam
            for param in group["params"]:
                if param.grad is not None:
                    update = rule(param.grad.float(), self.state[param], group)
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


class FRUGAL(_Paper):
    """Adam for some columns of every matrix, signs for the others (2411.07837, its column-wise form).

    Args:
        density: share of the columns that have moments; 1: AdamW.
        update_gap: steps after which other columns are drawn, whose moments begin at zero.
        free_scale: learning rate of the signs as a share of Adam's.
        seed: of the draws.
        others: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        density: float = 0.25,
        update_gap: int = 200,
        free_scale: float = 1.0,
        seed: int = 0,
        **others: Any,
    ) -> None:
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        super().__init__(params, lr, density=density, update_gap=update_gap, free_scale=free_scale, **others)
        self.generator = torch.Generator().manual_seed(seed)

    def direction(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """Return Adam's direction in the drawn columns, and the sign of the gradient in the others."""
        columns = grad.shape[1]
        kept = max(1, round(group["density"] * columns))
        state["steps"] = state.get("steps", -1) + 1
        if kept == columns:
            return adam(grad, state, group)
        if state["steps"] % group["update_gap"] == 0:
            drawn = torch.randperm(columns, generator=self.generator)[:kept].clone().to(grad.device)
            state |= {"columns": drawn, "moments": 0}
            state |= {name: torch.zeros_like(grad[:, drawn]) for name in ("exp_avg", "exp_avg_sq")}
        update = grad.sign().mul_(group["free_scale"])
        update[:, state["columns"]] = adam(grad[:, state["columns"]], state, group)
        return update


class LDAdam(_Paper):
    """Adam in a subspace that turns with every gradient, its moments with it (2410.16103, algorithm 1).

    What the subspace leaves out of the gradient and of the turned momentum is added to the next gradient. Its authors
    hold that remainder in the gradient's own memory, which then cannot be freed; here it is state, and counted.

    Args:
        rank: of the subspace; the smaller side of a matrix or more: Adam.
        rho: share of the momentum in the matrix that the subspace follows.
        others: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        rank: int = 16,
        rho: float = 0.908,
        betas: tuple[float, float] = (0.908, 0.99),
        **others: Any,
    ) -> None:
        super().__init__(params, lr, betas=betas, rank=rank, rho=rho, **others)

    def direction(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """Return P·m̂ / (√v̂ + ε) for the subspace P (m, r) of this step, and keep P, moments (r, n) and remainder."""
        wide = grad.shape[0] <= grad.shape[1]
        update = self._wide(grad if wide else grad.T, state, group)
        return update if wide else update.T

    def _wide(self, grad: Tensor, state: State, group: Group) -> Tensor:
        (beta1, beta2), rank, t = group["betas"], min(group["rank"], grad.shape[0]), state.get("moments", 0)
        if t == 0:
            low = grad.new_zeros(rank, grad.shape[1])
            state |= {"exp_avg": low, "exp_avg_sq": low.clone(), "error": torch.zeros_like(grad)}
            before = grad.new_zeros(grad.shape[0], rank)
        else:
            before = state["basis"]
        grad = grad + state["error"]
        mean = state["exp_avg"]
        if rank == grad.shape[0]:
            basis = torch.eye(rank, dtype=grad.dtype, device=grad.device)  # the whole space has no need to turn
        elif t == 0:
            basis = torch.linalg.svd(grad, full_matrices=False)[0][:, :rank].contiguous()
        else:  # one power iteration from the last basis
            followed = (before @ mean).mul_(group["rho"] / (1 - beta1**t)).add_(grad, alpha=1 - group["rho"])
            basis = torch.linalg.qr(followed @ (followed.T @ before))[0]
        turn = basis.T @ before
        low, turned = basis.T @ grad, turn @ mean
        if t:  # the second moment turns as a variance and a squared mean do
            m, v = mean / (1 - beta1**t), state["exp_avg_sq"] / (1 - beta2**t)
            state["exp_avg_sq"] = (turn.square() @ (v - m.square()) + (turn @ m).square()).abs_().mul_(1 - beta2**t)
        lost = before @ mean - basis @ turned
        state["error"] = grad - basis @ low + beta1 / (1 - beta1) * lost
        state |= {"exp_avg": turned, "basis": basis}
        return basis @ adam(low, state, group)


class SCALE(_Paper):
    """The gradient with every output's row at a root mean square of 1, with momentum in the last layer (2506.16659).

    As in its authors' code: the paper divides by the norm, the code by the root mean square, which makes rates those
    of AdamW. Embeddings are normalised along the vocabulary. Vectors are under Adam.

    Args:
        momentum: of the groups with last=True.
        others: of AdamW.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, momentum: float = 0.9, **others: Any) -> None:
        super().__init__(params, lr, momentum=momentum, last=False, dim=1, **others)

    def direction(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """Return the gradient, or the last layer's momentum, normalised along `dim`."""
        if group["last"]:
            mean = state.setdefault("exp_avg", torch.zeros_like(grad))
            grad = mean.lerp_(grad, 1 - group["momentum"])
        return grad / grad.square().mean(group["dim"], keepdim=True).sqrt_().clamp_min_(1e-8)


class SinkGD(_Paper):
    """The gradient with rows and columns of equal norms, without state (2502.06742).

    Args:
        iterations: of the two normalisations in turn.
        scale: learning rate as a share of AdamW's.
        others: of AdamW.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, *, iterations: int = 5, scale: float = 0.05, **others: Any
    ) -> None:
        super().__init__(params, lr, iterations=iterations, scale=scale, **others)

    def direction(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """Return the normalised gradient times `scale`."""
        return balance(grad, group["iterations"]).mul_(group["scale"])


def balance(grad: Tensor, iterations: int) -> Tensor:
    """Return a matrix (m, n) scaled by rows and columns to row norms √n and column norms √m (SR-Sinkhorn)."""
    for _ in range(iterations):
        for dim in (1, 0):
            norms = torch.linalg.vector_norm(grad, dim=dim, keepdim=True)
            grad = grad * (math.sqrt(grad.shape[dim]) / norms.clamp_min(1e-8))
    return grad
