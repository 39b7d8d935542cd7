"""What a training step holds at every moment: a tracker of tensors, and a step of a whole model without its memory.

Every operation of forward and backward runs under FakeTensorMode, which makes shapes and no numbers; the tracker sees
each storage come and go. It finds the same peak as torch's own (torch.distributed._tools.mem_tracker, the oracle in
tests), which looks through all modules after every operation and takes twelve times as long on 32 layers.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sgc.compressed_grad import CompressedGradient
from sgc.planner.models import PlanError, first_line, make_model, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Held(NamedTuple):
    """Bytes by kind."""

    weights: int = 0
    gradients: int = 0
    state: int = 0
    activations: int = 0
    temporaries: int = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self)

    def plus(self, **more: int) -> Held:
        """Add bytes to some kinds."""
        return self._replace(**{kind: getattr(self, kind) + size for kind, size in more.items()})


KINDS = Held._fields


class Tracker(TorchDispatchMode):
    """Record the bytes of all tensors, by kind, after every operation; as a context manager around a training step.

    What is made while gradients are recorded is an activation (recomputation under checkpointing too), all else is a
    temporary, until it is marked as something else. Tensors from before are seen if they are marked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[Held] = []
        self.now = dict.fromkeys(KINDS, 0)
        self._kind: dict[int, str] = {}

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage as of this kind from now on."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        before = self._kind.get(key)
        if before is None:
            weakref.finalize(storage, self._gone, key, size).atexit = False
        else:
            self.now[before] -= size
        self._kind[key] = kind
        self.now[kind] += size

    def _gone(self, key: int, size: int) -> None:
        self.now[self._kind.pop(key)] -= size

    def note(self) -> None:
        """Record what is held now."""
        self.moments.append(Held(**self.now))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation, and see what it has made."""
        made = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # fake tensors are asked for their device again and again
            return made
        kind = "activations" if torch.is_grad_enabled() else "temporaries"
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if not isinstance(tensor, Tensor) or isinstance(tensor, CompressedGradient):  # which says a size, and holds
                continue
            if tensor.untyped_storage()._cdata not in self._kind:
                self.mark(tensor, kind)
        self.note()
        return made

    def follow(self, module: nn.Module) -> list[Any]:
        """Mark a module's weights and, as they arrive, its gradients; gives the handles of the hooks."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.mark(tensor, "weights")

        def arrived(param: Tensor) -> None:
            held = param.grad
            if held is not None:
                self.mark(held.buffer.flat if isinstance(held, CompressedGradient) else held, "gradients")
                self.note()

        trained = [param for param in module.parameters() if param.requires_grad]
        return [param.register_post_accumulate_grad_hook(arrived) for param in trained]

    def peak(self) -> Held:
        """Give what was held at the first moment of most bytes."""
        return max(self.moments, key=lambda held: held.total, default=Held(**self.now))


@dataclass(frozen=True)
class Info:
    """A parameter: all that a plan needs of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool = True
    repeated: bool = False  # the matrix of a linear layer in one of the repeated blocks

    @property
    def numel(self) -> int:
        """Entries."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Bytes of the weight."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Trace:
    """Forward and backward of one batch: what is held after every operation, and when each gradient was complete."""

    params: list[Info]
    moments: list[Held]
    arrivals: dict[str, int] = field(default_factory=dict)  # parameter → index of the moment in which it has a gradient


@dataclass(frozen=True)
class Run:
    """The training step that is planned."""

    config: PretrainedConfig
    dtype: torch.dtype
    batch_size: int
    sequence_length: int
    checkpointing: bool
    chunked_loss: bool = False


def infos(model: nn.Module) -> list[Info]:
    """List a model's parameters, tied ones once."""
    repeated = {id(weight) for weight in repeated_matrices(model)}
    return [
        Info(name, tuple(p.shape), p.dtype, p.requires_grad, id(p) in repeated) for name, p in model.named_parameters()
    ]


def repeated_matrices(model: nn.Module) -> list[Tensor]:
    """List the weights of linear layers inside repeated blocks: attention and MLP, no embedding, no head."""
    repeated = ((name, module) for name, module in model.named_modules() if is_linear(module))
    return [module.get_parameter("weight") for name, module in repeated if any(map(str.isdigit, name.split(".")))]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer; GPT-2's are transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@contextlib.contextmanager
def fake() -> Iterator[None]:
    """Make tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), _no_packed_rows():
        yield


@contextlib.contextmanager
def _no_packed_rows() -> Iterator[None]:
    """Say that a row is one sequence: transformers can't see it in fake positions, and would mask all pairs."""
    from transformers import masking_utils

    before = getattr(masking_utils, "find_packed_sequence_indices", None)
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        if before is not None:
            masking_utils.find_packed_sequence_indices = before


def trace(run: Run, adapt: Callable[[PreTrainedModel], nn.Module] | None = None) -> Trace:
    """Trace forward and backward of one batch of a model, as large as it may be.

    Args:
        run: the step.
        adapt: makes of the model what is trained instead, for adapters.

    Raises:
        PlanError: the model refuses the batch.
    """
    with fake():
        made = make_model(run.config, run.dtype)
        if run.checkpointing:
            checkpointed(made)
        model: nn.Module = made if adapt is None else adapt(made)
        model.train()
        batch = torch.zeros(run.batch_size, run.sequence_length, dtype=torch.long)
        tracker = Tracker()
        handles = tracker.follow(model)
        names = {id(param): name for name, param in model.named_parameters()}
        arrivals: dict[str, int] = {}

        def arrived(param: Tensor) -> None:
            arrivals[names[id(param)]] = len(tracker.moments) - 1  # what `follow`'s hook has just noted

        trained = [param for param in model.parameters() if param.requires_grad]
        handles += [param.register_post_accumulate_grad_hook(arrived) for param in trained]
        tracker.mark(batch, "activations")
        with quiet(), tracker:
            try:
                loss = loss_of(model, batch, chunked=run.chunked_loss)
            except PlanError:
                raise
            except ValueError as error:  # as of a classifier that pads without a token for it
                rows = f"{run.batch_size} x {run.sequence_length} tokens"
                raise PlanError(f"{type(made).__name__} refuses a batch of {rows}: {first_line(error)}") from error
            loss.backward()
            del loss
            tracker.note()
        for handle in handles:
            handle.remove()
        return Trace(infos(model), tracker.moments, arrivals)


def checkpointed(model: PreTrainedModel) -> None:
    """Recompute the activations of every repeated block in backward."""
    model.config.use_cache = False
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # before transformers 5.20
        model.gradient_checkpointing_enable(options)


def loss_of(model: nn.Module, batch: Tensor, *, chunked: bool = False) -> Tensor:
    """Give the loss of a model on a batch (rows, tokens), as its own forward computes it or with a chunked head."""
    whole: Any = model
    inner = whole.get_base_model() if hasattr(model, "get_base_model") else whole
    if type(inner).__name__.endswith("ForSequenceClassification"):
        return whole(input_ids=batch, labels=batch[:, 0]).loss
    if chunked:
        return _chunked_loss(inner, batch)
    return whole(input_ids=batch, labels=batch, use_cache=False).loss


def _chunked_loss(model: Any, batch: Tensor) -> Tensor:
    """Give the loss with torch's chunked head, which never holds all logits and makes the gradients in forward."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise PlanError(f"a chunked loss needs torch.nn.LinearCrossEntropyOptions, torch {torch.__version__} has none")
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
    weight = model.get_output_embeddings().weight
    flat, target = hidden[:, :-1].reshape(-1, hidden.shape[-1]), batch[:, 1:].reshape(-1)
    # what "auto" means on a GPU, on every device: no fp32 copy of the head's gradient
    options = nn.LinearCrossEntropyOptions(acc_policy="compact", acc_dtype=weight.dtype)
    return nn.functional.linear_cross_entropy(flat, weight, target, options=options)
