package dev.snapgen.core

import java.text.Normalizer

/**
 * Text to token ids by a `tokenizer.json` of the `tokenizers` library: byte-level BPE, as snapgen_jax trains it and as
 * CLIP has it. Another kind raises [BundleException] that names what is not known.
 */
class Tokenizer private constructor(
    private val normalize: (String) -> String,
    private val split: (String) -> List<String>,
    private val bpe: Bpe,
    private val added: List<Added>,
) {
    private class Added(val text: String, val id: Int)

    private var normalizedAdded = emptyList<Added>()

    /** Token ids without any around them. Raises [InputException] where the text holds half of a character. */
    fun encode(text: String): IntArray {
        requireText(text)
        val ids = ArrayList<Int>()
        for ((piece, id) in cut(text, added)) {
            if (id != null) ids += id else encodePiece(piece, ids)
        }
        return ids.toIntArray()
    }

    private fun encodePiece(piece: String, ids: MutableList<Int>) {
        for ((part, id) in cut(normalize(piece), normalizedAdded)) {
            if (id != null) ids += id else split(part).forEach { word -> bpe.encode(word, ids) }
        }
    }

    /** Ids and mask of one prompt in their frame: begin, ids, end, padding. One that is too long loses its last ids. */
    fun frame(prompt: String, frame: TokenizerSpec, length: Int): Pair<IntTensor, FloatTensor> {
        val room = length - frame.begin.size - frame.end.size
        val ids = frame.begin + encode(prompt).take(room) + frame.end
        val tokens = IntArray(length) { if (it < ids.size) ids[it] else frame.pad }
        val mask = FloatArray(length) { if (it < ids.size) 1f else 0f }
        return IntTensor(listOf(length), tokens) to FloatTensor(listOf(length), mask)
    }

    /** The text between added tokens, and those tokens with their ids; the longest of those that begin at a place. */
    private fun cut(text: String, tokens: List<Added>): List<Pair<String, Int?>> {
        if (tokens.isEmpty()) return listOf(text to null)
        val parts = ArrayList<Pair<String, Int?>>()
        var (from, at) = 0 to 0
        while (at < text.length) {
            val token = tokens.filter { text.startsWith(it.text, at) }.maxByOrNull { it.text.length }
            if (token == null) {
                at++
                continue
            }
            if (from < at) parts += text.substring(from, at) to null
            parts += token.text to token.id
            at += token.text.length
            from = at
        }
        if (from < text.length || parts.isEmpty()) parts += text.substring(from) to null
        return parts
    }

    companion object {
        /** Reads the contents of a `tokenizer.json`; [name] is that of the file, for messages. */
        fun read(text: String, name: String): Tokenizer {
            val data = Json.parseObject(text, name)
            val model = data.child("model")
            if (model.values["type"] != "BPE") unknown(model, "the model ${Json.kind(model.values["type"])}")
            val bpe = Bpe.read(model)
            val normalize = if (data.has("normalizer")) normalizer(data.child("normalizer")) else ({ it })
            val split = if (data.has("pre_tokenizer")) splitter(data.child("pre_tokenizer")) else ({ listOf(it) })
            val added = if (data.has("added_tokens")) data.objects("added_tokens") else emptyList()
            for (token in added) {
                for (flag in listOf("single_word", "lstrip", "rstrip")) {
                    if (token.flag(flag, false)) unknown(token, "an added token with $flag")
                }
            }
            val (late, early) = added.partition { it.flag("normalized", false) }
            val tokenizer = Tokenizer(normalize, split, bpe, early.map { it.asAdded() })
            tokenizer.normalizedAdded =
                late.map { Added(normalize(it.text("content")), it.int("id")) }.filter { it.text.isNotEmpty() }
            return tokenizer
        }

        private fun JsonObject.asAdded() = Added(text("content"), int("id"))

        /** Raises [InputException] where a text holds half of a character. */
        fun requireText(text: String) {
            var at = 0
            while (at < text.length) {
                val letter = text[at]
                val whole = letter.isHighSurrogate() && at + 1 < text.length && text[at + 1].isLowSurrogate()
                if (letter.isSurrogate() && !whole) {
                    throw InputException("the prompt is no text: it holds half of a character at place $at; use UTF-8")
                }
                at += if (whole) 2 else 1
            }
        }

        private fun normalizer(entry: JsonObject): (String) -> String =
            when (val type = entry.text("type")) {
                "Sequence" -> {
                    val all = entry.objects("normalizers").map { normalizer(it) };
                    { text -> all.fold(text) { made, next -> next(made) } }
                }
                "NFC", "NFD", "NFKC", "NFKD" -> fun(text) = Normalizer.normalize(text, Normalizer.Form.valueOf(type))
                "Lowercase" -> Unicode::lowercase
                "Replace" -> replace(entry)
                else -> unknown(entry, "the normalizer $type")
            }

        private fun replace(entry: JsonObject): (String) -> String {
            val (pattern, content) = entry.child("pattern") to entry.text("content")
            if ("String" in pattern) return pattern.text("String").let { from -> { it.replace(from, content) } }
            if (pattern.text("Regex") != "\\s+") unknown(entry, "the pattern ${pattern.text("Regex")}")
            return { Unicode.replaceSpaces(it, content) }
        }

        private fun splitter(entry: JsonObject): (String) -> List<String> =
            when (val type = entry.text("type")) {
                "Sequence" -> {
                    val all = entry.objects("pretokenizers").map { splitter(it) };
                    { text -> all.fold(listOf(text)) { pieces, next -> pieces.flatMap(next) } }
                }
                "ByteLevel" -> byteLevel(entry)
                "Split" -> {
                    if (entry.text("behavior") != "Removed" || !entry.flag("invert", false)) {
                        unknown(entry, "another Split")
                    }
                    WordPattern(entry.child("pattern").text("Regex"), entry)::findAll
                }
                else -> unknown(entry, "the pre-tokenizer $type")
            }

        private fun byteLevel(entry: JsonObject): (String) -> List<String> {
            val (prefix, pattern) = entry.flag("add_prefix_space", true) to entry.flag("use_regex", true)
            return { text ->
                val spaced = if (prefix && text != "" && !text.startsWith(' ')) " $text" else text
                (if (pattern) Words.ofGpt2(spaced) else listOf(spaced)).map { ByteLevel.encode(it) }
            }
        }

        internal fun unknown(entry: JsonObject, what: String): Nothing = throw BundleException(
            "${entry.where} is of a kind that this client does not know: $what. It knows byte-level BPE, as snapgen " +
                "trains it and as CLIP has it. Give the token ids themselves to Generator.run."
        )
    }
}
