"""The recipes end to end, on what comes with them."""

import gzip
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FEW = ["--devices", "10", "--rounds", "12", "--evaluate_every", "3", "--lr", "1.0"]


def recipe(name):
    sys.path.insert(0, str(RECIPES))
    try:
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(RECIPES))
    return module


mnist = recipe("federated_mnist")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("scheme", mnist.SCHEMES)
def test_every_scheme_learns_the_digits_and_writes_all_it_promises(scheme, tmp_path, capsys):
    assert mnist.main(["--scheme", scheme, *FEW, "--output_dir", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert rows[-1]["accuracy"] > (0.75 if scheme == "sketched" else 0.85)
    for name in ("curve.png", "devices.png"):
        assert (tmp_path / name).stat().st_size > 3000
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) == 650
    assert "rows.jsonl" in capsys.readouterr().out


def idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


def small_mnist(folder, rows=(200, 50)):
    rng = np.random.default_rng(0)
    for which, number in zip(("train", "t10k"), rows, strict=True):
        labels = (np.arange(number) % 10).astype(np.uint8)
        pictures = rng.integers(0, 40, (number, 8, 8), dtype=np.uint8)
        pictures[np.arange(number), labels % 8, labels // 2] = 255
        idx(folder / f"{which}-images-idx3-ubyte.gz", pictures)
        idx(folder / f"{which}-labels-idx1-ubyte", labels)


def test_a_folder_of_idx_files_is_opened_as_it_is(tmp_path):
    small_mnist(tmp_path)
    data = mnist.open_data(mnist.parse(["--dataset", str(tmp_path)]))
    columns = data.columns_of(test=False)
    assert columns["pixel_values"].shape == (200, 1, 8, 8)
    assert float(columns["pixel_values"].max()) == 1.0
    assert columns["labels"].tolist() == [i % 10 for i in range(200)]
    assert (data.classes, data.image) == (10, (1, 8))
    assert len(data.columns_of(test=True)["labels"]) == 50


def test_the_real_mnist_is_opened(shared_data):
    data = mnist.open_data(mnist.parse(["--dataset", str(shared_data / "mnist")]))
    assert data.columns_of(test=False)["pixel_values"].shape == (60_000, 1, 28, 28)
    assert (len(data.test), data.classes) == (10_000, 10)


def rows_of_pictures(number, mode="L"):
    """Pictures whose class is the bright column, of four speakers."""
    labels = [i % 4 for i in range(number)]
    pictures = np.zeros((number, 8, 8), np.uint8)
    pictures[np.arange(number), :, labels] = 255
    return {
        "image": [Image.fromarray(each).convert(mode) for each in pictures],
        "label": labels,
        "speaker": [f"speaker {i % 3}" for i in range(number)],
    }


def saved_to_disk(folder):
    DatasetDict(
        train=Dataset.from_dict(rows_of_pictures(96)), test=Dataset.from_dict(rows_of_pictures(16))
    ).save_to_disk(folder)


def folders_of_pictures(folder):
    for split, number in (("train", 96), ("test", 16)):
        rows = rows_of_pictures(number, "P")
        for i, (picture, label) in enumerate(zip(rows["image"], rows["label"], strict=True)):
            (folder / split / f"class {label}").mkdir(parents=True, exist_ok=True)
            picture.save(folder / split / f"class {label}" / f"{i}.png")


def parquet_with_named_labels(folder):
    """As on the hub: labels by name, and a test split without any."""
    names = np.array(["ant", "bee", "cow", "dog"])
    folder.mkdir()
    for split, number in (("train", 96), ("validation", 16), ("test", 8)):
        rows = rows_of_pictures(number, "RGB")
        rows["label"] = [None] * number if split == "test" else names[rows["label"]].tolist()
        Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("make", [saved_to_disk, folders_of_pictures, parquet_with_named_labels])
def test_pictures_are_opened_as_datasets_opens_them(make, tmp_path):
    make(tmp_path / "set")
    common = ["--dataset", str(tmp_path / "set"), "--devices", "4", "--rounds", "8", "--lr", "0.5"]
    split = (
        ["--split", "iid"] if make is folders_of_pictures else ["--split", "speaker", "--scheme", "downlink-selection"]
    )
    assert mnist.main([*common, *split, "--output_dir", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out")
    assert rows[-1]["accuracy"] == 1.0
    assert rows[-1]["participants"] == (4 if make is folders_of_pictures else 1)
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["num_channels"] == (3 if make is not saved_to_disk else 1)
    assert len(config["id2label"]) == 4


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_a_plain_file_is_opened_and_a_part_of_it_held_out(ending, tmp_path, capsys):
    rows = rows_of_pictures(60)
    if ending != "parquet":
        rows["image"] = [f"picture {i}" for i in range(60)]
    path = tmp_path / f"rows.{ending}"
    getattr(Dataset.from_dict(rows), f"to_{ending.removesuffix('l')}")(path)
    arguments = ["--dataset", str(path), "--devices", "4", "--rounds", "1", "--output_dir", str(tmp_path / "out")]
    assert mnist.main(arguments) == (0 if ending == "parquet" else 2)
    said = capsys.readouterr()
    assert f"'{path}' has no test split, 12 of its rows are held out" in said.out + said.err
    if ending != "parquet":
        assert f"'{path}' holds no pictures; for texts name a model with --model_name_or_path" in said.err
        assert "can't be opened" not in said.err


def test_texts_are_opened_with_any_classifier(tmp_path, monkeypatch):
    """By column, too: who spoke decides who holds a row."""
    monkeypatch.setattr(sys.modules["federated_data"], "MOST_TOKENS", 8)
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "song"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=6, **sizes)).save_pretrained(tmp_path / "bert")
    for split, number in (("train", 60), ("test", 12)):
        rows = [
            {"text": f"{words[2 + i % 2]} {words[4 + i // 2 % 2]}", "label": i % 2, "speaker": i % 3}
            for i in range(number)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--dataset", str(tmp_path), "--model_name_or_path", str(tmp_path / "bert"), "--split", "speaker"]
    arguments += ["--optimizer", "adamw", "--lr", "0.02", "--batch_size", "8", "--rounds", "6", "--late", "0.1"]
    assert mnist.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    assert rows_of(tmp_path / "out")[-1]["accuracy"] == 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "sgc"])
def test_devices_may_train_with_any_optimizer(optimizer, tmp_path):
    arguments = ["--optimizer", optimizer, "--lr", "0.01", "--output_dir", str(tmp_path)]
    assert mnist.main([*FEW[:4], *arguments]) == 0
    assert rows_of(tmp_path)[-1]["accuracy"] > 0.8


def test_a_killed_recipe_resumes_and_ends_in_the_same_model(tmp_path):
    common = ["--scheme", "downlink-selection", "--participants", "5", "--devices", "10", "--rounds", "60"]
    common += ["--checkpoint_every", "2", "--evaluate_every", "20"]
    command = [sys.executable, str(RECIPES / "federated_mnist.py"), *common, "--output_dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    rows = tmp_path / "killed" / "rows.jsonl"
    while not rows.exists() or len(rows.read_text().splitlines()) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(rows.read_text().splitlines()) < 60
    assert mnist.main([*common, "--output_dir", str(tmp_path / "killed"), "--resume"]) == 0
    assert mnist.main([*common, "--output_dir", str(tmp_path / "whole")]) == 0
    killed, whole = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    assert [row["round"] for row in rows_of(tmp_path / "killed")] == list(range(1, 61))


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--participants", "41"], 2, "participants must be at most the 40 devices, got 41"),
        (["--scheme", "downlink-selection", "--participants", "41"], 2, "participants must be at most the 40 devices"),
        (["--devices", "2000"], 2, "no device may be empty: 1437 rows do not reach for 2000 devices"),
        (["--scheme", "noisy-downlink", "--power_down", "0"], 2, "power must be positive and finite, got 0.0"),
        (["--rounds", "0"], 2, "rounds must be at least 1, got 0"),
        (["--split", "speaker"], 2, "the data have no column 'speaker', only labels"),
        (["--dataset", "no/such/set"], 2, "the data set 'no/such/set' can't be opened"),
        (["--scheme", "noisy-downlink", "--threshold", "99"], 1, "10 rounds in a row brought no update"),
        (
            ["--scheme", "downlink-selection", "--snr_db", "-40", "--most_skipped", "3"],
            1,
            "the run ended after round 3 of 40: 3 rounds in a row brought no update, the last because the downlink",
        ),
        (["--scheme", "sketched", "--ofdm_symbols_up", "1", "--subchannels", "1"], 2, "a budget of 2 numbers"),
        (["--snr_db=-inf", "--scheme", "blind"], 2, "snr_db must be in [-300, 300], or inf for no noise, got -inf"),
        (["--model_name_or_path", "no/such/model"], 2, "error: "),
        (["--scheme", "blind", "--ofdm_symbols_up", "3"], 2, "above the budget of ofdm_symbols=3"),
    ],
)
def test_bad_input_is_a_sentence_and_a_status(arguments, status, sentence, tmp_path, capsys):
    assert mnist.main([*arguments, "--output_dir", str(tmp_path / "out")]) == status
    assert sentence in capsys.readouterr().err


def test_labels_that_are_missing_are_named(tmp_path, capsys):
    small_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert mnist.main(["--dataset", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "must hold train-labels-idx1-ubyte" in capsys.readouterr().err


def test_another_run_is_not_overwritten_unasked(tmp_path, capsys):
    assert mnist.main(["--rounds", "1", "--output_dir", str(tmp_path)]) == 0
    assert mnist.main(["--rounds", "1", "--output_dir", str(tmp_path)]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert mnist.main(["--rounds", "1", "--output_dir", str(tmp_path), "--overwrite"]) == 0


@pytest.mark.parametrize("name", ["selection", "antennas", "noisy", "steps"])
def test_a_sweep_runs_what_has_no_row_yet_and_draws_its_figure(name, tmp_path, monkeypatch):
    sweeps = recipe("federated_sweeps")
    few = [cell | {"rounds": 2, "devices": 40} for cell in sweeps.SWEEPS[name]() if cell["seed"] == 0][::7]
    played = []
    play = sweeps.play
    monkeypatch.setitem(sweeps.SWEEPS, name, lambda: few)
    monkeypatch.setattr(sweeps, "play", lambda cell, *rest: played.append(cell) or play(cell, *rest))
    for _ in range(2):
        assert mnist.main(["--sweep", name, "--output_dir", str(tmp_path)]) == 0
    assert played == few
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == few


def test_a_language_model_is_fine_tuned_over_the_air(tmp_path):
    finetune = recipe("federated_finetune")
    assert finetune.main(["--smoke", "--evaluate_every", "1", "--output_dir", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert rows[1]["loss"] < rows[0]["loss"]
    assert rows[0]["channel_uses_up"] < 821_120 / 2 * 0.35
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) == 821_120


def test_what_does_not_fit_into_memory_is_said(tmp_path, capsys):
    assert mnist.main(["--scheme", "blind", "--antennas", str(10**9), "--output_dir", str(tmp_path)]) == 2
    assert "\nerror: it does not fit into memory: " in capsys.readouterr().err
