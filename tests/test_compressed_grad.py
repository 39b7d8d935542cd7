import copy
import gc
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sgc import SGC
from sgc.backward.gradient import CompressedGradient
from sgc.backward.sums import buckets_of, rewhitening
from sgc.moments import RULES
from tests.tolerances import SUM

SKETCHED = {"lr": 1e-2, "chunk_size": 64, "sketch_size": 16, "min_size": 64}


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 24)).to(dtype)


def batches(count, rows=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 32, generator=generator) for _ in range(count)]


def loss_of(model, x):
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def weights(model):
    return torch.cat([param.detach().flatten().float() for param in model.parameters()])


def assert_close(actual, expected, rtol=SUM):
    """Equal up to the order of sums, relative to the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def train(*, attach, steps=6, micro_batches=1, max_norm=None, dtype=torch.float32, sample_every=8, **kwargs):
    model = make_model(dtype)
    optimizer = SGC(model.parameters(), **{**SKETCHED, **kwargs})
    if attach:
        optimizer.attach(model, sample_every=sample_every)
    norms = []
    for batch in batches(steps):
        for part in batch.chunk(micro_batches):
            (loss_of(model, part) / micro_batches).backward()
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), norms, optimizer


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_norm", [None, 1e6])
def test_hooked_equals_unhooked_bit_for_bit_for_one_micro_batch(rule, dtype, max_norm):
    hooked, norms, optimizer = train(attach=True, dtype=dtype, moments=rule, max_norm=max_norm)
    unhooked, expected, reference = train(attach=False, dtype=dtype, moments=rule, max_norm=max_norm)
    assert torch.equal(hooked, unhooked)
    assert norms == pytest.approx(expected, rel=1e-2 if dtype is torch.bfloat16 else 1e-5)
    assert optimizer.stats()["grad_norm"] == pytest.approx(reference.stats()["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_norm", [None, 1e6])
def test_without_a_sketch_and_every_entry_held_hooked_equals_unhooked_bit_for_bit(dtype, max_norm):
    hooked, norms, _ = train(attach=True, dtype=dtype, sketch_size=0, sample_every=1, max_norm=max_norm)
    unhooked, expected, _ = train(attach=False, dtype=dtype, sketch_size=0, max_norm=max_norm)
    assert torch.equal(hooked, unhooked)
    assert norms == pytest.approx(expected, rel=1e-2 if dtype is torch.bfloat16 else 1e-5)


def test_without_a_sketch_clipped_gradients_make_the_update_of_whole_ones():
    hooked, norms, _ = train(attach=True, sketch_size=0, sample_every=1, max_norm=1e-2, eps=0.0)
    unhooked, expected, _ = train(attach=False, sketch_size=0, max_norm=1e-2, eps=0.0)
    assert norms == pytest.approx(expected, rel=1e-4)
    assert_close(hooked, unhooked, 1e-4)


def test_without_a_sketch_every_entry_moves_once_in_a_cycle_and_as_far_as_the_norm_of_a_whole_update_wants():
    """The entries held move as they would with all others, times √m; the others only decay."""
    m, moved = 8, []
    model = make_model()
    optimizer = SGC(model.parameters(), **{**SKETCHED, "sketch_size": 0}, weight_decay=0.0)
    optimizer.attach(model, sample_every=m)
    for x in batches(2 * m):
        before = model[0].weight.detach().clone()
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append((model[0].weight != before).flatten())
    for cycle in (moved[:m], moved[m:]):
        assert torch.stack(cycle).sum(0).max() == 1
        assert torch.stack(cycle).sum(0).float().mean() > 0.99  # a gradient may be zero
    firsts = [[int(turn.nonzero()[0]) for turn in cycle] for cycle in (moved[:m], moved[m:])]
    assert firsts[0] != firsts[1]  # in another order

    once, _, _ = train(attach=True, steps=1, sketch_size=0, sample_every=m, weight_decay=0.0)
    whole, _, _ = train(attach=False, steps=1, sketch_size=0, weight_decay=0.0)
    start = weights(make_model())
    of_matrix = slice(0, 32 * 48)
    held = (once != start)[of_matrix]
    assert held.sum() == 32 * 48 / m
    assert_close((once - start)[of_matrix][held], m**0.5 * (whole - start)[of_matrix][held], 1e-4)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_without_a_sketch_micro_batches_make_the_sum_of_their_batch(micro_batches):
    """What is held is linear; only the estimate of R and C depends on the micro-batches."""
    held = []
    for parts in (1, micro_batches):
        model = make_model()
        optimizer = SGC(model.parameters(), **{**SKETCHED, "sketch_size": 0})
        optimizer.attach(model)
        for part in batches(1)[0].chunk(parts):
            (loss_of(model, part) / parts).backward()
        held.append(model[0].weight.grad.sums())
    assert_close(held[1].p, held[0].p)


@pytest.mark.parametrize("rule", ["residual", "whitened"])
def test_clipping_is_expected_from_the_last_step_so_that_whitening_hardly_notices(rule):
    """R and C are of clipped gradients: whitening an unclipped one by them would clip |w| and lose the order."""
    start = weights(make_model())
    hooked, norms, _ = train(attach=True, steps=6, max_norm=1e-2, moments=rule, weight_decay=0.0)
    unhooked, expected, _ = train(attach=False, steps=6, max_norm=1e-2, moments=rule, weight_decay=0.0)
    assert sum(norms) == pytest.approx(sum(expected), rel=0.1)
    cosine = torch.nn.functional.cosine_similarity(hooked - start, unhooked - start, dim=0)
    assert cosine > 0.6
    assert (hooked - start).norm() / (unhooked - start).norm() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_sketches_add_up_at_a_fixed_second_moment(rule):
    """Where nothing is sparsified and the statistic hardly moves, micro-batches make the sketch of their batch."""
    kwargs = {"moments": rule, "sparsity": 64, "recovered": 4, "betas": (0.9, 1 - 1e-7)}
    sketches = []
    for parts in (1, 4):
        model = make_model()
        optimizer = SGC(model.parameters(), **{**SKETCHED, **kwargs})
        train_batch, batch = batches(2)
        loss_of(model, train_batch).backward()
        optimizer.step()  # the statistic has seen one batch, and 1e-7 of the next
        optimizer.zero_grad()
        for state in optimizer.state.values():
            state["step"].fill_(10**9)  # far from the start, where R and C are what they are
            for name in {"row", "col"} & state.keys():
                state[name].mul_(1e11)  # bias-corrected, and 1e4 times larger, so that no entry is clipped
        optimizer.attach(model)
        for part in batch.chunk(parts):
            (loss_of(model, part) / parts).backward()
        sums = model[0].weight.grad.sums()
        sketches.append(sums.p * 1)
        assert sums.number == parts
    assert_close(sketches[1], sketches[0], 1e-3)


@given(parts=st.integers(1, 6), seed=st.integers(0, 100))
def test_the_norm_lies_between_that_of_noise_and_that_of_agreement(parts, seed):
    model = make_model(seed=seed)
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    squares = []
    for part in batches(parts, seed=seed):
        single = torch.autograd.grad(loss_of(model, part), model[0].weight)[0]
        squares.append(single.square().sum().item())
        loss_of(model, part).backward()
    norm = torch.linalg.vector_norm(model[0].weight.grad).item()
    assert norm <= math.sqrt(parts * sum(squares)) * (1 + 1e-5)
    if parts == 1:
        assert norm == pytest.approx(math.sqrt(squares[0]), rel=1e-5)


def test_the_norm_of_equal_micro_batches_is_exact():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    x = batches(1)[0]
    expected = torch.autograd.grad(loss_of(model, x), model[0].weight)[0].norm()
    for _ in range(4):
        (loss_of(model, x) / 4).backward()
    assert_close(torch.linalg.vector_norm(model[0].weight.grad), expected)


@pytest.mark.parametrize(("rule", "steps"), [("residual", 1), ("whitened", 1), ("sketched", 3), ("subspace", 3)])
def test_equal_micro_batches_make_the_step_of_their_batch(rule, steps):
    """The statistic sees (Σgᵢ)² although only gᵢ² came by: the update is as large as that of the batch.

    (The rules that whiten do so before they know; a later step corrects the size, not the pattern, of what is new.)
    """
    moved = []
    for parts in (1, 4):
        model = make_model()
        before = weights(model)
        optimizer = SGC(model.parameters(), **SKETCHED, moments=rule, weight_decay=0.0, eps=0.0)
        optimizer.attach(model)
        for x in batches(steps):
            for _ in range(parts):
                (loss_of(model, x) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(weights(model) - before)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-6)


def test_clipping_scales_by_the_true_norm():
    """At the first step the whitened gradient is the same whatever its length; sketches of the rule without are not."""
    clipped, norms, _ = train(attach=True, max_norm=1e-3, moments="subspace", eps=1e-3)
    expected, expected_norms, _ = train(attach=False, max_norm=1e-3, moments="subspace", eps=1e-3)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    torch.testing.assert_close(clipped, expected, rtol=1e-3, atol=1e-6)


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_gradient_bytes(attach, layers=12, width=64):
    """Largest sum of whole gradients alive at once, over a backward of equal layers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(layers)])
    optimizer = SGC(model.parameters(), **SKETCHED)
    alive, peak = [], 0

    def watch(gradient):
        nonlocal peak
        alive.append(weakref.ref(gradient.untyped_storage()))
        peak = max(peak, sum(storage.nbytes() for ref in alive if (storage := ref()) is not None))

    for param in model.parameters():
        param.register_hook(watch)
    if attach:
        optimizer.attach(model)
    model(torch.randn(4, width)).square().sum().backward()
    return peak / (4 * width * width)


def test_at_most_two_layers_of_gradients_exist_at_once():
    assert peak_gradient_bytes(attach=True) <= 2
    gc.collect()


def test_dropping_the_gradients_frees_the_sketches():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    before = optimizer.expected_state_bytes()
    loss_of(model, batches(1)[0]).backward()
    held = optimizer.state_bytes()
    buffer = weakref.ref(model[0].weight.grad.buffer)
    model.zero_grad()
    assert buffer() is None
    assert optimizer.state_bytes() < held <= before


# ---- what loops do with gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["model", "optimizer"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_what_was_accumulated(whose, set_to_none):
    first, second = batches(2)
    results = []
    for spoil in (False, True):
        model = make_model()
        optimizer = SGC(model.parameters(), **SKETCHED)
        optimizer.attach(model)
        if spoil:
            loss_of(model, first).backward()
            (model if whose == "model" else optimizer).zero_grad(set_to_none=set_to_none)
        loss_of(model, second).backward()
        optimizer.step()
        results.append(weights(model))
    assert torch.equal(*results)


def test_a_gradient_of_zeros_moves_nothing_but_the_decay():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED, weight_decay=0.1)
    optimizer.attach(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.zero_grad(set_to_none=False)
    before = weights(model)
    optimizer.step()
    assert_close(weights(model), before * (1 - 1e-3))


@pytest.mark.parametrize(("rule", "growth_interval"), [("residual", 100), ("sketched", 3), ("subspace", 3)])
def test_grad_scaler_trains_compressed_gradients_as_whole_ones(rule, growth_interval):
    """(When the scale grows, R and C of the rules that whiten see one gradient at the scale before.)"""
    results = []
    for attach in (False, True):
        model = make_model()
        optimizer = SGC(model.parameters(), **SKETCHED, moments=rule, eps=0.0)  # eps is not scaled
        if attach:
            optimizer.attach(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=growth_interval)
        norms = []
        for batch in batches(8):
            for part in batch.chunk(1):
                scaler.scale(loss_of(model, part)).backward()
            scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6).item())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((weights(model), norms, scaler.get_scale()))
    (expected, norms, scale), (hooked, hooked_norms, hooked_scale) = results
    assert scale == hooked_scale
    assert (scale > 2.0**12) == (growth_interval < 8)
    assert hooked_norms == pytest.approx(norms, rel=1e-5)
    torch.testing.assert_close(hooked, expected, rtol=1e-5, atol=1e-7)


def test_grad_scaler_skips_the_step_of_an_infinite_gradient_and_lowers_its_scale():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = weights(model)
    scaler.scale(loss_of(model, batches(1)[0] * torch.tensor(math.inf))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weights(model), before)
    assert scaler.get_scale() == 2.0**9


def test_a_tensor_with_a_nan_is_skipped_and_counted_and_the_others_move():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    handle = model[0].weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), math.nan))
    before = [param.detach().clone() for param in model.parameters()]
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.stats()["skipped_tensors"] == 1
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[2])
    handle.remove()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert weights(model).isfinite().all()
    assert not torch.equal(model[0].weight, before[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    results = []
    for checkpointed in (False, True):
        model = make_model()
        optimizer = SGC(model.parameters(), **SKETCHED)
        optimizer.attach(model)
        for x in batches(3):
            x.requires_grad_()
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    assert torch.equal(*results)


def test_a_compiled_model_trains_as_the_model_does():
    results = []
    for compiled in (False, True):
        model = make_model()
        optimizer = SGC(model.parameters(), **SKETCHED)
        optimizer.attach(model)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for x in batches(3):
            forward(x).square().mean().backward()
            assert isinstance(model[0].weight.grad, CompressedGradient)
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_tied_weights_are_compressed_once():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(64, 32), "head": torch.nn.Linear(32, 64, bias=False)})
    model["head"].weight = model["embedding"].weight
    results = []
    for attach in (False, True):
        twin = copy.deepcopy(model)
        optimizer = SGC(twin.parameters(), **SKETCHED)
        if attach:
            optimizer.attach(twin)
        for token in ([1, 2, 3], [3, 4, 60]):
            twin["head"](twin["embedding"](torch.tensor(token))).logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(twin))
    assert torch.equal(*results)


def test_a_gradient_set_by_hand_is_compressed_at_the_step():
    results = []
    for attach in (False, True):
        model = make_model()
        optimizer = SGC(model.parameters(), **SKETCHED)
        if attach:
            optimizer.attach(model)
        generator = torch.Generator().manual_seed(3)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        results.append(weights(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("rule", ["residual", "subspace"])  # whitened, so that its length is lost at first; and not
def test_more_can_be_added_after_clipping(rule):
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED, moments=rule)
    optimizer.attach(model)
    x = batches(1)[0]
    loss_of(model, x).backward()
    sketch = model[0].weight.grad.sums().p.clone()
    norm = torch.nn.utils.clip_grad_norm_([model[0].weight], 1e-2)
    assert norm > 1e-2
    assert_close(torch.linalg.vector_norm(model[0].weight.grad), torch.tensor(1e-2), 1e-3)
    (loss_of(model, x) * (1e-2 / norm)).backward()  # as much again
    assert_close(torch.linalg.vector_norm(model[0].weight.grad), torch.tensor(2e-2), 1e-3)
    share = 1e-2 / norm if rule == "subspace" else 1
    assert_close(model[0].weight.grad.sums().p, 2 * share * sketch, 0.05)


@pytest.fixture(scope="module")
def gradients():
    """Gradients of matrices, compressed and whole."""
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED).attach(model)
    loss_of(model, batches(1)[0]).backward()
    yield [model[0].weight.grad, torch.randn(4, 4), model[2].weight.grad]
    del optimizer


NUMBERS = {
    "a float": 0.5,
    "an integer": 2,
    "a boolean": True,
    "minus one": -1.0,
    "of numpy": np.float32(0.5),
    "0-d": torch.tensor(0.5),
    "0-d, fp64": torch.tensor(0.3, dtype=torch.float64),
    "0-d, bf16": torch.tensor(0.5, dtype=torch.bfloat16),
    "0-d, integer": torch.tensor(2),
    "one entry": torch.tensor([0.5]),
    "one entry, 2-d": torch.tensor([[4.0]]),
}
SCALINGS = {
    "mul_": lambda all, number: [gradient.mul_(number) for gradient in all],
    "div_": lambda all, number: [gradient.div_(number) for gradient in all],
    "*=": lambda all, number: [gradient.__imul__(number) for gradient in all],
    "/=": lambda all, number: [gradient.__itruediv__(number) for gradient in all],
    "of data": lambda all, number: [gradient.data.mul_(number) for gradient in all],
    "of what is detached": lambda all, number: [gradient.detach().div_(number) for gradient in all],
    "_foreach_mul_": torch._foreach_mul_,
    "_foreach_div_": torch._foreach_div_,
    "_foreach_mul_, a list": lambda all, number: torch._foreach_mul_(all, [number] * len(all)),
    "_foreach_div_, a list": lambda all, number: torch._foreach_div_(all, [number] * len(all)),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("scale", SCALINGS.values(), ids=SCALINGS)
def test_it_is_scaled_by_whatever_scales_gradients(gradients, scale, number):
    """As a whole gradient of the same norm is: by the factor that ones become."""
    ones = [torch.ones(48, 32) for _ in gradients]
    try:
        scale(ones, number)
    except (TypeError, RuntimeError) as error:  # as lists of numpy's numbers
        pytest.skip(f"torch does not scale gradients by this: {error}")
    before = torch._foreach_norm(gradients)
    held = [gradient.scale.clone() for gradient in gradients if isinstance(gradient, CompressedGradient)]
    scale(gradients, number)
    for norm, old, factor in zip(torch._foreach_norm(gradients), before, ones, strict=True):
        assert_close(norm, old * factor[0, 0].abs())
    after = [gradient.scale for gradient in gradients if isinstance(gradient, CompressedGradient)]
    assert all(new.dtype is torch.float32 for new in after)
    assert torch.stack([new / old for new, old in zip(after, held, strict=True)]).tolist() == pytest.approx(
        [float(ones[0][0, 0])] * len(held), rel=1e-6
    )
    for gradient in gradients:  # as it was
        gradient.div_(ones[0][0, 0])


whole = torch.ones(48, 32)
REFUSED = {
    "scaled by a row": lambda g: g.mul_(torch.ones(32)),
    "scaled by a matrix": lambda g: g.mul_(whole),
    "divided by a row": lambda g: g.div_(torch.ones(32)),
    "scaled by a complex number": lambda g: g.mul_(2j),
    "scaled by a complex tensor": lambda g: g.mul_(torch.tensor(2j)),
    "scaled by itself": lambda g: g.mul_(g),
    "divided and rounded": lambda g: g.div_(2, rounding_mode="floor"),
    "scaling others": lambda g: whole.clone().mul_(g),
    "dividing others": lambda g: whole.clone().div_(g),
    "scaling others in a list": lambda g: torch._foreach_mul_([whole.clone()], [g]),
    "scaled by a row in a list": lambda g: torch._foreach_div_([g], [torch.ones(32)]),
    "scaled out of place": lambda g: g * 2,
    "scaled out of place in a list": lambda g: torch._foreach_mul([g], 2.0),
    "added to others": lambda g: whole.clone().add_(g),
    "added out of place": lambda g: g + whole,
    "added to a number": lambda g: g.add_(1.0),
    "added to a row": lambda g: g.add_(torch.ones(32)),
    "added in part": lambda g: g.add_(whole, alpha=0.5),
    "added to itself": lambda g: g.add_(g),
    "added in a list": lambda g: torch._foreach_add_([g], [whole]),
    "subtracted": lambda g: g.sub_(whole),
    "negated": lambda g: g.neg_(),
    "clipped by value": lambda g: g.clamp_(-1, 1),
    "clipped by value in a list": lambda g: torch._foreach_clamp_max_([g], 1.0),
    "copied": lambda g: g.clone(),
    "copied deeply": copy.deepcopy,
    "copied into": lambda g: g.copy_(whole),
    "copied out of": lambda g: whole.clone().copy_(g),
    "given other data": lambda g: setattr(g, "data", whole),
    "pickled": pickle.dumps,
    "shared": lambda g: g.share_memory_(),
    "of another dtype": lambda g: g.double(),
    "read": lambda g: g[0],
    "written": lambda g: g.__setitem__(0, 1.0),
    "summed": lambda g: g.sum(),
    "of an infinity norm": lambda g: torch.linalg.vector_norm(g, math.inf),
    "of a 1-norm": lambda g: g.norm(1),
    "of norms of rows": lambda g: g.norm(dim=1),
    "of a norm of its shape": lambda g: torch.linalg.vector_norm(g, keepdim=True),
    "compared": lambda g: g == whole,
    "tested": lambda g: torch.isfinite(g),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_what_needs_the_gradient_itself_is_refused_with_a_sentence_and_changes_nothing(gradients, use):
    gradient = gradients[0]
    assert gradient.shape == (48, 32)
    assert gradient.dtype is torch.float32
    before = gradient.true_norm(), gradient.sums().p.clone()
    with pytest.raises(RuntimeError, match="a (whole )?compressed gradient"):
        use(gradient)
    assert torch.equal(gradient.true_norm(), before[0])
    assert torch.equal(gradient.sums().p, before[1])


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("rule", ["sketched", "subspace"])
def test_clipping_and_unscaling_make_the_step_of_whole_gradients(rule, foreach):
    """Rules that do not whiten at backward see the same numbers, however often they are scaled."""
    ends = []
    for attach in (False, True):
        model = make_model()
        optimizer = SGC(model.parameters(), **SKETCHED, moments=rule, eps=1e-3)
        if attach:
            optimizer.attach(model)
        for x in batches(3):
            (loss_of(model, x) * 512).backward()
            torch._foreach_div_([param.grad for param in model.parameters()], 512.0)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=foreach)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm_type", [1.0, math.inf])
def test_clipping_by_another_norm_is_refused(norm_type):
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED).attach(model)
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="only the 2-norm is known"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type)
    optimizer.zero_grad()


@pytest.mark.parametrize("factor", [-1.0, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("changed", [{}, {"sketch_size": 0}], ids=["sketch", "sampled"])
def test_a_factor_of_any_kind_does_what_it_does_to_whole_gradients(changed, factor):
    """Minus one ascends, zero only decays, and what is not finite is skipped and counted."""
    model = make_model()
    optimizer = SGC(model.parameters(), **{**SKETCHED, **changed}, weight_decay=0.5).attach(model, sample_every=1)
    before = model[0].weight.detach().clone()
    x = batches(1)[0]
    gradient = torch.autograd.grad(loss_of(model, x), model[0].weight)[0]
    loss_of(model, x).backward()
    model[0].weight.grad.mul_(factor)
    optimizer.step()
    moved = model[0].weight.detach() - before * (1 - 0.5e-2)
    if factor == -1:
        assert (moved * gradient).sum() > 0
    elif factor == 0:
        assert moved.abs().max() <= SUM
    else:
        assert torch.equal(model[0].weight, before)
    assert optimizer.stats()["skipped_tensors"] == (not math.isfinite(factor))


# ---- attaching -------------------------------------------------------------------------------------------------------


def test_what_can_not_be_compressed_is_refused_with_a_sentence():
    model = make_model()
    with pytest.raises(ValueError, match="smaller than its min_size"):
        SGC(model.parameters(), min_size=10**6).attach(model)
    with pytest.raises(ValueError, match="sparsity=4 selects among all"):
        SGC(model.parameters(), min_size=64, sparsity=4).attach(model)
    with pytest.raises(ValueError, match="sample_every must be at least 1, got 0"):
        SGC(model.parameters(), min_size=64).attach(model, sample_every=0)
    with pytest.raises(TypeError, match="sample_every must be a whole number, got 1.5"):
        SGC(model.parameters(), min_size=64).attach(model, sample_every=1.5)


def test_a_rank_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="rank=4"):
        SGC(model.parameters(), **SKETCHED, rank=4).attach(model)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="not a parameter of the model"):
        SGC(make_model().parameters(), **SKETCHED).attach(make_model())
    with pytest.raises(TypeError, match="got list"):
        SGC(make_model().parameters(), **SKETCHED).attach([])


def test_detached_gradients_are_whole_and_a_dropped_optimizer_lets_go():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    assert optimizer.attach(model) is optimizer
    optimizer.detach()
    loss_of(model, batches(1)[0]).backward()
    assert type(model[0].weight.grad) is torch.Tensor
    model.zero_grad()
    optimizer.attach(model)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    loss_of(model, batches(1)[0]).backward()
    assert type(model[0].weight.grad) is torch.Tensor


def test_attaching_twice_compresses_once():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model).attach(model)
    loss_of(model, batches(1)[0]).backward()
    assert model[0].weight.grad.sums().number == 1


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_in_the_middle_of_an_accumulation_is_bit_equal(rule, dtype, tmp_path):
    changed = {"sketch_size": 0} if rule == "sampled" else {"moments": rule}
    data = [part for batch in batches(4) for part in batch.chunk(4)]

    def make():
        model = make_model(dtype)
        optimizer = SGC(model.parameters(), **{**SKETCHED, **changed})
        return model, optimizer.attach(model)

    def go_on(model, optimizer, start, stop):
        for number in range(start, stop):
            (loss_of(model, data[number]) / 4).backward()
            if number % 4 == 3:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()

    model, optimizer = make()
    go_on(model, optimizer, 0, 16)

    first, saved = make()
    go_on(first, saved, 0, 10)  # two steps, and two micro-batches of the third
    dense = {name: param.grad for name, param in first.named_parameters() if "bias" in name}  # whole, as ever
    torch.save({"model": first.state_dict(), "optimizer": saved.state_dict(), "dense": dense}, tmp_path / "state.pt")
    resumed, loaded = make()
    checkpoint = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    loaded.load_state_dict(checkpoint["optimizer"])
    for name, param in resumed.named_parameters():
        if name in checkpoint["dense"]:
            param.grad = checkpoint["dense"][name]
    go_on(resumed, loaded, 10, 16)
    assert torch.equal(weights(resumed), weights(model))


def by_torch(model, optimizer, other, again, folder):
    torch.save([model.state_dict(), optimizer.state_dict()], folder / "state.pt")
    weights, state = torch.load(folder / "state.pt", weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)


def by_distributed_checkpoint(model, optimizer, other, again, folder):
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)
    state = dict(zip(("model", "optimizer"), get_state_dict(other, again), strict=True))
    dcp.load(state, checkpoint_id=folder)  # only what has a place in the state of a new optimizer
    set_state_dict(other, again, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("attach_last", [False, True])
@pytest.mark.parametrize("way", [by_torch, by_distributed_checkpoint])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [*RULES, "sampled"])
def test_resume_with_clipping_is_bit_equal(rule, dtype, way, attach_last, tmp_path):
    changed = {"sketch_size": 0} if rule == "sampled" else {"moments": rule}

    def make(attach=True):
        model = make_model(dtype)
        optimizer = SGC(model.parameters(), **{**SKETCHED, **changed})
        return model, optimizer.attach(model) if attach else optimizer

    def go_on(model, optimizer, first, last):
        for x in batches(6)[first:last]:
            (30 * loss_of(model, x)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make()
    go_on(model, optimizer, 0, 3)
    resumed, loaded = make(attach=not attach_last)
    way(model, optimizer, resumed, loaded, tmp_path)
    if attach_last:
        loaded.attach(resumed)
    go_on(model, optimizer, 3, 6)
    go_on(resumed, loaded, 3, 6)
    assert torch.equal(weights(resumed), weights(model))


def test_a_gradient_that_a_step_has_used_is_in_no_checkpoint():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    loss_of(model, batches(1)[0]).backward()
    assert any("pending" in held for held in optimizer.state_dict()["state"].values())
    optimizer.step()
    assert not any("pending" in held for held in optimizer.state_dict()["state"].values())


def test_a_checkpoint_with_compressed_gradients_needs_an_attached_optimizer():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    loss_of(model, batches(1)[0]).backward()
    fresh = SGC(make_model().parameters(), **SKETCHED)
    with pytest.raises(ValueError, match="attach"):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_gradients_that_deepspeed_will_take_are_refused(mark):
    model = make_model()
    setattr(model[0].weight, mark, 0)
    with pytest.raises(RuntimeError, match="DeepSpeed"):
        SGC(model.parameters(), **SKETCHED).attach(model)
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    setattr(model[2].weight, mark, 0)  # as deepspeed.initialize does
    with pytest.raises(RuntimeError, match="DeepSpeed"):
        loss_of(model, batches(1)[0]).backward()


def test_a_model_dropped_with_its_gradients_is_freed():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    gone = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_operators_on_lists_of_gradients_do_what_they_do_one_by_one():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    loss_of(model, batches(1)[0]).backward()
    gradients = [param.grad for param in model.parameters()]  # compressed and whole
    before = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, 2.0)
    torch._foreach_div_(gradients, torch.tensor(4.0))
    torch._foreach_mul_(gradients, [3.0] * len(gradients))
    assert_close(torch.stack(torch._foreach_norm(gradients)), 1.5 * before)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=True)
    assert_close(torch.stack(torch._foreach_norm(gradients)).norm(), torch.tensor(1e-3), 1e-3)
    torch._foreach_zero_(gradients)
    assert torch.stack(torch._foreach_norm(gradients)).max() == 0


def test_of_two_optimizers_on_one_model_the_newer_compresses():
    model = make_model()
    older, newer = SGC(model.parameters(), **SKETCHED), SGC(model.parameters(), **SKETCHED)
    older.attach(model)
    newer.attach(model)
    twin = make_model()
    expected = SGC(twin.parameters(), **SKETCHED)
    for x in batches(3):
        loss_of(model, x).backward()
        loss_of(twin, x).backward()
        newer.step()
        newer.zero_grad()
        expected.step()
        expected.zero_grad()
    assert torch.equal(weights(model), weights(twin))


def test_sampled_entries_stay_those_of_their_gradient():
    """A gradient that is used twice moves the same entries twice."""
    model = make_model()
    optimizer = SGC(model.parameters(), **{**SKETCHED, "sketch_size": 0}, weight_decay=0.0)
    optimizer.attach(model, sample_every=8)
    loss_of(model, batches(1)[0]).backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    once = model[0].weight.detach() != before
    optimizer.step()
    assert torch.equal(model[0].weight.detach() != before, once)


def test_parameters_replaced_after_attaching_are_refused():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    optimizer.param_groups[0]["params"] = list(make_model().parameters())  # as FSDP2 in accelerate does
    with pytest.raises(RuntimeError, match="were replaced"):
        optimizer.step()


def test_an_attached_model_can_be_copied_and_pickled(tmp_path):
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        loss_of(other, batches(1)[0]).backward()
        assert type(other[0].weight.grad) is torch.Tensor


# ---- what is estimated of the sums of several gradients --------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"sketch_size": 0}], ids=["sketch", "sampled"])
def test_the_norm_of_two_micro_batches_tells_gradients_that_agree_from_opposite_ones(kwargs):
    """Of equal ones it is twice the norm of one, of opposite ones nothing is left, others are orthogonal, nearly."""
    weight = torch.nn.Linear(64, 64, bias=False)
    optimizer = SGC(weight.parameters(), **{**SKETCHED, **kwargs}).attach(weight, sample_every=4)
    generator = torch.Generator().manual_seed(0)
    gradient, other = (torch.randn(64, 64, generator=generator) for _ in range(2))
    for second, expected in ((gradient, 2.0), (-gradient, 0.0), (other, 2**0.5)):
        for one in (gradient, second):
            (weight.weight * one).sum().backward()
        assert isinstance(weight.weight.grad, CompressedGradient)
        norm = torch.linalg.vector_norm(weight.weight.grad).item()
        assert norm == pytest.approx(expected * gradient.norm().item(), abs=0.1 * gradient.norm().item())
        weight.weight.grad = None
    assert optimizer.state_bytes() > 0  # an optimizer that is gone compresses nothing


def test_the_norm_of_a_compressed_gradient_has_the_dtype_that_is_asked_for():
    model = make_model()
    optimizer = SGC(model.parameters(), **SKETCHED).attach(model)
    loss_of(model, batches(1)[0]).backward()
    gradient = model[0].weight.grad
    assert isinstance(gradient, CompressedGradient)
    assert torch.linalg.vector_norm(gradient, dtype=torch.float64).dtype is torch.float64
    assert torch.linalg.vector_norm(gradient).dtype is torch.float32
    assert optimizer.stats()["state_bytes"] > 0


def test_a_gradient_that_was_dropped_leaves_nothing_in_the_next():
    """The buffer lives on in the gradient of another parameter of its bucket."""
    found = []
    for dropped in (False, True):
        model = make_model()
        optimizer = SGC(model.parameters(), **SKETCHED).attach(model)
        buckets_of(list(optimizer._compressor.slots.values()))  # as where ranks sum
        first, second = batches(2)
        if dropped:
            loss_of(model, first).backward()
            model[0].weight.grad = model[0].bias.grad = None
            model[2].weight.grad.zero_()
        loss_of(model, second).backward()
        found.append([one.clone() for one in model[0].weight.grad.sums() if one is not None])
        assert optimizer.state_bytes() > 0
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_sketch_whitened_too_early_is_made_up_for_by_the_means_of_both_second_moments():
    """√v̂ scales as g: twice the gradient beside no history, and less beside a long one."""
    used = torch.tensor([4.0, 8.0])
    assert rewhitening(torch.zeros(2), 0.9, used, 4 * used).item() == pytest.approx(0.5)
    held = torch.full((2,), 6.0)
    assert rewhitening(held, 0.9, used, 4 * used).item() == pytest.approx(math.sqrt((5.4 + 0.6) / (5.4 + 2.4)))


def test_a_clipped_sum_of_one_gradient_is_folded_by_the_statistics_of_that_one():
    model = make_model()
    optimizer = SGC(model.parameters(), **{**SKETCHED, "moments": "whitened"}, betas=(0.9, 0.9)).attach(model)
    loss_of(model, batches(1)[0]).backward()
    gradient, col = model[0].weight.grad, optimizer.state[model[0].weight]["col"]
    col.fill_(gradient.sums().col.mean().item())
    before, used = gradient.sums().p.clone(), gradient.sums().col.clone()
    gradient.mul_(0.5)
    optimizer._compressor.fold(gradient)
    assert_close(gradient.sums().p, before * 0.5 * rewhitening(col, 0.9, used, used / 4))
    assert_close(gradient.sums().norm_sq, torch.linalg.vector_norm(gradient).square())
