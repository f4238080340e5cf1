"""What an example is: batch shapes, frozen encoders, conditions, decoding. One file is one kind."""
