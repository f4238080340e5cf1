package dev.snapgen.core

/** The golden examples of a bundle: what encoders give, the latent after each step, and the outputs. */
class GoldenSuite(private val bundle: Bundle) {
    private val facts = bundle.golden ?: throw BundleException("the bundle has no golden/golden.json: export it again")
    private val program = bundle.program

    val examples: Int get() = facts.int("examples")

    /** What needs no network: noise, tokens, the small cases, and runs whose networks are recorded. */
    fun withoutNetworks(): List<Check> {
        val small = if (bundle.hasFile("golden/conformance.json")) Conformance(bundle).checks() else emptyList()
        val recorded = if (bundle.hasGolden("predictions")) replays() else emptyList()
        return noise() + tokens() + small + recorded
    }

    /** The golden examples on networks, within the tolerances of a precision. */
    fun onNetworks(generator: Generator, precision: String, watcher: Watcher = Watcher.NONE): List<Check> {
        val limits = facts.child("tolerances").child(precision)
        return (0 until examples).flatMap { example ->
            val trace = generator.trace(inputs(example), noise(example), Options(), watcher)
            val name = "$precision golden $example"
            contexts(name, example, trace, limits) + latents(name, example, trace, limits) +
                outputs(name, example, trace, limits)
        }
    }

    private fun noise(): List<Check> = if (program !is Flow) emptyList() else (0 until examples).map { example ->
        Check.of("golden noise $example") {
            val (expected, seed) = noise(example)!! to facts.long("seed")
            val made = Noise.draw(seed, example.toLong(), expected.shape)
            val worst = made.values.indices.maxOf { Math.abs(made.values[it].toDouble() - expected.values[it]) }
            Check.below("golden noise $example", worst, NOISE)
        }
    }

    private fun tokens(): List<Check> = facts.texts("prompts").mapIndexed { example, prompt ->
        Check.of("golden tokens $example") {
            val wrong = bundle.tokenize(prompt).filter { (name, made) ->
                !same(made, bundle.goldenArray("inputs/$name").rowOf(example))
            }
            Check("golden tokens $example", if (wrong.isEmpty()) "equal" else "${wrong.keys} differ", wrong.isEmpty())
        }
    }

    private fun same(made: Tensor, expected: Tensor): Boolean = when (made) {
        is IntTensor -> expected is IntTensor && made.values.contentEquals(expected.values)
        is FloatTensor -> expected is FloatTensor && made.values.contentEquals(expected.values)
        is ByteTensor -> expected is ByteTensor && made.values.contentEquals(expected.values)
    }

    /** The sampler over recorded predictions: guidance, prediction rule, times and steps, apart from any network. */
    private fun replays(): List<Check> {
        val flow = program as? Flow ?: return emptyList()
        val predictions = bundle.goldenArray("predictions") as FloatTensor
        return (0 until predictions.shape[0]).map { example ->
            Check.of("golden replay $example") { replay(flow, predictions.row(example), example) }
        }
    }

    private fun replay(flow: Flow, predictions: FloatTensor, example: Int): Check {
        val record = Replay(flow, predictions, bundle.goldenArray("latents").rowOf(example) as FloatTensor)
        val units = Units(program.units().associateWith { name -> { record.network(name) } }, Residency.TOGETHER)
        try {
            Sampler(program, units, bundle.shapes()).run(inputs(example), noise(example), Options(), record)
        } catch (end: Replay.Finished) { // the decoder is a network, and not on record
        }
        val passed = record.steps == flow.intervals && record.worst <= REPLAY && record.worstTime <= TIME
        val finding = "latents off by %.1e, time by %.1e".format(record.worst, record.worstTime)
        return Check("golden replay $example", finding, passed)
    }

    private inner class Replay(
        private val flow: Flow, private val predictions: FloatTensor, private val expected: FloatTensor,
    ) : Watcher {
        private val asks = Sampler.asks(flow)
        private val times = if (bundle.hasGolden("time")) bundle.goldenArray("time") as FloatTensor else null
        private var asked = 0
        private var call = -1
        var steps = 0
        var worst = 0.0
        var worstTime = 0.0

        inner class Finished : RuntimeException("the last step is done")

        fun network(name: String) = object : Network {
            override fun run(inputs: Map<String, Tensor>): Map<String, FloatTensor> =
                if (flow.steps.any { it.unit == name }) denoise(inputs) else encode(name)

            override fun close() {}
        }

        private fun denoise(inputs: Map<String, Tensor>): Map<String, FloatTensor> {
            val ask = asks[asked++]
            if (!ask.isNull) call++
            val time = inputs["time"]
            if (times != null && time is FloatTensor) {
                val right = times.row(call).values
                for (i in right.indices) worstTime = Math.max(worstTime, Math.abs(right[i].toDouble() - time.values[i]))
            }
            return mapOf("prediction" to predictions.row(call).row(if (ask.isNull) 1 else 0))
        }

        /** What an encoder gave, or the decoder's call, which ends the replay. */
        private fun encode(name: String): Map<String, FloatTensor> {
            if (steps == flow.intervals) throw Finished()
            val outputs = bundle.unit(name, bundle.precisions.first()).outputs
            return outputs.mapValues { (_, spec) -> FloatTensor.zeros(spec.shape) } // the record does not look at it
        }

        override fun stepped(step: Int, steps: Int, latent: FloatTensor) {
            this.steps = step
            worst = Math.max(worst, relativeL2(latent.values, expected.row(step - 1).values))
        }
    }

    private fun contexts(name: String, example: Int, trace: Trace, limits: JsonObject): List<Check> {
        if (program !is Flow) return emptyList()
        return limits.child("contexts").keys.map { context ->
            val made = trace.contexts.getValue(context).filterKeys { it !in program.inputs }
            val worst = made.maxOfOrNull { (array, value) ->
                val expected = bundle.goldenArray("contexts/$context/$array").rowOf(example) as FloatTensor
                relativeL2((value as FloatTensor).values, expected.values)
            } ?: 0.0
            Check.below("$name context $context", worst, limits.child("contexts").number(context))
        }
    }

    private fun latents(name: String, example: Int, trace: Trace, limits: JsonObject): List<Check> {
        if (program !is Flow) return emptyList()
        val expected = bundle.goldenArray("latents").rowOf(example) as FloatTensor
        val allowed = limits.list("latents").map { it as Double }
        val errors = trace.latents.mapIndexed { i, latent -> relativeL2(latent.values, expected.row(i).values) }
        val worst =
            errors.indices.maxByOrNull { if (errors[it].isNaN()) Double.MAX_VALUE else errors[it] / allowed[it] }!!
        return listOf(Check.below("$name latent after step ${worst + 1}", errors[worst], allowed[worst]))
    }

    private fun outputs(name: String, example: Int, trace: Trace, limits: JsonObject): List<Check> =
        limits.child("outputs").children().map { (output, limit) ->
            val expected = bundle.goldenArray("outputs/$output").rowOf(example)
            val made = trace.outputs.getValue(output)
            if (made is FloatTensor) {
                val error = relativeL2(made.values, (expected as FloatTensor).values)
                Check.below("$name $output", error, limit.number("rel_l2"))
            } else {
                picture("$name $output", made as ByteTensor, expected as ByteTensor, limit)
            }
        }

    private fun picture(name: String, made: ByteTensor, expected: ByteTensor, limit: JsonObject): Check {
        val off = IntArray(made.size) { Math.abs(made.level(it) - expected.level(it)) }
        if ("max_grey" in limit) {
            return Check.below("$name, largest difference", off.max().toDouble(), limit.number("max_grey"))
        }
        val square = off.sumOf { it.toDouble() * it } / off.size
        return Check.below("$name, rms difference", Math.sqrt(square), limit.number("rms_grey"))
    }

    private fun inputs(example: Int): Map<String, Tensor> =
        program.inputs.keys.associateWith { bundle.goldenArray("inputs/$it").rowOf(example) }

    private fun noise(example: Int): FloatTensor? =
        if (program is Flow) bundle.goldenArray("noise").rowOf(example) as FloatTensor else null

    private fun Bundle.hasFile(name: String) = java.io.File(folder, name).isFile

    private companion object {
        const val NOISE = 1e-6
        const val REPLAY = 1e-5
        const val TIME = 1e-4
    }
}
