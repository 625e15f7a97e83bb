"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (name) => document.getElementById(name);
  const root = document.documentElement;

  // -- theme: the system's, or the one that was picked -----------------------------------------------------------------

  const themes = ["auto", "light", "dark"];
  let theme = "auto";
  try { theme = localStorage.getItem("spin-theme") || "auto"; } catch { /* a file may have no storage */ }

  function applyTheme() {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    byId("theme").textContent = `theme: ${theme}`;
  }

  const value = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  function mix(one, other, share) {
    const parts = [one, other].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    return `rgb(${parts[0].map((part, at) => Math.round(part + (parts[1][at] - part) * share)).join(",")})`;
  }

  // "@human" is the theme's colour of that name, "@run7" one of six, "@shade1of4" a step between two
  function colour(role) {
    const shade = /^shade(\d+)of(\d+)$/.exec(role);
    if (shade) return mix(value("shade0"), value("shade1"), shade[2] > 1 ? shade[1] / (shade[2] - 1) : 1);
    const run = /^run(\d+)$/.exec(role);
    return value(run ? `run${run[1] % 6}` : role);
  }

  function coloured(item) {
    if (typeof item === "string") return item.startsWith("@") ? colour(item.slice(1)) : item;
    if (Array.isArray(item)) return item.map(coloured);
    if (item && typeof item === "object") {
      return Object.fromEntries(Object.entries(item).map(([key, part]) => [key, key === "x" || key === "y" ? part : coloured(part)]));
    }
    return item;
  }

  // -- charts ----------------------------------------------------------------------------------------------------------

  function layoutOf(chart, size) {
    const { xaxis_range: range, ...own } = coloured(chart.layout);
    const axis = {
      gridcolor: value("border"), linecolor: value("border"), zerolinecolor: value("border"), automargin: true, zeroline: false,
    };
    return {
      ...own, ...size, showlegend: false,
      margin: { l: 8, r: 12, t: 22, b: 8 }, hovermode: "x unified",
      hoverlabel: { bgcolor: value("card"), bordercolor: value("border"), font: { color: value("text") } },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: value("text"), size: 12, family: getComputedStyle(document.body).fontFamily },
      xaxis: { ...axis, ...(range ? { range } : {}), ...own.xaxis }, yaxis: { ...axis, ...own.yaxis },
      bargap: 0.3,
    };
  }

  // a legend in HTML, since it wraps; a click hides a line and shows it again
  function legend(chart, place) {
    let box = place.previousElementSibling;
    if (!box.classList.contains("legend")) box = place.parentElement.insertBefore(make("div", "legend"), place);
    if (!chart.layout.showlegend) return;
    box.replaceChildren(...chart.data.map((trace) => {
      const button = make("button", trace.type === "bar" ? "bar" : (trace.line || {}).dash || "solid", plain(trace.name));
      button.type = "button";
      button.style.setProperty("--line", coloured((trace.line || trace.marker).color));
      button.setAttribute("aria-pressed", trace.visible !== false);
      button.addEventListener("click", () => {
        trace.visible = trace.visible === false;
        draw();
      });
      return button;
    }));
  }

  // names of runs are escaped for Plotly, which takes some HTML
  const plain = (text) => new DOMParser().parseFromString(text, "text/html").body.textContent;

  function make(tag, kind, text) {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  async function draw(size) {
    for (const chart of data.charts) {
      const place = byId(chart.name);
      const settings = { responsive: true, displayModeBar: false };
      legend(chart, place);
      await window.Plotly.react(place, coloured(chart.data), layoutOf(chart, size || { autosize: true }), settings);
      place.dataset.drawn = "true";
    }
    root.dataset.charts = "drawn";
  }

  async function start() {
    try {
      const bytes = Uint8Array.from(atob(byId("plotly").textContent.trim()), (letter) => letter.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const script = document.createElement("script");
      script.textContent = await new Response(stream).text();
      document.head.append(script);
      await draw();
    } catch (error) {
      for (const chart of data.charts) byId(chart.name).textContent = `This chart could not be drawn: ${error}`;
      root.dataset.charts = "failed";
      throw error;
    }
  }

  const redraw = () => { if (window.Plotly) draw(); };
  byId("theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("spin-theme", theme); } catch { /* as above */ }
    applyTheme();
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  // paper is white, and two charts stand side by side on it
  let before = null;
  addEventListener("beforeprint", () => {
    before = theme;
    root.dataset.theme = "light";
    for (const details of document.querySelectorAll("details")) details.open = true;
    if (window.Plotly) draw({ autosize: false, width: 325, height: 230 });
  });
  addEventListener("afterprint", () => {
    if (before !== null) theme = before;
    applyTheme();
    redraw();
  });

  // -- pairs -----------------------------------------------------------------------------------------------------------

  const PAGE = 20;
  const pairs = data.pairs;
  const several = new Set(pairs.columns.map((column) => column.run)).size > 1;
  const label = (column) => (several ? `${column.run}, ` : "") + `iteration ${column.iteration}`;
  const state = { sort: "n", down: false, column: Math.max(0, pairs.columns.length - 1), search: "", cut: false, count: PAGE };

  // the text with every hit of the search marked; what is written here is text, never HTML
  function marked(kind, text, characters, atEnd) {
    const element = make("p", `text ${kind}`);
    if (characters && atEnd) element.append(`(${characters.toLocaleString("en")} characters; the last:) …`);
    const wanted = state.search;
    const lower = text.toLowerCase();
    let at = 0;
    if (wanted && lower.length === text.length) {
      for (let hit = lower.indexOf(wanted); hit >= 0; hit = lower.indexOf(wanted, at)) {
        element.append(text.slice(at, hit), make("mark", "", text.slice(hit, hit + wanted.length)));
        at = hit + wanted.length;
      }
    }
    element.append(text.slice(at));
    if (characters && !atEnd) element.append(`… (${characters.toLocaleString("en")} characters)`);
    return element;
  }

  function answerBox(kind, title, answer) {
    const box = make("div", `answer ${kind}`);
    box.append(make("h4", "", title));
    if (answer.text === "") box.append(make("p", "text muted", "(nothing)"));
    else box.append(marked("", answer.text, answer.text_characters, false));
    return box;
  }

  const signed = (number) => (number === null ? "?" : `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(3)}`);

  // the first of a prompt's pictures, as far as the page has them, and how many are left out
  function pictureRow(prompt) {
    const row = make("div", "pictures");
    const shown = prompt.images.filter((name, place) => {
      if (!pairs.pictures[name]) return false;
      const image = make("img", "");
      Object.assign(image, { loading: "lazy", decoding: "async", src: pairs.pictures[name] });
      image.alt = `picture ${place + 1} of ${prompt.images.length} of prompt ${prompt.n}`;
      row.append(image);
      return true;
    }).length;
    const left = prompt.images.length - shown;
    if (left) row.append(make("span", "muted", `${left} ${shown ? "more " : ""}picture${left > 1 ? "s" : ""}, not in this page`));
    return row;
  }

  function card(prompt) {
    const element = make("article", "pair card");
    element.dataset.n = prompt.n;
    const head = make("header");
    head.append(make("span", "", `prompt ${prompt.n}`), make("span", "", `source row ${prompt.row}`));
    element.append(head);
    if (prompt.images) element.append(pictureRow(prompt));
    element.append(marked("prompt", prompt.prompt, prompt.prompt_characters, true));
    const texts = make("div", "texts");
    texts.append(answerBox("human", `human · ${prompt.tokens} tokens`,
      { text: prompt.human, text_characters: prompt.human_characters }));
    prompt.answers.forEach((answer, index) => {
      if (!answer) return;
      const cut = answer.cut ? " · cut" : "";
      texts.append(answerBox("", `${label(pairs.columns[index])} · ${answer.tokens} tokens${cut} · ${signed(answer.margin)}`, answer));
      texts.lastChild.title = `margin ${signed(answer.margin)} nats per token; log-probs under this opponent: human ${answer.human_logp}, own ${answer.logp} nats`;
    });
    element.append(texts);
    return element;
  }

  function key(prompt) {
    const answer = prompt.answers[state.column];
    if (state.sort === "n") return prompt.n;
    if (state.sort === "human") return prompt.tokens;
    return answer ? answer[state.sort] : null;
  }

  function chosen() {
    const has = (text) => text.toLowerCase().includes(state.search);
    const found = pairs.prompts.filter((prompt) => {
      const answer = prompt.answers[state.column];
      if (state.cut && !(answer && answer.cut)) return false;
      return !state.search || has(prompt.prompt) || has(prompt.human) || prompt.answers.some((one) => one && has(one.text));
    });
    const sign = state.down ? -1 : 1;
    return found.sort((one, other) => {
      const [a, b] = [key(one), key(other)];
      if (a === null || b === null) return (a === null) - (b === null) || one.n - other.n;
      return sign * (a - b) || one.n - other.n;
    });
  }

  function list() {
    const found = chosen();
    byId("list").replaceChildren(...found.slice(0, state.count).map(card));
    const shown = Math.min(state.count, found.length);
    byId("shown").textContent = `Showing ${shown} of ${found.length} prompts` +
      (found.length < pairs.prompts.length ? ` that match, of ${pairs.prompts.length} in this page.` : ".");
    byId("more").hidden = shown === found.length;
    for (const button of byId("sort").children) {
      const on = button.dataset.sort === state.sort;
      button.setAttribute("aria-pressed", on);
      button.textContent = button.textContent.replace(/ [↑↓]$/, "") + (on ? (state.down ? " ↓" : " ↑") : "");
    }
  }

  function browse() {
    pairs.columns.forEach((column, index) => byId("column").append(new Option(label(column), index)));
    byId("column").value = state.column;
    const change = (part) => { Object.assign(state, { count: PAGE }, part); list(); };
    byId("column").addEventListener("change", (event) => change({ column: Number(event.target.value) }));
    byId("cut").addEventListener("change", (event) => change({ cut: event.target.checked }));
    byId("search").addEventListener("input", (event) => change({ search: event.target.value.trim().toLowerCase() }));
    byId("sort").addEventListener("click", (event) => {
      const sort = event.target.dataset.sort;
      if (sort) change({ sort, down: sort === state.sort ? !state.down : sort !== "n" });
    });
    byId("more").addEventListener("click", () => { state.count += 5 * PAGE; list(); });
    list();
  }

  applyTheme();
  if (pairs.prompts.length) browse();
  start();
})();
