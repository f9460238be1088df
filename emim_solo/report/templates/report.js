"use strict";
(() => {
  // Copying the table.
  const copies = JSON.parse(document.getElementById("copies").textContent);
  const copied = document.getElementById("copied");
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Some browsers have no clipboard for a page opened from disk: select the text and copy it.
      const area = document.createElement("textarea");
      area.value = text;
      area.className = "hidden";
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      await copy(copies[button.dataset.copy]);
      copied.textContent = button.dataset.copy === "latex" ? "LaTeX copied." : "Markdown copied.";
      setTimeout(() => { copied.textContent = ""; }, 4000);
    });
  }

  // UMAP panels.
  const source = document.getElementById("umap-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const root = document.getElementById("umap");
  const holder = root.querySelector(".panels");
  const legend = root.querySelector(".legend");
  const said = document.getElementById("umap-said");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const NEAR = 16; // pixels from the pointer within which it selects an image
  let split, panels = [], active = null, chosenClass = null;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // The label -1 means images without labels: they have one colour and no name.
  const colour = (label) => data.colours[Math.max(label, 0) % data.colours.length][dark.matches ? 1 : 0];
  const shape = (label) => data.shapes[Math.floor(Math.max(label, 0) / data.colours.length) % data.shapes.length];
  const className = (index) => split.classes[split.labels[index]] ?? "";

  function trace(context, x, y, radius, label) {
    const polygon = shape(label);
    context.beginPath();
    if (polygon === null) {
      context.arc(x, y, radius, 0, 2 * Math.PI);
    } else {
      polygon.forEach(([px, py], i) => context[i ? "lineTo" : "moveTo"](x + px * radius * 1.15, y - py * radius * 1.15));
      context.closePath();
    }
  }

  function fit(canvas, width, height) {
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio); // which clears it
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    return context;
  }

  // One scale for all panels makes positions comparable.
  function frame(points) {
    let [left, right, bottom, top] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const list of points) for (const [x, y] of list) {
      left = Math.min(left, x); right = Math.max(right, x); bottom = Math.min(bottom, y); top = Math.max(top, y);
    }
    const side = Math.max(right - left, top - bottom, 1e-6) * 1.1;
    return { x: (left + right - side) / 2, y: (bottom + top - side) / 2, side };
  }

  function drawBase(panel) {
    const { width, height } = panel.stage.getBoundingClientRect();
    if (!width || !panel.points) return;
    const { x, y, side } = split.frame;
    panel.pixels = panel.points.map(([px, py]) => [(px - x) / side * width, height - (py - y) / side * height]);
    const context = fit(panel.base, width, height);
    const radius = Math.min(4.2, Math.max(1.8, 64 / Math.sqrt(split.labels.length)));
    const order = chosenClass === null ? [false] : [false, true];
    for (const chosen of order) {
      split.labels.forEach((label, i) => {
        if (chosenClass !== null && (label === chosenClass) !== chosen) return;
        context.globalAlpha = chosenClass === null ? 0.85 : chosen ? 1 : 0.1;
        context.fillStyle = colour(label);
        trace(context, ...panel.pixels[i], radius, label);
        context.fill();
      });
    }
    context.globalAlpha = 1;
    if (split.classes.length <= 20) {
      context.font = "600 12px system-ui, sans-serif";
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.lineJoin = "round";
      context.lineWidth = 3;
      context.strokeStyle = css("--surface");
      context.fillStyle = css("--ink");
      split.classes.forEach((name, label) => {
        if (chosenClass !== null && label !== chosenClass) return;
        const own = panel.pixels.filter((_, i) => split.labels[i] === label);
        if (!own.length) return;
        const median = [0, 1].map((axis) => own.map((p) => p[axis]).sort((a, b) => a - b)[own.length >> 1]);
        // At the image closest to the median: the median itself may lie between two clusters.
        const away = ([x, y]) => (x - median[0]) ** 2 + (y - median[1]) ** 2;
        const middle = own.reduce((best, point) => away(point) < away(best) ? point : best);
        context.strokeText(name, ...middle);
        context.fillText(name, ...middle);
      });
    }
    drawMark(panel);
  }

  function drawMark(panel) {
    const { width, height } = panel.stage.getBoundingClientRect();
    if (!width || !panel.points) return;
    const context = fit(panel.over, width, height);
    if (active === null) { delete panel.stage.dataset.active; return; }
    panel.stage.dataset.active = active;
    const [x, y] = panel.pixels[active];
    context.fillStyle = colour(split.labels[active]);
    trace(context, x, y, 5.5, split.labels[active]);
    context.fill();
    for (const [line, width] of [[css("--surface"), 5], [css("--ink"), 2]]) {
      context.beginPath();
      context.arc(x, y, 10, 0, 2 * Math.PI);
      context.strokeStyle = line;
      context.lineWidth = width;
      context.stroke();
    }
  }

  function showTip(panel) {
    for (const other of panels) other.tip.hidden = true;
    if (active === null || !panel) return;
    const { tip } = panel;
    tip.querySelector("b").textContent = className(active);
    tip.querySelector("span").textContent = `image ${split.images[active]}`;
    const picture = tip.querySelector("i");
    picture.hidden = !split.sprite;
    if (split.sprite) {
      const shown = 84, rows = Math.ceil(split.labels.length / split.columns);
      picture.style.backgroundImage = `url(${split.sprite})`;
      picture.style.backgroundSize = `${split.columns * shown}px ${rows * shown}px`;
      picture.style.backgroundPosition = `${-(active % split.columns) * shown}px ${-Math.floor(active / split.columns) * shown}px`;
    }
    tip.hidden = false;
    const { width, height } = panel.stage.getBoundingClientRect();
    const [x, y] = panel.pixels[active];
    const left = x + 16 + tip.offsetWidth > width ? x - 16 - tip.offsetWidth : x + 16;
    tip.style.left = `${Math.max(4, Math.min(left, width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(y - tip.offsetHeight / 2, height - tip.offsetHeight - 4))}px`;
  }

  function select(index, panel, speak) {
    if (index !== active) {
      active = index;
      panels.forEach(drawMark);
    }
    showTip(panel);
    if (speak && active !== null) said.textContent = [className(active), `image ${split.images[active]}`].filter(Boolean).join(", ");
  }

  function nearest(panel, x, y, within) {
    let best = null, closest = within * within;
    panel.pixels.forEach(([px, py], i) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance <= closest) { closest = distance; best = i; }
    });
    return best;
  }

  // The closest image in a direction. Images to the side count as further away.
  function step(panel, dx, dy) {
    const [x, y] = panel.pixels[active];
    let best = null, least = Infinity;
    panel.pixels.forEach(([px, py], i) => {
      const along = (px - x) * dx + (py - y) * dy, across = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
      if (i === active || along <= 0.01 || across > 2 * along) return;
      const cost = along + 2 * across;
      if (cost < least) { least = cost; best = i; }
    });
    return best;
  }

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function addPanel(content) {
    const figure = document.createElement("figure");
    figure.className = "panel";
    figure.innerHTML = "<figcaption><strong></strong></figcaption><div class=stage tabindex=0 role=application><canvas></canvas><canvas></canvas><div class=tip hidden><i></i><b></b><span></span></div></div><p class=quality></p>";
    const stage = figure.querySelector(".stage");
    const [base, over] = figure.querySelectorAll("canvas");
    const panel = { points: content.points, stage, base, over, tip: figure.querySelector(".tip"), pixels: [] };
    figure.querySelector("strong").textContent = content.name;
    const number = (value) => value === null ? "n/a" : value.toFixed(3);
    const silhouette = split.classes.length ? ` · silhouette ${number(content.silhouette)}` : "";
    figure.querySelector(".quality").textContent = `trustworthiness ${number(content.trustworthiness)}${silhouette}`;
    stage.dataset.name = content.name;
    stage.setAttribute("aria-label", `UMAP of ${content.name}, ${split.labels.length} images`);
    stage.setAttribute("aria-describedby", "umap-help");
    holder.append(figure);
    if (!panel.points) {
      const empty = document.createElement("div");
      empty.className = "empty";
      empty.textContent = "NaN features";
      stage.append(empty);
      return panel;
    }
    const at = (event) => {
      const box = stage.getBoundingClientRect();
      return nearest(panel, event.clientX - box.left, event.clientY - box.top, NEAR);
    };
    const central = () => nearest(panel, stage.clientWidth / 2, stage.clientHeight / 2, Infinity);
    stage.addEventListener("pointermove", (event) => select(at(event), panel, false));
    stage.addEventListener("pointerdown", (event) => select(at(event), panel, true));
    stage.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") select(null, null, false); });
    stage.addEventListener("focus", () => {
      if (stage.matches(":focus-visible")) select(active ?? central(), panel, true);
    });
    stage.addEventListener("blur", () => select(null, null, false));
    stage.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { select(null, null, false); return; }
      const direction = ARROWS[event.key];
      if (!direction) return;
      event.preventDefault();
      select(active === null ? central() : step(panel, ...direction) ?? active, panel, true);
    });
    return panel;
  }

  function addClass(name, label) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    const canvas = document.createElement("canvas");
    button.append(canvas, name);
    const mark = () => {
      const context = fit(canvas, 14, 14);
      context.fillStyle = colour(label);
      trace(context, 7, 7, 4.6, label);
      context.fill();
    };
    mark();
    dark.addEventListener("change", mark);
    button.addEventListener("click", () => {
      chosenClass = chosenClass === label ? null : label;
      legend.querySelectorAll("button").forEach((other, i) => other.setAttribute("aria-pressed", String(i === chosenClass)));
      panels.forEach(drawBase);
    });
    legend.append(button);
  }

  function show(name) {
    split = data.splits[name];
    split.frame = frame(split.panels.map((panel) => panel.points).filter(Boolean));
    active = chosenClass = null;
    holder.replaceChildren();
    legend.replaceChildren();
    panels = split.panels.map(addPanel);
    split.classes.forEach(addClass);
    legend.hidden = !split.classes.length;
    panels.forEach(drawBase);
  }

  for (const button of root.querySelectorAll("[data-split]")) {
    button.addEventListener("click", () => {
      root.querySelectorAll("[data-split]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      show(button.dataset.split);
    });
  }
  show(Object.keys(data.splits)[0]);
  new ResizeObserver(() => panels.forEach(drawBase)).observe(holder);
  dark.addEventListener("change", () => panels.forEach(drawBase));
})();
