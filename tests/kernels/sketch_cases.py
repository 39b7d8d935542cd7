"""Shapes for the kernels of the sketch path, and launches of them for `tests.kernels.compiled`, at all sizes."""

import torch

from sgc.backends.triton import encode, recover, scatter
from sgc.codec.layout import make_layout
from sgc.codec.project import Projection

SHAPES = {
    "one chunk a row": (9, 64),
    "several chunks a row": (5, 192),
    "padded rows": (5, 77),
    "short rows share a chunk": (40, 6),
    "short rows, ragged last chunk": (41, 6),
    "vector": (256,),
    "vector, ragged": (250,),
    "one row": (1, 130),
    "experts": (3, 5, 64),
}

# shape, chunk_size, sketch_size, sparsity, dtype of gradient and weight
LOADS = [((512, 1024), 256, 32, 4, torch.bfloat16)]
MORE_LOADS = [
    ((513, 77), 32, 20, 3, torch.float16),
    ((512, 1024), 1024, 128, 16, torch.bfloat16),
    ((512, 1024), 256, 128, 16, torch.bfloat16),
    ((512, 2048), 2048, 256, 32, torch.bfloat16),
    ((4130, 6), 256, 45, 1, torch.float32),
    ((1 << 18,), 256, 32, 4, torch.float32),
]


def launches():
    for load in LOADS:
        launch(*load)


def launch_all():
    for load in LOADS + MORE_LOADS:
        launch(*load)


def launch(shape, chunk_size, sketch_size, sparsity, dtype):
    layout, projection = make_layout(shape, chunk_size), Projection(sketch_size, 0)
    x, sketch = torch.ones(shape, dtype=dtype), torch.zeros(layout.chunks, sketch_size)
    whitening = (torch.ones(layout.rows), torch.ones(layout.cols), torch.ones(layout.rows, dtype=torch.bool))
    into, norm = encode.Into(sketch, 0.9, averages=False), torch.ones(())
    encode.encode(x, layout, whitening, projection, sparsity, 1e-8, into=into, norm=norm)
    encode.encode(x, layout, None, projection, sparsity, 1e-8, factor=torch.ones(()), squares=True)
    encode.select(x, layout, (*whitening[:2], None), sparsity, 1e-8)
    index, value = recover.recover(sketch, layout, projection, sparsity, take=True, norm=norm)
    scatter.apply(x, layout, index, value, 1e-3, 0.0, 1, norm=norm)
    scatter.apply(x, layout, index, value, 1e-3, 1e-5, None)
