// Token ids of a prompt, by a tokenizer.json of the `tokenizers` library: byte-level BPE, as snapgen_jax trains it and
// as CLIP has it. What another kind needs is refused by name.

import { BundleError, InputError, NDArray } from "./arrays.js";

const GPT2 =
  / ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/u;
const BYTE_LEVEL = new RegExp(`'s|'t|'re|'ve|'m|'ll|'d|${GPT2.source}`, "gu");
const FORMS = ["NFC", "NFD", "NFKC", "NFKD"];

/** What makes ids of a text. */
export class Tokenizer {
  #file;
  #vocab;
  #ranks;
  #model;
  #added;
  #normalize;
  #split;
  #words = new Map();

  /** `data`: the contents of the file; `file` names it in errors. */
  constructor(data, file = "tokenizer.json") {
    this.#file = file;
    const model = data.model ?? {};
    if (model.type !== "BPE" || model.byte_fallback) this.#refuse(`a ${model.type} model`);
    if (model.dropout || model.continuing_subword_prefix || model.fuse_unk) this.#refuse("such a BPE model");
    this.#model = model;
    this.#vocab = new Map(Object.entries(model.vocab));
    const merges = model.merges.map((pair) => (typeof pair === "string" ? pair.split(" ") : pair));
    this.#ranks = new Map(merges.map((pair, rank) => [pair.join(" "), rank]));
    this.#added = new Map((data.added_tokens ?? []).map((token) => [token.content, token.id]));
    for (const token of data.added_tokens ?? []) {
      if (token.single_word || token.lstrip || token.rstrip || token.normalized) {
        this.#refuse(`the added token ${token.content}, which takes more than its own letters`);
      }
    }
    this.#normalize = this.#normalizer(data.normalizer);
    this.#split = this.#preTokenizer(data.pre_tokenizer);
  }

  /** The ids of a text, without any that frame it. Throws `InputError` where it holds half of a character. */
  encode(text) {
    if (/\p{Surrogate}/u.test(text)) {
      throw new InputError("the prompt holds half of a character, which is no text; write it again");
    }
    const ids = [];
    for (const [piece, id] of this.#withoutAdded(text)) {
      if (id !== undefined) ids.push(id);
      else for (const word of this.#split([this.#normalize(piece)])) ids.push(...this.#word(word));
    }
    return ids;
  }

  #refuse(what) {
    throw new BundleError(
      `${this.#file} has ${what}; this page reads byte-level BPE as snapgen_jax and CLIP have it`,
    );
  }

  /** [text, id]: the pieces of a text; of an added token, which stands for itself, with its id. */
  *#withoutAdded(text) {
    const escaped = [...this.#added.keys()].sort((a, b) => b.length - a.length).map(escapeRegExp);
    if (!escaped.length) {
      if (text) yield [text];
      return;
    }
    for (const piece of text.split(new RegExp(`(${escaped.join("|")})`, "u"))) {
      if (piece) yield [piece, this.#added.get(piece)];
    }
  }

  #normalizer(spec) {
    if (!spec) return (text) => text;
    if (spec.type === "Sequence") {
      const parts = spec.normalizers.map((part) => this.#normalizer(part));
      return (text) => parts.reduce((made, part) => part(made), text);
    }
    if (FORMS.includes(spec.type)) return (text) => text.normalize(spec.type);
    // Letter by letter: of a whole word, JavaScript would write the last sigma in another way.
    if (spec.type === "Lowercase") return (text) => Array.from(text, (letter) => letter.toLowerCase()).join("");
    if (spec.type === "Replace") {
      const pattern = this.#pattern(spec.pattern);
      return (text) => text.replace(pattern, () => spec.content);
    }
    return this.#refuse(`a ${spec.type} normalizer`);
  }

  /** A function of a list of texts to the list of their words, as the characters that stand for bytes. */
  #preTokenizer(spec) {
    if (spec?.type === "Sequence") {
      const parts = spec.pretokenizers.map((part) => this.#preTokenizer(part));
      return (texts) => parts.reduce((made, part) => part(made), texts);
    }
    if (spec?.type === "ByteLevel") {
      return (texts) =>
        texts.flatMap((text) => {
          const whole = spec.add_prefix_space && text && !text.startsWith(" ") ? ` ${text}` : text;
          return (spec.use_regex === false ? [whole] : (whole.match(BYTE_LEVEL) ?? [])).map(asBytes);
        });
    }
    if (spec?.type === "Split" && ["Removed", "Isolated"].includes(spec.behavior)) {
      const pattern = this.#pattern(spec.pattern);
      if (spec.behavior === "Removed" && spec.invert)
        return (texts) => texts.flatMap((text) => text.match(pattern) ?? []);
      const kept = spec.behavior === "Isolated" ? new RegExp(`(${pattern.source})`, "gu") : pattern;
      return (texts) => texts.flatMap((text) => text.split(kept).filter(Boolean));
    }
    return this.#refuse(`a ${spec?.type} pre-tokenizer`);
  }

  /** A pattern of the file as one of JavaScript, in which white space is what Unicode says. */
  #pattern({ String: text, Regex: regex }) {
    const source = regex?.replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}");
    try {
      return new RegExp(source ?? escapeRegExp(text), "gu");
    } catch {
      return this.#refuse(`the pattern ${regex}`);
    }
  }

  /** The ids of one word: the pair of the lowest rank is joined, the first of several, until none is left. */
  #word(word) {
    let ids = this.#words.get(word);
    if (ids) return ids;
    const { ignore_merges: whole, end_of_word_suffix: suffix, unk_token: unknown } = this.#model;
    const parts = Array.from(word);
    if (suffix) parts[parts.length - 1] += suffix;
    if (whole && this.#vocab.has(word)) parts.splice(0, parts.length, word);
    for (;;) {
      let [best, place] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.#ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) [best, place] = [rank, i];
      }
      if (place < 0) break;
      parts.splice(place, 2, parts[place] + parts[place + 1]);
    }
    ids = parts.map((part) => this.#vocab.get(part) ?? this.#vocab.get(unknown)).filter((id) => id !== undefined);
    this.#words.set(word, ids);
    return ids;
  }
}

/**
 * What an entry of program.json's `tokenizers` makes of a text: {tokens: int32 [L], mask: float32 [L], lost}. A text
 * that is too long loses its last ids, not those of `end`; `lost` counts them.
 */
export function frame(tokenizer, text, { begin, end, pad, length }) {
  const room = length - begin.length - end.length;
  const found = tokenizer.encode(text);
  const ids = [...begin, ...found.slice(0, room), ...end];
  return {
    tokens: new NDArray(
      Int32Array.from({ length }, (_, i) => ids[i] ?? pad),
      [length],
    ),
    mask: new NDArray(
      Float32Array.from({ length }, (_, i) => (i < ids.length ? 1 : 0)),
      [length],
    ),
    lost: Math.max(0, found.length - room),
  };
}

/** Each byte of a text in UTF-8 as the character that stands for it: itself where it can be seen, else from 256 on. */
function asBytes(text) {
  return Array.from(new TextEncoder().encode(text), (byte) => BYTES[byte]).join("");
}

const BYTES = (() => {
  const seen = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let others = 0;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(seen(byte) ? byte : 256 + others++));
})();

function escapeRegExp(text) {
  return text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
}
