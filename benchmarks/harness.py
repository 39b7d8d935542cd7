"""What every benchmark shares: rows that name machine, versions and commit, cells measured once, and clocks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from federated.files import sentence

if TYPE_CHECKING:
    import torch

RESULTS = Path(os.environ.get("SGC_BENCH_RESULTS") or Path(__file__).parent / "results")
PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "bitsandbytes",
    "peft",
    "galore-torch",
    "apollo-torch",
    "came-pytorch",
    "pytorch-optimizer",
    "torchao",
    "numba",
)


def said(main: Callable[[], None]) -> NoReturn:
    """Run a benchmark's command; what it can't do is one sentence and exit code 2."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{name}: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; the same command goes on where it was")
    sys.exit()


def provenance() -> dict[str, Any]:
    """Name the commit, the machine and the versions that a row was measured with."""
    import torch

    root = Path(__file__).parent
    commit = os.environ.get("SGC_COMMIT", "")  # where the files are and the repository is not
    if not commit and shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {"commit": commit, "machine": machine, "versions": versions, "threads": torch.get_num_threads()}


def rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of results/NAME.jsonl; a line that a killed process left unfinished is no row."""
    path = RESULTS / f"{name}.jsonl"
    found = map(_whole, path.read_bytes().splitlines()) if path.exists() else ()
    return [row for row in found if row is not None]


def _whole(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def add_row(name: str, row: dict[str, Any]) -> None:
    """Append a row in one write under a lock, so that several processes may share the file.

    A last line without its end was cut off by a kill: it is dropped, so that the new row stands on a line of its own.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    stamped = {**row, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **provenance()}
    with open(RESULTS / f"{name}.jsonl", "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = file.read()
        ended = before.rfind(b"\n") + 1
        if ended < len(before):
            if _whole(before[ended:]) is None:
                file.truncate(ended)
            else:  # only the line's end is missing
                file.write(b"\n")
        file.write(json.dumps(stamped).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def claim(name: str, cell: str) -> Iterator[bool]:
    """Claim a cell for this process; yield False where another live process is measuring it.

    The lock is the kernel's and falls with the process, so a killed run leaves nothing to clear.
    """
    folder = RESULTS / ".claims"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.{cell.replace('/', '_')}", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


# ---- clocks ----------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU needs no waiting."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int = 30,
    seconds: float = 60.0,
    warm_up: int = 2,
) -> dict[str, dict[str, float]]:
    """Time calls in turns, so that what disturbs one disturbs all; return ms of each by quantile.

    Each call of a round is timed from an idle device to an idle device. On a CPU the seconds that this process computed
    are given too ("cpu_p50"): other processes prolong them less than the time that passes.

    Args:
        calls: by name.
        device: that they run on.
        repeats: rounds, fewer where `seconds` are over, but three.
        seconds: for all rounds together.
        warm_up: calls of each before the first round.
    """
    passed: dict[str, list[float]] = {name: [] for name in calls}
    computed: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warm_up):
            call()
    synchronize(device)
    start = time.perf_counter()
    for number in range(repeats):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            synchronize(device)
            passed[name].append(time.perf_counter() - wall)
            computed[name].append(time.process_time() - cpu)
    found = {}
    for name in calls:
        found[name] = quantiles(passed[name])
        if device.type == "cpu":
            found[name]["cpu_p50"] = quantiles(computed[name])["p50"]
        found[name]["rounds"] = len(passed[name])
    return found


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return p20, p50 and p80 in ms."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {f"p{at}": round(ordered[round(at / 100 * last)] * 1e3, 4) for at in (20, 50, 80)}


@contextlib.contextmanager
def environment(**changed: str) -> Iterator[None]:
    """Set environment variables for a while: `SGC_KERNELS` is read at every step."""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def temporaries(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Return the bytes of the largest tensor that a call makes, and the most that it holds at once.

    What is held before the call does not count. On a GPU the allocator is asked for the second, and the first is 0; on
    a CPU the tensors that torch's operators make are followed.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return 0, torch.cuda.max_memory_allocated(device) - before
    held: dict[int, weakref.ref[Any]] = {}
    total = largest = peak = 0

    class Follow(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest, peak, total
            given = {
                leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
            }
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if not isinstance(leaf, torch.Tensor) or type(leaf) is not torch.Tensor:
                    continue
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key in given or key in held:
                    continue

                def gone(_: Any, key: int = key, size: int = size) -> None:
                    nonlocal total
                    total -= size
                    held.pop(key, None)

                held[key] = weakref.ref(storage, gone)
                total += size
                largest, peak = max(largest, size), max(peak, total)
            return out

    with Follow():
        call()
    return largest, peak


def floors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure what a stage cannot beat: bytes/s of a copy (read and written), and operations/s of a matrix product."""
    import torch

    entries = (1 << 28) // dtype.itemsize if device.type == "cuda" else (1 << 26) // dtype.itemsize
    source = torch.ones(entries, dtype=dtype, device=device)
    target = torch.empty_like(source)
    side = 8192 if device.type == "cuda" else 1024
    a = torch.ones(side, side, dtype=dtype, device=device)
    b, c = a.clone(), a.clone()
    calls = {"copy": lambda: target.copy_(source), "matrix": lambda: torch.mm(a, b, out=c)}
    found = interleave(calls, device, repeats=10, seconds=5)
    clock = "cpu_p50" if device.type == "cpu" else "p50"
    return {
        "copy_bytes_per_s": 2 * source.nbytes / found["copy"][clock] * 1e3,
        "matrix_flops_per_s": 2 * side**3 / found["matrix"][clock] * 1e3,
    }


def device_of(name: str | None) -> torch.device:
    """Return the device of a name; without a name, the GPU where there is one."""
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def fast_path(device: torch.device) -> str | None:
    """Name the path beside torch that SGC can take here: "triton" or "numba"; None: there is no other."""
    from sgc import backends
    from sgc.backends import numba as compiled

    with environment(SGC_KERNELS="auto"):
        if device.type == "cpu":
            found = compiled.choose().path
        else:
            found = backends.choose("encode", device).path
    return None if found == "torch" else found


# ---- pictures --------------------------------------------------------------------------------------------------------


def panels(count: int, columns: int) -> tuple[Any, list[Any]]:
    """Return a figure, and its panels in reading order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def save_figure(figure: Any, output: Path) -> None:
    """Write a figure."""
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
