// Hovering, hiding lines and the sample slider. The page is complete without it.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const make = (name) => document.createElementNS(document.querySelector("svg").namespaceURI, name);
  const show = (value, unit) => (value === null ? "\u2013" : format(value) + unit);

  function format(value) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("-", "\u2212").replace("e\u2212", "e-");
    return value.toLocaleString("en", { maximumSignificantDigits: 4 }).replace("-", "\u2212");
  }

  class Chart {
    constructor(svg) {
      this.svg = svg;
      this.data = charts[svg.dataset.chart];
      const [left, top, right, bottom, xLow, xHigh, yLow, yHigh] = svg.dataset.frame.split(" ").map(Number);
      this.x = (v) => left + ((v - xLow) / (xHigh - xLow)) * (right - left);
      this.y = (v) => bottom - ((v - yLow) / (yHigh - yLow)) * (bottom - top);
      this.iterationAt = (x) => xLow + ((x - left) / (right - left)) * (xHigh - xLow);
      this.figure = svg.closest("figure");
      this.cross = make("path");
      this.cross.setAttribute("class", "cross");
      this.height = [top, bottom];
      this.dots = [];
    }

    nearest(iteration) {
      const { x } = this.data;
      let best = 0;
      for (let i = 1; i < x.length; i++) if (Math.abs(x[i] - iteration) <= Math.abs(x[best] - iteration)) best = i;
      return best;
    }

    mark(index) {
      this.clear();
      if (!this.data.x.length) return;
      const x = this.x(this.data.x[index]);
      this.cross.setAttribute("d", `M${x} ${this.height[0]}V${this.height[1]}`);
      this.svg.append(this.cross);
      this.data.series.forEach((series, number) => {
        const group = this.svg.querySelector(`g[data-series="${number}"]`);
        if (series.values[index] === null || group.matches(".raw, .off")) return;
        const dot = make("circle");
        dot.setAttribute("class", "dot");
        dot.setAttribute("cx", x);
        dot.setAttribute("cy", this.y(series.values[index]));
        dot.setAttribute("r", 4);
        group.append(dot);
        this.dots.push(dot);
      });
    }

    clear() {
      this.cross.remove();
      this.dots.splice(0).forEach((dot) => dot.remove());
    }
  }

  const all = [...document.querySelectorAll("svg.chart")].map((svg) => new Chart(svg));
  const panels = all.filter((chart) => chart.figure.matches(".panel:not(.several)"));

  // The small charts share one crosshair, so that what happened at one iteration is seen in all of them.
  function readPanels(iteration) {
    for (const chart of panels) {
      const { x, series, unit } = chart.data;
      if (!x.length) continue;
      const value = chart.figure.querySelector(".value");
      value.dataset.last ??= value.textContent;
      if (iteration === null) {
        chart.clear();
        value.textContent = value.dataset.last;
        continue;
      }
      const index = chart.nearest(iteration);
      chart.mark(index);
      value.textContent = `${show(series[0].values[index], unit)} at ${x[index].toLocaleString("en")}`;
    }
  }

  function tip(chart, index) {
    const box = chart.figure.querySelector(".tip") ?? chart.figure.appendChild(document.createElement("div"));
    box.className = "tip";
    box.replaceChildren();
    const { x, x_name, series, notes, unit } = chart.data;
    const line = (parent, tag, name, text) => {
      const element = document.createElement(tag);
      if (name) element.className = name;
      element.textContent = text;
      return parent.appendChild(element);
    };
    line(box, "b", "", `${x_name} ${x[index].toLocaleString("en")}`);
    if (notes[index]) line(box, "div", "note", notes[index]);
    series
      .map((entry, number) => ({ ...entry, value: entry.values[index], group: chart.svg.querySelector(`g[data-series="${number}"]`) }))
      .filter((entry) => !entry.group.matches(".off"))
      .sort((a, b) => (b.value ?? -Infinity) - (a.value ?? -Infinity))
      .forEach((entry) => {
        const row = line(box, "div", "row", "");
        row.insertAdjacentHTML("beforeend", entry.swatch);
        line(row, "span", "", entry.name);
        line(row, "span", "value", show(entry.value, unit));
      });
    const frame = chart.figure.getBoundingClientRect();
    const svg = chart.svg.getBoundingClientRect();
    const scale = svg.width / chart.svg.viewBox.baseVal.width;
    const at = svg.left - frame.left + chart.x(x[index]) * scale;
    const flip = at + box.offsetWidth + 24 > frame.width;
    box.style.left = `${Math.max(4, flip ? at - box.offsetWidth - 14 : at + 14)}px`;
    box.style.top = `${svg.top - frame.top + 8}px`;
  }

  function read(chart, index) {
    chart.index = index;
    if (panels.includes(chart)) return readPanels(chart.data.x[index]);
    chart.mark(index);
    tip(chart, index);
  }

  function leave(chart) {
    chart.index = undefined;
    if (panels.includes(chart)) return readPanels(null);
    chart.clear();
    chart.figure.querySelector(".tip")?.remove();
  }

  for (const chart of all) {
    if (!chart.data.x.length) continue;
    chart.svg.addEventListener("pointermove", (event) => {
      const box = chart.svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.svg.viewBox.baseVal.width;
      read(chart, chart.nearest(chart.iterationAt(x)));
    });
    chart.svg.addEventListener("pointerleave", () => leave(chart));
    chart.svg.addEventListener("blur", () => leave(chart));
    chart.svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const last = chart.data.x.length - 1;
      read(chart, Math.min(last, Math.max(0, (chart.index ?? (step > 0 ? -1 : last + 1)) + step)));
    });
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const visible = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", visible);
      for (const line of button.closest("figure").querySelectorAll(`g[data-series="${button.dataset.series}"]`)) {
        line.classList.toggle("off", !visible);
      }
    });
  }

  const slider = document.querySelector(".slider");
  if (slider) {
    const input = slider.querySelector("input");
    const pictures = [...document.querySelectorAll(".compare .later img")];
    const heading = document.querySelector(".compare .heading.later");
    slider.hidden = false;
    input.addEventListener("input", () => {
      pictures.forEach((picture, index) => (picture.hidden = index !== Number(input.value)));
      const { label } = pictures[Number(input.value)].dataset;
      heading.textContent = slider.querySelector("output").textContent = label;
      input.setAttribute("aria-valuetext", label);
    });
  }

  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((block) => (block.open = true));
  });
  window.addEventListener("afterprint", () => opened.forEach((block) => (block.open = false)));
})();
