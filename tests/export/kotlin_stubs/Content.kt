package android.content

import android.content.res.AssetManager
import android.net.Uri
import java.io.File
import java.io.OutputStream

abstract class Context {
    val assets: AssetManager = TODO()
    val filesDir: File = TODO()
    val cacheDir: File = TODO()
    val packageName: String = TODO()
    val contentResolver: ContentResolver = TODO()
    fun getExternalFilesDir(type: String?): File? = TODO()
    fun startActivity(intent: Intent): Unit = TODO()
}

abstract class ContentResolver {
    fun openOutputStream(uri: Uri): OutputStream? = TODO()
}

class Intent(action: String) {
    fun setType(type: String?): Intent = TODO()
    fun putExtra(name: String, value: android.os.Parcelable?): Intent = TODO()
    fun addFlags(flags: Int): Intent = TODO()

    companion object {
        const val ACTION_SEND = "android.intent.action.SEND"
        const val EXTRA_STREAM = "android.intent.extra.STREAM"
        const val FLAG_GRANT_READ_URI_PERMISSION = 1
        fun createChooser(target: Intent, title: CharSequence?): Intent = TODO()
    }
}
