// The table of layers: sorted, filtered, searched; the right part is the heat-map.

const UNDECIDED = 0.5;

const Table = {
  sort: { key: "order", down: false },

  build(run, select) {
    this.run = run;
    this.select = select;
    this.rows = [];
    this.shape = null;
    const several = new Set(run.tensors.map((t) => t.role));
    menu("role", ["weight", ...[...several].filter((role) => role !== "weight").sort()].filter((role) => several.has(role)));
    menu("choice", [...new Set(run.tensors.map((t) => t.label))].sort());
    this.candidates = this.columns();
    this.share = shares(run.tensors);
    this.head();
    const body = document.createElement("tbody");
    run.tensors.forEach((tensor, order) => this.rows.push(this.row(tensor, order)));
    body.append(...this.rows.map((row) => row.element));
    document.getElementById("table").append(body);
    this.body = body;
    this.arrange();
  },

  // A candidate is a column; where one label stands for several grids, one for each grid.
  columns() {
    const found = new Map(), grids = new Map(), { tensors, decisions } = this.run;
    const sides = [tensors.filter((t) => t.role === "weight"), tensors.filter((t) => t.role !== "weight")].flat();
    const known = [...new Set(sides.map((t) => t.decision))].map((name) => decisions[name]).filter(Boolean);
    for (const { labels, schemes } of known) {
      labels.forEach((label, k) => {
        if (!grids.has(label)) grids.set(label, new Set());
        if (labels.indexOf(label) !== labels.lastIndexOf(label)) grids.get(label).add(schemes[k]);
      });
    }
    for (const { labels, schemes } of known) {
      labels.forEach((label, k) => {
        const key = grids.get(label).size ? `${label} ${schemes[k]}` : label;
        if (!found.has(key)) found.set(key, found.size);
      });
    }
    this.key = (label, scheme) => (grids.get(label) && grids.get(label).size ? `${label} ${scheme}` : label);
    return [...found.keys()];
  },

  head() {
    const table = document.getElementById("table"), line = document.createElement("tr");
    const columns = [["order", "#"], ["layer", "layer"], ["role", "tensor"], ["label", "choice"], ["bits", "bits"], ["probability", "p"], ["margin", "margin"], ["sensitivity", "sensitivity"]];
    for (const [key, title] of columns) line.append(this.heading(key, title));
    for (const name of this.candidates) {
      const cell = this.heading(`p:${name}`, name);
      cell.classList.add("candidate");
      line.append(cell);
    }
    const head = document.createElement("thead");
    head.append(line);
    table.replaceChildren(head);
  },

  heading(key, title) {
    const cell = document.createElement("th"), button = element("button", title);
    cell.scope = "col";
    cell.dataset.key = key;
    button.type = "button";
    button.title = `sort by ${title}`;
    button.addEventListener("click", () => {
      const numbers = !["order", "layer", "role", "label"].includes(key);
      this.sort = { key, down: this.sort.key === key ? !this.sort.down : numbers };
      this.arrange();
    });
    cell.append(button);
    return cell;
  },

  row(tensor, order) {
    const line = document.createElement("tr"), decision = this.run.decisions[tensor.decision];
    const values = { ...tensor, order };
    const layer = element("td", `${tensor.layer} `, "layer");
    layer.title = tensor.layer;
    layer.append(element("span", tensor.kind, "kind"));
    const probability = element("td", tensor.probability === null ? "" : tensor.probability.toFixed(2), "number");
    line.append(
      element("td", order, "number"), layer, element("td", tensor.role), element("td", tensor.label),
      element("td", tensor.bits, "number"), probability, bar(tensor.margin, tensor.margin, 2), bar(tensor.sensitivity, this.share(tensor.sensitivity)),
    );
    line.lastChild.previousSibling.dataset.value = tensor.margin;
    probability.dataset.value = tensor.probability;
    const cells = this.candidates.map(() => element("td", "", "heat absent"));
    if (decision) {
      decision.labels.forEach((label, k) => {
        const name = this.key(label, decision.schemes[k]), p = decision.probabilities[k];
        values[`p:${name}`] = p;
        this.fill(cells[this.candidates.indexOf(name)], p, k === decision.chosen, `${label} ${decision.schemes[k]}: ${p}`);
      });
    }
    line.append(...cells);
    line.tabIndex = -1;
    line.addEventListener("click", () => this.select(order));
    return { element: line, values, words: `${tensor.layer} ${tensor.kind} ${tensor.role}`.toLowerCase(), decision };
  },

  fill(cell, p, chosen, title) {
    cell.className = chosen ? "heat chosen" : "heat";
    cell.title = title;
    cell.dataset.p = p;
    cell.textContent = p < 0.005 ? "" : p < 0.995 ? p.toFixed(2).replace(/^0/, "") : "1";
    this.paint(cell);
  },

  paint(cell) {
    const p = Number(cell.dataset.p);
    cell.style.backgroundColor = heat(p);
    cell.style.color = onHeat(p);
  },

  repaint() {
    for (const cell of document.querySelectorAll("#table td[data-p]")) this.paint(cell);
  },

  // -- order and filters --

  arrange() {
    const { key, down } = this.sort, direction = down ? -1 : 1;
    const before = (a, b) => {
      const x = a.values[key], y = b.values[key];
      if ((x ?? null) === null || (y ?? null) === null) return ((x ?? null) === null) - ((y ?? null) === null);
      const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
      return direction * order || a.values.order - b.values.order;
    };
    this.rows.sort(before);
    this.body.append(...this.rows.map((row) => row.element));
    for (const cell of document.querySelectorAll("#table thead th")) {
      const here = cell.dataset.key === key;
      cell.setAttribute("aria-sort", here ? (down ? "descending" : "ascending") : "none");
      cell.firstChild.textContent = cell.firstChild.textContent.replace(/ [▲▼]$/, "") + (here ? (down ? " ▼" : " ▲") : "");
    }
    this.filter();
  },

  filter() {
    const value = (id) => document.getElementById(id).value, on = (id) => document.getElementById(id).checked;
    const words = value("query").toLowerCase().split(/\s+/).filter(Boolean), role = value("role"), choice = value("choice");
    let count = 0;
    for (const { element: line, values, words: text, decision } of this.rows) {
      const shown = words.every((word) => text.includes(word)) && (!role || values.role === role) && (!choice || values.label === choice)
        && (!on("undecided") || (values.margin !== null && values.margin < UNDECIDED))
        && (!on("changed") || Boolean(decision && decision.outcome[decision.preferred] !== decision.outcome[decision.chosen]));
      line.hidden = !shown;
      count += shown;
    }
    this.narrow();
    document.getElementById("count").textContent = `${count} of ${this.rows.length} tensors`;
  },

  // Columns of candidates that none of the shown tensors has are left out.
  narrow() {
    const used = new Set(), first = this.run.tensors.length ? this.rows[0].element.children.length - this.candidates.length : 0;
    for (const { element: line, values } of this.rows) {
      if (!line.hidden) this.candidates.forEach((name, k) => { if (`p:${name}` in values) used.add(k); });
    }
    const shape = [...used].sort().join();
    if (shape === this.shape) return;
    this.shape = shape;
    for (const line of document.querySelectorAll("#table tr")) {
      this.candidates.forEach((_, k) => { line.children[first + k].hidden = !used.has(k); });
    }
  },

  mark(order, focus) {
    for (const row of this.rows) {
      const here = row.values.order === order;
      row.element.setAttribute("aria-selected", here);
      row.element.tabIndex = here ? 0 : -1;
      if (here && focus) row.element.focus();
    }
  },

  // The tensor so many shown rows further on.
  step(order, by) {
    const shown = this.rows.filter((row) => !row.element.hidden), here = shown.findIndex((row) => row.values.order === order);
    if (!shown.length) return order;
    const next = here < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, here + by));
    return shown[next].values.order;
  },
};

function menu(id, names) {
  const list = document.getElementById(id);
  list.replaceChildren(list.options[0], ...names.map((name) => new Option(name, name)));
}

// How long the bar of a sensitivity is: in proportion, or to its logarithm where few would show otherwise.
function shares(tensors) {
  const positive = tensors.map((t) => t.sensitivity).filter((value) => value > 0);
  const high = Math.max(...positive), low = Math.min(...positive);
  if (!skewed(tensors)) return (value) => value / high;
  return (value) => (value > 0 ? 0.03 + 0.97 * Math.log(value / low) / Math.log(high / low) : 0);
}

function bar(value, share, digits) {
  const cell = element("td", "", "number");
  if (value === null || value === undefined) return cell;
  const frame = element("span", "", "bar"), inside = document.createElement("i");
  inside.style.width = `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(1)}%`;
  frame.append(inside);
  cell.append(frame, digits === undefined ? (value >= 100 ? value.toFixed(0) : value.toPrecision(2)) : value.toFixed(digits));
  return cell;
}
