"""The hooks: what the model sees in a training forward, what it is left with, and what is refused."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.live import LiveMixing, installed_on
from hf_dataopt.mixup.options import LiveOptions
from hf_dataopt.mixup.result import MixResult
from hf_dataopt.saliency import input_saliency

from .models import FAMILIES, batch, halves, make


class Recorder:
    """A stand-in mixer that keeps what it was given."""

    needs_pixels = True

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, ...]] = []
        self.results: list[MixResult] = []

    def __call__(self, images: Any, targets: Any, saliency: Any, generator: Any, shown: Any = None) -> MixResult:
        self.seen.append((images, targets, saliency, *(shown or ())))
        self.results.append(halves(images if shown is None else shown[0], targets, saliency, generator))
        return self.results[-1]


def installed(model: nn.Module, **options: Any) -> tuple[LiveMixing, Recorder]:
    mixer = Recorder()
    live, before = LiveMixing(mixer, LiveOptions(**options)), installed_on(model)
    if before is not None:
        before.remove()
    live.install(model)
    return live, mixer


@pytest.mark.parametrize("family", list(FAMILIES))
def test_saliency_of_this_step_and_loss_of_the_mixed_batch(family: str) -> None:
    model, data = make(family).train(), batch(family, 4)
    name = model.main_input_name
    live, mixer = installed(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        expected = input_saliency(model, {name: data[name]}, data["labels"])
        statistics = {key: value.clone() for key, value in model.named_buffers()}
        output = model(**data)
        torch.testing.assert_close(mixer.seen[-1][2].reshape(expected.shape), expected)
        optimizer.zero_grad()
        output.loss.backward()
        images, targets = mixer.results[-1].images, mixer.results[-1].targets
        with live.paused(), torch.no_grad():
            for key, value in statistics.items():
                dict(model.named_buffers())[key].copy_(value)
            logits = model(**{name: images.reshape(data[name].shape)}).logits
        expected_loss = -(targets * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(output["loss"].detach(), expected_loss)
        optimizer.step()
    changed = (mixer.seen[0][2] - mixer.seen[1][2]).norm() / mixer.seen[0][2].norm()
    assert float(changed) > 1e-3  # the second step saw the updated weights
    assert live.samples == 8 and live.batches == 2


def test_loss_is_the_share_of_all_samples() -> None:
    model, data = make("vit"), batch("vit", 4)
    installed(model)
    model.eval()
    losses = []
    for items in (None, 4, torch.tensor(16)):
        live = installed_on(model)
        assert live is not None
        live.set_epoch(0)
        model.train()
        losses.append(model(**data, num_items_in_batch=items).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0] / 4, rel=1e-6)


def test_evaluation_and_removed_hooks_change_nothing() -> None:
    model, data = make("vit").eval(), batch("vit", 4)
    plain = model(**data)
    live, mixer = installed(model)
    live.install(model)  # again: nothing
    hooked = model(**data)
    assert torch.equal(plain.logits, hooked.logits) and torch.equal(plain.loss, hooked.loss)
    assert not mixer.seen
    model.train()
    model(**data)
    assert len(mixer.seen) == 1  # installed once
    live.remove()
    live.remove()
    assert not live.installed and installed_on(model) is None
    assert torch.equal(model(**data).logits, plain.logits) and len(mixer.seen) == 1
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_one_mixing_serves_one_model_and_one_model_has_one_mixing() -> None:
    model = make("vit").train()
    first, seen = installed(model)
    with pytest.raises(ValueError, match="another mixing is installed"):
        LiveMixing(halves).install(model)
    with pytest.raises(ValueError, match="remove"):
        first.install(make("vit"))
    model(**batch("vit", 2))
    assert installed_on(model) is first and len(seen.seen) == 1


def test_exceptions_leave_model_and_hooks_as_they_were() -> None:
    model, data = make("vit").train(), batch("vit", 4)
    model.vit.embeddings.eval()
    modes = [module.training for module in model.modules()]

    def broken(*_: Any, **__: Any) -> MixResult:
        raise RuntimeError("broken mixer")

    live = LiveMixing(broken)
    live.install(model)
    with pytest.raises(RuntimeError, match="broken mixer"):
        model(**data)
    assert modes == [module.training for module in model.modules()]
    assert all(weight.grad is None for weight in model.parameters())
    with live.paused(), pytest.raises(KeyError), live.paused():
        raise KeyError
    with pytest.raises(RuntimeError, match="broken mixer"):
        model(**data)  # mixing goes on after the pauses
    live.mixer = halves

    def broken_head(*_: Any) -> None:
        if model.training:  # the saliency pass runs in eval mode
            raise RuntimeError("broken head")

    handle = model.classifier.register_forward_hook(broken_head)
    with pytest.raises(RuntimeError, match="broken head"):
        model(**data)
    handle.remove()
    assert modes == [module.training for module in model.modules()]
    plain = model.eval()(**data)  # the loss of the broken step is forgotten
    torch.testing.assert_close(plain.loss, nn.functional.cross_entropy(plain.logits, data["labels"]))


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_random_numbers_and_statistics_are_those_of_the_plain_forward(family: str) -> None:
    changes = {"hidden_dropout_prob": 0.3} if family == "vit" else {}
    data, states = batch(family, 4), []
    for mixed in (False, True):
        model = make(family, **changes).train()
        if mixed:
            # what is mixed is the batch itself: only the hooks' own traces can differ
            live = LiveMixing(unchanged)
            live.install(model)
        torch.manual_seed(5)
        output = model(**data)
        states.append((torch.get_rng_state(), output.logits, output.loss, dict(model.named_buffers())))
    plain, hooked = states
    assert torch.equal(plain[0], hooked[0]) and torch.equal(plain[1], hooked[1])
    torch.testing.assert_close(plain[2], hooked[2])
    assert all(torch.equal(value, hooked[3][name]) for name, value in plain[3].items())


def unchanged(images: Any, targets: Any, saliency: Any, generator: Any) -> MixResult:
    n = len(images)
    return MixResult(
        images=images,
        targets=targets,
        sources=torch.arange(n)[:, None],
        masks=torch.ones(n, 1, 1, 1),
        ratios=torch.ones(n, 1),
        unmixed=torch.tensor([True] + [False] * (n - 1)),
    )


def test_seeds_give_streams_and_unmixed_samples_are_counted() -> None:
    model, data = make("vit").train(), batch("vit", 8)
    partners = {}
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        live, mixer = installed(model, seed=seed)
        live.set_epoch(epoch)
        model(**data)
        model(**data)
        partners.setdefault((seed, epoch), []).append([result.sources[:, 1].tolist() for result in mixer.results])
    first = partners[0, 0]
    assert first[0] == first[1] and first[0][0] != first[0][1]
    assert len({str(runs[0]) for runs in partners.values()}) == 3
    live.remove()
    live = LiveMixing(unchanged)
    live.install(model)
    model(**data)
    model(**data)
    assert live.unmixed == 2 and live.samples == 16


def test_callable_saliency_augmentation_and_probability() -> None:
    model, data = make("vit").train(), batch("vit", 4)
    calls: list[torch.Size] = []

    def brightness(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(targets.shape)
        return images.mean(1)

    def inverted(image: torch.Tensor) -> torch.Tensor:
        assert image.shape == (1, 8, 8) and float(image.min()) >= 0 and float(image.max()) <= 1
        return 1 - image

    _, mixer = installed(model, saliency=brightness, augmentation=inverted, mean=(0.5,), std=(0.25,))
    model(pixel_values=(data["pixel_values"] - 0.5) / 0.25, labels=data["labels"])
    expected = (1 - data["pixel_values"] - 0.5) / 0.25
    torch.testing.assert_close(mixer.seen[0][0], expected)
    torch.testing.assert_close(mixer.seen[0][2], expected[:, 0])
    assert calls == [torch.Size([4, 10])]

    live, mixer = installed(model, probability=0.5)
    for _ in range(40):
        loss = model(**data).loss
        assert bool(torch.isfinite(loss))
    assert 10 <= len(mixer.seen) == live.batches <= 30


def test_attack_shows_perturbed_images_and_leaves_masks_to_clean_ones() -> None:
    model, data = make("vit").train(), batch("vit", 8)
    config = PuzzleMixConfig(adversarial_probability=0.5)
    _, mixer = installed(model, attack=config)
    model(**data)
    images, _, _, own, partner = mixer.seen[0]
    assert torch.equal(images, data["pixel_values"])
    for shown in (own, partner):
        moved = (shown - images).abs().flatten(1).amax(1)
        assert 0 < int((moved > 0).sum()) < 8 and float(moved.max()) <= config.adversarial_eps + 1e-6
    assert not torch.equal(own, partner)  # nu_0 and nu_1 of Algorithm 2
    with pytest.raises(ValueError, match="image_mean"):
        installed(model, attack=config)
        model(pixel_values=data["pixel_values"] * 4 - 2, labels=data["labels"])


def test_copies_of_the_model_carry_their_own_mixing() -> None:
    model = make("vit").train()
    live, mixer = installed(model)
    twin = copy.deepcopy(model)
    twin(**batch("vit", 2))
    assert live.samples == 0 and not mixer.seen
    del model
    gc.collect()
    assert not live.installed


def test_what_cannot_be_mixed_is_refused() -> None:
    model, data = make("vit").train(), batch("vit", 2)
    installed(model)
    with pytest.raises(ValueError, match="paused"):
        model(pixel_values=data["pixel_values"])
    with pytest.raises(ValueError, match="2 inputs but 1 labels"):
        model(pixel_values=data["pixel_values"], labels=data["labels"][:1])
    with pytest.raises(ValueError, match="0 to 9"):
        model(pixel_values=data["pixel_values"], labels=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="nn.DataParallel"):
        model._replicate_for_data_parallel()(**data)
    with pytest.raises(ValueError, match="nn.DataParallel"):
        LiveMixing(halves).install(nn.DataParallel(model))
    with pytest.raises(ValueError, match="spectrograms"):
        model(pixel_values=data["pixel_values"].flatten(1), labels=data["labels"])
    installed(model, saliency=lambda images, targets: images)
    with pytest.raises(ValueError, match="one map each"):
        model(**data)
    installed(model, augmentation=lambda image: image[:, 1:])
    with pytest.raises(ValueError, match="augmentation"):
        model(**data)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"label_smoothing": 1.0}, ValueError),
        ({"clean_weight": -1.0}, ValueError),
        ({"clean_weight": float("nan")}, ValueError),
        ({"probability": 2.0}, ValueError),
        ({"mean": (0.5,)}, ValueError),
        ({"saliency": abs, "attack": PuzzleMixConfig()}, ValueError),
        ({"saliency": abs, "saliency_scale": 0.5}, ValueError),
        ({"clean_weight": 1.0, "saliency_scale": 0.5}, ValueError),
        ({"saliency_scale": 0.0}, ValueError),
        ({"label_smoothing": 0.1, "loss": abs}, ValueError),
        ({"loss": 1}, TypeError),
        ({"saliency": 3}, TypeError),
        ({"augmentation": "flip"}, TypeError),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        LiveOptions(**options)


def test_pixels_outside_their_range_are_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_attention_heads=2)
    config.num_labels, config.num_hidden_layers = 10, 1
    model = transformers.ViTForImageClassification(config).train()
    images = torch.rand(2, 3, 8, 8) * 4 - 2
    for scale, warned in (({}, 1), ({"mean": (0.5,) * 3, "std": (0.25,) * 3}, 0)):
        caplog.clear()
        installed(model, **scale)
        for _ in range(2):
            model(pixel_values=images, labels=torch.tensor([1, 2]))
        assert caplog.text.count("image_mean") == warned
