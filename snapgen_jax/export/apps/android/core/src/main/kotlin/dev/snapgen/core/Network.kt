package dev.snapgen.core

import java.io.File

/** A named array of a network's file. */
class TensorSpec(val shape: List<Int>, val dtype: String)

/** One `.tflite` file of a bundle, and the signature in it that is run. Several units may be signatures of one file. */
class UnitFile(
    val name: String,
    val precision: String,
    val file: File,
    val signature: String,
    val inputs: Map<String, TensorSpec>,
    val outputs: Map<String, TensorSpec>,
)

/** A loaded network. It is called by one thread at a time. */
interface Network : AutoCloseable {
    /** Float32 and int32 arrays by their names in, float32 arrays by their names out, in the shapes of the file. */
    fun run(inputs: Map<String, Tensor>): Map<String, FloatTensor>
}

/**
 * Loads a network from its file, on one kind of processor. Raises any exception where that cannot be done.
 *
 * A loader that lives as long as its networks holds a file once, however many of its signatures are loaded: [Shared].
 */
fun interface NetworkLoader {
    fun load(unit: UnitFile): Network
}

/** What loaded networks have in common, by its key, and which is closed with the last of them. */
class Shared<T : AutoCloseable>(private val make: (String) -> T) {
    private class Held<T>(val value: T, var users: Int)

    private val held = HashMap<String, Held<T>>()

    /** What [use] makes of the value of a key; whoever gets it calls [release] once. */
    fun <R> take(key: String, use: (T) -> R): R {
        val one = held.getOrPut(key) { Held(make(key), 0) }
        one.users += 1
        return try {
            use(one.value)
        } catch (error: Throwable) {
            release(key)
            throw error
        }
    }

    fun release(key: String) {
        val one = held.getValue(key)
        one.users -= 1
        if (one.users == 0) {
            held.remove(key)
            one.value.close()
        }
    }
}

/** Whether all networks are in memory at once, or each only until one of another file is called. */
enum class Residency { TOGETHER, IN_TURN }

/** The networks of a bundle by name, loaded TOGETHER at once, or IN_TURN when they are called; [file] is that of one. */
class Units(
    private val load: Map<String, () -> Network>,
    private val residency: Residency,
    private val file: (String) -> String = { it },
) : AutoCloseable {
    private val held = LinkedHashMap<String, Network>()

    init {
        if (residency == Residency.TOGETHER) {
            try {
                load.forEach { (name, make) -> held[name] = make() }
            } catch (error: Throwable) {
                close()
                throw error
            }
        }
    }

    fun call(name: String, inputs: Map<String, Tensor>): Map<String, FloatTensor> {
        val network = held[name] ?: run {
            val make = load[name]
                ?: throw BundleException("the bundle has no unit '$name'; it has ${load.keys.joinToString()}")
            if (held.keys.any { file(it) != file(name) }) close() // first: two at once would be what this avoids
            make().also { held[name] = it }
        }
        return network.run(inputs)
    }

    override fun close() {
        held.values.forEach { it.close() }
        held.clear()
    }
}
