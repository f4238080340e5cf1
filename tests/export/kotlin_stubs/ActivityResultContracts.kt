package androidx.activity.result.contract

import android.net.Uri

abstract class ActivityResultContract<I, O>

class ActivityResultContracts {
    class CreateDocument(mimeType: String) : ActivityResultContract<String, Uri?>()
}
