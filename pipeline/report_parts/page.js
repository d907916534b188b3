"use strict";
// Everything from data enters the page as text, never as markup.
const sections = JSON.parse(document.getElementById("data").textContent);
for (const section of sections) {
  section.rows = section.rows.map((row) => Object.fromEntries(section.fields.map((name, i) => [name, row[i]])));
}
const words = (value) => (value === null ? "\u2013" : value.toFixed(3).replace("-", "\u2212"));

// Numbers by value, words by the reader's alphabet, what is missing last either way.
function compare(a, b, sign) {
  const missing = (value) => value === null || value === "";
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
}

// Tables.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const keyOf = (row, column) => {
    const key = row.cells[column].dataset.key;
    return column > 0 && key !== "" && Number.isFinite(Number(key)) ? Number(key) : key;
  };
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const first = column === 0 ? "ascending" : "descending";
      const other = column === 0 ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first ? other : first;
      headings.forEach((one) => one.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(keyOf(a, column), keyOf(b, column), sign));
      table.tBodies[0].append(...rows);
    });
  });
}

// Galleries.
for (const gallery of document.querySelectorAll(".gallery")) {
  const { rows } = sections[Number(gallery.dataset.section)];
  const form = gallery.querySelector("form");
  const list = gallery.querySelector(".cards");
  const cards = [...list.children].map((card) => ({
    card, row: rows[Number(card.dataset.at)], kinds: card.dataset.kinds.split(" "),
  }));
  const direction = form.elements.direction;
  const update = () => {
    const label = form.elements.label.value;
    const show = form.elements.show.value;
    const source = form.elements.source ? form.elements.source.value : "";
    const wanted = form.elements.prompt.value.trim().toLowerCase();
    const human = `${label}_label`;
    const error = (row) => (row[label] === null || row[human] === null ? null : row[label] - row[human]);
    const key = {
      error: (row) => (error(row) === null ? null : Math.abs(error(row))),
      over: error,
      human: (row) => row[human],
      predicted: (row) => row[label],
      delta: (row) => row[`${label}_delta`],
      prompt: (row) => row.prompt,
    }[form.elements.sort.value];
    const sign = direction.getAttribute("aria-pressed") === "true" ? -1 : 1;
    cards.sort((a, b) => compare(key(a.row), key(b.row), sign));
    let shown = 0;
    for (const { card, row, kinds } of cards) {
      const fits = (show === "all" || kinds.includes(`${label}-${show}`))
        && (!source || row.source === source) && row.prompt.toLowerCase().includes(wanted);
      card.hidden = !fits;
      shown += fits;
    }
    list.append(...cards.map(({ card }) => card));
    direction.textContent = sign < 0 ? "largest first" : "smallest first";
    form.querySelector("output").textContent = `${shown} of ${cards.length} rows`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    direction.setAttribute("aria-pressed", "true");
    setTimeout(update);  // the fields have their first values only after this event
  });
  direction.addEventListener("click", () => {
    direction.setAttribute("aria-pressed", String(direction.getAttribute("aria-pressed") !== "true"));
    update();
  });
  update();
}

// What a mark of a plot shows: under the pointer, or by the arrow keys.
const tip = document.getElementById("tip");
function fill(mark) {
  tip.replaceChildren();
  const add = (text) => {
    const line = document.createElement("p");
    line.textContent = text;
    tip.append(line);
  };
  if (mark.dataset.tip !== undefined) {
    add(mark.dataset.tip);
    return;
  }
  const number = Number(mark.closest("[data-section]").dataset.section);
  const section = sections[number];
  const row = section.rows[Number(mark.dataset.row)];
  const picture = document.querySelector(`.gallery[data-section="${number}"] .card[data-at="${mark.dataset.row}"] img`);
  if (picture) {
    const copy = picture.cloneNode();
    copy.alt = "";
    tip.append(copy);
  }
  add(row.prompt.length > 200 ? `${row.prompt.slice(0, 200)}\u2026` : row.prompt);
  add(row.source ? `${row.image}, ${row.source}` : row.image);
  for (const label of section.labels) {
    const [base, delta] = [row[`${label}_base`], row[`${label}_delta`]];
    const parts = base === null ? "" : ` = base ${words(base)}, correction ${words(delta)}`;
    add(`${label}: human ${words(row[`${label}_label`])}, predicted ${words(row[label])}${parts}`);
  }
}
function show(chart, mark) {
  hide();
  mark.classList.add("here");
  fill(mark);
  tip.hidden = false;
  const box = mark.getBoundingClientRect();
  const left = Math.min(box.right + 10, window.innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + 10 + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, below ? box.bottom + 10 : box.top - tip.offsetHeight - 10)}px`;
}
function hide() {
  tip.hidden = true;
  for (const mark of document.querySelectorAll(".chart .here")) mark.classList.remove("here");
}
const REACH_PIXELS = 18;
for (const chart of document.querySelectorAll(".chart")) {
  const marks = [...chart.querySelectorAll(".mark")];
  let at = -1;
  const middle = (mark) => {
    const box = mark.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const nearest = (event) => {
    if (event.target.classList.contains("mark")) return event.target;
    let best = null;
    let least = REACH_PIXELS;
    for (const mark of marks) {
      const [x, y] = middle(mark);
      const distance = Math.hypot(event.clientX - x, event.clientY - y);
      if (distance < least) [best, least] = [mark, distance];
    }
    return best;
  };
  chart.addEventListener("pointermove", (event) => {
    const mark = nearest(event);
    if (mark === null) hide();
    else if (!mark.classList.contains("here")) show(chart, mark);
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const last = marks.length - 1;
    const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (next === undefined || last < 0) return;
    event.preventDefault();
    at = Math.min(Math.max(next, 0), last);
    show(chart, marks[at]);
  });
}
window.addEventListener("scroll", hide, { passive: true });
window.addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
