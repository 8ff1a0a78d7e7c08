"""Packaging of vhabl. The README's table gives the reason for each dependency."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search('__version__ = "(.*)"', (ROOT / "vhabl" / "__init__.py").read_text())[1]


class Build(build_py):
    """The package, with the recipes and the shipped data set in it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for part in ("configs", "dataset/emoji"):
                shutil.copytree(part, Path(self.build_lib, "vhabl", part), dirs_exist_ok=True)


# The embedded engine of 3.x has no binary vectors; that of 2.5 imports pkg_resources.
MILVUS = ["pymilvus>=2.6,<3", "milvus-lite==2.5.1", "setuptools>=77,<82"]
DOCS = ["mkdocs-material>=9.5,<10", "mkdocstrings-python>=1.10,<3"]

setup(
    name="vhabl",
    version=VERSION,
    cmdclass={"build_py": Build},
    entry_points={"console_scripts": ["vhabl = vhabl.__main__:run"]},
    description="Binary codes for image-text pairs: five hashing methods, exact evaluation, search",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["vhabl", "vhabl.*"]),
    package_data={"vhabl.report": ["page.html"], "vhabl.search": ["web/*"]},
    install_requires=[
        "torch>=2.4,<2.14",
        "numpy>=2,<3",
        "scipy>=1.11,<2",
        "h5py>=3.10,<4",
        "pyyaml>=6,<7",
        "safetensors>=0.4,<1",
        "pillow>=11.3",
        "regex>=2023.8.8",
        "tqdm>=4.60",
        "tensorboard>=2.14,<3",
        "matplotlib>=3.8,<4",
        "jinja2>=3.1,<4",
        "faiss-cpu>=1.8,<2",
        "numba>=0.60,<1",
        "torchvision>=0.19,<0.29",
        "open_clip_torch>=3.3,<4",
        "fastapi>=0.115,<1",
        "uvicorn>=0.30,<1",
        "python-multipart>=0.0.18",
    ],
    extras_require={
        "test": [
            *MILVUS,
            *DOCS,
            "playwright>=1.45,<2",
            "pytest>=8,<10",
            "pytest-xdist>=3.5,<4",
            "hypothesis>=6.90,<7",
            "ruff>=0.8",
            "mypy>=1.13,<3",
            "types-PyYAML",
            "types-tqdm",
        ],
        "milvus": MILVUS,
        "docs": DOCS,
        "emoji": ["uharfbuzz>=0.39"],
        "parquet": ["pyarrow>=14"],
    },
)
