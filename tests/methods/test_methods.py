"""What is particular to each method: rankings, prefixes, class prototypes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pair_config, small_config, write_pair_folder

from vhabl import methods
from vhabl.config import build_method
from vhabl.data import load as load_data
from vhabl.evaluation.records import batches_in_order
from vhabl.methods.base import mean_terms
from vhabl.methods.cmcl import CMCL
from vhabl.methods.hiamh import HIAMH
from vhabl.methods.hq import HQ
from vhabl.methods.pghmh import PGHMH, TEMPLATES, ResponseNorm
from vhabl.methods.vh_abl import VHABL
from vhabl.nn import quantisation
from vhabl.nn.layers import Dropout, FusedHashNet, FusedNetSettings, PrototypeAttention, StandIn
from vhabl.nn.losses import TARGETS, classification, info_nce, similarity, weighted_similarity
from vhabl.system.errors import VhablError
from vhabl.training.trainer import Trainer
from vhabl.types import Batch, Dataset, Embeddings, Inputs

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
    method = build_method(config, data.spec).eval()
    inputs, labels = data.train.inputs(), torch.from_numpy(data.train.labels).float()
    with torch.no_grad():
        before = method.embed(inputs)["fused"]
        weights = method.bit_weights(before).mean(dim=0)
        logits = method.classifier(before)
        distances = before @ torch.tanh(method.centres).T
        method.calibrate(batches_in_order(method, data.train))
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
    method = build_method(config, data.spec).eval()
    inputs = data.train.inputs()
    with torch.no_grad():
        before = method.embed(inputs)["fused"]
        weights = method.bit_weights(before).mean(dim=0)
        method.calibrate(batches_in_order(method, data.train))
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
    method.calibrate(batches_in_order(method, trainer.train))
    assert all(torch.allclose(v, before[k], atol=1e-6) for k, v in method.state_dict().items())


def test_shorter_codes_are_prefixes(vh_abl: tuple[VHABL, Trainer]) -> None:
    method, trainer = vh_abl
    inputs = trainer.data.query.inputs()
    whole = method.encode(inputs, 16)["fused"]
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    for bits in (1, 7, 12):
        assert torch.equal(method.encode(inputs, bits)["fused"], whole[:, :bits])
    for bits in (0, 17):
        with pytest.raises(
            VhablError, match=f"bits is {bits}, but must be a code length from 1 to 16"
        ):
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
    method = build_method(config, data.spec)
    batch = next(batches_in_order(method, data.train))
    method.loss(batch)["importance"].backward()
    assert method.importance_out.weight.grad is not None
    assert method.importance_out.weight.grad.abs().max() > 0


def test_hierarchical_weights_fall_whatever_theta_is(feature_file: Path) -> None:
    config = small_config(feature_file, "hiamh")
    data = load_data(config.data)
    method = build_method(config, data.spec)
    for scale in (0.0, 1.0, 30.0):
        with torch.no_grad():
            method.theta.copy_(scale * torch.randn(16))
        w = method.bit_weights().detach()
        assert (w >= 0).all() and (w.diff() <= 0).all()
        assert w.mean() == pytest.approx(1, abs=1e-5)
    batch = next(batches_in_order(method, data.train))
    torch.nn.init.normal_(method.theta)
    method.loss(batch)["similarity"].backward()
    assert method.theta.grad is not None and method.theta.grad.abs().min() > 0


def fused_net(members: int, bits: int) -> FusedHashNet:
    torch.manual_seed(0)
    settings = FusedNetSettings(members=members, dim=8, image_hidden=8, text_hidden=8)
    return FusedHashNet(12, 9, 4, bits, settings).eval()


def test_members_take_the_bits_in_turn() -> None:
    net, inputs = fused_net(3, 8), Inputs(torch.randn(5, 12), torch.randn(5, 9))
    h, _ = net(inputs)
    assert [b.tolist() for b in net.member_bits()] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    for member, bits in zip(net.members, net.member_bits(), strict=True):
        assert torch.equal(h[:, bits], member(inputs)[0])
    assert len(fused_net(5, 3).members) == 3  # no member without a bit


def test_a_plain_member_by_its_formula() -> None:
    """A layer for each modality, a joint one, and the codes; BatchNorm by running statistics."""
    torch.manual_seed(0)
    settings = FusedNetSettings(network="plain", members=2, dim=6)
    member = FusedHashNet(4, 3, 5, 8, settings).eval().members[1]
    for name, buffer in member.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    weights = {name: tensor.double().numpy() for name, tensor in member.state_dict().items()}

    def layer(x: np.ndarray, name: str) -> np.ndarray:
        x = x @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"]
        x = (x - weights[f"{name}.1.running_mean"]) / np.sqrt(
            weights[f"{name}.1.running_var"] + 1e-5
        )
        return np.maximum(x * weights[f"{name}.1.weight"] + weights[f"{name}.1.bias"], 0)

    image, text = torch.randn(7, 4), torch.randn(7, 3)
    parts = [layer(image.numpy(), "image"), layer(text.numpy(), "text")]
    joint = layer(np.concatenate(parts, axis=1), "head.0")
    expected = np.tanh(joint @ weights["head.1.weight"].T + weights["head.1.bias"])
    found = member(Inputs(image, text))[0].detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


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
    method = build_method(config, data.spec)
    batch = next(batches_in_order(method, data.train))
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


def test_prototype_attention_by_its_formula() -> None:
    """Two heads of width 4, item by item: an item's feature asks, prototypes answer."""
    torch.manual_seed(0)
    attention, x = PrototypeAttention(8, 5, 2).eval(), 3 * torch.randn(3, 8)
    q, k = attention.query(x), attention.key(attention.prototypes)
    v = attention.value(attention.prototypes)
    found = attention(x)
    for i in range(3):
        parts = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = torch.stack([q[i, head] @ k[c, head] / 2 for c in range(5)])
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(weights[c] * v[c, head] for c in range(5)))
        dense, norm, _ = attention.dense
        y = dense(torch.cat(parts)) / (1 + norm.eps) ** 0.5  # running mean 0, variance 1
        assert torch.allclose(found[i], y.clamp(min=0), atol=1e-5)


def test_modalities_share_what_merges_attention_into_their_features() -> None:
    torch.manual_seed(0)
    settings = FusedNetSettings(dim=8, image_hidden=8, text_hidden=8, prototypes=True)
    (member,) = FusedHashNet(12, 9, 4, 8, settings).eval().members
    seen: list[torch.Tensor] = []
    member.merge.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    inputs = Inputs(torch.randn(5, 12), torch.randn(5, 9))
    member(inputs)
    for x, attend, given in zip(
        (member.image(inputs.image), member.text(inputs.text)), member.attention, seen, strict=True
    ):
        assert torch.allclose(given, torch.cat([x, attend(x)], dim=1))


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


def test_the_longest_length_is_trained_in_whatever_order_lengths_come(feature_file: Path) -> None:
    config = small_config(feature_file, "nested_mlp", "bits=[16,8]")
    data = load_data(config.data)
    method = build_method(config, data.spec)
    assert method.bits == 16


def test_terms_of_a_network_are_means_over_its_members() -> None:
    members = [{"a": torch.tensor(1.0), "b": torch.tensor(4.0)},
               {"a": torch.tensor(2.0), "b": torch.tensor(0.0)}]  # fmt: skip
    assert {k: float(v) for k, v in mean_terms(members).items()} == {"a": 1.5, "b": 2.0}


@pytest.mark.parametrize("name", ["vh_abl", "hiamh"])
def test_a_weight_scales_its_own_term_alone(feature_file: Path, name: str) -> None:
    names = vars(small_config(feature_file, name).model.weights)
    config = small_config(feature_file, name, *(f"model.weights.{term}=0.1" for term in names))
    data = load_data(config.data)
    weights = config.model.weights

    def terms(settings: Any) -> dict[str, float]:
        torch.manual_seed(0)
        method = build_method(replace(config, model=settings), data.spec)
        batch = next(batches_in_order(method, data.train))
        return {k: float(v.detach()) for k, v in method.eval().loss(batch).items()}

    plain = terms(config.model)
    assert plain.keys() == vars(weights).keys()
    for term in plain:
        raised = replace(weights, **{term: 2 * getattr(weights, term)})
        expected = {k: v * (2 if k == term else 1) for k, v in plain.items()}
        assert terms(replace(config.model, weights=raised)) == pytest.approx(expected, rel=1e-5)


def test_the_importance_term_teaches_the_importance_network_alone(feature_file: Path) -> None:
    """It says which bits carry the neighbourhood; it does not bend them."""
    config = small_config(feature_file, "vh_abl")
    data = load_data(config.data)
    torch.manual_seed(0)
    method = build_method(config, data.spec)
    method.loss(next(batches_in_order(method, data.train)))["importance"].backward()
    taught = {name for name, p in method.named_parameters() if p.grad is not None}
    assert taught == {name for name, _ in method.named_parameters() if name.startswith("import")}


def test_training_follows_the_importance_slowly_and_ranks_by_it(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One network: its prefixes start with the bits that matter most so far."""
    config = small_config(feature_file, "vh_abl", "model.net.members=1", "model.momentum=0.75")
    data = load_data(config.data)
    torch.manual_seed(0)
    method = build_method(config, data.spec).eval()
    batch = next(batches_in_order(method, data.train))
    method.importance.copy_(1 + torch.rand(16))
    before = method.importance.clone()
    ranks: list[torch.Tensor] = []
    real = VHABL.member_loss

    def member_loss(
        self: VHABL, h: torch.Tensor, ranked: torch.Tensor, *more: Any
    ) -> dict[str, torch.Tensor]:
        ranks.append(ranked)
        return real(self, h, ranked, *more)

    monkeypatch.setattr(VHABL, "member_loss", member_loss)
    with torch.no_grad():
        now = method.bit_weights(method.embed(batch.inputs)["fused"]).mean(dim=0)
        method.loss(batch)
    expected = 0.75 * before + 0.25 * now
    assert torch.allclose(method.importance, expected, atol=1e-6)
    assert ranks[0].tolist() == expected.argsort(descending=True).tolist()


@pytest.mark.parametrize("name", ["vh_abl", "hiamh"])
def test_a_member_takes_the_parts_of_its_own_bits(feature_file: Path, name: str) -> None:
    """Columns of the classifier, weights of the bits: by the bits' places in the whole code."""
    config = small_config(feature_file, name, "model.net.members=2")
    data = load_data(config.data)
    torch.manual_seed(0)
    method = build_method(config, data.spec).eval()
    batch = next(batches_in_order(method, data.train))
    with torch.no_grad():
        if isinstance(method, HIAMH):
            torch.nn.init.normal_(method.theta)
        h, _ = method.net(method.encoder(batch.inputs))
        bits = method.net.member_bits()[1]
        target, y = TARGETS[config.model.target](batch.labels), batch.labels
        found = method.member_loss(h, bits, y, target)
        if isinstance(method, HIAMH):
            w = method.bit_weights()[bits]
            expected = weighted_similarity(h[:, bits], w / w.mean(), target)
            assert torch.allclose(found["similarity"], config.model.weights.similarity * expected)
        else:
            logits = h[:, bits] @ method.classifier.weight[:, bits].T + method.classifier.bias
            assert torch.allclose(found["classification"], classification(logits, y))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vh_abl", "hiamh"])
def test_each_modality_predicts_the_classes_alone(feature_file: Path, name: str) -> None:
    """Two members: the sum over image and text, the mean over members."""
    config = small_config(feature_file, name, "model.net.members=2", "model.weights.modalities=0.5")
    data = load_data(config.data)
    torch.manual_seed(0)
    method = build_method(config, data.spec).eval()
    batch = next(batches_in_order(method, data.train))
    read, y = method.encoder(batch.inputs), batch.labels
    expected = 0.0
    for number, member in enumerate(method.net.members):
        for view, x in enumerate((member.image(read.image), member.text(read.text))):
            logits = method.predict[2 * number + view](x).double()
            own = torch.stack([row[label.argmax()] for row, label in zip(logits, y, strict=True)])
            expected += float((logits.exp().sum(dim=1).log() - own).mean()) / 2
    assert method.loss(batch)["modalities"].item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_the_plain_network_has_a_term_for_every_doubled_prefix(feature_file: Path) -> None:
    config = small_config(feature_file, "nested_mlp", "model.shortest=4", "model.dropout=0")
    data = load_data(config.data)
    method = build_method(config, data.spec).eval()
    batch = next(batches_in_order(method, data.train))
    h, target = method.embed(batch.inputs)["fused"], TARGETS[config.model.target](batch.labels)
    parts = [similarity(h[:, :m], target) for m in (4, 8, 16)]
    assert torch.allclose(method.loss(batch)["nested"], torch.stack(parts).mean())


def test_the_image_enters_the_joint_branch_with_its_weight() -> None:
    inputs = Inputs(torch.randn(5, 12), torch.randn(5, 9))
    settings = FusedNetSettings(
        dim=8, image_hidden=8, text_hidden=8, joint_hidden=8, joint_image=0.25
    )
    net = FusedHashNet(12, 9, 4, 8, settings).eval()
    seen: list[torch.Tensor] = []
    net.members[0].joint.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net(inputs)
    assert torch.equal(seen[0], torch.cat([0.25 * inputs.image, inputs.text], dim=1))


# -- CMCL ------------------------------------------------------------------------------------------


def cmcl(feature_file: Path, *overrides: str) -> tuple[CMCL, Batch]:
    """A small CMCL that has begun training, and a batch of seven items."""
    config = small_config(feature_file, "cmcl", *overrides)
    data = load_data(config.data)
    torch.manual_seed(0)
    method = build_method(config, data.spec)
    assert isinstance(method, CMCL)
    labels = torch.from_numpy(data.train.labels).float()
    method.prepare(labels)
    rows = torch.tensor([3, 50, 11, 7, 29, 30, 31])
    return method.eval(), Batch(data.train.inputs(rows.numpy()), labels[rows], rows)


def test_the_memory_of_cmcl_holds_the_latest_codes_and_their_common_signs(
    feature_file: Path,
) -> None:
    method, batch = cmcl(feature_file)
    memory = method.memory
    begun = {name: b.clone() for name, b in memory.named_buffers()}
    assert torch.equal(memory.labels[batch.index], batch.labels)
    with torch.no_grad():
        method.loss(batch)
        codes = method.relax_lengths(batch.inputs, [8])[8]
    for view in ("image", "text"):
        now = memory.codes(view, 8)
        assert torch.allclose(now[batch.index], codes[view])
        others = torch.ones(60, dtype=torch.bool)
        others[batch.index] = False
        assert torch.equal(now[others], begun[f"{view}_8"][others])
    assert torch.equal(memory.signs(8), begun["signs_8"])  # renewed after an epoch, not before
    method.after_epoch()
    assert torch.equal(
        memory.signs(8),
        torch.where(memory.codes("image", 8) + memory.codes("text", 8) >= 0, 1.0, -1.0),
    )
    assert not torch.equal(memory.signs(8), begun["signs_8"])
    stored = method.state_dict()
    assert not [name for name in stored if "_8" in name or "labels" in name]


@torch.no_grad()
def test_the_loss_of_cmcl_by_its_formulas(feature_file: Path) -> None:
    """Every term from the paper's formulas, over the lengths 8 and 16 and the auxiliary 24."""
    method, batch = cmcl(feature_file)
    w = method.settings.weights
    found = {name: value.item() for name, value in method.loss(batch).items()}
    codes = method.relax_lengths(batch.inputs, [8, 16, 24])
    similar = (method.memory.labels @ batch.labels.T > 0).float()
    expected = dict.fromkeys(("inter", "intra", "quantisation", "reconstruction"), 0.0)
    for k, factor in ((8, 1), (16, 1), (24, w.auxiliary)):
        for view, other in (("image", "text"), ("text", "image")):
            h = codes[k][view]
            for name, memory, weight in (("inter", other, w.inter), ("intra", view, w.intra)):
                s = method.memory.codes(memory, k) @ h.T / 2
                value = -(similar * s - torch.log(1 + torch.exp(s))).mean()
                expected[name] += factor * weight * float(value)
            signs = method.memory.signs(k)[batch.index]
            squared = ((h - signs) ** 2).sum(dim=1).mean() / k
            expected["quantisation"] += factor * w.quantisation * float(squared)
            if k != 24:
                target = method.memory.signs(24)[batch.index]
                error = ((method.heads.decode[str(k)](h) - target) ** 2).sum(dim=1).mean()
                expected["reconstruction"] += w.auxiliary * w.reconstruction * float(error)
    whole, _ = method.features(batch.inputs)
    expected["contrast"] = w.contrast * float(
        info_nce(whole["image"], whole["text"], method.settings.temperature)
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_cmcl_encodes_one_modality_without_the_other(feature_file: Path) -> None:
    method, batch = cmcl(feature_file)
    both = method.encode(batch.inputs, 16)
    alone = method.encode(Inputs(None, batch.inputs.text), 16)
    assert set(alone) == {"text"} and torch.equal(alone["text"], both["text"])
    assert not torch.equal(both["image"], both["text"])


def test_a_length_that_is_the_auxiliary_one_is_served_from_it(feature_file: Path) -> None:
    method, batch = cmcl(feature_file, "bits=[8,24]")
    assert list(method.heads.hash) == ["8", "24"] and list(method.heads.decode) == ["8"]
    assert method.encode(batch.inputs, 24)["image"].shape == (7, 24)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.dim=0", r"model\.dim.*0.*at least 1"),
        ("model.blocks=-1", r"model\.blocks.*-1.*at least 0"),
        ("model.auxiliary=0", r"model\.auxiliary.*0.*at least 1"),
        ("model.dropout=1", r"model\.dropout.*1\.0.*0.*below 1"),
        ("model.temperature=0", r"model\.temperature.*0\.0.*more than 0"),
    ],
)
def test_settings_of_cmcl_are_checked(feature_file: Path, override: str, expected: str) -> None:
    with pytest.raises(VhablError, match=expected):
        small_config(feature_file, "cmcl", override)


# -- one modality alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vh_abl", "hiamh", "nested_mlp", "pghmh"])
def test_a_fused_method_encodes_one_modality_where_it_learned_to(
    feature_file: Path, name: str
) -> None:
    key = "model.net.modality_dropout" if name in ("vh_abl", "hiamh") else "model.modality_dropout"
    for rate in (0.3, 0.0):
        config = small_config(feature_file, name, f"{key}={rate}")
        data = load_data(config.data)
        torch.manual_seed(0)
        method = build_method(config, data.spec).eval()
        inputs = data.train.inputs(np.arange(5))
        if not rate:
            assert method.stand_in is None
            with pytest.raises(VhablError, match="without an image or without a text"):
                method.encode(inputs.only("text"), 8)
            continue
        with torch.no_grad():
            for view in ("image", "text"):
                alone = method.embed(inputs.only(view))["fused"]
                turned = inputs.take(torch.tensor([4, 3, 2, 1, 0])).only(view)
                assert torch.allclose(method.embed(turned)["fused"].flip(0), alone, atol=1e-5)
                assert not torch.allclose(alone, method.embed(inputs)["fused"], atol=1e-3)


def test_stand_ins_take_the_place_of_dropped_modalities() -> None:
    torch.manual_seed(0)
    stand_in = StandIn(3, 2, 0.4)
    torch.nn.init.constant_(stand_in.image, 7)
    torch.nn.init.constant_(stand_in.text, 9)
    found = Embeddings(
        torch.zeros(5000, 3), torch.zeros(5000, 2), words=torch.zeros(5000, 4, 2),
        word_mask=torch.ones(5000, 4, dtype=torch.bool),
    )  # fmt: skip
    seen = stand_in(found)
    no_image, no_text = (seen.image == 7).all(dim=1), (seen.text == 9).all(dim=1)
    assert torch.equal(seen.image != 0, no_image[:, None].expand(-1, 3))
    assert no_image.float().mean() == pytest.approx(0.2, abs=0.02)
    assert no_text.float().mean() == pytest.approx(0.2, abs=0.02)
    assert not (no_image & no_text).any()
    assert torch.equal(seen.word_mask.any(dim=1), ~no_text)
    kept = stand_in.eval()(found)
    assert torch.equal(kept.image, found.image) and torch.equal(kept.text, found.text)
    assert (stand_in(replace(found, image=None)).image == 7).all()
    assert (stand_in(replace(found, text=None, words=None, word_mask=None)).text == 9).all()


# -- PGHMH -----------------------------------------------------------------------------------------


def pghmh(feature_file: Path, *overrides: str) -> tuple[PGHMH, Batch]:
    """A small PGHMH that has begun training, and a batch of seven items."""
    config = small_config(feature_file, "pghmh", *overrides)
    data = load_data(config.data)
    torch.manual_seed(0)
    method = build_method(config, data.spec)
    assert isinstance(method, PGHMH)
    labels = torch.from_numpy(data.train.labels).float()
    method.prepare(labels)
    rows = torch.tensor([3, 50, 11, 7, 29, 30, 31])
    return method.eval(), Batch(data.train.inputs(rows.numpy()), labels[rows], rows)


@torch.no_grad()
def test_prompts_name_what_is_expected_and_true_classes_where_told(feature_file: Path) -> None:
    method, batch = pghmh(feature_file)
    seen: list[torch.Tensor] = []
    method.reader[0].register_forward_pre_hook(lambda _, given: seen.append(given[0][:, -1]))
    expected = torch.nn.functional.normalize(
        method.features(batch.inputs)["logits"].sigmoid(), p=1, dim=1
    )
    labels = (batch.labels + batch.labels.roll(1, dims=1)).clamp(max=1)  # two classes each
    true = labels / labels.sum(dim=1, keepdim=True)
    told = torch.tensor([1, 0, 0, 1, 1, 0, 1], dtype=torch.bool)[:, None]
    method.features(batch.inputs, labels, told)
    learned = method.context[-1]
    assert torch.allclose(seen[0], expected @ method.names + learned, atol=1e-5)
    mixed = torch.where(told, true, expected)
    assert torch.allclose(seen[1], mixed @ method.names + learned, atol=1e-5)


@torch.no_grad()
def test_the_features_of_pghmh_by_its_formulas(tmp_path: Path) -> None:
    """Item by item, without any padding, with every parameter that begins at zero set."""
    config = pair_config(write_pair_folder(tmp_path / "p"), "pghmh", "model.context=2")
    data = load_data(config.data, config.encoder)
    torch.manual_seed(0)
    method = build_method(config, data.spec)
    assert isinstance(method, PGHMH)
    method.eval()
    for parameter in (method.fusion.response.scale, method.fusion.response.shift):
        torch.nn.init.normal_(parameter)
    inputs = data.train.inputs(np.arange(9))
    read, found = method.embeddings(inputs), method.features(inputs)
    assert read.words is not None and read.word_mask is not None
    assert len(set(read.word_mask.sum(dim=1).tolist())) > 1  # captions of several lengths
    fusion = method.fusion
    for i in range(9):
        image, text = read.image[i], read.text[i]
        logits = method.classifier(torch.cat([image, text])[None])[0]
        share = logits.sigmoid() / logits.sigmoid().sum()
        words, context = read.words[i][read.word_mask[i]], method.context
        x = torch.cat([words, context[:-1], (share @ method.names + context[-1])[None]])[None]
        for block in method.reader:
            x = block(x)
        x = method.norm(x)[0]
        text = method.text_projection(x[len(words) - 1] * x[-1])
        before = torch.stack([image, text, method.text_projection(x[-1])])[None]
        seen = fusion.norm(before)
        attended = fusion.attention(seen, seen, seen)[0]
        fused = fusion.layer(fusion.response(attended) + before / 2)
        image, text, guide = (0.5 * before + 0.5 * fused)[0]
        expected = {"fused": image + text, "prompt": guide, "image": image, "text": text,
                    "logits": logits}  # fmt: skip
        for name, value in expected.items():
            assert torch.allclose(found[name][i], value, atol=1e-4), name


@torch.no_grad()
def test_names_of_classes_are_read_in_every_template_and_centred(tmp_path: Path) -> None:
    folder = write_pair_folder(tmp_path / "p")
    names = ["dark_red", "sea-green", "blue", "white"]
    config = pair_config(folder, "pghmh", f"data.class_names=[{','.join(names)}]")
    torch.manual_seed(0)
    method = build_method(config, load_data(config.data, config.encoder).spec)
    assert isinstance(method, PGHMH)
    read = []
    for name in ("dark red", "sea green", "blue", "white"):
        vectors = method.encoder.read([template.format(name) for template in TEMPLATES])
        read.append((vectors / vectors.norm(dim=1, keepdim=True)).mean(dim=0))
    centred = torch.stack(read) - torch.stack(read).mean(dim=0)
    assert torch.allclose(method.names, centred / centred.norm(dim=1, keepdim=True), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("truth", "oracle"), [(0.0, False), (1.0, False), (0.0, True)])
def test_the_loss_of_pghmh_by_its_formulas(feature_file: Path, truth: float, oracle: bool) -> None:
    """Every term, over the lengths 8 and 16 and the auxiliary 24; oracle labels are always told."""
    method, batch = pghmh(feature_file, f"model.truth={truth}")
    method.oracle_labels = oracle
    w, y = method.settings.weights, batch.labels
    told = torch.full((7, 1), bool(truth) or oracle)
    found = {name: value.item() for name, value in method.loss(batch).items()}
    features = method.features(batch.inputs, y, told)
    t = method.settings.temperature
    logits, aligned = features["logits"], method.align(features["fused"])
    expected = {
        "alignment": w.alignment * float(info_nce(aligned, features["prompt"], t)),
        "contrast": w.contrast * float(info_nce(features["image"], features["text"], t)),
        "classes": -w.classes * float(
            (y * logits.sigmoid().log() + (1 - y) * (1 - logits.sigmoid()).log()).mean()
        ),
        "likelihood": 0.0,
        "reconstruction": 0.0,
    }  # fmt: skip
    similar = (method.memory.labels @ y.T > 0).float()
    for k, factor in ((8, 1), (16, 1), (24, w.auxiliary)):
        h = method.heads(features["fused"], k)
        s = method.memory.codes("fused", k) @ h.T / 2
        value = -(similar * s - torch.log(1 + torch.exp(s))).mean()
        expected["likelihood"] += factor * w.likelihood * float(value)
        if k != 24:
            error = (method.heads.rebuild(h) - method.memory.signs(24)[batch.index]) ** 2
            error = error.sum(dim=1).mean()
            expected["reconstruction"] += w.auxiliary * w.reconstruction * float(error)
    assert found == pytest.approx(expected, rel=1e-4)
    latest = method.memory.codes("fused", 8)
    assert torch.allclose(latest[batch.index], method.heads(features["fused"], 8))
    assert not torch.equal(method.memory.signs(8), latest.sign())
    method.after_epoch()
    assert torch.equal(method.memory.signs(8), latest.sign())


@torch.no_grad()
def test_true_labels_reach_codes_by_the_oracle_alone(feature_file: Path) -> None:
    method, batch = pghmh(feature_file)
    torch.nn.init.normal_(method.names, std=9)
    other = batch.labels.roll(1, dims=1)
    honest = method.relax_lengths(batch.inputs, [8])[8]["fused"]
    first, second = (method.relax_oracle(batch.inputs, y, [8])[8]["fused"]
                     for y in (batch.labels, other))  # fmt: skip
    assert not torch.allclose(first, second) and not torch.allclose(first, honest)
    codes = method.encode_oracle(batch.inputs, batch.labels, [8, 16])
    assert torch.equal(codes[8]["fused"], torch.where(first >= 0, 1.0, -1.0))
    assert codes[16]["fused"].shape == (7, 16)


@torch.no_grad()
def test_response_normalisation_by_hand() -> None:
    norm = ResponseNorm(2)
    x = torch.tensor([[[3.0, 1.0], [4.0, 0.0]]])
    assert torch.equal(norm(x), x)  # at first it changes nothing
    torch.nn.init.ones_(norm.scale)
    norm.shift.copy_(torch.tensor([0.5, 0.0]))
    # Over the tokens the norms are 5 and 1, their mean 3.
    expected = x + x * torch.tensor([5 / 3, 1 / 3]) + torch.tensor([0.5, 0.0])
    assert torch.allclose(norm(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.dim=0", r"model\.dim.*0.*at least 1"),
        ("model.layers=0", r"model\.layers.*0.*at least 1"),
        ("model.context=-1", r"model\.context.*-1.*at least 0"),
        ("model.truth=1.5", r"model\.truth.*1\.5.*0 to 1"),
        ("model.modality_dropout=1", r"model\.modality_dropout.*1\.0.*0"),
        ("model.temperature=0", r"model\.temperature.*0\.0.*more than 0"),
    ],
)
def test_settings_of_pghmh_are_checked(feature_file: Path, override: str, expected: str) -> None:
    with pytest.raises(VhablError, match=expected):
        small_config(feature_file, "pghmh", override)


def test_heads_divide_the_width(feature_file: Path) -> None:
    config = small_config(feature_file, "pghmh", "model.heads=3")
    with pytest.raises(VhablError, match=r"heads is 3, but must be a divisor of"):
        build_method(config, load_data(config.data).spec)


# -- HQ --------------------------------------------------------------------------------------------


def hq(feature_file: Path, *overrides: str) -> tuple[HQ, Dataset, Batch]:
    """A small HQ without dropout that is about to be trained, its data and a batch."""
    config = small_config(feature_file, "hq", "model.dropout=0", *overrides)
    data = load_data(config.data)
    torch.manual_seed(0)
    method = build_method(config, data.spec)
    assert isinstance(method, HQ)
    rows = torch.tensor([3, 50, 11, 7, 29])
    method.prepare(torch.from_numpy(data.train.labels).float())
    return method, data, batch_of(data, rows)


def batch_of(data: Dataset, rows: torch.Tensor) -> Batch:
    """Training items as the trainer gives them."""
    train = data.train.take(rows.numpy())
    texts = None if train.text_labels is None else torch.from_numpy(train.text_labels).float()
    return Batch(train.inputs(), torch.from_numpy(train.labels).float(), rows, texts)


@torch.no_grad()
@pytest.mark.parametrize("given", [[], ["model.pairs=rows", "data.text_order=10"]])
def test_the_loss_of_hq_by_its_formulas(feature_file: Path, given: list[str]) -> None:
    """Pair by pair and bit by bit, before there are dictionaries and with them."""
    method, data, batch = hq(feature_file, "model.weights.balance=0.01", *given)
    everything = batch_of(data, torch.arange(len(data.train)))
    w = method.settings.weights
    of_images = batch.labels.tolist()
    of_texts = data.train.labels_of_texts[batch.index].tolist()
    pairs = [(i, i) for i in range(5)] if given else [(i, j) for i in range(5) for j in range(5)]
    similar = {(i, j): any(a * b for a, b in zip(of_images[i], of_texts[j], strict=True))
               for i, j in pairs}  # fmt: skip
    assert set(similar.values()) == {True, False}
    for begun in (False, True):
        found = {name: float(value) for name, value in method.loss(batch).items()}
        expected = dict.fromkeys(("similarity", "hash", "balance", "quantisation"), 0.0)
        for k, views in method.relax_lengths(batch.inputs, [8, 16]).items():
            f, g = views["image"].tolist(), views["text"].tolist()
            losses = [
                math.log1p(math.exp(s)) - s * similar[i, j]
                for i, j in pairs
                for s in [sum(a * b for a, b in zip(f[i], g[j], strict=True))]
            ]
            expected["similarity"] += w.similarity * sum(losses) / len(pairs)
            for side in (f, g):
                squares = [(x - (1 if x >= 0 else -1)) ** 2 for row in side for x in row]
                expected["hash"] += w.hash * sum(squares) / len(squares)
            rows = f + g
            means = [sum(row[bit] for row in rows) / 10 for bit in range(k)]
            expected["balance"] += w.balance * sum(m * m for _ in rows for m in means)
            if begun:
                numbers = [*batch.index.tolist(), *(batch.index + 60).tolist()]
                codes = method.get_buffer(f"codes_{k}")[numbers].tolist()
                near = [sum(c[j] for c, j in zip(method.codebook(k), code, strict=True)).tolist()
                        for code in codes]  # fmt: skip
                expected["quantisation"] += w.quantisation * sum(
                    (x - y) ** 2 for row, c in zip(rows, near, strict=True)
                    for x, y in zip(row, c, strict=True)
                )  # fmt: skip
        assert found == pytest.approx(expected, rel=1e-4)
        method.loss(everything)
        method.after_epoch()


@torch.no_grad()
def test_plain_branches_of_hq_by_their_formulas(feature_file: Path) -> None:
    """Images go straight to the feature; texts through one layer of `dim` and a ReLU."""
    method, data, batch = hq(feature_file, "model.branches=plain", "data.scale=none")
    weights = {name: tensor.double().numpy() for name, tensor in method.state_dict().items()}
    image, text = data.train.image[batch.index], data.train.text[batch.index]
    hidden = np.maximum(
        text @ weights["branches.text.0.weight"].T + weights["branches.text.0.bias"], 0
    )
    assert hidden.shape == (5, 16) and (hidden == 0).any()
    found = method.relax_lengths(batch.inputs, [8])[8]
    for view, x in (("image", image), ("text", hidden)):
        name = f"features.{view}.8"
        expected = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        np.testing.assert_allclose(found[view].numpy(), expected, rtol=1e-5, atol=1e-5)
    dropped, _, _ = hq(feature_file, "model.branches=plain", "model.dropout=0.5")
    hidden = dropped.train().hidden(batch.inputs)["text"]
    assert 0.6 < float((hidden == 0).float().mean()) < 0.95  # of them a half by the ReLU


def test_pairs_of_rows_need_texts_in_another_order(feature_file: Path) -> None:
    with pytest.raises(VhablError, match=r"model\.pairs .rows.: image i and text i are one item"):
        hq(feature_file, "model.pairs=rows")


@pytest.mark.parametrize("name", ["cmcl", "vh_abl", "hiamh", "pghmh", "nested_mlp"])
def test_other_methods_refuse_texts_in_another_order(feature_file: Path, name: str) -> None:
    config = small_config(feature_file, name, "data.text_order=10")
    data = load_data(config.data)
    with pytest.raises(
        VhablError, match=r"data set wiki: image i and text i are not one item.*needs pairs"
    ):
        build_method(config, data.spec)


@torch.no_grad()
def test_dictionaries_begin_after_the_epochs_asked_for(feature_file: Path) -> None:
    method, data, _ = hq(feature_file, "model.begin=2")
    everything = batch_of(data, torch.arange(len(data.train)))
    begun = []
    for _ in range(3):
        method.loss(everything)
        method.after_epoch()
        begun.append((float(method.begun), bool((method.codebook(16) != 0).any())))
    assert begun == [(0, False), (1, True), (1, True)]


@torch.no_grad()
def test_dictionaries_of_hq_serve_images_and_texts(
    feature_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an epoch saw of both; at the end what the trained network gives, which they fit best."""
    method, data, _ = hq(feature_file, "model.centres=4")
    batch = batch_of(data, torch.arange(len(data.train)))
    method.loss(batch)
    assert method.begun == 0 and (method.codebook(16) == 0).all()
    method.after_epoch()
    method.eval()
    views = method.relax_lengths(batch.inputs, [16])[16]
    x = torch.cat([views["image"], views["text"]])
    codes = method.get_buffer("codes_16")
    assert method.begun == 1 and torch.equal(method.get_buffer("seen_16"), x)
    assert torch.equal(codes, quantisation.assign(x, method.codebook(16), codes))
    before = method.codebook(16).clone()
    for parameter in method.features.parameters():
        parameter.mul_(2)
    monkeypatch.setattr(quantisation, "begin", None)  # they go on from what they are
    method.calibrate(batches_in_order(method, data.train))
    after = method.codebook(16)

    def error(centres: torch.Tensor) -> float:
        return float(
            (2 * x - quantisation.rebuild(quantisation.assign(2 * x, centres), centres)).norm()
        )

    assert error(after) < 0.9 * error(before) and error(after) < float((2 * x).norm())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.dim=0", r"model\.dim.*0.*at least 1"),
        ("model.dictionaries=0", r"model\.dictionaries.*0.*at least 1"),
        ("model.begin=0", r"model\.begin.*0.*at least 1"),
        ("model.branches=deep", r"model\.branches.*deep.*residual or plain"),
        ("model.pairs=some", r"model\.pairs.*some.*all or rows"),
        ("model.centres=1", r"model\.centres.*1.*2 to 65536"),
        ("model.dropout=1", r"model\.dropout.*1\.0.*0"),
    ],
)
def test_settings_of_hq_are_checked(feature_file: Path, override: str, expected: str) -> None:
    with pytest.raises(VhablError, match=expected):
        small_config(feature_file, "hq", override)
