"""FeatureExtractor: features through the head give the probabilities, on several families; hashing; two processes."""

from __future__ import annotations

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
