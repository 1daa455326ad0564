// The circuit as an SVG: marks, edges, axes that stay in view, zoom and pan. Which of them are shown is said by graph_steer.js.
"use strict";
const relpGraph = (() => {
  const data = JSON.parse(document.getElementById("graph-data").textContent);
  const svg = document.getElementById("cg-svg"), tip = document.getElementById("cg-tip");
  const nodes = data.nodes, lines = data.edges ? data.units : data.links, many = nodes.row.length;
  const NAMED = 2000;  // as many of the strongest have their number below them, where there is room
  let plan = data.layouts.all;
  const nLines = lines ? lines.u.length : 0;
  const draw = (name, attributes = {}, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== "") node.textContent = text;
    return node;
  };
  const largest = (values) => values.reduce((most, v) => Math.max(most, Math.abs(v ?? 0)), 0) || 1;
  const topLine = nLines ? largest(lines.score) : 1, topNode = data.edges ? 1 : largest(data.units.score);
  const isUnit = (i) => !data.edges && i < data.units.score.length;
  const isBar = (i) => data.kinds[nodes.kind[i]].shape === "bar" && nodes.column[i] < 0;
  const token = (column) => {  // beside a role only where all pairs have it
    const own = new Set(data.columns[column].tokens.map(([clean]) => clean));
    if (own.size !== 1) return "";
    const text = [...own][0].replaceAll("\n", "↵").replaceAll("\t", "⇥").trim() || "␣";
    return text.length > 14 ? `${text.slice(0, 13)}…` : text;
  };

  // A mark's outline around (0, 0).
  const polygon = (r, n, turn) => "M" + Array.from({ length: n }, (_, j) => {
    const a = (2 * Math.PI * j) / n + turn;
    return `${(r * Math.cos(a)).toFixed(2)},${(r * Math.sin(a)).toFixed(2)}`;
  }).join("L") + "Z";
  const outline = (shape, r, wide) => ({
    circle: () => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
    square: () => `M${-0.87 * r},${-0.87 * r}h${1.74 * r}v${1.74 * r}h${-1.74 * r}Z`,
    hollow: () => `M${-0.8 * r},${-0.8 * r}h${1.6 * r}v${1.6 * r}h${-1.6 * r}Z`,
    diamond: () => polygon(1.15 * r, 4, 0), up: () => polygon(1.15 * r, 3, -Math.PI / 2),
    down: () => polygon(1.15 * r, 3, Math.PI / 2), hexagon: () => polygon(r, 6, 0),
    bar: () => `M${-wide / 2},${-r * 0.8}h${wide}a${r * 0.8},${r * 0.8} 0 0,1 0,${1.6 * r}h${-wide}a${r * 0.8},${r * 0.8} 0 0,1 0,${-1.6 * r}Z`,
  })[shape]();

  // Places in pixels; the same for every threshold.
  let at = null;
  const measure = () => {
    const room = Math.max(svg.parentNode.clientWidth || 0, 300), narrow = room < 560;
    const left = 22 + 6 * Math.max(...data.rows.map((label) => label.length)), top = 18, [w, h] = plan.size;
    const sx = Math.min(Math.max((room - left - 14) / (w + 0.2), narrow ? 14 : 9), data.positions ? 52 : 90);
    const W = Math.max(room, Math.ceil(left + 14 + (w + 0.2) * sx));  // wider than the stage: it scrolls
    const sy = Math.min(Math.max(880 / h, 15), 46), inner = W - left - 14;
    const shift = left + Math.max(0, (inner - w * sx) / 2);
    const labels = data.columns.map((c) => (data.positions || !narrow ? c.label : c.label.replace("head ", "")));
    const turned = data.columns.some((_, j) => Math.max(labels[j].length, token(j).length) * 6.6 > (plan.columns[j][1] + 0.6) * sx);
    const longest = Math.max(0, ...data.columns.map((c, j) => labels[j].length + (token(j) ? token(j).length + 1 : 0)));
    const bottom = turned ? Math.min(120, 20 + longest * 5) : data.positions ? 46 : 28;
    const cap = Math.min(0.47 * sx, (data.edges ? 0.42 : 0.46) * sy, 12);
    at = { W, H: top + h * sy + 12 + bottom, left, top, bottom, sx, sy, labels, turned, cap, width: w * sx, shift,
      x: Float64Array.from(plan.x, (v) => shift + (v + 0.5) * sx), y: Float64Array.from(plan.y, (v) => top + (h - v - 0.5) * sy) };
    at.r = Float64Array.from(plan.x, (_, i) => (isUnit(i) ? cap * (0.36 + 0.64 * Math.sqrt(Math.abs(data.units.score[i] ?? 0) / topNode)) : cap));
  };
  const path = (j) => {
    const u = lines.u[j], v = lines.v[j], part = lines.part ? lines.part[j] : "";
    const port = { q: -0.6, k: 0, v: 0.6 }[part] ?? 0;
    const x2 = (isBar(v) ? at.x[u] : at.x[v] + port * at.r[v]) + (isBar(u) || isBar(v) ? ((j % 5) - 2) * 1.3 : 0);
    const x1 = isBar(u) ? x2 : isBar(v) ? at.x[u] : at.x[u];
    const y1 = at.y[u] - at.r[u] * 0.7, y2 = at.y[v] + at.r[v] * 0.8, dy = y1 - y2;
    const beside = Math.abs(x2 - x1) < 0.6 * at.sx && dy > 1.6 * at.sy;
    const bow = beside ? (j % 2 ? 1 : -1) * Math.min(0.46 * at.sx, 5 + 0.07 * dy, 30) : 0;
    const to = (...points) => points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
    return `M${to([x1, y1])}C${to([x1 + 1.3 * bow, y1 - 0.4 * dy], [x2 + 1.3 * bow, y2 + 0.4 * dy], [x2, y2])}`;
  };

  // Elements are made when they are first shown, and hidden afterwards.
  const layer = Object.fromEntries(["back", "edges", "nodes", "names"].map((name) => [name, draw("g")]));
  const content = draw("g"), axes = draw("g", { "aria-hidden": "true" });
  content.append(layer.back, layer.edges, layer.nodes, layer.names);
  svg.append(content, axes);
  const marks = new Array(many), names = new Array(many), curves = new Array(nLines), chips = new Map();
  const place = (i) => {
    const { shape } = data.kinds[nodes.kind[i]], wide = isBar(i) ? at.width - 8 : shape === "bar" ? at.r[i] : 0;
    marks[i].setAttribute("d", outline(shape, at.r[i], wide));
    marks[i].setAttribute("transform", `translate(${at.x[i].toFixed(1)},${at.y[i].toFixed(1)})`);
    if (!names[i]) return;
    names[i].setAttribute("x", at.x[i].toFixed(1));
    names[i].setAttribute("y", (at.y[i] + (isUnit(i) ? at.r[i] : 3.5)).toFixed(1));
    if (!isUnit(i)) names[i].style.fontSize = `${Math.min(11, 1.25 * at.r[i])}px`;
  };
  const mark = (i) => {
    if (marks[i]) return marks[i];
    const { shape } = data.kinds[nodes.kind[i]], score = isUnit(i) ? data.units.score[i] : null;
    const sign = score === null ? "plain" : score < 0 ? "neg" : "pos";
    marks[i] = draw("path", { class: `cg-node ${sign}${shape === "hollow" ? " hollow" : ""}`, "data-i": i });
    if (nodes.text[i] && shape !== "hollow" && i < NAMED) {
      names[i] = draw("text", isUnit(i) ? { class: "cg-name cg-tag", dy: "1em" } : { class: "cg-name" }, nodes.text[i]);
      layer.names.append(names[i]);
    }
    layer.nodes.append(marks[i]);
    place(i);
    return marks[i];
  };
  const curve = (j) => {
    if (curves[j]) return curves[j];
    const share = Math.abs(lines.score[j] ?? 0) / topLine, part = lines.part ? lines.part[j] : "";
    curves[j] = draw("path", { class: `cg-edge ${lines.score[j] < 0 ? "neg" : "pos"} ${part}`, d: path(j), "data-j": j,
      "stroke-width": (0.7 + 4.3 * share).toFixed(2), opacity: (0.3 + 0.6 * Math.sqrt(share)).toFixed(2) });
    layer.edges.prepend(curves[j]);  // the strongest, made first, stay on top
    return curves[j];
  };
  const visible = new Uint8Array(many), on = new Uint8Array(many), drawn = new Uint8Array(nLines);
  const show = (wantNodes, wantLines, ring) => {
    const hidden = new Map();
    for (let i = 0; i < many; i += 1) {
      if (plan.over[i] && wantNodes[i]) {
        const key = `${nodes.row[i]},${nodes.column[i]}`;
        hidden.set(key, [...(hidden.get(key) ?? []), i]);
      }
      const now = Number(wantNodes[i] === 1 && !plan.over[i]);
      if (now !== on[i]) {
        on[i] = now;
        mark(i).style.display = now ? "" : "none";
        if (names[i]) names[i].style.display = now ? "" : "none";
      }
      if (now) marks[i].classList.toggle("kept", ring(i));
      visible[i] = wantNodes[i];
    }
    for (let j = 0; j < nLines; j += 1)
      if (wantLines[j] !== drawn[j]) {
        curve(j).style.display = wantLines[j] ? "" : "none";
        drawn[j] = wantLines[j];
      }
    for (const chip of chips.values()) chip.style.display = "none";
    for (const [key, members] of hidden) {
      if (!chips.has(key)) {
        chips.set(key, draw("text", { class: "cg-chip", "data-cell": key }));
        layer.names.append(chips.get(key));
      }
      const chip = chips.get(key), i = members[0];
      chip.textContent = `+${members.length}`;
      chip.setAttribute("x", at.x[i]);
      chip.setAttribute("y", at.y[i] + 3);
      chip.members = members;
      chip.style.display = "";
    }
    return [...hidden.values()].reduce((sum, m) => sum + m.length, 0);
  };

  // Axes in pixels of the page, moved with the view.
  const view = { k: 1, x: 0, y: 0 };
  const drawAxes = () => {
    const { W, H, left, bottom, sx, sy, turned, labels } = at, [, h] = plan.size, floor = H - bottom, side = Math.max(left, at.shift * view.k + view.x - 4);
    const mask = (y, width, height) => draw("rect", { class: "cg-mask", x: 0, y, width, height });
    const parts = [mask(floor, W, bottom), mask(0, side - 6, floor)];
    let last = Infinity;
    for (const [j, y] of plan.rows.entries()) {
      const py = (at.top + (h - y - 0.5) * sy) * view.k + view.y;
      if (py < 4 || py > floor - 2 || last - py < 10) continue;
      last = py;
      parts.push(draw("text", { x: side - 12, y: py + 4, "text-anchor": "end" }, data.rows[j]));
    }
    plan.columns.forEach(([from, width], j) => {
      const px = (at.shift + (from + width / 2) * sx) * view.k + view.x;
      if (px < side - 4 || px > W) return;
      if (turned) {
        const word = draw("text", { x: px + 3, y: floor + 14, transform: `rotate(-50 ${px + 3} ${floor + 14})`, "text-anchor": "end" }, labels[j]);
        if (token(j)) word.append(draw("tspan", {}, " "), Object.assign(draw("tspan", { style: "fill: var(--ink)" }), { textContent: token(j) }));
        parts.push(word);
      } else {
        parts.push(draw("text", { x: px, y: floor + 16, "text-anchor": "middle" }, labels[j]));
        if (token(j)) parts.push(draw("text", { class: "tok", x: px, y: floor + 32, "text-anchor": "middle" }, token(j)));
      }
    });
    axes.replaceChildren(...parts);
  };
  const drawBack = () => {
    const [, h] = plan.size, parts = [];
    if (data.positions)
      for (const [from, width] of plan.columns)
        parts.push(draw("rect", { class: "cg-band", x: at.shift + (from - 0.2) * at.sx, y: at.top - 6, width: (width + 0.4) * at.sx, height: h * at.sy + 12, rx: 8 }));
    for (const y of plan.rows) {
      const py = at.top + (h - y - 0.5) * at.sy;
      parts.push(draw("line", { class: "cg-row", x1: at.shift - 6, x2: at.shift + at.width + 6, y1: py, y2: py }));
    }
    layer.back.replaceChildren(...parts);
  };
  const move = (k, x, y) => {
    const wide = at.W - at.left, high = at.H - at.bottom;
    view.k = Math.min(Math.max(k, 1), 16);
    view.x = Math.min(at.left * (1 - view.k) + 0.4 * wide * (view.k > 1), Math.max(x, at.W - at.W * view.k - 0.4 * wide * (view.k > 1)));
    view.y = Math.min(0.4 * high * (view.k > 1), Math.max(y, high * (1 - view.k) - 0.4 * high * (view.k > 1)));
    if (view.k === 1) view.x = view.y = 0;
    content.setAttribute("transform", `translate(${view.x.toFixed(2)},${view.y.toFixed(2)}) scale(${view.k.toFixed(4)})`);
    svg.classList.toggle("zoomed", view.k > 1);
    svg.classList.toggle("roomy", at.sx * view.k > 21 && at.sy * view.k > 24);
    if (layer.names.dataset.zoom !== String(view.k)) {  // as few styles as can be are computed anew
      layer.names.dataset.zoom = view.k;
      layer.names.style.setProperty("--zoom", view.k);
    }
    drawAxes();
  };
  const zoom = (factor, px, py) => {
    const k = Math.min(Math.max(view.k * factor, 1), 16), f = k / view.k;
    move(k, px - (px - view.x) * f, py - (py - view.y) * f);
  };
  const middle = () => [(at.W + at.left) / 2, (at.H - at.bottom) / 2];
  const fit = () => {
    const shown = [...visible.keys()].filter((i) => visible[i] && !isBar(i));
    if (!shown.length) return move(1, 0, 0);
    const low = (v) => Math.min(...shown.map((i) => v[i])) - 24, high = (v) => Math.max(...shown.map((i) => v[i])) + 24;
    const [x0, x1, y0, y1] = [low(at.x), high(at.x), low(at.y), high(at.y)];
    const k = Math.min((at.W - at.left) / (x1 - x0), (at.H - at.bottom) / (y1 - y0), 6), [mx, my] = middle();
    return move(k, mx - (k * (x0 + x1)) / 2, my - (k * (y0 + y1)) / 2);
  };
  const arrange = () => {
    measure();
    svg.setAttribute("height", at.H);
    svg.style.minWidth = `${at.W}px`;
    svg.setAttribute("viewBox", `0 0 ${at.W} ${at.H}`);
    drawBack();
    marks.forEach((m, i) => m && place(i));
    curves.forEach((c, j) => c && c.setAttribute("d", path(j)));
    for (const chip of chips.values())
      if (chip.members) {
        chip.setAttribute("x", at.x[chip.members[0]]);
        chip.setAttribute("y", at.y[chip.members[0]] + 3);
      }
    move(view.k, view.x, view.y);
  };
  const use = (mode) => {
    plan = data.layouts[mode] ?? data.layouts.all;
    arrange();
  };
  let hot = [];
  const focus = (i, near, own) => {
    for (const element of hot) element.classList.remove("hot", "at");
    hot = i === null ? [] : [...near, i].flatMap((n) => [marks[n], names[n]]).filter(Boolean).concat(own.map((j) => curves[j]).filter(Boolean));
    for (const element of hot) element.classList.add("hot");
    if (i !== null) marks[i]?.classList.add("at");
    svg.classList.toggle("cg-focus", i !== null && nLines > 0);
  };
  const say = (text, x, y) => {
    tip.hidden = text === "";
    tip.textContent = text;
    tip.style.left = `${Math.max(4, Math.min(x + 14, at.W - tip.offsetWidth - 6))}px`;
    tip.style.top = `${Math.max(4, y - 34)}px`;
  };
  const show2page = (i) => [at.x[i] * view.k + view.x, at.y[i] * view.k + view.y];
  arrange();
  return { data, svg, nodes, lines, nLines, many, isUnit, isBar, visible, drawn, show, use, over: (i) => plan.over[i], focus, say, zoom, fit, move, arrange, view, middle,
    place: show2page, at: () => at, draw, outline };
})();
