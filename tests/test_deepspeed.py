"""ZeRO 1, 2 and 3 for real, two processes on a CPU: every update is the one that a single process makes."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sgc.zero_checkpoint import reshape_checkpoint
from tests.distributed import deepspeed_worker as worker
from tests.processes import Processes

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason='needs DeepSpeed: pip install --no-build-isolation "sgc[deepspeed]"',
    ),
    pytest.mark.xdist_group("deepspeed"),  # one set of processes for all
]
ROOT = Path(__file__).resolve().parents[1]

STEPS, HALF = 4, 2
SKETCHED = {"sketch_size": 16, "sparsity": 4}
# Gradients are summed in another order: about 1e-7 of a weight's size per step, as between DDP and one process.
ORDER = 1e-6
# Where sketches are, two nearly equal entries may change places with that order, and the update moves the other one.
SWAPPED = 2e-3


def differences(one, other):
    """The largest difference between two sets of weights, and the share of entries that differ by more than ORDER."""
    assert one.keys() == other.keys()
    apart = torch.cat([(one[name] - other[name]).abs().view(-1) for name in one])
    return apart.max().item(), (apart > ORDER).double().mean().item()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def two():
    processes = Processes(2)
    yield lambda function, *args, **kwargs: processes.run(functools.partial(function, **kwargs), *args)
    processes.close()


@pytest.fixture(scope="module")
def one():
    processes = Processes(1)
    yield lambda function, *args, **kwargs: processes.run(functools.partial(function, **kwargs), *args)[0]
    processes.close()


@pytest.fixture(scope="module")
def whole(two):
    """Runs of four steps without a break, made once."""
    return functools.lru_cache(lambda stage: two(worker.together, stage, 0, STEPS))


@pytest.fixture(scope="module")
def halves(two, tmp_path_factory):
    """Checkpoints after two steps, made once."""

    @functools.lru_cache
    def make(stage):
        folder = tmp_path_factory.mktemp(f"zero{stage}")
        two(worker.together, stage, 0, HALF, save=str(folder))
        return folder

    return make


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_make_the_updates_of_one_process(whole, stage):
    first, second = whole(stage)
    assert same(first["weights"], second["weights"])
    assert differences(first["weights"], worker.alone(STEPS))[0] < ORDER
    assert first["losses"][-1] < first["losses"][0]
    assert first["left out"] == second["left out"] == []  # SGCCallback refuses nothing here


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kwargs", [SKETCHED, {"sparsity": 8}], ids=["residual", "sparse"])
def test_sketches_of_cut_chunks_add_up(two, stage, kwargs):
    first, second = two(worker.together, stage, 0, 1, kwargs=kwargs)
    assert same(first["weights"], second["weights"])
    assert differences(first["weights"], worker.alone(1, **kwargs))[1] < SWAPPED


@pytest.mark.parametrize("stage", [2, 3])
def test_accumulation_and_clipping_are_those_of_one_process(two, stage):
    first, _ = two(worker.together, stage, 0, STEPS, micro=2, config={"gradient_clipping": 0.5})
    assert differences(first["weights"], worker.alone(STEPS, micro=2, clip=0.5))[0] < ORDER


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_makes_the_same_updates(two, whole, stage):
    zero = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    first, _ = two(worker.together, stage, 0, STEPS, zero=zero)
    assert differences(first["weights"], whole(stage)[0]["weights"])[0] < ORDER


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_keeps_fp32_weights_and_learns(two, whole, stage):
    first, second = two(worker.together, stage, 0, STEPS, config={"bf16": {"enabled": True}})
    assert same(first["weights"], second["weights"])
    assert first["losses"] == pytest.approx(whole(stage)[0]["losses"], rel=2e-2)  # bf16 has 8 bits


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resume_is_bit_equal(two, whole, halves, stage):
    first, _ = two(worker.together, stage, HALF, STEPS, load=str(halves(stage)))
    assert same(first["weights"], whole(stage)[0]["weights"])


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_resume_is_bit_equal_with_small_sketches(two, tmp_path, state_dtype):
    kwargs = {**SKETCHED, "state_dtype": state_dtype}
    uninterrupted, _ = two(worker.together, 3, 0, STEPS, kwargs=kwargs)
    two(worker.together, 3, 0, HALF, kwargs=kwargs, save=str(tmp_path))
    first, _ = two(worker.together, 3, HALF, STEPS, kwargs=kwargs, load=str(tmp_path))
    assert same(first["weights"], uninterrupted["weights"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_another_number_of_ranks_is_refused_and_a_rewritten_checkpoint_goes_on(one, two, halves, tmp_path, stage):
    assert "world size of 2" in one(worker.together_says, stage, HALF, STEPS, load=str(halves(stage)))
    reshape_checkpoint(halves(stage), tmp_path / "of-1", ranks=1)
    on = one(worker.together, stage, HALF, HALF + 1, load=str(tmp_path / "of-1"), save=str(tmp_path / "on"))
    assert differences(on["weights"], worker.alone(HALF + 1))[0] < ORDER
    reshape_checkpoint(tmp_path / "on", tmp_path / "of-2", ranks=2)
    first, second = two(worker.together, stage, HALF + 1, STEPS, load=str(tmp_path / "of-2"))
    assert same(first["weights"], second["weights"])
    assert differences(first["weights"], worker.alone(STEPS))[0] < ORDER


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_rewritten_to_three_ranks_and_back_is_the_same(two, tmp_path, stage):
    two(worker.together, stage, 0, HALF, kwargs=SKETCHED, save=str(tmp_path / "of-2"))
    reshape_checkpoint(tmp_path / "of-2", tmp_path / "of-3", ranks=3)
    reshape_checkpoint(tmp_path / "of-3", tmp_path / "again", ranks=2)
    (tag,) = (path.name for path in (tmp_path / "of-2").iterdir() if path.is_dir())
    for file in sorted((tmp_path / "of-2" / tag).glob("*optim_states.pt")):
        before, after = (
            torch.load(folder / tag / file.name, weights_only=False)["optimizer_state_dict"]
            for folder in (tmp_path / "of-2", tmp_path / "again")
        )
        flats, inner = ("fp32_flat_groups", "optimizer_state_dict") if stage == 3 else worker.FLAT_12
        for left, right in zip(before[flats], after[flats], strict=True):
            assert torch.equal(left, right)
        for left, right in zip(before[inner]["state"].values(), after[inner]["state"].values(), strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(two, stage):
    first, second = two(worker.together, stage, 0, STEPS, poison=(1, "up.weight"))
    assert first["changed"] == second["changed"] == set()
    assert same(first["weights"], second["weights"])
    assert all(math.isfinite(loss) for loss in first["losses"])


def test_where_deepspeed_does_not_look_only_the_tensor_is_skipped(two):
    config = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    first, second = two(worker.together, 2, 0, STEPS, poison=(1, "up.weight"), config=config)
    assert first["changed"] == second["changed"]
    small = {"gain"}  # its steps of 0.003 do not show in bf16 yet
    assert first["changed"] | small == first["weights"].keys() - {"up.weight"} | small
    assert first["stats"]["skipped_tensors"] + second["stats"]["skipped_tensors"] >= 1
    assert same(first["weights"], second["weights"])


def test_a_rank_is_in_lockstep_where_it_holds_only_padding(whole):
    gains = [run["weights"]["gain"] for run in whole(2)]
    assert not torch.equal(gains[0], torch.ones(2))  # two entries, all on the first rank
    assert torch.equal(*gains)


def test_double_compression_is_refused(two):
    for said in two(worker.together_says, 2, 0, 1, kwargs={"rank": 4}):
        assert "rank must be None under DeepSpeed, which cuts matrices into pieces, got 4" in said


def launched(folder, *options, config="zero3"):
    """Run the recipe's ten steps on two processes, or on one."""
    wrapped = [str(ROOT / "tests" / "distributed" / "deepspeed_recipe.py"), str(ROOT / "recipes" / "finetune.py")]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "configs" / f"{config}.yaml")]
    command = [sys.executable, *launch, "--main_process_port", "0", *wrapped, "--smoke", "--disable_tqdm", "true"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command += ["--output_dir", str(folder), "--generate_samples", "0", "--eval_strategy", "no", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())["runs"][0]


def test_the_recipe_trains_saves_and_resumes_under_the_trainer(tmp_path):
    whole = launched(tmp_path / "whole", "--save_strategy", "steps", "--save_steps", "5", "--save_total_limit", "2")
    alone = launched(tmp_path / "alone", "--per_device_train_batch_size", "32", config="cpu")
    losses = [[entry["loss"] for entry in run["history"] if "loss" in entry] for run in (whole, alone)]
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    of_one_rank = json.loads((tmp_path / "whole" / "sgc_summary.json").read_text())["memory"]["optimizer_state"]
    assert whole["memory"]["optimizer_state"] > 1.5 * of_one_rank  # AdamW's beside it is that of both, too
    launched(tmp_path / "parts", "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-5"))
    assert same(*(load_file(tmp_path / part / "model.safetensors") for part in ("whole", "parts")))


def test_reshape_says_what_is_no_checkpoint(tmp_path, halves):
    with pytest.raises(ValueError, match="is no DeepSpeed checkpoint: it has no file named latest"):
        reshape_checkpoint(tmp_path, tmp_path / "new", ranks=2)
    with pytest.raises(ValueError, match="target must be a new folder"):
        reshape_checkpoint(halves(2), tmp_path, ranks=2)
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        reshape_checkpoint(halves(2), tmp_path / "new", ranks=0)
