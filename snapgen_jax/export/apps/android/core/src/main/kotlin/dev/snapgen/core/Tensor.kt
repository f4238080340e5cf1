package dev.snapgen.core

/** An array in C order: the last axis runs fastest. */
sealed class Tensor(val shape: List<Int>, size: Int) {
    init {
        if (shape.any { it < 0 } || elements(shape) != size.toLong()) {
            throw InputException("$size values do not make an array of shape $shape")
        }
    }

    abstract val dtype: String

    val size: Int get() = elements(shape).toInt()

    /** The same values in another shape. Shares them. */
    abstract fun reshaped(shape: List<Int>): Tensor

    companion object {
        fun elements(shape: List<Int>): Long = shape.fold(1L) { product, axis -> product * axis }
    }
}

class FloatTensor(shape: List<Int>, val values: FloatArray) : Tensor(shape, values.size) {
    override val dtype get() = "float32"

    override fun reshaped(shape: List<Int>) = FloatTensor(shape, values)

    /** Row [index] of the first axis, copied. */
    fun row(index: Int): FloatTensor {
        val inner = shape.drop(1)
        val length = elements(inner).toInt()
        return FloatTensor(inner, values.copyOfRange(index * length, (index + 1) * length))
    }

    companion object {
        fun zeros(shape: List<Int>) = FloatTensor(shape, FloatArray(elements(shape).toInt()))
    }
}

class IntTensor(shape: List<Int>, val values: IntArray) : Tensor(shape, values.size) {
    override val dtype get() = "int32"

    override fun reshaped(shape: List<Int>) = IntTensor(shape, values)
}

/** uint8: 0 to 255, each in one signed byte; see [level]. */
class ByteTensor(shape: List<Int>, val values: ByteArray) : Tensor(shape, values.size) {
    override val dtype get() = "uint8"

    override fun reshaped(shape: List<Int>) = ByteTensor(shape, values)

    /** The value at a place, 0 to 255. */
    fun level(place: Int): Int = values[place].toInt() and 0xFF
}

/** Row [index] of the first axis of any array, copied. */
fun Tensor.rowOf(index: Int): Tensor {
    val inner = shape.drop(1)
    val length = Tensor.elements(inner).toInt()
    val (from, to) = index * length to (index + 1) * length
    return when (this) {
        is FloatTensor -> row(index)
        is IntTensor -> IntTensor(inner, values.copyOfRange(from, to))
        is ByteTensor -> ByteTensor(inner, values.copyOfRange(from, to))
    }
}

/** `||value - reference|| / ||reference||`; infinite where either holds NaN or infinity, or only the reference is 0. */
fun relativeL2(value: FloatArray, reference: FloatArray): Double {
    if (value.size != reference.size) return Double.POSITIVE_INFINITY
    var difference = 0.0
    var norm = 0.0
    for (i in value.indices) {
        if (!value[i].isFinite() || !reference[i].isFinite()) return Double.POSITIVE_INFINITY
        val off = value[i].toDouble() - reference[i]
        difference += off * off
        norm += reference[i].toDouble() * reference[i]
    }
    if (norm > 0) return Math.sqrt(difference) / Math.sqrt(norm)
    return if (difference > 0) Double.POSITIVE_INFINITY else 0.0
}
