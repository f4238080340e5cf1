package dev.snapgen.core

/** A named array of one example. [nullValue] is what guidance leads away from: a number, a list, "keep", or none. */
class ArraySpec(val name: String, val shape: List<Int>, val dtype: String, val nullValue: Any?) {
    /** Whether the null calls are given the caller's own array. */
    val keeps: Boolean get() = nullValue == "keep"

    /** The caller's array as units take it. Raises [InputException] where shape or dtype is another. */
    fun of(value: Tensor): Tensor {
        if (value.shape != shape || value.dtype != dtype) {
            throw InputException("the input $name is $dtype $shape; got ${value.dtype} ${value.shape}")
        }
        if (value !is ByteTensor) return value
        return FloatTensor(shape, FloatArray(value.size) { value.level(it) / 127.5f - 1f })
    }

    /** What takes the place of the caller's own array in the null calls, as units take it. */
    fun nullOf(own: Tensor?): Tensor {
        if (keeps) return own ?: throw BundleException("inputs.$name: there is nothing to keep")
        val flat = flatten(nullValue)
        val values = broadcast(flat.first, flat.second, shape)
            ?: throw BundleException("program.json: inputs.$name: the null fits neither 'keep' nor $shape")
        return when (dtype) {
            "float32" -> FloatTensor(shape, FloatArray(values.size) { values[it].toFloat() })
            "int32" -> IntTensor(shape, IntArray(values.size) { values[it].toInt() })
            else -> of(ByteTensor(shape, ByteArray(values.size) { values[it].toInt().toByte() }))
        }
    }
}

/** What makes the ids of one input, and how they stand in it. */
class TokenizerSpec(
    val file: String,
    val tokens: String,
    val begin: List<Int>,
    val end: List<Int>,
    val pad: Int,
    val mask: String?,
    val kind: String,
)

enum class Rule { EULER, HEUN, RENOISE }

sealed interface Prediction {
    data object Velocity : Prediction

    class Clean(val tMin: Float) : Prediction

    class Linear(val x: Float, val out: Float) : Prediction
}

sealed interface TimeInput {
    class Features(val dim: Int, val scale: Double, val maxPeriod: Double) : TimeInput

    class Index(val size: Int) : TimeInput

    class Values(val values: FloatArray) : TimeInput
}

/** How the denoiser is asked at one time, and what follows. */
data class Step(
    val unit: String,
    val rule: Rule,
    val prediction: Prediction,
    val guidance: FloatTensor,
    val time: TimeInput?,
    val native: Double?,
    val arrays: Map<String, FloatTensor>,
    val scale: Float,
    val context: String?,
    val interval: Pair<Float, Float>,
) {
    /** Whether it is guided at some time. */
    val guided: Boolean get() = guidance.values.any { it != 1f }

    /** Whether a call at time t is guided. */
    fun guidedAt(t: Float): Boolean = guided && interval.first <= t && t <= interval.second
}

sealed interface Decoder {
    class Identity(val scale: Float, val shift: Float) : Decoder

    class Patch(val patch: Int, val scale: Double, val shift: Float, val frequencyScale: List<Double>) : Decoder

    class Network(val unit: String, val chunk: Int?) : Decoder
}

/** What program.json says, checked. */
sealed class Program(
    val inputs: Map<String, ArraySpec>,
    val outputs: Map<String, ArraySpec>,
    val tokenizers: List<TokenizerSpec>,
) {
    /** The names of all units that are called. */
    abstract fun units(): Set<String>
}

/** One call of one unit. */
class FeedForward(
    val unit: String,
    inputs: Map<String, ArraySpec>,
    outputs: Map<String, ArraySpec>,
    tokenizers: List<TokenizerSpec>,
) : Program(inputs, outputs, tokenizers) {
    override fun units() = setOf(unit)
}

/** A sampler from noise at time 1 to data at time 0. [steps] holds what is true at each of [times]. */
class Flow(
    inputs: Map<String, ArraySpec>,
    outputs: Map<String, ArraySpec>,
    tokenizers: List<TokenizerSpec>,
    val latentShape: List<Int>,
    val times: FloatArray,
    val initialScale: Float,
    val shift: Double?,
    val steps: List<Step>,
    val alike: Boolean,
    val contexts: Map<String, List<String>>,
    val nullContexts: Map<String, Map<String, ArraySpec>>,
    val state: Map<String, ArraySpec>,
    val decoder: Decoder?,
) : Program(inputs, outputs, tokenizers) {
    val intervals: Int get() = times.size - 1

    val guided: Boolean get() = steps.any { it.guided }

    override fun units(): Set<String> {
        val decoding = if (decoder is Decoder.Network) setOf(decoder.unit) else emptySet()
        return steps.mapTo(LinkedHashSet()) { it.unit } + contexts.values.flatten() + decoding
    }

    /** Of the noise of one example: that of x, or one for each step where a step renoises. */
    fun noiseShape(): List<Int> {
        val renoises = steps.take(intervals).any { it.rule == Rule.RENOISE }
        return if (renoises) listOf(intervals) + latentShape else latentShape
    }

    /** The state before the first call. */
    fun initialState(): MutableMap<String, Tensor> =
        state.mapValuesTo(LinkedHashMap()) { FloatTensor.zeros(it.value.shape) }

    /** The same with other times and steps, checked. */
    fun with(times: FloatArray = this.times, steps: List<Step> = this.steps): Flow = Flow(
        inputs, outputs, tokenizers, latentShape, times, initialScale, shift, steps, alike, contexts, nullContexts,
        state, decoder,
    ).also { it.check() }

    /** Raises [BundleException] that names what does not fit together. */
    fun check() {
        val last = steps[intervals - 1]
        if (last.rule == Rule.HEUN && steps.size < times.size) {
            refuse("the last rule is 'heun', which asks at the last time: add an entry to steps")
        }
        if (last.rule == Rule.RENOISE && times.last() != 0f) {
            refuse("the last rule is 'renoise', which ends at time 0, not ${times.last()}")
        }
        if (shift != null && !(alike && steps[0].isFree())) {
            refuse("`shift` offers other grids, but the steps are made for this one; leave it out")
        }
        steps.forEach { check(it) }
        val asked = steps.take(intervals).zip(times.asList())
        if (asked.any { it.first.guided } && asked.none { (step, t) -> step.guidedAt(t) }) {
            refuse("guidance_interval holds none of the times ${times.dropLast(1).joinToString()}")
        }
    }

    private fun check(step: Step) {
        if (step.context != null && step.context !in contexts) {
            refuse("a step has the context '${step.context}'; there are ${contexts.keys}")
        }
        if (broadcast(step.guidance.shape, DoubleArray(step.guidance.size), latentShape) == null) {
            refuse("guidance ${step.guidance.shape} does not fit x, $latentShape")
        }
        val (low, high) = step.interval
        if (!(0f <= low && low <= high && high <= 1f)) {
            refuse("guidance_interval is [$low, $high]; two times from 0 to 1, the lower one first")
        }
        val without = inputs.values.filter { it.nullValue == null }
        if (step.guided && without.isNotEmpty() && step.context !in nullContexts) {
            refuse("guidance needs the `null` of the inputs ${without.joinToString { it.name }}")
        }
    }

    /** Whether a step can be taken at any time. */
    private fun Step.isFree() = (time == null || time is TimeInput.Features) && native == null
}

internal fun refuse(why: String): Nothing = throw BundleException("program.json: $why")

/** A number or nested lists of numbers as shape and values. */
internal fun flatten(value: Any?): Pair<List<Int>, DoubleArray> = when (value) {
    is Double -> emptyList<Int>() to doubleArrayOf(value)
    is List<*> -> {
        val parts = value.map { flatten(it) }
        val inner = parts.firstOrNull()?.first ?: emptyList()
        if (parts.any { it.first != inner }) refuse("a list of lists of different lengths")
        (listOf(parts.size) + inner) to parts.flatMap { it.second.asList() }.toDoubleArray()
    }
    else -> refuse("${Json.kind(value)} where numbers were expected")
}

/** The values of an array of [from] as one of [to], by numpy's rules; null where they do not fit. */
internal fun broadcast(from: List<Int>, values: DoubleArray, to: List<Int>): DoubleArray? {
    if (from.size > to.size) return null
    val padded = List(to.size - from.size) { 1 } + from
    if (padded.zip(to).any { (have, want) -> have != 1 && have != want }) return null
    return DoubleArray(Tensor.elements(to).toInt()) { place ->
        var (rest, stride, source) = Triple(place, 1, 0)
        for (axis in to.indices.reversed()) {
            if (padded[axis] != 1) source += rest % to[axis] * stride
            rest /= to[axis]
            stride *= padded[axis]
        }
        values[source]
    }
}
