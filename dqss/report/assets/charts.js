// All charts but those of one tensor.

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const ROLES = { weight: "weights" };

function layout(extra) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
  const found = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("ink"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 50, r: 12, t: 10, b: 40 }, height: 280, hovermode: "closest",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("ink") } },
    ...extra,
  };
  for (const key of ["xaxis", "yaxis", "xaxis2", "yaxis2"]) {
    if (found[key] || key.length === 5) found[key] = { ...axis, ...found[key] };
  }
  return found;
}

function draw(target, traces, extra) {
  const element = typeof target === "string" ? document.getElementById(target) : target;
  if (!traces.length) {
    element.replaceChildren(Object.assign(document.createElement("p"), { className: "note", textContent: "Not recorded in this run." }));
    return null;
  }
  if (!element.classList.contains("js-plotly-plot")) element.replaceChildren();
  Plotly.react(element, traces, layout(extra), { responsive: true, displayModeBar: false });
  return element;
}

// Plotly reads a few HTML tags in texts; names are only ever words.
function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function running(values, window) {
  const found = [];
  let sum = 0;
  values.forEach((value, k) => {
    sum += value;
    if (k >= window) sum -= values[k - window];
    found.push(sum / Math.min(k + 1, window));
  });
  return found;
}

// Whether a few tensors matter so much more than most that nothing would be seen of the others.
function skewed(tensors) {
  const known = tensors.map((t) => t.sensitivity).filter((value) => value > 0).sort((a, b) => a - b);
  return known.length > 2 && known.at(-1) > 30 * known[known.length >> 1];
}

function logarithmic(values) {
  const positive = values.filter((value) => value > 0);
  const wide = positive.reduce((m, v) => Math.max(m, v), 0) > 1000 * positive.reduce((m, v) => Math.min(m, v), Infinity);
  return { type: "log", tickformat: "~g", dtick: wide ? 1 : "D2" };
}

const Charts = {
  drawAll(run, select) {
    this.loss(run);
    this.certainty(run);
    this.importance(run, select);
    this.evolution(run, select);
    this.pareto(run);
  },

  loss({ history, loss, distance }) {
    const steps = history.step || [], soft = history.soft_loss || [], discrete = history.discrete_distance || [];
    const measured = steps.map((step, k) => [step, discrete[k]]).filter((pair) => pair[1] != null);
    const traces = soft.length ? [
      { x: steps, y: soft, name: `soft ${plain(loss || "loss")}, each step`, mode: "lines", line: { color: colour("line"), width: 1 }, hoverinfo: "skip" },
      { x: steps, y: running(soft, Math.max(1, Math.round(soft.length / 40))), name: "its running mean", mode: "lines", line: { color: colour("accent"), width: 2 } },
    ] : [];
    if (measured.length) {
      traces.push({ x: measured.map((p) => p[0]), y: measured.map((p) => p[1]), name: `discrete ${plain(distance)}`, mode: "lines+markers", line: { color: colour("second"), width: 2, dash: "dot" }, marker: { size: 6, symbol: "diamond" } });
    }
    draw("chart-loss", traces, { xaxis: { title: { text: "step" } }, yaxis: logarithmic(soft) });
  },

  certainty({ history }) {
    const styles = { entropy: ["entropy (nats)", "second", "dash"], margin_mean: ["mean margin", "accent", "solid"], margin_min: ["smallest margin", "accent", "dot"] };
    const traces = Object.entries(styles).filter(([key]) => history[key]).map(([key, [name, ink, dash]]) => (
      { x: history.step, y: history[key], name, mode: "lines", line: { color: colour(ink), dash, width: 1.8 } }
    ));
    draw("chart-certainty", traces, { xaxis: { title: { text: "step" } } });
  },

  importance({ tensors, effects, loss }, select) {
    const known = tensors.filter((t) => t.sensitivity !== null || t.margin !== null);
    const order = [...new Set(tensors.map((t) => t.layer))];
    const bars = (key, axis, shown) => ["weight", "activation"].map((side) => {
      const rows = known.filter((t) => (t.role === "weight") === (side === "weight") && t[key] !== null);
      return {
        type: "bar", x: rows.map((t) => order.indexOf(t.layer)), y: rows.map((t) => t[key]), yaxis: axis, showlegend: shown,
        customdata: rows.map((t) => tensors.indexOf(t)), text: rows.map((t) => plain(`${t.layer} ${t.role}: ${t.label}`)), textposition: "none",
        name: side === "weight" ? "weights" : "activations", legendgroup: side,
        hovertemplate: `%{text}<br>${key} %{y:.4g}<extra></extra>`,
        marker: side === "weight" ? { color: colour("accent") } : { color: colour("page"), line: { color: colour("second"), width: 1 }, pattern: { shape: "/", fgcolor: colour("second"), size: 5 } },
      };
    }).filter((trace) => trace.x.length);
    const sensitive = bars("sensitivity", "y", true);
    const element = draw("chart-importance", [...sensitive, ...bars("margin", "y2", !sensitive.length)], {
      height: sensitive.length ? 380 : 220, barmode: "group", bargap: 0.15, xaxis: { title: { text: "layer, in network order" }, zeroline: false, anchor: "y2" },
      yaxis: { title: { text: "sensitivity" }, visible: sensitive.length > 0, domain: [0.47, 1], ...(skewed(tensors) ? logarithmic(tensors.map((t) => t.sensitivity)) : {}) }, yaxis2: { title: { text: "margin" }, domain: sensitive.length ? [0, 0.4] : [0, 1], range: [0, 1] },
    });
    if (element) clicks(element, (point) => select(point.customdata));
    const how = { mean_field: `as the search learned it (a mean over the other decisions' options, in units of ${loss})`, first_order: `estimated from one gradient at the exported strategy (${loss}); this flatters changes` }[effects];
    document.getElementById("sensitivity-note").textContent = how
      ? `Sensitivity: the difference between a decision's worst and best option in their effect on the loss, ${how}. Margin: probability of the choice minus the best other one; negative where the refinement or the uniform strategy overruled it. Click a bar for its tensor.`
      : "Margin: probability of the choice minus the best other one.";
  },

  evolution({ tensors, decisions, trajectorySteps }, select) {
    const names = [...new Set(tensors.map((t) => t.decision))].filter((name) => decisions[name] && decisions[name].trajectory);
    const traces = names.length && trajectorySteps.length ? [{
      type: "heatmap", x: trajectorySteps, y: names.map((_, k) => k),
      z: names.map((name) => decisions[name].trajectory.map((row) => row[decisions[name].chosen])),
      text: names.map((name) => trajectorySteps.map(() => plain(name))), hovertemplate: "%{text}<br>step %{x}: %{z:.2f}<extra></extra>",
      zmin: 0, zmax: 1, colorscale: heatScale(), colorbar: { thickness: 10, title: { text: "p" } },
    }] : [];
    const height = Math.min(900, 110 + 9 * names.length);
    const element = draw("chart-evolution", traces, { height, xaxis: { title: { text: "step" } }, yaxis: { autorange: "reversed", title: { text: "decision" } } });
    if (element) clicks(element, (point) => select(tensors.findIndex((t) => t.decision === names[point.y])));
  },

  pareto({ pareto }) {
    document.getElementById("pareto-section").hidden = !pareto;
    if (!pareto) return;
    const numeric = pareto.header.filter((_, k) => pareto.rows.every((row) => typeof row[k] === "number"));
    const [across, up] = ["pareto-x", "pareto-y"].map((id) => document.getElementById(id));
    if (across.length !== numeric.length) {
      for (const menu of [across, up]) menu.replaceChildren(...numeric.map((name) => new Option(name)));
      const quality = numeric.findIndex((name) => /distance|kl|mse|loss/i.test(name));
      up.selectedIndex = quality < 0 ? numeric.length - 1 : quality;
      across.selectedIndex = up.selectedIndex === 0 ? Math.min(1, numeric.length - 1) : 0;
      for (const menu of [across, up]) menu.onchange = () => this.pareto({ pareto });
    }
    const column = (name) => pareto.rows.map((row) => row[pareto.header.indexOf(name)]);
    const text = pareto.rows.map((row) => pareto.header.map((name, k) => plain(`${name}: ${row[k]}`)).join("<br>"));
    draw("chart-pareto", numeric.length ? [{ x: column(across.value), y: column(up.value), text, mode: "markers", hovertemplate: "%{text}<extra></extra>", marker: { size: 10, color: colour("accent") } }] : [],
      { xaxis: { title: { text: plain(across.value) } }, yaxis: { title: { text: plain(up.value) } } });
  },
};

function clicks(element, handle) {
  element.removeAllListeners("plotly_click");
  element.on("plotly_click", (event) => handle(event.points[0]));
}
