"""Which model is meant, and how it looks: built-in shapes, folders, configurations and hub names, no weight made."""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEQUENCE_LENGTH = 2048  # tokens of a row, where the model has so many positions
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class PlanError(ValueError):
    """A plan can't be made of what was asked; the message is one sentence that says why."""


def _llama(**sizes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "tie_word_embeddings": False, "rms_norm_eps": 1e-5, **sizes}


# The sizes that the models' authors published (config.json of each).
BUILT_IN: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "llama-2-13b": _llama(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "llama-3-8b": _llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "llama-3.2-1b": _llama(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": _llama(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2"},
}


def parse_bytes(text: str | float) -> int:
    """Turn "24GB" (10⁹ bytes), "24GiB" (2³⁰ bytes), "24e9" or a number into bytes.

    Raises:
        PlanError: it is no positive amount of memory.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:  # two points
        number = 0.0
    if found is None or not 0 < number < math.inf or (found[3] and not found[2]):
        raise PlanError(f'memory must be a positive amount such as "24GB", "24GiB" or "24e9", got {text!r}')
    return int(number * (1024 if found[3] else 1000) ** UNITS[found[2].upper()])


def load_config(model: str | PretrainedConfig) -> PretrainedConfig:
    """Give the configuration of a built-in shape, a folder, a config.json or a model of the hub.

    Raises:
        PlanError: there is no such model, or it can't be reached.
    """
    transformers = _transformers()
    if isinstance(model, transformers.PretrainedConfig):
        return model
    name = str(model)
    if name.lower() in BUILT_IN:
        return transformers.AutoConfig.for_model(**BUILT_IN[name.lower()])
    path = Path(name)
    try:
        with quiet():
            if path.is_file():
                return transformers.AutoConfig.from_pretrained(str(path))
            if path.is_dir() and not (path / "config.json").is_file():
                raise PlanError(f"the folder {name!r} holds no config.json")
            return transformers.AutoConfig.from_pretrained(name)
    except PlanError:
        raise
    except (OSError, ValueError, KeyError) as error:
        if path.exists():
            raise PlanError(f"{name!r} holds no configuration that transformers knows: {first_line(error)}") from error
        close = difflib.get_close_matches(name.lower(), BUILT_IN, n=1, cutoff=0.5)
        raise PlanError(
            f"no model {name!r} here, and none of that name could be had from the Hugging Face hub"
            + (f" (did you mean {close[0]!r}?)" if close else "")
            + f"; built-in shapes are {', '.join(BUILT_IN)}"
        ) from error


def make_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make the model on the device that is in force, with weights of no particular value.

    Raises:
        PlanError: it is neither a causal language model nor a classifier.
    """
    transformers = _transformers()
    from transformers.initialization import no_init_weights

    wanted = (config.architectures or [""])[0]
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if causal and (not wanted or wanted.endswith(("ForCausalLM", "LMHeadModel"))):
        kind = transformers.AutoModelForCausalLM
    elif type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        kind = transformers.AutoModelForSequenceClassification
    else:
        raise PlanError(f"a plan needs a causal language model or a classifier, got {type(config).__name__}")
    with quiet(), no_init_weights():
        model: PreTrainedModel = kind.from_config(config, dtype=dtype)
    model.tie_weights()  # which is otherwise a part of the initialization
    return model


def check_run(config: PretrainedConfig, batch_size: int, sequence_length: int | None) -> int:
    """Refuse a batch that the model can't take, and give the tokens of a row: by default 2048, or all that it has.

    Raises:
        PlanError: a size is below 1, or the sequence has more tokens than the model has positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if sequence_length is None:
        sequence_length = SEQUENCE_LENGTH if positions is None else min(SEQUENCE_LENGTH, positions)
    for name, size in (("batch size", batch_size), ("sequence length", sequence_length)):
        if not (isinstance(size, int) and size >= 1):
            raise PlanError(f"the {name} must be a whole number of at least 1, got {size!r}")
    if positions is not None and sequence_length > positions:
        raise PlanError(f"the sequence length must be at most the model's {positions} positions, got {sequence_length}")
    return sequence_length


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('a plan needs transformers: pip install "sgc[hf]"') from error
    return transformers


def first_line(error: BaseException) -> str:
    """Give what an error says at first, or else its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Leave it to the one sentence to say what is wrong."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
