"""The command `sgc-market`: a buyer makes a query, sellers answer it, the buyer ranks the answers.

    sgc-market query mine.jsonl --encoder MODEL --column text --query query.safetensors --key buyer.key
    sgc-market answer query.safetensors theirs.csv --encoder MODEL --column text --name "seller A" --out a.json
    sgc-market rank --key buyer.key a.json b.json c.json

The query goes to every seller, by e-mail if need be; the key stays with the buyer; nothing but `a.json` comes back.
MODEL is a Hugging Face encoder for text or images, `pixels`, `pixels:SIZE`, or `vectors` for `.npy` files.
With two keys of the same data the honesty of sellers that answered both queries is tested better.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from federated.arguments import check_options
from federated.files import check_apart, check_file, check_folder, sentence
from federated.market import honesty
from federated.market.encoders import ArrayFeatures
from federated.market.features import Extractor, batches, make_extractor, naming
from federated.market.measures import MEASURES
from federated.market.messages import BuyerKey, BuyerQuery, SellerResponse
from federated.market.privacy import Ledger, private_answer
from federated.market.query import DECOYS, DIRECTIONS, answer, make_query
from federated.market.rank import Portfolio, Ranked, portfolio, rank
from federated.market.rows import open_rows
from federated.market.untrusted import write_whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 after a sentence on stderr."""
    args = _parser().parse_args(argv)
    try:
        check_options(args, args.parser, {"decoys": 0})
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"sgc-market: {' '.join(sentence(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sgc-market: stopped, nothing is written but what --cache keeps", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sgc-market", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="query|answer|rank")

    query = commands.add_parser("query", help="make a query of the buyer's rows, and its key", allow_abbrev=False)
    _add_data(query)
    query.add_argument(
        "--query", type=Path, default=Path("query.safetensors"), help="file to send (default %(default)s)"
    )
    query.add_argument("--key", type=Path, default=Path("buyer.key"), help="to keep (default %(default)s)")
    query.add_argument("--directions", type=int, default=DIRECTIONS, help="leading eigenvectors (default %(default)s)")
    query.add_argument("--decoys", type=int, default=DECOYS, help="directions that mean nothing (default %(default)s)")
    query.set_defaults(run=_query, parser=query)

    reply = commands.add_parser("answer", help="answer a query with a seller's rows", allow_abbrev=False)
    reply.add_argument("query", type=Path, help="the buyer's file")
    _add_data(reply)
    reply.add_argument("--name", required=True, help="of the seller")
    reply.add_argument("--out", type=Path, default=Path("response.json"), help="file to send (default %(default)s)")
    reply.add_argument("--epsilon", type=float, help="of differential privacy; without it, no noise is added")
    reply.add_argument("--delta", type=float, default=1e-6, help="of differential privacy (default %(default)s)")
    reply.add_argument("--clip", type=float, default=1.0, help="largest norm of a row (default %(default)s)")
    reply.add_argument("--ledger", type=Path, help="file that adds up what all answers spent")
    reply.add_argument("--budget", type=float, help="epsilon of all answers in the ledger (default: --epsilon)")
    reply.set_defaults(run=_answer, parser=reply)

    ranking = commands.add_parser("rank", help="rank sellers by their answers", allow_abbrev=False)
    ranking.add_argument("responses", type=Path, nargs="+", help="the sellers' files")
    ranking.add_argument("--key", type=Path, action="append", required=True, help="the buyer's file; up to two")
    ranking.add_argument("--by", choices=list(MEASURES), default="relevance", help="(default %(default)s)")
    ranking.add_argument("--confidence", type=float, default=0.95, help="of all ranks together (default %(default)s)")
    ranking.add_argument("--budget", type=float, help="choose sellers that complement each other for this much")
    ranking.add_argument("--price", action="append", default=[], metavar="NAME=NUMBER", help="of a seller (default 1)")
    ranking.add_argument("--json", type=Path, help="write the result here, too")
    ranking.set_defaults(run=_rank, parser=ranking)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a file (json, jsonl, csv, tsv, parquet, txt, npy), a folder of images, or a name")
    parser.add_argument("--encoder", required=True, help="Hugging Face name or folder, pixels, pixels:SIZE or vectors")
    parser.add_argument("--column", help="of the data, to be embedded")
    parser.add_argument("--split", default="train", help="of the data (default %(default)s)")
    parser.add_argument("--revision", help="of the encoder on the hub")
    parser.add_argument("--pooling", help="of the encoder (default: its own)")
    parser.add_argument("--cache", type=Path, help="folder where embeddings are kept")
    parser.add_argument("--device", default="cpu", help="for the encoder (default %(default)s)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the encoder")


def _open(args: argparse.Namespace) -> tuple[Extractor, Iterator[Tensor]]:
    """Open the rows and what embeds them; return the extractor and an iterator of batches of vectors."""
    if args.cache is not None:
        check_folder(args.cache.expanduser(), "--cache")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):  # the latter of a torch without CUDA
        raise ValueError(f"--device must be one that this torch finds, got {args.device!r}") from None
    rows = open_rows(args.data, args.split)
    if args.encoder == "vectors":
        shape = getattr(rows, "shape", None)
        if shape is None or len(shape) != 2:
            raise ValueError(f"vectors must come as a (rows, dimension) .npy file, got '{args.data}'")
        extractor: Extractor = ArrayFeatures(shape[1])
    else:
        options = {"revision": args.revision, "pooling": args.pooling, "device": args.device}
        extractor = make_extractor(args.encoder, trust_remote_code=args.trust_remote_code, **options)
    options = {"columns": args.column, "cache": args.cache, "progress": sys.stderr.isatty()}
    return extractor, naming(batches(extractor, rows, **options), args.data)


def _query(args: argparse.Namespace) -> None:
    check_file(args.query, "--query")
    check_file(args.key, "--key")
    check_apart({"--query": args.query, "--key": args.key, "data": args.data}, ("--query", "--key"))
    extractor, stream = _open(args)
    x = torch.cat(list(stream))
    query, key = make_query(x, extractor.encoder, directions=args.directions, decoys=args.decoys)
    key.save(args.key)
    query.save(args.query)
    print(
        f"{args.query}: {query.directions.shape[1]} directions, made of {len(x)} rows, to send\n"
        f"{args.key}: the key to the answers, to keep"
    )


def _answer(args: argparse.Namespace) -> None:
    check_file(args.out, "--out")
    files = {"--out": args.out, "query": args.query, "data": args.data, "--ledger": args.ledger}
    check_apart(files, ("--out", "--ledger"))
    query = BuyerQuery.load(args.query)
    extractor, stream = _open(args)
    query.encoder.check(extractor.encoder)  # before hours of embedding
    if args.epsilon is None:
        if args.ledger is not None or args.budget is not None:
            raise ValueError("--ledger and --budget need --epsilon")
        response = answer(query, stream, extractor.encoder, args.name)
    else:
        ledger = None
        if args.ledger is not None:
            budget = args.epsilon if args.budget is None else args.budget
            ledger = Ledger(args.ledger, epsilon=budget, delta=args.delta)
        elif args.budget is not None:
            raise ValueError("--budget needs --ledger, the file that adds up what answers spend")
        response = private_answer(
            query,
            stream,
            extractor.encoder,
            args.name,
            epsilon=args.epsilon,
            delta=args.delta,
            clip=args.clip,
            ledger=ledger,
        )
    response.save(args.out)
    spent = "" if args.epsilon is None else f", (ε, δ) = ({args.epsilon:g}, {args.delta:g})"
    print(f"{args.out}: {len(response.moments.mean)} directions over {response.moments.rows} rows{spent}, to send")


def _rank(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_file(args.json, "--json")
        read = {f"{path}": path for path in (*args.responses, *args.key)}
        check_apart({"--json": args.json, **read}, ("--json",))
    keys = {key.query: key for key in map(BuyerKey.load, args.key)}
    found: dict[str, dict[str, SellerResponse]] = {query: {} for query in keys}
    for response in map(SellerResponse.load, args.responses):
        if response.query not in found:
            raise ValueError(f"{response.seller!r} answers a query that no --key belongs to, or an altered one")
        if response.seller in found[response.query]:
            raise ValueError(f"two files answer the same query in the name of {response.seller!r}")
        found[response.query][response.seller] = response
    key, *others = keys.values()
    answers = found[key.query]
    if args.price and args.budget is None:
        raise ValueError("--price needs --budget")
    for other in others:
        for name in sorted(found[other.query].keys() - answers.keys()):
            raise ValueError(f"{name!r} must answer the query of the first --key, too")
    findings = {name: honesty.audit(key, response) for name, response in answers.items()}
    for other in others:
        for name, response in found[other.query].items():
            findings[name].extend(honesty.audit(other, response))
            findings[name].append(honesty.audit_pair((key, answers[name]), (other, response)))
    sellers = {name: key.seller(response) for name, response in answers.items()}
    ranked = rank(key.buyer(), sellers, by=args.by, confidence=args.confidence)
    bought = None
    if args.budget is not None:
        prices = {**dict.fromkeys(sellers, 1.0), **_prices(args.price, sellers)}
        bought = portfolio(key.buyer(), honesty.honest(sellers, findings), budget=args.budget, prices=prices)
    if args.json:
        write_whole(args.json, json.dumps(record(ranked, findings, bought), indent=1).encode())
    print(table(ranked, findings, args.by))
    if bought is not None:
        print(describe(bought))


def _prices(texts: list[str], sellers: dict[str, Any]) -> dict[str, float]:
    prices = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            prices[name] = float(number)
        except ValueError:
            raise ValueError(f"--price takes NAME=NUMBER, got {text!r}") from None
        if name not in sellers:
            raise ValueError(f"--price must name one of {', '.join(sellers)}, got {name!r}")
    return prices


def table(ranked: Sequence[Ranked], findings: dict[str, list[honesty.Finding]], by: str = "relevance") -> str:
    """Return a ranking as a table, a seller in each line, with what its audit found."""
    width = max(len("seller"), *(len(r.seller) for r in ranked))
    shown = [by, *(m for m in ("relevance", "diversity", "volume") if m != by)]
    lines = [f"rank        {'seller':{width}}  " + "".join(f"{m:16}" for m in shown) + "   rows"]
    for r in ranked:
        doubts = "; ".join(f.sentence for f in findings.get(r.seller, []) if f.suspicious)
        lines.append(
            f"{r.rank:>4} {f'{r.rank_low}–{r.rank_high}':<6} {r.seller:{width}}  "
            + "".join(f"{r.scores[m].value:6.3f} ± {r.scores[m].standard_error:.3f} " for m in shown)
            + f"{r.rows:>7}"
            + (f"  ! {doubts}" if doubts else "")
        )
    return "\n".join(lines)


def describe(bought: Portfolio) -> str:
    """Return what to buy as a sentence."""
    names = ", then ".join(f"{name} (+{gain:.2f})" for name, gain in zip(bought.sellers, bought.gains, strict=True))
    return (
        f"buy {names or 'nothing'}: {bought.value:.2f} nats for {bought.cost:g}; no other choice has more than "
        f"{bought.at_most:.2f}"
    )


def record(
    ranked: Sequence[Ranked], findings: dict[str, list[honesty.Finding]], bought: Portfolio | None = None
) -> dict[str, Any]:
    """Return the result as plain values, for JSON."""
    return {
        "ranking": [
            {
                **{name: x for name, x in asdict(r).items() if name != "scores"},
                **{name: x._asdict() for name, x in r.scores.items()},
                "audit": [asdict(f) for f in findings.get(r.seller, [])],
            }
            for r in ranked
        ],
        "portfolio": None if bought is None else asdict(bought),
    }


if __name__ == "__main__":
    sys.exit(main())
