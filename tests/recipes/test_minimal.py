"""`recipes/minimal.py` is short enough to copy, and trains a real small Llama on a text and on .jsonl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "minimal.py"
LLAMA = Path(os.environ.get("SGC_SHARED_DATA", ROOT.parent / "shared" / "data")) / "stories260k"


def test_it_fits_on_a_page():
    assert len(RECIPE.read_text().splitlines()) <= 60


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_it_teaches_a_small_llama_a_text_and_saves_what_opens(tmp_path, kind):
    model = LLAMA if LLAMA.is_dir() else ROOT / "recipes" / "assets" / "tiny-llama"
    lines = [f"Anna had {number} red apples and gave one to her friend." for number in range(40)]
    data = tmp_path / f"data.{kind}"
    data.write_text("\n".join(json.dumps({"text": line}) if kind == "jsonl" else line for line in lines))
    found = subprocess.run(
        [sys.executable, str(RECIPE), str(model), str(data), str(tmp_path / "out")],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")(lines[3], return_tensors="pt").input_ids
    before = AutoModelForCausalLM.from_pretrained(model)
    assert opened(words, labels=words).loss < before(words, labels=words).loss - 0.5
    assert json.loads((tmp_path / "out" / "sgc_summary.json").read_text())["compression_ratio"] < 0.1
