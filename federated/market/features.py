"""Rows → vectors: by a Hugging Face encoder, as pixels, as they are, or as sketches of per-example gradients.

An extractor has a fingerprint (`encoder`), which goes into the query and is compared, and `embed(rows)`. `batches`
feeds it any data set, streaming, with a cache on disk whose names are digests of encoder and content: rows that were
embedded by this encoder are not embedded again, whatever the data set is called.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from federated.files import opening, sentence
from federated.market.query import Encoder
from sgc.checks import flag, whole
from sgc.codec import Codec

MAX_SIZE = 256  # of an image's side: its pixels must be a dimension that a query can have
SHARD_ROWS = 256  # rows read, embedded and cached together
TEXT_POOLING, VISION_POOLING = ("mean", "cls", "last"), ("cls", "spatial", "features")


class Extractor(Protocol):
    """What makes vectors of rows."""

    @property
    def encoder(self) -> Encoder:
        """The fingerprint, which both sides must share."""

    @property
    def whole_rows(self) -> bool:
        """Whether it reads all columns of a row, and not one."""

    def embed(self, rows: Sequence[Any]) -> Tensor:
        """Embed rows: (m, D) fp32."""


def batches(
    extractor: Extractor,
    dataset: Iterable[Any],
    *,
    columns: str | Sequence[str] | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Embed a data set, 256 rows at a time.

    Args:
        extractor: makes the vectors.
        dataset: a `datasets.Dataset` or `IterableDataset`, or any iterable of rows.
        columns: of rows that are dicts, the one to embed, or for gradients those that the model is to be given; None
            takes the only column but "label", or all of them for gradients.
        cache: a folder, or None for none.
        progress: show a bar on the terminal.

    Yields:
        (m, D) fp32.

    Raises:
        ValueError: rows without such a column, or of another kind than the extractor reads.
    """
    from tqdm import tqdm

    folder = None if cache is None else Path(cache).expanduser() / extractor.encoder.identifier[:32]
    held = dataset.rows if isinstance(dataset, Named) else dataset
    total = len(held) if isinstance(held, Sized) else None
    with tqdm(total=total, unit=" rows", desc=extractor.encoder.name, disable=None if progress else True) as bar:
        rows = iter(dataset)
        while shard := [_pick(row, columns, extractor.whole_rows) for row in islice(rows, SHARD_ROWS)]:
            yield _cached(extractor, shard, folder)
            bar.update(len(shard))


def naming(stream: Iterable[Tensor], source: str) -> Iterator[Tensor]:
    """Name the data in what is wrong with their vectors, and refuse data without a row.

    Args:
        stream: of `batches`.
        source: as the user gave it.

    Raises:
        ValueError: as `batches`, or there is no row.
    """
    rows = 0
    try:
        for x in stream:
            rows += len(x)
            yield x
        if not rows:
            raise ValueError("the data must have rows, got none")
    except ValueError as error:
        text = sentence(error)
        raise ValueError(text if source in text else f"{text}: '{source}'") from None


def features(extractor: Extractor, dataset: Iterable[Any], **kwargs: Any) -> Tensor:
    """Embed a data set that fits into memory: (n, D). Arguments and errors as in `batches`."""
    parts = list(batches(extractor, dataset, **kwargs))
    return torch.cat(parts) if parts else torch.empty(0, extractor.encoder.dimension)


def _pick(row: Any, columns: str | Sequence[str] | None, whole: bool) -> Any:
    if not isinstance(row, dict):
        return row
    if columns is None:
        names = [name for name in row if whole or name not in ("label", "labels")] or list(row)
    else:
        names = [columns] if isinstance(columns, str) else list(columns)
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(f"there is no column {missing[0]!r}, only {', '.join(map(repr, row))}")
    if whole:
        return {name: row[name] for name in names}
    if len(names) != 1:
        raise ValueError(f"one column must be chosen among {', '.join(map(repr, row))}")
    return row[names[0]]


def _cached(extractor: Extractor, rows: list[Any], folder: Path | None) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    if folder is None:
        return _checked(extractor, rows)
    path = folder / f"{_content_digest(rows)}.safetensors"
    with contextlib.suppress(FileNotFoundError, SafetensorError, KeyError, OSError):  # what is not whole is made anew
        held = load_file(path)["x"]
        whole = held.dtype == torch.float32 and bool(torch.isfinite(held).all())
        if whole and held.shape == (len(rows), extractor.encoder.dimension):
            return held
    x = _checked(extractor, rows)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"x": x.contiguous()}, part)
    os.replace(part, path)
    return x


def _checked(extractor: Extractor, rows: list[Any]) -> Tensor:
    x = extractor.embed(rows)
    if x.shape != (len(rows), extractor.encoder.dimension):
        raise ValueError(
            f"{extractor.encoder.name} must give {len(rows)} vectors of {extractor.encoder.dimension}, "
            f"got {tuple(x.shape)}"
        )
    return x.float().cpu()


def _content_digest(rows: list[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for part in _content(row):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _content(row: Any) -> Iterator[bytes]:
    """Give a row's content as bytes, each part with its type, so that different rows never look the same."""
    if isinstance(row, dict):
        yield f"dict {len(row)}".encode()
        for key in sorted(row):
            yield from (b"key", str(key).encode())
            yield from _content(row[key])
    elif isinstance(row, str):
        yield from (b"text", row.encode("utf-8", "surrogatepass"))
    elif isinstance(row, (int, float)):
        yield from (b"number", repr(row).encode())
    elif isinstance(row, Tensor):
        yield from (f"tensor {row.dtype} {tuple(row.shape)}".encode(), row.contiguous().cpu().numpy().tobytes())
    elif hasattr(row, "dtype") and hasattr(row, "tobytes") and not row.dtype.hasobject:  # numpy
        yield from (f"array {row.dtype} {row.shape}".encode(), row.tobytes())
    elif hasattr(row, "getpalette") and hasattr(row, "tobytes"):  # PIL; a memory-mapped array has a mode, too
        yield from (f"image {row.mode} {row.size}".encode(), row.tobytes(), bytes(row.getpalette() or ()))
    elif isinstance(row, (list, tuple)):
        yield f"list {len(row)}".encode()
        for value in row:
            yield from _content(value)
    else:
        raise ValueError(f"a row must be text, an image, numbers or a dict of those, got {type(row).__name__}")


def _digest(description: dict[str, Any], state: dict[str, Tensor] | None = None) -> str:
    """SHA-256 of what decides about the numbers: settings, and weights by name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode())
    for name, weight in sorted((state or {}).items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Give all that decides which tokens a text becomes: vocabulary, merges, normalisation, special tokens."""
    settings: dict[str, Any] = {
        "tokenizer": type(tokenizer).__name__,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
    }
    settings["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        steps = json.loads(backend.to_str())
        return settings | {name: x for name, x in steps.items() if name not in ("truncation", "padding")}
    return settings | {
        "init": {k: str(v) for k, v in tokenizer.init_kwargs.items() if "path" not in k and "file" not in k}
    }


class ArrayFeatures:
    """Rows that are vectors, taken as they are.

    Args:
        dimension: D.
        name: of how they were made; both sides must mean the same by it, since nothing else can be checked.
        normalize: scale rows to unit norm.
    """

    def __init__(self, dimension: int, name: str = "vectors", *, normalize: bool = False) -> None:
        dimension = whole("dimension", dimension, at_least=1)
        self.encoder = Encoder(name, _digest({"kind": "array", "name": name}), "none", normalize, dimension)
        self.whole_rows = False

    def embed(self, rows: Sequence[Any]) -> Tensor:
        """Stack vectors."""
        import numpy as np

        try:
            x = torch.from_numpy(np.stack([np.asarray(row, dtype=np.float32).reshape(-1) for row in rows]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"rows must be vectors of {self.encoder.dimension} numbers: {error}") from None
        return _unit(x) if self.encoder.normalize else x


class PixelFeatures:
    """Images as their pixels in [0, 1], grey, resized.

    Args:
        size: of a side.
        normalize: scale rows to unit norm.

    Raises:
        ValueError: a size that is not from 1 to 256.
    """

    def __init__(self, size: int = 28, *, normalize: bool = True) -> None:
        if not 1 <= whole("size", size) <= MAX_SIZE:
            raise ValueError(f"the size of an image must be from 1 to {MAX_SIZE}, got {size}")
        self.size = size
        digest = _digest({"kind": "pixels", "size": size, "version": 1})
        self.encoder = Encoder(f"pixels-{size}", digest, "none", normalize, size * size)
        self.whole_rows = False

    def embed(self, rows: Sequence[Any]) -> Tensor:
        """Read PIL images, or arrays (h, w) or (h, w, 3) of bytes, or of floats in [0, 1]."""
        x = torch.stack([self._pixels(row) for row in rows]).flatten(1)
        return _unit(x) if self.encoder.normalize else x

    def _pixels(self, row: Any) -> Tensor:
        import numpy as np

        array = np.asarray(row.convert("L") if hasattr(row, "convert") else row)
        if array.ndim not in (2, 3) or array.dtype == object:
            raise ValueError(f"an image must have two or three dimensions, got shape {array.shape} of {array.dtype}")
        x = torch.from_numpy(array / 255 if array.dtype == np.uint8 else array.astype(np.float64)).float()
        x = x.mean(-1) if x.ndim == 3 else x
        if x.shape == (self.size, self.size):
            return x
        return torch.nn.functional.interpolate(
            x[None, None], (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )[0, 0]


class HuggingFaceFeatures:
    """Vectors of a Hugging Face encoder for text or images, pooled as the model wants.

    Args:
        name: on the hub, or a folder.
        revision: on the hub.
        pooling: text: "mean", "cls" or "last"; images: "cls", "spatial" (the mean over a feature map) or "features" (a
            joint model's projected ones). None takes what the model comes with: the sentence-transformers pooling where
            there is one, else the last token of a decoder and the mean of any other text model; "features" for
            models like CLIP, "spatial" for convolutional and "cls" for other vision models.
        normalize: scale rows to unit norm.
        max_length: of a text, in tokens.
        batch_size: rows in one pass.
        device: torch's.
        trust_remote_code: run Python code that comes with the model; without it, a model that needs some is refused.

    Raises:
        ValueError: a pooling that the model hasn't got, or a model that can't be opened, or is neither for text nor for
            images.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        pooling: str | None = None,
        normalize: bool = True,
        max_length: int = 256,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        try:
            from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError:
            raise ImportError("encoders need transformers: pip install 'sgc[federated]'") from None

        self.batch_size: int = whole("batch_size", batch_size, at_least=1)
        max_length = self.max_length = whole("max_length", max_length, at_least=1)
        self.whole_rows, self.normalize = False, flag("normalize", normalize)
        flag("trust_remote_code", trust_remote_code)
        opened: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        with opening("the encoder", name):
            config = AutoConfig.from_pretrained(name, **opened)
            self.model = AutoModel.from_pretrained(name, dtype=torch.float32, **opened).eval().to(device)
            self.joint = hasattr(self.model, "get_image_features")
            self.vision = self.joint or self.model.main_input_name == "pixel_values"
            if not self.vision and self.model.main_input_name != "input_ids":
                raise ValueError(f"it must read text or images, got {self.model.main_input_name}")
            reader: Any = AutoImageProcessor if self.vision else AutoTokenizer
            self.processor = reader.from_pretrained(name, **opened)
        if self.vision:
            settings = {"processor": self.processor.to_dict()}
            self.channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
        else:
            if self.processor.pad_token is None:
                self.processor.pad_token = self.processor.eos_token
            self.processor.padding_side = "right"  # the last token is found by the mask
            self.max_length = min(max_length, self.processor.model_max_length)
            settings = {**_tokenizer_settings(self.processor), "max_length": self.max_length}
        self.pooling = pooling or self._own_pooling(name, revision)
        choices = VISION_POOLING if self.vision else TEXT_POOLING
        if self.pooling not in choices or (self.pooling == "features") > self.joint:
            raise ValueError(f"pooling must be one of {', '.join(choices)} and suit the model, got {self.pooling!r}")
        settings |= {"architecture": type(self.model).__name__, "config": _numbers_of(config)}
        # a pooler of transformers' own that the checkpoint lacks is random, and not used
        state = {k: v for k, v in self.model.state_dict().items() if not k.startswith("pooler.")}
        with torch.no_grad(), opening("the encoder", name):
            dimension = self.embed([self._probe()]).shape[1]
        title = re.sub(r"[^\x21-\x7e]", "?", (Path(name).resolve() if Path(name).is_dir() else Path(name)).name)[:40]
        title = title or "encoder"
        commit = getattr(config, "_commit_hash", None)
        self.encoder = Encoder(
            f"{title}@{commit[:12]}" if commit else title, _digest(settings, state), self.pooling, normalize, dimension
        )

    def _own_pooling(self, name: str, revision: str | None) -> str:
        from transformers.utils.hub import cached_file

        if self.joint:
            return "features"
        if self.vision:
            with torch.no_grad():
                probe = self.model(**self._inputs([self._probe()])).last_hidden_state
            return "spatial" if probe.ndim == 4 else "cls"
        with contextlib.suppress(OSError, ValueError, TypeError):
            file = cached_file(
                name, "1_Pooling/config.json", revision=revision, _raise_exceptions_for_missing_entries=False
            )
            modes = json.loads(Path(file or "").read_text())
            for mode, word in (("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "last")):
                if modes.get(f"pooling_mode_{mode}"):
                    return word
        architectures = " ".join(self.model.config.architectures or ())
        return "last" if "CausalLM" in architectures else "mean"

    def _probe(self) -> Any:
        if not self.vision:
            return "a"
        import numpy as np

        return np.zeros((64, 64, 3), dtype=np.uint8)

    def _inputs(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        if self.vision:
            images = [self._image(row) for row in rows]
            inputs = {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}
        else:
            inputs = dict(
                self.processor(
                    list(rows), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
                )
            )
            if not inputs["input_ids"].shape[1]:
                raise ValueError(f"a text must have a token to be embedded, got {rows[0]!r}")
        return {name: x.to(self.model.device) for name, x in inputs.items()}

    def _image(self, row: Any) -> Any:
        import numpy as np
        from PIL import Image

        if not isinstance(row, Image.Image):
            array = np.asarray(row)
            if array.dtype == object or array.dtype.kind in "US" or array.ndim not in (2, 3):
                raise ValueError(f"{self.model.config.model_type} reads images, got {type(row).__name__}")
            row = Image.fromarray(array if array.dtype == np.uint8 else (array * 255).round().astype(np.uint8))
        return row.convert("L" if self.channels == 1 else "RGB")

    @torch.no_grad()
    def embed(self, rows: Sequence[Any]) -> Tensor:
        """Embed texts or images (PIL, or arrays of bytes, or of floats in [0, 1])."""
        order = list(range(len(rows)))
        if not self.vision:
            other = next((row for row in rows if not isinstance(row, str)), None)
            if not all(isinstance(row, str) for row in rows):
                raise ValueError(f"{self.model.config.model_type} reads text, got {type(other).__name__}")
            order.sort(key=lambda i: len(rows[i]))
        parts = []
        for start in range(0, len(rows), self.batch_size):
            inputs = self._inputs([rows[i] for i in order[start : start + self.batch_size]])
            if self.pooling == "features":
                found = self.model.get_image_features(**inputs)
                x = getattr(found, "pooler_output", found)
            else:
                x = _pool(self.model(**inputs).last_hidden_state, self.pooling, inputs.get("attention_mask"))
            parts.append((_unit(x.float()) if self.normalize else x.float()).cpu())
        x = torch.cat(parts)
        return torch.empty_like(x).index_copy_(0, torch.tensor(order), x)


def _pool(hidden: Tensor, pooling: str, mask: Tensor | None) -> Tensor:
    """Pool hidden states (m, tokens, D), or a feature map (m, D, h, w), to (m, D)."""
    if pooling == "spatial":
        return hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden.mean(1)
    if pooling == "cls":
        if hidden.ndim == 4:
            raise ValueError("pooling must be 'spatial' for a model that gives feature maps, got 'cls'")
        return hidden[:, 0]
    assert mask is not None  # of a tokenizer
    if pooling == "last":
        return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def _numbers_of(config: Any) -> dict[str, Any]:
    """Give the part of a model's configuration that decides about its numbers."""
    passing = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "id2label", "label2id")
    return {name: value for name, value in config.to_dict().items() if name not in passing}


def make_extractor(name: str, *, dimension: int | None = None, normalize: bool = True, **options: Any) -> Extractor:
    """Make the extractor of a name: "pixels" or "pixels:SIZE", "vectors" (as they are), else a Hugging Face encoder.

    Args:
        name: of the extractor.
        dimension: of "vectors".
        normalize: scale rows to unit norm.
        options: of `HuggingFaceFeatures`.

    Raises:
        ValueError: a size that is no number, or "vectors" without a dimension.
    """
    if re.fullmatch(r"pixels(:\d{1,4})?", name):
        return PixelFeatures(int(name.partition(":")[2] or 28), normalize=normalize)
    if name == "vectors":
        if dimension is None:
            raise ValueError("vectors need a dimension")
        return ArrayFeatures(dimension, normalize=normalize)
    return HuggingFaceFeatures(name, normalize=normalize, **options)


BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


def open_rows(source: str, split: str = "train") -> Iterable[Any]:
    """Open a data set: a file, a folder of images, or a name on the hub; files of text and tables are streamed.

    Args:
        source: a `json`, `jsonl`, `csv`, `tsv`, `parquet` or `txt` file, vectors in `npy`, a folder, or a name.
        split: of a data set on the hub or in a folder.

    Raises:
        ValueError: a file that isn't there, is empty or of an unknown kind, or data that can't be opened; or, while
            rows are read, a row that can't be.
    """
    with opening("the data set", source):
        rows = _open_rows(Path(source).expanduser(), source, split)
    return rows if hasattr(rows, "shape") else Named(rows, source)


class Named:
    """Rows whose reader's errors are sentences that name the source.

    Args:
        rows: any iterable of them.
        source: as the user gave it.
    """

    def __init__(self, rows: Iterable[Any], source: str) -> None:
        self.rows, self.source = rows, source

    def __iter__(self) -> Iterator[Any]:
        with opening("the data set", self.source):
            rows = iter(self.rows)
        while True:
            with opening("the data set", self.source):
                row = next(rows, _END)
            if row is _END:
                return
            yield row


_END = object()


def _open_rows(path: Path, source: str, split: str) -> Iterable[Any]:
    if path.is_file() and not path.stat().st_size:
        raise ValueError("it is empty")
    if path.suffix == ".npy":
        import numpy as np

        if not path.is_file():
            raise ValueError(f"the data file '{source}' does not exist")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if getattr(array, "ndim", 0) < 2 or array.dtype.kind not in "biuf":
            raise ValueError("it must hold an array of numbers with a row for each example")
        return array
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("data sets need datasets: pip install 'sgc[federated]'") from None
    if path.is_dir():
        return load_dataset("imagefolder", data_dir=str(path), split=split)
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise ValueError(f"the data file '{source}' does not exist")
        options = {"sep": "\t", "quoting": 3} if path.suffix == ".tsv" else {}
        builder = BUILDERS[path.suffix]
        return load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
    if path.suffix and path.exists():
        raise ValueError(f"data must be one of {', '.join(BUILDERS)}, .npy, a folder or a name, got '{source}'")
    return load_dataset(source, split=split)


class GradientFeatures:
    """Sketches of per-example gradients of the model that is to be fine-tuned, through `sgc.codec`. (ours)

    One vmapped backward for all rows of a length; each row's gradient, flattened over the chosen parameters, is
    sparsified and projected to `sketch_size` numbers. A is data-independent, so both sides make the same, and inner
    products of sketches are those of the sparse gradients up to 1/√k.

    Args:
        model: transformers', with a loss when given labels; its attention should be "eager".
        tokenizer: of the model; rows are dicts with a text column and "label" (or, for a causal model, texts).
        parameters: a regular expression; the gradients of the parameters it finds are taken.
        sketch_size: k, the dimension D of the vectors.
        sparsity: s, the largest entries of a gradient that are kept.
        seed: of A.
        normalize: scale rows to unit norm.
        max_length: of a text, in tokens.
        batch_size: rows in one pass.
        name: of the model, for people.

    Raises:
        ValueError: no parameter matches.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        parameters: str = ".",
        sketch_size: int = 512,
        sparsity: int = 1024,
        seed: int = 0,
        normalize: bool = True,
        max_length: int = 128,
        batch_size: int = 16,
        name: str = "gradients",
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        max_length = self.max_length = whole("max_length", max_length, at_least=1)
        self.batch_size: int = whole("batch_size", batch_size, at_least=1)
        sparsity = whole("sparsity", sparsity, at_least=1)
        held = {n: p.detach() for n, p in model.named_parameters()}
        self._free = {n: p for n, p in held.items() if re.search(parameters, n)}
        self._fixed = {n: p for n, p in held.items() if n not in self._free}
        if not self._free:
            raise ValueError(f"parameters must match a name such as {next(iter(held), None)!r}, got {parameters!r}")
        self.entries = sum(p.numel() for p in self._free.values())
        self.codec = Codec(None, sketch_size, min(sparsity, self.entries), seed)
        settings = {
            "kind": "gradients",
            "parameters": sorted(self._free),
            "codec": repr(self.codec),
            "max_length": max_length,
            "model": type(model).__name__,
            **_tokenizer_settings(tokenizer),
        }
        digest = _digest(settings, dict(model.state_dict()))
        self.encoder = Encoder(name, digest, "sketched gradients", normalize, min(sketch_size, self.entries))
        self.whole_rows = True

    def embed(self, rows: Sequence[Any]) -> Tensor:
        """Sketch the gradient of every row's loss."""
        ids, labels = zip(*map(self._example, rows), strict=True)
        x = torch.empty(len(rows), self.encoder.dimension)
        by_length: dict[int, list[int]] = {}
        for i, tokens in enumerate(ids):
            by_length.setdefault(len(tokens), []).append(i)
        for same in by_length.values():  # without padding there is no mask, on which models branch as vmap can't
            for start in range(0, len(same), self.batch_size):
                part = same[start : start + self.batch_size]
                gradient = self.gradients(torch.tensor([ids[i] for i in part]), torch.tensor([labels[i] for i in part]))
                for i, g in zip(part, gradient, strict=True):
                    x[i] = self.codec.encode(g).reshape(-1)
        return _unit(x) if self.encoder.normalize else x

    def _example(self, row: Any) -> tuple[list[int], Any]:
        fields = {"text": row} if isinstance(row, str) else dict(row)
        label = fields.pop("label", fields.pop("labels", None))
        texts = [value for value in fields.values() if isinstance(value, str)]
        if len(texts) != len(fields) or not 1 <= len(texts) <= 2:
            raise ValueError("a row must be one text or two, with a label or, for a causal model, without")
        ids = self.tokenizer(*texts, truncation=True, max_length=self.max_length)["input_ids"]
        if len(ids) < 2:
            raise ValueError(f"a row must have at least 2 tokens, got {texts[0]!r}")
        return ids, ids if label is None else label

    def gradients(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Compute every row's own gradient in one vmapped pass.

        Args:
            ids: (m, length) tokens.
            labels: (m,) or (m, length).

        Returns:
            (m, entries) fp32.
        """
        from torch.func import functional_call, grad, vmap

        def loss(free: dict[str, Tensor], ids: Tensor, label: Tensor) -> Tensor:
            inputs = {"input_ids": ids[None], "labels": label[None]}
            return functional_call(self.model, {**self._fixed, **free}, kwargs=inputs).loss

        device = next(iter(self._free.values())).device
        found = vmap(grad(loss), in_dims=(None, 0, 0))(self._free, ids.to(device), labels.to(device))
        return torch.cat([found[n].flatten(1) for n in self._free], 1).float()
