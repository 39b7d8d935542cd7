"""A data market from end to end: a buyer with a hundred rows finds whose data are like its own, without seeing them.

    python recipes/data_market.py                     # all on its own: handwritten digits, a dozen sellers and a liar
    python recipes/data_market.py --epsilon 50        # the sellers add noise for differential privacy
    python recipes/data_market.py --texts FOLDER --encoder MINILM    # the buyer has SST-2, sellers eight text sets
    python recipes/data_market.py --dataset mine.jsonl --column text --encoder MODEL --sellers a=a.jsonl b=b.csv

Without arguments it takes a few seconds. Expected: the sellers of digits first, at ranks that so few rows don't tell
apart, as the intervals say; "noisy", "mirrored" and a single class behind them; "shifted", "inverted", "random" and
"pixels shuffled" last. The liar, who makes up moments, and the copycat, who sells the buyer's own rows, are marked with
an exclamation mark and not bought from.

It writes `market.json` and `market.png`, a map of relevance against diversity, into --output_dir.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import market_data
from federated.arguments import check_options
from federated.files import check_folder, opening, sentence
from federated.market import cli, honesty
from federated.market.features import Extractor, batches, make_extractor, naming
from federated.market.messages import BuyerQuery, SellerResponse
from federated.market.moments import Moments
from federated.market.privacy import private_answer
from federated.market.query import answer, make_query
from federated.market.rank import Ranked, portfolio, rank
from federated.market.rows import open_rows
from report import write_atomically

LIAR, COPYCAT = "liar", "copycat"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="the buyer's rows: a file, a folder of images, or a name on the hub")
    parser.add_argument("--sellers", nargs="+", metavar="NAME=DATASET", help="the sellers' rows")
    parser.add_argument("--column", help="of every data set, to be embedded")
    parser.add_argument("--encoder", help="a Hugging Face model, pixels or pixels:SIZE (default for digits: pixels:8)")
    parser.add_argument("--texts", type=Path, metavar="FOLDER", help="the text market on the data sets in a folder")
    parser.add_argument("--buyer", default="SST-2", help="whose rows the buyer of the text market has (%(default)s)")
    parser.add_argument("--buyer_rows", type=int, default=100, help="(default %(default)s)")
    parser.add_argument("--rows", type=int, default=500, help="of a seller of the text market (default %(default)s)")
    parser.add_argument("--directions", type=int, default=10, help="(default %(default)s)")
    parser.add_argument("--budget", type=float, default=3, help="to spend, at 1 a seller (default %(default)s)")
    parser.add_argument("--epsilon", type=float, help="of differential privacy, δ = 1e-6 (default: no noise)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the encoder")
    parser.add_argument("--cache", type=Path, help="folder where embeddings are kept")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/data_market"), help="(default %(default)s)")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    if (args.dataset is None) != (args.sellers is None):
        raise ValueError("--dataset and --sellers must be given together: the buyer's rows and the sellers'")
    if args.dataset and args.texts:
        raise ValueError("--texts is a market of its own and must go without --dataset")
    if (args.dataset or args.texts) and args.encoder is None:
        raise ValueError("--encoder must be given with data of your own: both sides must use the same")
    return args


def open_market(args: argparse.Namespace) -> tuple[Iterable[Any], dict[str, Iterable[Any]], Extractor]:
    """Open the buyer's rows, the sellers' rows by name, and what embeds them."""
    check_folder(args.output_dir, "--output_dir")
    if args.cache is not None:
        check_folder(args.cache.expanduser(), "--cache")
    encoder = make_extractor(args.encoder or "pixels:8", trust_remote_code=args.trust_remote_code)
    if args.dataset:
        sellers = {}
        for text in args.sellers:
            name, _, source = text.rpartition("=")
            sellers[name or Path(source).stem] = open_rows(source)
        if len(sellers) < len(args.sellers):
            raise ValueError("every seller must have a name of its own: --sellers NAME=DATASET …")
        return open_rows(args.dataset), sellers, encoder
    if args.texts:
        with opening("the text sets in", args.texts):
            market = market_data.text_market(args.texts, args.buyer, args.buyer_rows, args.rows, args.seed)
    else:
        market = market_data.digits_market(args.buyer_rows, args.seed)
    return market.buyer, dict(market.sellers), encoder


def lie(query: BuyerQuery, energy: float) -> SellerResponse:
    """Make up an answer as a liar would who knows what spectra look like, and has no data."""
    k = query.directions.shape[1]
    spectrum = 1 / torch.arange(1, k + 1, dtype=torch.float64)
    second = torch.diag(spectrum / spectrum.sum() * 0.8 * energy)
    moments = Moments(200, torch.zeros(k, dtype=torch.float64), second, energy, second.diagonal() * 0.1)
    return SellerResponse(query.identifier, LIAR, moments)


def draw_map(ranked: list[Ranked], path: Path) -> None:
    """Draw relevance against diversity, a name at each point, standard errors as bars."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for r in ranked:
        (x, dx), (y, dy) = r.relevance, r.diversity
        axes.errorbar(x, y, xerr=dx, yerr=dy, fmt="o", capsize=2, markersize=5, elinewidth=0.8)
        axes.annotate(r.seller, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.plot([0, 1], [1, 0], color="0.8", linewidth=1, zorder=0)
    axes.set(xlabel="relevance", ylabel="diversity", xlim=(0, 1), ylim=(0, 1), title="relevance + diversity ≤ 1")
    write_atomically(path, lambda part: figure.savefig(part, dpi=120, format=path.suffix[1:]))
    plt.close(figure)


def embed(args: argparse.Namespace, extractor: Extractor, rows: Iterable[Any], source: str) -> torch.Tensor:
    """Embed one side's rows (n, D); an error names their source."""
    options = {"columns": args.column, "cache": args.cache, "progress": sys.stderr.isatty()}
    return torch.cat(list(naming(batches(extractor, rows, **options), source)))


def write(folder: Path, result: dict[str, Any], ranked: list[Ranked]) -> None:
    """Write market.json and market.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "market.json", lambda part: part.write_text(json.dumps(result, indent=1)))
    draw_map(ranked, folder / "market.png")
    print(f"{folder / 'market.json'} and {folder / 'market.png'}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    buyer, sellers, extractor = open_market(args)
    rows = embed(args, extractor, buyer, args.dataset or "the buyer's")
    query, key = make_query(rows, extractor.encoder, directions=args.directions)
    second_query, second_key = make_query(rows, extractor.encoder, directions=args.directions)
    embedded = {name: embed(args, extractor, part, getattr(part, "source", name)) for name, part in sellers.items()}
    demo = not args.dataset and not args.texts
    if demo:
        embedded[COPYCAT] = rows

    def reply(query: BuyerQuery, name: str) -> SellerResponse:
        if name == LIAR:
            return lie(query, energy=key.moments.energy)
        if args.epsilon is None:
            return answer(query, embedded[name].split(256), extractor.encoder, name)
        return private_answer(
            query, embedded[name].split(256), extractor.encoder, name, epsilon=args.epsilon / 2**0.5, delta=1e-6
        )  # of two answers; Gaussian mechanisms add up in squares

    names = [*embedded, LIAR] if demo else list(embedded)
    start = time.perf_counter()
    responses, again = ({name: reply(q, name) for name in names} for q in (query, second_query))
    answered = time.perf_counter() - start
    findings = {
        name: [
            *honesty.audit(key, responses[name]),
            honesty.audit_pair((key, responses[name]), (second_key, again[name])),
        ]
        for name in names
    }
    moments = {name: key.seller(response) for name, response in responses.items()}
    ranked = rank(key.buyer(), moments, seed=args.seed)
    bought = portfolio(key.buyer(), honesty.honest(moments, findings), budget=args.budget)
    sent = sum(len(response.to_json()) for response in responses.values()) / len(responses)
    print(cli.table(ranked, findings))
    print(cli.describe(bought))
    print(
        f"{len(names)} sellers answered two queries in {answered:.2f} s; an answer has {sent / 1024:.1f} KiB, "
        f"a query {query.directions.numel() * 4 / 1024:.1f} KiB"
    )
    result = {"encoder": extractor.encoder.name, "buyer_rows": len(rows), **cli.record(ranked, findings, bought)}
    write(args.output_dir, result, ranked)
    return result


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        check_options(args, make_parser(), {"seed": 0})
        run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"data_market.py: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_market.py: stopped, nothing is written but what --cache keeps", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
