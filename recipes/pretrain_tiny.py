"""Make the small pretrained Llama that `finetune.py` starts from when it is told nothing.

    python recipes/pretrain_tiny.py            # about 20 minutes on one CPU core; writes recipes/assets/tiny-llama
    python recipes/pretrain_tiny.py --smoke    # a few steps, to see that it runs

The text is generated here (see `word_tasks.py`): plain statements about made-up words and small sums. The result knows
how to reverse, count or add, and has never seen an instruction. `training.json` beside the weights records the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from federated.files import check_folder
from word_tasks import statements

ASSETS = Path(__file__).resolve().parent / "assets" / "tiny-llama"
CONTEXT = 256
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (  # lines, like the statements
    "{{ bos_token }}{% for m in messages %}{{ '' if loop.first else '\\n' }}"
    "{{ '<|' + m['role'] + '|>\\n' + m['content'] + (eos_token if m['role'] == 'assistant' else '') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte, so that every text can be written, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build the untrained Llama: grouped-query attention, tied embeddings, 0.8 million weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def windows(tokenizer: PreTrainedTokenizerFast, length: int, seed: int) -> Iterator[list[int]]:
    """Yield windows of `length` tokens: whole statements, one a line, the last one cut."""
    for first in (lines := statements(seed)):
        text = first
        while len(text) < length:  # a token is a byte
            text += "\n" + next(lines)
        yield [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:length]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict, folder: Path) -> None:
    """Write model, tokenizer and record beside `folder`, then put them in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    fresh.chmod(0o755)
    if folder.exists():
        old = fresh.with_name(fresh.name + "-old")
        folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old)
    else:
        os.replace(fresh, folder)


def main() -> None:
    """Pretrain and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens per window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="three small steps")
    args = parser.parse_args()
    try:
        check_folder(args.output_dir, "--output_dir")
    except ValueError as error:
        parser.error(str(error))
    if args.smoke:
        args.steps, args.batch_size = 3, 2

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1)
    stream = windows(tokenizer, args.length, args.seed)
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(range(args.steps), desc="pretraining") as bar:
        for step in bar:
            batch = torch.tensor(list(itertools.islice(stream, args.batch_size)))
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if step + 1 == args.steps or (step + 1) % 500 == 0:
                last = losses[-100:]
                record = {
                    "steps": step + 1,
                    "tokens": (step + 1) * args.batch_size * args.length,
                    "first_loss": losses[0],
                    "final_loss": sum(last) / len(last),
                    "final_loss_is": f"mean of the last {len(last)} steps, nats per token",
                    "seconds": round(time.perf_counter() - start),
                    "seed": args.seed,
                    "lr": args.lr,
                    "batch_size": args.batch_size,
                    "length": args.length,
                    "torch": torch.__version__,
                }
                save(model, tokenizer, record, args.output_dir)
    print(f"{args.output_dir}: loss {record['first_loss']:.3f} -> {record['final_loss']:.3f}")


if __name__ == "__main__":
    main()
