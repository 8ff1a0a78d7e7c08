"""scripts/setup.sh with package indexes made here: which build of torch it takes, and when none."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.e2e

# A project without dependencies, whose build needs nothing from an index.
BACKEND = """
import zipfile
from pathlib import Path

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "project-1.0-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder, name), "w") as wheel:
        info = "project-1.0.dist-info/"
        text = "Metadata-Version: 2.1\\nName: project\\nVersion: 1.0\\nProvides-Extra: test\\n"
        wheel.writestr(info + "METADATA", text)
        tags = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(info + "WHEEL", tags)
        wheel.writestr(info + "RECORD", "")
    return name
"""


def add_package(index: Path, name: str, requires: str = "", summary: str = "") -> None:
    """A wheel without content in a package index: the folder of its name."""
    folder = index / name
    folder.mkdir(parents=True)
    file = f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(folder / file, "w") as wheel:
        info = f"{name.replace('-', '_')}-1.0.dist-info"
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: {summary}\n"
        text += f"Requires-Dist: {requires}\n" if requires else ""
        wheel.writestr(f"{info}/METADATA", text)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Three indexes over HTTP: cpu, cuda (whose torch wants an NVIDIA package) and plain."""
    folder = tmp_path / "indexes"
    add_package(folder / "cpu", "torch", summary="from the CPU index")
    add_package(folder / "cuda", "torch", "nvidia-cublas-cu12", "the CUDA build")
    add_package(folder / "cuda", "nvidia-cublas-cu12")
    add_package(folder / "plain", "torch", summary="a default build without CUDA")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    (folder / "scripts" / "constraints.txt").write_text("torch==1.0\n")
    (folder / "backend.py").write_text(BACKEND)
    (folder / "setup.py").write_text("")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    return folder


def set_up(
    project: Path, default_index: str, cpu_index: str, driver: bool = False, **more: str
) -> tuple[int, str, set[str], str]:
    """Run the script: exit code, stderr, names of what is installed, where torch is from."""
    tools = project / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "nvidia-smi").write_text("#!/bin/sh\nexit " + ("0" if driver else "1") + "\n")
    (tools / "nvidia-smi").chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "VHABL_", "PYTHON"))}
    done = subprocess.run(
        ["bash", "scripts/setup.sh"], cwd=project, capture_output=True, text=True, check=False,
        env={
            **clean, "PATH": f"{tools}:{clean['PATH']}", "PYTHON": sys.executable,
            "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": default_index,
            "PIP_RETRIES": "0", "VHABL_TORCH_CPU_INDEX": cpu_index, "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1", **more,
        },
    )  # fmt: skip
    files = list(project.glob(".venv/lib/*/site-packages/*.dist-info/METADATA"))
    names = {file.parent.name.split("-")[0] for file in files}
    torch = "".join(f.read_text() for f in files if f.parent.name.startswith("torch-"))
    return done.returncode, done.stderr, names, torch


NOWHERE = "http://127.0.0.1:9"  # nothing answers there


def test_without_a_driver_torch_comes_from_the_cpu_index(project: Path, server: str) -> None:
    code, err, names, torch = set_up(project, f"{server}/cuda", f"{server}/cpu")
    assert code == 0, err
    assert {"torch", "project"} <= names and "nvidia_cublas_cu12" not in names
    assert "from the CPU index" in torch
    made = (project / ".venv" / "pyvenv.cfg").stat().st_mtime_ns
    code, err, _, _ = set_up(project, NOWHERE, NOWHERE)  # current: nothing is asked for
    assert code == 0 and err == ""
    assert (project / ".venv" / "pyvenv.cfg").stat().st_mtime_ns == made


def test_cuda_packages_are_refused_unless_asked_for(project: Path, server: str) -> None:
    code, err, names, _ = set_up(project, f"{server}/cuda", NOWHERE)
    assert code == 2 and "torch" not in names and "project" not in names
    last = err.splitlines()[-1]
    assert last.startswith(
        "error: torch: there is no NVIDIA driver, torch's CPU index does not answer"
    )
    assert "VHABL_TORCH_CPU_INDEX" in last and "VHABL_CUDA=1" in last
    code, err, names, torch = set_up(project, f"{server}/cuda", NOWHERE, VHABL_CUDA="1")
    assert code == 0, err
    assert {"torch", "nvidia_cublas_cu12", "project"} <= names and "the CUDA build" in torch


def test_a_default_build_without_cuda_is_taken(project: Path, server: str) -> None:
    code, err, _, torch = set_up(project, f"{server}/plain", NOWHERE)
    assert code == 0, err
    assert "a default build without CUDA" in torch


def test_with_a_driver_the_default_build_is_taken(project: Path, server: str) -> None:
    code, err, names, torch = set_up(project, f"{server}/cuda", f"{server}/cpu", driver=True)
    assert code == 0, err
    assert "nvidia_cublas_cu12" in names and "the CUDA build" in torch
