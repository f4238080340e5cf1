package dev.snapgen.core

import java.io.File
import java.io.IOException
import java.io.InputStream
import java.security.MessageDigest

/** Copies a bundle out of where no file can be mapped, such as an APK, and checks every file on the way. */
object BundleCopy {
    /**
     * Makes [folder] the bundle that [open] reads by the names of its files; does nothing where it is that already.
     *
     * It is written beside its place and moved when it is whole. [progress]: the share of all bytes, 0 to 1. Raises
     * [BundleException] where a file is missing or is not the one that was exported.
     */
    fun refresh(folder: File, open: (String) -> InputStream, progress: (Float) -> Unit = {}) {
        val manifest = try {
            open(MANIFEST).use { it.readBytes() }
        } catch (error: IOException) {
            throw BundleException("there is no bundle to open: neither in the app nor on the phone", error)
        }
        val present = File(folder, MANIFEST)
        if (present.isFile && present.readBytes().contentEquals(manifest)) return
        val files = Json.parseObject(manifest.toString(Charsets.UTF_8), MANIFEST).child("files").children()
        val total = files.values.sumOf { it.long("bytes") }
        if (folder.absoluteFile.parentFile.usableSpace < total) {
            throw BundleException("the bundle needs ${total / 1_000_000 + 1} MB of storage; free some and start again")
        }
        val part = File(folder.absoluteFile.parentFile, folder.name + ".part")
        part.deleteRecursively()
        var done = 0L
        for ((name, expected) in files) {
            Bundle.requireInside(name)
            val target = File(part, name).also { it.parentFile.mkdirs() }
            copy(name, open, target, expected.text("sha256"))
            done += expected.long("bytes")
            progress(if (total == 0L) 1f else done.toFloat() / total)
        }
        File(part, MANIFEST).writeBytes(manifest)
        folder.deleteRecursively()
        if (!part.renameTo(folder)) throw BundleException("$part cannot be moved to $folder")
    }

    private fun copy(name: String, open: (String) -> InputStream, target: File, expected: String) {
        val digest = MessageDigest.getInstance("SHA-256")
        try {
            open(name).use { source ->
                target.outputStream().use { out ->
                    val block = ByteArray(1 shl 16)
                    while (true) {
                        val count = source.read(block)
                        if (count < 0) break
                        digest.update(block, 0, count)
                        out.write(block, 0, count)
                    }
                }
            }
        } catch (error: IOException) {
            throw BundleException("$name cannot be copied: ${error.message}", error)
        }
        val found = Bundle.hex(digest.digest())
        if (found != expected) {
            throw BundleException("$name is not the file that was exported (SHA-256 $found): build the app again")
        }
    }

    private const val MANIFEST = "manifest.json"
}
