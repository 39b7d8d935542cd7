"""The whole command: it runs, its files open, it can be stopped and goes on bit for bit."""

import ast
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import arguments
import finetune

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "recipes" / "finetune.py"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
QUICK = ["--max_train_samples", "80", "--max_eval_samples", "16", "--eval_strategy", "no", "--generate_samples", "0"]

pytestmark = pytest.mark.usefixtures("offline")


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(left, right):
    """Bit-equal tensors under the same names."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run with a comparison, which several tests look at."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        finetune.fine_tune(["--smoke", "--compare", "adamw", "--output_dir", str(folder), "--disable_tqdm", "true"])
    return folder


def test_the_smoke_run_learns_and_says_what_it_holds(smoke):
    found = results(smoke)
    assert [run["name"] for run in found["runs"]] == ["sgc", "adamw"]
    for run in found["runs"]:
        assert run["after"]["loss"] < found["before"]["loss"]
        assert set(run["after"]) == {"loss", "token_accuracy", "exact_match"}
        assert run["steps"] == 10
    sgc, adamw = (run["memory"] for run in found["runs"])
    weights_held = sum(t.nbytes for t in weights(smoke).values())
    assert sgc["weights"] == adamw["weights"] == sgc["gradients"] == adamw["gradients"] == weights_held
    assert adamw["adamw_state"] == 2 * weights_held
    assert adamw["optimizer_state"] == pytest.approx(2 * weights_held, rel=1e-3)
    assert sgc["optimizer_state"] < adamw["optimizer_state"] / 2


def test_the_runs_start_alike(smoke):
    first = [run["history"][0 if run["name"] != "sgc" else 1]["loss"] for run in results(smoke)["runs"]]
    assert first[0] == first[1]  # the loss of step 1 is taken before any update


def test_the_saved_model_opens_and_answers(smoke):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smoke), AutoTokenizer.from_pretrained(smoke)
    prompt = [{"role": "user", "content": "Shout the word.\nabc"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_the_plot_is_a_png_and_no_half_written_file_is_left(smoke):
    assert (smoke / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in smoke.iterdir() if p.name.startswith(".")]


def test_the_same_command_makes_the_same_weights(smoke, tmp_path):
    finetune.fine_tune(["--smoke", "--output_dir", str(tmp_path)])
    assert same(weights(smoke), weights(tmp_path))


def test_all_test_rows_are_judged_though_the_last_training_batch_is_dropped(tmp_path):
    command = ["--output_dir", str(tmp_path), *QUICK, "--max_steps", "1", "--dataloader_drop_last"]
    finetune.fine_tune([*command, "--per_device_eval_batch_size", "64"])  # more than the 16 test rows
    assert results(tmp_path)["runs"][0]["after"]["loss"] > 0
    with pytest.raises(ValueError, match="--dataloader_drop_last needs one whole batch, 81 .* or more, got 80"):
        finetune.fine_tune([*command, "--per_device_train_batch_size", "81", "--overwrite_output_dir"])


def interrupt_at(step, number=signal.SIGINT):
    """Return a callback's method that sends a signal to this process while step `step` is under way."""

    def on_step_begin(callback, args, state, control, **kwargs):
        if state.global_step == step - 1:
            os.kill(os.getpid(), number)

    return on_step_begin


def test_what_does_not_fit_into_memory_is_a_sentence_and_any_other_failure_is_none(monkeypatch, capsys):
    def failing(error):
        def fine_tune(_):
            raise error

        monkeypatch.setattr(finetune, "fine_tune", fine_tune)
        finetune.main()

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        with pytest.raises(SystemExit) as stop:
            failing(error)
        assert stop.value.code == 2
        assert "does not fit into memory: lower --per_device_train_batch_size" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a fault"):
        failing(RuntimeError("a fault"))


def test_signals_within_two_seconds_are_one_and_a_later_one_ends_the_run_at_once(monkeypatch):
    now = [100.0]
    stop = finetune.StopOnSignal()
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    stop.on_train_begin()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(finetune.time, "monotonic", lambda: now[0])
            signal.raise_signal(signal.SIGINT)
            now[0] += 1.9
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGINT
            now[0] += 0.2
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()
        signal.signal(signal.SIGINT, inherited)


def test_a_finished_run_that_is_asked_to_go_on_leaves_its_models_as_they_are(smoke, tmp_path, capsys):
    folder = tmp_path / "again"
    shutil.copytree(smoke, folder)
    models = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    command = ["--smoke", "--compare", "adamw", "--output_dir", str(folder), "--resume_from_checkpoint"]
    finetune.fine_tune([*command, "--disable_tqdm", "true"])
    assert len(models) == 3  # the model, and a checkpoint of each run
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == models
    for before, after in zip(results(smoke)["runs"], results(folder)["runs"], strict=True):
        assert (after["after"], after["steps"]) == (before["after"], before["steps"])
        assert after["memory"] == before["memory"] | {"gradients": None}  # no step was taken
    assert "goes on from" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["save", "judge", "answers", "show"])
def test_a_signal_after_the_last_step_loses_no_model(tmp_path, monkeypatch, capsys, moment, number):
    original = getattr(finetune, moment)

    def interrupted(job, trainer, *args):
        if moment == "show" or trainer.state.global_step > 0:
            signal.raise_signal(number)
        return original(job, trainer, *args)

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    monkeypatch.setattr(finetune, moment, interrupted)
    options = [*QUICK, "--generate_samples", "4", "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options, "--disable_tqdm", "true"])
    try:
        with pytest.raises(SystemExit) as stop:
            finetune.main()
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert stop.value.code == 128 + number
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"interrupted: the model of sgc is saved in {tmp_path / 'out'}; ")
    assert f"{tmp_path / 'out' / 'checkpoint-2'} is a whole checkpoint; the same command with --resume" in last
    saved, checkpoint = tmp_path / "out", tmp_path / "out" / "checkpoint-2"
    assert (saved / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert (saved / "results.json").exists() == (moment == "show")
    assert not (saved / ".model").exists()


def test_what_the_checkpoint_decides_is_said_or_refused(smoke, tmp_path, capsys):
    shutil.copytree(smoke, tmp_path / "out")
    command = ["--smoke", "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "--disable_tqdm", "true"]
    with pytest.raises(ValueError, match="was made with weights in float32, got bfloat16: --dtype"):
        finetune.fine_tune([*command, "--dtype", "bfloat16"])
    finetune.fine_tune([*command, "--learning_rate", "3e-4"])
    said = capsys.readouterr().out
    assert "note: it goes on at the learning rate of the checkpoint, 0.001, not at 0.0003" in said


def model_with_code(folder):
    """Make a model whose config names Python code, which leaves a file when it runs."""
    shutil.copytree(arguments.TINY_LLAMA, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(folder / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return ["--model_name_or_path", str(folder), *QUICK, "--max_steps", "1", "--output_dir", str(folder / "out")]


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    command = model_with_code(tmp_path / "model")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match="model '.*' can't be opened: .*code.*; --trust_remote_code runs it"):
        finetune.fine_tune(command)
    assert not (tmp_path / "model" / "ran").exists()
    assert sys.stdin.read() == "y\n" * 9
    finetune.fine_tune([*command, "--trust_remote_code"])
    assert (tmp_path / "model" / "ran").exists()


def test_every_model_and_tokenizer_is_opened_with_a_word_on_its_code():
    silent = []
    for path in (*ROOT.glob("recipes/**/*.py"), *ROOT.glob("benchmarks/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            opens = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config")
            if opens and not {"trust_remote_code", None} & {keyword.arg for keyword in node.keywords}:
                silent.append(f"{path.name}:{node.lineno}")
    assert silent == []


def test_a_pickle_in_the_place_of_weights_is_not_executed(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    ignore = shutil.ignore_patterns("model.safetensors")
    shutil.copytree(arguments.TINY_LLAMA, tmp_path / "model", ignore=ignore)
    torch.save(Touch(), tmp_path / "model" / "pytorch_model.bin")
    common = ["--model_name_or_path", str(tmp_path / "model"), *QUICK, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="model '.*' can't be opened"):
        finetune.fine_tune(common)
    assert not (tmp_path / "ran").exists()


def test_sgc_says_what_it_held_and_a_comparison_does_not(smoke):
    summary = json.loads((smoke / "sgc_summary.json").read_text())
    sgc, adamw = results(smoke)["runs"]
    assert summary["memory"]["optimizer_state"] == sgc["memory"]["optimizer_state"]
    assert summary["memory"]["gradients"] == sgc["memory"]["gradients"]
    assert summary["stats"]["state_bytes"] == sgc["stats"]["state_bytes"]
    assert any("sgc/memory/activations" in entry for entry in sgc["history"])
    assert not any(name.startswith("sgc/") for entry in adamw["history"] for name in entry)
    assert not (smoke / "compare-adamw" / "sgc_summary.json").exists()


def test_every_argument_of_sgc_arrives(tmp_path):
    overrides = '{"q_proj": {"sketch_size": 64, "lr": 1e-4}, "k_proj": "frozen"}'
    options = ["--sgc_embeddings", "dense", "--sgc_compressed_gradients", "--sgc_overrides", overrides]
    finetune.fine_tune(["--smoke", *options, "--weight_decay", "0.1", "--output_dir", str(tmp_path)])
    summary = json.loads((tmp_path / "sgc_summary.json").read_text())
    group_of = {name: group for group in summary["groups"] for name in group["names"]}
    assert not any("k_proj" in name for name in group_of)
    q_proj = group_of["model.layers.0.self_attn.q_proj.weight"]
    assert (q_proj["sketch_size"], q_proj["initial_lr"], q_proj["weight_decay"]) == (64, 1e-4, 0.1)
    up_proj, embeddings = (group_of[f"model.{name}.weight"] for name in ("layers.0.mlp.up_proj", "embed_tokens"))
    assert (up_proj["sketch_size"], up_proj["initial_lr"]) == (0, 1e-3)
    assert embeddings["min_size"] > up_proj["min_size"]
    found = results(tmp_path)
    held = found["runs"][0]["memory"]
    assert held["gradients"] < 0.5 * held["weights"]  # of what is dense, and of nothing else
    assert found["runs"][0]["after"]["loss"] < found["before"]["loss"]


def test_an_override_of_no_module_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="'q_prj'.*matches no module of the model; the nearest are .*q_proj"):
        finetune.fine_tune(["--smoke", "--sgc_overrides", '{"q_prj": "dense"}', "--output_dir", str(tmp_path)])


# peft asks transformers for a name that will go
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("options", "file"),
    [
        (["--optim", "adamw", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "8"], "model"),
        (["--optim", "sgc", "--lora", "--lora_dropout", "0.1"], "adapter_model"),
    ],
    ids=["adamw with accumulation", "sgc on adapters with dropout"],
)
@pytest.mark.parametrize("step", [2, 5], ids=["within an epoch", "at its end"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, options, file, step):
    command = [*QUICK, *options, "--num_train_epochs", "2"]
    finetune.fine_tune([*command, "--output_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        patch.setattr(finetune.StopOnSignal, "on_step_begin", interrupt_at(step))
        with pytest.raises(SystemExit) as stop:
            finetune.fine_tune([*command, "--output_dir", str(tmp_path / "parts")])
    assert stop.value.code == 128 + signal.SIGINT
    assert (tmp_path / "parts" / f"checkpoint-{step}").is_dir()
    assert not (tmp_path / "parts" / "results.json").exists()
    finetune.fine_tune([*command, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint"])
    left, right = (load_file(tmp_path / part / f"{file}.safetensors") for part in ("whole", "parts"))
    assert same(left, right)


def test_ctrl_c_in_a_terminal_saves_a_checkpoint_that_goes_on_bit_for_bit(tmp_path):
    command = [sys.executable, str(SCRIPT), *QUICK, "--num_train_epochs", "6", "--logging_steps", "1"]
    whole = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "whole")], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    parts = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "parts")],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    while "learning_rate=" not in seen:  # the bar of a run under way
        more = parts.stderr.read(64)
        assert more, seen
        seen += more
    parts.send_signal(signal.SIGINT)
    said, _ = parts.communicate(timeout=120)
    assert parts.returncode == 128 + signal.SIGINT
    assert "is saved; the same command with --resume_from_checkpoint goes on from there" in said
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    assert 0 < json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] < 30
    again = [*command, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint"]
    assert subprocess.run(again, env=ENVIRONMENT, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert whole.wait(timeout=120) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_two_processes_train_one_model_and_speak_once(tmp_path):
    config = ROOT / "recipes" / "configs" / "cpu_ddp.yaml"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--main_process_port",
        "0",
    ]
    command = [*launch, str(SCRIPT), "--smoke", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("after sgc") == 1
    assert results(tmp_path)["runs"][0]["after"]["loss"] < results(tmp_path)["before"]["loss"]
    assert results(tmp_path)["runs"][0]["history"][-1]["epoch"] == 1  # 10 steps of 2 × 16 of 320 examples


def test_two_launchers_as_on_two_machines_train_one_model(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    config = ["--config_file", str(ROOT / "recipes" / "configs" / "cpu_ddp.yaml"), "--num_processes", "2"]
    machines = [*config, "--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    launchers = []
    for machine in ("0", "1"):
        launch = [sys.executable, "-m", "accelerate.commands.launch", *machines, "--machine_rank", machine]
        command = [*launch, str(SCRIPT), "--smoke", "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        launchers.append(subprocess.Popen(command, env=ENVIRONMENT, **pipes))
    said = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert ["after sgc" in text for text in said] == [True, False]
    assert results(tmp_path)["runs"][0]["history"][-1]["epoch"] == 1  # 10 steps of 2 × 16 of 320 examples


def test_bad_input_is_a_sentence_and_exit_code_2_without_a_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--dataset", "missing.json", "--output_dir", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        finetune.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == "finetune.py: error: data file 'missing.json' does not exist"
    assert not (tmp_path / "o").exists()


def rows_file(folder, rows):
    path = folder / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    return str(path)


def test_help_shows_the_command_first_and_every_argument(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        finetune.main()
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert said.index("accelerate launch recipes/finetune.py") < 500
    for name in ("--sgc_sketch_size", "--lora_r", "--gradient_accumulation_steps", "--packing"):
        assert name in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--text_column", "body"], "there is no column 'body'; the data set has text"),
        (["--max_length", "100000"], r"max_length must be in \[8, 256\], the model's context, got 100000"),
        (["--metric", "bleurgh"], "there is no metric 'bleurgh'; recipes/metrics has accuracy, exact_match"),
        (["--eval_fraction", "1.5"], r"eval_fraction must be in \(0, 1\), got 1.5"),
        (
            ["--metric_for_best_model", "accuracy", "--eval_strategy", "steps"],
            "--metric_for_best_model must be one of loss, token_accuracy, got 'accuracy'",
        ),
    ],
)
def test_what_only_the_data_shows_is_refused_with_a_sentence_too(tmp_path, options, sentence):
    rows = [{"text": f"a text with the number {i}"} for i in range(20)]
    if "--metric" in options:
        rows = [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(20)]
    with pytest.raises(ValueError, match=sentence):
        finetune.fine_tune(["--dataset", rows_file(tmp_path, rows), "--output_dir", str(tmp_path / "out"), *options])


def test_plain_text_is_learnt_in_packs(tmp_path):
    path = rows_file(tmp_path, [{"text": f"one {i} two {i + 1} three " * (1 + i % 9)} for i in range(200)])
    options = ["--packing", "--max_steps", "10", "--learning_rate", "1e-3", "--max_length", "128"]
    finetune.fine_tune(["--dataset", path, "--output_dir", str(tmp_path / "out"), *options])
    found = results(tmp_path / "out")
    assert found["runs"][0]["after"]["loss"] < found["before"]["loss"]


def encoder_and_pairs(folder, tokenizer):
    """Make a small BERT of two classes and pairs of three, and return the arguments that name them."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    ).save_pretrained(folder / "bert")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder / "bert")
    rows = [
        {"sentence1": "abc"[i % 3] * 5, "sentence2": str(i), "label": ["low", "mid", "high"][i % 3]} for i in range(300)
    ]
    return ["--model_name_or_path", str(folder / "bert"), "--dataset", rows_file(folder, rows)]


def test_an_encoder_learns_to_classify_pairs(tmp_path, tokenizer):
    common = encoder_and_pairs(tmp_path, tokenizer)
    options = ["--max_steps", "60", "--learning_rate", "5e-3", "--per_device_train_batch_size", "16"]
    finetune.fine_tune([*common, "--output_dir", str(tmp_path / "out"), *options])
    found = results(tmp_path / "out")
    assert found["runs"][0]["after"]["accuracy"] > 0.9 > found["before"]["accuracy"]
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert opened.config.id2label == {0: "high", 1: "low", 2: "mid"}


def test_a_classifier_of_adapters_keeps_the_names_of_its_classes(tmp_path, tokenizer):
    from peft import AutoPeftModelForSequenceClassification

    common = encoder_and_pairs(tmp_path, tokenizer)
    finetune.fine_tune([*common, "--lora", "--max_steps", "1", "--output_dir", str(tmp_path / "out")])
    names = json.loads((tmp_path / "out" / "classes.json").read_text())["id2label"]
    assert names == {"0": "high", "1": "low", "2": "mid"}
    own = {"num_labels": len(names), "ignore_mismatched_sizes": True}  # the base has a head of two classes
    opened = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", **own)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    head = opened.state_dict()["base_model.model.classifier.modules_to_save.default.weight"]
    assert torch.equal(head, saved["base_model.model.classifier.weight"])


# peft asks transformers for names that will go
@pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)`:FutureWarning")
def test_adapters_learn_on_weights_of_four_bits_after_an_evaluation(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    options = ["--lora", "--load_in_4bit", "--gradient_checkpointing", "--bf16", "--learning_rate", "3e-3"]
    finetune.fine_tune([*QUICK, *options, "--output_dir", str(tmp_path / "out")])
    found = results(tmp_path / "out")
    assert found["runs"][0]["after"]["loss"] < found["before"]["loss"] - 1
    assert found["runs"][0]["memory"]["weights"] < 0.5 * 4 * 821_120


def test_a_tokenizer_without_pad_token_or_chat_template_is_served_aloud(tmp_path, tokenizer, capsys):
    shutil.copytree(arguments.TINY_LLAMA, tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja"))
    tokenizer.chat_template = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    options = ["--model_name_or_path", str(tmp_path / "bare"), "--smoke", "--output_dir", str(tmp_path / "out")]
    finetune.fine_tune(options)
    said = capsys.readouterr().out
    assert "the tokenizer has no pad token: '<|eos|>' is used" in said
    assert "the tokenizer has no chat template: a plain one is used, and saved with the model" in said
    assert "### Response:" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_real_instructions_lower_the_loss_of_a_real_model(tmp_path, shared_data):
    model, data = shared_data / "stories260k", shared_data / "instruct" / "alpaca_en_demo.json"
    options = ["--max_steps", "10", "--learning_rate", "3e-3", "--max_train_samples", "100", "--max_eval_samples", "20"]
    common = ["--model_name_or_path", str(model), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    finetune.fine_tune([*common, *options, "--max_length", "256"])
    found = results(tmp_path / "out")
    assert found["runs"][0]["after"]["loss"] < found["before"]["loss"] - 0.2
