package com.google.ai.edge.litert

import android.content.Context

enum class Accelerator { NONE, CPU, GPU, NPU }

abstract class JniHandle : AutoCloseable {
    override fun close(): Unit = TODO()
}

class Environment private constructor() : JniHandle() {
    enum class Option { CompilerPluginLibraryDir, DispatchLibraryDir }

    fun getAvailableAccelerators(): Set<Accelerator> = TODO()

    companion object {
        fun create(context: Context, options: Map<Option, String> =
            mapOf(), enableCompilerCache: Boolean = true): Environment = TODO()
    }
}

class TensorBuffer private constructor() : JniHandle() {
    fun writeFloat(data: FloatArray): Unit = TODO()
    fun writeInt(data: IntArray): Unit = TODO()
    fun readFloat(): FloatArray = TODO()
}

class CompiledModel private constructor() : JniHandle() {
    data class CpuOptions(
        val numThreads: Int? = null, val xnnPackFlags: Int? = null, val xnnPackWeightCachePath: String? = null,
    )

    class GpuOptions(val precision: Precision? = null) {
        enum class Precision { DEFAULT, FP16, FP32 }
    }

    class Options(vararg val accelerators: Accelerator) {
        var cpuOptions: CpuOptions? = null
        var gpuOptions: GpuOptions? = null
    }

    fun createInputBuffer(inputName: String, signature: String? = null): TensorBuffer = TODO()
    fun createOutputBuffer(outputName: String, signature: String? = null): TensorBuffer = TODO()
    fun run(inputs: Map<String, TensorBuffer>, outputs: Map<String, TensorBuffer>, signature: String? =
        null): Unit = TODO()

    companion object {
        fun create(filePath: String, options: Options, optionalEnv: Environment? = null): CompiledModel = TODO()
    }
}
