"""SGC beside bitsandbytes: adapters over 4-bit weights (QLoRA), and sketches held in 8 bits."""

import pytest
import torch

pytest.importorskip("transformers", reason="the extra sgc[hf] is not installed")
pytest.importorskip("peft", reason="the extra sgc[hf] is not installed")
pytest.importorskip("bitsandbytes", reason="the extra sgc[bnb] is not installed")
import peft
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sgc.budget import probe_bytes
from sgc.hf import create_sgc_optimizer, find_sgc
from tests.tiny import bits, check_resume, differing, llama, loss_of, losses, trainer

EIGHT_BITS = {"sketch_size": 32, "chunk_size": 128, "min_size": 0, "state_dtype": "int8"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Give a function that gives a model with adapters over 4-bit weights, the same at every call."""
    folder = tmp_path_factory.mktemp("base")
    llama(hidden=64).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def make(checkpointing=False, **changed):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # it would not go backward after an evaluation
                module.support_avx512bf16_for_cpu = False
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        lora = {"task_type": "CAUSAL_LM", "r": 8, "target_modules": "all-linear"} | changed
        return peft.get_peft_model(model, peft.LoraConfig(**lora))

    return make


def names(optimizer):
    return {name for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize(
    ("kwargs", "changed"),
    [
        ({"min_size": 0}, {}),
        (EIGHT_BITS, {"gradient_accumulation_steps": 2}),
        ({"min_size": 0, "compressed_gradients": True}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
    ],
    ids=["memoryless", "int8", "compressed"],
)
def test_qlora_learns_and_resumes_in_the_bits_of_an_uninterrupted_run(tmp_path, quantized, kwargs, changed):
    run = check_resume(tmp_path, quantized, kwargs, **changed)
    kinds = {type(module).__name__ for module in run.model.modules()}
    assert "Linear4bit" in kinds
    assert {param.dtype for param in run.model.parameters() if not param.requires_grad} >= {torch.uint8}
    assert names(find_sgc(run.optimizer)) == {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert losses(run)[-1] < losses(run)[0]


def test_compressed_gradients_over_4_bits_see_no_difference_with_checkpointing(quantized):
    results = []
    for checkpointing in (False, True):
        model = quantized(checkpointing)
        optimizer = create_sgc_optimizer(model, lr=1e-2, min_size=0, compressed_gradients=True)
        before = bits(model)
        for _ in range(3):
            loss_of(model.train()).backward()
            optimizer.step()
            model.zero_grad()
        assert differing(before, bits(model))
        results.append(bits(model))
    assert not differing(*results)


def test_modules_trained_whole_beside_4_bit_weights_are_compressed(quantized):
    model = quantized(modules_to_save=["lm_head"])
    optimizer = create_sgc_optimizer(model, lr=1e-2)
    (head,) = (param for name, param in model.named_parameters() if "lm_head.modules_to_save" in name)
    assert head.is_floating_point()
    loss_of(model).backward()
    optimizer.step()
    assert set(optimizer.state[head]) == {"step", "row", "col"}


def test_sketches_in_8_bits_hold_a_quarter_and_learn(tmp_path):
    held, ended = {}, {}
    for state_dtype in ("float32", "int8"):
        kwargs = {**EIGHT_BITS, "state_dtype": state_dtype}
        run = trainer(tmp_path / state_dtype, llama(hidden=64), kwargs, max_steps=12, save_strategy="steps")
        run.train()
        optimizer = find_sgc(run.optimizer)
        expected = optimizer.expected_state_bytes()
        assert expected <= optimizer.state_bytes() <= expected + sum(map(probe_bytes, optimizer.param_groups))
        held[state_dtype] = sum(
            value.nbytes for state in optimizer.state.values() for name, value in state.items() if "sketch" in name
        )
        ended[state_dtype] = losses(run)
        saved = torch.load(tmp_path / state_dtype / "checkpoint-12" / "optimizer.pt", weights_only=True)
        dtypes = {state["sketch"].dtype for state in saved["state"].values() if "sketch" in state}
        assert dtypes == {torch.uint8 if state_dtype == "int8" else torch.float32}
    assert held["int8"] == pytest.approx(held["float32"] * (1 / 4 + 1 / 256), rel=0.02)  # and an fp32 for every 256
    assert ended["int8"][-1] < 0.8 * ended["int8"][0]
    fallen = {name: values[0] - values[-1] for name, values in ended.items()}
    assert fallen["int8"] == pytest.approx(fallen["float32"], rel=0.1)
