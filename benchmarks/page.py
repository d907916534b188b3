"""What a report of many rows costs: `python -m benchmarks.page --run RUN --rows 20000`.

The test rows of a run are repeated with other prompts and scores until there are so many: only for measuring.
Prints the time to write the page, its size, and in Chromium the time until it can be used and of each action: sorting
by a column, filtering by a word, going to another page of the table, the slowest of each.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from deltaclip.pipeline.report import report
from deltaclip.pipeline.settings import ReportConfig

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ACTIONS = """() => {
  const part = document.querySelector("#run1-rows");
  const timed = (act) => {
    const start = performance.now();
    act();
    part.offsetHeight;
    return Math.round(performance.now() - start);
  };
  const words = part.querySelector("input");
  const fill = (value) => () => {
    words.value = value;
    words.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const buttons = [...part.querySelectorAll("thead button")];
  const sort = buttons.flatMap((button) => [timed(() => button.click()), timed(() => button.click())]);
  const filter = ["r", "re", "red", "red s", ""].map((value) => timed(fill(value)));
  const pages = [1, 2, 3, 4].map(() => timed(() => part.querySelector("[data-to=next]").click()));
  return { sort_ms: Math.max(...sort), filter_ms: Math.max(...filter), next_ms: Math.max(...pages) };
}"""


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run with predictions")
    parser.add_argument("--rows", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        shutil.copytree(options.run, run)
        _repeat(run / "predictions.csv", options.rows)
        start = time.perf_counter()
        made = report(ReportConfig(runs=[run], out=Path(folder) / "page.html"))
        found = {
            "rows": options.rows,
            "write_s": round(time.perf_counter() - start, 1),
            "size_mb": made.size_bytes / 1e6,
        }
        print(json.dumps({**found, "pictures": made.pictures, **_browsed(made.page)}))


def _repeat(path: Path, num_rows: int) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    names = [name for name in rows[0] if f"{name}_label" in rows[0]]
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for number in range(num_rows):
            row = dict(rows[number % len(rows)])
            row["prompt"] = f"{row['prompt']}, {number // len(rows)}"
            for name in names:
                row[name] = f"{min(1.0, max(0.0, float(row[name] or 0) + draw.gauss(0, 0.02))):.6g}"
            writer.writerow(row)


def _browsed(page_file: Path) -> dict[str, float]:
    program = next(path for name in BROWSERS if (path := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        start = time.perf_counter()
        page.goto(page_file.as_uri())
        page.locator("#run1-rows output").wait_for()
        load_s = time.perf_counter() - start
        found: dict[str, float] = page.evaluate(ACTIONS)
        browser.close()
    return {"load_s": round(load_s, 2), **found}


if __name__ == "__main__":
    main()
