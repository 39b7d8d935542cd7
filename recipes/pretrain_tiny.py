"""Make the small pretrained Llama that `finetune.py` starts from when it is told nothing, or one of another size.

    python recipes/pretrain_tiny.py            # about 20 minutes on one CPU core; writes recipes/assets/tiny-llama
    python recipes/pretrain_tiny.py --smoke    # a few steps, to see that it runs
    python recipes/pretrain_tiny.py --width 256 --steps 400 --tokenizer FOLDER --text FILE

The text is generated here (see `word_tasks.py`): plain statements about made-up words and small sums. The result knows
how to reverse, count or add, and has never seen an instruction. `training.json` beside the weights records the run.
A model of another size, text or tokenizer is written into a cache outside the repository (~/.cache/sgc/pretrained, or
SGC_PRETRAINED_CACHE), into a folder that is named by all that it was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
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
CACHE = Path(os.environ.get("SGC_PRETRAINED_CACHE") or "~/.cache/sgc/pretrained").expanduser()
CONTEXT = 256
HEAD = 32  # entries of an attention head
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


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, width: int = 128, layers: int = 4, context: int = CONTEXT
) -> LlamaForCausalLM:
    """Build the untrained Llama: grouped-query attention, tied embeddings; 0.8 million weights unless told otherwise.

    Raises:
        ValueError: the width is no multiple of HEAD.
    """
    if width < HEAD or width % HEAD:
        raise ValueError(f"width must be a multiple of {HEAD}, got {width}")
    torch.manual_seed(seed)
    heads = width // HEAD
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads if heads % 2 else heads // 2,
            max_position_embeddings=context,
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


def text_windows(tokenizer: PreTrainedTokenizerFast, text: str, length: int, seed: int) -> Iterator[list[int]]:
    """Yield windows of `length` tokens from places of a text that the seed draws.

    Raises:
        ValueError: the text has fewer tokens than that.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < length:
        raise ValueError(f"the text must have at least {length} tokens, got {len(ids)}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(len(ids) - length + 1, (), generator=generator))
        yield ids[start : start + length]


def cached(args: argparse.Namespace) -> Path:
    """Name the folder of the cache for a run, by all that it is made from."""
    made_from = {name: value for name, value in vars(args).items() if name not in ("output_dir", "smoke")}
    for name in ("tokenizer", "text"):  # by what they say, wherever they lie
        path = made_from[name] and Path(made_from[name]) / ("tokenizer.json" if name == "tokenizer" else "")
        made_from[name] = path and hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return CACHE / f"llama-{args.width}x{args.layers}-{digest[:12]}"


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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; only a run with nothing but defaults goes to recipes/assets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help=f"default: {ASSETS.name} of the recipes, or the cache")
    parser.add_argument("--width", type=int, default=128, help=f"a multiple of {HEAD}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokenizer", help="folder that holds tokenizer.json; default: a token per byte")
    parser.add_argument("--text", help="file of plain text; default: generated statements")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens per window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="three small steps")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.batch_size = 3, 2
    if args.tokenizer and not (Path(args.tokenizer) / "tokenizer.json").is_file():
        parser.error(f"--tokenizer must be a folder that holds tokenizer.json, got '{args.tokenizer}'")
    if args.text and not Path(args.text).is_file():
        parser.error(f"--text must be a file, got '{args.text}'")
    for name in ("steps", "batch_size", "length", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if args.width < HEAD or args.width % HEAD:
        parser.error(f"--width must be a multiple of {HEAD}, got {args.width}")
    if args.output_dir is None:
        as_ever = all(value == parser.get_default(name) for name, value in vars(args).items())
        args.output_dir = ASSETS if as_ever else cached(args)
    try:
        check_folder(args.output_dir, "--output_dir")
    except ValueError as error:
        parser.error(str(error))
    return args


def recorded(folder: Path) -> int:
    """Return how many steps the model of a folder was trained for; 0: there is none."""
    record = folder / "training.json"
    return json.loads(record.read_text())["steps"] if record.is_file() else 0


def pretrain(args: argparse.Namespace) -> dict:
    """Pretrain and save, and return the record of the run."""
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(args.tokenizer, trust_remote_code=False)
        if args.tokenizer
        else make_tokenizer()
    )
    context = max(CONTEXT, args.length)
    model = make_model(tokenizer, args.seed, width=args.width, layers=args.layers, context=context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1)
    if args.text:
        stream = text_windows(tokenizer, Path(args.text).read_text(encoding="utf-8"), args.length, args.seed)
    else:
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
    return record


def main() -> None:
    """Pretrain and save."""
    args = parse()
    try:
        record = pretrain(args)
    except ValueError as error:
        sys.exit(f"pretrain_tiny.py: error: {error}")
    print(f"{args.output_dir}: loss {record['first_loss']:.3f} -> {record['final_loss']:.3f}")


if __name__ == "__main__":
    main()
