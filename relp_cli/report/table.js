// Tables: sorted by a click on a heading, searched, a page at a time, downloaded as CSV.
// spec: columns, types ("text", "int", "float"), rows, of (how many there are beyond these), file, by (the first order's column),
// sizes (columns that are ordered by |value|), digits, same ([column, value] of all rows). options.text(value, column): what else than the value is shown.
relp.table = (root, spec, options = {}) => {
  const { make, number } = relp;
  const page = options.page ?? 25, sizes = new Set(spec.sizes ?? []), same = spec.same ?? [];
  const state = { by: spec.by ?? -1, down: true, page: 0, words: [], keep: null };
  const cell = (value, at) => {
    if (value === null || value === undefined || value === "*") return "—";
    if (at < 0) return typeof value === "number" && !Number.isInteger(value) ? number(value, 3) : String(value);
    return options.text?.(value, at) ?? (spec.types[at] === "float" ? number(value, spec.digits ?? 3) : String(value));
  };
  const words = spec.rows.map((row) =>
    row.map((value, at) => (spec.types[at] === "float" || value === null ? "" : cell(value, at))).join(" ").toLowerCase());
  const chosen = () => {
    const kept = spec.rows.map((_, i) => i).filter((i) =>
      (!state.keep || state.keep(spec.rows[i])) && state.words.every((word) => words[i].includes(word)));
    if (state.by < 0) return kept;
    const key = (i) => {
      const value = spec.rows[i][state.by];
      return value !== null && sizes.has(state.by) ? Math.abs(value) : value;
    };
    return kept.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === y) return a - b;
      if (x === null || y === null) return x === null ? 1 : -1;
      return (x < y ? -1 : 1) * (state.down ? -1 : 1);
    });
  };

  const tools = make("div", { class: "tools" });
  const search = make("input", { type: "search", placeholder: "search", "aria-label": `search ${spec.title ?? "the table"}` });
  const csv = make("button", { type: "button", title: "download the rows that are chosen, all columns" }, "CSV");
  const earlier = make("button", { type: "button", "aria-label": "earlier rows" }, "←");
  const later = make("button", { type: "button", "aria-label": "later rows" }, "→");
  const count = make("span", { class: "soft count", "aria-live": "polite" });
  const short = spec.rows.length <= page;
  tools.append(...(spec.rows.length > 8 ? [search] : []), csv, ...(short ? [] : [earlier, later]), count);

  const head = make("tr"), body = make("tbody");
  spec.columns.forEach((column, at) => {
    const th = make("th", { class: spec.types[at] === "text" ? "" : "num", scope: "col" });
    const button = make("button", { type: "button", ...(sizes.has(at) ? { title: "ordered by size, whatever the sign" } : {}) }, column);
    button.addEventListener("click", () => {
      state.down = state.by === at ? !state.down : spec.types[at] === "float";
      state.by = at;
      state.page = 0;
      draw();
    });
    th.append(button);
    head.append(th);
  });
  const draw = () => {
    const rows = chosen(), pages = Math.max(1, Math.ceil(rows.length / page));
    state.page = Math.min(state.page, pages - 1);
    [...head.children].forEach((th, at) =>
      th.setAttribute("aria-sort", at !== state.by ? "none" : state.down ? "descending" : "ascending"));
    body.replaceChildren(...rows.slice(state.page * page, (state.page + 1) * page).map((i) => {
      const line = make("tr");
      spec.rows[i].forEach((value, at) => {
        const kind = spec.types[at] !== "text" ? "num" : typeof value === "string" && value.length > 60 ? "text" : "";
        line.append(make("td", { class: kind }, cell(value, at)));
      });
      return line;
    }));
    const all = (spec.of ?? 0) > spec.rows.length ? ` of the ${spec.rows.length} strongest of ${spec.of}` : ` of ${spec.rows.length}`;
    const many = rows.length === spec.rows.length && short && !((spec.of ?? 0) > spec.rows.length);
    count.textContent = many ? `${rows.length} row${rows.length === 1 ? "" : "s"}` : `${rows.length}${all}` + (pages > 1 ? `; page ${state.page + 1} of ${pages}` : "");
    earlier.disabled = state.page === 0;
    later.disabled = state.page === pages - 1;
  };
  search.addEventListener("input", () => {
    state.words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    state.page = 0;
    draw();
  });
  earlier.addEventListener("click", () => { state.page -= 1; draw(); });
  later.addEventListener("click", () => { state.page += 1; draw(); });
  csv.addEventListener("click", () => relp.download(spec.file, [
    [...same.map(([name]) => name), ...spec.columns], ...chosen().map((i) => [...same.map(([, value]) => value), ...spec.rows[i]])]));

  const table = make("table", { class: "full" }), thead = make("thead"), scroll = make("div", { class: "scroll", tabindex: 0 });
  thead.append(head);
  table.append(thead, body);
  scroll.append(table);
  const said = same.filter(([, value]) => value !== null && value !== "").map(([name, value]) => `${name.replaceAll("_", " ")} ${cell(value, -1)}`);
  root.replaceChildren(tools, ...(said.length ? [make("p", { class: "soft same" }, said.join(" · "))] : []), scroll);
  draw();
  return { keep: (test) => { state.keep = test; state.page = 0; draw(); } };
};
for (const root of document.querySelectorAll("[data-table]")) relp.table(root, relp.data.tables[root.dataset.table]);
