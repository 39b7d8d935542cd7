"""SGC for a model, by hand or inside a Trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from sgc.checks import flag, whole
from sgc.hf.callback import SGCCallback, callers
from sgc.hf.groups import Override, parameter_groups
from sgc.optimizer import SGC


def create_sgc_optimizer(
    model: nn.Module,
    *,
    embeddings: str = "compressed",
    overrides: Mapping[str, Override] | None = None,
    compressed_gradients: bool = False,
    sample_every: int | None = None,
    **sgc_kwargs: Any,
) -> SGC:
    """Make SGC for a model: biases and norms do not decay, frozen parameters are left out, tied ones taken once.

    Args:
        model: as it will be trained, before DDP or FSDP wraps it.
        embeddings: what becomes of embeddings and of the head that predicts tokens: "compressed", "dense" (AdamW in
            fp32) or "frozen" (their `requires_grad` is switched off).
        overrides: by module, what differs there: SGC's keyword arguments, or one of the words of `embeddings`. A key is
            a name ("lm_head", "model.layers.0"), or the last parts of one ("q_proj": in every layer); * stands for any
            part or piece of one. It holds for all parameters below, and where keys meet, the longest match wins; what
            is frozen stays so unless a longer match says "compressed" or "dense".
        compressed_gradients: compress every gradient as soon as backward has made it (`SGC.attach`).
        sample_every: as for `SGC.attach`; default: its own.
        sgc_kwargs: of SGC, for all: lr, betas, weight_decay, sketch_size, …; a function that is called by hand knows no
            Trainer, so what is left out is SGC's own default.

    Returns:
        The optimizer; its groups hold the names of their parameters. Parameters without an override come first, those
        that decay before those that do not.

    Raises:
        ValueError: an override that names nothing, or nothing that is trained; no parameter is trained; a value out of
            range.
        TypeError: a value of another kind.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(512, 64), nn.Linear(64, 512))
        >>> optimizer = create_sgc_optimizer(model, lr=1e-3, embeddings="dense", overrides={"1": dict(sketch_size=32)})
        >>> [group["param_names"] for group in optimizer.param_groups]
        [['0.weight'], ['1.weight'], ['1.bias']]
    """
    compressed_gradients = flag("compressed_gradients", compressed_gradients)
    sample_every = whole("sample_every", sample_every, at_least=1, optional=True)
    if sample_every is not None and not compressed_gradients:
        raise ValueError(
            f"sample_every={sample_every} says how gradients are compressed: set compressed_gradients=True"
        )
    if compressed_gradients and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise ValueError("compressed_gradients is not for FSDP, which shards parameters and gradients already")
    groups, frozen = parameter_groups(model, embeddings=embeddings, overrides=overrides)
    optimizer = SGC(groups, **sgc_kwargs)
    for param in frozen:
        param.requires_grad_(False)
    if compressed_gradients:
        optimizer.attach(model, **({} if sample_every is None else {"sample_every": sample_every}))
    return optimizer


class SGCFactory:
    """Make SGC inside a Trainer, which calls `SGCFactory()(model, **kwargs)`: see `create_sgc_optimizer`.

    Without `lr`, learning rate and weight decay are those of the Trainer's arguments, if `SGCCallback` is one of its
    callbacks. A Trainer that takes no `optimizer_cls_and_kwargs`, as some of TRL's, can be given it afterwards.

    Example:
        >>> from transformers import Trainer
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=(SGCFactory, {"lr": 1e-3}))  # doctest: +SKIP
        >>> trainer.optimizer_cls_and_kwargs = (SGCFactory, {"lr": 1e-3})  # doctest: +SKIP
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> SGC:
        """Make the optimizer of a model from the keyword arguments of `create_sgc_optimizer`.

        Raises:
            ValueError: as `create_sgc_optimizer`; or there is no `lr`, and no Trainer with `SGCCallback` to take it of.
        """
        return create_sgc_optimizer(model, **(kwargs if "lr" in kwargs else _rates_of_trainer() | kwargs))


def _rates_of_trainer() -> dict[str, float]:
    """Return learning rate and weight decay of the Trainer that is making its optimizer."""
    from transformers import Trainer

    for name, owner in callers():
        if isinstance(owner, Trainer) and name == "create_optimizer":
            if any(isinstance(callback, SGCCallback) for callback in owner.callback_handler.callbacks):
                return {"lr": owner.args.learning_rate, "weight_decay": owner.args.weight_decay}
            break
    raise ValueError(
        'SGCFactory needs a learning rate, as in (SGCFactory, {"lr": 1e-3}); or add SGCCallback() to the callbacks of '
        "the Trainer, and learning_rate and weight_decay of its arguments hold"
    )
