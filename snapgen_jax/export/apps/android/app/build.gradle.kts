import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.compose)
}

android {
    namespace = "dev.snapgen.app"
    compileSdk = 37

    defaultConfig {
        applicationId = "dev.snapgen.app"
        minSdk = 24 // that of LiteRT's packages
        targetSdk = 36
        versionCode = 1
        versionName = "1.0"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") } // phones, and the emulator
    }

    buildFeatures { compose = true }

    // Copied to the app's folder once, and mapped from there: compressing them in the APK would only cost time.
    androidResources { noCompress += listOf("tflite", "npy") }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

kotlin {
    compilerOptions { jvmTarget.set(JvmTarget.JVM_17) }
}

dependencies {
    implementation(project(":core"))
    implementation(libs.litert)
    implementation(libs.litert.gpu)
    implementation(platform(libs.compose.bom))
    implementation(libs.compose.material3)
    implementation(libs.activity.compose)
    implementation(libs.core)
}
