"""Compile for an H100 every kernel that is launched, instead of running it: needs no GPU.

    TRITON_INTERPRET=0 python -m tests.kernels.compiled CASES [FUNCTION]

CASES is a module whose FUNCTION, `launches` where none is named, launches kernels on CPU tensors. A line is printed for
each kernel compiled: its name, warps and bytes of shared memory.
"""

import importlib
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    "torch.float32": "*fp32",
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.int32": "*i32",
    "torch.int64": "*i64",
    "torch.uint8": "*u8",
    "torch.bool": "*i1",
}


def signature_of(kernel, arguments):
    """Give what triton makes of the arguments of a launch: types, constants, and which are multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(at,)] = "constexpr", value
        elif hasattr(value, "data_ptr"):
            signature[name] = POINTERS[str(value.dtype)]
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize:
                attributes[(at,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            assert parameter.do_not_specialize, f"{name} of {kernel.__name__} is specialized on its value"
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            raise TypeError(f"{name} of {kernel.__name__} is {value!r}")
    return signature, constants, attributes


def compile_instead(kernel, *args, grid, warmup, **kwargs):
    """Stand in for `JITFunction.run`."""
    names = [parameter.name for parameter in kernel.params]
    arguments = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
    signature, constants, attributes = signature_of(kernel, arguments)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=HOPPER, options=kwargs)
    assert made.asm["cubin"]
    print(kernel.__name__, made.metadata.num_warps, made.metadata.shared, flush=True)


if __name__ == "__main__":
    JITFunction.run = compile_instead
    getattr(importlib.import_module(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "launches")()
