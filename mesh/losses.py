"""What a good surface should look like whatever the prompt: regularisers of triangles and of signed distances."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

SLIVER = 1e-4  # a triangle with less than this share of the mean area has no normal worth following
_TINY = 1e-30  # under a square root: keeps the gradient at 0 finite (and 0)


def normal_consistency(vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> Float[Tensor, ""]:
    """Neighbouring faces look the same way: mean of 1 - n_i . n_j over the edges that two faces share, n the faces' unit normals.

    As stable-dreamfusion's, but boundary edges are left out, and so are edges of degenerate faces (area below 1e-4 of the mean): their
    normals are noise, and the gradient of it grows with 1 / height. 0 for a mesh without such edges.
    """
    a, b, c = vertices[faces].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    size = normal.detach().norm(dim=1)
    pairs = adjacency(faces)
    pairs = pairs[(size > SLIVER * size.mean())[pairs].all(1)]
    if not len(pairs):
        return vertices.sum() * 0
    first, second = F.normalize(normal[pairs].transpose(0, 1), dim=-1)
    return (1 - (first * second).sum(-1)).mean()


def laplacian(vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> Float[Tensor, ""]:
    """Vertices lie amid their neighbours: mean |m_i - v_i|, m_i the plain mean of the vertices joined to v_i by an edge.

    The uniform Laplacian divided by the degree, so that the value is a length whatever the valence (stable-dreamfusion's D - A gives about
    six times as much). Vertices without a face do not count.
    """
    a, b = edges_of(faces, len(vertices)).unbind(1)
    ends, others = torch.cat([a, b]), torch.cat([b, a])
    total = torch.zeros_like(vertices).index_add(0, ends, vertices[others])
    degree = torch.bincount(ends, minlength=len(vertices))[:, None]
    shift = (total / degree.clamp(min=1) - vertices)[degree[:, 0] > 0]
    return shift.square().sum(1).clamp(min=_TINY).sqrt().sum() / max(len(shift), 1)


def eikonal(gradient: Float[Tensor, "*N 3"]) -> Float[Tensor, ""]:
    """A field is a distance: mean (|grad s| - 1)^2 over the points (Gropp et al. 2020, equation 2)."""
    length = gradient.square().sum(-1).clamp(min=_TINY).sqrt()
    return (length - 1).square().sum() / max(length.numel(), 1)


def sign_changes(sdf: Float[Tensor, "V"], edges: Int[Tensor, "E 2"]) -> Float[Tensor, ""]:
    """Little surface, no floating crumbs: over the edges (a, b) whose ends differ in sign, the mean of H(s_a, sign s_b) + H(s_b, sign s_a).

    H is the binary cross-entropy of sigmoid(s) with the other end's side, 0 counting as outside: each end is drawn to the other's sign
    (nvdiffrec, Munkberg et al. 2022, equation 2, there a sum of the same terms). 0 where nothing changes sign.
    """
    outside = sdf.detach() >= 0
    a, b = edges.unbind(1)
    crossing = outside[a] != outside[b]
    a, b = a[crossing], b[crossing]
    values, sides = sdf[torch.cat([a, b])], outside[torch.cat([b, a])].to(sdf.dtype)
    return F.binary_cross_entropy_with_logits(values, sides, reduction="sum") / max(len(a), 1)


def adjacency(faces: Int[Tensor, "F 3"]) -> Int[Tensor, "P 2"]:
    """Pairs of faces that share an edge. Boundary edges give none; an edge with n > 2 faces (not a manifold) gives n - 1 pairs."""
    key, face = _sorted_edges(faces, int(faces.max()) + 1 if len(faces) else 0)
    pairs = torch.stack([face[:-1], face[1:]], 1)[key[1:] == key[:-1]]
    return pairs[pairs[:, 0] != pairs[:, 1]]  # a face that names one vertex twice is its own neighbour


def edges_of(faces: Int[Tensor, "F 3"], vertices: int) -> Int[Tensor, "E 2"]:
    """Every edge of the triangles once, smaller vertex first, in ascending order; `vertices` is how many there are."""
    key, _ = _sorted_edges(faces, vertices)
    key = torch.unique_consecutive(key)
    edges = torch.stack([torch.div(key, max(vertices, 1), rounding_mode="floor"), key % max(vertices, 1)], 1)
    return edges[edges[:, 0] != edges[:, 1]]


def _sorted_edges(faces: Int[Tensor, "F 3"], vertices: int) -> tuple[Int[Tensor, "E"], Int[Tensor, "E"]]:
    """The three edges of every face as smaller vertex * vertices + larger one, sorted, and the face each belongs to."""
    a = faces.long()
    b = a.roll(-1, 1)
    key = (torch.minimum(a, b) * vertices + torch.maximum(a, b)).reshape(-1)
    key, order = torch.sort(key, stable=True)
    return key, torch.div(order, 3, rounding_mode="floor")
