package dev.snapgen.app

import android.content.Intent
import android.graphics.Bitmap
import android.net.Uri
import android.os.Bundle
import androidx.activity.ComponentActivity
import androidx.activity.compose.setContent
import androidx.activity.result.contract.ActivityResultContracts
import androidx.activity.viewModels
import androidx.compose.material3.MaterialTheme
import androidx.core.content.FileProvider
import java.io.File
import java.io.OutputStream

class MainActivity : ComponentActivity() {
    private val studio: Studio by viewModels()

    private val save = registerForActivityResult(ActivityResultContracts.CreateDocument("image/png")) { place: Uri? ->
        val picture = studio.picture
        if (place != null && picture != null) contentResolver.openOutputStream(place)?.use { write(picture, it) }
    }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContent {
            MaterialTheme { StudioScreen(studio, save = { save.launch("snapgen.png") }, share = { share(it) }) }
        }
    }

    private fun share(picture: Bitmap) {
        val file = File(cacheDir, "pictures/snapgen.png").also { it.parentFile?.mkdirs() }
        file.outputStream().use { write(picture, it) }
        val place = FileProvider.getUriForFile(this, "$packageName.pictures", file)
        val intent = Intent(Intent.ACTION_SEND)
            .setType("image/png")
            .putExtra(Intent.EXTRA_STREAM, place)
            .addFlags(Intent.FLAG_GRANT_READ_URI_PERMISSION)
        startActivity(Intent.createChooser(intent, null))
    }

    private fun write(picture: Bitmap, stream: OutputStream) {
        picture.compress(Bitmap.CompressFormat.PNG, 100, stream)
    }
}
