package dev.snapgen.core

/** The folder is not a bundle that this client can run, or a file in it is damaged. The message says what to change. */
class BundleException(message: String, cause: Throwable? = null) : RuntimeException(message, cause)

/** What the caller asked for does not fit the bundle: a seed out of bounds, an array of another shape. */
class InputException(message: String) : IllegalArgumentException(message)

/** The watcher of a run asked to stop. Nothing is lost but the picture that was being drawn. */
class CancelledException : RuntimeException("the run was cancelled")
