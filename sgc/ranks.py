"""What several processes must agree on before they train one model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

_compared = 0  # optimizers compared so far: every rank counts its own, in the same order


def refuse_mismatch(groups: Iterable[Mapping[str, Any]], names: Iterable[str]) -> None:
    """Compare this rank's hyperparameters with those of the first rank that came here; no rank waits for another.

    Args:
        groups: the parameter groups.
        names: of the hyperparameters that must be equal.

    Raises:
        RuntimeError: they differ; the sentence names the ranks and the values.
    """
    global _compared
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    store = dist.distributed_c10d._get_default_store()
    rank, names = dist.get_rank(), tuple(names)
    own = {"rank": rank, "groups": [{name: group[name] for name in names} for group in groups]}
    mine: dict[str, Any] = json.loads(json.dumps(own))
    key, _compared = f"sgc/optimizer/{_compared}", _compared + 1
    first = json.loads(store.compare_set(key, "", json.dumps(mine)))
    if first["groups"] == mine["groups"]:
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
    return "the hyperparameters differ"
