package dev.snapgen.app

import java.io.File

/**
 * Remembers that a GPU is being tried. A driver that crashes takes the app with it: the next start finds the [mark],
 * and leaves the GPU alone.
 */
class GpuTrial(private val mark: File) {
    private val crashed = mark.exists()

    /** Raises [IllegalStateException] where the last trial never ended. */
    fun begin() {
        check(!crashed) { "the app ended while it was tried; clear the app's data to try it again" }
        mark.createNewFile()
    }

    fun end() {
        if (!crashed) mark.delete()
    }
}
