"""SGC under autocast with a loss scale, and in a Trainer that compiles the model; gradients whole and compressed."""

import pytest
import torch

pytest.importorskip("transformers", reason="the extra sgc[hf] is not installed")
from sgc.hf import create_sgc_optimizer, find_sgc
from tests.tiny import bits, differing, llama, loss_of, losses, trainer

KWARGS = {
    "memoryless": {"min_size": 0},
    "compressed": {"min_size": 0, "compressed_gradients": True, "sample_every": 2},
    "compressed sketches": {"min_size": 0, "sketch_size": 16, "chunk_size": 64, "compressed_gradients": True},
}


def train(kwargs, *, dtype=None, scale=None, steps=4, poisoned=None):
    """Make some steps under autocast and give the weights, the norms before clipping, and the scales."""
    model = llama()
    optimizer = create_sgc_optimizer(model, lr=5e-3, eps=1e-12, **kwargs)  # eps of gradients that are not scaled
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    norms, scales, weights = [], [], [bits(model)]
    for step in range(steps):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = loss_of(model)
        scaler.scale(loss * (torch.inf if step == poisoned else 1.0)).backward()
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        weights.append(bits(model))
    return weights, norms, scales, loss_of(model).item()


@pytest.mark.parametrize("kwargs", KWARGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_a_loss_scale_trains_as_fp32_does(kwargs, dtype):
    _, expected, _, single = train(KWARGS[kwargs])
    _, norms, scales, loss = train(KWARGS[kwargs], dtype=dtype, scale=2.0**14)
    assert scales == [2.0**14] * 4  # nothing overflowed
    digits = 2.0**-10 if dtype is torch.float16 else 2.0**-7
    assert norms[0] == pytest.approx(expected[0], rel=4 * digits)
    assert norms[0] != expected[0]  # it was computed in less than fp32
    assert loss == pytest.approx(single, rel=0.02)
    assert loss < loss_of(llama()).item() - 0.2


@pytest.mark.parametrize("kwargs", KWARGS)
def test_an_overflow_of_the_scaled_loss_moves_nothing_and_halves_the_scale(kwargs):
    weights, _, scales, _ = train(KWARGS[kwargs], dtype=torch.float16, scale=2.0**14, poisoned=1)
    assert scales == [2.0**14, 2.0**13, 2.0**13, 2.0**13]
    assert not differing(weights[1], weights[2])
    assert differing(weights[2], weights[3])


@pytest.mark.parametrize("kwargs", ["memoryless", "compressed"])
def test_a_trainer_that_compiles_the_model_trains_as_one_that_does_not(tmp_path, kwargs):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    runs = []
    for changed in ({}, compiled):
        run = trainer(tmp_path / str(bool(changed)), llama(layers=1), KWARGS[kwargs], max_steps=3, **changed)
        frames = torch._dynamo.utils.counters["frames"]["ok"]
        run.train()
        assert (torch._dynamo.utils.counters["frames"]["ok"] > frames) == bool(changed)
        runs.append(run)
    torch.compiler.reset()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
    named = [[group["param_names"] for group in find_sgc(run.optimizer).param_groups] for run in runs]
    assert named[0] == named[1]
    assert losses(runs[0])[-1] < losses(runs[0])[0]
