"use strict";
// One query is at work at a time: a newer one puts an end to the older one's request.

const $ = (id) => document.getElementById(id);
const TITLES = {
  exact: "exact", weighted: "exact, bits weighted", prefix: "prefix first",
  "two-stage": "two stages", ivf: "clusters (IVF)", hnsw: "graph (HNSW)",
};
let info = null;
let file = null;     // an uploaded picture
let origin = null;   // {like: id} or {code, own}: a query that is no text
let running = null;  // AbortController of the request at work

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function fill(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => {
    const option = element("option", "", text);
    option.value = value;
    return option;
  }));
}

const plural = (count, noun) =>
  `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const quoted = (name) => `'${name.replaceAll("'", "''")}'`;

function said(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

// -- what is shown, and what can be asked ---------------------------------------------------------

async function begin() {
  const answer = await fetch("api/info");
  info = await answer.json();
  if (!answer.ok) throw new Error(info.error);
  document.title = `${info.data} - vhabl search`;
  $("title").textContent = info.data;
  $("about").textContent = `${plural(info.items, "item")}, codes of ` +
    `${info.method} (${info.views.join(" and ")}, ${info.lengths.at(-1)} bits)`;
  $("footer").textContent = `Run: ${info.run}. True labels were used to train this model; a code ` +
    "is made from a picture and a text alone. Labels here only filter and mark what was found.";
  fill($("bits"), info.lengths.toReversed().map((n) => [n, n]));
  fill($("mode"), info.modes.map((name) => [name, TITLES[name]]));
  fill($("against"), [["", "the other modality"], ...info.views.map((v) => [v, `${v}s`])]);
  $("against-label").hidden = info.views.length < 2;
  const names = info.class_names.map((name) => [name, name]);
  fill($("only"), [["", "all items"], ...names]);
  fill($("expect"), [["", "nothing"], ...names]);
  document.querySelectorAll(".labelled").forEach((e) => { e.hidden = !names.length; });
  if (!info.raw) {
    $("text").disabled = $("image").disabled = $("go").disabled = true;
    $("text").placeholder = "Codes of feature files: choose one of the items to begin with";
    $("choose").hidden = true;
  } else if (!info.alone) {
    $("text").placeholder = "A text with a picture: the model was trained for pairs alone";
  }
  explain();
}

function explain() {
  const mode = $("mode").value;
  const view = $("against").value || info.views.at(-1);
  const found = (info.recall[view] || {})[mode];
  const share = found && (100 * found.recall).toFixed(1);
  $("mode-note").textContent = !found ? "" :
    `This mode ${mode === "two-stage"
      ? "finds " + share + " % of what real features rank"
      : "finds " + share + " % of the exact search's"} first ${found.at} ` +
    `(${found.queries} queries when the index was built, among ${view}).`;
}

// -- the query, the link, and back ----------------------------------------------------------------

function options() {
  const chosen = new URLSearchParams();
  const set = (name, value, usual) => { if (value && value !== usual) chosen.set(name, value); };
  set("bits", $("bits").value, String(info.lengths.at(-1)));
  set("mode", $("mode").value, "exact");
  set("against", $("against").value, "");
  set("top", $("top").value, "20");
  set("where", $("where").value.trim(), "");
  set("expect", $("expect").value, "");
  return chosen;
}

function restore() {
  const asked = new URLSearchParams(location.search);
  const set = (name, usual) => { $(name).value = asked.get(name) || usual; };
  set("text", "");
  set("bits", String(info.lengths.at(-1)));
  set("mode", "exact");
  set("against", "");
  set("top", "20");
  set("where", "");
  set("expect", "");
  onlyFromWhere();
  origin = null;
  if (asked.has("like")) origin = { like: asked.get("like") };
  if (asked.has("code")) origin = { code: asked.get("code"), own: asked.get("own") || "" };
  if (!origin) file = null;
  showChosen();
  explain();
  return asked.has("text") || origin !== null;
}

function onlyFromWhere() {
  const where = $("where").value.trim();
  const name = info.class_names.find((n) => where === `label = ${quoted(n)}`);
  $("only").value = name || "";
  $("where").closest("details").open = Boolean(where && !name);
}

function showChosen() {
  if ($("preview").src.startsWith("blob:")) URL.revokeObjectURL($("preview").src);
  $("preview").hidden = false;
  if (file) {
    $("preview").src = URL.createObjectURL(file);
    $("chosen-name").textContent = file.name;
  } else if (origin && origin.like) {
    $("preview").src = `image?id=${encodeURIComponent(origin.like)}`;
    $("chosen-name").textContent = `items like ${origin.like}`;
  } else if (origin) {
    $("preview").removeAttribute("src");
    $("preview").hidden = true;
    $("chosen-name").textContent = `a picture's code, ${origin.code.slice(0, 16)}...`;
  }
  $("chosen").hidden = !file && !origin;
}

async function search(remember = true) {
  said("");
  const text = $("text").value.trim();
  if (!text && !file && !origin) {
    if (running) running.abort();
    $("cards").replaceChildren();
    $("status").textContent = "";
    said("Type a text or choose a picture to search with.");
    return;
  }
  if (running) running.abort();
  const mine = running = new AbortController();
  $("cards").classList.add("old");
  $("status").textContent = "Searching ...";
  try {
    const chosen = options();
    let answer;
    if (file) {
      if (file.size > info.limits.bytes) {
        throw new Error(`upload: ${plural(file.size, "byte")}. Send at most ` +
          info.limits.bytes.toLocaleString("en"));
      }
      const form = new FormData();
      for (const [name, value] of chosen) form.set(name, value);
      if (text) form.set("text", text);
      form.set("image", file);
      answer = await fetch("api/search", { method: "POST", body: form, signal: mine.signal });
    } else {
      for (const [name, value] of Object.entries(origin || { text })) chosen.set(name, value);
      answer = await fetch(`api/search?${chosen}`, { signal: mine.signal });
    }
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    if (mine !== running) return;
    const link = options();
    for (const [name, value] of Object.entries(found.query)) link.set(name, value);
    if (remember) history.pushState(null, "", `?${link}`);
    show(found);
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    $("cards").replaceChildren();
    $("status").textContent = "";
    said(error instanceof TypeError ? "The server does not answer." : error.message);
  } finally {
    if (mine === running) $("cards").classList.remove("old");
  }
}

// -- what was found -------------------------------------------------------------------------------

function show(found) {
  const right = found.hits.filter((hit) => hit.match).length;
  const marked = found.hits.length && found.hits[0].match !== null;
  const status = $("status");
  status.textContent = found.hits.length
    ? `${plural(found.hits.length, "item")} in ${(1000 * found.seconds).toFixed(0)} ms` +
      (marked ? `, ${right} of them match. ` : ". ")
    : "No item passes the filter. ";
  if (found.unknown.length) {
    status.textContent += `The model does not know: ${found.unknown.join(", ")}. `;
  }
  const link = element("a", "", "Link to this search");
  link.href = location.href;
  link.id = "link";
  status.append(link);
  $("cards").replaceChildren(...found.hits.map((hit) => card(hit, found)));
}

function card(hit, found) {
  const made = element("article", "card");
  if (hit.match !== null && found) made.classList.add(hit.match ? "right" : "wrong");
  if (hit.picture) {
    const tile = element("div", "tile");
    const image = element("img");
    image.loading = "lazy";
    image.alt = hit.caption || hit.id;
    image.src = `image?id=${encodeURIComponent(hit.id)}`;
    tile.append(image);
    made.append(tile);
  }
  const body = element("div", "body");
  if (hit.match !== null && found) {
    body.append(element("div", "mark", hit.match ? "\u2713 match" : "\u2717 no match"));
  }
  const caption = element("div", "caption", hit.caption || hit.id);
  caption.title = hit.caption || hit.id;
  body.append(caption);
  if (found) {
    const unit = found.mode === "weighted" ? "weighted distance" : `of ${found.bits} bits differ`;
    const score = hit.score === null ? "" : `, score ${hit.score.toPrecision(4)}`;
    body.append(element("div", "distance",
      found.mode === "weighted" ? `${unit} ${hit.distance}` : `${hit.distance} ${unit}${score}`));
  }
  if (hit.labels.length) body.append(element("div", "labels", hit.labels.join(", ")));
  const like = element("button", "plain like", "more like this");
  like.type = "button";
  like.addEventListener("click", () => {
    origin = { like: hit.id };
    file = null;
    $("text").value = "";
    if ($("mode").value === "two-stage") $("mode").value = "exact";
    showChosen();
    explain();
    search();
    scrollTo({ top: 0 });
  });
  body.append(like);
  made.append(body);
  return made;
}

async function showItems() {
  const answer = await fetch("api/items");
  if (!answer.ok || running) return;
  const items = await answer.json();
  $("status").textContent = "Some of the items, to begin with:";
  $("cards").replaceChildren(...items.map((hit) => card(hit, null)));
}

// -- events ---------------------------------------------------------------------------------------

function choose(some) {
  if (!some) return;
  file = some;
  origin = null;
  if (!info.together) $("text").value = "";  // pictures and texts are encoded apart
  showChosen();
  if (info.alone || $("text").value.trim()) search();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("text").value.trim() && origin) {
    origin = null;
    showChosen();
  }
  search();
});
$("image").addEventListener("change", () => {
  choose($("image").files[0]);
  $("image").value = "";
});
$("text").addEventListener("input", () => {
  if (file && info && !info.together) {
    file = null;
    showChosen();
  }
});
$("clear").addEventListener("click", () => {
  file = origin = null;
  showChosen();
  $("text").focus();
});
for (const name of ["bits", "mode", "against", "top", "expect"]) {
  $(name).addEventListener("change", () => {
    explain();
    if ($("text").value.trim() || file || origin) search();
  });
}
$("only").addEventListener("change", () => {
  $("where").value = $("only").value ? `label = ${quoted($("only").value)}` : "";
  if ($("text").value.trim() || file || origin) search();
});
$("where").addEventListener("input", onlyFromWhere);
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && info && info.raw) choose(event.dataTransfer.files[0]);
  });
}
addEventListener("popstate", () => {
  file = null;
  if (restore()) {
    search(false);
    return;
  }
  if (running) running.abort();
  running = null;
  said("");
  showItems();
});

begin().then(() => (restore() ? search(false) : showItems())).catch((error) => {
  said(error.message || "The server does not answer.");
});
