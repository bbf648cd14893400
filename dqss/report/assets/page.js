// What holds the parts together: the run and the tensor that are shown, keys, theme.

const DATA = JSON.parse(document.getElementById("data").textContent);
const state = { run: 0, tensor: 0 };

function select(order, focus = false) {
  if (order < 0 || order === undefined) return;
  state.tensor = order;
  const run = DATA[state.run];
  Table.mark(order, focus);
  Details.show(run, run.tensors[order]);
}

function showRun(number) {
  state.run = number;
  for (const part of document.querySelectorAll(".per-run")) part.hidden = Number(part.dataset.run) !== number;
  Table.build(DATA[number], (order) => select(order));
  Charts.drawAll(DATA[number], (order) => select(order, true));
  select(0);
}

function repaint() {
  const run = DATA[state.run];
  Table.repaint();
  Charts.drawAll(run, (order) => select(order, true));
  Details.show(run, run.tensors[state.tensor]);
}

function compare() {
  const table = document.getElementById("comparison");
  if (!table) return;
  const keys = new Map();
  DATA.forEach((run, k) => run.tensors.forEach((t) => {
    const key = JSON.stringify([t.layer, t.role]);
    if (!keys.has(key)) keys.set(key, { layer: t.layer, role: t.role, labels: DATA.map(() => "–") });
    keys.get(key).labels[k] = `${t.label} ${t.scheme}`;
  }));
  const only = document.getElementById("only-different").checked;
  const rows = [...keys.values()].filter((row) => !only || new Set(row.labels).size > 1);
  const head = document.createElement("tr");
  head.append(...["layer", "tensor", ...DATA.map((run) => run.name)].map((name) => element("th", name)));
  table.replaceChildren(head, ...rows.map((row) => {
    const line = document.createElement("tr");
    line.append(element("td", row.layer), element("td", row.role));
    line.append(...row.labels.map((label) => element("td", label, label === row.labels[0] ? "" : "different")));
    return line;
  }));
  document.getElementById("compared").textContent = `${rows.length} of ${keys.size} tensors`;
}

function keys(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "/" && !typing) {
    event.preventDefault();
    document.getElementById("query").focus();
  } else if (event.key === "Escape" && event.target.id === "query") {
    event.target.value = "";
    Table.filter();
  } else if (event.target.closest("#table tbody")) {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (by) {
      event.preventDefault();
      select(Table.step(state.tensor, by), true);
    }
  }
}

Theme.start(repaint);
document.addEventListener("keydown", keys);
for (const id of ["query", "role", "choice", "undecided", "changed"]) {
  document.getElementById(id).addEventListener("input", () => Table.filter());
}
document.getElementById("reset").addEventListener("click", () => {
  document.getElementById("query").value = "";
  for (const id of ["role", "choice"]) document.getElementById(id).selectedIndex = 0;
  for (const id of ["undecided", "changed"]) document.getElementById(id).checked = false;
  Table.sort = { key: "order", down: false };
  Table.arrange();
});
const runs = document.getElementById("run");
if (runs) runs.addEventListener("input", () => showRun(Number(runs.value)));
const different = document.getElementById("only-different");
if (different) different.addEventListener("input", compare);
compare();
showRun(0);
