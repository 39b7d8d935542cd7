"""The arguments of `finetune.py`: of a YAML file, the command line, the embedded default; judged before any work."""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import torch
import yaml
from huggingface_hub import HfApi
from transformers import HfArgumentParser, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from checkpoints import CheckpointError, check_checkpoint, read_state, sort_whole, step_of
from federated.files import check_folder, sentence
from sgc import SGC
from sgc.hf import check_overrides, create_sgc_optimizer

HERE = Path(__file__).resolve().parent
TINY_LLAMA = HERE / "assets" / "tiny-llama"
# What the embedded default sets; with a model or data of your own, transformers' defaults hold.
EMBEDDED = {
    "output_dir": "outputs/finetune",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "save_total_limit": 1,
}
AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_accumulation_steps",
    "dataloader_prefetch_factor",
    "lora_r",
    "max_train_samples",
    "max_eval_samples",
)
AT_MOST = {"seed": 2**32 - 1, "data_seed": 2**32 - 1, "label_smoothing_factor": 1, "lora_dropout": 1}
EMBEDDED_ROWS = {"train": 4800, "test": 320}
OPTIMIZERS = {"adamw": "adamw_torch_fused", "galore": "galore_adamw", "apollo": "apollo_adamw", "lion": "lion_32bit"}
PACKAGES = (  # names of optimizers → module to import, package to install
    (r"galore_", "galore_torch", "galore-torch"),
    (r"apollo_", "apollo_torch", "apollo-torch"),
    (r"adamw_torch_[48]bit", "torchao", "torchao"),
    (r"(ada)?lomo$", "lomo_optim", "lomo-optim"),
    (r"schedule_free_", "schedulefree", "schedulefree"),
    (r"grokadamw", "grokadamw", "grokadamw"),
    (r"stable_adamw", "optimi", "torch-optimi"),
    (r".*(8bit|bnb|paged|ademamix|lion)", "bitsandbytes", "bitsandbytes"),
)


@dataclass
class ModelArguments:
    """Which model, and how much of it is trained."""

    model_name_or_path: str = field(default=str(TINY_LLAMA), metadata={"help": "hub name or folder"})
    dtype: str = field(default="auto", metadata={"help": "of the weights: auto (the checkpoint's), float32, bfloat16"})
    lora: bool = field(default=False, metadata={"help": "train low-rank adapters only (peft)"})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the adapters, times the rank"})
    lora_dropout: float = 0.0
    lora_target_modules: str = field(default="all-linear", metadata={"help": "regular expression, or all-linear"})
    load_in_4bit: bool = field(default=False, metadata={"help": "hold the frozen weights in 4 bits (bitsandbytes)"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the Python code that comes with the model"})


@dataclass
class DataArguments:
    """Which data, and how it becomes examples."""

    dataset: str | None = field(
        default=None, metadata={"help": "hub name, json, jsonl, csv, tsv, parquet or txt file, folder or pattern"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a hub data set"})
    eval_dataset: str | None = field(default=None, metadata={"help": "as --dataset; else its own test split"})
    eval_fraction: float = field(default=0.1, metadata={"help": "held out for testing when there is no test split"})
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    task: str = field(default="auto", metadata={"choices": ["auto", "generation", "classification"]})
    instruction_column: str | None = None
    input_column: str | None = None
    output_column: str | None = None
    messages_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    max_length: int | None = field(default=None, metadata={"help": "tokens; default: the model's context, up to 1024"})
    answers_only: bool = field(default=True, metadata={"help": "loss on answers only, not on prompts"})
    packing: bool = field(default=False, metadata={"help": "join short training examples; none attends to another"})
    metric: str = field(
        default="auto",
        metadata={
            "help": "`evaluate` module for generated answers: a name in recipes/metrics, a path, or none; auto is "
            "exact_match where answers have at most 32 tokens"
        },
    )
    generate_samples: int = field(default=256, metadata={"help": "test rows answered by generating"})


@dataclass
class FinetuneArguments(TrainingArguments):
    """transformers' TrainingArguments, with `optim` open to SGC and friendlier names."""

    optim: str = field(
        default="sgc",
        metadata={"help": "sgc, adamw, sgd, galore, apollo, adafactor, adamw_8bit, … or transformers' name"},
    )
    compare: list[str] = field(
        default_factory=list, metadata={"help": "more optimizers to run from the same start, as name or name@lr"}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"nargs": "?", "const": "last", "help": "a checkpoint folder; bare: the last one"}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "discard the checkpoints in output_dir"})
    logging_steps: float = field(default=10, metadata={"help": "as transformers'"})
    smoke: bool = field(default=False, metadata={"help": "ten steps on little data, to see that it runs"})

    def __post_init__(self) -> None:
        check_numbers(self)
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # as YAML may say it
            self.resume_from_checkpoint = "last" if str(self.resume_from_checkpoint).lower() == "true" else None
        self.optimizer_name = self.optim
        self.optim = trainer_name(self.optim)
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing  # the former is the new name
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else transformers refuses bf16
            self.dataloader_pin_memory = False  # else torch warns that there is nothing to pin for
        super().__post_init__()

    def for_run(self, name: str, learning_rate: float, folder: Path) -> FinetuneArguments:
        """Return a copy for one run with one optimizer."""
        args = copy.copy(self)
        args.optimizer_name, args.optim = name, OptimizerNames(trainer_name(name))
        args.learning_rate, args.output_dir = learning_rate, str(folder)
        if args.optim.startswith(("galore", "apollo")) and args.optim_target_modules is None:
            args.optim_target_modules = "all-linear"
        return args


def trainer_name(name: str) -> str:
    """Return transformers' name of an optimizer; SGC has none, so that any other stands in its place.

    Raises:
        ValueError: nobody knows the name.
    """
    choices = ["sgc", *OPTIMIZERS, *(o.value for o in OptimizerNames)]
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=1)
        raise ValueError(f"there is no optimizer '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    return "sgd" if name == "sgc" else OPTIMIZERS.get(name, name)


SGC_OPTIONS = [  # lr, betas, eps and weight_decay are TrainingArguments
    p for f in (create_sgc_optimizer, SGC) for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY
]
SGC_HELP = {
    "embeddings": "what becomes of embeddings and head: compressed, dense (AdamW) or frozen",
    "overrides": 'SGC\'s arguments by module, as JSON: {"lm_head": {"sketch_size": 64}, "q_proj": "dense"}',
    "compressed_gradients": "compress every gradient as soon as backward has made it, and free it",
    "sample_every": "with compressed gradients, of tensors without a sketch: one entry in so many is held (8)",
}
SGCArguments = dataclasses.make_dataclass(
    "SGCArguments",
    [
        (
            f"sgc_{p.name}",
            "str | None",
            field(
                default=None,
                metadata={"help": SGC_HELP.get(p.name, f"SGC's {p.name}")}
                | ({"nargs": "?", "const": "true"} if isinstance(p.default, bool) else {}),
            ),
        )
        for p in SGC_OPTIONS
    ],
    namespace={"__doc__": "SGC's own arguments; its defaults hold for what is not given."},
)
SGCArguments.__module__ = __name__


def sgc_value(text: Any) -> Any:
    """Read the value of an SGC argument: a number, true, false, none, a torch dtype, a word, or JSON of such."""
    if isinstance(text, dict):
        return {str(name): sgc_value(value) for name, value in text.items()}
    if isinstance(text, list):
        return [sgc_value(value) for value in text]
    word = str(text)
    if word.lstrip().startswith("{"):
        try:
            return sgc_value(json.loads(word))
        except json.JSONDecodeError as error:
            raise ValueError(f"{word} is not JSON: {error}") from None
    if word.lower() in ("none", "null"):
        return None
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    dtype = getattr(torch, word, None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


class Parser(HfArgumentParser):
    """Raises a sentence where argparse prints two hundred lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(
    argv: list[str], description: str | None = None
) -> tuple[ModelArguments, DataArguments, FinetuneArguments, dict[str, Any]]:
    """Read a YAML file, if the first argument is one, then the command line.

    Args:
        argv: the command line without the program's name.
        description: what --help says first.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    parser = Parser(
        (ModelArguments, DataArguments, FinetuneArguments, SGCArguments),
        usage="%(prog)s [arguments.yaml] [--argument value …]",
        description=description,
        formatter_class=Help,
        allow_abbrev=False,
    )
    known = {name for cls in parser.dataclass_types for name in cls.__dataclass_fields__}
    hints = {name: hint for cls in parser.dataclass_types for name, hint in get_type_hints(cls).items()}
    config: dict[str, Any] = {}
    if argv and argv[0].endswith((".yaml", ".yml")):
        config, argv = read_yaml(argv[0]), argv[1:]
    for name in config:
        if name not in known:
            raise ValueError(unknown_argument(str(name), known))
    names = {a.split("=")[0].lstrip("-").replace("-", "_") for a in argv if a.startswith("--")} | config.keys()
    embedded = {"model_name_or_path", "dataset"}.isdisjoint(names)
    lists = {name: texts_of(name, value) for name, value in config.items() if takes_list(value, hints[name])}
    parser.set_defaults(**(EMBEDDED if embedded else {}) | lists)
    words = [w for name, value in config.items() if name not in lists for w in as_words(name, value, hints[name])]
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            [*words, *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.doc!r} is not JSON: {error}") from None
    except Exception as error:  # transformers' own checks of its arguments, and of the files they name, raise anything
        raise ValueError(sentence(error)) from error
    if rest:
        raise ValueError(unknown_argument(rest[0].lstrip("-").split("=")[0], known))
    model_args, data_args, args, sgc_args = parsed
    if args.output_dir == "trainer_output" and "output_dir" not in names:
        raise ValueError("--output_dir must be given with a model or data of your own: it says where the result goes")
    if embedded and "output_dir" not in names:
        args.overwrite_output_dir = True
    if args.smoke:
        args.max_steps, args.eval_steps, args.logging_steps = 10, 5, 1
        data_args.max_train_samples = min(data_args.max_train_samples or 320, 320)
        data_args.max_eval_samples = min(data_args.max_eval_samples or 32, 32)
    sgc_kwargs = {k.removeprefix("sgc_"): sgc_value(v) for k, v in vars(sgc_args).items() if v is not None}
    return model_args, data_args, args, sgc_kwargs


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, a few of which stand for more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it must not use aliases, got *{self.peek_event().anchor}")
        return super().compose_node(parent, index)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a file of arguments.

    Raises:
        ValueError: a sentence with the rule and the file.
    """
    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8"), PlainLoader)
    except FileNotFoundError:
        raise ValueError(f"the file of arguments '{path}' does not exist") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())  # YAML says what and where in several lines
        raise ValueError(f"the file of arguments '{path}' can't be read: {said}") from None
    if not isinstance(config, dict | None):
        raise ValueError(f"'{path}' must hold lines of the form name: value")
    return config or {}


def allows(hint: Any, kind: type) -> bool:
    """Return whether an argument of this type may be a value of that kind."""
    return kind in (hint, get_origin(hint)) or any(allows(part, kind) for part in get_args(hint))


def takes_list(value: Any, hint: Any) -> bool:
    """Return whether a value is a list, of an argument that may be one."""
    return isinstance(value, list) and allows(hint, list)


def texts_of(name: str, values: list) -> list[str]:
    """Return the values of a list as the command line has them."""
    if any(isinstance(value, list | dict) for value in values):
        raise ValueError(f"--{name} must be a list of single values, got {values}")
    return [str(value) for value in values]


def as_words(name: str, value: Any, hint: Any) -> list[str]:
    """Return what a line of YAML is on the command line, so that both are read and judged alike."""
    if value is None:
        return [f"--{name}=none"] if name.startswith("sgc_") else []
    if isinstance(value, list) or (isinstance(value, dict) and not (name.startswith("sgc_") or allows(hint, dict))):
        raise ValueError(f"--{name} must be one value, got {value}")
    return [f"--{name}={json.dumps(value, default=str) if isinstance(value, dict) else value}"]


def unknown_argument(name: str, known: set[str]) -> str:
    """Return the sentence for a name that is no argument."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no argument '{name}'" + (f"; did you mean '{near[0]}'?" if near else "")


def check(model_args: ModelArguments, data_args: DataArguments, args: FinetuneArguments, sgc_kwargs: dict) -> None:
    """Refuse what can't work, before anything is loaded.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    runs = runs_of(args)
    names = [run.name for run in runs]
    for name in names:
        for pattern, module, package in PACKAGES:
            if re.match(pattern, trainer_name(name)):
                if importlib.util.find_spec(module) is None:
                    raise ValueError(f"optimizer '{name}' needs a package: pip install {package}")
                break
    if "sgc" in names:
        check_sgc(sgc_kwargs)
    elif sgc_kwargs:
        raise ValueError(f"--sgc_{next(iter(sgc_kwargs))} is given, but no run uses sgc: --optim {args.optimizer_name}")
    if model_args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got '{model_args.dtype}'")
    if model_args.load_in_4bit and not model_args.lora:
        raise ValueError("--load_in_4bit freezes the weights, so that there must be adapters to train: add --lora")
    if data_args.packing and args.use_cache:
        raise ValueError("--packing must go without --use_cache: with a cache, packed examples attend to each other")
    try:
        re.compile(model_args.lora_target_modules)
    except re.error as error:
        raise ValueError(
            f"--lora_target_modules must be a regular expression, got '{model_args.lora_target_modules}': {error}"
        ) from None
    for flag, module in ((model_args.lora, "peft"), (model_args.load_in_4bit, "bitsandbytes")):
        if flag and importlib.util.find_spec(module) is None:
            raise ValueError(f"this needs a package: pip install {module}")
    for name in ("eval_dataset", "dataset_config"):
        if getattr(data_args, name) is not None and data_args.dataset is None:
            raise ValueError(f"--{name} must go with --dataset, got '{getattr(data_args, name)}' alone")
    if isinstance(args.fsdp_config, str):  # transformers reads it with --fsdp only
        raise ValueError(f"--fsdp_config must go with --fsdp, got '{args.fsdp_config}' alone")
    path = model_args.model_name_or_path
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not os.path.isdir(os.path.expanduser(path)):
        made_by = "; python recipes/pretrain_tiny.py makes it" if path == str(TINY_LLAMA) else ""
        raise ValueError(f"model folder '{path}' does not exist{made_by}")
    check_numbers(model_args)
    check_numbers(data_args)
    check_rates(args, runs)
    check_late(args)
    check_reports(args)
    output = Path(args.output_dir)
    for run in runs:
        check_folder(run.folder, "--output_dir")
    if args.resume_from_checkpoint is not None:
        check_resumed(args, runs, sgc_kwargs)
    elif output.is_dir() and any(output.iterdir()) and not args.overwrite_output_dir:
        raise ValueError(
            f"output_dir '{output}' is not empty: give another, or --resume_from_checkpoint to go on, "
            "or --overwrite_output_dir to begin anew"
        )


def check_numbers(args: Any) -> None:
    """Refuse numbers that no argument can mean: not finite, beyond 64 bits, or negative where not even the default is.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    for item in dataclasses.fields(args):
        value, default = getattr(args, item.name), item.default
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = 1 if item.name in AT_LEAST_ONE else 0
        most = AT_MOST.get(item.name, sys.maxsize if isinstance(value, int) else math.inf)
        if value > most and math.isfinite(value):
            raise ValueError(f"--{item.name} must be at most {most}, got {value}")
        may_be_negative = isinstance(default, int | float) and default < 0
        if not math.isfinite(value) or (value < least and not may_be_negative):
            raise ValueError(
                f"--{item.name} must be {'finite' if may_be_negative else f'{least} or more'}, got {value}"
            )


def check_rates(args: FinetuneArguments, runs: list[Run]) -> None:
    """Let SGC judge the learning rate of every run, and what the optimizers share; AdamW's rules are the same.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    shared = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "weight_decay": args.weight_decay}
    given = "--learning_rate"
    try:
        for run, text in zip(runs, ["", *args.compare], strict=True):
            given = f"--compare {text}" if text else given
            SGC([torch.nn.Parameter(torch.zeros(2, 2))], lr=run.learning_rate, **shared)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{error} (of {given})") from None


def check_late(args: FinetuneArguments) -> None:
    """Let transformers and torch judge now what they would judge when training begins, or after it.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    for name, value in vars(args).items():
        if name.endswith("_kwargs") and not isinstance(value, dict | None):
            raise ValueError(f"--{name} must be a JSON object, got '{value}'")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs == 0):
        name = "num_train_epochs" if args.max_steps else "max_steps"
        raise ValueError(f"a run must take a step or more, got --{name} 0")
    if not args.eval_do_concat_batches:
        raise ValueError("--eval_do_concat_batches must be true: the test rows are judged together, got false")
    if args.label_names not in (None, ["labels"]):
        raise ValueError(f"--label_names must be labels, as all examples have, got {' '.join(args.label_names)}")
    if args.torch_compile:
        try:
            torch.compile(torch.nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        except Exception as error:  # as each backend of torch.compile says it
            raise ValueError(f"--torch_compile: {sentence(error)}") from None
    options = args.lr_scheduler_kwargs
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=options)
    except Exception as error:  # each schedule raises errors of its own for what it can't take
        raise ValueError(
            f"--lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value} with {options}: {sentence(error)}"
        ) from None


def check_reports(args: FinetuneArguments) -> None:
    """Refuse what can't be reported to: a backend that is not installed, a hub that does not answer.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"--report_to {' '.join(args.report_to)}: {sentence(error)}") from None
    if args.push_to_hub:
        try:
            HfApi().whoami(token=args.hub_token)
        except Exception as error:  # no token, or whatever the hub's HTTP library raises without a network
            raise ValueError(f"--push_to_hub needs the hub, which did not answer: {sentence(error)}") from None


def check_resumed(args: FinetuneArguments, runs: list[Run], sgc_kwargs: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint that is not whole, or that another command made.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    checkpoints = {run: checkpoint_of(args, run) for run in runs}
    if not any(checkpoints.values()):
        where = args.output_dir if args.resume_from_checkpoint == "last" else args.resume_from_checkpoint
        incomplete = sort_whole(Path(where))[1] if args.resume_from_checkpoint == "last" else [Path(where)]
        why = "it has no folder named checkpoint-…"
        if incomplete:
            try:
                read_state(incomplete[-1])
            except CheckpointError as error:
                why = str(error)
        raise ValueError(f"there is no whole checkpoint to resume from in '{where}': {why}")
    for run, found in checkpoints.items():
        if found is None:  # killed before its first one: it begins
            continue
        made = made_with(found.parent)
        if made.get("optim", run.name) != run.name:
            raise ValueError(f"the checkpoint '{found}' was made with --optim {made['optim']}, got --optim {run.name}")
        check_checkpoint(found)
        if run.name != "sgc" or "sgc" not in made:
            continue
        given = json.loads(json.dumps(sgc_kwargs, default=str))
        for name in sorted((made["sgc"].keys() | given.keys()) - {"compressed_gradients", "sample_every"}):
            then, now = (kwargs.get(name, "its default") for kwargs in (made["sgc"], given))
            if then != now:
                raise ValueError(f"the checkpoint '{found}' was made with --sgc_{name} {then}, got {now}")


def made_with(folder: Path) -> dict[str, Any]:
    """Read how the run of a folder was begun; nothing where it does not say so.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / "run.json"
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{file}', which says how the run was begun, can't be read: {sentence(error)}") from None
    kinds = (("optim", str), ("sgc", dict), ("lr", float))
    if not isinstance(made, dict) or any(not isinstance(made.get(name, kind()), kind) for name, kind in kinds):
        raise ValueError(f"'{file}' must say how the run was begun, got {str(made)[:60]}")
    if "optim" not in made:
        raise ValueError(f"'{file}' must name the optimizer of the run as \"optim\", got {str(made)[:60]}")
    return made


def check_sgc(sgc_kwargs: dict[str, Any]) -> None:
    """Let SGC judge its arguments, those of every override too; which modules there are, the model will show.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    own = {p.name: p.default for p in inspect.signature(create_sgc_optimizer).parameters.values()}
    given = {name: value for name, value in sgc_kwargs.items() if name not in own}
    embeddings, overrides, compressed = (
        sgc_kwargs.get(name, own[name]) for name in ("embeddings", "overrides", "compressed_gradients")
    )
    if not isinstance(overrides, dict | None):
        raise ValueError(f"--sgc_overrides must be a JSON object of modules, got {overrides!r}")
    if not isinstance(compressed, bool):
        raise ValueError(f"--sgc_compressed_gradients must be true or false, got {compressed!r}")
    try:
        check_overrides(overrides or {}, embeddings)
        for override in ({}, *(overrides or {}).values()):
            different = {} if isinstance(override, str) else override
            SGC([torch.nn.Parameter(torch.zeros(2, 2))], **{"lr": 1e-3} | given | different)
    except TypeError as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True)
class Run:
    """One optimizer's training run."""

    name: str
    learning_rate: float
    folder: Path


def runs_of(args: FinetuneArguments) -> list[Run]:
    """Return the run of every optimizer, the main one first.

    Raises:
        ValueError: a learning rate after @ is no number, or a name comes twice.
    """
    runs = [Run(args.optimizer_name, args.learning_rate, Path(args.output_dir))]
    for text in args.compare:
        name, _, rate = text.partition("@")
        try:
            lr = float(rate) if rate else args.learning_rate
        except ValueError:
            raise ValueError(f"--compare takes a name or name@learning_rate, got '{text}'") from None
        runs.append(Run(name, lr, Path(args.output_dir) / f"compare-{name}"))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"--compare must name optimizers other than '{names[0]}', each once, got {names[1:]}")
    return runs


def checkpoint_of(args: FinetuneArguments, run: Run) -> Path | None:
    """Return the checkpoint to resume a run from: the named one, or the last whole one of its folder."""
    named = args.resume_from_checkpoint
    if named is None:
        return None
    if named != "last" and run.folder == Path(args.output_dir):
        return Path(named) if step_of(Path(named)) is not None else None
    whole, _ = sort_whole(run.folder)
    return whole[-1] if whole else None
