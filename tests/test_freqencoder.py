"""Frequency encoding: the formula, the compiled kernel against the twin, first and second derivatives."""

import math

import pytest
import torch

import extension
import freqencoder
from freqencoder import FreqEncoder, frequency_encode, reference

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["compiled", "reference"])
def kind(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setenv("SOMNIUM_KERNELS", "reference")
    elif extension.load(freqencoder.FOLDER, "freqencoder") is None:
        pytest.skip("no compiled kernels on this machine")
    return request.param


@pytest.fixture
def compiled():
    if extension.load(freqencoder.FOLDER, "freqencoder") is None:
        pytest.skip("no compiled kernels on this machine")


def test_values_by_hand(kind):
    encoder = FreqEncoder(input_dim=2, degree=2)
    assert encoder.output_dim == 10
    out = encoder(torch.tensor([[math.pi / 2, 0.0]]))
    #                x            sin x     cos x     sin 2x    cos 2x
    expected = [math.pi / 2, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, -1.0, 1.0]
    torch.testing.assert_close(out, torch.tensor([expected]), atol=2e-7, rtol=0)


@pytest.mark.parametrize("dims", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_compiled_equals_reference(compiled, count, dims):
    generator = torch.Generator().manual_seed(count * 8 + dims)
    for dtype, tolerance in [(torch.float32, 1e-6), (torch.float64, 1e-14)]:
        x = (torch.randn(count, dims, generator=generator, dtype=dtype) * 3).requires_grad_()
        grad = torch.randn(count, dims * 13, generator=generator, dtype=dtype).requires_grad_()
        direction = torch.randn(count, dims, generator=generator, dtype=dtype)
        results = []
        for encode in (frequency_encode, reference.frequency_encode):
            out = encode(x, 6, 5)
            (first,) = torch.autograd.grad(out, x, grad, create_graph=True)
            second = torch.autograd.grad(first, (grad, x), direction)
            results.append((out, first, *second))
        for ours, theirs, scale in zip(*results, (1, 32, 32, 1024), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=30 * tolerance * scale)
        assert results[0][0].dtype == dtype


def test_float32_is_accurate_for_large_arguments(compiled):
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([1e-20, 123.456, -9000.5, 3e6, -8e9])])[:, None]
    exact = reference.frequency_encode(x.double(), 8, 8)
    error = (frequency_encode(x, 8).double() - exact)[:, 1:].abs().max()
    assert error < 4e-7
    assert frequency_encode(torch.tensor([[float("nan")]]), 2).isnan().all()


def test_derivatives_by_finite_differences(kind):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    encoder = FreqEncoder(degree=4)
    assert torch.autograd.gradcheck(encoder, x)
    assert torch.autograd.gradgradcheck(encoder, x)


def test_max_level_pads_with_zeros(kind):
    encoder = FreqEncoder(degree=4)
    x = torch.rand(7, 3, requires_grad=True)
    full, half = encoder(x), encoder(x, max_level=0.5)
    assert half.shape == full.shape
    assert torch.equal(half[:, :15], full[:, :15])
    assert not half[:, 15:].any()
    (gradient,) = torch.autograd.grad(half.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(full[:, :15].sum(), x)[0])
    assert torch.equal(encoder(x, max_level=0.0)[:, :3], x) and not encoder(x, max_level=0.0)[:, 3:].any()


def test_shapes_and_types(kind):
    encoder = FreqEncoder(degree=3)
    assert encoder(torch.zeros(2, 5, 4, 3)).shape == (2, 5, 4, 21)
    assert encoder(torch.zeros(0, 3)).shape == (0, 21)
    assert encoder(torch.zeros(2, 3, dtype=torch.float16)).dtype == torch.float32
    wide = torch.rand(6, 8)
    assert torch.equal(encoder(wide[:, ::3]), encoder(wide[:, ::3].contiguous()))
    with pytest.raises(ValueError, match="expects 3 numbers"):
        encoder(torch.zeros(2, 4))


def test_operators_refuse_wrong_arguments(compiled):
    ops = extension.load(freqencoder.FOLDER, "freqencoder").ops
    x = torch.zeros(4, 3)
    for message, call in [
        ("contiguous", lambda: ops.encode(torch.zeros(3, 4).T, None, 2, 2)),
        ("float32 or float64", lambda: ops.encode(x.long(), None, 2, 2)),
        (r"direction must have shape \[4, 3\], got \[3, 3\]", lambda: ops.encode(x, x[:3], 2, 2)),
        ("active", lambda: ops.encode(x, None, 2, 3)),
        (r"grad must have shape \[4, 15\]", lambda: ops.input_gradient(x, x, None, 2, 2)),
        ("grad must be Float", lambda: ops.input_gradient(torch.zeros(4, 15).double(), x, None, 2, 2)),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@CUDA
@pytest.mark.cuda
def test_cuda_equals_reference():
    x = torch.randn(1000, 3, device="cuda", requires_grad=True)
    grad = torch.randn(1000, 39, device="cuda").requires_grad_()
    results = []
    for encode in (frequency_encode, reference.frequency_encode):
        out = encode(x, 6, 5)
        (first,) = torch.autograd.grad(out, x, grad, create_graph=True)
        results.append((out, first, *torch.autograd.grad(first.sum(), (grad, x))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
