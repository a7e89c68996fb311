// The form as the fields of a drawing, and the other way round.

const byId = (id) => document.getElementById(id);
const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
let more = {};

function option(value, label) {
  return new Option(label, value);
}

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function fill(choices) {
  byId("about").textContent = `${choices.version} · ${choices.models.length} checkpoint${choices.models.length === 1 ? "" : "s"}`;
  byId("model").replaceChildren(...choices.models.map((each) => option(each.name, each.name)));
  byId("model").value = choices.model;
  byId("style").append(...choices.styles.filter((name) => name !== "base").map((name) => option(name, name)));
  byId("sampler").append(...choices.samplers.map((each) => option(each.name, each.label)));
  byId("sampler").value = "euler";
  byId("spacing").append(...choices.spacings.map((each) => option(each.name, each.label)));
  byId("steps").max = Math.min(100, choices.limits.steps);
  byId("count").max = choices.limits.images;
  byId("loras").replaceChildren(...choices.loras.map(loraSlider));
  byId("loras-part").hidden = !choices.loras.length;
  byId("compare-models").replaceChildren(...choices.models.map((each) => {
    const box = element("input", { type: "checkbox", value: each.name, checked: each.family === familyOf(choices) });
    return element("label", { className: "check" }, box, each.name);
  }));
  byId("compare-part").hidden = choices.models.length < 2;
  document.querySelectorAll(".slider input").forEach(tell);
}

const familyOf = (choices) => choices.models.find((each) => each.name === choices.model)?.family;

function loraSlider(lora, i) {
  const id = `lora-${i}`;
  const slider = element("input", { id, type: "range", min: -1, max: 2, step: 0.05, value: 0 });
  slider.dataset.lora = lora.name;
  const shown = element("output");
  shown.htmlFor = id;
  return element("div", { className: "slider" }, element("label", { htmlFor: id }, lora.name), shown, slider);
}

// The number beside a slider.
export function tell(slider) {
  const { lowest, unit = "", lora } = slider.dataset;
  const off = (lowest && slider.value === slider.min) || (lora && Number(slider.value) === 0);
  const text = off ? (lora ? "off" : lowest) : `${Number(slider.value)}${unit}`;
  slider.parentElement.querySelector("output").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  const on = loraSliders().filter((each) => Number(each.value) !== 0).length;
  byId("loras-on").textContent = on ? `${on} on` : "";
}

const loraSliders = () => [...document.querySelectorAll("[data-lora]")];

export function read() {
  const guidance = byId("guidance");
  const seed = byId("seed").value.trim();
  const fields = {
    prompt: byId("prompt").value, negative_prompt: byId("negative").value, model: byId("model").value || null,
    style: byId("style").value || null, sampler: byId("sampler").value, spacing: byId("spacing").value || null,
    steps: number("steps"), width: number("width"), height: number("height"), num_images: number("count") ?? 1, seed: seed || null,
    guidance_scale: guidance.value === guidance.min ? null : Number(guidance.value), more,
  };
  const on = loraSliders().filter((each) => Number(each.value) !== 0);
  return { ...fields, loras: Object.fromEntries(on.map((each) => [each.dataset.lora, Number(each.value)])) };
}

// A value that a slider's steps or a list do not have is added to them, so that nothing is changed in silence.
function put(id, value) {
  const field = byId(id);
  if (field.type === "range") {
    if (value > Number(field.max)) field.max = value;
    if (Number.isFinite(value)) field.step = Number.isInteger(value * 2) && id === "guidance" ? 0.5 : id === "steps" ? 1 : "any";
    field.value = value ?? field.min;
    tell(field);
    return;
  }
  if (field.tagName === "SELECT" && value && ![...field.options].some((each) => each.value === value)) field.append(option(value, value));
  field.value = value ?? "";
}

export function write(fields) {
  const ids = { prompt: "prompt", negative_prompt: "negative", style: "style", spacing: "spacing", width: "width", height: "height",
    seed: "seed", guidance_scale: "guidance" };
  for (const [name, id] of Object.entries(ids)) put(id, fields[name] ?? null);
  put("sampler", fields.sampler ?? "euler");
  put("steps", fields.steps ?? 20);
  put("count", fields.num_images ?? 1);
  if (fields.model) put("model", fields.model);
  if (fields.strength != null) put("strength", fields.strength);
  for (const slider of loraSliders()) {
    const wanted = fields.loras?.[slider.dataset.lora] ?? 0;
    slider.min = Math.min(slider.min, wanted);
    slider.max = Math.max(slider.max, wanted);
    slider.step = Number.isInteger(Math.round(wanted * 1e6) / 5e4) ? 0.05 : "any";
    slider.value = wanted;
    tell(slider);
  }
  if (Object.keys(fields.loras ?? {}).length) byId("loras-part").open = true;
  setMore(fields.more ?? {});
}

function setMore(found) {
  more = { ...found };
  byId("more").hidden = !Object.keys(more).length;
  byId("more").querySelector("ul").replaceChildren(...Object.entries(more).map(([name, value]) => {
    const text = `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`;
    const remove = element("button", { type: "button", ariaLabel: `Leave out ${text}`, onclick: () => {
      const { [name]: _, ...rest } = more;
      setMore(rest);
    } }, "×");
    return element("li", {}, text, remove);
  }));
}
