// The picture to start from, and the mask that is painted on it.

const byId = (id) => document.getElementById(id);
const canvas = byId("mask");
const MOST = 1024; // pixels of the mask's longer side; the server scales it to the picture
let file = null, painted = false, at = null, last = null;

export async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}

export async function begin(blob) {
  const image = byId("start-image");
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  await image.decode();
  const scale = Math.min(1, MOST / Math.max(image.naturalWidth, image.naturalHeight));
  canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
  file = blob;
  clear();
  shown(true);
}

export function remove() {
  file = null;
  byId("start").value = "";
  shown(false);
}

function shown(on) {
  byId("start-shown").hidden = !on;
  byId("start-pick").hidden = on;
  byId("start-on").textContent = on ? "on" : "";
  if (on) byId("start-part").open = true;
}

function clear() {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  painted = false;
  at = [canvas.width / 2, canvas.height / 2];
}

const brush = () => (Number(byId("brush").value) / 100) * Math.max(canvas.width, canvas.height);

function stroke(x, y) {
  const ink = canvas.getContext("2d");
  ink.strokeStyle = getComputedStyle(canvas).color;
  ink.lineWidth = brush();
  ink.lineCap = ink.lineJoin = "round";
  ink.beginPath();
  ink.moveTo(...(last ?? [x, y]));
  ink.lineTo(x, y);
  ink.stroke();
  last = at = [x, y];
  painted = true;
}

// Where the brush is, for who moves it by the keyboard.
function point() {
  const mark = byId("brush-at");
  const width = (brush() / canvas.width) * canvas.clientWidth;
  Object.assign(mark.style, { left: `${(at[0] / canvas.width) * 100}%`, top: `${(at[1] / canvas.height) * 100}%`, width: `${width}px`, height: `${width}px` });
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  last = null;
  stroke(...place(event));
});
canvas.addEventListener("pointermove", (event) => {
  if (event.buttons) stroke(...place(event));
});
canvas.addEventListener("keydown", (event) => {
  const step = Math.max(canvas.width, canvas.height) / 32;
  const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step], " ": [0, 0] }[event.key];
  if (!way) return;
  event.preventDefault();
  at = [Math.min(canvas.width, Math.max(0, at[0] + way[0])), Math.min(canvas.height, Math.max(0, at[1] + way[1]))];
  last = null;
  if (event.key === " " || event.shiftKey) stroke(...at);
  point();
});
canvas.addEventListener("focus", point);
byId("mask-clear").addEventListener("click", clear);
byId("start-remove").addEventListener("click", remove);

// White where it is painted, black elsewhere.
async function maskPng() {
  const copy = new OffscreenCanvas(canvas.width, canvas.height);
  const ink = copy.getContext("2d");
  ink.drawImage(canvas, 0, 0);
  const pixels = ink.getImageData(0, 0, copy.width, copy.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.fill(pixels.data[i + 3] > 127 ? 255 : 0, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  ink.putImageData(pixels, 0, 0);
  return copy.convertToBlob({ type: "image/png" });
}

export async function startFields() {
  if (!file) return {};
  const fields = { init_image: await base64(file), strength: Number(byId("strength").value) };
  return painted ? { ...fields, mask: await base64(await maskPng()) } : fields;
}
