"""A market on Flower gives what files give, and a bad seller spoils nothing."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("flwr.app", reason="Flower needs Python 3.11")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from federated.market import flower
from federated.market.fingerprint import Encoder
from federated.market.privacy import Ledger
from federated.market.query import answer, make_query
from federated.market.rank import rank

ENCODER = Encoder("unit", "0" * 64, "none", True, 24)


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine tells a process about itself, and messages carry."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class LocalGrid(Grid):
    """Runs every node's ClientApp here."""

    def __init__(self, apps: list[ClientApp]) -> None:
        self.apps = {100 + i: app for i, app in enumerate(apps)}

    def get_node_ids(self):
        return list(self.apps)

    def send_and_receive(self, messages, *, timeout=None):
        return [
            self.apps[m.metadata.dst_node_id](m, Context(1, m.metadata.dst_node_id, {}, RecordDict(), {}))
            for m in messages
        ]

    def set_run(self, run): ...
    def create_message(self, *arguments): ...
    def push_messages(self, messages): ...
    def pull_messages(self, message_ids): ...

    @property
    def run(self): ...


def rows(n: int, seed: int, power: float = 1.0) -> torch.Tensor:
    x = torch.randn(n, 24, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x * torch.linspace(0, 3 * power, 24).neg().exp() + 0.1, dim=1)


def seller(name: str, x: torch.Tensor, **kwargs) -> flower.Seller:
    return flower.Seller(name, ENCODER, lambda: x.split(64), **kwargs)


def app(one: flower.Seller) -> ClientApp:
    return flower.seller_app(lambda context: one)


def saying(record: dict) -> ClientApp:
    """A client that answers whatever it likes."""
    app = ClientApp()

    @app.query()
    def reply(message: Message, context: Context) -> Message:
        return Message(RecordDict({"answer": ConfigRecord(record)}), reply_to=message)

    return app


def test_answers_over_flower_are_those_of_files_and_rank_alike() -> None:
    query, key = make_query(rows(100, 0), ENCODER, directions=4, decoys=3)
    data = {"flat": rows(300, 1, 0.1), "same": rows(300, 2)}
    responses, refusals = flower.ask(LocalGrid([app(seller(n, x)) for n, x in data.items()]), query, sellers=2)
    assert refusals == {}
    for response in responses:
        assert response.to_json() == answer(query, data[response.seller].split(64), ENCODER, response.seller).to_json()
    ranked = rank(key.buyer(), {r.seller: key.seller(r) for r in responses})
    assert [r.seller for r in ranked] == ["same", "flat"]


def test_whoever_refuses_or_misbehaves_is_named_and_spoils_nothing(tmp_path) -> None:
    query = make_query(rows(100, 0), ENCODER, directions=4, decoys=3)[0]
    other = make_query(rows(100, 1), ENCODER, directions=4, decoys=3)[0]
    foreign = answer(other, [rows(300, 2)], ENCODER, "x").to_json()
    spent = Ledger(tmp_path / "ledger", epsilon=0.1, delta=1e-6)
    apps = [
        app(seller("good", rows(300, 2))),
        app(replace(seller("encoder", rows(300, 2)), encoder=replace(ENCODER, digest="1" * 64))),
        app(seller("few", rows(10, 2))),
        app(seller("spent", rows(300, 2), epsilon=1.0, ledger=spent)),
        saying({"response": "{"}),
        saying({"response": foreign}),
        saying({"refusal": "\x1b[31mno" + "x" * 1000}),
        saying({}),
    ]
    responses, refusals = flower.ask(LocalGrid(apps), query, sellers=8)
    assert [r.seller for r in responses] == ["good"]
    sentences = ["same encoder", "at least 32 rows", "would be exceeded", "no JSON", "another query", "no", "response"]
    assert list(refusals) == [100 + i for i in range(1, 8)]
    for said, sentence in zip(refusals.values(), sentences, strict=True):
        assert sentence in said
        assert said.isprintable()
        assert len(said) <= flower.MOST_TEXT


def test_who_answers_in_anothers_name_is_refused_and_so_is_the_other() -> None:
    query = make_query(rows(100, 0), ENCODER, directions=4, decoys=3)[0]
    apps = [app(seller(name, rows(300, i))) for i, name in enumerate(("a", "b", "a"))]
    responses, refusals = flower.ask(LocalGrid(apps), query, sellers=3)
    assert [r.seller for r in responses] == ["b"]
    assert refusals == dict.fromkeys((100, 102), "2 nodes answer in the name of 'a'")


def test_private_sellers_answer_with_noise() -> None:
    query = make_query(rows(100, 0), ENCODER, directions=4, decoys=3)[0]
    (response,), _ = flower.ask(LocalGrid([app(seller("a", rows(300, 2), epsilon=1.0))]), query)
    assert response.epsilon == 1.0
    assert response.moments.second_noise > 0


def test_too_few_sellers_are_a_sentence() -> None:
    query = make_query(rows(100, 0), ENCODER, directions=4, decoys=3)[0]
    with pytest.raises(RuntimeError, match="3 sellers are needed, 1 came in 0 s"):
        flower.ask(LocalGrid([app(seller("a", rows(300, 2)))]), query, sellers=3, timeout=0.1)


def test_bytes_that_are_no_query_are_refused_by_the_seller() -> None:
    class Garbled(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            for message in messages:
                message.content["query"]["file"] = b"x" * 100
            return super().send_and_receive(messages)

    query = make_query(rows(100, 0), ENCODER, directions=4, decoys=3)[0]
    responses, refusals = flower.ask(Garbled([app(seller("a", rows(300, 2)))]), query)
    assert responses == []
    assert "no safetensors file" in refusals[100]


def test_an_error_on_a_sellers_node_is_passed_on_with_its_reason() -> None:
    class Failing(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return [Message(Error(2, "KeyError: \x1b[31m'rows'"), reply_to=message) for message in messages]

    query = make_query(rows(100, 0), ENCODER, directions=4, decoys=3)[0]
    responses, refusals = flower.ask(Failing([app(seller("a", rows(300, 2)))]), query)
    assert responses == []
    assert refusals == {100: "it failed: KeyError: ?[31m'rows'"}
