package dev.snapgen.core

/** Classes of characters by code point. They are those of the platform's Unicode version. */
internal object Unicode {
    /** The property White_Space, which `\s` means to the tokenizers library. */
    fun isSpace(point: Int): Boolean = when (point) {
        in 0x09..0x0D, 0x20, 0x85, 0xA0, 0x1680, in 0x2000..0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000 -> true
        else -> false
    }

    fun isLetter(point: Int): Boolean = when (Character.getType(point).toByte()) {
        Character.UPPERCASE_LETTER, Character.LOWERCASE_LETTER, Character.TITLECASE_LETTER, Character.MODIFIER_LETTER,
        Character.OTHER_LETTER -> true
        else -> false
    }

    fun isNumber(point: Int): Boolean = when (Character.getType(point).toByte()) {
        Character.DECIMAL_DIGIT_NUMBER, Character.LETTER_NUMBER, Character.OTHER_NUMBER -> true
        else -> false
    }

    /** Each character by itself: the language does not matter, nor does a sigma's place in its word. */
    fun lowercase(text: String): String {
        val built = StringBuilder(text.length)
        var at = 0
        while (at < text.length) {
            val point = text.codePointAt(at)
            if (point == 0x130) built.append("i\u0307") else built.appendCodePoint(Character.toLowerCase(point))
            at += Character.charCount(point)
        }
        return built.toString()
    }

    /** The text with every run of spaces as [content]. */
    fun replaceSpaces(text: String, content: String): String {
        val built = StringBuilder(text.length)
        var inside = false
        for (letter in text) { // no space lies outside the first plane
            val space = isSpace(letter.code)
            if (!space) built.append(letter) else if (!inside) built.append(content)
            inside = space
        }
        return built.toString()
    }
}

/** Where a text is cut into words. */
internal object Words {
    val CONTRACTIONS = listOf("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")

    /** GPT-2's rule: contractions; letters, digits or others, each with one space before it; and spaces. */
    fun ofGpt2(text: String): List<String> {
        val words = ArrayList<String>()
        var at = 0
        while (at < text.length) {
            val end = gpt2End(text, at)
            words += text.substring(at, end)
            at = end
        }
        return words
    }

    private fun gpt2End(text: String, at: Int): Int {
        CONTRACTIONS.firstOrNull { text.startsWith(it, at) }?.let { return at + it.length }
        val from = if (text[at] == ' ') at + 1 else at
        for (belongs in listOf(Unicode::isLetter, Unicode::isNumber, ::isOther)) {
            val end = run(text, from, belongs)
            if (end > from) return end
        }
        val end = run(text, at, Unicode::isSpace)
        return if (end == text.length || end == at + 1) end else end - 1 // the last space goes to the word that follows
    }

    fun isOther(point: Int): Boolean = !Unicode.isSpace(point) && !Unicode.isLetter(point) && !Unicode.isNumber(point)

    /** Where a run of characters ends that begins at a place. */
    fun run(text: String, from: Int, belongs: (Int) -> Boolean): Int {
        var at = from
        while (at < text.length) {
            val point = text.codePointAt(at)
            if (!belongs(point)) break
            at += Character.charCount(point)
        }
        return at
    }
}

/** A pattern of alternatives as CLIP's tokenizer has it: literal texts, letters, a digit, others. */
internal class WordPattern(pattern: String, entry: JsonObject) {
    private val alternatives: List<(String, Int) -> Int> = pattern.split(BAR).map { part ->
        when (part) {
            "[\\p{L}]+", "\\p{L}+" -> { text, at -> Words.run(text, at, Unicode::isLetter) }
            "[^\\s\\p{L}\\p{N}]+" -> { text, at -> Words.run(text, at, Words::isOther) }
            "[\\p{N}]", "\\p{N}" -> { text, at ->
                val point = text.codePointAt(at)
                if (Unicode.isNumber(point)) at + Character.charCount(point) else at
            }
            else -> {
                val word = literal(part, pattern, entry);
                { text, at -> if (text.startsWith(word, at)) at + word.length else at }
            }
        }
    }

    /** All matches, from left to right; what lies between them is left out. */
    fun findAll(text: String): List<String> {
        val words = ArrayList<String>()
        var at = 0
        while (at < text.length) {
            val end = alternatives.firstNotNullOfOrNull { find -> find(text, at).takeIf { it > at } }
            if (end != null) words += text.substring(at, end)
            at = end ?: (at + Character.charCount(text.codePointAt(at)))
        }
        return words
    }

    private companion object {
        val BAR = Regex("(?<!\\\\)\\|")
        val META = Regex("[\\\\\\[\\](){}.*+?^$|]")

        fun literal(part: String, pattern: String, entry: JsonObject): String {
            val plain = part.replace("\\|", "|")
            if (plain.isEmpty() || META.containsMatchIn(plain.replace("|", ""))) {
                Tokenizer.unknown(entry, "the pattern $pattern")
            }
            return plain
        }
    }
}
