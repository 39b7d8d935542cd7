"""The Flower app on the engine: SuperLink, SuperNodes and `flwr run` as processes on loopback."""

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from federated import partition
from federated.device import LocalTraining
from federated.models import make_model
from federated.simulate import Simulation
from tests.tolerances import SUM

pytest.importorskip("flwr", reason="Flower needs Python 3.11")
REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
TIMEOUT = 300  # seconds; a SuperNode starts a process for every message


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def process(log, environment, *command):
    with open(log, "w") as file:
        started = subprocess.Popen(
            [SCRIPTS / command[0], *command[1:]], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def wait_for(condition, what, logs, processes):
    end = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > end or any(each.poll() for each in processes):
            tails = "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in logs if log.exists())
            pytest.fail(f"no {what} within {TIMEOUT} s\n{tails}")
        time.sleep(0.5)


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def simulated(rounds):
    """The same rounds in the simulator."""
    raw = load_digits()
    train = np.arange(len(raw.target)) % 5 != 0
    pictures = torch.from_numpy(raw.images[train][:, None].astype(np.float32) / 16)
    labels = torch.from_numpy(raw.target[train]).long()
    training = LocalTraining(
        model=make_model("softmax", image_size=8, num_channels=1, num_labels=10),
        steps=2,
        batch_size=32,
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )
    parts = partition.iid(Dataset.from_dict({"labels": labels.numpy()}), 2)
    sim = Simulation(training, {"pixel_values": pictures, "labels": labels}, parts)
    list(sim.run(rounds, progress=False))
    return sim.theta


@pytest.mark.parametrize("engine", ["simulation on Ray", "SuperLink and two SuperNodes"])
def test_flwr_run_gives_the_simulators_rounds(tmp_path, engine):
    if not shutil.which("flwr", path=SCRIPTS):
        pytest.skip("needs Flower's commands beside the interpreter")
    rounds = 3 if engine == "simulation on Ray" else 1
    port = free_port()
    home, out = tmp_path / "flower", tmp_path / "out"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
    }
    logs = [tmp_path / f"{name}.log" for name in ("superlink", "supernode-0", "supernode-1", "run")]
    common = ["--insecure", "--host", "127.0.0.1"]
    with contextlib.ExitStack() as stack:
        simulate = ["--simulation"] if engine == "simulation on Ray" else []
        command = ["flower-superlink", *common, "--port", str(port), *simulate]
        processes = [stack.enter_context(process(logs[0], environment, *command))]
        wait_for(lambda: answers(port), "SuperLink", logs, processes)
        for number in (0, 1) if not simulate else ():
            command = ["flower-supernode", *common, "--port", str(free_port()), "--superlink", f"127.0.0.1:{port}"]
            command += ["--node-config", f"partition-id={number}"]
            processes.append(stack.enter_context(process(logs[1 + number], environment, *command)))
        command = ["flwr", "run", str(REPOSITORY / "recipes" / "federated_flower"), "here"]
        command += ["--run-config", f"rounds={rounds} output='{out}'"]
        command += ["--federation-config", "num-supernodes=2"] if simulate else ["--stream"]
        processes.append(stack.enter_context(process(logs[3], environment, *command)))
        wait_for((out / "rows.jsonl").exists, "result", logs, processes)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [(row["round"], row["participants"], row["late"]) for row in rows] == [(t + 1, 2, 0) for t in range(rounds)]
    weights = load_file(out / "model" / "model.safetensors")
    theta = torch.cat([weights["linear.weight"].flatten(), weights["linear.bias"]])
    expected = simulated(rounds)
    assert (theta - expected).abs().max() <= 4 * SUM * expected.abs().max()
    assert rows[-1]["loss"] < math.log(10)  # where training starts
