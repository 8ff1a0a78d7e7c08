"""Composite quantisation against its definitions, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vhabl.nn import quantisation


def vectors(count: int = 200, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def error(x: torch.Tensor, codes: torch.Tensor, centres: torch.Tensor) -> float:
    return float((x - quantisation.rebuild(codes, centres)).square().sum())


def test_dictionaries_begin_as_means_of_sub_spaces() -> None:
    x = vectors()
    centres = quantisation.begin(x, 3, 8)
    assert centres.shape == (3, 8, 6)
    for m in range(3):
        own = torch.zeros(6, dtype=torch.bool)
        own[2 * m : 2 * m + 2] = True
        assert (centres[m][:, ~own] == 0).all()
        nearest = torch.cdist(x[:, own], centres[m][:, own]).argmin(dim=1)
        means = torch.stack([x[nearest == j][:, own].mean(dim=0) for j in range(8)])
        assert torch.allclose(means, centres[m][:, own], atol=0.15)
    assert torch.equal(quantisation.begin(x, 3, 8), centres)  # seeded
    uneven = quantisation.begin(vectors(dim=7), 3, 4)
    assert [int((c != 0).any(dim=0).sum()) for c in uneven] == [3, 2, 2]


def test_fewer_vectors_than_centres_are_their_own() -> None:
    x = vectors(7)
    centres = quantisation.begin(x, 1, 9)
    assert torch.allclose(torch.cdist(x, centres[0]).min(dim=1).values, torch.zeros(7), atol=1e-5)
    assert (centres[0, 7:] == 0).all()


def test_codes_are_conditional_modes() -> None:
    """No other centre of the dictionary that was chosen last is nearer, and no round is worse."""
    x, centres = vectors(), vectors(3 * 5, 6, 1).view(3, 5, 6)
    codes = quantisation.assign(x, centres)
    assert codes.shape == (200, 3) and codes.dtype == torch.int64
    held = codes.clone()
    choices = []
    for j in range(5):
        held[:, 2] = j
        choices.append((x - quantisation.rebuild(held, centres)).square().sum(dim=1))
    assert torch.equal(torch.stack(choices).argmin(dim=0), codes[:, 2])
    again = quantisation.assign(x, centres, codes)
    greedy = torch.zeros_like(codes)
    rest = x
    for m in range(3):
        greedy[:, m] = torch.cdist(rest, centres[m]).argmin(dim=1)
        rest = rest - centres[m][greedy[:, m]]
    assert error(x, again, centres) <= error(x, codes, centres) < error(x, greedy, centres)
    start = torch.randint(5, (200, 3), generator=torch.Generator().manual_seed(3))
    before = start.clone()
    assert error(x, quantisation.assign(x, centres, start), centres) < error(x, start, centres)
    assert torch.equal(start, before)  # what is given stays as it is


def test_one_dictionary_takes_the_nearest_centre() -> None:
    x, centres = vectors(), vectors(9, 6, 1)[None]
    nearest = torch.cdist(x, centres[0]).argmin(dim=1)
    assert torch.equal(quantisation.assign(x, centres)[:, 0], nearest)
    assert torch.equal(quantisation.assign(x, centres, torch.zeros(200, 1).long())[:, 0], nearest)
    assert quantisation.assign(x[:0], centres).shape == (0, 1)


@pytest.mark.parametrize("begun", [False, True])
def test_blocks_change_nothing(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, centres = vectors(), vectors(3 * 5, 6, 1).view(3, 5, 6)
    start = torch.randint(5, (200, 3)) if begun else None
    whole = quantisation.assign(x, centres, start)
    monkeypatch.setattr(quantisation, "BLOCK", 33)
    assert torch.equal(quantisation.assign(x, centres, start), whole)


def test_centres_are_the_regularised_least_squares() -> None:
    x, codes = vectors().double(), torch.randint(4, (200, 3))
    codes[codes[:, 1] == 2, 1] = 1  # a centre that nothing takes
    h = torch.nn.functional.one_hot(codes, 4).double().flatten(1)
    expected = torch.linalg.solve(h.T @ h + 1e-3 * torch.eye(12), h.T @ x)
    found = quantisation.solve(x, codes, 4)
    assert torch.allclose(found, expected.view(3, 4, 6), atol=1e-8)
    assert (found[1, 2] == 0).all()
    assert quantisation.solve(x.float(), codes, 4).dtype == torch.float32
    for y in (x, x.float()):  # NCCL sends no other
        assert quantisation.solve(y, codes, 4).is_contiguous()


def test_a_vector_is_the_sum_of_its_centres() -> None:
    centres = torch.arange(12.0).view(2, 3, 2)
    codes = torch.tensor([[0, 2], [1, 0]])
    assert quantisation.rebuild(codes, centres).tolist() == [[10, 12], [8, 10]]
    query = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    expected = query @ quantisation.rebuild(codes, centres).T
    tables = quantisation.tables(query, centres)
    assert tables.shape == (2, 2, 3)
    for row, table in zip(expected, tables, strict=True):
        assert np.allclose(quantisation.scores(table, codes), row)
    assert torch.equal(quantisation.tables(query[1], centres), tables[1])
