"""Every optimizer of the comparison: it learns, it trains what it should, and its bytes are its closed form's."""

import sys

import pytest
import torch

from benchmarks.peers import MAKERS, head_parameters, lowrank_matrices, make, parse, state_bytes, why_not
from tests import tiny

RANK = 4
STEP = 4  # bytes of a step counter that is a tensor


def model(**changed):
    torch.manual_seed(0)
    return tiny.llama(**changed)


def train(made, steps=6):
    found = []
    for _ in range(steps):
        loss = tiny.loss_of(made.model)
        loss.backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
        found.append(loss.item())
    return found


def installed(spec):
    if reason := why_not(parse(spec)[0]):
        pytest.skip(reason)
    return spec


# torchao's is left out: it compiles for a minute
LEARNERS = {
    "adamw": 1e-2,
    "adamw_fused": 1e-2,
    "adamw_foreach": 1e-2,
    "adamw8bit": 1e-2,
    "sgd": 0.3,
    "sgd_momentum": 0.3,
    "adafactor": 1e-2,
    "came": 1e-3,
    f"galore(rank={RANK}, scale=1.0)": 3e-2,
    f"apollo(rank={RANK}, scale='auto')": 1e-2,
    "apollo_mini": 1e-3,
    "adalomo": 3e-2,
    "lion": 3e-3,
    "muon": 1e-2,
    "sm3": 3e-2,
    f"fira(rank={RANK}, scale=1.0)": 1e-2,
    "frugal(update_gap=3)": 1e-3,
    f"ldadam(rank={RANK})": 1e-2,
    "scale": 1e-3,
    "sinkgd": 1e-2,
    f"lora(rank={RANK})": 1e-1,
    f"dora(rank={RANK})": 1e-1,
    "frozen": 1e-2,
    "sgc()": 1e-2,
    "attached(min_size=0, micro_batches=2)": 1e-2,
}


@pytest.mark.parametrize("spec", LEARNERS)
def test_the_loss_falls(spec):
    losses = train(make(installed(spec), model(), LEARNERS[spec]))
    assert losses[-1] < losses[0] - 0.02


def test_every_maker_is_tried():
    assert {parse(spec)[0] for spec in LEARNERS} | {"torchao8bit"} == set(MAKERS)


def sizes(params):
    return sum(param.numel() for param in params)


def outside(network):
    """List the parameters that are no matrices inside layers."""
    inside = {id(param) for param in lowrank_matrices(network)}
    return [param for param in network.parameters() if id(param) not in inside]


def vectors(network):
    """List the parameters of one dimension."""
    return [param for param in network.parameters() if param.dim() < 2]


def lowrank_bytes(network, projector):
    """Adam's two moments of r×n and a projector for each matrix m ≤ n; the rest under dense Adam."""
    matrices = lowrank_matrices(network)
    known = {id(param) for param in matrices}
    low = sum(4 * (2 * RANK * max(param.shape) + projector(min(param.shape))) for param in matrices)
    return low + 8 * sizes(param for param in network.parameters() if id(param) not in known)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("adamw", lambda net: 8 * sizes(net.parameters()) + STEP * len(list(net.parameters()))),
        ("adamw_fused", lambda net: 8 * sizes(net.parameters()) + STEP * len(list(net.parameters()))),
        ("sgd", lambda net: 0),
        ("sgd_momentum", lambda net: 4 * sizes(net.parameters())),
        # row and column means of matrices, the square of vectors; of each tensor its root mean square
        ("adafactor", lambda net: sum(4 * (sum(p.shape) + 1) for p in net.parameters())),
        # its projector is a view of all m singular vectors, which stay alive behind it
        (f"galore(rank={RANK})", lambda net: lowrank_bytes(net, lambda m: m * m)),
        # a random projector of r×m, and the norm of the last update
        (f"apollo(rank={RANK})", lambda net: lowrank_bytes(net, lambda m: RANK * m + 1)),
        ("frozen", lambda net: 8 * sizes(net.lm_head.parameters()) + STEP),
        # rows and columns of matrices, the square of vectors
        ("adalomo", lambda net: sum(4 * sum(p.shape) for p in net.parameters())),
        ("lion", lambda net: 4 * sizes(net.parameters())),
        # momentum of the matrices inside layers, AdamW for the others
        ("muon", lambda net: 4 * sizes(lowrank_matrices(net)) + sum(8 * p.numel() + STEP for p in outside(net))),
        # two moments of a quarter of the columns, and which they are
        (
            "frugal(density=0.25)",
            lambda net: 8 * sizes(outside(net)) + sum(2 * p.numel() + 2 * p.shape[1] for p in lowrank_matrices(net)),
        ),
        # what is left out of the last step stands beside the basis
        (
            f"ldadam(rank={RANK})",
            lambda net: lowrank_bytes(net, lambda m: RANK * m) + 4 * sizes(lowrank_matrices(net)),
        ),
        ("scale", lambda net: 4 * sizes(net.lm_head.parameters()) + 8 * sizes(vectors(net))),
        ("sinkgd", lambda net: 8 * sizes(outside(net))),
    ],
)
def test_bytes_are_those_of_the_closed_form(spec, expected):
    network = model()
    made = make(installed(spec), network, 1e-3)
    train(made, 1)
    assert state_bytes(made.optimizer) == expected(network)


def test_bytes_of_adapters_are_two_moments_of_what_is_trained():
    made = make(installed(f"dora(rank={RANK})"), model(), 1e-3)
    train(made, 1)
    trained = [param for param in made.model.parameters() if param.requires_grad]
    assert 0 < sizes(trained) < sizes(made.model.parameters()) / 4
    assert state_bytes(made.optimizer) == 8 * sizes(trained) + STEP * len(trained)


def test_8_bit_state_counts_codes_scales_and_each_map_once():
    made = make(installed("adamw8bit"), [torch.nn.Parameter(torch.randn(64, 256)) for _ in range(2)], 1e-3)
    for param in made.optimizer.param_groups[0]["params"]:
        param.grad = torch.randn_like(param)
    made.optimizer.step()
    codes, scales, maps = 2 * 2 * 64 * 256, 2 * 2 * (64 * 256 // 256) * 4, 2 * 256 * 4
    assert state_bytes(made.optimizer) == codes + scales + maps


def test_the_inside_of_a_quantized_tensor_is_counted_not_its_appearance():
    installed("torchao8bit")
    from torchao.optim.subclass_8bit import OptimState8bit

    param = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = torch.optim.SGD([param], lr=1.0)
    optimizer.state[param]["exp_avg"] = OptimState8bit.zeros(param.shape, signed=True, block_size=256)
    assert (
        state_bytes(optimizer) == 64 * 256 + 64 * 4 + 256 * 4
    )  # codes, scales, the map; in fp32 it looks four times as large


def test_two_views_of_one_memory_are_counted_once():
    param = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([param], lr=1.0)
    both = torch.zeros(2, 8)
    optimizer.state[param] |= {"exp_avg": both[0], "exp_avg_sq": both[1]}
    assert state_bytes(optimizer) == both.nbytes


def test_low_rank_is_for_attention_and_mlp_alone():
    network = model()
    found = {id(param) for param in lowrank_matrices(network)}
    names = {name for name, param in network.named_parameters() if id(param) in found}
    assert all(".layers." in name and name.endswith("proj.weight") for name in names)
    assert len(names) == 2 * 7  # q, k, v, o, gate, up, down
    made = make(installed(f"galore(rank={RANK})"), network, 1e-3)
    low = [group for group in made.optimizer.param_groups if "rank" in group]
    assert {id(param) for group in low for param in group["params"]} == found


def test_apollo_scales_by_the_smaller_side_over_the_rank():
    made = make(installed(f"apollo(rank={RANK}, scale='auto')"), model(hidden=32), 1e-3)
    low = [group for group in made.optimizer.param_groups if "rank" in group]
    assert [group["scale"] for group in low] == [32 / RANK]


def test_a_frozen_body_stays_as_it_is():
    network = model()
    before = tiny.bits(network)
    made = make("frozen", network, 1e-2)
    train(made, 2)
    assert tiny.differing(before, tiny.bits(network)) == ["lm_head.weight"]
    assert head_parameters(network) == [network.lm_head.weight]


def test_the_same_arithmetic_as_torch_for_every_form_of_adamw():
    losses = [train(make(name, model(), 1e-2)) for name in ("adamw", "adamw_fused", "adamw_foreach")]
    torch.testing.assert_close(torch.tensor(losses[1:]), torch.tensor([losses[0]] * 2), rtol=1e-4, atol=1e-5)


def test_keywords_and_micro_batches_are_taken_from_the_spec():
    made = make("attached(min_size=0, sketch_size=8, micro_batches=4)", model(), 1e-3)
    assert made.micro_batches == 4
    assert made.optimizer.param_groups[0]["sketch_size"] == 8
    assert parse("adamw(betas=(0.0, 0.999))") == ("adamw", {"betas": (0.0, 0.999)})


@pytest.mark.parametrize("spec", ["sgc(8)", "sgc(k=open('x'))", "a.b()", "sgc(", "1", ""])
def test_a_spec_that_is_no_name_with_literals_is_refused(spec):
    with pytest.raises(ValueError, match="name or name"):
        parse(spec)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="must be one of adamw, .* got 'adan'"):
        make("adan", model(), 1e-3)


@pytest.mark.parametrize("name", ["lora", "dora", "frozen", "attached", "adalomo", "scale"])
def test_what_changes_the_model_is_refused_for_bare_parameters(name):
    if why_not(name) is None:
        with pytest.raises(ValueError, match="bare parameters"):
            make(name, model().parameters(), 1e-3)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "came_pytorch", None)
    with pytest.raises(ValueError, match="pip install came-pytorch"):
        make("came", model(), 1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_every_peer_says_where_it_is_from(name):
    assert MAKERS[name].source
    assert MAKERS[name].package


def test_a_schedule_reaches_both_parts_of_muon():
    made = make("muon", model(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda step: 0.5**step)
    before = tiny.bits(made.model)
    train(made, 1)
    schedule.step()
    assert [group["lr"] for group in made.optimizer.param_groups] == [5e-3, 5e-3]
    assert [group["lr"] for part in made.optimizer.parts for group in part.param_groups] == [5e-3, 5e-3]
    assert set(tiny.differing(before, tiny.bits(made.model))) == set(before)


def test_adalomo_follows_the_learning_rate_and_updates_every_parameter():
    made = make(installed("adalomo"), model(), 1e-2)
    before = tiny.bits(made.model)
    train(made, 1)
    after = tiny.bits(made.model)
    assert set(tiny.differing(before, after)) == set(before)
    made.optimizer.param_groups[0]["lr"] = 0.0
    made.optimizer.zero_grad()
    train(made, 1)
    assert tiny.differing(after, tiny.bits(made.model)) == []
