"""Compile versions of the default path's kernels for an H100, and print how each touches memory, a JSON line a kernel.

TRITON_INTERPRET=0 python -m tests.kernels.dense_cases
"""

import json
import re

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sgc.backends.triton import whitened
from sgc.backends.triton.batch import Batch, TensorUpdate
from sgc.codec.layout import make_layout
from tests.kernels.compiled import HOPPER, signature_of


def entry(shape, gradients, weights, stochastic):
    weight, layout = torch.zeros(shape, dtype=weights), make_layout(shape, 256)
    if weight.numel() < 4096:
        layout, state = None, {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
    else:
        state = {"row": torch.zeros(layout.rows), "col": torch.zeros(layout.cols)}
    state["step"] = torch.zeros(())
    gradient = torch.zeros(shape, dtype=gradients)
    return TensorUpdate(weight, gradient, state, layout, 1e-3, 1e-5, 1e-8, (0.9, 0.999), 7, stochastic)


def launches():
    yield "aligned bf16", lambda: step((512, 512), torch.bfloat16, torch.bfloat16, True)
    yield "aligned dense bf16", lambda: step((1024,), torch.bfloat16, torch.bfloat16, True)
    yield (
        "aligned sums bf16",
        lambda: whitened.square_sums(torch.zeros(512, 512, dtype=torch.bfloat16), layout(512, 512)),
    )
    yield "aligned shard bf16", lambda: shard(80, 640)
    yield "odd shard bf16", lambda: shard(5, 0)
    yield "aligned fp32", lambda: step((512, 512), torch.float32, torch.float32, False)
    yield "odd bf16", lambda: step((512, 511), torch.bfloat16, torch.bfloat16, False)
    yield "odd dense fp16", lambda: step((1023,), torch.float16, torch.float16, False)
    yield "odd mixed", lambda: step((512, 31), torch.bfloat16, torch.float32, False)


def layout(*shape):
    return make_layout(shape, 256)


def shard(offset, missing):
    grid = torch.zeros(512, 512, dtype=torch.bfloat16)
    weight = torch.zeros(512 * 512 - offset - missing, dtype=torch.bfloat16)
    a, b = torch.zeros(2, 512)
    whitened.apply_whitened(weight, grid, layout(512, 512), a, b, 1e-8, 1, 0, 1 << 31, offset)


def step(shape, *kind):
    Batch(torch.device("cpu")).update([entry(shape, *kind)])


def compile_instead(kernel, *args, grid, warmup, **kwargs):
    """Stand in for `JITFunction.run`."""
    names = [parameter.name for parameter in kernel.params]
    arguments = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
    signature, constants, attributes = signature_of(kernel, arguments)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=HOPPER, options=kwargs)
    assert made.asm["cubin"]
    compiled.append((kernel.__name__, made.asm["ptx"]))


compiled = []

if __name__ == "__main__":
    JITFunction.run = compile_instead
    for case, launch in launches():
        compiled.clear()
        launch()
        for name, ptx in compiled:
            accesses = re.findall(r"((?:ld|st)\.global\S*)", ptx)
            print(json.dumps({"case": case, "kernel": name, "accesses": sorted(set(accesses))}))
