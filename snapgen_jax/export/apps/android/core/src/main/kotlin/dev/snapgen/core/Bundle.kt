package dev.snapgen.core

import java.io.File
import java.io.IOException
import java.security.MessageDigest

/**
 * A bundle's folder: its manifest, its program, and its files by name. No name leads out of the folder.
 *
 * Opening it compares the size of every file, which is quick and finds a copy that ended early; [checkDigests] reads
 * them all. Raises [BundleException] that says what is wrong.
 */
class Bundle(val folder: File) {
    val manifest: JsonObject
    val program: Program

    /** What golden.json says of the golden examples; null where the bundle has none. */
    val golden: JsonObject?

    init {
        if (!File(folder, "manifest.json").isFile) {
            throw BundleException("$folder holds no manifest.json, so it is not an export bundle")
        }
        manifest = json("manifest.json")
        checkSchema()
        for (key in listOf("precisions", "units", "files")) manifest.any(key)
        checkSizes()
        program = ProgramReader.read(json("program.json").let { JsonObject(it.values, "program.json") })
        val missing = program.units() - manifest.child("units").keys
        if (missing.isNotEmpty()) {
            throw BundleException("manifest.json does not describe the units ${missing.joinToString()}")
        }
        golden = if (File(folder, "golden/golden.json").isFile) json("golden/golden.json") else null
    }

    /** Its name, where the manifest has one. */
    val name: String get() = if (manifest.has("model")) manifest.text("model") else folder.name

    val precisions: List<String> get() = manifest.texts("precisions")

    /** The first of [wanted] that the bundle has, else the first that it has. */
    fun precision(wanted: List<String>): String = wanted.firstOrNull { it in precisions } ?: precisions.first()

    /** The file of a unit in one precision. */
    fun unit(name: String, precision: String): UnitFile {
        if (precision !in precisions) {
            throw BundleException("no precision '$precision' in this bundle; it has ${precisions.joinToString()}")
        }
        val unit = manifest.child("units").child(name)
        val path = file(unit.child("files").text(precision))
        val (inputs, outputs) = specs(unit.child("inputs")) to specs(unit.child("outputs"))
        return UnitFile(name, precision, path, unit.text("signature"), inputs, outputs)
    }

    /** The name of a unit's file in the first precision that it has: the same for the units of one file. */
    fun fileOf(name: String): String =
        manifest.child("units").child(name).child("files").let { it.text(it.keys.first()) }

    /** {unit: {input: its shape in the file}}. */
    fun shapes(): Map<String, Map<String, List<Int>>> = manifest.child("units").children()
        .mapValues { (_, unit) -> specs(unit.child("inputs")).mapValues { it.value.shape } }

    /** The path of a file that the manifest or a caller names. */
    fun file(name: String): File {
        requireInside(name)
        val path = File(folder, name)
        if (!path.isFile) throw BundleException("the bundle has no file '$name'")
        return path
    }

    /** The text of a file. */
    fun text(name: String): String = try {
        file(name).readText(Charsets.UTF_8)
    } catch (error: IOException) {
        throw BundleException("$name cannot be read: ${error.message}", error)
    }

    fun json(name: String): JsonObject = Json.parseObject(text(name), name)

    /** An array of the golden examples, by its name without `golden/` and `.npy`. */
    fun goldenArray(name: String): Tensor = Npy.read(file("golden/$name.npy"))

    fun hasGolden(name: String): Boolean = File(folder, "golden/$name.npy").isFile

    /** The inputs that the bundle's tokenizers make of a prompt. */
    fun tokenize(prompt: String): Map<String, Tensor> {
        if (program.tokenizers.isEmpty()) {
            val names = program.inputs.keys.joinToString().ifEmpty { "none" }
            throw InputException("this bundle takes no prompts; its inputs are $names")
        }
        val made = LinkedHashMap<String, Tensor>()
        for (entry in program.tokenizers) {
            val (tokens, mask) =
                tokenizer(entry.file).frame(prompt, entry, program.inputs.getValue(entry.tokens).shape[0])
            made[entry.tokens] = tokens
            if (entry.mask != null) made[entry.mask] = mask
        }
        return made
    }

    private val tokenizers = HashMap<String, Tokenizer>()

    /** The tokenizer of a file, read once. */
    fun tokenizer(file: String): Tokenizer = synchronized(tokenizers) {
        tokenizers.getOrPut(file) { Tokenizer.read(text(file), file) }
    }

    /** Reads every file and compares its SHA-256. [report] is told of each, with its share of all bytes so far. */
    fun checkDigests(report: (String, Double) -> Unit = { _, _ -> }) {
        val files = manifest.child("files").children()
        val total = files.values.sumOf { it.long("bytes") }.coerceAtLeast(1)
        var done = 0L
        for ((name, expected) in files) {
            val found = sha256(file(name))
            if (found != expected.text("sha256")) {
                throw BundleException("$name is not the file that was exported (SHA-256 $found): copy the bundle again")
            }
            done += expected.long("bytes")
            report(name, done.toDouble() / total)
        }
    }

    private fun checkSchema() {
        val schema = if (manifest.has("schema")) manifest.int("schema") else 0
        if (schema == PACKED_SCHEMA) {
            throw BundleException(
                "this bundle has packed networks, which this client does not unpack: make the project by " +
                    "`snapgen export --bundle=BUNDLE --app=android`, which unpacks them",
            )
        }
        if (schema > SCHEMAS.last) {
            throw BundleException("this bundle has schema $schema, and this client knows $SCHEMAS: update the app")
        }
        if (schema < SCHEMAS.first) {
            throw BundleException("this bundle has schema $schema, and this client knows $SCHEMAS: export it again")
        }
    }

    private fun checkSizes() {
        for ((name, expected) in manifest.child("files").children()) {
            val size = file(name).length()
            if (size != expected.long("bytes")) {
                val right = expected.long("bytes")
                throw BundleException("$name has $size bytes instead of $right: copy the bundle again")
            }
        }
    }

    private fun specs(section: JsonObject) =
        section.children().mapValues { (_, entry) -> TensorSpec(entry.ints("shape"), entry.text("dtype")) }

    companion object {
        /** Of manifest.json. */
        val SCHEMAS = 3..4

        /** As 4, with packed networks. */
        const val PACKED_SCHEMA = 5

        fun sha256(file: File): String {
            val digest = MessageDigest.getInstance("SHA-256")
            file.inputStream().use { stream ->
                val block = ByteArray(1 shl 16)
                while (true) {
                    val count = stream.read(block)
                    if (count < 0) break
                    digest.update(block, 0, count)
                }
            }
            return hex(digest.digest())
        }

        internal fun hex(bytes: ByteArray): String = bytes.joinToString("") { "%02x".format(it) }

        /** Raises [BundleException] where a name is absolute, or leaves the folder. */
        fun requireInside(name: String) {
            val parts = name.split('/')
            if (name == "" || parts[0] == "" || ".." in parts || ':' in parts[0] || '\\' in name || '\u0000' in name) {
                throw BundleException("the file name '$name' leads out of the bundle; names stay inside it")
            }
        }
    }
}
