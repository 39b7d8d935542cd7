"""The same few steps in every surrounding that torch's contract allows end in the same bits."""

import contextlib
import copy
import functools
import itertools
import pickle
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sgc import SGC, backends
from sgc.backends import numba as compiled
from sgc.backward.gradient import CompressedGradient

STEPS = 4
SKETCHED = {"sketch_size": 16, "sparsity": 4}
FAMILIES = {
    "memoryless": {},
    "sparse": {"sparsity": 4},
    "residual": SKETCHED,
    "whitened, omp": {**SKETCHED, "moments": "whitened", "recovery": "omp"},
    "sketched, gomp": {**SKETCHED, "moments": "sketched", "recovery": "gomp"},
    "subspace": {**SKETCHED, "moments": "subspace"},
    "rank": {**SKETCHED, "rank": 4, "refresh_every": 2},
    "attached, sampled": {"attach": 2},
    "attached, sketch": {**SKETCHED, "attach": 1},
    "attached, sketched": {**SKETCHED, "moments": "sketched", "attach": 1},
    "bf16 weights": {"dtype": torch.bfloat16},
    "bf16 state": {**SKETCHED, "state_dtype": torch.bfloat16, "moments": "subspace"},
    "int8 state": {**SKETCHED, "state_dtype": "int8", "moments": "whitened"},
    "fp64, attached": {**SKETCHED, "dtype": torch.float64, "attach": 1},
}


class Training:
    """A model whose gradients are given, clipped to about a third of their norm and stepped with."""

    def __init__(self, family, max_norm=20.0):
        self.max_norm = max_norm
        kwargs = dict(FAMILIES[family])
        self.attach, dtype = kwargs.pop("attach", 0), kwargs.pop("dtype", torch.float32)
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Linear(48, 24)).to(dtype)
        self.model.register_parameter("scale", torch.nn.Parameter(torch.ones(1, dtype=dtype)))
        trained = list(self.model.parameters())
        self.model.frozen = torch.nn.Linear(8, 8, dtype=dtype).requires_grad_(False)
        groups = [{"params": trained}, {"params": self.model.frozen.parameters()}]
        self.optimizer = SGC(groups, lr=1e-2, chunk_size=64, min_size=64, **kwargs)
        self.attach_again()

    def attach_again(self):
        if self.attach:
            self.optimizer.attach(self.model, sample_every=self.attach)

    def loss(self, number):
        """Give a sum whose gradients are drawn at random."""
        generator = torch.Generator("cpu").manual_seed(number)
        loss = 0
        for param in filter(lambda param: param.requires_grad, self.model.parameters()):
            gradient = torch.randn(param.shape, generator=generator, dtype=torch.float32, device="cpu")
            loss = loss + (param * gradient.to(param.dtype)).sum(dtype=torch.float32)
        return loss

    def backward(self, number):
        loss = self.loss(number)
        loss.backward()
        return loss.item()

    def clip(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)

    def run(self, first=0, last=STEPS):
        for number in range(first, last):
            self.backward(number)
            self.clip()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def bits(self):
        """Copy the weights and the state."""
        state = self.optimizer.state_dict()["state"]
        held = [value for number in sorted(state) for _, value in sorted(state[number].items())]
        return [tensor.detach().clone() for tensor in (*self.model.parameters(), *held)]


# ---- surroundings: each trains as `Training.run` does, otherwise -----------------------------------------------------


def inside(context):
    """Clip and step inside a context."""

    def run(training):
        for number in range(STEPS):
            training.backward(number)
            with context():
                training.clip()
                training.optimizer.step()
                training.optimizer.zero_grad()

    return run


def inside_at_first(context):
    """Clip and step inside a context, and then outside it, with the state that was made inside."""

    def run(training):
        with context():
            for number in range(2):
                with torch.inference_mode(False):
                    training.backward(number)
                training.clip()
                training.optimizer.step()
                training.optimizer.zero_grad()
        training.run(2, STEPS)

    return run


def wholly_inside(context):
    """Go backward inside it, too."""

    def run(training):
        with context():
            training.run()

    return run


def halfway(change):
    """Change something after two steps, and go on."""

    def run(training):
        training.run(0, 2)
        change(training)
        training.run(2, STEPS)

    return run


def between(change):
    """Change something between backward and step."""

    def run(training):
        for number in range(STEPS):
            training.backward(number)
            change(training)
            training.clip()
            training.optimizer.step()
            training.optimizer.zero_grad()

    return run


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Passing(TorchDispatchMode):
    """Sees every operation, as counters of operations do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Calling(TorchFunctionMode):
    """Sees every call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def by_closure(compile_it):
    def run(training):
        step = torch.compile(training.optimizer.step, backend="eager") if compile_it else training.optimizer.step

        def closure():
            assert torch.is_grad_enabled()
            training.optimizer.zero_grad()
            loss = training.backward(next(numbers))
            training.clip()
            return loss

        numbers = itertools.count()
        losses = [step(closure) for _ in range(STEPS)]
        training.optimizer.zero_grad()
        assert all(isinstance(loss, float) for loss in losses)

    return run


def compiled_step(training):
    step = torch.compile(training.optimizer.step, backend="eager")
    for number in range(STEPS):
        training.backward(number)
        training.clip()
        step()
        training.optimizer.zero_grad()


def compiled_loop(training):
    """The hooks of a backward inside it must not be compiled, nor what is done with compressed gradients."""

    def update(loss):
        loss.backward()
        training.clip()
        training.optimizer.step()
        training.optimizer.zero_grad()

    update = torch.compile(update, backend="eager")
    for number in range(STEPS):
        update(training.loss(number))


def in_threads(training):
    for number in range(STEPS):
        thread = threading.Thread(target=training.run, args=(number, number + 1))
        thread.start()
        thread.join()


def with_hooks(training):
    seen = []
    training.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    training.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    training.run()
    assert seen == ["before", "after"] * STEPS


def zeroed(training):
    for number in range(STEPS):
        training.backward(number)
        training.clip()
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=False)


def copied(make):
    """Go on with a copy of the model and the optimizer, attached where the first was."""

    def change(training):
        training.model, training.optimizer = make((training.model, training.optimizer))
        training.attach_again()

    return halfway(change)


def reload(training):
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def reload_in_inference_mode(training):
    with torch.inference_mode():
        reload(training)


def add_a_group(training):
    training.added = torch.nn.Linear(16, 16)
    training.optimizer.add_param_group({"params": training.added.parameters()})
    state_dict = training.optimizer.state_dict
    training.optimizer.state_dict = lambda: {  # what the group added holds is no matter
        "state": {number: held for number, held in state_dict()["state"].items() if number < 7}
    }


def move(training):
    training.model.cpu()
    training.model.to("cpu", torch.float32 if training.model.scale.dtype is torch.float32 else None)


def swap(training):
    with swapping():
        training.model.cpu()


SURROUNDINGS = {
    "autocast": inside(functools.partial(torch.autocast, "cpu", torch.bfloat16)),
    "autocast, backward too": wholly_inside(functools.partial(torch.autocast, "cpu", torch.bfloat16)),
    "inference mode": inside(torch.inference_mode),
    "inference mode at first": inside_at_first(torch.inference_mode),
    "no grad": inside(torch.no_grad),
    "enable grad": inside(torch.enable_grad),
    "default dtype": wholly_inside(default_dtype),
    "default device": wholly_inside(default_device),
    "torch.device": wholly_inside(functools.partial(torch.device, "meta")),
    "deterministic": wholly_inside(deterministic),
    "dispatch mode": inside(Passing),
    "function mode": wholly_inside(Calling),
    "profiler": wholly_inside(torch.autograd.profiler.profile),
    "hooks": with_hooks,
    "closure": by_closure(False),
    "compiled step": compiled_step,
    "compiled step, closure": by_closure(True),
    "compiled loop": compiled_loop,
    "thread": in_threads,
    "gradients zeroed": zeroed,
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda both: pickle.loads(pickle.dumps(both))),
    "attached again": halfway(Training.attach_again),
    "reloaded": halfway(reload),
    "reloaded in inference mode": halfway(reload_in_inference_mode),
    "group added": halfway(add_a_group),
    "group removed": halfway(lambda training: training.optimizer.param_groups.pop()),
    "group emptied": halfway(lambda training: training.optimizer.param_groups[-1]["params"].clear()),
    "group empty": halfway(lambda training: training.optimizer.param_groups[-1].update(params=[])),
    "moved": halfway(move),
    "moved with gradients": between(move),
}
LOOPS = ("autocast", "inference mode", "default dtype", "default device", "function mode", "compiled step", "thread")
CASES = [*itertools.product(["torch"], SURROUNDINGS, FAMILIES), *itertools.product(["numba"], LOOPS, FAMILIES)]
CASES = [(*_, at, family) for *_, at, family in CASES if at != "compiled loop" or "attached" in family]  # takes longest


@functools.cache
def expected(path, family, max_norm=20.0):
    """Give what the plain run ends in; the variable says the same path."""
    training = Training(family, max_norm)
    training.run()
    return training.bits()


def on(monkeypatch, path, family):
    if path == "numba" and not compiled._installed():
        pytest.skip("numba is not installed")
    if family == "int8 state":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setenv(backends.VARIABLE, path)


# torch's compiler looks at the gradient of every tensor that it meets
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize(("path", "surrounding", "family"), CASES)
def test_what_surrounds_a_step_changes_no_bit(monkeypatch, path, surrounding, family):
    on(monkeypatch, path, family)
    training = Training(family)
    SURROUNDINGS[surrounding](training)
    found, wanted = training.bits(), expected(path, family)
    assert len(found) == len(wanted)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contents_of_parameters_may_be_swapped(monkeypatch, family):
    """As torch does on `model.to` under a flag, and with FSDP2; hooks go with the contents, for one backward."""
    on(monkeypatch, "torch", family)
    training = Training(family, max_norm=1e6)  # that one gradient is compressed after it was clipped
    halfway(swap)(training)
    assert all(map(torch.equal, training.bits(), expected("torch", family, 1e6)))
    training.backward(0)
    assert isinstance(training.model[0].weight.grad, CompressedGradient) == bool(training.attach)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "bf16" not in family])  # rounded by number
def test_the_first_group_may_be_removed(family):
    ends = []
    for removed in (False, True):
        training = Training(family)
        group = training.optimizer.param_groups.pop()
        training.optimizer.param_groups.insert(0, group)
        training.run(0, 2)
        if removed:
            training.optimizer.param_groups.remove(group)
        training.run(2, STEPS)
        ends.append(training.bits())
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("attach", [False, True])
def test_a_trained_group_may_be_removed_and_come_back(attach):
    """Its parameters stay as they are meanwhile, and the state of the others is saved."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Linear(48, 32))
    optimizer = SGC([{"params": layer.parameters()} for layer in model], min_size=64, **SKETCHED)
    if attach:
        optimizer.attach(model)

    def step():
        before = [layer.weight.detach().clone() for layer in model]
        model(torch.randn(4, 32)).square().sum().backward()
        optimizer.step()
        model.zero_grad()
        return [not torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True)]

    assert step() == [True, True]
    group = optimizer.param_groups.pop(0)
    assert step() == [False, True]
    assert step() == [False, True]
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]
    optimizer.param_groups.insert(0, group)
    assert step() == [True, True]
    assert int(optimizer.state[model[0].weight]["step"]) == 2


def test_a_group_of_other_sizes_needs_the_model_to_be_attached_again():
    model = torch.nn.Linear(32, 48)
    optimizer = SGC(model.parameters(), min_size=64, **SKETCHED).attach(model)
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.add_param_group({"params": model.parameters(), "sketch_size": 32})
    model(torch.randn(4, 32)).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"parameter 0 or its group is of other sizes .* call optimizer.attach\(model\)"
    ):
        optimizer.step()
    model.zero_grad()
    optimizer.state.clear()
    optimizer.attach(model)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()


# ---- what there is to be said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attach", [False, True])
def test_shapes_without_numbers_are_refused_with_a_sentence(attach):
    def trained(make):
        model = make()
        optimizer = SGC(model.parameters(), min_size=64)
        if attach:
            optimizer.attach(model)
        model(torch.randn(4, 32, device=model.weight.device)).sum().backward()
        optimizer.step()

    sentence = r"parameter [01] or its gradient is only a shape \(a meta or fake tensor\): put the model on a device"
    with pytest.raises(TypeError, match=sentence):
        trained(lambda: torch.nn.Linear(32, 48, device="meta"))
    with FakeTensorMode(), pytest.raises(TypeError, match=sentence):
        trained(lambda: torch.nn.Linear(32, 48))


def test_a_step_that_can_move_nothing_says_so_once():
    base = torch.nn.Linear(8, 8).requires_grad_(False)
    optimizer = SGC(base.parameters())
    with pytest.warns(UserWarning, match="none of its 2 parameters requires a gradient. Make the") as seen:
        optimizer.step()
    assert seen[0].filename == __file__
    optimizer.step()
    trained = SGC(torch.nn.Linear(8, 8).parameters())
    trained.step()  # its gradients have not come yet
    trained.param_groups.clear()
    trained.step()
