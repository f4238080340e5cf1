package dev.snapgen.core

/** The formulas of a sampler in float32. SPEC.md of a bundle has them, and its golden suite compares them. */
object Formulas {
    /** Cosines, then sines, of `scale t` at dim / 2 frequencies from 1 towards 1 / max_period: `[1, dim]`. */
    fun timeFeatures(t: Float, spec: TimeInput.Features): FloatTensor {
        val half = spec.dim / 2
        val step = (-Math.log(spec.maxPeriod) / half).toFloat()
        val angle = spec.scale.toFloat() * t
        val values = FloatArray(2 * half)
        for (i in 0 until half) {
            val frequency = Math.exp((step * i).toDouble()).toFloat()
            values[i] = Math.cos((angle * frequency).toDouble()).toFloat()
            values[half + i] = Math.sin((angle * frequency).toDouble()).toFloat()
        }
        return FloatTensor(listOf(1, 2 * half), values)
    }

    /** The input "time" at a time of the grid; null where the denoiser is told nothing. */
    fun timeInput(step: Step, t: Float, position: Int): FloatTensor? = when (val time = step.time) {
        null -> null
        is TimeInput.Values -> FloatTensor(listOf(1, time.values.size), time.values)
        is TimeInput.Index -> {
            val index = step.native?.toInt() ?: position
            FloatTensor(listOf(1, time.size), FloatArray(time.size) { if (it == index) 1f else 0f })
        }
        is TimeInput.Features -> timeFeatures(step.native?.toFloat() ?: t, time)
    }

    /** The velocity at x, from what the denoiser gave there. */
    fun asVelocity(out: FloatArray, x: FloatArray, t: Float, prediction: Prediction): FloatArray = when (prediction) {
        is Prediction.Velocity -> out
        is Prediction.Linear -> FloatArray(x.size) { prediction.x * x[it] + prediction.out * out[it] }
        is Prediction.Clean -> FloatArray(x.size) { (x[it] - out[it]) / Math.max(t, prediction.tMin) }
    }

    /**
     * One step from time t to time s. [velocity] is asked at t, where its last argument is 0, and by "heun" at s too,
     * where it is 1. [noise] is fresh, for "renoise"; there is none at s = 0.
     */
    fun advance(
        x: FloatArray, t: Float, s: Float, rule: Rule, noise: FloatArray?,
        velocity: (FloatArray, Float, Int) -> FloatArray,
    ): FloatArray {
        val h = s - t
        var v = velocity(x, t, 0)
        if (rule == Rule.RENOISE) {
            val clean = FloatArray(x.size) { x[it] - t * v[it] }
            return if (noise == null) clean else FloatArray(x.size) { (1 - s) * clean[it] + s * noise[it] }
        }
        if (rule == Rule.HEUN) {
            val first = v
            val second = velocity(FloatArray(x.size) { x[it] + h * first[it] }, s, 1)
            v = FloatArray(x.size) { (first[it] + second[it]) / 2f }
        }
        return FloatArray(x.size) { x[it] + h * v[it] }
    }

    /** Latents `[..., h, w, c]` to an image `[..., H, W, 3]`, by a codec that is no network. */
    fun decode(latent: FloatTensor, codec: Decoder): ByteTensor = when (codec) {
        is Decoder.Identity -> {
            val pixels = FloatArray(latent.size) { latent.values[it] / codec.scale + codec.shift }
            greyLevels(FloatTensor(latent.shape, pixels))
        }
        is Decoder.Patch -> greyLevels(patches(latent, codec))
        is Decoder.Network -> throw IllegalArgumentException("a network decodes these latents")
    }

    /** Pixels in [-1, 1] to the nearest of 0..255, halves to the even one, those outside clipped. */
    fun greyLevels(pixels: FloatTensor): ByteTensor = ByteTensor(
        pixels.shape,
        ByteArray(pixels.size) {
            val level = pixels.values[it] * 127.5f + 127.5f
            Math.rint(Math.min(Math.max(level, 0f), 255f).toDouble()).toInt().toByte()
        },
    )

    /** Latents are the orthonormal DCT-II of p x p patches; channel = (vertical p + horizontal) 3 + colour. */
    private fun patches(latent: FloatTensor, codec: Decoder.Patch): FloatTensor {
        val p = codec.patch
        val (h, w) = latent.shape.takeLast(3)
        val lead = latent.shape.dropLast(3)
        if (latent.shape.last() != p * p * 3) throw InputException("latents ${latent.shape} for patches of $p")
        val dct = dct(p)
        val gain = FloatArray(p * p) { (codec.scale * codec.frequencyScale[it]).toFloat() }
        val pixels = FloatArray(latent.size)
        val coefficients = FloatArray(p * p)
        for (image in 0 until Tensor.elements(lead).toInt()) for (y in 0 until h) for (x in 0 until w) {
            val from = ((image * h + y) * w + x) * p * p * 3
            for (colour in 0 until 3) {
                for (k in 0 until p * p) coefficients[k] = latent.values[from + k * 3 + colour] / gain[k]
                for (row in 0 until p) for (column in 0 until p) {
                    var sum = 0f
                    for (k in 0 until p) for (l in 0 until p) {
                        sum += coefficients[k * p + l] * dct[k][row] * dct[l][column]
                    }
                    pixels[(((image * h + y) * p + row) * w * p + x * p + column) * 3 + colour] = sum + codec.shift
                }
            }
        }
        return FloatTensor(lead + listOf(h * p, w * p, 3), pixels)
    }

    private fun dct(p: Int) = Array(p) { frequency ->
        FloatArray(p) { position ->
            val wave = Math.sqrt(2.0 / p) * Math.cos(Math.PI * (position + 0.5) * frequency / p)
            (if (frequency == 0) wave / Math.sqrt(2.0) else wave).toFloat()
        }
    }
}
