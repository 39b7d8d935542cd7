"""Checkpoints: what is damaged or of another run is refused or said, and what is over stays over."""

import json
import os
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

from checkpoints import CheckpointError, WholeCheckpoints, last_whole, read_state
from sgc import SGC

STEPS = 4
OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "sgc": lambda params: SGC(params, lr=0.1, min_size=8, sketch_size=8),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
}


class Model(torch.nn.Module):
    """Dropout, so that the random numbers matter."""

    _keys_to_ignore_on_save = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout = torch.nn.Linear(16, 4), torch.nn.Dropout()

    def forward(self, x):
        return {"loss": self.layer(self.dropout(x)).square().mean()}


class WholeTrainer(WholeCheckpoints, Trainer):
    pass


def trainer(folder, optimizer="adamw", model=None, callbacks=(), rows=None, **options):
    options = {"max_steps": STEPS, "save_steps": 1, "lr_scheduler_type": "constant", **options}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    args = TrainingArguments(str(folder), save_strategy="steps", dataloader_pin_memory=False, **quiet, **options)
    rows = rows or [{"x": torch.full((16,), float(i))} for i in range(64)]
    model = Model() if model is None else model
    made = (OPTIMIZERS[optimizer](model.parameters()), None)
    return WholeTrainer(model, args, train_dataset=rows, optimizers=made, callbacks=list(callbacks))


def trained(*args, resume=None, **options):
    """Return the weights at the end of a run."""
    run = trainer(*args, **options)
    run.train(resume_from_checkpoint=resume)
    return torch.cat([param.detach().flatten() for param in run.model.parameters()])


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module", params=OPTIMIZERS)
def whole(request, tmp_path_factory):
    """A run with a checkpoint of every step, and its last weights."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, trained(folder, request.param)


def test_an_undamaged_checkpoint_goes_on_bit_for_bit(whole, tmp_path):
    optimizer, folder, weights = whole
    assert torch.equal(trained(tmp_path, optimizer, resume=str(folder / "checkpoint-2")), weights)


DAMAGES = {
    "missing": None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "other bytes": lambda content: bytes(255 - byte for byte in content),
    "a number": lambda content: b"2",
    "a list": lambda content: b"[]",
    "an object": lambda content: b"{}",
    "a step only": lambda content: b'{"global_step": 2}',
    "a step without end": lambda content: b'{"global_step": 1e999}',
    "nested": lambda content: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_refused_or_said_or_changes_nothing(whole, tmp_path, damage):
    optimizer, folder, weights = whole
    files = sorted(path.name for path in (folder / "checkpoint-2").iterdir())
    assert len(files) >= 6
    for number, name in enumerate(files):
        checkpoint = tmp_path / str(number) / "checkpoint-2"
        shutil.copytree(folder / "checkpoint-2", checkpoint)
        file = checkpoint / name
        if DAMAGES[damage] is None:
            file.unlink()
        else:
            file.write_bytes(DAMAGES[damage](file.read_bytes()))
        refused, end = None, weights
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                end = trained(tmp_path / str(number), optimizer, resume=str(checkpoint))
            except CheckpointError as error:
                refused = str(error)
        assert refused is None or (str(checkpoint) in refused and "\n" not in refused)
        assert any(name in str(warning.message) for warning in caught) or torch.equal(end, weights), name


def test_what_a_checkpoint_must_have_is_refused_when_it_is_missing(whole, tmp_path):
    optimizer, folder, _ = whole
    for file in ("optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json"):
        shutil.copytree(folder / "checkpoint-2", tmp_path / file / "checkpoint-2")
        (tmp_path / file / "checkpoint-2" / file).unlink()
        with pytest.raises(CheckpointError, match=file):
            trained(tmp_path / file, optimizer, resume=str(tmp_path / file / "checkpoint-2"))


def test_a_checkpoint_of_another_optimizer_is_refused(whole, tmp_path):
    optimizer, folder, _ = whole
    for other in OPTIMIZERS.keys() - {optimizer}:
        with pytest.raises(CheckpointError, match="optimizer or scheduler state in checkpoint"):
            trained(tmp_path / other, other, resume=str(folder / "checkpoint-2"))


def test_an_optimizer_state_without_moments_is_refused(tmp_path):
    trained(tmp_path)
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    torch.save({**torch.load(file, weights_only=True), "state": {}}, file)
    with pytest.raises(CheckpointError, match="it holds no moments"):
        trained(tmp_path, resume=str(file.parent))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trained(tmp_path)
    other = Model()
    other.more = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="they lack more.bias and 1 more"):
        trained(tmp_path, model=other, resume=str(tmp_path / "checkpoint-2"))
    other = Model()
    other.layer = torch.nn.Linear(16, 4, bias=False)
    with pytest.raises(CheckpointError, match="they have, and the model has not, layer.bias"):
        trained(tmp_path, model=other, resume=str(tmp_path / "checkpoint-2"))
    other = Model()
    other.layer = torch.nn.Linear(16, 5)
    with pytest.raises(CheckpointError, match="the weights in checkpoint"):
        trained(tmp_path, model=other, resume=str(tmp_path / "checkpoint-2"))


def test_experts_that_are_stacked_in_memory_and_apart_in_files_go_on_bit_for_bit(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=2, **sizes)

    def run(resume=None, seed=0):
        torch.manual_seed(seed)
        return trained(tmp_path, model=MixtralForCausalLM(config), rows=rows, max_steps=2, resume=resume)

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (16, 8))]
    weights = run()
    assert torch.equal(run(str(tmp_path / "checkpoint-1"), seed=1), weights)


def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    trained(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name / "checkpoint-2")
        torch.save(Touch(), tmp_path / name / "checkpoint-2" / name)
        with pytest.raises(CheckpointError):
            trained(tmp_path / name, resume=str(tmp_path / name / "checkpoint-2"))
    assert not (tmp_path / "ran").exists()


def test_a_run_that_is_over_stays_over(whole, tmp_path):
    optimizer, folder, weights = whole
    shutil.copytree(folder, tmp_path / "again")
    last = tmp_path / "again" / f"checkpoint-{STEPS}"
    times = {path: path.stat().st_mtime_ns for path in last.iterdir()}
    assert torch.equal(trained(tmp_path / "again", optimizer, resume=True), weights)
    assert names(tmp_path / "again") == names(folder)
    assert {path: path.stat().st_mtime_ns for path in last.iterdir()} == times
    assert torch.equal(trained(tmp_path / "again", optimizer, resume=str(last), max_steps=STEPS - 1), weights)
    assert not torch.equal(trained(tmp_path / "again", optimizer, resume=str(last), max_steps=STEPS + 1), weights)


class Clock(TrainerCallback):
    """Puts the files of the first checkpoint an hour ahead, and notes which ones are there after each."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(names(Path(args.output_dir)))
        if state.global_step == 1:
            for path in Path(args.output_dir, "checkpoint-1").iterdir():
                os.utime(path, (time.time() + 3600,) * 2)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_newest_checkpoints_are_kept_whatever_the_clock_says(tmp_path, limit):
    clock = Clock()
    trained(tmp_path, save_total_limit=limit, callbacks=[clock])
    for step, seen in enumerate(clock.seen, 1):
        assert seen == [f"checkpoint-{i}" for i in range(max(1, step - limit + 1), step + 1)]
    assert last_whole(tmp_path) == str(tmp_path / f"checkpoint-{STEPS}")


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"global_step": step, "max_steps": 200, "log_history": [], "stateful_callbacks": {}}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-100")


def test_a_checkpoint_just_written_is_kept_beside_one_of_an_earlier_run_that_went_further(tmp_path):
    trained(tmp_path, max_steps=3, save_steps=3)
    clock = Clock()
    trained(tmp_path, max_steps=2, save_total_limit=1, callbacks=[clock])
    assert clock.seen == [["checkpoint-1"], ["checkpoint-2"]]


def test_the_last_checkpoint_stays_beside_the_best(tmp_path):
    run = trainer(tmp_path, save_total_limit=1)
    run.state.best_model_checkpoint = None

    class FirstIsBest(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.best_model_checkpoint = os.path.relpath(tmp_path / "checkpoint-1")

    run.add_callback(FirstIsBest())
    run.train()
    assert names(tmp_path) == ["checkpoint-1", f"checkpoint-{STEPS}"]


def test_the_state_says_which_number_is_wrong(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": -1, "max_steps": 3}')
    with pytest.raises(CheckpointError, match="must hold global_step, a whole number above 0, got -1"):
        read_state(tmp_path)
