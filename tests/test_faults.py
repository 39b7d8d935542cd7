"""Runs that are killed, told to stop, or out of room: what they leave behind resumes, bit for bit.

Where accelerate and torchrun matter, the recipe is started with `accelerate launch`; else it is forked from one process
that has imported it, so that a run takes seconds.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from sgc import SGC
from tests.processes import Processes

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "distributed" / "fault_worker.py"
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "configs" / "cpu_ddp.yaml")]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
RUN = "--smoke --max_train_samples 96 --max_eval_samples 8 --eval_strategy no --generate_samples 0 --save_steps 2"
RUN = [*RUN.split(), "--per_device_train_batch_size", "4", "--save_total_limit", "3", "--disable_tqdm", "true"]
STEPS = 10  # of --smoke
BOUND = 120  # seconds in which a broken run must have ended on a busy machine; alone it takes seconds
START = 300  # seconds in which a run must have reached its third step there
POINTS = ["start", "model.safetensors", "optimizer.pt", "rng_state", "trainer_state.json"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks, reads /proc and limits files as Linux does"),
    pytest.mark.xdist_group("faults"),  # one set of processes for all
]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(left, right):
    """Bit-equal tensors under the same names."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Recipe:
    """A process that has imported the recipe and forks a run for every order."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, str(WORKER), "serve"],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._server.stdout.readline() == "ready\n"

    def run(self, folder, *options, ranks=1, **fault):
        """Train into a folder; give what became of every rank."""
        argv = [*RUN, *options, "--output_dir", str(folder)]
        order = {"ranks": ranks, "argv": argv, "fault": fault or None}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answers = json.loads(self._server.stdout.readline())
        assert not any(answer.get("hung") for answer in answers), answers
        return answers

    def finish(self, folder, *options, ranks=1):
        """Train to the end; give what the first rank said."""
        answers = self.run(folder, *options, ranks=ranks)
        assert all(answer["code"] == 0 for answer in answers), answers
        return answers[0]["said"]

    def close(self):
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(30)


@pytest.fixture(scope="module")
def recipe():
    server = Recipe()
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    """The same run, without a fault: by the number of ranks."""
    folders = {ranks: tmp_path_factory.mktemp(f"undisturbed-{ranks}") for ranks in (1, 2)}
    for ranks, folder in folders.items():
        recipe.finish(folder, ranks=ranks)
    return folders


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# -------------------------------------------------------------------------------- killed while a checkpoint is written


def test_killed_at_any_point_of_saving_the_last_whole_checkpoint_is_resumed_from(recipe, undisturbed, tmp_path):
    for number, point in enumerate(POINTS):
        resume = ["--resume_from_checkpoint"] if number else []
        (answer,) = recipe.run(tmp_path, *resume, at=point, step=4)
        assert answer["code"] in (-signal.SIGKILL, -signal.SIGXFSZ), answer["said"]
        assert not (tmp_path / "checkpoint-4" / "trainer_state.json").exists() or point == POINTS[-1]
        assert (f"goes on from {tmp_path / 'checkpoint-2'}" in answer["said"]) == bool(number)
        if number > 1:  # the folder that the run before left half-written
            assert f"note: {tmp_path / 'checkpoint-4'} is not whole, it is passed over" in answer["said"]
    half = tmp_path / "checkpoint-4"
    assert {path.name for path in half.iterdir()} >= {"model.safetensors", "optimizer.pt", "rng_state.pth"}
    assert 0 < (half / "trainer_state.json").stat().st_size <= 1024
    from transformers.trainer_utils import get_last_checkpoint  # here, as a pool of processes imports this module

    assert get_last_checkpoint(str(tmp_path)) == str(half)  # transformers would take it
    said = recipe.finish(tmp_path, "--resume_from_checkpoint")
    assert f"goes on from {tmp_path / 'checkpoint-2'}" in said
    assert same(weights(tmp_path), weights(undisturbed[1]))
    assert checkpoints(tmp_path) == checkpoints(undisturbed[1])  # the half-written one counted for nothing


def test_killed_while_it_writes_over_a_whole_checkpoint_no_mixture_is_taken_for_whole(recipe, undisturbed, tmp_path):
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.copytree(undisturbed[1] / name, tmp_path / name)
    old = tmp_path / "checkpoint-6"
    (answer,) = recipe.run(tmp_path, "--resume_from_checkpoint", str(old), at="optimizer.pt", step=8)
    assert answer["code"] == -signal.SIGXFSZ
    assert (tmp_path / "checkpoint-8" / "model.safetensors").exists()
    assert f"goes on from {old}" in recipe.finish(tmp_path, "--resume_from_checkpoint")
    assert same(weights(tmp_path), weights(undisturbed[1]))


def test_killed_while_it_deletes_an_old_checkpoint_that_one_is_not_taken_for_whole(recipe, tmp_path):
    (answer,) = recipe.run(tmp_path, "--save_total_limit", "1", at="deleting", step=4)
    assert answer["code"] == -signal.SIGKILL
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    (answer,) = recipe.run(tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2"))
    assert answer["code"] == 2
    assert "there is no whole checkpoint to resume from" in answer["said"]
    (answer,) = recipe.run(tmp_path, "--resume_from_checkpoint", at="start", step=6)
    assert f"goes on from {tmp_path / 'checkpoint-4'}" in answer["said"]


def test_a_checkpoint_is_not_whole_before_every_rank_has_written_its_part(recipe, undisturbed, tmp_path):
    answers = recipe.run(tmp_path, ranks=2, at="rng_state", step=4, rank=1)
    assert answers[1]["code"] == -signal.SIGKILL
    assert answers[0]["code"] == 1
    assert f"{tmp_path / 'checkpoint-2'} is the last whole checkpoint" in answers[0]["said"]
    assert answers[0]["end"] - answers[1]["end"] < BOUND
    assert f"goes on from {tmp_path / 'checkpoint-2'}" in recipe.finish(tmp_path, "--resume_from_checkpoint", ranks=2)
    assert same(weights(tmp_path), weights(undisturbed[2]))


# ------------------------------------------------------------------------------------------------------ a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB: room for two checkpoints."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up_to(folder, room):
    """Leave so many bytes free."""
    free = shutil.disk_usage(folder).free
    (folder / "filler").write_bytes(bytes(max(0, free - room)))


@pytest.mark.parametrize(("ranks", "file"), [(1, "model.safetensors"), (2, "optimizer.pt")])
def test_a_full_disk_is_said_and_leaves_the_old_checkpoint(recipe, undisturbed, small_disk, tmp_path, ranks, file):
    source = undisturbed[ranks] / "checkpoint-6"
    shutil.copytree(source, small_disk / "checkpoint-6")
    model = (source / "model.safetensors").stat().st_size
    fill_up_to(small_disk, model - 10**6 if file == "model.safetensors" else model + 60 * 1024)
    before = {path.name: path.read_bytes() for path in (small_disk / "checkpoint-6").iterdir()}
    answers = recipe.run(small_disk, "--resume_from_checkpoint", ranks=ranks)
    assert answers[0]["code"] == 1
    assert f"checkpoint-8 can't be saved in '{small_disk}': the disk is full" in answers[0]["said"]
    assert f"{small_disk / 'checkpoint-6'} is the last whole checkpoint" in answers[0]["said"]
    assert all(answer["code"] for answer in answers)
    assert before == {path.name: path.read_bytes() for path in (small_disk / "checkpoint-6").iterdir()}
    shutil.copytree(small_disk / "checkpoint-6", tmp_path / "large" / "checkpoint-6")
    recipe.finish(tmp_path / "large", "--resume_from_checkpoint", ranks=ranks)
    assert same(weights(tmp_path / "large"), weights(undisturbed[ranks]))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_write_that_is_refused_is_said_and_leaves_the_old_checkpoint(recipe, tmp_path, file):
    (answer,) = recipe.run(tmp_path, at=file, step=4, kill=False)
    assert answer["code"] == 1
    assert f"checkpoint-4 can't be saved in '{tmp_path}': " in answer["said"]
    assert f"{tmp_path / 'checkpoint-2'} is the last whole checkpoint" in answer["said"]
    assert checkpoints(tmp_path) == ["checkpoint-2"]


# ------------------------------------------------------------------------------------------ under accelerate launch


def launch(folder, *options, **fault):
    """Start two processes as a user does; the fault is told through the environment."""
    return subprocess.Popen(
        [sys.executable, *LAUNCH, str(WORKER), *RUN, *options, "--output_dir", str(folder)],
        env={**ENVIRONMENT, "FAULT": json.dumps(fault)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, launcher):
    deadline = time.time() + START
    while not path.exists():
        assert launcher.poll() is None, launcher.communicate()
        assert time.time() < deadline, f"nothing has written {path}"
        time.sleep(0.1)


def workers_of(launcher):
    """The processes of the ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    workers = [int(child) for child in children if WORKER.name in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(workers) == 2
    return workers


def last_step(folder):
    return max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_told_to_stop_save_and_go_on_bit_for_bit(recipe, undisturbed, tmp_path, number):
    seen = tmp_path / "seen"
    launcher = launch(tmp_path / "run", at="wait", step=3, seen=str(seen))
    wait_for(seen, launcher)
    sent = time.time()
    if number == signal.SIGTERM:  # as a scheduler does, to all processes; torchrun then signals its workers again
        for worker in workers_of(launcher):
            os.kill(worker, number)
    launcher.send_signal(number)  # as a terminal does: torchrun's workers are in sessions of their own
    said, _ = launcher.communicate(timeout=BOUND)
    print(f"{signal.Signals(number).name}: ended after {time.time() - sent:.1f} s, code {launcher.returncode}\n{said}")
    assert launcher.returncode
    step = last_step(tmp_path / "run")
    assert 3 <= step < STEPS
    assert f"interrupted: {tmp_path / 'run'}/checkpoint-{step} is saved" in said
    again = recipe.finish(tmp_path / "run", "--resume_from_checkpoint", ranks=2)
    assert f"goes on from {tmp_path / 'run'}/checkpoint-{step}" in again
    assert same(weights(tmp_path / "run"), weights(undisturbed[2]))


def test_a_rank_killed_in_the_middle_of_a_step_ends_the_run_and_costs_less_than_a_save_interval(
    recipe, undisturbed, tmp_path
):
    seen = tmp_path / "seen"
    launcher = launch(tmp_path / "run", at="backward", step=7, rank=1, seen=str(seen))
    said, _ = launcher.communicate(timeout=START + BOUND)
    elapsed = time.time() - float(seen.read_text())
    print(f"kill -9: ended after {elapsed:.1f} s, code {launcher.returncode}\n{said}")
    assert launcher.returncode == 1
    assert elapsed < BOUND
    assert "Signal 9 (SIGKILL)" in said
    assert last_step(tmp_path / "run") == 6  # steps 1 to 6 of the 7 begun
    assert "goes on from" in recipe.finish(tmp_path / "run", "--resume_from_checkpoint", ranks=2)
    assert same(weights(tmp_path / "run"), weights(undisturbed[2]))


# ----------------------------------------------------------------------- one rank has NaN, Inf, or another optimizer


@pytest.fixture(scope="module")
def processes():
    pool = Processes(2)
    yield pool
    pool.close()


def make(attach, **kwargs):
    """A model, the same on both ranks, whose matrices are compressed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 48), torch.nn.Linear(48, 8)
    )
    optimizer = SGC(model.parameters(), **{"lr": 3e-3, "chunk_size": 64, "min_size": 64, **kwargs})
    if attach:
        optimizer.attach(model)
    return model, optimizer, DistributedDataParallel(model)


def backward(ddp, micro_batches, scale=lambda loss: loss, poison=()):
    """Accumulate the gradients of one step; `poison` = (rank, micro-batch, value) goes into the second matrix."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    for number in range(micro_batches):
        ddp.require_backward_grad_sync = number == micro_batches - 1
        handle = None
        if poison and poison[:2] == (rank, number):
            broken = torch.zeros(48, 48).index_fill(0, torch.tensor([5]), poison[2])
            handle = ddp.module[2].weight.register_hook(broken.add)
        scale(ddp(torch.randn(8, 32, generator=generator)).square().mean() / micro_batches).backward()
        if handle is not None:
            handle.remove()


def moved(model, before):
    return [not torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True)]


def copies(model):
    return [param.detach().clone() for param in model.parameters()]


def same_on_all_ranks(model):
    flat = torch.cat([param.detach().flatten() for param in model.parameters()])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return all(torch.equal(flat, other) and other.isfinite().all() for other in others)


def skip(attach, sketch_size, value, micro_batch):
    model, optimizer, ddp = make(attach, sketch_size=sketch_size)
    backward(ddp, 3)
    optimizer.step()
    optimizer.zero_grad()
    before, skipped = copies(model), [optimizer.stats()["skipped_tensors"]]
    state = {name: tensor.clone() for name, tensor in optimizer.state[model[2].weight].items()}
    backward(ddp, 3, poison=(1, micro_batch, value))
    optimizer.step()
    optimizer.zero_grad()
    assert moved(model, before) == [True, True, False, True, True, True]  # all but the second matrix
    assert all(torch.equal(state[name], tensor) for name, tensor in optimizer.state[model[2].weight].items())
    skipped.append(optimizer.stats()["skipped_tensors"])
    before = copies(model)
    backward(ddp, 3)
    optimizer.step()
    assert all(moved(model, before))  # nothing of it is left
    assert same_on_all_ranks(model)
    return [*skipped, optimizer.stats()["skipped_tensors"]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("attach", "sketch_size"), [(False, 0), (True, 0), (True, 16)])
def test_what_is_not_finite_in_one_micro_batch_of_one_rank_skips_that_tensor_on_every_rank(
    processes, attach, sketch_size, value
):
    for micro_batch in (0, 2):
        assert processes.run(skip, attach, sketch_size, value, micro_batch) == [[0, 1, 1], [0, 1, 1]]


def scaled(attach, sketch_size, micro_batches):
    model, optimizer, ddp = make(attach, sketch_size=sketch_size)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    scales = []
    for poison in ((), (1, 0, math.inf), (1, 0, math.nan), ()):
        before = copies(model)
        backward(ddp, micro_batches, scaler.scale, poison)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert any(moved(model, before)) == (not poison)
        scales.append(math.log2(scaler.get_scale()))
    assert same_on_all_ranks(model)
    return scales


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("attach", "sketch_size"), [(False, 0), (True, 0), (True, 16)])
def test_under_a_grad_scaler_all_ranks_leave_out_the_step_and_lower_their_scale(
    processes, attach, sketch_size, micro_batches
):
    assert processes.run(scaled, attach, sketch_size, micro_batches) == [[11, 10, 9, 10]] * 2


def step_apart(kind):
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    groups = [list(layer.parameters()) for layer in model]
    optimizer = SGC([{"params": group} for group in groups] if kind != "groups" or rank else model.parameters())
    optimizer.check_ranks = False
    torch.manual_seed(rank if kind == "other state" else 0)
    for _ in range(2):
        model(torch.randn(4, 64)).square().sum().backward()
        optimizer.step()
    saved = optimizer.state_dict()
    optimizer = SGC([{"params": group} for group in groups] if kind != "groups" or rank else model.parameters())
    if kind in ("other state", "same state") or (kind == "no state" and rank):
        optimizer.load_state_dict(saved)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("groups", "1 parameter groups on rank 0, 2 on rank 1"),
        ("no state", "steps=0 on rank 0, steps=2 on rank 1 (parameter group 0)"),
        ("other state", "the state on rank 0 is not that on rank 1 (parameter group 0)"),
        ("same state", None),
    ],
)
def test_ranks_with_other_groups_or_another_state_are_refused_at_the_first_step(processes, kind, sentence):
    first, second = processes.run(step_apart, kind)
    assert first == second
    assert first is None if sentence is None else sentence in first
