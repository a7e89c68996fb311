// Questions to the server: JSON, and drawings as server-sent events.  The key is kept for this tab alone.

const KEY = "minisd-key";

export class Refused extends Error {}

// One dialog, however many questions wait for the key.
let asking = null;

function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key");
    const value = document.getElementById("key-value");
    document.getElementById("key-wrong").textContent = wrong ? "That is not this server’s key." : "";
    dialog.oncancel = (event) => event.preventDefault();
    document.getElementById("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, value.value);
      value.value = "";
      dialog.close();
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}

function request(body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body === undefined) return { headers, signal };
  headers["Content-Type"] = "application/json";
  return { method: "POST", body: JSON.stringify(body), headers, signal };
}

async function reach(path, body, signal) {
  for (;;) {
    let answer;
    try {
      answer = await fetch(path, request(body, signal));
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The server does not answer. Is minisd serve still running?");
    }
    if (answer.status !== 401) return answer;
    await askForKey(sessionStorage.getItem(KEY) !== null);
  }
}

async function checked(answer) {
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  const first = Array.isArray(said.detail) ? said.detail[0] : null;
  const where = first?.loc?.at(-1);
  const text = first ? (first.msg.startsWith(where) ? first.msg : `${where}: ${first.msg}`) : said.message;
  const again = answer.headers.get("Retry-After");
  throw new Refused(`${text ?? `The server answered ${answer.status}.`}${again ? ` Try again in ${again} s.` : ""}`);
}

export async function ask(path, body) {
  return (await checked(await reach(path, body))).json();
}

// Calls heard[event](data) for each event; ends with the stream.
export async function listen(path, body, signal, heard) {
  const answer = await checked(await reach(path, body, signal));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", ended = false;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const [event, data] = part.split("\n").map((line) => line.slice(line.indexOf(": ") + 2));
      if (event === "error") throw new Refused(JSON.parse(data).message);
      ended = event === "done";
      heard[event]?.(JSON.parse(data));
    }
  }
  if (!ended) throw new Refused("The server ended before the picture was finished.");
}
