"""The market over Flower: the buyer is the server, every seller a client; what travels is what the files hold.

app = seller_app(open_seller)                      # a seller's ClientApp
responses, refusals = ask(grid, query)             # in the buyer's ServerApp
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

try:
    from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
except ImportError as error:
    raise ImportError(
        "federated.market.flower needs Flower: pip install 'sgc[federated]' on Python 3.11 or newer"
    ) from error

from federated.arguments import positive
from federated.flower import wait_for_nodes
from federated.market.fingerprint import Encoder
from federated.market.messages import BuyerQuery, SellerResponse
from federated.market.privacy import Ledger, private_answer
from federated.market.query import answer
from sgc.checks import whole

MOST_TEXT = 300  # characters of a refusal that are passed on


@dataclass(frozen=True)
class Seller:
    """What a client has.

    Args:
        name: of the seller.
        encoder: how its rows are embedded.
        batches: gives its rows anew, as tensors (m, D).
        epsilon: of each answer, or None for no noise.
        delta: the same.
        clip: the largest norm of a row, where there is noise.
        ledger: adds up what all answers spend.
    """

    name: str
    encoder: Encoder
    batches: Callable[[], Iterable[Tensor]]
    epsilon: float | None = None
    delta: float = 1e-6
    clip: float = 1.0
    ledger: Ledger | None = None

    def reply(self, query: BuyerQuery) -> SellerResponse:
        """Answer a query; raises ValueError as `query.answer` and `privacy.private_answer` do."""
        query.encoder.check(self.encoder)
        if self.epsilon is None:
            return answer(query, self.batches(), self.encoder, self.name)
        return private_answer(
            query,
            self.batches(),
            self.encoder,
            self.name,
            epsilon=self.epsilon,
            delta=self.delta,
            clip=self.clip,
            ledger=self.ledger,
        )


def seller_app(open_seller: Callable[[Context], Seller]) -> ClientApp:
    """Make the ClientApp of a seller, which answers queries and refuses with a sentence what it can't answer.

    Args:
        open_seller: makes the seller from its node's context.
    """
    app = ClientApp()

    @app.query()
    def reply(message: Message, context: Context) -> Message:
        try:
            data = message.content["query"]["file"]
            if not isinstance(data, bytes):
                raise ValueError("a query must be bytes")
            record = ConfigRecord({"response": open_seller(context).reply(BuyerQuery.from_bytes(data)).to_json()})
        except (ValueError, KeyError) as error:
            record = ConfigRecord({"refusal": str(error)[:MOST_TEXT]})
        return Message(RecordDict({"answer": record}), reply_to=message)

    return app


def ask(
    grid: Grid, query: BuyerQuery, *, sellers: int = 1, timeout: float = 300.0
) -> tuple[list[SellerResponse], dict[int, str]]:
    """Send a query to every client that is there.

    Args:
        grid: of the ServerApp.
        query: the buyer's.
        sellers: to wait for.
        timeout: seconds to wait for them, and then for their answers.

    Returns:
        The answers, and by node what it said instead: a seller's refusal, its error, or what is wrong with its answer.
        Who did not answer in time is in neither. Nodes that answer in one name are all refused, since nobody knows
        whose it is.

    Raises:
        RuntimeError: fewer sellers came in time.
    """
    sellers, timeout = whole("sellers", sellers, at_least=1), positive("timeout", timeout)
    nodes = wait_for_nodes(grid, sellers, "sellers", timeout)
    content = RecordDict({"query": ConfigRecord({"file": query.to_bytes()})})
    replies = grid.send_and_receive([Message(content, node, MessageType.QUERY) for node in nodes], timeout=timeout)
    responses: dict[int, SellerResponse] = {}
    refusals: dict[int, str] = {}
    for reply in replies:
        node = reply.metadata.src_node_id
        if not reply.has_content():
            refusals[node] = f"it failed: {_plain(reply.error.reason or 'for no reason that it gives')}"
            continue
        try:
            record = reply.content["answer"]
            if "refusal" in record:
                raise ValueError(_plain(str(record["refusal"])))
            response = SellerResponse.from_json(str(record["response"]))
            if response.query != query.identifier:
                raise ValueError("it answers another query, or an altered one")
            responses[node] = response
        except (ValueError, KeyError) as error:
            refusals[node] = str(error)
    names = Counter(response.seller for response in responses.values())
    refusals |= {
        node: f"{names[response.seller]} nodes answer in the name of {response.seller!r}"
        for node, response in responses.items()
        if names[response.seller] > 1
    }
    return [response for node, response in responses.items() if node not in refusals], refusals


def _plain(text: str) -> str:
    """Make a stranger's sentence safe to print."""
    return "".join(c if c.isprintable() else "?" for c in text[:MOST_TEXT])
