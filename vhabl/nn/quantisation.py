"""Signs, and composite quantisation: a vector as the sum of one centre from each of several
dictionaries.

Zhang, Du & Wang, Composite quantization for approximate nearest neighbor search, ICML 2014. M
dictionaries of J centres of width d are one tensor [M, J, d]; the code of a vector is the number of
a centre in each, [N, M]. The inner product of a query with a coded vector is a sum of M entries of
a table, so that a vector takes M log2(J) bits and no vector is rebuilt to be searched.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-3  # keeps the centres of one that nothing takes finite
SWEEPS = 3  # of iterated conditional modes
BLOCK = 16384  # vectors at a time


def binarise(h: Tensor) -> Tensor:
    """Codes of relaxed codes: +1 where h >= 0, else -1, in the shape and type of h."""
    return torch.where(h >= 0, 1.0, -1.0).to(h.dtype)


def begin(x: Tensor, dictionaries: int, centres: int, seed: int = 0) -> Tensor:
    """Centres [M, J, d] from k-means of x [N, d] in each of M sub-spaces, zero in the others:
    product quantisation, where composite quantisation begins. Of fewer vectors than centres some
    centres stay zero.
    """
    import faiss

    result = torch.zeros(dictionaries, centres, x.shape[1])
    for m, columns in enumerate(torch.arange(x.shape[1]).tensor_split(dictionaries)):
        part = x[:, columns.to(x.device)].float().cpu().contiguous().numpy()
        count = min(centres, len(part))
        means = faiss.Kmeans(part.shape[1], count, seed=seed, min_points_per_centroid=1)
        means.train(part)
        result[m, :count, columns] = torch.from_numpy(means.centroids)
    return result.to(x)


def assign(x: Tensor, centres: Tensor, codes: Tensor | None = None) -> Tensor:
    """Codes [N, M] of x [N, d] by iterated conditional modes: the best centre of each dictionary in
    turn, those of the others held.

    codes: where to begin; without them the dictionaries are taken one after another, each for what
    those before it leave.
    """
    parts = []
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        parts.append(_assign(x[rows], centres, None if codes is None else codes[rows]))
    if not parts:
        return torch.zeros(0, len(centres), dtype=torch.int64, device=x.device)
    return torch.cat(parts)


def _assign(x: Tensor, centres: Tensor, codes: Tensor | None) -> Tensor:
    half = centres.square().sum(dim=2) / 2  # (M, J)

    def nearest(rest: Tensor, m: int) -> Tensor:
        return (half[m] - rest @ centres[m].T).argmin(dim=1)

    if codes is not None:
        codes, rest = codes.clone(), x - rebuild(codes, centres)
    else:
        codes, rest = torch.zeros(len(x), len(centres), dtype=torch.int64, device=x.device), x
        for m, dictionary in enumerate(centres):
            codes[:, m] = nearest(rest, m)
            rest = rest - dictionary[codes[:, m]]
    for _ in range(SWEEPS if len(centres) > 1 else 1):
        for m, dictionary in enumerate(centres):
            rest = rest + dictionary[codes[:, m]]
            codes[:, m] = nearest(rest, m)
            rest = rest - dictionary[codes[:, m]]
    return codes


def solve(x: Tensor, codes: Tensor, centres: int) -> Tensor:
    """The centres [M, J, d] that rebuild x [N, d] best from codes [N, M]: (h^T h + eps I)^-1 h^T x,
    h [N, M J] the codes as zeros and ones.
    """
    m = codes.shape[1]
    gram = x.new_zeros(m, centres, m, centres, dtype=torch.float64)  # how often two meet
    sums = x.new_zeros(m, centres, x.shape[1], dtype=torch.float64)
    for i, one in enumerate(codes.T):
        sums[i].index_add_(0, one, x.double())
        for j, other in enumerate(codes.T):
            pairs = (one * centres + other).bincount(minlength=centres**2)
            gram[i, :, j] = pairs.view(centres, centres)
    gram = gram.view(m * centres, -1)
    gram.diagonal().add_(EPSILON)
    factor = torch.linalg.cholesky(gram)
    found = torch.cholesky_solve(sums.flatten(0, 1), factor).view(m, centres, -1)
    return found.to(x.dtype).contiguous()  # ranks can send nothing else


def rebuild(codes: Tensor, centres: Tensor) -> Tensor:
    """The vectors [N, d] that codes [N, M] stand for."""
    return torch.stack([c[codes[:, m]] for m, c in enumerate(centres)]).sum(dim=0)


def tables(query: Tensor, centres: Tensor) -> Tensor:
    """Inner products of queries [..., d] with every centre: [..., M, J].

    The inner product with a coded vector is the sum of its M entries (asymmetric distance
    computation, Jegou et al., TPAMI 2011).
    """
    return torch.einsum("...d,mjd->...mj", query, centres)


def scores(table: Tensor, codes: Tensor) -> Tensor:
    """Inner products [..., N] of queries with coded vectors, from tables [..., M, J] and codes
    [..., N, M].
    """
    return table.gather(-1, codes.mT).sum(dim=-2)
