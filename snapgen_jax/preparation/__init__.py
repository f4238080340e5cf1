"""Training data at scale: from anything to shards of images, and from these to what encoders make of them."""
