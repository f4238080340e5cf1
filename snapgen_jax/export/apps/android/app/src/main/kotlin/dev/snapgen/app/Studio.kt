package dev.snapgen.app

import android.app.Application
import android.graphics.Bitmap
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.setValue
import androidx.lifecycle.AndroidViewModel
import com.google.ai.edge.litert.Environment
import dev.snapgen.core.Bundle
import dev.snapgen.core.BundleCopy
import dev.snapgen.core.CancelledException
import dev.snapgen.core.Choice
import dev.snapgen.core.Generator
import dev.snapgen.core.GoldenSuite
import dev.snapgen.core.Options
import dev.snapgen.core.Residency
import dev.snapgen.core.Watcher
import java.io.File
import java.util.concurrent.Executors

/** What the screen shows. */
sealed interface Phase {
    /** Something long is under way; [share] of it from 0 to 1, below 0 where nobody knows. */
    class Busy(val what: String, val share: Float) : Phase

    data object Ready : Phase

    class Failed(val why: String) : Phase
}

/** Holds the networks and draws, on one thread of its own. It outlives a turn of the screen. */
class Studio(application: Application) : AndroidViewModel(application) {
    var phase: Phase by mutableStateOf(Phase.Busy("Opening the bundle", -1f))
        private set
    var picture: Bitmap? by mutableStateOf(null)
        private set

    /** On what the networks run and why, and the report of a check. */
    var report: List<String> by mutableStateOf(emptyList())
        private set
    var opened: Bundle? by mutableStateOf(null)
        private set

    @Volatile private var cancelled = false
    private val thread = Executors.newSingleThreadExecutor()
    private val trial = GpuTrial(File(application.filesDir, "gpu-on-trial"))
    private var environment: Environment? = null
    private var generator: Generator? = null

    init {
        work { open() }
    }

    fun draw(prompt: String, seed: Long, steps: Int?) = work {
        val image = generator!!.generate(prompt, seed, options = Options(steps = steps), watcher = Told("Drawing"))
        picture = Bitmap.createBitmap(image.argb(), image.width, image.height, Bitmap.Config.ARGB_8888)
    }

    /** Ends the drawing before its next call of a network. */
    fun cancel() {
        cancelled = true
    }

    /** Compares all golden examples on this phone: what to send to whoever made the bundle. */
    fun check() = work {
        val made = generator!!
        val suite = GoldenSuite(made.bundle)
        val precision = checked(made.choice)
        val checks = suite.withoutNetworks() + suite.onNetworks(made, precision, Told("Checking"))
        report = made.choice.chosen.values.map { "$it" } +
            "${checks.count { it.passed }} of ${checks.size} checks passed (tolerances of $precision)" +
            checks.filter { !it.passed }.map { "$it" }
    }

    /** The coarsest precision that a network runs in: its tolerances hold for all. */
    private fun checked(choice: Choice): String {
        val used = choice.chosen.values.map { it.candidate.precision }
        return listOf("mixed", "int8", "f16", "f32").first { it in used }
    }

    private fun open() {
        val bundle = Bundle(folder())
        val made = Environment.create(getApplication<Application>()).also { environment = it }
        phase = Phase.Busy("Loading and testing the networks", -1f)
        val choice = Choice(bundle, LiteRtLoader.candidates(bundle, made, trial)) {
            trial.end()
            report = report + "$it"
        }
        generator = Generator(bundle, choice, residency(bundle))
        opened = bundle
    }

    /** Large bundles hold one network at a time, as a phone ends apps that take too much. */
    private fun residency(bundle: Bundle): Residency {
        val bytes =
            bundle.program.units().sumOf { bundle.unit(it, bundle.precision(listOf("f16", "f32"))).file.length() }
        return if (bytes > 500_000_000L) Residency.IN_TURN else Residency.TOGETHER
    }

    /** The bundle that was pushed to the phone, else the one in the APK, copied out of it once. */
    private fun folder(): File {
        val application = getApplication<Application>()
        val pushed = application.getExternalFilesDir(null)?.let { File(it, "bundle") }
        if (pushed != null && File(pushed, "manifest.json").isFile) return pushed
        val folder = File(application.filesDir, "bundle")
        BundleCopy.refresh(folder, { application.assets.open("bundle/$it") }) {
            phase = Phase.Busy("Unpacking the bundle", it)
        }
        return folder
    }

    private fun work(job: () -> Unit) {
        cancelled = false
        thread.execute {
            phase = try {
                job()
                Phase.Ready
            } catch (error: CancelledException) {
                Phase.Ready
            } catch (error: Exception) {
                Phase.Failed(error.message ?: error.javaClass.simpleName)
            } catch (error: OutOfMemoryError) {
                Phase.Failed("The phone has too little memory for this bundle")
            } finally {
                trial.end()
            }
        }
    }

    private inner class Told(private val what: String) : Watcher {
        override val cancelled get() = this@Studio.cancelled

        override fun progressed(done: Int, total: Int) {
            phase = Phase.Busy(what, done.toFloat() / total)
        }
    }

    override fun onCleared() {
        cancelled = true
        thread.execute {
            generator?.close()
            environment?.close()
        }
        thread.shutdown()
    }
}
