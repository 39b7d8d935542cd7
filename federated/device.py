"""What devices do: τ local steps from θ̂_m on their own data, all devices of a block in one batched call.

`updates_in_a_loop` is the plain form, one device after the other with torch's own autograd and optimizer: the oracle of
the others, and what a device on a machine of its own runs. `updates_in_threads` runs that loop on every core.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from federated.arguments import instance
from federated.draws import Draws
from sgc.checks import flag, shown, whole

IGNORED = -100  # the label that Hugging Face losses leave out of the mean
Batch = dict[str, Tensor]
OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
# Optimizers that treat every entry alike, whatever tensor it lies in: one instance serves all devices of a block.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Flat:
    """How the trained parameters of a model lie in θ (d,): one after the other, tied ones once.

    Args:
        names: of the parameters.
        shapes: theirs.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Flat:
        """Lay out the parameters that require a gradient.

        Raises:
            ValueError: there are none, one that is not fp32 on the CPU, or normalization that keeps statistics of its
                batches.
        """
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                raise ValueError(f"normalization must not keep statistics of its batches on devices, {name} does")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("the model has no parameter that requires a gradient")
        for name, p in trained.items():
            if p.dtype != torch.float32 or p.device.type != "cpu":
                raise ValueError(f"trained parameters must be fp32 on the CPU, {name} is {p.dtype} on {p.device}")
        return cls(tuple(trained), tuple(p.shape for p in trained.values()))

    @property
    def size(self) -> int:
        """d."""
        return sum(math.prod(shape) for shape in self.shapes)

    def read(self, model: nn.Module) -> Tensor:
        """Copy the model's parameters into a new θ (d,) fp32."""
        parameters = dict(model.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1).float() for name in self.names])

    def write(self, theta: Tensor, model: nn.Module) -> None:
        """Copy θ (d,) into the model."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.split(theta).items():
                parameters[name].copy_(value)

    def split(self, theta: Tensor) -> Batch:
        """View θ (…, d) as the parameters by name, each (…, *shape)."""
        views, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            stop = start + math.prod(shape)
            views[name] = theta[..., start:stop].unflatten(-1, shape) if len(shape) != 1 else theta[..., start:stop]
            start = stop
        return views


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """How every device trains: τ steps of any torch optimizer on batches of its own data.

    The optimizer is made anew in every round: devices keep no moments. Dropout, if the model has any, is off.

    Args:
        model: called as `model(**batch)`, with a `.loss` that is a mean over labels other than −100, as Hugging Face
            models do.
        steps: τ.
        batch_size: samples of a step, drawn without replacement as far as a device's data reach; None: all of them.
        optimizer: makes an optimizer of some tensors, such as `partial(torch.optim.SGD, lr=0.1)`.
        batched: all devices of a block in one `torch.func` call; False: each on its own, as many at a time as torch has
            threads; None: batched unless the model has no batched form (such as one that looks into its attention
            mask), or has convolutions, whose batched form is a grouped one and slower.

    Raises:
        ValueError: a number below 1, or a model that can't be trained so.
        TypeError: a number that is not whole.
    """

    model: nn.Module
    steps: int = 1
    batch_size: int | None = None
    optimizer: OptimizerFactory
    batched: bool | None = None
    _found: dict[str, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole("steps", self.steps, at_least=1))
        object.__setattr__(self, "batch_size", whole("batch_size", self.batch_size, at_least=1, optional=True))
        flag("batched", self.batched, optional=True)
        if not callable(self.optimizer):
            raise TypeError(f"optimizer must make an optimizer of some tensors, got {shown(self.optimizer)}")
        instance("model", self.model, nn.Module)
        _ = self.flat  # refuses what can't be trained

    @functools.cached_property
    def flat(self) -> Flat:
        """How the model's parameters lie in θ."""
        return Flat.of(self.model)

    def in_one_call(self, theta_hat: Tensor, batches: Batches) -> bool:
        """Return whether a block of devices is trained in one batched call; found out once."""
        if self.batched is not None:
            return self.batched
        if "batched" not in self._found:
            convolves = any(isinstance(module, _CONVOLUTIONS) for module in self.model.modules())
            self._found["batched"] = not convolves and has_batched_form(self, theta_hat, batches)
        return self._found["batched"]

    def batches(self, data: Mapping[str, Tensor], parts: Sequence[Tensor], devices: list[int], draws: Draws) -> Batches:
        """Draw what some devices train on in a round."""
        return draw_batches(data, [parts[device] for device in devices], self.steps, self.batch_size, devices, draws)

    def updates(self, theta_hat: Tensor, batches: Batches) -> tuple[Tensor, Tensor]:
        """Train a block of devices: Δ_m = θ_m^{(τ)} − θ̂_m.

        Args:
            theta_hat: θ̂ (B, d), left as it is.
            batches: of these devices.

        Returns:
            Δ (B, d), and each device's loss (B,), the mean over its steps before each was made.
        """
        self.model.eval()
        train = updates_in_one_call if self.in_one_call(theta_hat, batches) else updates_in_threads
        return train(self, theta_hat, batches)


@dataclass(frozen=True)
class Batches:
    """What a block of devices trains on.

    Args:
        data: columns (N, …), "labels" among them.
        index: (B, τ, b) rows.
        real: (B, τ, b) bool, or None where no row is padding.
    """

    data: Mapping[str, Tensor]
    index: Tensor
    real: Tensor | None

    def at(self, step: int, device: int | None = None) -> Batch:
        """Gather the batch of a step: columns (B, b, …), or (b, …) of one device; padding has labels of −100."""
        place = (slice(None), step) if device is None else (device, step)
        index = self.index[place]
        rows = index.reshape(-1)  # index_select copies whole rows, which indexing does not
        batch = {
            name: column.index_select(0, rows).view(*index.shape, *column.shape[1:])
            for name, column in self.data.items()
        }
        if self.real is not None:
            real = self.real[place].reshape(*index.shape, *(1,) * (batch["labels"].dim() - index.dim()))
            batch["labels"] = batch["labels"].masked_fill(~real, IGNORED)
        return batch


def draw_batches(
    data: Mapping[str, Tensor],
    parts: Sequence[Tensor],
    steps: int,
    batch_size: int | None,
    devices: Sequence[int],
    draws: Draws,
) -> Batches:
    """Draw τ batches for each of some devices, going through its data in a random order, again and again.

    Args:
        data: columns (N, …).
        parts: each device's rows, not empty.
        steps: τ.
        batch_size: b, or None for all rows of a device in every step.
        devices: their numbers, which with `draws` decide the order.
        draws: of this round.

    Raises:
        ValueError: labels that can't be ignored, of a device with fewer rows than a batch.
    """
    width = max(len(part) for part in parts) if batch_size is None else batch_size
    index = torch.empty(len(parts), steps, width, dtype=torch.int64)
    sizes = torch.tensor([min(width, len(part)) for part in parts])
    for row, (part, device, own) in enumerate(zip(parts, devices, sizes.tolist(), strict=True)):
        if batch_size is None:
            order = part.expand(steps, -1)
        else:
            generator = draws.generator("batches", device)
            passes = math.ceil(steps * own / len(part))
            shuffled = [torch.randperm(len(part), generator=generator) for _ in range(passes)]
            first = shuffled[0] if passes == 1 else torch.cat(shuffled)
            order = part.index_select(0, first[: steps * own]).view(steps, own)
        index[row, :, :own] = order
        if own < width:
            index[row, :, own:] = part[0]
    if int(sizes.min()) == width:
        return Batches(data, index, None)
    if data["labels"].is_floating_point():
        raise ValueError(f"with labels of numbers every device needs a batch's {width} rows, one has {sizes.min()}")
    real = (torch.arange(width) < sizes[:, None, None]).expand(-1, steps, -1)
    return Batches(data, index, real)


def has_batched_form(training: LocalTraining, theta_hat: Tensor, batches: Batches) -> bool:
    """Try a forward pass of one device in its batched form."""
    real = None if batches.real is None else batches.real[:1]
    try:
        with torch.no_grad():
            batch = Batches(batches.data, batches.index[:1], real).at(0)
            vmap(_loss(training.model))(training.flat.split(theta_hat[:1]), batch)
    except RuntimeError as error:
        if "vmap" in str(error) or "atching rule" in str(error):  # torch has no error of its own for it
            return False
        raise
    return True


def _loss(model: nn.Module) -> Callable[[Batch, Batch], Tensor]:
    """Return a model's loss as a function of its parameters and a batch."""

    def loss(parameters: Batch, batch: Batch) -> Tensor:
        output: Any = functional_call(model, parameters, args=(), kwargs=batch)
        return output.loss

    return loss


def updates_in_one_call(training: LocalTraining, theta_hat: Tensor, batches: Batches) -> tuple[Tensor, Tensor]:
    """Train a block of devices side by side; see `LocalTraining.updates`."""
    model, flat = training.model, training.flat
    gradients_of = vmap(grad_and_value(_loss(model)))
    theta = theta_hat.clone(memory_format=torch.contiguous_format)
    parameters = flat.split(theta)
    optimizers = _optimizers(training.optimizer, parameters)
    losses = torch.zeros(len(theta))
    for step in range(training.steps):
        gradients, values = gradients_of(parameters, batches.at(step))
        losses += values / training.steps
        for optimizer, tensors in optimizers:
            for name, tensor, row in tensors:
                tensor.grad = gradients[name] if row is None else gradients[name][row]
            optimizer.step()
    return theta.sub_(theta_hat), losses


Slots = list[tuple[str, Tensor, int | None]]


def _optimizers(make: OptimizerFactory, parameters: Batch) -> list[tuple[torch.optim.Optimizer, Slots]]:
    """Make one optimizer for all devices if it treats entries alike, else one for each; each with what it moves."""
    stacked: Slots = [(name, value, None) for name, value in parameters.items()]
    optimizer = make([tensor for _, tensor, _ in stacked])
    if type(optimizer) in ELEMENTWISE:
        return [(optimizer, stacked)]
    optimizers = []
    for row in range(len(next(iter(parameters.values())))):
        slots: Slots = [(name, value[row], row) for name, value in parameters.items()]
        optimizers.append((make([tensor for _, tensor, _ in slots]), slots))
    return optimizers


def updates_in_a_loop(training: LocalTraining, theta_hat: Tensor, batches: Batches) -> tuple[Tensor, Tensor]:
    """Train a block of devices one after the other; see `LocalTraining.updates`."""
    model, flat = training.model, training.flat
    named = dict(model.named_parameters())
    trained = [named[name] for name in flat.names]
    update, losses = torch.empty_like(theta_hat, memory_format=torch.contiguous_format), torch.zeros(len(theta_hat))
    for device, start in enumerate(theta_hat):
        flat.write(start, model)
        optimizer = training.optimizer(trained)
        for step in range(training.steps):
            loss = model(**batches.at(step, device)).loss
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                parameter.grad = gradient
            optimizer.step()
            losses[device] += loss.detach() / training.steps
        torch.sub(flat.read(model), start, out=update[device])
    for parameter in trained:
        parameter.grad = None
    return update, losses


def updates_in_threads(training: LocalTraining, theta_hat: Tensor, batches: Batches) -> tuple[Tensor, Tensor]:
    """Train a block of devices in a loop on every core, with a copy of the model on each; see `LocalTraining.updates`.

    A device's arithmetic is always that of one thread, so the numbers are the same on any number of them.
    """
    threads = torch.get_num_threads()

    def train(block: Tensor) -> tuple[Tensor, Tensor]:
        first, last = int(block[0]), int(block[-1]) + 1
        real = None if batches.real is None else batches.real[first:last]
        own = replace(training, model=copy.deepcopy(training.model))
        return updates_in_a_loop(own, theta_hat[first:last], Batches(batches.data, batches.index[first:last], real))

    blocks = torch.arange(len(theta_hat)).tensor_split(min(threads, len(theta_hat)))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            updates, losses = zip(*pool.map(train, blocks), strict=True)
    finally:
        torch.set_num_threads(threads)  # what a thread sets is the process's
    return torch.cat(updates), torch.cat(losses)


def saved_bytes(training: LocalTraining, batches: Batches) -> int:
    """Count the bytes that one device's forward pass keeps for its backward pass."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    training.model.eval()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        training.model(**batches.at(0, 0))
    return kept
