"""The SGC optimizer: parameter groups, state, checks and statistics. The arithmetic is in `sgc.step`."""

from __future__ import annotations

import logging
import math
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from sgc import backends, moments
from sgc.arguments import check_group, check_param, warn_small_sketch
from sgc.backward.compressed import FACTOR, CompressedGradient, Compressor
from sgc.checks import plain, rate, shown, whole
from sgc.codec.layout import Layout
from sgc.codec.project import Projection, mix
from sgc.parallel import fsdp2, ranks
from sgc.parallel.zero import Partition, Piece, Tools, find_pieces, on_cpu
from sgc.state import NAMES, budget_ladder, has_basis, projection_bytes, schema_bytes, state_schema, tensor_layout
from sgc.step import (
    PROBED_CHUNKS,
    Update,
    adamw_update,
    apply_dense,
    apply_memoryless,
    apply_sampled,
    apply_sparse,
    compressed_update,
    gradient_norm,
    lowrank_update,
    sketched_update,
    square_sums,
)
from sgc.surroundings import has_numbers, shielded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from sgc.backends.triton.batch import Batch, Entry, Pending, Sparse

PENDING = "pending"  # in a checkpoint, beside the state of a tensor: its compressed gradient
PROBE_EVERY = 10  # steps from one look at the recovery to the next
CONFIGURATION = ("chunk_size", "sketch_size", "sparsity", "moments", "rank", "min_size", "state_dtype", "seed")
_NOT_PROBED = torch.full((1, 3), math.nan, dtype=torch.float32, device="cpu")
_logger = logging.getLogger("sgc")


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
        self._projections: dict[tuple[int, int], Projection] = {}
        self._supports: dict[Tensor | Piece, Tensor] = {}
        self._probes: list[Tensor] = []
        self._steps = 0
        self._grad_norm = math.nan
        self._skipped = 0
        self._batches: dict[torch.device, Batch] = {}
        self._unsettled: deque[tuple[list[float], dict[torch.device, Pending]]] = deque()  # norms known, norms to come
        self._unborn: dict[Tensor, None] = {}  # whose state a batch has made, perhaps for a gradient that is not finite
        self._judged: dict[Tensor, tuple[Any, ...]] = {}  # for what shape and sizes a state was found to be right
        self._compared = False
        self._presence: ranks.Presence | None = getattr(self, "_presence", None)
        if self._presence is None and self.check_ranks and ranks.several():
            self._presence = ranks.Presence(self)
        self._compressor: Compressor | None = None
        self._idle_said = False
        # The lists of the groups, as DeepSpeed puts others in the place of them. Others hold no parameter alive that a
        # harness has taken out of its list, and unlike weak references let torch swap the contents of one.
        self._given: list[list[Tensor]] = getattr(self, "_given", [])
        self._given_ids = {id(param) for params in self._given for param in params}
        self._partitions: dict[Tensor, Partition] = {}

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        compressor = getattr(self, "_compressor", None)  # torch's load_state_dict comes here too
        self._start()
        self._compressor = compressor
        super().__setstate__(state)
        self._given = self._given or [group["params"] for group in self.param_groups]

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
        state_bytes = whole("state_bytes", state_bytes)
        params = [_listed(param) for param in params]
        smallest, refused = math.inf, None
        for picked in budget_ladder(kwargs):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a candidate's warning is not the user's
                    candidate = cls(params, **{**picked, **kwargs})
            except ValueError as error:  # what is picked may not go with what is fixed
                refused = refused or error
                continue
            needed = candidate.expected_state_bytes() + candidate._probe_bytes()
            smallest = min(smallest, needed)
            if needed <= state_bytes:
                optimizer = cls(params, **{**picked, **kwargs})
                sizes = ("chunk_size", "sketch_size", "sparsity")
                chosen = ", ".join(f"{name}={optimizer.param_groups[0][name]}" for name in sizes)
                _logger.info("SGC.for_budget: %s takes %d of %d bytes", chosen, needed, state_bytes)
                return optimizer
        if refused is not None and smallest == math.inf:
            raise refused
        raise ValueError(f"state_bytes must be at least {smallest} for these parameters, got {state_bytes}")

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
        self._given_ids.update(map(id, self._given[-1]))

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
        self._settle()
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
        self._given_ids = {id(param) for params in self._given for param in params}
        self._compare_ranks()
        for group in self.param_groups:  # schedulers and users write into them
            check_group(group)
        if self._compressor is not None:
            here = {param for _, param, _ in self._numbered()}
            if not self._compressor.slots.keys() <= here and any(id(param) not in self._given_ids for param in here):
                raise RuntimeError(
                    "parameters were replaced after optimizer.attach(model), as FSDP does: compressed gradients need "
                    "whole ones, and sharded parameters have sharded gradients already"
                )
            if self.check_ranks:
                self._compressor.check_ranks()
            self._compressor.collect()
        ready: list[tuple[int, Tensor, Any, Any]]
        ready = [(number, p, p.grad, group) for number, p, group in self._numbered() if p.grad is not None]
        for _, param, gradient, _ in ready:
            self._check_gradient(param, gradient)
        if not ready:
            self._say_if_idle()
        if any(self._partition(param) is not None for _, param, _, _ in ready):
            self._step_partitions(ready)
            return
        for number, param, _, group in ready:
            self._check_sizes(number, param, group)
        self._steps += 1
        for group in self.param_groups:
            group["steps"] += 1
        self._probes = [] if self._probing else self._probes
        self._settle(wait=False)
        ready, batches = self._split_batches(self._with_parts(ready))
        if ready:
            self._settle()
        sums = [_sums(*entry[1:]) for entry in ready]
        norms = _norms([gradient for _, _, gradient, _ in ready], sums)
        moving = (entry[2] for entry, norm in zip(ready, norms, strict=True) if math.isfinite(norm) and norm > 0)
        fsdp2.reduce_sketches((part for part in moving if isinstance(part, fsdp2.Part)), self._projection)
        for (number, param, gradient, group), norm, known in zip(ready, norms, sums, strict=True):
            if not math.isfinite(norm):
                self._skipped += 1
            elif norm >= 0:
                self._update(number, param, gradient, group, norm > 0, known)
        self._unsettled.append((norms, {device: self._batches[device].update(batches[device]) for device in batches}))
        if not batches:
            self._settle()

    def _check_gradient(self, param: Tensor, gradient: Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise TypeError(f"SGC needs dense gradients, {self._name_of(param)} has one in layout {gradient.layout}")
        if not gradient.is_floating_point():
            raise TypeError(
                f"SGC needs real floating-point gradients, {self._name_of(param)} has one of {gradient.dtype}"
            )
        if fsdp2.is_flattened(param):
            raise TypeError(
                f"SGC needs the shapes of the tensors it trains, and FSDP1 has flattened {self._name_of(param)}: use "
                "FSDP2, which is torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate's configuration"
            )
        self._check_numbers(param, gradient)

    def _check_numbers(self, param: Tensor, gradient: Tensor) -> None:
        if not (has_numbers(param) and has_numbers(gradient)):
            raise TypeError(
                f"SGC needs the numbers of what it trains, and {self._name_of(param)} or its gradient is only a shape "
                "(a meta or fake tensor): put the model on a device, as by model.to_empty, before the optimizer is made"
            )

    def _check_sizes(self, number: int, param: Tensor, group: dict[str, Any]) -> None:
        """Raise unless a tensor can be trained with its group's sizes: either may have changed since it was added."""
        sizes = (param.shape, *(group[name] for name in CONFIGURATION))
        if self._judged.get(param) == sizes:
            return
        name = self._parameter_name(number)
        check_param((name, param), number, group)
        if not fsdp2.is_sharded(param):
            self._check_state(name, self.state.get(param, {}), param, group, "it")
        self._judged[param] = sizes

    def _say_if_idle(self) -> None:
        """Warn, once, where no step will ever move anything."""
        params = [param for _, param, _ in self._numbered()]
        if self._idle_said or not params or any(param.requires_grad for param in params):
            return
        self._idle_said = True
        warnings.warn(
            f"SGC trains nothing: none of its {len(params)} parameters requires a gradient. Make the optimizer after "
            "adapters are added to the model, or let parameters require gradients",
            stacklevel=7,
        )

    def _split_batches(
        self, ready: Sequence[tuple[int, Tensor, Any, Any]]
    ) -> tuple[list[tuple[int, Tensor, Any, Any]], dict[torch.device, list[Entry]]]:
        """Take out the tensors that kernels update together, by device."""
        rest, batches = [], dict[torch.device, "list[Entry]"]()
        fused = {
            device: backends.choose("apply", device).fused for device in {param.device for _, param, _, _ in ready}
        }
        for one in ready:
            entry = self._entry(*one) if fused[one[1].device] else None
            if entry is None:
                rest.append(one)
            else:
                batches.setdefault(entry.weight.device, []).append(entry)
        for device in batches:
            if device not in self._batches:
                from sgc.backends.triton.batch import Batch

                self._batches[device] = Batch(device)
        return rest, batches

    def _entry(self, number: int, param: Tensor, gradient: Any, group: dict[str, Any]) -> Entry | None:
        """Give what a batch needs to update a whole tensor, or None where it can't."""
        layout = tensor_layout(param.shape, group)
        if type(gradient) is not Tensor or fsdp2.is_sharded(param) or not param.numel():
            return None
        is_sparse = layout is not None and group["recovered"] is not None
        if layout is not None and (has_basis(param.shape, group) or (is_sparse and not _batched(group))):
            return None
        from sgc.backends.triton.batch import Entry, obstacle, sparse_obstacle

        why_not, sparse = obstacle(param, gradient), None
        if why_not is None and layout is not None and is_sparse:
            sparse = self._sparse(param, layout, group)
            why_not = sparse_obstacle(param, layout, gradient.dtype, sparse, group["recovery"])
            if why_not is not None:
                return None  # the stages say why, each for itself
        if why_not is not None and not backends.choose("apply", param.device, why_not).fused:
            return None
        signed_lr, decay = _rates(group)
        if layout is not None:
            signed_lr *= moments.update_scale(param.numel(), layout.chunks, layout.chunk, group)
        if "step" not in self.state[param]:
            self._unborn[param] = None
        state, seed, stochastic = self._state_of(param, group), self._seed(number, group), group["stochastic_rounding"]
        rates = signed_lr, decay, group["eps"], group["betas"]
        return Entry(param, gradient, state, layout, *rates, seed, stochastic, sparse)

    def _sparse(self, param: Tensor, layout: Layout, group: dict[str, Any]) -> Sparse:
        """Say how a batch makes the update of a tensor sparse."""
        from sgc.backends.triton.batch import Sparse

        def noted(index: Tensor, value: Tensor, target: Tensor | None) -> None:
            self._probe(param, layout, projection, group, Update(index, value, target))

        projection, recovered = self._projection(group), min(group["recovered"], layout.chunk)
        sparsity = recovered if projection is None else group["sparsity"]
        return Sparse(sparsity, recovered, projection, PROBED_CHUNKS, noted if self._probes_now else None)

    def _settle(self, wait: bool = True) -> None:
        """Learn which of the last updates were none, where kernels decided it; without `wait`, what is known by now."""
        while self._unsettled and (wait or all(one.ready() for one in self._unsettled[0][1].values())):
            norms, pending = self._unsettled.popleft()
            found = []
            for one in pending.values():
                found += one.settle()
                for param, norm in zip(one.weights, found[-len(one.weights) :], strict=True):
                    if math.isfinite(norm):
                        self._unborn.pop(param, None)
                    elif param in self._unborn and self.state[param]["step"] == 0:
                        del self.state[param], self._unborn[param]
            self._skipped += sum(not math.isfinite(norm) for norm in found)
            self._grad_norm = math.hypot(*(norm for norm in [*norms, *found] if not norm < 0))

    def _partition(self, param: Tensor) -> Partition | None:
        """Give the pieces of a tensor that DeepSpeed has put in the place of others."""
        if param not in self._partitions and not fsdp2.is_sharded(param):
            found = None
            if id(param) not in self._given_ids:
                found = find_pieces(param, [tensor for params in self._given for tensor in params])
            if found is None:
                return None
            self._partitions[param] = Partition(param, *found)
            if "step" in self.state[param]:
                self.state[param] = {}  # DeepSpeed's bf16 optimizer steps once before it says what lies where
        return self._partitions.get(param)

    def _step_partitions(self, ready: list[tuple[int, Tensor, Tensor, dict[str, Any]]]) -> None:
        """Update DeepSpeed's partitions: it calls `step` once for each, with all others out of sight."""
        for _, flat, gradient, group in ready:
            partition = self._partition(flat)
            if partition is None:
                continue  # nothing but padding lies on this rank
            group["steps"] += 1
            if group["steps"] != self._steps:
                self._steps = group["steps"]
                self._probes = [] if self._probing else self._probes
            tools = Tools(*_rates(group), self._projection(group), self._generator, self._probe)
            self._skipped += partition.update(gradient, self.state[flat], group, tools)

    def _with_parts(self, ready: list[tuple[int, Tensor, Any, Any]]) -> list[tuple[int, Tensor, Any, Any]]:
        """Put this rank's parts in the place of sharded gradients, their statistics summed over the ranks."""
        parts = {}
        for number, param, gradient, group in ready:
            if fsdp2.is_sharded(param):
                name = self._parameter_name(number)
                shard = fsdp2.shard_of(param, group, name)
                state = self._state_of(param, group)
                parts[number] = fsdp2.Part(param, gradient, state, group, shard, name)
        fsdp2.reduce_statistics(list(parts.values()))
        return [(number, param, parts.get(number, gradient), group) for number, param, gradient, group in ready]

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

    def _update(
        self,
        number: int,
        param: Tensor,
        gradient: Any,
        group: dict[str, Any],
        moves: bool,
        sums: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Update one tensor, given what `_sums` gives; without `moves`, only decay it."""
        part = gradient if isinstance(gradient, fsdp2.Part) else None
        state, layout = self._state_of(param, group), tensor_layout(param.shape, group)
        own = param
        if part is not None:
            state, own, gradient = part.state, part.weight, part.gradient
        signed_lr, decay = _rates(group)
        weight = own if own.is_contiguous() else own.contiguous()
        if moves:
            state["step"] += 1
        generator = rounding = self._generator(number, param, group)
        if part is not None:
            rounding = self._generator(number, param, group, part.stream)
            generator = generator if part.cut else rounding
        rounding = rounding if group["stochastic_rounding"] else None
        if not moves:
            apply_dense(weight, None, 0.0, decay, rounding)
        elif layout is None:
            update = adamw_update(gradient, state, group["betas"], group["eps"])
            apply_dense(weight, update, signed_lr, decay, rounding)
        else:
            scaled = signed_lr * moments.update_scale(param.numel(), layout.chunks, layout.chunk, group)
            projection = self._projection(group)
            if part is not None:
                applied = part.apply(weight, projection, scaled, decay, generator, rounding)
                if applied is not None:
                    self._probe(param, applied[1], projection, group, applied[0])
            elif has_basis(param.shape, group):
                dense, sparse = lowrank_update(gradient, state, layout, projection, group, generator)
                apply_dense(weight, dense, scaled, decay, rounding)
                self._probe(param, layout, projection, group, sparse)
            elif isinstance(gradient, CompressedGradient) and projection is None:
                whitening, value, first, every = gradient.advance_sampled(state, group)
                apply_sampled(
                    weight, value, first, every, layout, whitening, group["eps"], scaled * every**0.5, decay, rounding
                )
            elif isinstance(gradient, CompressedGradient):
                assert projection is not None  # compressed gradients have a sketch
                p, q = gradient.advance(state, group)
                sparse = sketched_update(p, q, state, layout, projection, group, generator)
                apply_sparse(weight, layout, sparse, scaled, decay, rounding)
                self._probe(param, layout, projection, group, sparse)
            elif group["recovered"] is None:
                apply_memoryless(weight, gradient, state, layout, group, scaled, decay, rounding, sums)
            else:
                sparse = compressed_update(gradient, state, layout, projection, group, generator, sums)
                apply_sparse(weight, layout, sparse, scaled, decay, rounding)
                self._probe(param, layout, projection, group, sparse)
        if weight is not own:
            own.copy_(weight)

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[param]
        if "step" in state:
            return state
        if fsdp2.is_sharded(param):
            state.update(fsdp2.make_state(param, group, fsdp2.shard_of(param, group, "a parameter")))
        else:
            for name, (shape, dtype) in state_schema(param.shape, group).items():
                device = "cpu" if name == "step" else param.device
                state[name] = torch.zeros(shape, dtype=dtype, device=device)
        return state

    def _generator(
        self, number: int, param: Tensor, group: Mapping[str, Any], stream: int = 0
    ) -> torch.Generator | None:
        """Seed the stochastic rounding of one tensor's update, so that a resumed run draws the same.

        What ranks hold of a sharded tensor differs in `stream`, so its rounding depends on the number of ranks.
        """
        if param.dtype is not torch.bfloat16 and group["state_dtype"] != "bfloat16":
            return None
        seed = self._seed(number, group)
        return torch.Generator(param.device).manual_seed(mix(seed ^ mix(stream)) if stream else seed)

    def _seed(self, number: int, group: Mapping[str, Any]) -> int:
        return mix(mix(mix(group["seed"] & 0xFFFFFFFF) ^ number) ^ group["steps"])

    def _projection(self, group: Mapping[str, Any]) -> Projection | None:
        key = (group["sketch_size"], group["seed"])
        if key[0] and key not in self._projections:
            self._projections[key] = Projection(*key)
        return self._projections.get(key)

    @property
    def _probing(self) -> bool:
        return self._steps == 1 or self._steps % PROBE_EVERY == 0

    @property
    def _probes_now(self) -> bool:
        """Whether `_probe` does anything at this step."""
        return self._probing or self._steps % PROBE_EVERY == PROBE_EVERY - 1

    def _probe(
        self,
        param: Tensor | Piece,
        layout: Layout,
        projection: Projection | None,
        group: Mapping[str, Any],
        update: Update,
    ) -> None:
        """Look at the recovery of the first chunks, at the first and every tenth step; note the supports before."""
        index, value = update.index[:PROBED_CHUNKS], update.value[:PROBED_CHUNKS]
        if self._steps % PROBE_EVERY == PROBE_EVERY - 1:
            self._supports[param] = index.clone()
        if not self._probing:
            return
        last = self._supports.pop(param, None)
        left, whole = torch.zeros(2, dtype=torch.float32, device=index.device)
        if projection is not None and update.target is not None and group["moments"] != "sketched":
            explained = projection.project(index, value, layout.chunk)
            left, whole = (update.target - explained).square().sum(), update.target.square().sum()
        unknown = torch.full((), math.nan, dtype=torch.float32, device=index.device)
        overlap = unknown if last is None else _overlap(index, last)
        self._probes.append(torch.stack([left, whole, overlap]))

    def stats(self) -> dict[str, float]:
        """Say how the optimizer is doing; reading it costs one synchronization.

        Returns:
            state_bytes: bytes held; compression_ratio: those over AdamW's 8 bytes per parameter (where tensors are
            sharded, both on this rank); grad_norm: of the last step; skipped_tensors: gradients left out so far because
            they were not finite; and from the first 16 chunks of each tensor that this rank holds, at the last probed
            step (the first, and every tenth): recovery_error, the share ‖y − A·u‖/‖y‖ of the sketches that the
            recovered update leaves unexplained; recovered_fraction, 1 − its square; support_overlap, the share of
            recovered entries that the step before recovered too. What has not been seen yet is nan.
        """
        self._settle()
        tensors = {id(param): param for param in (*self.held_tensors(), *self._partitions)}
        parameters = sum(fsdp2.local(param).numel() for param in tensors.values())
        held = self.state_bytes()
        probes = torch.stack([probe.cpu() for probe in self._probes]) if self._probes else _NOT_PROBED
        left, whole = probes[:, 0].sum().item(), probes[:, 1].sum().item()
        unexplained = left / whole if whole > 0 else math.nan
        return {
            "state_bytes": float(held),
            "compression_ratio": held / (8 * parameters) if parameters else math.nan,
            "grad_norm": self._grad_norm,
            "skipped_tensors": float(self._skipped),
            "recovery_error": math.sqrt(unexplained),
            "recovered_fraction": 1 - unexplained,
            "support_overlap": probes[:, 2].nanmean().item(),
            **({} if self._compressor is None else self._compressor.stats()),
        }

    def held_tensors(self) -> list[Tensor]:
        """List what this process updates: trained parameters, or what a sharding harness has put in their place."""
        trained = [param for _, param, _ in self._numbered() if param.requires_grad or param in self.state]
        listed = trained or list(self._partitions)  # ZeRO-3 shows them at a step
        return listed or [tensor for params in self._given for tensor in params]

    def state_bytes(self) -> int:
        """Count the bytes really held: every state tensor, A, compressed gradients, and what is kept for `stats`."""
        states = (held for held in self.state.values() if isinstance(held, dict))  # others may keep what they like here
        state = (value for held in states for value in held.values() if isinstance(value, Tensor))
        tensors = [*map(fsdp2.local, state), *self._supports.values(), *self._probes]
        held = sum(t.numel() * t.element_size() for t in tensors) + sum(p.bytes() for p in self._projections.values())
        return held + (0 if self._compressor is None else self._compressor.bytes())

    def expected_state_bytes(self) -> int:
        """Predict the bytes of state, A and compressed gradients when every trained parameter has been updated."""
        total = 0 if self._compressor is None else self._compressor.most_bytes()
        shared: dict[tuple[int, int], int] = {}
        for group in self.param_groups:
            trained = [param for param in group["params"] if param.requires_grad]
            shapes = [param.shape for param in trained]
            total += sum(_expected_bytes(param, group) for param in trained)
            key = (group["sketch_size"], group["seed"])
            shared[key] = max(shared.get(key, 0), projection_bytes(shapes, group))
        return total + sum(shared.values())

    def _probe_bytes(self) -> int:
        """Bytes that `stats` may hold beside the state: the supports and sums of a probe."""
        total = 0
        for _, param, group in self._numbered():
            layout = tensor_layout(param.shape, group)
            if param.requires_grad and layout is not None and group["recovered"] is not None:
                total += min(layout.chunks, PROBED_CHUNKS) * min(group["recovered"], layout.chunk) * 8 + 12
        return total

    def state_dict(self) -> dict[str, Any]:
        """Give the state; in the middle of an accumulation, with the compressed gradients.

        Those are summed over the ranks first: in the middle of an accumulation, call it on every rank.
        """
        self._settle()
        every, here = self.state, {param for _, param, _ in self._numbered()}
        # that of parameters whose group was removed is kept, as torch does, and not saved, for which torch has no place
        kept = {key: held for key, held in every.items() if key in here or not isinstance(key, Tensor)}
        self.state = defaultdict(dict, kept)
        try:
            state_dict = super().state_dict()
        finally:
            self.state = every
        state_dict["param_groups"] = [
            {name: _saved(value) for name, value in group.items()} | {FACTOR: float(group.get(FACTOR, 1.0))}
            for group in state_dict["param_groups"]
        ]
        pending = {} if self._compressor is None else self._compressor.pending()
        if pending:
            state = dict(state_dict["state"])
            for number, gradient in pending.items():
                state[number] = {**state.get(number, {}), PENDING: gradient}
            state_dict["state"] = state
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; dtypes are kept as saved. Each rank takes its part of whole or otherwise sharded tensors.

        Pre-hooks come first, then what they made of the checkpoint is checked; post-hooks see all that was loaded.

        Raises:
            ValueError: the checkpoint is damaged, of another configuration, or holds a tensor of another shape or
                dtype; nothing has been overwritten then.
            TypeError: it is no dict, or a hyperparameter in it is of another kind.
        """
        self._settle()
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"a checkpoint of an optimizer is a dict, got {shown(state_dict)}")
        own: dict[int, dict[str, Any]] = {}
        pending: dict[int, Tensor] = {}

        def take_own(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            """Take out what is ours; torch casts what it loads to the parameter's dtype."""
            state_dict = self._checked(state_dict)
            others = {}
            numbered = {number: (param, group) for number, param, group in self._numbered()}
            for number, held in state_dict["state"].items():
                if number not in numbered:
                    others[number] = held  # of any kind
                    continue
                names = self._own_names(held, *numbered[number])
                if PENDING in names:
                    pending[number] = held[PENDING]
                own[number] = {name: value for name, value in held.items() if name in names and name != PENDING}
                others[number] = {k: v for k, v in held.items() if k not in names} if names else held
            return {**state_dict, "state": others}

        def put_own(_: Any) -> None:
            for number, param, group in self._numbered():
                saved = own.get(number)
                if saved and fsdp2.is_sharded(param):
                    shard = fsdp2.shard_of(param, group, self._parameter_name(number))
                    self.state[param].update(fsdp2.load_state(saved, param, group, shard))
                    continue
                for name, value in (saved or {}).items():
                    device = "cpu" if on_cpu(name) else param.device
                    self.state[param][name] = fsdp2.whole(value).detach().to(device=device, copy=True)
            if self._compressor is not None:
                self._compressor.restore(pending)

        # the user's hooks rename and reorder states, so ours is the last before torch loads and the first after it
        hooks = [
            self.register_load_state_dict_pre_hook(take_own),
            self.register_load_state_dict_post_hook(put_own, prepend=True),
        ]
        try:
            with shielded(param for _, param, _ in self._numbered()):
                super().load_state_dict(dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint, all of it judged, with numbered parameters and whole groups."""
        groups, state = state_dict.get("param_groups"), state_dict.get("state")
        if not isinstance(groups, list | tuple) or not isinstance(state, dict) or not all(map(_is_group, groups)):
            raise ValueError(
                'the checkpoint is damaged: an optimizer\'s has "state", a dict, and "param_groups", a list of dicts '
                f'with "params"; this one holds {shown(state_dict)}'
            )
        state_dict = _numbered_state(state_dict)
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            return state_dict  # torch says this well
        pairs = zip(self.param_groups, state_dict["param_groups"], strict=True)
        checked = [_checked_group(number, own, saved) for number, (own, saved) in enumerate(pairs)]
        numbered = {number: (param, group) for number, param, group in self._numbered()}
        for number, held in state_dict["state"].items():
            if isinstance(number, int):
                if number not in numbered:
                    raise ValueError(f"the checkpoint holds a state of parameter {number}, its groups have no such one")
                self._check_state(self._parameter_name(number), held, *numbered[number])
        return {**state_dict, "param_groups": checked}

    def _check_state(
        self, name: str, held: Any, param: Tensor, group: dict[str, Any], source: str = "the checkpoint"
    ) -> None:
        """Raise unless the state of a tensor is what `step` would have made, apart from what others add."""
        if not isinstance(held, dict):
            raise ValueError(f"the state of {name} should be a dict, the checkpoint holds {shown(held)}")
        if PENDING in held and self._compressor is None:
            raise ValueError(
                "the checkpoint was written in the middle of an accumulation and holds compressed gradients: call "
                "optimizer.attach(model) before it is loaded"
            )
        partition = self._partition(param)
        if partition is not None:
            partition.check_state(held, group)
            return
        schema = state_schema(param.shape, group)
        found = {key: _described(held[key]) for key in sorted(NAMES & held.keys())}
        expected = {key: (shape, dtype) for key, (shape, dtype) in sorted(schema.items())}
        if found and found != expected:
            raise ValueError(
                f"the state of {name} should hold {expected} for a parameter of shape {tuple(param.shape)}, "
                f"{source} holds {found}"
            )
        if found and not 0 <= (step := fsdp2.whole(held["step"]).item()) < math.inf:
            raise ValueError(f"the state of {name} should count its updates, {source} holds step={step}")

    def _own_names(self, held: Mapping[str, Any], param: Tensor, group: dict[str, Any]) -> set[str]:
        """Name what a state holds of ours; the rest is others', who may keep what they like beside it."""
        partition = self._partition(param)
        names = NAMES if partition is None else partition.schema(group).keys()
        return held.keys() & (names | {PENDING})


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list | tuple)


def _checked_group(number: int, own: Mapping[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return the group of a checkpoint, judged, and completed by what only this version of SGC has."""
    for name in CONFIGURATION:
        if name not in saved:
            raise ValueError(f"the checkpoint is not one of SGC's: its parameter groups have no {name}")
    merged = {name: value for name, value in own.items() if name not in ("params", "param_names")} | saved
    try:
        check_group(merged)
        merged["steps"] = whole("steps", merged["steps"], at_least=0)
        merged[FACTOR] = rate(FACTOR, saved.get(FACTOR, 1.0))
        if not merged[FACTOR]:
            raise ValueError(f"{FACTOR} must be positive, got 0")
    except (TypeError, ValueError) as error:
        raise type(error)(f"parameter group {number} of the checkpoint is damaged: {error}") from None
    for name in CONFIGURATION:
        if merged[name] != own[name]:
            raise ValueError(f"the checkpoint was written with {name}={merged[name]}, this SGC has {own[name]}")
    return merged


def _saved(value: Any) -> Any:
    """Return what is in a group without NumPy's numbers, which torch.load(weights_only=True) refuses."""
    if type(value) in (tuple, list):
        return type(value)(map(_saved, value))
    return value if isinstance(value, Tensor) else plain(value)


def _listed(params: Any) -> Any:
    """Hold the parameters of a group in a list, so that they can be gone through more than once."""
    if not isinstance(params, dict) or isinstance(params["params"], Tensor | set):
        return params
    return {**params, "params": list(params["params"])}


def _numbered_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Number the parameters of a checkpoint, where torch.distributed.checkpoint has put their names."""
    groups: list[dict[str, Any]] = []
    numbers: dict[Any, int] = {}
    for group in state_dict["param_groups"]:
        first = len(numbers)
        numbers |= {key: first + at for at, key in enumerate(group["params"])}
        groups.append({**group, "params": list(range(first, len(numbers)))})
    state = {numbers.get(key, key): held for key, held in state_dict["state"].items()}
    return {**state_dict, "param_groups": groups, "state": state}


def _rates(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return the learning rate, which the step has judged, negative where the group ascends, and its weight decay."""
    lr = float(group["lr"])
    return -lr if group["maximize"] else lr, lr * group["weight_decay"]


def _described(value: Any) -> Any:
    """Say what a checkpoint holds in the place of a state tensor: shape and dtype, or what is wrong with it."""
    if not isinstance(value, Tensor):
        return shown(value)
    if value.is_meta or value.layout is not torch.strided:
        return f"a tensor on the {value.device} device in layout {value.layout}"
    return tuple(value.shape), value.dtype


def _expected_bytes(param: Tensor, group: dict[str, Any]) -> int:
    if fsdp2.is_sharded(param):
        return fsdp2.local_bytes(param, group, fsdp2.shard_of(param, group, "a parameter"))
    return schema_bytes(state_schema(param.shape, group))


def _overlap(index: Tensor, last: Tensor) -> Tensor:
    """Give the share of the positions (c, s'), ascending in each chunk, that are among the last ones (c, s')."""
    last = last.contiguous()
    at = torch.searchsorted(last, index.contiguous()).clamp_(max=last.shape[1] - 1)
    return (last.gather(1, at) == index).float().mean()


def _batched(group: Mapping[str, Any]) -> bool:
    """Whether a batch knows the moment rule of a group, and how its sketches are held."""
    return not group["sketch_size"] or (group["moments"] == "residual" and group["state_dtype"] == "float32")


def _sums(param: Tensor, gradient: Any, group: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Sum g² over the rows and columns of a gradient that is to be whitened, which gives its norm in the same read."""
    layout = tensor_layout(param.shape, group)
    if type(gradient) is not Tensor or layout is None or has_basis(param.shape, group):
        return None
    return square_sums(layout.grid(gradient), layout) if group["moments"] in moments.FACTORED else None


def _norms(gradients: list[Tensor], sums: list[tuple[Tensor, Tensor] | None]) -> list[float]:
    """Give the norm of every gradient in one synchronization: inf or nan where it is not finite, −1 where none came."""
    if not gradients:
        return []
    pairs = zip(gradients, sums, strict=True)
    norms = [_norm(gradient) if known is None else known[0].sum().sqrt() for gradient, known in pairs]
    found = torch.stack([norm.to(norms[0].device) for norm in norms])
    # torch gives the norm of a single entry without squaring it: what squares make of the others is made of it here
    return torch.where(found < 0, found, found.square().sqrt()).tolist()


def _norm(gradient: Any) -> Tensor:
    if isinstance(gradient, fsdp2.Part):
        return gradient.norm
    if isinstance(gradient, CompressedGradient):
        return gradient.step_norm()
    return gradient_norm(gradient)
