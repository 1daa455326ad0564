// What is said beside the graph: what was measured at a threshold, and a node's card with its edges.
"use strict";
const relpCard = (() => {
  const g = relpGraph, { data, nodes, lines } = g, units = data.units;
  const make = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children.filter((c) => c !== null && c !== ""));
    return node;
  };
  const soft = (...children) => make("p", { class: "soft" }, ...children);
  const whole = (n) => n.toLocaleString("en-US");
  const number = (v, digits = 4) => {
    if (v === null || v === undefined) return "—";
    const size = Math.abs(v), plain = size === 0 || digits < 3 || (size >= 10 ** -digits && size < 1e5);
    const text = plain ? v.toFixed(digits) : v.toExponential(2);
    return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
  };
  const scored = (v, se, digits = 4) => number(v, digits) + (se === null || se === undefined ? "" : ` ± ${number(se, digits)}`);
  const short = (tau) => String(Number(tau.toPrecision(4)));
  const counted = (n, one) => `${whole(n)} ${n === 1 ? one : `${one}s`}`;

  // What was measured: rows of evaluation.csv as they are, never something between two of them.
  const interval = (row, name) => `${name} ${number(row[name], 2)} [${number(row[`${name}_lo`], 2)}, ${number(row[`${name}_hi`], 2)}]`;
  const said = (row) => `${interval(row, "faithfulness")}, ${interval(row, "completeness")}`;
  const sized = (row) => `${whole(row.n_nodes)} of ${whole(row.n_possible)}`;
  const result = (name, row) => [make("b", {}, name), ` (${sized(row)}): ${said(row)}.`];
  // same: all units with |score| > τ are drawn, and no others. entire: the whole circuit is.
  const measured = ({ tau, count, same, entire }) => {
    const own = data.curve.find((r) => r.own), sweep = data.curve.filter((r) => r.kept !== null);
    const row = entire && own ? own : same ? sweep.find((r) => r.kept === count) : null;
    const out = [make("h3", {}, "Measured on held-out pairs")], answer = { id: "cg-said" };
    if (sweep.length) out.push(chart(sweep, same ? count : null, row));
    if (row) out.push(make("p", answer, ...result(row === own ? "This circuit" : `τ = ${short(row.tau)}`, row)));
    else if (!data.curve.length) {
      const how = make("code", {}, "relp evaluate RUN --sweep …");
      out.push(make("p", { ...answer, class: "soft" }, "Nothing yet: ", how, " measures faithfulness and completeness."));
    } else if (!same || !sweep.length) {
      const why = own ? `Only the whole circuit was measured (${sized(own)}): ${said(own)}.` : "What evaluation.csv measured are other sets of units than these.";
      out.push(make("p", { ...answer, class: "soft" }, why));
    } else {
      const nearest = (side, closer) => sweep.filter(side).reduce((a, b) => (a && closer(a.kept, b.kept) ? a : b), null);
      const near = [nearest((r) => r.kept < count, (a, b) => a > b), nearest((r) => r.kept > count, (a, b) => a < b)].filter(Boolean);
      const head = `Not measured at τ = ${short(tau)}; the nearest evaluated ${near.length > 1 ? "circuits" : "circuit"}:`;
      out.push(make("div", answer, soft(head), ...near.map((r) => make("p", {}, ...result(`τ = ${short(r.tau)}`, r)))));
    }
    const about = row ?? sweep[0] ?? own, first = about?.exclude_layers;
    const spared = first > 1 ? `; the first ${first} layers run whole and do not count` : first ? "; the first layer runs whole and does not count" : "";
    const prompts = about?.n_prompts < about?.n_pairs ? ` of ${about.n_prompts} prompts` : "";
    if (about) out.push(soft(`${about.n_pairs ?? "?"} pairs${prompts}, ${about.ablation} ablation${spared}. [95 % bootstrap]`));
    return out;
  };
  const chart = (rows, count, current) => {
    const [w, h, left, low, top] = [290, 128, 26, 104, 1.25], most = Math.max(2, ...rows.map((r) => r.kept), count ?? 0);
    const px = (n) => left + ((w - left - 8) * Math.log(Math.max(n, 0.8) / 0.8)) / Math.log(most / 0.8);
    const py = (v) => low - (92 * Math.min(Math.max(v, -0.1), top)) / top;
    const label = "evaluated circuits: faithfulness (filled) and completeness (hollow) against size";
    const box = g.draw("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": label });
    const line = (x1, x2, y1, y2, more) => box.append(g.draw("line", { x1, x2, y1, y2, ...more }));
    const word = (x, y, anchor, text) => box.append(g.draw("text", { x, y, "text-anchor": anchor }, text));
    for (const v of [0, 0.5, 1]) {
      line(left, w - 4, py(v), py(v), { stroke: "var(--line)" });
      word(left - 5, py(v) + 3, "end", String(v));
    }
    for (let n = 1; n <= most; n *= 10) word(px(n), h - 8, "middle", n < 1000 ? String(n) : `${n / 1000}k`);
    const here = { stroke: "var(--accent)", "stroke-width": 1.5, "stroke-dasharray": current ? "none" : "3 3" };
    if (count !== null) line(px(count), px(count), 6, low + 6, here);
    for (const r of rows)
      for (const [name, fill] of [["completeness", "var(--panel)"], ["faithfulness", "var(--ink)"]]) {
        if (r[name] === null) continue;
        const x = px(r.kept), on = r === current;
        if (r[`${name}_lo`] !== null) line(x, x, py(r[`${name}_lo`]), py(r[`${name}_hi`]), { stroke: "var(--soft)" });
        const look = { fill, stroke: on ? "var(--accent)" : "var(--ink)", "stroke-width": on ? 2 : 1 };
        box.append(g.draw("circle", { cx: x, cy: py(r[name]), r: on ? 4.5 : 3, ...look }));
      }
    return box;
  };

  // A node's card; go(i) chooses another node.
  const MOST = 14;
  const part = (j) => lines.part?.[j] ?? "";
  const around = (i) => {
    const into = [], out = [];
    for (let j = 0; j < g.nLines; j += 1) {
      if (!g.drawn[j]) continue;
      if (lines.v[j] === i) into.push(j);
      if (lines.u[j] === i) out.push(j);
    }
    return { into, out };
  };
  const item = (text, score, se, share, go, more = []) => {
    const bar = make("i", { class: score < 0 ? "neg" : "", style: `width: ${(100 * share).toFixed(1)}%` });
    const rest = more.map((m) => make("span", { class: "more" }, m));
    const button = make("button", { type: "button" }, make("span", {}, text), make("span", {}, scored(score, se, 3)), bar, ...rest);
    button.addEventListener("click", go);
    return make("li", {}, button);
  };
  const list = (title, members, row) => {
    if (!members.length) return [];
    const more = members.length > MOST ? [soft(`and ${whole(members.length - MOST)} weaker`)] : [];
    return [make("h4", {}, title), make("ul", { class: "cg-list" }, ...members.slice(0, MOST).map(row)), ...more];
  };
  const edgeList = (title, members, end, go) => {
    const most = Math.max(...members.map((j) => Math.abs(lines.score[j])), 1e-30);
    const total = members.reduce((sum, j) => sum + lines.score[j], 0);
    return list(`${title}: ${counted(members.length, "edge")}, Σ ${number(total)}`, members, (j) => {
      const others = data.edges ? data.methods.map((m) => `${m.name}: ${scored(m.score[j], m.se?.[j], 3)}`) : [];
      const name = nodes.name[end[j]] + (part(j) ? ` into ${part(j)}` : "");
      return item(name, lines.score[j], lines.se?.[j], Math.abs(lines.score[j]) / most, () => go(end[j]), others);
    });
  };
  const facts = (i) => [
    [data.own, `${scored(units.score[i], units.se?.[i])} (n = ${units.n[i]})`],
    ...data.methods.map((m) => [m.name, scored(m.score[i], m.se?.[i])]),
    ["rank", i < data.complete ? `${whole(i + 1)} of ${whole(data.of)}` : `after ${whole(data.complete)}`],
    ...(data.circuit ? [["circuit", units.kept[i] ? "in it" : "not in it"]] : []),
  ];
  const card = (i, go) => {
    const column = data.positions ? data.columns[nodes.column[i]] : undefined, { into, out: onto } = around(i);
    const where = [data.kinds[nodes.kind[i]].title, data.rows[nodes.row[i]], column?.label].filter(Boolean);
    const out = [make("h3", {}, nodes.name[i]), soft([...new Set(where)].join(" · "))];
    if (g.isUnit(i)) out.push(make("dl", {}, ...facts(i).flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)])));
    if (data.meanings[i]) out.push(make("h4", {}, "Feature"), make("p", {}, data.meanings[i]));
    if (column?.tokens.length) {
      const pair = ([clean, other]) => (other === null || other === clean ? `‘${clean}’` : `‘${clean}’ → ‘${other}’`);
      out.push(make("h4", {}, "Tokens at this position"), make("p", { class: "mono" }, column.tokens.map(pair).join("   ")));
    }
    out.push(...edgeList("Upstream", into, lines?.u, go), ...edgeList("Downstream", onto, lines?.v, go));
    if (!into.length && !onto.length && g.nLines) out.push(soft("No kept edge begins or ends here."));
    return out;
  };
  const cell = (members, go) => {
    const share = (i) => Math.abs(units.score[i] / units.score[members[0]]);
    const row = (i) => item(nodes.name[i], units.score[i], units.se?.[i], share(i), () => go(i));
    return [make("h3", {}, `${whole(members.length)} more in this cell`), ...list("Strongest first", members, row)];
  };
  const empty = () => {
    const { circuit } = data, how = circuit?.selection ? `, selected by ${circuit.selection}` : "";
    const what = circuit ? `The circuit: ${whole(circuit.n)} of ${whole(circuit.of)} ${data.noun}${how}. ` : "";
    const signed = data.direction === "noising" ? "Negative (blue): patching takes behaviour away." : "Positive (red): patching restores behaviour.";
    return [make("h3", {}, "Pick a node"), soft(what, data.signed ? signed : "Scores have no sign.")];
  };
  const node = (i) => nodes.name[i] + (g.isUnit(i) ? `: ${scored(units.score[i], units.se?.[i])}` : "");
  const edge = (j) => `${nodes.name[lines.u[j]]} → ${nodes.name[lines.v[j]]}${part(j) ? ` (${part(j)})` : ""}: ${scored(lines.score[j], lines.se?.[j])}`;
  return { make, whole, short, number, counted, measured, around, card, cell, empty, node, edge };
})();
