package dev.snapgen.app

import android.graphics.Bitmap
import androidx.compose.foundation.Image
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.layout.safeDrawingPadding
import androidx.compose.foundation.rememberScrollState
import androidx.compose.foundation.verticalScroll
import androidx.compose.material3.Button
import androidx.compose.material3.LinearProgressIndicator
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Text
import androidx.compose.material3.TextButton
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.graphics.FilterQuality
import androidx.compose.ui.graphics.asImageBitmap
import androidx.compose.ui.layout.ContentScale
import androidx.compose.ui.unit.dp
import dev.snapgen.core.Flow
import kotlin.random.Random

/** Prompt, seed and steps; the picture; what is under way; and the report. */
@Composable
fun StudioScreen(studio: Studio, save: () -> Unit, share: (Bitmap) -> Unit) {
    Column(
        Modifier.safeDrawingPadding().padding(16.dp).verticalScroll(rememberScrollState()),
        verticalArrangement = Arrangement.spacedBy(8.dp),
    ) {
        Request(studio)
        when (val phase = studio.phase) {
            is Phase.Busy -> Busy(phase)
            is Phase.Failed -> Text(phase.why)
            is Phase.Ready -> {}
        }
        studio.picture?.let { Picture(it, save, share) }
        studio.report.forEach { Text(it) }
    }
}

@Composable
private fun Request(studio: Studio) {
    var prompt by rememberSaveable { mutableStateOf("") }
    var seed by rememberSaveable { mutableStateOf("0") }
    var steps by rememberSaveable { mutableStateOf("") }
    val busy = studio.phase is Phase.Busy
    val flow = studio.opened?.program as? Flow
    val ready = !busy && studio.opened != null
    OutlinedTextField(prompt, { prompt = it }, Modifier.fillMaxWidth(), label = { Text("Prompt") })
    Row(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
        OutlinedTextField(seed, { seed = it }, Modifier.weight(1f), label = { Text("Seed") }, singleLine = true)
        if (flow?.shift != null) {
            val label = "Steps (${flow.intervals})"
            OutlinedTextField(steps, { steps = it }, Modifier.weight(1f), label = { Text(label) }, singleLine = true)
        }
    }
    Row(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
        val (number, count) = seed.toLongOrNull() to steps.toIntOrNull()
        val whole = number != null && number in 0..0xFFFFFFFFL && (steps == "" || (count != null && count > 0))
        Button({ studio.draw(prompt, number!!, count) }, enabled = ready && whole) { Text("Draw") }
        TextButton({ seed = "${Random.nextLong(0, 0x100000000L)}" }) { Text("Other seed") }
        TextButton({ studio.cancel() }, enabled = busy) { Text("Cancel") }
        TextButton({ studio.check() }, enabled = ready) { Text("Check") }
    }
}

@Composable
private fun Busy(phase: Phase.Busy) {
    Text(phase.what)
    if (phase.share < 0) {
        LinearProgressIndicator(Modifier.fillMaxWidth())
    } else {
        LinearProgressIndicator(progress = { phase.share }, modifier = Modifier.fillMaxWidth())
    }
}

@Composable
private fun Picture(picture: Bitmap, save: () -> Unit, share: (Bitmap) -> Unit) {
    Image(
        picture.asImageBitmap(),
        contentDescription = "The picture",
        modifier = Modifier.fillMaxWidth(),
        contentScale = ContentScale.FillWidth,
        filterQuality = FilterQuality.None,
    )
    Row(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
        Button(save) { Text("Save") }
        Button({ share(picture) }) { Text("Share") }
    }
}
