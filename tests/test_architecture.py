"""What docs/architecture.md promises: sizes that a screen holds, and one place for each addition."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for room in ("sgc", "federated") for path in (ROOT / room).rglob("*.py"))
LONGEST_FILE, LONGEST_KERNEL_FILE, LONGEST_BODY, MOST_PARAMETERS = 400, 450, 40, 8
# a public function whose arguments are the command line's
MANY = {"sgc/planner/plan.py:plan"}


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_of_a_size_to_be_read(file):
    source = (ROOT / file).read_text()
    kernels = "/triton/" in file or file.endswith("backends/loops.py")
    assert source.count("\n") <= (LONGEST_KERNEL_FILE if kernels else LONGEST_FILE)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        length = node.end_lineno - body[0].lineno + 1 if body else 0
        given = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        given = [name for name in given if name not in ("self", "cls")]
        if not kernels:
            assert length <= LONGEST_BODY, node.name
            assert len(given) <= MOST_PARAMETERS or node.name == "__init__" or f"{file}:{node.name}" in MANY, node.name


@pytest.mark.parametrize("file", FILES)
def test_docstrings_begin_with_a_plain_verb(file):
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (said := ast.get_docstring(node)):
            assert said.split()[0] not in ("Give", "Gives", "Tell", "Say", "Be"), said


ADDED = {
    "a rule": """
from sgc import moments
moments.RULES["signs"] = moments.Rule(
    ("sketch",), moments.RULES["whitened"].move, lambda held, rates: held["sketch"].sign(), whitens=True
)
given = {"moments": "signs"}
""",
    "a dtype": """
import torch
from sgc import state
class Half:
    dtype, block, draws = torch.float16, 0, False
    def check(self):
        return
    def read(self, state, name):
        return state[name].float()
    def write(self, state, name, moment, generator):
        state[name].copy_(moment.view_as(state[name]))
state.DTYPES["float16"] = Half()
given = {"state_dtype": "float16"}
""",
    "a backend": """
import sys, types
from sgc import backends
asked = types.ModuleType("nothing")
asked.recover = lambda *given, **more: asked.__dict__.setdefault("was", NotImplemented)
sys.modules["nothing"] = asked
backends.BACKENDS = (backends.Backend("nothing", "nothing", lambda mode, stage, device: True), *backends.BACKENDS)
given = {}
""",
}
TRAIN = """
import torch
from sgc import SGC
def make():
    weight = torch.nn.Parameter(torch.ones(64, 80))
    return weight, SGC([weight], min_size=1, sketch_size=32, **given)
def step(weight, optimizer, seed):
    weight.grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(seed))
    optimizer.step()
weight, optimizer = make()
step(weight, optimizer, 0)
again, resumed = make()
again.data.copy_(weight)
resumed.load_state_dict(optimizer.state_dict())
for number in (1, 2):
    step(weight, optimizer, number)
    step(again, resumed, number)
assert torch.equal(weight, again) and not torch.equal(weight, torch.ones(64, 80))
assert 0 < optimizer.stats()["recovery_error"] < 1
assert optimizer.state_bytes() - optimizer.expected_state_bytes() <= 12
"""


@pytest.mark.parametrize("kind", ADDED)
def test_an_addition_is_one_entry_and_trains_and_resumes(kind):
    checked = "assert asked.was is NotImplemented\n" if kind == "a backend" else ""
    subprocess.run([sys.executable, "-c", ADDED[kind] + TRAIN + checked], check=True, cwd=ROOT)
