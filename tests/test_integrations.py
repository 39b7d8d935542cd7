"""The blocks of docs/integrations.md run as they are written.

The line before each block says how: `<!-- run: SETUP -->`, with SETUP one of `SETUPS` below, which gives the names that
the block takes for granted and judges what came of it; or `<!-- tested: tests/file.py::test_name -->` for lines that
another test runs, in more than one process.
"""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra sgc[hf] is not installed")
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from sgc import SGC, hf
from sgc.hf import groups

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "integrations.md"
BLOCK = re.compile(r"(?:^<!-- (?P<how>\w+): (?P<what>\S+) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)


def blocks():
    """Give every Python block with the heading it stands under."""
    text = PAGE.read_text()
    for match in BLOCK.finditer(text):
        heading = re.findall(r"^#+ (.*)$", text[: match.start()], re.M)[-1]
        yield pytest.param(match["how"], match["what"], match["code"], id=heading)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, tie_word_embeddings=False, **sizes))


def rows():
    ids = torch.randint(0, 8, (32, 12), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in ids]


def mean_loss(model):
    with torch.no_grad():
        return sum(model(**{name: row[None] for name, row in pair.items()}).loss.item() for pair in rows()) / len(
            rows()
        )


def for_trainer(folder):
    fixed = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none"}
    args = TrainingArguments(output_dir=str(folder), max_steps=4, save_strategy="no", logging_steps=2, **fixed)
    return {"model": llama(), "args": args, "dataset": rows()}


def judge_trainer(names):
    assert isinstance(hf.find_sgc(names["trainer"].optimizer), SGC)
    assert mean_loss(names["trainer"].model) < mean_loss(llama())


def for_loop(folder):
    return {"model": llama(), "loader": torch.utils.data.DataLoader(rows(), batch_size=4)}


def judge_loop(names):
    assert hf.find_sgc(names["optimizer"]).state_bytes() > 0
    assert mean_loss(names["model"]) < mean_loss(llama())


def judge_options(names):
    group_of = {name: group for group in names["optimizer"].param_groups for name in group["param_names"]}
    assert group_of["lm_head.weight"]["sketch_size"] == 64
    assert group_of["model.layers.1.self_attn.q_proj.weight"]["lr"] == 3e-4
    assert group_of["model.layers.1.input_layernorm.weight"]["lr"] == 1e-4
    assert group_of["model.embed_tokens.weight"]["min_size"] == groups.DENSE
    assert not any(name.startswith("model.layers.0.") for name in group_of)


SETUPS = {
    "trainer": (for_trainer, judge_trainer),
    "loop": (for_loop, judge_loop),
    "options": (lambda folder: {"model": llama()}, judge_options),
}


@pytest.mark.parametrize(("how", "what", "code"), list(blocks()))
def test_every_block_does_what_the_page_says(how, what, code, tmp_path, monkeypatch):
    assert how in ("run", "tested"), "say before the block how it is tested"
    if how == "tested":
        file, _, name = what.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text()
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    set_up, judge = SETUPS[what]
    names = set_up(tmp_path / "out")
    exec(compile(code, str(PAGE), "exec"), names)
    judge(names)


def test_the_page_has_blocks():
    assert len(list(blocks())) >= 6
