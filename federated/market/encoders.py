"""Encoders of rows: vectors as they are, images as pixels, and Hugging Face models for text or images."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from federated.files import opening
from federated.market.fingerprint import Encoder, config_settings, digest_of, tokenizer_settings
from sgc.checks import flag, whole

MAX_SIZE = 256  # of an image's side: its pixels must be a dimension that a query can have
TEXT_POOLING, VISION_POOLING = ("mean", "cls", "last"), ("cls", "spatial", "features")


class ArrayFeatures:
    """Rows that are vectors, taken as they are.

    Args:
        dimension: D.
        name: of how they were made; both sides must mean the same by it, since nothing else can be checked.
        normalize: scale rows to unit norm.
    """

    def __init__(self, dimension: int, name: str = "vectors", *, normalize: bool = False) -> None:
        dimension = whole("dimension", dimension, at_least=1)
        self.encoder = Encoder(name, digest_of({"kind": "array", "name": name}), "none", normalize, dimension)
        self.whole_rows = False

    def embed(self, rows: Sequence[Any]) -> Tensor:
        """Stack vectors."""
        import numpy as np

        try:
            x = torch.from_numpy(np.stack([np.asarray(row, dtype=np.float32).reshape(-1) for row in rows]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"rows must be vectors of {self.encoder.dimension} numbers: {error}") from None
        return unit_rows(x) if self.encoder.normalize else x


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
        digest = digest_of({"kind": "pixels", "size": size, "version": 1})
        self.encoder = Encoder(f"pixels-{size}", digest, "none", normalize, size * size)
        self.whole_rows = False

    def embed(self, rows: Sequence[Any]) -> Tensor:
        """Read PIL images, or arrays (h, w) or (h, w, 3) of bytes, or of floats in [0, 1]."""
        x = torch.stack([self._pixels(row) for row in rows]).flatten(1)
        return unit_rows(x) if self.encoder.normalize else x

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
    """Vectors of a Hugging Face encoder for text or images, pooled as suits the model.

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
        ValueError: a pooling that the model does not have, a model that can't be opened, or one that reads neither text
            nor images.
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
        self.batch_size: int = whole("batch_size", batch_size, at_least=1)
        self.max_length: int = whole("max_length", max_length, at_least=1)
        self.whole_rows, self.normalize = False, flag("normalize", normalize)
        flag("trust_remote_code", trust_remote_code)
        config = self._open(name, device, {"revision": revision, "trust_remote_code": trust_remote_code})
        settings = self._vision_settings(config) if self.vision else self._text_settings()
        self.pooling = pooling or self._own_pooling(name, revision)
        choices = VISION_POOLING if self.vision else TEXT_POOLING
        if self.pooling not in choices or (self.pooling == "features") > self.joint:
            raise ValueError(f"pooling must be one of {', '.join(choices)} and suit the model, got {self.pooling!r}")
        settings |= {"architecture": type(self.model).__name__, "config": config_settings(config)}
        # a pooler of transformers' own that the checkpoint lacks is random, and not used
        state = {k: v for k, v in self.model.state_dict().items() if not k.startswith("pooler.")}
        with torch.no_grad(), opening("the encoder", name):
            dimension = self.embed([self._probe()]).shape[1]
        self.encoder = Encoder(
            _title(name, getattr(config, "_commit_hash", None)),
            digest_of(settings, state),
            self.pooling,
            normalize,
            dimension,
        )

    def _open(self, name: str, device: str | torch.device, opened: dict[str, Any]) -> Any:
        """Open the model and what reads its rows; return its configuration."""
        try:
            from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError:
            raise ImportError("encoders need transformers: pip install 'sgc[federated]'") from None

        with opening("the encoder", name):
            config = AutoConfig.from_pretrained(name, **opened)
            self.model = AutoModel.from_pretrained(name, dtype=torch.float32, **opened).eval().to(device)
            self.joint = hasattr(self.model, "get_image_features")
            self.vision = self.joint or self.model.main_input_name == "pixel_values"
            if not self.vision and self.model.main_input_name != "input_ids":
                raise ValueError(f"it must read text or images, got {self.model.main_input_name}")
            reader: Any = AutoImageProcessor if self.vision else AutoTokenizer
            self.processor = reader.from_pretrained(name, **opened)
        return config

    def _vision_settings(self, config: Any) -> dict[str, Any]:
        self.channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
        return {"processor": self.processor.to_dict()}

    def _text_settings(self) -> dict[str, Any]:
        if self.processor.pad_token is None:
            self.processor.pad_token = self.processor.eos_token
        self.processor.padding_side = "right"  # the last token is found by the mask
        self.max_length = min(self.max_length, self.processor.model_max_length)
        return {**tokenizer_settings(self.processor), "max_length": self.max_length}

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
            parts.append((unit_rows(x.float()) if self.normalize else x.float()).cpu())
        x = torch.cat(parts)
        return torch.empty_like(x).index_copy_(0, torch.tensor(order), x)


def _title(name: str, commit: str | None) -> str:
    """Return a name for people: printable, without the folders above it, with the commit where there is one."""
    path = Path(name).resolve() if Path(name).is_dir() else Path(name)
    title = re.sub(r"[^\x21-\x7e]", "?", path.name)[:40] or "encoder"
    return f"{title}@{commit[:12]}" if commit else title


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


def unit_rows(x: Tensor) -> Tensor:
    """Scale rows to unit norm."""
    return torch.nn.functional.normalize(x, dim=1)
