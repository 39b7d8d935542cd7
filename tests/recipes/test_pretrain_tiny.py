"""Small Llamas of any width: seeded, named by what they are made from, kept outside the repository."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pretrain_tiny

SMALL = ("--width", "32", "--layers", "1", "--steps", "2", "--batch_size", "2", "--length", "16")


@pytest.fixture
def made_from(tmp_path, monkeypatch, tokenizer):
    """Give arguments of a small run on a text and with a tokenizer of the test's own, with a cache of its own."""
    monkeypatch.setattr(pretrain_tiny, "CACHE", tmp_path / "cache")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return [*SMALL, "--tokenizer", str(tmp_path / "tokenizer"), "--text", str(tmp_path / "text.txt")]


@pytest.mark.parametrize(("width", "layers"), [(32, 1), (64, 2), (96, 1), (128, 4), (160, 1)])
def test_a_model_has_the_width_and_the_layers_it_was_asked_for(tokenizer, width, layers):
    model = pretrain_tiny.make_model(tokenizer, 0, width=width, layers=layers)
    assert model.model.embed_tokens.weight.shape == (len(tokenizer), width)
    assert len(model.model.layers) == layers
    ids = torch.tensor([[1, 2, 3]])
    assert model(input_ids=ids).logits.shape == (1, 3, len(tokenizer))


def test_the_model_of_the_repository_is_what_it_was(tokenizer):
    assert sum(p.numel() for p in pretrain_tiny.make_model(tokenizer, 0).parameters()) == 821_120


@pytest.mark.parametrize("width", [0, 16, 33, -32])
def test_a_width_that_heads_do_not_divide_is_refused(tokenizer, width):
    with pytest.raises(ValueError, match=f"width must be a multiple of 32, got {width}"):
        pretrain_tiny.make_model(tokenizer, 0, width=width)


def test_the_same_arguments_make_the_same_model_and_another_seed_another(made_from):
    runs = [pretrain_tiny.parse([*made_from, "--seed", seed]) for seed in ("0", "0", "1")]
    found = []
    for args in runs:
        record = pretrain_tiny.pretrain(args)
        assert pretrain_tiny.recorded(args.output_dir) == record["steps"] == 2
        found.append(AutoModelForCausalLM.from_pretrained(args.output_dir).state_dict())
    assert runs[0].output_dir == runs[1].output_dir != runs[2].output_dir
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])
    assert AutoTokenizer.from_pretrained(runs[0].output_dir)("to be")["input_ids"]


def test_every_argument_changes_the_folder_and_none_changes_the_repository(made_from, tmp_path):
    (tmp_path / "other.txt").write_text("something else " * 20)
    changes = [["--width", "64"], ["--layers", "2"], ["--steps", "3"], ["--batch_size", "3"], ["--length", "8"]]
    changes += [["--lr", "1e-3"], ["--seed", "1"], ["--text", str(tmp_path / "other.txt")]]
    folders = [pretrain_tiny.parse([*made_from, *change]).output_dir for change in [[], *changes]]
    folders.append(pretrain_tiny.parse(["--smoke"]).output_dir)
    assert len(set(folders)) == len(folders)
    assert {folder.parent for folder in folders} == {tmp_path / "cache"}
    assert pretrain_tiny.parse([]).output_dir == pretrain_tiny.ASSETS


def test_a_text_in_another_place_is_the_same_text(made_from, tmp_path):
    (tmp_path / "copy.txt").write_bytes((tmp_path / "text.txt").read_bytes())
    copied = [str(tmp_path / "copy.txt") if word.endswith("text.txt") else word for word in made_from]
    assert pretrain_tiny.parse(copied).output_dir == pretrain_tiny.parse(made_from).output_dir


def test_windows_of_a_text_are_drawn_by_the_seed_and_are_of_the_text(tokenizer):
    text = "abcdefghijklmnopqrstuvwxyz"
    first, again, other = (
        list(itertools.islice(pretrain_tiny.text_windows(tokenizer, text, 5, seed), 300)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert all(tokenizer.decode(window) in text and len(window) == 5 for window in first)
    assert {tokenizer.decode(window)[0] for window in first} == set(text[:22])  # both ends are reached
    assert (
        list(itertools.islice(pretrain_tiny.text_windows(tokenizer, "abc", 3, 0), 2))
        == [tokenizer("abc", add_special_tokens=False)["input_ids"]] * 2
    )
    with pytest.raises(ValueError, match="at least 4 tokens, got 3"):
        next(pretrain_tiny.text_windows(tokenizer, "abc", 4, 0))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--width", "33"], "--width must be a multiple of 32, got 33"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--layers", "-1"], "--layers must be 1 or more, got -1"),
        (["--text", "nosuch.txt"], "--text must be a file, got 'nosuch.txt'"),
        (["--tokenizer", "nosuch"], "--tokenizer must be a folder that holds tokenizer.json, got 'nosuch'"),
    ],
)
def test_arguments_that_make_no_model_are_refused(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        pretrain_tiny.parse(words)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_run_that_was_killed_is_not_taken_for_a_finished_one(tmp_path):
    assert pretrain_tiny.recorded(tmp_path) == 0
    (tmp_path / "training.json").write_text(json.dumps({"steps": 500}))
    assert pretrain_tiny.recorded(tmp_path) == 500
