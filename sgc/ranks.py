"""What several processes must agree on before they train one model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_compared = 0  # optimizers compared so far: every rank counts its own, in the same order


def checksum(tensors: Iterable[Tensor]) -> int:
    """Sum the bits of tensors as integers, which no order of summation, and so no device, changes.

    Args:
        tensors: of any shape, dtype and device.

    Returns:
        The sum; equal tensors have equal ones, and different ones hardly ever.
    """
    words = (tensor.detach().reshape(-1).view(WORDS[tensor.element_size()]) for tensor in tensors)
    return sum(int(word.sum(dtype=torch.int64)) for word in words)


def refuse_mismatch(groups: Iterable[Mapping[str, Any]], names: Iterable[str], checksums: Iterable[int]) -> None:
    """Compare this rank's optimizer with that of the first rank that came here; no rank waits for another.

    Args:
        groups: the parameter groups.
        names: of the hyperparameters that must be equal.
        checksums: of the state of every group, which must be equal too.

    Raises:
        RuntimeError: they differ; the sentence names the ranks and the values.
    """
    global _compared
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    store = dist.distributed_c10d._get_default_store()
    rank, names = dist.get_rank(), tuple(names)
    own = {"rank": rank, "groups": [{name: group[name] for name in names} for group in groups]}
    mine: dict[str, Any] = json.loads(json.dumps({**own, "state": list(checksums)}))
    key, _compared = f"sgc/optimizer/{_compared}", _compared + 1
    first = json.loads(store.compare_set(key, "", json.dumps(mine)))
    if (first["groups"], first["state"]) == (mine["groups"], mine["state"]):
        return
    raise RuntimeError(
        f"every rank must use the same SGC: {_difference(mine, first)}; where ranks train different models, set "
        "`optimizer.check_ranks = False` before the first step"
    )


def _difference(mine: dict[str, Any], first: dict[str, Any]) -> str:
    here, there = f"on rank {mine['rank']}", f"on rank {first['rank']}"
    if len(mine["groups"]) != len(first["groups"]):
        return f"{len(mine['groups'])} parameter groups {here}, {len(first['groups'])} {there}"
    for number, (own, other) in enumerate(zip(mine["groups"], first["groups"], strict=True)):
        for name in own:
            if own[name] != other[name]:
                return f"{name}={own[name]} {here}, {name}={other[name]} {there} (parameter group {number})"
    number = next(n for n, pair in enumerate(zip(mine["state"], first["state"], strict=True)) if pair[0] != pair[1])
    return f"the state {here} is not that {there} (parameter group {number}), as if it came from another checkpoint"
