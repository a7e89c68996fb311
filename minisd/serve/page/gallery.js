// What was drawn in this session.  An entry has columns, one for each checkpoint, and each of these its pictures.

import { element } from "./form.js";

const byId = (id) => document.getElementById(id);
const entries = [];
let shown = null, chosen = null;

export function begin(asked, models) {
  const entry = { asked, columns: models.map((model) => ({ model, pictures: [], preview: null, error: null })) };
  show(entry);
  return entry;
}

export function show(entry, picture = null) {
  shown = entry;
  chosen = picture ?? entry.columns.flatMap((column) => column.pictures)[0] ?? null;
  const many = entry.columns.length > 1;
  byId("canvas").className = many ? "compared" : entry.columns[0].pictures.length > 1 ? "several" : "";
  byId("canvas").replaceChildren(...entry.columns.map((column) => columnShown(entry, column, many)));
  recipeShown();
}

function columnShown(entry, column, named) {
  const pictures = column.pictures.map((picture) => pictureShown(entry, picture));
  if (column.preview) pictures.push(element("img", { className: "making", src: column.preview, alt: "The picture in the making" }));
  else if (column.error) pictures.push(element("p", { className: "failed" }, column.error));
  else if (!pictures.length) pictures.push(element("div", { className: "blank" }));
  const body = element("div", { className: "pictures" }, ...pictures);
  return element("section", { className: "column", ariaLabel: column.model }, ...(named ? [element("h3", {}, column.model)] : []), body);
}

const wordsOf = (picture) => `${picture.asked.prompt || "No prompt"}, by ${picture.recipe.model}, seed ${picture.seed}`;

function pictureShown(entry, picture) {
  const image = element("img", { src: picture.url, alt: wordsOf(picture), width: picture.recipe.width, height: picture.recipe.height });
  if (picture.recipe.width < 320) image.className = "tiny";
  const only = entry.columns.length === 1 && entry.columns[0].pictures.length === 1;
  if (only) return image;
  const pressed = picture === chosen;
  return element("button", { type: "button", className: "picture", ariaPressed: `${pressed}`, onclick: () => {
    show(entry, picture);
    byId("canvas").querySelector("[aria-pressed=true]").focus();
  } }, image);
}

// An image may be loading it still.
function release(url) {
  setTimeout(() => URL.revokeObjectURL(url), 5000);
}

// A preview, or what it has become; drawn anew only where somebody looks at it.
export function changed(entry) {
  if (entry === shown) show(entry, chosen);
}

export function preview(entry, column, url) {
  const image = column.preview && shown === entry && byId("canvas").querySelector(".making");
  if (column.preview) release(column.preview);
  column.preview = url;
  if (image) image.src = url;
  else changed(entry);
}

export function add(entry, column, said) {
  const bytes = Uint8Array.from(atob(said.png), (letter) => letter.charCodeAt(0));
  const blob = new Blob([bytes], { type: "image/png" });
  if (column.preview) release(column.preview);
  column.preview = null;
  column.pictures.push({ blob, url: URL.createObjectURL(blob), recipe: said.recipe, seed: said.seed, asked: entry.asked, model: column.model });
  changed(entry);
}

// Into the gallery, if there is anything of it.
export function keep(entry) {
  for (const column of entry.columns) {
    if (column.preview) release(column.preview);
    column.preview = null;
  }
  const pictures = entry.columns.flatMap((column) => column.pictures);
  if (!pictures.length) {
    if (entries.length) show(entries[0]);
    else if (shown === entry) empty();
    return;
  }
  entries.unshift(entry);
  changed(entry);
  byId("session").hidden = false;
  const count = entry.columns.length > 1 ? `${entry.columns.length} checkpoints` : pictures.length > 1 ? `${pictures.length} pictures` : "";
  const image = element("img", { src: pictures[0].url, alt: "", className: pictures[0].recipe.width < 320 ? "tiny" : "" });
  const label = `${wordsOf(pictures[0])}${count ? `, ${count}` : ""}`;
  const button = element("button", { type: "button", ariaLabel: `Show: ${label}`, title: label, onclick: () => {
    show(entry);
    byId("stage").scrollIntoView({ block: "nearest" });
  } }, image, ...(count ? [element("span", {}, `${Math.max(entry.columns.length, pictures.length)}`)] : []));
  byId("gallery").prepend(element("li", {}, button));
}

const nothing = byId("canvas").firstElementChild;

function empty() {
  shown = chosen = null;
  byId("canvas").className = "";
  byId("canvas").replaceChildren(nothing);
  recipeShown();
}

let actions = () => [];

// of: a picture -> the buttons below it.
export function withActions(of) {
  actions = of;
}

function recipeShown() {
  byId("recipe").hidden = !chosen;
  if (!chosen) return;
  const { recipe, asked, seed } = chosen;
  const loras = Object.entries(asked.loras ?? {}).map(([name, strength]) => `${name} ${strength}`).join(", ");
  const rows = { Checkpoint: recipe.model, Seed: seed, Size: `${recipe.width} × ${recipe.height}`, Sampler: recipe.sampler_label,
    Spacing: recipe.spacing, Steps: recipe.steps, Guidance: recipe.guidance_scale, Style: asked.style, LoRAs: loras };
  const facts = Object.entries(rows).filter(([, value]) => value != null && value !== "");
  const negative = recipe.negative_prompt ? [element("p", { className: "without" }, `Without ${recipe.negative_prompt}`)] : [];
  byId("recipe").replaceChildren(
    element("p", { className: "said" }, recipe.prompt || "No prompt"), ...negative,
    element("dl", {}, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, `${value}`)))),
    element("div", { className: "row" }, ...actions(chosen)),
  );
}
