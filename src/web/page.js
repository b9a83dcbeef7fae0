// The node's page, and the report's: the same pictures of a disk, asked for every second or embedded in the page.
// What a node, a peer or a disk says reaches the page as text only, never as markup.
"use strict";

const CELLS = 1024;
const INTERVAL_MS = 1000;
// How often what changes slowly is asked for again: one in so many looks.
const REPORT_EACH = 10;
const OPEN_AT_FIRST = 4;
const EVENTS_SHOWN = 500;

// ---- small helpers

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const svgSpace = (() => {
  const template = document.createElement("template");
  template.innerHTML = "<svg></svg>";
  return template.content.firstChild.namespaceURI;
})();

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(svgSpace, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit ? count.toFixed(2) : Math.round(count)} ${units[unit]}`;
}

function micros(us) {
  if (us < 1000) return `${Math.round(us)} us`;
  return us < 1e6 ? `${(us / 1000).toFixed(1)} ms` : `${(us / 1e6).toFixed(2)} s`;
}

function seconds(s) {
  if (s < 120) return `${Number(s.toFixed(1))} s`;
  return s < 7200 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
}

// What fills: the disk here, or at the host that it was given to.
function filling(status) {
  return status.destination ?? status;
}

// All of it is said only when nothing is missing.
function percent(status) {
  const { present_bytes, missing_bytes } = filling(status);
  return missing_bytes === 0 ? 100 : Math.min(99, Math.floor((present_bytes * 100) / status.size));
}

// ---- the map

function drawMap(canvas, map, own) {
  const count = map.present.length;
  const columns = Math.max(1, Math.min(count, Math.ceil(Math.sqrt(count * 4))));
  const side = 10;
  canvas.width = columns * side;
  canvas.height = Math.max(1, Math.ceil(count / columns)) * side;
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const pen = canvas.getContext("2d");
  const [present, written, hot, missing] = ["present", "written", "hot", "missing"].map(colour);
  for (let cell = 0; cell < count; cell += 1) {
    const x = (cell % columns) * side;
    const y = Math.floor(cell / columns) * side;
    pen.fillStyle = missing;
    pen.fillRect(x, y, side - 1, side - 1);
    const share = map.present[cell] / 1000;
    const dirty = map.dirty[cell] > 0 || (own && map.hot[cell]);
    pen.globalAlpha = share === 0 ? 0 : 0.3 + 0.7 * share;
    pen.fillStyle = dirty ? written : present;
    pen.fillRect(x, y, side - 1, side - 1);
    pen.globalAlpha = 1;
    if (dirty || (map.hot[cell] && share < 1)) {
      // Marks that are seen without colours too: a bar for written, a point for hot.
      pen.fillStyle = dirty ? colour("paper") : hot;
      if (dirty) pen.fillRect(x + 1, y + side - 4, side - 3, 1);
      else pen.fillRect(x + 2, y + 2, side - 5, side - 5);
    }
  }
}

// ---- charts over time

const WIDTH = 800;
const HEIGHT = 110;
const LEFT = 4;
const BOTTOM = 16;

// `series`: {name, cls, points: [[ms, value], ...], area}. All charts of a disk share [from, to].
function chart(holder, title, series, [from, to], windows, show) {
  const top = Math.max(0, ...series.flatMap((one) => one.points.map((point) => point[1])));
  const x = (at) => LEFT + ((at - from) / Math.max(1, to - from)) * (WIDTH - 2 * LEFT);
  const y = (value) => HEIGHT - BOTTOM - (top > 0 ? value / top : 0) * (HEIGHT - BOTTOM - 12);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  picture.append(svg("title", {}, title));
  for (const window of windows) {
    const start = Math.max(from, window.from_ms);
    const end = Math.min(to, window.to_ms ?? to);
    if (end < start) continue;
    // Even the shortest pause is seen.
    const width = Math.max(2, x(end) - x(start));
    const band = svg("rect", { x: x(start), y: 12, width, height: HEIGHT - BOTTOM - 12, class: `window ${window.kind}` });
    band.append(svg("title", {}, `${window.kind} ${window.to_ms == null ? "" : seconds((window.to_ms - window.from_ms) / 1000)}`));
    picture.append(band);
  }
  picture.append(svg("path", { class: "axis", d: `M${LEFT} ${HEIGHT - BOTTOM}H${WIDTH - LEFT}` }));
  for (const one of series) {
    if (one.points.length === 0) continue;
    const steps = one.points.map(([at, value]) => `${x(at).toFixed(1)} ${y(value).toFixed(1)}`);
    let d = `M${steps.join("L")}`;
    if (one.area) d += `V${HEIGHT - BOTTOM}H${x(one.points[0][0]).toFixed(1)}Z`;
    picture.append(svg("path", { class: `${one.cls} ${one.area ? "area" : "line"}`, d }));
  }
  picture.append(svg("text", { x: LEFT, y: 10 }, `${show(top)} at most`));
  picture.append(svg("text", { x: LEFT, y: HEIGHT - 4 }, "0 s"));
  picture.append(svg("text", { x: WIDTH - LEFT, y: HEIGHT - 4, "text-anchor": "end" }, seconds((to - from) / 1000)));
  const head = el("h3", {}, title);
  if (series.length > 1) {
    for (const one of series) head.append(el("span", { class: `key ${one.cls}` }), one.name);
  }
  holder.append(head, picture);
}

// How fast a counter grows, a second. It begins anew with the node's process.
function rates(history, count) {
  return history.slice(1).map((sample, before) => {
    const span = Math.max(1, sample.at_ms - history[before].at_ms) / 1000;
    const grown = count(sample) - count(history[before]);
    return [sample.at_ms, (grown < 0 ? count(sample) : grown) / span];
  });
}

function drawCharts(holder, disk) {
  const { status, summary } = disk;
  const began = summary?.began_ms ?? disk.history[0]?.at_ms ?? 0;
  const history = disk.history.filter((sample) => sample.at_ms >= began);
  holder.replaceChildren();
  if (history.length === 0) {
    const why = status.missing_bytes === 0 ? "Nothing moved for long enough to be drawn." : "No data has moved yet.";
    holder.append(el("p", { class: "faint" }, why));
    return;
  }
  const windows = summary?.windows ?? [];
  const from = Math.min(began, history[0].at_ms);
  const last = history[history.length - 1].at_ms;
  const to = Math.max(last, from + 1, ...windows.map((window) => window.to_ms ?? last));
  const draw = (title, series, show) => chart(holder, title, series, [from, to], windows, show);
  const points = (value) => history.map((sample) => [sample.at_ms, value(sample)]);
  draw("Present at the destination", [
    { name: "present", cls: "present", area: true, points: points((sample) => sample.present_bytes) },
    { name: "written there", cls: "written", points: points((sample) => sample.dirty_bytes) },
  ], bytes);
  draw("From the source, bytes a second", [
    { name: "rate", cls: "present", area: true, points: rates(history, (sample) => sample.pulled_bytes) },
  ], (value) => `${bytes(value)}/s`);
  draw("What was fetched and why, requests a second", [
    { name: "a reader waited (demand)", cls: "hot", points: rates(history, (sample) => sample.demand_fetches) },
    { name: "background", cls: "second", points: rates(history, (sample) => sample.background_fetches) },
  ], (value) => `${value.toFixed(0)}/s`);
  if (status.role === "source") return; // The waits are at the destination.
  draw("Waits of clients, 99 of 100 shorter than", [
    { name: "p99", cls: "hot", points: points((sample) => sample.wait_p99_us) },
  ], micros);
  const share = history.slice(1).map((sample, before) => {
    const span = Math.max(1, sample.at_ms - history[before].at_ms);
    return [sample.at_ms, sample.stalled_us / 1000 / span];
  });
  draw("Client's view: waited and stalled, requests at a time", [
    { name: "waiting", cls: "written", area: true, points: share },
  ], (value) => value.toFixed(2));
}

function drawHistogram(holder, waits) {
  holder.replaceChildren();
  if (waits.length === 0) {
    holder.append(el("p", { class: "faint" }, "No request had to wait for a block."));
    return;
  }
  const octaves = new Map();
  for (const { up_to_us, count } of waits) {
    const octave = Math.max(0, Math.ceil(Math.log2(up_to_us + 1)));
    octaves.set(octave, (octaves.get(octave) ?? 0) + count);
  }
  const [low, high] = [Math.min(...octaves.keys()), Math.max(...octaves.keys())];
  const most = Math.max(...octaves.values());
  const step = (WIDTH - 2 * LEFT) / (high - low + 1);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "data-chart": "waits" });
  for (let octave = low; octave <= high; octave += 1) {
    const count = octaves.get(octave) ?? 0;
    const height = (count / most) * (HEIGHT - BOTTOM - 14);
    const x = LEFT + (octave - low) * step;
    if (count > 0) {
      const bar = { x: x + 1, y: HEIGHT - BOTTOM - height, width: Math.max(1, Math.min(60, step - 2)), height, class: "hot" };
      picture.append(svg("rect", bar), svg("text", { x: x + 2, y: HEIGHT - BOTTOM - height - 3 }, count));
    }
    picture.append(svg("text", { x: x + 2, y: HEIGHT - 4 }, `< ${micros(2 ** octave)}`));
  }
  holder.append(picture);
}

// ---- one disk

const COMMON = new Set(["seq", "at_ms", "disk", "role", "phase", "epoch", "event"]);

function eventText(event) {
  const rest = Object.entries(event).filter(([key, value]) => !COMMON.has(key) && value !== null);
  const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
  return rest.map(([key, value]) => `${key} ${text(value)}`).join(", ");
}

class Card {
  constructor(open) {
    this.asked = 0;
    this.events = [];
    this.title = el("summary");
    this.bar = el("progress", { max: 1000 });
    this.figures = el("dl");
    this.map = el("canvas", { role: "img" });
    this.legend = el("p", { class: "faint" });
    for (const [cls, text] of [["present", "present"], ["written", "written here"], ["hot", "hot, missing"], ["missing", "missing"]]) {
      this.legend.append(el("span", { class: `key ${cls}` }), text);
    }
    this.charts = el("div");
    this.histogram = el("div");
    this.list = el("tbody");
    this.node = el("details", {}, this.title, this.bar, this.figures, this.map, this.legend, this.charts,
      el("h3", {}, "How long requests waited for missing blocks"), this.histogram,
      el("h3", {}, "Events"), el("table", {}, this.list));
    this.node.open = open;
  }

  showStatus(status) {
    this.node.dataset.disk = status.name;
    this.node.dataset.phase = status.phase;
    this.title.replaceChildren(status.name, el("span", {}, `  ${status.role}, ${status.phase}, epoch ${status.epoch}`));
    this.bar.value = percent(status) * 10;
  }

  showFigures(status, summary) {
    const { present_bytes, missing_bytes, pull_rate, eta_s } = filling(status);
    const figures = [
      [status.destination ? "present there" : "present", `${percent(status)} %, ${bytes(present_bytes)} of ${bytes(status.size)}`],
      ["rate", `${bytes(pull_rate)}/s`],
      ["left", missing_bytes === 0 ? "nothing" : eta_s === null ? "no end in sight" : seconds(eta_s)],
      ["written", bytes(status.dirty_bytes)],
      ["faults", `${status.faults.count}, p50 ${micros(status.faults.p50_us)}, p99 ${micros(status.faults.p99_us)}`],
      ["longest wait", micros(status.faults.max_us)],
      ["stalled", micros(status.stalled_us)],
      ["clients", String(status.clients)],
      ["link", status.link],
      ["upstream", status.upstream],
    ];
    const some = (name, value) => value !== null && value !== undefined && figures.push([name, String(value)]);
    some("peer", status.peer);
    some("lease", status.lease_remaining_ms === null ? null : `${(status.lease_remaining_ms / 1000).toFixed(1)} s`);
    some("device", status.device);
    some("container", status.container);
    if (summary) {
      const whole = summary.pulled_bytes + summary.skipped_bytes;
      const share = whole > 0 ? ` (${Math.round((summary.skipped_bytes * 100) / whole)} %)` : "";
      figures.push(["outcome", summary.outcome]);
      if (summary.took_ms !== null) figures.push(["took", seconds(summary.took_ms / 1000)]);
      some("frozen", summary.frozen_ms === null ? null : `${summary.frozen_ms} ms`);
      figures.push(["over the link", bytes(summary.pulled_bytes)], ["saved by skipping", bytes(summary.skipped_bytes) + share]);
      figures.push(["fetches", `${summary.demand_fetches} on demand, ${summary.background_fetches} in the background`]);
      some("why", summary.why);
    }
    some("paused", status.paused);
    some("last error", status.last_error);
    const bad = new Set(["why", "paused", "last error"]);
    this.figures.replaceChildren(...figures.map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", { "data-figure": name, class: bad.has(name) ? "bad" : "" }, value))));
  }

  showMap(status, map) {
    drawMap(this.map, map, status.role === "local" || status.role === "source");
    const full = map.present.filter((share) => share === 1000).length;
    this.map.setAttribute("aria-label", `${full} of ${map.present.length} parts of the disk are present`);
  }

  showEvents(events) {
    const shown = events.slice(-EVENTS_SHOWN).reverse();
    const rows = shown.map((event) => el("tr", {}, el("td", {}, new Date(event.at_ms).toISOString()),
      el("td", {}, event.event), el("td", {}, event.phase), el("td", {}, eventText(event))));
    if (shown.length < events.length) rows.push(el("tr", {}, el("td", { colspan: 4 }, `and ${events.length - shown.length} before`)));
    this.list.replaceChildren(...rows);
  }

  // Everything, as `GET /v1/disks/NAME/report` says it.
  showAll(report) {
    this.showStatus(report.status);
    this.showFigures(report.status, report.summary);
    this.showMap(report.status, report.map);
    drawCharts(this.charts, report);
    drawHistogram(this.histogram, report.waits);
    this.showEvents(report.events);
  }

  // Asks for what is looked at.
  async refresh(status) {
    const path = `v1/disks/${encodeURIComponent(status.name)}`;
    if (!this.report || this.asked % REPORT_EACH === 0 || this.report.status.phase !== status.phase) {
      this.report = await ask(`${path}/report?cells=${CELLS}`);
      this.events = this.report.events;
      this.showAll(this.report);
    } else {
      const [map, history] = await Promise.all([ask(`${path}/map?cells=${CELLS}`), ask(`${path}/history`)]);
      this.report = { ...this.report, status, history };
      this.showFigures(status, this.report.summary);
      this.showMap(status, map);
      drawCharts(this.charts, this.report);
    }
    this.asked += 1;
  }
}

// ---- the node's page

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.message ?? answer.statusText);
  return body;
}

const cards = new Map();

function showTable(disks) {
  const rows = disks.map((disk) => {
    const { missing_bytes, pull_rate, eta_s } = filling(disk);
    const cells = [disk.name, disk.role, disk.phase, `${percent(disk)} %`, `${bytes(pull_rate)}/s`,
      eta_s === null || missing_bytes === 0 ? "" : seconds(eta_s), micros(disk.faults.p99_us), disk.link,
      disk.paused ?? disk.last_error ?? ""];
    return el("tr", { "data-row": disk.name }, ...cells.map((text) => el("td", {}, text)));
  });
  const table = document.getElementById("disks");
  table.tBodies[0].replaceChildren(...rows);
  table.hidden = disks.length === 0;
}

async function look() {
  const state = document.getElementById("state");
  try {
    const status = await ask("v1/status");
    showTable(status.disks);
    const names = new Set(status.disks.map((disk) => disk.name));
    for (const [name, card] of cards) {
      if (names.has(name)) continue;
      card.node.remove();
      cards.delete(name);
    }
    for (const disk of status.disks) {
      let card = cards.get(disk.name);
      if (!card) {
        card = new Card(cards.size < OPEN_AT_FIRST);
        cards.set(disk.name, card);
        document.getElementById("cards").append(card.node);
      }
      card.showStatus(disk);
      // A disk that was removed in between is gone at the next look.
      if (card.node.open) await card.refresh(disk).catch((error) => console.warn(disk.name, error));
    }
    state.className = "";
    state.textContent = `version ${status.version}, exports ${status.disks.length}`;
  } catch (error) {
    state.className = "bad";
    state.textContent = `the node does not answer (${error.message}); what is shown is as it was`;
  }
  setTimeout(look, INTERVAL_MS);
}

const embedded = document.getElementById("report");
if (embedded) {
  const report = JSON.parse(embedded.textContent);
  document.title = `${report.status.name}: ${report.summary.outcome}`;
  document.getElementById("state").textContent =
    `report of ${report.status.name}, made ${new Date(report.made_at_ms).toISOString()} by version ${report.version}`;
  const card = new Card(true);
  document.getElementById("cards").append(card.node);
  card.showAll(report);
} else {
  look();
}
