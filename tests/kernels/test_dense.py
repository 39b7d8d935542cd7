import copy
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
from triton import language as tl

from sgc import SGC
from sgc.apply import apply_whitened
from sgc.backends.triton import adamw, batch, table, whitened
from sgc.codec.encode import Whitening
from sgc.codec.layout import make_layout
from sgc.codec.project import mix
from sgc.constants import CLIP
from sgc.whiten import square_sums
from tests.tolerances import EPS, SIGMAS, SUM

# A matrix of several tiles, a narrow one, one of odd width, a ragged vector, a stack of experts, and two kept dense.
SHAPES = [(40, 264), (130, 40), (20, 261), (6401,), (3, 5, 20, 24), (33,), (15, 20)]
REAL_SHAPES = [(4096, 11008), (130000, 40), (2047, 8191), (1000003,), (8, 3, 512, 1024), (397,), (15, 20)]

# Two ways to round each of the dozen operations of a step, with two orders of its sums; over T ≤ 6 steps of |u| ≤ 3.
STEP = 12 * 6 * EPS

SKETCHED = {"chunk_size": 64, "sketch_size": 16, "sparsity": 2}


@pytest.fixture(autouse=True)
def larger_pieces(monkeypatch, forced, real_sizes):
    """In the interpreter an operation costs the same for every size: take larger tiles, and fewer."""
    if not real_sizes:
        for module, names in ((batch, ("SUMMED", "MOVED")), (whitened, ("SUMMED",))):
            for name in names:
                monkeypatch.setattr(module, name, whitened.SMALL_TILE // 2)


@pytest.fixture
def shapes(real_sizes):
    return REAL_SHAPES if real_sizes else SHAPES


def make(shapes, device, dtype=torch.float32, **changed):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    options = {"lr": 1e-2, "weight_decay": 0.1, "stochastic_rounding": False, "min_size": 400, **changed}
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "weight_decay": 0.0, "betas": (0.8, 0.95)}]
    return params, SGC([group for group in groups if group["params"]], **options)


def gradients(params, step):
    """Heavy tails; from step 1 on a NaN, zeros, an infinity, rows without gradient, and a tensor without any."""
    generator = torch.Generator().manual_seed(step)
    for number, param in enumerate(params):
        x = torch.randn(param.shape, generator=generator) * torch.randn(param.shape, generator=generator).exp()
        if number == 0:
            x[10:30] = 0
        if (step, number) in ((1, 1), (1, 5)):
            x.view(-1)[7] = float("nan")
        if (step, number) in ((2, 0), (2, 4), (2, 6)):
            x.zero_()
        if (step, number) == (3, 2):
            x.view(-1)[-1] = float("inf")
        param.grad = None if (step, number) == (1, 3) else x.to(param)


def advance(params, optimizer, steps):
    for step in steps:
        gradients(params, step)
        optimizer.step()


def held(params, optimizer):
    return [param.detach().clone() for param in params], copy.deepcopy(optimizer.state_dict())


def assert_near(found, expected, tolerance):
    weights, state = found
    for weight, other in zip(weights, expected[0], strict=True):
        one = torch.finfo(weight.dtype).eps * (weight.dtype is not torch.float32)  # rounded to another neighbour
        error = (weight.float() - other.float()).abs().max()
        assert error <= (tolerance + one) * other.float().abs().max()
    assert state["param_groups"] == expected[1]["param_groups"]
    for number, tensors in expected[1]["state"].items():
        assert tensors.keys() == state["state"][number].keys()
        for name, value in tensors.items():
            other = state["state"][number][name]
            assert (other - value).abs().max() <= (0 if name == "step" else SUM) * value.abs().max(), (number, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(72, 264), (40, 33), (20, 261), (6001,), (1100, 32)], ids=str)
def test_square_sums_are_those_of_torch(shape, dtype, device):
    gradient = torch.randn(shape, device=device).to(dtype)
    layout = make_layout(shape, 256)
    row, col = whitened.square_sums(gradient, layout)
    expected = square_sums(layout.grid(gradient), layout)
    torch.testing.assert_close((row, col), expected, rtol=SUM, atol=0)


@pytest.mark.parametrize(
    ("dtype", "changed"),
    [
        (torch.float32, {}),
        (torch.float32, {"maximize": True, "eps": 1e-2, "betas": (0.0, 0.0)}),
        (torch.bfloat16, {"scale": 2.0}),
        (torch.float16, {"weight_decay": 0.0}),
    ],
    ids=["fp32", "fp32 maximize", "bf16", "fp16"],
)
def test_steps_are_those_of_torch(dtype, changed, shapes, device, monkeypatch):
    params, optimizer = make(shapes, device, dtype, **changed)
    advance(params, optimizer, range(5))
    found, stats = held(params, optimizer), optimizer.stats()
    monkeypatch.setenv("SGC_KERNELS", "torch")
    params, optimizer = make(shapes, device, dtype, **changed)
    advance(params, optimizer, range(5))
    assert_near(found, held(params, optimizer), STEP)
    expected = optimizer.stats()
    assert stats["skipped_tensors"] == expected["skipped_tensors"] == 3
    assert stats["grad_norm"] == pytest.approx(expected["grad_norm"], rel=SUM)
    assert stats["state_bytes"] == expected["state_bytes"]


@pytest.mark.parametrize("changed", [{}, SKETCHED], ids=["dense", "sketched"])
def test_a_host_that_never_hears_of_the_norms_makes_the_same_updates(changed, device, monkeypatch):
    shapes = [(40, 64), (33,), (20, 261), (10, 300), (24, 80), (17,)]
    params, optimizer = make(shapes, device, **changed)
    advance(params, optimizer, range(5))
    expected = held(params, optimizer)
    norm, skipped = (optimizer.stats()[name] for name in ("grad_norm", "skipped_tensors"))

    with monkeypatch.context() as patch:
        patch.setattr(batch.Pending, "ready", lambda self: False)
        params, optimizer = make(shapes, device, **changed)
        advance(params, optimizer, range(5))
        assert [int(optimizer.state[param]["step"]) for param in params] == [5, 5, 5, 4, 5, 5]  # until it hears
        assert_near(held(params, optimizer), expected, 0)
    assert [int(optimizer.state[param]["step"]) for param in params] == [4, 4, 4, 4, 4, 4]
    assert (optimizer.stats()["grad_norm"], optimizer.stats()["skipped_tensors"]) == (norm, skipped)


def test_the_count_of_updates_survives_a_change_of_paths(device, monkeypatch):
    shapes = [(40, 64), (33,), (20, 261), (10, 300)]
    monkeypatch.setattr(batch.Pending, "ready", lambda self: False)
    results = []
    for paths in (("torch",) * 5, ("triton", "triton", "torch", "triton", "torch")):
        params, optimizer = make(shapes, device)
        for step, path in enumerate(paths):
            monkeypatch.setenv("SGC_KERNELS", path)
            advance(params, optimizer, [step])
        results.append(held(params, optimizer))
    assert_near(results[1], results[0], STEP)


@pytest.mark.parametrize("changed", [{}, SKETCHED], ids=["dense", "sketched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_ends_in_the_same_bits(dtype, changed, device):
    shapes = [(40, 64), (33,), (20, 261), (10, 300)]
    params, optimizer = make(shapes, device, dtype, stochastic_rounding=True, **changed)
    advance(params, optimizer, range(2))
    weights, state = held(params, optimizer)
    advance(params, optimizer, range(2, 5))
    resumed, other = make(shapes, device, dtype, stochastic_rounding=True, **changed)
    for param, weight in zip(resumed, weights, strict=True):
        param.data.copy_(weight)
    other.load_state_dict(state)
    advance(resumed, other, range(2, 5))
    assert_near(held(resumed, other), held(params, optimizer), 0)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "cols", "offset", "missing"), [(40, 264, 0, 0), (20, 264, 80, 16), (40, 33, 5, 20)])
def test_a_shard_moves_as_in_torch(rows, cols, offset, missing, dtype, device, monkeypatch):
    layout, grid = make_layout((rows, cols), 256), torch.randn(rows, cols, device=device).to(dtype)
    grid[3:5] = 0
    a, b = torch.rand(rows, device=device) + 0.1, torch.rand(cols, device=device) + 0.1
    whitening = Whitening(a, b, grid.any(1), 1e-8, CLIP)
    before = torch.randn(rows * cols - offset - missing, device=device).to(dtype)
    moved = []
    for path in ("triton", "torch"):
        monkeypatch.setenv("SGC_KERNELS", path)
        moved.append(before.clone())
        apply_whitened(moved[-1], grid, layout, whitening, 0.1, 0.01, None, offset)
    error = STEP if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(*moved, rtol=error, atol=error)
    assert (moved[0] != before).float().mean() > 0.5


def test_stochastic_rounding_takes_a_neighbour_and_the_mean_of_many_is_exact(device):
    shapes = [(128, 256), (3001,)]
    updates = {}
    for dtype in (torch.bfloat16, torch.float32):
        params, optimizer = make(shapes, device, dtype, stochastic_rounding=True, min_size=4000)
        if dtype is torch.float32:
            for param in params:
                param.data.copy_(param.data.bfloat16())
        for number, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(number)).bfloat16().to(param)
        optimizer.step()
        updates[dtype] = [param.detach().float() for param in params]
    for rounded, exact in zip(updates[torch.bfloat16], updates[torch.float32], strict=True):
        low = (exact.view(torch.int32) & -65536).view(torch.float32)  # towards zero
        high = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
        # an fp32 rounded differently in its last bits may be another side of a bf16
        clear = ((exact - low) / (high - low)).clamp(0, 1)
        sure = (clear > 1e-3) & (clear < 1 - 1e-3)
        up = rounded == high
        assert ((rounded == low) | up)[sure].all()
        surplus = (up.float() - clear)[sure].sum()
        assert surplus.abs() <= SIGMAS * (clear * (1 - clear))[sure].sum().sqrt()
        # chance takes no side twice: neighbours in a row and in a column, and a tensor at the next step
        centred = torch.where(sure, up.float() - clear, 0.0)
        deviation = torch.where(sure, clear * (1 - clear), 0.0)
        for shift in ((0, 1), (1, 0), (7, 3)) if rounded.dim() == 2 else ((1,), (32,)):
            moved = torch.roll(centred, shift, tuple(range(len(shift))))
            product = (centred * moved).sum()
            spread = (deviation * torch.roll(deviation, shift, tuple(range(len(shift))))).sum().sqrt()
            assert product.abs() <= SIGMAS * spread


@triton.jit
def store_noise(hashes, noise, seed, N: tl.constexpr):
    at = tl.arange(0, N)
    keys = table.mixed(at.to(tl.uint32) ^ seed.to(tl.uint32))
    tl.store(hashes + at, keys.to(tl.int64))
    drawn = table.noise_of(keys[:, None], table.mixed(at.to(tl.uint32))[None, :])
    tl.store(noise + at[:, None] * N + at[None, :], drawn.to(tl.int64))


def test_the_noise_of_a_grid_is_uniform_and_no_rectangle_repeats(device):
    n, seed = 128, 12345
    hashes = torch.empty(n, dtype=torch.int64, device=device)
    noise = torch.empty(n, n, dtype=torch.int64, device=device)
    store_noise[(1,)](hashes, noise, seed, n)
    assert hashes.tolist() == [mix(at ^ seed) for at in range(n)]
    assert noise.min() >= 0
    assert noise.max() < 1 << 16
    bits = noise[:, :, None] >> torch.arange(16, device=device) & 1
    for shares in (bits.float().mean((0, 1)), (bits[1:] ^ bits[:-1]).float().mean((0, 1))):
        assert (shares - 0.5).abs().max() <= SIGMAS * 0.5 / (n * (n - 1)) ** 0.5
    corners = noise[1:, 1:] ^ noise[1:, :-1] ^ noise[:-1, 1:] ^ noise[:-1, :-1]
    assert (corners == 0).float().mean() < 1e-2


def test_each_step_and_each_tensor_are_rounded_by_other_numbers(device):
    params, optimizer = make([(64, 64), (64, 64)], device, torch.bfloat16, stochastic_rounding=True, min_size=0)
    weight, gradient = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    found = []
    for _ in range(2):
        for param in params:
            param.data.copy_(weight)
            param.grad = gradient.to(device)
            optimizer.state.pop(param, None)
        optimizer.step()
        found += [param.detach().clone() for param in params]
    assert len({one.cpu().view(torch.int16).numpy().tobytes() for one in found}) == 4


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_row_without_gradient_only_decays(decay, device):
    (param,), optimizer = make([(64, 96)], device, weight_decay=decay)
    for group in optimizer.param_groups:
        group["weight_decay"] = decay
    before = param.detach().clone()
    param.grad = torch.randn_like(param)
    param.grad[5:60] = 0
    optimizer.step()
    expected = before[5:60] * (1 - 1e-2 * decay)
    torch.testing.assert_close(param.detach()[5:60], expected, rtol=0 if decay == 0 else EPS, atol=0)
    assert (param.detach()[:5] - before[:5] * (1 - 1e-2 * decay)).abs().median() > 1e-3


def test_what_is_in_fresh_memory_does_not_matter(device, monkeypatch):
    shapes = [(40, 64), (33,), (20, 261), (6001,)]
    params, optimizer = make(shapes, device)
    advance(params, optimizer, [0])
    expected = held(params, optimizer)
    empty = torch.empty

    def full_of_nan(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full_of_nan)
    params, optimizer = make(shapes, device)
    advance(params, optimizer, [0])
    assert_near(held(params, optimizer), expected, 0)


def test_addresses_that_are_no_multiples_of_16_bytes_are_read_as_well(device, monkeypatch):
    results = []
    for path in ("triton", "torch"):
        monkeypatch.setenv("SGC_KERNELS", path)
        flat = torch.arange(40 * 64 + 3, device=device) % 17 / 17
        param = torch.nn.Parameter(flat[3:].view(40, 64))
        optimizer = SGC([param], lr=1e-2, min_size=0)
        gradient = torch.randn(40 * 64 + 1, generator=torch.Generator().manual_seed(0)).to(device)
        param.grad = gradient[1:].view(40, 64)
        optimizer.step()
        results.append(held([param], optimizer))
    assert_near(*results, STEP)


def test_launches_do_not_grow_with_the_number_of_tensors(device, monkeypatch):
    counts = []
    for tensors in (1, 4):
        launched: list[str] = []
        for name in ("tile_sums", "fold_sums", "move_moments", "whiten_and_apply", "adamw_sums", "adamw_step"):
            module = adamw if name.startswith("adamw") else whitened
            kernel = getattr(module, name)

            class Counted:
                def __init__(self, kernel=kernel, launched=launched):
                    self.kernel, self.launched = kernel, launched

                def __getitem__(self, grid):
                    self.launched.append(grid)
                    return self.kernel[grid]

            monkeypatch.setattr(module, name, Counted())
        params, optimizer = make([(40, 64)] * tensors + [(33,)] * tensors, device)
        advance(params, optimizer, [0])
        counts.append(len(launched))
        monkeypatch.undo()
        monkeypatch.setenv("SGC_KERNELS", "triton")
    assert counts == [6, 6]


def test_tensors_that_do_not_fit_into_one_launch_take_several(device, monkeypatch):
    shapes = [(40, 64), (20, 261), (30, 64), (6001,)]
    results = []
    for entries in (1 << 30, 5000):
        monkeypatch.setattr(batch, "WAVE_ENTRIES", entries)
        params, optimizer = make(shapes, device)
        advance(params, optimizer, [0])
        results.append(held(params, optimizer))
    assert_near(*results, 0)


def test_a_change_of_the_learning_rate_compiles_nothing(device, real_sizes):
    if not real_sizes:
        pytest.skip("nothing is compiled in the interpreter")
    params, optimizer = make([(512, 512), (33,)], device)
    advance(params, optimizer, [0])
    compiled = [len(kernel.device_caches[0][0]) for kernel in (whitened.whiten_and_apply, adamw.adamw_step)]
    for step, lr in enumerate((1.0, 0.0, 16.0, 1e-3), start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        advance(params, optimizer, [step + 4])
    assert compiled == [len(kernel.device_caches[0][0]) for kernel in (whitened.whiten_and_apply, adamw.adamw_step)]


@pytest.mark.parametrize("changed", [{}, SKETCHED, {"sparsity": 2}], ids=["dense", "sketched", "sparse"])
def test_a_step_does_not_wait_for_the_device(changed, device, real_sizes):
    if not real_sizes:
        pytest.skip("there is no device to wait for")
    params, optimizer = make([(512, 512), (33,), (1024, 300)], device, torch.bfloat16, **changed)
    advance(params, optimizer, [0])
    gradients(params, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_kernels_compile_for_an_h100_and_move_16_bytes_at_a_time(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.dense_cases"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    accesses = {(line["case"], line["kernel"]): line["accesses"] for line in lines}
    assert len(accesses) == 24
    reading = {"tile_sums", "tile_sums_of_one", "whiten_and_apply", "whiten_and_apply_one", "adamw_sums", "adamw_step"}
    for (case, kernel), found in accesses.items():
        if case.startswith("aligned") and kernel in reading:
            assert "ld.global.v4.b32" in found, (case, kernel)
            assert "ld.global.b16" not in found, (case, kernel)
            assert "sums" in kernel or "st.global.v4.b32" in found, (case, kernel)
