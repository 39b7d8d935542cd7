"""What a training step holds at every moment: a tracker of tensors, and a step of a whole model without its memory.

Every operation of forward and backward runs under FakeTensorMode, which makes shapes and no numbers; the tracker sees
each storage come and go. It finds the same peak as torch's own (torch.distributed._tools.mem_tracker, the oracle in
tests), which looks through all modules after every operation and takes twelve times as long on 32 layers.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sgc.backward.gradient import CompressedGradient
from sgc.planner.models import PlanError, make_model, refused

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
SCANNED = 2048  # tokens of which a scan's kernel keeps one state
MOST_MOMENTS = 200_000  # of a step: a model that goes through a row token by token has millions


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
        """Record what is held now.

        Raises:
            PlanError: the step has so many operations that it would take hours.
        """
        if len(self.moments) >= MOST_MOMENTS:
            raise PlanError(f"a plan is of a step of at most {MOST_MOMENTS:,} operations: take shorter sequences")
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
        """Return what was held at the first moment of most bytes."""
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
    unreached: int = 0  # trained entries that no token reaches


@dataclass(frozen=True)
class Run:
    """The training step that is planned."""

    config: PretrainedConfig
    dtype: torch.dtype
    batch_size: int
    sequence_length: int
    checkpointing: bool
    chunked_loss: bool = False
    trust_remote_code: bool = False


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
    from transformers import masking_utils
    from transformers.integrations import moe

    with FakeTensorMode(), contextlib.ExitStack() as stack:
        # a row is one sequence: transformers can't see it in fake positions, and would mask all pairs
        stack.enter_context(_replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
        # torch's operator on fake tensors is of bf16 alone; transformers' own makes the same tensors
        stack.enter_context(_replaced(moe, "_can_use_grouped_mm", lambda *_: False))
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Put another function in a module's place, where it has one."""
    before = getattr(module, name, None)
    if before is not None:
        setattr(module, name, by)
    try:
        yield
    finally:
        if before is not None:
            setattr(module, name, before)


def _scanned_at_once(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Scan as mamba-ssm's kernel does: transformers' own loop goes through a row token by token."""
    return _replaced(sys.modules[type(model).__module__], "mamba_selective_scan", _selective_scan)


def _selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, z: Any = None, **options: Any
) -> Tensor:
    scanned: Tensor = _Scan.apply(u, dt, A, B, C, D, z, options.get("delta_bias"))
    return scanned


class _Scan(torch.autograd.Function):
    """What the kernel keeps for backward: all that it is given, a state for every SCANNED tokens, and its result.

    Source: mamba-ssm's selective_scan_interface.py. u and z: (rows, channels, tokens), A: (channels, states).
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, A: Tensor, *more: Tensor | None) -> Tensor:
        rows, channels, tokens = u.shape
        states = u.new_empty(rows, channels, -(-tokens // SCANNED), 2 * A.shape[1], dtype=torch.float32)
        gated = more[3] is not None  # the gated result is another tensor
        ctx.save_for_backward(u, dt, A, *more, states, *([torch.empty_like(u)] if gated else []))
        return torch.empty_like(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors[: len(ctx.needs_input_grad)]
        pairs = zip(given, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if needed else None for tensor, needed in pairs)


def trace(run: Run, adapt: Callable[[PreTrainedModel], nn.Module] | None = None) -> Trace:
    """Trace forward and backward of one batch of a model, as large as it may be.

    Args:
        run: the step.
        adapt: makes of the model what is trained instead, for adapters.

    Raises:
        PlanError: the model refuses the batch.
    """
    with fake():
        made = make_model(run.config, run.dtype, trust_remote_code=run.trust_remote_code)
        rows = f"{run.batch_size} x {run.sequence_length} tokens"
        with refused(f"{type(made).__name__} refuses a batch of {rows}"), _scanned_at_once(made):
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
            with tracker:
                loss = loss_of(model, batch, chunked=run.chunked_loss)
                loss.backward()
                del loss
                tracker.note()
                unreached = [param for param in trained if param.grad is None]
                for param in unreached:  # images come before the text, so that their gradients come last
                    param.grad = torch.zeros_like(param)
                    tracker.mark(param.grad, "gradients")
                    tracker.note()
                    arrived(param)
        for handle in handles:
            handle.remove()
        return Trace(infos(model), tracker.moments, arrivals, sum(param.numel() for param in unreached))


def checkpointed(model: PreTrainedModel) -> None:
    """Recompute the activations of every repeated block in backward."""
    model.config.use_cache = False
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # before transformers 5.20
        model.gradient_checkpointing_enable(options)


def loss_of(model: nn.Module, batch: Tensor, *, chunked: bool = False) -> Tensor:
    """Return the loss of a model on a batch (rows, tokens), as its own forward computes it or with a chunked head."""
    whole: Any = model
    inner = whole.get_base_model() if hasattr(model, "get_base_model") else whole
    if type(inner).__name__.endswith("ForSequenceClassification"):
        return whole(input_ids=batch, labels=_classes(inner, batch)).loss
    if chunked:
        return _chunked_loss(inner, batch)
    options: dict[str, Any] = {}
    if hasattr(inner.config.get_text_config(), "use_cache"):
        options["use_cache"] = False
    if inner.config.is_encoder_decoder:
        options["decoder_input_ids"] = batch
    return whole(input_ids=batch, labels=batch, **options).loss


def _classes(model: Any, batch: Tensor) -> Tensor:
    """Return what a classifier is to say of each row: a class, or numbers."""
    config = model.config
    if config.problem_type == "multi_label_classification":
        return batch.new_zeros(len(batch), config.num_labels, dtype=model.dtype)
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return batch.new_zeros(len(batch), *[config.num_labels][config.num_labels == 1 :], dtype=model.dtype)
    return batch[:, 0]


def _chunked_loss(model: Any, batch: Tensor) -> Tensor:
    """Return the loss with torch's chunked head, which never holds all logits and makes the gradients in forward."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise PlanError(f"a chunked loss needs torch.nn.LinearCrossEntropyOptions, torch {torch.__version__} has none")
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) or (
        model.config.is_encoder_decoder
    ):
        raise PlanError(f"a chunked loss is of a decoder with a head on its words, got {type(model).__name__}")
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
    weight = model.get_output_embeddings().weight
    flat, target = hidden[:, :-1].reshape(-1, hidden.shape[-1]), batch[:, 1:].reshape(-1)
    # what "auto" means on a GPU, on every device: no fp32 copy of the head's gradient
    options = nn.LinearCrossEntropyOptions(acc_policy="compact", acc_dtype=weight.dtype)
    return nn.functional.linear_cross_entropy(flat, weight, target, options=options)
