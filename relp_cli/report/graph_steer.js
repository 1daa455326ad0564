// The threshold and what it draws; pointer, keys and buttons.
"use strict";
(() => {
  const g = relpGraph, { data, svg, nodes, lines } = g, units = data.units;
  const { make, whole, short, counted, measured, around, card, cell, empty, node, edge } = relpCard;
  const byId = (id) => document.getElementById(id);

  // Units in the order of strength: of the circuit, or all.
  const strength = units.score.map((v) => Math.abs(v ?? 0));
  const pools = { circuit: [...strength.keys()].filter((i) => units.kept[i]), all: [...strength.keys()].slice(0, data.complete) };
  const above = (pool, tau) => {
    let [low, high] = [0, pool.length];
    while (low < high) {
      const mid = (low + high) >> 1;
      if (strength[pool[mid]] > tau) low = mid + 1; else high = mid;
    }
    return low;
  };
  const between = (low, high) => {  // a τ of few digits that keeps what is ≥ high and nothing ≤ low
    for (let digits = 2; digits < 17; digits += 1) {
      const tau = Number(((low + high) / 2).toPrecision(digits));
      if (low <= tau && tau < high) return tau;
    }
    return low;
  };
  const tauOf = (pool, count) => {
    if (!pool.length) return 0;
    if (count === 0) return between(strength[pool[0]], 1.5 * strength[pool[0]] || 1);
    const last = strength[pool[count - 1]], next = count < pool.length ? strength[pool[count]] : strength.find((s) => s < last) ?? 0;
    return between(Math.max(next, count === pool.length && next <= data.below ? Math.min(data.below, last) : 0), last);
  };
  const steps = (n) => {
    const out = new Set([0]);
    for (let s = 0; s <= 160; s += 1) out.add(Math.min(n, Math.round(Math.exp((Math.log(Math.max(n, 1)) * s) / 160))));
    return [...out].sort((a, b) => a - b);
  };
  const state = { mode: data.circuit && pools.circuit.length ? "circuit" : "all", tau: 0, edgeTau: data.links ? data.links.threshold : 0, at: null };
  const slider = byId("cg-tau"), box = byId("cg-number"), edgeSlider = byId("cg-edge-tau");
  let marksOfSlider = [];
  const setMode = (mode) => {
    state.mode = mode;
    for (const button of byId("cg-modes").children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    g.use(mode);
    marksOfSlider = steps(pools[mode].length);
    slider.max = marksOfSlider.length - 1;
    setTau(tauOf(pools[mode], mode === "circuit" ? pools.circuit.length : Math.min(pools.all.length, 150)));
  };
  const setTau = (asked) => {
    const tau = state.mode === "all" ? Math.max(asked, data.below) : asked;  // below that, the page does not have all
    state.tau = tau;
    const count = above(pools[state.mode], tau);
    const near = marksOfSlider.findIndex((c) => c >= count);
    slider.value = near < 0 ? marksOfSlider.length - 1 : near;
    box.value = tau;
    update();
  };

  // The threshold's line, and what was measured there.
  const update = () => {
    const pool = pools[state.mode], count = above(pool, state.tau);
    const wantNodes = new Uint8Array(g.many), wantLines = new Uint8Array(g.nLines);
    for (const i of pool.slice(0, count)) (data.edges ? wantLines : wantNodes)[i] = 1;
    if (data.edges)
      for (let j = 0; j < g.nLines; j += 1) {
        if (!wantLines[j]) continue;
        wantNodes[lines.u[j]] = 1;
        wantNodes[lines.v[j]] = 1;
      }
    else {
      for (let i = units.score.length; i < g.many; i += 1) wantNodes[i] = 1;
      for (let j = 0; j < g.nLines; j += 1)
        wantLines[j] = Number(Math.abs(lines.score[j]) > state.edgeTau && wantNodes[lines.u[j]] && wantNodes[lines.v[j]]);
    }
    const ring = (i) => state.mode === "all" && data.circuit !== null && g.isUnit(i) && units.kept[i] === 1;
    const hidden = g.show(wantNodes, wantLines, ring);
    const sum = (flags) => flags.reduce((a, b) => a + b, 0);
    const all = state.mode === "circuit" ? `the circuit's ${whole(pool.length)}` : whole(data.of);
    const line = [make("b", {}, `τ = ${short(state.tau)}`), `: ${whole(count)} of ${all} ${data.noun} with |score| > τ`];
    if (data.edges) line.push(`, between ${counted(sum(wantNodes), "node")}`);
    if (data.links) line.push(`; ${counted(sum(wantLines), "edge")} with |score| > ${short(state.edgeTau)} among them and to the metric`);
    if (state.mode === "all" && data.circuit) line.push(`; ${whole(pool.slice(0, count).filter((i) => units.kept[i]).length)} are in the circuit`);
    if (hidden) line.push(`; ${whole(hidden)} stand in their cells as +n`);
    if (state.mode === "all" && count === pool.length && data.below > 0) line.push(`; the page holds the ${whole(pool.length)} strongest`);
    if (state.mode === "circuit" && data.circuit.shown < data.circuit.n)
      line.push(`; the page holds ${whole(data.circuit.shown)} of its ${whole(data.circuit.n)}`);
    if (data.links && g.nLines < data.links.of) line.push(`; the page holds ${whole(g.nLines)} of ${whole(data.links.of)} edges`);
    byId("cg-line").replaceChildren(...line);
    slider.setAttribute("aria-valuetext", byId("cg-line").textContent);
    const strongest = pools.all.slice(0, count), complete = state.tau >= data.below && above(pools.all, state.tau) === count;
    const same = state.mode === "all" || (complete && strongest.every((i) => units.kept[i]));
    const entire = state.mode === "circuit" && count === pool.length;
    byId("cg-measured").replaceChildren(...measured({ tau: state.tau, count, same, entire }));
    if (state.at !== null && !wantNodes[state.at]) select(null); else select(state.at, false);
  };
  const select = (i, anew = true) => {
    state.at = i;
    const { into, out } = i === null ? { into: [], out: [] } : around(i);
    g.focus(i, [...into.map((j) => lines.u[j]), ...out.map((j) => lines.v[j])], [...into, ...out]);
    if (anew || i !== null) byId("cg-card").replaceChildren(...(i === null ? empty() : card(i, select)));
  };

  // Pointer and keys.
  const pointers = new Map();
  let moved = false, last = null;
  const local = (event) => {
    const box = svg.getBoundingClientRect(), f = g.at().W / box.width;
    return [(event.clientX - box.left) * f, (event.clientY - box.top) * f];
  };
  svg.addEventListener("pointerdown", (event) => {
    pointers.set(event.pointerId, local(event));
    moved = false;
    last = null;
  });
  svg.addEventListener("pointermove", (event) => {
    const [x, y] = local(event), { i, j } = event.target.dataset;
    if (pointers.has(event.pointerId)) {
      const [px, py] = pointers.get(event.pointerId), others = [...pointers].filter(([id]) => id !== event.pointerId);
      if (others.length) {
        const [ox, oy] = others[0][1], size = Math.hypot(x - ox, y - oy);
        if (last) g.zoom(size / last, (x + ox) / 2, (y + oy) / 2);
        last = size;
        moved = true;
      } else if (g.view.k > 1 && (moved || Math.hypot(x - px, y - py) > 4)) {
        if (!moved) svg.setPointerCapture(event.pointerId);
        moved = true;
        svg.classList.add("dragging");
        g.move(g.view.k, g.view.x + x - px, g.view.y + y - py);
      } else return;
      pointers.set(event.pointerId, [x, y]);
      return;
    }
    g.say(i !== undefined ? node(+i) : j !== undefined ? edge(+j) : "", x, y);
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"])
    svg.addEventListener(name, (event) => {
      pointers.delete(event.pointerId);
      svg.classList.remove("dragging");
      if (name === "pointerleave") g.say("", 0, 0);
    });
  svg.addEventListener("click", (event) => {
    if (moved) return;
    const { i, j, cell: key } = event.target.dataset;
    if (key !== undefined) byId("cg-card").replaceChildren(...cell(event.target.members, select));
    else if (j !== undefined) select(lines.v[j]);
    else select(i === undefined ? null : +i);
  });
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    g.zoom(Math.exp(-0.002 * event.deltaY), ...local(event));
  }, { passive: false });
  const centre = () => {  // the chosen node, or the one nearest to the middle
    if (state.at !== null) return g.place(state.at);
    const [mx, my] = g.middle(), far = ([x, y]) => Math.hypot(x - mx, y - my);
    return [...g.visible.keys()].filter((i) => g.visible[i] && !g.isBar(i)).map(g.place).reduce((best, p) => (best && far(best) <= far(p) ? best : p), null) ?? [mx, my];
  };
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  svg.addEventListener("keydown", (event) => {
    const way = ways[event.key];
    if (event.key === "Escape") select(null);
    else if (event.key === "+" || event.key === "=") g.zoom(1.4, ...centre());
    else if (event.key === "-") g.zoom(1 / 1.4, ...centre());
    else if (event.key === "0") g.move(1, 0, 0);
    else if (way) {
      event.preventDefault();
      const { x, y } = g.at(), shown = [...g.visible.keys()].filter((i) => g.visible[i] && !g.over(i));
      if (state.at === null) return void (shown.length && select(shown[0]));
      const far = (i) => {
        const [dx, dy] = [x[i] - x[state.at], y[i] - y[state.at]], on = dx * way[0] + dy * way[1], off = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
        return on > 1 ? on + 2.5 * off : Infinity;
      };
      const next = shown.reduce((best, i) => (far(i) < far(best) ? i : best), state.at);
      if (far(next) < Infinity) {
        select(next);
        g.say(node(next), ...g.place(next));
      }
    }
  });
  slider.addEventListener("input", () => setTau(tauOf(pools[state.mode], marksOfSlider[slider.value])));
  box.addEventListener("change", () => { if (box.value !== "" && Number(box.value) >= 0) setTau(Number(box.value)); });
  for (const button of byId("cg-modes").children) button.addEventListener("click", () => setMode(button.dataset.mode));
  byId("cg-in").addEventListener("click", () => g.zoom(1.5, ...centre()));
  byId("cg-out").addEventListener("click", () => g.zoom(1 / 1.5, ...centre()));
  byId("cg-fit").addEventListener("click", () => (g.view.k > 1 ? g.move(1, 0, 0) : g.fit()));
  if (data.links && g.nLines) {
    const marks = steps(g.nLines);
    byId("cg-edge-label").hidden = false;
    edgeSlider.max = marks.length - 1;
    edgeSlider.value = marks.length - 1;
    const sizes = lines.score.map(Math.abs);
    edgeSlider.addEventListener("input", () => {
      const count = marks[edgeSlider.value];
      state.edgeTau = count === g.nLines ? data.links.threshold : between(sizes[count], count ? sizes[count - 1] : 1.5 * sizes[0]);
      update();
    });
  }
  if (!data.circuit || !pools.circuit.length) byId("cg-modes").hidden = true;
  const legend = (mark, text) => make("span", {}, mark, text);
  const symbol = (attributes) => {
    const box = g.draw("svg", { viewBox: "-11 -7 22 14", "aria-hidden": "true" });
    box.append(g.draw("path", attributes));
    return box;
  };
  const dash = (d) => symbol({ d: "M-10,0H10", stroke: "var(--ink)", "stroke-width": 2, "stroke-dasharray": d });
  const stroke = (name) => symbol({ d: "M-10,0H10", stroke: `var(${name})`, "stroke-width": 4 });
  const kind = ({ shape }) => symbol({ d: g.outline(shape, 5.5, 0), fill: shape === "hollow" ? "none" : "var(--ink)", stroke: "var(--ink)" });
  byId("cg-legend").append(
    ...(data.signed ? [legend(stroke("--neg"), "negative score"), legend(stroke("--pos"), "positive score")] : []),
    ...data.kinds.filter((k) => k.shape !== "bar").map((k) => legend(kind(k), k.title)),
    ...(data.edges ? [["5 3", "into queries"], ["1.5 2.5", "into keys"], ["none", "into values, MLPs, logits"]].map(([d, text]) => legend(dash(d), text)) : []));
  let width = svg.clientWidth;
  addEventListener("resize", () => {
    if (svg.clientWidth === width) return;
    width = svg.clientWidth;
    g.arrange();
  });
  select(null);
  setMode(state.mode);
})();
