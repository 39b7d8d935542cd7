"""Rewrite a DeepSpeed checkpoint for another number of ranks, the state of SGC re-encoded with it. (ours)

DeepSpeed itself refuses to load the optimizer's state where the number of ranks has changed, and its universal
checkpoint knows Adam's state alone. The state of SGC says which piece of which tensor it is of, so it can be put
together and cut anew: nothing is lost, but int8 sketches are rounded once more.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgc.parallel.pieces import SPAN, Piece, piece_schema
from sgc.state import MOMENTS, SCALES, new_state, read_held, tensor_layout, write_held

FLAT = {True: "fp32_flat_groups", False: "single_partition_of_fp32_groups"}  # in a file, by whether it is of ZeRO-3
OPTIMIZER = {True: "optimizer_state_dict", False: "base_optimizer_state"}
ALIGNMENT = 2  # entries per rank to which ZeRO-1 and 2 pad a group


@dataclass
class _Whole:
    """A tensor put together from its pieces."""

    shape: tuple[int, ...]
    weight: Tensor  # (entries,) fp32
    state: dict[str, Tensor] = field(default_factory=dict)  # sketches (c, k) in fp32 where they were int8


def reshape_checkpoint(source: str | Path, target: str | Path, ranks: int) -> None:
    """Rewrite a checkpoint of DeepSpeed's, or of a Trainer under DeepSpeed, for another number of ranks.

    Args:
        source: the folder with the file "latest"; it is left as it is.
        target: a new folder, to resume from.
        ranks: data-parallel processes that will load it.

    Raises:
        ValueError: what is saved is no such checkpoint, or lies in a way that is not understood.

    Example:
        >>> from sgc.zero_checkpoint import reshape_checkpoint
        >>> reshape_checkpoint("out/checkpoint-100", "out/checkpoint-100-of-4", ranks=4)  # doctest: +SKIP
    """
    source, target = Path(source), Path(target)
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if target.exists():
        raise ValueError(f"target must be a new folder, '{target}' exists")
    if not (source / "latest").is_file():
        raise ValueError(f"'{source}' is no DeepSpeed checkpoint: it has no file named latest")
    tag = (source / "latest").read_text().strip()
    saved, names = _load(source / tag)
    zero3 = int(saved[0]["optimizer_state_dict"]["zero_stage"]) == 3
    fresh = _recut(saved, ranks, zero3)
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns(tag, "rng_state_*.pth"))
    (unfinished / tag).mkdir()
    for rank, content in enumerate(fresh):
        torch.save(content, unfinished / tag / names.format(rank))
    for name, content in _model_files(source / tag, ranks):
        torch.save(content, unfinished / tag / name)
    unfinished.rename(target)


def _load(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Read the optimizer's file of every rank; give the pattern of their names, too."""
    found = {}
    names = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    for file in folder.glob("*_optim_states.pt"):
        match = re.fullmatch(r"((?:bf16_)?zero_pp_rank_)(\d+)(_mp_rank_00_optim_states\.pt)", file.name)
        if match is None:
            raise ValueError(
                f"'{file.name}' is of tensor or expert parallelism, which reshape_checkpoint does not know"
            )
        names = f"{match[1]}{{}}{match[3]}"
        found[int(match[2])] = torch.load(file, map_location="cpu", weights_only=False)  # the user's own checkpoint
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(
            f"'{folder}' should hold the optimizer's file of every rank, it holds those of {sorted(found)}"
        )
    return [found[rank] for rank in range(len(found))], names


def _model_files(folder: Path, ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the files of the model: one, or under ZeRO-3 one per rank, in which the trained weights are left out."""
    for file in sorted(folder.glob("*_model_states.pt")):
        content = torch.load(file, map_location="cpu", weights_only=False)
        if "dp_world_size" not in content:
            raise ValueError(f"'{file.name}' is no model file of DeepSpeed's")
        content["dp_world_size"] = ranks
        match = re.fullmatch(r"((?:bf16_)?zero_pp_rank_)\d+(_mp_rank_00_model_states\.pt)", file.name)
        if match is None:
            yield file.name, content
            continue
        if content.get("frozen_param_fragments"):
            raise ValueError(
                "frozen parameters under ZeRO-3 are saved in pieces, which reshape_checkpoint does not know"
            )
        yield from ((f"{match[1]}{rank}{match[2]}", content) for rank in range(ranks))
        return


def _recut(saved: list[dict[str, Any]], ranks: int, zero3: bool) -> list[dict[str, Any]]:
    """Put every partition together and cut it for `ranks` ranks."""
    inner = [content["optimizer_state_dict"] for content in saved]
    if any(any(padding) for padding in inner[0].get("param_alignment_paddings", [])):
        raise ValueError('reshape_checkpoint does not know the "parameter_alignment" of DeepSpeed')
    fresh = [{**saved[0], "optimizer_state_dict": dict(inner[0])} for _ in range(ranks)]
    groups = inner[0][OPTIMIZER[zero3]]["param_groups"]
    flats: list[list[Tensor]] = [[] for _ in range(ranks)]
    states: list[dict[int, dict[str, Any]]] = [{} for _ in range(ranks)]
    paddings: list[list[int]] = [[] for _ in range(ranks)]
    for group in groups:
        if "chunk_size" not in group:
            raise ValueError("the checkpoint is not one of SGC's: its parameter groups have no chunk_size")
        if zero3 and len(group["params"]) > 1:
            raise ValueError('reshape_checkpoint does not know ZeRO-3 with several sub-groups: raise "sub_group_size"')
        for partition in group["params"]:
            held = [content[OPTIMIZER[zero3]]["state"].get(partition, {}) for content in inner]
            parts = [content[FLAT[zero3]][partition].float() for content in inner]
            whole = _assemble(held, parts, group)
            for rank, (flat, state, padding) in enumerate(_cut(whole, ranks, group, zero3)):
                flats[rank].append(flat)
                paddings[rank].append(padding)
                states[rank][partition] = state
    for rank, content in enumerate(fresh):
        own = content["optimizer_state_dict"]
        own[OPTIMIZER[zero3]] = {**own[OPTIMIZER[zero3]], "state": states[rank], "param_groups": copy.deepcopy(groups)}
        own[FLAT[zero3]] = flats[rank]
        own["partition_count"] = ranks if zero3 else [ranks] * len(groups)
        if not zero3:
            own["group_paddings"] = paddings[rank]
            own.pop("param_slice_mappings", None)  # of the old cut; only DeepSpeed's own converter reads it
    return fresh


def _assemble(held: list[dict[str, Any]], parts: list[Tensor], group: Mapping[str, Any]) -> dict[int, _Whole]:
    """Put together the tensors of one partition, in the order in which they lie."""
    pieces: list[tuple[int, Piece]] = []
    for rank, state in enumerate(held):
        for name, value in state.items():
            if name.endswith(f".{SPAN}"):
                start, stop, at, *shape = value.tolist()
                pieces.append((rank, Piece(int(name.partition(".")[0]), tuple(shape), start, stop, at)))
    if not pieces:
        raise ValueError(
            "the checkpoint holds no state of SGC yet: resume it where it was written, and save after a step"
        )
    found: dict[int, _Whole] = {}
    for rank, piece in sorted(pieces, key=lambda entry: (entry[0], entry[1].at)):
        whole = found.setdefault(piece.number, _Whole(piece.shape, torch.zeros(math.prod(piece.shape))))
        whole.weight[piece.start : piece.stop] = parts[rank][piece.at : piece.at + piece.numel]
        state = {n.partition(".")[2]: v for n, v in held[rank].items() if n.startswith(f"{piece.number}.")}
        layout = tensor_layout(piece.shape, group)
        for name, value in state.items():
            if name == SPAN or name.endswith(SCALES):
                continue
            if layout is None and value.dim():
                place, entries = slice(piece.start, piece.stop), math.prod(piece.shape)
                whole.state.setdefault(name, value.new_zeros(entries))[place] = value
            elif layout is not None and name in MOMENTS:
                value = read_held(state, name) if name + SCALES in state else value
                place = layout.window(piece.start, piece.stop).chunks
                whole.state.setdefault(name, value.new_zeros(layout.chunks, value.shape[1]))[place] = value
            else:
                whole.state[name] = value
    return found


def _cut(
    whole: Mapping[int, _Whole], ranks: int, group: Mapping[str, Any], zero3: bool
) -> Iterator[tuple[Tensor, dict[str, Any], int]]:
    """Return the partition, its state and its padding for every rank, in DeepSpeed's ways of cutting."""
    sizes = {number: tensor.weight.numel() for number, tensor in whole.items()}
    total = sum(sizes.values())
    share = math.ceil(total / (ALIGNMENT * ranks)) * ALIGNMENT
    for rank in range(ranks):
        pieces, at, first = [], 0, 0
        for number, size in sizes.items():
            if zero3:
                length = math.ceil(size / ranks)
                start, stop = min(rank * length, size), min((rank + 1) * length, size)
                here, at = at, at + length
            else:
                start, stop = (min(max(edge * share - first, 0), size) for edge in (rank, rank + 1))
                here, first = max(first - rank * share, 0), first + size
            if start < stop:
                pieces.append(Piece(number, whole[number].shape, start, stop, here))
        padding = 0 if zero3 else min(max((rank + 1) * share - total, 0), share)
        flat = torch.zeros(at if zero3 else share - padding)
        state: dict[str, Any] = {}
        for piece in pieces:
            flat[piece.at : piece.at + piece.numel] = whole[piece.number].weight[piece.start : piece.stop]
            state |= {f"{piece.number}.{name}": value for name, value in _piece_state(whole, piece, group).items()}
        yield flat, state, padding


def _piece_state(whole: Mapping[int, _Whole], piece: Piece, group: Mapping[str, Any]) -> dict[str, Any]:
    layout, schema = tensor_layout(piece.shape, group), piece_schema(piece, group)
    state: dict[str, Any] = dict(new_state(schema, torch.device("cpu")))
    state[SPAN].copy_(torch.tensor(piece.span))
    for name, value in whole[piece.number].state.items():
        if layout is None and value.dim():
            state[name].copy_(value[piece.start : piece.stop])
        elif layout is not None and name in MOMENTS:
            own = value[layout.window(piece.start, piece.stop).chunks]
            if name + SCALES in state:
                write_held(state, name, own.contiguous(), None)
            else:
                state[name].copy_(own)
        else:
            state[name].copy_(value.view_as(state[name]))
    return state
