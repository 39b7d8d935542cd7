"""Arguments: where they come from, and what is refused before any work."""

import dataclasses
import json
import sys
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import save

import report
from arguments import (
    EMBEDDED,
    TINY_LLAMA,
    DataArguments,
    FinetuneArguments,
    ModelArguments,
    check,
    checkpoint_of,
    parse,
    runs_of,
    sgc_value,
)


def judged(*argv: str):
    """Parse and check as the command does."""
    parsed = parse(list(argv))
    check(*parsed)
    return parsed


def test_without_arguments_the_embedded_default_holds():
    model, data, args, sgc = parse([])
    assert (model.model_name_or_path, data.dataset, sgc) == (str(TINY_LLAMA), None, {})
    assert args.learning_rate == EMBEDDED["learning_rate"]
    assert args.optimizer_name == "sgc"


def test_with_a_model_or_data_transformers_defaults_hold(tmp_path):
    _, _, args, _ = parse(["--dataset", "a.json", "--output_dir", str(tmp_path)])
    assert args.learning_rate == 5e-5
    assert args.num_train_epochs == 3


def test_the_command_line_overrides_the_yaml_file(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text(
        "learning_rate: 1e-4\nmax_steps: 7\npacking: true\nsgc_sketch_size: 16\ncompare: [adamw, sgd@0.1]\n"
    )
    _, data, args, sgc = parse([str(config), "--max_steps", "9"])
    assert (args.learning_rate, args.max_steps, data.packing, sgc) == (1e-4, 9, True, {"sketch_size": 16})
    assert [(r.name, r.learning_rate) for r in runs_of(args)] == [("sgc", 1e-4), ("adamw", 1e-4), ("sgd", 0.1)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("none", None),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("64", 64),
        ("int8", "int8"),
        ("bfloat16", torch.bfloat16),
        ("false", False),
        (16, 16),
    ],
)
def test_values_of_sgc_arguments_are_read_as_python_writes_them(text, value):
    assert sgc_value(text) == value
    assert type(sgc_value(text)) is type(value)


def test_what_differs_by_module_is_read_from_json_or_yaml(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text(
        "sgc_embeddings: dense\nsgc_compressed_gradients: true\n"
        "sgc_overrides:\n  lm_head: {sketch_size: 64, lr: 1e-4, state_dtype: bfloat16}\n  q_proj: dense\n"
    )
    overrides = {"lm_head": {"sketch_size": 64, "lr": 1e-4, "state_dtype": torch.bfloat16}, "q_proj": "dense"}
    expected = {"embeddings": "dense", "compressed_gradients": True, "overrides": overrides}
    assert judged(str(config))[3] == expected
    text = '{"lm_head": {"sketch_size": 64, "lr": 1e-4, "state_dtype": "bfloat16"}, "q_proj": "dense"}'
    command = ["--sgc_embeddings", "dense", "--sgc_compressed_gradients", "--sgc_overrides", text]
    assert judged(*command)[3] == expected


def test_every_keyword_of_sgc_is_an_argument_and_none_has_a_default_here():
    import inspect

    from arguments import SGCArguments
    from sgc import SGC
    from sgc.hf import create_sgc_optimizer

    signatures = (inspect.signature(made).parameters.values() for made in (SGC, create_sgc_optimizer))
    keywords = {p.name for parameters in signatures for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {f"sgc_{name}" for name in keywords} == set(vars(SGCArguments()))
    assert set(vars(SGCArguments()).values()) == {None}


def test_gradient_checkpointing_is_understood_by_its_old_name():
    _, _, args, _ = parse(["--gradient_checkpointing"])
    assert args.activation_checkpointing is True


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--learning_rat", "1"], "no argument 'learning_rat'; did you mean 'learning_rate'"),
        (["--max_steps", "many"], "--max_steps.*many"),
        (["--optim", "adamv"], "no optimizer 'adamv'; did you mean 'adamw'"),
        (["--optim", "lomo"], "optimizer 'lomo' needs a package: pip install lomo-optim"),
        (["--compare", "sgc"], "--compare must name optimizers other than 'sgc'"),
        (["--compare", "adamw@fast"], "got 'adamw@fast'"),
        (["--sgc_sparsity", "-1"], "sparsity must be .*-1"),
        (["--sgc_chunk_size", "many"], "chunk_size must be a whole number or None, got 'many'"),
        (["--sgc_embeddings", "sparse"], "embeddings must be one of compressed, dense, frozen, got 'sparse'"),
        (["--sgc_compressed_gradients", "some"], "compressed_gradients must be true or false, got 'some'"),
        (["--sgc_overrides", "lm_head"], "overrides must be a JSON object of modules, got 'lm_head'"),
        (["--sgc_overrides", '{"lm_head": }'], "is not JSON: Expecting value"),
        (["--sgc_overrides", '{"lm_head": {"sketch_size": -1}}'], "sketch_size must not be negative, got -1"),
        (["--sgc_overrides", '{"lm_head": {"sketchsize": 1}}'], "'lm_head'.*did you mean 'sketch_size'"),
        (["--sgc_overrides", '{"lm_head": 8}'], "'lm_head'.*must be a dict or one of"),
        (["--sgc_sparsity", "2", "--optim", "adamw"], "--sgc_sparsity is given, but no run uses sgc"),
        (["--model_name_or_path", "/no/such", "--output_dir", "new"], "model folder '/no/such' does not exist"),
        (["--dataset", "a.json"], "--output_dir must be given"),
        (["--load_in_4bit"], "add --lora"),
        (["--packing", "--use_cache"], "--packing must go without --use_cache"),
        (["--dtype", "float8"], "--dtype must be auto, float32, bfloat16 or float16, got 'float8'"),
        (["--max_train_samples", "0"], "--max_train_samples must be 1 or more, got 0"),
        (["none.yaml"], "'none.yaml' does not exist"),
        (["--lr_scheduler_kwargs", "fast"], "--lr_scheduler_kwargs must be a JSON object, got 'fast'"),
        (["--lr_scheduler_kwargs", '{"speed": 1}'], "--lr_scheduler_type cosine with {'speed': 1}: .*'speed'"),
        (["--torch_compile_mode", "fastest"], "--torch_compile: Unrecognized mode=fastest"),
        (["--label_names", "target"], "--label_names must be labels, as all examples have, got target"),
        (["--eval_dataset", "a.json"], "--eval_dataset must go with --dataset, got 'a.json' alone"),
        (["--fsdp_config", "a.json"], "--fsdp_config must go with --fsdp, got 'a.json' alone"),
        (["--eval_accumulation_steps", "0"], "--eval_accumulation_steps must be 1 or more, got 0"),
        (["--eval_do_concat_batches", "false"], "--eval_do_concat_batches must be true"),
        (["--dataloader_prefetch_factor", "0"], "--dataloader_prefetch_factor must be 1 or more, got 0"),
        (["--lora_target_modules", "("], "--lora_target_modules must be a regular expression, got '\\('"),
        (["--lora_dropout", "2"], "--lora_dropout must be at most 1, got 2"),
        (["--label_smoothing_factor", "2"], "--label_smoothing_factor must be at most 1, got 2"),
        (["--max_steps", "0"], "a run must take a step or more, got --max_steps 0"),
        (["--num_train_epochs", "0"], "a run must take a step or more, got --num_train_epochs 0"),
        (["--seed", str(2**32)], "--seed must be at most 4294967295, got 4294967296"),
        (["--resume_from_checkpoint", "/no/such"], "no whole checkpoint to resume from in '/no/such'"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        judged(*argv)


def test_an_unknown_name_in_the_yaml_file_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("max_step: 7\n")
    with pytest.raises(ValueError, match="no argument 'max_step'; did you mean 'max_steps'"):
        parse([str(tmp_path / "a.yaml")])


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty: give another, or --resume_from_checkpoint"):
        judged("--output_dir", str(tmp_path))
    judged("--output_dir", str(tmp_path), "--overwrite_output_dir")


def checkpoint(folder, step, **content):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    state = {"global_step": step, "max_steps": 20, "log_history": [], "stateful_callbacks": {}}
    files = {"trainer_state.json": json.dumps(state).encode(), "model.safetensors": save({"a": torch.zeros(1)})}
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, path / name)
    for name, held in (files | content).items():
        (path / name).write_bytes(held)
    return path


def resumed(folder, *argv):
    """Return the checkpoint that the command would go on from."""
    _, _, args, _ = judged("--output_dir", str(folder), "--resume_from_checkpoint", *argv)
    return checkpoint_of(args, runs_of(args)[0])


def test_the_last_whole_checkpoint_is_resumed_from(tmp_path):
    checkpoint(tmp_path, 9)
    last = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, **{"trainer_state.json": b'{"global_st'})  # killed while writing
    (tmp_path / "checkpoint-12").mkdir()
    assert resumed(tmp_path) == last


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    checkpoint(tmp_path, 9)
    (tmp_path / "run.json").write_text('{"optim": "adamw"}')
    with pytest.raises(ValueError, match="was made with --optim adamw, got --optim sgc"):
        resumed(tmp_path)


def test_a_checkpoint_made_with_other_arguments_of_sgc_is_refused(tmp_path):
    checkpoint(tmp_path, 9)
    sgc = {"sketch_size": 32, "state_dtype": torch.bfloat16, "compressed_gradients": True}
    report.write_json(tmp_path / "run.json", {"optim": "sgc", "sgc": sgc, "lr": 1e-3})
    same = ["--sgc_sketch_size", "32", "--sgc_state_dtype", "bfloat16"]
    assert resumed(tmp_path, *same).name == "checkpoint-9"  # how gradients are held may change
    for changed, sentence in (
        (same[:2], "--sgc_state_dtype torch.bfloat16, got its default"),
        ([*same, "--sgc_moments", "whitened"], "--sgc_moments its default, got whitened"),
        (["--sgc_sketch_size", "16", *same[2:]], "--sgc_sketch_size 32, got 16"),
    ):
        with pytest.raises(ValueError, match=f"was made with {sentence}"):
            resumed(tmp_path, *changed)


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"2", b'{"optim": "sg', b'{"optim": 1}', b"", b"[" * 100_000, b"\xff"]
)
def test_a_damaged_record_of_the_run_is_named(tmp_path, content):
    checkpoint(tmp_path, 9)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match="run.json.*(can't be read|must )"):
        resumed(tmp_path)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors"])
def test_a_checkpoint_with_a_damaged_file_is_refused_before_any_work(tmp_path, name):
    path = checkpoint(tmp_path, 9, **{name: b"PK"})
    with pytest.raises(ValueError, match=f"{path / name}' is damaged: .*; resume from another checkpoint"):
        resumed(tmp_path)
    (path / name).unlink()
    with pytest.raises(ValueError, match=f"checkpoint '{path}' has no .*{name}"):
        resumed(tmp_path)


def test_a_checkpoint_that_is_not_whole_is_named_with_the_reason(tmp_path):
    path = checkpoint(tmp_path, 9, **{"trainer_state.json": b"2"})
    for argv in ([], [str(path)]):
        with pytest.raises(ValueError, match=f"there is no whole checkpoint .*{path / 'trainer_state.json'}' can't be"):
            judged("--output_dir", str(tmp_path), "--resume_from_checkpoint", *argv)


@pytest.mark.parametrize("rate", ["nan", "-1", "inf", "-inf"])
@pytest.mark.parametrize("argument", ["--learning_rate", "--weight_decay", "--adam_epsilon", "--compare"])
def test_a_rate_that_is_none_is_refused_whoever_takes_it(argument, rate):
    for name in ("sgc", "adamw", "sgd"):
        given = [argument, f"adafactor@{rate}"] if argument == "--compare" else [f"{argument}={rate}"]
        with pytest.raises(ValueError, match=f"(?s){argument}.* {float(rate)}|{float(rate)}.*{argument}"):
            judged("--optim", name, *given)


NUMBERS = [f.name for kind in (ModelArguments, DataArguments, FinetuneArguments) for f in dataclasses.fields(kind)
           if {int, float} & {get_type_hints(kind)[f.name], *get_args(get_type_hints(kind)[f.name])}]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_may_be_nan_or_infinite(name):
    for value in ("nan", "inf", "-inf"):
        with pytest.raises(ValueError, match=f"(?s)--{name}.*{value}"):
            judged(f"--{name}={value}")


@pytest.mark.parametrize("name", ["data_seed", "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_r"])
def test_no_whole_number_may_be_beyond_64_bits(name):
    with pytest.raises(ValueError, match=f"--{name} must be at most .*, got {2**63}"):
        judged(f"--{name}={2**63}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: &a [x, x]\nb: *a\n", "must not use aliases"),
        ("\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'] * 9)}]" for i in range(9)), "aliases"),
        ("[" * 100_000, "can't be read"),
        ("\x00", "can't be read"),
        ("- max_steps", "must hold lines of the form name: value"),
        ("max_steps", "must hold lines of the form name: value"),
        ("? [a]\n: 2", "can't be read"),
        ("!!python/object/apply:os.system [true]", "can't be read"),
        ("max_steps: [1]", r"--max_steps must be one value, got \[1\]"),
        ("max_steps: {a: 1}", "--max_steps must be one value"),
        ("max_steps: 2020-01-01", "--max_steps.*2020-01-01"),
        ("learning_rate: fast", "--learning_rate.*fast"),
        ("compare: [[adamw]]", "--compare must be a list of single values"),
        ("gradient_checkpointing_kwargs: '{'", "'{' is not JSON"),
        ("1: 2", "no argument '1'"),
    ],
)
def test_a_file_of_arguments_that_is_none_is_refused_with_a_sentence(tmp_path, text, sentence):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        parse([str(tmp_path / "a.yaml")])


def test_a_file_of_arguments_says_what_the_command_line_says(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "resume_from_checkpoint: true\nmax_steps:\nsgc_scale: null\nlr_scheduler_kwargs: {num_cycles: 1}\n"
        "optim_target_modules: [q_proj]\nlora_target_modules: -x\npacking: true\nanswers_only: false\n"
    )
    model, data, args, sgc = parse([str(tmp_path / "a.yaml")])
    assert (args.resume_from_checkpoint, args.max_steps, sgc) == ("last", -1, {"scale": None})
    assert (args.lr_scheduler_kwargs, args.optim_target_modules) == ({"num_cycles": 1}, ["q_proj"])
    assert (model.lora_target_modules, data.packing, data.answers_only) == ("-x", True, False)


def test_a_hub_that_does_not_answer_is_said_before_any_work():
    with pytest.raises(ValueError, match="--push_to_hub needs the hub, which did not answer"):
        judged("--push_to_hub", "--hub_token", "hf_none")


def test_a_backend_that_is_not_installed_is_said_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ValueError, match="--report_to codecarbon: "):
        judged("--report_to", "codecarbon")
    with pytest.raises(ValueError, match="--report_to nobody: "):
        judged("--report_to", "nobody")
