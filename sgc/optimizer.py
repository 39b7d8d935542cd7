"""The SGC optimizer: parameter groups, state, checks and statistics. The arithmetic is in `sgc.step`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from sgc.arguments import FACTOR, check_group, check_param, warn_small_sketch
from sgc.backward.compressor import Compressor
from sgc.budget import fit
from sgc.checkpoint import Loading, kept_state, saved_form
from sgc.checks import shown
from sgc.codec.project import Projection
from sgc.gradients import check_gradient, warn_if_idle
from sgc.loop import StepLoop, state_of
from sgc.parallel import ranks
from sgc.parallel.fsdp2 import local
from sgc.parallel.home import Given, Home
from sgc.state import projection_bytes
from sgc.surroundings import shielded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SGC(torch.optim.Optimizer):
    """Fine-tune all parameters with an optimizer state of any size: sparse gradient compression.

    Each gradient is whitened by a factored second moment, sparsified and projected to k numbers per chunk of n entries;
    the moments live in that sketch; sparse recovery brings the update back. With `sketch_size=0`, the default, there is
    no first moment to hold and so no need to sparsify: every entry moves by the whitened gradient, and the state is the
    row and column means of its square. Use it where `torch.optim.AdamW` stood, with the same learning rate.

    Args:
        params: parameters, named parameters or groups of them; every keyword below may differ by group.
        lr: learning rate; AdamW's carries over.
        betas: β1 of the sketch (for "residual" the decay ρ of what is left; idle where there is no sketch), β2 of the
            second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        chunk_size: n, wanted entries of a chunk; None: one chunk per tensor.
        sketch_size: k, numbers held per chunk; 0: no sketch, only row and column means.
        sparsity: s, entries of each chunk that are encoded; default k/8, or all of them where there is no sketch.
        recovered: s', entries of each chunk that are recovered and updated; default s.
        moments: "residual", "whitened", "sketched" or "subspace".
        recovery: "omp", "gomp" or "threshold".
        scale: factor between lr and the compressed tensors' updates; default: what makes AdamW's lr carry over.
        rank: r, of double compression (CESGC): the codec works on PᵀG with P of r columns.
        refresh_every: updates from one P to the next.
        min_size: tensors with fewer entries (vectors: 16 times as many) are kept dense, under AdamW in fp32.
        state_dtype: of the sketches: torch.float32, torch.bfloat16 (stochastically rounded) or "int8" (blockwise).
        stochastic_rounding: of bf16 weights; False rounds to nearest.
        maximize: ascend instead of descend.
        seed: of A, of P's probes and of stochastic rounding.
        foreach, fused: AdamW's choice of an implementation; taken, and of no effect.
        amsgrad, capturable, differentiable: AdamW's; they must be False.

    Raises:
        ValueError: an argument out of range.
        TypeError: an argument of another kind, or a trained parameter that is not real floating point.

    Example:
        >>> model = torch.nn.Linear(256, 256)
        >>> optimizer = SGC(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 256)).square().mean().backward()
        >>> optimizer.step()

    Source: Yang et al., arXiv 2502.00311; "residual" and "whitened" are ours.
    """

    # whether ranks agree before the first step on all that `sgc.ranks` lists; a process group: its ranks alone do
    check_ranks: bool | ProcessGroup = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        chunk_size: int | None = 256,
        sketch_size: int = 0,
        sparsity: int | None = None,
        recovered: int | None = None,
        moments: str = "residual",
        recovery: str = "threshold",
        scale: float | None = None,
        rank: int | None = None,
        refresh_every: int = 200,
        min_size: int = 4096,
        state_dtype: torch.dtype | str = torch.float32,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        seed: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        self._start()
        super().__init__(params, defaults)

    def _start(self) -> None:
        """Make what is not part of a checkpoint."""
        self._compared = False
        self._presence: ranks.Presence | None = getattr(self, "_presence", None)
        if self._presence is None and self.check_ranks and ranks.several():
            self._presence = ranks.Presence(self)
        self._compressor: Compressor | None = None
        self._idle_said = False
        self._given: Given = getattr(self, "_given", None) or Given()
        self._given.look()
        self._loop = StepLoop(self._given)

    def __getstate__(self) -> dict[str, Any]:
        self._loop.batches.settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        compressor = getattr(self, "_compressor", None)  # torch's load_state_dict comes here too
        self._start()
        self._compressor = compressor
        super().__setstate__(state)
        if not self._given:
            self._given.extend(group["params"] for group in self.param_groups)

    @classmethod
    def for_budget(cls, params: Iterable[Any], state_bytes: int, **kwargs: Any) -> SGC:
        """Make the optimizer whose whole state fits in `state_bytes`, and log what was picked.

        Args:
            params: as for SGC.
            state_bytes: bytes that all of the state may take.
            kwargs: as for SGC; what is given is kept.

        Raises:
            ValueError: even the row and column means do not fit.
            TypeError: state_bytes is not a whole number.
        """
        return fit(cls, params, state_bytes, kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its hyperparameters checked first and tied parameters taken once."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f'a group of parameters must be a dict with "params", got {shown(param_group)}')
        group = {**self.defaults, **param_group}
        params = group["params"]
        if isinstance(params, set):
            raise TypeError("parameters must be in an ordered collection, a set has another order in every run")
        params = [params] if isinstance(params, Tensor) else list(params)
        once: dict[int, Any] = {}
        for param in params:
            once.setdefault(id(param[1] if isinstance(param, tuple) else param), param)
        group["params"] = list(once.values())
        check_group(group)
        warn_small_sketch(group)
        group.setdefault("steps", 0)  # calls of `step`, for the seeds of rounding: a decay alone is rounded anew, too
        group.setdefault(FACTOR, 1.0)
        for number, param in enumerate(group["params"], start=sum(len(other["params"]) for other in self.param_groups)):
            check_param(param, number, group)
        super().add_param_group(group)
        self._given.append(self.param_groups[-1]["params"])
        self._given.look()

    def attach(self, model: nn.Module, *, sample_every: int = 8) -> SGC:
        """Compress every gradient as soon as backward has made it, so that they never pile up.

        From the next backward on, `param.grad` of every compressed parameter is a `CompressedGradient`: its sketch, or
        where there is no sketch (sketch_size=0) every m-th of its entries, others at each step. Accumulation, clipping,
        GradScaler and `zero_grad` work on it as on any gradient, and `step` remains the only place where weights move.
        Under DistributedDataParallel, which must wrap the model afterwards, ranks sum these instead of gradients. A
        copied or pickled optimizer is not attached: attach it to its model anew.

        Args:
            model: whose parameters the optimizer trains.
            sample_every: m, where there is no sketch: each entry moves at one step in m, √m times as far.

        Returns:
            The optimizer itself.

        Raises:
            ValueError: nothing is large enough to be compressed; `rank`, or `sparsity` without a sketch, is set; a
                parameter is not the model's; sample_every is below 1.
            TypeError: a sharded parameter.
            RuntimeError: the model is wrapped in DistributedDataParallel already.

        Source: ours.
        """
        self._loop.batches.settle()
        if self._compressor is not None:
            self._compressor.remove()
            self._compressor = None
        self._compressor = Compressor(self, model, sample_every)
        return self

    def detach(self) -> None:
        """Undo `attach`: gradients are whole from the next backward on.

        Raises:
            RuntimeError: the model has run inside DistributedDataParallel, which goes on ignoring its parameters.
        """
        if self._compressor is not None:
            if self._compressor.joined:
                raise RuntimeError(
                    "DistributedDataParallel ignores the compressed parameters for good: make a new optimizer, and "
                    "wrap the model anew"
                )
            self._compressor.remove()
            self._compressor = None

    @_disable_dynamo  # as torch has it for the parts of its own optimizers that a compiler can't follow
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update of every parameter that has a gradient.

        A tensor whose gradient is not finite (or so large that its square is not) is left as it is, with its state, and
        counted. A gradient of zeros moves nothing but the weight decay.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            TypeError: a gradient that is no dense real floating-point tensor, a parameter that is sharded in another
                way than FSDP2's, a tensor that is only a shape; or a scheduler or the user has put a value of another
                kind into a group.
            ValueError: such a value is out of range, or the state of a tensor is of other sizes than its group says.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with shielded(param for _, param, _ in self._numbered()):
            self._step()
        return loss

    def _step(self) -> None:
        self._given.look()
        self._compare_ranks()
        for group in self.param_groups:  # schedulers and users write into them
            check_group(group)
        if self._compressor is not None:
            self._compressor.collect()
        homes = [self._home(*one) for one in self._numbered() if one[1].grad is not None]
        for home in homes:
            check_gradient(home.param, home.param.grad, self._name_of)
        if not homes and not self._idle_said:
            self._idle_said = warn_if_idle([param for _, param, _ in self._numbered()])
        self._loop.run(homes, self.param_groups, self.state)

    def _home(self, number: int, param: Tensor, group: dict[str, Any]) -> Home:
        return self._loop.home(number, param, group, self._parameter_name(number))

    def _compare_ranks(self, ddp_ranks: Sequence[int] | None = None, refusal: str | None = None) -> None:
        """Agree, once, with all ranks that train this model: see `ranks.agree`."""
        if self.check_ranks and not self._compared and ranks.several():
            ranks.agree(ranks.must_agree(self, ddp_ranks), ddp_ranks or ranks.partners(self), refusal)
        elif refusal is not None:
            raise RuntimeError(refusal)
        self._compared = self._compared or bool(self.check_ranks)
        if self._presence is not None:
            self._presence.end()
            self._presence = None

    def _numbered(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        pairs = ((param, group) for group in self.param_groups for param in group["params"])
        return ((number, param, group) for number, (param, group) in enumerate(pairs))

    def _parameter_name(self, number: int) -> str:
        within = number
        for group in self.param_groups:
            if within < len(group["params"]):
                return group["param_names"][within] if group.get("param_names") else f"parameter {number}"
            within -= len(group["params"])
        raise IndexError(number)

    def _name_of(self, param: Tensor) -> str:
        names = (self._parameter_name(number) for number, other, _ in self._numbered() if other is param)
        return next(names, "a parameter")

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a whole tensor, made where there is none."""
        return state_of(Home(0, param, group, "a parameter"), self.state)

    def _projection(self, group: Mapping[str, Any]) -> Projection | None:
        return self._loop.projection(group)

    def stats(self) -> dict[str, float]:
        """Report how the optimizer is doing; reading it costs one synchronization.

        Returns:
            state_bytes: bytes held; compression_ratio: those over AdamW's 8 bytes per parameter (where tensors are
            sharded, both on this rank); grad_norm: of the last step; skipped_tensors: gradients left out so far because
            they were not finite; and from the first 16 chunks of each tensor that this rank holds, at the last probed
            step (the first, and every tenth): recovery_error, the share ‖y − A·u‖/‖y‖ of the sketches that the
            recovered update leaves unexplained; recovered_fraction, 1 − its square; support_overlap, the share of
            recovered entries that the step before recovered too. What has not been seen yet is nan.
        """
        self._loop.batches.settle()
        stepped = (tensor for harness in self._loop.harnesses for tensor in harness.held_tensors())
        tensors = {id(param): param for param in (*self.held_tensors(), *stepped)}
        parameters = sum(local(param).numel() for param in tensors.values())
        held = self.state_bytes()
        return {
            "state_bytes": float(held),
            "compression_ratio": held / (8 * parameters) if parameters else math.nan,
            "grad_norm": self._loop.batches.grad_norm,
            "skipped_tensors": float(self._loop.batches.skipped),
            **self._loop.probes.stats(),
            **({} if self._compressor is None else self._compressor.stats()),
        }

    def held_tensors(self) -> list[Tensor]:
        """List what this process updates: trained parameters, or what a sharding harness has put in their place."""
        trained = [param for _, param, _ in self._numbered() if param.requires_grad or param in self.state]
        shown = (
            tensor for harness in self._loop.harnesses for tensor in harness.held_tensors()
        )  # by ZeRO-3, at a step
        return trained or list(shown) or self._given.tensors()

    def state_bytes(self) -> int:
        """Count the bytes really held: every state tensor, A, compressed gradients, and what is kept for `stats`."""
        states = (held for held in self.state.values() if isinstance(held, dict))  # others may keep what they like here
        state = (value for held in states for value in held.values() if isinstance(value, Tensor))
        tensors = [*map(local, state), *self._loop.probes.tensors()]
        held = sum(t.numel() * t.element_size() for t in tensors) + sum(
            p.bytes() for p in self._loop.projections.values()
        )
        return held + (0 if self._compressor is None else self._compressor.bytes())

    def expected_state_bytes(self) -> int:
        """Predict the bytes of state, A and compressed gradients when every trained parameter has been updated."""
        total = 0 if self._compressor is None else self._compressor.most_bytes()
        shared: dict[tuple[int, int], int] = {}
        for group in self.param_groups:
            trained = [param for param in group["params"] if param.requires_grad]
            shapes = [param.shape for param in trained]
            total += sum(self._home(0, param, group).expected_bytes() for param in trained)
            key = (group["sketch_size"], group["seed"])
            shared[key] = max(shared.get(key, 0), projection_bytes(shapes, group))
        return total + sum(shared.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the state; in the middle of an accumulation, with the compressed gradients.

        Those are summed over the ranks first: in the middle of an accumulation, call it on every rank.
        """
        self._loop.batches.settle()
        every = self.state
        self.state = defaultdict(dict, kept_state(every, (param for _, param, _ in self._numbered())))
        try:
            state_dict = super().state_dict()
        finally:
            self.state = every
        return saved_form(state_dict, {} if self._compressor is None else self._compressor.pending())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; dtypes are kept as saved. Each rank takes its part of whole or otherwise sharded tensors.

        Pre-hooks come first, then what they made of the checkpoint is checked; post-hooks see all that was loaded.

        Raises:
            ValueError: the checkpoint is damaged, of another configuration, or holds a tensor of another shape or
                dtype; nothing has been overwritten then.
            TypeError: it is no dict, or a hyperparameter in it is of another kind.
        """
        self._loop.batches.settle()
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"a checkpoint of an optimizer is a dict, got {shown(state_dict)}")
        loading = Loading(lambda: [self._home(*one) for one in self._numbered()], self.param_groups, self._compressor)
        # the user's hooks rename and reorder states, so ours is the last before torch loads and the first after it
        hooks = [
            self.register_load_state_dict_pre_hook(loading.take_own),
            self.register_load_state_dict_post_hook(loading.put_own, prepend=True),
        ]
        try:
            with shielded(param for _, param, _ in self._numbered()):
                super().load_state_dict(dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()
