// One tensor: its values with every candidate's clip range, and how the choice came about.

const Details = {
  show(run, tensor) {
    const panel = document.getElementById("details");
    panel.hidden = !tensor;
    panel.parentElement.classList.toggle("alone", !tensor);
    if (!tensor) return;
    const decision = run.decisions[tensor.decision];
    panel.replaceChildren(
      element("h3", `${tensor.layer} · ${tensor.role}`),
      element("p", [tensor.kind, tensor.shape.length ? tensor.shape.join(" × ") : ""].filter(Boolean).join(", "), "small"),
      element("p", `${tensor.label}, ${tensor.scheme}`),
      ...this.words(tensor, decision, run).map((line) => element("p", line, "small")),
    );
    if (!decision) return;
    const ranges = panel.appendChild(element("div", "", "chart")), course = panel.appendChild(element("div", "", "chart"));
    this.histogram(ranges, tensor, decision);
    this.course(course, decision, run.trajectorySteps);
  },

  words(tensor, decision, run) {
    const lines = [];
    if (tensor.probability !== null) lines.push(`probability ${tensor.probability.toFixed(3)}, margin ${tensor.margin.toFixed(3)}`);
    if (decision && decision.preferred !== decision.chosen) lines.push(`the logits preferred ${decision.labels[decision.preferred]}`);
    if (tensor.sensitivity !== null) lines.push(`sensitivity ${tensor.sensitivity.toPrecision(3)}`);
    const tied = run.ties.find((names) => names.includes(tensor.layer));
    if (tied && tensor.role === "weight") lines.push(`one weight with ${tied.filter((name) => name !== tensor.layer).join(", ")}`);
    if (decision) {
      const count = new Set(decision.outcome).size;
      if (count < decision.labels.length) lines.push(`${decision.labels.length} candidates come to ${count} different results`);
    }
    return lines;
  },

  histogram(target, tensor, decision) {
    const seen = tensor.histogram, ranges = tensor.ranges || [];
    if (!seen) return draw(target, [], {});
    const count = seen.counts.length, width = (seen.high - seen.low) / count || 1;
    const traces = [{
      type: "bar", x: seen.counts.map((_, k) => seen.low + (k + 0.5) * width), y: seen.counts.map((n) => n || null), width,
      marker: { color: colour("soft") }, hovertemplate: "near %{x:.4g}: %{y}<extra></extra>", showlegend: false,
    }];
    const shapes = [];
    ranges.forEach(([low, high, lowest, highest], k) => {
      const chosen = k === decision.chosen, ink = colour(chosen ? "second" : "accent");
      const text = plain(`${decision.labels[k]}: ${low.toPrecision(4)} to ${high.toPrecision(4)}`);
      if (lowest < low || highest > high) traces.push({ x: [lowest, highest], y: [k, k], yaxis: "y2", mode: "lines", line: { color: ink, width: 1, dash: "dot" }, hoverinfo: "skip", showlegend: false });
      traces.push({ x: [low, high], y: [k, k], yaxis: "y2", mode: "lines+markers", marker: { symbol: "line-ns-open", size: 9, color: ink }, line: { color: ink, width: chosen ? 5 : 2 }, text: [text, text], hovertemplate: "%{text}<extra></extra>", showlegend: false });
      if (chosen) for (const x of [low, high]) shapes.push({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: ink, width: 1, dash: "dash" } });
    });
    draw(target, traces, {
      height: 190 + 17 * ranges.length, shapes, bargap: 0, margin: { l: 40, r: 8, t: 8, b: 40 },
      xaxis: { title: { text: "value" }, anchor: "y2" },
      yaxis: { type: "log", domain: [0.42, 1], title: { text: "count" }, tickformat: "~s", dtick: 1 },
      yaxis2: { domain: [0, 0.38], tickvals: ranges.map((_, k) => k), ticktext: names(decision.labels).map(plain), range: [ranges.length - 0.4, -0.6], zeroline: false, tickfont: { size: 9 } },
    });
  },

  course(target, decision, steps) {
    const rows = decision.trajectory;
    if (!rows) return draw(target, [], {});
    const first = decision.labels.map((_, k) => decision.outcome.indexOf(decision.outcome[k]));
    const shown = decision.labels.map((_, k) => k).filter((k) => first[k] === k);
    const chosen = first[decision.chosen];
    draw(target, shown.map((k, position) => ({
      x: steps, y: rows.map((row) => row[k]), mode: "lines", name: plain(decision.labels[k]),
      line: { color: colour(k === chosen ? "second" : "accent"), width: k === chosen ? 3 : 1.3, dash: k === chosen ? "solid" : DASHES[position % DASHES.length] },
      opacity: k === chosen ? 1 : 0.75, hovertemplate: `%{y:.2f} ${plain(decision.labels[k])}<extra></extra>`,
    })), {
      height: 230 + 16 * shown.length, margin: { l: 40, r: 8, t: 8, b: 40 }, yaxis: { range: [-0.02, 1.02], title: { text: "probability" } },
      xaxis: { title: { text: "step" } }, legend: { orientation: "v", y: -0.25, yanchor: "top", x: 0, font: { size: 10 } },
    });
  },
};

// Short names: the bits are left out where all have the same.
function names(labels) {
  const bits = new Set(labels.map((label) => label.split("@").pop()));
  const found = bits.size > 1 ? labels : labels.map((label) => label.slice(0, label.lastIndexOf("@")));
  return found.map((label) => (label.length > 18 ? `${label.slice(0, 17)}…` : label));
}

function element(tag, text, className = "") {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}
