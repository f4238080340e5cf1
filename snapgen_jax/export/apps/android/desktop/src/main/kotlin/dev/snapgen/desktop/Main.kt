package dev.snapgen.desktop

import dev.snapgen.core.Bundle
import dev.snapgen.core.BundleException
import dev.snapgen.core.Candidate
import dev.snapgen.core.Choice
import dev.snapgen.core.Generator
import dev.snapgen.core.GoldenSuite
import dev.snapgen.core.Image
import dev.snapgen.core.InputException
import dev.snapgen.core.Options
import dev.snapgen.core.Residency
import dev.snapgen.core.Watcher
import java.awt.image.BufferedImage
import java.io.File
import javax.imageio.ImageIO
import kotlin.system.exitProcess

private const val USAGE = """
draw   --bundle=FOLDER --library=libLiteRt.so --prompt=TEXT [--seed=0] [--steps=N] [--precision=f32] [--out=picture.png]
verify --bundle=FOLDER --library=libLiteRt.so [--precision=f32]
Both take --in-turn, which holds one network in memory at a time.
"""

fun main(arguments: Array<String>) {
    val named = arguments.drop(1).associate { it.removePrefix("--").substringBefore('=') to it.substringAfter('=', "") }
    try {
        val passed = when (arguments.firstOrNull()) {
            "draw" -> draw(named)
            "verify" -> verify(named)
            else -> throw InputException("what shall be done?\n$USAGE")
        }
        exitProcess(if (passed) 0 else 1)
    } catch (error: BundleException) {
        fail(error)
    } catch (error: InputException) {
        fail(error)
    }
}

private fun fail(error: Exception): Nothing {
    System.err.println(error.message)
    exitProcess(1)
}

private fun draw(named: Map<String, String>): Boolean = opened(named) { generator, _ ->
    val options = Options(steps = named["steps"]?.let { whole("steps", it).toInt() })
    val watcher = object : Watcher {
        override fun progressed(done: Int, total: Int) = System.err.print("\r$done of $total calls")
    }
    val image = generator.generate(needed(named, "prompt"), whole("seed", named["seed"]
        ?: "0"), options = options, watcher = watcher)
    val out = File(named["out"] ?: "picture.png")
    ImageIO.write(image.buffered(), "png", out)
    println("\n$out: ${image.width} x ${image.height}")
    true
}

private fun verify(named: Map<String, String>): Boolean = opened(named) { generator, precision ->
    generator.bundle.checkDigests()
    val suite = GoldenSuite(generator.bundle)
    val checks = suite.withoutNetworks() + suite.onNetworks(generator, precision)
    checks.forEach { println(it) }
    println("${checks.count { it.passed }} of ${checks.size} checks passed")
    checks.all { it.passed }
}

private fun opened(named: Map<String, String>, use: (Generator, String) -> Boolean): Boolean {
    val bundle = Bundle(File(needed(named, "bundle")))
    val precision = named["precision"] ?: bundle.precisions.first()
    val residency = if ("in-turn" in named) Residency.IN_TURN else Residency.TOGETHER
    return LiteRt(File(needed(named, "library"))).use { lite ->
        val choice = Choice(bundle, listOf(Candidate("the CPU", precision, lite))) { System.err.println(it) }
        Generator(bundle, choice, residency).use { use(it, precision) }
    }
}

private fun needed(named: Map<String, String>, key: String) = named[key]
    ?: throw InputException("--$key is missing\n$USAGE")

private fun whole(key: String, text: String) = text.toLongOrNull()
    ?: throw InputException("--$key=$text is no whole number")

private fun Image.buffered() = BufferedImage(width, height, BufferedImage.TYPE_INT_RGB).also {
    it.setRGB(0, 0, width, height, argb(), 0, width)
}
