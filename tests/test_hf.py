"""SGC in Hugging Face's Trainer: groups, reports, and a resumed run that ends in the same bits."""

import gc
import importlib
import json
import logging
import math
import shutil
import sys
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the extra sgc[hf] is not installed")
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sgc import SGC, hf
from sgc.hf import SGCCallback, SGCFactory, create_sgc_optimizer, groups, measures
from tests.pairwise import named, pairwise

SKETCHED = {"sketch_size": 16, "chunk_size": 64, "min_size": 64}


def llama(*, tied=True, layers=1, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=96, max_position_embeddings=32, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config).to(dtype)


def bert():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    return BertForSequenceClassification(BertConfig(vocab_size=96, max_position_embeddings=32, **sizes))


def rows(count=32):
    ids = torch.randint(0, 8, (count, 12), generator=torch.Generator().manual_seed(7))  # of 96: there is much to learn
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **changed):
    fixed = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none"}
    sizes = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **(fixed | sizes | changed))


def trainer(folder, model=None, *, kwargs=None, make=SGCFactory, callbacks=None, **changed):
    model = llama() if model is None else model
    optimizer = (make, {"lr": 1e-3} | (SKETCHED if kwargs is None else kwargs))
    return Trainer(
        model,
        arguments(folder, **changed),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=optimizer,
        callbacks=callbacks,
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def names(optimizer):
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def group_of(optimizer, name):
    return next(group for group in optimizer.param_groups if name in group["param_names"])


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "sgc"]


# ---------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("model", [llama(), llama(tied=False), bert()], ids=["llama, tied", "llama", "bert"])
def test_what_decays_is_what_decays_in_trainer(model):
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    optimizer = create_sgc_optimizer(model, weight_decay=0.1)
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            assert group["weight_decay"] == (0.1 if name in decaying else 0.0), name
    assert sorted(names(optimizer)) == sorted(name for name, _ in model.named_parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_frozen_parameters_are_left_out_and_tied_ones_taken_once():
    model = llama()
    model.model.layers.requires_grad_(False)
    optimizer = create_sgc_optimizer(model)
    assert names(optimizer) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_of_which_nothing_is_trained_is_refused():
    with pytest.raises(ValueError, match="no parameter to train: none requires a gradient"):
        create_sgc_optimizer(llama().requires_grad_(False))


def test_groups_come_in_one_order_whatever_the_seed_of_hashing():
    overrides = {"lm_head": {"sketch_size": 8}, "q_proj": {"lr": 1e-4}, "model.layers.1": "dense"}
    first, second = (create_sgc_optimizer(llama(tied=False, layers=2), overrides=overrides) for _ in range(2))
    assert names(first) == names(second)
    assert "lr" not in overrides["lm_head"]  # what the user gave is not changed
    heads = [group["param_names"][0] for group in first.param_groups]
    assert heads == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_are_compressed_unless_told_otherwise(tied):
    def held(embeddings):
        model = llama(tied=tied)
        optimizer = create_sgc_optimizer(model, embeddings=embeddings, **SKETCHED)
        model(**{key: row[None] for key, row in rows(1)[0].items()}).loss.backward()
        optimizer.step()
        state = {name: set(optimizer.state[param]) for name, param in model.named_parameters() if param.requires_grad}
        return {name: found for name, found in state.items() if name in ("model.embed_tokens.weight", "lm_head.weight")}

    known = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert held("compressed") == {name: {"step", "row", "col", "sketch"} for name in known}
    assert held("dense") == {name: {"step", "exp_avg", "exp_avg_sq"} for name in known}
    assert held("frozen") == {}


def test_frozen_embeddings_get_no_gradient():
    model = llama(tied=False)
    optimizer = create_sgc_optimizer(model, embeddings="frozen")
    model(**{key: row[None] for key, row in rows(1)[0].items()}).loss.backward()
    assert model.model.embed_tokens.weight.grad is None
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(names(optimizer))


def test_embeddings_of_a_model_that_is_not_of_transformers_are_found():
    model = nn.Sequential(nn.Embedding(512, 16), nn.Linear(16, 16))
    optimizer = create_sgc_optimizer(model, embeddings="frozen")
    assert names(optimizer) == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("key", "matched"),
    [
        ("lm_head", {"lm_head.weight"}),
        ("model.layers.1.mlp", {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}),
        ("q_proj", {f"model.layers.{number}.self_attn.q_proj.weight" for number in range(2)}),
        ("layers.1.*.q_proj", {"model.layers.1.self_attn.q_proj.weight"}),
        ("post*norm", {f"model.layers.{number}.post_attention_layernorm.weight" for number in range(2)}),
        ("model.norm.weight", {"model.norm.weight"}),
    ],
)
def test_a_key_names_a_module_its_last_parts_or_a_pattern_and_all_below(key, matched):
    optimizer = create_sgc_optimizer(llama(tied=False, layers=2), overrides={key: {"lr": 0.5}})
    found = {name for group in optimizer.param_groups if group["lr"] == 0.5 for name in group["param_names"]}
    assert found == matched


def test_the_longest_match_wins_and_shorter_ones_hold_for_the_rest():
    overrides = {
        "model": {"lr": 0.1, "seed": 1},
        "model.layers.0.mlp": {"lr": 0.2},
        "mlp": {"lr": 0.3, "eps": 1e-6},
        "model.layers.1": "frozen",
        "model.layers.1.mlp.up_proj": "compressed",
        "lm_head": {"sketch_size": 32},
    }
    model = llama(tied=False, layers=2)
    optimizer = create_sgc_optimizer(model, embeddings="dense", min_size=64, overrides=overrides)
    embed, up, later = (
        group_of(optimizer, f"model.{name}.weight")
        for name in ("embed_tokens", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj")
    )
    assert (embed["lr"], embed["seed"], embed["min_size"]) == (0.1, 1, groups.DENSE)
    assert (up["lr"], up["eps"], up["seed"]) == (0.2, 1e-6, 1)
    assert later["lr"] == 0.3
    assert [name for name in names(optimizer) if "layers.1" in name] == ["model.layers.1.mlp.up_proj.weight"]
    head = group_of(optimizer, "lm_head.weight")
    assert (head["sketch_size"], head["min_size"]) == (32, 64)  # a sketch is asked for, so it is dense no more


def test_a_learning_rate_alone_leaves_a_dense_head_dense():
    optimizer = create_sgc_optimizer(llama(tied=False), embeddings="dense", overrides={"lm_head": {"lr": 0.5}})
    assert group_of(optimizer, "lm_head.weight")["min_size"] == groups.DENSE
    optimizer = create_sgc_optimizer(llama(tied=False), embeddings="dense", overrides={"lm_head": "compressed"})
    assert group_of(optimizer, "lm_head.weight")["min_size"] == 4096


def test_a_tied_weight_is_known_by_both_names():
    optimizer = create_sgc_optimizer(llama(tied=True), overrides={"lm_head": {"sketch_size": 32}})
    assert group_of(optimizer, "model.embed_tokens.weight")["sketch_size"] == 32
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight and lm_head.weight are one tied tensor"):
        create_sgc_optimizer(llama(tied=True), overrides={"lm_head": {"lr": 1.0}, "embed_tokens": {"lr": 2.0}})


def test_a_decay_of_a_module_is_not_for_its_biases():
    optimizer = create_sgc_optimizer(bert(), overrides={"classifier": {"weight_decay": 0.5}})
    assert group_of(optimizer, "classifier.weight")["weight_decay"] == 0.5
    assert group_of(optimizer, "classifier.bias")["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("override", "error", "sentence"),
    [
        ({"lm_haed": {}}, ValueError, r"'lm_haed'\] matches no module of the model; the nearest are .*lm_head"),
        ({"k_prj": {}}, ValueError, "the nearest are .*self_attn.k_proj"),
        ({"": {}}, ValueError, "matches no module"),
        ({"norm": {"sketchsize": 8}}, ValueError, "no argument of SGC: 'sketchsize'; did you mean 'sketch_size'"),
        ({"norm": "compress"}, ValueError, "must be a dict or one of compressed, dense, frozen, got 'compress'"),
        ({"norm": 32}, TypeError, "must be a dict or one of compressed, dense, frozen, got 32"),
        ({"norm": {"weight_decay": 0.1}}, ValueError, "biases and norms, which do not decay"),
        ({"model.layers.0": {"lr": 1.0}}, ValueError, "must name parameters that are trained, all 9 are frozen"),
        ({"lm_head": {"sketch_size": 8}}, ValueError, "must name parameters that are trained, all 1 are frozen"),
    ],
)
def test_an_override_that_can_not_be_meant_is_refused_with_a_sentence(override, error, sentence):
    model = llama(tied=False, layers=2)
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(error, match=sentence):
        create_sgc_optimizer(model, embeddings="frozen", overrides=override)
    assert model.lm_head.weight.requires_grad  # the model is left alone


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"embeddings": 3}, "embeddings must be one of compressed, dense, frozen, got 3"),
        ({"embeddings": "sparse"}, "embeddings must be one of compressed, dense, frozen, got 'sparse'"),
        ({"sketch_size": -1}, "sketch_size must not be negative, got -1"),
        ({"compressed_gradients": True, "sparsity": 4, "min_size": 64}, "set sketch_size"),
        ({"sample_every": 4}, "set compressed_gradients=True"),
        ({"compressed_gradients": "no"}, "compressed_gradients must be True or False, got 'no'"),
        ({"compressed_gradients": True, "sample_every": True}, "sample_every must be a whole number or None, got True"),
        ({"overrides": ["layers"]}, r"overrides must be a dict, by the names of modules, got \['layers'\]"),
        ({"overrides": {1: "dense"}}, "overrides must be a dict, by the names of modules, got the key 1"),
        ({"overrides": {"layers": None}}, r"overrides\['layers'\] must be a dict or one of .* got None"),
        ({"compressed_gradients": True, "sample_every": 0, "min_size": 64}, "at least 1, got 0"),
    ],
)
def test_arguments_that_can_not_be_meant_are_refused_with_a_sentence(kwargs, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        create_sgc_optimizer(llama(), **kwargs)


def test_without_transformers_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "sgc.hf")
    with pytest.raises(ImportError, match=r'sgc.hf needs transformers: pip install "sgc\[hf\]"'):
        importlib.import_module("sgc.hf")


# --------------------------------------------------------------------------------------------------------- Trainer


def test_the_factory_the_class_and_a_ready_optimizer_train_alike(tmp_path):
    kwargs = {**SKETCHED, "weight_decay": 0.1}
    by_factory = trainer(tmp_path / "factory", kwargs=kwargs, max_steps=8, learning_rate=1e-3)
    by_class = trainer(tmp_path / "class", make=SGC, kwargs=SKETCHED, max_steps=8, weight_decay=0.1, learning_rate=1e-3)
    model = llama()
    ready = Trainer(
        model,
        arguments(tmp_path / "ready", max_steps=8),
        train_dataset=rows(),
        optimizers=(create_sgc_optimizer(model, lr=1e-3, **kwargs), None),
    )
    for run in (by_factory, by_class, ready):
        run.train()
        assert isinstance(hf.find_sgc(run.optimizer), SGC)
    assert losses(by_factory) == losses(by_class) == losses(ready)
    assert losses(ready)[-1] < losses(ready)[0] - 0.01


def test_the_schedule_scales_every_learning_rate_from_its_own_start(tmp_path):
    kwargs = {"overrides": {"lm_head": {"lr": 1e-2}}}
    run = trainer(tmp_path, llama(tied=False), kwargs=kwargs, max_steps=4, lr_scheduler_type="linear", warmup_steps=2)
    seen = []

    class Seen(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
            seen.append([group["lr"] for group in optimizer.param_groups])

    run.add_callback(Seen())
    run.train()
    share = [0, 0.5, 1, 0.5]  # two steps up, two down
    assert seen == [[pytest.approx(s * lr) for lr in (1e-3, 1e-3, 1e-2)] for s in share]
    assert [entry["learning_rate"] for entry in run.state.log_history[:-1]] == [pytest.approx(s * 1e-3) for s in share]


# ---------------------------------------------------------------------------------------------------------- resume

FACTORS = {
    "rule": ["residual", "whitened", "sketched", "subspace", "memoryless"],
    "dtype": [torch.float32, torch.bfloat16],
    "state_dtype": ["float32", "bfloat16", "int8"],
    "rank": [None, 4],
    "compressed": [False, True],
    "accumulation": [1, 2],
    "clip": [0.0, 0.1],
}


def possible(case):
    return not (case["compressed"] and case["rank"])


@pytest.mark.parametrize("case", pairwise(FACTORS, possible), ids=named)
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(tmp_path, case):
    if case["state_dtype"] == "int8":
        pytest.importorskip("bitsandbytes", reason="int8 sketches need bitsandbytes")
    memoryless = case["rule"] == "memoryless"
    kwargs = {
        **SKETCHED,
        "sketch_size": 0 if memoryless else 16,
        "moments": "residual" if memoryless else case["rule"],
        "state_dtype": case["state_dtype"],
        "rank": case["rank"],
        "refresh_every": 3,
        "compressed_gradients": case["compressed"],
        "overrides": {"q_proj": {"lr": 3e-3}},
    }
    changed = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": case["accumulation"],
        "max_grad_norm": case["clip"],
        "lr_scheduler_type": "cosine",
    }

    whole = trainer(tmp_path, llama(dtype=case["dtype"]), kwargs=kwargs, **changed)
    whole.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["param_names"] == hf.find_sgc(whole.optimizer).param_groups[0]["param_names"]
    resumed = trainer(tmp_path, llama(dtype=case["dtype"], seed=1), kwargs=kwargs, **changed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    left, right = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    left, right = (hf.find_sgc(run.optimizer).state_dict() for run in (whole, resumed))
    assert left["param_groups"] == right["param_groups"]
    for number, held in left["state"].items():
        assert held.keys() == right["state"][number].keys()
        assert all(torch.equal(held[name], right["state"][number][name]) for name in held)
    assert losses(whole) == losses(resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loop_with_accelerate_resumes_bit_for_bit(tmp_path, dtype):
    def stepped(model, optimizer, accelerator, batches):
        for batch in batches:
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

    def prepared(seed):
        model, accelerator = llama(dtype=dtype, seed=seed), Accelerator(cpu=True)
        optimizer = create_sgc_optimizer(model, lr=1e-2, **SKETCHED)
        return (*accelerator.prepare(model, optimizer), accelerator)

    batches = [{name: row[None] for name, row in pair.items()} for pair in rows(6)]
    whole = prepared(seed=0)
    stepped(*whole, batches[:3])
    whole[2].save_state(str(tmp_path))
    stepped(*whole, batches[3:])
    resumed = prepared(seed=1)
    resumed[2].load_state(str(tmp_path))
    stepped(*resumed, batches[3:])
    assert all(map(torch.equal, whole[0].parameters(), resumed[0].parameters()))


# -------------------------------------------------------------------------------------------------------- callback


def scalars(folder):
    (events,) = folder.glob("runs/*/events*")
    reader = EventAccumulator(str(events)).Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_gets_the_numbers_of_every_log(tmp_path):
    run = trainer(tmp_path, callbacks=[SGCCallback()], report_to="tensorboard", max_steps=20, logging_steps=10)
    run.train()
    found, optimizer = scalars(tmp_path), hf.find_sgc(run.optimizer)
    held = [value for _, value in found["train/sgc/memory/optimizer_state"]]
    assert held == [value for _, value in found["train/sgc/state_bytes"]]
    assert held[-1] == optimizer.state_bytes()
    assert [step for step, _ in found["train/sgc/recovery_error"]] == [10, 20]
    weights = sum(param.nbytes for param in run.model.parameters())
    assert {value for _, value in found["train/sgc/memory/weights"]} == {weights}
    assert {value for _, value in found["train/sgc/memory/gradients"]} == {weights}
    assert all(value > 0 for _, value in found["train/sgc/memory/activations"])
    for entry in run.state.log_history[:2]:  # what trainer_state.json keeps
        for tag in found:
            name = tag.removeprefix("train/")
            if name in entry:
                assert (entry["step"], pytest.approx(entry[name], rel=1e-6)) in found[tag]
    assert {f"sgc/{name}" for name in optimizer.stats()} <= run.state.log_history[1].keys()


def test_what_has_not_been_seen_is_not_logged(tmp_path):
    run = trainer(tmp_path, kwargs={}, callbacks=[SGCCallback()])
    run.train()
    logged = run.state.log_history[0]
    assert "sgc/state_bytes" in logged
    assert "sgc/recovery_error" not in logged  # there is no sketch
    assert all(math.isfinite(value) for value in logged.values())


def test_reporting_changes_no_bit_of_training(tmp_path):
    plain, reported = (trainer(tmp_path / str(len(c)), callbacks=c) for c in ([], [SGCCallback()]))
    plain.train()
    reported.train()
    assert losses(plain) == losses(reported)
    assert all(map(torch.equal, plain.model.parameters(), reported.model.parameters()))


def test_activations_on_a_cpu_are_what_forward_saves_for_backward():
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
    meter = measures.SavedForBackward(model)
    meter.arm()
    model.eval()(torch.zeros(50, 24))
    model.train()(torch.zeros(5, 24)).sum().backward()
    assert meter.bytes == 4 * 5 * (24 + 40)  # the inputs of both layers; the second is also what ReLU saves
    model(torch.zeros(500, 24))
    assert meter.bytes == 4 * 5 * (24 + 40)  # only when it is armed
    assert "forward" not in vars(model)


class Failing(LlamaForCausalLM):
    """A model whose forward pass fails when it is told to."""

    fails = None

    def forward(self, *args, **kwargs):
        if self.training and self.fails is not None:
            error, type(self).fails = self.fails, None
            raise error
        return super().forward(*args, **kwargs)


class Fails(TrainerCallback):
    """Raises at one event of the second step, once."""

    def __init__(self, event, error):
        setattr(self, event, self.fail)
        self.error = error

    def fail(self, args, state, control, **kwargs):
        if self.error is not None and state.global_step:
            error, self.error = self.error, None
            raise error


def left_on(model):
    """All that a callback could have left: hooks, attributes, and what sees the tensors that autograd saves."""
    kept = [len(getattr(module, name)) for module in model.modules() for name in vars(module) if "_hooks" in name]
    return kept, "forward" in vars(model), torch._C._autograd._top_saved_tensors_default_hooks(False)


EVENTS = ["on_step_begin", "forward", "on_log"]


@pytest.mark.parametrize(
    ("another", "error"), [(False, KeyboardInterrupt()), (True, MemoryError())], ids=["same", "another"]
)
def test_a_run_that_fails_leaves_nothing_on_the_model_wherever_it_fails(tmp_path, another, error):
    model = llama()
    model.__class__ = Failing
    before = left_on(model)
    for event in EVENTS:
        fails = [] if event == "forward" else [Fails(event, error)]
        Failing.fails = error if event == "forward" else None
        changed = {"max_steps": 3, "remove_unused_columns": False}
        run = trainer(tmp_path, model, callbacks=[*fails, SGCCallback()], **changed)
        with pytest.raises(type(error)):
            run.train()
        if event != "on_step_begin":  # what is set up there waits for the forward pass
            assert left_on(model) == before, event
        if another:
            run = trainer(tmp_path, model, callbacks=[SGCCallback()], **changed)
        run.train()
        assert left_on(model) == before, event
        assert run.state.log_history[0]["sgc/memory/activations"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator, whose allocator counts")
def test_activations_on_an_accelerator_grow_with_the_batch(tmp_path):
    def activations(size):
        changed = {"use_cpu": False, "max_steps": 2, "per_device_train_batch_size": size}
        run = trainer(tmp_path / str(size), llama(layers=4), callbacks=[SGCCallback()], **changed)
        run.train()
        return run.state.log_history[1]["sgc/memory/activations"]

    assert activations(32) > 2 * activations(4)


def test_gradient_checkpointing_shows_in_the_activations(tmp_path):
    def activations(folder, **changed):
        run = trainer(folder, llama(layers=4), callbacks=[SGCCallback()], max_steps=1, **changed)
        run.train()
        return run.state.log_history[0]["sgc/memory/activations"]

    checkpointed = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    assert activations(tmp_path / "less", **checkpointed) < 0.5 * activations(tmp_path / "more")


def test_the_optimizer_is_found_inside_its_wrappers():
    model = llama()
    optimizer = create_sgc_optimizer(model)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert wrapped is not optimizer
    assert hf.find_sgc(wrapped) is optimizer

    class Wrapper:
        pass

    outer = Wrapper()
    outer.optimizer = wrapped
    assert hf.find_sgc(outer) is optimizer
    outer.optimizer = outer
    assert hf.find_sgc(outer) is None
    assert hf.find_sgc(None) is None


def test_an_optimizer_that_is_not_sgc_is_said_in_one_sentence(tmp_path, caplog):
    run = trainer(tmp_path, make=torch.optim.SGD, kwargs={}, callbacks=[SGCCallback()])
    run.train()
    (said,) = messages(caplog)
    assert said.startswith("SGCCallback reports nothing: the optimizer of this Trainer is no SGC")
    assert not (tmp_path / "sgc_summary.json").exists()


def test_the_summary_says_what_was_held_and_with_which_arguments(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="sgc")
    kwargs = {**SKETCHED, "overrides": {"lm_head": {"sketch_size": 32}}}
    run = trainer(tmp_path, llama(tied=False), kwargs=kwargs, callbacks=[SGCCallback()], max_steps=10)
    run.train()
    found = json.loads((tmp_path / "sgc_summary.json").read_text(), parse_constant=pytest.fail)
    optimizer = hf.find_sgc(run.optimizer)
    assert found["steps"] == 10
    assert found["state_bytes"] == optimizer.state_bytes() == found["memory"]["optimizer_state"]
    assert found["parameters"] == run.model.num_parameters() == sum(group["parameters"] for group in found["groups"])
    assert found["compression_ratio"] == found["state_bytes"] / found["adamw_state_bytes"]
    assert sum(found["state_share"].values()) == pytest.approx(1)
    sketches = sum(held["sketch"].nbytes for held in optimizer.state.values() if "sketch" in held)
    assert found["state_share"]["sketches"] == sketches / found["state_bytes"]
    assert found["peak_memory_bytes"] > found["memory"]["weights"]
    assert found["skipped_tensors"] == 0
    (head,) = (group for group in found["groups"] if "lm_head.weight" in group["names"])
    assert (head["sketch_size"], head["initial_lr"], head["lr"]) == (32, 1e-3, 0.0)
    assert any("SGC, 10 steps" in said and "sketches" in said for said in messages(caplog))


def test_a_run_that_was_over_leaves_the_summary_and_says_of_gradients_that_none_were_seen(tmp_path, caplog):
    run = trainer(tmp_path, callbacks=[SGCCallback()], max_steps=2)
    run.train()
    path = tmp_path / "sgc_summary.json"
    written = path.read_bytes()

    def resume_after_the_last_step():
        handler = run.callback_handler
        handler.on_train_begin(run.args, run.state, run.control)
        handler.on_train_end(run.args, run.state, run.control)

    resume_after_the_last_step()
    assert path.read_bytes() == written
    path.unlink()
    resume_after_the_last_step()
    assert json.loads(path.read_text())["memory"]["gradients"] is None
    path.unlink()
    path.mkdir()
    run.train()  # what was trained is not lost for it
    assert messages(caplog)[-1] == f"{path} can't be written: Is a directory"


def test_a_summary_that_can_not_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "sgc_summary.json"
    measures.write_json(path, {"steps": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        measures.write_json(path, {"steps": math.nan})
    assert json.loads(path.read_text()) == {"steps": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["sgc_summary.json"]


def test_gradients_that_are_not_finite_are_said_once_and_counted(tmp_path, caplog):
    model = llama()
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    run = trainer(tmp_path, model, callbacks=[SGCCallback()], max_steps=12, max_grad_norm=0)
    run.train()
    (said,) = messages(caplog)
    tensors = len(list(model.parameters()))  # the Trainer's clipping, asked for or not, spreads what is not finite
    assert said.startswith(f"{10 * tensors} gradients were not finite up to step 10: their tensors are left as they")
    assert json.loads((tmp_path / "sgc_summary.json").read_text())["skipped_tensors"] == 12 * tensors
    assert run.state.log_history[11]["sgc/skipped_tensors"] == 12 * tensors


@pytest.mark.parametrize(
    ("kwargs", "fails"),
    [({"sketch_size": 32, "chunk_size": 128}, False), ({"sketch_size": 16, "sparsity": 4, "chunk_size": 1024}, True)],
    ids=["healthy", "far below the bound"],
)
def test_recovery_that_finds_next_to_nothing_is_said_once(tmp_path, caplog, kwargs, fails):
    run = trainer(
        tmp_path, kwargs={**kwargs, "min_size": 64}, callbacks=[SGCCallback()], max_steps=70, logging_steps=70
    )
    run.train()
    said = [message for message in messages(caplog) if "recovery" in message]
    assert len(said) == fails
    assert all("recovery finds next to nothing" in message and "raise sketch_size=16" in message for message in said)


def test_noise_leaves_less_unexplained_the_more_entries_explain_it():
    def left(**kwargs):
        (group,) = SGC([torch.zeros(256, 256)], **kwargs).param_groups
        return measures.noise_error(group)

    assert left(sketch_size=0) == 0.0
    assert left(sketch_size=256) == 0.0  # nothing is recovered, the chunk is held
    assert (
        0 < left(sketch_size=32, sparsity=8) < left(sketch_size=32, sparsity=4) < left(sketch_size=64, sparsity=4) < 1
    )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("sketched", [True, False])
def test_with_compressed_gradients_the_norm_is_reported_and_no_gradient_held(tmp_path, accumulation, sketched):
    changed = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 1e9, "callbacks": [SGCCallback()]}
    kwargs = SKETCHED if sketched else {"min_size": 64}
    compressed = {"compressed_gradients": True, **({} if sketched else {"sample_every": 1})}
    hooked = trainer(tmp_path / "hooked", kwargs={**kwargs, **compressed}, **changed)
    hooked.train()
    plain = trainer(tmp_path / "plain", kwargs=kwargs, **changed)
    plain.train()
    norms = [[entry["grad_norm"] for entry in run.state.log_history[:4]] for run in (hooked, plain)]
    if accumulation == 1:
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        assert losses(hooked) == losses(plain)
    assert min(norms[0]) > 0
    held = [run.state.log_history[0]["sgc/memory/gradients"] for run in (hooked, plain)]
    assert held[0] < 0.05 * held[1]  # the norms' alone
    first = hooked.state.log_history[0]
    sums = hf.find_sgc(hooked.optimizer)._compressor.most_bytes()
    assert first["sgc/memory/optimizer_state"] == first["sgc/state_bytes"] + sums


class Wrapper(nn.Module):
    """Names parameters as DistributedDataParallel and torch.compile do."""

    def __init__(self, model):
        super().__init__()
        self.module = nn.ModuleDict({"_orig_mod": model})


def test_an_optimizer_that_holds_nothing_of_what_the_model_trains_is_refused_before_the_first_step(tmp_path):
    for trained, made_for in ((llama(), llama()), (llama(), llama(seed=1)), (llama().requires_grad_(False), llama())):
        before = [param.detach().clone() for param in trained.parameters()]
        optimizers = (create_sgc_optimizer(made_for, lr=1e-2), None)
        run = Trainer(
            trained, arguments(tmp_path), train_dataset=rows(), optimizers=optimizers, callbacks=[SGCCallback()]
        )
        with pytest.raises(RuntimeError, match=r"trainer.optimizer_cls_and_kwargs = \(SGCFactory, {\"lr\": 0.01}\)"):
            run.train()
        assert all(map(torch.equal, before, trained.parameters()))


def test_what_the_optimizer_leaves_out_is_named_and_what_is_frozen_is_not(tmp_path, caplog):
    model = llama(tied=False)
    optimizer = SGC([*model.model.layers.parameters(), model.model.embed_tokens.weight])
    model.model.embed_tokens.requires_grad_(False)
    assert hf.left_out(optimizer, model) == ["model.norm.weight", "lm_head.weight"]
    run = Trainer(
        model, arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None), callbacks=[SGCCallback()]
    )
    run.train()
    assert messages(caplog) == [
        "2 tensors that require a gradient are not the optimizer's, and stay: model.norm.weight, lm_head.weight"
    ]


def test_where_a_harness_has_replaced_the_tensors_names_decide():
    def replaced(model):
        optimizer = create_sgc_optimizer(model)
        for group in optimizer.param_groups:
            group["params"] = [nn.Parameter(param.detach().flatten()) for param in group["params"]]
        return optimizer

    assert hf.left_out(replaced(llama()), Wrapper(llama(seed=1))) == []
    with pytest.raises(RuntimeError, match="holds none of the 2 tensors"):
        hf.left_out(replaced(llama()), nn.Linear(4, 4))


def rates(run):
    (lr,) = {group["initial_lr"] for group in hf.find_sgc(run.optimizer).param_groups}
    return lr, max(group["weight_decay"] for group in hf.find_sgc(run.optimizer).param_groups)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, (3e-4, 0.3)),
        ({"weight_decay": 0.2}, (3e-4, 0.2)),
        ({"lr": 2e-3}, (2e-3, 0.01)),  # who sets one has rates of their own
        ({"lr": 2e-3, "weight_decay": 0.2}, (2e-3, 0.2)),
    ],
    ids=str,
)
def test_without_a_rate_of_its_own_the_factory_takes_those_of_the_trainer(tmp_path, own, expected):
    given = {"learning_rate": 3e-4, "weight_decay": 0.3, "max_steps": 1}
    run = Trainer(
        llama(),
        arguments(tmp_path, **given),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(SGCFactory, own),
        callbacks=[SGCCallback()],
    )
    run.train()
    assert rates(run) == expected


def test_every_trainer_has_its_own_rates_and_is_not_kept(tmp_path):
    model = llama()
    first, second, fresh = (
        Trainer(
            *((model,) if fresh is None else ()),
            args=arguments(tmp_path, max_steps=1, learning_rate=lr),
            model_init=fresh,
            train_dataset=rows(),
            optimizer_cls_and_kwargs=(SGCFactory, {}),
            callbacks=[SGCCallback()],
        )
        for lr, fresh in ((3e-4, None), (4e-4, None), (5e-4, lambda: llama()))
    )
    for run in (first, second, fresh):
        run.train()
    assert [rates(run)[0] for run in (first, second, fresh)] == [3e-4, 4e-4, 5e-4]
    gone = weakref.ref(first), weakref.ref(first.optimizer)
    del run, first
    gc.collect()
    assert [left() for left in gone] == [None, None]


def test_without_a_rate_and_without_a_trainer_that_has_the_callback_the_factory_refuses(tmp_path):
    run = Trainer(
        llama(), arguments(tmp_path), train_dataset=rows(), optimizer_cls_and_kwargs=(SGCFactory, {"sketch_size": 16})
    )
    for make in (run.train, lambda: SGCFactory()(llama())):
        with pytest.raises(ValueError, match=r"SGCFactory needs a learning rate, as in .* or add SGCCallback\(\)"):
            make()


@pytest.mark.parametrize(
    "lacks", [["optimizer.pt"], ["scheduler.pt"], ["optimizer.pt", "scheduler.pt", "rng_state.pth"], []], ids=str
)
@pytest.mark.parametrize("again", [False, True], ids=["another Trainer", "the same"])
def test_a_checkpoint_of_which_the_optimizer_loads_nothing_is_said(checkpoint, tmp_path, caplog, lacks, again):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    for name in lacks:
        (folder / name).unlink()
    run = trainer(tmp_path, callbacks=[SGCCallback()], max_steps=3)
    if again:
        run.train()
    caplog.clear()
    run.train(resume_from_checkpoint=str(folder))
    said = messages(caplog)
    assert len(said) == bool(lacks)
    assert all("goes on at step 2, but the optimizer has loaded no state and begins anew" in one for one in said)


def test_a_checkpoint_of_another_optimizer_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    model = llama()
    groups = [[p for p in model.parameters() if (p.dim() > 1) == decays] for decays in (True, False)]
    torch.save(torch.optim.AdamW([{"params": group} for group in groups]).state_dict(), folder / "optimizer.pt")
    run = trainer(tmp_path, callbacks=[SGCCallback()], max_steps=3)
    with pytest.raises(ValueError, match="not one of SGC's"):
        run.train(resume_from_checkpoint=str(folder))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder, max_steps=2, save_strategy="steps", save_steps=2).train()
    return folder / "checkpoint-2"


def test_arguments_of_the_trainer_that_do_not_reach_sgc_are_said(tmp_path, caplog):
    trainer(tmp_path, callbacks=[SGCCallback()], max_steps=1, weight_decay=0.3, learning_rate=2e-4).train()
    assert messages(caplog) == [
        "TrainingArguments has learning_rate=0.0002, which does not reach SGC: it was made with lr=0.001",
        "TrainingArguments has weight_decay=0.3, which does not reach SGC: it was made with weight_decay=0.01",
    ]
    caplog.clear()
    kwargs = {"lr": 2e-4, "weight_decay": 0.3}
    trainer(
        tmp_path, kwargs=kwargs, callbacks=[SGCCallback()], max_steps=1, weight_decay=0.3, learning_rate=2e-4
    ).train()
    assert messages(caplog) == []
