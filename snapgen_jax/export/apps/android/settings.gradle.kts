pluginManagement {
    repositories {
        google()
        mavenCentral()
        gradlePluginPortal()
    }
}

dependencyResolutionManagement {
    repositoriesMode.set(RepositoriesMode.FAIL_ON_PROJECT_REPOS)
    repositories {
        google()
        mavenCentral()
    }
}

rootProject.name = "snapgen"
include(":core", ":app")

// The desktop adapter needs a JDK of 22 or newer, which Android Studio does not bring: -Pdesktop adds it.
if (providers.gradleProperty("desktop").isPresent) include(":desktop")
