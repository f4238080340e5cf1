package dev.snapgen.core

/** An image: `height * width * 3` levels of red, green and blue, each 0 to 255 in a signed byte. */
class Image(val width: Int, val height: Int, val rgb: ByteArray) {
    /** As 0xAARRGGBB, opaque, row by row: what Android's Bitmap takes. */
    fun argb() = IntArray(width * height) {
        fun level(colour: Int) = rgb[3 * it + colour].toInt() and 0xFF
        (0xFF shl 24) or (level(0) shl 16) or (level(1) shl 8) or level(2)
    }
}

/**
 * A bundle on networks that [choice] loads; the picture of a prompt, a seed and an index is that of the Python client
 * but for rounding.
 *
 *     Generator(bundle, choice).use { it.generate("two red circles", seed = 7) }
 *
 * Not for two threads at once. Close it to free the networks.
 */
class Generator(
    val bundle: Bundle,
    val choice: Choice,
    residency: Residency = Residency.TOGETHER,
) : AutoCloseable {
    private val units =
        Units(bundle.program.units().associateWith { name -> { choice.load(name) } }, residency, bundle::fileOf)
    private val sampler = Sampler(bundle.program, units, bundle.shapes())

    /**
     * The output "image" of a prompt.
     *
     * @param seed and index: whole numbers from 0 to 2^32 - 1.
     *
     * Raises [InputException] where an input does not fit, [CancelledException] where the watcher asks for it.
     */
    fun generate(
        prompt: String, seed: Long = 0, index: Long = 0, options: Options = Options(), watcher: Watcher = Watcher.NONE,
    ): Image {
        val spec = bundle.program.outputs["image"]
        if (spec?.dtype != "uint8" || spec.shape.size != 3) {
            val made = bundle.program.outputs.keys.joinToString()
            throw InputException("this bundle makes $made and no image; use `run`")
        }
        val made = run(bundle.tokenize(prompt), seed, index, options, watcher).getValue("image") as ByteTensor
        return Image(spec.shape[1], spec.shape[0], made.values)
    }

    /** All outputs of one example from all inputs that program.json lists. */
    fun run(
        inputs: Map<String, Tensor>, seed: Long = 0, index: Long = 0, options: Options = Options(),
        watcher: Watcher = Watcher.NONE,
    ): Map<String, Tensor> = trace(inputs, noise(seed, index, options), options, watcher).outputs

    /** The same with noise of the caller's own, and with what was made on the way. */
    fun trace(
        inputs: Map<String, Tensor>, noise: FloatTensor?, options: Options = Options(), watcher: Watcher = Watcher.NONE,
    ): Trace = sampler.run(inputs, noise, options, watcher)

    private fun noise(seed: Long, index: Long, options: Options): FloatTensor? =
        (bundle.program as? Flow)?.let { Noise.draw(seed, index, options.of(it).noiseShape()) }

    override fun close() = units.close()
}
