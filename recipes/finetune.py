"""Fine-tune a Hugging Face model with SGC, or with any other optimizer beside it.

    accelerate launch recipes/finetune.py                      # all on its own: no network, no data, no GPU
    python recipes/finetune.py --compare adamw                 # a second run from the same start, same data order
    python recipes/finetune.py --smoke                         # ten steps, to see that it runs
    python recipes/finetune.py my.yaml --max_steps 100         # arguments from a file, overridden by the command line

    python recipes/finetune.py --model_name_or_path meta-llama/Llama-3.2-1B --dataset my.jsonl --output_dir out --bf16
    python recipes/finetune.py --model_name_or_path MODEL --dataset train.tsv --task classification --output_dir out
    python recipes/finetune.py --output_dir out --resume_from_checkpoint          # after Ctrl-C; bit-equal

Without arguments it teaches the small Llama of `recipes/assets/tiny-llama`, which can reverse, count and add but has
never seen an instruction, to do so when asked, all parameters trained. Expected on 2 CPU cores, in about a minute:
exact match on unseen words and sums from 0.00 to 0.99, loss from 8.7 to 0.02, with 0.05 MB of optimizer state where
AdamW has 6.57 MB. (With `--compare adamw`, at the same learning rate: 0.96, loss 0.05.)

`--help` lists every argument: those below, SGC's own as `--sgc_…`, and all of transformers' TrainingArguments.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_callback import ProgressCallback

import report
import text_data
from arguments import (
    EMBEDDED_ROWS,
    DataArguments,
    FinetuneArguments,
    ModelArguments,
    Run,
    check,
    checkpoint_of,
    made_with,
    parse,
    runs_of,
)
from checkpoints import SaveError, WholeCheckpoints, said_if_it_fails, sort_whole
from federated.files import opening, sentence
from sgc.hf import SGCCallback, SGCFactory, find_sgc, parameter_groups
from word_tasks import instruction_rows

HERE = Path(__file__).resolve().parent
SHORT_ANSWER = 32  # tokens; up to here an exact match is asked for
ONE_SIGNAL = 2.0  # seconds in which several are taken for one
DEFAULT_CONTEXT = 1024  # tokens; a model's context may be more than memory holds


@dataclass
class Job:
    """All that the runs share: the model's config, the data as examples, how to judge."""

    tokenizer: PreTrainedTokenizerBase
    config: transformers.PretrainedConfig
    kind: str
    max_length: int
    train: Dataset
    test: Dataset
    prompts: list[tuple[list[int], str, int]]
    metric: evaluate.EvaluationModule | None
    accuracy: evaluate.EvaluationModule

    @property
    def classifies(self) -> bool:
        return self.kind == "classification"


def say(text: str, *, error: bool = False) -> None:
    """Print a line, from one process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(text, file=sys.stderr if error else sys.stdout)


# -------------------------------------------------------------------------------------------- model and data


def load_metric(name: str) -> evaluate.EvaluationModule:
    """Open an `evaluate` module of recipes/metrics by its name, or another by its path or hub name."""
    own = HERE / "metrics" / name
    try:
        return evaluate.load(str(own if own.is_dir() else name), keep_in_memory=True)
    except (FileNotFoundError, ConnectionError) as error:
        names = ", ".join(sorted(p.name for p in (HERE / "metrics").iterdir()))
        raise ValueError(f"there is no metric '{name}'; recipes/metrics has {names}") from error


def open_rows(
    args: DataArguments, named: dict[str, str | None], seed: int, notes: text_data.Notes
) -> tuple[Dataset, Dataset]:
    """Return training and test rows: the embedded task's, or the user's."""
    if args.dataset is None:
        train, test = (
            Dataset.from_list(instruction_rows(EMBEDDED_ROWS[name], test=name == "test", seed=0))
            for name in ("train", "test")
        )
    else:
        train, test = text_data.split(
            args.dataset,
            args.eval_dataset,
            config=args.dataset_config,
            eval_fraction=args.eval_fraction,
            seed=seed,
            notes=notes,
            named=named,
            task=args.task,
        )
    train = train.select(range(min(len(train), args.max_train_samples or len(train))))
    return train, test.select(range(min(len(test), args.max_eval_samples or len(test))))


def open_tokenizer(path: str, *, trust: bool) -> PreTrainedTokenizerBase:
    """Open the tokenizer and see to its pad token."""
    with opening("model", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of '{path}' has neither pad, eos nor unk token; add one to it")
        say(f"the tokenizer has no pad token: {tokenizer.pad_token!r} is used")
    return tokenizer


def context_of(config: transformers.PretrainedConfig, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> int:
    """Return the tokens of an example at most."""
    bounds = [getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    context = int(min([b for b in bounds if b is not None and b < 1e9], default=DEFAULT_CONTEXT))
    if wanted is not None and not 8 <= wanted <= context:
        raise ValueError(f"max_length must be in [8, {context}], the model's context, got {wanted}")
    return wanted or min(context, DEFAULT_CONTEXT)


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: FinetuneArguments,
    divide: Callable[[Dataset, Dataset], tuple[Dataset, Dataset]] | None = None,
) -> Job:
    """Open tokenizer, config and data, and make the examples.

    Args:
        model_args: which model.
        data_args: which data, and how it becomes examples.
        args: of the training.
        divide: makes of the training and the test rows those to train on and to judge by; None: they are.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    path, notes = model_args.model_name_or_path, text_data.Notes()
    with opening("model", path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=model_args.trust_remote_code)
    tokenizer = open_tokenizer(path, trust=model_args.trust_remote_code)
    if config.is_encoder_decoder:
        raise ValueError(f"the model must be a decoder or an encoder, got the encoder-decoder '{config.model_type}'")
    max_length = context_of(config, tokenizer, data_args.max_length)
    named = {
        r: getattr(data_args, f"{r}_column") for r in ("instruction", "input", "output", "messages", "text", "label")
    }
    train_rows, test_rows = open_rows(data_args, named, args.seed, notes)
    if divide is not None:
        train_rows, test_rows = divide(train_rows, test_rows)
    layout, test_layout = text_data.layouts(train_rows, test_rows, named, data_args.task)
    parts = ((train_rows, layout), (test_rows, test_layout))
    names: list[str] | None = None
    prompts: list[tuple[list[int], str, int]] = []
    metric = None
    if layout.kind == "classification":
        names = text_data.label_names(train_rows, test_rows, layout.columns["label"], test_layout.columns["label"])
        config.num_labels, config.pad_token_id = len(names), tokenizer.pad_token_id
        config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        train, test = (
            text_data.classification_examples(*part, tokenizer, names=names, max_length=max_length, notes=notes)
            for part in parts
        )
    else:
        if tokenizer.chat_template is None and {layout.kind, test_layout.kind} != {"text"}:
            tokenizer.chat_template = text_data.plain_template(tokenizer)
            say("the tokenizer has no chat template: a plain one is used, and saved with the model")
        train, test = (
            text_data.generation_examples(
                *part, tokenizer, max_length=max_length, answers_only=data_args.answers_only, notes=notes
            )
            for part in parts
        )
        if test_layout.kind != "text" and data_args.metric != "none" and data_args.generate_samples > 0:
            prompts = text_data.prompts(test_rows, test_layout, tokenizer, max_length=max_length)
            prompts = prompts[: data_args.generate_samples]
            if data_args.metric != "auto":
                metric = load_metric(data_args.metric)
            elif prompts and max(length for *_, length in prompts) <= SHORT_ANSWER:
                metric = load_metric("exact_match")
    for line in notes.lines():
        say(f"note: {line}")
    if not train or not test:
        kind, left_of = ("test", test_rows) if train else ("training", train_rows)
        raise ValueError(f"no {kind} example is left of {len(left_of):,} rows{notes.left_out()}")
    say(text_data.first_example(train[0], tokenizer, names))
    if data_args.packing and layout.kind != "classification":
        before, train = len(train), text_data.pack(train, max_length)
        say(f"note: {before:,} training examples packed into {len(train):,} of up to {max_length} tokens")
    say(f"data: {layout.kind}, {len(train):,} training and {len(test):,} test examples of up to {max_length} tokens")
    accuracy = load_metric("accuracy")
    examples = (Dataset.from_list(train), Dataset.from_list(test))
    return Job(
        tokenizer, config, layout.kind, max_length, *examples, [] if metric is None else prompts, metric, accuracy
    )


def load_model(model_args: ModelArguments, job: Job, args: FinetuneArguments) -> torch.nn.Module:
    """Open the model; with --lora, wrap it."""
    auto = transformers.AutoModelForSequenceClassification if job.classifies else transformers.AutoModelForCausalLM
    options: dict[str, Any] = {
        "dtype": model_args.dtype,
        "config": copy.deepcopy(job.config),
        "trust_remote_code": model_args.trust_remote_code,
        "weights_only": True,  # of a pytorch_model.bin, which is a pickle
    }
    if job.classifies:
        options["ignore_mismatched_sizes"] = True  # a head for other classes is made anew
    if model_args.load_in_4bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        )
    transformers.set_seed(args.seed)  # adapters and a new head start alike in every run
    with opening("model", model_args.model_name_or_path):
        model = auto.from_pretrained(model_args.model_name_or_path, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # on a CPU, evaluating would turn 4-bit weights into a form
            module.support_avx512bf16_for_cpu = False  # for inference, through which bitsandbytes has no gradient
    if len(job.tokenizer) > model.get_input_embeddings().num_embeddings:
        say(f"note: the embeddings grow to the tokenizer's {len(job.tokenizer):,} tokens")
        model.resize_token_embeddings(len(job.tokenizer))
    if model_args.lora:
        import peft

        if model_args.load_in_4bit:
            checkpointing = bool(args.activation_checkpointing)
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="SEQ_CLS" if job.classifies else "CAUSAL_LM",
                r=model_args.lora_r,
                lora_alpha=model_args.lora_alpha,
                lora_dropout=model_args.lora_dropout,
                target_modules=model_args.lora_target_modules,
            ),
        )
    return model


# -------------------------------------------------------------------------------------------------- training


class LossBar(ProgressCallback):
    """The progress bar shows loss and learning rate; no line is printed for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            shown = {k.removeprefix("eval_"): v for k, v in logs.items() if k in ("loss", "learning_rate")}
            shown |= {"test": logs["eval_loss"]} if "eval_loss" in logs else {}
            self.training_bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()})


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM ends training after the step under way, with a checkpoint; a second one ends it at once.

    After the last step they wait until the model is saved, for which `restore` is called.
    A scheduler signals a launcher and its processes, and the launcher signals them again: that is one signal.
    """

    def __init__(self) -> None:
        self.received = 0
        self.since: float | None = None
        self.old: dict[int, Any] = {}

    def _note(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.since is None:
            self.received, self.since = number, now
        elif now - self.since > ONE_SIGNAL:
            self.restore()
            signal.raise_signal(number)

    def restore(self) -> None:
        """Let signals do again what they did before training."""
        for number, handler in self.old.items():
            signal.signal(number, handler)
        self.old = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:  # all ranks stop at the same step
            flag = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.received = int(flag)
        if self.received:
            control.should_save = control.should_training_stop = True


class RecipeTrainer(WholeCheckpoints, Trainer):
    """transformers' Trainer, whose checkpoints are whole or seen not to be, and which judges by all test rows."""

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        """Keep the last batch, which transformers drops with the training batches' by --dataloader_drop_last."""
        asked, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = asked


class BytesHeld(TrainerCallback):
    """Measures what gradients and optimizer state hold, right before and after a step."""

    def __init__(self) -> None:
        self.gradients: int | None = None  # of a run that was over before it began
        self.state = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.gradients = max(self.gradients or 0, report.tensor_bytes(grads))

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.state = report.state_bytes(optimizer)


def make_trainer(job: Job, model: torch.nn.Module, args: FinetuneArguments, sgc_kwargs: dict[str, Any]) -> Trainer:
    """Put model, data, optimizer and callbacks together."""

    def token_accuracy(outputs: transformers.EvalPrediction) -> dict[str, float]:
        predictions, labels = outputs.predictions, outputs.label_ids
        if not job.classifies:
            keep = labels[:, 1:] != text_data.IGNORE  # the token at t is predicted at t - 1
            predictions, labels = predictions[:, :-1][keep], labels[:, 1:][keep]
        value = job.accuracy.compute(predictions=predictions, references=labels)["accuracy"]
        return {"accuracy" if job.classifies else "token_accuracy": value}

    def best(logits: Any, _: torch.Tensor) -> torch.Tensor:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    optimizer, callbacks = None, [StopOnSignal(), BytesHeld()]
    if args.optimizer_name == "sgc":
        parameter_groups(
            model, **{k: v for k, v in sgc_kwargs.items() if k in ("embeddings", "overrides")}
        )  # judges them
        rates = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = (SGCFactory, {**rates, "betas": betas, "eps": args.adam_epsilon, **sgc_kwargs})
        callbacks.append(SGCCallback())
    pad = job.tokenizer.pad_token_id
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=job.train,
        eval_dataset=job.test,
        data_collator=DataCollatorWithPadding(job.tokenizer) if job.classifies else text_data.Collator(pad),
        processing_class=job.tokenizer,
        compute_metrics=token_accuracy,
        preprocess_logits_for_metrics=best,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer,
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBar())
    return trainer


def answers(job: Job, trainer: Trainer) -> list[str]:
    """Let the model answer the test prompts, greedily, spread over the processes."""
    tokenizer, model = job.tokenizer, trainer.model
    settings = transformers.GenerationConfig(
        max_new_tokens=max(length for *_, length in job.prompts),
        do_sample=False,
        use_cache=True,
        eos_token_id=text_data.end_of_turn(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.eval()
    found: list[str] = []
    size = trainer.args.per_device_eval_batch_size
    with PartialState().split_between_processes(job.prompts, apply_padding=True) as mine:  # ZeRO-3 waits for all
        for start in tqdm(range(0, len(mine), size), desc="answering", leave=False, disable=trainer.args.disable_tqdm):
            batch = [ids for ids, *_ in mine[start : start + size]]
            width = max(map(len, batch))
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(b)) + b for b in batch])
            mask = torch.tensor([[0] * (width - len(b)) + [1] * len(b) for b in batch])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
                )
            found += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return gather_object(found)[: len(job.prompts)] if PartialState().num_processes > 1 else found


def judge(job: Job, trainer: Trainer) -> dict[str, float]:
    """Return loss, accuracy and, where there is one, the metric of generated answers."""
    logged = trainer.evaluate()
    scores = {k.removeprefix("eval_"): v for k, v in logged.items() if k.endswith(("_loss", "accuracy"))}
    if job.metric is not None and job.prompts:
        wanted = [reference for _, reference, _ in job.prompts]
        values = job.metric.compute(predictions=answers(job, trainer), references=wanted)
        scores |= {k: float(v) for k, v in values.items() if isinstance(v, (int, float, np.floating))}
    return scores


def train(
    job: Job,
    run: Run,
    all_args: tuple[ModelArguments, FinetuneArguments],
    sgc_kwargs: dict[str, Any],
    *,
    first: bool,
    saved: list[str],
) -> dict[str, Any]:
    """Run one optimizer from the common start and return what came of it; what is saved is added to `saved`."""
    model_args, common = all_args
    args = common.for_run(run.name, run.learning_rate, run.folder)
    model = load_model(model_args, job, args)
    trainer = make_trainer(job, model, args, sgc_kwargs)
    if "position_ids" in job.train.column_names and not text_data.packs_are_isolated(
        model, job.config.get_text_config().vocab_size
    ):
        raise ValueError(
            f"--packing needs a model that keeps packed examples apart; '{job.config.model_type}' does not"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    count, total = (sum(entries(p) for p in params) for params in (trained, model.parameters()))
    say(f"{run.name}: {count:,} of {total:,} parameters are trained, {trained[0].dtype}, lr {run.learning_rate:g}")
    checkpoint = checkpoint_of(common, run)
    dtype = str(trained[0].dtype).removeprefix("torch.")
    if checkpoint is not None:
        goes_on(run, checkpoint, dtype)
    engine = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # has the model only together with its optimizer
    before = judge(job, trainer) if first and not engine else {}
    if first and engine:
        say("note: DeepSpeed and FSDP take the model when training begins: it is judged after that only")
    if trainer.is_world_process_zero():
        with said_if_it_fails("run.json", run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
            begun = {"optim": run.name, "sgc": sgc_kwargs, "lr": run.learning_rate, "dtype": dtype}
            report.write_json(run.folder / "run.json", begun)

    transformers.set_seed(args.seed)  # whatever was judged before, every run sees the same noise
    callbacks = {type(c): c for c in trainer.callback_handler.callbacks}
    stop, held = callbacks[StopOnSignal], callbacks[BytesHeld]
    try:
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.received and trainer.state.global_step < trainer.state.max_steps:
            how = "its weights can be gone on from, as --model_name_or_path; --save_only_model left the rest away"
            if not args.save_only_model:
                how = "the same command with --resume_from_checkpoint goes on from there"
            say(f"\ninterrupted: {run.folder}/checkpoint-{trainer.state.global_step} is saved; {how}")
            sys.exit(128 + stop.received)
        if first:  # before it is judged, which may take long, or end it
            save(job, trainer, run.folder)
            saved.append(f"the model of {run.name} is saved in {run.folder}")
    finally:
        stop.restore()
    if stop.received:
        raise KeyboardInterrupt(stop.received)
    reported = callbacks[SGCCallback].memory(model) if run.name == "sgc" else {}
    state = reported.get("optimizer_state", held.state)
    sgc = find_sgc(trainer.optimizer)
    result = {
        "name": run.name,
        "learning_rate": run.learning_rate,
        "before": before,
        "after": judge(job, trainer),
        "steps": trainer.state.global_step,
        "seconds": output.metrics["train_runtime"],
        "memory": {
            "weights": report.tensor_bytes(model.parameters()),
            "gradients": None if trainer.is_deepspeed_enabled else held.gradients,  # DeepSpeed keeps them to itself
            "optimizer_state": sum(gather_object([state])) if engine else state,  # each process has a part
            "adamw_state": report.ADAMW_BYTES_PER_PARAMETER * count,
        },
        "stats": {} if sgc is None else sgc.stats(),
        "history": trainer.state.log_history,
    }
    if first:
        known = [{"step": 0, "eval_loss": before["loss"]}] if before else []
        result["history"] = [*known, *result["history"]]
    return result


def goes_on(run: Run, checkpoint: Path, dtype: str) -> None:
    """Say from where a run goes on, and what of its arguments the checkpoint does not follow.

    Raises:
        ValueError: the weights had another dtype.
    """
    made = made_with(checkpoint.parent)
    if made.get("dtype", dtype) != dtype:
        raise ValueError(
            f"the checkpoint '{checkpoint}' was made with weights in {made['dtype']}, got {dtype}: --dtype"
        )
    say(f"{run.name}: goes on from {checkpoint}")
    if made.get("lr", run.learning_rate) != run.learning_rate:
        say(f"note: it goes on at the learning rate of the checkpoint, {made['lr']:g}, not at {run.learning_rate:g}")
    for passed in sort_whole(run.folder)[1]:
        say(f"note: {passed} is not whole, it is passed over")


def entries(param: torch.nn.Parameter) -> int:
    """Count the entries of a parameter; under ZeRO-3 most of them lie elsewhere."""
    return getattr(param, "ds_numel", param.numel())


def save(job: Job, trainer: Trainer, folder: Path) -> None:
    """Write the model into a folder beside its place, then move its files there."""
    fresh = folder / ".model"
    if trainer.is_fsdp_enabled:  # however the checkpoints are written, the model is put together
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    main = trainer.is_world_process_zero()
    try:
        with said_if_it_fails("the model", folder):
            if main:
                shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
            trainer.accelerator.wait_for_everyone()
            trainer.save_model(str(fresh))
            if main and job.classifies and (fresh / "adapter_config.json").is_file():  # which has no place for classes
                classes = {"id2label": job.config.id2label, "label2id": job.config.label2id}
                report.write_json(fresh / "classes.json", classes)
            if main:
                for file in fresh.iterdir():
                    os.replace(file, folder / file.name)
    finally:
        if main:
            shutil.rmtree(fresh, ignore_errors=True)


def check_batches(job: Job, args: FinetuneArguments) -> None:
    """Refuse to drop the only batch; transformers would train without a step, and call the model trained.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    least = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(job.train) < least:
        raise ValueError(
            f"--dataloader_drop_last needs one whole batch, {least:,} training examples or more, got {len(job.train):,}"
        )


def check_best(job: Job, args: FinetuneArguments) -> None:
    """Refuse a best model by what is not measured; transformers would after the first evaluation.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    measured = ("loss", "accuracy" if job.classifies else "token_accuracy")
    if ("loss" if args.metric_for_best_model is None else args.metric_for_best_model).removeprefix(
        "eval_"
    ) not in measured:
        raise ValueError(
            f"--metric_for_best_model must be one of {', '.join(measured)}, got '{args.metric_for_best_model}'"
        )


def fine_tune(argv: list[str]) -> None:
    """Do the whole job: arguments, data, a run for every optimizer, tables and files."""
    model_args, data_args, args, sgc_kwargs = parse(argv, __doc__)
    with args.main_process_first(desc="arguments"):  # what one writes to try a folder, the others do not meet
        check(model_args, data_args, args, sgc_kwargs)
    started = time.perf_counter()
    with args.main_process_first(desc="data"):
        job = prepare(model_args, data_args, args)
    check_batches(job, args)
    check_best(job, args)
    runs = runs_of(args)
    if args.overwrite_output_dir and args.resume_from_checkpoint is None and PartialState().is_main_process:
        for old in (*Path(args.output_dir).glob("checkpoint-*"), *Path(args.output_dir).glob("compare-*/checkpoint-*")):
            shutil.rmtree(old)
    results: dict[str, Any] = {"runs": []}
    packages = [p for p in ("torch", "transformers", "accelerate", "datasets", "peft") if importlib.util.find_spec(p)]
    results["versions"] = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}
    results["arguments"] = {"argv": argv, "model": vars(model_args), "data": vars(data_args), "sgc": sgc_kwargs}
    saved: list[str] = []
    try:
        for run in runs:
            result = train(job, run, (model_args, args), sgc_kwargs, first=run is runs[0], saved=saved)
            results.setdefault("before", result.pop("before"))
            results["runs"].append(result)
            results["seconds"] = time.perf_counter() - started
            if PartialState().is_main_process:  # after every run, for a later one may fail
                with said_if_it_fails("results.json", Path(args.output_dir)):
                    report.write_json(Path(args.output_dir) / "results.json", results)
                saved = [*saved, f"its numbers are in {args.output_dir}/results.json"][:2]
        if PartialState().is_main_process:
            show(results, Path(args.output_dir))
    except KeyboardInterrupt as stop:
        found = [whole[-1] for run in runs if (whole := sort_whole(run.folder)[0])]
        saved += [f"{checkpoint} is a whole checkpoint" for checkpoint in found]
        if found and not args.save_only_model:
            saved.append("the same command with --resume_from_checkpoint goes on from there")
        say(f"\ninterrupted: {'; '.join(saved) or 'nothing is saved'}")
        sys.exit(128 + exit_number(stop))


def show(results: dict[str, Any], output: Path) -> None:
    """Print the tables and draw the losses."""
    say(f"\n{report.report(results)}\n\n{output}: the model, results.json, loss.png; {results['seconds']:.0f} s in all")
    if importlib.util.find_spec("matplotlib") is None:
        say("there is no loss.png, for it needs a package: pip install matplotlib")
    else:
        with said_if_it_fails("loss.png", output):
            report.plot_losses(output / "loss.png", results["runs"])


def interrupt(number: int, _: Any) -> None:
    """Treat SIGTERM as Python treats Ctrl-C."""
    raise KeyboardInterrupt(number)


def exit_number(stop: KeyboardInterrupt) -> int:
    """Return the signal that interrupted."""
    return stop.args[0] if stop.args else signal.SIGINT


def main() -> None:
    """Say bad input in a sentence, and stop."""
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        fine_tune(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        said = sentence(error) if isinstance(error, OSError) else " ".join(str(error).split())
        say(f"finetune.py: error: {said}", error=True)
        sys.exit(2)
    except SaveError as error:  # of any process: each has a disk of its own
        print(f"finetune.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        said = "it does not fit into memory: lower --per_device_train_batch_size, --per_device_eval_batch_size or"
        print(f"finetune.py: error: {said} --max_length ({sentence(error)})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        say("\ninterrupted: nothing was being trained, nothing is saved")
        sys.exit(128 + exit_number(stop))
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
