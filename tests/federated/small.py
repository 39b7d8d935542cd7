"""A small world for the tests: pictures of 8×8, a few devices, a small model."""

from functools import partial

import torch

from federated.device import LocalTraining
from federated.models import make_model

SGD = partial(torch.optim.SGD, lr=0.1)
M = 5


def small_data(rows=120, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(rows, 1, 8, 8, generator=generator)
    return {"pixel_values": centres[labels] + noise, "labels": labels}


def small_parts(sizes=(10, 30, 20, 25, 35)):
    return list(torch.arange(sum(sizes)).split(list(sizes)))


def small_model(name="softmax", seed=0):
    return make_model(name, image_size=8, num_channels=1, num_labels=4, seed=seed)


def training(model=None, **arguments):
    arguments = {"optimizer": SGD, "batch_size": 8, "steps": 2} | arguments
    return LocalTraining(model=model or small_model(), **arguments)
