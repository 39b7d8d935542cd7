"""Every optimizer that the benchmarks compare, made from a spec such as "galore(rank=8)", and the bytes that it holds.

    python benchmarks/peers.py            # which are installed, and if not, why not; and where each is from

The real packages are used, with the defaults of their papers; `benchmarks/papers.py` has what no package has. GaLore,
Fira, APOLLO, Muon, FRUGAL, LDAdam and SinkGD change the matrices of a model's repeated layers (attention and MLP), as
their authors do, and keep the rest under dense Adam. Weight decay is 0 unless asked for.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import papers
from recipes.report import tensors_in


class Made(NamedTuple):
    """An optimizer, and the model to train with it: LoRA wraps it, a frozen body has its gradients switched off."""

    optimizer: torch.optim.Optimizer
    model: nn.Module | None  # None where bare parameters were given
    micro_batches: int  # that make a batch, from the spec; 1 unless it says otherwise


class Given(NamedTuple):
    """What an optimizer is made for."""

    model: nn.Module | None
    params: list[nn.Parameter]
    lr: float
    weight_decay: float

    def whole_model(self, name: str) -> nn.Module:
        """Return the model; raise for bare parameters."""
        if self.model is None:
            raise ValueError(f"{name} changes the model, so it needs one, got bare parameters")
        return self.model


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Parse a spec such as "sgc(sketch_size=8)": ("sgc", {"sketch_size": 8}).

    Raises:
        ValueError: it is neither a name nor a name with keyword arguments that are literals.
    """
    try:
        call = ast.parse(spec, mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return call.func.id, {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"an optimizer must be a name or name(keyword=literal, …), got {spec!r}")


# ---- one function per package: Given and keywords in, Made out -------------------------------------------------------

Maker = Callable[..., "torch.optim.Optimizer | tuple[torch.optim.Optimizer, nn.Module]"]


def _adamw(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(given.params, lr=given.lr, weight_decay=given.weight_decay, **kwargs)


def _sgd(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(given.params, lr=given.lr, weight_decay=given.weight_decay, **kwargs)


def _sgc(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    from sgc import SGC

    return SGC(given.params, lr=given.lr, weight_decay=given.weight_decay, **kwargs)


def _attached(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    from sgc import SGC

    sampling = {"sample_every": kwargs.pop("sample_every")} if "sample_every" in kwargs else {}
    optimizer = SGC(given.params, lr=given.lr, weight_decay=given.weight_decay, **kwargs)
    return optimizer.attach(given.whole_model("attached"), **sampling)


def _adamw8bit(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(given.params, lr=given.lr, weight_decay=given.weight_decay, **kwargs)


def _torchao8bit(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    """Make torchao's, which compiles one kernel per shape of parameter: a minute and more on a CPU's first step."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(given.params, lr=given.lr, weight_decay=given.weight_decay, **kwargs)


def _adafactor(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    from transformers import Adafactor

    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}  # lr is the caller's
    return Adafactor(given.params, lr=given.lr, weight_decay=given.weight_decay, **{**fixed, **kwargs})


def _came(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    from came_pytorch import CAME

    return CAME(given.params, lr=given.lr, weight_decay=given.weight_decay, **kwargs)


def _galore(
    given: Given, rank: int = 128, update_proj_gap: int = 200, scale: float = 0.25, proj_type: str = "std"
) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    fixed = {"update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    groups = _lowrank_groups(given, rank, lambda _: fixed)
    return GaLoreAdamW(groups, lr=given.lr, weight_decay=given.weight_decay, no_deprecation_warning=True)


def _apollo(
    given: Given,
    rank: int = 256,
    scale: float | str = 1.0,
    scale_type: str = "channel",
    update_proj_gap: int = 200,
    proj: str = "random",
    proj_type: str = "std",
) -> torch.optim.Optimizer:
    """Make APOLLO; scale="auto" is m/r for matrices of m < n rows, what its theorem on the scaling factor asks for."""
    from apollo_torch import APOLLOAdamW

    def options(smaller: int) -> dict[str, Any]:
        factor = smaller / rank if scale == "auto" else scale
        fixed = {"update_proj_gap": update_proj_gap, "proj": proj, "proj_type": proj_type}
        return {**fixed, "scale": factor, "scale_type": scale_type}

    groups = _lowrank_groups(given, rank, options)
    return APOLLOAdamW(groups, lr=given.lr, weight_decay=given.weight_decay)


def _fira(
    given: Given, rank: int = 128, update_proj_gap: int = 200, scale: float = 0.25, projection_type: str = "std"
) -> torch.optim.Optimizer:
    from pytorch_optimizer import Fira

    fixed = {"update_proj_gap": update_proj_gap, "scale": scale, "projection_type": projection_type}
    groups = _lowrank_groups(given, rank, lambda _: fixed)
    return Fira(groups, lr=given.lr, weight_decay=given.weight_decay)


def _apollo_mini(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    return _apollo(given, **{"rank": 1, "scale": 128, "scale_type": "tensor", **kwargs})


def _adalomo(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    """Make AdaLomo, which updates in backward: gradients are neither accumulated nor clipped."""
    from pytorch_optimizer import AdaLOMO

    class Stepped(AdaLOMO):  # the package wants its own fused_backward(loss, lr) in the place of backward and step
        updates_in_backward = True

        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none)
            self.lr = self.param_groups[0]["lr"]

        def step(self, closure: Any = None) -> None:
            self.grad_func(0)  # the gradient that came last
            self.num_steps += 1

        def state_bytes(self) -> int:
            held = (self.exp_avg_sq, self.exp_avg_sq_row, self.exp_avg_sq_col)
            return sum(tensor.nbytes for tensors in held for tensor in tensors.values())

    fixed = {"loss_scale": 0.0}  # for fp16 alone
    made = Stepped(given.whole_model("adalomo"), lr=given.lr, weight_decay=given.weight_decay, **{**fixed, **kwargs})
    made.num_steps = 1
    return made


def _lion(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lion

    return Lion(given.params, lr=given.lr, weight_decay=given.weight_decay, **kwargs)


def _sm3(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import SM3

    return SM3(given.params, lr=given.lr, **{"momentum": 0.9, **kwargs})


class Joint(torch.optim.Optimizer):
    """Optimizers of different parameters as one: schedules reach all of them."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([param for part in parts for group in part.param_groups for param in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        """Update all parameters."""
        for part in self.parts:
            part.step()

    def state_bytes(self) -> int:
        """Return the bytes of state of all parts."""
        return sum(map(state_bytes, self.parts))


def _muon(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    """Make Muon for matrices inside layers and AdamW for the rest, with updates of AdamW's root mean square."""
    matrices, rest = _split(given)
    fixed = {"adjust_lr_fn": "match_rms_adamw"}  # one learning rate for both
    muon = torch.optim.Muon(matrices, lr=given.lr, weight_decay=given.weight_decay, **{**fixed, **kwargs})
    return Joint(muon, *([_adamw(given._replace(params=rest))] if rest else []))


def _frugal(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    return papers.FRUGAL(_own_groups(given), given.lr, weight_decay=given.weight_decay, **kwargs)


def _ldadam(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    return papers.LDAdam(_own_groups(given), given.lr, weight_decay=given.weight_decay, **kwargs)


def _sinkgd(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    return papers.SinkGD(_own_groups(given), given.lr, weight_decay=given.weight_decay, **kwargs)


def _scale(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    model = given.whole_model("scale")
    last = {id(param) for param in head_parameters(model)}
    inside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - last
    matrices = [param for param in given.params if param.dim() > 1]
    groups = [
        {"params": [param for param in given.params if param.dim() < 2]},
        {"params": [param for param in matrices if id(param) in last], "own": True, "last": True},
        {"params": [param for param in matrices if id(param) in inside], "own": True, "dim": 0},
        {"params": [param for param in matrices if id(param) not in last | inside], "own": True},
    ]
    filled = [group for group in groups if group["params"]]
    return papers.SCALE(filled, given.lr, weight_decay=given.weight_decay, **kwargs)


def _lora(
    given: Given, rank: int = 8, alpha: int | None = None, dora: bool = False, **kwargs: Any
) -> tuple[torch.optim.Optimizer, nn.Module]:
    import peft

    model = given.whole_model("dora" if dora else "lora")
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        use_dora=dora,
    )
    wrapped = peft.get_peft_model(model, config)
    trained = [param for param in wrapped.parameters() if param.requires_grad]
    return _adamw(given._replace(params=trained), fused=True, **kwargs), wrapped


def _dora(given: Given, **kwargs: Any) -> tuple[torch.optim.Optimizer, nn.Module]:
    return _lora(given, dora=True, **kwargs)


def _frozen(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    head = head_parameters(given.whole_model("frozen"))
    for param in given.params:
        param.requires_grad_(any(param is kept for kept in head))
    return _adamw(given._replace(params=head), fused=True, **kwargs)


class Peer(NamedTuple):
    """How an optimizer is made, and where it is from."""

    maker: Maker
    package: str  # that it needs; of its settings, what is not in the spec is the package's or the paper's default
    source: str  # the paper, and whose code runs


def _fused(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    return _adamw(given, fused=True, **kwargs)


def _foreach(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    return _adamw(given, foreach=True, **kwargs)


def _sgd_momentum(given: Given, **kwargs: Any) -> torch.optim.Optimizer:
    return _sgd(given, **{"momentum": 0.9, **kwargs})


MAKERS: dict[str, Peer] = {
    "adamw": Peer(_adamw, "torch", "1711.05101; on a CPU torch chooses a for-loop; betas=(0.0, 0.999): no momentum"),
    "adamw_fused": Peer(_fused, "torch", "1711.05101, one kernel"),
    "adamw_foreach": Peer(_foreach, "torch", "1711.05101, a kernel per operation"),
    "sgd": Peer(_sgd, "torch", "torch"),
    "sgd_momentum": Peer(_sgd_momentum, "torch", "torch, momentum 0.9"),
    "adamw8bit": Peer(_adamw8bit, "bitsandbytes", "2110.02861"),
    "torchao8bit": Peer(_torchao8bit, "torchao", "2110.02861, compiled"),
    "adafactor": Peer(_adafactor, "transformers", "1804.04235, with a learning rate of the caller's"),
    "adalomo": Peer(_adalomo, "pytorch-optimizer", "2310.10195; updates in backward"),
    "lion": Peer(_lion, "pytorch-optimizer", "2302.06675, betas 0.9 and 0.99"),
    "muon": Peer(_muon, "torch", "kellerjordan.github.io/posts/muon; AdamW's root mean square as in 2502.16982"),
    "came": Peer(_came, "came-pytorch", "2307.02047, its authors' code"),
    "sm3": Peer(_sm3, "pytorch-optimizer", "1901.11150, momentum 0.9"),
    "galore": Peer(_galore, "galore-torch", "2403.03507, its authors' code; rank 128, scale 0.25, gap 200"),
    "fira": Peer(_fira, "pytorch-optimizer", "2410.01623; rank 128, scale 0.25, gap 200 as GaLore"),
    "apollo": Peer(_apollo, "apollo-torch", "2412.05270, its authors' code; rank 256, scale 1, gap 200"),
    "apollo_mini": Peer(_apollo_mini, "apollo-torch", "2412.05270, its authors' code; rank 1, scale 128"),
    "frugal": Peer(_frugal, "torch", "2411.07837, from the paper; columns, density 0.25, gap 200"),
    "ldadam": Peer(_ldadam, "torch", "2410.16103, from the paper; rank 16, rho and beta1 0.908, beta2 0.99"),
    "scale": Peer(_scale, "torch", "2506.16659, from the paper; momentum 0.9 in the last layer"),
    "sinkgd": Peer(_sinkgd, "torch", "2502.06742, from the paper; 5 iterations, 0.05 of AdamW's rate"),
    "lora": Peer(_lora, "peft", "2106.09685; rank 8, alpha 16, all linear layers"),
    "dora": Peer(_dora, "peft", "2402.09353; as LoRA"),
    "frozen": Peer(_frozen, "torch", "AdamW for the head alone"),
    "sgc": Peer(_sgc, "torch", "this repository"),
    "attached": Peer(_attached, "torch", "this repository, compressed gradients"),
}


def make(
    spec: str, model_or_params: nn.Module | Iterable[nn.Parameter], lr: float, *, weight_decay: float = 0.0
) -> Made:
    """Make the optimizer that a spec names.

    Args:
        spec: a name of MAKERS, with keyword arguments of its package if wanted: "lora(rank=8, alpha=16)".
        model_or_params: what is trained. "lora", "dora", "frozen" and "attached" need the model.
        lr: learning rate.
        weight_decay: decoupled or not, as the package does it.

    Raises:
        ValueError: the spec is unknown, its package is missing, or it needs a model and got bare parameters.
    """
    name, kwargs = parse(spec)
    if name not in MAKERS:
        raise ValueError(f"an optimizer must be one of {', '.join(MAKERS)}, got {name!r}")
    if reason := why_not(name):
        raise ValueError(f"{name} cannot be used: {reason}")
    micro_batches = kwargs.pop("micro_batches", 1)
    model = model_or_params if isinstance(model_or_params, nn.Module) else None
    params = list(model.parameters() if model is not None else model_or_params)
    given = Given(model, [param for param in params if param.requires_grad], lr, weight_decay)
    with warnings.catch_warnings():
        # bitsandbytes and torchao warn of CPUs, old names and missing kernels: nothing that changes a result.
        warnings.filterwarnings("ignore", module=r"(bitsandbytes|torchao|peft)(\..*)?")
        made = MAKERS[name].maker(given, **kwargs)
    optimizer, changed = made if isinstance(made, tuple) else (made, model)
    return Made(optimizer, changed, micro_batches)


def why_not(name: str) -> str | None:
    """Return why an optimizer of MAKERS cannot be used here, or None where it can."""
    package = MAKERS[name].package
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        return f"{error}; pip install {package}"
    return None


# ---- which parameters ------------------------------------------------------------------------------------------------


def lowrank_matrices(model: nn.Module) -> list[nn.Parameter]:
    """List the trained weights of linear layers inside repeated layers: attention and MLP, no embedding, no head."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
    with contextlib.suppress(ImportError):
        from transformers.pytorch_utils import Conv1D

        kinds = (nn.Linear, Conv1D)
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.weight.requires_grad and any(part.isdigit() for part in name.split("."))
    ]


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List what a frozen body leaves: the classifier's parameters, or a language model's output embedding."""
    head = next((part for name in ("classifier", "score") if (part := getattr(model, name, None)) is not None), None)
    if head is None and hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"frozen needs a model with a head (classifier, score, lm_head), got {type(model).__name__}")
    return list(head.parameters())


def _split(given: Given, rank: int = 0) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split off matrices inside layers (of bare parameters, all) with more than `rank` rows and columns."""
    found = lowrank_matrices(given.model) if given.model is not None else [p for p in given.params if p.dim() == 2]
    chosen = {id(param): param for param in found if min(param.shape) > rank}
    return list(chosen.values()), [param for param in given.params if id(param) not in chosen]


def _own_groups(given: Given) -> list[dict[str, Any]]:
    """Put matrices inside layers into a group for the rule of a paper, and the rest into one for AdamW."""
    matrices, dense = _split(given)
    return [group for group in ({"params": dense}, {"params": matrices, "own": True}) if group["params"]]


def _lowrank_groups(given: Given, rank: int, options: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Put matrices of more than `rank` rows and columns into low-rank groups by smaller side; the rest is dense."""
    matrices, dense = _split(given, rank)
    groups: dict[int, dict[str, Any]] = {}
    for param in matrices:
        smaller = min(param.shape)
        group = groups.setdefault(smaller, {"params": [], "rank": rank, **options(smaller)})
        group["params"].append(param)
    return [*([{"params": dense}] if dense else []), *groups.values()]


# ---- bytes -----------------------------------------------------------------------------------------------------------


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of state held: every tensor in it, in the objects it holds, and inside quantized ones, once each.

    Projectors, quantization maps and step counters that are tensors count; Python numbers do not. What counts is the
    memory behind a tensor: galore-torch 1.0 keeps r singular vectors as a view of all of them, and so holds all.
    """
    if hasattr(optimizer, "state_bytes"):
        return int(optimizer.state_bytes())
    storages = {}
    for tensor in tensors_in(dict(optimizer.state)):
        for part in _plain(tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _plain(tensor: Tensor) -> Iterable[Tensor]:
    """Yield the plain tensors that a tensor subclass is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def main() -> None:
    """Print which optimizers can be used here."""
    for name, peer in MAKERS.items():
        print(f"{name:14} {peer.package:18} {why_not(name) or 'installed':10} {peer.source}")


if __name__ == "__main__":
    main()
