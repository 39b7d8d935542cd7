import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgc.codec.layout import BLOCK_ENTRIES, is_compressed, make_layout, matrix_shape
from tests.twin import lay_out, matrix_sides

SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 31, 48, 64, 97, 120, 257])
SHAPES = st.lists(SIZES, max_size=4).map(tuple).filter(lambda shape: math.prod(shape) <= 40_000)
CHUNKS = st.one_of(st.none(), st.integers(1, 300))


@given(SHAPES, CHUNKS, st.booleans())
def test_every_entry_lies_in_exactly_one_chunk(shape, chunk_size, within_rows):
    layout = make_layout(shape, chunk_size, within_rows=within_rows)
    index = torch.arange(layout.chunk).expand(layout.chunks, -1)
    position = layout.flat_index(index)
    lengths = layout.lengths("cpu")
    if lengths is not None:
        assert int(lengths.min()) >= 1
        position = position[index < lengths[:, None]]
    assert position.flatten().sort().values.tolist() == list(range(math.prod(shape)))


@given(SHAPES, CHUNKS, st.booleans())
def test_cutting_the_grid_gives_each_chunk_its_entries_and_pads_with_zeros(shape, chunk_size, within_rows):
    layout = make_layout(shape, chunk_size, within_rows=within_rows)
    x = torch.arange(1.0, math.prod(shape) + 1).view(shape)
    chunks = layout.cut(layout.grid(x))
    assert chunks.shape == (layout.chunks, layout.chunk)
    index = torch.arange(layout.chunk).expand(layout.chunks, -1)
    expected = layout.flat_index(index) + 1.0
    lengths = layout.lengths("cpu")
    if lengths is not None:
        expected = expected.where(index < lengths[:, None], torch.tensor(0.0))
    assert torch.equal(chunks, expected)


@given(SHAPES, CHUNKS, st.booleans())
def test_chunks_are_those_of_the_twin(shape, chunk_size, within_rows):
    layout = make_layout(shape, chunk_size, within_rows=within_rows)
    chunks, n, cols = lay_out(shape, chunk_size, within_rows)
    assert (layout.chunks, layout.chunk, layout.cols) == (len(chunks), n, cols)
    index = torch.zeros(layout.chunks, 1, dtype=torch.int64)
    assert layout.flat_index(index).flatten().tolist() == [chunk[0] for chunk in chunks]
    lengths = layout.lengths("cpu")
    assert (lengths.tolist() if layout.padded else [n] * len(chunks)) == [len(chunk) for chunk in chunks]


@given(SHAPES, CHUNKS, st.integers(1, 5000), st.booleans())
def test_blocks_partition_rows_and_chunks_without_cutting_a_chunk(shape, chunk_size, entries, within_rows):
    layout = make_layout(shape, chunk_size, within_rows=within_rows)
    grid = layout.grid(torch.arange(math.prod(shape), dtype=torch.float32).view(shape))
    blocks = list(layout.blocks(entries))
    assert [row for rows, _ in blocks for row in range(layout.rows)[rows]] == list(range(layout.rows))
    assert [chunk for _, chunks in blocks for chunk in range(layout.chunks)[chunks]] == list(range(layout.chunks))
    whole = layout.cut(grid)
    for rows, chunks in blocks:
        assert torch.equal(layout.cut(grid[rows]), whole[chunks])


def test_blocks_hold_about_as_many_entries_as_asked_for():
    layout = make_layout((4096, 1024), 256)
    sizes = [(rows.stop - rows.start) * layout.cols for rows, _ in layout.blocks()]
    assert len(sizes) > 1
    assert max(sizes) <= BLOCK_ENTRIES
    assert min(sizes[:-1]) > BLOCK_ENTRIES // 2


@given(st.integers(2, 64), st.integers(2, 4096), st.integers(2, 512))
def test_a_chunk_is_within_a_factor_of_two_of_the_wanted_size(rows, cols, chunk_size):
    layout = make_layout((rows, cols), chunk_size)
    assert layout.chunk <= 2 * chunk_size
    assert 2 * layout.chunk >= chunk_size or layout.chunk in (
        cols * rows,
        math.ceil(cols / math.ceil(cols / chunk_size)),
    )


@pytest.mark.parametrize(
    ("cols", "chunk_size", "chunk"), [(240, 100, 80), (192, 48, 48), (768, 250, 256), (66, 50, 66), (101, 32, 26)]
)
def test_the_nearest_divisor_is_the_chunk_and_of_two_as_near_the_smaller(cols, chunk_size, chunk):
    assert make_layout((300, cols), chunk_size).chunk == chunk


@given(st.integers(1, 64), st.integers(1, 3000), CHUNKS)
def test_within_rows_no_chunk_crosses_a_row(rows, cols, chunk_size):
    layout = make_layout((rows, cols), chunk_size, within_rows=True)
    assert layout.chunks % rows == 0
    index = torch.arange(layout.chunk).expand(layout.chunks, -1)
    row = layout.flat_index(index) // cols
    lengths = layout.lengths("cpu")
    real = index >= 0 if lengths is None else index < lengths[:, None]
    number = torch.arange(layout.chunks)[:, None] // (layout.chunks // rows)
    assert bool(((row == number) | ~real).all())


@given(SHAPES.filter(len))
def test_a_tensor_is_split_where_rows_plus_columns_is_smallest(shape):
    assert matrix_shape(shape) == matrix_sides(shape)
    rows, cols = matrix_shape(shape)
    assert rows * cols == math.prod(shape)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 3, 7, 7), (64, 147)), ((8, 32, 16), (256, 16)), ((8, 4, 4096), (32, 4096)), ((5,), (1, 5)), ((), (1, 1))],
    ids=["convolution", "experts", "wide experts", "vector", "scalar"],
)
def test_known_shapes_split_as_expected(shape, expected):
    if shape == (8, 32, 16):
        expected = min([(8, 512), (256, 16)], key=sum)
    assert matrix_shape(shape) == expected


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_an_empty_tensor_has_no_chunks(shape):
    layout = make_layout(shape, 32)
    assert (layout.chunks, layout.numel, list(layout.blocks())) == (0, 0, [])


def test_without_a_chunk_size_the_whole_tensor_is_one_chunk():
    for shape in [(7,), (7, 9), (3, 5, 7), (1, 1000), ()]:
        layout = make_layout(shape, None)
        assert (layout.chunks, layout.chunk) == (1, math.prod(shape))


@pytest.mark.parametrize("layout_of", [(10, 77), (41, 6), (250,), (6, 64)])
def test_a_non_contiguous_tensor_is_read_in_logical_order(layout_of):
    layout = make_layout(layout_of, 32)
    x = torch.randn(layout_of)
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(layout.cut(layout.grid(strided)), layout.cut(layout.grid(x)))


@given(st.integers(0, 10_000))
def test_vectors_stay_dense_sixteen_times_longer(min_size):
    wanted = max(1, min_size)
    assert is_compressed((wanted, 1), min_size)
    assert not is_compressed((wanted - 1, 1), min_size)
    assert is_compressed((16 * wanted,), min_size)
    assert not is_compressed((16 * min_size - 1,), min_size)
    assert not is_compressed((0, 5), 0)
