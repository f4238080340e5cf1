package dev.snapgen.app

import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import com.google.ai.edge.litert.Environment
import dev.snapgen.core.Bundle
import dev.snapgen.core.Candidate
import dev.snapgen.core.FloatTensor
import dev.snapgen.core.IntTensor
import dev.snapgen.core.Network
import dev.snapgen.core.NetworkLoader
import dev.snapgen.core.Shared
import dev.snapgen.core.Tensor
import dev.snapgen.core.UnitFile

/** Networks on LiteRT's CompiledModel; those of one file share one. */
class LiteRtLoader(
    private val environment: Environment,
    private val options: () -> CompiledModel.Options,
) : NetworkLoader {
    private val models = Shared { path -> CompiledModel.create(path, options(), environment) }

    override fun load(unit: UnitFile): Network =
        models.take(unit.file.path) { model -> LiteRtNetwork(model, unit) { models.release(unit.file.path) } }

    companion object {
        private val ON_GPU = listOf("f16", "f32")
        private val ON_CPU = listOf("mixed", "int8", "f16", "f32")

        /**
         * The GPU in half precision, the GPU in single precision, then the CPU.
         *
         * The GPU is asked for alone: `Options(GPU, CPU)` runs on the CPU, in silence, whatever the GPU cannot do, and
         * all of it where the package litert-gpu is missing.
         */
        fun candidates(bundle: Bundle, environment: Environment, trial: GpuTrial): List<Candidate> {
            val half = { CompiledModel.Options(Accelerator.GPU) }
            val single = {
                CompiledModel.Options(Accelerator.GPU).apply {
                    gpuOptions = CompiledModel.GpuOptions(precision = CompiledModel.GpuOptions.Precision.FP32)
                }
            }
            val cpu = {
                CompiledModel.Options(Accelerator.CPU).apply {
                    val threads = Runtime.getRuntime().availableProcessors().coerceAtMost(4)
                    cpuOptions = CompiledModel.CpuOptions(numThreads = threads)
                }
            }
            val present = Accelerator.GPU in environment.getAvailableAccelerators()
            fun gpu(name: String, options: () -> CompiledModel.Options): Candidate {
                val loader = LiteRtLoader(environment, options)
                return Candidate(name, bundle.precision(ON_GPU)) { unit ->
                    check(present) {
                        "LiteRT has no GPU accelerator (litert-gpu is not in the app, or not for this phone)"
                    }
                    trial.begin()
                    loader.load(unit)
                }
            }
            val onCpu = Candidate("the CPU", bundle.precision(ON_CPU), LiteRtLoader(environment, cpu))
            return listOf(gpu("the GPU", half), gpu("the GPU in single precision", single), onCpu)
        }
    }
}

/** One signature. Its buffers are made once, by its names: the file's order is not the manifest's. */
private class LiteRtNetwork(
    private val model: CompiledModel, private val unit: UnitFile, private val release: () -> Unit,
) : Network {
    private val inputs = unit.inputs.keys.associateWith { model.createInputBuffer(it, unit.signature) }
    private val outputs = unit.outputs.keys.associateWith { model.createOutputBuffer(it, unit.signature) }

    override fun run(inputs: Map<String, Tensor>): Map<String, FloatTensor> {
        for ((name, buffer) in this.inputs) {
            when (val tensor = inputs.getValue(name)) {
                is FloatTensor -> buffer.writeFloat(tensor.values)
                is IntTensor -> buffer.writeInt(tensor.values)
                else -> throw IllegalArgumentException("networks take float32 and int32; got ${tensor.dtype}")
            }
        }
        model.run(this.inputs, outputs, unit.signature)
        return outputs.mapValues { (name, buffer) ->
            val shape = unit.outputs.getValue(name).shape
            val values = buffer.readFloat()
            val size = Tensor.elements(shape).toInt()
            check(values.size >= size) { "${unit.name} gives ${values.size} values of $name; $size were expected" }
            FloatTensor(shape, if (values.size == size) values else values.copyOf(size)) // some buffers are padded
        }
    }

    override fun close() {
        (inputs.values + outputs.values).forEach { it.close() }
        release()
    }
}
