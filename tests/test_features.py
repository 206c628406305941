"""FeatureExtractor: features through the head give the probabilities, on several families; hashing; two processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from datasets.fingerprint import Hasher

from hf_dataopt.features import FeatureExtractor, _head

E = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGES = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
CASES = {
    "vit": (tf.ViTForImageClassification, tf.ViTConfig, {"image_size": 32, "patch_size": 8, **E}, "image", IMAGES),
    "resnet": (
        tf.ResNetForImageClassification,
        tf.ResNetConfig,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "image",
        IMAGES,
    ),
    "convnext": (
        tf.ConvNextForImageClassification,
        tf.ConvNextConfig,
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "image",
        IMAGES,
    ),
    "bert": (
        tf.BertForSequenceClassification,
        tf.BertConfig,
        {"vocab_size": 128, **E},
        "text",
        np.ones((3, 5), np.int64),
    ),
    "gpt2": (
        tf.GPT2ForSequenceClassification,
        tf.GPT2Config,
        {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
        "text",
        np.array([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9], [3, 2, 0, 0, 0]]),
    ),
    "ast": (
        tf.ASTForAudioClassification,
        tf.ASTConfig,
        {"max_length": 64, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, **E},
        "audio",
        np.ones((3, 64, 16), np.float32),
    ),
}


def _vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=32, patch_size=8, num_labels=4, **E))


@pytest.mark.parametrize("name", CASES)
def test_head_of_features_gives_probs(name: str) -> None:
    model_class, config_class, options, modality, values = CASES[name]
    model = model_class(config_class(num_labels=4, **options))
    got = FeatureExtractor(model, column="x", modality=modality)({"x": values})
    again = torch.softmax(_head(model)(torch.from_numpy(got["features"])), dim=-1)
    np.testing.assert_allclose(got["probs"], again.detach().numpy(), atol=1e-6)
    assert got["features"].shape[0] == 3


def test_timm_model() -> None:
    timm_wrapper = tf.TimmWrapperConfig(architecture="resnet10t", num_labels=4)
    torch.manual_seed(0)
    model = tf.TimmWrapperForImageClassification(timm_wrapper).eval()
    got = FeatureExtractor(model)({"image": IMAGES})
    again = torch.softmax(_head(model)(torch.from_numpy(got["features"])), dim=-1)
    np.testing.assert_allclose(got["probs"], again.detach().numpy(), atol=1e-6)


def test_the_callers_model_stays_as_it_is() -> None:
    model = _vit().train()
    FeatureExtractor(model, dtype="bfloat16")({"image": IMAGES})
    assert model.training and next(model.parameters()).dtype == torch.float32
    before = FeatureExtractor(model)
    state = Hasher.hash(before)
    before({"image": IMAGES})
    assert Hasher.hash(before) == state


def test_stored_processor_reads_pictures(tmp_path: object) -> None:
    _vit().save_pretrained(tmp_path)
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    from PIL import Image

    pictures = [Image.fromarray(np.full((40, 30), 60 * k, np.uint8)) for k in range(3)]
    got = FeatureExtractor(str(tmp_path))({"image": pictures})
    assert got["features"].shape == (3, 32) and np.ptp(got["probs"], axis=0).max() > 0


def test_map_caches_by_name_and_fields(tmp_path: object) -> None:
    _vit().save_pretrained(f"{tmp_path}/m")
    Dataset.from_dict({"image": list(IMAGES)}).save_to_disk(f"{tmp_path}/d")
    data = Dataset.load_from_disk(f"{tmp_path}/d")
    one, again = (data.map(FeatureExtractor(f"{tmp_path}/m"), batched=True) for _ in range(2))
    assert one._fingerprint == again._fingerprint and one.cache_files == again.cache_files
    other = data.map(FeatureExtractor(f"{tmp_path}/m", suffix="_2"), batched=True)
    assert other._fingerprint != one._fingerprint and "features_2" in other.column_names


def test_hash_follows_the_fields_and_not_the_call() -> None:
    extractor = FeatureExtractor("some/name", column="x", revision="a")
    assert Hasher.hash(extractor) == Hasher.hash(FeatureExtractor("some/name", column="x", revision="a"))
    assert Hasher.hash(extractor) != Hasher.hash(FeatureExtractor("some/name", column="x", revision="b"))
    assert Hasher.hash(extractor) != Hasher.hash(
        FeatureExtractor("some/name", column="x", revision="a", dtype="bfloat16")
    )


def test_two_processes_equal_one(tmp_path: object) -> None:
    _vit().save_pretrained(tmp_path)
    data = Dataset.from_dict({"image": list(np.concatenate([IMAGES, IMAGES]))})
    extractor = FeatureExtractor(str(tmp_path))
    one = data.map(extractor, batched=True, batch_size=2)
    two = data.map(extractor, batched=True, batch_size=2, num_proc=2, with_rank=True)
    np.testing.assert_allclose(one["features"][:], two["features"][:], atol=1e-6)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="set column"):
        FeatureExtractor(_vit(), column="x")({"image": IMAGES})
    with pytest.raises(ValueError, match="modality"):
        FeatureExtractor("m", modality="video")


def test_a_folder_that_is_saved_again_is_read_again(tmp_path: Path) -> None:
    """The hash changes with the files, and so do the weights in use; a folder that nobody touched hashes the same."""
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = tf.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "checkpoint")
    extractor = FeatureExtractor(str(tmp_path / "checkpoint"))
    batch = {"image": torch.rand(2, 3, 32, 32)}
    before, first = Hasher.hash(extractor), extractor(batch)["probs"]
    assert Hasher.hash(FeatureExtractor(str(tmp_path / "checkpoint"))) == before == Hasher.hash(extractor)
    with torch.no_grad():
        model.classifier.weight.normal_(0, 3)
    model.save_pretrained(tmp_path / "checkpoint")
    assert Hasher.hash(extractor) != before
    assert not np.allclose(extractor(batch)["probs"], first)
