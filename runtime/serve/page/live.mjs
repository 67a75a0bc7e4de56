// The socket: it reconnects, and sends the newest request again if it was not answered.

const KEY = "turbochain-key";
const FIRST_PAUSE = 500; // ms before the first try to reconnect; each further pause is twice as long
const LONGEST_PAUSE = 8000;
const RETRIED = ["starting", "ending", "overloaded"]; // codes of errors that pass
const AGAIN = 1000; // ms after which such a request is sent again
const FULL = 2 ** 20; // bytes that a slow line has still to carry; a newer request waits until they are fewer
const HEAD = 16; // bytes before a picture's file

export class Live extends EventTarget {
  // Events: "about" (what the server is), "state" ({state: connecting, open or lost, text}), "key" (a key is wanted;
  // detail: whether one was refused), "picture" ({id, ms, skipped, drawn, encoded, file}) and "error" ({id, code,
  // message}).

  format = "image/jpeg"; // of the pictures to start from
  #socket = null;
  #pause = FIRST_PAUSE;
  #id = 0;
  #unanswered = null; // the newest request
  #again = 0;

  get key() {
    return sessionStorage.getItem(KEY);
  }

  async connect() {
    this.#state("connecting", "Connecting");
    let answer;
    try {
      const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
      answer = await fetch(new URL("about", document.baseURI), { headers, cache: "no-store" });
      if (answer.status === 401) {
        this.#tell("key", Boolean(this.key));
        return;
      }
      if (!answer.ok) throw new Error(answer.statusText);
      this.#tell("about", await answer.json());
    } catch {
      this.#later();
      return;
    }
    this.#open();
  }

  useKey(key) {
    sessionStorage.setItem(KEY, key);
    return this.connect();
  }

  // Send a request, {prompt, seed, …}; `image`, `control`: the bytes of the files of a picture to start from, and of
  // one to follow. Returns its id, which grows.
  send(request, image = null, control = null) {
    this.#unanswered = { id: ++this.#id, request, image, control };
    this.#transmit();
    return this.#id;
  }

  get waiting() {
    return this.#unanswered !== null;
  }

  #open() {
    const address = new URL("ws", document.baseURI);
    address.protocol = address.protocol.replace("http", "ws");
    const protocols = this.key ? ["turbochain", `key.${base64url(this.key)}`] : ["turbochain"];
    const socket = new WebSocket(address, protocols);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.#socket = socket;
      this.#pause = FIRST_PAUSE;
      this.#state("open", "Connected");
      this.#transmit();
    };
    socket.onclose = () => {
      this.#socket = null;
      this.#later();
    };
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.#failed(JSON.parse(data)) : this.#drawn(data));
  }

  #later() {
    this.#state("lost", "Reconnecting");
    setTimeout(() => this.connect(), this.#pause * (0.75 + Math.random() / 2));
    this.#pause = Math.min(2 * this.#pause, LONGEST_PAUSE);
  }

  #transmit() {
    clearTimeout(this.#again);
    if (this.#socket?.readyState !== WebSocket.OPEN || !this.#unanswered) return;
    if (this.#socket.bufferedAmount > FULL) {
      this.#again = setTimeout(() => this.#transmit(), 20);
      return;
    }
    const { id, request, image, control } = this.#unanswered;
    const text = JSON.stringify({ id, ...request, ...(control ? { control_bytes: control.length } : {}) });
    this.#unanswered.sent = performance.now();
    this.#socket.send(image || control ? withFiles(text, [image, control].filter(Boolean)) : text);
  }

  #drawn(data) {
    const head = new DataView(data, 0, HEAD);
    const id = head.getUint32(0, true);
    const ms = this.#settle(id);
    this.#tell("picture", {
      id,
      ms, // null for an answer to a request that is not the newest
      skipped: head.getUint32(4, true),
      drawn: head.getFloat32(8, true),
      encoded: head.getFloat32(12, true),
      file: new Blob([new Uint8Array(data, HEAD)], { type: "image/jpeg" }),
    });
  }

  #failed({ id, error }) {
    if (RETRIED.includes(error.code) && id === this.#id) {
      this.#again = setTimeout(() => this.#transmit(), AGAIN);
    } else {
      this.#settle(id);
    }
    this.#tell("error", { id, code: error.code, message: error.message });
  }

  #settle(id) {
    if (this.#unanswered?.id !== id) return null;
    const ms = performance.now() - this.#unanswered.sent;
    this.#unanswered = null;
    return ms;
  }

  #state(state, text) {
    this.#tell("state", { state, text });
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

// A binary message: the length of its JSON, the JSON, and the pictures' files.
function withFiles(text, files) {
  const parts = [new TextEncoder().encode(text), ...files];
  const message = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 4));
  new DataView(message.buffer).setUint32(0, parts[0].length, true);
  let at = 4;
  for (const part of parts) {
    message.set(part, at);
    at += part.length;
  }
  return message;
}

function base64url(text) {
  const bytes = String.fromCharCode(...new TextEncoder().encode(text));
  return btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}
