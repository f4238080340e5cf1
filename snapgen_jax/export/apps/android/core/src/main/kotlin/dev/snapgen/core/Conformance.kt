package dev.snapgen.core

/** One thing that was looked at: its name, what was found and expected, and whether it holds. */
class Check(val name: String, val finding: String, val passed: Boolean) {
    override fun toString() = "${if (passed) "ok  " else "FAIL"}  $name: $finding"

    companion object {
        fun below(name: String, value: Double, limit: Double) =
            Check(name, "%.3g, at most %.3g".format(value, limit), value <= limit) // NaN is not below

        /** A check that may raise, as one that fails. */
        fun of(name: String, look: () -> Check): Check = try {
            look()
        } catch (error: RuntimeException) {
            Check(name, error.message ?: error.javaClass.simpleName, false)
        }
    }
}

/** The small cases of golden/conformance.json: noise, time features, tokens, codecs, rounding, and runs on record. */
class Conformance(private val bundle: Bundle) {
    private val cases = bundle.json("golden/conformance.json")
    private val tolerances = cases.child("tolerances")

    fun checks(): List<Check> =
        each("noise", ::noise) + each("time_features", ::timeFeatures) + each("tokenizer", ::tokenizer) +
            each("codec", ::codec) + each("rounding", ::rounding) + each("runs", ::run)

    private fun each(section: String, look: (JsonObject) -> Check): List<Check> =
        cases.objects(section).mapIndexed { i, case -> Check.of("conformance $section $i") { look(case) } }

    private fun noise(case: JsonObject): Check {
        val expected = floats(case)
        val made = Noise.draw(case.long("seed"), case.long("index"), expected.shape)
        return Check.below(case.where, furthest(made.values, expected.values), limit("noise"))
    }

    private fun timeFeatures(case: JsonObject): Check {
        val time = case.child("time")
        val spec = TimeInput.Features(time.int("dim"), time.number("scale"), time.number("max_period"))
        val made = Formulas.timeFeatures(case.number("t").toFloat(), spec)
        return Check.below(case.where, furthest(made.values, values(case.list("values"))), limit("time_features"))
    }

    private fun tokenizer(case: JsonObject): Check {
        val tokenizer = bundle.tokenizer(case.text("file"))
        val frame =
            TokenizerSpec(case.text("file"), "tokens", case.ints("begin"), case.ints("end"), case.int("pad"), null, "")
        val prompt = case.text("prompt")
        val (tokens, mask) = tokenizer.frame(prompt, frame, case.int("length"))
        val ids = tokenizer.encode(prompt).asList()
        val same = ids == case.ints("ids") && tokens.values.asList() == case.ints("tokens") &&
            mask.values.contentEquals(values(case.list("mask")))
        val finding = if (same) "${ids.size} ids" else "\"$prompt\" gives $ids, not ${case.ints("ids")}"
        return Check(case.where, finding, same)
    }

    private fun codec(case: JsonObject): Check {
        val decoder = ProgramReader.decoder(case.child("decoder"))
        val (latent, image) = floats(case.child("latent")) to floats(case.child("image"))
        val made = Formulas.decode(latent, decoder)
        if (made.shape != image.shape) return Check(case.where, "shape ${made.shape}, not ${image.shape}", false)
        return Check.below(case.where, furthest(levels(made), image.values), limit("codec"))
    }

    private fun rounding(case: JsonObject): Check {
        val (pixels, grey) = values(case.list("pixels")) to values(case.list("grey"))
        val made = Formulas.greyLevels(FloatTensor(listOf(pixels.size), pixels))
        return Check.below(case.where, furthest(levels(made), grey), limit("rounding"))
    }

    private fun run(case: JsonObject): Check {
        val limits = tolerances.child("runs")
        val program = ProgramReader.read(JsonObject(case.child("program").values, "program.json"))
        val record = Record(case, limits)
        val shapes = case.child("units").children().mapValues { (_, unit) ->
            unit.child("inputs").let { it.keys.associateWith(it::ints) }
        }
        val units = Units(shapes.keys.associateWith { name -> { record.network(name) } }, Residency.TOGETHER)
        val inputs = program.inputs.mapValues { (name, spec) -> typed(case.child("inputs").child(name), spec.dtype) }
        val options = options(case.child("options"))
        val noise =
            (program as? Flow)?.let { Noise.draw(case.long("seed"), case.long("index"), options.of(it).noiseShape()) }
        val trace = Sampler(program, units, shapes).run(inputs, noise, options)
        val why = record.complaint() ?: results(case, limits, program, trace)
        return Check("${case.where}, ${case.text("name")}", why ?: "${record.size} calls", why == null)
    }

    /** Why latents or outputs are wrong; null where they are right. */
    private fun results(case: JsonObject, limits: JsonObject, program: Program, trace: Trace): String? {
        if (case.has("latents")) {
            val made = trace.latents.flatMap { it.values.asList() }.toFloatArray()
            val error = relativeL2(made, floats(case.child("latents")).values)
            if (!(error <= limits.number("latents_rel_l2"))) return "the latents are off by %.2e".format(error)
        }
        for (name in program.outputs.keys) {
            val expected = floats(case.child("outputs").child(name)).values
            when (val made = trace.outputs.getValue(name)) {
                is ByteTensor -> furthest(levels(made), expected).let {
                    if (!(it <= limits.number("grey_abs"))) return "$name is off by $it grey levels"
                }
                is FloatTensor -> relativeL2(made.values, expected).let {
                    if (!(it <= limits.number("outputs_rel_l2"))) return "$name is off by %.2e".format(it)
                }
                is IntTensor -> return "$name is int32"
            }
        }
        return null
    }

    private fun options(entry: JsonObject) = Options(
        steps = if (entry.has("steps")) entry.int("steps") else null,
        guidance = if (entry.has("guidance")) flatten(entry.any("guidance")).let { (shape, values) ->
            FloatTensor(shape, FloatArray(values.size) { values[it].toFloat() })
        } else null,
        method = if (entry.has("method")) entry.text("method") else null,
        guidanceInterval = if (entry.has("guidance_interval")) {
            values(entry.list("guidance_interval")).let { it[0] to it[1] }
        } else null,
    )

    private fun limit(section: String) = tolerances.child(section).number("abs")

    /** The recorded calls of a run, in place of its networks: each must be given what is on record. */
    private class Record(case: JsonObject, private val limits: JsonObject) {
        private val calls = case.objects("calls")
        private var next = 0
        private val complaints = ArrayList<String>()

        val size: Int get() = calls.size

        fun complaint(): String? = complaints.firstOrNull()
            ?: if (next < calls.size) "$next calls were made of ${calls.size}" else null

        fun network(name: String) = object : Network {
            override fun run(inputs: Map<String, Tensor>): Map<String, FloatTensor> {
                val call = calls.getOrNull(next++) ?: throw InputException("more than ${calls.size} calls were made")
                if (call.text("unit") != name) {
                    throw InputException("call $next is of ${call.text("unit")}, not of $name")
                }
                val expected = call.child("inputs")
                if (inputs.keys != expected.keys) {
                    complaints += "call $next was given ${inputs.keys}, not ${expected.keys}"
                }
                inputs.forEach { (input, array) -> compare(input, array, floats(expected.child(input))) }
                return call.child("outputs").children().mapValues { floats(it.value) }
            }

            override fun close() {}
        }

        private fun compare(name: String, array: Tensor, expected: FloatTensor) {
            val values = when (array) {
                is FloatTensor -> array.values
                is IntTensor -> FloatArray(array.size) { array.values[it].toFloat() }
                is ByteTensor -> levels(array)
            }
            val error = if (name == "time") furthest(values, expected.values) else relativeL2(values, expected.values)
            val limit = limits.number(if (name == "time") "time_abs" else "inputs_rel_l2")
            if (array.shape != expected.shape || !(error <= limit)) {
                complaints += "the input $name of call $next has shape ${array.shape} and is off by %.2e".format(error)
            }
        }
    }

    private companion object {
        fun values(list: List<*>) = FloatArray(list.size) { (list[it] as Double).toFloat() }

        /** {"shape", "values"} as float32. */
        fun floats(entry: JsonObject) = FloatTensor(entry.ints("shape"), values(entry.list("values")))

        fun typed(entry: JsonObject, dtype: String): Tensor = floats(entry).let { floats ->
            when (dtype) {
                "float32" -> floats
                "int32" -> IntTensor(floats.shape, IntArray(floats.size) { floats.values[it].toInt() })
                else -> ByteTensor(floats.shape, ByteArray(floats.size) { floats.values[it].toInt().toByte() })
            }
        }

        fun levels(image: ByteTensor) = FloatArray(image.size) { image.level(it).toFloat() }

        /** The largest absolute difference; infinite where the sizes differ or a value is not finite. */
        fun furthest(value: FloatArray, reference: FloatArray): Double {
            if (value.size != reference.size) return Double.POSITIVE_INFINITY
            val worst = value.indices.maxOfOrNull { Math.abs(value[it].toDouble() - reference[it]) } ?: 0.0
            return if (worst.isNaN()) Double.POSITIVE_INFINITY else worst
        }
    }
}
