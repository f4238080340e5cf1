// Kotlin's plugin is named here so that Android's built-in Kotlin takes this version and not its own.
plugins {
    alias(libs.plugins.android.application) apply false
    alias(libs.plugins.kotlin.jvm) apply false
    alias(libs.plugins.kotlin.compose) apply false
}
