"""Shared folders to a Hub and back, with the Hub's own client and a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from deltaclip.base.errors import UserError
from deltaclip.pipeline.pull import pull
from deltaclip.pipeline.push import push
from deltaclip.pipeline.runs.hub import check_names, fetch
from deltaclip.pipeline.settings import PullConfig, PushConfig, ShareConfig
from deltaclip.pipeline.settings.sharing import Repo
from deltaclip.pipeline.share import share
from deltaclip.tests.pipeline.hub_server import HubServer, hub

pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
# The client's own, of the library that it connects with.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SIZES = {"README.md": 10, "config.json": 10, "metrics.json": 10, "a_best.safetensors": 10}


@pytest.fixture(scope="module")
def folder(demo_run, tmp_path_factory):
    """Return what was shared of a run."""
    return share(ShareConfig(run=demo_run, out=tmp_path_factory.mktemp("hub") / "shared")).out


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Return an empty Hub, which the client in this process asks, with a cache of its own."""
    import huggingface_hub.constants as of_client

    with hub() as running:
        for name, value in (
            ("ENDPOINT", running.url),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_PROGRESS_BARS", True),
        ):
            monkeypatch.setattr(of_client, name, value)
        monkeypatch.setattr(
            of_client, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", HubServer.token)
        yield running


def refused(call):
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_goes_there_and_back(folder, server, tmp_path):
    planned = push(PushConfig(folder=folder, repo="lab/scorer", dry_run=True))
    assert planned.sizes == {name: len(text) for name, text in content(folder).items()}
    assert "would go; nothing was sent" in planned.summary()
    assert not server.repos
    sent = push(PushConfig(folder=folder, repo="lab/scorer"))
    assert sent.address.startswith(f"{server.url}/lab/scorer/commit/")
    back = pull(PullConfig(repo="lab/scorer", out=tmp_path / "back"))
    assert content(back.out) == content(folder)
    assert not any(path.is_symlink() for path in back.out.iterdir())
    assert (back.labels, back.backbone) == (["quality", "consistency"], "tiny")
    assert ".gitattributes" not in server.fetched


def test_what_was_fetched_is_used_without_the_hub_and_by_its_revision(folder, server, tmp_path, *, monkeypatch):
    push(PushConfig(folder=folder, repo="lab/scorer"))
    (commit, files) = server.repos["lab/scorer"][-1]
    server.repos["lab/scorer"].append(("a" * 40, {**files, "README.md": b"# later\n"}))
    assert (fetch(Repo.parse("hf://lab/scorer", "")) / "README.md").read_bytes() == b"# later\n"
    for revision in (commit, "first"):
        assert content(fetch(Repo("lab/scorer", revision)))["README.md"] == content(folder)["README.md"]
    asked = len(server.fetched)
    server.shutdown()
    server.server_close()
    assert (fetch(Repo("lab/scorer")) / "README.md").read_bytes() == b"# later\n"
    assert len(server.fetched) == asked
    line = refused(lambda: pull(PullConfig(repo="lab/other", out=tmp_path / "x")))
    assert line == (
        f"hf://lab/other: is not on this machine, and the Hub at {server.url} does not answer; "
        "try where there is a network, or give a folder"
    )
    line = refused(lambda: push(PushConfig(folder=folder, repo="lab/scorer")))
    assert line.startswith("hf://lab/scorer: is not on this machine, and the Hub at ")


def test_what_the_hub_does_not_have_is_one_line(folder, server, tmp_path, *, monkeypatch):
    assert refused(lambda: fetch(Repo("lab/none"))) == (
        "hf://lab/none: the Hub knows no such model, or it is private; check the name, or give HF_TOKEN"
    )
    push(PushConfig(folder=folder, repo="lab/scorer"))
    assert refused(lambda: fetch(Repo("lab/scorer", "v9"))) == (
        "hf://lab/scorer@v9: the Hub has no such revision of it; give a branch, a tag or a commit"
    )
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert refused(lambda: push(PushConfig(folder=folder, repo="lab/scorer"))) == (
        "hf://lab/scorer: the Hub takes no files without a token; give HF_TOKEN, or log in with `hf auth login`"
    )


def test_a_token_that_may_not_write_is_one_line(folder, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    line = refused(lambda: push(PushConfig(folder=folder, repo="lab/scorer")))
    assert line.startswith("hf://lab/scorer: the Hub ")
    assert line.endswith("HF_TOKEN") or "a HF_TOKEN that may write there" in line
    assert "\n" not in line


def test_other_files_are_named_and_left_there(folder, server, tmp_path, *, capsys):
    push(PushConfig(folder=folder, repo="lab/scorer"))
    files = server.repos["lab/scorer"][-1][1]
    files |= {"model.pkl": b"cos\nsystem\n", "pytorch_model.bin": b"x", "deep/config.json": b"{}"}
    out = pull(PullConfig(repo="lab/scorer", out=tmp_path / "out")).out
    assert content(out) == content(folder)
    told = "hf://lab/scorer: left out, as no part of a shared folder: deep/config.json, model.pkl, pytorch_model.bin"
    assert told in capsys.readouterr().err
    assert not {"model.pkl", "pytorch_model.bin", "deep/config.json"} & set(server.fetched)


@pytest.mark.parametrize("change", ["too large", "missing", "no run", "not shared", "damaged"])
def test_what_is_no_shared_folder_is_refused(folder, server, tmp_path, *, change):
    push(PushConfig(folder=folder, repo="lab/scorer"))
    files = server.repos["lab/scorer"][-1][1]
    if change == "too large":
        server.sizes["config.json"] = 1 << 30
    elif change == "missing":
        del files["metrics.json"]
    elif change == "no run":
        files["residual_frozen_best.safetensors"] = b"no tensors"
    elif change == "not shared":
        files["config.json"] = json.dumps({**json.loads(files["config.json"]), "shared": 1}).encode()
        files["config.json"] = files["config.json"].replace(b'"shared"', b'"hared"')
    else:
        files["config.json"] = b"{"
    line = refused(lambda: pull(PullConfig(repo="lab/scorer", out=tmp_path / "out")))
    wanted = {
        "too large": "hf://lab/scorer: config.json has 1,074 MB, more than the 4 MB of such a file",
        "missing": "hf://lab/scorer: has no metrics.json; give what `deltaclip share` wrote",
        "no run": "is text, no file of heads",
        "not shared": "hf://lab/scorer: is no shared folder; give what `deltaclip share` wrote",
        "damaged": "cannot be read",
    }
    assert wanted[change] in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ab", "a/b/c", "/b", "a/", "a/b@", "a/../b", "hf://", "a b/c", "a/b--c", "-a/b"])
def test_names_that_no_hub_has(name):
    assert refused(lambda: Repo.parse(name, "REPO")).startswith(f"REPO: {name!r} is no name of a repository")


def test_names_with_a_revision():
    assert str(Repo.parse("a/b@v1", "")) == str(Repo.parse("hf://a/b@v1", "")) == "hf://a/b@v1"
    assert Repo.parse("a/b.c-d_e", "") == Repo("a/b.c-d_e")


def test_two_checkpoints_are_refused():
    line = refused(lambda: check_names({**SIZES, "b_best.safetensors": 1}, place="x"))
    assert line == "x: has 2 files *_best.safetensors; give what `deltaclip share` wrote"
    assert check_names(SIZES, place="x") == sorted(SIZES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_line_and_python_find_the_hub_by_its_variables(folder, tmp_path):
    with hub() as running:
        variables = {"HF_ENDPOINT": running.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": HubServer.token}
        variables |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}

        def run(*words):
            command = [sys.executable, *map(str, words)]
            environment = {**os.environ, **variables}
            return subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path)

        first = json.loads(run("-m", "deltaclip", "push", folder, "lab/scorer", "--dry-run", "--json").stdout)
        assert first["address"] is None
        assert not running.repos
        sent = json.loads(run("-m", "deltaclip", "push", folder, "lab/scorer", "--json").stdout)
        assert sent["files"] == first["files"]
        run("-m", "deltaclip", "pull", "lab/scorer", "back")
        assert content(tmp_path / "back") == content(folder)
        program = "import sys; from deltaclip import Scorer; print(Scorer.load(sys.argv[1], device='cpu').labels)"
        assert run("-c", program, "hf://lab/scorer@main").stdout == "('quality', 'consistency')\n"
