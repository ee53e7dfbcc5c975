"""Pictures and videos: found, decoded, padded, tiled, turned into pixel values."""
