// The three ways to ask, and the closing screen. Views draw; page.js decides. Text only ever enters through textContent.
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name.startsWith("data-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const key = (label) => element("kbd", { textContent: label });

function framed(image) {
  const frame = element("span", { className: "frame" });
  if (!image) return frame;
  const picture = image.cloneNode();
  picture.alt = "";
  picture.draggable = false;
  frame.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  if (image.naturalWidth < 200) picture.classList.add("tiny");
  frame.append(picture);
  return frame;
}

export function choices(images, badges, labels, onChoose) {
  const pair = images.length === 2 && badges[0] !== "1";
  const grid = element("div", { className: pair ? "pictures pair" : "pictures many" });
  images.forEach((image, position) => {
    const button = element("button", { type: "button", className: "picture", "aria-label": labels[position], "data-position": position, onclick: () => onChoose(position) }, framed(image), key(badges[position]));
    grid.append(button);
  });
  return grid;
}

// The number of columns at which the pictures of a ranking are largest in the room that there is.
export function fitColumns(stage) {
  const grid = stage.querySelector(".many");
  if (!grid) return;
  const count = grid.children.length;
  const ratio = Math.max(...[...grid.querySelectorAll(".frame")].map((frame) => Number(frame.style.getPropertyValue("--ratio")) || 1));
  const edge = (columns) => Math.min(stage.clientWidth / columns, (stage.clientHeight / Math.ceil(count / columns) - 40) * ratio);
  const columns = Array.from({ length: count }, (_, index) => index + 1).reduce((best, one) => (edge(one) > edge(best) ? one : best));
  grid.style.setProperty("--columns", columns);
}

export function markRanks(stage, ranks) {
  stage.querySelectorAll(".picture").forEach((button, position) => {
    button.querySelector(".rank")?.remove();
    button.classList.toggle("chosen", ranks[position] !== null);
    if (ranks[position] !== null) button.querySelector(".frame").append(element("span", { className: "rank", textContent: ranks[position] }));
  });
}

export function flicker(image, label) {
  return element("div", { className: "pictures flicker" }, element("div", { className: "picture" }, framed(image), key(label)));
}

export function scoring(image, criteria, texts, onPoint) {
  const panel = element("div", { className: "criteria" });
  for (const name of criteria) {
    const [title, note] = texts.criteria[name] ?? [name, ""];
    const points = element("div", { className: "points", role: "group", "aria-label": title });
    for (let value = 1; value <= 5; value++) points.append(element("button", { type: "button", textContent: value, "aria-pressed": "false", onclick: () => onPoint(name, value) }));
    panel.append(element("section", { className: "criterion", "data-criterion": name }, element("h2", { textContent: title }), element("p", { textContent: note }), points));
  }
  return element("div", { className: "one" }, framed(image), panel);
}

export function markPoints(stage, points, current) {
  stage.querySelectorAll(".criterion").forEach((section) => {
    const name = section.dataset.criterion;
    section.classList.toggle("current", name === current);
    section.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(Number(button.textContent) === points[name])));
  });
}

export function done(texts, summary, skipped, actions) {
  const percent = (share) => `${Math.round(share * 100)} %`;
  const shown = [["judgements", summary.judgements], ["seconds", summary.seconds?.toFixed(1)], ["left", summary.left === null ? null : percent(summary.left)],
    ["consistency", summary.consistency === null ? null : percent(summary.consistency)], ["agreement", summary.agreement === null ? null : percent(summary.agreement)]];
  const figures = element("div", { className: "figures" });
  for (const [name, value] of shown) {
    if (value !== null && value !== undefined) figures.append(element("div", {}, element("b", { textContent: value }), element("span", { textContent: texts.figures[name] })));
  }
  const buttons = element("div", { className: "actions" });
  if (skipped) buttons.append(element("button", { type: "button", onclick: actions.revisit }, key("R"), texts.revisit(skipped)));
  buttons.append(element("button", { type: "button", onclick: actions.undo }, key("U"), texts.undo), element("button", { type: "button", onclick: actions.finish }, key("↵"), texts.finish));
  return element("div", { className: "done" }, element("h1", { textContent: texts.doneTitle }), element("p", { textContent: texts.doneText }), figures, buttons);
}

export function keyHints(entries) {
  return entries.map(([labels, text, action]) => element("button", { type: "button", tabIndex: -1, onclick: action }, ...labels.map(key), text));
}

export function help(texts, title, entries, onClose) {
  const list = element("dl");
  for (const [labels, text] of entries) list.append(element("dt", {}, ...labels.map(key)), element("dd", { textContent: text }));
  return [element("h2", { textContent: title }), list, element("p", { textContent: texts.helpNote }), element("p", {}, element("button", { type: "button", textContent: texts.close, onclick: onClose }))];
}
