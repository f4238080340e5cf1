"""Networks to `.tflite`, into a verified bundle, and the client that runs it."""
