"""SGC in TRL's trainers: packing, a peft_config, the callback, resume, and the lines of the page."""

import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="the extra sgc[hf] is not installed")
import peft
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgc.hf import SGCCallback, SGCFactory, create_sgc_optimizer, find_sgc
from tests.tiny import bits, differing, losses

ROOT = Path(__file__).resolve().parent.parent
LLAMA = ROOT / "recipes" / "assets" / "tiny-llama"
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # trl's own

LORA = {"task_type": "CAUSAL_LM", "r": 8, "target_modules": "all-linear"}


def model():
    return AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)


def texts():
    return Dataset.from_list([{"text": f"the {n}. number {n % 5} is not {n % 7}, said he"} for n in range(64)])


def chats():
    def turn(n):
        return [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"it is {n % 5}."}]

    return Dataset.from_list([{"messages": turn(n)} for n in range(64)])


def trainer(folder, kwargs, *, dataset=None, peft_config=None, **changed):
    fixed = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none"}
    sizes = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    args = trl.SFTConfig(output_dir=str(folder), max_length=128, **(fixed | sizes | changed))
    return trl.SFTTrainer(
        model(),
        args=args,
        train_dataset=texts() if dataset is None else dataset,
        processing_class=AutoTokenizer.from_pretrained(LLAMA),
        peft_config=peft_config,
        callbacks=[SGCCallback()],
        optimizer_cls_and_kwargs=(SGCFactory, {"lr": 1e-3} | kwargs),
    )


@pytest.mark.parametrize(
    ("kwargs", "packing", "adapters", "changed"),
    [
        ({}, True, False, {}),  # bf16 and gradient checkpointing, as TRL has them
        ({"sketch_size": 32}, True, False, {"packing_strategy": "wrapped", "bf16": False}),
        ({"compressed_gradients": True}, True, False, {"gradient_accumulation_steps": 2}),
        ({"lr": 1e-2, "min_size": 0}, True, True, {}),
        ({"lr": 1e-2, "min_size": 0, "compressed_gradients": True, "sample_every": 4}, True, True, {}),
        ({"lr": 1e-2}, False, True, {"activation_checkpointing": False}),
    ],
    ids=["whole", "sketched", "compressed", "adapters", "compressed adapters", "dense adapters"],
)
def test_sft_trainer_trains_with_sgc(tmp_path, kwargs, packing, adapters, changed):
    run = trainer(
        tmp_path, kwargs, packing=packing, peft_config=peft.LoraConfig(**LORA) if adapters else None, **changed
    )
    optimizer = run.create_optimizer()
    assert find_sgc(optimizer) is optimizer
    assert (len(run.train_dataset) < len(texts())) == packing
    trained = {name for name, param in run.model.named_parameters() if param.requires_grad}
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == trained
    assert all(("lora_" in name) == adapters for name in trained)
    before = bits(run.model)
    run.train()
    assert set(differing(before, bits(run.model))) == trained
    assert losses(run)[-1] < losses(run)[0] - 0.3
    logged = run.state.log_history[0]
    assert {"mean_token_accuracy", "sgc/state_bytes", "sgc/memory/gradients"} <= logged.keys()
    assert all(math.isfinite(entry["grad_norm"]) for entry in run.state.log_history if "grad_norm" in entry)
    whole = sum(4 * param.numel() for param in run.model.parameters() if param.requires_grad)
    held = logged["sgc/memory/gradients"]
    assert held < 0.01 * whole if "compressed_gradients" in kwargs else held == whole
    assert (tmp_path / "sgc_summary.json").exists()


def test_chats_train_on_what_the_assistant_says(tmp_path):
    run = trainer(tmp_path, {}, dataset=chats(), assistant_only_loss=False, packing=False)
    run.train()
    assert losses(run)[-1] < losses(run)[0]


def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(tmp_path):
    def make(name):
        config = peft.LoraConfig(**LORA)
        kwargs = {"lr": 1e-2, "min_size": 0, "compressed_gradients": True}
        saved = {"save_strategy": "steps", "save_steps": 3}
        return trainer(tmp_path / name, kwargs, peft_config=config, packing=True, **saved)

    whole, again = make("whole"), make("again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again)[-3:] == losses(whole)[-3:]
    assert not differing(bits(whole.model), bits(again.model))


def pairs(*columns, **more):
    """Rows of preferences, of which a trainer takes some columns."""
    row = {"prompt": "the number is", "chosen": " not seven, said he", "rejected": " four", "completion": " four"}
    return Dataset.from_list([{name: row[name] for name in columns} | more | {"n": n} for n in range(8)])


def reward(completions, **columns):
    """Prefer even lengths: two completions of a prompt seldom have the same."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


GENERATION = {"num_generations": 2, "max_completion_length": 8, "per_device_train_batch_size": 4}
PAGE = {  # by trainer: its arguments and its data
    "SFTTrainer": (trl.SFTConfig, {"max_length": 128, "packing": True}, texts),
    "DPOTrainer": (trl.DPOConfig, {}, lambda: pairs("prompt", "chosen", "rejected")),
    "KTOTrainer": (trl.KTOConfig, {}, lambda: pairs("prompt", "completion", label=True)),
    "GRPOTrainer": (trl.GRPOConfig, GENERATION, lambda: pairs("prompt")),
    "RLOOTrainer": (trl.RLOOConfig, GENERATION, lambda: pairs("prompt")),
}


def blocks():
    """Give the blocks of the page that name this test, by trainer."""
    marker = re.escape("<!-- tested: tests/test_trl.py::test_the_lines_of_the_page_train -->")
    page = (ROOT / "docs" / "integrations.md").read_text()
    found = re.findall(rf"^{marker}\n```python\n(.*?)^```$", page, re.M | re.S)
    return {re.search(r"^trainer = (\w+)", code, re.M)[1]: code for code in found}


def test_the_page_shows_every_trainer():
    assert blocks().keys() == PAGE.keys()


@pytest.mark.parametrize("kind", list(PAGE))
def test_the_lines_of_the_page_train(tmp_path, kind):
    config, more, data = PAGE[kind]
    fixed = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none"}
    fixed |= {"bf16": False, "learning_rate": 3e-4, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    args = config(output_dir=str(tmp_path), max_steps=2, save_strategy="no", **(fixed | more))
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    names = {"model": model(), "args": args, "dataset": data(), "tokenizer": tokenizer, "reward": reward}
    exec(compile(blocks()[kind], "docs/integrations.md", "exec"), names)
    run = names["trainer"]
    trained = {name: param for name, param in run.model.named_parameters() if param.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert {name for group in find_sgc(run.optimizer).param_groups for name in group["param_names"]} == trained.keys()
    assert any(param.any() for name, param in trained.items() if "lora_B" in name)  # they begin with zeros
    lr = 1e-3 if kind == "SFTTrainer" else 3e-4  # its own, or the Trainer's
    assert {group["lr"] for group in find_sgc(run.optimizer).param_groups} == {lr}


def test_an_optimizer_made_before_the_adapters_is_refused(tmp_path):
    fixed = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none"}
    whole = model()
    run = trl.DPOTrainer(
        whole,
        args=trl.DPOConfig(output_dir=str(tmp_path), max_steps=1, bf16=False, **fixed),
        train_dataset=pairs("prompt", "chosen", "rejected"),
        processing_class=AutoTokenizer.from_pretrained(LLAMA),
        peft_config=peft.LoraConfig(**LORA),
        optimizers=(create_sgc_optimizer(whole, lr=1e-3), None),
        callbacks=[SGCCallback()],
    )
    with pytest.raises(RuntimeError, match=r"peft_config.*write: trainer.optimizer_cls_and_kwargs = \(SGCFactory"):
        run.train()
