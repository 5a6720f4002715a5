/* Replies side by side: filters, pages. All text reaches the page as text, never as markup. */
"use strict";
(() => {
  const source = document.getElementById("reply-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const PER_PAGE = 4;
  const by = (id) => document.getElementById(id);
  const fields = ["emotion", "kind", "valence", "theme", "method", "sound", "good", "text", "only"].map((name) => by("f-" + name));
  const [emotionField, kindField, valenceField, themeField, methodField, soundField, goodField, textField, onlyField] = fields;
  const THIN = "\u202f";

  // one case: a prompt and an emotion, with a reply of every method; replies without an emotion (unsteered) belong to every case
  const cases = [];
  const reply = (emotion, [of, method, text, judged, shares, sound, reasons, strength, tokens, votes, answers, named]) => {
    const target = (of === emotion ? shares[0] : shares[emotion]) ?? null;
    const carries = judged < 0 ? null : data.judged[judged] === data.emotions[emotion];
    const answered = answers === null ? null : answers >= data.answered;
    const names = named.includes(emotion);
    const good = carries === null ? null : carries && sound === 1 && answered === true && !names;
    return { method, text, judged, target, carries, good, sound, reasons, strength, tokens, votes, answers, answered, names };
  };
  data.prompts.forEach(([prompt, valence, theme, scenario, kind], index) => {
    for (let emotion = 0; emotion < data.asked; emotion++) {
      const rows = data.replies[index].filter((row) => row[0] === emotion || row[0] >= data.asked).map((row) => reply(emotion, row));
      rows.sort((a, b) => a.method - b.method);
      for (const row of rows) row.low = (row.text + "\n" + prompt).toLowerCase();
      cases.push({ prompt, valence, theme, scenario, kind, emotion, rows });
    }
  });
  // neighbours on the page differ in emotion and in prompt: the emotions take turns, each starting elsewhere in the list
  const mixed = [];
  const count = data.prompts.length;
  for (let i = 0; i < count; i++) {
    for (let emotion = 0; emotion < data.asked; emotion++) {
      mixed.push(cases[((i + Math.floor((emotion * count) / data.asked)) % count) * data.asked + emotion]);
    }
  }

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const option = (select, value, text) => {
    const made = element("option", "", text);
    made.value = value;
    select.append(made);
  };
  const seen = (values) => [...new Set(values)].filter(Boolean).sort();
  data.emotions.slice(0, data.asked).forEach((name, index) => option(emotionField, String(index), name));
  seen(mixed.map((item) => item.kind)).forEach((name) => option(kindField, name, name));
  seen(mixed.map((item) => item.valence)).forEach((name) => option(valenceField, name, name));
  seen(mixed.map((item) => item.theme)).forEach((name) => option(themeField, name, name));
  data.methods.forEach(([, label], index) => option(methodField, String(index), label));

  let page = 0;
  let found = [];

  const fits = (row) => {
    if (methodField.value && row.method !== Number(methodField.value)) return false;
    if (soundField.value && row.sound !== Number(soundField.value)) return false;
    if (goodField.value === "none" && row.judged >= 0) return false;
    if ((goodField.value === "1" || goodField.value === "0") && row.good !== (goodField.value === "1")) return false;
    const words = textField.value.trim().toLowerCase();
    return !words || row.low.includes(words);
  };
  const perReply = () => Boolean(methodField.value || soundField.value || goodField.value || textField.value.trim());

  const search = () => {
    found = [];
    for (const item of mixed) {
      if (emotionField.value && item.emotion !== Number(emotionField.value)) continue;
      if (kindField.value && item.kind !== kindField.value) continue;
      if (valenceField.value && item.valence !== valenceField.value) continue;
      if (themeField.value && item.theme !== themeField.value) continue;
      const fitting = new Set(item.rows.filter(fits));
      if (!fitting.size) continue;
      found.push({ item, fitting });
    }
    page = 0;
    by("found").textContent = found.length
      ? `${found.length.toLocaleString("en")} of ${mixed.length.toLocaleString("en")} requests (a prompt and an emotion) have a reply that fits.`
      : "No reply fits. Clear a filter to see more.";
    draw();
  };

  const verdictOf = (row, emotion) => {
    const list = element("ul", "marks");
    const add = (className, text) => list.append(element("li", className, text));
    if (row.judged >= 0) {
      const share = row.target === null ? "" : `, ${emotion} ${row.target.toFixed(2)}`;
      add(row.good ? "yes" : "no", row.good ? "\u2713 good" : "\u2717 not good");
      add(row.carries ? "plain" : "no", `panel: ${data.judged[row.judged]}${share}`);
    } else add("none", "not judged");
    row.votes.forEach((vote, index) => {
      const said = vote ? `${data.judged[vote[0]]} ${vote[1].toFixed(2)}` : "no opinion";
      add("vote", `${data.judges[index]}: ${said}`);
    });
    if (row.answered !== null) add(row.answered ? "plain" : "no", `${row.answered ? "answers" : "does not answer"}, ${row.answers.toFixed(2)}`);
    if (row.names) add("no", `names ${emotion}`);
    if (row.sound !== null) add(row.sound ? "plain" : "no", (row.sound ? "sound" : "unsound") + (row.reasons ? `: ${row.reasons}` : ""));
    if (row.strength !== null) add("plain", `strength ${row.strength}`);
    if (row.tokens !== null) add("plain", `${row.tokens}${THIN}tokens`);
    return list;
  };

  const drawCase = ({ item, fitting }) => {
    const article = element("article", "case");
    const emotion = data.emotions[item.emotion];
    const heading = element("h3", "", `${emotion} asked for`);
    heading.append(element("span", "about", [item.kind, item.valence && `${item.valence} event`, item.theme, item.scenario].filter(Boolean).join(" \u00b7 ")));
    const prompt = element("blockquote", "prompt", item.prompt);
    prompt.dir = "auto";
    const list = element("ul", "answers");
    for (const row of item.rows) {
      const fit = fitting.has(row);
      if (!fit && onlyField.checked) continue;
      const entry = element("li", "reply" + (perReply() ? (fit ? " fits" : " other") : ""));
      entry.append(element("h4", "", data.methods[row.method][1]));
      const text = element("p", "text", row.text || "(empty)");
      text.dir = "auto";
      entry.append(text, verdictOf(row, emotion));
      list.append(entry);
    }
    article.append(heading, prompt, list);
    return article;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    by("cases").replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(drawCase));
    by("where").textContent = `Page ${(page + 1).toLocaleString("en")} of ${pages.toLocaleString("en")}`;
    by("first").disabled = by("previous").disabled = page === 0;
    by("next").disabled = by("last").disabled = page === pages - 1;
    by("pager").hidden = pages === 1;
  };

  const go = (to) => () => {
    page = to();
    draw();
    by("found").scrollIntoView({ block: "nearest" });
  };
  by("first").addEventListener("click", go(() => 0));
  by("previous").addEventListener("click", go(() => page - 1));
  by("next").addEventListener("click", go(() => page + 1));
  by("last").addEventListener("click", go(() => Infinity));
  let waiting = 0;
  textField.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 150);
  });
  fields.filter((field) => field !== textField).forEach((field) => field.addEventListener("change", search));
  by("filters").addEventListener("submit", (event) => event.preventDefault());
  by("filters").addEventListener("reset", () => setTimeout(search, 0));
  by("filters").hidden = false;
  search();
})();
