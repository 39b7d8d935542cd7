"""What `load_state_dict` does with damaged checkpoints, with hooks, and with what others keep beside ours."""

import copy
import math

import numpy as np
import pytest
import torch

from sgc import SGC
from sgc.arguments import FACTOR
from tests.test_arguments import NONSENSE, is_plain
from tests.test_optimizer import make_params, run, same, snapshot, through_a_file

RULES = {
    "no sketch": {},
    "residual": {"sketch_size": 16},
    "sketched": {"sketch_size": 16, "moments": "sketched"},
    "int8": {"sketch_size": 16, "moments": "subspace", "state_dtype": "int8"},
    "rank": {"sketch_size": 16, "rank": 2},
}
VALUES = [*NONSENSE, None]
SHAPES = [(40, 48), (33,)]


def make(rule, seed=0, shapes=SHAPES):
    if RULES[rule].get("state_dtype") == "int8":
        pytest.importorskip("bitsandbytes")
    return SGC(make_params(shapes, seed=seed), **{"lr": 1e-2, "min_size": 64, "chunk_size": 32, **RULES[rule]})


def damaged_tensors(tensor):
    """Return what may stand in the place of a state tensor after an accident, by what it is."""
    others = {
        "int64": tensor.long(),
        "bool": tensor.bool(),
        "complex": tensor.to(torch.complex64),
        "fp64": tensor.double(),
        "bf16": tensor.to(torch.bfloat16 if tensor.dtype is not torch.bfloat16 else torch.float32),
        "on the meta device": tensor.to("meta"),
        "sparse": tensor.to_sparse() if tensor.dim() else tensor.reshape(1),
        "longer": torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]]),
        "of another shape": tensor[None],
        "a word": "abc",
        "None": None,
        "a list": [1.0],
    }
    return {what: other for what, other in others.items() if other is not tensor}


def accidents(saved, groups_too):
    """Yield every way to damage a checkpoint, as (what, function that damages one)."""
    for at, group in enumerate(saved["param_groups"] if groups_too else []):
        for name in group.keys() - {"params"}:
            for number, value in enumerate(VALUES):
                yield (name, number), lambda s, n=name, v=value, at=at: s["param_groups"][at].update({n: v})
        yield "params is a number", lambda s, at=at: s["param_groups"][at].update(params=3)
        yield "no params", lambda s, at=at: s["param_groups"][at].pop("params")
        yield "one parameter too few", lambda s, at=at: s["param_groups"][at]["params"].pop()
    for number, held in saved["state"].items():
        for name, tensor in held.items():
            for what, other in damaged_tensors(tensor).items():
                yield f"{name} {what}", lambda s, k=number, n=name, o=other: s["state"][k].update({n: o})
            yield f"no {name}", lambda s, k=number, n=name: s["state"][k].pop(n)
        for other in (3, "abc", None, [1]):
            yield f"state {number} is {other!r}", lambda s, k=number, o=other: s["state"].update({k: o})
        for count in (math.nan, math.inf, -1.0):
            yield f"step {count}", lambda s, k=number, c=count: s["state"][k]["step"].fill_(c)
    yield "the state of a parameter more", lambda s: s["state"].update({7: {}})
    for name in ("state", "param_groups"):
        yield f"no {name}", lambda s, n=name: s.pop(n)
        for other in (None, 3, "abc", [3], {3: 4}):
            yield f"{name} is {other!r}", lambda s, n=name, o=other: s.update({n: o})


@pytest.mark.parametrize("rule", RULES)
def test_a_damaged_checkpoint_is_refused_in_a_sentence_and_nothing_is_overwritten(rule):
    source, target = make(rule), make(rule, seed=3)
    run(source, 2)
    run(target, 1)
    saved, before, taken = through_a_file(source.state_dict()), snapshot(target), []
    for what, damage in accidents(saved, groups_too=rule == "residual"):
        checkpoint = copy.deepcopy(saved)
        damage(checkpoint)
        try:
            target.load_state_dict(checkpoint)
        except (ValueError, TypeError) as error:
            sentence = str(error)
        else:
            taken.append(what)
            assert all(
                is_plain(value) for group in target.param_groups for name, value in group.items() if name in HELD
            )
            target = make(rule, seed=3)
            run(target, 1)
            continue
        assert "\n" not in sentence, what
        assert same(snapshot(target), before), what
    for name, number in taken:  # these mean something, so that the constructor takes them, too
        if name == FACTOR:  # which it does not have
            continue
        assert name in HELD
        value = VALUES[number]
        changed = {**{key: item for key, item in saved["param_groups"][0].items() if key in HELD}, name: value}
        SGC(make_params(SHAPES), **changed)


HELD = set(SGC(make_params([(3,)])).param_groups[0]) - {"params", "steps", FACTOR}


@pytest.mark.parametrize("checkpoint", [None, 3, "abc", [], [{}], {}, torch.zeros(3)], ids=repr)
def test_what_is_no_checkpoint_is_refused_in_a_sentence(checkpoint):
    with pytest.raises((TypeError, ValueError), match="checkpoint"):
        make("residual").load_state_dict(checkpoint)


def test_a_checkpoint_of_a_version_with_fewer_arguments_is_completed():
    source, target = make("residual"), make("residual", seed=3)
    run(source, 2)
    saved = through_a_file(source.state_dict())
    for name in ("foreach", "fused", "amsgrad", "capturable", "differentiable"):
        del saved["param_groups"][0][name]
    target.load_state_dict(saved)
    assert same(target.state_dict(), source.state_dict())


def reordered(optimizer, saved):
    """Map a checkpoint to this optimizer's order of parameters, by their names, as torch's documentation does."""
    (old,), (new,) = saved["param_groups"], optimizer.param_groups
    at = {name: number for number, name in enumerate(old["param_names"])}
    state = {number: saved["state"][at[name]] for number, name in enumerate(new["param_names"])}
    return {"state": state, "param_groups": [{**old, "param_names": list(new["param_names"])}]}


@pytest.mark.parametrize("rule", RULES)
def test_load_hooks_are_heeded_in_their_order(rule):
    source = make(rule)
    names = ["first", "last"]
    for optimizer in (source,):
        optimizer.param_groups[0]["param_names"] = names
    run(source, 2)
    target = make(rule, shapes=SHAPES[::-1])
    target.param_groups[0]["param_names"] = names[::-1]
    seen = []
    target.register_load_state_dict_pre_hook(reordered)
    target.register_load_state_dict_post_hook(lambda optimizer: seen.append(copy.deepcopy(optimizer.state_dict())))
    target.load_state_dict(through_a_file(source.state_dict()))
    held = target.state_dict()["state"]
    assert same([held[1], held[0]], [source.state_dict()["state"][number] for number in (0, 1)])
    assert same(seen, [target.state_dict()])  # a post-hook sees what is loaded, in the dtypes of the checkpoint
    assert len(target._optimizer_load_state_dict_pre_hooks) == 1
    assert len(target._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("when", ["before the first step", "later"])
@pytest.mark.parametrize("rule", RULES)
def test_what_others_keep_in_the_state_is_kept_and_changes_nothing(rule, when):
    alone, beside = make(rule), make(rule)
    if when == "later":
        run(alone, 1)
        run(beside, 1)
    for param in beside.param_groups[0]["params"]:
        beside.state[param]["slow_buffer"] = param.detach().clone()
        beside.state[param]["count"] = 3
    beside.state["theirs"] = 3
    run(alone, 2, first=2)
    run(beside, 2, first=2)
    target = make(rule, seed=3)
    with torch.no_grad():
        for mine, theirs in zip(target.param_groups[0]["params"], beside.param_groups[0]["params"], strict=True):
            mine.copy_(theirs)
    target.load_state_dict(through_a_file(beside.state_dict()))
    assert same(target.state_dict(), beside.state_dict())
    assert target.stats()["state_bytes"] > 0
    for optimizer in (alone, beside, target):
        run(optimizer, 2, first=4)
    weights = [optimizer.param_groups[0]["params"] for optimizer in (alone, beside, target)]
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])


def test_a_rate_that_a_scheduler_made_of_numpy_s_numbers_is_saved_as_a_plain_one():
    optimizer = make("residual")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float32(0.5) ** step)
    run(optimizer, 1)
    scheduler.step()
    assert type(optimizer.param_groups[0]["lr"]) is not float
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["lr"] == pytest.approx(0.005)
