// What the graph shows: the threshold, what was measured there, the node that is pointed at, its card and its edges.
"use strict";
(() => {
  const g = relpGraph, { data, svg, nodes, lines } = g, units = data.units;
  const byId = (id) => document.getElementById(id);
  const make = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children.filter((c) => c !== null && c !== ""));
    return node;
  };
  const whole = (n) => n.toLocaleString("en-US");
  const number = (v, digits = 4) => {
    if (v === null || v === undefined) return "—";
    const size = Math.abs(v);
    const text = size === 0 || digits < 3 || (size >= 10 ** -digits && size < 1e5) ? v.toFixed(digits) : v.toExponential(2);
    return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
  };
  const scored = (v, se, digits = 4) => number(v, digits) + (se === null || se === undefined ? "" : ` ± ${number(se, digits)}`);
  const short = (tau) => String(Number(tau.toPrecision(4)));
  const counted = (n, one) => `${whole(n)} ${n === 1 ? one : `${one}s`}`;

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
  const setTau = (tau) => {
    state.tau = tau;
    const count = above(pools[state.mode], tau);
    const near = marksOfSlider.findIndex((c) => c >= count);
    slider.value = near < 0 ? marksOfSlider.length - 1 : near;
    box.value = tau;
    update();
  };

  // The threshold's line, and what was measured: never between two evaluated circuits.
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
    const line = [make("b", {}, `τ = ${short(state.tau)}`), `: ${whole(count)} of ${state.mode === "circuit" ? `the circuit's ${whole(pool.length)}` : whole(data.of)} ${data.noun} with |score| > τ`];
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
    measured(count);
    if (state.at !== null && !wantNodes[state.at]) select(null); else select(state.at, false);
  };
  const said = (row) => `faithfulness ${number(row.faithfulness, 2)} [${number(row.faithfulness_lo, 2)}, ${number(row.faithfulness_hi, 2)}], `
    + `completeness ${number(row.completeness, 2)} [${number(row.completeness_lo, 2)}, ${number(row.completeness_hi, 2)}]`;
  const sized = (row) => `${whole(row.n_nodes)} of ${whole(row.n_possible)}`;
  const measured = (count) => {
    const out = [make("h3", {}, "Measured on held-out pairs")], own = data.curve.find((r) => r.own), sweep = data.curve.filter((r) => r.kept !== null);
    const alone = pools.all.length === data.complete && state.tau >= data.below, prefix = pools.all.slice(0, count);
    const same = state.mode === "all" || (alone && above(pools.all, state.tau) === count && prefix.every((i) => units.kept[i]));
    const exact = same ? sweep.find((r) => r.kept === count) : null;
    const row = state.mode === "circuit" && count === pools.circuit.length && own ? own : exact;
    if (sweep.length) out.push(chart(sweep, same ? count : null, row));
    if (row) out.push(make("p", { id: "cg-said" }, make("b", {}, row === own ? "This circuit" : `τ = ${short(row.tau)}`), ` (${sized(row)}): ${said(row)}.`));
    else if (!data.curve.length) out.push(make("p", { id: "cg-said", class: "soft" }, "Nothing yet: ", make("code", {}, "relp evaluate RUN --sweep …"), " measures faithfulness and completeness."));
    else if (!same || !sweep.length)
      out.push(make("p", { id: "cg-said", class: "soft" }, own ? `Only the whole circuit was measured (${sized(own)}): ${said(own)}.`
        : "What evaluation.csv measured are other sets of units than these."));
    else {
      const larger = sweep.filter((r) => r.kept > count).reduce((a, b) => (a && a.kept < b.kept ? a : b), null);
      const smaller = sweep.filter((r) => r.kept < count).reduce((a, b) => (a && a.kept > b.kept ? a : b), null);
      const lines = [smaller, larger].filter(Boolean).map((r) => make("p", {}, make("b", {}, `τ = ${short(r.tau)}`), ` (${sized(r)}): ${said(r)}.`));
      out.push(make("div", { id: "cg-said" }, make("p", { class: "soft" }, `Not measured at τ = ${short(state.tau)}; the nearest evaluated ${lines.length > 1 ? "circuits" : "circuit"}:`), ...lines));
    }
    const about = row ?? sweep[0] ?? own;
    if (about) out.push(make("p", { class: "soft" }, `${about.n_pairs ?? "?"} pairs, ${about.ablation} ablation` + (about.exclude_layers ? `; the first ${about.exclude_layers > 1 ? `${about.exclude_layers} layers run whole and do not count` : "layer runs whole and does not count"}` : "") + ". [95 % bootstrap]"));
    byId("cg-measured").replaceChildren(...out);
  };
  const chart = (rows, count, current) => {
    const [w, h, left, low] = [290, 128, 26, 104], most = Math.max(2, ...rows.map((r) => r.kept), count ?? 0), top = 1.25;
    const px = (n) => left + ((w - left - 8) * Math.log(Math.max(n, 0.8) / 0.8)) / Math.log(most / 0.8), py = (v) => low - 92 * Math.min(Math.max(v, -0.1), top) / top;
    const box = g.draw("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": "evaluated circuits: faithfulness (filled) and completeness (hollow) against size" });
    for (const v of [0, 0.5, 1]) box.append(g.draw("line", { x1: left, x2: w - 4, y1: py(v), y2: py(v), stroke: "var(--line)" }), g.draw("text", { x: left - 5, y: py(v) + 3, "text-anchor": "end" }, String(v)));
    for (let n = 1; n <= most; n *= 10) box.append(g.draw("text", { x: px(n), y: h - 8, "text-anchor": "middle" }, n < 1000 ? String(n) : `${n / 1000}k`));
    if (count !== null) box.append(g.draw("line", { x1: px(count), x2: px(count), y1: 6, y2: low + 6, stroke: "var(--accent)", "stroke-width": 1.5, "stroke-dasharray": current ? "none" : "3 3" }));
    for (const r of rows)
      for (const [name, fill] of [["completeness", "var(--panel)"], ["faithfulness", "var(--ink)"]]) {
        if (r[name] === null) continue;
        const x = px(r.kept);
        if (r[`${name}_lo`] !== null) box.append(g.draw("line", { x1: x, x2: x, y1: py(r[`${name}_lo`]), y2: py(r[`${name}_hi`]), stroke: "var(--soft)" }));
        box.append(g.draw("circle", { cx: x, cy: py(r[name]), r: r === current ? 4.5 : 3, fill, stroke: r === current ? "var(--accent)" : "var(--ink)", "stroke-width": r === current ? 2 : 1 }));
      }
    return box;
  };

  // A node's card.
  const around = (i) => {
    const into = [], out = [];
    for (let j = 0; j < g.nLines; j += 1) {
      if (!g.drawn[j]) continue;
      if (lines.v[j] === i) into.push(j);
      if (lines.u[j] === i) out.push(j);
    }
    return { into, out };
  };
  const item = (text, score, se, share, go, more = []) => make("li", {}, (() => {
    const button = make("button", { type: "button" }, make("span", {}, text), make("span", {}, scored(score, se, 3)), make("i", { class: score < 0 ? "neg" : "", style: `width: ${(100 * share).toFixed(1)}%` }),
      ...more.map((m) => make("span", { class: "more" }, m)));
    button.addEventListener("click", go);
    return button;
  })());
  const MOST = 14;
  const list = (title, members, row) => members.length ? [make("h4", {}, title), make("ul", { class: "cg-list" }, ...members.slice(0, MOST).map(row)),
    members.length > MOST ? make("p", { class: "soft" }, `and ${whole(members.length - MOST)} weaker`) : ""] : [];
  const edgeList = (title, members, end) => {
    const most = Math.max(...members.map((j) => Math.abs(lines.score[j])), 1e-30), total = members.reduce((a, j) => a + lines.score[j], 0);
    return list(`${title}: ${counted(members.length, "edge")}, Σ ${number(total)}`, members, (j) => item(nodes.name[end[j]] + (lines.part?.[j] ? ` into ${lines.part[j]}` : ""), lines.score[j], lines.se?.[j],
      Math.abs(lines.score[j]) / most, () => select(end[j]), data.edges ? data.methods.map((m) => `${m.name}: ${scored(m.score[j], m.se?.[j], 3)}`) : []));
  };
  const card = (i) => {
    const out = [], column = data.columns[nodes.column[i]], unit = g.isUnit(i), { into, out: onto } = around(i);
    out.push(make("h3", {}, nodes.name[i]), make("p", { class: "soft" }, [...new Set([data.kinds[nodes.kind[i]].title, data.rows[nodes.row[i]], column && data.positions ? column.label : ""])].filter(Boolean).join(" · ")));
    if (unit) {
      const facts = [[data.own, `${scored(units.score[i], units.se?.[i])} (n = ${units.n[i]})`], ...data.methods.map((m) => [m.name, scored(m.score[i], m.se?.[i])]),
        ["rank", i < data.complete ? `${whole(i + 1)} of ${whole(data.of)}` : `after ${whole(data.complete)}`], ...(data.circuit ? [["circuit", units.kept[i] ? "in it" : "not in it"]] : [])];
      out.push(make("dl", {}, ...facts.flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)])));
    }
    if (data.meanings[i]) out.push(make("h4", {}, "Feature"), make("p", {}, data.meanings[i]));
    if (column?.tokens.length && data.positions)
      out.push(make("h4", {}, "Tokens at this position"), make("p", { class: "mono" }, column.tokens.map(([clean, other]) => (other === null || other === clean ? `‘${clean}’` : `‘${clean}’ → ‘${other}’`)).join("   ")));
    out.push(...edgeList("Upstream", into, lines?.u), ...edgeList("Downstream", onto, lines?.v));
    if (!into.length && !onto.length && g.nLines) out.push(make("p", { class: "soft" }, "No kept edge begins or ends here."));
    return out;
  };
  const cell = (members) => [make("h3", {}, `${whole(members.length)} more in this cell`), ...list("Strongest first", members, (i) =>
    item(nodes.name[i], units.score[i], units.se?.[i], strength[i] / strength[members[0]], () => select(i)))];
  const empty = () => {
    const { circuit } = data, sign = !data.signed ? "Scores have no sign." : data.direction === "noising" ? "Negative (blue): patching takes behaviour away." : "Positive (red): patching restores behaviour.";
    return [make("h3", {}, "Pick a node"), make("p", { class: "soft" }, circuit ? `The circuit: ${whole(circuit.n)} of ${whole(circuit.of)} ${data.noun}${circuit.selection ? `, selected by ${circuit.selection}` : ""}. ` : "", sign)];
  };
  const select = (i, anew = true) => {
    state.at = i;
    const { into, out } = i === null ? { into: [], out: [] } : around(i);
    g.focus(i, [...into.map((j) => lines.u[j]), ...out.map((j) => lines.v[j])], [...into, ...out]);
    if (anew || i !== null) byId("cg-card").replaceChildren(...(i === null ? empty() : card(i)));
  };
  const told = (i) => nodes.name[i] + (g.isUnit(i) ? `: ${scored(units.score[i], units.se?.[i])}` : "");

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
    g.say(i !== undefined ? told(+i) : j !== undefined ? `${nodes.name[lines.u[j]]} → ${nodes.name[lines.v[j]]}${lines.part?.[j] ? ` (${lines.part[j]})` : ""}: ${scored(lines.score[j], lines.se?.[j])}` : "", x, y);
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
    if (key !== undefined) byId("cg-card").replaceChildren(...cell(event.target.members));
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
        g.say(told(next), ...g.place(next));
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
  byId("cg-legend").append(
    ...(data.signed ? [legend(symbol({ d: "M-10,0H10", stroke: "var(--neg)", "stroke-width": 4 }), "negative score"), legend(symbol({ d: "M-10,0H10", stroke: "var(--pos)", "stroke-width": 4 }), "positive score")] : []),
    ...data.kinds.filter((k) => k.shape !== "bar").map((k) => legend(symbol({ d: g.outline(k.shape, 5.5, 0), fill: k.shape === "hollow" ? "none" : "var(--ink)", stroke: "var(--ink)" }), k.title)),
    ...(data.edges ? [legend(dash("5 3"), "into queries"), legend(dash("1.5 2.5"), "into keys"), legend(dash("none"), "into values, MLPs, logits")] : []));
  let width = svg.clientWidth;
  addEventListener("resize", () => {
    if (svg.clientWidth === width) return;
    width = svg.clientWidth;
    g.arrange();
  });
  select(null);
  setMode(state.mode);
})();
