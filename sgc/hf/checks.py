"""What a run with SGC is warned about before it begins: what the optimizer lacks, and arguments that do not hold."""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments

from sgc.optimizer import SGC

WRAPPER = re.compile(r"(?:^module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # in names
_logger = logging.getLogger("sgc")


def find_sgc(optimizer: Any) -> SGC | None:
    """Find SGC inside the wrappers of accelerate and DeepSpeed, each of which keeps it as `optimizer`."""
    seen: list[Any] = []
    while optimizer is not None and not isinstance(optimizer, SGC) and not any(optimizer is other for other in seen):
        seen.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer if isinstance(optimizer, SGC) else None


def left_out(optimizer: SGC, model: nn.Module) -> list[str]:
    """Name the parameters that a model trains and an optimizer does not hold.

    A sharding harness may have put other tensors in the place of the optimizer's, or of the model's. The optimizer
    knows which it was given; where neither those nor the ones it holds now are the model's, names decide.

    Raises:
        RuntimeError: it holds none of them.
    """
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    given = {id(param) for params in optimizer._given for param in params}
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    missing = [name for name, param in trained.items() if id(param) not in given | held]
    if len(missing) < len(trained):
        return missing
    if not held <= given:
        names = {name for group in optimizer.param_groups for name in group.get("param_names") or ()}
        if not names or not names.isdisjoint(WRAPPER.sub("", name) for name in trained):
            return []
    lr = float(optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]))
    raise RuntimeError(
        f"the optimizer holds none of the {len(trained)} tensors that the model trains, and so would train nothing: it "
        "was made before they were, as those of peft_config are, or for another model. Make the Trainer without "
        f'optimizers=, and then write: trainer.optimizer_cls_and_kwargs = (SGCFactory, {{"lr": {lr:g}}})'
    )


def warn_left_out(names: list[str]) -> None:
    """Warn of parameters that are trained by nothing."""
    if names:
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        _logger.warning("%d tensors that require a gradient are not the optimizer's, and stay: %s", len(names), some)


def warn_unloaded(optimizer: SGC, state: TrainerState) -> None:
    """Warn that a run goes on from a checkpoint of which the optimizer has loaded nothing."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    given = {id(param) for params in optimizer._given for param in params}
    if not params or not all(hasattr(param, "to_local") or id(param) in given for param in params):
        return  # DeepSpeed loads its partitions by itself, and warns of what is missing
    counted = (
        any(group["steps"] for group in optimizer.param_groups) and not optimizer._loop.steps
    )  # since it was loaded
    if state.global_step and not counted:
        _logger.warning(
            "training goes on at step %d, but the optimizer has loaded no state and begins anew: the checkpoint lacks "
            "optimizer.pt or scheduler.pt, as with save_only_model; for a new run with its weights open the model from "
            "its folder, and leave resume_from_checkpoint out",
            state.global_step,
        )


def compare_arguments(args: TrainingArguments, optimizer: SGC) -> None:
    """Warn which of the Trainer's arguments do not reach an optimizer that is given its own."""
    fields = type(args).__dataclass_fields__
    for theirs, ours, own in (("learning_rate", "lr", "initial_lr"), ("weight_decay", "weight_decay", "weight_decay")):
        wanted, values = getattr(args, theirs), [float(g.get(own, g[ours])) for g in optimizer.param_groups]
        if wanted != fields[theirs].default and wanted not in values:
            _logger.warning(
                "TrainingArguments has %s=%g, which does not reach SGC: it was made with %s=%g",
                theirs,
                wanted,
                ours,
                values[0],
            )
