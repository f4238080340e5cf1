package dev.snapgen.core

import java.io.DataInputStream
import java.io.EOFException
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** Arrays of numpy's `.npy` files: float32, int32 and uint8 in C order, little endian. */
object Npy {
    private val MAGIC = "\u0093NUMPY".toByteArray(Charsets.ISO_8859_1)
    private val HEADER = Regex(
        "\\{'descr': '([^']*)', 'fortran_order': (True|False), 'shape': \\(([0-9, ]*)\\),? *\\}\\s*"
    )

    /** Reads a file. Raises [BundleException] where it is damaged, or holds another kind of numbers. */
    fun read(file: File): Tensor = try {
        DataInputStream(file.inputStream().buffered()).use { stream -> read(stream, file) }
    } catch (error: EOFException) {
        throw BundleException("${file.name} ends too early: it is damaged; copy the bundle again", error)
    }

    private fun read(stream: DataInputStream, file: File): Tensor {
        val magic = ByteArray(6).also { stream.readFully(it) }
        if (!magic.contentEquals(MAGIC)) throw BundleException("${file.name} is no .npy file")
        val major = stream.readUnsignedByte()
        stream.readUnsignedByte()
        val low = stream.readUnsignedByte() or (stream.readUnsignedByte() shl 8)
        val length =
            if (major == 1) low else low or (stream.readUnsignedByte() shl 16) or (stream.readUnsignedByte() shl 24)
        if (length < 0 || length > file.length()) throw BundleException("${file.name} has a damaged header")
        val header = String(ByteArray(length).also { stream.readFully(it) }, Charsets.UTF_8)
        val (descr, fortran, axes) = HEADER.matchEntire(header)?.destructured
            ?: throw BundleException("${file.name} has a header that this client does not know: $header")
        if (fortran == "True") throw BundleException("${file.name} is in Fortran order; C order was expected")
        val shape = axes.split(',').map { it.trim() }.filter { it.isNotEmpty() }.map { it.toInt() }
        val width = when (descr) {
            "<f4", "<i4" -> 4
            "|u1" -> 1
            else -> throw BundleException("${file.name} holds '$descr'; this client reads float32, int32 and uint8")
        }
        val elements = Tensor.elements(shape)
        if (elements * width > file.length()) throw EOFException()
        val bytes = ByteArray((elements * width).toInt()).also { stream.readFully(it) }
        val buffer = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN)
        return when (descr) {
            "<f4" -> FloatTensor(shape, FloatArray(elements.toInt()).also { buffer.asFloatBuffer().get(it) })
            "<i4" -> IntTensor(shape, IntArray(elements.toInt()).also { buffer.asIntBuffer().get(it) })
            else -> ByteTensor(shape, bytes)
        }
    }
}
