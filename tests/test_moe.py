"""SGC on mixtures of experts, whose experts are one 3-d tensor: (experts, out, in)."""

import pytest
import torch

pytest.importorskip("transformers", reason="the extra sgc[hf] is not installed")
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from sgc import SGC
from sgc.budget import probe_bytes
from sgc.hf import create_sgc_optimizer
from tests.tiny import VOCABULARY, bits, check_resume, differing, loss_of, losses

EXPERTS, HIDDEN, WIDTH = 8, 32, 48
STACKS = {"gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN), "down_proj": (EXPERTS, HIDDEN, WIDTH)}
BOUND = 3  # of |w|, at one update without a sketch
SKETCHED = {"sketch_size": 16, "chunk_size": 64}
KWARGS = {
    "memoryless": {},
    "sketched": SKETCHED,
    "compressed": {"compressed_gradients": True, "sample_every": 4},
    "compressed sketches": {**SKETCHED, "compressed_gradients": True},
}


def moe(kind="mixtral", layers=1, chosen=2):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_hidden_layers": layers}
    sizes |= {"num_key_value_heads": 2, "num_experts_per_tok": chosen, "max_position_embeddings": 32}
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=EXPERTS, intermediate_size=WIDTH))
    experts = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "intermediate_size": WIDTH, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, output_router_logits=True))


def stacks(model):
    """Give the stacked experts of the first layer by the last part of their name."""
    experts = model.model.layers[0].mlp.experts
    return {name: getattr(experts, name) for name in STACKS}


def backward(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()


def largest(tensor):
    """Give the largest entry of each expert, (experts,)."""
    return tensor.detach().abs().amax(dim=(1, 2))


@pytest.mark.parametrize("kwargs", KWARGS)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_stacked_experts_are_compressed_learn_and_hold_what_is_predicted(kind, kwargs):
    model = moe(kind)
    assert {name: tuple(stack.shape) for name, stack in stacks(model).items()} == STACKS
    first = loss_of(model).item()
    optimizer = create_sgc_optimizer(model, lr=5e-3, **KWARGS[kwargs])
    for _ in range(8):
        loss_of(model).backward()
        optimizer.step()
        model.zero_grad()
    assert loss_of(model).item() < first - 0.1
    held = optimizer._compressor.most_bytes() if optimizer._compressor else 0
    state = optimizer.expected_state_bytes() - held
    assert (
        state
        <= optimizer.state_bytes()
        <= state + (sum(map(probe_bytes, optimizer.param_groups)) if optimizer._loop.probes.tensors() else 0)
    )
    for name, (experts, out, width) in STACKS.items():
        shapes = {key: tuple(value.shape) for key, value in optimizer.state[stacks(model)[name]].items()}
        rows = {"step": (), "row": (experts, out), "col": (width,)}
        if "sketch_size" in KWARGS[kwargs]:
            _, _, k = shapes.pop("sketch")
            assert k == 16
        assert shapes == rows


def test_a_stack_of_experts_is_updated_as_the_matrix_of_all_their_rows():
    model = moe()
    loss_of(model).backward()
    for kwargs in ({}, SKETCHED):
        for stack in stacks(model).values():
            ours = torch.nn.Parameter(stack.detach().clone())
            matrix = torch.nn.Parameter(stack.detach().flatten(0, 1).clone())
            ours.grad, matrix.grad = stack.grad.clone(), stack.grad.flatten(0, 1).clone()
            for param in (ours, matrix):
                SGC([param], lr=1e-2, **kwargs).step()
            assert torch.equal(ours.flatten(0, 1), matrix)


@pytest.mark.parametrize("kwargs", KWARGS)
def test_an_expert_without_tokens_stays_as_it_is_and_its_first_update_is_bounded(kwargs):
    """(A later one has a history: the residual of an expert that had tokens goes on moving it.)"""
    model, few = moe(chosen=1), torch.tensor([[1, 2, 3, 4]])
    backward(model, few)  # to see who has tokens that the loss depends on
    idle = {name: largest(stack.grad) == 0 for name, stack in stacks(model).items()}
    assert all(0 < unused.sum() < EXPERTS for unused in idle.values())
    model.zero_grad()
    lr, before = 1e-2, bits(model)
    start = {name: stack.detach().clone() for name, stack in stacks(model).items()}
    optimizer = create_sgc_optimizer(model, lr=lr, weight_decay=0.0, **KWARGS[kwargs])
    backward(model, few)
    optimizer.step()
    model.zero_grad()
    assert set(differing(before, bits(model))) >= {f"model.layers.0.mlp.experts.{name}" for name in STACKS}
    for name, stack in stacks(model).items():
        moved = largest(stack - start[name])
        assert torch.equal(moved == 0, idle[name])
        assert torch.equal(optimizer.state[stack]["row"].sum(1) == 0, idle[name])
    many = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(3))
    start = {name: stack.detach().clone() for name, stack in stacks(model).items()}
    backward(model, many)
    optimizer.step()
    for name, stack in stacks(model).items():
        moved = largest(stack - start[name])
        assert moved.isfinite().all()
        assert (moved[idle[name]] > 0).any()
        assert moved[idle[name]].max() <= 2 * moved[~idle[name]].max()  # no blow-up of what was never seen
        if "sketch_size" not in KWARGS[kwargs]:
            farther = KWARGS[kwargs].get("sample_every", 1) ** 0.5
            assert moved.max() <= BOUND * lr * farther


def test_weight_decay_is_for_idle_experts_too():
    model = moe(chosen=1)
    backward(model, torch.tensor([[1, 2, 3, 4]]))
    optimizer = create_sgc_optimizer(model, lr=1e-2, weight_decay=0.1)
    start = {name: stack.detach().clone() for name, stack in stacks(model).items()}
    idle = {name: largest(stack.grad) == 0 for name, stack in stacks(model).items()}
    optimizer.step()
    for name, stack in stacks(model).items():
        torch.testing.assert_close(stack[idle[name]], start[name][idle[name]] * (1 - 1e-3))


@pytest.mark.parametrize("kwargs", ["sketched", "compressed"])
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(tmp_path, kwargs):
    """The Trainer writes every expert apart and does not stack them when it resumes (transformers' issue 48805)."""
    reopen = Qwen3MoeForCausalLM.from_pretrained
    run = check_resume(tmp_path, lambda: moe("qwen3"), KWARGS[kwargs], reopen=reopen, gradient_accumulation_steps=2)
    assert losses(run)[-1] < losses(run)[0]


def test_adapters_of_stacked_experts_are_trained():
    peft = pytest.importorskip("peft", reason="the extra sgc[hf] is not installed")
    config = {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{name}" for name in STACKS]}
    model = peft.get_peft_model(moe(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0, **config))
    optimizer = create_sgc_optimizer(model, lr=2e-2, min_size=0, weight_decay=0.0)
    before, first = bits(model), loss_of(model).item()
    for _ in range(6):
        loss_of(model).backward()
        optimizer.step()
        model.zero_grad()
    changed = differing(before, bits(model))
    assert all("lora_" in name for name in changed)
    assert any("experts" in name for name in changed)
    assert loss_of(model).item() < first
