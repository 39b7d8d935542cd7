"""Small built-in models for images, as Hugging Face models: they save, load and train as any other does.

| model | | parameters on 28×28 images of 10 classes |
|---|---|---|
| `SoftmaxRegression` | one linear layer | 7,850 |
| `SmallCNN` | two convolutions and a linear layer | 28,938 |
| `tiny_vit` | transformers' ViT, 2 layers of width 64 | 72,074 |
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from sgc.checks import whole


class ImageConfig(PreTrainedConfig):
    """What the built-in image models are made from.

    Args:
        num_channels: of a picture.
        image_size: its height and width.
        kwargs: what every config has, such as num_labels.
    """

    def __init__(self, num_channels: int = 1, image_size: int = 28, **kwargs: Any) -> None:
        self.num_channels, self.image_size = num_channels, image_size
        kwargs.setdefault("num_labels", 10)
        super().__init__(**kwargs)


class SoftmaxConfig(ImageConfig):
    """The configuration of `SoftmaxRegression`."""

    model_type = "sgc-softmax"


class SmallCNNConfig(ImageConfig):
    """The configuration of `SmallCNN`."""

    model_type = "sgc-small-cnn"


class _ImageModel(PreTrainedModel, abc.ABC):
    """Pictures to logits, and the loss where labels are given."""

    main_input_name = "pixel_values"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()

    @abc.abstractmethod
    def logits(self, pixel_values: Tensor) -> Tensor:
        """Map pictures (N, channels, height, width) to logits (N, num_labels)."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Classify pictures.

        Args:
            pixel_values: (N, channels, height, width) fp32.
            labels: (N,) int64; −100 counts for nothing.

        Returns:
            `loss`, the mean cross-entropy, and `logits` (N, num_labels).
        """
        logits = self.logits(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class SoftmaxRegression(_ImageModel):
    """Multinomial logistic regression on pixels; starts at zero, where all classes are alike."""

    config_class = SoftmaxConfig

    def __init__(self, config: SoftmaxConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.num_channels * config.image_size**2, config.num_labels or 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Map pictures to logits."""
        return self.linear(pixel_values.flatten(1))


class SmallCNN(_ImageModel):
    """Two 5×5 convolutions of 16 and 32 channels with pooling, and a linear layer."""

    config_class = SmallCNNConfig

    def __init__(self, config: SmallCNNConfig) -> None:
        super().__init__(config)
        if config.image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {config.image_size}")
        self.first = nn.Conv2d(config.num_channels, 16, 5, padding=2)
        self.second = nn.Conv2d(16, 32, 5, padding=2)
        self.linear = nn.Linear(32 * (config.image_size // 4) ** 2, config.num_labels or 1)
        self.post_init()

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Map pictures to logits."""
        x = nn.functional.max_pool2d(self.first(pixel_values).relu(), 2)
        x = nn.functional.max_pool2d(self.second(x).relu(), 2)
        return self.linear(x.flatten(1))


def tiny_vit(image_size: int = 28, num_channels: int = 1, num_labels: int = 10) -> ViTForImageClassification:
    """Make an untrained ViT of 2 layers of width 64, its patches 1/4 of the picture's side."""
    arguments: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": image_size // 4,
        "num_channels": num_channels,
        "num_labels": num_labels,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "attn_implementation": "eager",
    }
    return ViTForImageClassification(ViTConfig(**arguments))


def make_model(name: str, *, image_size: int, num_channels: int, num_labels: int, seed: int = 0) -> PreTrainedModel:
    """Make a built-in model by name: "softmax", "cnn" or "vit".

    Raises:
        ValueError: no such model, or a picture it can't take.
    """
    sizes: dict[str, Any] = {"image_size": image_size, "num_channels": num_channels, "num_labels": num_labels}
    sizes = {size: whole(size, value, at_least=1) for size, value in sizes.items()}
    seed = whole("seed", seed, at_least=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "softmax":
            return SoftmaxRegression(SoftmaxConfig(**sizes))
        if name == "cnn":
            return SmallCNN(SmallCNNConfig(**sizes))
        if name == "vit":
            return tiny_vit(**sizes)
    raise ValueError(f"model must be one of softmax, cnn, vit, got {name!r}")


for _config, _model in ((SoftmaxConfig, SoftmaxRegression), (SmallCNNConfig, SmallCNN)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)
