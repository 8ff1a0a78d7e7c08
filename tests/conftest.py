"""Fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TinyAlexNet, write_feature_file

from vhabl.encoders import open_clip
from vhabl.system import errors


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    errors.note.cache_clear()


@pytest.fixture(autouse=True)
def _inside_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test writes without a full path ends up in its own folder."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture
def feature_file(tmp_path: Path) -> Path:
    return write_feature_file(tmp_path / "features.mat")


@pytest.fixture
def tiny_alexnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few weights in place of AlexNet's 61 million."""
    open_clip.mend_torchvision()
    from torchvision import models

    monkeypatch.setattr(models, "get_model", lambda name, weights: TinyAlexNet())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
