// The bundle's files: fetched from beside the page, held to the manifest's sizes and checksums, and kept in the
// browser's cache by their checksum, so that a changed file is fetched anew.

import { BundleError } from "./arrays.js";
import { readNpy } from "./npy.js";

const CACHE = "snapgen-bundle";

export class Files {
  /** `base`: URL of the bundle's folder, with "/" at its end. */
  constructor(base) {
    this.base = base;
    this.listed = null;
  }

  /** From then on, every file is held to its entry of `listed`, {name: {bytes, sha256}}. */
  hold(listed) {
    this.listed = listed;
  }

  has(name) {
    return this.listed !== null && name in this.listed;
  }

  /** The bytes of a file; `report(bytes)` is told of each piece that arrives. Throws `BundleError` that names it. */
  async bytes(name, report = () => {}) {
    if (name.startsWith("/") || name.includes("\\") || name.includes(":") || name.split("/").includes("..")) {
      throw new BundleError(`the file name ${JSON.stringify(name)} leads out of the bundle`);
    }
    const expected = this.listed?.[name];
    if (this.listed && !expected) throw new BundleError(`the bundle's manifest lists no file ${name}`);
    const kept = expected && (await this.#kept(name, expected));
    if (kept) {
      report(kept.length);
      return kept;
    }
    const bytes = await this.#fetch(name, expected, report);
    if (!expected) return bytes;
    const digest = await sha256(bytes);
    if (bytes.length !== expected.bytes || (digest && digest !== expected.sha256)) {
      throw new BundleError(
        `${name} is not the file that the bundle was written with (${bytes.length} of ${expected.bytes} bytes); ` +
          "copy the bundle again, whole",
      );
    }
    await this.#keep(name, expected, bytes);
    return bytes;
  }

  /** The contents of a JSON file, an object. */
  async json(name) {
    const text = new TextDecoder().decode(await this.bytes(name));
    let data = null;
    try {
      data = JSON.parse(text);
    } catch (error) {
      throw new BundleError(`${name} is not readable JSON: ${error.message}`);
    }
    if (typeof data !== "object" || data === null || Array.isArray(data)) {
      throw new BundleError(`${name} holds no object`);
    }
    return data;
  }

  /** One golden array. */
  async golden(name) {
    const file = `golden/${name}.npy`;
    return readNpy(await this.bytes(file), file);
  }

  /** Removes what the cache holds of files that the bundle no longer has. */
  async forgetOthers() {
    if (!globalThis.caches || !this.listed) return;
    try {
      const cache = await caches.open(CACHE);
      const current = new Set(
        Object.entries(this.listed).map(([name, { sha256: digest }]) => this.#key(name, digest)),
      );
      for (const { url } of await cache.keys()) {
        if (url.startsWith(this.base) && !current.has(url)) await cache.delete(url);
      }
    } catch {
      // A cache that fails is no cache.
    }
  }

  async #fetch(name, expected, report) {
    // Servers tell times by the second, so a file written twice in one would look unchanged to the browser's cache of
    // HTTP. It is asked only for large files where there is no other cache.
    const cache = expected && !globalThis.caches ? "no-cache" : "no-store";
    let response = null;
    try {
      response = await fetch(this.base + name, { cache, credentials: "same-origin" });
    } catch {
      throw new BundleError(`${name} could not be fetched; is the server that this page came from still running?`);
    }
    if (!response.ok) throw new BundleError(`the bundle has no file ${name} (the server says ${response.status})`);
    if (!expected || !response.body) return new Uint8Array(await response.arrayBuffer());
    const bytes = new Uint8Array(expected.bytes);
    let length = 0;
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read().catch(() => {
        throw new BundleError(`the connection broke after ${length} of ${expected.bytes} bytes of ${name}`);
      });
      if (done) return bytes.subarray(0, Math.min(length, bytes.length));
      if (length + value.length <= bytes.length) bytes.set(value, length);
      length += value.length;
      if (length > bytes.length) return new Uint8Array(length); // too long: its checksum will say so
      report(value.length);
    }
  }

  #key(name, digest) {
    return `${this.base}${name}?sha256=${digest}`;
  }

  async #kept(name, { bytes, sha256: digest }) {
    if (!globalThis.caches) return null;
    try {
      const found = await (await caches.open(CACHE)).match(this.#key(name, digest));
      const data = found && new Uint8Array(await found.arrayBuffer());
      return data?.length === bytes ? data : null;
    } catch {
      return null;
    }
  }

  async #keep(name, { sha256: digest }, bytes) {
    if (!globalThis.caches) return;
    try {
      await (await caches.open(CACHE)).put(this.#key(name, digest), new Response(bytes));
    } catch {
      // No room: it is fetched again next time.
    }
  }
}

/** In hexadecimal; "" where the browser has none, as on a page that came by plain http from another machine. */
async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) return "";
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
