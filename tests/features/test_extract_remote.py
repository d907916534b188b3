"""Data at addresses: the same cache as from files, faults of networks told, secrets written nowhere."""

from __future__ import annotations

import csv
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from deltaclip.base.errors import MachineError, UserError
from deltaclip.features.check_data import check_data
from deltaclip.features.data import remote
from deltaclip.features.data.adapters import data_name, read_manifest
from deltaclip.features.data.addresses import RemotePath, full_address
from deltaclip.features.data.remote import held, require
from deltaclip.features.data.sources import UnreadableFile, read_image_bytes
from deltaclip.features.extract import extract
from deltaclip.features.settings import CheckConfig, ExtractConfig
from deltaclip.features.store.shards import open_cache
from deltaclip.pipeline.runs.run_backbone import image_files
from deltaclip.tests.features.file_server import serving
from deltaclip.tests.features.forms import write_form
from deltaclip.tests.features.killing import Server, kill_often, make_kill_set, read_rows
from deltaclip.tests.features.test_extract_forms import without_names


@pytest.fixture(scope="module")
def rows(demo_folder):
    """Return 9 rows of the demo set, one of whose pictures stands twice."""
    chosen = read_rows(demo_folder)[:8]
    return [*chosen, chosen[3] | {"prompt": "another"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_folder, rows):
    """Return a folder with the rows in every form."""
    made = tmp_path_factory.mktemp("remote")
    for form in ("metadata", "parquet", "shards"):
        write_form(form, demo_folder, rows, made / form)
    return made


@pytest.fixture
def server(folder):
    with serving(folder) as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Wait little before a request is repeated."""
    monkeypatch.setattr(remote, "WAIT_S", 0.005)


@pytest.fixture(scope="module")
def of_files(tmp_path_factory, folder, tiny_backbone):
    out = tmp_path_factory.mktemp("files") / "c.h5"
    extract(config(folder / "metadata" / "metadata.csv", out, tiny_backbone))
    return without_names(out)


def config(data, out, backbone, **more):
    more = {"label_range": ["0,1"], "views": "center", "precision": "fp32"} | more
    return ExtractConfig(data=str(data), out=out, backbone=backbone, **more)


def with_addresses(folder, base, data):
    """Write the table of the folder of pictures with an address in each row."""
    with (folder / "metadata" / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["image"] = f"{base}/{row.pop('file_name')}"
    with data.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return data


def table(path, images):
    path.write_text("image,prompt,quality\n" + "".join(f"{image},p{i},0.5\n" for i, image in enumerate(images)))
    return path


def pattern(folder):
    numbers = sorted(path.stem for path in (folder / "shards").glob("*.tar"))
    return f"{{{numbers[0]}..{numbers[-1]}}}.tar"


@pytest.mark.parametrize(
    "form", [pytest.param("addresses", marks=pytest.mark.slow), "table", "parquet", "shards", "memory"]
)
def test_one_cache_from_files_and_from_addresses(form, server, folder, *, tmp_path, of_files, tiny_backbone):
    data = {
        "addresses": lambda: with_addresses(folder, f"{server.url}/metadata", tmp_path / "far.csv"),
        "table": lambda: f"{server.url}/metadata/metadata.csv",
        "parquet": lambda: f"{server.url}/parquet/{next((folder / 'parquet').glob('*.parquet')).name}",
        "shards": lambda: f"{server.url}/shards/{pattern(folder)}",
        "memory": lambda: _in_memory(folder),
    }[form]()
    made = config(data, tmp_path / "c.h5", tiny_backbone)
    first = extract(made)
    assert (first.rows, first.images, first.new_images, first.failed) == (9, 8, 8, [])
    assert without_names(tmp_path / "c.h5") == of_files
    host = "set" if form == "memory" else server.host
    assert f"9 of 9 images are fetched from {host}" in first.notes
    assert any(note.startswith("fetched ") and note.endswith(" MB") for note in first.notes)
    before = (tmp_path / "c.h5").read_bytes()
    assert extract(made).new_images == 0
    assert (tmp_path / "c.h5").read_bytes() == before
    checked = check_data(CheckConfig(data=str(data), images="full", label_range=["0,1"]))
    assert (checked.rows, checked.exit_code) == (9, 0)
    assert f"9 of 9 images are fetched from {host}" in checked.notes


def _in_memory(folder):
    files = fsspec.filesystem("memory")
    for path in (folder / "metadata").iterdir():
        files.pipe_file(f"/set/pictures/{path.name}", path.read_bytes())
    return "memory://set/pictures/metadata.csv"


def test_every_picture_is_asked_for_once(server, folder, tmp_path, tiny_backbone):
    """Hashing and decoding read the same copy, and so do rows of one address."""
    data = with_addresses(folder, f"{server.url}/metadata", tmp_path / "far.csv")
    extract(config(data, tmp_path / "c.h5", tiny_backbone))
    assert {path: count for path, count in server.asked.items() if count > 1} == {}


def test_pictures_of_a_cache_are_found_again(server, folder, tmp_path, tiny_backbone):
    extract(config(f"{server.url}/shards/{pattern(folder)}", tmp_path / "c.h5", tiny_backbone))
    with open_cache(tmp_path / "c.h5") as store:
        root, names, keys = store.dataset["image_root"], store.rows().text["file"], store.keys("images")
    assert root == f"{server.url}/shards"

    class Rows:
        path = tmp_path / "c.h5"

        class rows:  # noqa: N801
            image = range(8)
            text = {"file": names}  # noqa: RUF012

    files = image_files(Rows, None, allow_outside=False)
    for entry, file in files.files.items():
        assert file.sha256 == keys[entry].tobytes()
        file.read(files.root)  # which compares the content


def test_faults_that_pass_are_repeated_and_counted(server, folder, tmp_path, tiny_backbone):
    names = sorted(path.name for path in (folder / "metadata").glob("*.png"))[:3]
    server.faults = {
        f"/metadata/{names[0]}": [503, 503],
        f"/metadata/{names[1]}": ["cut"],
        f"/metadata/{names[2]}": [(429, ("Retry-After", "0"))],
    }
    done = extract(config(f"{server.url}/metadata/metadata.csv", tmp_path / "c.h5", tiny_backbone))
    assert (done.new_images, done.failed) == (8, [])
    assert done.notes[-1].partition("; ")[2] == (
        "4 requests were repeated (the server answers 503, Service Unavailable: 2, the connection broke "
        "(ClientPayloadError): 1, the server answers 429, Too Many Requests: 1)"
    )


def test_what_stays_away_is_a_row_with_its_reason(server, folder, tmp_path, tiny_backbone):
    there = sorted(path.name for path in (folder / "metadata").glob("*.png"))
    (folder / "page.png").write_text("<html>sign in</html>")
    (folder / "empty.png").write_bytes(b"")
    server.faults = {"/metadata/busy.png": [500] * 9, "/metadata/no.png": [403]}
    free = _free_port()
    data = table(
        tmp_path / "t.csv",
        [
            f"{server.url}/metadata/{there[0]}",
            f"{server.url}/gone.png",
            f"{server.url}/metadata/no.png",
            f"{server.url}/metadata/busy.png",
            f"{server.url}/page.png",
            f"{server.url}/empty.png",
            f"http://127.0.0.1:{free}/a.png",
            f"http://127.0.0.1:{free}/b.png",
        ],
    )
    done = extract(config(data, tmp_path / "c.h5", tiny_backbone))
    assert done.new_images == 1
    assert dict(done.failed) == {
        f"{server.url}/gone.png": "the server answers 404, Not Found",
        f"{server.url}/metadata/no.png": "the server answers 403, Forbidden",
        f"{server.url}/metadata/busy.png": "the server answers 500, Internal Server Error, 4 times",
        f"{server.url}/page.png": "not an image in a known format",
        f"{server.url}/empty.png": "empty file",
        f"http://127.0.0.1:{free}/a.png": f"127.0.0.1:{free} cannot be reached, 4 times",
        f"http://127.0.0.1:{free}/b.png": f"127.0.0.1:{free} cannot be reached, 4 times",
    }
    assert server.asked["/metadata/busy.png"] == 4
    (folder / "page.png").unlink()


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_dead_host_is_one_line(tmp_path, folder, tiny_backbone):
    port = _free_port()
    data = table(tmp_path / "t.csv", [f"http://127.0.0.1:{port}/{i}.png" for i in range(3)])
    with pytest.raises(UserError) as caught:
        extract(config(data, tmp_path / "c.h5", tiny_backbone))
    assert str(caught.value) == (
        f"{data}: none of the 3 images can be read (127.0.0.1:{port} cannot be reached, 4 times); check the paths "
        f"or give --image-root (now {tmp_path})"
    )
    with pytest.raises(UserError) as caught:
        extract(config(f"http://127.0.0.1:{port}/t.csv", tmp_path / "c.h5", tiny_backbone))
    assert str(caught.value) == (
        f"http://127.0.0.1:{port}/t.csv: 127.0.0.1:{port} cannot be reached, 4 times; check the address and the network"
    )


def test_a_host_that_goes_away_stops_the_run(folder, tmp_path):
    remote.begin()
    with serving(folder) as server, held(RemotePath.of(f"{server.url}/metadata/metadata.csv")):
        pass
    with pytest.raises(MachineError) as caught, held(RemotePath.of(f"{server.url}/metadata/other.csv")):
        pass
    assert str(caught.value) == (
        f"{server.host}: does not answer any more ({server.host} cannot be reached, 4 times); check the network and "
        "give the same command again: it goes on"
    )


def test_too_large_a_picture_is_refused_while_it_comes(server, folder, monkeypatch):
    remote.begin()
    monkeypatch.setattr("deltaclip.features.data.sources.MAX_IMAGE_BYTES", 1000)
    (folder / "large.png").write_bytes(bytes(2000))
    with pytest.raises(UnreadableFile, match=r"^over 0 MB$"):
        read_image_bytes(RemotePath.of(f"{server.url}/large.png"), None)


def test_secrets_are_used_and_written_nowhere(server, folder, tmp_path, *, tiny_backbone, capsys):
    name = sorted(path.name for path in (folder / "metadata").glob("*.png"))[0]
    host = server.host
    far = [
        f"http://anna:geheim1@{host}/metadata/{name}?v=2&X-Amz-Signature=geheim2&X-Amz-Expires=60",
        f"{server.url}/gone.png?access_token=geheim3",
        f"{server.url}/gone.png?sv=1&sig=geheim4&page=7",
    ]
    data = table(tmp_path / "t.csv", far)
    done = extract(config(data, tmp_path / "c.h5", tiny_backbone))
    assert done.new_images == 1
    assert [image for image, _ in done.failed] == [f"{server.url}/gone.png", f"{server.url}/gone.png?page=7"]
    said = json.dumps(done.to_json()) + done.summary() + "".join(capsys.readouterr())
    said += json.dumps(check_data(CheckConfig(data=str(data))).to_json())
    assert "geheim" not in said
    assert b"geheim" not in (tmp_path / "c.h5").read_bytes()
    asked = f"/metadata/{name}?v=2&X-Amz-Signature=geheim2&X-Amz-Expires=60"
    assert server.headers[asked]["Authorization"].startswith("Basic ")
    # A table behind a password: its pictures are asked for with the same one.
    address = f"http://anna:geheim1@{host}/metadata/metadata.csv"
    done = extract(config(address, tmp_path / "d.h5", tiny_backbone))
    assert done.new_images == 8
    assert all("Authorization" in server.headers[path] for path in server.headers if path.endswith(".png"))
    assert b"geheim" not in (tmp_path / "d.h5").read_bytes()
    assert data_name(address) == data_name(f"{server.url}/metadata/metadata.csv")


def test_addresses_that_differ_in_secrets_alone_are_refused():
    remote.begin()
    RemotePath.of("https://host/a.png?token=1")
    with pytest.raises(UserError) as caught:
        RemotePath.of("https://host/a.png?token=2")
    assert str(caught.value) == (
        "https://host/a.png: two addresses differ in secrets alone, which are written nowhere; download the files "
        "and give their folder"
    )
    RemotePath.of("https://host/b.png?X-Amz-Signature=1")
    assert full_address(RemotePath.of("https://host/b.png?X-Amz-Signature=2")).endswith("=2")  # signed anew


def test_a_table_elsewhere_reaches_no_file_here(server, folder, tmp_path, tiny_backbone):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"x")
    for row in (str(secret), f"file://{secret}", "../../secret.png"):
        (folder / "evil.csv").write_text(f"image,prompt\n{row},x\n")
        with pytest.raises(UserError) as caught:
            read_manifest(f"{server.url}/evil.csv")
        assert "lies outside" in str(caught.value)
        assert str(caught.value).startswith(f"{server.url}/evil.csv, line 2, column image: ")


def test_pictures_here_of_a_table_elsewhere_and_the_reverse(server, folder, tmp_path, *, tiny_backbone, of_files):
    done = extract(
        config(f"{server.url}/metadata/metadata.csv", tmp_path / "a.h5", tiny_backbone, image_root=folder / "metadata")
    )
    assert done.new_images == 8
    assert not any("are fetched" in note for note in done.notes)
    local = tmp_path / "metadata.csv"
    local.write_bytes((folder / "metadata" / "metadata.csv").read_bytes())
    done = extract(config(local, tmp_path / "b.h5", tiny_backbone, image_root=Path(f"{server.url}/metadata")))
    assert done.new_images == 8
    assert without_names(tmp_path / "a.h5") == without_names(tmp_path / "b.h5") == of_files


def test_errors_in_a_table_elsewhere_name_its_address(server, folder, tmp_path):
    (folder / "bad.csv").write_text("image,prompt,quality\na.png,x,good\n")
    (folder / "cut.tar").write_bytes(next((folder / "shards").glob("*.tar")).read_bytes()[:700])
    for name, line in {
        "bad.csv": "bad.csv, line 2, column quality: 'good' is no number; leave a missing label empty",
        "gone.csv": "gone.csv: the server answers 404, Not Found; check the address and the network",
        "{0..2}.tar": "0.tar: the server answers 404, Not Found; check the address and the network",
        "*.tar": "*.tar: names files by a pattern, and web servers do not say what they have; name them in braces: "
        "{000..099}",
    }.items():
        with pytest.raises(UserError) as caught:
            read_manifest(f"{server.url}/{name}")
        assert str(caught.value) == f"{server.url}/{line}"
    with pytest.raises(UserError, match=rf"^{server.url}/cut\.tar: is cut or damaged at byte"):
        read_manifest(f"{server.url}/cut.tar")


def test_a_pattern_where_a_store_can_list(folder):
    files = fsspec.filesystem("memory")
    for path in (folder / "shards").glob("*.tar"):
        files.pipe_file(f"/listed/{path.name}", path.read_bytes())
    assert len(read_manifest("memory://listed/*.tar")) == 9
    with pytest.raises(UserError) as caught:
        read_manifest("memory://listed/*.parquet")
    assert str(caught.value) == "memory://listed/*.parquet: no such file; check the pattern, and keep it in quotes"


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(remote.MODULES, "https", "no_such_module")
    data = table(tmp_path / "t.csv", ["https://host/a.png"])
    remedy = "install it with: pip install 'deltaclip[remote]', or download the files and give their folder"
    for what, place in ((str(data), data), ("https://host/t.csv", "https://host/t.csv")):
        with pytest.raises(UserError) as caught:
            read_manifest(what)
        assert str(caught.value) == f"{place}: https:// needs no_such_module, which is not installed; {remedy}"
    require([Path("https://host/a.png")], place=tmp_path)  # no address: nothing would be fetched


def test_a_plain_path_is_never_fetched(server, folder):
    """Only who makes an address reaches the network: a server that is asked for such a path does not."""
    name = sorted(path.name for path in (folder / "metadata").glob("*.png"))[0]
    with pytest.raises(UnreadableFile, match="no such file"):
        read_image_bytes(Path(f"{server.url}/metadata/{name}"), None)
    assert not server.asked


def test_addresses_survive_pickle_and_odd_spellings():
    for text in ("https://host/a//b.png", "https://host/a/./b.png?x=1", "s3://bucket/a b.png", "HTTPS://host/Ä.png"):
        path = RemotePath.of(text)
        assert str(pickle.loads(pickle.dumps(path))) == str(path)  # noqa: S301
        assert str(path) == text.replace("HTTPS", "https")


def test_what_a_killed_process_left_is_removed(server, tmp_path):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code = (
        "from deltaclip.features.data.addresses import RemotePath\n"
        "from deltaclip.features.data.remote import held\n"
        f"with held(RemotePath.of('{server.url}/metadata/metadata.csv')):\n"
        "    "
    )
    env = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code + kill], check=False, env=env)
    assert len(list(tmp_path.iterdir())) == 1
    subprocess.run([sys.executable, "-c", code + "pass"], check=True, env=env)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_at_random_moments(demo_folder, tmp_path_factory, tmp_path, tiny_backbone):
    found = Server()
    with found.process, serving(make_kill_set(demo_folder, tmp_path_factory.mktemp("kill"))) as server:
        base = f"{server.url}/demo.csv"
        assert kill_often(found, base, tmp_path, tiny_backbone, kills=6, seed=4).kills == 6
        found.process.stdin.close()
