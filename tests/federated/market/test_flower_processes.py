"""A market between processes: a SuperLink, two SuperNodes and the buyer's ServerApp, on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("flwr.app", reason="Flower needs Python 3.11")

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = Path(sys.executable).parent
WAIT = 240  # seconds; on two busy cores a minute is usual

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "shop"
version = "1.0.0"
description = "A market"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "test"

[tool.flwr.app.components]
serverapp = "shop.buyer:app"
clientapp = "shop.seller:app"

[tool.flwr.app.config]
result = ""
"""
COMMON = """
import torch
from federated.market.fingerprint import Encoder

ENCODER = Encoder("unit", "0" * 64, "none", True, 24)


def rows(n, seed, power=1.0):
    x = torch.randn(n, 24, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x * torch.linspace(0, 3 * power, 24).neg().exp() + 0.1, dim=1)
"""
SELLER = """
from federated.market.flower import Seller, seller_app
from shop.common import ENCODER, rows


def open_seller(context):
    config = context.node_config
    x = rows(300, int(config["seed"]), float(config["power"]))
    return Seller(str(config["name"]), ENCODER, lambda: x.split(64))


app = seller_app(open_seller)
"""
BUYER = """
import json
from pathlib import Path

from flwr.serverapp import ServerApp

from federated.market.flower import ask
from federated.market.honesty import audit
from federated.market.query import make_query
from federated.market.rank import rank
from shop.common import ENCODER, rows

app = ServerApp()


@app.main()
def main(grid, context):
    query, key = make_query(rows(100, 0), ENCODER, directions=4, decoys=3)
    responses, refusals = ask(grid, query, sellers=2, timeout=120)
    ranked = rank(key.buyer(), {r.seller: key.seller(r) for r in responses})
    suspicious = [r.seller for r in responses if any(f.suspicious for f in audit(key, r))]
    result = {"ranking": [r.seller for r in ranked], "refusals": list(refusals.values()), "suspicious": suspicious}
    Path(context.run_config["result"]).write_text(json.dumps(result))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    """Wait until something answers HTTP there."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"it ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return
        except OSError:
            time.sleep(0.3)
        else:
            return
    pytest.fail(f"nothing answers at port {port}: {log.read_text()[-2000:]}")


def test_a_buyer_and_two_sellers_meet_on_loopback(tmp_path: Path) -> None:
    app = tmp_path / "app"
    (app / "shop").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PYPROJECT)
    for name, text in (("__init__", ""), ("common", COMMON), ("seller", SELLER), ("buyer", BUYER)):
        (app / "shop" / f"{name}.py").write_text(text)
    home, result, link = tmp_path / "home", tmp_path / "result.json", free_port()
    home.mkdir()
    here = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    (home / "config.toml").write_text(here)
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
    }
    with ExitStack() as stack:

        def start(program: str, *arguments: str, log: str) -> tuple[subprocess.Popen, Path]:
            path = tmp_path / f"{log}.log"
            file = stack.enter_context(path.open("w"))
            process = subprocess.Popen(
                [str(PROGRAMS / program), "--insecure", *arguments], stdout=file, stderr=file, env=environment
            )
            stack.callback(stop, process)
            return process, path

        server = start(
            "flower-superlink", "--host", "127.0.0.1", "--port", str(link),
            "--fleet-api-address", f"127.0.0.1:{free_port()}", "--control-api-address", f"127.0.0.1:{free_port()}",
            "--disable-runtime-dependency-installation", log="link",
        )  # fmt: skip
        wait_for(link, *server)
        for i, (name, power) in enumerate((("same", 1.0), ("flat", 0.1))):
            start(
                "flower-supernode", "--superlink", f"127.0.0.1:{link}", "--port", str(free_port()),
                "--node-config", f"name='{name}' seed={i + 2} power={power}", log=name,
            )  # fmt: skip
        done = subprocess.run(
            [str(PROGRAMS / "flwr"), "run", str(app), "here", "--run-config", f"result='{result}'"],
            capture_output=True, text=True, env=environment, timeout=WAIT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        end = time.monotonic() + WAIT
        while not result.exists() and time.monotonic() < end:
            time.sleep(0.3)
        logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
        assert result.exists(), logs
        time.sleep(0.5)
        found = json.loads(result.read_text())
    assert found == {"ranking": ["same", "flat"], "refusals": [], "suspicious": []}


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
