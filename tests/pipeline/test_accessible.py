"""Both pages under the rules of axe-core, in light and dark, on a phone and a desk."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
from axe_playwright_python.sync_playwright import Axe

from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.report import report
from deltaclip.pipeline.serve import _application, listen
from deltaclip.pipeline.settings import ReportConfig, ServeConfig

server_of = pytest.importorskip("deltaclip.pipeline.serving.app", reason="the extra serve is not installed")

LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in (375, 1200)]


def violations(page, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    found = Axe().run(page).response
    assert len(found["passes"]) > 10
    return {each["id"]: [node["html"][:200] for node in each["nodes"]] for each in found["violations"]}


@pytest.fixture(scope="module")
def report_page(browser, demo_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("accessible") / "page.html"
    other = shutil.copytree(demo_run, out.with_name("other"))
    report(ReportConfig(runs=[demo_run, other], out=out, gallery=4))
    page = browser.new_page(bypass_csp=True)  # its policy lets no other script run, that of axe neither
    page.goto(out.as_uri())
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    yield page
    page.close()


@pytest.fixture(scope="module")
def serve_page(browser, demo_run, demo_folder, demo_rows):
    """The page of a real server, with the scores of a picture on it."""
    app = _application(ServeConfig(run=demo_run), Scorer.load(demo_run, device="cpu"))
    ready = threading.Event()
    with listen("127.0.0.1", 0) as bound:
        server = server_of.make_server(app, on_ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        page = browser.new_page(bypass_csp=True)
        try:
            assert ready.wait(30)
            page.goto(f"http://127.0.0.1:{bound.getsockname()[1]}/")
            page.set_input_files("#file", demo_folder / demo_rows[0]["image"])
            page.get_by_label("Prompt").fill(demo_rows[0]["prompt"])
            page.get_by_role("button", name="Score").click()
            page.locator(".score").first.wait_for()
            yield page
        finally:
            page.close()
            server.should_exit = True
            thread.join(20)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_the_page_of_runs_breaks_no_rule(report_page, scheme, width):
    assert violations(report_page, scheme, width) == {}


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_the_page_of_the_server_breaks_no_rule(serve_page, scheme, width):
    assert violations(serve_page, scheme, width) == {}


def test_the_page_of_the_server_shows_scores_and_errors_and_asks_only_for_what_is_needed(serve_page):
    assert serve_page.locator(".score b").all_inner_texts() != []
    assert serve_page.locator(".score span").first.inner_text() == "Quality"
    labels = json.dumps({"status": "ok", "run": "x", "labels": ["quality"], "needs_prompt": []})
    serve_page.route("**/healthz", lambda route: route.fulfill(body=labels, content_type="application/json"))
    serve_page.reload()
    serve_page.get_by_text("Run: x.").wait_for()
    assert serve_page.get_by_label("Prompt").is_hidden()
    serve_page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    assert serve_page.get_by_role("button", name="Score").is_enabled()
    serve_page.get_by_role("button", name="Score").click()
    serve_page.get_by_text("prompt: is missing").wait_for()  # this server's run does need one
    assert violations(serve_page, "light", 1200) == {}
