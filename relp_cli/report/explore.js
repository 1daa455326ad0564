// The page's own script: hover values on heatmaps, one table of units, one threshold. No library, no request.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 50;
  const byId = (id) => document.getElementById(id);
  const make = (name, attributes = {}, text = "") => {
    const svg = name === "svg" || name === "rect" || name === "text";
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== "") node.textContent = text;
    return node;
  };
  const number = (value, digits = 4) => {
    if (value === null) return "—";
    const size = Math.abs(value);
    return size === 0 || (size >= 1e-3 && size < 1e5) ? value.toFixed(digits) : value.toExponential(2);
  };
  const token = (position) => {
    const at = data.labels.indexOf(position);
    return at >= 0 && data.tokens.length ? ` '${data.tokens[at]}'` : "";
  };

  // Heatmaps: a cell for each layer and position; pointer or arrow keys show its value.
  const tip = byId("tip");
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.min(x + 14, window.innerWidth - tip.offsetWidth - 8) + window.scrollX}px`;
    tip.style.top = `${y + 16 + window.scrollY}px`;
  };
  const color = (value, largest) => {
    const share = largest ? Math.min(1, Math.abs(value) / largest) : 0;
    return `color-mix(in srgb, var(${value < 0 ? "--neg" : "--pos"}) ${(100 * share).toFixed(1)}%, var(--panel))`;
  };
  for (const map of data.maps) {
    const layers = map.mean.length, positions = data.labels.length, wide = 26, high = 15, left = 30, below = 92;
    const width = left + wide * positions + 4, height = high * layers + below;
    const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img",
      "aria-label": `${map.title}: mean score per layer and position; arrow keys move over the cells`, "data-kind": map.kind });
    const largest = Math.max(...map.mean.flat().map((v) => Math.abs(v ?? 0)));
    const cells = [];
    map.mean.forEach((row, layer) => row.forEach((value, at) => {
      const rect = make("rect", { x: left + wide * at, y: high * layer, width: wide - 1, height: high - 1, "data-layer": layer, "data-at": at });
      rect.style.fill = color(value ?? 0, largest);
      cells.push(rect);
      svg.append(rect);
    }));
    for (let layer = 0; layer < layers; layer += layers > 16 ? 2 : 1)
      svg.append(make("text", { x: left - 6, y: high * layer + 11, "text-anchor": "end" }, String(layer)));
    data.labels.forEach((label, at) => {
      const x = left + wide * at + 15, y = high * layers + 8;
      const text = data.tokens.length ? `${label} ${data.tokens[at]}` : label;
      svg.append(make("text", { x, y, transform: `rotate(-60 ${x} ${y})`, "text-anchor": "end" }, text));
    });
    const describe = (layer, at) => {
      const error = map.se ? ` ± ${number(map.se[layer][at])}` : "";
      return `${map.title}, layer ${layer}, ${data.labels[at]}${token(data.labels[at])}: ${number(map.mean[layer][at])}${error} (n = ${map.n[at]})`;
    };
    let current = 0;
    const point = (index) => {
      cells[current].classList.remove("at");
      current = index;
      cells[current].classList.add("at");
    };
    svg.addEventListener("pointermove", (event) => {
      const { layer, at } = event.target.dataset;
      if (layer === undefined) { tip.hidden = true; return; }
      show(describe(+layer, +at), event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; });
    svg.addEventListener("blur", () => { tip.hidden = true; cells[current].classList.remove("at"); });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -positions, ArrowDown: positions }[event.key];
      if (step === undefined || !cells[current + step]) return;
      event.preventDefault();
      point(current + step);
      const box = cells[current].getBoundingClientRect();
      show(describe(Math.floor(current / positions), current % positions), box.left, box.top);
    });
    const figure = make("figure");
    figure.append(make("figcaption", {}, `${map.title}${map.se ? "" : ", added up over units"}`), svg);
    byId("maps").append(figure);
  }

  // The table: sorted by a click on a heading, searched, kept by the threshold, a page at a time.
  const [KIND, LAYER, POSITION, UNIT, SCORE] = ["kind", "layer", "position", "unit", "score"].map((n) => data.columns.indexOf(n));
  const state = { by: SCORE, down: true, page: 0, words: [], tau: 0 };
  const text = data.rows.map((r) => `${r[KIND]} ${r[LAYER]} ${r[POSITION]}${token(r[POSITION])} ${r[UNIT] ?? ""}`.toLowerCase());
  const chosen = () => {
    const kept = data.rows.map((_, i) => i).filter((i) =>
      Math.abs(data.rows[i][SCORE]) > state.tau && state.words.every((word) => text[i].includes(word)));
    const key = (i) => (state.by === SCORE ? Math.abs(data.rows[i][SCORE]) : data.rows[i][state.by]);
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === y) return a - b;
      if (x === null || y === null) return x === null ? 1 : -1;
      return (x < y ? -1 : 1) * (state.down ? -1 : 1);
    };
    return kept.sort(order);
  };
  const names = { score: "score (by size)", se: "± s.e." };
  const head = byId("rows-head");
  data.columns.forEach((column, i) => {
    const cell = make("th", { class: i === POSITION || i === KIND ? "" : "num", scope: "col" });
    const button = make("button", { type: "button" }, names[column] ?? column);
    button.addEventListener("click", () => {
      state.down = state.by === i ? !state.down : i >= SCORE;
      state.by = i;
      state.page = 0;
      draw();
    });
    cell.append(button);
    head.append(cell);
  });
  const draw = () => {
    const rows = chosen(), pages = Math.max(1, Math.ceil(rows.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    [...head.children].forEach((cell, i) =>
      cell.setAttribute("aria-sort", i !== state.by ? "none" : state.down ? "descending" : "ascending"));
    byId("rows").replaceChildren(...rows.slice(state.page * PAGE, (state.page + 1) * PAGE).map((i) => {
      const line = make("tr");
      data.rows[i].forEach((value, at) => {
        const plain = at === KIND || at === POSITION;
        const shown = typeof value === "number" && at >= SCORE && at < data.columns.length - 1 ? number(value) : value ?? "";
        line.append(make("td", { class: plain ? "" : "num" }, at === POSITION ? `${value}${token(value)}` : String(shown)));
      });
      return line;
    }));
    const all = data.rows.length < data.of ? ` of the ${data.rows.length} strongest of ${data.of}` : ` of ${data.of}`;
    byId("rows-count").textContent = `${rows.length}${all}; page ${state.page + 1} of ${pages}`;
    byId("earlier").disabled = state.page === 0;
    byId("later").disabled = state.page === pages - 1;
  };
  byId("search").addEventListener("input", (event) => {
    state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    state.page = 0;
    draw();
  });
  byId("earlier").addEventListener("click", () => { state.page -= 1; draw(); });
  byId("later").addEventListener("click", () => { state.page += 1; draw(); });
  byId("download").addEventListener("click", () => {
    const quoted = (v) => (v === null ? "" : /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : String(v));
    const lines = [data.columns, ...chosen().map((i) => data.rows[i])].map((row) => row.map(quoted).join(","));
    const link = make("a", { download: "scores.csv", href: URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" })) });
    link.click();
    URL.revokeObjectURL(link.href);
  });

  // The threshold: how many units it keeps, and what was measured of the nearest circuit of the sweep.
  const slider = byId("tau");
  slider.max = data.steps.length - 1;
  slider.value = slider.max;
  const move = () => {
    const everything = +slider.value === data.steps.length - 1;
    const [tau, count] = everything ? [0, data.steps.at(-1)[1]] : data.steps[slider.value];
    state.tau = everything ? -1 : tau;
    let line = everything ? `all ${data.of} units` : `τ = ${number(tau)}: ${count} of ${data.of} units with |score| > τ`;
    if (data.curve.length && !everything) {
      const distance = (row) => Math.abs(Math.log((row.tau || 1e-12) / (tau || 1e-12)));
      const near = data.curve.reduce((best, row) => (distance(row) < distance(best) ? row : best));
      line += `; measured at τ = ${number(near.tau)} (${near.n_nodes} of ${near.n_possible}): faithfulness ${number(near.faithfulness, 2)} `
        + `[${number(near.faithfulness_lo, 2)}, ${number(near.faithfulness_hi, 2)}], completeness ${number(near.completeness, 2)}`;
    }
    byId("tau-line").textContent = line;
    for (const rect of document.querySelectorAll("#maps rect")) rect.classList.remove("kept");
    if (!everything)
      for (const row of data.rows) {
        if (Math.abs(row[SCORE]) <= tau) break;
        const at = data.labels.indexOf(row[POSITION]);
        document.querySelector(`svg[data-kind="${row[KIND]}"] rect[data-layer="${row[LAYER]}"][data-at="${at}"]`)?.classList.add("kept");
      }
    state.page = 0;
    draw();
  };
  slider.addEventListener("input", move);
  move();
})();
