import pytest
import torch
from transformers import AutoModelForImageClassification

from federated.models import make_model
from tests.federated.small import small_data


@pytest.mark.parametrize(("name", "parameters"), [("softmax", 7850), ("cnn", 28938), ("vit", 72074)])
def test_built_in_models_have_the_stated_size(name, parameters):
    model = make_model(name, image_size=28, num_channels=1, num_labels=10)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["softmax", "cnn", "vit"])
def test_built_in_models_are_saved_and_opened_as_any_other(name, tmp_path):
    model, data = make_model(name, image_size=8, num_channels=1, num_labels=4, seed=3), small_data(6)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is type(model)
    # the ViT is opened with fused attention, which sums in another order
    assert torch.allclose(model.eval()(**data).logits, again.eval()(**data).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_seed_makes_the_same_model(name):
    sizes = {"image_size": 8, "num_channels": 1, "num_labels": 4}
    first, again, other = (make_model(name, seed=seed, **sizes).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_softmax_regression_starts_where_all_classes_are_alike():
    model = make_model("softmax", image_size=8, num_channels=1, num_labels=4)
    assert not model(**small_data(6)).logits.any()


def test_a_model_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="model must be one of softmax, cnn, vit, got 'resnet'"):
        make_model("resnet", image_size=8, num_channels=1, num_labels=4)
    with pytest.raises(ValueError, match="image_size must be a multiple of 4, got 9"):
        make_model("cnn", image_size=9, num_channels=1, num_labels=4)
