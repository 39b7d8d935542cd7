"""SGC on adapters and on parts of a model: LoRA, DoRA, embeddings alone, modules trained whole beside adapters."""

import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra sgc[hf] is not installed")
pytest.importorskip("peft", reason="the extra sgc[hf] is not installed")
import peft
from transformers import LlamaConfig, LlamaForCausalLM

from sgc.backward.gradient import CompressedGradient
from sgc.budget import probe_bytes
from sgc.hf import create_sgc_optimizer
from tests.tiny import bits, check_resume, differing, llama, loss_of, losses, trainer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "integrations.md"
SKETCHED = {"sketch_size": 16, "chunk_size": 64, "min_size": 0}
ADAMW_BYTES = 8  # per parameter


def adapted(model=None, **changed):
    """Give a model with adapters, the same at every call."""
    model = llama() if model is None else model
    torch.manual_seed(1)
    return peft.get_peft_model(model, lora_config(**changed))


def lora_config(**changed):
    return peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 8, "target_modules": "all-linear"} | changed))


def embeddings_alone():
    model = llama().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return model


def trained(model):
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def names(optimizer):
    return {name for group in optimizer.param_groups for name in group["param_names"]}


def group_of(optimizer, name):
    return next(group for group in optimizer.param_groups if name in group["param_names"])


def update(model, optimizer, times=1):
    for _ in range(times):
        loss_of(model).backward()
        optimizer.step()
        model.zero_grad()


MODELS = {
    "lora": adapted,
    "dora": lambda: adapted(use_dora=True),
    "embeddings": embeddings_alone,
    "modules_to_save": lambda: adapted(modules_to_save=["embed_tokens", "lm_head"]),
}
KWARGS = {
    "dense": {},  # all are smaller than min_size
    "memoryless": {"min_size": 0},
    "sketched": SKETCHED,
    "compressed": {"min_size": 0, "compressed_gradients": True},
    "compressed sketches": {**SKETCHED, "compressed_gradients": True},
}


@pytest.mark.parametrize("kwargs", KWARGS)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_trained_learns_all_else_stays_and_the_state_is_as_predicted(kind, kwargs):
    model = MODELS[kind]()
    before, first = bits(model), loss_of(model).item()
    optimizer = create_sgc_optimizer(model, lr=1e-2, weight_decay=0.0, **KWARGS[kwargs])
    assert names(optimizer) == set(trained(model))
    update(model, optimizer, times=9)  # one more than `sample_every`: each entry has had its turn
    assert loss_of(model).item() < first
    assert set(differing(before, bits(model))) == set(trained(model))
    probes = sum(map(probe_bytes, optimizer.param_groups)) if optimizer._loop.probes.tensors() else 0
    held = optimizer._compressor.most_bytes() if optimizer._compressor else 0
    state = optimizer.expected_state_bytes() - held
    assert state <= optimizer.state_bytes() <= state + probes


@pytest.mark.parametrize(
    ("kind", "kwargs", "changed"),
    [
        ("lora", "dense", {}),
        ("dora", "memoryless", {"gradient_accumulation_steps": 2}),
        ("embeddings", "sketched", {}),
        ("modules_to_save", "compressed", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
    ],
)
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(tmp_path, kind, kwargs, changed):
    run = check_resume(tmp_path, MODELS[kind], KWARGS[kwargs], **changed)
    assert losses(run)[-1] < losses(run)[0]


def test_the_first_step_of_adapters_moves_what_has_a_gradient(tmp_path):
    """B starts at zero, and so the gradient of A is zero: it must neither move nor make what is not finite."""
    model = adapted()
    optimizer = create_sgc_optimizer(model, lr=1e-2, weight_decay=0.0, **KWARGS["memoryless"])
    before = bits(model)
    update(model, optimizer)
    assert set(differing(before, bits(model))) == {name for name in trained(model) if "lora_B" in name}
    update(model, optimizer)
    after = trained(model)
    assert set(differing(before, bits(model))) == set(after)
    assert all(param.isfinite().all() for param in after.values())
    moved = max((after[name] - before[name]).abs().max().item() for name in after if "lora_A" in name)
    assert moved <= 3 * 1e-2  # at most |w| ≤ 3 times lr at a first update, however small its gradient


# ------------------------------------------------------------------------------------------------- who belongs where


@pytest.mark.parametrize("tied", [False, True])
def test_modules_trained_whole_beside_adapters_are_their_copies(tied):
    changed = {"ensure_weight_tying": True} if tied else {}
    model = adapted(llama(tied=tied), modules_to_save=["embed_tokens", "lm_head"], **changed)
    optimizer = create_sgc_optimizer(model, lr=1e-2, embeddings="dense", **KWARGS["memoryless"])
    copies = {name for name in names(optimizer) if "modules_to_save" in name}
    assert copies == {
        "base_model.model.model.embed_tokens.modules_to_save.default.weight",
        *([] if tied else ["base_model.model.lm_head.modules_to_save.default.weight"]),
    }
    assert not any("original_module" in name for name in names(optimizer))
    update(model, optimizer)
    inputs, head = (getattr(model, f"get_{which}_embeddings")() for which in ("input", "output"))
    inputs, head = (module.modules_to_save["default"].weight for module in (inputs, head))
    assert (inputs is head) == tied
    for weight in (inputs, head):  # the policy of embeddings is theirs
        assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_adapters_of_embeddings_follow_the_policy_of_embeddings():
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    optimizer = create_sgc_optimizer(model, embeddings="frozen")
    assert names(optimizer)
    assert all("q_proj.lora_" in name for name in names(optimizer))
    model = adapted(trainable_token_indices=[3, 4])
    optimizer = create_sgc_optimizer(model, lr=1e-2, weight_decay=0.0, **KWARGS["memoryless"])
    (tokens,) = (name for name in names(optimizer) if "token" in name)
    before = bits(model)
    update(model, optimizer)
    assert tokens in differing(before, bits(model))


def test_overrides_reach_one_side_of_all_adapters():
    """B at a rate of its own, as in LoRA+ (Hayou et al., arXiv 2402.12354)."""
    model = adapted()
    optimizer = create_sgc_optimizer(model, lr=1e-4, overrides={"lora_B": {"lr": 1.6e-3}, "layers.1": "frozen"})
    assert names(optimizer) == set(trained(model))
    assert not any("layers.1" in name for name in names(optimizer))
    for name in names(optimizer):
        assert group_of(optimizer, name)["lr"] == (1.6e-3 if "lora_B" in name else 1e-4)


def test_a_second_adapter_trains_alone():
    model = adapted()
    model.add_adapter("second", lora_config(r=4))
    model.set_adapter("second")
    optimizer = create_sgc_optimizer(model, lr=1e-2, **KWARGS["memoryless"])
    assert names(optimizer)
    assert all(".second." in name for name in names(optimizer))
    before = bits(model)
    update(model, optimizer, times=2)
    assert set(differing(before, bits(model))) == names(optimizer)


def test_what_was_trained_is_saved_and_merged_as_any_adapter(tmp_path):
    run = trainer(tmp_path, adapted(), KWARGS["sketched"])
    run.train()
    expected = loss_of(run.model.eval())
    run.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")).eval()
    assert torch.equal(loss_of(loaded), expected)
    torch.testing.assert_close(loss_of(loaded.merge_and_unload()), expected)


# ------------------------------------------------------------------------------------------- compressed gradients


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kwargs", ["compressed", "compressed sketches"])
def test_compressed_gradients_of_adapters_see_no_difference_with_checkpointing(tmp_path, kwargs, use_reentrant):
    checkpointed = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    runs = []
    for changed in ({}, checkpointed):
        model = adapted()
        if use_reentrant:
            model.enable_input_require_grads()  # without, reentrant checkpointing of a frozen base has no gradient
        runs.append(trainer(tmp_path / str(bool(changed)), model, KWARGS[kwargs], max_steps=4, **changed))
        runs[-1].train()
    assert losses(runs[0]) == losses(runs[1])
    assert not differing(*(bits(run.model) for run in runs))
    for run in runs:
        assert loss_of(run.model.eval()) < loss_of(adapted().eval())


def test_whole_gradients_of_adapters_never_pile_up():
    model = adapted(use_dora=True)
    optimizer = create_sgc_optimizer(model, lr=1e-2, **KWARGS["compressed"])
    loss_of(model).backward()
    assert all(isinstance(param.grad, CompressedGradient) for param in trained(model).values())
    assert all(param.grad is None for param in model.parameters() if not param.requires_grad)
    assert optimizer._compressor.bytes() < 0.4 * sum(4 * param.numel() for param in trained(model).values())


# ------------------------------------------------------------------------------------------------- what it holds


def test_adapters_of_a_small_model_are_kept_dense_unless_min_size_is_lowered():
    model = adapted()
    shapes = [param.shape for param in trained(model).values()]
    count = sum(map(math.prod, shapes))
    assert all(math.prod(shape) < 4096 for shape in shapes)
    by_default, smallest = (create_sgc_optimizer(model, **kwargs) for kwargs in ({}, {"min_size": 0}))
    assert by_default.expected_state_bytes() == ADAMW_BYTES * count + 4 * len(shapes)  # and the counts of steps
    assert smallest.expected_state_bytes() == 4 * sum(rows + cols + 1 for rows, cols in shapes)
    assert smallest.expected_state_bytes() < 0.08 * ADAMW_BYTES * count


def large(**changed):
    """Give a model of Llama-3-8B's shapes, without its weights, and adapters."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "tie_word_embeddings": False}
    with torch.device("meta"):
        return adapted(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), **changed)


CASES = {
    "r=16, q and v": {"r": 16, "target_modules": ["q_proj", "v_proj"]},
    "r=16": {"r": 16},
    "r=64": {"r": 64},
    "r=16, DoRA": {"r": 16, "use_dora": True},
    "r=16, embeddings and head whole": {"r": 16, "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("case", CASES)
def test_the_page_says_what_is_held_for_adapters_of_a_large_model(case):
    model = large(**CASES[case])
    count = sum(param.numel() for param in trained(model).values())
    held = [create_sgc_optimizer(model, min_size=size).expected_state_bytes() for size in (4096, 0)]
    said = re.search(rf"^\| {re.escape(case)} \|(.*)\|$", PAGE.read_text(), re.M)[1].split(" | ")
    parameters, adamw, by_default, smallest = (float(re.sub(r"[^0-9.]", "", cell)) for cell in said)
    assert parameters == round(count / 1e6, 1)
    assert adamw == round(ADAMW_BYTES * count / 1e6)
    assert by_default == round(held[0] / 1e6, 1)
    assert smallest == round(held[1] / 1e6, 1)
