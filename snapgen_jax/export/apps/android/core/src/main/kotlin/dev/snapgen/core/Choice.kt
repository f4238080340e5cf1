package dev.snapgen.core

/** A processor, the precision that it is given, and how to load a network on it. */
class Candidate(val name: String, val precision: String, val loader: NetworkLoader)

/** Which candidate runs a unit; [reasons] say why those before it do not. */
class Chosen(val unit: String, val candidate: Candidate, val reasons: List<String>, val selfTest: SelfTest.Result) {
    override fun toString(): String {
        val why = if (reasons.isEmpty()) "" else " because ${reasons.joinToString("; ")}"
        return "$unit runs on ${candidate.name} in ${candidate.precision} ($selfTest)$why"
    }
}

/**
 * Loads every unit on the first candidate that can load it and that gives the recorded outputs of a recorded call. A
 * runtime may report full acceleration and compute garbage, so nothing but that call decides.
 *
 * [report] is told once for each unit.
 */
class Choice(val bundle: Bundle, val candidates: List<Candidate>, private val report: (Chosen) -> Unit = {}) {
    private val made = LinkedHashMap<String, Chosen>()

    init {
        require(candidates.isNotEmpty()) { "a choice needs a candidate" }
    }

    /** What was chosen so far, by unit. */
    val chosen: Map<String, Chosen> get() = made

    /** A unit, loaded. Raises [BundleException] with all reasons where no candidate can run it. */
    fun load(name: String): Network {
        made[name]?.let { return it.candidate.loader.load(bundle.unit(name, it.candidate.precision)) }
        val reasons = ArrayList<String>()
        for (candidate in candidates) {
            val unit = bundle.unit(name, candidate.precision)
            var network: Network? = null
            try {
                network = candidate.loader.load(unit)
                val result = SelfTest.run(bundle, unit, network)
                if (result.passed) {
                    Chosen(name, candidate, reasons, result).let {
                        made[name] = it
                        report(it)
                    }
                    return network
                }
                reasons += "${candidate.name} computes something else ($result)"
            } catch (error: Exception) {
                reasons += failure(candidate, error)
            } catch (error: LinkageError) { // the native library is not there, or not for this processor
                reasons += failure(candidate, error)
            }
            network?.close()
        }
        throw BundleException("the unit '$name' runs nowhere here: ${reasons.joinToString("; ")}")
    }

    private fun failure(candidate: Candidate, error: Throwable) =
        "${candidate.name} cannot run it: ${error.message ?: error.javaClass.simpleName}"
}

/** One recorded call of a unit, compared with what the network gives. */
object SelfTest {
    /** [error]: relative L2, the worst of the outputs; null where the bundle has no recorded call. */
    class Result(val error: Double?, val limit: Double?) {
        val passed: Boolean get() = error == null || limit == null || error <= limit

        override fun toString(): String = when {
            error == null || limit == null -> "not tested: the bundle has no recorded call"
            !error.isFinite() -> "self-test: not finite"
            else -> "self-test: off by %.1e, at most %.0e".format(error, limit)
        }
    }

    fun run(bundle: Bundle, unit: UnitFile, network: Network): Result {
        val limits = bundle.golden?.takeIf { it.has("self_test") }?.child("self_test")
        val folder = "self_test/${unit.name}"
        val recorded = unit.inputs.keys.all { bundle.hasGolden("$folder/inputs/$it") }
        if (limits == null || !limits.has(unit.precision) || !recorded) return Result(null, null)
        val inputs = unit.inputs.keys.associateWith { bundle.goldenArray("$folder/inputs/$it") }
        val out = network.run(inputs)
        val worst = unit.outputs.keys.maxOf { name ->
            val expected = bundle.goldenArray("$folder/outputs/$name") as FloatTensor
            out[name]?.let { relativeL2(it.values, expected.values) } ?: Double.POSITIVE_INFINITY
        }
        return Result(worst, limits.number(unit.precision))
    }
}
