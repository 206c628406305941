"""The kernel's pieces in numbers: lengths, powers, signs, and what is refused."""

from __future__ import annotations

import pytest
import torch

from hf_dataopt.relation.config import RelationConfig
from hf_dataopt.relation.kernel import base_kernel, normalise, power_, relation, sign_


def test_half_precision_divides_as_the_reference_where_it_can() -> None:
    """Rows whose squares overflow, vanish or fit: the first two are divided in float32 and rounded."""
    rows = torch.tensor([[300.0, 400.0], [1e-5, 2e-5], [0.3, 0.7], [3.0, 4.0]])
    found = normalise(rows, torch.float16)
    unit = rows / rows.norm(dim=1, keepdim=True)
    half = rows.half()
    assert found.dtype == torch.float16
    assert torch.equal(found[:2], unit[:2].half())
    assert torch.equal(found[2:], (half / (half * half).sum(1, keepdim=True).sqrt())[2:])
    assert torch.equal(normalise(rows, torch.float32), unit)
    assert torch.equal(normalise(rows, torch.bfloat16), unit.bfloat16())


@pytest.mark.parametrize("temperature", [1, 2, 3, 4, 5, 6, 8, 16, 0.5, 2.5])
def test_powers(temperature: float) -> None:
    base = torch.tensor([0.0, 0.25, 0.9, 1.0])
    torch.testing.assert_close(power_(base.clone(), temperature), base**temperature)


def test_kernel_entry_by_entry() -> None:
    f = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    p = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    cosine, agree = f[:3] @ f.T, p[:3] @ p.T
    plain = RelationConfig(edge_cutoff=0.3)
    assert torch.equal(base_kernel(f[:3], f, None, None, plain), torch.where(cosine > 0.3, cosine, 0.0))
    both = cosine * agree
    torch.testing.assert_close(base_kernel(f[:3], f, p[:3], p, plain), torch.where(both > 0.3, both, 0.0))
    rbf = RelationConfig(similarity="rbf", rbf_gamma=0.7, edge_cutoff=0.0)
    distances = torch.cdist(f[:3], f) ** 2
    torch.testing.assert_close(base_kernel(f[:3], f, None, None, rbf), torch.exp(-0.7 * distances), atol=1e-5, rtol=0)
    signed = sign_(torch.ones(2, 3), torch.tensor([1, 2]), torch.tensor([2, 1, 1]))
    assert signed.tolist() == [[-1, 1, 1], [1, -1, -1]]


def test_dense_relation_refuses() -> None:
    f, p, labels = torch.eye(3), torch.full((3, 2), 0.5), torch.tensor([0, 1, 1])
    assert relation(f, f, p, p, (labels, labels)).shape == (3, 3)
    assert relation(f, f, p, p, config=RelationConfig(compatibility=False)).tolist() == f.tolist()
    zero = f.clone()
    zero[1] = 0
    bad = f[:, :2]
    for given, words in (
        ((zero, f, None, None), "features_i hold a row of zeros"),
        ((f, zero, None, None), "features_j hold a row of zeros"),
        ((f, bad, None, None), "features_j"),
        ((f, f, p, None), "go together"),
        ((f, f, None, p), "go together"),
        ((f, f, p * 3, p), "probs_i"),
        ((f, f, p, p * 3), "probs_j"),
        ((f, f, p[:2], p), "probs_i"),
        ((f, f, p, torch.full((3, 4), 0.25)), "probs_j"),
        ((f, f, p, p, (labels, labels[:2])), "labels of j"),
        ((f, f, p, p, (labels[:2], labels)), "labels of i"),
    ):
        with pytest.raises(ValueError, match=words):
            relation(*given)
    for wrong in ((labels,), (labels,) * 3, labels):
        with pytest.raises(TypeError, match="labels must be two tensors"):
            relation(f, f, None, None, wrong)  # type: ignore[arg-type]
