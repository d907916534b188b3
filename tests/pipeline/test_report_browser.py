"""The page of a run in a real browser, from a file: no request, no error, and what it does under mouse and keyboard."""

from __future__ import annotations

import itertools
import shutil

import pytest

from deltaclip.pipeline.report import report
from deltaclip.pipeline.settings import ReportConfig
from deltaclip.tests.pipeline.conftest import read_csv, read_json, write_csv

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
PHONE, DESKTOP = {"width": 375, "height": 812}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def page_file(demo_run, tmp_path_factory):
    """Page of the demo run, in which some prompts, sources and names are hostile."""
    run = tmp_path_factory.mktemp("page") / "run <i>"
    shutil.copytree(demo_run, run)
    rows = read_csv(run / "predictions.csv")
    for number, row in enumerate(rows):
        if number % 3 == 0:
            row.update(prompt=HOSTILE + "w" * 400 + row["prompt"], source=HOSTILE)
        if number % 5 == 0:
            row.update(quality_label="")
    write_csv(run / "predictions.csv", rows)
    return report(ReportConfig(runs=[run, demo_run], out=run.parent / "page.html", gallery=6)).page


@pytest.fixture(scope="module")
def opened(browser, page_file):
    """Open the page once, with everything that the browser had to say about it."""
    page = browser.new_page(viewport=DESKTOP)
    said, requests = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    yield page, said, requests
    page.close()


@pytest.fixture
def page(opened):
    page, said, _ = opened
    page.set_viewport_size(DESKTOP)
    page.evaluate("for (const form of document.forms) form.reset()")
    page.wait_for_timeout(20)  # the galleries follow after the event
    yield page
    assert said == []
    assert page.title() == "2 runs side by side"  # no script of the data has run


def test_it_asks_for_nothing_but_itself(opened, page_file):
    page, said, requests = opened
    page.wait_for_load_state("networkidle")
    assert {url for url in requests if not url.startswith("data:")} == {page_file.as_uri()}
    assert said == []
    broken = "[...document.images].filter((one) => !one.complete || one.naturalWidth === 0).length"
    assert page.evaluate("document.images.length") > 12
    assert page.evaluate(broken) == 0


def shown(page, gallery="#run2-gallery"):
    """Return quality, prediction, source and prompt of the rows in sight, in order."""
    return page.evaluate(
        """(gallery) => [...document.querySelectorAll(`${gallery} .card:not([hidden])`)].map((card) => {
            const row = sections[Number(card.closest("section").dataset.section)].rows[Number(card.dataset.at)];
            return [row.quality_label, row.quality, row.source, row.prompt, card.dataset.kinds];
        })""",
        gallery,
    )


def test_the_gallery_sorts_and_filters(page):
    form = page.locator("#run2-gallery form")
    everything = shown(page)
    errors = [abs(q - quality) for quality, q, *_ in everything]
    assert errors == sorted(errors, reverse=True)

    form.get_by_label("Show").select_option("worst")
    worst = shown(page)
    assert len(worst) == 6
    assert all("quality-worst" in row[4] for row in worst)
    assert form.locator("output").inner_text() == f"6 of {len(everything)} rows"
    form.get_by_label("Show").select_option("all")

    source = everything[0][2]
    form.get_by_label("Source").select_option(source)
    assert {row[2] for row in shown(page)} == {source}
    form.get_by_role("button", name="reset").click()
    page.wait_for_timeout(20)
    assert len(shown(page)) == len(everything)

    word = everything[3][3].split()[-1]
    form.get_by_label("Prompt has").fill(word.upper())
    found = shown(page)
    assert 0 < len(found) < len(everything)
    assert all(word in row[3] for row in found)
    form.get_by_label("Prompt has").fill("")

    form.get_by_label("Sort by").select_option("human")
    form.get_by_role("button", name="largest first").click()
    values = [row[0] for row in shown(page)]
    assert values == sorted(values)


def test_rows_without_a_label_come_last_and_hostile_sources_can_be_chosen(page):
    form = page.locator("#run1-gallery form")
    form.get_by_label("Label").select_option("quality")
    values = [row[0] for row in shown(page, "#run1-gallery")]
    known = [value for value in values if value is not None]
    assert None in values
    assert values[: len(known)] == known
    form.get_by_label("Source").select_option(HOSTILE)
    assert {row[2] for row in shown(page, "#run1-gallery")} == {HOSTILE}


def listed(page, value, target=""):
    """Return a value of the rows in the table of all rows, in order."""
    return page.evaluate(
        """([value, target]) => [...document.querySelectorAll("#run2-rows tbody .enlarge")]
            .map((button) => valueOf(sections[1].rows[Number(button.dataset.at)], value, target))""",
        [value, target],
    )


def test_all_rows_are_sorted_filtered_and_paged(page):
    part = page.locator("#run2-rows")
    pager, output = part.locator(".pager"), part.locator("output")
    assert output.inner_text() == "48 of 48 rows"
    assert len(listed(page, "image")) == 25
    heading = part.locator("thead th[data-value=over][data-target=quality]")
    heading.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    first = listed(page, "over", "quality")
    pager.get_by_role("button", name="next").click()
    assert pager.locator("span").inner_text() == "26 to 48"
    assert page.evaluate("document.activeElement.textContent") == "first"  # `next` is off: the keyboard is not lost
    both = first + listed(page, "over", "quality")
    assert both == sorted(both, reverse=True)
    word = listed(page, "prompt")[0].split()[-1]
    part.get_by_label("Image or prompt has").fill(word.upper())
    found = listed(page, "prompt")
    assert found
    assert all(word in prompt for prompt in found)
    part.get_by_label("Image or prompt has").fill("no such words")
    assert pager.locator("span").inner_text() == "none"
    part.get_by_role("button", name="reset").click()
    page.wait_for_timeout(20)
    source = listed(page, "source")[0]
    part.get_by_label("Source").select_option(source)
    assert set(listed(page, "source")) == {source}


def test_a_picture_is_enlarged_by_click_and_by_key_and_escape_gives_the_keyboard_back(page):
    viewer = page.locator("#viewer")
    button = page.locator("#run2-pictures .enlarge").nth(1)
    button.click()
    assert viewer.is_visible()
    assert viewer.locator("img").get_attribute("src") == button.locator("img").get_attribute("src")
    assert viewer.locator("img").bounding_box()["width"] > 2 * button.bounding_box()["width"]
    viewer.get_by_role("button", name="close").click()
    assert viewer.is_hidden()
    part = page.locator("#run2-rows")
    part.get_by_label("Source").select_option("")
    button = part.locator("tbody .enlarge").last
    button.focus()
    page.keyboard.press("Enter")
    assert button.inner_text() in viewer.inner_text()
    page.keyboard.press("Escape")
    assert viewer.is_hidden()
    assert page.evaluate("document.activeElement.textContent") == button.inner_text()


@pytest.mark.slow
def test_twenty_thousand_rows_stay_fluent(browser, demo_run, tmp_path):
    run = tmp_path / "many"
    shutil.copytree(demo_run, run)
    rows = [row for row in read_csv(run / "predictions.csv") if row["split"] == "test"]
    many = (dict(row, image=f"{copy}/{row['image']}") for copy in range(420) for row in rows)
    write_csv(run / "predictions.csv", list(itertools.islice(many, 20_000)))
    made = report(ReportConfig(runs=[run], out=tmp_path / "page.html"))
    assert made.size_bytes < 10e6
    page = browser.new_page(viewport=DESKTOP)
    page.goto(made.page.as_uri())
    assert page.locator("#run1-rows output").inner_text() == "20,000 of 20,000 rows"
    seconds = page.evaluate(
        """() => {
          const part = document.querySelector("#run1-rows");
          const timed = (act) => {
            const start = performance.now();
            act();
            part.offsetHeight;
            return performance.now() - start;
          };
          const words = part.querySelector("input");
          const filter = () => {
            words.value = "red";
            words.dispatchEvent(new Event("input", { bubbles: true }));
          };
          const buttons = [...part.querySelectorAll("thead button")];
          return [...buttons.map((button) => timed(() => button.click())), timed(filter)];
        }"""
    )
    page.close()
    assert max(seconds) < 3_000  # milliseconds; some 100 on an idle machine


def test_tables_sort_by_their_headings(page):
    table = page.locator("#run2-sources table")
    button = table.get_by_role("button", name="quality SROCC")
    column = "(table) => [...table.tBodies[0].rows].map((row) => Number(row.cells[2].dataset.key))"
    heading = table.locator("thead th").nth(2)
    assert heading.get_attribute("aria-sort") is None
    for order, reverse in (("descending", True), ("ascending", False)):
        button.focus()
        page.keyboard.press("Enter")
        values = table.evaluate(column)
        assert values == sorted(values, reverse=reverse)
        assert heading.get_attribute("aria-sort") == order
    table.get_by_role("button", name="source").click()
    assert heading.get_attribute("aria-sort") is None
    names = table.locator("tbody th").all_inner_texts()
    assert names == sorted(names)


def test_a_point_shows_its_row_under_the_pointer_and_by_keyboard(page):
    chart = page.locator("#run2-scatter .chart").first
    chart.scroll_into_view_if_needed()
    point = chart.locator(".mark").first
    point.hover()
    tip = page.locator("#tip")
    row = page.evaluate("(row) => sections[1].rows[row]", int(point.get_attribute("data-row")))
    words = tip.inner_text()
    assert row["prompt"] in words
    assert row["image"] in words
    assert f"quality: human {row['quality_label']:.3f}, predicted {row['quality']:.3f}" in words
    page.mouse.move(0, 0)
    assert tip.is_hidden()

    chart.focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() == words
    page.keyboard.press("End")
    assert tip.inner_text() != words
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= DESKTOP["width"]
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_the_keyboard_reaches_the_content_at_once_and_shows_where_it_is(page):
    page.reload()  # so that Tab starts at the top
    page.keyboard.press("Tab")
    skip = page.evaluate("[document.activeElement.textContent, document.activeElement.getBoundingClientRect().left]")
    assert skip == ["Skip to the results", 0]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_headings_go_down_by_one_and_controls_have_names(page):
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5')].map((one) => Number(one.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    unnamed = "[...document.querySelectorAll('select, input')].filter((one) => !one.labels.length).length"
    assert page.evaluate(unnamed) == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("width", [320, 375, 1200])
def test_the_page_never_scrolls_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 812})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


LUMINANCE = """() => {
  const channel = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (css) => {
    const [r, g, b] = css.match(/[\\d.]+/g).map(Number).map((c) => channel(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const root = getComputedStyle(document.documentElement);
  const probe = document.body.appendChild(document.createElement("i"));
  const of = (name) => {
    probe.style.color = root.getPropertyValue(name);
    return light(getComputedStyle(probe).color);
  };
  const ratio = (a, b) => (Math.max(of(a), of(b)) + 0.05) / (Math.min(of(a), of(b)) + 0.05);
  const names = ["--ink", "--faint", "--link", "--bad"];
  const found = {
    text: Math.min(...names.map((name) => ratio(name, "--page")), ratio("--faint", "--panel"),
      ratio("--bad", "--bad-page"), ratio("--ink", "--warn-page")),
    marks: Math.min(...[0, 1, 2, 3, 4, 5, 6, 7].map((number) => ratio(`--c${number}`, "--page"))),
  };
  probe.remove();
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_that_of_the_guidelines(page, scheme):
    page.emulate_media(color_scheme=scheme)
    found = page.evaluate(LUMINANCE)
    page.emulate_media(color_scheme="light")
    assert found["text"] >= 4.5  # WCAG 2.2, 1.4.3
    assert found["marks"] >= 3  # 1.4.11


def test_on_paper_controls_are_gone_and_everything_is_unfolded(page):
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".controls").first.is_hidden()
    # Of the table of all rows a part is on paper, and which one stands below it.
    assert page.locator(".pager button").first.is_hidden()
    assert page.locator(".pager span").first.is_visible()
    assert page.evaluate("[...document.querySelectorAll('details')].every((one) => one.open)")
    page.emulate_media(media="screen")


def test_without_scripts_everything_is_there(browser, page_file, demo_run):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    srocc = read_json(demo_run / "metrics.json")["test"]["quality"]["srocc"]
    assert f"{srocc:.3f}" in page.locator("#run2-result").inner_text()
    assert page.locator("#run2-gallery .card").first.is_visible()
    context.close()
