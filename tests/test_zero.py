"""Pieces of a tensor, as DeepSpeed's partitions hold them, make the update of the whole tensor."""

import itertools
import warnings

import pytest
import torch

from sgc import SGC
from sgc.loop import moves, rates_now
from sgc.moments import RULES
from sgc.parallel.home import side_by_side
from sgc.parallel.pieces import Piece, piece_schema
from sgc.parallel.zero import PieceView
from sgc.state import new_state
from sgc.step import update
from tests.tolerances import SUM

SHAPE, CUTS = (12, 77), (0, 301, 650, 12 * 77)  # inside chunks
# every entry of a chunk is encoded: else each side of a cut encodes the top entries of its own part
SKETCHED = {"chunk_size": 11, "sketch_size": 8, "sparsity": 11, "recovered": 3, "min_size": 16}
KINDS = {rule: {**SKETCHED, "moments": rule} for rule in RULES} | {"no memory": {"min_size": 16}}


def in_pieces(optimizer, flat, gradient, states):
    """Make one step of the pieces, as ranks would: what they yield is summed here."""
    (group,) = optimizer.param_groups
    group["steps"] += 1
    views = []
    for piece, state in states.items():
        own, lent = slice(piece.start, piece.stop), optimizer._loop._lend(0, group["params"][0], group)
        views.append(PieceView(piece, flat[own], gradient.view(-1)[own], state, group, lent))
        views[-1].look()
    total = sum(view.sums for view in views)
    for view in views:
        view.sums = total.clone()
        assert moves(view, float(view.norm()))

    def rounds(number, asked):
        if not asked:
            return None

        def add(asked):
            if len(next(iter(asked.values()))[0]) == 2:  # sums over entries, and their number
                return [[sum(own for [own] in asked.values())] for _ in asked]
            layout = views[0].layout
            found = []
            for kind in zip(*asked.values(), strict=True):
                whole = torch.zeros(layout.chunks, kind[0].shape[1])
                for view, own in zip(asked, kind, strict=True):
                    whole[view.window.chunks] += own
                found.append(whole)
            return [[whole[view.window.chunks] for whole in found] for view in asked]

        return add

    side_by_side({view: update(view, rates_now(view)) for view in views}, rounds)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_update_of_the_whole_tensor(kind):
    weight = torch.nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sketch_size=8 is small")
        optimizer = SGC([weight], lr=1e-2, **KINDS[kind])
    (group,) = optimizer.param_groups
    flat = weight.detach().clone().view(-1)
    pieces = [Piece(0, SHAPE, start, stop, 0) for start, stop in itertools.pairwise(CUTS)]
    states = {piece: new_state(piece_schema(piece, group), torch.device("cpu")) for piece in pieces}
    generator, before = torch.Generator().manual_seed(1), flat.clone()
    for _ in range(3):
        gradient = torch.randn(SHAPE, generator=generator) * torch.randn(SHAPE, generator=generator).exp()
        in_pieces(optimizer, flat, gradient, states)
        group["steps"] -= 1  # the step that follows is the same
        weight.grad = gradient
        optimizer.step()
    moved = (weight.detach().view(-1) - before).abs().max()
    assert moved > 0
    apart = (flat - weight.detach().view(-1)).abs() > 8 * SUM * moved
    assert apart.float().mean() <= 0.01, "but for recoveries that are all but ties"
