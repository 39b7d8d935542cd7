"""The table of harnesses and features, every cell a test that ran: `make test-matrix` runs them and writes it.

python -m tests.compatibility            # run the tests of all cells, write the table into README.md and docs/
python -m tests.compatibility --check    # only check that the tests of all cells exist
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
README, PAGE = REPOSITORY / "README.md", REPOSITORY / "docs" / "compatibility.md"
BEGIN, END = "<!-- compatibility: written by make test-matrix -->", "<!-- end of compatibility -->"

FEATURES = (
    "update of one process",
    "bf16",
    "accumulation, clipping",
    "resume, bit-equal",
    "on other numbers of ranks",
    "NaN in one layer",
    "compressed gradients",
)

# A cell is a test, several, or a sentence that says why there is none.
ONE = "there is one process"
MATRIX = "test_matrix.py::test_every_harness_has_every_feature"
TRAINERS = "as in the Trainer"
TRAINER_SKIPS = "test_hf.py::test_gradients_that_are_not_finite_are_said_once_and_counted"

CELLS: dict[str, tuple[str | list[str], ...]] = {
    "torch loop": (
        "test_optimizer.py",
        "test_optimizer.py",
        "test_compressed_grad.py::test_clipping_scales_by_the_true_norm",
        "test_optimizer.py",
        ONE,
        "test_compressed_grad.py::test_a_tensor_with_a_nan_is_skipped_and_counted_and_the_others_move",
        "test_compressed_grad.py",
    ),
    "accelerate": (
        "test_integrations.py",
        "test_hf.py::test_a_loop_with_accelerate_resumes_bit_for_bit",
        "test_hf.py::test_a_loop_with_accelerate_resumes_bit_for_bit",
        "test_hf.py::test_a_loop_with_accelerate_resumes_bit_for_bit",
        ONE,
        "as in a torch loop",
        "as in a torch loop",
    ),
    "Trainer": (
        "test_hf.py::test_the_factory_the_class_and_a_ready_optimizer_train_alike",
        "test_hf.py::test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one",
        "test_hf.py::test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one",
        "test_hf.py::test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one",
        ONE,
        TRAINER_SKIPS,
        "test_hf.py::test_with_compressed_gradients_the_norm_is_reported_and_no_gradient_held",
    ),
    "DDP": (
        "test_ranks.py::test_the_norm_is_that_of_the_mean_gradient",
        "test_ranks.py::test_ranks_stay_bit_identical",
        "test_ranks.py::test_ranks_stay_bit_identical_with_accumulation",
        f"{MATRIX}[DDP *resume",
        "every rank holds the same state",
        "test_ranks.py::test_a_nan_on_one_rank_skips_the_same_tensor_on_every_rank",
        "test_ranks.py",
    ),
    "FSDP2": (
        "test_sharded.py::test_two_ranks_make_the_update_of_one_process_under_each_rule",
        "test_sharded.py::test_bf16_weights_agree_to_the_last_bit_but_one",
        f"{MATRIX}[FSDP2 *accumulation, clipping",
        "test_sharded.py::test_a_resumed_run_ends_in_the_same_bits",
        "test_sharded.py::test_a_run_goes_on_with_another_number_of_ranks",
        "test_sharded.py::test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all",
        "gradients are sharded already, and attach refuses sharded parameters",
    ),
    "FSDP1": ("refused with a sentence that names FSDP2",) * 7,
    **{
        f"ZeRO-{stage}": (
            f"test_deepspeed.py::test_two_ranks_make_the_updates_of_one_process[{stage}]",
            f"{MATRIX}[ZeRO-{stage} bfloat16",
            f"{MATRIX}[ZeRO-{stage} *accumulation, clipping",
            f"test_deepspeed.py::test_resume_is_bit_equal[{stage}]",
            f"test_deepspeed.py::test_another_number_of_ranks_is_refused_and_a_rewritten_checkpoint_goes_on[{stage}]",
            f"{MATRIX}[ZeRO-{stage} *NaN on one rank",
            "refused with a sentence: DeepSpeed holds the gradients itself",
        )
        for stage in (1, 2, 3)
    },
    "PEFT: LoRA, DoRA, embeddings": (
        "test_peft.py::test_what_is_trained_learns_all_else_stays_and_the_state_is_as_predicted",
        TRAINERS,
        "test_peft.py::test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one",
        "test_peft.py::test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one",
        ONE,
        TRAINERS,
        "test_peft.py::test_compressed_gradients_of_adapters_see_no_difference_with_checkpointing",
    ),
    "QLoRA, 4 bits": (
        "test_bitsandbytes.py::test_qlora_learns_and_resumes_in_the_bits_of_an_uninterrupted_run",
        TRAINERS,
        "test_bitsandbytes.py::test_qlora_learns_and_resumes_in_the_bits_of_an_uninterrupted_run",
        "test_bitsandbytes.py::test_qlora_learns_and_resumes_in_the_bits_of_an_uninterrupted_run",
        ONE,
        TRAINERS,
        "test_bitsandbytes.py::test_compressed_gradients_over_4_bits_see_no_difference_with_checkpointing",
    ),
    "TRL's SFTTrainer": (
        "test_trl.py::test_sft_trainer_trains_with_sgc",
        TRAINERS,
        "test_trl.py::test_sft_trainer_trains_with_sgc",
        "test_trl.py::test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one",
        ONE,
        TRAINERS,
        "test_trl.py::test_sft_trainer_trains_with_sgc",
    ),
    "mixture of experts": (
        "test_moe.py::test_a_stack_of_experts_is_updated_as_the_matrix_of_all_their_rows",
        TRAINERS,
        TRAINERS,
        "test_moe.py::test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one",
        ONE,
        TRAINERS,
        "test_moe.py::test_stacked_experts_are_compressed_learn_and_hold_what_is_predicted",
    ),
}


def tests_of(cell: str | list[str]) -> list[str]:
    """Give the tests of a cell; a sentence has none."""
    return [cell] if isinstance(cell, str) and cell.startswith("test_") else cell if isinstance(cell, list) else []


def outcomes() -> dict[str, str]:
    """Run the tests of all cells: outcome by name."""
    files = sorted({test.split("::")[0] for cells in CELLS.values() for cell in cells for test in tests_of(cell)})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", os.environ.get("WORKERS", "auto"), "--dist", "loadgroup"]
        command += [f"--junitxml={report}", *(f"tests/{file}" for file in files)]
        subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "SGC_MATRIX": "all"}, check=False)
        found = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            file = case.attrib["classname"].rpartition(".")[2] + ".py"
            bad = case.find("failure") is not None or case.find("error") is not None
            found[f"{file}::{case.attrib['name']}"] = (
                "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
            )
        return found


def judged(test: str, found: dict[str, str]) -> str:
    """Give ✓ and the number of tests that passed, or what is wrong."""
    start, _, within = test.partition("*")
    of_cell = [outcome for name, outcome in found.items() if name.startswith(start) and within in name]
    if not of_cell or "failed" in of_cell:
        return "✗"
    passed = of_cell.count("passed")
    return f"✓ {passed}" if passed else "not run here"


def table(found: dict[str, str]) -> str:
    """Draw the table, and below it the sentences."""
    notes: list[str] = []
    lines = ["| | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    for harness, cells in CELLS.items():
        drawn = []
        for cell in cells:
            tests = tests_of(cell)
            if tests:
                drawn.append(" ".join(judged(test, found) for test in tests))
                continue
            if cell not in notes:
                notes.append(str(cell))
            drawn.append(f"– ({notes.index(str(cell)) + 1})")
        lines.append(f"| {harness} | " + " | ".join(drawn) + " |")
    said = "; ".join(f"({number}) {note}" for number, note in enumerate(notes, 1))
    return "\n".join([*lines, "", f"✓ n: n tests of the cell passed. {said}."])


def page(found: dict[str, str]) -> str:
    """Draw the whole page: the table, the tests behind each cell, and the matrix."""
    lines = ["# Compatibility", "", "Written by `make test-matrix`, which runs every test named here.", ""]
    lines += [table(found), ""]
    lines += ["## The tests behind the cells", ""]
    for harness, cells in CELLS.items():
        for feature, cell in zip(FEATURES, cells, strict=True):
            lines += [f"* {harness}, {feature}: `tests/{test}`" for test in tests_of(cell)]
    matrix = {name: outcome for name, outcome in found.items() if name.startswith(MATRIX)}
    passed = sum(outcome == "passed" for outcome in matrix.values())
    lines += ["", "## Harness × dtype × moment rule × feature", ""]
    lines += [f"{passed} of {len(matrix)} combinations passed (`tests/test_matrix.py`)."]
    lines += [f"* {outcome}: {name}" for name, outcome in matrix.items() if outcome != "passed"]
    return "\n".join(lines) + "\n"


def missing() -> list[str]:
    """List tests of the table that are not there."""
    absent = []
    for cells in CELLS.values():
        assert len(cells) == len(FEATURES)
        for cell in cells:
            for test in tests_of(cell):
                file, _, name = test.partition("::")
                path = REPOSITORY / "tests" / file
                function = name.split("[")[0]
                if not path.exists() or (name and not re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE)):
                    absent.append(test)
    return absent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check that the tests of all cells exist")
    if absent := missing():
        sys.exit("compatibility: no such test: " + ", ".join(absent))
    if parser.parse_args().check:
        return
    found = outcomes()
    PAGE.write_text(page(found))
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + "\n" + table(found) + "\n" + END + rest.split(END)[1])
    if any(outcome == "failed" for outcome in found.values()):
        sys.exit("compatibility: " + ", ".join(name for name, outcome in found.items() if outcome == "failed"))


if __name__ == "__main__":
    main()
