package dev.snapgen.core

/** Another number of steps, another guidance or rule than program.json says; null leaves what is. */
class Options(
    val steps: Int? = null,
    val guidance: FloatTensor? = null,
    val method: String? = null,
    val guidanceInterval: Pair<Float, Float>? = null,
) {
    constructor(steps: Int?, guidance: Float) : this(steps, FloatTensor(emptyList(), floatArrayOf(guidance)))

    /** Whether nothing is changed. */
    val empty: Boolean get() = steps == null && guidance == null && method == null && guidanceInterval == null

    /** The flow with these options. Raises [InputException] where the program does not allow them. */
    fun of(flow: Flow): Flow {
        if (empty) return flow
        var changed = flow.steps
        if (method != null && flow.steps.take(flow.intervals).any { it.rule != ProgramReader.rule(method) }) {
            if (!flow.alike) {
                throw InputException(
                    "the steps of this bundle differ, and so their method is fixed; leave out `method`"
                )
            }
            changed = changed.map { it.copy(rule = ProgramReader.rule(method)) }
        }
        if (guidance != null) {
            changed.firstOrNull { it.guidance.shape != guidance.shape }?.let {
                throw InputException(
                    "the guidance of this bundle has the shape ${it.guidance.shape}; got ${guidance.shape}"
                )
            }
            val every = changed.none { it.guided }
            changed = changed.map { if (every || it.guided) it.copy(guidance = guidance) else it }
        }
        if (guidanceInterval != null) changed = changed.map { it.copy(interval = guidanceInterval) }
        var times = flow.times
        if (steps != null && steps != flow.intervals) {
            times = grid(flow, steps)
            changed = List(steps + 1) { changed[0] }
        }
        try {
            return flow.with(times, changed)
        } catch (error: BundleException) {
            throw InputException(error.message!!.removePrefix("program.json: "))
        }
    }

    private fun grid(flow: Flow, steps: Int): FloatArray {
        if (steps < 1) throw InputException("a sample needs at least one step, got $steps")
        val shift = flow.shift
            ?: throw InputException("this bundle takes ${flow.intervals} steps and no other number; leave out `steps`")
        return FloatArray(steps + 1) {
            val t = if (it == steps) 0.0 else 1.0 + it * (-1.0 / steps)
            (shift * t / (1 + (shift - 1) * t)).toFloat()
        }
    }
}
