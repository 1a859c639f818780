/** The text/event-stream format, byte by byte as it comes. */

export interface Message {
  id: string | null;
  /** Null where only the id is said: how far the stream is. */
  data: string | null;
}

/** Feed it text in any pieces; it gives whole messages and tells of the server's `retry`. */
export class EventStreamParser {
  #rest = "";
  #data: string[] = [];
  #id: string | null = null;
  retryMilliseconds = 2000;

  push(text: string): Message[] {
    const messages: Message[] = [];
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop() ?? "";
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line === "") {
        const data = this.#data.length > 0 ? this.#data.join("\n") : null;
        if (data !== null || this.#id !== null) messages.push({ id: this.#id, data });
        this.#data = [];
        this.#id = null;
      } else if (!line.startsWith(":")) {
        this.#field(line);
      }
    }
    return messages;
  }

  #field(line: string): void {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    else if (name === "id") this.#id = value;
    else if (name === "retry" && /^\d+$/.test(value)) this.retryMilliseconds = Number(value);
  }
}
