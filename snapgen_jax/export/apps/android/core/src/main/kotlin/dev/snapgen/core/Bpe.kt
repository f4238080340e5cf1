package dev.snapgen.core

/** Byte-pair encoding: symbols of a word are merged in the order that the merges were learnt. */
internal class Bpe private constructor(
    private val vocab: Map<String, Int>,
    private val merges: Map<Long, Merge>,
    private val suffix: String,
    private val unknownId: Int?,
    private val fuseUnknown: Boolean,
    private val wholeWords: Boolean,
) {
    private class Merge(val rank: Int, val id: Int)

    /** Adds the ids of one word of byte-level letters. */
    fun encode(word: String, ids: MutableList<Int>) {
        if (word.isEmpty()) return
        if (wholeWords) vocab[word]?.let { ids += it; return }
        val symbols = symbols(word)
        var count = symbols.size
        val ranks = IntArray(count) { if (it + 1 < count) rank(symbols[it], symbols[it + 1]) else NEVER }
        while (true) {
            var best = 0
            for (i in 1 until count - 1) if (ranks[i] < ranks[best]) best = i // the first of equals
            if (count < 2 || ranks[best] == NEVER) break
            symbols[best] = merges.getValue(key(symbols[best], symbols[best + 1])).id
            System.arraycopy(symbols, best + 2, symbols, best + 1, count - best - 2)
            System.arraycopy(ranks, best + 2, ranks, best + 1, count - best - 2)
            count--
            ranks[count - 1] = NEVER
            if (best + 1 < count) ranks[best] = rank(symbols[best], symbols[best + 1])
            if (best > 0) ranks[best - 1] = rank(symbols[best - 1], symbols[best])
        }
        for (i in 0 until count) ids += symbols[i]
    }

    private fun symbols(word: String): IntArray {
        val found = ArrayList<Int>()
        var afterUnknown = false
        word.forEachIndexed { i, letter ->
            val id = vocab[if (i == word.length - 1) letter + suffix else letter.toString()]
            if (id != null) found += id else if (unknownId != null && !(fuseUnknown && afterUnknown)) found += unknownId
            afterUnknown = id == null
        }
        return found.toIntArray()
    }

    private fun rank(first: Int, second: Int): Int = merges[key(first, second)]?.rank ?: NEVER

    companion object {
        private const val NEVER = Int.MAX_VALUE

        private fun key(first: Int, second: Int): Long = (first.toLong() shl 32) or (second.toLong() and 0xFFFFFFFFL)

        fun read(model: JsonObject): Bpe {
            for (name in listOf("dropout", "continuing_subword_prefix")) {
                if (model.has(name) && model.values[name] !in listOf("", 0.0)) {
                    Tokenizer.unknown(model, "BPE with $name")
                }
            }
            if (model.flag("byte_fallback", false)) Tokenizer.unknown(model, "BPE with byte_fallback, as Gemma's")
            val entries = model.child("vocab")
            val vocab = HashMap<String, Int>(2 * entries.values.size)
            entries.values.forEach { (word, id) -> vocab[word as String] = (id as? Double)?.toInt()
                ?: model.fail("has a bad vocab") }
            val merges = HashMap<Long, Merge>()
            model.list("merges").forEachIndexed { rank, entry ->
                val (first, second) = pair(entry, model)
                fun id(word: String) = vocab[word] ?: model.fail("has the merge $first $second, and no word '$word'")
                merges.getOrPut(key(id(first), id(second))) { Merge(rank, id(first + second)) }
            }
            val unknown = if (model.has("unk_token")) vocab[model.text("unk_token")] else null
            val suffix = if (model.has("end_of_word_suffix")) model.text("end_of_word_suffix") else ""
            val (fuse, whole) = model.flag("fuse_unk", false) to model.flag("ignore_merges", false)
            return Bpe(vocab, merges, suffix, unknown, fuse, whole)
        }

        private fun pair(entry: Any?, model: JsonObject): Pair<String, String> {
            val parts = (entry as? List<*>) ?: (entry as? String)?.split(' ')
            if (parts == null || parts.size != 2) {
                model.fail("has the merge ${Json.kind(entry)}; two words were expected")
            }
            return parts[0] as String to parts[1] as String
        }
    }
}

/** Every byte of UTF-8 as one visible letter, as GPT-2 writes them. */
internal object ByteLevel {
    private val LETTERS = CharArray(256).also { letters ->
        var further = 256
        for (byte in 0..255) {
            val visible = byte in 0x21..0x7E || byte in 0xA1..0xAC || byte in 0xAE..0xFF
            letters[byte] = if (visible) byte.toChar() else (further++).toChar()
        }
    }

    fun encode(text: String): String {
        val bytes = text.toByteArray(Charsets.UTF_8)
        return String(CharArray(bytes.size) { LETTERS[bytes[it].toInt() and 0xFF] })
    }
}
