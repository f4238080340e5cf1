"""Folders of weights to and from the Hugging Face hub, by explicit command only.

`huggingface_hub` does it; where that is not installed, everything else works.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from etils import epath

from snapgen_jax.generation import load_config
from snapgen_jax.training.exits import ConfigError, RunError
from snapgen_jax.training.files import new_folder
from snapgen_jax.weights.checkpoint import WeightsError
from snapgen_jax.weights.folder import MANIFEST, held, is_weights_folder, runs_of

# What such a folder holds; nothing else is fetched, no code and no pickle.
PATTERNS = ("*.safetensors", "*.json", "*.md", "*.png")


def push(folder: epath.PathLike, repo: str, *, private: bool = True, hub: Any = None) -> str:
    """Uploads a folder of weights as one commit; a repository that is not there is made.

    Args:
        folder: what `snapgen weights export` wrote.
        repo: "owner/name".
        private: of a repository that is made.
        hub: a `huggingface_hub`, for tests.

    Returns:
        where it is.

    Raises:
        ConfigError: the folder holds no weights or is damaged, `huggingface_hub` is not installed, or the hub refuses.
        RunError: the hub cannot be reached.
    """
    check_folder(folder)
    hub = hub or _hub()
    with _told(hub, repo):
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=list(PATTERNS),
            commit_message="Weights of snapgen-jax",
        )
    return str(getattr(made, "commit_url", made))


def pull(repo: str, out: epath.PathLike, *, revision: str | None = None, hub: Any = None) -> None:
    """Downloads a folder of weights, which appears at `out` when all of it is there and has been looked at.

    Args:
        repo: "owner/name".
        out: local folder; there must be none yet, or an empty one.
        revision: branch, tag or commit; the newest by default.
        hub: a `huggingface_hub`, for tests.

    Raises:
        ConfigError: `out` is not empty, `huggingface_hub` is not installed, the hub refuses, or the repository holds no
            folder of weights.
        RunError: the hub cannot be reached.
    """
    hub = hub or _hub()
    with new_folder(out) as folder:
        with _told(hub, repo):
            hub.snapshot_download(repo, revision=revision, local_dir=str(folder), allow_patterns=list(PATTERNS))
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes on the download
        if not is_weights_folder(folder):
            raise ConfigError(
                f"{repo} holds no {MANIFEST}, so `snapgen weights push` did not make it; fetch other weights with "
                f"`hf download {repo} --local-dir DIR`"
            )
        check_folder(folder)


def check_folder(folder: epath.PathLike) -> None:
    """Looks through a folder of weights, without reading its arrays.

    Raises:
        ConfigError: a file of it is missing, damaged, or points out of the folder.
    """
    if not is_weights_folder(folder):
        raise ConfigError(f"{folder} is no folder of weights; make one with `snapgen weights export --out={folder}`")
    try:
        root = pathlib.Path(folder).resolve()
        for path in root.rglob("*"):
            if path.is_symlink() and root not in path.resolve().parents:
                raise WeightsError(f"{path} is a link that leaves the folder")
        for part in (str(folder), *runs_of(folder).values()):
            load_config(part)
            held(part)
    except WeightsError as error:
        raise ConfigError(str(error)) from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            "the hub needs the package huggingface_hub, which is not installed: pip install huggingface_hub"
        ) from error
    return huggingface_hub


@contextlib.contextmanager
def _told(hub: Any, repo: str) -> Iterator[None]:
    """What the hub's client raises, as an error that says what to do."""
    errors = hub.errors
    try:
        yield
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo!r} is no name of a repository: {error}") from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{repo} has no such revision; leave --revision out for the newest") from error
    except errors.RepositoryNotFoundError as error:  # gated ones too
        raise ConfigError(
            f"{repo} is not there, or not for you; check the name, accept its terms on its page, and log in first: "
            "hf auth login"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise ConfigError("no token of the hub is stored here; log in first: hf auth login") from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise ConfigError(
                f"the hub refuses {repo}: log in with a token that may do this (hf auth login)"
            ) from error
        raise RunError(f"the hub failed for {repo} ({error}); try again later") from error
    except OSError as error:  # what the client makes of a broken connection
        raise RunError(f"the hub cannot be reached for {repo} ({error}); try again later") from error
