"""Which model is meant, and how it looks: built-in shapes, folders, configurations and hub names, no weight made."""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sgc.codec.layout import make_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEQUENCE_LENGTH = 2048  # tokens of a row, where the model has so many positions
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
SIZE = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(?:([kmgt])(i?)b?|b)", re.IGNORECASE)  # a number and its unit
MOST_BYTES = 2**63  # exclusive
MOST_PARTS = 100_000  # layers, experts, heads or classes: transformers makes lists of them before anything can stop it
MOST_TENSORS = 20_000  # parameters of a model, of which Llama-3-405B has 1137
MOST_ENTRIES = 10**13  # of all parameters
MOST_COLUMNS = 2**18  # of a matrix, a block of what a step works on; Llama-3-405B has 53,248
PARTS = re.compile(r"(layers?|depths?|blocks|experts|heads?|labels)$")

# transformers' classes by how they learn: the mapping that knows each, in the order in which one is sought for a
# configuration that names no class.
LEARNERS = {
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}


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


def parse_bytes(size: str | float, name: str = "memory", *, zero: bool = False) -> int:
    """Turn an amount of memory into bytes: "24GB" (10⁹ bytes), "24GiB" (2³⁰ bytes); a number counts bytes.

    Args:
        size: words with a unit, or a number of bytes. Words without a unit are refused: whoever writes "24" means GB.
        name: of what is asked for, in the sentence.
        zero: whether it may be 0, which needs no unit.

    Raises:
        PlanError: it is no amount of memory.
    """
    given: Any = size
    number: Any = math.nan
    if not isinstance(size, bool) and isinstance(given, Real):
        number = given
    elif isinstance(size, str) and (found := SIZE.fullmatch(size.strip())):
        number = float(found[1]) * (1024 if found[3] else 1000) ** UNITS[(found[2] or "").upper()]
    elif zero and isinstance(size, str) and re.fullmatch(r"0+(\.0+)?", size.strip()):
        number = 0
    if zero and number == 0:
        return 0
    if not 1 <= number < MOST_BYTES:  # nan is neither
        kind = 'an amount (or "0")' if zero else "a positive amount"
        bytes_ = "" if isinstance(size, str) else ", or a number of bytes"
        raise PlanError(f'{name} must be {kind} with its unit, such as "24GB" or "24GiB"{bytes_}, got {size!r}')
    return int(number)


def load_config(
    model: str | os.PathLike[str] | PretrainedConfig, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Return the configuration of a built-in shape, a folder, a config.json or a model of the hub.

    Raises:
        PlanError: there is no such model, it can't be reached, it makes no sense, or it needs code of its own.
    """
    transformers = _transformers()
    if isinstance(model, transformers.PretrainedConfig):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise PlanError(f"a model must be a name, a path or a configuration, got {type(model).__name__}")
    name = str(model)
    if name.lower() in BUILT_IN:
        return transformers.AutoConfig.for_model(**BUILT_IN[name.lower()])
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise PlanError(f"the folder {name!r} holds no config.json")
    close = difflib.get_close_matches(name.lower(), BUILT_IN, n=1, cutoff=0.5)
    if os.path.exists(name):
        unknown = f"{name!r} holds no configuration that transformers knows"
    else:
        unknown = f"no model {name!r} here, and none of that name could be had from the Hugging Face hub"
        unknown += f" (did you mean {close[0]!r}?)" if close else ""
        unknown += f"; built-in shapes are {', '.join(BUILT_IN)}"
    with refused(unknown, reason=os.path.exists(name)):
        raw, _ = transformers.PretrainedConfig.get_config_dict(name)
        kind = raw.get("model_type")
        if kind not in transformers.CONFIG_MAPPING and "AutoConfig" in (raw.get("auto_map") or {}):
            _check_trust(name, trust_remote_code)
        elif kind is None:  # transformers would guess one from the name of the folder
            raise ValueError("it names no model_type")
        _check_parts(raw)
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return config


def _check_trust(name: str, trusted: bool) -> None:
    if not trusted:
        raise PlanError(
            f"{name} comes with code of its own (auto_map in its config.json), which runs only if you say so: "
            "trust_remote_code=True, or --trust_remote_code"
        )


def _check_parts(raw: Any, where: str = "") -> None:
    """Refuse so many layers, experts, heads or classes that listing them would take all memory."""
    for name, value in raw.items() if isinstance(raw, dict) else ():
        if isinstance(value, dict):
            _check_parts(value, f"{where}{name}.")
        elif isinstance(value, int) and value > MOST_PARTS and PARTS.search(name):
            raise ValueError(f"{where}{name} must be at most {MOST_PARTS:,}, got {value}")


def make_model(config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Make the model on the device that is in force, with weights of no particular value.

    Its class is the one that the configuration names. Of one that names none it is the first of LEARNERS that there is.

    Raises:
        PlanError: it is neither a language model nor a classifier of text, or no model can be made so.
    """
    transformers = _transformers()
    from transformers.initialization import no_init_weights

    with refused(f"transformers can't make a model of this {type(config).__name__}"):
        name, auto = _learner(config, trust_remote_code)
        with no_init_weights(), _few_tensors():
            made = getattr(transformers, auto).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model: PreTrainedModel = made
        model.tie_weights()  # which is otherwise a part of the initialization
    if type(model).__name__ != name:
        raise PlanError(f"transformers makes {type(model).__name__} of a configuration that names {name}")
    _check_sizes(model)
    return model


def _learner(config: PretrainedConfig, trust_remote_code: bool) -> tuple[str, str]:
    """Find the class that would be trained, and transformers' automatic class that makes it."""
    transformers = _transformers()
    known: dict[str, str] = {}
    own = getattr(config, "auto_map", None) or {}
    for auto, mapping_name in LEARNERS.items():
        mapping = getattr(transformers, mapping_name)
        if type(config) in mapping:
            classes = mapping[type(config)]
            for one in classes if isinstance(classes, tuple) else (classes,):
                known.setdefault(one.__name__, auto)
        if trust_remote_code and auto in own:
            known.setdefault(str(own[auto]).rpartition(".")[2], auto)
    named = getattr(config, "architectures", None)
    if not (named is None or (isinstance(named, (list, tuple)) and all(isinstance(name, str) for name in named))):
        raise PlanError(f"architectures must be a list of names of classes, got {named!r}")
    if named:
        name = named[0]
        if name in known:
            return name, known[name]
        if name in {str(value).rpartition(".")[2] for value in own.values()}:
            _check_trust(name, trust_remote_code)
    if not known:
        what = named[0] if named else type(config).__name__
        raise PlanError(f"a plan needs a language model or a classifier of text, got {what}")
    if named:
        kinds = ", ".join(known)
        raise PlanError(f"the configuration names {named[0]}, and a plan knows how to train {kinds} of its kind")
    left_out = set()
    if not getattr(config, "is_encoder_decoder", False):
        left_out.add("AutoModelForSeq2SeqLM")
    if getattr(config, "is_decoder", False):
        left_out.add("AutoModelForMaskedLM")
    return next(((name, auto) for name, auto in known.items() if auto not in left_out), next(iter(known.items())))


@contextmanager
def _few_tensors() -> Iterator[None]:
    """Stop a model that is being made at more than MOST_TENSORS parameters."""
    count = 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MOST_TENSORS:
            raise PlanError(f"a plan is of at most {MOST_TENSORS:,} tensors, and this model has more")

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _check_sizes(model: nn.Module) -> None:
    """Refuse what no step can be planned of: tensors without entries, and more entries than any machine holds."""
    entries = 0
    for name, param in model.named_parameters():
        entries += param.numel()
        if param.numel() == 0:
            raise PlanError(f"{name} has no entries: its shape is {tuple(param.shape)}")
        if make_layout(param.shape, 256).cols > MOST_COLUMNS:
            raise PlanError(f"a matrix must have at most {MOST_COLUMNS:,} columns, {name} is {tuple(param.shape)}")
    if entries > MOST_ENTRIES:
        raise PlanError(f"a model must have at most {MOST_ENTRIES:,} parameters, this has {entries:,}")


def check_run(config: PretrainedConfig, batch_size: int, sequence_length: int | None) -> int:
    """Refuse a batch that the model can't take, and give the tokens of a row: by default 2048, or all that it has.

    Raises:
        PlanError: a size is below 1, or the sequence has more tokens than the model has positions.
    """
    with refused(f"{type(config).__name__} says nothing of its text"):
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions == -1:  # so XLNet says that it takes any number
        positions = None
    if positions is not None and not is_size(positions):
        raise PlanError(f"max_position_embeddings must be a whole number of at least 1, got {positions!r}")
    if sequence_length is None:
        sequence_length = SEQUENCE_LENGTH if positions is None else min(SEQUENCE_LENGTH, positions)
    for name, size in (("batch size", batch_size), ("sequence length", sequence_length)):
        if not is_size(size):
            raise PlanError(f"the {name} must be a whole number of at least 1, got {size!r}")
    if positions is not None and sequence_length > positions:
        raise PlanError(f"the sequence length must be at most the model's {positions} positions, got {sequence_length}")
    return sequence_length


def is_size(value: object) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('a plan needs transformers: pip install "sgc[hf]"') from error
    return transformers


@contextmanager
def refused(what: str, *, reason: bool = True) -> Iterator[None]:
    """Turn whatever a model's code raises into one sentence, and keep it from saying more.

    Args:
        what: the sentence.
        reason: whether to add what the code has said.

    Raises:
        PlanError: the code has raised something.
    """
    try:
        with quiet():
            yield
    except PlanError:
        raise
    except Exception as error:  # hundreds of models' code, given numbers that nobody has looked at, raises anything
        raise PlanError(f"{what}: {in_one_line(error)}" if reason else what) from error


def in_one_line(error: BaseException) -> str:
    """Return what an error says in one line, with the error's name where that says more."""
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, (OSError, ValueError)) and said else f"{type(error).__name__}: {said}".rstrip(": ")


@contextmanager
def quiet() -> Iterator[None]:
    """Leave it to the one sentence to say what is wrong."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "torch._subclasses.fake_tensor")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
