import numpy as np
import pytest
import torch

from sgc import SGC
from sgc.codec import project
from sgc.codec.layout import Layout
from sgc.constants import CLIP
from tests.tolerances import MARGIN, TWIN
from tests.twin import Twin, matrix_sides

RULES = ("residual", "whitened", "sketched", "subspace")
METHODS = ("omp", "gomp", "threshold")
# eps is of the size of the gradients' roots: an eps that matters is tested, and "subspace" does not start from ±1
# everywhere, where all correlations tie.
OPTIONS = {
    "lr": 0.03,
    "betas": (0.8, 0.95),
    "eps": 0.05,
    "weight_decay": 0.1,
    "chunk_size": 32,
    "sketch_size": 24,
    "sparsity": 4,
    "scale": 2.0,
    "seed": 3,
}


def gradients(shape, steps, seed, seen=None):
    """Heavy-tailed gradients, so that few choices are close; row 1 and column 2 are all but dead.

    With `seen`, a list of rows for every step, all other rows are zero, as an embedding's are.
    """
    rng = np.random.default_rng(seed)
    for step in range(steps):
        g = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))
        grid = g.reshape(matrix_sides(shape))
        if min(grid.shape) > 3:
            grid[1] *= 1e-5
            grid[:, 2] *= 1e-4
        if seen is not None:
            grid[np.setdiff1d(np.arange(len(grid)), seen[step])] = 0
        yield torch.tensor(g, dtype=torch.float32)


def check_beside_twin(shape, steps=4, seen=None, **changed):
    """Take the first data on which the twin's own choices are clear, and compare all weights after every step."""
    assert any(run_beside_twin(shape, steps, seed, seen, **changed) for seed in range(30)), "no data with clear choices"


def run_beside_twin(shape, steps, seed, seen=None, **changed):
    """Return whether the data leave no choice of entries open; weights and choices are compared as long as they do."""
    options = {**OPTIONS, **changed}
    torch.manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(shape) * 0.1)
    optimizer = SGC([param], min_size=0, **options)
    twin = Twin(shape, **options)
    weight = param.detach().double().flatten().numpy().copy()
    decay = 1 - options["lr"] * options["weight_decay"]
    for number, gradient in enumerate(gradients(shape, steps, seed, seen)):
        before, old = weight, param.detach().clone().flatten()
        param.grad = gradient.clone()
        optimizer.step()
        basis = optimizer.state[param].get("basis")
        weight = twin.step(
            before, gradient.double().flatten().numpy(), None if basis is None else basis.double().numpy().copy()
        )
        if twin.margin < MARGIN:
            return False
        new = param.detach().flatten()
        if "rank" not in changed:
            moved = set((new - old * decay).abs().gt(1e-6).nonzero().flatten().tolist())
            chosen = {at for chunk in twin.moved for at in chunk}
            assert moved <= chosen, f"step {number}: moved {sorted(moved - chosen)}, which the twin did not choose"
            sure = {at for at in chosen if abs(weight[at] - before[at] * decay) > 2e-6}
            assert sure <= moved, f"step {number}: did not move {sorted(sure - moved)}"
        error = np.abs(new.double().numpy() - weight).max()
        assert error <= TWIN * np.abs(weight).max(), f"step {number}: {error / np.abs(weight).max()}"
    return True


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_twin_on_every_rule_and_recovery(rule, method):
    check_beside_twin((12, 96), moments=rule, recovery=method)


SHAPES = {
    "padded rows": (10, 77),
    "short rows share a chunk": (40, 6),
    "short rows, ragged last chunk": (41, 6),
    "vector": (256,),
    "vector, ragged": (250,),
    "one row": (1, 130),
    "one column": (300, 1),
    "experts": (3, 5, 64),
    "convolution": (8, 3, 5, 5),
    "wide": (3, 340),
    "prime": (7, 101),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_the_twin_on_every_shape(rule, shape):
    check_beside_twin(shape, moments=rule, recovery="omp", steps=3)


@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_twin_on_one_chunk(rule):
    check_beside_twin((8, 40), moments=rule, recovery="omp", chunk_size=None, sketch_size=96, sparsity=6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_twin_when_one_entry_is_recovered(rule, method):
    check_beside_twin((6, 64), moments=rule, recovery=method, sparsity=3, recovered=1)


# Those that pick one by one would pick from rounding noise once the s entries encoded first are found.
@pytest.mark.parametrize("method", ["gomp", "threshold"])
def test_agrees_with_the_twin_when_more_entries_are_recovered_than_encoded(method):
    check_beside_twin(
        (6, 64), moments="residual", recovery=method, betas=(0.95, 0.95), sparsity=4, recovered=5, steps=3
    )


@pytest.mark.parametrize("recovered", [6, 32], ids=["part", "all"])
@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_twin_when_the_sketch_is_the_chunk(rule, recovered):
    check_beside_twin((6, 77), moments=rule, recovery="omp", sketch_size=128, sparsity=recovered)


@pytest.mark.parametrize("sparsity", [4, None], ids=["sparse", "whole"])
@pytest.mark.parametrize("shape", [(12, 96), (10, 77), (41, 6), (250,), (8, 3, 5, 5)])
@pytest.mark.parametrize("rule", ["residual", "whitened"])
def test_agrees_with_the_twin_without_a_sketch(rule, shape, sparsity):
    check_beside_twin(shape, moments=rule, sketch_size=0, sparsity=sparsity)


@pytest.mark.parametrize("sparsity", [4, None], ids=["sparse", "whole"])
@pytest.mark.parametrize("shape", [(12, 90), (90, 12)], ids=["wide", "tall"])
def test_agrees_with_the_twin_without_a_sketch_under_double_compression(shape, sparsity):
    check_beside_twin(shape, moments="whitened", sketch_size=0, sparsity=sparsity, rank=3, refresh_every=2)


@pytest.mark.parametrize("shape", [(12, 96), (41, 6), (250,)])
def test_agrees_with_the_twin_without_a_sketch_in_small_blocks(shape, monkeypatch):
    monkeypatch.setattr(Layout.blocks, "__defaults__", (70,))
    check_beside_twin(shape, moments="whitened", sketch_size=0, sparsity=None)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(12, 90), (90, 12), (12, 3, 5, 5)], ids=["wide", "tall", "convolution"])
@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_twin_under_double_compression(rule, shape, rank):
    check_beside_twin(shape, moments=rule, recovery="omp", rank=rank, refresh_every=2, steps=5)


@pytest.mark.parametrize("shape", [(12, 96), (41, 6), (250,)])
@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_twin_when_worked_in_small_blocks_with_a_projection_never_held(rule, shape, monkeypatch):
    monkeypatch.setattr(Layout.blocks, "__defaults__", (70,))
    monkeypatch.setattr(project, "HELD_ENTRIES", 0)
    check_beside_twin(shape, moments=rule, recovery="omp", steps=3)


@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_twin_when_maximizing_without_decay(rule):
    check_beside_twin((6, 64), moments=rule, recovery="threshold", maximize=True, weight_decay=0.0)


def test_agrees_with_the_twin_on_tied_entries():
    """Raw gradients of three magnitudes only: most cuts fall among equals, and the lowest index wins."""
    shape = (6, 64)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randint(-2, 3, shape, generator=generator).float()
    options = {**OPTIONS, "moments": "sketched", "recovery": "omp", "eps": 1e-3, "sketch_size": 32}
    param = torch.nn.Parameter(torch.zeros(shape))
    twin = Twin(shape, **options)
    optimizer = SGC([param], min_size=0, **options)
    param.grad = gradient
    optimizer.step()
    expected = twin.step(np.zeros(param.numel()), gradient.double().flatten().numpy())
    assert set(param.detach().flatten().nonzero().flatten().tolist()) == {at for c in twin.moved for at in c}
    assert np.abs(param.detach().double().flatten().numpy() - expected).max() <= TWIN * np.abs(expected).max()


@pytest.mark.parametrize("sizes", [(0, None), (0, 1), (256, 1)], ids=["whole", "sparse", "sketched"])
def test_whitened_entries_are_bounded(sizes):
    """On the diagonal of an n×n matrix v̂ is n times too small: w = √n."""
    side = int(2 * CLIP**2)
    param = torch.nn.Parameter(torch.zeros(side, side))
    param.grad = -torch.eye(side)
    sketch_size, sparsity = sizes
    configuration = {"chunk_size": side, "sketch_size": sketch_size, "sparsity": sparsity, "moments": "residual"}
    SGC([param], lr=1.0, weight_decay=0.0, scale=1.0, min_size=0, **configuration).step()
    assert (param.detach() - CLIP * torch.eye(side)).abs().max() <= TWIN * CLIP


@pytest.mark.parametrize(
    "changed",
    [{"moments": rule, "recovery": "omp", "recovered": 2} for rule in RULES]  # all explained would leave rounding only
    + [{"sketch_size": 0, "sparsity": None}, {"sketch_size": 0, "sparsity": 3}],
    ids=[*RULES, "every entry", "no sketch"],
)
@pytest.mark.parametrize("shape", [(40, 64), (40, 77), (300, 6)], ids=["one chunk a row", "padded", "rows share"])
def test_agrees_with_the_twin_where_most_rows_have_no_gradient(shape, changed, monkeypatch):
    monkeypatch.setattr(Layout.blocks, "__defaults__", (300,))
    check_beside_twin(shape, steps=3, seen=([7, 8, 31], [8, 39], [0, 9]), **changed)
