"""The loops that numba compiles give what plain torch gives: the same indices, values within the tolerances."""

import errno
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import temporaries
from sgc import SGC, backends
from sgc.apply import apply_whitened
from sgc.backends import numba as compiled
from sgc.codec.encode import Whitening, encode, select
from sgc.codec.layout import make_layout
from sgc.codec.project import Projection
from sgc.codec.recover import pursue
from sgc.constants import CLIP
from sgc.whiten import mean_squares, square_sums
from tests.tolerances import RIDGE_VALUE, SUM

needs_numba = pytest.mark.skipif(not compiled._installed(), reason="numba is not installed")
SHAPES = [(1, 4096), (7, 300), (64, 96), (40, 1024), (3, 5, 200), (5000,), (33, 8), (300, 257), (4, 6000)]


def raises(error):
    def call(*_, **__):
        raise error

    return call


def on(path, call, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.VARIABLE, path)
        return call(*arguments)


def problem(shape, chunk_size, seed, *, idle=True, levels=None):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(shape, generator=generator) * 1e-3
    if levels:  # few values: many entries tie
        gradient = (gradient * 1e3 * levels).round() / levels
    if idle and gradient.dim() > 1 and len(gradient) > 1:
        gradient[::3] = 0
    layout = make_layout(gradient.shape, chunk_size)
    grid = layout.grid(gradient)
    row, col = on("torch", mean_squares, grid, layout)
    a, b = (row + 1e-12).sqrt(), (col / col.mean() + 1e-6).sqrt()
    busy = row > 0
    return grid, layout, Whitening(a, b, None if busy.all() else busy, 1e-8, CLIP)


@needs_numba
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_squares_agree(shape):
    grid, layout, _ = problem(shape, 256, 0)
    for found, expected in zip(
        on("numba", square_sums, grid, layout), on("torch", square_sums, grid, layout), strict=True
    ):
        assert found.dtype is torch.float32
        assert (found - expected).abs().max() <= SUM * expected.max()


@needs_numba
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_sums_of_squares_pass_on_what_is_not_finite(value):
    grid, layout, _ = problem((64, 96), 256, 0)
    grid[5, 7] = value
    row, col = on("numba", square_sums, grid, layout)
    assert row.isfinite().logical_not().nonzero().tolist() == [[5]]
    assert col.isfinite().logical_not().nonzero().tolist() == [[7]]


@needs_numba
@pytest.mark.parametrize("whitens", [True, False], ids=["whitened", "as it is"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("chunk_size", "sparsity"), [(256, 4), (256, 1), (64, 60), (1024, 16), (None, 8), (100, 99)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selects_the_same_entries(shape, chunk_size, sparsity, dtype, whitens):
    for levels in (None, 3):
        grid, layout, whitening = problem(shape, chunk_size, 1, levels=levels)
        if sparsity > layout.chunk:
            continue
        arguments = (grid.to(dtype), layout, whitening if whitens else None, sparsity)
        (index, value), (expected, amount) = on("numba", select, *arguments), on("torch", select, *arguments)
        assert torch.equal(index, expected)
        assert torch.equal(value, amount)


@needs_numba
@given(
    n=st.integers(2, 400),
    chunks=st.integers(1, 5),
    sparsity=st.integers(1, 140),
    levels=st.sampled_from([1, 2, 10, 10**6]),
    seed=st.integers(0, 2**32),
)
def test_of_equal_entries_the_first_are_selected(n, chunks, sparsity, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randint(-levels, levels + 1, (chunks, n), generator=generator).float()
    layout = make_layout(grid.shape, n, within_rows=True)
    found = on("numba", select, grid, layout, None, min(sparsity, n))
    for one, other in zip(found, on("torch", select, grid, layout, None, min(sparsity, n)), strict=True):
        assert torch.equal(one, other)


@needs_numba
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encodes_to_the_same_sketch(shape):
    grid, layout, whitening = problem(shape, 256, 2)
    encoded = functools.partial(encode, squares=True)
    arguments = (grid, layout, Projection(16, 3), min(4, layout.chunk), whitening)
    for found, expected in zip(on("numba", encoded, *arguments), on("torch", encoded, *arguments), strict=True):
        assert (found - expected).abs().max() <= SUM * expected.abs().max()


@needs_numba
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("n", "k", "s"), [(256, 32, 4), (256, 8, 1), (300, 33, 5), (1024, 128, 16), (40, 16, 12)])
def test_recovers_the_same_entries(n, k, s, padded):
    projection = Projection(k, 5)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(50, k, generator=generator)
    lengths = torch.randint(1, n + 1, (50,), generator=generator) if padded else None
    arguments = (y, n, projection, s, "threshold", lengths)
    (index, value), (expected, amount) = on("numba", pursue, *arguments), on("torch", pursue, *arguments)
    assert torch.equal(index, expected)
    if s * s * 4 < k:  # else columns may be nearly dependent, and the values, not what they explain, differ
        assert (value - amount).norm() <= RIDGE_VALUE * amount.norm()
    explained = projection.project(index, value, n) - projection.project(index, amount, n)
    assert explained.norm() <= RIDGE_VALUE * y.norm()
    if lengths is not None:
        assert not value[index >= lengths[:, None]].any()


@needs_numba
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_applies_the_same_update(shape, decay):
    grid, layout, whitening = problem(shape, 256, 3)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    results = []
    for path in ("numba", "torch"):
        results.append(weight.clone())
        on(path, apply_whitened, results[-1], grid, layout, whitening, 0.1, decay, None)
    assert not torch.equal(results[0], weight)
    assert (results[0] - results[1]).abs().max() <= SUM * weight.abs().max()


@needs_numba
@pytest.mark.parametrize("kwargs", [{}, {"sketch_size": 32}, {"sparsity": 4}], ids=str)
def test_the_number_of_threads_changes_no_bit(kwargs):
    weights = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            weight = torch.nn.Parameter(torch.ones(1024, 1100))
            optimizer = on("numba", lambda weight: SGC([weight], **kwargs), weight)
            for seed in range(2):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
                on("numba", optimizer.step)
        finally:
            torch.set_num_threads(before)
        weights.append(weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@needs_numba
def test_a_forked_child_makes_threads_of_its_own():
    code = """
import os, torch
from sgc import SGC
torch.set_num_threads(2)
weight = torch.nn.Parameter(torch.ones(1024, 1024))
optimizer = SGC([weight])
def step():
    weight.grad = torch.ones(1024, 1024)
    optimizer.step()
step()
torch.set_num_threads(1)  # torch's own threads do not survive a fork
child = os.fork()
if not child:
    from sgc.backends import numba as compiled
    assert not compiled._pools
    compiled.torch.get_num_threads = lambda: 2
    optimizer.step()
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_numba_that_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr(compiled, "_installed", lambda: False)
    compiled._choose.cache_clear()
    monkeypatch.setenv(backends.VARIABLE, "auto")
    try:
        assert compiled.choose() == ("torch", 'numba is not installed: pip install "sgc[numba]"')
        monkeypatch.setenv(backends.VARIABLE, "numba")
        with pytest.raises(RuntimeError, match="asks for numba, which is missing"):
            compiled.choose()
        monkeypatch.setenv(backends.VARIABLE, "torch")
        assert compiled.choose().path == "torch"
    finally:
        compiled._choose.cache_clear()


@needs_numba
def test_numba_takes_a_cpu_and_fp32_only(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "auto")
    assert compiled.usable(torch.ones(3), torch.nn.Parameter(torch.ones(3)))
    assert not compiled.usable(torch.ones(3, dtype=torch.bfloat16))
    assert not compiled.usable(torch.ones(3, device="meta"))
    assert not compiled.usable(torch.ones(3), torch.ones(3, dtype=torch.float64))
    assert compiled.takes("auto")
    assert not compiled.takes("torch")


def test_without_numba_nothing_of_it_is_imported():
    code = """
import os, sys, torch
os.environ["SGC_KERNELS"] = "torch"
from sgc import SGC
weight = torch.nn.Parameter(torch.ones(128, 128))
weight.grad = torch.ones(128, 128)
SGC([weight], sketch_size=8).step()
assert "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("path", ["torch", pytest.param("numba", marks=needs_numba)])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"sparsity": 4}, {"sketch_size": 32}, {"sketch_size": 128, "chunk_size": 1024, "sparsity": 16}],
    ids=["default", "sparse", "k=32", "k=128"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_temporary_of_a_step_exceeds_64_mb(path, kwargs, dtype):
    """On a matrix of 88 MB in fp32: four times the largest of the load that the benchmarks time."""
    weight = torch.nn.Parameter(torch.zeros(4096, 5504, dtype=dtype))
    weight.grad = torch.randn(4096, 5504).to(dtype)
    optimizer = on(path, lambda: SGC([weight], **kwargs))
    on(path, optimizer.step)
    largest, peak = on(path, temporaries, optimizer.step, torch.device("cpu"))
    assert 0 < largest <= peak
    assert largest <= 64e6


@needs_numba
def test_a_step_works_where_numba_can_keep_nothing(tmp_path, monkeypatch):
    """No place can be written to, then one that fills up: compiled all the same, with the same result."""
    from numba.core.caching import FunctionCache

    from sgc.backends import loops

    grid = torch.arange(12, dtype=torch.float32).view(3, 4)
    source = tmp_path / "loops.py"
    shutil.copy(loops.__file__, source)
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, "/dev/null")

    def sums():
        spec = importlib.util.spec_from_file_location("copied_loops", source)
        copied = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        row, col = torch.empty(3), torch.zeros(4)
        copied.square_sums(grid.numpy(), row.numpy(), col.numpy(), 0, 3)
        assert torch.equal(row, grid.square().sum(1))
        assert torch.equal(col, grid.square().sum(0))

    (tmp_path / "__pycache__").touch()
    sums()
    (tmp_path / "__pycache__").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(FunctionCache, "save_overload", raises(OSError(errno.ENOSPC, "No space left on device")))
        sums()
    assert not list((tmp_path / "__pycache__").glob("*.nb[ci]"))
    sums()
    assert list((tmp_path / "__pycache__").glob("*.nbc"))
    for damaged in (tmp_path / "__pycache__").glob("*.nb[ci]"):
        damaged.write_bytes(damaged.read_bytes()[:20])
    sums()


@needs_numba
def test_numba_that_can_not_be_imported_is_said_to_be(monkeypatch):
    monkeypatch.setattr(compiled, "_loops", raises(ImportError("Numba needs NumPy 2.3 or less")))
    compiled._choose.cache_clear()
    monkeypatch.setenv(backends.VARIABLE, "auto")
    try:
        assert compiled.choose() == ("torch", "numba can't be imported: Numba needs NumPy 2.3 or less")
        monkeypatch.setenv(backends.VARIABLE, "numba")
        with pytest.raises(ImportError, match="Numba needs NumPy"):
            compiled.choose()
    finally:
        compiled._choose.cache_clear()


@needs_numba
@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_every_part_is_done_once_where_no_thread_takes_work(monkeypatch, accepted):
    """While the interpreter ends; or where a system lets no more threads begin, after their work was noted."""

    class Ending(ThreadPoolExecutor):
        submitted = 0

        def submit(self, *work):
            future = super().submit(*work)
            self.submitted += 1
            if self.submitted > accepted:
                raise RuntimeError("can't start new thread")
            return future

    monkeypatch.setattr(compiled, "_pools", {4: Ending(3)})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for parts in (4, 7, 100):
        counts = [0] * parts

        def run(first, last, counts=counts):
            for part in range(first, last):
                counts[part] += 1

        compiled._share(run, parts)
        assert counts == [1] * parts


@needs_numba
def test_a_step_works_while_the_interpreter_ends():
    """In a thread that outlives the main one, and at exit."""
    code = """
import atexit, threading, torch
from sgc import SGC
torch.set_num_threads(2)
weight = torch.nn.Parameter(torch.ones(1024, 1024))
optimizer = SGC([weight])
def step():
    before = weight.detach().clone()
    weight.grad = torch.ones(1024, 1024)
    optimizer.step()
    assert not torch.equal(weight, before)
    print("stepped")
def later():
    threading.main_thread().join()
    step()
threading.Thread(target=later).start()
atexit.register(step)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert run.stdout == "stepped\n" * 2, run.stderr
