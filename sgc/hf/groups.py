"""Parameters into groups: what holds for each, from a model's names."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from sgc.checks import shown, word
from sgc.optimizer import SGC

POLICIES = ("compressed", "dense", "frozen")
DENSE = 1 << 62  # a min_size that no tensor reaches
OPTIONS = [name for name in inspect.signature(SGC).parameters if name != "params"]
DENSE_OPTIONS = ("lr", "betas", "eps", "weight_decay", "stochastic_rounding", "maximize", "seed")  # all that AdamW has

Override = Mapping[str, Any] | str


def check_overrides(overrides: Mapping[str, Override], embeddings: str) -> None:
    """Check what can be checked without the model: the words, and the names of SGC's arguments.

    Raises:
        ValueError: an unknown word or argument.
        TypeError: a word or key that is none, or an override that is neither word nor dict.
    """
    word("embeddings", embeddings, POLICIES)
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a dict, by the names of modules, got {shown(overrides)}")
    for key, override in overrides.items():
        if not isinstance(key, str):
            raise TypeError(f"overrides must be a dict, by the names of modules, got the key {shown(key)}")
        if not isinstance(override, Mapping):
            word(f"overrides[{key!r}]", override, POLICIES, "a dict or one of")
        else:
            for name in override:
                if name not in OPTIONS:
                    near = difflib.get_close_matches(str(name), OPTIONS, n=1)
                    raise ValueError(
                        f"overrides[{key!r}] names no argument of SGC: {name!r}"
                        + (f"; did you mean {near[0]!r}?" if near else "")
                    )


def parameter_groups(
    model: nn.Module, *, embeddings: str = "compressed", overrides: Mapping[str, Override] | None = None
) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Sort the parameters of a model by what holds for them; the model is left as it is.

    Args:
        model: as for `create_sgc_optimizer`.
        embeddings: as for `create_sgc_optimizer`.
        overrides: as for `create_sgc_optimizer`.

    Returns:
        The groups, for SGC; and the parameters that are trained now and are to be frozen.

    Raises:
        ValueError: as `create_sgc_optimizer`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"SGC's groups are made from a model, a torch.nn.Module, got {shown(model)}")
    overrides = {} if overrides is None else overrides
    check_overrides(overrides, embeddings)
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # uses no self
    inside_embeddings = _embedding_parameters(model)
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)

    kinds: list[tuple[dict[str, Any], bool, list[tuple[str, nn.Parameter]]]] = [({}, True, []), ({}, False, [])]
    frozen = []
    for param, known_as in names.items():
        if not param.requires_grad:
            continue
        policy = embeddings if param in inside_embeddings else None
        options = _options(known_as, overrides, policy)
        if options is None:
            frozen.append(param)
            continue
        decays = known_as[0] in decaying
        for other, other_decays, members in kinds:
            if other == options and other_decays == decays:
                members.append((known_as[0], param))
                break
        else:
            kinds.append((options, decays, [(known_as[0], param)]))
    _check_matches(model, names, overrides, decaying, {param for *_, members in kinds for _, param in members})
    groups = [
        {**options, **({} if decays else {"weight_decay": 0.0}), "params": members}
        for options, decays, members in kinds
        if members
    ]
    if not groups:
        raise ValueError("the model has no parameter to train: none requires a gradient")
    return groups, frozen


def _embedding_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of all embeddings and of the head that predicts tokens, as far as the model names one."""
    modules: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # not every model has, or names, both
            modules.append(getattr(model, getter)())
    return {param for module in modules if isinstance(module, nn.Module) for param in module.parameters()}


def _matched(key: str, name: str) -> int:
    """Count the parts of a parameter's name up to the end of the deepest match of `key`; 0: it matches nowhere."""
    wanted, parts = key.split("."), name.split(".")
    for end in range(len(parts), len(wanted) - 1, -1):
        if all(map(fnmatchcase, parts[end - len(wanted) : end], wanted)):
            return end
    return 0


def _options(names: list[str], overrides: Mapping[str, Override], policy: str | None) -> dict[str, Any] | None:
    """Lay the overrides that match a parameter over each other, the longest match last; None: it is frozen."""
    by_name: list[tuple[str, dict[str, Any] | None]] = []
    for name in names:
        found = [(_matched(key, name), len(key), override) for key, override in overrides.items()]
        explicit = [(depth, 1, length, override) for depth, length, override in found if depth]
        if explicit:
            implied: list[tuple[int, int, int, Override]] = (
                [] if policy is None else [(len(name.split(".")) - 1, 0, 0, policy)]
            )
            layers = sorted(explicit + implied, key=lambda layer: layer[:3])
            by_name.append((name, _laid([override for *_, override in layers])))
    if not by_name:
        return _laid([] if policy is None else [policy])
    for name, options in by_name:
        if options != by_name[0][1]:
            raise ValueError(
                f"{by_name[0][0]} and {name} are one tied tensor: the overrides must agree on it, got "
                f"{by_name[0][1] or 'frozen'} and {options or 'frozen'}"
            )
    return by_name[0][1]


def _laid(layers: Iterable[Override]) -> dict[str, Any] | None:
    """Lay overrides over each other; whoever names a size or rule of the compression does not want a dense tensor."""
    options: dict[str, Any] = {}
    frozen = False
    for layer in layers:
        given = {} if isinstance(layer, str) else layer
        frozen = layer == "frozen" or (frozen and not isinstance(layer, str))
        if layer == "compressed" or any(name not in DENSE_OPTIONS for name in given):
            options = {name: value for name, value in options.items() if (name, value) != ("min_size", DENSE)}
        options |= {"min_size": DENSE} if layer == "dense" else given
    return None if frozen else options


def _check_matches(
    model: nn.Module,
    names: Mapping[nn.Parameter, list[str]],
    overrides: Mapping[str, Override],
    decaying: set[str],
    trained: set[nn.Parameter],
) -> None:
    """Refuse an override that would change nothing."""
    for key, override in overrides.items():
        matched = [param for param, known_as in names.items() if any(_matched(key, name) for name in known_as)]
        if not matched:
            known = [name for name, _ in model.named_modules() if name] + [n for both in names.values() for n in both]
            tails = {name.rpartition(".")[2]: name for name in reversed(known)}
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
            near += [tails[tail] for tail in difflib.get_close_matches(key, tails, n=3) if tails[tail] not in near]
            raise ValueError(
                f"overrides[{key!r}] matches no module of the model"
                + (f"; the nearest are {', '.join(near[:3])}" if near else "")
            )
        if override != "frozen" and trained.isdisjoint(matched):
            raise ValueError(f"overrides[{key!r}] must name parameters that are trained, all {len(matched)} are frozen")
        decay = 0 if isinstance(override, str) else override.get("weight_decay", 0)
        if decay and not any(names[param][0] in decaying for param in matched):
            raise ValueError(
                f"overrides[{key!r}] sets weight_decay={decay}, but all that it names are biases and norms, which do "
                "not decay"
            )
