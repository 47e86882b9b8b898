"""Hash grid: an independent interpolation, the compiled kernels against the twin, first and second derivatives."""

import itertools
import types

import pytest
import torch
from torch.nn.functional import grid_sample

import extension
import gridencoder
from gridencoder import GridEncoder, grid_encode, grid_spec, reference

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["compiled", "reference"])
def kind(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setenv("SOMNIUM_KERNELS", "reference")
    elif extension.load(gridencoder.FOLDER, "gridencoder") is None:
        pytest.skip("no compiled kernels on this machine")
    return request.param


@pytest.fixture
def compiled():
    kernels = extension.load(gridencoder.FOLDER, "gridencoder")
    if kernels is None:
        pytest.skip("no compiled kernels on this machine")
    return kernels


def points(count, dims, dtype=torch.float64, seed=0, device="cpu"):
    """Points in [-1.1, 1.1]^D: some of them outside."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(count, dims, generator=generator, dtype=dtype) * 2.2) - 1.1).to(device)


def table_for(spec, features, dtype=torch.float64, seed=1, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(spec.entries, features, generator=generator, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_dense_level_is_multilinear_interpolation(kind, dims, align_corners):
    resolution = 6
    spec = grid_spec(dims, [resolution], 10, align_corners=align_corners)
    table = table_for(spec, 2)
    x = points(200, dims).clamp(-1, 1)
    volume = table[: resolution**dims].T.reshape(1, 2, *[resolution] * dims)  # the first axis varies fastest, as here
    sites = x.reshape(1, *[1] * (dims - 1), -1, dims)
    expected = grid_sample(volume, sites, mode="bilinear", padding_mode="border", align_corners=align_corners)
    torch.testing.assert_close(grid_encode(x, table, spec), expected.reshape(2, -1).T)


def test_smoothstep_by_hand(kind):
    spec = grid_spec(2, [2], 4, interpolation="smoothstep", align_corners=True)
    table = torch.zeros(spec.entries, 1, dtype=torch.float64)
    table[1] = 1.0  # the vertex (1, 0)
    x = torch.tensor([[-0.5, -1.0], [0.0, 0.0], [0.5, 0.5]], dtype=torch.float64)  # fractions 1/4, 1/2, 3/4
    smooth = [0.25**2 * 2.5, 0.5, 0.75**2 * 1.5]
    expected = [smooth[0], smooth[1] * 0.5, smooth[2] * (1 - smooth[2])]
    torch.testing.assert_close(grid_encode(x, table, spec)[:, 0], torch.tensor(expected, dtype=torch.float64))


def test_points_outside_give_zeros_and_no_gradient(kind):
    encoder = GridEncoder(num_levels=2, log2_hashmap_size=8, base_resolution=4, desired_resolution=8)
    x = torch.tensor([[0.0, 0.0, 1.5], [float("nan"), 0.0, 0.0], [0.1, 0.2, -0.3]], requires_grad=True)
    out = encoder(x)
    assert not out[:2].any() and out[2].all()
    out.sum().backward()
    assert not x.grad[:2].any() and x.grad[2].any()
    assert encoder(torch.full((1, 3), 1.9), bound=2.0).all(), "bound moves the border"


def everything(encode, x, table, spec, active):
    """Value, first derivatives, and the derivatives of these in everything, as one list."""
    out = encode(x, table, spec, active, 1.0)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape).requires_grad_()
    first = torch.autograd.grad(out, (x, table), weight, create_graph=True)
    results = [out, *first]
    for value, inputs in [(first[0], (weight, x, table)), (first[1], (weight, x))]:
        v = torch.linspace(1, -1, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
        second = torch.autograd.grad(value, inputs, v, retain_graph=True, allow_unused=True)
        results += [torch.zeros_like(i) if s is None else s for s, i in zip(second, inputs, strict=True)]
    return results


@pytest.mark.parametrize("interpolation", ["linear", "smoothstep"])
@pytest.mark.parametrize("gridtype", ["hash", "tiled"])
@pytest.mark.parametrize(("dims", "features"), [(2, 8), (3, 1), (3, 2), (3, 4), (4, 2), (5, 4)])
def test_compiled_equals_reference(compiled, dims, features, gridtype, interpolation):
    spec = grid_spec(dims, [3, 4, 9, 17], 8, gridtype, interpolation, align_corners=features == 2)
    assert not spec.levels[3].hashed if gridtype == "tiled" else spec.levels[3].hashed
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.float16, 4e-3)]:
        x = points(37, dims, torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        table = table_for(spec, features, dtype).requires_grad_()
        ours = everything(grid_encode, x, table, spec, active=3)
        theirs = everything(reference.grid_encode, x, table, spec, active=3)
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.dtype == b.dtype
            error = (a - b).abs().max() / b.abs().max().clamp(min=1e-3)
            assert error < tolerance, f"result {number} in {dtype} differs by {error:.1e}"


@pytest.mark.parametrize("count", [0, 1, 7, 8, 511, 513, 2000])
def test_odd_numbers_of_points(compiled, count):
    spec = grid_spec(3, [4, 12, 31], 10)
    x, table = points(count, 3, torch.float32).requires_grad_(), table_for(spec, 2, torch.float32).requires_grad_()
    results = []
    for encode in (grid_encode, reference.grid_encode):
        out = encode(x, table, spec, 3)
        results.append([out, *torch.autograd.grad((out * torch.arange(6)).sum(), (x, table))])
    assert results[0][0].shape == (count, 6)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("interpolation", ["linear", "smoothstep"])
def test_derivatives_by_finite_differences(kind, interpolation):
    spec = grid_spec(3, [2, 5], 4, interpolation=interpolation)
    table = table_for(spec, 2).requires_grad_()
    # Inside of cells and of the border: finite differences know nothing of kinks.
    cells = torch.tensor([[1, 2, 3], [4, 4, 2]], dtype=torch.float64)
    x = ((cells + 0.13) / 5 * 2 - 1 + torch.tensor([0.03, 0.0, -0.02])).requires_grad_()

    def encode(x, table):
        return grid_encode(x, table, spec)

    assert torch.autograd.gradcheck(encode, (x, table))
    assert torch.autograd.gradgradcheck(encode, (x, table))


def test_beyond_the_outermost_vertices_the_derivative_is_zero(kind):
    spec = grid_spec(2, [4], 8)
    x = torch.tensor([[0.9, 0.3], [-0.9, 0.3]], dtype=torch.float64, requires_grad=True)  # last vertex: +-0.75
    gradient = torch.autograd.grad(grid_encode(x, table_for(spec, 2), spec).sum(), x)[0]
    assert not gradient[:, 0].any() and gradient[:, 1].all()


def test_normals_do_not_pay_for_the_table(compiled, monkeypatch):
    """autograd.grad(y, x) must not compute the table's gradient; a full backward must."""
    calls = []
    names = ("encode", "input_gradient", "table_gradient")
    spies = {n: (lambda *a, n=n: (calls.append(n), getattr(compiled.ops, n)(*a))[1]) for n in names}
    monkeypatch.setattr(extension, "ops_for", lambda *_: types.SimpleNamespace(**spies))
    spec = grid_spec(3, [4, 8], 8)
    x, table = points(10, 3).requires_grad_(), table_for(spec, 2).requires_grad_()
    out = grid_encode(x, table, spec)
    (normal,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert calls == ["encode", "input_gradient"]
    normal.square().sum().backward(inputs=[table])
    assert calls[2:] == ["table_gradient"] and table.grad.any()


def test_max_level_mask(kind):
    encoder = GridEncoder(num_levels=4, log2_hashmap_size=8, base_resolution=4, desired_resolution=32)
    x = points(20, 3, torch.float32) * 0.9
    full = encoder(x)
    for fraction, levels in [(0.0, 1), (0.25, 1), (0.26, 2), (0.75, 3), (1.0, 4)]:
        out = encoder(x, max_level=fraction)
        assert torch.equal(out[:, : 2 * levels], full[:, : 2 * levels]) and not out[:, 2 * levels :].any()
    encoder(x, max_level=0.5).sum().backward()
    third = encoder.spec.levels[2].offset
    assert encoder.embeddings.grad[:third].any() and not encoder.embeddings.grad[third:].any()


def test_many_threads_for_few_levels(compiled):
    spec = grid_spec(3, [8, 20], 12)
    x, grad = points(9000, 3, torch.float32), torch.randn(9000, 4)
    how = (spec.numbers, 2, 2, False, False, 1.0)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 7, 7):
            torch.set_num_threads(number)
            results.append(compiled.ops.table_gradient(grad, x, None, *how))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)


def test_every_half_survives(compiled):
    """Every finite float16, subnormal ones too, as a table's entry; and the rounding of what lies between two."""
    spec = grid_spec(2, [256], 16, align_corners=True)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    table = torch.where(halves.isfinite(), halves, 0)[:, None]
    axis = torch.arange(256)
    vertex = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)
    x = (vertex.double() / 255 * 2 - 1).float()
    at = x.add(1).mul(0.5).mul(255)
    exact = (at == vertex).all(dim=1)  # where float32 meets the vertex exactly
    assert exact.float().mean() > 0.2
    assert torch.equal(grid_encode(x, table, spec)[exact], table[exact])
    table = torch.tensor([0.0, 3e-8, 6e-8, 1.0, 1.0009765625, 2049.0, 65504.0, -65504.0], dtype=torch.float16)[:, None]
    spec = grid_spec(2, [2], 3, align_corners=True)
    x = torch.tensor([[0.0, -1.0], [0.0, 1.0], [0.0, 0.0], [-0.5, 0.25], [0.25, 0.125]])
    assert torch.equal(grid_encode(x, table, spec), reference.grid_encode(x, table, spec, 1))


@pytest.mark.parametrize("gridtype", ["hash", "tiled"])
def test_total_variation_is_the_gradient_of_an_explicit_loss(kind, gridtype):
    encoder = GridEncoder(2, 3, 2, 4, 6, 12, gridtype, align_corners=True).double()
    torch.nn.init.normal_(encoder.embeddings)
    x = points(50, 2)
    encoder.grad_total_variation(0.7, x)

    table, loss = encoder.embeddings.detach().clone().requires_grad_(), 0.0
    for level, point in itertools.product(encoder.spec.levels, x[(x.abs() <= 1).all(dim=1)]):
        R = level.resolution
        vertex = [int((float(p) + 1) / 2 * (R - 1) + 0.5) for p in point]
        near = [(vertex[0] + i, vertex[1] + j) for i, j in [(-1, 0), (1, 0), (0, -1), (0, 1)]]
        near = [v for v in near if 0 <= min(v) and max(v) < R]  # a vertex of the border has fewer neighbours
        rows = reference.rows(level, torch.tensor([vertex, *near]))
        steps = table[rows[0]] - table[rows[1:]].detach()
        loss = loss + 0.7 / 4 * ((steps**2).sum(dim=0) + 1e-9).sqrt().sum()
    expected = torch.autograd.grad(loss, table)[0]
    torch.testing.assert_close(encoder.embeddings.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_total_variation_compiled_equals_reference(compiled, dtype, monkeypatch):
    gradients = []
    for mode in ("auto", "reference"):
        monkeypatch.setenv("SOMNIUM_KERNELS", mode)
        encoder = GridEncoder(3, 4, 4, 4, 8, 20).to(dtype)
        encoder.embeddings.data = table_for(encoder.spec, 4, dtype)
        encoder.grad_total_variation(1e-3, points(300, 3, torch.float32))
        encoder.grad_total_variation(1e-3, points(300, 3, torch.float32))
        gradients.append(encoder.embeddings.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_total_variation_of_drawn_points_counts_as_a_million(kind, monkeypatch):
    monkeypatch.setattr(gridencoder, "VARIATION_SAMPLES", 4000)
    encoder = GridEncoder(2, 1, 1, 4, 6, 4, align_corners=False)
    with torch.no_grad():
        encoder.embeddings.copy_(torch.arange(16)[:, None] % 4)  # value = first coordinate: steps of 1
    encoder.grad_total_variation(1.0, bound=3.0, generator=torch.Generator().manual_seed(0))
    # At a border: one step of 1 along the axis and up to two of 0 across: +-1, for 1/16 of a million points, over 2 D.
    gradient = encoder.embeddings.grad.reshape(4, 4).mean(dim=0) * 4 * 16 / 1e6
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.0, 0.0, 1.0]), atol=0.1, rtol=0)


def test_weight_decay_is_the_gradient_of_the_levels_means(kind):
    encoder = GridEncoder(3, 3, 2, 4, 8, 16)
    torch.nn.init.normal_(encoder.embeddings)
    for _ in range(2):  # adds up
        encoder.grad_weight_decay(0.3)
    table = encoder.embeddings.detach().clone().requires_grad_()
    loss = sum(0.3 * table[v.offset : v.offset + v.entries].square().sum() / v.entries for v in encoder.spec.levels)
    torch.testing.assert_close(encoder.embeddings.grad, 2 * torch.autograd.grad(loss, table)[0])


def test_levels_and_their_sizes():
    encoder = GridEncoder()
    resolutions = [level.resolution for level in encoder.spec.levels]
    assert resolutions[:6] == [16, 23, 31, 43, 59, 81] and resolutions[-1] == 2048
    assert [level.hashed for level in encoder.spec.levels] == [False] * 5 + [True] * 11
    assert [level.entries for level in encoder.spec.levels][:6] == [4096, 12168, 29792, 79512, 205384, 524288]
    assert encoder.embeddings.shape == (encoder.spec.entries, 2) and encoder.output_dim == 32
    assert encoder.embeddings.abs().max() <= 1e-4
    vertices = torch.cartesian_prod(*[torch.arange(16)] * 3)
    assert len(set(reference.rows(encoder.spec.levels[0], vertices).tolist())) == 4096, "dense: no two share a row"
    x = torch.tensor([[3, 5, 7]])
    assert reference.rows(encoder.spec.levels[5], x).item() == encoder.spec.levels[5].offset + (
        (3 ^ (5 * 2654435761 % 2**32) ^ (7 * 805459861 % 2**32)) % 2**19
    )


@pytest.mark.parametrize(
    "wrong", [{"input_dim": 6}, {"level_dim": 3}, {"base_resolution": 1}, {"gridtype": "dense"}, {"num_levels": 0}]
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GridEncoder(**wrong)


def test_shapes_and_types(kind):
    encoder = GridEncoder(num_levels=2, log2_hashmap_size=8, base_resolution=4, desired_resolution=8)
    assert encoder(torch.zeros(2, 5, 3)).shape == (2, 5, 4)
    assert encoder(torch.zeros(0, 3)).shape == (0, 4)
    encoder(torch.zeros(0, 3)).sum().backward()
    assert not encoder.embeddings.grad.any()
    assert encoder(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float32
    assert encoder.double()(torch.zeros(2, 3)).dtype == torch.float64
    with pytest.raises(ValueError, match="expects 3 numbers"):
        encoder(torch.zeros(2, 2))


def test_operators_refuse_wrong_arguments(compiled):
    spec = grid_spec(3, [4, 8], 8)
    x, table = torch.zeros(5, 3), torch.zeros(spec.entries, 2)
    how = (2, False, False, 1.0)
    encode, numbers = compiled.ops.encode, spec.numbers
    for message, call in [
        ("table must have shape", lambda: encode(x, table[:-8], None, numbers, *how)),
        ("1, 2, 4 or 8 features", lambda: encode(x, torch.zeros(spec.entries, 3), None, numbers, *how)),
        ("x must be Float", lambda: encode(x.double(), table, None, numbers, *how)),
        ("x must be contiguous", lambda: encode(torch.zeros(3, 5).T, table, None, numbers, *how)),
        ("levels must hold", lambda: encode(x, table, None, numbers[:-1], *how)),
        ("must fit into its", lambda: encode(x, table, None, [0, 8, 4, 2**32 - 1, 0, 1, 4, 16], 1, *how[1:])),
        ("active", lambda: encode(x, table, None, numbers, 3, *how[1:])),
        ("grad must have shape", lambda: compiled.ops.input_gradient(x, x, table, None, numbers, *how)),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@CUDA
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("dims", [2, 3, 5])
def test_cuda_equals_reference(dims, dtype):
    spec = grid_spec(dims, [3, 4, 9, 17], 8, interpolation="smoothstep")
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x = points(1000, dims, real, device="cuda").requires_grad_()
    table = table_for(spec, 2, dtype, device="cuda").requires_grad_()
    ours = everything(grid_encode, x, table, spec, active=3)
    theirs = everything(reference.grid_encode, x, table, spec, active=3)
    for a, b in zip(ours, theirs, strict=True):
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-3)
        assert error < {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 1e-2}[dtype]
