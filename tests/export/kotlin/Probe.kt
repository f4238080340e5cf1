package dev.snapgen.probe

import dev.snapgen.core.Bundle
import dev.snapgen.core.BundleCopy
import dev.snapgen.core.Candidate
import dev.snapgen.core.Check
import dev.snapgen.core.Choice
import dev.snapgen.core.FloatTensor
import dev.snapgen.core.Generator
import dev.snapgen.core.GoldenSuite
import dev.snapgen.core.Json
import dev.snapgen.core.JsonObject
import dev.snapgen.core.Network
import dev.snapgen.core.NetworkLoader
import dev.snapgen.core.Noise
import dev.snapgen.core.Npy
import dev.snapgen.core.Options
import dev.snapgen.core.ProgramReader
import dev.snapgen.core.Residency
import dev.snapgen.core.Tensor
import dev.snapgen.core.Tokenizer
import dev.snapgen.core.UnitFile
import dev.snapgen.core.Watcher
import dev.snapgen.desktop.LiteRt
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** Answers the tests' questions: a JSON object a line in, one out. {"error", "kind"} where something was raised. */
fun main(arguments: Array<String>) {
    val probe = Probe(File(arguments[0]))
    generateSequence(::readlnOrNull).forEach { line ->
        val answer = try {
            probe.answer(Json.parseObject(line, "the question"))
        } catch (error: Exception) {
            mapOf("error" to (error.message ?: ""), "kind" to error.javaClass.simpleName)
        }
        println(written(answer))
    }
}

private class Probe(library: File) {
    private val lite by lazy { LiteRt(library) }

    fun answer(question: JsonObject): Any? = when (question.text("do")) {
        "noise" -> noise(question)
        "encode" -> Tokenizer.read(File(question.text("file")).readText(), "tokenizer.json").let { tokenizer ->
            question.texts("prompts").map { tokenizer.encode(it).asList() }
        }
        "npy" -> Npy.read(File(question.text("file"))).let { mapOf("shape" to it.shape, "dtype" to it.dtype) }
        "json" -> Json.parse(question.text("text"), "text")
        "program" -> ProgramReader.read(Json.parseObject(question.text("text"), "program.json")).units().toList()
        "open" -> Bundle(File(question.text("folder"))).let { bundle ->
            if (question.flag("digests", false)) bundle.checkDigests()
            if ("file" in question) bundle.file(question.text("file"))
            mapOf("name" to bundle.name, "precisions" to bundle.precisions)
        }
        "golden" -> GoldenSuite(Bundle(File(question.text("folder")))).withoutNetworks().map(::row)
        "verify" -> generator(question).use { made ->
            GoldenSuite(made.bundle).onNetworks(made, question.text("precision")).map(::row)
        }
        "draw" -> draw(question)
        "choose" -> choose(question)
        "copy" -> copy(question)
        else -> question.fail("asks for something unknown")
    }

    private fun generator(question: JsonObject): Generator {
        val bundle = Bundle(File(question.text("folder")))
        val choice = Choice(bundle, listOf(Candidate("CPU", question.text("precision"), lite)))
        return Generator(bundle, choice, if (question.flag("in_turn", false)) Residency.IN_TURN else Residency.TOGETHER)
    }

    private fun draw(question: JsonObject): Any = generator(question).use { generator ->
        val told = Told(if (question.has("cancel_after")) question.int("cancel_after") else null)
        val options = Options(
            steps = if (question.has("steps")) question.int("steps") else null,
            guidance = if (question.has("guidance")) scalar(question.number("guidance")) else null,
            method = if (question.has("method")) question.text("method") else null,
        )
        val image =
            generator.generate(question.text("prompt"), question.long("seed"), question.long("index"), options, told)
        File(question.text("out")).writeBytes(image.rgb)
        mapOf("width" to image.width, "height" to image.height, "progress" to told.calls, "steps" to told.steps)
    }

    /** What is chosen where the first candidate fails in a given way. */
    private fun choose(question: JsonObject): Any {
        val bundle = Bundle(File(question.text("folder")))
        val precision = question.text("precision")
        val reports = ArrayList<String>()
        val gpu = Candidate("GPU", precision, faulty(question.text("fault")))
        val choice = Choice(bundle, listOf(gpu, Candidate("CPU", precision, lite))) { reports += "$it" }
        Generator(bundle, choice, Residency.IN_TURN).use { made ->
            val image = made.generate(question.text("prompt"))
            return mapOf("reports" to reports, "sum" to image.rgb.sumOf { it.toInt() and 0xFF })
        }
    }

    private fun copy(question: JsonObject): Any {
        val source = File(question.text("source"))
        val read = ArrayList<String>()
        val progress = ArrayList<Float>()
        val open = { name: String ->
            read += name
            File(source, name).inputStream()
        }
        BundleCopy.refresh(File(question.text("folder")), open) { progress += it }
        return mapOf("read" to read.size, "progress" to progress)
    }

    private fun faulty(fault: String) = NetworkLoader { unit ->
        if (fault == "throws") throw IllegalStateException("no OpenCL here")
        if (fault == "links") throw UnsatisfiedLinkError("libLiteRtClGlAccelerator.so")
        Faulty(lite.load(unit), fault, unit)
    }

    private class Told(private val most: Int?) : Watcher {
        val calls = ArrayList<List<Int>>()
        val steps = ArrayList<Int>()

        override val cancelled get() = most != null && calls.size >= most

        override fun progressed(done: Int, total: Int) {
            calls += listOf(done, total)
        }

        override fun stepped(step: Int, steps: Int, latent: FloatTensor) {
            this.steps += step
        }
    }

    private class Faulty(private val right: Network, private val fault: String, private val unit: UnitFile) : Network {
        override fun run(inputs: Map<String, Tensor>) = right.run(inputs).mapValues { (_, array) ->
            val factor = if (fault == "nan") Float.NaN else if (unit.name == fault) 1.5f else 1f
            FloatTensor(array.shape, FloatArray(array.size) { array.values[it] * factor })
        }

        override fun close() = right.close()
    }

    private fun noise(question: JsonObject): Any {
        val values = Noise.draw(question.long("seed"), question.long("index"), question.ints("shape")).values
        val buffer = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
        buffer.asFloatBuffer().put(values)
        File(question.text("out")).writeBytes(buffer.array())
        return values.size
    }

    private fun scalar(value: Double) = FloatTensor(emptyList(), floatArrayOf(value.toFloat()))

    private fun row(check: Check) = listOf(check.passed, check.name, check.finding)
}

private fun written(value: Any?): String = when (value) {
    is Map<*, *> -> value.entries.joinToString(",", "{", "}") { "${written(it.key)}:${written(it.value)}" }
    is List<*> -> value.joinToString(",", "[", "]") { written(it) }
    is String -> value.map { if (it in ' '..'~' && it != '"' && it != '\\') "$it" else "\\u%04x".format(it.code) }
        .joinToString("", "\"", "\"")
    else -> "$value"
}
