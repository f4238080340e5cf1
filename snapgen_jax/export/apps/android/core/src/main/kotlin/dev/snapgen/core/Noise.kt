package dev.snapgen.core

/**
 * Noise from a seed: the same numbers as in Python and JAX. SPEC.md of a bundle has the formulas.
 *
 * The bits are equal everywhere; the normals are within 1e-6 of those of any other port.
 */
object Noise {
    private const val PLACE = 0x6E6F6973 // "nois"
    private const val PARITY = 0x1BD11BDA
    private val ROTATIONS = arrayOf(intArrayOf(13, 15, 26, 6), intArrayOf(17, 29, 16, 24))
    private val CENTRE = coefficients(
        2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
        -0.00417768164, 0.246640727, 1.50140941,
    )
    private val TAIL = coefficients(
        -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
        1.00167406, 2.83297682,
    )

    /**
     * Standard normal noise of one example.
     *
     * @param seed a whole number from 0 to 2^32 - 1; so is [index]. Another raises [InputException].
     */
    fun draw(seed: Long, index: Long, shape: List<Int>): FloatTensor {
        val (first, second) = word("seed", seed) to word("index", index)
        return FloatTensor(shape, FloatArray(Tensor.elements(shape).toInt()) { normal(bits(first, second, it)) })
    }

    /** The 32 random bits of one element. */
    fun bits(seed: Int, index: Int, place: Int): Int {
        val keys = intArrayOf(seed, index, seed xor index xor PARITY)
        var x = PLACE + keys[0]
        var y = place + keys[1]
        for (four in 0 until 5) {
            for (rotation in ROTATIONS[four % 2]) {
                x += y
                y = y.rotateLeft(rotation) xor x
            }
            x += keys[(four + 1) % 3]
            y += keys[(four + 2) % 3] + four + 1
        }
        return x
    }

    private fun normal(bits: Int): Float {
        val u = (2 * (bits ushr 8) + 1 - (1 shl 24)) / 16777216f
        val w = -Math.log(((1 - u) * (1 + u)).toDouble()).toFloat()
        val value = if (w < 5) polynomial(CENTRE, w - 2.5f) else polynomial(TAIL, Math.sqrt(w.toDouble()).toFloat() - 3)
        return u * value
    }

    private fun polynomial(coefficients: FloatArray, w: Float): Float {
        var value = coefficients[0]
        for (i in 1 until coefficients.size) value = value * w + coefficients[i]
        return value
    }

    private fun coefficients(vararg values: Double) =
        FloatArray(values.size) { (Math.sqrt(2.0) * values[it]).toFloat() }

    private fun word(name: String, value: Long): Int {
        if (value !in 0..0xFFFFFFFFL) {
            throw InputException("the $name is $value; it must be a whole number from 0 to 4294967295")
        }
        return value.toInt()
    }
}
