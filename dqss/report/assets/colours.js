// Colours come from the style sheet, so that charts follow light and dark as everything else does.
// One hue from faint to full: in grey it still says the same.

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function heat(probability) {
  return `rgba(${colour("accent-rgb")}, ${probability.toFixed(3)})`;
}

function onHeat(probability) {
  return probability > 0.55 ? colour("on-accent") : colour("ink");
}

function heatScale() {
  return [[0, colour("page")], [1, colour("accent")]];
}

const Theme = {
  modes: ["system", "light", "dark"],
  mode: "system",
  system: window.matchMedia("(prefers-color-scheme: dark)"),

  start(changed) {
    try { this.mode = localStorage.getItem("dqss-theme") || "system"; } catch { /* files may have no storage */ }
    if (!this.modes.includes(this.mode)) this.mode = "system";
    this.apply();
    const button = document.getElementById("theme");
    button.addEventListener("click", () => {
      this.mode = this.modes[(this.modes.indexOf(this.mode) + 1) % this.modes.length];
      try { localStorage.setItem("dqss-theme", this.mode); } catch { /* as above */ }
      this.apply();
      changed();
    });
    this.system.addEventListener("change", () => { this.apply(); changed(); });
    // On paper ink is dear.
    window.addEventListener("beforeprint", () => { this.show("light"); changed(); });
    window.addEventListener("afterprint", () => { this.apply(); changed(); });
    document.getElementById("print").addEventListener("click", () => window.print());
  },

  apply() {
    this.show(this.mode === "system" ? (this.system.matches ? "dark" : "light") : this.mode);
    document.querySelector("#theme span").textContent = this.mode;
  },

  show(shade) {
    document.documentElement.dataset.theme = shade;
  },
};
