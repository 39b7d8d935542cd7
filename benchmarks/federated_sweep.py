"""The papers' figures on MNIST, as rows with commit, machine and versions; then the figures of docs/federated.md.

python benchmarks/federated_sweep.py --data path/to/mnist            # all that is missing; stop it at any time
python benchmarks/federated_sweep.py --data path/to/mnist --sweep antennas --draw docs
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "recipes"))

import federated_mnist
import federated_sweeps
from benchmarks import harness

RESULTS = "federated_sweep"


def main() -> None:
    """Run and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="a folder with idx files, or mnist on the hub")
    parser.add_argument("--sweep", choices=federated_sweeps.SWEEPS, action="append")
    parser.add_argument("--draw", type=Path, help="only draw what is there, into this folder")
    arguments = parser.parse_args()
    names = arguments.sweep or list(federated_sweeps.SWEEPS)
    if arguments.draw:
        rows = harness.rows(RESULTS)
        for name in names:
            wanted = {federated_sweeps.key_of(cell) for cell in federated_sweeps.SWEEPS[name]()}
            cells = [row for row in rows if federated_sweeps.key_of(row["cell"]) in wanted]
            federated_sweeps.draw(name, cells, arguments.draw / f"federated-{name}.png")
            print(f"{name}: {len(cells)} of {len(wanted)} runs")
        return
    args = federated_mnist.parse(["--dataset", arguments.data])
    data = federated_mnist.open_data(args)
    cells = [(name, cell) for name in names for cell in federated_sweeps.SWEEPS[name]()]
    # whole figures of one seed first, but for the longest runs
    for name, cell in sorted(cells, key=lambda pair: (pair[1]["steps"] > 30, pair[1]["seed"])):
        key = federated_sweeps.key_of(cell)
        if any(federated_sweeps.key_of(row["cell"]) == key for row in harness.rows(RESULTS)):
            continue
        with harness.claim(RESULTS, hashlib.sha256(key.encode()).hexdigest()[:16]) as mine:
            if mine:
                result = federated_sweeps.play(cell, args, data, federated_mnist.simulation)
                harness.add_row(RESULTS, {"sweep": name, "dataset": "mnist", "cell": cell, **result})
                print(name, cell, result["accuracy"], flush=True)


if __name__ == "__main__":
    main()
