package dev.snapgen.desktop

import dev.snapgen.core.FloatTensor
import dev.snapgen.core.IntTensor
import dev.snapgen.core.Network
import dev.snapgen.core.NetworkLoader
import dev.snapgen.core.Shared
import dev.snapgen.core.Tensor
import dev.snapgen.core.UnitFile
import java.io.File
import java.lang.foreign.Arena
import java.lang.foreign.FunctionDescriptor
import java.lang.foreign.Linker
import java.lang.foreign.MemoryLayout
import java.lang.foreign.MemorySegment
import java.lang.foreign.SymbolLookup
import java.lang.foreign.ValueLayout.ADDRESS
import java.lang.foreign.ValueLayout.JAVA_FLOAT
import java.lang.foreign.ValueLayout.JAVA_INT
import java.lang.foreign.ValueLayout.JAVA_LONG
import java.lang.invoke.MethodHandle
import java.nio.file.Path

/** LiteRT on a desktop JVM: the C functions of `libLiteRt.so`, as in the ai-edge-litert 2.3.0 wheel, by Panama. */
class LiteRt(nativeFile: File) : NetworkLoader, AutoCloseable {
    private val arena = Arena.ofShared()
    private val open: (Path, Arena) -> SymbolLookup = SymbolLookup::libraryLookup
    private val lookup = open(nativeFile.toPath(), arena)
    private val functions = HashMap<String, MethodHandle>()
    private val environment = made { call("LiteRtCreateEnvironment", 0, MemorySegment.NULL, it) }

    private val files = Shared { path -> CompiledFile(this, environment, path) }

    override fun load(unit: UnitFile): Network =
        files.take(unit.file.path) { file -> LiteRtNetwork(this, environment, file, unit) { files.release(file.path) } }

    override fun close() {
        call("LiteRtDestroyEnvironment", environment)
        arena.close()
    }

    /** Calls a function that returns a status. Raises [IllegalStateException] where that is not 0. */
    internal fun check(name: String, vararg arguments: Any) {
        val status = call(name, *arguments)
        check(status == 0) { "$name failed with status $status" }
    }

    /** Calls a function of pointers (MemorySegment), int32 (Int) and size_t (Long). */
    internal fun call(name: String, vararg arguments: Any): Any? {
        val handle = functions.getOrPut(name) { handle(name, arguments) }
        return handle.invokeWithArguments(arguments.asList())
    }

    private fun handle(name: String, arguments: Array<out Any>): MethodHandle {
        val layouts = Array<MemoryLayout>(arguments.size) {
            when (arguments[it]) {
                is Int -> JAVA_INT
                is Long -> JAVA_LONG
                else -> ADDRESS
            }
        }
        val symbol = lookup.find(name).orElseThrow { IllegalStateException("the library has no function $name") }
        val nothing = name.startsWith("LiteRtDestroy")
        val type = if (nothing) FunctionDescriptor.ofVoid(*layouts) else FunctionDescriptor.of(JAVA_INT, *layouts)
        return Linker.nativeLinker().downcallHandle(symbol, type)
    }

    /** The pointer that a function writes. */
    internal fun made(write: (MemorySegment) -> Any?): MemorySegment = Arena.ofConfined().use { scratch ->
        val place = scratch.allocate(ADDRESS)
        val status = write(place)
        check(status == null || status == 0) { "LiteRT made nothing: status $status" }
        place.get(ADDRESS, 0)
    }

    /** The size_t that a function writes. */
    internal fun size(name: String, of: MemorySegment): Long = Arena.ofConfined().use { scratch ->
        val place = scratch.allocate(JAVA_LONG)
        check(name, of, place)
        place.get(JAVA_LONG, 0)
    }
}

/** One `.tflite` file compiled for the CPU. */
private class CompiledFile(
    private val lite: LiteRt, environment: MemorySegment, val path: String,
) : AutoCloseable {
    private val arena = Arena.ofShared()
    val model = lite.made { lite.call("LiteRtCreateModelFromFile", environment, arena.allocateFrom(path), it) }
    private val options = lite.made { lite.call("LiteRtCreateOptions", it) }
    val compiled: MemorySegment

    init {
        lite.check("LiteRtSetOptionsHardwareAccelerators", options, CPU)
        compiled = lite.made { lite.call("LiteRtCreateCompiledModel", environment, model, options, it) }
    }

    override fun close() {
        lite.call("LiteRtDestroyCompiledModel", compiled)
        lite.call("LiteRtDestroyOptions", options)
        lite.call("LiteRtDestroyModel", model)
        arena.close()
    }

    private companion object {
        const val CPU = 1 // kLiteRtHwAcceleratorCpu
    }
}

/** One signature of a file. Its buffers are made once. */
private class LiteRtNetwork(
    private val lite: LiteRt,
    private val environment: MemorySegment,
    file: CompiledFile,
    unit: UnitFile,
    private val release: () -> Unit,
) : Network {
    private class Buffer(val handle: MemorySegment, val bytes: Long, val shape: List<Int>)

    private val arena = Arena.ofShared()
    private val model = file.model
    private val compiled = file.compiled
    private val signatureIndex: Long
    private val inputs: Map<String, Buffer>
    private val outputs: Map<String, Buffer>
    private val inputHandles: MemorySegment
    private val outputHandles: MemorySegment

    init {
        signatureIndex = signatureIndex(unit.signature)
        val signature = lite.made { lite.call("LiteRtGetModelSignature", model, signatureIndex, it) }
        inputs = buffers("Input", signature, unit.inputs.mapValues { it.value.shape })
        outputs = buffers("Output", signature, unit.outputs.mapValues { it.value.shape })
        inputHandles = handles(inputs)
        outputHandles = handles(outputs)
    }

    override fun run(inputs: Map<String, Tensor>): Map<String, FloatTensor> {
        this.inputs.forEach { (name, buffer) -> write(buffer, inputs.getValue(name)) }
        lite.check(
            "LiteRtRunCompiledModel", compiled, signatureIndex, this.inputs.size.toLong(), inputHandles,
            outputs.size.toLong(), outputHandles,
        )
        return outputs.mapValues { (_, buffer) -> read(buffer) }
    }

    override fun close() {
        (inputs.values + outputs.values).forEach { lite.call("LiteRtDestroyTensorBuffer", it.handle) }
        arena.close()
        release()
    }

    private fun signatureIndex(key: String): Long {
        val count = lite.size("LiteRtGetNumModelSignatures", model)
        return (0 until count).first { index ->
            val signature = lite.made { lite.call("LiteRtGetModelSignature", model, index, it) }
            text { lite.call("LiteRtGetSignatureKey", signature, it) } == key
        }
    }

    /** In the order of the file, which is not that of the manifest. */
    private fun buffers(kind: String, signature: MemorySegment, shapes: Map<String, List<Int>>): Map<String, Buffer> {
        val count = lite.size("LiteRtGetNumSignature${kind}s", signature)
        return (0 until count).associate { index ->
            val name = text { lite.call("LiteRtGetSignature${kind}Name", signature, index, it) }
            val tensor = lite.made { lite.call("LiteRtGetSignature${kind}TensorByIndex", signature, index, it) }
            val type = arena.allocate(RANKED_TENSOR_TYPE, 8)
            lite.check("LiteRtGetRankedTensorType", tensor, type)
            val needs = lite.made {
                lite.call("LiteRtGetCompiledModel${kind}BufferRequirements", compiled, signatureIndex, index, it)
            }
            val buffer =
                lite.made { lite.call("LiteRtCreateManagedTensorBufferFromRequirements", environment, type, needs, it) }
            name to Buffer(buffer, lite.size("LiteRtGetTensorBufferPackedSize", buffer), shapes.getValue(name))
        }
    }

    private fun handles(buffers: Map<String, Buffer>): MemorySegment {
        val array = arena.allocate(ADDRESS, buffers.size.toLong())
        buffers.values.forEachIndexed { i, buffer -> array.setAtIndex(ADDRESS, i.toLong(), buffer.handle) }
        return array
    }

    private fun write(buffer: Buffer, tensor: Tensor) = locked(buffer, WRITE) { memory ->
        check(4L * tensor.size == buffer.bytes) { "${tensor.size} values for ${buffer.bytes} bytes" }
        when (tensor) {
            is FloatTensor -> MemorySegment.copy(tensor.values, 0, memory, JAVA_FLOAT, 0, tensor.size)
            is IntTensor -> MemorySegment.copy(tensor.values, 0, memory, JAVA_INT, 0, tensor.size)
            else -> throw IllegalArgumentException("networks take float32 and int32; got ${tensor.dtype}")
        }
    }

    private fun read(buffer: Buffer): FloatTensor {
        val values = FloatArray((buffer.bytes / 4).toInt())
        locked(buffer, READ) { memory -> MemorySegment.copy(memory, JAVA_FLOAT, 0, values, 0, values.size) }
        return FloatTensor(buffer.shape, values)
    }

    private fun locked(buffer: Buffer, mode: Int, use: (MemorySegment) -> Unit) {
        val memory = lite.made { lite.call("LiteRtLockTensorBuffer", buffer.handle, it, mode) }
        try {
            use(memory.reinterpret(buffer.bytes))
        } finally {
            lite.check("LiteRtUnlockTensorBuffer", buffer.handle)
        }
    }

    private fun text(write: (MemorySegment) -> Any?): String = lite.made(write).reinterpret(Long.MAX_VALUE).getString(0)

    private companion object {
        const val READ = 0 // kLiteRtTensorBufferLockModeRead
        const val WRITE = 1
        const val RANKED_TENSOR_TYPE = 72L // bytes of LiteRtRankedTensorType
    }
}
