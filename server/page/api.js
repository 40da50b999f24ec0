// What the page asks of the server: JSON calls, and the stream of an answer. The key stays in this tab.

let askForKey = async () => {};

export function onKeyWanted(ask) {
  askForKey = ask;
}

// Addresses are relative to the page, so that it also works below a proxy's prefix.
async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server does not answer.");
    });
    if (response.status === 401) await askForKey(key);
    else if (response.ok) return response;
    else throw Object.assign(new Error(await message(response)), { status: response.status });
  }
}

async function message(response) {
  const body = await response.json().catch(() => ({}));
  const wait = response.headers.get("Retry-After");
  return `${body.error?.message ?? `The server says ${response.status}`}${wait ? ` (try again in ${wait} s)` : ""}`;
}

export const get = async (path) => (await call(path)).json();

export const setSparsity = (id, sparsity) =>
  call(`v1/requests/${encodeURIComponent(id)}`, { method: "PATCH", body: JSON.stringify({ sparsity }) });

// The chunks of an answer. `signal` ends it; the server hears of that within one token.
export async function* chat(body, signal) {
  const stream_options = { include_usage: true, sparsity: true };
  const asked = JSON.stringify({ ...body, stream: true, stream_options });
  const response = await call("v1/chat/completions", { method: "POST", body: asked, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer was cut off.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
