"""Arguments: where they come from, and what is refused before any work."""

import json

import pytest
import torch

from arguments import EMBEDDED, TINY_LLAMA, check, checkpoint_of, parse, runs_of, sgc_value


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


def checkpoint(folder, step, content=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}) if content is None else content)
    return path


def test_the_last_whole_checkpoint_is_resumed_from(tmp_path):
    checkpoint(tmp_path, 9)
    last = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, content='{"global_st')  # killed while writing
    (tmp_path / "checkpoint-12").mkdir()
    _, _, args, _ = judged("--output_dir", str(tmp_path), "--resume_from_checkpoint")
    assert checkpoint_of(args, runs_of(args)[0]) == last


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    checkpoint(tmp_path, 9)
    (tmp_path / "run.json").write_text('{"optim": "adamw"}')
    with pytest.raises(ValueError, match="was made with --optim adamw, got --optim sgc"):
        judged("--output_dir", str(tmp_path), "--resume_from_checkpoint")
