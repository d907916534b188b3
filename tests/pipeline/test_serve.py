"""The server over real HTTP: scores, limits, hostile inputs, load, a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest

from deltaclip.base.errors import UserError
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.serve import _application, listen, serve
from deltaclip.pipeline.serving.service import Pair, QueueFull, Refused, Scored, Service
from deltaclip.pipeline.settings import PredictConfig, ServeConfig
from deltaclip.tests.features.data.odd_images import png_header, refused_files, usable_files
from deltaclip.tests.pipeline.conftest import write_csv

server_of = pytest.importorskip("deltaclip.pipeline.serving.app", reason="the extra serve is not installed")

BOUNDARY = b"----a-boundary"
# bf16 rounds differently in batches of other sizes.
CLOSE = 5e-3


def form(*fields):
    """A multipart body of (name, value) fields, where bytes are a file."""
    parts = []
    for name, value in fields:
        head = f'content-disposition: form-data; name="{name}"'
        if isinstance(value, bytes):
            head += '; filename="a.png"\r\ncontent-type: application/octet-stream'
        content = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        parts.append(b"--" + BOUNDARY + b"\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n")
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


class Client:
    """Asks one server; every answer is (status, JSON), its headers are kept."""

    def __init__(self, port, app=None):
        self.port, self.app = port, app

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            content = answer.read()
        self.headers = answer.headers
        return answer.status, json.loads(content) if "json" in answer.headers["content-type"] else content.decode()

    def post(self, path, *fields):
        kind = f"multipart/form-data; boundary={BOUNDARY.decode()}"
        return self.ask("POST", path, form(*fields), {"content-type": kind})

    def raw(self, content, *, wait_s=10.0):
        """Send bytes and return all that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as connection:
            connection.sendall(content)
            received = b""
            while part := connection.recv(65536):
                received += part
        return received


@pytest.fixture(scope="module")
def scorer(demo_run):
    return Scorer.load(demo_run, device="cpu")


@pytest.fixture(scope="module")
def start(demo_run, scorer):
    """Start servers with some settings, in threads of this process; all stop at the end."""
    with contextlib.ExitStack() as running:

        def begin(*, of=scorer, **settings):
            app = _application(ServeConfig(run=demo_run, **settings), of)
            bound = running.enter_context(listen("127.0.0.1", 0))
            ready = threading.Event()
            server = server_of.make_server(app, on_ready=ready.set)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
            thread.start()

            def stop():
                server.should_exit = True
                thread.join(20)
                assert not thread.is_alive()

            running.callback(stop)
            assert ready.wait(30)
            return Client(bound.getsockname()[1], app)

        yield begin


@pytest.fixture(scope="module")
def files(tmp_path_factory, demo_folder, demo_rows):
    """A root with an image, a folder, a link that leaves it and a pipe."""
    root = tmp_path_factory.mktemp("root") / "images"
    (root / "sub").mkdir(parents=True)
    content = (demo_folder / demo_rows[0]["image"]).read_bytes()
    (root / "sub" / "a.png").write_bytes(content)
    (root.parent / "outside.png").write_bytes(content)
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "large.bin").write_bytes(bytes(1_100_000))
    os.mkfifo(root / "pipe.png")
    return root


@pytest.fixture(scope="module")
def client(start, files):
    return start(root=files, max_request_mb=1, max_megapixels=1, timeout_s=20)


@pytest.fixture(scope="module")
def picture(demo_folder, demo_rows):
    return (demo_folder / demo_rows[0]["image"]).read_bytes()


def test_an_upload_scores_what_the_scorer_says(client, scorer, demo_folder, demo_rows):
    for row in demo_rows[:3]:
        path = demo_folder / row["image"]
        status, found = client.post("/score", ("image", path.read_bytes()), ("prompt", row["prompt"]))
        expected = scorer.score(path, row["prompt"])
        assert status == 200
        assert found.pop("prompt_truncated") is False
        columns = expected.scores.columns()
        assert found.pop("flag") == columns.pop("flag")[0] == ""
        assert found == pytest.approx({name: float(values[0]) for name, values in columns.items()})


def test_a_path_under_the_root_scores_what_its_upload_does(client, picture):
    prompt = ("prompt", "ein Kreis, 円 ○")
    by_path = client.post("/score", ("path", "sub/a.png"), prompt)
    assert by_path == client.post("/score", ("image", picture), prompt)
    assert by_path == client.post("/score", ("path", "sub\\a.png"), prompt)


def test_a_batch_answers_pair_by_pair(client, scorer, demo_folder, demo_rows):
    paths = [demo_folder / row["image"] for row in demo_rows[:3]]
    prompts = [row["prompt"] for row in demo_rows[:3]]
    fields = [("images", path.read_bytes()) for path in paths] + [("images", b"no image")]
    status, found = client.post("/score/batch", *fields, *[("prompts", prompt) for prompt in [*prompts, "x"]])
    assert status == 200
    assert [each["quality"] for each in found["results"][:3]] == pytest.approx(
        scorer.score(paths, prompts).q, abs=CLOSE
    )
    assert found["results"][3] == {"error": "image: not an image in a known format"}
    status, found = client.post("/score/batch", ("paths", "sub/a.png"), ("paths", "none.png"), ("prompts", "x"))
    assert status == 200
    assert found["results"][0]["consistency"] == pytest.approx(float(scorer.score(paths[0], "x").c[0]), abs=CLOSE)
    assert found["results"][1] == {"error": "path: no such file"}


def test_a_batch_says_of_all_what_predict_says(client, demo_run, *, demo_folder, demo_rows, tmp_path):
    rows = list({row["image"]: row for row in demo_rows}.values())[:12]
    fields = [("images", (demo_folder / row["image"]).read_bytes()) for row in rows] + [("images", b"no image")]
    status, found = client.post("/score/batch", *fields, *[("prompts", row["prompt"]) for row in [*rows, rows[0]]])
    write_csv(tmp_path / "rows.csv", [{"image": row["image"], "prompt": row["prompt"]} for row in rows])
    target = str(tmp_path / "rows.csv")
    expected = predict(PredictConfig(run=demo_run, target=target, image_root=demo_folder, device="cpu"))
    assert status == 200
    assert (found["unlike"], found["trust"]) == (expected.unlike, expected.trust)
    assert found["trust"][-1].endswith("12 pairs is unlike those that the run was trained on")
    assert client.post("/score/batch", ("images", b"x"), ("prompts", "x"))[1]["trust"] == []  # nothing was scored


def test_of_a_batch_of_strange_pictures_it_is_said_how_many_and_whether_they_are_together(scorer):
    limits = {"root": None, "max_pixels": 10**6, "max_bytes": 10**6, "max_prompt_chars": 100, "wait_s": 0}
    service = Service(scorer, **limits, coverage=0.9, batch_size=1, queue_size=2)
    found = [Scored({"flag": "unlike: center" if place else ""}, 0.999, str(place)) for place in range(13)]
    unlike, lines = service.together([*found, Refused("image: none")])
    assert unlike == 12
    assert lines[-2].startswith("together the pairs are unlike every source that the run was trained on")
    assert lines[-1].startswith("12 of 13 pairs are unlike those that the run was trained on (12 by center)")
    same = [each._replace(image="one") for each in found]  # one picture many times is no set
    assert not [line for line in service.together(same).lines if line.startswith("together")]


def test_a_long_prompt_is_scored_and_said_to_be_cut(client, picture):
    status, found = client.post("/score", ("image", picture), ("prompt", "red circle " * 100))
    assert (status, found["prompt_truncated"]) == (200, True)


def test_health_page_and_document(client, demo_run):
    status, found = client.ask("GET", "/healthz")
    assert (status, found["status"], found["run"]) == (200, "ok", demo_run.name)
    assert (found["labels"], found["needs_prompt"]) == (["quality", "consistency"], ["consistency"])
    status, page = client.ask("GET", "/")
    assert status == 200
    assert "<title>deltaclip</title>" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "the page must load nothing from elsewhere"
    status, document = client.ask("GET", "/openapi.json")
    assert status == 200
    assert {"/score", "/score/batch", "/healthz"} == document["paths"].keys()
    common = {"200", "400", "403", "408", "413", "500", "503"}
    assert document["paths"]["/healthz"]["get"]["responses"].keys() == common
    for path in (SCORE, BATCH):
        assert document["paths"][path]["post"]["responses"].keys() == common | {"415", "422"}
    body = document["paths"]["/score"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert body["required"] == ["prompt"]
    assert body["properties"]["image"]["format"] == "binary"


def test_what_the_run_has_not_learned_is_null(start, scorer, picture):
    client = start(of=Scorer(scorer.heads, scorer.backbone, ["quality"]))
    answers = [client.post("/score", ("image", picture), *prompt) for prompt in ([("prompt", "x")], [])]
    batch = client.post("/score/batch", ("images", picture), ("images", picture))
    _, document = client.ask("GET", "/openapi.json")
    for status, found in answers:
        assert (status, found["consistency"], found["consistency_base"], found["c"]) == (200, None, None, None)
    assert answers[0] == answers[1]
    assert [each["quality"] for each in batch[1]["results"]] == pytest.approx([answers[0][1]["quality"]] * 2, abs=CLOSE)
    body = document["paths"]["/score"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert body["required"] == []
    status, health = client.ask("GET", "/healthz")
    assert (status, health["labels"], health["needs_prompt"]) == (200, ["quality"], [])


def test_three_targets_are_named_and_scored_and_those_that_see_the_prompt_are_told(start, colour_run, picture):
    scorer = Scorer.load(colour_run, device="cpu")
    client, targets = start(of=scorer), ["quality", "consistency", "colour"]
    parts = ("", "_base", "_delta", "_low", "_high")
    names = [f"{target}{part}" for target in targets for part in parts] + ["q", "c", "flag"]
    _, document = client.ask("GET", "/openapi.json")
    assert list(document["components"]["schemas"]["Scores"]["properties"]) == [*names, "prompt_truncated"]
    _, health = client.ask("GET", "/healthz")
    assert (health["labels"], health["needs_prompt"]) == (targets, ["consistency"])
    status, found = client.post("/score", ("image", picture), ("prompt", "a red circle"))
    expected = scorer.score(picture, "a red circle").scores.columns()
    assert status == 200
    assert found["flag"] == expected["flag"][0]
    numbers = [name for name in names if name != "flag"]
    assert {name: found[name] for name in numbers} == {
        name: pytest.approx(float(expected[name][0])) for name in numbers
    }


HOSTILE = {
    "no fields": ((), 422, "prompt: is missing"),
    "no prompt": ((("image", b"x"),), 422, "prompt: is missing"),
    "empty prompt": ((("image", b"x"), ("prompt", "  ")), 422, "prompt: is empty"),
    "no image": ((("prompt", "x"),), 422, "give either image, a file, or path, a path under the server's root"),
    "both": (
        (("prompt", "x"), ("image", b"x"), ("path", "sub/a.png")),
        422,
        "give either image, a file, or path, a path under the server's root",
    ),
    "text as image field": ((("prompt", "x"), ("image", "text")), 422, "image: has the wrong type: send a file"),
    "file as prompt": ((("prompt", b"x"), ("image", b"x")), 422, "prompt: has the wrong type: send a text"),
    "empty file": ((("prompt", "x"), ("image", b"")), 422, "image: empty file"),
    "10,000 characters": (
        (("prompt", "y" * 10_000), ("image", b"x")),
        422,
        "prompt: has 10,000 characters, at most 2,000 are taken",
    ),
    "prompt in no UTF-8": ((("prompt", "\udcff\udcfe"), ("image", b"x")), 400, "text fields must be UTF-8"),
    "bomb": (
        (("prompt", "x"), ("image", png_header(60_000, 60_000))),
        422,
        "image: 60000 x 60000 is over 1 million pixels",
    ),
    "over the limit": (
        (("prompt", "x"), ("image", png_header(1001, 1000))),
        422,
        "image: 1001 x 1000 is over 1 million pixels",
    ),
    "out by dots": ((("prompt", "x"), ("path", "../outside.png")), 422, "path: must be relative and stay in the root"),
    "dots inside": ((("prompt", "x"), ("path", "sub/../a.png")), 422, "path: must be relative and stay in the root"),
    "out by backslashes": (
        (("prompt", "x"), ("path", "..\\outside.png")),
        422,
        "path: must be relative and stay in the root",
    ),
    "out by percents": (
        (("prompt", "x"), ("path", "%2e%2e/outside.png")),
        422,
        "path: must be relative and stay in the root",
    ),
    "home": ((("prompt", "x"), ("path", "~/a.png")), 422, "path: must be relative and stay in the root"),
    "absolute": ((("prompt", "x"), ("path", "/etc/passwd")), 422, "path: must be relative and stay in the root"),
    "zero byte": ((("prompt", "x"), ("path", "a\0.png")), 422, "path: must be relative and stay in the root"),
    "link": ((("prompt", "x"), ("path", "link.png")), 422, "path: links to a file outside the image root"),
    "folder": ((("prompt", "x"), ("path", "sub")), 422, "path: is not a file"),
    "pipe": ((("prompt", "x"), ("path", "pipe.png")), 422, "path: is not a file"),
    "large file": ((("prompt", "x"), ("path", "large.bin")), 422, "path: the file is over 1 MB"),
    "long name": ((("prompt", "x"), ("path", "a" * 5000)), 422, "path: File name too long"),
    "no such file": ((("prompt", "x"), ("path", "none.png")), 422, "path: no such file"),
}


@pytest.mark.parametrize(("fields", "status", "sentence"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_fields_are_answered_in_one_sentence(client, fields, status, sentence):
    assert client.post("/score", *fields) == (status, {"error": sentence})


def test_hostile_images_are_refused_with_their_reason(client):
    for name, (content, _) in refused_files().items():
        status, found = client.post("/score", ("image", content), ("prompt", "x"))
        assert status == 422, name
        assert found["error"].startswith("image: "), name


def test_odd_images_are_scored(client):
    for name, content in usable_files().items():
        status, found = client.post("/score", ("image", content), ("prompt", "x"))
        assert (status, 0 <= found["quality"] <= 1) == (200, True), name


BATCHES = {
    "neither": ((("prompts", "x"),), "give either images, files, or paths, paths under the server's root"),
    "prompts": (
        (("paths", "a"), ("paths", "b"), ("paths", "c"), ("prompts", "x"), ("prompts", "y")),
        "3 images but 2 prompts: give one an image, or a single one for all",
    ),
    "many": (
        (*[("paths", "a")] * 65, ("prompts", "x")),
        "65 images are more than the 64 that one request may hold",
    ),
}


def test_one_of_many_prompts_in_no_utf8_is_found_and_equal_ones_are_not_mixed_up(client):
    paths = [("paths", "sub/a.png")] * 3
    fine = client.post("/score/batch", *paths, ("prompts", "\xe9"), ("prompts", "\xe9"), ("prompts", "x"))
    assert (fine[0], len(fine[1]["results"])) == (200, 3)
    # The same but for the last bit, in which products of several rows may differ from row to row.
    assert fine[1]["results"][0] == pytest.approx(fine[1]["results"][1], abs=1e-6)
    # Read as Latin-1 the third is a text that stands in the body, but before the second.
    wrong = client.post("/score/batch", *paths, ("prompts", "\xe9"), ("prompts", "x"), ("prompts", "\udce9"))
    assert wrong == (400, {"error": "text fields must be UTF-8"})


@pytest.mark.parametrize(("fields", "sentence"), BATCHES.values(), ids=BATCHES.keys())
def test_hostile_batches(client, fields, sentence):
    assert client.post("/score/batch", *fields) == (422, {"error": sentence})


HEAD = b"POST /score HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: multipart/form-data; boundary=b\r\n"
RAW = {
    "huge declared length": (HEAD + b"content-length: 99999999999\r\n\r\n", 413, b"the request is over 1 MB"),
    "a length of 5,000 digits": (HEAD + b"content-length: " + b"9" * 5000 + b"\r\n\r\n", 400, b""),
    "negative length": (HEAD + b"content-length: -5\r\n\r\n", 400, b""),
    "chunks over the limit": (
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + (b"10000\r\n" + bytes(65536) + b"\r\n") * 20,
        413,
        b"the request is over 1 MB",
    ),
    "no boundary in the body": (HEAD + b"content-length: 5\r\nconnection: close\r\n\r\nhello", 400, b""),
    "another host": (
        b"GET /healthz HTTP/1.1\r\nhost: evil.example\r\n\r\n",
        403,
        b"host 'evil.example' is not served: ask by 127.0.0.1 or ::1 or localhost",
    ),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, b""),
    "a head without end": (b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"y" * 200_000, 400, b""),
}


@pytest.mark.parametrize(("content", "status", "words"), RAW.values(), ids=RAW.keys())
def test_hostile_bytes(client, content, status, words):
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may close before all is sent
        answer = client.raw(content)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert words in answer
    assert client.ask("GET", "/healthz")[0] == 200


def test_unknown_addresses_and_methods(client):
    for path in ("/none", "/score/"):
        assert client.ask("GET", path) == (404, {"error": "no such address; see /openapi.json"})
    sentence = {"error": "another method is needed here; see /openapi.json"}
    for method, path, allowed in (
        ("GET", "/score", "POST"),
        ("OPTIONS", "/score/batch", "POST"),
        ("TRACE", "/healthz", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("DELETE", "/openapi.json", "GET, HEAD"),
    ):
        assert client.ask(method, path) == (405, sentence)
        assert client.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/", "/healthz", "/openapi.json"])
def test_head_is_answered_as_get_without_a_body(client, path):
    answer = client.raw(b"HEAD %b HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n" % path.encode())
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


# Rule by rule: the same sentence at every address and in every encoding of a form.
SCORE, BATCH = "/score", "/score/batch"
MULTI, URL = "multipart", "url-encoded"
KIND = {MULTI: f"multipart/form-data; boundary={BOUNDARY.decode()}", URL: "application/x-www-form-urlencoded"}
EITHER = "give either image, a file, or path, a path under the server's root"
EITHERS = "give either images, files, or paths, paths under the server's root"
TWICE, NO_UTF8 = "is given 2 times; give it once", "text fields must be UTF-8"
NO_FILE, NO_TEXT = "has the wrong type: send a file", "has the wrong type: send a text"
OUTSIDE = "path: must be relative and stay in the root"
RULES = [
    ("no prompt", SCORE, MULTI, [("path", "sub/a.png")], 422, "prompt: is missing"),
    ("no prompt", SCORE, URL, [("path", "sub/a.png")], 422, "prompt: is missing"),
    ("no prompt", BATCH, MULTI, [("paths", "sub/a.png")], 422, "prompts: is missing"),
    ("no prompt", BATCH, URL, [("paths", "sub/a.png")], 422, "prompts: is missing"),
    ("blank prompt", SCORE, MULTI, [("path", "sub/a.png"), ("prompt", " \t")], 422, "prompt: is empty"),
    ("blank prompt", SCORE, URL, [("path", "sub/a.png"), ("prompt", " \t")], 422, "prompt: is empty"),
    ("blank prompt", BATCH, MULTI, [("paths", "sub/a.png"), ("prompts", " \t")], 200, "prompt: is empty"),
    ("blank prompt", BATCH, URL, [("paths", "sub/a.png"), ("prompts", " \t")], 200, "prompt: is empty"),
    ("no text", SCORE, MULTI, [("path", "sub/a.png"), ("prompt", "\udcff")], 400, NO_UTF8),
    ("no text", SCORE, URL, [("path", "sub/a.png"), ("prompt", "\udcff")], 400, NO_UTF8),
    ("no text", BATCH, MULTI, [("paths", "\udcff"), ("prompts", "x")], 400, NO_UTF8),
    ("no text", BATCH, URL, [("paths", "\udcff"), ("prompts", "x")], 400, NO_UTF8),
    ("no image", SCORE, MULTI, [("prompt", "x")], 422, EITHER),
    ("no image", SCORE, URL, [("prompt", "x")], 422, EITHER),
    ("no image", BATCH, MULTI, [("prompts", "x")], 422, EITHERS),
    ("no image", BATCH, URL, [("prompts", "x")], 422, EITHERS),
    ("twice", SCORE, MULTI, [("path", "a"), ("prompt", "x"), ("prompt", "y")], 422, f"prompt: {TWICE}"),
    ("twice", SCORE, URL, [("path", "a"), ("path", "b"), ("prompt", "x")], 422, f"path: {TWICE}"),
    ("twice", SCORE, MULTI, [("image", b"a"), ("image", b"b"), ("prompt", "x")], 422, f"image: {TWICE}"),
    ("unknown", SCORE, MULTI, [("path", "a"), ("promt", "x")], 422, "promt: no such field; did you mean 'prompt'?"),
    ("unknown", BATCH, URL, [("paths", "a"), ("prompt", "x")], 422, "prompt: no such field; did you mean 'prompts'?"),
    ("text for a file", BATCH, MULTI, [("images", "a"), ("prompts", "x")], 422, f"images: {NO_FILE}"),
    ("text for a file", BATCH, URL, [("images", "a"), ("prompts", "x")], 422, f"images: {NO_FILE}"),
    ("file for a text", BATCH, MULTI, [("paths", b"a"), ("prompts", "x")], 422, f"paths: {NO_TEXT}"),
    ("blank path", SCORE, URL, [("path", " "), ("prompt", "x")], 422, "path: is empty"),
    ("blank path", BATCH, MULTI, [("paths", ""), ("prompts", "x")], 200, "path: is empty"),
    ("out of the root", SCORE, URL, [("path", "../a"), ("prompt", "x")], 422, OUTSIDE),
    ("out of the root", BATCH, MULTI, [("paths", "../a"), ("prompts", "x")], 200, OUTSIDE),
    ("empty file", BATCH, MULTI, [("images", b""), ("prompts", "x")], 200, "image: empty file"),
]  # fmt: skip


def encoded(encoding, fields):
    if encoding == MULTI:
        return form(*fields)
    pairs = [(name, value.encode("utf-8", "surrogateescape")) for name, value in fields]
    return urllib.parse.urlencode(pairs).encode()


@pytest.mark.parametrize(
    ("path", "encoding", "fields", "status", "sentence"),
    [rule[1:] for rule in RULES],
    ids=[" ".join(rule[:3]) for rule in RULES],
)
@pytest.mark.parametrize("shout", [False, True], ids=["", "in capitals"])
def test_a_rule_has_one_sentence_at_every_address(client, path, encoding, *, fields, status, sentence, shout):
    kind = KIND[encoding]
    if shout:
        kind = kind.replace("multipart/form-data", "Multipart/Form-Data").replace("application/x", "APPLICATION/X")
    found = client.ask("POST", path, encoded(encoding, fields), {"content-type": kind})
    failure = {"error": sentence}
    assert found == (status, {"results": [failure], "unlike": None, "trust": []} if status == 200 else failure)


@pytest.mark.parametrize("path", [SCORE, BATCH])
@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "text/plain", "image/png"])
def test_what_is_no_form_is_415(client, path, kind):
    named = kind.partition(";")[0].lower()
    sentence = f"content-type: {named} is not taken; send a form, multipart/form-data"
    assert client.ask("POST", path, b'{"prompt": "x"}', {"content-type": kind}) == (415, {"error": sentence})
    assert client.ask("POST", path, b"x") == (415, {"error": sentence.replace(named, "none")})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"hello", "the form cannot be read ("),
        (form(("prompt", "x"))[:-8], "the form cannot be read: its last boundary is missing"),
        (form(("prompt", "x")).replace(b'name="prompt"', b""), "the form cannot be read: a part has no name"),
    ],
)
def test_a_form_that_cannot_be_read_is_400(client, body, words):
    status, found = client.ask("POST", "/score", body, {"content-type": KIND[MULTI]})
    assert (status, found["error"][: len(words)]) == (400, words)


def test_a_file_field_in_which_none_was_chosen_is_none(client):
    body = form(("path", "sub/a.png"), ("prompt", "x"), ("image", b"")).replace(b'"a.png"', b'""')
    assert client.ask("POST", "/score", body, {"content-type": KIND[MULTI]})[0] == 200


def test_prompts_are_scored_as_they_came(client, scorer, picture, monkeypatch):
    seen = []
    embed = scorer.embed_prompts
    monkeypatch.setattr(scorer, "embed_prompts", lambda texts: seen.extend(texts) or embed(texts))
    given = "  a red circle\r\n&amp; more "
    client.post("/score", ("image", picture), ("prompt", given))
    body = urllib.parse.urlencode({"prompt": given, "path": "sub/a.png"}).encode()
    client.ask("POST", "/score", body, {"content-type": KIND[URL]})
    assert seen == [given, given]


def test_a_slow_client_is_answered_and_holds_nobody_up(start, picture):
    client = start(timeout_s=1)
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as slow:
        slow.sendall(HEAD + b"content-length: 1000\r\n\r\n")
        assert client.post("/score", ("image", picture), ("prompt", "x"))[0] == 200
        answer = b""
        while b"}" not in answer and (part := slow.recv(65536)):  # head and sentence may come apart
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the request did not arrive within 1 s" in answer


def test_a_connection_that_sends_no_head_is_closed(client, monkeypatch):
    monkeypatch.setattr(server_of, "HEAD_S", 0.3)
    started = time.monotonic()
    assert client.raw(b"GET / HT") == b""
    assert time.monotonic() - started < 5


def test_without_a_root_no_path_is_taken(start):
    expected = "path: no paths are taken here: start the server with --root, or upload the image"
    assert start().post("/score", ("path", "a.png"), ("prompt", "x")) == (422, {"error": expected})


def test_a_full_queue_is_503_and_the_server_goes_on(start, picture):
    client = start(queue_size=2, batch_size=1)
    fields = (("image", picture), ("prompt", "x"))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: client.post("/score", *fields), range(48)))
    assert {status for status, _ in answers} == {200, 503}
    full = {"error": "as many images wait as may wait: try again later"}
    assert all(found == full for status, found in answers if status == 503)
    assert client.post("/score", *fields)[0] == 200


def test_what_finds_no_room_is_not_decoded(scorer, picture):
    limits = {"root": None, "max_pixels": 10**6, "max_bytes": 10**6, "max_prompt_chars": 100, "wait_s": 0}
    service = Service(scorer, **limits, coverage=0.9, batch_size=1, queue_size=2)

    async def ask():
        service.batcher.start()
        pairs = [[Pair(picture, "x")] * 2, [Pair(b"no image", "x")] * 2]
        answers = await asyncio.gather(*(service.score(each) for each in pairs), return_exceptions=True)
        again = await service.score(pairs[-1])
        await service.stop()
        return answers, again

    with ThreadPoolExecutor(1) as pool:  # the loop of a browser in another test may still run on this thread
        (first, second), again = pool.submit(lambda: asyncio.run(ask())).result()
    assert [0 <= each.values["quality"] <= 1 for each in first] == [True, True]
    assert isinstance(second, QueueFull)  # decoded, they would have been refused
    assert [str(each) for each in again] == ["image: not an image in a known format"] * 2


def test_more_requests_than_may_run_are_503(start, picture):
    client = start(max_requests=1, timeout_s=5)
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as slow:
        slow.sendall(HEAD + b"content-length: 1000\r\n\r\n")
        deadline = time.monotonic() + 5
        while client.app.num_running < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        status, found = client.post("/score", ("image", picture), ("prompt", "x"))
        assert (status, found) == (503, {"error": "1 requests are being answered: try again later"})
        assert client.ask("GET", "/healthz")[0] == 200, "health is told in any case"
    deadline = time.monotonic() + 5
    while client.app.num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.post("/score", ("image", picture), ("prompt", "x"))[0] == 200


def test_under_load_every_answer_is_right_and_forwards_are_shared(start, scorer, demo_folder, demo_rows):
    client = start(batch_size=16, batch_wait_ms=20)
    rows = demo_rows[:12]
    paths, prompts = [demo_folder / row["image"] for row in rows], [row["prompt"] for row in rows]
    expected = scorer.score(paths, prompts)
    contents = [path.read_bytes() for path in paths]

    def ask(number):
        place = number % len(rows)
        return place, client.post("/score", ("image", contents[place]), ("prompt", prompts[place]))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(96)))
    for place, (status, found) in answers:
        assert status == 200
        assert found["quality"] == pytest.approx(float(expected.q[place]), abs=CLOSE)
        assert found["consistency"] == pytest.approx(float(expected.c[place]), abs=CLOSE)
    _, health = client.ask("GET", "/healthz")
    assert health["scored"] == 96
    assert health["batches"] < 70
    assert health["waiting"] == 0


def test_a_batch_size_of_one_scores_each_by_itself(start, picture):
    client = start(batch_size=1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: client.post("/score", ("image", picture), ("prompt", "x")), range(16)))
    _, health = client.ask("GET", "/healthz")
    assert health["scored"] == health["batches"] == 16


def test_a_first_image_waits_for_others(start, picture):
    client = start(batch_size=4, batch_wait_ms=1000)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: client.post("/score", ("image", picture), ("prompt", "x")), range(3)))
    _, health = client.ask("GET", "/healthz")
    assert (health["scored"], health["batches"]) == (3, 1)


def test_an_answer_that_takes_too_long_is_503(start, picture):
    client = start(batch_wait_ms=1000, timeout_s=0.3)
    status, found = client.post("/score", ("image", picture), ("prompt", "x"))
    assert (status, found) == (503, {"error": "no answer within 0.3 s: try again later"})
    assert client.ask("GET", "/healthz")[0] == 200


def test_prompts_may_be_bounded_shorter(start, picture):
    sentence = "prompt: has 6 characters, at most 5 are taken"
    client = start(max_prompt_chars=5)
    assert client.post("/score", ("image", picture), ("prompt", "a blue")) == (422, {"error": sentence})
    assert client.post("/score", ("image", picture), ("prompt", "a red"))[0] == 200


def test_an_open_address_answers_to_any_name(start):
    answer = start(host="0.0.0.0").ask("GET", "/healthz", headers={"host": "scores.example"})  # noqa: S104 - meant
    assert answer[0] == 200


def test_many_idle_connections_leave_room(client, picture):
    with contextlib.ExitStack() as held:
        for _ in range(200):
            held.enter_context(socket.create_connection(("127.0.0.1", client.port), timeout=10))
        assert client.post("/score", ("image", picture), ("prompt", "x"))[0] == 200


def command(run, *options):
    program = "from deltaclip.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, "serve", str(run), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_the_command_says_its_address_and_ends_gracefully(demo_run, picture, sign):
    process = command(demo_run, "--json")
    try:
        line = process.stderr.readline()
        found = re.fullmatch(r"deltaclip: serving (.*) on (http://127\.0\.0\.1:(\d+))\n", line)
        assert found, line
        client = Client(int(found[3]))
        assert client.ask("GET", "/none")[0] == 404
        be_a_nuisance(client, b"no image")
        assert client.post("/score", ("image", picture), ("prompt", "x"))[0] == 200
        process.send_signal(sign)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (0, "")
    result = json.loads(out)
    assert result["address"] == found[2]
    assert result["answers"]["200"] == 2  # one of them to a request for a web socket, which is the page
    assert result["answers"]["404"] == 1


def be_a_nuisance(client, picture):
    """Send what libraries like to log about: no HTTP, broken forms, odd images, clients that leave."""
    for raw in (
        b"\x16\x03\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nupgrade: websocket\r\nconnection: upgrade, close\r\n\r\n",
    ):
        client.raw(raw)
    boundary = f"--{BOUNDARY.decode()}--\r\n".encode()
    for body in (b"hello", form(("prompt", "x")) + b"after the end", form(("prompt", "x")).replace(boundary, b"")):
        client.ask("POST", "/score", body, {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"})
    client.post("/score", ("image", png_header(12_000, 12_000)), ("prompt", "x"))
    for content in refused_files().values():
        client.post("/score", ("image", content[0]), ("prompt", "x"))
    whole = form(("image", picture), ("prompt", "x"))
    head = HEAD.replace(b"boundary=b", b"boundary=" + BOUNDARY) + b"content-length: %d\r\n\r\n" % len(whole)
    for sent in (head + whole[:100], head + whole):  # gone in the middle of the request, and before the answer
        with socket.create_connection(("127.0.0.1", client.port)) as leaver:
            leaver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
            leaver.sendall(sent)


def test_a_defect_is_one_line_of_the_log_and_what_clients_do_none(start, scorer, picture, *, monkeypatch, capsys):
    client = start()
    with server_of.one_line_log():
        be_a_nuisance(client, picture)
        assert client.post("/score", ("image", picture), ("prompt", "x"))[0] == 200
        assert capsys.readouterr() == ("", "")
        monkeypatch.setattr(scorer, "score_crops", lambda *_, **__: int("x"))
        failed = {"error": "the server failed on this request; its log says why"}
        assert client.post("/score", ("image", picture), ("prompt", "x")) == (500, failed)
        said, deadline = "", time.monotonic() + 10
        while not said and time.monotonic() < deadline:  # it is logged once the answer is out
            said = capsys.readouterr().err
        (line,) = said.splitlines()
    assert line.startswith(
        "deltaclip: Exception in ASGI application: ValueError: invalid literal for int() with base 10: 'x' (test"
    )


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"backbone": "local-dir:none"}, "none"),
        ({"backbone": "ViT-B-32", "pretrained": "none.pt"}, "none.pt"),
        ({"device": "cpux"}, "cpux"),
    ],
)
def test_where_the_backbone_lies_and_the_device_are_taken(demo_run, settings, place):
    with pytest.raises(UserError, match=place):
        serve(ServeConfig(run=demo_run, port=0, **settings))


def test_what_cannot_be_served_is_one_line(demo_run, tmp_path):
    with pytest.raises(UserError) as error:
        serve(ServeConfig(run=demo_run, root=tmp_path / "none"))
    assert str(error.value) == f"{tmp_path / 'none'}: no such folder; give the folder of the images as --root"
    with listen("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(UserError) as error:
            serve(ServeConfig(run=demo_run, port=port))
        expected = f"127.0.0.1:{port}: cannot be listened on (Address already in use); give another --port, or 0 for a"
        assert str(error.value) == f"{expected} free one"
    with pytest.raises(UserError, match=r"cannot be listened on \(.*\); give --host an address of this machine$"):
        serve(ServeConfig(run=demo_run, host="999.1.1.1"))
