"""What the callback measures: memory by kind, activations, and the error that pure noise leaves."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from sgc.backward.gradient import CompressedGradient
from sgc.codec.project import Projection
from sgc.codec.recover import pursue
from sgc.optimizer import SGC
from sgc.state import MOMENTS, SCALES, tensor_layout

COMPONENTS = {  # of the state, by the names of its tensors
    "sketches": MOMENTS | {name + SCALES for name in MOMENTS},
    "row_and_column_means": {"row", "col"},
    "bases": {"basis"},
    "dense_moments": {"exp_avg", "exp_avg_sq"},
    "step_counters": {"step", "span"},
}


def tensor_bytes(tensors: Iterable[Tensor | None], device: torch.device | None = None) -> int:
    """Count the bytes of the distinct storages behind some tensors: tied ones once, of sharded ones this rank's.

    Args:
        tensors: None among them is passed over, and so are compressed gradients, which are the optimizer's.
        device: count what lies there only.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in tensors:
        if tensor is None or isinstance(tensor, CompressedGradient) or (device and tensor.device != device):
            continue
        storage = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()
        storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class SavedForBackward:
    """Counts the bytes that a model's forward pass saves for backward: distinct storages, parameters left out.

    For one pass it stands in the place of `model.forward`, which it puts back before that begins: nothing of it stays
    on the model, however the pass or the run ends.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes, self.due = 0, True
        self._model = model
        self._forward: Callable[..., Any] | None = None  # what is in the place of the model's while it is armed
        self._before: Callable[..., Any] | None = None  # what was set there before, by others

    def arm(self) -> None:
        """Measure the next forward pass in training."""
        before = vars(self._model).get("forward")
        if isinstance(other := getattr(before, "meter", None), SavedForBackward):
            other.remove()  # a run that failed between the beginning of a step and its forward pass
            before = vars(self._model).get("forward")
        forward = self._model.forward

        @functools.wraps(forward)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if self._forward is not measured or not self._model.training or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            self.remove()
            storages: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                outputs = forward(*args, **kwargs)
            for param in self._model.parameters():
                storages.pop(param.untyped_storage().data_ptr(), None)
            self.bytes, self.due = max(self.bytes, sum(storages.values())), False
            return outputs

        vars(measured)["meter"] = self
        self._before, self._forward = before, measured
        self._model.forward = measured

    def remove(self) -> None:
        """Put the model's forward back."""
        if self._forward is not None and vars(self._model).get("forward") is self._forward:
            if self._before is None:
                del self._model.forward
            else:
                self._model.forward = self._before
        self._forward = self._before = None


def can_be_hooked(model: nn.Module, args: TrainingArguments) -> bool:
    """Whether a model's forward can be replaced for one pass: compiled and sharded ones are left alone."""
    compiled = args.torch_compile or any(module._compiled_call_impl is not None for module in model.modules())
    sharded = any(hasattr(param, "to_local") for param in model.parameters())
    return not compiled and not sharded


def device_of(optimizer: SGC) -> torch.device:
    """Return the device of what the optimizer updates."""
    return next((param.device for param in optimizer.held_tensors()), torch.device("cpu"))


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most allocated on an accelerator, or at most resident for the process where the system says it."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):  # not every accelerator's allocator counts
            return torch.accelerator.max_memory_allocated(device)
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def noise_error(group: Mapping[str, Any]) -> float:
    """Return the share of a sketch of pure noise that recovery leaves unexplained: ‖y − A·u‖/‖y‖, y ~ N(0, I).

    With y as long as it is, the best s' of n columns explain much of it, though nothing is there to be found: the bound
    that recovery must beat. 0 where nothing is recovered from a sketch. (ours)
    """
    k, recovered = group["sketch_size"], group["recovered"]
    layouts = [tensor_layout(param.shape, group) for param in group["params"]]
    chunks = [layout.chunk for layout in layouts if layout is not None and layout.chunk > k]
    if not k or not chunks:
        return 0.0
    n = max(set(chunks), key=chunks.count)
    projection = Projection(k, group["seed"])
    y = torch.randn(max(4, min(256, (1 << 22) // n)), k, generator=torch.Generator().manual_seed(0))
    index, value = pursue(y, n, projection, recovered, group["recovery"])
    left = y - projection.project(index, value, n)
    return math.sqrt(left.square().sum().item() / y.square().sum().item())


def state_tensors(optimizer: SGC) -> Iterator[Tensor]:
    """Iterate over the tensors of the optimizer's state."""
    states = (held for held in optimizer.state.values() if isinstance(held, dict))  # others may keep anything here
    return (value for held in states for value in held.values() if isinstance(value, Tensor))


def sums_held(optimizer: SGC) -> int:
    """Bytes of compressed gradients held now."""
    return 0 if optimizer._compressor is None else optimizer._compressor.bytes()


def state_parts(optimizer: SGC) -> dict[str, int]:
    """Bytes of the state by component; what is in none of them (for `stats`) is the rest of `state_bytes`."""
    parts = dict.fromkeys(COMPONENTS, 0)
    for held in filter(lambda held: isinstance(held, dict), optimizer.state.values()):
        for component, names in COMPONENTS.items():  # of DeepSpeed's partitions, "7.row"
            found = [tensor for name, tensor in held.items() if name.rpartition(".")[2] in names]
            parts[component] += sum(tensor.numel() * tensor.element_size() for tensor in found)
    parts["projection"] = sum(projection.bytes() for projection in optimizer._loop.projections.values())
    return {**parts, "probes": optimizer.state_bytes() - sum(parts.values())}


def describe(group: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a group in plain numbers and words."""
    plain = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    return {
        "names": group.get("param_names"),
        "parameters": sum(param.numel() for param in group["params"]),
        **{name: float(value) if isinstance(value, Tensor) else value for name, value in plain.items()},
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a whole file or none: beside its place first, then into it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=2, allow_nan=False, default=str)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def table(summary: Mapping[str, Any]) -> str:
    """Format a summary for people."""
    rows = [(name.replace("_", " "), held) for name, held in summary["memory"].items() if held is not None]
    lines = [f"{name:<16} {held / 1e6:>12,.2f} MB" for name, held in rows]
    shares = ", ".join(f"{share:.0%} {name.replace('_', ' ')}" for name, share in summary["state_share"].items())
    return "\n".join(
        [
            f"SGC, {summary['steps']:,} steps, {summary['parameters']:,} parameters",
            *lines,
            f"state: {summary['compression_ratio']:.4f} of AdamW's ({shares})",
            f"skipped tensors: {summary['skipped_tensors']}",
        ]
    )
