package android.graphics

import java.io.OutputStream

class Bitmap {
    enum class Config { ARGB_8888 }

    enum class CompressFormat { PNG }

    fun compress(format: CompressFormat, quality: Int, stream: OutputStream): Boolean = TODO()

    companion object {
        fun createBitmap(colors: IntArray, width: Int, height: Int, config: Config): Bitmap = TODO()
    }
}
