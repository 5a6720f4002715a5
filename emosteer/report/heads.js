/* What the heads do: a graph that can be clicked, and a page for each head. All text reaches the page as text, never as markup. */
"use strict";
(() => {
  const source = document.getElementById("head-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const by = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const THIN = "\u202f";
  const LEFT = 44, TOP = 14, BOTTOM = 34, WIDTH = 960;

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const shape = (tag, attributes, text) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}${THIN}%`;
  const signed = (value, digits = 2) => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(digits)}`;
  const name = (node) => `L${node[0]}H${node[1]}`;

  let emotion = 0;
  let chosen = "";

  const start = Math.max(0, Math.min(...data.graphs.flatMap(({ nodes }) => nodes.map((node) => node[0]))) - 1);
  const xOf = (layer) => LEFT + 14 + ((layer - start) * (WIDTH - LEFT - 40)) / Math.max(1, data.layers - 1 - start);
  const step = Math.max(13, Math.min(34, 420 / data.heads));
  const yOf = (head) => TOP + 14 + head * step;

  const drawGraph = () => {
    const { nodes, edges } = data.graphs[emotion];
    const height = yOf(data.heads - 1) + BOTTOM;
    const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${height}`, class: "heads", role: "group", "aria-label": `Heads of ${data.emotions[emotion]} and ${edges.length} edges` });
    const every = Math.ceil((data.layers - start) / 16);
    for (let layer = start; layer < data.layers; layer += every) {
      svg.append(shape("line", { x1: xOf(layer), x2: xOf(layer), y1: TOP, y2: height - BOTTOM + 8, class: "grid" }));
      svg.append(shape("text", { x: xOf(layer), y: height - 14, "text-anchor": "middle" }, String(layer)));
    }
    svg.append(shape("text", { x: WIDTH / 2, y: height - 1, "text-anchor": "middle" }, "layer"));
    for (let head = 0; head < data.heads; head += Math.ceil(data.heads / 16)) svg.append(shape("text", { x: LEFT - 14, y: yOf(head) + 4, "text-anchor": "end" }, `H${head}`));
    const most = Math.max(1e-9, ...edges.map((edge) => Math.abs(edge[2])));
    const longest = Math.max(1e-9, ...nodes.map((node) => node[3]));
    for (const [a, b, weight] of edges) {
      const [from, to] = [nodes[a], nodes[b]];
      const [x1, y1, x2, y2] = [xOf(from[0]), yOf(from[1]), xOf(to[0]), yOf(to[1])];
      const bend = Math.max(12, (x2 - x1) / 2);
      const curve = `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`;
      const line = shape("path", { d: curve, class: weight < 0 ? "edge less" : "edge more", "stroke-width": (0.6 + (4.4 * Math.abs(weight)) / most).toFixed(2) });
      line.dataset.from = name(from);
      line.dataset.to = name(to);
      line.append(shape("title", {}, `${name(from)} to ${name(to)}: ${signed(weight, 3)}`));
      svg.append(line);
    }
    for (const node of nodes) {
      const page = node[2] < 0 ? null : data.pages[node[2]];
      const radius = page ? Math.max(7, Math.min(step / 2, 6 + (5 * node[3]) / longest)) : 4 + (2 * node[3]) / longest;
      const told = `${name(node)}${page ? `, number ${page.rank}` : ""}: contribution ${signed(node[4], 3)}`;
      const group = shape("g", { class: page ? "node described" : "node", tabindex: 0, role: "button", "aria-label": told });
      group.dataset.head = name(node);
      group.append(shape("circle", { cx: xOf(node[0]), cy: yOf(node[1]), r: radius.toFixed(1) }), shape("title", {}, told));
      if (page) group.append(shape("text", { x: xOf(node[0]), y: yOf(node[1]) + 3.5, "text-anchor": "middle" }, String(page.rank)));
      group.addEventListener("click", () => choose(name(node)));
      group.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        choose(name(node));
      });
      svg.append(group);
    }
    by("head-drawing").replaceChildren(svg);
  };

  const mark = () => {
    for (const node of document.querySelectorAll("#head-drawing .node")) {
      const mine = node.dataset.head === chosen;
      node.classList.toggle("chosen", mine);
      node.setAttribute("aria-pressed", String(mine));
    }
    for (const line of document.querySelectorAll("#head-drawing .edge")) {
      line.classList.toggle("mine", line.dataset.from === chosen || line.dataset.to === chosen);
    }
    for (const button of by("head-emotions").children) button.setAttribute("aria-pressed", String(Number(button.value) === emotion));
  };

  const jump = (other, text) => {
    const button = element("button", "jump", text);
    button.type = "button";
    button.addEventListener("click", () => {
      choose(other);
      by("head-page").querySelector("h3").focus(); // the button itself is gone with the page that it stood on
    });
    return button;
  };

  const bar = (share, even) => {
    const made = element("span", "bar");
    made.style.setProperty("--share", String(Math.min(1, Math.max(0, share))));
    made.style.setProperty("--even", String(Math.min(1, Math.max(0, even))));
    return made;
  };

  const looking = (page) => {
    const part = element("section", "part");
    part.append(element("h4", "", "Where it looks"));
    const table = element("table");
    const head = element("tr");
    ["", "in a reply", "at its start"].forEach((text) => {
      const cell = element("th", "", text);
      cell.scope = "col";
      head.append(cell);
    });
    table.append(element("thead"), element("tbody"));
    table.firstChild.append(head);
    data.classes.forEach((label, index) => {
      const row = element("tr");
      const title = element("th", "", label);
      title.scope = "row";
      row.append(title);
      page.attention.forEach((shares, where) => {
        const cell = element("td", "num");
        cell.append(bar(shares[index], data.even[where][index]), element("span", "value", percent(shares[index])));
        row.append(cell);
      });
      table.lastChild.append(row);
    });
    const scroll = element("div", "scroll");
    scroll.tabIndex = 0;
    scroll.append(table);
    part.append(scroll, element("p", "small", "The tick is where a head would be that looks at all tokens alike."));
    part.append(element("p", "small", "Tokens that it looks at most, whenever they can be seen (mean attention):"), chips(page.looks.map(([text, share]) => [text, percent(share), false])));
    return part;
  };

  const chips = (rows) => {
    const list = element("ul", "chips");
    for (const [text, value, named] of rows) {
      const entry = element("li", named ? "named" : "");
      const word = element("span", "token", text);
      word.dir = "auto";
      entry.append(word, element("span", "value", named ? `${value}, its name` : value));
      list.append(entry);
    }
    return list;
  };

  const writing = (page) => {
    const part = element("section", "part");
    part.append(element("h4", "", "What it writes, read off the logits"));
    for (const [key, title] of [["added", "What the circuit adds here"], ["own", "What the head itself writes more for this emotion"]]) {
      const lift = page.words[key][page.emotion];
      part.append(element("h5", "", title));
      part.append(element("p", "small", `Raises words for ${data.emotions[page.emotion]} by ${signed(lift)} standard deviations; of random outputs of this head 95${THIN}% stay below ${signed(page.words.random_high)}.`));
      for (const end of ["promoted", "suppressed"]) {
        part.append(element("p", "small", end === "promoted" ? "Promotes:" : "Suppresses:"));
        part.append(chips(page[key][end].map(([text, value, named]) => [text, signed(value, 1), named])));
      }
    }
    return part;
  };

  const EDGES = [-0.65, -0.35, -0.15, -0.05, 0.05, 0.15, 0.35, 0.65];
  const shaded = ([number, score, course], page) => {
    const [label, prompt, tokens] = data.texts[number];
    const entry = element("li");
    const about = element("p", "small");
    about.append(element("strong", label === data.emotions[page.emotion] ? "own" : "", label), ` ${signed(score, 3)} \u00b7 `, element("span", "", prompt));
    about.dir = "auto";
    const text = element("p", "shaded");
    text.dir = "auto";
    const paint = (value) => `s${EDGES.filter((edge) => value >= edge).length}`;
    const first = element("span", `at ${paint(course[0])}`, "\u25b8");
    first.title = `before the first token: ${signed(course[0] * page.fires.peak, 3)}`;
    text.append(first);
    tokens.forEach((token, index) => {
      const value = course[index + 1];
      const made = element("span", value === undefined ? "" : paint(value), token);
      if (value !== undefined) made.title = signed(value * page.fires.peak, 3);
      text.append(made);
    });
    entry.append(about, text);
    return entry;
  };

  const firing = (page) => {
    const part = element("section", "part wide");
    part.append(element("h4", "", "What it fires on"));
    part.append(element("p", "small", "A token is shaded by what the head writes along the direction at the position that has just read it: blue towards the emotion, brown away from it."));
    const both = element("div", "ends");
    for (const [end, title] of [["most", "Most"], ["least", "Least"]]) {
      const column = element("div");
      const list = element("ol");
      page.fires[end].forEach((row) => list.append(shaded(row, page)));
      column.append(element("h5", "", title), list);
      both.append(column);
    }
    part.append(both);
    return part;
  };

  const neighbours = (node, page) => {
    const part = element("section", "part");
    const { nodes, edges } = data.graphs[emotion];
    const index = nodes.indexOf(node);
    const here = new Set(nodes.map(name));
    const listed = (title, rows, none) => {
      part.append(element("h5", "", title));
      if (!rows.length) return part.append(element("p", "small", none));
      const list = element("ul", "chips");
      for (const [other, weight] of rows) {
        const entry = element("li");
        entry.append(here.has(other) ? jump(other, other) : element("span", "token", other), element("span", "value", signed(weight, 3)));
        list.append(entry);
      }
      part.append(list);
    };
    part.append(element("h4", "", "Whom it reads, and who reads it"));
    if (page && page.sources) {
      const { circuit, heads, mlps, embeddings } = page.sources;
      const told = [["heads of the circuit", circuit], ["other heads", heads], ["MLPs", mlps], ["embeddings", embeddings]];
      part.append(element("p", "small", `Of its ${signed(page.contribution, 3)}, directly through its values: ${told.map(([who, value]) => `${who} ${signed(value, 3)}`).join(", ")}.`));
      listed("Reads most from", page.reads.map(([layer, head, weight]) => [`L${layer}H${head}`, weight]), "Nothing.");
    } else listed("Reads from", edges.filter((edge) => edge[1] === index).map((edge) => [name(nodes[edge[0]]), edge[2]]), "No edge of the graph leads here.");
    listed("Is read by", edges.filter((edge) => edge[0] === index).map((edge) => [name(nodes[edge[1]]), edge[2]]), "No edge of the graph leads on from here.");
    return part;
  };

  const drawPage = () => {
    const node = data.graphs[emotion].nodes.find((one) => name(one) === chosen);
    if (!node) return by("head-page").replaceChildren();
    const page = node[2] < 0 ? null : data.pages[node[2]];
    const heading = element("h3", "", name(node));
    heading.tabIndex = -1;
    const rank = page ? `number ${page.rank} by what the circuit adds` : "no page of its own";
    heading.append(element("span", "about", `${data.emotions[emotion]} \u00b7 ${rank}`));
    const facts = element("ul", "marks");
    [
      `added length ${node[3].toFixed(2)}`,
      `contribution ${signed(node[4], 3)}`,
      `tells ${percent(node[5])} of other replies apart`,
      ...(page ? [`what is added against what it writes: cosine ${signed(page.cosine)}`, `against the direction: ${signed(page.along)}`] : []),
    ].forEach((text) => facts.append(element("li", "", text)));
    const parts = element("div", "parts");
    const left = element("div", "part");
    if (page) left.append(looking(page));
    left.append(neighbours(node, page));
    parts.append(left);
    if (page) parts.append(writing(page), firing(page));
    by("head-page").replaceChildren(heading, facts, parts);
  };

  const choose = (head, of = emotion) => {
    const other = of !== emotion || !by("head-drawing").firstChild;
    emotion = of;
    chosen = head;
    if (other) drawGraph();
    drawPage();
    mark();
  };
  const first = (of) => {
    const node = data.graphs[of].nodes.find((one) => one[2] >= 0 && data.pages[one[2]].rank === 1);
    return node ? name(node) : "";
  };
  data.emotions.forEach((label, index) => {
    const button = element("button", "", label);
    button.type = "button";
    button.value = String(index);
    button.addEventListener("click", () => {
      const same = data.graphs[index].nodes.some((one) => name(one) === chosen && one[2] >= 0);
      choose(same ? chosen : first(index), index);
    });
    by("head-emotions").append(button);
  });
  by("head-graph").hidden = false;
  choose(first(0), 0);
})();
