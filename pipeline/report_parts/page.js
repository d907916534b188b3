"use strict";
// Everything from data enters the page as text, never as markup.
const sections = JSON.parse(document.getElementById("data").textContent);
for (const section of sections) {
  section.rows = section.rows.map((row) => Object.fromEntries(section.fields.map((name, i) => [name, row[i]])));
}
const words = (value) => (value === null ? "\u2013" : value.toFixed(3).replace("-", "\u2212"));

// Numbers by value, words by the reader's alphabet, what is missing last either way.
// A collator of its own: localeCompare makes one for each pair, which takes seconds for thousands of rows.
const alphabet = new Intl.Collator();
function compare(a, b, sign) {
  const missing = (value) => value === null || value === "";
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return sign * (typeof a === "number" && typeof b === "number" ? a - b : alphabet.compare(a, b));
}
// What can be shown of a row and a target, and sorted by.
function valueOf(row, value, label) {
  const human = row[`${label}_label`];
  const over = () => (row[label] === null || human === null ? null : row[label] - human);
  if (value === "error") return over() === null ? null : Math.abs(over());
  if (value === "over") return over();
  if (value === "human") return human;
  if (value === "predicted") return row[label];
  if (value === "delta") return row[`${label}_delta`];
  return row[value];
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
    const by = form.elements.sort.value;
    const sign = direction.getAttribute("aria-pressed") === "true" ? -1 : 1;
    cards.sort((a, b) => compare(valueOf(a.row, by, label), valueOf(b.row, by, label), sign));
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

// Tables of all rows: a page of them at a time, so that many thousands are sorted and filtered at once.
const ROWS_SHOWN = 25;
for (const part of document.querySelectorAll(".rows")) {
  const number = Number(part.dataset.section);
  const { rows } = sections[number];
  const form = part.querySelector("form");
  const table = part.querySelector("table");
  const headings = [...table.tHead.rows[0].cells];
  const place = part.querySelector(".pager span");
  let order = rows.map((row, at) => at);
  let kept = order;
  let page = 0;
  let lower = null;
  const cell = (row, at, heading, column) => {
    const made = document.createElement(column === 0 ? "th" : "td");
    const { value, target } = heading.dataset;
    const found = valueOf(row, value, target);
    if (column === 0) {
      made.scope = "row";
      const button = document.createElement("button");
      button.type = "button";
      button.className = "enlarge";
      button.dataset.at = at;
      button.setAttribute("aria-haspopup", "dialog");
      button.textContent = found;
      made.append(button);
    } else if (target) {
      made.textContent = (value === "over" && found > 0 ? "+" : "") + words(found);
    } else {
      made.className = "words";
      made.dataset.words = value;
      made.textContent = found;
    }
    return made;
  };
  const draw = () => {
    const last = Math.max(0, Math.ceil(kept.length / ROWS_SHOWN) - 1);
    page = Math.min(Math.max(page, 0), last);
    const shown = kept.slice(page * ROWS_SHOWN, (page + 1) * ROWS_SHOWN);
    table.tBodies[0].replaceChildren(...shown.map((at) => {
      const line = document.createElement("tr");
      line.append(...headings.map((heading, column) => cell(rows[at], at, heading, column)));
      return line;
    }));
    const first = page * ROWS_SHOWN + 1;
    place.textContent = shown.length
      ? `${first.toLocaleString("en")} to ${(first + shown.length - 1).toLocaleString("en")}` : "none";
    for (const button of part.querySelectorAll(".pager button")) {
      button.disabled = page === (["first", "previous"].includes(button.dataset.to) ? 0 : last);
    }
  };
  const filter = () => {
    const wanted = form.elements.words.value.trim().toLowerCase();
    const source = form.elements.source ? form.elements.source.value : "";
    const flagged = form.elements.flagged ? form.elements.flagged.value : "";
    if (wanted && lower === null) lower = rows.map((row) => `${row.image}\n${row.prompt}`.toLowerCase());
    kept = order.filter((at) => (!wanted || lower[at].includes(wanted))
      && (!source || rows[at].source === source) && (!flagged || rows[at].flag !== ""));
    page = 0;
    form.querySelector("output").textContent =
      `${kept.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    draw();
  };
  headings.forEach((heading) => {
    const { value, target } = heading.dataset;
    heading.querySelector("button").addEventListener("click", () => {
      const first = target ? "descending" : "ascending";
      const other = target ? "ascending" : "descending";
      const direction = heading.getAttribute("aria-sort") === first ? other : first;
      headings.forEach((one) => one.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const keys = rows.map((row) => valueOf(row, value, target));
      order = order.sort((a, b) => compare(keys[a], keys[b], sign));
      filter();
    });
  });
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  for (const button of part.querySelectorAll(".pager button")) {
    button.addEventListener("click", () => {
      page = { first: 0, previous: page - 1, next: page + 1, last: Infinity }[button.dataset.to];
      draw();
      // A button that is off loses the keyboard: the next one along has it then.
      if (button.disabled) part.querySelector(".pager button:not(:disabled)")?.focus();
    });
  }
  filter();
}

// Pictures and rows in full: by click or Enter, closed by Escape, which gives the keyboard back to where it was.
const viewer = document.getElementById("viewer");
const pictureOf = (number, at) => document.querySelector(
  `[data-section="${number}"] .enlarge[data-at="${at}"] img`);
document.addEventListener("click", (event) => {
  const button = event.target.closest(".enlarge");
  if (!button) return;
  const number = Number(button.closest("[data-section]").dataset.section);
  const parts = [];
  const picture = pictureOf(number, button.dataset.at);
  if (picture) parts.push(picture.cloneNode());
  const about = document.createElement("div");
  describe(about, sections[number], sections[number].rows[Number(button.dataset.at)], Infinity);
  if (!picture) {
    const line = document.createElement("p");
    line.textContent = "Its picture is not on this page.";
    about.append(line);
  }
  viewer.querySelector(".viewed").replaceChildren(...parts, about);
  viewer.showModal();
});
viewer.addEventListener("click", (event) => {
  if (event.target === viewer || event.target.closest(".close")) viewer.close();
});

// A row in words: prompt, image, source, flag and scores, a line each.
function describe(element, section, row, characters) {
  const add = (text) => {
    const line = document.createElement("p");
    line.textContent = text;
    element.append(line);
  };
  if (row.prompt) add(row.prompt.length > characters ? `${row.prompt.slice(0, characters)}\u2026` : row.prompt);
  add(row.source ? `${row.image}, ${row.source}` : row.image);
  if (row.flag) add(row.flag);
  for (const label of section.labels) {
    const [human, base, delta] = ["_label", "_base", "_delta"].map((part) => row[label + part]);
    const parts = base === null ? "" : ` = base ${words(base)}, correction ${words(delta)}`;
    const beside = human === null ? "" : `human ${words(human)}, `;
    add(`${label}: ${beside}predicted ${words(row[label])}${parts}`);
  }
}

// What a mark of a plot shows: under the pointer, or by the arrow keys.
const tip = document.getElementById("tip");
function fill(mark) {
  tip.replaceChildren();
  if (mark.dataset.tip !== undefined) {
    const line = document.createElement("p");
    line.textContent = mark.dataset.tip;
    tip.append(line);
    return;
  }
  const number = Number(mark.closest("[data-section]").dataset.section);
  const picture = pictureOf(number, mark.dataset.row);
  if (picture) {
    const copy = picture.cloneNode();
    copy.alt = "";
    tip.append(copy);
  }
  describe(tip, sections[number], sections[number].rows[Number(mark.dataset.row)], 200);
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
