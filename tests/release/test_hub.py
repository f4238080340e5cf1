"""Up to the hub and down again, by a client that keeps its repositories in a folder."""

import builtins
import fnmatch
import pathlib
import shutil
import types

import pytest
from huggingface_hub import errors

from snapgen_jax.cli import main
from snapgen_jax.release import hub
from snapgen_jax.training.exits import ConfigError, ExitCode, RunError
from tests.released_for_tests import rewrite


class Hub:
    """What of `huggingface_hub` is used. `fails` is raised by every call."""

    errors = errors

    def __init__(self, root, fails=None):
        self.root, self.fails, self.private = root, fails, {}

    def HfApi(self):
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        if self.fails:
            raise self.fails
        self.private.setdefault(repo_id, private)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self._copy(pathlib.Path(folder_path), self.root / repo_id, allow_patterns)
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id, *, revision, local_dir, allow_patterns):
        if self.fails:
            raise self.fails
        self._copy(self.root / repo_id, pathlib.Path(local_dir), allow_patterns)
        notes = pathlib.Path(local_dir) / ".cache" / "huggingface"
        notes.mkdir(parents=True)
        (notes / "lock").write_text("")
        return local_dir

    @staticmethod
    def _copy(source, target, patterns):
        for file in source.rglob("*"):
            name = str(file.relative_to(source))
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_pushed_is_pulled_byte_for_byte(released, tmp_path, monkeypatch, capsys):
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "_hub", lambda: fake)
    folder = released.folders["student"]
    (folder / "evil.py").write_text("raise SystemExit")
    try:
        assert main(["weights", "push", f"--folder={folder}", "--repo=me/snapgen"]) == ExitCode.DONE
    finally:
        (folder / "evil.py").unlink()
    assert "https://hub/me/snapgen/commit/1" in capsys.readouterr().out
    assert fake.private == {"me/snapgen": True} and not (tmp_path / "hub/me/snapgen/evil.py").exists()
    assert main(["weights", "pull", "--repo=me/snapgen", f"--out={tmp_path / 'out'}"]) == ExitCode.DONE
    assert contents(tmp_path / "out") == contents(folder)
    assert main(["weights", "push", f"--folder={folder}", "--repo=me/open", "--public"]) == ExitCode.DONE
    assert fake.private["me/open"] is False


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "weights.json").unlink(), r"holds no weights\.json.*hf download me/it"),
        (lambda f: rewrite(f / "weights.json", runs={"inputs.text_workdir": "../x"}), "a run lies in 'runs/NAME'"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12"), "is not a whole safetensors file"),
        (lambda f: (f / "runs/clip/model.safetensors").unlink(), "holds no safetensors file"),
        (lambda f: rewrite(f / "config.json", recipe="os"), "unknown recipe 'os'"),
        (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
    ],
)
def test_a_repository_that_is_not_whole_is_refused_and_leaves_nothing(released, tmp_path, spoil, message):
    shutil.copytree(released.folders["student"], tmp_path / "hub" / "me" / "it")
    spoil(tmp_path / "hub" / "me" / "it")
    with pytest.raises(ConfigError, match=message):
        hub.pull("me/it", tmp_path / "out", hub=Hub(tmp_path / "hub"))
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_a_link_out_of_the_folder_and_another_folder_are_not_pushed(released, tmp_path):
    fake = Hub(tmp_path / "hub")
    with pytest.raises(ConfigError, match="is no folder of weights; make one with"):
        hub.push(tmp_path, "me/it", hub=fake)
    copy = shutil.copytree(released.folders["clip"], tmp_path / "copy")
    (copy / "secret.json").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="is a link that leaves the folder"):
        hub.push(copy, "me/it", hub=fake)
    assert not (tmp_path / "hub").exists()


def refusal(kind, status):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None, text="")
    return kind("no", response=response)


@pytest.mark.parametrize(
    ("fails", "kind", "message"),
    [
        (refusal(errors.RepositoryNotFoundError, 404), ConfigError, "is not there, or not for you.*hf auth login"),
        (refusal(errors.GatedRepoError, 403), ConfigError, "accept its terms"),
        (refusal(errors.RevisionNotFoundError, 404), ConfigError, "has no such revision"),
        (refusal(errors.HfHubHTTPError, 401), ConfigError, "log in with a token"),
        (refusal(errors.HfHubHTTPError, 503), RunError, "the hub failed for me/it .*; try again later"),
        (errors.HFValidationError("bad name"), ConfigError, "is no name of a repository"),
        (ConnectionError("no route"), RunError, "cannot be reached"),
        (errors.LocalTokenNotFoundError("none"), ConfigError, "log in first"),
    ],
)
def test_what_the_hub_says_becomes_one_clear_error(released, tmp_path, fails, kind, message):
    fake = Hub(tmp_path / "hub", fails)
    with pytest.raises(RunError, match=message) as pulled:
        hub.pull("me/it", tmp_path / "out", hub=fake)
    with pytest.raises(RunError, match=message) as pushed:
        hub.push(released.folders["clip"], "me/it", hub=fake)
    assert type(pulled.value) is type(pushed.value) is kind
    assert not list(tmp_path.iterdir())


def test_without_the_client_everything_but_the_hub_works(released, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert main(["weights", "pull", "--repo=me/it", f"--out={tmp_path / 'out'}"]) == ExitCode.BAD_CONFIG
    assert "pip install huggingface_hub" in capsys.readouterr().err
    assert main(["weights", "export", f"--workdir={released.folders['clip']}", f"--out={tmp_path / 'a'}"]) == 0
