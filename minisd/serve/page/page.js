// What happens on the page: drawing, comparing, cancelling, and what is dropped on it.

import { element, fill, read, tell, write } from "./form.js";
import * as gallery from "./gallery.js";
import { begin as startFrom, base64, remove as startFromNothing, startFields } from "./start.js";
import { ask, listen } from "./wire.js";

const byId = (id) => document.getElementById(id);
const KINDS = ["image/png", "image/jpeg", "image/webp"];
let models = [], stopping = null, opened;
const ready = new Promise((resolve) => { opened = resolve; });  // the form knows what it may offer

function say(text) {
  byId("status").textContent = text;
}

function fail(error) {
  byId("error").textContent = error?.message ?? "";
}

function busy(on) {
  byId("draw").hidden = on;
  byId("compare").disabled = on;
  byId("cancel").hidden = !on;
  byId("progress").hidden = !on;
  byId("canvas").ariaBusy = `${on}`;
  if (!on && document.activeElement === document.body) byId("draw").focus();
}

// Progress of one column among all; every quarter is said aloud.
function progress(share, text) {
  const before = Math.floor(byId("bar").value * 4);
  byId("bar").value = share;
  byId("step").textContent = text;
  if (Math.floor(share * 4) > before && share < 1) say(`${Math.round(share * 100)} percent drawn`);
}

const seeded = (fields) => ({ ...fields, seed: fields.seed ?? `${crypto.getRandomValues(new Uint32Array(1))[0]}` });

// One entry: the same fields with each of these checkpoints.  first: pictures that are there already, of another.
async function draw(fields, names, first = []) {
  if (stopping) return;
  fail(null);
  stopping = new AbortController();
  const { signal } = stopping;
  const asked = names.length + first.length > 1 ? seeded(fields) : fields;
  const entry = gallery.begin(asked, names);
  entry.columns.unshift(...first);
  byId("bar").value = 0;
  progress(0, "Waiting for the server");
  busy(true);
  say("Drawing");
  byId("stage").scrollIntoView({ block: "nearest" });
  let seconds = 0;
  try {
    for (const [i, model] of names.entries()) seconds += await drawOne(entry, entry.columns[first.length + i], { ...asked, model }, i, names.length, signal);
    say(`Done in ${seconds.toFixed(1)} seconds`);
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled");
    else {
      say("Not drawn");
      fail(error);
    }
  }
  stopping = null;
  gallery.keep(entry);
  busy(false);
}

// Gives the seconds that it took.  In a comparison, what one checkpoint cannot draw does not keep the others from it.
async function drawOne(entry, column, fields, i, all, signal) {
  const name = all > 1 ? `${fields.model}: ` : "";
  let seconds = 0;
  const heard = {
    queued: ({ waiting }) => progress(i / all, waiting > 1 ? `${name}${waiting - 1} before this` : `${name}opening the checkpoint`),
    step: ({ step, steps, preview }) => {
      progress((i + step / steps) / all, `${name}step ${step} of ${steps}`);
      if (preview) gallery.preview(entry, column, URL.createObjectURL(new Blob([Uint8Array.from(atob(preview), (c) => c.charCodeAt(0))], { type: "image/png" })));
    },
    picture: (said) => gallery.add(entry, column, said),
    done: (said) => {
      seconds = said.seconds;
      if (said.warnings.length) fail({ message: said.warnings.join(" ") });
    },
  };
  try {
    await listen("/minisd/draw", fields, signal, heard);
  } catch (error) {
    if (all === 1 || error.name === "AbortError") throw error;
    column.error = error.message;
    gallery.changed(entry);
  }
  return seconds;
}

async function drawForm() {
  await ready;
  const fields = { ...read(), ...(await startFields()) };
  await draw(fields, [fields.model]);
}

async function compareForm() {
  await ready;
  const names = [...document.querySelectorAll("#compare-models input:checked")].map((box) => box.value);
  if (names.length < 2) fail({ message: "Tick two checkpoints or more to compare." });
  else await draw({ ...read(), ...(await startFields()) }, names);
}

function actionsOf(picture) {
  const recipe = picture.recipe;
  const whole = { ...picture.asked, seed: picture.seed, model: picture.model, num_images: 1, width: recipe.width, height: recipe.height };
  const use = element("button", { type: "button", className: "quiet", onclick: () => take(whole, "The recipe is in the form.") }, "Use this recipe");
  const save = element("a", { className: "quiet", href: picture.url, download: `minisd-${picture.seed}.png` }, "Save");
  const start = element("button", { type: "button", className: "quiet", onclick: () => startFrom(picture.blob) }, "Start from it");
  const others = models.filter((each) => each.name !== picture.model);
  if (!others.length) return [use, save, start];
  const other = element("select", { id: "other", ariaLabel: "Other checkpoint" }, ...others.map((each) => new Option(each.name, each.name)));
  const first = { model: picture.model, pictures: [picture], preview: null, error: null };
  const again = element("button", { type: "button", className: "quiet", onclick: () => draw(whole, [other.value], [first]) }, "Same seed, other checkpoint");
  return [use, save, start, element("span", { className: "joined" }, again, other)];
}

function take(fields, text) {
  write(fields);
  say(text);
  byId("prompt").focus();
}

async function takeRecipe(file) {
  fail(null);
  try {
    const { program, fields, notes } = await ask("/minisd/recipe", { image: await base64(file) });
    take(fields, `The recipe of ${program} is in the form.`);
    if (notes.length) fail({ message: `The recipe is in the form; ${notes.join("; ")}.` });
  } catch (error) {
    fail(error);
  }
}

async function takeStart(file) {
  fail(null);
  try {
    await startFrom(file);
    say("The drawing starts from this picture.");
  } catch {
    startFromNothing();
    fail({ message: "This is no picture that can be read; PNG, JPEG and WebP are." });
  }
}

function listenToKeys() {
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      drawForm();
    } else if (event.key === "Escape" && stopping) stopping.abort();
  });
}

// Files that are dropped: on one of the two places that show while something is dragged over the page.
function listenToDrops() {
  const places = byId("drop");
  const carries = (event) => [...event.dataTransfer.types].includes("Files");
  addEventListener("dragenter", (event) => {
    if (carries(event)) places.hidden = false;
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    for (const each of places.children) each.classList.toggle("over", each.contains(event.target));
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) places.hidden = true;
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    places.hidden = true;
    const file = [...event.dataTransfer.files].find((each) => KINDS.includes(each.type));
    if (!file) fail({ message: "This is no picture; PNG, JPEG and WebP are." });
    else if (event.target.closest?.("[data-drop=start], #start-part")) takeStart(file);
    else takeRecipe(file);
  });
}

function chosenFile(id, then) {
  byId(id).addEventListener("change", () => {
    const [file] = byId(id).files;
    byId(id).value = "";
    if (file) then(file);
  });
}

async function begin() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    drawForm();
  });
  byId("form").addEventListener("input", (event) => {
    if (event.target.type === "range") tell(event.target);
  });
  byId("compare").addEventListener("click", compareForm);
  byId("cancel").addEventListener("click", () => stopping?.abort());
  chosenFile("open", takeRecipe);
  chosenFile("start", takeStart);
  listenToKeys();
  listenToDrops();
  gallery.withActions(actionsOf);
  try {
    const choices = await ask("/minisd/choices");
    ({ models } = choices);
    fill(choices);
    opened();
    document.body.dataset.ready = "yes";
  } catch (error) {
    fail(error);
  }
}

begin();
