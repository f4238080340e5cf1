package dev.snapgen.core

/** What may happen while a picture is drawn. Called on the thread that draws. */
interface Watcher {
    /** Read before every call of a network: true ends the run with [CancelledException]. */
    val cancelled: Boolean get() = false

    /** After every call of a network: how many of all. */
    fun progressed(done: Int, total: Int) {}

    /** After every step of the sampler: its number, from 1, and the latent. */
    fun stepped(step: Int, steps: Int, latent: FloatTensor) {}

    companion object {
        val NONE = object : Watcher {}
    }
}

/** What one run made on the way. [contexts] by name; [latents] one after each step; empty for a program of one call. */
class Trace(
    val contexts: Map<String?, Map<String, Tensor>>,
    val latents: List<FloatTensor>,
    val outputs: Map<String, Tensor>,
)

/** One question to the denoiser: at which place of the grid, at which time, and whether it is the null call. */
class Ask(val position: Int, val t: Float, val isNull: Boolean)

/** A program over its networks: the order of their calls. [shapes]: {unit: {input: its shape in the file}}. */
class Sampler(val program: Program, private val units: Units, private val shapes: Map<String, Map<String, List<Int>>>) {
    private val nullMemo = LinkedHashMap<String?, Map<String, Tensor>>()

    /**
     * One example, from the caller's named inputs; a flow also takes [noise] of `noiseShape`.
     *
     * Raises [InputException] where they do not fit, [CancelledException] where the watcher asks for it.
     */
    fun run(
        inputs: Map<String, Tensor>,
        noise: FloatTensor? = null,
        options: Options = Options(),
        watcher: Watcher = Watcher.NONE,
    ): Trace {
        val given = given(inputs)
        return when (program) {
            is FeedForward -> {
                if (!options.empty) throw InputException("this bundle is one call of one unit, and takes no options")
                val calls = Calls(watcher, 1)
                Trace(mapOf(null to given), emptyList(), outputs(calls.call(program.unit, given)))
            }
            is Flow -> {
                if (noise == null) throw InputException("this bundle needs noise of shape ${program.noiseShape()}")
                FlowRun(program, options.of(program), watcher).run(given, noise)
            }
        }
    }

    /** The caller's arrays as units take them. */
    fun given(inputs: Map<String, Tensor>): Map<String, Tensor> {
        if (inputs.keys != program.inputs.keys) {
            throw InputException("the inputs are ${named(program.inputs.keys)}; got ${named(inputs.keys)}")
        }
        return program.inputs.mapValues { (name, spec) -> spec.of(inputs.getValue(name)) }
    }

    private fun named(names: Set<String>) = names.joinToString().ifEmpty { "none" }

    /** Those of [arrays] that a unit takes, each with an axis of 1 before it where the file has one. */
    private fun take(unit: String, arrays: Map<String, Tensor>): Map<String, Tensor> {
        val wanted = shapes[unit] ?: throw BundleException("manifest.json does not describe the unit '$unit'")
        return wanted.mapValues { (name, shape) ->
            val array = arrays[name]
                ?: throw BundleException("the unit '$unit' needs $name; there is only ${arrays.keys.joinToString()}")
            if (shape != array.shape && shape != listOf(1) + array.shape) {
                throw BundleException("the unit '$unit' takes $name of shape $shape; got ${array.shape}")
            }
            array.reshaped(shape)
        }
    }

    /** What a unit gave, as the caller gets it. */
    private fun outputs(out: Map<String, FloatTensor>): Map<String, Tensor> =
        program.outputs.mapValues { (name, spec) ->
        val array = out[name] ?: throw BundleException("the last unit gives ${out.keys.joinToString()} and no $name")
        val shaped = array.reshaped(spec.shape)
        if (spec.dtype == "uint8") Formulas.greyLevels(shaped) else shaped
    }

    private inner class Calls(private val watcher: Watcher, private val total: Int) {
        private var done = 0

        fun call(unit: String, arrays: Map<String, Tensor>): Map<String, FloatTensor> {
            if (watcher.cancelled) throw CancelledException()
            val out = units.call(unit, take(unit, arrays))
            watcher.progressed(++done, total)
            return out
        }
    }

    private inner class FlowRun(private val stored: Flow, private val flow: Flow, private val watcher: Watcher) {
        private val calls = Calls(watcher, total())
        private val scales = HashMap<FloatTensor, FloatArray>()

        fun run(given: Map<String, Tensor>, noise: FloatTensor): Trace {
            if (noise.shape != flow.noiseShape()) {
                throw InputException("the noise has shape ${noise.shape}; these steps take ${flow.noiseShape()}")
            }
            val contexts = contexts(given, isNull = false)
            val nulls = if (flow.guided) nullContexts(given) else emptyMap()
            val latents = trajectory(noise, contexts, nulls)
            return Trace(contexts, latents, decode(latents.last()))
        }

        private fun total(): Int {
            val encoders = flow.contexts.values.sumOf { it.size }
            val nulls = flow.contexts.filterKeys { it !in flow.nullContexts }.values.sumOf { it.size }
            val decoding = when (val decoder = flow.decoder) {
                is Decoder.Network -> decoder.chunk?.let { flow.latentShape[0] / it } ?: 1
                else -> 0
            }
            val encoding = encoders + if (flow.guided && nullMemo.isEmpty()) nulls else 0
            return encoding + asks(flow).size + decoding
        }

        private fun contexts(given: Map<String, Tensor>, isNull: Boolean): Map<String?, Map<String, Tensor>> {
            val made = LinkedHashMap<String?, Map<String, Tensor>>()
            made[null] = given
            for ((name, encoders) in flow.contexts) {
                val context = LinkedHashMap(given)
                val fixed = if (isNull) flow.nullContexts[name] else null
                if (fixed != null) {
                    fixed.forEach { (array, spec) ->
                        context[array] = spec.nullOf(null).reshaped(listOf(1) + spec.shape)
                    }
                } else {
                    encoders.forEach { context += calls.call(it, context) }
                }
                made[name] = context
            }
            return made
        }

        /** Made once, unless they hold something of the caller's own. */
        private fun nullContexts(given: Map<String, Tensor>): Map<String?, Map<String, Tensor>> {
            if (nullMemo.isNotEmpty()) return nullMemo
            val inputs = stored.inputs.filterValues { it.nullValue != null }
            val made = contexts(inputs.mapValues { (name, spec) -> spec.nullOf(given[name]) }, isNull = true)
            if (stored.inputs.values.none { it.keeps }) nullMemo += made
            return made
        }

        private fun trajectory(
            noise: FloatTensor, contexts: Map<String?, Map<String, Tensor>>, nulls: Map<String?, Map<String, Tensor>>,
        ): List<FloatTensor> {
            val renoises = noise.shape != flow.latentShape
            val states = flow.initialState() to flow.initialState()
            val first = if (renoises) noise.row(0) else noise
            var x = if (flow.initialScale == 1f) first.values else scaled(flow.initialScale, first.values)
            return List(flow.intervals) { i ->
                val (t, s) = flow.times[i] to flow.times[i + 1]
                val fresh = if (renoises && i + 1 < flow.intervals) noise.row(i + 1).values else null
                x = Formulas.advance(x, t, s, flow.steps[i].rule, fresh) { at, time, end ->
                    velocity(i + end, at, time, contexts, nulls, states)
                }
                FloatTensor(flow.latentShape, x).also { watcher.stepped(i + 1, flow.intervals, it) }
            }
        }

        private fun velocity(
            i: Int, x: FloatArray, t: Float,
            contexts: Map<String?, Map<String, Tensor>>, nulls: Map<String?, Map<String, Tensor>>,
            states: Pair<MutableMap<String, Tensor>, MutableMap<String, Tensor>>,
        ): FloatArray {
            val step = flow.steps[i]
            val v = ask(i, x, t, contexts, states.first)
            if (!flow.asksNull(step, t)) return v
            val away = ask(i, x, t, nulls, states.second)
            if (!step.guidedAt(t)) return v
            val w = guidance(step)
            return FloatArray(x.size) { away[it] + w[it] * (v[it] - away[it]) }
        }

        /** w in the shape of x. Made once for each step's own array: most programs have one for all steps. */
        private fun guidance(step: Step): FloatArray = scales.getOrPut(step.guidance) {
            val w = DoubleArray(step.guidance.size) { step.guidance.values[it].toDouble() }
            val wide = broadcast(step.guidance.shape, w, flow.latentShape)!!
            FloatArray(wide.size) { wide[it].toFloat() }
        }

        private fun ask(
            i: Int, x: FloatArray, t: Float,
            contexts: Map<String?, Map<String, Tensor>>, state: MutableMap<String, Tensor>,
        ): FloatArray {
            val step = flow.steps[i]
            val named = LinkedHashMap(contexts.getValue(step.context))
            named += state
            named += step.arrays
            named["latent"] = FloatTensor(flow.latentShape, if (step.scale == 1f) x else scaled(step.scale, x))
            Formulas.timeInput(step, t, i)?.let { named["time"] = it }
            val out = calls.call(step.unit, named)
            rewrite(state, out)
            val prediction = out["prediction"] ?: throw BundleException("the unit '${step.unit}' gives no prediction")
            return Formulas.asVelocity(prediction.reshaped(flow.latentShape).values, x, t, step.prediction)
        }

        private fun decode(latent: FloatTensor): Map<String, Tensor> = when (val decoder = flow.decoder) {
            null -> mapOf("latent" to latent)
            is Decoder.Network -> {
                val chunk = decoder.chunk ?: flow.latentShape.first()
                val state = flow.initialState()
                val pieces = (0 until flow.latentShape.first() step chunk).map { from ->
                    val length = latent.size / flow.latentShape.first()
                    val piece = latent.values.copyOfRange(from * length, (from + chunk) * length)
                    val named = state + ("latent" to FloatTensor(listOf(chunk) + flow.latentShape.drop(1), piece))
                    calls.call(decoder.unit, named).also { rewrite(state, it) }
                }
                outputs(joined(pieces))
            }
            else -> mapOf("image" to Formulas.decode(latent, decoder))
        }

        private fun joined(pieces: List<Map<String, FloatTensor>>): Map<String, FloatTensor> =
            if (pieces.size == 1) pieces[0] else flow.outputs.keys.associateWith { name ->
                val parts = pieces.map { it[name] ?: throw BundleException("the decoder gives no $name") }
                val values = FloatArray(parts.sumOf { it.size })
                parts.fold(0) { at, part -> part.values.copyInto(values, at).let { at + part.size } }
                FloatTensor(flow.outputs.getValue(name).shape, values)
            }

        /** Puts in what a unit gave under the names of the state. */
        private fun rewrite(state: MutableMap<String, Tensor>, out: Map<String, FloatTensor>) {
            state.keys.filter { it in out }.forEach { state[it] = out.getValue(it).reshaped(state.getValue(it).shape) }
        }

        private fun scaled(scale: Float, x: FloatArray) = FloatArray(x.size) { scale * x[it] }
    }

    companion object {
        /** The calls of the denoiser, in their order. */
        fun asks(flow: Flow): List<Ask> = (0 until flow.intervals).flatMap { i ->
            val ends = if (flow.steps[i].rule == Rule.HEUN) listOf(i, i + 1) else listOf(i)
            ends.flatMap { at ->
                val t = flow.times[at]
                val call = Ask(at, t, isNull = false)
                if (flow.asksNull(flow.steps[at], t)) listOf(call, Ask(at, t, isNull = true)) else listOf(call)
            }
        }

        /** Whether a null call goes with a call: for guidance, or because its state goes on at all times. */
        private fun Flow.asksNull(step: Step, t: Float) = step.guidedAt(t) || (step.guided && state.isNotEmpty())
    }
}
