package dev.snapgen.core

/** A JSON document as Map, List, String, Double, Boolean and null. */
object Json {
    private const val DEEPEST = 64

    /** Parses one document; [name] is that of the file, for messages. Raises [BundleException] where it is not JSON. */
    fun parse(text: String, name: String): Any? {
        val reader = Reader(text.removePrefix("\uFEFF"), name)
        val value = reader.value(0)
        reader.end()
        return value
    }

    /** The same, of a document that must be an object. */
    fun parseObject(text: String, name: String): JsonObject = when (val value = parse(text, name)) {
        is Map<*, *> -> JsonObject(value, name)
        else -> throw BundleException("$name holds ${kind(value)}; an object was expected")
    }

    internal fun kind(value: Any?): String = when (value) {
        null -> "null"
        is Map<*, *> -> "an object"
        is List<*> -> "a list"
        is String -> "the text \"${value.take(40)}\""
        else -> "$value"
    }

    private class Reader(private val text: String, private val name: String) {
        private var at = 0

        fun value(depth: Int): Any? {
            if (depth > DEEPEST) fail("nested more than $DEEPEST deep")
            space()
            return when (peek()) {
                '{' -> members(depth)
                '[' -> items(depth)
                '"' -> string()
                't' -> word("true", true)
                'f' -> word("false", false)
                'n' -> word("null", null)
                else -> number()
            }
        }

        fun end() {
            space()
            if (at < text.length) fail("text after the end")
        }

        private fun members(depth: Int): Map<String, Any?> {
            val found = LinkedHashMap<String, Any?>()
            at++
            space()
            if (peek() == '}') return found.also { at++ }
            while (true) {
                space()
                if (peek() != '"') fail("a name was expected")
                val key = string()
                space()
                expect(':')
                found[key] = value(depth + 1)
                space()
                if (peek() == '}') return found.also { at++ }
                expect(',')
            }
        }

        private fun items(depth: Int): List<Any?> {
            val found = ArrayList<Any?>()
            at++
            space()
            if (peek() == ']') return found.also { at++ }
            while (true) {
                found.add(value(depth + 1))
                space()
                if (peek() == ']') return found.also { at++ }
                expect(',')
            }
        }

        private fun string(): String {
            val built = StringBuilder()
            at++
            while (true) {
                when (val letter = next()) {
                    '"' -> return built.toString()
                    '\\' -> built.append(escape())
                    else -> if (letter < ' ') fail("a control character in a text") else built.append(letter)
                }
            }
        }

        private fun escape(): Char = when (val letter = next()) {
            '"', '\\', '/' -> letter
            'b' -> '\b'
            'f' -> '\u000C'
            'n' -> '\n'
            'r' -> '\r'
            't' -> '\t'
            'u' -> {
                val digits = text.substring(at, minOf(at + 4, text.length))
                at += digits.length
                if (digits.length < 4 || digits.any { Character.digit(it, 16) < 0 || it > 'f' }) {
                    fail("a bad \\u escape")
                }
                digits.toInt(16).toChar()
            }
            else -> fail("the escape \\$letter")
        }

        private fun number(): Double {
            val start = at
            while (at < text.length && text[at] in "+-.0123456789eE") at++
            val found = text.substring(start, at)
            if (!NUMBER.matches(found)) {
                at = start
                fail("a value was expected")
            }
            return found.toDouble()
        }

        private fun word(word: String, value: Any?): Any? {
            if (!text.startsWith(word, at)) fail("a value was expected")
            at += word.length
            return value
        }

        private fun space() {
            while (at < text.length && text[at] in " \t\r\n") at++
        }

        private fun peek(): Char = if (at < text.length) text[at] else fail("it ends too early")

        private fun next(): Char = peek().also { at++ }

        private fun expect(letter: Char) {
            if (next() != letter) {
                at--
                fail("'$letter' was expected")
            }
        }

        private fun fail(why: String): Nothing {
            val line = text.take(at).count { it == '\n' } + 1
            throw BundleException("$name is not readable JSON: $why (line $line, character $at)")
        }
    }

    private val NUMBER = Regex("-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?")
}

/** An object of a JSON document; [where] names it in messages. */
class JsonObject(val values: Map<*, *>, val where: String) {
    val keys: Set<String> get() = values.keys.mapTo(LinkedHashSet()) { it as String }

    operator fun contains(key: String): Boolean = key in values

    /** Whether the key is there with something else than null. */
    fun has(key: String): Boolean = values[key] != null

    fun any(key: String): Any? = if (key in values) values[key] else fail("lacks $key")

    fun text(key: String): String = any(key) as? String ?: expected(key, "a text")

    fun number(key: String): Double = any(key) as? Double ?: expected(key, "a number")

    fun flag(key: String, default: Boolean): Boolean =
        if (has(key)) any(key) as? Boolean ?: expected(key, "true or false") else default

    fun int(key: String): Int = number(key).let {
        if (it == Math.rint(it) && Math.abs(it) <= Int.MAX_VALUE) it.toInt() else expected(key, "a whole number")
    }

    fun long(key: String): Long = number(key).let {
        if (it == Math.rint(it) && Math.abs(it) < MOST_EXACT) it.toLong() else expected(key, "a whole number")
    }

    fun list(key: String): List<*> = any(key) as? List<*> ?: expected(key, "a list")

    fun ints(key: String): List<Int> = list(key).map {
        if (it is Double && it == Math.rint(it) && Math.abs(it) <= Int.MAX_VALUE) it.toInt()
        else expected(key, "a list of whole numbers")
    }

    fun texts(key: String): List<String> = list(key).map { it as? String ?: expected(key, "a list of texts") }

    fun child(key: String): JsonObject = JsonObject(any(key) as? Map<*, *>
        ?: expected(key, "an object"), "$where: $key")

    /** The entries of an object whose values are objects. */
    fun children(): Map<String, JsonObject> = keys.associateWith { child(it) }

    /** The entries of a list of objects. */
    fun objects(key: String): List<JsonObject> = list(key).mapIndexed { i, entry ->
        JsonObject(entry as? Map<*, *> ?: expected(key, "a list of objects"), "$where: $key[$i]")
    }

    /** Raises [BundleException] where a needed key is missing, or one that nobody knows is there. */
    fun known(needed: List<String>, optional: List<String> = emptyList()): JsonObject {
        val missing = needed.filter { it !in values }
        if (missing.isNotEmpty()) fail("lacks ${missing.joinToString()}")
        val unknown = keys.filter { it !in needed && it !in optional }
        if (unknown.isNotEmpty()) {
            fail("has ${unknown.joinToString()}; this client knows ${(needed + optional).joinToString()}")
        }
        return this
    }

    fun fail(why: String): Nothing = throw BundleException("$where $why")

    private fun expected(key: String, what: String): Nothing =
        throw BundleException("$where: $key is ${Json.kind(values[key])}; $what was expected")

    private companion object {
        const val MOST_EXACT = 9007199254740992.0 // 2^53
    }
}
