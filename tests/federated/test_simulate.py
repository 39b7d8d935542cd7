import json
import math
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from federated.channel import Channel, MultipleAccess
from federated.downlink import DigitalDownlink, SelectionDownlink
from federated.simulate import Simulation, line_of, tensors_of
from federated.uplink import AnalogUplink, QuantizedUplink, SketchedUplink
from tests.federated.small import SGD, M, small_data, small_model, small_parts, training

DATA, PARTS, TEST = small_data(), small_parts(), small_data(40, seed=1)
REPOSITORY = Path(__file__).resolve().parents[2]


def simulation(output_dir=None, *, model=None, **arguments):
    return Simulation(training(model), DATA, PARTS, test=TEST, output_dir=output_dir, **arguments)


def remembering():
    """Links that remember all there is: θ̂_m, e_m, a residual."""
    return {
        "downlink": SelectionDownlink(Channel.from_snr(15.0, subchannels=4, ofdm_symbols=60), 3),
        "uplink": SketchedUplink(
            AnalogUplink(MultipleAccess.from_snr(15.0, subchannels=4), 0.1),
            chunk_size=65, sketch_size=40, sparsity=8, residual=0.9,
        ),
        "server_momentum": 0.5,
        "late": 0.2,
    }  # fmt: skip


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("memory_limit", [1 << 30, 1])
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path, memory_limit):
    """At a limit of one byte all that is remembered is memory-mapped."""
    whole = simulation(tmp_path / "whole", memory_limit=memory_limit, devices_at_once=2, **remembering())
    rows = list(whole.run(7, progress=False))
    arguments = {"memory_limit": memory_limit, "devices_at_once": 2, "checkpoint_every": 3}
    first = simulation(tmp_path / "parts", **arguments, **remembering())
    for _ in range(5):  # stopped two rounds after a checkpoint
        first.step()
    second = simulation(tmp_path / "parts", **arguments, **remembering())
    assert second.resume() == 3
    rest = list(second.run(7, progress=False))
    assert without_seconds(rest) == without_seconds(rows[3:])
    assert torch.equal(second.theta, whole.theta)
    assert torch.equal(second.world.theta_hat, whole.world.theta_hat)
    assert torch.equal(second.world.error, whole.world.error)
    written = [json.loads(line) for line in (tmp_path / "parts" / "rows.jsonl").read_text().splitlines()]
    assert without_seconds(written) == without_seconds(rows)
    assert [path.name for path in (tmp_path / "parts").glob("*checkpoint*")] == ["checkpoint-00000007"]
    assert (tmp_path / "parts" / "memory" / "error.bin").exists() == (memory_limit == 1)


KILLED = """
import sys
from tests.federated.test_simulate import remembering, simulation
sim = simulation(sys.argv[1], checkpoint_every=2, devices_at_once=3, memory_limit=1, **remembering())
sim.resume()
for row in sim.run(int(sys.argv[2]), progress=False):
    print(row["round"], flush=True)
"""


def test_kill_9_in_the_middle_of_a_run_resumes_bit_equal(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), "400"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 5:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    with open(tmp_path / "killed" / "rows.jsonl", "a") as file:
        file.write('{"round": 9')  # a line cut off
    resumed = simulation(tmp_path / "killed", checkpoint_every=2, devices_at_once=3, memory_limit=1, **remembering())
    reached = resumed.resume()
    assert reached >= 4
    rows = list(resumed.run(reached + 3, progress=False))
    whole = simulation(devices_at_once=3, memory_limit=1, **remembering())
    expected = list(whole.run(reached + 3, progress=False))
    assert without_seconds(rows) == without_seconds(expected)[reached:]
    assert torch.equal(resumed.theta, whole.theta)
    written = (tmp_path / "killed" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in written] == list(range(1, reached + 4))


def test_a_seed_decides_the_run():
    first, again, other = (list(simulation(seed=seed, **remembering()).run(3, progress=False)) for seed in (0, 0, 1))
    assert without_seconds(first) == without_seconds(again)
    assert without_seconds(first) != without_seconds(other)


def test_a_new_run_takes_the_place_of_an_old_one(tmp_path):
    list(simulation(tmp_path, checkpoint_every=2).run(5, progress=False))
    list(simulation(tmp_path, checkpoint_every=2).run(3, progress=False))
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000003"]


def test_checkpoints_of_other_programs_are_left_alone(tmp_path):
    """transformers' Trainer names its folders checkpoint-STEP."""
    for name in ("checkpoint-500", "checkpoint-best", "checkpoint-00000009"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("precious")
    assert simulation(tmp_path).resume() == 0
    list(simulation(tmp_path, checkpoint_every=1).run(3, progress=False))
    kept = ["checkpoint-00000003", "checkpoint-00000009", "checkpoint-500", "checkpoint-best"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == kept
    assert simulation(tmp_path).resume() == 3


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    list(simulation(tmp_path, checkpoint_every=2).run(2, progress=False))
    with pytest.raises(
        ValueError, match=r"is of another run: uplink was IdealUplink\(\), now QuantizedUplink\(levels=3\)"
    ):
        simulation(tmp_path, uplink=QuantizedUplink(levels=3)).resume()
    with pytest.raises(ValueError, match="seed was 0, now 5"):
        simulation(tmp_path, seed=5).resume()
    assert simulation(tmp_path / "nothing").resume() == 0


def selection(snr_db=10.0):
    return SelectionDownlink(Channel.from_snr(snr_db, ofdm_symbols=200), 3)


def over_the_air(threshold=0.1):
    return SketchedUplink(AnalogUplink(MultipleAccess(), threshold), chunk_size=65, sketch_size=40, sparsity=8)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"downlink": selection(11.0)}, "downlink was SelectionDownlink"),
        ({"uplink": over_the_air(0.2)}, r"uplink was SketchedUplink\(codec=Codec\(.*threshold=0.1"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.2)}, r"optimizer was SGD\(lr=0.1\), now SGD\(lr=0.2\)"),
        ({"server_lr": 0.5}, "server_lr was 1.0, now 0.5"),
        ({"server_momentum": 0.5}, "server_momentum was 0.0, now 0.5"),
        ({"asked": 2}, "asked was None, now 2"),
        ({"late": 0.5}, "late was 0.0, now 0.5"),
        ({"parts": small_parts((10, 30, 20, 35, 25))}, "rows of the devices was"),
    ],
)
def test_no_setting_changes_unnoticed_between_a_checkpoint_and_its_resume(tmp_path, other, sentence):
    def make(optimizer=SGD, parts=PARTS, **arguments):
        arguments = {"downlink": selection(), "uplink": over_the_air(), "checkpoint_every": 1} | arguments
        return Simulation(training(optimizer=optimizer), DATA, parts, output_dir=tmp_path, **arguments)

    make().step()
    assert make().resume() == 1
    with pytest.raises(ValueError, match=f"is of another run: {sentence}"):
        make(**other).resume()


def test_rows_are_json_also_where_a_number_is_not_finite():
    line = line_of({"round": 3, "nmse_up": math.inf, "loss": math.nan, "bits_up": None, "accuracy": 0.5})
    assert line == '{"round": 3, "nmse_up": null, "loss": null, "bits_up": null, "accuracy": 0.5}\n'


def test_rows_tell_what_a_round_did(tmp_path):
    sim = simulation(tmp_path, evaluate_every=2, uplink=QuantizedUplink(levels=3))
    rows = list(sim.run(3, progress=False))
    assert ["accuracy" in row for row in rows] == [False, True, True]
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert written == rows
    assert rows[0]["bits_up"] == M * (64 + 260 * 3)
    assert all(row["seconds"] > 0 for row in rows)


def test_after_a_stated_number_of_skipped_rounds_the_run_ends_and_says_so():
    sim = simulation(uplink=AnalogUplink(MultipleAccess(), 50.0), most_skipped=4)
    rows = list(sim.run(100, progress=False))
    assert len(rows) == 4
    assert (
        sim.ended
        == "4 rounds in a row brought no update, the last because no update reached the server: of 5 devices 5 silent"
    )
    thin = simulation(downlink=DigitalDownlink(Channel.from_snr(-40.0, ofdm_symbols=1)), most_skipped=2)
    assert len(list(thin.run(9, progress=False))) == 2
    assert re.search("could serve no device: too thin", thin.ended)


def test_what_is_not_in_memory_together_does_not_count():
    """Ten thousand devices of a model of 7,850 parameters: 314 MB of updates, 256 devices' of them held at a time."""
    code = """
import resource, torch
from functools import partial
from federated.device import LocalTraining
from federated.models import make_model
from federated.simulate import Simulation
devices = 10_000
data = {"pixel_values": torch.rand(devices, 1, 28, 28), "labels": torch.arange(devices) % 10}
train = LocalTraining(model=make_model("softmax", image_size=28, num_channels=1, num_labels=10), batch_size=1,
                      optimizer=partial(torch.optim.SGD, lr=0.1))
sim = Simulation(train, data, list(torch.arange(devices).split(1)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
row = sim.step()
assert row["participants"] == devices and sim.world.devices_at_once == 256
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    assert peak < 4 * 2**20  # KiB
    assert peak - before < 200 * 2**10


def test_blocks_fit_the_memory_limit():
    large = simulation(model=small_model("cnn"), memory_limit=1 << 30).world.devices_at_once
    small = simulation(model=small_model("cnn"), memory_limit=1 << 20).world.devices_at_once
    assert large == M
    assert 1 <= small < M


def test_columns_become_tensors():
    rows = Dataset.from_dict({"pixel_values": [[0.5, 1.0], [0.25, 0.0]], "labels": [1, 0], "name": ["a", "b"]})
    tensors = tensors_of(rows, ["pixel_values", "labels"])
    assert tensors["pixel_values"].dtype == torch.float32
    assert tensors["labels"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="no column 'image', only pixel_values, labels, name"):
        tensors_of(rows, ["image"])
    with pytest.raises(ValueError, match="rows of column 'name' must be numbers of one shape"):
        tensors_of(rows, ["name"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"asked": M + 1}, rf"asked must be in \[1, num_devices={M}\], got {M + 1}"),
        ({"late": 1.0}, r"late must be in \[0, 1\), got 1.0"),
        ({"most_skipped": 0}, "most_skipped must be at least 1, got 0"),
        ({"devices_at_once": 0}, "devices_at_once must be at least 1, got 0"),
        ({"checkpoint_every": -1}, "checkpoint_every must not be negative, got -1"),
        ({"downlink": SelectionDownlink(Channel(ofdm_symbols=9), M + 1)}, f"at most num_devices={M}, got {M + 1}"),
    ],
)
def test_a_run_that_cannot_be_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        simulation(**arguments)


@pytest.mark.parametrize(
    ("data", "parts", "sentence"),
    [
        (DATA, [torch.arange(3), torch.arange(0)], "no device may be empty, device 1 of 2 is"),
        (DATA, [np.array([0, 120])], r"rows of device 0 must be in \[0, 119\], got 120"),
        (DATA, [], "at least one device is needed, got none"),
        (DATA | {"pixel_values": DATA["pixel_values"][:90]}, PARTS, "labels has 120 rows and pixel_values 90"),
        ({"pixel_values": DATA["pixel_values"]}, PARTS, "need a column 'labels', got pixel_values"),
    ],
)
def test_data_that_cannot_be_are_refused(data, parts, sentence):
    with pytest.raises(ValueError, match=sentence):
        Simulation(training(), data, parts)


def test_checkpoints_need_a_folder():
    with pytest.raises(RuntimeError, match="needs an output_dir"):
        simulation().save()
    with pytest.raises(RuntimeError, match="needs an output_dir"):
        simulation().resume()
