package androidx.compose.ui.graphics

import android.graphics.Bitmap

interface ImageBitmap

fun Bitmap.asImageBitmap(): ImageBitmap = TODO()

class FilterQuality {
    companion object {
        val None: FilterQuality = TODO()
        val Low: FilterQuality = TODO()
    }
}
