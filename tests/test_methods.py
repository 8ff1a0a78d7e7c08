"""What is particular to each method: rankings, prefixes, class prototypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import small_config

from vhabl import methods
from vhabl.data import load as load_data
from vhabl.errors import VhablError
from vhabl.evaluator import batches_in_order
from vhabl.layers import Dropout, FusedHashNet, FusedNetSettings, PrototypeAttention
from vhabl.losses import similarity
from vhabl.methods.hiamh import HIAMH
from vhabl.methods.vh_abl import VHABL
from vhabl.trainer import Trainer
from vhabl.types import DataSpec, Inputs

CPU = torch.device("cpu")


@pytest.fixture
def vh_abl(feature_file: Path) -> tuple[VHABL, Trainer]:
    config = small_config(feature_file, "vh_abl")
    trainer = Trainer(config, load_data(config.data), False)
    method = trainer.run()
    assert isinstance(method, VHABL)
    return method, trainer


def test_calibration_ranks_bits_and_changes_nothing_else(feature_file: Path) -> None:
    config = small_config(feature_file, "vh_abl", "model.net.members=1")
    data = load_data(config.data)
    torch.manual_seed(3)
    method = VHABL(data.spec, config.bits, config.model).eval()
    inputs, labels = data.train.inputs(), torch.from_numpy(data.train.labels).float()
    with torch.no_grad():
        before = method.embed(inputs)["fused"]
        weights = method.bit_weights(before).mean(dim=0)
        logits = method.classifier(before)
        distances = before @ torch.tanh(method.centres).T
        method.calibrate(batches_in_order(data.train, CPU))
        after = method.embed(inputs)["fused"]
        order = weights.argsort(descending=True, stable=True)
        assert torch.allclose(after, before[:, order], atol=1e-6)
        assert not torch.equal(order, torch.arange(len(order)))
        assert torch.allclose(method.importance, weights[order], atol=1e-6)
        assert (method.importance.diff() <= 0).all()
        assert torch.allclose(method.bit_weights(after).mean(dim=0), weights[order], atol=1e-5)
        assert torch.allclose(method.classifier(after), logits, atol=1e-5)
        assert torch.allclose(after @ torch.tanh(method.centres).T, distances, atol=1e-5)
    target = 2 * (labels @ labels.T) - 1
    assert torch.allclose(similarity(after, target), similarity(before, target), atol=1e-6)


def test_members_take_turns_in_the_ranking(feature_file: Path) -> None:
    config = small_config(feature_file, "vh_abl", "model.net.members=3")
    data = load_data(config.data)
    torch.manual_seed(3)
    method = VHABL(data.spec, config.bits, config.model).eval()
    inputs = data.train.inputs()
    with torch.no_grad():
        before = method.embed(inputs)["fused"]
        weights = method.bit_weights(before).mean(dim=0)
        method.calibrate(batches_in_order(data.train, CPU))
        after = method.embed(inputs)["fused"]
    order = []
    for turn in range(6):  # the bits of member m are m, m + 3, m + 6 ...
        members = [sorted(range(m, 16, 3), key=lambda i: -weights[i]) for m in range(3)]
        ranked = [bits[turn] for bits in members if turn < len(bits)]
        order += sorted(ranked, key=lambda i: -weights[i])
    assert torch.allclose(after, before[:, order], atol=1e-6)
    assert torch.allclose(method.importance, weights[order], atol=1e-6)


def test_calibrating_twice_is_calibrating_once(vh_abl: tuple[VHABL, Trainer]) -> None:
    method, trainer = vh_abl
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.calibrate(batches_in_order(trainer.train, CPU))
    assert all(torch.allclose(v, before[k], atol=1e-6) for k, v in method.state_dict().items())


def test_shorter_codes_are_prefixes(vh_abl: tuple[VHABL, Trainer]) -> None:
    method, trainer = vh_abl
    inputs = trainer.data.query.inputs()
    whole = method.encode(inputs, 16)["fused"]
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    for bits in (1, 7, 12):
        assert torch.equal(method.encode(inputs, bits)["fused"], whole[:, :bits])
    for bits in (0, 17):
        with pytest.raises(VhablError, match=f"found {bits}; expected a code length from 1 to 16"):
            method.encode(inputs, bits)


def test_bit_weights_are_positive_with_mean_one(vh_abl: tuple[VHABL, Trainer]) -> None:
    method, _ = vh_abl
    w = method.bit_weights(torch.randn(50, 16).tanh())
    assert (w > 0).all() and torch.allclose(w.mean(dim=1), torch.ones(50), atol=1e-5)


def test_importance_is_trained(feature_file: Path) -> None:
    """The release's importance network is in no loss; ours gets gradients from two terms."""
    config = small_config(feature_file, "vh_abl")
    data = load_data(config.data)
    torch.manual_seed(0)
    method = VHABL(data.spec, config.bits, config.model)
    batch = next(batches_in_order(data.train, CPU))
    method.loss(batch)["importance"].backward()
    assert method.importance_out.weight.grad is not None
    assert method.importance_out.weight.grad.abs().max() > 0


def test_hierarchical_weights_fall_whatever_theta_is(feature_file: Path) -> None:
    config = small_config(feature_file, "hiamh")
    data = load_data(config.data)
    method = HIAMH(data.spec, config.bits, config.model)
    for scale in (0.0, 1.0, 30.0):
        with torch.no_grad():
            method.theta.copy_(scale * torch.randn(16))
        w = method.bit_weights().detach()
        assert (w >= 0).all() and (w.diff() <= 0).all()
        assert w.mean() == pytest.approx(1, abs=1e-5)
    batch = next(batches_in_order(data.train, CPU))
    torch.nn.init.normal_(method.theta)
    method.loss(batch)["similarity"].backward()
    assert method.theta.grad is not None and method.theta.grad.abs().min() > 0


def fused_net(members: int, bits: int) -> FusedHashNet:
    torch.manual_seed(0)
    spec = DataSpec("x", 12, 9, 4, 60)
    settings = FusedNetSettings(members, dim=8, image_hidden=8, text_hidden=8)
    return FusedHashNet(spec, bits, settings).eval()


def test_members_take_the_bits_in_turn() -> None:
    net, inputs = fused_net(3, 8), Inputs(torch.randn(5, 12), torch.randn(5, 9))
    h, attentions = net(inputs)
    assert [len(a) for a in attentions] == [2, 2, 2]
    assert [b.tolist() for b in net.member_bits()] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    for member, bits in zip(net.members, net.member_bits(), strict=True):
        assert torch.equal(h[:, bits], member(inputs)[0])
    assert len(fused_net(5, 3).members) == 3  # no member without a bit


def test_members_keep_their_bits_when_the_code_is_reordered() -> None:
    net, inputs = fused_net(3, 8), Inputs(torch.randn(5, 12), torch.randn(5, 9))
    before, _ = net(inputs)
    for _ in range(2):
        order = torch.randperm(8)
        net.reorder(order)
        after, _ = net(inputs)
        assert torch.equal(after, before[:, order])
        before = after
        for member, bits in zip(net.members, net.member_bits(), strict=True):
            assert bits.tolist() == sorted(bits.tolist())
            own = member(inputs)[0]
            assert torch.equal(after[:, bits].sort(dim=1).values, own.sort(dim=1).values)


def test_a_member_learns_from_its_own_bits_alone(feature_file: Path) -> None:
    """What one member learns does not depend on another: this keeps their errors apart."""
    config = small_config(feature_file, "hiamh", "model.net.members=2", "model.net.dropout=0")
    data = load_data(config.data)
    torch.manual_seed(0)
    method = HIAMH(data.spec, config.bits, config.model)
    batch = next(batches_in_order(data.train, CPU))
    first, second = method.net.members
    weight = first.hash.weight
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad(sum(method.loss(batch).values()), [weight])
        found.append(grad)
        with torch.no_grad():
            second.hash.weight.mul_(-2.0)
    assert found[0].abs().max() > 0
    assert torch.allclose(found[0], found[1], atol=1e-7)


def test_prototype_attention_looks_at_the_feature() -> None:
    """With one key, as in the release, the softmax is 1 and the query has no effect."""
    torch.manual_seed(0)
    attention = PrototypeAttention(8, 5, 2)
    with torch.no_grad():
        attention.merge.weight.copy_(torch.eye(8, 16).roll(8, dims=1))  # the context alone
    x = 3 * torch.randn(2, 8)
    out, weights = attention(x)
    assert weights.shape == (2, 5)
    assert torch.allclose(weights.exp().sum(dim=1), torch.ones(2), atol=1e-5)
    assert out.shape == (2, 8)
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    single = PrototypeAttention(8, 1, 2)
    with torch.no_grad():
        single.merge.weight.copy_(torch.eye(8, 16).roll(8, dims=1))
    out, _ = single(x)
    assert torch.allclose(out[0], out[1], atol=1e-6)


def test_prototype_attention_starts_as_the_identity() -> None:
    x = torch.randn(4, 8)
    assert torch.allclose(PrototypeAttention(8, 5, 2)(x)[0], x, atol=1e-6)


def test_items_do_not_meet_in_prototype_attention() -> None:
    attention = PrototypeAttention(8, 5, 2)
    torch.nn.init.normal_(attention.merge.weight)
    x = torch.randn(6, 8)
    assert torch.allclose(attention(x)[0][2:3], attention(x[2:3])[0], atol=1e-5)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    dropout, x = Dropout(0.3), torch.ones(200, 200)
    out = dropout(x)
    assert out.mean() == pytest.approx(1, abs=0.02)
    assert (out == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(dropout.eval()(x), x)


def test_every_file_in_methods_is_a_method() -> None:
    assert {"vh_abl", "hiamh", "nested_mlp"} <= set(methods.names())
    assert "base" not in methods.names()
    for name in methods.names():
        assert methods.get(name).title
