package dev.snapgen.core

/** Reads program.json, schema 3. Raises [BundleException] that names what is missing or unknown. */
object ProgramReader {
    const val SCHEMA = 3
    private val DTYPES = listOf("float32", "int32", "uint8")
    private val RULES = mapOf("euler" to Rule.EULER, "heun" to Rule.HEUN, "renoise" to Rule.RENOISE)
    private val NEEDED = listOf("unit", "rule", "prediction", "guidance")
    private val OPTIONAL = listOf("time", "native", "arrays", "scale", "context", "guidance_interval")
    private val RESERVED = listOf("latent", "time", "prediction")

    fun read(data: JsonObject): Program {
        val schema = if ("schema" in data) data.any("schema") else null
        if (schema != SCHEMA.toDouble()) {
            val newer = schema is Double && schema > SCHEMA
            val advice = if (newer) "update the app" else "export the bundle again"
            refuse("schema is ${shown(schema)}; this client knows $SCHEMA: $advice")
        }
        return when (val kind = data.any("kind")) {
            "flow" -> flow(data)
            "feed_forward" -> feedForward(data)
            else -> refuse("kind is ${shown(kind)}; this client knows flow, feed_forward")
        }
    }

    /** A rule by its name; raises [InputException] for another. */
    fun rule(name: String): Rule =
        RULES[name]
            ?: throw InputException("unknown sampling method '$name'; expected one of ${RULES.keys.joinToString()}")

    private fun feedForward(data: JsonObject): FeedForward {
        data.known(listOf("schema", "kind", "unit", "inputs", "outputs"), listOf("tokenizers"))
        val (inputs, outputs) = ends(data)
        return FeedForward(data.text("unit"), inputs, outputs, tokenizers(data, inputs))
    }

    private fun flow(data: JsonObject): Flow {
        data.known(
            listOf("schema", "kind", "inputs", "outputs", "latent_shape", "times", "step", "decoder"),
            listOf("tokenizers", "initial_scale", "shift", "steps", "contexts", "null_contexts", "state"),
        )
        val (inputs, outputs) = ends(data)
        val times = numbers(data, "times").values
        if (times.size < 2) refuse("`times` needs two entries at least")
        val contexts = data.optional("contexts")?.let { all -> all.keys.associateWith { all.texts(it) } } ?: emptyMap()
        val flow = Flow(
            inputs, outputs, tokenizers(data, inputs), data.ints("latent_shape"), times,
            if (data.has("initial_scale")) data.number("initial_scale").toFloat() else 1f,
            if (data.has("shift")) data.number("shift") else null,
            steps(data, times.size), !data.has("steps"), contexts, nullContexts(data, contexts), state(data, inputs),
            if (data.has("decoder")) decoder(data.child("decoder")) else null,
        )
        checkDecoder(flow)
        flow.check()
        return flow
    }

    private fun steps(data: JsonObject, times: Int): List<Step> {
        val common = data.child("step").known(emptyList(), NEEDED + OPTIONAL)
        if (!data.has("steps")) return step(common).let { step -> List(times) { step } }
        val differ = data.objects("steps")
        if (differ.size != times - 1 && differ.size != times) {
            refuse("$times times need ${times - 1} steps, or one more; got ${differ.size}")
        }
        return differ.map { entry ->
            entry.known(emptyList(), NEEDED + OPTIONAL)
            step(JsonObject(common.values + entry.values, entry.where))
        }
    }

    private fun step(entry: JsonObject): Step {
        entry.known(NEEDED, OPTIONAL)
        val interval =
            if (entry.has("guidance_interval")) numbers(entry, "guidance_interval").values else floatArrayOf(0f, 1f)
        if (interval.size != 2) entry.fail("guidance_interval has ${interval.size} entries; two times were expected")
        val rule = entry.any("rule")
        return Step(
            unit = entry.text("unit"),
            rule = RULES[rule] ?: entry.fail("rule is ${shown(rule)}; this client knows ${RULES.keys.joinToString()}"),
            prediction = prediction(entry.child("prediction")),
            guidance = numbers(entry, "guidance"),
            time = if (entry.has("time")) time(entry.child("time")) else null,
            native = if (entry.has("native")) entry.number("native") else null,
            arrays = entry.optional("arrays")?.let { all -> all.keys.associateWith { numbers(all, it) } } ?: emptyMap(),
            scale = if (entry.has("scale")) entry.number("scale").toFloat() else 1f,
            context = if (entry.has("context")) entry.text("context") else null,
            interval = interval[0] to interval[1],
        )
    }

    private fun prediction(entry: JsonObject): Prediction = when (val kind = entry.any("kind")) {
        "velocity" -> Prediction.Velocity.also { entry.known(listOf("kind")) }
        "x_0" -> Prediction.Clean(entry.known(listOf("kind", "t_min")).number("t_min").toFloat())
        "linear" -> entry.known(listOf("kind", "x", "out")).let {
            Prediction.Linear(it.number("x").toFloat(), it.number("out").toFloat())
        }
        else -> entry.fail("is ${shown(kind)}; this client knows velocity, x_0, linear")
    }

    private fun time(entry: JsonObject): TimeInput = when (val kind = entry.any("kind")) {
        "features" -> {
            entry.known(listOf("kind", "dim", "scale", "max_period", "order"))
            if (entry.text("order") != "cos,sin") entry.fail("has the order '${entry.text("order")}'; 'cos,sin'")
            TimeInput.Features(entry.int("dim"), entry.number("scale"), entry.number("max_period"))
        }
        "index" -> TimeInput.Index(entry.known(listOf("kind", "size")).int("size"))
        "values" -> TimeInput.Values(numbers(entry.known(listOf("kind", "values")), "values").values)
        else -> entry.fail("is ${shown(kind)}; this client knows features, index, values")
    }

    /** The entry "decoder" of a program. */
    fun decoder(entry: JsonObject): Decoder = when (val kind = entry.any("kind")) {
        "identity" -> Decoder.Identity(entry.number("scale").toFloat(), entry.number("shift").toFloat())
        "patch" -> {
            val patch = entry.int("patch")
            val scales = flatten(entry.any("frequency_scale")).second.asList()
            if (scales.size != patch * patch) entry.fail("has ${scales.size} frequency scales for patches of $patch")
            Decoder.Patch(patch, entry.number("scale"), entry.number("shift").toFloat(), scales)
        }
        "network" -> Decoder.Network(entry.text("unit"), if (entry.has("chunk")) entry.int("chunk") else null)
        else -> entry.fail("is ${shown(kind)}; this client knows identity, patch, network")
    }

    private fun checkDecoder(flow: Flow) {
        val outputs = flow.outputs
        when (val decoder = flow.decoder) {
            null -> {
                val latent = outputs["latent"]
                if (outputs.size != 1 || latent?.dtype != "float32" || latent.shape != flow.latentShape) {
                    refuse("without a decoder the output is a latent, float32 ${flow.latentShape}; got ${outputs.keys}")
                }
            }
            is Decoder.Network -> {
                val (chunk, frames) = decoder.chunk to flow.latentShape[0]
                if (chunk != null && (chunk < 1 || frames % chunk != 0)) {
                    refuse("the decoder's chunk $chunk does not divide $frames")
                }
            }
            else -> if (outputs.keys != setOf("image")) {
                refuse("a decoder without a unit gives 'image'; outputs are ${outputs.keys}")
            }
        }
    }

    private fun nullContexts(
        data: JsonObject, contexts: Map<String, List<String>>,
    ): Map<String, Map<String, ArraySpec>> {
        val entries = data.optional("null_contexts")?.children() ?: return emptyMap()
        entries.keys.firstOrNull { it !in contexts }?.let {
            refuse("null_contexts has '$it'; the contexts are ${contexts.keys}")
        }
        return entries.mapValues { (name, section) ->
            arrays(section, listOf("null")).onEach { (array, spec) ->
                if (spec.nullValue == null || spec.keeps) {
                    refuse("null_contexts.$name.$array needs a `null`, a number or an array")
                }
            }
        }
    }

    private fun state(data: JsonObject, inputs: Map<String, ArraySpec>): Map<String, ArraySpec> {
        val section = data.optional("state") ?: return emptyMap()
        return arrays(section, listOf("initial")).onEach { (name, spec) ->
            val initial = section.child(name).values["initial"]
            if (initial != "zeros") refuse("state.$name: initial is ${shown(initial)}; this client knows zeros")
            if (spec.dtype != "float32") refuse("state.$name: dtype is ${spec.dtype}; this client knows float32")
            if (name in inputs || name in RESERVED) {
                refuse("the state '$name' has the name of an input; give it another")
            }
        }
    }

    private fun ends(data: JsonObject): Pair<Map<String, ArraySpec>, Map<String, ArraySpec>> {
        val inputs = arrays(data.child("inputs"), listOf("null"))
        inputs.keys.firstOrNull { it in RESERVED }?.let {
            refuse("the input '$it' has the name of what the sampler gives; rename it")
        }
        return inputs to arrays(data.child("outputs"), emptyList())
    }

    private fun arrays(section: JsonObject, optional: List<String>): Map<String, ArraySpec> =
        section.children().mapValues { (name, entry) ->
            entry.known(listOf("shape", "dtype"), optional)
            val dtype = entry.any("dtype")
            if (dtype !in DTYPES) entry.fail("has dtype ${shown(dtype)}; this client knows ${DTYPES.joinToString()}")
            val spec = ArraySpec(name, entry.ints("shape"), dtype as String, entry.values["null"])
            if (spec.nullValue != null && !spec.keeps) spec.nullOf(null)
            spec
        }

    private fun tokenizers(data: JsonObject, inputs: Map<String, ArraySpec>): List<TokenizerSpec> {
        if (!data.has("tokenizers")) return emptyList()
        return data.objects("tokenizers").map { entry ->
            entry.known(listOf("file", "tokens", "begin", "end", "pad"), listOf("mask", "kind"))
            val spec = TokenizerSpec(
                entry.text("file"), entry.text("tokens"), entry.ints("begin"), entry.ints("end"), entry.int("pad"),
                if (entry.has("mask")) entry.text("mask") else null, if (entry.has("kind")) entry.text("kind") else "",
            )
            val tokens = row(entry, inputs, spec.tokens, "int32")
            if (spec.mask != null && row(entry, inputs, spec.mask, "float32").shape != tokens.shape) {
                entry.fail("makes ${spec.tokens} ${tokens.shape} and ${spec.mask}, which has another length")
            }
            if (spec.begin.size + spec.end.size >= tokens.shape[0]) {
                entry.fail("between ${spec.begin} and ${spec.end} leaves no room in ${tokens.shape[0]} tokens")
            }
            spec
        }
    }

    private fun row(entry: JsonObject, inputs: Map<String, ArraySpec>, name: String, dtype: String): ArraySpec =
        inputs[name]?.takeIf { it.dtype == dtype && it.shape.size == 1 }
            ?: entry.fail("makes '$name', which is no input of $dtype [L]")

    private fun numbers(entry: JsonObject, key: String): FloatTensor {
        val (shape, values) = flatten(entry.any(key))
        return FloatTensor(shape, FloatArray(values.size) { values[it].toFloat() })
    }

    private fun JsonObject.optional(key: String): JsonObject? = if (has(key)) child(key) else null

    private fun shown(value: Any?): String =
        if (value is Double && value == Math.rint(value)) "${value.toLong()}" else Json.kind(value)
}
