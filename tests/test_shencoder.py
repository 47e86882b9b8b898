"""Spherical harmonics against scipy, against their orthonormality, and by finite differences."""

import math

import pytest
import torch
from scipy.special import roots_legendre, sph_harm_y

import extension
import shencoder
from shencoder import SHEncoder, reference


@pytest.fixture(params=["auto", "reference"], ids=["compiled", "twin"])
def backend(request, monkeypatch):
    """Runs a test on the compiled kernels and on their twin."""
    monkeypatch.setenv("SOMNIUM_KERNELS", request.param)
    if request.param == "auto" and extension.load(shencoder.FOLDER, "shencoder") is None:
        pytest.skip("no C++ compiler here")
    return request.param


@pytest.fixture
def compiled():
    if extension.load(shencoder.FOLDER, "shencoder") is None:
        pytest.skip("no C++ compiler here")


def directions(count, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=g, dtype=dtype), dim=-1)


def test_first_columns_by_hand(backend):
    x, y, z = direction = directions(1)[0]
    columns = SHEncoder(degree=3)(direction[None])[0]
    a, b = math.sqrt(3 / (4 * math.pi)), math.sqrt(15 / (4 * math.pi))
    expected = [math.sqrt(1 / (4 * math.pi)), -a * y, a * z, -a * x, b * x * y, -b * y * z]
    expected += [b / math.sqrt(12) * (3 * z * z - 1), -b * x * z, b / 2 * (x * x - y * y)]
    torch.testing.assert_close(columns, torch.tensor(expected).double())


@pytest.mark.parametrize("degree", range(1, 9))
def test_against_scipy(backend, degree):
    direction = directions(37)
    polar, azimuth = torch.acos(direction[:, 2]).numpy(), torch.atan2(direction[:, 1], direction[:, 0]).numpy()
    expected = []
    for l in range(degree):
        for m in range(-l, l + 1):
            value = sph_harm_y(l, abs(m), polar, azimuth)
            expected.append(value.real if m == 0 else math.sqrt(2) * (value.real if m > 0 else value.imag))
    encoder = SHEncoder(degree=degree)
    columns = encoder(direction)
    assert columns.shape == (37, encoder.output_dim) == (37, degree**2)
    torch.testing.assert_close(columns, torch.stack([torch.from_numpy(e) for e in expected], 1))


def test_orthonormal_on_the_sphere(backend):
    """Gauss-Legendre in z times an even spacing in azimuth integrates these products exactly."""
    nodes, weights = (torch.from_numpy(x) for x in roots_legendre(8))
    azimuth = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    ring = (1 - nodes**2).sqrt()[:, None]
    points = torch.stack([ring * azimuth.cos(), ring * azimuth.sin(), nodes[:, None].expand(8, 16)], -1)
    area = weights[:, None].expand(8, 16) * (2 * math.pi / 16)
    columns = SHEncoder(degree=8)(points)
    gram = torch.einsum("ijk,ijl,ij->kl", columns, columns, area)
    torch.testing.assert_close(gram, torch.eye(64, dtype=torch.float64))


def test_poles_are_ordinary_points(backend):
    poles = torch.tensor([[0.0, 0, 1], [0, 0, -1]], requires_grad=True)
    columns = SHEncoder(degree=5)(poles)
    for l in range(5):
        for m in range(-l, l + 1):
            expected = math.sqrt((2 * l + 1) / (4 * math.pi)) if m == 0 else 0.0
            torch.testing.assert_close(columns[:, l * l + l + m], torch.tensor([expected, (-1) ** l * expected]))
    (gradient,) = torch.autograd.grad(columns.sum(), poles)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("degree", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_equals_its_twin(compiled, degree, dtype):
    """Values, gradient and the gradient's gradients, for a number of points that no vector divides."""
    x = directions(101, dtype).requires_grad_()
    g = torch.Generator().manual_seed(1)
    a = torch.randn(101, degree**2, generator=g, dtype=dtype).requires_grad_()
    b = torch.randn(101, 3, generator=g, dtype=dtype)
    results = []
    for function in shencoder.spherical_harmonics, reference.spherical_harmonics:
        y = function(x, degree)
        (gradient,) = torch.autograd.grad(y, x, a, create_graph=True)
        results.append([y, gradient, *torch.autograd.grad((gradient * b).sum(), [a, x], allow_unused=True)])
    tolerance = {"rtol": 1e-4, "atol": 2e-4} if dtype == torch.float32 else {}
    for fast, plain in zip(*results, strict=True):
        if plain is None:  # a constant has no second derivative: the compiled one says zero
            assert fast is None or (fast == 0).all()
        else:
            torch.testing.assert_close(fast, plain, **tolerance)


@pytest.mark.parametrize("degree", [2, 5])
def test_derivatives_by_finite_differences(backend, degree):
    x = directions(2).requires_grad_()
    assert torch.autograd.gradcheck(SHEncoder(degree=degree), x)
    assert torch.autograd.gradgradcheck(SHEncoder(degree=degree), x)


def test_shapes_and_precision(backend):
    encoder = SHEncoder(degree=4)
    assert encoder(directions(6).view(2, 3, 3)).shape == (2, 3, 16)
    assert encoder(directions(1)[0]).shape == (16,)
    x = torch.zeros(0, 3, requires_grad=True)
    encoder(x).sum().backward()
    assert x.grad.shape == (0, 3)
    direction = directions(50)
    single = encoder(direction.float())
    assert single.dtype == encoder(direction.half()).dtype == torch.float32
    torch.testing.assert_close(single.double(), encoder(direction), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"degree": 0}, {"degree": 9}, {"input_dim": 2}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="input_dim = 3 and degree 1 .. 8"):
        SHEncoder(**arguments)
