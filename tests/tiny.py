"""Small models and a Trainer for them: what the tests of adapters, quantized weights and experts share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sgc.hf import SGCCallback, SGCFactory, find_sgc

VOCABULARY = 96


def llama(*, hidden=32, tied=False, layers=2):
    """Give the same small Llama at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 2}
    config = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes, **config))


def rows(count=32):
    """Give rows of eight tokens of the vocabulary's 96: there is much to learn."""
    ids = torch.randint(0, 8, (count, 12), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in ids]


def loss_of(model):
    """Give the loss on some rows, to go backward from."""
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    return model(input_ids=ids, labels=ids).loss


def trainer(folder, model, kwargs, **changed):
    """Give a Trainer of six steps with SGC and its callback."""
    fixed = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none"}
    sizes = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    args = TrainingArguments(output_dir=str(folder), **(fixed | sizes | changed))
    optimizer = (SGCFactory, {"lr": 1e-2} | kwargs)
    return Trainer(model, args, train_dataset=rows(), optimizer_cls_and_kwargs=optimizer, callbacks=[SGCCallback()])


def losses(run):
    """List the losses that a Trainer has logged."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def bits(model):
    """Copy all parameters, by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def differing(one, other):
    """Name the parameters whose bits differ."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def check_resume(folder, make_model, kwargs, *, reopen=None, **changed):
    """Hold a run that is taken up at its middle to an uninterrupted one, bit for bit; give the latter's Trainer.

    Args:
        folder: for both runs.
        make_model: gives the model both start from.
        kwargs: of SGC.
        reopen: gives the model from the checkpoint's folder, where the Trainer itself can't; default: `make_model`.
        changed: of TrainingArguments.
    """
    saved = {"save_strategy": "steps", "save_steps": 3, **changed}
    whole = trainer(folder / "whole", make_model(), kwargs, **saved)
    start = bits(whole.model)
    whole.train()
    checkpoint = str(folder / "whole" / "checkpoint-3")
    again = trainer(folder / "again", reopen(checkpoint) if reopen else make_model(), kwargs, **saved)
    again.train(resume_from_checkpoint=checkpoint)
    assert losses(again)[-3:] == losses(whole)[-3:]
    ended = bits(whole.model)
    assert not differing(ended, bits(again.model))
    trained = {name for name, param in whole.model.named_parameters() if param.requires_grad}
    assert set(differing(start, ended)) == trained
    states = [find_sgc(run.optimizer).state_dict()["state"] for run in (whole, again)]
    assert states[0].keys() == states[1].keys()
    for number, held in states[0].items():
        assert all(torch.equal(value, states[1][number][name]) for name, value in held.items())
    return whole
