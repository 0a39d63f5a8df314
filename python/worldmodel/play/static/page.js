"use strict";
// One WebSocket: commands go out as JSON, frames and maps come in. A move is sent once the one before was answered, and
// at most RATE times a second, so a key that is held moves as fast as the world can and no faster. One that is only
// tapped moves once.

const RATE = 30;
const HOLD = 200; // milliseconds after which a key is held
const MAP_EVERY = 200; // milliseconds
const ARROWS = {north: "↑", east: "→", south: "↓", west: "←", ahead: "↑", left: "↺", right: "↻"};
const $ = (id) => document.getElementById(id);

let socket, actions = [], swatches = [], chosen = null, active = 0, body = 0, waiting = 0, sent = 0, began = 0, queued = -1, timer = 0;
const worlds = [];      // {article, view, map, frames: last of each body, frame: the one shown, held: last map, asked:
                        // when a map was asked for}
const pressed = [];     // actions of keys and buttons that are down, the last one counts
const frames = [];      // times of the last second's frames

function send(command) {
  if (socket && socket.readyState === WebSocket.OPEN) {
    socket.send(JSON.stringify(command));
    return true;
  }
  return false;
}

function connect() {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}/play${location.search}`);
  socket.onmessage = (event) => receive(JSON.parse(event.data));
  socket.onclose = () => {
    [waiting, queued] = [0, -1];
    $("status").textContent = "no connection, trying again";
    setTimeout(connect, 1000);
  };
}

function receive(message) {
  if (message.type === "hello") {
    greet(message);
  } else if (message.type === "frame") {
    show(message);
  } else if (message.type === "map") {
    const world = worldOf(message.world);
    world.asked = 0;
    if (message.picture) {
      world.held = message;
      drawMap(world);
    }
  } else if (message.type === "closed") {
    worlds.splice(message.world).forEach((world) => world.article.remove());
    choose(0);
  } else if (message.type === "said") {
    waiting = 0;
    say(message.text, message.error);
  }
}

function say(text, error = false) {
  $("said").textContent = text;
  $("said").classList.toggle("error", error);
}

function greet(hello) {
  worlds.splice(0).forEach((world) => world.article.remove());
  [actions, swatches] = [hello.actions, hello.map ? hello.swatches : []];
  document.body.classList.toggle("mapless", !hello.map);
  $("file").textContent = document.title = hello.file;
  $("moves").classList.toggle("plain", !(actions[0].name in ARROWS));
  $("moves").replaceChildren(...actions.map((action, index) => {
    const button = document.createElement("button");
    button.className = action.name;
    button.textContent = ARROWS[action.name] || [action.name, ...action.keys].join(": ");
    button.setAttribute("aria-label", action.name);
    button.onpointerdown = (event) => { button.setPointerCapture(event.pointerId); press(index); };
    button.onpointerup = button.onpointercancel = () => release(index);
    button.onclick = (event) => { if (event.detail === 0) { press(index); release(index); } }; // Enter or Space
    button.oncontextmenu = (event) => event.preventDefault();
    return button;
  }));
  $("swatches").replaceChildren(...swatches.map((swatch, index) => {
    const button = document.createElement("button");
    button.style.background = `rgb(${swatch.rgb})`;
    button.title = swatch.name;
    button.setAttribute("aria-label", swatch.name);
    button.onclick = () => arm(chosen === index ? null : index);
    return button;
  }));
  arm(null);
}

function arm(index) {
  chosen = index;
  [...$("swatches").children].forEach((button, i) => button.setAttribute("aria-pressed", i === chosen));
  document.querySelectorAll("canvas").forEach((canvas) => canvas.classList.toggle("editing", chosen !== null));
}

function worldOf(index) {
  while (worlds.length <= index) {
    const article = $("world").content.cloneNode(true).firstElementChild;
    const number = worlds.length;
    const [view, map] = [article.querySelector(".view"), article.querySelector(".map")];
    const world = {article, view, map, frames: [], asked: 0};
    article.querySelector("h2").textContent = number ? "Fork" : "World";
    article.onpointerdown = () => choose(number);
    world.view.onclick = (event) => edit(number, "view", placeAt(world.view, event, ...viewCells(world)));
    world.map.onclick = (event) => clickMap(world, number, event);
    world.map.onpointermove = (event) => tell(world, event);
    worlds.push(world);
    $("worlds").append(article);
  }
  const two = worlds.length > 1;
  $("close").hidden = $("together-label").hidden = !two;
  return worlds[index];
}

function choose(index) {
  active = Math.min(index, worlds.length - 1);
  worlds.forEach((world, i) => world.article.classList.toggle("active", i === active && worlds.length > 1));
  $("close").hidden = $("together-label").hidden = worlds.length < 2;
}

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function show(frame) {
  const known = worlds.length, world = worldOf(frame.world);
  if (world.frame === undefined) choose(frame.world < known ? active : frame.world);
  world.frames[frame.body] = frame;
  $("body").hidden = frame.bodies < 2;
  body = Math.min(body, frame.bodies - 1);
  if (frame.milliseconds !== undefined) count(frame.milliseconds);
  else if ($("status").textContent !== "ready" && !frames.length) $("status").textContent = "ready";
  if (frame.body === body) paint(world, frame);
  pump();
}

function count(milliseconds) {
  waiting = Math.max(0, waiting - 1);
  const now = performance.now();
  frames.push(now);
  while (frames[0] < now - 1000) frames.shift();
  document.body.dataset.frames = Number(document.body.dataset.frames || 0) + 1;
  $("status").textContent = `${frames.length} frames per second, ${milliseconds} ms per step`;
}

function paint(world, frame) {
  world.frame = frame;
  $("body").textContent = `Body ${frame.body + 1} of ${frame.bodies}`;
  const {rows, columns, rgb} = frame.view, colours = bytes(rgb), picture = new ImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    picture.data.set([colours[3 * i], colours[3 * i + 1], colours[3 * i + 2], 255], 4 * i);
  }
  [world.view.width, world.view.height] = [columns, rows];
  world.view.getContext("2d").putImageData(picture, 0, 0);
  const [row, column] = frame.position;
  world.article.querySelector(".where").textContent =
    `step ${frame.steps.toLocaleString("en")}, at ${row}, ${column}${frame.saved ? "" : ", not saved"}`;
  askForMap(world, frame.world);
}

function otherBody() {
  const bodies = worlds.length ? worlds[0].frames.length : 1;
  if (bodies < 2) return;
  body = (body + 1) % bodies;
  worlds.forEach((world) => { if (world.frames[body]) paint(world, world.frames[body]); if (world.held) drawMap(world); });
}

function askForMap(world, index) {
  const now = performance.now();
  if (world.asked && now - world.asked < 2000) return; // one is on its way
  const rest = (world.mapped || 0) + MAP_EVERY - now;
  if (rest <= 0) {
    world.mapped = world.asked = now;
    send({do: "map", world: index, body});
  } else if (!world.later) {
    world.later = setTimeout(() => { world.later = 0; if (worlds[index] === world) askForMap(world, index); }, rest);
  }
}

function drawMap(world) {
  const {picture, certainty, gap, first, period, positions, headings} = world.held;
  const {rows, columns, rgb} = picture, colours = bytes(rgb), certain = bytes(certainty);
  const size = Math.max(2, Math.floor(480 / columns)), context = world.map.getContext("2d");
  [world.map.width, world.map.height] = [columns * size, rows * size];
  const byGap = $("gaps").checked, longest = Math.log2(2 + Math.max(...gap));
  for (let i = 0; i < rows * columns; i++) {
    if (gap[i] < 0) continue;
    context.globalAlpha = byGap ? 1 : Math.max(0.08, certain[i] / 255);
    context.fillStyle = byGap
      ? `hsl(${200 + 60 * Math.log2(1 + gap[i]) / longest} 80% ${78 - 44 * Math.log2(1 + gap[i]) / longest}%)`
      : `rgb(${colours[3 * i]},${colours[3 * i + 1]},${colours[3 * i + 2]})`;
    context.fillRect((i % columns) * size, Math.floor(i / columns) * size, size, size);
  }
  context.globalAlpha = 1;
  const order = [...positions.keys()].sort((a, b) => (a === body) - (b === body)); // the chosen one on top
  for (const other of order) {
    const [row, column] = positions[other].map((p, k) => ((p - first[k]) % period + period) % period);
    if (row < rows && column < columns) drawBody(context, row, column, size, headings[other], other === body);
  }
}

function drawBody(context, row, column, size, heading, here) {
  const r = Math.max(3, size * 0.38);
  context.translate((column + 0.5) * size, (row + 0.5) * size);
  context.rotate(heading * Math.PI / 2);
  context.beginPath();
  context.moveTo(0, -r);
  context.lineTo(r * 0.8, r * 0.8);
  context.lineTo(-r * 0.8, r * 0.8);
  context.closePath();
  [context.fillStyle, context.strokeStyle] = here ? ["#fff", "#000"] : ["#000", "#fff"];
  context.lineWidth = Math.max(1, size / 10);
  context.fill();
  context.stroke();
  context.setTransform(1, 0, 0, 1, 0, 0);
}

function viewCells(world) {
  const cells = world.frame.cells;
  return [cells[0], cells[1]];
}

function placeAt(canvas, event, rows, columns) {
  const box = canvas.getBoundingClientRect();
  const at = [(event.clientY - box.top) / box.height * rows, (event.clientX - box.left) / box.width * columns];
  return [Math.min(rows - 1, Math.max(0, Math.floor(at[0]))), Math.min(columns - 1, Math.max(0, Math.floor(at[1])))];
}

function mapPlace(world, event) {
  const {picture, first, period} = world.held;
  const cell = placeAt(world.map, event, picture.rows, picture.columns);
  return {index: cell[0] * picture.columns + cell[1], place: cell.map((c, k) => (c + first[k]) % period)};
}

function tell(world, event) {
  if (!world.held) return;
  const {index, place} = mapPlace(world, event), gap = world.held.gap[index];
  const when = gap < 0 ? "never seen" : gap === 0 ? "in view" : `seen ${gap.toLocaleString("en")} steps ago`;
  const certain = gap < 0 ? "" : `, ${Math.round(bytes(world.held.certainty)[index] / 2.55)}% certain`;
  world.article.querySelector(".place").textContent = `place ${place.join(", ")}: ${when}${certain}`;
}

function clickMap(world, number, event) {
  tell(world, event);
  if (world.held) edit(number, "place", mapPlace(world, event).place);
}

function edit(world, where, place) {
  if (chosen !== null) send({do: "edit", world, body, [where]: place, value: chosen});
}

function press(index) {
  if (!pressed.includes(index)) pressed.push(index);
  say("");
  began = performance.now();
  if (waiting > 0) queued = index; // as soon as the move before is answered
  else move(index);
}

function release(index) {
  const at = pressed.indexOf(index);
  if (at >= 0) pressed.splice(at, 1);
}

function move(index) {
  if (waiting > 0) return;
  const targets = $("together").checked && worlds.length > 1 ? worlds.map((_, i) => i) : [active];
  sent = performance.now();
  for (const world of targets) if (send({do: "act", world, body, action: index})) waiting++;
}

function pump() {
  if (waiting > 0) return;
  if (queued >= 0) {
    const next = queued;
    queued = -1;
    move(next);
    return;
  }
  if (!pressed.length || timer) return;
  const rest = Math.max(sent + 1000 / RATE, began + HOLD) - performance.now();
  timer = setTimeout(() => { timer = 0; if (pressed.length) move(pressed[pressed.length - 1]); }, Math.max(0, rest));
}

function actionOf(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  return event.ctrlKey || event.metaKey || event.altKey ? -1 : actions.findIndex((action) => action.keys.includes(key));
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape") arm(null);
  const index = actionOf(event);
  if (index < 0) {
    if (event.key.toLowerCase() === "b" && !event.repeat && !(event.ctrlKey || event.metaKey || event.altKey)) otherBody();
    return;
  }
  event.preventDefault();
  if (!event.repeat) press(index);
});
addEventListener("keyup", (event) => { const index = actionOf(event); if (index >= 0) release(index); });
addEventListener("blur", () => pressed.splice(0));
$("save").onclick = () => send({do: "save", world: active});
$("fork").onclick = () => send({do: "fork", world: active, body});
$("body").onclick = otherBody;
$("close").onclick = () => send({do: "close", world: 1});
$("wait").onclick = () => send({do: "wait", world: active, body, steps: 10});
$("gaps").onchange = () => worlds.forEach((world) => world.held && drawMap(world));
connect();
