"""FSDP2 on two processes: the same update as in one, whole checkpoints, the same refusals on every rank."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgc.moments import RULES
from sgc.parallel import fsdp2
from sgc.state import tensor_layout
from tests.distributed import fsdp_worker
from tests.distributed.fsdp_worker import ALIGNED, CUT, EVERYWHERE, SMALL
from tests.processes import Processes

pytestmark = pytest.mark.xdist_group("sharded")  # one set of processes for all

REPOSITORY = Path(__file__).resolve().parent.parent
TIMEOUT = 120  # seconds that a job may take
SUM_ORDER = 2e-5  # of the largest change: fp32 sums in another order, carried through six steps
SKETCH = {"sketch_size": 16, "sparsity": 2}
WHOLE = {"sketch_size": 64, "sparsity": 4}  # k ≥ n: no projection, so recovery has no near ties that rounding decides
ALL = {"sketch_size": 64, "sparsity": 32}  # every entry of a chunk


@pytest.fixture(scope="module")
def pools():
    kept = []
    yield kept
    for pool in kept:
        pool.close()


@pytest.fixture
def ranks(pools):
    """Run jobs of `fsdp_worker` in two processes that stay up, new ones after a failure: one may still wait."""

    def run(job, **keywords):
        if not pools:
            pools.append(Processes(fsdp_worker.WORLD))
        try:
            return pools[0].run(functools.partial(getattr(fsdp_worker, job), **keywords), timeout=TIMEOUT)
        except BaseException:
            pools.pop().kill()
            raise

    return run


# ------------------------------------------------------------------------------------- the same as in one process


def test_two_ranks_make_the_update_of_one_process_on_tensors_of_any_shape(ranks):
    for result in ranks("agree", shapes=EVERYWHERE):
        assert result["weights"] <= SUM_ORDER
        assert max(result["state"].values()) <= SUM_ORDER
        assert result["grad_norm"] <= 1e-6
        assert result["steps"]
        assert result["equal over ranks"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shapes", [ALIGNED, CUT], ids=["aligned", "cut"])
def test_two_ranks_make_the_update_of_one_process_under_each_rule(ranks, rule, shapes):
    # where a boundary cuts a chunk, the top entries of it are taken on each side: all of them, to compare; and Adam's
    # ratio, which "subspace" recovers, is ±1 everywhere after one step, so there too rounding would decide
    options = dict(WHOLE if shapes is ALIGNED else ALL, recovered=32 if rule == "subspace" else 4)
    for result in ranks("agree", shapes=shapes + SMALL, moments=rule, **options):
        assert result["weights"] <= SUM_ORDER
        assert max(result["state"].values()) <= SUM_ORDER
        assert result["equal over ranks"]


@pytest.mark.parametrize("rule", RULES)
def test_sketches_agree_up_to_near_ties_of_the_recovery(ranks, rule):
    for result in ranks("agree", shapes=ALIGNED, steps=2, moments=rule, **SKETCH):
        assert result["off"] <= 0.01
        assert result["equal over ranks"]


@pytest.mark.parametrize("shapes", [ALIGNED, CUT], ids=["aligned", "cut"])
def test_a_sparse_update_without_a_sketch_agrees(ranks, shapes):
    for result in ranks("agree", shapes=shapes, sketch_size=0, sparsity=4 if shapes is ALIGNED else 32):
        assert result["weights"] <= SUM_ORDER
        assert result["equal over ranks"]


@pytest.mark.parametrize("rule", [None, *RULES])
def test_bf16_weights_agree_to_the_last_bit_but_one(ranks, rule):
    options = {} if rule is None else {**WHOLE, "moments": rule}
    for result in ranks(
        "agree", shapes=ALIGNED + SMALL, steps=3, dtype="bfloat16", stochastic_rounding=False, **options
    ):
        assert result["in ulps"] <= 2
        assert result["off"] <= 0.02
        assert result["equal over ranks"]


def test_a_mixed_precision_policy_computes_in_bf16_and_updates_in_fp32(ranks):
    for result in ranks("agree", shapes=EVERYWHERE, compute="bfloat16", steps=3):
        assert result["off"] <= 0.01  # a weight on the edge of two bf16 numbers has another gradient
        assert result["equal over ranks"]


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)])
def test_hybrid_sharding_sums_over_the_dimension_that_shards(ranks, mesh):
    for result in ranks("agree", shapes=EVERYWHERE, mesh=mesh):
        assert result["weights"] <= SUM_ORDER
        assert result["equal over ranks"]


@pytest.mark.parametrize("shape", CUT)
@pytest.mark.parametrize("rule", ["residual", "whitened"])
def test_the_sketch_of_a_cut_chunk_is_the_sum_of_what_each_side_encodes(ranks, shape, rule):
    for result in ranks("cut_sketches", shape=shape, sparsity=2, moments=rule):
        assert result["weights"] <= SUM_ORDER
        # at the boundary, up to 2·s entries were encoded; one row has none, and rank 1 no entry of it
        assert result["chunks that another top would give"] == (shape[0] > 1)


def test_a_tensor_that_every_rank_holds_whole_is_updated_like_a_plain_one(ranks):
    assert ranks("replicated") == [0.0, 0.0]


def test_gradients_of_zeros_move_nothing_but_the_decay(ranks):
    for apart, steps in ranks("zero_gradients", shapes=EVERYWHERE):
        assert apart <= 1e-6
        assert steps == 0


@pytest.mark.parametrize(
    ("value", "shapes", "options"),
    [
        (math.nan, ALIGNED, {}),
        (math.nan, CUT, {}),
        (math.nan, ALIGNED, WHOLE),
        (math.nan, CUT, {**WHOLE, "moments": "sketched"}),
        (math.nan, SMALL, {}),
        (math.inf, ALIGNED, {**WHOLE, "moments": "subspace"}),
        (1e30, CUT, WHOLE),
        (1e30, [(2,), *SMALL], {}),  # one entry on each rank
    ],
)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(ranks, shapes, value, options):
    for result in ranks("not_finite", shapes=shapes, value=value, **options):
        assert result["skipped"] == 1
        assert all(result.values())


def test_a_model_may_be_moved_between_steps(ranks):
    """torch swaps the contents of sharded parameters then, which weak references to them would forbid."""
    assert all(ranks("moved", shapes=EVERYWHERE, **SKETCH))


def test_ranks_round_with_other_random_numbers(ranks):
    for agreeing, moved in ranks("rounding"):
        assert moved > 0.01  # of 2048 weights, so that agreement would show
        assert agreeing < 1


# ------------------------------------------------------------------------------------------- memory and traffic


def test_a_rank_holds_the_state_of_its_rows_only(ranks):
    results = ranks("agree", shapes=[(64, 96), (66, 64)], steps=1, **SKETCH)
    for result in results:
        assert result["bytes"] == result["expected bytes"]
    shared = 2 * 4 + 4 * (96 + 64)  # `step` and C
    assert sum(result["bytes"] for result in results) == results[0]["bytes of one process"] + shared


def test_a_step_makes_one_all_reduce_of_statistics_and_one_of_cut_sketches(ranks):
    for result in ranks("traffic", shapes=ALIGNED + SMALL, **SKETCH):
        cols = 96 + 40 + 64 + 9 + 64 + 32
        # C of every matrix, its norm and the mean of R, the norms of the dense; and nothing is gathered
        assert result == {"all-reduced": [cols + 2 * len(ALIGNED) + len(SMALL)], "collectives": 1}
    for result in ranks("traffic", shapes=ALIGNED + CUT + SMALL, **SKETCH):
        assert len(result["all-reduced"]) == result["collectives"] == 2
        group = {**SKETCH, "recovered": 2, "chunk_size": 32, "min_size": 10, "moments": "residual", "rank": None}
        chunks = sum(tensor_layout(shape, {**group, "state_dtype": "float32"}).chunks for shape in CUT)
        assert result["all-reduced"][1] == 16 * chunks


# ------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        *(("dcp", rule) for rule in (None, *RULES)),
        *(("torch", rule) for rule in (None, "residual")),
        *(("full", rule) for rule in (None, "sketched")),
        *(("broadcast", rule) for rule in (None, "residual")),
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(ranks, tmp_path, how, rule):
    options = {} if rule is None else {**SKETCH, "moments": rule}
    for result in ranks("resume", folder=str(tmp_path), how=how, shapes=EVERYWHERE, **options):
        assert result == {"loaded": True, "resumed": True}


@pytest.mark.parametrize(
    ("how", "state"),
    [("dcp", "float32"), ("dcp", "bfloat16"), ("dcp", "int8"), ("torch", "bfloat16"), ("full", "int8")],
)
def test_a_resumed_run_in_bf16_with_stochastic_rounding_ends_in_the_same_bits(ranks, tmp_path, how, state):
    options = {**SKETCH, "state_dtype": state, "dtype": "bfloat16"}
    for result in ranks("resume", folder=str(tmp_path), how=how, shapes=EVERYWHERE, **options):
        assert result == {"loaded": True, "resumed": True}


@pytest.mark.parametrize("rule", [None, *RULES])
def test_a_run_goes_on_with_another_number_of_ranks(ranks, tmp_path, rule):
    options = {} if rule is None else {**ALL, "recovered": 32 if rule == "subspace" else 4, "moments": rule}
    for result in ranks("other_ranks", folder=str(tmp_path), shapes=EVERYWHERE, **options):
        assert len(result) == 3
        assert max(result.values()) <= SUM_ORDER, result


@pytest.mark.parametrize("options", [{}, SKETCH, {"sketch_size": 64, "state_dtype": "int8"}], ids=str)
def test_a_state_goes_from_one_process_to_shards_and_back(ranks, options):
    assert ranks("whole_state_loads", shapes=EVERYWHERE, **options) == [True, True]


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_accelerate_resumes_in_the_same_bits(ranks, tmp_path, kind):
    assert ranks("accelerate_resume", folder=str(tmp_path), kind=kind, **SKETCH) == [True, True]


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_the_trainer_resumes_in_the_same_bits(ranks, tmp_path, kind):
    for result in ranks("trainer_resume", folder=str(tmp_path), kind=kind, **SKETCH):
        assert result["same bits"]
        assert result["losses"][-1] < result["losses"][0]
        assert not result["warned"]  # nothing is left out of the optimizer, and its state was loaded


# ------------------------------------------------------------------------------------------------------ recipe


def test_the_recipe_under_accelerate_launch_learns_as_in_one_process_and_saves_a_model_that_opens(tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = ["recipes/finetune.py", "--use_cpu", "--smoke", "--disable_tqdm", "True", "--eval_strategy", "no"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/configs/fsdp2.yaml"]
    launch += ["--main_process_port", "0", "tests/distributed/fsdp_on_cpu.py"]
    commands = {
        "sharded": [*launch, *recipe, "--per_device_train_batch_size", "16"],
        "alone": [*recipe, "--per_device_train_batch_size", "32"],
    }
    started = {
        name: subprocess.Popen(
            [sys.executable, *command, "--output_dir", str(tmp_path / name)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in commands.items()
    }
    losses = {}
    for name, process in started.items():
        said, _ = process.communicate(timeout=2 * TIMEOUT)
        assert process.returncode == 0, said
        (run,) = json.loads((tmp_path / name / "results.json").read_text())["runs"]
        losses[name] = [entry["loss"] for entry in run["history"] if "loss" in entry]
    assert len(losses["alone"]) == 10
    assert losses["sharded"] == pytest.approx(losses["alone"], rel=1e-4)  # sums in another order, grown over ten steps
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in losses]
    apart = fsdp_worker.gap(*[[p.detach() for p in model.parameters()] for model in models])
    assert apart <= 1e-2


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (
            "FSDP1",
            "TypeError: SGC needs the shapes of the tensors it trains, and FSDP1 has flattened parameter 0: use FSDP2",
        ),
        (
            "FSDP1 with original parameters",
            "TypeError: SGC needs the shapes .* FSDP1 has flattened parameter .: use FSDP2",
        ),
        (
            "columns",
            r"TypeError: SGC trains tensors that are sharded along dimension 0 .*parameter 0 has .*Shard\(dim=1\)",
        ),
        ("other placements", "TypeError: the gradient of parameter 0 must have its placements"),
        ("rank", "ValueError: rank must be None where tensors are sharded, got 4 for parameter 0"),
        ("attach", "TypeError: compressed gradients need whole parameters"),
        ("shape", "ValueError: the state of parameter 0 should hold"),
    ],
)
def test_what_cannot_be_done_is_refused_on_every_rank_with_a_sentence(ranks, case, sentence):
    for result in ranks("refused", case=case):
        assert re.match(sentence, result), result


def test_a_plain_tensor_is_not_sharded():
    assert not fsdp2.is_sharded(torch.zeros(3))
    assert fsdp2.local(torch.ones(3)).equal(torch.ones(3))
